// From plan rows to memory: which pair a row stands for, which row of x it reads, which slice computes its v.
#pragma once

#include "polylora/params.h"

namespace polylora::cuda {

/// Tiles to work on: none of a plan that was made for other rows or groups.
__device__ __forceinline__ int live_tiles(const PlanView& plan) {
  return plan_fits(plan) ? plan.header[kPlanTiles] : 0;
}

/// Group of a row, kNoAdapter or kNoRow; kNoAdapter where the plan was made for other rows or groups.
__device__ __forceinline__ int32_t group_of(const PlanView& plan, int64_t row) {
  return plan_fits(plan) ? plan.row_group[row] : kNoAdapter;
}

__device__ __forceinline__ int64_t pair_of(const LoraParams& p, int64_t row) {
  return p.row_map ? p.row_map[row] : row;
}

__device__ __forceinline__ int64_t x_row_of(const LoraParams& p, int64_t row) {
  return p.x_div == 0 ? row : pair_of(p, row) / p.x_div;
}

__device__ __forceinline__ const SliceEntry& entry_of(const SliceSet& set, int64_t group, int slice) {
  return set.table[group * set.count + slice];
}

/// Slices with equal v_col share one A; only the first of them computes v.
__device__ __forceinline__ bool computes_v(const SliceSet& set, int64_t group, int slice) {
  const int32_t v_col = entry_of(set, group, slice).v_col;
  for (int s = 0; s < slice; ++s) {
    const SliceEntry& other = entry_of(set, group, s);
    if (other.rank > 0 && other.v_col == v_col) return false;
  }
  return true;
}

/// Factor of a row's v: the adapter's scale and, in MoE down, the top-k weight, both in fp32 before the product.
__device__ __forceinline__ float v_scale(const LoraParams& p, const SliceEntry& entry, int64_t row) {
  return p.row_weight ? entry.scale * p.row_weight[pair_of(p, row)] : entry.scale;
}

__device__ __forceinline__ int64_t output_col(const SliceSet& set, int slice, int64_t n) {
  return set.col[slice] + n * set.col_stride;
}

}  // namespace polylora::cuda
