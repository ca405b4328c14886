// linear taken apart, as an engine uses it: the deltas on another stream beside the base's GEMM, then their sum with
// its result.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "problem.h"
#include "side_stream.h"

namespace polylora::bench {

class Beside {
 public:
  explicit Beside(const Problem& problem);

  /// Deltas and sum, one after the other.
  cudaError_t run(int64_t call, cudaStream_t stream) const;

  /// The same, the deltas on a stream of their own from before `gemm`, which enqueues work on `stream`, on.
  void run_beside(int64_t call, cudaStream_t stream, const std::function<void()>& gemm) const;

 private:
  cudaError_t make_delta(int64_t call, cudaStream_t stream) const;
  cudaError_t add_delta(int64_t call, cudaStream_t stream) const;

  const Problem& problem_;
  DeviceBuffer delta_;    // [rows, width]
  DeviceBuffer scratch_;  // of linear_delta
  SideStream side_;
};

}  // namespace polylora::bench
