#include "chain.h"

#include <algorithm>
#include <cmath>

#include "rotation.h"

namespace polylora::bench {
namespace {

constexpr int64_t kMinCalls = 20;
constexpr int64_t kAlign = 256;
constexpr uint64_t kSeedW = 101;
constexpr uint64_t kSeedX = 102;

}  // namespace

Layer after_gemm(const Implementation& run) {
  return [run](int64_t call, cudaStream_t stream, const std::function<void()>& gemm) {
    gemm();
    check(run(call, stream), "the op in a chain");
  };
}

Chain::Chain(const Problem& problem, const Cublas& cublas, const Device& device, cudaStream_t stream)
    : problem_(problem), cublas_(cublas) {
  const Case& c = problem.shape();
  base_bytes_ = (c.width() * c.k * kElementBytes + kAlign - 1) / kAlign * kAlign;
  bases_ = std::max<int64_t>(2, (kColdL2s * device.l2_bytes + base_bytes_ - 1) / base_bytes_);
  w_ = DeviceBuffer(bases_ * base_bytes_, "base weights");
  x_ = DeviceBuffer(c.rows * c.k * kElementBytes, "x of the base layers");
  fill_random(w_.as<void>(), w_.bytes() / kElementBytes, problem.dtype(), 1 / std::sqrt(static_cast<double>(c.k)),
              kSeedW, stream);
  fill_random(x_.as<void>(), x_.bytes() / kElementBytes, problem.dtype(), 1, kSeedX, stream);
}

void Chain::enqueue_base(int64_t call) const {
  const Case& c = problem_.shape();
  const void* x = problem_.op() == Op::kLinear ? problem_.x(call) : x_.as<void>();
  cublas_.gemm(problem_.dtype(), x, w_.at(call % bases_ * base_bytes_), problem_.y(call), c.rows, c.width(), c.k);
}

void Chain::enqueue(const Layer& layer, int64_t call, cudaStream_t stream) const {
  layer(call, stream, [&] { enqueue_base(call); });
}

Verdict Chain::verify_chain(const Layer& layer, cudaStream_t stream) const {
  constexpr int64_t kLayers = 2;
  const Case& c = problem_.shape();
  const int64_t y_bytes = c.rows * c.width() * kElementBytes;
  DeviceBuffer y_base(y_bytes, "y of the base layer");
  DeviceBuffer delta(c.rows * c.width() * static_cast<int64_t>(sizeof(float)), "reference delta");
  check(cudaMemsetAsync(delta.as<void>(), 0, static_cast<size_t>(delta.bytes()), stream), "zeroing");
  enqueue_base(kLayers - 1);
  check(cudaMemcpyAsync(y_base.as<void>(), problem_.y(kLayers - 1), static_cast<size_t>(y_bytes),
                        cudaMemcpyDeviceToDevice, stream),
        "copy of y");
  const Graph graph([&](int64_t i, cudaStream_t s) { enqueue(layer, i, s); }, kLayers, stream);
  graph.replay(stream);
  check(cudaStreamSynchronize(stream), "chain of " + c.name());
  add_reference_delta(problem_, kLayers - 1, delta.as<float>(), stream);
  Verdict verdict = compare_y(problem_, problem_.y(kLayers - 1), y_base.as<void>(), delta.as<float>(), stream);
  if (!verdict.failure.empty()) verdict.failure = "with a base GEMM: " + verdict.failure;
  return verdict;
}

AddedTiming Chain::time(const Layer& layer, const TimingOptions& options, cudaStream_t stream) const {
  const int64_t calls = (kMinCalls + bases_ - 1) / bases_ * bases_;
  const Graph with([&](int64_t i, cudaStream_t s) { enqueue(layer, i, s); }, calls, stream);
  const Graph without([&](int64_t i, cudaStream_t) { enqueue_base(i); }, calls, stream);
  return time_added(with, without, options, stream);
}

}  // namespace polylora::bench
