// What MoE's streaming kernels share: units of work, what a block knows of them, and how K is shared by warps.
//
// The bytes of an MoE layer's adapters are its weights: most groups (slot, expert) have a row or a few. A unit is a
// tile of the plan (up to 16 rows of a group) and a part of K or of the outputs; blocks of four warps take units in
// turn. Each warp brings its share of a unit's weights through a ring of its own (cp.async), and goes on to the next
// unit's before it has multiplied this one's, so that the memory never waits for a sum. A block looks up what it will
// work on for up to kBatch units at once, sixteen threads each: the reads depend on each other, and their instructions
// would be most of a small unit's.
#pragma once

#include "linear/task.cuh"

namespace polylora::cuda {

inline constexpr int kStreamWarps = 4;
inline constexpr int kStreamThreads = kStreamWarps * 32;
inline constexpr int kStreamSlices = 2;
inline constexpr int kBatch = 16;  // units

struct StreamSlice {
  const void* a;
  const void* b;
  int64_t b_elements;
  int32_t a_stride, a_rows;
};

struct StreamTask {
  const int32_t* header;
  const Tile* tile;
  const int32_t* order;
  const SliceEntry* table;
  const void* x;
  const int32_t* row_map;
  const float* row_weight;
  float* plane;            // [planes][rows][plane_width]: sums over parts of K
  int64_t plane_elements;  // of a plane
  int32_t planes, plane_width;
  int32_t x_stride, x_div, k;
  int32_t rows, groups, pairs;  // that the plan must have been made for
  int32_t plan_pairs;           // of its inverse map
  int32_t max_tiles;
  int32_t slices, width, v_width;
  int32_t parts;  // units of a tile
  StreamSlice slice[kStreamSlices];
};

/// What is known of a tile but for its rows. Ranks of 0: absent.
struct StreamTile {
  const void* a[kStreamSlices];
  const void* b[kStreamSlices];
  int32_t rank[kStreamSlices];
  int32_t first_rank_tile[kStreamSlices];  // slices that share A and v_col share its rank tiles
  int32_t b_stride[kStreamSlices];
  float scale[kStreamSlices];
  int32_t v_col[kStreamSlices];
  int32_t rank_tiles, rows;

  /// How many of the rank tiles are of the first slice; they come first.
  __device__ __forceinline__ int tiles_of_first() const { return rank_tiles_of(rank[0]); }
};

/// A unit's tile, in shared memory.
struct StreamItem : StreamTile {
  int32_t row[kTileRows];    // beyond the tile's end the last
  int32_t x_row[kTileRows];  // of x
  float weight[kTileRows];
};
static_assert(sizeof(StreamItem) % 16 == 0);

/// The plan's header, asked for before it is needed.
struct PlanWords {
  int4 a, b, c;

  __device__ __forceinline__ explicit PlanWords(const StreamTask& task)
      : a(ptx::load_fresh16(task.header)),
        b(ptx::load_fresh16(task.header + 4)),
        c(ptx::load_fresh16(task.header + 8)) {}

  /// Whether all rows have an adapter.
  __device__ __forceinline__ bool all_active(const StreamTask& task) const {
    return tiles(task) > 0 && a.w == task.rows;
  }
  /// Tiles of the plan; none where it was made for another call.
  __device__ __forceinline__ int tiles(const StreamTask& task) const { return tiles(task, b.y); }
  __device__ __forceinline__ int wide_tiles(const StreamTask& task) const { return tiles(task, c.y); }

 private:
  __device__ __forceinline__ int tiles(const StreamTask& task, int32_t count) const {
    static_assert(kPlanVersion == 0 && kPlanRows == 1 && kPlanGroups == 2 && kPlanActiveRows == 3 && kPlanTiles == 5 &&
                  kPlanPairs == 8 && kPlanWideTiles == 9);
    const bool fits = a.x == kPlanVersionValue && a.y == task.rows && a.z == task.groups && c.x == task.plan_pairs;
    return fits ? min(max(count, 0), task.max_tiles) : 0;
  }
};

/// An entry, where it is there and leads nowhere outside; rank 0 else.
__device__ __forceinline__ SliceEntry load_entry(const StreamTask& task, uint32_t group, int s) {
  const int4* from = reinterpret_cast<const int4*>(task.table + int64_t{group} * task.slices + s);
  const int4 low = ptx::load_fresh16(from);
  const int4 high = ptx::load_fresh16(from + 1);
  const uint64_t offset = static_cast<uint64_t>(static_cast<uint32_t>(high.y)) << 32 | static_cast<uint32_t>(high.x);
  SliceEntry entry{low.x, low.y, low.z, low.w, static_cast<int64_t>(offset), __int_as_float(high.z), 0};
  const StreamSlice& slice = task.slice[s];
  if (!entry_fits(entry, entry.rank, slice.a_rows, task.width, slice.b_elements, task.v_width)) entry.rank = 0;
  return entry;
}

/// A unit's ranks, and where their sums stand.
__device__ __forceinline__ void set_ranks(const StreamTask& task, const SliceEntry& first, const SliceEntry& second,
                                          StreamTile& item) {
  const int rank0 = first.rank;
  const int rank1 = task.slices > 1 ? second.rank : 0;
  const bool shared = rank0 > 0 && rank1 == rank0 && first.a_row == second.a_row && first.v_col == second.v_col &&
                      task.slice[0].a == task.slice[1].a && task.slice[0].a_stride == task.slice[1].a_stride;
  const int tiles = rank_tiles_of(rank0);
  const int rank_tiles = tiles + (shared ? 0 : rank_tiles_of(rank1));
  const bool room =
      rank_tiles * kRankTile <= task.plane_width;  // else a table claims more ranks than v has columns for
  item.rank_tiles = room ? rank_tiles : 0;
  item.first_rank_tile[0] = 0;
  item.first_rank_tile[1] = shared ? 0 : tiles;
#pragma unroll
  for (int s = 0; s < kStreamSlices; ++s) {
    const SliceEntry& entry = s == 0 ? first : second;
    const StreamSlice& slice = task.slice[s < task.slices ? s : 0];
    item.rank[s] = room ? (s == 0 ? rank0 : rank1) : 0;
    item.scale[s] = item.rank[s] > 0 ? entry.scale : 0.f;  // an absent one's may be anything
    item.b_stride[s] = entry.b_stride;
    item.v_col[s] = entry.v_col;
    item.a[s] = static_cast<const uint16_t*>(slice.a) + int64_t{entry.a_row} * slice.a_stride;
    item.b[s] = static_cast<const uint16_t*>(slice.b) + entry.b_offset;
  }
}

/// The same, looked up.
__device__ __forceinline__ void load_ranks(const StreamTask& task, int32_t group_word, StreamTile& to) {
  const uint32_t group = min(static_cast<uint32_t>(group_word), static_cast<uint32_t>(task.groups - 1));
  const SliceEntry entry = load_entry(task, group, 0);
  set_ranks(task, entry, task.slices > 1 ? load_entry(task, group, 1) : entry, to);
}

/// The row at a position of the plan's order, and its pair.
__device__ __forceinline__ int row_at(const StreamTask& task, int pos) {
  const int32_t word = ptx::load_fresh4(task.order + min(pos, task.rows - 1));
  return min(static_cast<uint32_t>(word), static_cast<uint32_t>(task.rows - 1));
}
__device__ __forceinline__ int pair_of(const StreamTask& task, int row) {
  if (task.row_map == nullptr) return row;
  const int32_t mapped = ptx::load_fresh4(task.row_map + row);
  return static_cast<uint32_t>(mapped) < static_cast<uint32_t>(task.pairs) ? mapped : 0;
}

/// A tile of the plan, of `most` rows at most: inside the call, whatever stands there.
struct PlanTile {
  int32_t group;
  int rows, pos;

  __device__ __forceinline__ PlanTile(const StreamTask& task, const Tile* at, int most) {
    const int4 tile = ptx::load_fresh16(at);
    group = tile.x;
    rows = min(max(tile.z, 1), most);
    pos = min(max(tile.y, 0), task.rows - 1);
  }
};

/// Of the tiles first, first + stride, ... below `tiles`, those of a batch.
__device__ __forceinline__ int items_of(int first, int stride, int tiles) {
  return first < tiles ? min(kBatch, (tiles - first + stride - 1) / stride) : 0;
}

/// Looks them up; the block calls it. With the capacity for `tiles` it also looks up what lies behind the live ones,
/// which nobody may use: whatever stands in memory, nothing outside plan, table, row map and weights is read.
__device__ __forceinline__ void load_items(const StreamTask& task, int first, int stride, int tiles,
                                           StreamItem (&item)[kBatch]) {
  const int count = items_of(first, stride, tiles);
  const int j = static_cast<int>(threadIdx.x) % kTileRows;
  // sixteen threads an item: all read its tile, each a row, the first its entries
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) / kTileRows; i < count; i += kStreamThreads / kTileRows) {
    StreamItem& to = item[i];
    const PlanTile tile(task, task.tile + first + i * stride, kTileRows);
    const int row = row_at(task, tile.pos + min(j, tile.rows - 1));
    if (j == 0) {
      load_ranks(task, tile.group, to);
      to.rows = tile.rows;
    }
    const int pair = pair_of(task, row);
    to.row[j] = row;
    to.x_row[j] = task.x_div > 0 ? pair / task.x_div : row;
    to.weight[j] = task.row_weight != nullptr ? task.row_weight[pair] : 1.f;
  }
  __syncthreads();
}

/// The chunks of K of a block.
struct BlockChunks {
  int begin, end;

  __device__ __forceinline__ explicit BlockChunks(const StreamTask& task, int first = 0) {
    const int chunks = (task.k + kChunkK - 1) / kChunkK;
    const int part = blockIdx.y;
    begin = chunks * part / task.parts + first;
    end = chunks * (part + 1) / task.parts;
  }
};

/// Those of a warp: begin, begin + kStreamWarps, ...; at least one step, which may have none.
struct WarpChunks : BlockChunks {
  __device__ __forceinline__ explicit WarpChunks(const StreamTask& task)
      : BlockChunks(task, static_cast<int>(threadIdx.x) / 32) {}
};

// ---- host

inline StreamTask stream_task(const LoraParams& p, int planes) {
  StreamTask task{};
  task.header = p.plan.header;
  task.tile = p.plan.tile;
  task.order = p.plan.order;
  task.table = p.slices.table;
  task.x = p.x;
  task.row_map = p.row_map;
  task.row_weight = p.row_weight;
  task.plane = static_cast<float*>(p.scratch);
  task.planes = planes;
  // there are no planes of a v that is given, and any ranks have room
  task.plane_width = p.v_of_x ? INT32_MAX : static_cast<int32_t>(plane_width(p.v_width, p.slices.count));
  task.plane_elements = p.rows * task.plane_width;
  task.x_stride = static_cast<int32_t>(p.x_stride);
  task.x_div = p.x_div;
  task.k = static_cast<int32_t>(p.k);
  task.rows = p.plan.rows;
  task.groups = p.plan.groups;
  task.plan_pairs = p.plan.pairs;
  task.pairs = p.plan.pairs > 0 ? p.plan.pairs : p.plan.rows;
  task.max_tiles = static_cast<int32_t>(p.plan.max_tiles);
  task.slices = p.slices.count;
  task.width = p.slices.width[0];
  task.v_width = p.v_width;
  for (int s = 0; s < p.slices.count; ++s) {
    task.slice[s] = {p.slices.a[s], p.slices.b[s], p.slices.b_elements[s], static_cast<int32_t>(p.slices.a_stride[s]),
                     static_cast<int32_t>(min64(p.slices.a_rows[s], INT32_MAX))};
  }
  return task;
}

/// Units are of wide tiles.
inline void to_wide_tiles(const LoraParams& p, StreamTask& task) {
  task.tile = p.plan.wide_tile;
  task.max_tiles = static_cast<int32_t>(p.plan.max_wide_tiles);
}

/// Up to `blocks` blocks that take tiles in turn, each a part of them.
inline LaunchShape stream_shape(int64_t blocks, int64_t tiles, int parts) {
  const int64_t most = blocks / parts;
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(min64(tiles < 1 ? 1 : tiles, most < 1 ? 1 : most)), static_cast<unsigned>(parts));
  shape.threads = kStreamThreads;
  shape.overlap = true;
  return shape;
}

/// Units of a tile, `most` at most: as many as all blocks together can begin with. More, to even out the blocks' last
/// turns, cost more than they bring.
inline int stream_parts(int64_t tiles, int64_t blocks, int64_t most) {
  const int64_t wanted = blocks / (tiles < 1 ? 1 : tiles);
  return static_cast<int>(min64(wanted < 1 ? 1 : wanted, most < 1 ? 1 : most));
}

}  // namespace polylora::cuda
