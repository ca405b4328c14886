// plan, moe_plan: a stable sort of the rows by group, its runs and tiles, by one block in one launch.
//
// Up to kPlanSortRows rows the block holds all of them: a radix sort over the bits of a group id, then a scan over the
// sorted rows (run index and start). Above, it counts rows per group in the plan's workspace, scans the groups, and
// places the rows a sorted chunk at a time. All sums are of integers: the result depends on
// the ids alone. The sort's cost grows with the capacity, not with the rows in use.
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "plan/row_source.cuh"
#include "polylora/cuda.h"

namespace polylora::cuda {
namespace {

struct MaxOp {
  __device__ __forceinline__ int32_t operator()(int32_t a, int32_t b) const { return a > b ? a : b; }
};

// Run index (high half) and run start (low half) of a sorted row, scanned as one word: the index adds up, the start
// is a maximum. Both stay below 2^15 in one chunk.
struct RunScanOp {
  __device__ __forceinline__ int32_t operator()(int32_t a, int32_t b) const {
    const int32_t start = max(a & 0xffff, b & 0xffff);
    return (((a >> 16) + (b >> 16)) << 16) | start;
  }
};

// Sections of a plan, written.
struct PlanSections {
  int32_t *header, *row_group, *order, *run_group, *run_start;
  Tile *tile, *wide_tile;
  int32_t *pair_pos, *workspace;
};

PlanSections sections(int32_t* plan, int64_t rows, int64_t groups, int64_t pairs) {
  const PlanLayout at = plan_layout(rows, groups, pairs);
  return {plan,
          plan + at.row_group,
          plan + at.order,
          plan + at.run_group,
          plan + at.run_start,
          reinterpret_cast<Tile*>(plan + at.tile),
          reinterpret_cast<Tile*>(plan + at.wide_tile),
          pairs > 0 ? plan + at.pair_pos : nullptr,
          plan + at.workspace};
}

struct PlanTask {
  RowSource source;
  PlanSections out;
  int key_bits;  // of the keys 0..groups; key `groups` = no adapter, sorts last
};

template <int kThreads, int kItems>
struct Collectives {
  using Sort = cub::BlockRadixSort<uint32_t, kThreads, kItems, uint32_t>;
  using Scan = cub::BlockScan<int32_t, kThreads>;
  using Reduce = cub::BlockReduce<int32_t, kThreads>;
  union Storage {
    typename Sort::TempStorage sort;
    typename Scan::TempStorage scan;
    typename Reduce::TempStorage reduce;
  };
};

// Sanitises the rows [base, base + kThreads * kItems) into row_group and keys; returns how many ids were invalid.
template <int kThreads, int kItems>
__device__ int32_t load_keys(const PlanTask& task, int64_t base, uint32_t (&key)[kItems], uint32_t (&row)[kItems]) {
  int32_t invalid_ids = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t r = base + threadIdx.x * kItems + i;
    key[i] = static_cast<uint32_t>(task.source.groups);
    row[i] = static_cast<uint32_t>(r);
    if (r >= task.source.p.rows) continue;
    bool invalid = false;
    const int32_t group = task.source.group(r, invalid);
    invalid_ids += invalid;
    task.out.row_group[r] = group;
    if (group >= 0) key[i] = static_cast<uint32_t>(group);
    // two positions of one pair: the higher one stands in the inverse
    if (task.out.pair_pos) {
      const int32_t pair = task.source.p.row_map[r];
      if (pair >= 0 && pair < task.source.p.pairs) atomicMax(&task.out.pair_pos[pair], static_cast<int32_t>(r));
    }
  }
  return invalid_ids;
}

__device__ void clear_inverse(const PlanTask& task) {
  if (task.out.pair_pos == nullptr) return;
  for (int64_t i = threadIdx.x; i < task.source.p.pairs; i += blockDim.x) task.out.pair_pos[i] = -1;
  __syncthreads();
}

// A run, before its tiles are written.
struct Run {
  int32_t group, start, rows, index;
};

// Of short runs: tiles and, as each has one, wide tiles, added as one word.
static_assert(kShortRun <= kWideTileRows);
struct ShortCounts {
  int32_t word = 0;

  __device__ __forceinline__ static ShortCounts of(int32_t rows) {
    return {rows > 0 && rows <= kShortRun ? (rows + kTileRows - 1) / kTileRows << 16 | 1 : 0};
  }
  __device__ __forceinline__ int32_t tiles() const { return word >> 16; }
  __device__ __forceinline__ int32_t wide_tiles() const { return word & 0xffff; }
};

// Tiles written so far, those of short runs among them; and where the second part of each list begins: tiles of short
// runs come first, their wide tiles last.
struct TileCounts {
  int32_t tiles, wide_tiles, short_tiles, short_wide_tiles, first_long_tile, first_short_wide_tile;
};

// The longest runs that a thread has seen.
struct Longest {
  int32_t any = 0, of_short = 0;
};

// Before the first tile is written: of runs of `rows(i)` rows, i below `runs`. `total` is shared memory.
template <typename Block, typename Rows>
__device__ void count_tiles(typename Block::Storage& storage, int64_t runs, const Rows& rows, TileCounts& total) {
  int32_t short_tiles = 0, long_wide_tiles = 0;
  for (int64_t i = threadIdx.x; i < runs; i += blockDim.x) {
    const int32_t mine = rows(i);
    if (mine <= kShortRun) {
      short_tiles += (mine + kTileRows - 1) / kTileRows;
    } else {
      long_wide_tiles += (mine + kWideTileRows - 1) / kWideTileRows;
    }
  }
  __syncthreads();
  short_tiles = typename Block::Reduce(storage.reduce).Sum(short_tiles);
  __syncthreads();
  long_wide_tiles = typename Block::Reduce(storage.reduce).Sum(long_wide_tiles);
  if (threadIdx.x == 0) total = {0, 0, 0, 0, short_tiles, long_wide_tiles};
  __syncthreads();
}

// A run a thread, and where its tiles go.
template <int kThreads>
struct RunChunk {
  Run run[kThreads];
  int32_t tile[kThreads], wide_tile[kThreads];
};

template <int kRows>
__device__ __forceinline__ void write_run_tiles(Tile* to, const Run& run) {
  for (int32_t i = threadIdx.x % 32; i * kRows < run.rows; i += 32) {
    to[i] = {run.group, run.start + i * kRows, min(kRows, run.rows - i * kRows), run.index};
  }
}

// Writes the tiles of a chunk of runs, in order; a thread brings a run, of no rows where it has none. A warp writes the
// tiles of a run: one run may hold nearly all rows.
template <typename Block, int kThreads>
__device__ void write_tiles(const PlanTask& task, typename Block::Storage& storage, RunChunk<kThreads>& chunk,
                            const Run& mine, TileCounts& total, Longest& longest) {
  static_assert(kThreads * (kShortRun / kTileRows) < 1 << 15);
  int32_t tile = 0, wide_tile = 0, tiles = 0, wide_tiles = 0;
  ShortCounts of_short, all_short;
  __syncthreads();
  typename Block::Scan(storage.scan).ExclusiveSum((mine.rows + kTileRows - 1) / kTileRows, tile, tiles);
  __syncthreads();
  typename Block::Scan(storage.scan)
      .ExclusiveSum((mine.rows + kWideTileRows - 1) / kWideTileRows, wide_tile, wide_tiles);
  __syncthreads();
  typename Block::Scan(storage.scan).ExclusiveSum(ShortCounts::of(mine.rows).word, of_short.word, all_short.word);
  const int32_t short_tile = total.short_tiles + of_short.tiles();
  const int32_t short_wide_tile = total.short_wide_tiles + of_short.wide_tiles();
  const bool is_short = mine.rows <= kShortRun;
  chunk.run[threadIdx.x] = mine;
  chunk.tile[threadIdx.x] = is_short ? short_tile : total.first_long_tile + total.tiles + tile - short_tile;
  chunk.wide_tile[threadIdx.x] =
      is_short ? total.first_short_wide_tile + short_wide_tile : total.wide_tiles + wide_tile - short_wide_tile;
  __syncthreads();
  for (int i = threadIdx.x / 32; i < kThreads; i += kThreads / 32) {
    const Run run = chunk.run[i];
    write_run_tiles<kTileRows>(task.out.tile + chunk.tile[i], run);
    write_run_tiles<kWideTileRows>(task.out.wide_tile + chunk.wide_tile[i], run);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    total.tiles += tiles;
    total.wide_tiles += wide_tiles;
    total.short_tiles += all_short.tiles();
    total.short_wide_tiles += all_short.wide_tiles();
  }
  longest.any = max(longest.any, mine.rows);
  if (is_short) longest.of_short = max(longest.of_short, mine.rows);
}

__device__ void write_header(const PlanTask& task, int32_t active, int32_t runs, const TileCounts& total,
                             int32_t invalid, int32_t max_run, int32_t max_short) {
  int32_t* h = task.out.header;
  for (int i = 0; i < kPlanHeaderWords; ++i) h[i] = 0;
  h[kPlanVersion] = kPlanVersionValue;
  h[kPlanRows] = static_cast<int32_t>(task.source.p.rows);
  h[kPlanGroups] = static_cast<int32_t>(task.source.groups);
  h[kPlanActiveRows] = active;
  h[kPlanRuns] = runs;
  h[kPlanTiles] = total.tiles;
  h[kPlanInvalid] = invalid;
  h[kPlanMaxRun] = max_run;
  h[kPlanWideTiles] = total.wide_tiles;
  h[kPlanShortTiles] = total.short_tiles;
  h[kPlanLongTiles] = total.wide_tiles - total.short_wide_tiles;
  h[kPlanMaxShort] = max_short;
  h[kPlanPairs] = task.out.pair_pos ? static_cast<int32_t>(task.source.p.pairs) : 0;
}

template <typename Block>
__device__ void finish(const PlanTask& task, typename Block::Storage& storage, int32_t active, int32_t runs,
                       const TileCounts& total, const Longest& mine, int32_t invalid) {
  const int32_t longest = typename Block::Reduce(storage.reduce).Reduce(mine.any, MaxOp());
  __syncthreads();
  const int32_t longest_short = typename Block::Reduce(storage.reduce).Reduce(mine.of_short, MaxOp());
  if (threadIdx.x == 0) write_header(task, active, runs, total, invalid, longest, longest_short);
}

// The head of a run among sorted keys in blocked order; `last_key` lends one word a thread.
template <int kThreads, int kItems>
__device__ void find_heads(const uint32_t (&key)[kItems], uint32_t (&last_key)[kThreads], bool (&head)[kItems]) {
  last_key[threadIdx.x] = key[kItems - 1];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (i > 0) {
      head[i] = key[i] != key[i - 1];
    } else {
      head[i] = threadIdx.x == 0 || key[0] != last_key[threadIdx.x - 1];
    }
  }
  __syncthreads();
}

template <int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads) plan_one_chunk(const __grid_constant__ PlanTask task) {
  using Block = Collectives<kThreads, kItems>;
  extern __shared__ __align__(16) unsigned char smem[];
  auto& storage = *reinterpret_cast<typename Block::Storage*>(smem);
  __shared__ uint32_t last_key[kThreads];
  __shared__ RunChunk<kThreads> chunk_runs;

  clear_inverse(task);
  uint32_t key[kItems];
  uint32_t row[kItems];
  const int32_t my_invalid = load_keys<kThreads, kItems>(task, 0, key, row);
  const int32_t invalid = typename Block::Reduce(storage.reduce).Sum(my_invalid);
  __syncthreads();
  typename Block::Sort(storage.sort).Sort(key, row, 0, task.key_bits);
  __syncthreads();

  // runs: index and start of each sorted row's run
  const uint32_t none = static_cast<uint32_t>(task.source.groups);
  bool head[kItems];
  find_heads<kThreads, kItems>(key, last_key, head);
  int32_t flag[kItems], run[kItems];
  const int32_t first = threadIdx.x * kItems;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    flag[i] = (head[i] ? first + i : 0) | (head[i] && key[i] != none ? 1 << 16 : 0);
  }
  int32_t last_run = 0;
  typename Block::Scan(storage.scan).InclusiveScan(flag, run, RunScanOp(), last_run);
  __syncthreads();

  int32_t my_active = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (key[i] == none) continue;
    ++my_active;
    task.out.order[first + i] = static_cast<int32_t>(row[i]);
    if (head[i]) {
      const int32_t run_index = (run[i] >> 16) - 1;
      task.out.run_group[run_index] = static_cast<int32_t>(key[i]);
      task.out.run_start[run_index] = first + i;
    }
  }
  const int32_t runs = last_run >> 16;
  const int32_t active = typename Block::Reduce(storage.reduce).Sum(my_active);
  if (threadIdx.x == 0) task.out.run_start[runs] = active;
  __syncthreads();

  __shared__ TileCounts total;
  count_tiles<Block>(
      storage, runs, [&](int64_t r) { return task.out.run_start[r + 1] - task.out.run_start[r]; }, total);
  Longest longest;
  for (int32_t base = 0; base < runs; base += kThreads) {
    const int32_t r = base + threadIdx.x;
    Run my_run{0, 0, 0, r};
    if (r < runs) {
      const int32_t start = task.out.run_start[r];
      my_run = {task.out.run_group[r], start, task.out.run_start[r + 1] - start, r};
    }
    write_tiles<Block>(task, storage, chunk_runs, my_run, total, longest);
  }
  finish<Block>(task, storage, active, runs, total, longest, invalid);
}

template <int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads) plan_many_chunks(const __grid_constant__ PlanTask task) {
  using Block = Collectives<kThreads, kItems>;
  constexpr int kChunk = kThreads * kItems;
  extern __shared__ __align__(16) unsigned char smem[];
  auto& storage = *reinterpret_cast<typename Block::Storage*>(smem);
  __shared__ uint32_t last_key[kThreads];
  __shared__ RunChunk<kThreads> chunk_of_runs;

  const int64_t rows = task.source.p.rows;
  const int64_t groups = task.source.groups;
  int32_t* cursor = task.out.workspace;  // rows of a group, then where its next row goes

  // rows of every group
  for (int64_t g = threadIdx.x; g < groups; g += kThreads) cursor[g] = 0;
  clear_inverse(task);
  __syncthreads();
  int32_t my_invalid = 0;
  uint32_t key[kItems];
  uint32_t row[kItems];
  for (int64_t base = 0; base < rows; base += kChunk) {
    my_invalid += load_keys<kThreads, kItems>(task, base, key, row);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (key[i] < groups) atomicAdd(&cursor[key[i]], 1);
    }
  }
  __syncthreads();
  const int32_t invalid = typename Block::Reduce(storage.reduce).Sum(my_invalid);
  __syncthreads();

  // runs and tiles of every group; a group's count becomes its cursor
  __shared__ TileCounts total;
  count_tiles<Block>(storage, groups, [&](int64_t g) { return cursor[g]; }, total);
  int32_t runs = 0, active = 0;
  Longest longest;
  for (int64_t base = 0; base < groups; base += kThreads) {
    const int64_t g = base + threadIdx.x;
    const int32_t count = g < groups ? cursor[g] : 0;
    int32_t run = 0, start = 0, chunk_runs = 0, chunk_rows = 0;
    typename Block::Scan(storage.scan).ExclusiveSum(static_cast<int32_t>(count > 0), run, chunk_runs);
    __syncthreads();
    typename Block::Scan(storage.scan).ExclusiveSum(count, start, chunk_rows);
    if (count > 0) {
      task.out.run_group[runs + run] = static_cast<int32_t>(g);
      task.out.run_start[runs + run] = active + start;
      cursor[g] = active + start;
    }
    write_tiles<Block>(task, storage, chunk_of_runs, Run{static_cast<int32_t>(g), active + start, count, runs + run},
                       total, longest);
    runs += chunk_runs;
    active += chunk_rows;
  }
  if (threadIdx.x == 0) task.out.run_start[runs] = active;
  finish<Block>(task, storage, active, runs, total, longest, invalid);
  __syncthreads();

  // rows to their places, a chunk after the other: stable
  for (int64_t base = 0; base < rows; base += kChunk) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t r = base + threadIdx.x * kItems + i;
      const int32_t group = r < rows ? task.out.row_group[r] : kNoAdapter;
      key[i] = static_cast<uint32_t>(group >= 0 ? group : groups);
      row[i] = static_cast<uint32_t>(r);
    }
    typename Block::Sort(storage.sort).Sort(key, row, 0, task.key_bits);
    __syncthreads();
    bool head[kItems];
    find_heads<kThreads, kItems>(key, last_key, head);
    int32_t flag[kItems], start[kItems];
    const int32_t first = threadIdx.x * kItems;
#pragma unroll
    for (int i = 0; i < kItems; ++i) flag[i] = head[i] ? first + i : 0;
    typename Block::Scan(storage.scan).InclusiveScan(flag, start, MaxOp());
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (key[i] < groups) {
        task.out.order[cursor[key[i]] + first + i - start[i]] = static_cast<int32_t>(row[i]);
      }
    }
    last_key[threadIdx.x] = head[0];
    __syncthreads();  // all cursors are read before any moves; the next thread's head tells where a run ends
    const bool next_is_head = threadIdx.x == kThreads - 1 || last_key[threadIdx.x + 1] != 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool tail = i < kItems - 1 ? head[i + 1] : next_is_head;
      if (tail && key[i] < groups) cursor[key[i]] += first + i - start[i] + 1;
    }
    __syncthreads();
  }
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, int threads, size_t smem_bytes, const PlanTask& task, cudaStream_t stream) {
  // above 48 KiB, static arrays included, a kernel must ask; half of that leaves room for the static part
  if (smem_bytes > 24 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<1, threads, smem_bytes, stream>>>(task);
  return cudaGetLastError();
}

template <int kThreads, int kItems>
constexpr size_t storage_bytes() {
  return sizeof(typename Collectives<kThreads, kItems>::Storage);
}

cudaError_t launch_plan(const RowSource& source, int32_t* plan, int64_t pairs_mapped, cudaStream_t stream) {
  const int64_t rows = source.p.rows;
  PlanTask task{source, sections(plan, rows, source.groups, pairs_mapped), 1};
  while ((int64_t{1} << task.key_bits) <= source.groups) ++task.key_bits;
  // the smallest block that holds the capacity: latency grows with threads and items
  if (rows <= 256) return launch(plan_one_chunk<256, 1>, 256, storage_bytes<256, 1>(), task, stream);
  if (rows <= 1024) return launch(plan_one_chunk<1024, 1>, 1024, storage_bytes<1024, 1>(), task, stream);
  if (rows <= kPlanSortRows) return launch(plan_one_chunk<512, 16>, 512, storage_bytes<512, 16>(), task, stream);
  return launch(plan_many_chunks<1024, 4>, 1024, storage_bytes<1024, 4>(), task, stream);
}

}  // namespace

cudaError_t plan(const PlanParams& params, cudaStream_t stream) {
  return launch_plan(RowSource::dense(params), params.plan, 0, stream);
}

cudaError_t moe_plan(const MoePlanParams& params, cudaStream_t stream) {
  return launch_plan(RowSource::moe(params), params.plan, params.row_map ? params.pairs : 0, stream);
}

}  // namespace polylora::cuda
