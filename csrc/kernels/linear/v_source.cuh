// Where expand finds v: sums in planes, rows of v, or elements of A that tokens look up.
#pragma once

#include "linear/task.cuh"

namespace polylora::cuda {

/// A that is looked up by token instead of multiplied.
struct TokenSource {
  const void* ids;  // [rows]; null: v is multiplied
  bool ids_are_int64;
  bool token_major;
  int64_t vocab;
};

/// The token that a row of the batch asks for; -1 where the vocabulary has no such.
__device__ __forceinline__ int64_t token_of(const TokenSource& tokens, int64_t row) {
  const int64_t token = tokens.ids_are_int64 ? static_cast<const int64_t*>(tokens.ids)[row]
                                             : static_cast<const int32_t*>(tokens.ids)[row];
  return token < tokens.vocab ? token : -1;
}

/// Four ranks of A, from the `r`th on, that a token looks up; zeros where there is no token (below 0) and beyond the
/// rank.
__device__ __forceinline__ uint2 look_up(const LinearSlice& slice, int a_row, int rank, bool token_major, int64_t token,
                                         int r) {
  uint32_t bits[4] = {};
  if (token >= 0) {
    const int64_t token_stride = token_major ? slice.a_stride : 1;
    const int64_t rank_stride = token_major ? 1 : slice.a_stride;
    const auto* a = static_cast<const uint16_t*>(slice.a) + int64_t{a_row} * slice.a_stride + token * token_stride;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (r + i < rank) bits[i] = a[(r + i) * rank_stride];
    }
  }
  return {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
}

/// Four ranks of a row of v, from the `r`th on; zeros beyond the rank, where nothing is read.
__device__ __forceinline__ float4 load_v4(const LinearTask& task, int64_t row, int v_col, int r, int rank) {
  const float* from = task.v + row * task.v_stride + v_col + r;
  if (r + 4 <= rank && (reinterpret_cast<uintptr_t>(from) & 15) == 0) return *reinterpret_cast<const float4*>(from);
  float4 v{0.f, 0.f, 0.f, 0.f};
  if (r < rank) v.x = from[0];
  if (r + 1 < rank) v.y = from[1];
  if (r + 2 < rank) v.z = from[2];
  if (r + 3 < rank) v.w = from[3];
  return v;
}

/// Four ranks from the planes' column `column` on, of a position: the parts of K in their order, eight on their way at
/// once.
__device__ __forceinline__ float4 add_planes(const LinearTask& task, int64_t pos, int column) {
  const float* from = task.plane + pos * task.plane_width + column;
  float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
  for (int i = 0; i < task.planes; i += 8) {
    float4 next[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      next[j] = {0.f, 0.f, 0.f, 0.f};
      if (i + j < task.planes) next[j] = *reinterpret_cast<const float4*>(from + (i + j) * task.plane_elements);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) add(sum, next[j]);
  }
  return sum;
}

}  // namespace polylora::cuda
