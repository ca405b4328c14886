// The paths of linear, chosen per call in linear.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "polylora/params.h"

namespace polylora::cuda {

/// One launch, clusters of blocks (sm_90 and later).
bool cluster_path_serves(const LoraParams& params);
cudaError_t linear_cluster_path(const LoraParams& params, cudaStream_t stream);

}  // namespace polylora::cuda
