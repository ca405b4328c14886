// The paths of MoE's ops, chosen per call in moe.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "polylora/params.h"

namespace polylora::cuda {

/// Streams of weights (8.0 and later): 16-bit, aligned, up to two slices of one width.
bool moe_stream_serves(const LoraParams& p);

/// y += delta: moe_gate_up_ and moe_down_. `bytes`: of p.scratch.
cudaError_t moe_linear_scratch(const LoraParams& p, int64_t& bytes);
cudaError_t moe_linear_path(const LoraParams& p, cudaStream_t stream);

/// h = act(y1 + delta).
bool moe_act_serves(const GateUpActParams& g);
cudaError_t moe_gate_up_act_scratch(const GateUpActParams& g, int64_t& bytes);
cudaError_t moe_gate_up_act_path(const GateUpActParams& g, cudaStream_t stream);

/// What linear's kernels ask of the rest of a call whose pairs, and their weights, are not their concern.
inline LoraParams as_linear(const LoraParams& p) {
  LoraParams dense = p;
  dense.x_div = 0;
  dense.row_weight = nullptr;
  return dense;
}

/// The same for few rows of a layer without experts (a pair is a row of x), two slices.
bool act_narrow_serves(const GateUpActParams& g);
cudaError_t act_narrow_scratch(const GateUpActParams& g, int64_t& bytes);
cudaError_t act_narrow_path(const GateUpActParams& g, cudaStream_t stream);

/// The deltas alone: p.y is [rows, sum of widths].
cudaError_t moe_deltas_scratch(const LoraParams& p, int64_t& bytes);
cudaError_t moe_delta_path(const LoraParams& p, cudaStream_t stream);
/// The same of few pairs, by linear's kernels for few rows.
bool few_deltas_serve(const LoraParams& p);
cudaError_t few_deltas_scratch(const LoraParams& p, int64_t& bytes);
cudaError_t few_deltas_path(const LoraParams& p, cudaStream_t stream);

/// Bytes of deltas up to which kernels ask for them before they know whether a row has any. Tests set it lower.
#ifndef POLYLORA_SHORT_DELTAS
#define POLYLORA_SHORT_DELTAS (8 << 20)
#endif
inline constexpr int64_t kShortDeltas = POLYLORA_SHORT_DELTAS;

/// h = act(y1 + g.delta).
bool moe_add_act_serves(const GateUpActParams& g);
cudaError_t moe_add_act_path(const GateUpActParams& g, cudaStream_t stream);
/// The same of many deltas, which the former leaves to it; no bit tells. Tests set the bytes lower.
#ifndef POLYLORA_LONG_DELTAS
#define POLYLORA_LONG_DELTAS (32 << 20)
#endif
inline constexpr int64_t kLongDeltas = POLYLORA_LONG_DELTAS;
bool moe_act_long_serves(const GateUpActParams& g);
cudaError_t moe_act_long_path(const GateUpActParams& g, cudaStream_t stream);

/// out = sum over a token's experts of w * (y2 + delta).
bool moe_reduce_serves(const DownReduceParams& d);
cudaError_t moe_down_reduce_scratch(const DownReduceParams& d, int64_t& bytes);
cudaError_t moe_down_reduce_path(const DownReduceParams& d, cudaStream_t stream);

/// The same with d.delta, of another call.
bool moe_add_reduce_serves(const DownReduceParams& d);
cudaError_t moe_add_reduce_path(const DownReduceParams& d, cudaStream_t stream);

/// Rows a group from which runs count as long. Tests set it lower.
#ifndef POLYLORA_LONG_RUN
#define POLYLORA_LONG_RUN 16
#endif
inline constexpr int64_t kLongRun = POLYLORA_LONG_RUN;

/// Whether most runs are, as far as the capacities tell.
inline bool has_long_runs(const LoraParams& p) { return p.rows >= kLongRun * int64_t{p.slices.groups}; }

/// Rows a group from which runs count as middling, below long ones. A step rarely hits all groups that the capacities
/// count: of 11 rows a group (nemotron3-super, 2048 tokens, 4 of 8 adapters) runs have 22. Tests set it lower.
#ifndef POLYLORA_MIDDLE_RUN
#define POLYLORA_MIDDLE_RUN 10
#endif
inline constexpr int64_t kMiddleRun = POLYLORA_MIDDLE_RUN;
inline bool has_middle_runs(const LoraParams& p) {
  return p.rows >= kMiddleRun * int64_t{p.slices.groups} && !has_long_runs(p);
}

/// The path that serves the call: what linear is for is_moe.
cudaError_t moe_scratch(const LoraParams& p, int64_t& bytes);
cudaError_t moe_linear(const LoraParams& p, cudaStream_t stream);

/// Everything; v given.
cudaError_t gate_up_act_general_path(const GateUpActParams& g, cudaStream_t stream);
cudaError_t down_reduce_general_path(const DownReduceParams& d, cudaStream_t stream);

/// The pieces. `planes`: parts of K, whose sums stand in p.scratch. `most_blocks`: of an SM; fewer than it has room for
/// leave that to a kernel beside.
inline constexpr int kAllBlocks = 32;
cudaError_t moe_planes(const LoraParams& p, int most_blocks, int& planes);
int64_t moe_plane_bytes(const LoraParams& p, int planes);
cudaError_t moe_shrink_path(const LoraParams& p, int planes, int most_blocks, cudaStream_t stream);

/// shrink for long runs, up to 128 rows at a time, 9.0a: the same planes, but for the order in which K is summed.
bool moe_shrink_long_serves(const LoraParams& p);
cudaError_t moe_long_planes(const LoraParams& p, int most_blocks, int& planes);
cudaError_t moe_shrink_long_path(const LoraParams& p, int planes, int most_blocks, cudaStream_t stream);

cudaError_t moe_expand_add_path(const LoraParams& p, int planes, cudaStream_t stream);
cudaError_t moe_expand_act_path(const GateUpActParams& g, int planes, cudaStream_t stream);

/// Weighted deltas of all rows and outputs, into p.y.
cudaError_t moe_expand_deltas_path(const LoraParams& p, int planes, int most_blocks, cudaStream_t stream);

/// The same of one slice, outputs [n_begin, n_end): `delta` is [rows, n_end - n_begin] of the call's dtype.
cudaError_t moe_expand_delta_path(const LoraParams& p, int planes, void* delta, int32_t n_begin, int32_t n_end,
                                  cudaStream_t stream);
/// The same for long runs, up to 128 rows at a time; which of the two makes them, no bit of them tells. `out_stride`:
/// of h.
bool moe_expand_long_serves(const LoraParams& p, int64_t out_stride);
cudaError_t moe_expand_long_act_path(const GateUpActParams& g, int planes, cudaStream_t stream);
cudaError_t moe_expand_long_deltas_path(const LoraParams& p, int planes, int most_blocks, cudaStream_t stream);
cudaError_t moe_expand_long_delta_path(const LoraParams& p, int planes, void* delta, int32_t n_begin, int32_t n_end,
                                       cudaStream_t stream);

/// All of this for runs of a middling length, one slice and up to 16 ranks, 32 rows at a time; again no bit tells.
bool moe_expand_middle_serves(const LoraParams& p);
cudaError_t moe_expand_middle_add_path(const LoraParams& p, int planes, cudaStream_t stream);
cudaError_t moe_expand_middle_act_path(const GateUpActParams& g, int planes, cudaStream_t stream);
cudaError_t moe_expand_middle_deltas_path(const LoraParams& p, int planes, int most_blocks, cudaStream_t stream);
cudaError_t moe_expand_middle_delta_path(const LoraParams& p, int planes, void* delta, int32_t n_begin, int32_t n_end,
                                         cudaStream_t stream);

/// The sum of y2 and these deltas over a token's experts.
cudaError_t moe_sum_path(const DownReduceParams& d, const void* delta, int32_t n_begin, int32_t n_end,
                         cudaStream_t stream);

/// Few tokens: both in one kernel, a block a token and part of the outputs, each pair's B read for that token alone.
inline constexpr int kFewTokenPairs = 32;
cudaError_t moe_down_few_path(const DownReduceParams& d, int planes, cudaStream_t stream);

}  // namespace polylora::cuda
