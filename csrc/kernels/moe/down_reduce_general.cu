// moe_down_reduce and moe_reduce: out[t] = sum_j w[t, j] * (y2[t, j] + delta), general path.
//
// A block owns one token and 256 outputs and walks the token's experts in order: no atomics, one rounding, one
// write. Pairs of kNoRow (an expert of another rank, a pair without a position) contribute nothing, whatever y2 holds.
#include "common/row_product.cuh"
#include "moe/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) down_reduce_general(const __grid_constant__ DownReduceParams d) {
  const LoraParams& p = d.lora;
  const int64_t token = blockIdx.x;
  const int64_t n = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const bool has_output = n < p.slices.width[0];

  __shared__ float smem_v[kMaxRank];
  float total = 0.f;
  for (int j = 0; j < d.top_k; ++j) {
    const int64_t pair = token * d.top_k + j;
    const int64_t row = p.plan.pair_pos && load_head(p.plan).fits ? p.plan.pair_pos[pair] : pair;
    if (row < 0 || row >= p.rows) continue;
    const int32_t group = group_of(p.plan, row);
    if (group == kNoRow) continue;
    if (has_output) {
      const float y2 = to_float(static_cast<const T*>(p.y)[row * p.y_stride + output_col(p.slices, 0, n)]);
      total = d.y_weighted ? total + y2 : fmaf(p.row_weight[pair], y2, total);
    }
    if (group < 0) continue;
    if (d.delta != nullptr) {
      if (has_output) total += to_float(static_cast<const T*>(d.delta)[row * d.delta_stride + n]);
      continue;
    }
    const SliceEntry entry = load_scaled_v(p, group, 0, row, smem_v);
    if (has_output && entry.rank > 0) total += row_times_b<T>(p, entry, 0, n, smem_v);
  }
  if (has_output) static_cast<T*>(d.out)[token * d.out_stride + n] = from_float<T>(total);
}

}  // namespace

cudaError_t down_reduce_general_path(const DownReduceParams& params, cudaStream_t stream) {
  const int32_t width = params.lora.slices.width[0];
  if (params.tokens == 0 || width == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(params.tokens), (width + kThreads - 1) / kThreads);
  return dispatch_dtype(params.lora.dtype, [&](auto element) {
    down_reduce_general<decltype(element)><<<grid, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace polylora::cuda
