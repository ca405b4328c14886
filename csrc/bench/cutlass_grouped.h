// CUTLASS's grouped GEMM on the same problem: shrink as one grouped GEMM into a v of bf16, expand as another with
// beta 1. The rows of an adapter must be contiguous: cases run with their rows sorted by adapter, in decode too.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "problem.h"

namespace polylora::bench {

class CutlassBaseline {
 public:
  virtual ~CutlassBaseline() = default;
  virtual cudaError_t run(int64_t call, cudaStream_t stream) = 0;
};

/// Null where the problem is nothing for it: bf16, K, ranks and widths multiples of 8, sorted rows, equal scales.
/// Throws UsageError in a build without CUTLASS.
std::unique_ptr<CutlassBaseline> make_cutlass_baseline(const Problem& problem);

}  // namespace polylora::bench
