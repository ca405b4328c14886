// The paths of linear, shrink and expand, chosen per call in linear.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "polylora/params.h"

namespace polylora::cuda {

/// linear in one launch: decode, clusters of blocks (9.0 and later).
bool cluster_path_serves(const LoraParams& params);
cudaError_t linear_cluster_path(const LoraParams& params, cudaStream_t stream);

/// Prefill: wide tiles, tensor cores (8.0 and later, with a kernel of its own for 9.0).
bool wide_shrink_serves(const LoraParams& params);
bool wide_expand_serves(const LoraParams& params);
/// `packed`: v is for expand_wide_path alone, at the beginning of params.scratch, in the form that suits it; else it is
/// params.v. `portable`: what any device from 8.0 on can do, and no more.
cudaError_t wide_scratch(const LoraParams& params, bool packed, int64_t& bytes);
cudaError_t shrink_wide_path(const LoraParams& params, bool portable, bool packed, cudaStream_t stream);
/// `packed`: shrink_wide_path left v so, in the same call.
cudaError_t expand_wide_path(const LoraParams& params, bool packed, cudaStream_t stream);

/// POLYLORA_BATCH_INVARIANT: sums in an order that no other row and no number of rows changes.
bool batch_invariant();

/// Everything.
cudaError_t shrink_general_path(const LoraParams& params, cudaStream_t stream);
cudaError_t expand_general_path(const LoraParams& params, cudaStream_t stream);

}  // namespace polylora::cuda
