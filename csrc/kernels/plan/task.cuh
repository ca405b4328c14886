// What the plan's kernels are told, and what they share: sections of the plan, counts of runs and tiles, the header.
#pragma once

#include "common/launch.cuh"
#include "plan/row_source.cuh"

namespace polylora::cuda {

/// Of some runs: what the places of the runs behind them follow from.
struct RunCounts {
  int32_t rows = 0;
  int32_t runs = 0;
  int32_t short_runs = 0;  // each has one tile and one wide tile
  int32_t long_tiles = 0;  // of the others
  int32_t long_wide_tiles = 0;

  /// Of one run, or of none.
  __device__ __forceinline__ static RunCounts of(int32_t rows) {
    static_assert(kShortRun <= kTileRows && kShortRun <= kWideTileRows);
    const bool is_long = rows > kShortRun;
    return {rows, rows > 0, rows > 0 && !is_long, is_long ? (rows - 1) / kTileRows + 1 : 0,
            is_long ? (rows - 1) / kWideTileRows + 1 : 0};
  }
  __device__ __forceinline__ void add(const RunCounts& other) {
    rows += other.rows;
    runs += other.runs;
    short_runs += other.short_runs;
    long_tiles += other.long_tiles;
    long_wide_tiles += other.long_wide_tiles;
  }
  /// The run behind these, of `rows` rows: tiles of short runs come first, their wide tiles last.
  __device__ __forceinline__ int32_t next_tile(int32_t rows, const RunCounts& all) const {
    return rows <= kShortRun ? short_runs : all.short_runs + long_tiles;
  }
  __device__ __forceinline__ int32_t next_wide_tile(int32_t rows, const RunCounts& all) const {
    return rows <= kShortRun ? all.long_wide_tiles + short_runs : long_wide_tiles;
  }
};

/// What is found of the ids beside their order.
struct RunLimits {
  int32_t invalid = 0;
  int32_t max_run = 0;
  int32_t max_short = 0;
};

/// What a block says of its rows (invalid) and of its range of groups (all else), in the workspace.
struct alignas(16) BlockTotals {
  RunCounts counts;
  RunLimits limits;
};
static_assert(sizeof(BlockTotals) == kPlanBlockWords * sizeof(int32_t));

struct PlanTask {
  RowSource source;
  // sections of the plan
  int32_t *header, *row_group, *order, *run_group, *run_start;
  Tile *tile, *wide_tile;
  int32_t* pair_pos;  // null without a row map
  BlockTotals* totals;
  int32_t* counts;  // [blocks + 1][pitch]
  int64_t pitch;
  // counting sort: how rows and groups are shared
  int64_t strip_rows;  // multiple of 32
  int32_t strips;      // of a block, a warp each; 0: one, counted in `counts`
  int32_t range_log2;  // groups of a block
};

inline PlanTask plan_task(const RowSource& source) {
  const MoePlanParams& p = source.p;
  const int64_t pairs = p.row_map ? p.pairs : 0;
  const PlanLayout at = plan_layout(p.rows, source.groups, pairs);
  PlanTask task{};
  task.source = source;
  task.header = p.plan;
  task.row_group = p.plan + at.row_group;
  task.order = p.plan + at.order;
  task.run_group = p.plan + at.run_group;
  task.run_start = p.plan + at.run_start;
  task.tile = reinterpret_cast<Tile*>(p.plan + at.tile);
  task.wide_tile = reinterpret_cast<Tile*>(p.plan + at.wide_tile);
  task.pair_pos = p.row_map ? p.plan + at.pair_pos : nullptr;
  task.totals = reinterpret_cast<BlockTotals*>(p.plan + at.workspace);
  task.counts = p.plan + at.workspace + plan_max_blocks(p.rows, source.groups) * kPlanBlockWords;
  task.pitch = round_up4(source.groups);
  return task;
}

/// No position of any pair yet; thread `thread` of `threads`.
__device__ __forceinline__ void clear_inverse(const PlanTask& task, int64_t thread, int64_t threads) {
  if (task.pair_pos == nullptr) return;
  for (int64_t i = thread; i < task.source.p.pairs; i += threads) task.pair_pos[i] = -1;
}

/// Of two positions of one pair, the higher one stands in the inverse.
__device__ __forceinline__ void invert(const PlanTask& task, int64_t row) {
  const int32_t pair = task.source.p.row_map[row];
  if (pair >= 0 && pair < task.source.p.pairs) atomicMax(&task.pair_pos[pair], static_cast<int32_t>(row));
}

__device__ __forceinline__ void write_header(const PlanTask& task, const RunCounts& all, const RunLimits& limits) {
  static_assert(kPlanHeaderWords == 16 && kPlanMaxShort == 12);
  int4* to = reinterpret_cast<int4*>(task.header);
  const int32_t tiles = all.short_runs + all.long_tiles;
  const int32_t wide_tiles = all.short_runs + all.long_wide_tiles;
  const int32_t pairs = task.pair_pos ? static_cast<int32_t>(task.source.p.pairs) : 0;
  to[0] = {kPlanVersionValue, static_cast<int32_t>(task.source.p.rows), static_cast<int32_t>(task.source.groups),
           all.rows};
  to[1] = {all.runs, tiles, limits.invalid, limits.max_run};
  to[2] = {pairs, wide_tiles, all.short_runs, all.long_wide_tiles};
  to[3] = {limits.max_short, 0, 0, 0};
}

/// One block, up to kPlanSmallRows rows.
cudaError_t plan_small(const PlanTask& task, const Device& device, cudaStream_t stream);

/// Counting sort: one launch up to kPlanOneLaunchRows rows, three above.
cudaError_t plan_counted(PlanTask task, const Device& device, cudaStream_t stream);

}  // namespace polylora::cuda
