// The slice table: where the weights of every (group, slice) lie and how big they are.
//
// A group is what a row's weights are chosen by: the adapter slot in a plain layer, slot * experts + expert in MoE.
// A slice is one of the outputs fused into a module (q, k, v of a qkv projection). One table of
// [groups, slices] entries describes dense pools, ragged arenas and the pools of vLLM and SGLang alike.
#pragma once

#include <cstddef>
#include <cstdint>

namespace polylora {

inline constexpr int kMaxSlices = 8;
inline constexpr int kMaxRank = 256;

/// One (group, slice). A rows and B elements count from the slice's own base pointer (SliceSet::a, SliceSet::b).
///
///   A[j, :]  = a + (a_row + j) * a_stride                     j in [0, rank)
///   v[row, j] lies at v + row * v_stride + v_col + j
///   B[n, j]  = b + b_offset + n * b_stride + j                n in [0, width)
///
/// Two slices of a group with the same v_col share one A (same a_row, same rank): shrink computes it once.
struct alignas(16) SliceEntry {
  int32_t a_row;     // first row of A
  int32_t rank;      // true rank; 0 = this adapter does not touch this slice
  int32_t v_col;     // first column of this slice's part of v
  int32_t b_stride;  // row pitch of B, elements
  int64_t b_offset;  // first element of B
  float scale;       // of the delta, in fp32; the fast CUDA kernels apply it after the product with B, the others to v
  int32_t epilogue;  // reserved for a per-output factor and bias (DoRA): offset + 1 into their arenas; must be 0
};

static_assert(sizeof(SliceEntry) == 32, "the Python side packs entries as 8 int32 words");
static_assert(offsetof(SliceEntry, a_row) == 0 && offsetof(SliceEntry, rank) == 4 && offsetof(SliceEntry, v_col) == 8 &&
              offsetof(SliceEntry, b_stride) == 12 && offsetof(SliceEntry, b_offset) == 16 &&
              offsetof(SliceEntry, scale) == 24 && offsetof(SliceEntry, epilogue) == 28);

}  // namespace polylora
