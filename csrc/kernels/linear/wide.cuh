// What the kernels for wide tiles share: the item, its copies of x and A, and where the sums go.
#pragma once

#include "linear/v_source.cuh"

namespace polylora::cuda {

inline constexpr int kMaxRankTiles = kMaxSlices * kMaxRank / kRankTile;
inline constexpr int kMaxBlocks = 8;  // of 32 ranks, of which v of a whole tile has room in shared memory

/// 16 ranks of a slice.
struct RankTile {
  int16_t slice, first_rank;
};

/// What a block works on, in shared memory.
struct WideItem {
  int32_t head[8];  // of the plan: version, rows, groups, wide tiles; of the tile: group, position, rows
  SliceEntry entry[kMaxSlices];
  int32_t row[kWideTileRows];  // beyond the tile's end the last
  int32_t index;               // of the tile
  // derived
  int32_t tiles;                        // of the plan
  int32_t rows;                         // of the tile
  int32_t plane_row;                    // the tile's first
  int32_t rank[kMaxSlices];             // 0: absent
  int32_t first_rank_tile[kMaxSlices];  // slices that share A and v_col share its rank tiles
  int32_t rank_tiles;
  RankTile rank_tile[kMaxRankTiles];
  int32_t blocks;                      // of 32 ranks, as many for a slice as it begins
  int32_t first_block[kMaxSlices];     // shared as rank tiles are
  int32_t block_tile[kMaxBlocks + 1];  // the first rank tile of each of the first ones
  int32_t is_distinct;                 // all slices are there and none shares
};
static_assert(sizeof(WideItem) % 16 == 0);  // what lies behind it is read in 16-byte pieces

/// The words that a WideItem is made of, one a thread, so that one load a thread reads them again: the item is read
/// before the kernel before has ended, and compared after it. Whatever stands in memory, nothing outside plan and table
/// is read.
///
/// Who a thread is, is read again wherever it matters: what follows from it would fill registers from begin to end.
class WideJob {
 public:
  /// All threads call it; it syncs at its end. `then(lane)`: what a warp does before that with the item that it has
  /// derived.
  template <typename Then>
  __device__ __forceinline__ static void read(const LinearTask& task, WideItem& item, int index, Then&& then) {
    const int thread = ptx::thread_again();
    if (thread < 7) item.head[thread] = ptx::load_fresh4(head_at(task, index));
    if (thread == 7) item.index = index;
    __syncthreads();
    if (index >= tiles_of(task, item)) {  // nothing to do: soon over
      if (thread == 0) item.tiles = item.rank_tiles = 0;
      __syncthreads();
      return;
    }
    if (has_entry_word(task))
      reinterpret_cast<int32_t*>(item.entry)[ptx::thread_again() - 8] = ptx::load_fresh4(entry_at(task, item));
    if (has_row()) item.row[ptx::thread_again() - 128] = load_row(task, item);
    __syncthreads();
    if (thread < 32) {
      derive(task, item, thread);
      __syncwarp();
      then(thread);
    }
    __syncthreads();
  }
  __device__ __forceinline__ static void read(const LinearTask& task, WideItem& item, int index) {
    read(task, item, index, [](int) {});
  }

  /// Whether memory now holds something else. Finds the addresses again rather than to keep them: registers are short.
  __device__ __forceinline__ static bool differs(const LinearTask& task, const WideItem& item) {
    const int thread = ptx::thread_again();
    if (thread < 7) return ptx::load_fresh4(head_at(task, item.index)) != item.head[thread];
    if (item.index >= item.tiles) return false;
    if (has_entry_word(task)) {
      return ptx::load_fresh4(entry_at(task, item)) !=
             reinterpret_cast<const int32_t*>(item.entry)[ptx::thread_again() - 8];
    }
    return has_row() && load_row(task, item) != item.row[ptx::thread_again() - 128];
  }

 private:
  static_assert(kPlanVersion == 0 && kPlanRows == 1 && kPlanGroups == 2);

  __device__ __forceinline__ static const int32_t* head_at(const LinearTask& task, int index) {
    const int thread = ptx::thread_again();
    if (thread < 4) return task.header + (thread < 3 ? thread : task.tiles_word);
    return reinterpret_cast<const int32_t*>(task.tile + min(index, task.max_tiles - 1)) + thread - 4;
  }

  __device__ __forceinline__ static bool has_entry_word(const LinearTask& task) {
    return static_cast<uint32_t>(ptx::thread_again() - 8) < sizeof(SliceEntry) / 4 * task.slices;
  }

  __device__ __forceinline__ static const int32_t* entry_at(const LinearTask& task, const WideItem& item) {
    const uint32_t group = min(static_cast<uint32_t>(item.head[4]), static_cast<uint32_t>(task.groups - 1));
    return reinterpret_cast<const int32_t*>(task.table + int64_t{group} * task.slices) + ptx::thread_again() - 8;
  }

  __device__ __forceinline__ static bool has_row() {
    return static_cast<uint32_t>(ptx::thread_again() - 128) < kWideTileRows;
  }

  __device__ __forceinline__ static int rows_of(const LinearTask& task, const WideItem& item) {
    return min(max(item.head[6], 1), min(kWideTileRows, task.rows));
  }

  __device__ __forceinline__ static int pos_of(const LinearTask& task, const WideItem& item) {
    return min(max(item.head[5], 0), task.rows - rows_of(task, item));
  }

  __device__ __forceinline__ static int32_t load_row(const LinearTask& task, const WideItem& item) {
    const int i = min(ptx::thread_again() - 128, rows_of(task, item) - 1);
    const int32_t row = ptx::load_fresh4(task.order + pos_of(task, item) + i);
    return static_cast<int32_t>(min(static_cast<uint32_t>(row), static_cast<uint32_t>(task.rows - 1)));
  }

  __device__ __forceinline__ static int tiles_of(const LinearTask& task, const WideItem& item) {
    const bool known = item.head[0] == kPlanVersionValue && item.head[1] == task.rows && item.head[2] == task.groups;
    return known ? min(max(item.head[3] - task.tiles_before, 0), task.max_tiles) : 0;
  }

  // A lane a slice.
  __device__ __forceinline__ static void derive(const LinearTask& task, WideItem& item, int lane) {
    int rank = 0;
    if (lane < task.slices) {
      const LinearSlice& slice = task.slice[lane];
      const SliceEntry& entry = item.entry[lane];
      const int64_t a_rows_used = task.a_rows_used > 0 ? task.a_rows_used : entry.rank;
      const bool fits = entry_fits(entry, a_rows_used, slice.a_rows, slice.width, slice.b_elements, task.v_width);
      if (fits && entry.rank <= slice.max_rank) rank = entry.rank;
    }
    // slices that multiply x with the same A into the same place share it: the first of them owns the rank tiles
    const SliceEntry& own_entry = item.entry[min(lane, task.slices - 1)];
    const uint64_t place =
        static_cast<uint64_t>(static_cast<uint32_t>(own_entry.a_row)) << 32 | static_cast<uint32_t>(own_entry.v_col);
    const LinearSlice& own_slice = task.slice[min(lane, task.slices - 1)];
    const uint32_t same = __match_any_sync(0xffffffffu, rank) & __match_any_sync(0xffffffffu, place) &
                          __match_any_sync(0xffffffffu, reinterpret_cast<uint64_t>(own_slice.a)) &
                          __match_any_sync(0xffffffffu, own_slice.a_stride);
    const int shares_with = __ffs(same) - 1;
    const bool own = rank > 0 && shares_with == lane;
    // rank tiles, and blocks of 32 ranks in the upper half of the word: a slice's own, then those up to it
    const int own_counts = own ? rank_tiles_of(rank) | (rank + 31) / 32 << 16 : 0;
    int counts = own_counts;
#pragma unroll
    for (int step = 1; step < kMaxSlices; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, counts, step);
      if (lane >= step) counts += before;
    }
    const int all_counts = __shfl_sync(0xffffffffu, counts, kMaxSlices - 1);
    const int before = __shfl_sync(0xffffffffu, counts - own_counts, shares_with);
    const int first = before & 0xffff, first_block = before >> 16;
    const int all = all_counts & 0xffff, blocks = all_counts >> 16;
    const bool is_distinct = !__any_sync(0xffffffffu, lane < task.slices && !own);
    // a table that claims more distinct ranks than v has columns for: no plane has room for them
    const bool room = task.planes == 0 || all * kRankTile <= task.plane_width;
    if (lane < task.slices) {
      item.rank[lane] = room ? rank : 0;
      item.first_rank_tile[lane] = first;
      item.first_block[lane] = first_block;
    }
    for (int r = 0; own && room && r < rank; r += kRankTile) {
      item.rank_tile[first + r / kRankTile] = {static_cast<int16_t>(lane), static_cast<int16_t>(r)};
      const int block = first_block + r / 32;
      if (r % 32 == 0 && block < kMaxBlocks) item.block_tile[block] = first + r / kRankTile;
    }
    if (lane == 0) {
      item.tiles = tiles_of(task, item);
      item.rows = rows_of(task, item);
      item.plane_row = task.planes_by_tile ? item.index * kWideTileRows : pos_of(task, item);
      item.rank_tiles = room ? all : 0;
      item.blocks = blocks;
      if (blocks <= kMaxBlocks) item.block_tile[blocks] = all;
      item.is_distinct = is_distinct;
    }
  }
};

/// Bytes of a stage of the ring of x and A.
__host__ __device__ constexpr int shrink_stage_bytes(int rank_tiles) {
  return (kWideTileRows + rank_tiles * kRankTile) * kChunkK * 2;
}

__device__ __forceinline__ int chunks_of_k(const LinearTask& task) { return (task.k + kChunkK - 1) / kChunkK; }

/// The chunks of K of a part of `parts`.
__device__ __forceinline__ Part chunks_of(const LinearTask& task, int part, int parts) {
  const int chunks = chunks_of_k(task);
  return {chunks * part / parts, chunks * (part + 1) / parts};
}

/// Brings the chunks of x and A of a pass over `kTiles` rank tiles into stages of the ring: a thread brings one 16-byte
/// piece of every (kThreads / 8)th row. Rows and ranks that are not there become zeros.
template <typename T, int kThreads, int kTiles>
class WideCopies {
 public:
  static constexpr int kStageBytes = shrink_stage_bytes(kTiles);
  static constexpr int kABytes = kWideTileRows * kChunkK * 2;  // from a stage's begin to its part of A

  __device__ __forceinline__ WideCopies(const LinearTask& task, const WideItem& item, int first_rank_tile)
      : task_(task), thread_(ptx::thread_again()) {
#pragma unroll
    for (int i = 0; i < kXPieces; ++i) {
      const int row = thread_row() + kRowsApart * i;
      x_[i] = static_cast<const T*>(task.x) + int64_t{item.row[row]} * task.x_stride + thread_k();
      if (row < item.rows) real_ |= 1u << i;
    }
#pragma unroll
    for (int i = 0; i < kAPieces; ++i) {
      const int row = thread_row() + kRowsApart * i;
      const int tile = first_rank_tile + row / kRankTile;
      a_[i] = static_cast<const T*>(task.x);
      if (row < kTiles * kRankTile && tile < item.rank_tiles) {
        const RankTile at = item.rank_tile[tile];
        const SliceEntry& entry = item.entry[at.slice];
        const LinearSlice& slice = task.slice[at.slice];
        const int r = at.first_rank + row % kRankTile;
        if (r < item.rank[at.slice]) {
          a_[i] = static_cast<const T*>(slice.a) + int64_t{entry.a_row + r} * slice.a_stride + thread_k();
          real_ |= 1u << (kXPieces + i);
        }
      }
    }
  }

  /// What is not real is not read: its address may be anything.
  __device__ __forceinline__ void start(unsigned char* stage, int chunk) const {
    unsigned char* to = stage + piece_at(thread_row(), thread_ % 8);
    const int k = chunk * kChunkK;
    const uint32_t real = k + thread_k() < task_.k ? real_ : 0;
#pragma unroll
    for (int i = 0; i < kXPieces; ++i) {
      ptx::copy_async16(to + i * kRowsApart * kChunkK * 2, x_[i] + k, (real >> i & 1) != 0 ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kAPieces; ++i) {
      if (kTiles * kRankTile % kRowsApart != 0 && thread_row() + kRowsApart * i >= kTiles * kRankTile) break;
      ptx::copy_async16(to + kABytes + i * kRowsApart * kChunkK * 2, a_[i] + k,
                        (real >> (kXPieces + i) & 1) != 0 ? 16 : 0);
    }
  }

 private:
  static constexpr int kRowsApart = kThreads / 8;
  static constexpr int kXPieces = kWideTileRows / kRowsApart;
  static constexpr int kAPieces = (kTiles * kRankTile + kRowsApart - 1) / kRowsApart;

  __device__ __forceinline__ int thread_row() const { return thread_ / 8; }
  __device__ __forceinline__ int thread_k() const { return thread_ % 8 * 8; }

  const LinearTask& task_;
  const int thread_;
  const T* x_[kXPieces];
  const T* a_[kAPieces];
  uint32_t real_ = 0;  // a bit for each of x, then of A
};

/// Stores a thread's sums, to the part's plane or to v: of rows `row` and `row` + 8 of the item, of kTiles rank tiles,
/// each kStep further, from `first_tile` on, ranks r, r + 1 and r + 8, r + 9 of each. `sums(i, second_row,
/// second_half)`: two of the ith.
template <int kTiles, int kStep, typename Sums>
__device__ __forceinline__ void store_sums(const LinearTask& task, const WideItem& item, int part, int row,
                                           int first_tile, int r, Sums&& sums) {
  const int tiles = item.rank_tiles - first_tile;
  if (task.planes > 0) {
    float* to = task.plane + part * task.plane_elements + int64_t{item.plane_row + row} * task.plane_width +
                first_tile * kRankTile + r;
#pragma unroll
    for (int second_row = 0; second_row < 2; ++second_row) {
      if (row + 8 * second_row < item.rows) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if (i * kStep >= tiles) break;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            *reinterpret_cast<float2*>(to + i * kStep * kRankTile + 8 * half) = sums(i, second_row, half);
          }
        }
      }
      to += 8 * task.plane_width;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i * kStep >= tiles) break;
    const RankTile tile = item.rank_tile[first_tile + i * kStep];
    const int left = item.rank[tile.slice] - tile.first_rank - r;
#pragma unroll
    for (int second_row = 0; second_row < 2; ++second_row) {
      if (row + 8 * second_row >= item.rows) break;
      float* to = task.v + int64_t{item.row[row + 8 * second_row]} * task.v_stride + item.entry[tile.slice].v_col +
                  tile.first_rank + r;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 two = sums(i, second_row, half);
        if (8 * half < left) to[8 * half] = two.x;
        if (8 * half + 1 < left) to[8 * half + 1] = two.y;
      }
    }
  }
}

/// Planes of an item's rank tiles, where they are not the same for all.
struct PlaneCounts {
  const uint8_t* of_tile;  // null: task.planes each
  int most;
};

/// v of rows [begin, end) of the item from its planes.
__device__ __forceinline__ void add_planes_to_v(const LinearTask& task, const WideItem& item, int begin, int end,
                                                PlaneCounts counts = {}) {
  const int quads = item.rank_tiles * (kRankTile / 4);  // a row
#pragma unroll 1
  for (int e = threadIdx.x; e < (end - begin) * quads; e += blockDim.x) {
    const int row = begin + e / quads;
    const int column = e % quads * 4;
    const RankTile tile = item.rank_tile[column / kRankTile];
    const int rank = item.rank[tile.slice];
    const int r = tile.first_rank + column % kRankTile;
    const float* from = task.plane + int64_t{item.plane_row + row} * task.plane_width + column;
    const float4 sum =
        add_planes(task, from, counts.of_tile != nullptr ? counts.of_tile[column / kRankTile] : task.planes);
    float* to = task.v + int64_t{item.row[row]} * task.v_stride + item.entry[tile.slice].v_col + r;
    if (r < rank) to[0] = sum.x;
    if (r + 1 < rank) to[1] = sum.y;
    if (r + 2 < rank) to[2] = sum.z;
    if (r + 3 < rank) to[3] = sum.w;
  }
}

// ---- host

/// The task of kernels for wide tiles, without planes.
inline LinearTask wide_task(const LoraParams& p) {
  LinearTask task = linear_task(p);
  task.tile = p.plan.wide_tile;
  task.max_tiles = static_cast<int32_t>(p.plan.max_wide_tiles);
  task.tiles_word = p.plan.runs == Runs::kAll ? kPlanWideTiles : kPlanLongTiles;
  return task;
}

/// Of the tiles that runs of n adapters have beyond those of a call's rows, as they seldom end where a tile does. What
/// is over of them fills n / 2 tiles on average; of 2 to 8 runs of random lengths, 3 n / 4 are enough for 94% and more.
enum class PartialTiles { kOnAverage = 2, kNearlyAlways = 3 };

/// Wide tiles that a call has. How many of a large table's adapters have rows at all, the host does not know.
inline int64_t expected_wide_tiles(const LoraParams& p, PartialTiles partial) {
  constexpr int64_t kFewAdapters = 8;
  const int64_t tiles =
      divide_up(p.rows, kWideTileRows) + min64(p.slices.groups, kFewAdapters) * static_cast<int>(partial) / 4;
  return min64(tiles, p.plan.max_wide_tiles);
}

/// Clusters that take a wide tile each.
struct WideClusters {
  int blocks;  // of a cluster
  int count;   // that the device holds
};

/// Tiles, one after the other, that `blocks` share.
struct Turns {
  int64_t tiles;
  int blocks;

  /// A tile takes each its share of what one would need, and a tenth of that, however many share it. H200, o r64,
  /// clusters of 2 to 6, us: 18 tiles 48.5, 35.3, 28.2, 25.9, 36.9, 33 tiles 48.8, 38.9, 61.2, 55.7, 51.4, 70 tiles
  /// 99.5, 83.0, 94.4, 99.8, 102.
  bool are_over_before(const Turns& other) const {
    return tiles * (10 + blocks) * other.blocks < other.tiles * (10 + other.blocks) * blocks;
  }
};

/// Of `least` to `most` blocks those that take `tiles` soonest.
template <auto kKernel>
cudaError_t best_clusters(int64_t tiles, const Device& device, int threads, int smem_bytes, int least, int most,
                          WideClusters& best) {
  const auto turns = [&](const WideClusters& c) { return Turns{divide_up(tiles, c.count), c.blocks}; };
  best = {least, 0};
  WideClusters clusters{};
  for (clusters.blocks = least; clusters.blocks <= most; ++clusters.blocks) {
    const cudaError_t error = resident_clusters<kKernel>(device, threads, smem_bytes, clusters.blocks, clusters.count);
    if (error != cudaSuccess) return error;
    if (clusters.count < 1) continue;
    if (best.count < 1 || turns(clusters).are_over_before(turns(best))) best = clusters;
  }
  return cudaSuccess;
}

/// The launch of clusters that take the task's tiles in turn.
inline LaunchShape cluster_shape(const LinearTask& task, const WideClusters& clusters, int threads, int smem_bytes) {
  const int64_t count = min64(task.max_tiles, clusters.count > 1 ? clusters.count : 1);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(count * clusters.blocks));
  shape.threads = threads;
  shape.smem_bytes = smem_bytes;
  shape.cluster = clusters.blocks;
  shape.overlap = true;
  return shape;
}

/// Rank tiles of an item: ranks are unknown to the host, so an even share of v for each slice. A block that finds more
/// passes over x again.
inline int expected_rank_tiles(const LoraParams& p) {
  const int64_t ranks = min64(p.v_width, int64_t{kMaxRank} * p.slices.count);
  return p.slices.count * static_cast<int>(divide_up(ranks, int64_t{kRankTile} * p.slices.count));
}

/// Planes of v, of `rows` rows, in the call's scratch, `skipped` bytes from its begin.
inline void set_planes(LinearTask& task, const LoraParams& p, int planes, int64_t rows, int64_t skipped = 0) {
  task.planes = planes;
  task.plane = reinterpret_cast<float*>(static_cast<char*>(p.scratch) + skipped);
  task.plane_width = static_cast<int32_t>(plane_width(p.v_width, p.slices.count));
  task.plane_elements = rows * task.plane_width;
}
inline int64_t plane_bytes(const LoraParams& p, int planes, int64_t rows) {
  return planes * rows * plane_width(p.v_width, p.slices.count) * int64_t{sizeof(float)};
}

}  // namespace polylora::cuda
