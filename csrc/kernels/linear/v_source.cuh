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

/// A of a slice, looked up by token.
class Lookup {
 public:
  __device__ __forceinline__ Lookup(const LinearSlice& slice, int a_row, int rank, bool token_major)
      : a_(static_cast<const uint16_t*>(slice.a) + int64_t{a_row} * slice.a_stride),
        token_stride_(token_major ? slice.a_stride : 1),
        rank_stride_(token_major ? 1 : slice.a_stride),
        rank_(rank),
        whole_(token_major && slice.a_stride % 4 == 0 && (reinterpret_cast<uintptr_t>(a_) & 7) == 0) {}

  /// Four ranks from the `r`th on; zeros where there is no token (below 0) and beyond the rank. Without branches, so
  /// that several are on their way at once: what is not wanted reads what is there anyway.
  __device__ __forceinline__ uint2 load(int64_t token, int r) const {
    const uint16_t* from = a_ + (token < 0 ? 0 : token) * token_stride_;
    uint2 four{0, 0};
    if (whole_ && rank_ % 4 == 0) {  // alike in all threads
      four = *reinterpret_cast<const uint2*>(from + min(r, rank_ - 4));
    } else {
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = from[min(r + i, rank_ - 1) * rank_stride_];
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = r + i < rank_ ? bits[i] : 0;
      four = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
    }
    return token < 0 || r >= rank_ ? uint2{0, 0} : four;
  }

 private:
  const uint16_t* a_;
  int64_t token_stride_, rank_stride_;
  int rank_;
  bool whole_;
};

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
