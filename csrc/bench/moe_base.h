// The base MoE layer, without adapters: what the ops are added to. Pairs stand sorted by expert, as its GEMMs want
// them; whoever adds LoRA calls the stages one by one and does something between two of them, or in the place of act
// and reduce.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "grouped_gemm.h"
#include "moe_problem.h"

namespace polylora::bench {

class MoeBase {
 public:
  /// H and I multiples of 8.
  static bool serves(const MoeCase& c);

  /// Routings are fixed: sizes of the GEMMs' problems are made here. Throws UsageError in a build without CUTLASS.
  explicit MoeBase(const MoeProblem& problem);

  // `call`: of problem.layers(). All may be captured; they throw CudaError.
  void gate_up(int64_t call, cudaStream_t stream) const;  // x to sorted_x to y1
  void act(cudaStream_t stream) const;                    // y1 to h
  void down(int64_t call, cudaStream_t stream) const;     // h to y2
  void reduce(int64_t call, cudaStream_t stream) const;   // y2 to out
  void forward(int64_t call, cudaStream_t stream) const;  // all four

 private:
  struct Gemms {
    std::unique_ptr<GroupedGemm> gate_up, down;
  };

  Gemms make_gemms(int64_t call) const;
  const Gemms& gemms(int64_t call) const { return gemms_[static_cast<size_t>(call % problem_.layers())]; }

  const MoeProblem& problem_;
  std::vector<Gemms> gemms_;  // [layers]
};

}  // namespace polylora::bench
