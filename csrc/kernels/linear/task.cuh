// What the fast kernels of linear are told, and what they share: 16-bit elements, 16-byte aligned rows.
#pragma once

#include "common/dtype.cuh"
#include "common/fragments.cuh"
#include "common/launch.cuh"
#include "polylora/params.h"

namespace polylora::cuda {

inline constexpr int kUnitN = 64;     // outputs of a unit, in which those of wide tiles are shared
inline constexpr int kRankTile = 16;  // ranks of two mma
inline constexpr int kChunkK = 64;    // elements of K in a stage: 128 bytes a row

/// Rank tiles that hold so many ranks, and the ranks that those hold.
__host__ __device__ constexpr int rank_tiles_of(int ranks) { return (ranks + kRankTile - 1) / kRankTile; }
__host__ __device__ constexpr int whole_rank_tiles(int ranks) { return rank_tiles_of(ranks) * kRankTile; }

// The call, as small as it can be: a block's first reads of its parameters miss every cache.
struct LinearSlice {
  const void* a;
  const void* b;
  int64_t b_elements;
  int32_t a_stride, a_rows;
  int32_t width, col;
  int32_t unit_begin;  // units of the slices before
  int32_t max_rank;    // of an entry
};
struct LinearTask {
  const int32_t* header;
  const Tile* tile;  // of up to 16 or 128 rows
  const int32_t* order;
  const SliceEntry* table;
  const void* x;
  void* y;
  float* v;  // [rows, v_width], row pitch v_stride
  // v between the halves: sums over parts of K, [planes][plane_rows][plane_width]; a row for each position of the
  // plan's order, or 128 for each wide tile of the launch; 16 columns for each rank tile of a wide item, or rank_cap
  // for each slice. Decode of short runs alone: a row for each of a job
  float* plane;
  int64_t plane_elements;
  int32_t plane_rows;  // decode
  int32_t planes;      // 0: v is used instead
  int32_t plane_width;
  int32_t x_stride, y_stride, v_stride;
  int32_t k;
  int32_t rows, groups;  // that the plan must have been made for
  int32_t max_tiles;
  int32_t tiles_before;              // of the header's count: another launch's
  int32_t skip_at, skipped_tiles;    // linear_wide: from this tile on so many are another launch's
  int32_t tiles_word, longest_word;  // of the plan's header: how many tiles there are; decode: rows of the longest run
  int32_t slices;
  int32_t v_width;       // that the caller allows the table
  int32_t units;         // of all slices
  int32_t blocks_log2;   // decode: blocks of a cluster
  int32_t parts_log2;    // decode: clusters that share the outputs of a tile
  int32_t k_split_log2;  // decode: warps that share K
  int32_t rank_cap;      // decode: ranks that shared memory has room for
  int32_t a_rows_used;   // of an entry; 0: its rank
  // of the blocks that share the outputs of a tile, each slice's first, then their number; all zero: shared otherwise
  uint16_t first_part[kMaxSlices + 1];
  bool sets_y;       // decode: y is the deltas alone; it is written, -0 where a slice is absent
  bool follows_own;  // the kernel before is our own of the same call: of what this one reads, only v may still change
  bool planes_by_tile;  // linear_wide: their rows
  bool holds_next;      // the next kernel is such a one: it starts when all that came before this one is done
  LinearSlice slice[kMaxSlices];
  const float* row_weight;  // pairs of MoE: multiplies a row's delta; or null
  int32_t x_div;            // pairs of MoE: row p reads x row p / x_div; or 0: row p

  /// The slice of a unit.
  __device__ __forceinline__ int slice_of(int unit) const {
    int s = 0;
#pragma unroll 1
    while (s + 1 < slices && unit >= slice[s + 1].unit_begin) ++s;
    return s;
  }

  /// The slice of a block, where each slice has blocks of its own.
  __device__ __forceinline__ int slice_of_part(int part) const {
    int s = 0;
    while (part >= first_part[s + 1]) ++s;
    return s;
  }
};

/// Where 16-byte piece `piece` of row `row` of a stage lies, in bytes: the 128-byte swizzle of the tensor cores' own
/// layouts, free of bank conflicts for ldmatrix, too.
__device__ __forceinline__ int piece_at(int row, int piece) { return row * kChunkK * 2 + ((piece ^ (row & 7)) << 4); }

struct Part {
  int begin, end;
};
/// What is `index`'s of `total` things shared by 2^parts_log2.
__device__ __forceinline__ Part part_of(int total, int index, int parts_log2) {
  return {(total * index) >> parts_log2, (total * (index + 1)) >> parts_log2};
}
/// The same of the things in `all`.
__device__ __forceinline__ Part part_of(Part all, int index, int parts_log2) {
  const Part part = part_of(all.end - all.begin, index, parts_log2);
  return {all.begin + part.begin, all.begin + part.end};
}

// ---- host

inline bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Ranks of a slice where all have an even share of v: what kernels are made ready for, whatever the table says.
inline int64_t even_rank(const LoraParams& p) {
  const int64_t rank = divide_up(p.v_width, p.slices.count);
  return rank < 1 ? 1 : rank;
}

/// Columns of a plane that are enough for any table.
inline int64_t plane_width(int64_t v_width, int slices) {
  return divide_up(min64(v_width, int64_t{kMaxRank} * slices) + (kRankTile - 1) * slices, kRankTile) * kRankTile;
}

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
  task.row_weight = p.row_weight;
  task.x_div = p.x_div;
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
    slice.max_rank = kMaxRank;
    task.units += static_cast<int32_t>(divide_up(slice.width, kUnitN));
  }
  return task;
}

/// Gives each slice some of `parts` (at least one each) blocks that share the outputs of a tile, so that the most
/// outputs of a block are as few as can be.
inline void share_parts(LinearTask& task, int parts) {
  int own[kMaxSlices];
  for (int s = 0; s < task.slices; ++s) own[s] = 1;
  for (int left = parts - task.slices; left > 0; --left) {
    int most = 0;
    for (int s = 1; s < task.slices; ++s) {
      if (int64_t{task.slice[s].width} * own[most] > int64_t{task.slice[most].width} * own[s]) most = s;
    }
    ++own[most];
  }
  for (int s = 0; s < task.slices; ++s) task.first_part[s + 1] = static_cast<uint16_t>(task.first_part[s] + own[s]);
}

inline constexpr int kSliceUnits = 4;  // what beginning another slice costs a block, in units: latencies

/// The same with `blocks`, unless the busiest of them has more than 1.15 times an even share of all outputs, in which
/// some begin a second slice: then first_part stays all zero. H200, us, own blocks and even: 3 blocks, 4096 rows of
/// qkv r16 59.5 and 49.2, of gate_up r16 193 and 163, r128 417 and 291; 5, 2560 rows of qkvz r64 76.7 and 61.4. At 1.12
/// times an even share (9, 1024 rows) qkv r16 19.1 and 19.8, r64 29.0 and 30.6, gate_up r16 48.5 and 53.4, r64 63.0 and
/// 59.9, at 1.25 (8, 1536 rows; 4, 3072) qkvz r16 34.9 and 36.1, 62.8 and 59.5, r64 46.2 and 45.3, 77.2 and 71.0.
inline void share_by_slices(LinearTask& task, int blocks) {
  share_parts(task, blocks);
  int64_t most = 0;  // units of a block
  for (int s = 0; s < task.slices; ++s) {
    const int64_t own = task.first_part[s + 1] - task.first_part[s];
    const int64_t units = divide_up(divide_up(task.slice[s].width, kUnitN), own);
    if (units > most) most = units;
  }
  const int64_t even = task.units + int64_t{kSliceUnits} * (task.slices - 1);  // of all blocks
  if (most * blocks * 20 <= even * 23) return;
  for (int s = 0; s < task.slices; ++s) task.first_part[s + 1] = 0;
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

/// What of an embedding's call is like linear's.
inline void set_lookup(LinearTask& task, const EmbeddingParams& e) {
  if (!e.token_major) return;
  task.a_rows_used = static_cast<int32_t>(e.vocab);
  for (int s = 0; s < task.slices; ++s) task.slice[s].max_rank = e.a_cols[s];
}

/// Ranks of an embedding's slices, from how A lies: next to each other within a token, or an even share of rows for
/// each group.
inline int64_t embedding_rank(const EmbeddingParams& e) {
  const int64_t rank = e.token_major ? e.lora.slices.a_stride[0] : e.lora.slices.a_rows[0] / e.lora.slices.groups;
  return rank < 1 ? 1 : min64(rank, kMaxRank);
}

}  // namespace polylora::cuda
