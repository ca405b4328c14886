// The phases of the counting sort that makes the plan of many rows. Between them all blocks have come to the same
// point: a cluster barrier, or the next launch.
//
//   count_rows   a block's rows, cut into strips of consecutive rows, a warp each: rows of each group in each strip, in
//                16-bit counters in shared memory; then of each group in the block, to the workspace
//   scan_range   a block's range of groups: where each group's rows of each block begin, from the range's first row on;
//                how many rows, runs and tiles the range has
//   place        what the ranges before have; a block's rows to their places in the order, strip by strip, each warp in
//                the order of its rows: stable; the runs and tiles of the block's range of groups
//
// Where the counters have no room in shared memory (about 100,000 groups), or a block has more rows than they count,
// the block's row of the workspace serves as its counters and one warp places its rows.
#pragma once

#include "common/ptx.cuh"
#include "plan/task.cuh"

namespace polylora::cuda {

constexpr int kPlanThreads = 512;
constexpr int kPlanWarps = kPlanThreads / 32;
constexpr int kPlanMostBlocks = 128;
constexpr int kPlanBatch = 4;                // rows of a thread whose reads are under way together
constexpr int kPlanStep = 32 * kPlanBatch;   // rows of a warp
constexpr uint32_t kPlanWarp = 0xffffffffu;  // all lanes
static_assert(kPlanMostBlocks <= kPlanThreads);

/// A run whose tiles are shared by threads.
struct LongRun {
  int32_t group, start, rows, run, tile, wide_tile;
};

/// Shared memory, before the counters.
struct alignas(16) PlanSmem {
  RunCounts of_warp[kPlanWarps];
  RunCounts before;                      // in the ranges before that of the block
  int32_t range_start[kPlanMostBlocks];  // first position of a range in the order
  RunLimits mine, all;
  int32_t long_runs;
  LongRun long_run[kPlanThreads];
};

/// Counters of one strip, two to a word; whole 16-byte units.
__host__ __device__ constexpr int64_t counter_words(int64_t groups) { return (groups + 7) / 8 * 4; }

__device__ __forceinline__ PlanSmem& plan_smem() { return *reinterpret_cast<PlanSmem*>(ptx::dynamic_smem()); }
__device__ __forceinline__ uint32_t* plan_counters() {
  return reinterpret_cast<uint32_t*>(ptx::dynamic_smem() + sizeof(PlanSmem));
}

/// Touches shared memory only; a barrier must follow.
__device__ __forceinline__ void clear_smem(const PlanTask& task) {
  PlanSmem& smem = plan_smem();
  if (threadIdx.x == 0) {
    smem.mine = {};
    smem.all = {};
    smem.long_runs = 0;
  }
  uint4* to = reinterpret_cast<uint4*>(plan_counters());
  const int64_t units = task.strips * counter_words(task.source.groups) / 4;
  for (int64_t i = threadIdx.x; i < units; i += kPlanThreads) to[i] = {0, 0, 0, 0};
}

/// Rows from `first` to before `end`.
struct Rows {
  int64_t first, end;
};

__device__ __forceinline__ Rows rows_from(const PlanTask& task, int64_t first, int64_t count) {
  const int64_t end = first + count;
  return {first, end < task.source.p.rows ? end : task.source.p.rows};
}

/// The block's rows: its strips, one behind the other.
__device__ __forceinline__ Rows block_rows(const PlanTask& task) {
  const int64_t count = max(task.strips, 1) * task.strip_rows;
  return rows_from(task, blockIdx.x * count, count);
}

/// Without counters in shared memory: a row of the workspace to zero, once the grid before has ended.
__device__ __forceinline__ void clear_counts(const PlanTask& task) {
  if (task.strips > 0) return;
  int32_t* counts = task.counts + blockIdx.x * task.pitch;
  for (int64_t g = threadIdx.x; g < task.source.groups; g += kPlanThreads) counts[g] = 0;
}

/// Counts the rows of each strip. `load(row, end, group)`: groups of rows `row`, `row` + kPlanThreads, ... below `end`.
/// All warps share the rows, however few strips there are. Lanes whose rows have the same group count as one: with few
/// groups, they would wait for each other.
template <typename Load>
__device__ __forceinline__ void count_strips(const PlanTask& task, const Load& load) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Rows rows = block_rows(task);
  const int64_t words = counter_words(task.source.groups);
  int32_t* counts = task.counts + blockIdx.x * task.pitch;
#pragma unroll 1
  for (int64_t row = rows.first + warp * 32; row < rows.end; row += kPlanThreads * kPlanBatch) {
    int32_t group[kPlanBatch];
    load(row + lane, rows.end, group);
#pragma unroll
    for (int i = 0; i < kPlanBatch; ++i) {
      const int64_t first = row + kPlanThreads * i;
      if (first >= rows.end) continue;
      const uint32_t same = __match_any_sync(kPlanWarp, group[i]);
      if (group[i] < 0 || __ffs(static_cast<int>(same)) - 1 != lane) continue;
      if (task.strips > 0) {
        const uint32_t strip = static_cast<uint32_t>(first - rows.first) / static_cast<uint32_t>(task.strip_rows);
        const uint32_t count = static_cast<uint32_t>(__popc(same)) << 16 * (group[i] & 1);
        atomicAdd(plan_counters() + strip * words + group[i] / 2, count);
      } else {
        atomicAdd(counts + group[i], __popc(same));
      }
    }
  }
}

/// Turns the counters of strips into the rows of the strips before; `total(pair, words)` takes the block's rows of
/// groups 2 * pair and 2 * pair + 1.
template <typename Total>
__device__ __forceinline__ void add_strips(const PlanTask& task, const Total& total) {
  constexpr int kStrips = 8;  // read at once
  uint32_t* counters = plan_counters();
  const int64_t words = counter_words(task.source.groups);
  for (int64_t i = threadIdx.x; 2 * i < task.source.groups; i += kPlanThreads) {
    uint32_t sum = 0;
    for (int first = 0; first < task.strips; first += kStrips) {
      uint32_t of_strip[kStrips];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) of_strip[s] = first + s < task.strips ? counters[(first + s) * words + i] : 0;
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        if (first + s < task.strips) counters[(first + s) * words + i] = sum;
        sum += of_strip[s];
      }
    }
    total(i, sum);
  }
}

__device__ __forceinline__ void count_rows(const PlanTask& task) {
  PlanSmem& smem = plan_smem();
  clear_counts(task);
  clear_inverse(task, int64_t{blockIdx.x} * kPlanThreads + threadIdx.x, int64_t{gridDim.x} * kPlanThreads);
  __syncthreads();
  int32_t invalid = 0;
  count_strips(task, [&](int64_t row, int64_t end, int32_t (&group)[kPlanBatch]) {
    task.source.load<kPlanThreads>(row, end, group, invalid);
#pragma unroll
    for (int i = 0; i < kPlanBatch; ++i) {
      if (row + kPlanThreads * i < end) task.row_group[row + kPlanThreads * i] = group[i];
    }
  });
  invalid = __reduce_add_sync(kPlanWarp, invalid);
  if (threadIdx.x % 32 == 0 && invalid > 0) atomicAdd(&smem.mine.invalid, invalid);
  __syncthreads();
  int32_t* counts = task.counts + blockIdx.x * task.pitch;
  add_strips(task, [&](int64_t i, uint32_t words) {
    if (task.strips == 0) return;
    reinterpret_cast<int2*>(counts)[i] = {static_cast<int32_t>(words & 0xffff), static_cast<int32_t>(words >> 16)};
  });
  if (threadIdx.x == 0) task.totals[blockIdx.x].limits.invalid = smem.mine.invalid;
}

__device__ __forceinline__ RunCounts shuffle_up(const RunCounts& counts, int distance) {
  return {__shfl_up_sync(kPlanWarp, counts.rows, distance), __shfl_up_sync(kPlanWarp, counts.runs, distance),
          __shfl_up_sync(kPlanWarp, counts.short_runs, distance),
          __shfl_up_sync(kPlanWarp, counts.long_tiles, distance),
          __shfl_up_sync(kPlanWarp, counts.long_wide_tiles, distance)};
}

/// Sums of the lanes up to the own one.
__device__ __forceinline__ RunCounts scan_lanes(RunCounts counts) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const RunCounts below = shuffle_up(counts, distance);
    if (static_cast<int>(threadIdx.x % 32) >= distance) counts.add(below);
  }
  return counts;
}

/// Sum of the threads before; `all` of all.
__device__ __forceinline__ RunCounts scan_threads(const RunCounts& mine, RunCounts& all) {
  PlanSmem& smem = plan_smem();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const RunCounts in_warp = scan_lanes(mine);
  if (lane == 31) smem.of_warp[warp] = in_warp;
  __syncthreads();
  if (warp == 0) {
    const RunCounts warps = scan_lanes(lane < kPlanWarps ? smem.of_warp[lane] : RunCounts{});
    if (lane < kPlanWarps) smem.of_warp[lane] = warps;
  }
  __syncthreads();
  all = smem.of_warp[kPlanWarps - 1];
  RunCounts before = shuffle_up(in_warp, 1);
  if (lane == 0) before = {};
  if (warp > 0) before.add(smem.of_warp[warp - 1]);
  __syncthreads();
  return before;
}

struct Range {
  int64_t first, end;
};
__device__ __forceinline__ Range range_of(const PlanTask& task) {
  const int64_t first = int64_t{blockIdx.x} << task.range_log2;
  const int64_t end = first + (int64_t{1} << task.range_log2);
  return {first, end < task.source.groups ? end : task.source.groups};
}

/// `kColumn`: counts of a group that a thread reads at once.
template <int kColumn>
__device__ __forceinline__ void scan_range(const PlanTask& task) {
  PlanSmem& smem = plan_smem();
  const Range range = range_of(task);
  const int blocks = static_cast<int>(gridDim.x);
  RunCounts sum;
  int32_t max_run = 0, max_short = 0;
  for (int64_t base = range.first; base < range.end; base += kPlanThreads) {
    const int64_t g = base + threadIdx.x;
    int32_t* column = task.counts + g;
    int32_t rows = 0;
    if (g < range.end) {
      for (int first = 0; first < blocks; first += kColumn) {
        int32_t of_block[kColumn];
#pragma unroll
        for (int b = 0; b < kColumn; ++b) of_block[b] = first + b < blocks ? column[(first + b) * task.pitch] : 0;
#pragma unroll
        for (int b = 0; b < kColumn; ++b) rows += of_block[b];
      }
      column[blocks * task.pitch] = rows;
    }
    RunCounts all;
    const RunCounts before = scan_threads(RunCounts::of(rows), all);
    if (g < range.end) {
      int32_t at = sum.rows + before.rows;
      for (int first = 0; first < blocks; first += kColumn) {
        int32_t of_block[kColumn];
#pragma unroll
        for (int b = 0; b < kColumn; ++b) of_block[b] = first + b < blocks ? column[(first + b) * task.pitch] : 0;
#pragma unroll
        for (int b = 0; b < kColumn; ++b) {
          if (first + b < blocks) column[(first + b) * task.pitch] = at;
          at += of_block[b];
        }
      }
    }
    sum.add(all);
    max_run = max(max_run, rows);
    max_short = max(max_short, rows <= kShortRun ? rows : 0);
  }
  max_run = __reduce_max_sync(kPlanWarp, max_run);
  max_short = __reduce_max_sync(kPlanWarp, max_short);
  if (threadIdx.x % 32 == 0) {
    atomicMax(&smem.mine.max_run, max_run);
    atomicMax(&smem.mine.max_short, max_short);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    BlockTotals& totals = task.totals[blockIdx.x];
    totals.counts = sum;
    totals.limits.max_run = smem.mine.max_run;
    totals.limits.max_short = smem.mine.max_short;
  }
}

}  // namespace polylora::cuda
