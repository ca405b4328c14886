#include "beside.h"

#include "polylora/cuda.h"

namespace polylora::bench {

Beside::Beside(const Problem& problem)
    : problem_(problem),
      delta_(problem.shape().rows * problem.shape().width() * kElementBytes, "deltas"),
      side_(SideStream::Order::kAlike) {
  int64_t bytes = 0;
  check(cuda::linear_delta_scratch(problem.lora_params(0), bytes), "scratch of deltas");
  scratch_ = DeviceBuffer(bytes, "scratch of deltas");
}

cudaError_t Beside::run(int64_t call, cudaStream_t stream) const {
  const cudaError_t error = make_delta(call, stream);
  return error == cudaSuccess ? add_delta(call, stream) : error;
}

void Beside::run_beside(int64_t call, cudaStream_t stream, const std::function<void()>& gemm) const {
  side_.fork(stream);
  gemm();  // first: where both wait for a place, the GEMM's blocks come before the deltas'
  check(make_delta(call, side_), "deltas beside a GEMM");
  side_.join(stream);
  check(add_delta(call, stream), "sum of deltas");
}

cudaError_t Beside::make_delta(int64_t call, cudaStream_t stream) const {
  LoraParams p = problem_.lora_params(call);
  p.y = delta_.as<void>();
  p.y_stride = problem_.shape().width();
  p.scratch = scratch_.as<void>();
  return cuda::linear_delta(p, stream);
}

cudaError_t Beside::add_delta(int64_t call, cudaStream_t stream) const {
  return cuda::add_delta({problem_.lora_params(call), delta_.as<void>(), problem_.shape().width()}, stream);
}

}  // namespace polylora::bench
