// The paths of linear, shrink, expand and embedding, chosen per call in linear.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "polylora/params.h"

namespace polylora::cuda {

inline bool adds_nothing(const LoraParams& params) { return params.rows == 0 || params.slices.groups == 0; }

/// linear in one launch: decode, clusters of blocks (9.0 and later).
bool cluster_path_serves(const LoraParams& params);
cudaError_t linear_cluster_path(const LoraParams& params, cudaStream_t stream);

/// What prefill's kernels serve.
bool wide_shrink_serves(const LoraParams& params);
bool wide_expand_serves(const LoraParams& params);
bool wide_embedding_serves(const EmbeddingParams& params);

/// linear for prefill in one launch (9.0); without y: shrink. `bytes`: of scratch.
cudaError_t wide_scratch(const LoraParams& params, int64_t& bytes);
cudaError_t linear_wide_path(const LoraParams& params, cudaStream_t stream);

/// The same in pieces (8.0 and later). `planes`: parts of K, whose sums stand in params.scratch; 0: v in params.v. With
/// planes, expand follows shrink in the same call. What is to be added goes into v, or into the first plane.
cudaError_t mma_parts(const LoraParams& params, int& parts);
cudaError_t shrink_mma_path(const LoraParams& params, int planes, cudaStream_t stream);
cudaError_t add_planes_to_v_path(const LoraParams& params, int planes, cudaStream_t stream);
cudaError_t add_planes_in_place_path(const LoraParams& params, int planes, cudaStream_t stream);
cudaError_t expand_wide_path(const LoraParams& params, int planes, cudaStream_t stream);

/// Planes of v from which on they are added by a launch of its own. Each block of expand would add all of its tile's: o
/// r128 M2048 142 MB from L2, with the launch 80, and 15 for it. H200, o, without and with it, us: r16 M2048 27.3 and
/// 26.2, r64 34.3 and 30.4, r128 54.3 and 42.4, M1024 51.8 and 31.5; gate_up r16 M2048 90.9 and 92.1, r128 150 and 143.
/// Not measured where no launch may begin early (8.x).
inline constexpr int kPartsToAdd = 3;

/// linear in those pieces. `between`: called after each but the last.
template <typename Between>
cudaError_t linear_mma_path(const LoraParams& params, int parts, int parts_to_add, Between&& between,
                            cudaStream_t stream) {
  cudaError_t error = shrink_mma_path(params, parts, stream);
  between();
  if (error == cudaSuccess && parts >= parts_to_add) {
    error = add_planes_in_place_path(params, parts, stream);
    between();
    parts = 1;
  }
  return error == cudaSuccess ? expand_wide_path(params, parts, stream) : error;
}

/// embedding of many rows: in one launch (9.0), and in two with scratch (8.0 and later).
cudaError_t embedding_wide_path(const EmbeddingParams& params, cudaStream_t stream);
void mma_embedding_scratch(const EmbeddingParams& params, int64_t& bytes);
cudaError_t embedding_lookup_path(const EmbeddingParams& params, cudaStream_t stream);
cudaError_t embedding_mma_path(const EmbeddingParams& params, cudaStream_t stream);

/// linear's pieces and embedding for decode: where the wide kernels serve and, for shrink, K allows it.
inline constexpr int64_t kDecodeRows = 256;
bool narrow_shrink_serves(const LoraParams& params);
cudaError_t narrow_parts(const LoraParams& params, bool beside, int& parts);  // of K; beside a GEMM of the base
cudaError_t shrink_narrow_path(const LoraParams& params, int planes, cudaStream_t stream);
cudaError_t expand_narrow_path(const LoraParams& params, int planes, cudaStream_t stream);
/// expand after shrink_narrow_path, with deltas alone: y is [rows, sum of widths], slice after slice.
cudaError_t expand_deltas_narrow_path(const LoraParams& params, int planes, cudaStream_t stream);
cudaError_t embedding_narrow_path(const EmbeddingParams& params, cudaStream_t stream);

/// -0 in all deltas of a call, which are its y, slice after slice.
cudaError_t clear_deltas_path(const LoraParams& params, cudaStream_t stream);

/// y += deltas, of the rows with an adapter: 16 bytes at a time, and anything.
bool add_delta_serves(const AddDeltaParams& params);
cudaError_t add_delta_path(const AddDeltaParams& params, cudaStream_t stream);
cudaError_t add_delta_general_path(const AddDeltaParams& params, cudaStream_t stream);

/// POLYLORA_BATCH_INVARIANT: sums in an order that no other row and no number of rows changes.
bool batch_invariant();

/// Everything. Both halves in a call have v in its scratch.
inline LoraParams with_v_in_scratch(const LoraParams& params) {
  LoraParams with_v = params;
  with_v.v = static_cast<float*>(params.scratch);
  with_v.v_stride = params.v_width;
  return with_v;
}
inline int64_t v_bytes(const LoraParams& params) { return params.rows * params.v_width * int64_t{sizeof(float)}; }
cudaError_t linear_general_path(const LoraParams& params, cudaStream_t stream);
cudaError_t shrink_general_path(const LoraParams& params, cudaStream_t stream);
cudaError_t expand_general_path(const LoraParams& params, cudaStream_t stream);
cudaError_t embedding_general_path(const EmbeddingParams& params, cudaStream_t stream);

}  // namespace polylora::cuda
