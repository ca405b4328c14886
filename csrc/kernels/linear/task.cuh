// What the fast kernels of linear are told, and what they share: 16-bit elements, 16-byte aligned rows.
#pragma once

#include "common/fragments.cuh"
#include "common/launch.cuh"
#include "polylora/params.h"

namespace polylora::cuda {

inline constexpr int kUnitN = 64;     // outputs of a unit: what a warp multiplies with B at a time
inline constexpr int kRankTile = 16;  // ranks of two mma

/// How v lies in memory between two kernels for prefill.
///
/// kRows: fp32 [rows, v_width], row pitch v_stride: what the public ops have between them.
/// kPacked: the 16-bit operands of expand, rounded once; a row for each position of the plan's order. A slice's ranks
/// stand
///   from its packed column on in blocks of 32, zeros behind the last: rank r = 8t + 2m + e of a block in place 8m + 2t
///   + e, so that ldmatrix hands a thread the ranks that it reads of B with one 16-byte load.
/// kPlanes: fp32 sums over parts of K, a plane for each part; rows and columns as packed, but ranks in order.
enum class VForm : int32_t { kRows, kPacked, kPlanes };

// The call, as small as it can be: a block's first reads of its parameters miss every cache.
struct LinearSlice {
  const void* a;
  const void* b;
  int64_t b_elements;
  int32_t a_stride, a_rows;
  int32_t width, col;
  int32_t unit_begin;  // units of the slices before
};
struct LinearTask {
  const int32_t* header;
  const Tile* tile;  // of up to 16 or 128 rows
  const int32_t* order;
  const SliceEntry* table;
  const void* x;
  void* y;
  void* v;          // in one of the forms of VForm
  int64_t v_plane;  // kPlanes: elements of a plane
  int32_t planes;   // kPlanes
  int32_t x_stride, y_stride;
  int32_t v_stride;  // kRows; elements of a row in the other forms
  VForm v_form;
  int32_t k;
  int32_t rows, groups;  // that the plan must have been made for
  int32_t max_tiles;
  int32_t slices;
  int32_t v_width;       // that the caller allows the table
  int32_t units;         // of all slices
  int32_t blocks_log2;   // decode: blocks of a cluster
  int32_t parts_log2;    // decode: clusters that share the outputs of a tile
  int32_t k_split_log2;  // decode: warps that share K. Prefill: blocks
  int32_t rank_cap;      // ranks that shared memory has room for
  bool follows_shrink;   // the kernel before is our own of the same call: only v is still being written
  LinearSlice slice[kMaxSlices];

  /// The slice of a unit.
  __device__ __forceinline__ int slice_of(int unit) const {
    int s = 0;
#pragma unroll 1
    while (s + 1 < slices && unit >= slice[s + 1].unit_begin) ++s;
    return s;
  }
};

/// 16 ranks of a slice of an item, in shared memory.
struct RankTile {
  int16_t slice, first_rank;
};

/// See VForm.
struct PackedV {
  /// Place of rank r (and r + 1, for even r) among a slice's columns.
  __device__ __forceinline__ static int place(int r) { return (r & ~31) + r % 8 / 2 * 8 + r % 32 / 8 * 2 + r % 2; }

  __device__ __forceinline__ static int columns(int rank) { return (rank + 31) / 32 * 32; }
};

/// First packed columns of the slices; slices with equal v_col share one A. Returns a bit for each slice that is the
/// first of those that share. `rank`: 0 where absent.
__device__ __forceinline__ uint32_t pack_columns(const SliceEntry* entry, const int32_t* rank, int slices,
                                                 int32_t* packed_col) {
  int columns = 0;
  uint32_t first = 0;
#pragma unroll 1
  for (int s = 0; s < slices; ++s) {
    int shared = -1;
#pragma unroll 1
    for (int other = 0; other < s && shared < 0; ++other) {
      if (rank[other] > 0 && entry[other].v_col == entry[s].v_col) shared = other;
    }
    packed_col[s] = shared >= 0 ? packed_col[shared] : columns;
    if (shared >= 0) continue;
    first |= 1u << s;
    columns += PackedV::columns(rank[s]);
  }
  return first;
}

/// Elements of a row of packed v that are enough for any table.
inline int64_t packed_v_width(int64_t v_width, int slices) { return (v_width + 31 * slices + 7) / 8 * 8; }

struct Part {
  int begin, end;
};
/// What is `index`'s of `total` things shared by 2^parts_log2.
__device__ __forceinline__ Part part_of(int total, int index, int parts_log2) {
  return {(total * index) >> parts_log2, (total * (index + 1)) >> parts_log2};
}

// ---- host

inline bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The fields that all kernels of linear fill alike.
inline LinearTask linear_task(const LoraParams& p) {
  LinearTask task{};
  task.header = p.plan.header;
  task.order = p.plan.order;
  task.table = p.slices.table;
  task.x = p.x;
  task.y = p.y;
  task.v = p.v;
  task.x_stride = static_cast<int32_t>(p.x_stride);
  task.y_stride = static_cast<int32_t>(p.y_stride);
  task.v_stride = static_cast<int32_t>(p.v_stride);
  task.k = static_cast<int32_t>(p.k);
  task.rows = p.plan.rows;
  task.groups = p.plan.groups;
  task.slices = p.slices.count;
  task.v_width = p.v_width;
  for (int s = 0; s < p.slices.count; ++s) {
    LinearSlice& slice = task.slice[s];
    slice.a = p.slices.a[s];
    slice.b = p.slices.b[s];
    slice.b_elements = p.slices.b_elements[s];
    slice.a_stride = static_cast<int32_t>(p.slices.a_stride[s]);
    slice.a_rows = static_cast<int32_t>(min64(p.slices.a_rows[s], INT32_MAX));
    slice.width = p.slices.width[s];
    slice.col = static_cast<int32_t>(p.slices.col[s]);
    slice.unit_begin = task.units;
    task.units += static_cast<int32_t>(divide_up(slice.width, kUnitN));
  }
  return task;
}

/// Whether x and A can be read in 16-byte pieces, and every number fits the task.
inline bool fast_shrink_serves(const LoraParams& p) {
  if (p.dtype == DType::kFloat32 || p.x_div != 0 || p.row_map || p.row_weight) return false;
  if (p.k % 8 != 0 || p.k > 1 << 24 || p.x_stride % 8 != 0 || p.x_stride > INT32_MAX || !is_aligned(p.x, 16))
    return false;
  if (!is_aligned(p.plan.header, 16) || !is_aligned(p.slices.table, 16) || p.v_stride > INT32_MAX) return false;
  for (int s = 0; s < p.slices.count; ++s) {
    if (!is_aligned(p.slices.a[s], 16) || p.slices.a_stride[s] % 8 != 0 || p.slices.a_stride[s] > INT32_MAX)
      return false;
  }
  return true;
}

/// Whether y and (where the table says so, else in smaller pieces) B can be read in 16-byte pieces.
inline bool fast_expand_serves(const LoraParams& p) {
  if (p.dtype == DType::kFloat32 || p.row_map || p.row_weight || p.slices.col_stride != 1) return false;
  if (p.y_stride % 8 != 0 || p.y_stride > INT32_MAX || !is_aligned(p.y, 16)) return false;
  if (!is_aligned(p.plan.header, 16) || !is_aligned(p.slices.table, 16) || p.v_stride > INT32_MAX) return false;
  for (int s = 0; s < p.slices.count; ++s) {
    if (!is_aligned(p.slices.b[s], 16)) return false;
    if (p.slices.width[s] % 8 != 0 || p.slices.col[s] % 8 != 0 || p.slices.col[s] > INT32_MAX) return false;
  }
  return true;
}

}  // namespace polylora::cuda
