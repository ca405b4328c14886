// linear: shrink, then expand on the same stream. A fused kernel replaces the pair where one is faster.
#include "polylora/cuda.h"

namespace polylora::cuda {

cudaError_t linear(const LoraParams& params, cudaStream_t stream) {
  const cudaError_t error = shrink(params, stream);
  return error == cudaSuccess ? expand(params, stream) : error;
}

}  // namespace polylora::cuda
