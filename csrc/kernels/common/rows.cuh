// From plan rows to memory: which pair a row stands for, which row of x it reads, which slice computes its v.
#pragma once

#include "polylora/params.h"

namespace polylora::cuda {

/// The header, in independent 16-byte loads. A plan made for other rows, groups or pairs counts as empty: its sections
/// lie elsewhere, and its groups are another table's.
struct PlanHead {
  bool fits;
  int tiles;
};
__device__ __forceinline__ PlanHead load_head(const int32_t* header, int32_t rows, int32_t groups, int32_t pairs) {
  static_assert(kPlanVersion == 0 && kPlanRows == 1 && kPlanGroups == 2 && kPlanTiles == 5 && kPlanPairs == 8);
  const int4* words = reinterpret_cast<const int4*>(header);
  const int4 a = words[0];
  const int4 b = words[1];
  const int4 c = words[2];
  const bool fits = a.x == kPlanVersionValue && a.y == rows && a.z == groups && c.x == pairs;
  return {fits, fits ? b.y : 0};
}
__device__ __forceinline__ PlanHead load_head(const PlanView& plan) {
  return load_head(plan.header, plan.rows, plan.groups, plan.pairs);
}

/// Group of a row, kNoAdapter or kNoRow.
__device__ __forceinline__ int32_t group_of(const PlanView& plan, int64_t row) {
  const int32_t group = plan.row_group[row];
  return load_head(plan).fits ? group : kNoAdapter;
}

/// A map that changed since the plan was made gives wrong values, but no wild access.
__device__ __forceinline__ int64_t pair_of(const LoraParams& p, int64_t row) {
  if (p.row_map == nullptr) return row;
  const int32_t pair = p.row_map[row];
  return static_cast<uint32_t>(pair) < static_cast<uint32_t>(p.plan.pairs) ? pair : 0;
}

__device__ __forceinline__ int64_t x_row_of(const LoraParams& p, int64_t row) {
  return p.x_div == 0 ? row : pair_of(p, row) / p.x_div;
}

/// Its row of v.
__device__ __forceinline__ int64_t v_row_of(const LoraParams& p, int64_t row) {
  return p.v_of_x ? x_row_of(p, row) : row;
}

/// The entry of (group, slice); rank 0 where it is absent or leads outside what the call was given.
__device__ __forceinline__ SliceEntry entry_of(const LoraParams& p, int64_t group, int slice) {
  const SliceSet& set = p.slices;
  SliceEntry entry = set.table[group * set.count + slice];
  if (!entry_fits(entry, entry.rank, set.a_rows[slice], set.width[slice], set.b_elements[slice], p.v_width)) {
    entry.rank = 0;
  }
  return entry;
}

/// Slices with equal v_col share one A; only the first of them computes v.
__device__ __forceinline__ bool computes_v(const LoraParams& p, int64_t group, int slice) {
  const int32_t v_col = p.slices.table[group * p.slices.count + slice].v_col;
  for (int s = 0; s < slice; ++s) {
    const SliceEntry other = entry_of(p, group, s);
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
