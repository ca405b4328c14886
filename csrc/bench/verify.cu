#include "verify.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "naive.h"
#include "plan_check.h"
#include "polylora/plan_layout.h"
#include "stats.h"
#include "timing.h"

namespace polylora::bench {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChain = 3;

struct Sums {
  double difference;  // squares
  double reference;   // squares
  unsigned long long not_finite;
  unsigned long long worst;  // bits of the largest |difference| as float, then its index
};

// result - (before + reference); `before` null: result - reference.
template <typename T, typename Reference>
__global__ void compare_kernel(const T* result, const T* before, const Reference* reference, int64_t n, Sums* sums) {
  double difference = 0;
  double norm = 0;
  unsigned long long not_finite = 0;
  unsigned long long worst = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += int64_t{gridDim.x} * kThreads) {
    const double wanted = static_cast<double>(reference[i]);
    const double start = before ? static_cast<double>(static_cast<float>(before[i])) : 0.0;
    const double off = static_cast<double>(static_cast<float>(result[i])) - (start + wanted);
    not_finite += isfinite(off) ? 0 : 1;
    difference += off * off;
    norm += wanted * wanted;
    // positive floats are ordered as their bits are; NaN comes last
    const unsigned long long bits = __float_as_uint(fabsf(static_cast<float>(off)));
    const unsigned long long candidate = bits << 32 | static_cast<uint32_t>(i);
    worst = candidate > worst ? candidate : worst;
  }
  atomicAdd(&sums->difference, difference);
  atomicAdd(&sums->reference, norm);
  if (not_finite) atomicAdd(&sums->not_finite, not_finite);
  atomicMax(&sums->worst, worst);
}

template <typename T, typename Reference>
Verdict compare(const T* result, const T* before, const Reference* reference, int64_t rows, int64_t width,
                cudaStream_t stream) {
  DeviceBuffer sums_device(sizeof(Sums), "comparison");
  check(cudaMemsetAsync(sums_device.as<void>(), 0, sizeof(Sums), stream), "comparison");
  compare_kernel<<<256, kThreads, 0, stream>>>(result, before, reference, rows * width, sums_device.as<Sums>());
  check(cudaGetLastError(), "comparison");
  Sums sums;
  check(cudaMemcpyAsync(&sums, sums_device.as<void>(), sizeof(Sums), cudaMemcpyDeviceToHost, stream), "comparison");
  check(cudaStreamSynchronize(stream), "comparison");

  Verdict verdict;
  verdict.error = sums.difference == 0 ? 0 : std::sqrt(sums.difference / sums.reference);
  if (sums.not_finite == 0 && verdict.error <= kMaxError) return verdict;
  const int64_t at = static_cast<uint32_t>(sums.worst);
  T got{};
  T start{};
  Reference wanted{};
  check(cudaMemcpy(&got, result + at, sizeof(T), cudaMemcpyDeviceToHost), "comparison");
  if (before) check(cudaMemcpy(&start, before + at, sizeof(T), cudaMemcpyDeviceToHost), "comparison");
  check(cudaMemcpy(&wanted, reference + at, sizeof(Reference), cudaMemcpyDeviceToHost), "comparison");
  verdict.failure = format("error %.3g above %.3g, %llu values not finite; worst at [%lld, %lld]: got %.6g, want %.6g",
                           verdict.error, kMaxError, sums.not_finite, static_cast<long long>(at / width),
                           static_cast<long long>(at % width), static_cast<double>(static_cast<float>(got)),
                           static_cast<double>(static_cast<float>(start)) + static_cast<double>(wanted));
  return verdict;
}

void zero(const DeviceBuffer& buffer, cudaStream_t stream) {
  check(cudaMemsetAsync(buffer.as<void>(), 0, static_cast<size_t>(buffer.bytes()), stream), "zeroing");
}

Call throwing(const Problem& problem, const Implementation& run) {
  return [&problem, &run](int64_t call, cudaStream_t stream) {
    check(run(call, stream), std::string(op_name(problem.op())) + " of " + problem.shape().name());
  };
}

// The shrink op: v itself is the result. What no adapter has must not be written.
Verdict verify_v(const Problem& problem, const Implementation& run, cudaStream_t stream) {
  const Case& c = problem.shape();
  const int64_t n = c.rows * problem.v_width();
  DeviceBuffer reference(n * static_cast<int64_t>(sizeof(double)), "reference v");
  const Call call = throwing(problem, run);
  Verdict verdict;
  for (const bool chain : {false, true}) {
    const int64_t last = chain ? (kChain - 1) * problem.copies() : 0;
    check(cudaMemsetAsync(problem.v(0), 0, static_cast<size_t>(n) * sizeof(float), stream), "zeroing");
    zero(reference, stream);
    if (chain) {
      const Graph graph([&](int64_t i, cudaStream_t s) { call(i * problem.copies(), s); }, kChain, stream);
      graph.replay(stream);
      check(cudaStreamSynchronize(stream), "shrink of " + c.name() + ", in a graph");
    } else {
      call(0, stream);
      check(cudaStreamSynchronize(stream), "shrink of " + c.name());
    }
    reference_shrink(problem, last, reference.as<double>(), stream);
    const Verdict each =
        compare<float, double>(problem.v(0), nullptr, reference.as<double>(), c.rows, problem.v_width(), stream);
    if (!chain) verdict = each;
    if (!each.failure.empty()) return each;
  }
  return verdict;
}

Verdict verify_plan(const Problem& problem, const Implementation& run, cudaStream_t stream) {
  const Case& c = problem.shape();
  throwing(problem, run)(0, stream);
  check(cudaStreamSynchronize(stream), "plan");
  const PlanLayout at = plan_layout(c.rows, c.slots, 0);
  return {0, plan_mistake(download<int32_t>(problem.plan_params().plan, at.words, "plan"), problem.row_adapters(),
                          c.slots, {})};
}

}  // namespace

Verdict compare_y(const Problem& problem, const void* y, const void* y_before, const float* delta,
                  cudaStream_t stream) {
  const int64_t rows = problem.shape().rows;
  const int64_t width = problem.shape().width();
  if (problem.dtype() == DType::kFloat16) {
    return compare(static_cast<const __half*>(y), static_cast<const __half*>(y_before), delta, rows, width, stream);
  }
  return compare(static_cast<const __nv_bfloat16*>(y), static_cast<const __nv_bfloat16*>(y_before), delta, rows, width,
                 stream);
}

void add_reference_delta(const Problem& problem, int64_t call, float* delta, cudaStream_t stream) {
  if (problem.op() == Op::kExpand) return reference_expand_given(problem, call, delta, stream);
  DeviceBuffer v(problem.shape().rows * problem.v_width() * static_cast<int64_t>(sizeof(double)), "reference v");
  reference_shrink(problem, call, v.as<double>(), stream);
  reference_expand(problem, call, v.as<double>(), delta, stream);
  check(cudaStreamSynchronize(stream), "reference");  // v goes away
}

Verdict verify(const Problem& problem, const Implementation& run, cudaStream_t stream) {
  if (problem.op() == Op::kPlan) return verify_plan(problem, run, stream);
  if (problem.op() == Op::kShrink) return verify_v(problem, run, stream);
  const Case& c = problem.shape();
  const int64_t y_bytes = c.rows * c.width() * kElementBytes;
  DeviceBuffer y_before(y_bytes, "y before the call");
  DeviceBuffer delta(c.rows * c.width() * static_cast<int64_t>(sizeof(float)), "reference delta");
  const Call call = throwing(problem, run);
  const std::string what = std::string(op_name(problem.op())) + " of " + c.name();
  Verdict verdict;
  for (const int64_t calls : {int64_t{1}, kChain}) {
    check(cudaMemcpyAsync(y_before.as<void>(), problem.y(0), static_cast<size_t>(y_bytes), cudaMemcpyDeviceToDevice,
                          stream),
          "copy of y");
    zero(delta, stream);
    // calls that share a copy of x and y
    if (calls == 1) {
      call(0, stream);
      check(cudaStreamSynchronize(stream), what);
    } else {
      const Graph graph([&](int64_t i, cudaStream_t s) { call(i * problem.copies(), s); }, calls, stream);
      graph.replay(stream);
      check(cudaStreamSynchronize(stream), what + ", in a graph");
    }
    for (int64_t i = 0; i < calls; ++i) add_reference_delta(problem, i * problem.copies(), delta.as<float>(), stream);
    Verdict each = compare_y(problem, problem.y(0), y_before.as<void>(), delta.as<float>(), stream);
    if (calls == 1) verdict = each;
    if (!each.failure.empty()) {
      if (calls > 1) each.failure = format("%d calls in a chain: ", static_cast<int>(calls)) + each.failure;
      return each;
    }
  }
  return verdict;
}

}  // namespace polylora::bench
