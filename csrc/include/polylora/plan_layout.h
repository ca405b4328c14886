// The plan: rows grouped once a step, on the device, reused by every layer of the step.
//
// One int32 tensor whose sections depend on (rows, groups, pairs) alone, never on the data, so that a captured
// graph replays for any mix of adapters. The functions below are the only place that knows the offsets; the
// kernels, the CPU path, the bindings and (through the host module) Python all call them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define POLYLORA_HD __host__ __device__
#else
#define POLYLORA_HD
#endif

namespace polylora {

/// row_group values that are not groups.
inline constexpr int32_t kNoAdapter = -1;  // the row exists, no adapter: base model only
inline constexpr int32_t kNoRow = -2;      // MoE: no such row here (padding, or an expert of another rank)

/// Header words.
enum PlanHeader : int32_t {
  kPlanVersion = 0,      // kPlanVersionValue
  kPlanRows = 1,         // row capacity the layout was made for
  kPlanGroups = 2,       // number of groups the layout was made for
  kPlanActiveRows = 3,   // rows with an adapter = length of `order`
  kPlanRuns = 4,         // groups with at least one row
  kPlanTiles = 5,        // tiles of up to kTileRows rows, none across two runs
  kPlanInvalid = 6,      // group, slot or expert ids out of range (each counted as "no adapter" / "no row")
  kPlanMaxRun = 7,       // rows of the longest run
  kPlanPairs = 8,        // MoE with a row map: (token, expert) pairs of the inverse map, else 0
  kPlanWideTiles = 9,    // tiles of up to kWideTileRows rows
  kPlanShortTiles = 10,  // tiles of short runs, the first of the tiles
  kPlanLongTiles = 11,   // wide tiles of the other runs, the first of the wide tiles
  kPlanMaxShort = 12,    // rows of the longest short run
  kPlanHeaderWords = 16,
};
inline constexpr int32_t kPlanVersionValue = 3;

/// Rows a tile holds at most: what decode kernels work on.
inline constexpr int32_t kTileRows = 16;

/// Rows a wide tile holds at most: what prefill kernels work on.
inline constexpr int32_t kWideTileRows = 128;

/// Rows that a short run has at most. A batch of many rows may hold both: a wide tile each would leave short runs'
/// mostly empty, decode's kernels would read the weights of a long run again for every few rows.
inline constexpr int32_t kShortRun = kTileRows;

/// Rows up to which one block makes the plan by comparing them all, without a workspace.
inline constexpr int64_t kPlanSmallRows = 512;

/// Rows up to which one launch makes the plan.
inline constexpr int64_t kPlanOneLaunchRows = 16384;

POLYLORA_HD constexpr int64_t round_up4(int64_t n) { return (n + 3) / 4 * 4; }
POLYLORA_HD constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/// Runs a plan can have at most.
POLYLORA_HD constexpr int64_t plan_max_runs(int64_t rows, int64_t groups) { return min64(rows, groups); }

/// Tiles a plan can have at most: every run adds less than one partly filled tile.
POLYLORA_HD constexpr int64_t plan_max_tiles(int64_t rows, int64_t groups, int64_t tile_rows = kTileRows) {
  int64_t full_and_partial = rows / tile_rows + plan_max_runs(rows, groups);
  return min64(rows, full_and_partial);
}

/// Tiles of short runs, and wide tiles of the others, at most.
POLYLORA_HD constexpr int64_t plan_max_short_tiles(int64_t rows, int64_t groups) {
  static_assert(kShortRun <= kTileRows);  // a tile each
  return plan_max_runs(rows, groups);
}
POLYLORA_HD constexpr int64_t plan_max_long_tiles(int64_t rows, int64_t groups) {
  return plan_max_tiles(rows, min64(groups, rows / (kShortRun + 1)), kWideTileRows);
}

/// Blocks that the workspace has room for: each counts its rows by group. Their number times the groups stays below
/// rows + 17 * groups.
POLYLORA_HD constexpr int64_t plan_max_blocks(int64_t rows, int64_t groups) {
  return rows <= kPlanOneLaunchRows ? 16 : min64(16 + rows / (groups > 0 ? groups : 1), 128);
}

/// Rows of each wide tile of a run but its last: an even share, in tiles of decode, as the longest tile is waited for.
POLYLORA_HD constexpr int32_t rows_of_wide_tiles(int32_t run_rows) {
  const int32_t tiles = (run_rows - 1) / kWideTileRows + 1;
  return ((run_rows - 1) / tiles / kTileRows + 1) * kTileRows;
}
static_assert(kWideTileRows % kTileRows == 0);  // as many tiles as of kWideTileRows

/// What a block of the plan's kernels tells the others: words of its own in the workspace, before the counts.
inline constexpr int64_t kPlanBlockWords = 8;

/// Words of the workspace: a count of each group for every block, and for all of them together.
POLYLORA_HD constexpr int64_t plan_workspace(int64_t rows, int64_t groups) {
  if (rows <= kPlanSmallRows) return 0;
  const int64_t blocks = plan_max_blocks(rows, groups);
  return blocks * kPlanBlockWords + (blocks + 1) * round_up4(groups);
}

/// Up to kTileRows or kWideTileRows rows of one run: all a block must know, in one 16-byte load.
struct alignas(16) Tile {
  int32_t group;
  int32_t pos;   // first position in `order`
  int32_t rows;  // from 1 on
  int32_t run;
};
static_assert(sizeof(Tile) == 16);
inline constexpr int64_t kTileWords = sizeof(Tile) / sizeof(int32_t);

/// Offsets (int32 words) of the sections of a plan.
struct PlanLayout {
  int64_t row_group;  // [rows]       group of each row, kNoAdapter or kNoRow
  int64_t order;      // [rows]       the active rows, stably sorted by group; the rest is unspecified
  int64_t run_group;  // [max_runs]   group of each run, ascending
  int64_t run_start;  // [max_runs+1] first position of each run in `order`; one past the last run: active rows
  int64_t tile;       // [max_tiles]  of struct Tile; those of short runs first
  int64_t pair_pos;   // [pairs]      MoE with a row map: position of a pair in the map, or -1
  int64_t wide_tile;  // [max_wide_tiles] of struct Tile; those of short runs last
  int64_t workspace;  // [plan_workspace(rows, groups)]
  int64_t words;      // total
};

POLYLORA_HD constexpr PlanLayout plan_layout(int64_t rows, int64_t groups, int64_t pairs) {
  PlanLayout layout{};
  int64_t at = kPlanHeaderWords;
  layout.row_group = at;
  at += round_up4(rows);
  layout.order = at;
  at += round_up4(rows);
  layout.run_group = at;
  at += round_up4(plan_max_runs(rows, groups));
  layout.run_start = at;
  at += round_up4(plan_max_runs(rows, groups) + 1);
  layout.tile = at;
  at += plan_max_tiles(rows, groups) * kTileWords;
  layout.pair_pos = at;
  at += round_up4(pairs);
  layout.wide_tile = at;
  at += plan_max_tiles(rows, groups, kWideTileRows) * kTileWords;
  layout.workspace = at;
  at += plan_workspace(rows, groups);
  layout.words = at;
  return layout;
}

/// Group of a (slot, expert) pair.
POLYLORA_HD constexpr int64_t moe_group(int64_t slot, int64_t expert, int64_t experts) {
  return slot * experts + expert;
}

}  // namespace polylora
