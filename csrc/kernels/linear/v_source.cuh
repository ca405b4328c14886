// Where expand finds v: sums in planes, rows of v, elements of A that tokens look up, or operands that are ready.
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

/// v as 16-bit operands, zeros in the last quad beyond a rank.
struct Operands {
  uint16_t* v;    // [slices, rows, pitch]; null: not these
  int32_t pitch;  // a multiple of 4

  __device__ __forceinline__ uint16_t* row(const LinearTask& task, int s, int row) const {
    return v + (int64_t{s} * task.rows + row) * pitch;
  }
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
      four = {load_pair(from, r), load_pair(from, r + 2)};
    }
    return token < 0 || r >= rank_ ? uint2{0, 0} : four;
  }

  /// The `piece`th 16 bytes of a row of v as StreamV lays it out: of the 32 ranks of block piece / 4, two of every
  /// eight.
  __device__ __forceinline__ uint4 load_piece(int64_t token, int piece) const {
    const uint16_t* from = a_ + (token < 0 ? 0 : token) * token_stride_;
    const int first = piece / 4 * 32 + piece % 4 * 2;
    uint32_t pairs[4];
    if (whole_ && rank_ % 2 == 0) {  // alike in all threads
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = *reinterpret_cast<const uint32_t*>(from + min(first + 8 * i, rank_ - 2));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = load_pair(from, first + 8 * i);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = token < 0 || first + 8 * i >= rank_ ? 0 : pairs[i];
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
  }

 private:
  // Ranks r and r + 1 of a token, wherever they lie.
  __device__ __forceinline__ uint32_t load_pair(const uint16_t* from, int r) const {
    const uint32_t low = from[min(r, rank_ - 1) * rank_stride_];
    const uint32_t high = from[min(r + 1, rank_ - 1) * rank_stride_];
    return (r < rank_ ? low : 0) | (r + 1 < rank_ ? high << 16 : 0);
  }

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

/// Four ranks from `from` on, in the first of `planes` planes, and of the others: the parts of K in their order, eight
/// on their way at once.
__device__ __forceinline__ float4 add_planes(const LinearTask& task, const float* from, int planes) {
  float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
  for (int i = 0; i < planes; i += 8) {
    float4 next[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      next[j] = {0.f, 0.f, 0.f, 0.f};
      if (i + j < planes) next[j] = *reinterpret_cast<const float4*>(from + (i + j) * task.plane_elements);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) add(sum, next[j]);
  }
  return sum;
}

// ---- host

inline TokenSource token_source(const EmbeddingParams& e) {
  return {e.token_ids, e.ids_are_int64, e.token_major, e.vocab};
}

/// The operands of embedding for wide tiles, in the call's scratch. Where A is [ranks, tokens], only the table knows
/// how many ranks there are.
inline Operands lookup_operands(const EmbeddingParams& e) {
  int64_t ranks = e.token_major ? 0 : kMaxRank;
  for (int s = 0; e.token_major && s < e.lora.slices.count; ++s) {
    if (e.a_cols[s] > ranks) ranks = min64(e.a_cols[s], kMaxRank);
  }
  return {static_cast<uint16_t*>(e.lora.scratch), static_cast<int32_t>(divide_up(ranks, 4) * 4)};
}
inline int64_t lookup_bytes(const EmbeddingParams& e) {
  return e.lora.slices.count * e.lora.rows * lookup_operands(e).pitch * int64_t{sizeof(uint16_t)};
}

}  // namespace polylora::cuda
