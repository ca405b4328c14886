// moe_delta of few pairs, sm_80 and later, by linear's two launches for few rows (shrink_narrow.cu, expand_narrow.cu):
// a row of x and a weight for each pair.
//
// Beside a GEMM of experts of one or two tokens, of which all blocks stand at once, there is no room for the rings of
// moe_shrink.cu and moe_expand.cu: they would begin when it ends. These hold weights in registers alone.
#include "linear/narrow.cuh"
#include "linear/paths.h"
#include "moe/paths.h"

namespace polylora::cuda {

bool few_deltas_serve(const LoraParams& p) {
  return p.rows > 0 && is_moe(p) && p.row_map == nullptr && !p.v_of_x && narrow_shrink_serves(as_linear(p)) &&
         wide_expand_serves(as_linear(p));
}

cudaError_t few_deltas_scratch(const LoraParams& p, int64_t& bytes) {
  int planes = 0;
  const cudaError_t error = narrow_parts(p, true, planes);
  bytes = narrow_plane_bytes(p, planes);
  return error;
}

cudaError_t few_deltas_path(const LoraParams& p, cudaStream_t stream) {
  int planes = 0;
  cudaError_t error = narrow_parts(p, true, planes);
  if (error == cudaSuccess) error = shrink_narrow_path(p, planes, stream);
  return error == cudaSuccess ? expand_deltas_narrow_path(p, planes, stream) : error;
}

}  // namespace polylora::cuda
