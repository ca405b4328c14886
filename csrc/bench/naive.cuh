// What naive kernels share: where a row's x stands, and what expand makes of a row of v.
#pragma once

#include "polylora/params.h"

namespace polylora::bench {

template <typename T>
__device__ float widen(T value) {
  return static_cast<float>(value);
}

__device__ inline int64_t pair_of(const LoraParams& p, int64_t row) { return p.row_map ? p.row_map[row] : row; }

__device__ inline int64_t x_row(const LoraParams& p, int64_t row) {
  return p.x_div > 0 ? pair_of(p, row) / p.x_div : row;
}

/// Output n of slice s: scale * sum_j v[j] * B[n, j], of a row of v.
template <typename T, typename V, typename Sum>
__device__ Sum expanded(const SliceSet& slices, int32_t group, int s, int64_t n, const V* v) {
  const SliceEntry entry = slices.table[int64_t{group} * slices.count + s];
  const T* b = static_cast<const T*>(slices.b[s]) + entry.b_offset + n * entry.b_stride;
  Sum sum = 0;
  for (int j = 0; j < entry.rank; ++j) sum += static_cast<Sum>(v[entry.v_col + j]) * static_cast<Sum>(widen(b[j]));
  return sum * static_cast<Sum>(entry.scale);
}

}  // namespace polylora::bench
