// The last phase of the counting sort (counting.cuh): rows to their places, runs, tiles, header.
#pragma once

#include "plan/counting.cuh"

namespace polylora::cuda {

/// What all ranges have, to smem.before, range_start and, in the first block, all. Returns the sum.
__device__ __forceinline__ RunCounts add_ranges(const PlanTask& task) {
  PlanSmem& smem = plan_smem();
  const bool is_block = threadIdx.x < gridDim.x;
  BlockTotals totals{};
  if (is_block) totals = task.totals[threadIdx.x];
  RunCounts all;
  const RunCounts before = scan_threads(totals.counts, all);
  if (is_block) smem.range_start[threadIdx.x] = before.rows;
  if (threadIdx.x == blockIdx.x) smem.before = before;
  if (is_block && blockIdx.x == 0) {
    atomicAdd(&smem.all.invalid, totals.limits.invalid);
    atomicMax(&smem.all.max_run, totals.limits.max_run);
    atomicMax(&smem.all.max_short, totals.limits.max_short);
  }
  __syncthreads();
  return all;
}

/// A strip's rows to their places, in their order. Only reading a counter and moving it on goes from batch to batch.
template <bool kInSmem>
__device__ __forceinline__ void place_strip(const PlanTask& task, const Rows& rows) {
  const PlanSmem& smem = plan_smem();
  const int lane = threadIdx.x % 32;
  int32_t* counts = task.counts + blockIdx.x * task.pitch;
  uint16_t* counters =
      reinterpret_cast<uint16_t*>(plan_counters() + threadIdx.x / 32 * counter_words(task.source.groups));
  int32_t next_group[kPlanBatch];
  const auto load = [&](int64_t row) {
#pragma unroll
    for (int i = 0; i < kPlanBatch; ++i) {
      next_group[i] = row + 32 * i < rows.end ? task.row_group[row + 32 * i] : kNoAdapter;
    }
  };
  load(rows.first + lane);
#pragma unroll 1
  for (int64_t row = rows.first + lane; row - lane < rows.end; row += kPlanStep) {
    int32_t group[kPlanBatch], start[kPlanBatch];
    uint32_t same[kPlanBatch];
#pragma unroll
    for (int i = 0; i < kPlanBatch; ++i) {
      group[i] = next_group[i];
      start[i] = 0;
      if (group[i] >= 0) start[i] = smem.range_start[group[i] >> task.range_log2] + (kInSmem ? counts[group[i]] : 0);
    }
    load(row + kPlanStep);
#pragma unroll
    for (int i = 0; i < kPlanBatch; ++i) same[i] = __match_any_sync(kPlanWarp, group[i]);
#pragma unroll
    for (int i = 0; i < kPlanBatch; ++i) {
      const bool is_leader = __ffs(static_cast<int>(same[i])) - 1 == lane;
      int32_t done = 0;
      if (group[i] >= 0) done = kInSmem ? static_cast<int32_t>(counters[group[i]]) : counts[group[i]];
      __syncwarp();
      if (group[i] >= 0 && is_leader) {
        const int32_t next = done + __popc(same[i]);
        if (kInSmem) {
          counters[group[i]] = static_cast<uint16_t>(next);
        } else {
          counts[group[i]] = next;
        }
      }
      __syncwarp();
      start[i] += done + __popc(same[i] & ((1u << lane) - 1));
    }
#pragma unroll
    for (int i = 0; i < kPlanBatch; ++i) {
      if (group[i] >= 0) task.order[start[i]] = static_cast<int32_t>(row + 32 * i);
    }
  }
}

__device__ __forceinline__ void write_tiles_of(Tile* to, int32_t rows, const LongRun& run, int first, int step) {
  for (int32_t i = first; i * rows < run.rows; i += step) {
    to[i] = {run.group, run.start + i * rows, min(rows, run.rows - i * rows), run.run};
  }
}
__device__ __forceinline__ void write_run_tiles(const PlanTask& task, const LongRun& run, int first, int step) {
  write_tiles_of(task.tile + run.tile, kTileRows, run, first, step);
  write_tiles_of(task.wide_tile + run.wide_tile, rows_of_wide_tiles(run.rows), run, first, step);
}

/// Runs and tiles of the block's groups. A thread writes those of a run that has one wide tile, a warp those of others,
/// and all threads those of a run that has nearly all rows.
__device__ __forceinline__ void write_runs(const PlanTask& task, const RunCounts& all) {
  constexpr int32_t kOfBlock = 256 * kTileRows;  // rows of a run from which on the block shares its tiles
  PlanSmem& smem = plan_smem();
  const Range range = range_of(task);
  RunCounts sum = smem.before;
  for (int64_t base = range.first; base < range.end; base += kPlanThreads) {
    const int64_t g = base + threadIdx.x;
    const int32_t rows = g < range.end ? task.counts[gridDim.x * task.pitch + g] : 0;
    RunCounts of_threads;
    RunCounts before = scan_threads(RunCounts::of(rows), of_threads);
    before.add(sum);
    sum.add(of_threads);
    if (rows > 0) {
      const LongRun run{static_cast<int32_t>(g),         before.rows, rows, before.runs, before.next_tile(rows, all),
                        before.next_wide_tile(rows, all)};
      task.run_group[run.run] = run.group;
      task.run_start[run.run] = run.start;
      if (rows <= kWideTileRows) {
        write_run_tiles(task, run, 0, 1);
      } else {
        smem.long_run[atomicAdd(&smem.long_runs, 1)] = run;
      }
    }
    __syncthreads();
    const int runs = smem.long_runs;
    for (int i = 0; i < runs; ++i) {
      const LongRun run = smem.long_run[i];
      const bool of_block = run.rows >= kOfBlock;
      if (!of_block && i % kPlanWarps != static_cast<int>(threadIdx.x) / 32) continue;
      const int first = of_block ? threadIdx.x : threadIdx.x % 32;
      const int step = of_block ? kPlanThreads : 32;
      write_run_tiles(task, run, first, step);
    }
    __syncthreads();
    if (threadIdx.x == 0) smem.long_runs = 0;  // the next scan's barriers come before its next use
  }
}

__device__ __forceinline__ void place(const PlanTask& task) {
  const PlanSmem& smem = plan_smem();
  const RunCounts all = add_ranges(task);
  const Rows rows = block_rows(task);
  const int warp = threadIdx.x / 32;
  if (warp < task.strips) {
    place_strip<true>(task, rows_from(task, rows.first + warp * task.strip_rows, task.strip_rows));
  } else if (task.strips == 0 && warp == 0) {
    place_strip<false>(task, rows);
  }
  write_runs(task, all);
  if (task.pair_pos) {
#pragma unroll 4
    for (int64_t row = rows.first + threadIdx.x; row < rows.end; row += kPlanThreads) invert(task, row);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    task.run_start[all.runs] = all.rows;
    write_header(task, all, smem.all);
  }
}

}  // namespace polylora::cuda
