// The launchers of the CUDA kernels. All pointers device memory; nothing synchronises, allocates or reads a value
// back; grids depend on capacities alone, so every call may be captured into a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "polylora/params.h"

namespace polylora::cuda {

cudaError_t plan(const PlanParams& params, cudaStream_t stream);
cudaError_t moe_plan(const MoePlanParams& params, cudaStream_t stream);

cudaError_t shrink(const LoraParams& params, cudaStream_t stream);
cudaError_t expand(const LoraParams& params, cudaStream_t stream);

/// shrink and expand in one call.
cudaError_t linear(const LoraParams& params, cudaStream_t stream);

/// linear taken apart: the deltas, which need nothing of the base layer's GEMM and may be made beside it, and their
/// sum with its result. linear_delta: y is delta, slice after slice; rows with an adapter are written whole, -0 where a
/// slice is absent, others hold anything afterwards. add_delta leaves y's bits where the delta is -0.
cudaError_t linear_delta(const LoraParams& params, cudaStream_t stream);
cudaError_t add_delta(const AddDeltaParams& params, cudaStream_t stream);

/// Bytes of params.scratch that the launcher of the same name wants for a call with these params; may be 0. They follow
/// from sizes, strides, alignment and the environment's switches.
cudaError_t shrink_scratch(const LoraParams& params, int64_t& bytes);
cudaError_t linear_scratch(const LoraParams& params, int64_t& bytes);
cudaError_t linear_delta_scratch(const LoraParams& params, int64_t& bytes);
cudaError_t embedding_scratch(const EmbeddingParams& params, int64_t& bytes);  // of params.lora.scratch
cudaError_t moe_delta_scratch(const LoraParams& params, int64_t& bytes);
cudaError_t gate_up_act_scratch(const GateUpActParams& params, int64_t& bytes);
cudaError_t down_reduce_scratch(const DownReduceParams& params, int64_t& bytes);

/// Looks A up by token id and expands.
cudaError_t embedding(const EmbeddingParams& params, cudaStream_t stream);

/// The fused seams of MoE, shrink and expand included.
cudaError_t gate_up_act(const GateUpActParams& params, cudaStream_t stream);
cudaError_t down_reduce(const DownReduceParams& params, cudaStream_t stream);

/// The same taken apart, as linear is: the deltas (0 where a slice is absent), and the seams that add them. With v_of_x
/// v is given: where all experts share A, it is shrunk once a token.
cudaError_t moe_delta(const LoraParams& params, cudaStream_t stream);
cudaError_t moe_act(const GateUpActParams& params, cudaStream_t stream);
cudaError_t moe_reduce(const DownReduceParams& params, cudaStream_t stream);

}  // namespace polylora::cuda
