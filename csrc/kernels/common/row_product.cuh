// One row's v times B, for kernels in which a block owns one row and a thread one output.
#pragma once

#include "common/dtype.cuh"
#include "common/rows.cuh"

namespace polylora::cuda {

/// Copies the row's v of one slice into shared memory, times its scale. The whole block calls it; it syncs before
/// and after. Returns the slice's entry; rank 0 means nothing was loaded.
__device__ __forceinline__ SliceEntry load_scaled_v(const LoraParams& p, int64_t group, int slice, int64_t row,
                                                    float (&smem_v)[kMaxRank]) {
  const SliceEntry entry = entry_of(p, group, slice);
  __syncthreads();
  if (entry.rank > 0) {
    const float scale = v_scale(p, entry, row);
    const float* v = p.v + row * p.v_stride + entry.v_col;
    for (int j = threadIdx.x; j < entry.rank; j += blockDim.x) smem_v[j] = v[j] * scale;
  }
  __syncthreads();
  return entry;
}

/// sum_j smem_v[j] * B[n, j]
template <typename T>
__device__ __forceinline__ float row_times_b(const LoraParams& p, const SliceEntry& entry, int slice, int64_t n,
                                             const float (&smem_v)[kMaxRank]) {
  const T* b = static_cast<const T*>(p.slices.b[slice]) + entry.b_offset + n * entry.b_stride;
  // four sums, as errors grow with the length of one
  float sum[4] = {};
#pragma unroll 4
  for (int j = 0; j < entry.rank; ++j) sum[j % 4] = fmaf(smem_v[j], to_float(b[j]), sum[j % 4]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace polylora::cuda
