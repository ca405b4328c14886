// Two grouped GEMMs of CUTLASS on the same problem: shrink as one into a v of bf16, expand as another with beta 1. The
// rows of an adapter must be contiguous: cases run with their rows sorted by adapter, in decode too.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "grouped_gemm.h"
#include "problem.h"

namespace polylora::bench {

class GroupedBaseline {
 public:
  /// bf16, K, ranks and widths multiples of 8, sorted rows, equal scales.
  static bool serves(const Problem& problem);

  /// In a build with CUTLASS: has_cutlass().
  explicit GroupedBaseline(const Problem& problem);

  void run(int64_t call, cudaStream_t stream) const;

 private:
  // A set of weights with a copy of x and y.
  struct Step {
    std::unique_ptr<GroupedGemm> shrink;
    std::unique_ptr<GroupedGemm> expand;
  };

  Step make_step(const Problem& problem, int64_t call) const;

  DeviceBuffer v_;  // [rows, v_width]
  std::vector<Step> steps_;
};

}  // namespace polylora::bench
