// Is a plan right? Held against the groups of its rows. No CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "polylora/plan_layout.h"
#include "stats.h"

namespace polylora::bench {

/// What is wrong with `plan`, first of all; empty: nothing. Rows must stand in order of their groups, each once, where
/// its group's run says. `row_group`: [rows] of each row, negative: none. `position`: [pairs] of each pair in a row
/// map; empty: the plan has none.
inline std::string plan_mistake(const std::vector<int32_t>& plan, const std::vector<int32_t>& row_group, int64_t groups,
                                const std::vector<int32_t>& position) {
  const auto rows = static_cast<int64_t>(row_group.size());
  const auto pairs = static_cast<int64_t>(position.size());
  const PlanLayout at = plan_layout(rows, groups, pairs);
  std::vector<std::vector<int32_t>> rows_of(static_cast<size_t>(groups));
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t group = row_group[static_cast<size_t>(row)];
    if (group >= 0) rows_of[static_cast<size_t>(group)].push_back(static_cast<int32_t>(row));
  }
  std::string mistake;
  const auto expect = [&](int64_t word, int64_t wanted, const char* what) {
    const int32_t got = plan[static_cast<size_t>(word)];
    if (got == wanted || !mistake.empty()) return;
    mistake = format("%s (word %lld) is %d, want %lld", what, static_cast<long long>(word), got,
                     static_cast<long long>(wanted));
  };
  int64_t active = 0;
  int64_t runs = 0;
  int64_t tiles = 0, wide_tiles = 0, short_tiles = 0, long_tiles = 0, max_short = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const std::vector<int32_t>& of_group = rows_of[static_cast<size_t>(group)];
    if (of_group.empty()) continue;
    expect(at.run_group + runs, group, "the group of a run");
    expect(at.run_start + runs, active, "the start of a run");
    for (size_t i = 0; i < of_group.size(); ++i) {
      expect(at.order + active + static_cast<int64_t>(i), of_group[i], "a row in order");
      expect(at.row_group + of_group[i], group, "the group of a row");
    }
    const auto count = static_cast<int64_t>(of_group.size());
    active += count;
    const int64_t own_tiles = (count + kTileRows - 1) / kTileRows;
    const int64_t own_wide_tiles = (count + kWideTileRows - 1) / kWideTileRows;
    tiles += own_tiles;
    wide_tiles += own_wide_tiles;
    if (count <= kShortRun) {
      short_tiles += own_tiles;
      max_short = std::max(max_short, count);
    } else {
      long_tiles += own_wide_tiles;
    }
    ++runs;
  }
  expect(at.run_start + runs, active, "the end of the last run");
  for (int64_t pair = 0; pair < pairs; ++pair) {
    expect(at.pair_pos + pair, position[static_cast<size_t>(pair)], "the position of a pair");
  }
  expect(kPlanVersion, kPlanVersionValue, "the version");
  expect(kPlanRows, rows, "the number of rows");
  expect(kPlanGroups, groups, "the number of groups");
  expect(kPlanPairs, pairs, "the number of mapped pairs");
  expect(kPlanActiveRows, active, "the number of active rows");
  expect(kPlanRuns, runs, "the number of runs");
  expect(kPlanTiles, tiles, "the number of tiles");
  expect(kPlanWideTiles, wide_tiles, "the number of wide tiles");
  expect(kPlanShortTiles, short_tiles, "the number of tiles of short runs");
  expect(kPlanLongTiles, long_tiles, "the number of wide tiles of long runs");
  expect(kPlanMaxShort, max_short, "the longest short run");
  expect(kPlanInvalid, 0, "the number of invalid ids");
  return mistake;
}

}  // namespace polylora::bench
