// A grouped GEMM of CUTLASS: many small y = alpha x W^T + beta y in one launch, in bf16 with fp32 sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace polylora::bench {

/// All 16-byte aligned; n, k and the pitches (in elements) multiples of kGemmVector.
struct GemmProblem {
  int64_t rows, n, k;
  const void* x;  // [rows, k]
  int64_t x_pitch;
  const void* w;  // [n, k]
  int64_t w_pitch;
  void* y;  // [rows, n]
  int64_t y_pitch;
};
inline constexpr int64_t kGemmVector = 8;

/// Tiles of 64 x 64 outputs by 64 of K, or of 64 x 128 by 32.
enum class GemmShapes { kLongK, kShortK };

/// As many blocks as fit the device at once, which take tiles in turn; or a block a tile, which makes room when its
/// tile is done, as the MoE GEMMs of engines do: beside blocks that stay to the end nothing else would start.
enum class GemmBlocks { kResident, kOneATile };

struct GemmConfig {
  GemmShapes shape = GemmShapes::kLongK;
  GemmBlocks blocks = GemmBlocks::kResident;
  float alpha = 1;
  float beta = 0;
};

class GroupedGemm {
 public:
  virtual ~GroupedGemm() = default;
  /// May be captured. Throws CudaError.
  virtual void run(cudaStream_t stream) = 0;
};

/// Whether this build has CUTLASS.
bool has_cutlass();

/// Sizes and addresses are fixed here; `what` names it in errors. Throws UsageError in a build without CUTLASS.
std::unique_ptr<GroupedGemm> make_grouped_gemm(const std::vector<GemmProblem>& problems, const GemmConfig& config,
                                               const std::string& what);

}  // namespace polylora::bench
