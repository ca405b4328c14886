// plan and moe_plan on the CPU: one stable counting sort of the rows by group, O(rows + groups).
//
// Ids are data: whatever they hold, nothing outside the plan is written and no group but a row's own is named.
#include <algorithm>
#include <vector>

#include "polylora/cpu.h"

namespace polylora::cpu {
namespace {

int64_t load_id(const void* ids, bool is_int64, int64_t at) {
  return is_int64 ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
}

/// row_group of the plan is filled in; sorts the rows by it and writes runs, tiles and the header.
void group_rows(int32_t* plan, int64_t rows, int64_t groups, int64_t mapped_pairs, int64_t invalid) {
  const PlanLayout at = plan_layout(rows, groups, mapped_pairs);
  const int32_t* row_group = plan + at.row_group;
  int32_t* order = plan + at.order;
  int32_t* run_group = plan + at.run_group;
  int32_t* run_start = plan + at.run_start;
  Tile* tile = reinterpret_cast<Tile*>(plan + at.tile);
  Tile* wide_tile = reinterpret_cast<Tile*>(plan + at.wide_tile);

  std::vector<int32_t> next(static_cast<size_t>(groups), 0);  // rows of a group, then its next position in `order`
  for (int64_t row = 0; row < rows; ++row) {
    if (row_group[row] >= 0) ++next[row_group[row]];
  }

  int32_t short_tiles = 0, long_tiles = 0;
  for (const int32_t count : next) {
    if (count <= kShortRun) {
      short_tiles += (count + kTileRows - 1) / kTileRows;
    } else {
      long_tiles += (count + kWideTileRows - 1) / kWideTileRows;
    }
  }

  // tiles of short runs come first, wide tiles of short runs last
  int32_t active = 0, runs = 0, max_run = 0, max_short = 0;
  int32_t at_tile[] = {short_tiles, 0}, at_wide_tile[] = {0, long_tiles};  // of the other runs, of short ones
  for (int64_t group = 0; group < groups; ++group) {
    const int32_t count = next[group];
    next[group] = active;
    if (count == 0) continue;
    run_group[runs] = static_cast<int32_t>(group);
    run_start[runs] = active;
    const bool is_short = count <= kShortRun;
    for (int32_t done = 0; done < count; done += kTileRows) {
      tile[at_tile[is_short]++] = {static_cast<int32_t>(group), active + done, std::min(kTileRows, count - done), runs};
    }
    const int32_t wide_rows = rows_of_wide_tiles(count);
    for (int32_t done = 0; done < count; done += wide_rows) {
      wide_tile[at_wide_tile[is_short]++] = {static_cast<int32_t>(group), active + done,
                                             std::min(wide_rows, count - done), runs};
    }
    max_run = std::max(max_run, count);
    if (is_short) max_short = std::max(max_short, count);
    active += count;
    ++runs;
  }
  run_start[runs] = active;

  for (int64_t row = 0; row < rows; ++row) {
    if (row_group[row] >= 0) order[next[row_group[row]]++] = static_cast<int32_t>(row);
  }

  std::fill(plan, plan + kPlanHeaderWords, 0);
  plan[kPlanVersion] = kPlanVersionValue;
  plan[kPlanRows] = static_cast<int32_t>(rows);
  plan[kPlanGroups] = static_cast<int32_t>(groups);
  plan[kPlanActiveRows] = active;
  plan[kPlanRuns] = runs;
  plan[kPlanTiles] = at_tile[false];
  plan[kPlanInvalid] = static_cast<int32_t>(invalid);
  plan[kPlanMaxRun] = max_run;
  plan[kPlanPairs] = static_cast<int32_t>(mapped_pairs);
  plan[kPlanWideTiles] = at_wide_tile[true];
  plan[kPlanShortTiles] = short_tiles;
  plan[kPlanLongTiles] = long_tiles;
  plan[kPlanMaxShort] = max_short;
}

/// Group of one MoE pair; the expert is judged first, the slot only where there is an expert. Counts at most one
/// invalid id.
int32_t pair_group(const MoePlanParams& params, int64_t pair, int64_t* invalid) {
  int64_t expert = load_id(params.topk_ids, params.ids_are_int64, pair);
  if (expert == -1) return kNoRow;
  if (expert < 0 || expert >= params.global_experts) {
    ++*invalid;
    return kNoRow;
  }
  if (params.expert_map != nullptr) {
    expert = params.expert_map[expert];
    if (expert == -1) return kNoRow;
  }
  if (expert < 0 || expert >= params.experts) {
    ++*invalid;
    return kNoRow;
  }
  const int64_t slot = params.token_slots[pair / params.top_k];
  if (slot == -1) return kNoAdapter;
  if (slot < 0 || slot >= params.slots) {
    ++*invalid;
    return kNoAdapter;
  }
  return static_cast<int32_t>(moe_group(slot, expert, params.experts));
}

}  // namespace

void plan(const PlanParams& params, const ParallelFor&) {
  int32_t* row_group = params.plan + plan_layout(params.rows, params.groups, 0).row_group;
  int64_t invalid = 0;
  for (int64_t row = 0; row < params.rows; ++row) {
    const int64_t group = load_id(params.group_ids, params.ids_are_int64, row);
    const bool valid = group >= 0 && group < params.groups;
    invalid += !valid && group != kNoAdapter;
    row_group[row] = valid ? static_cast<int32_t>(group) : kNoAdapter;
  }
  group_rows(params.plan, params.rows, params.groups, 0, invalid);
}

void moe_plan(const MoePlanParams& params, const ParallelFor&) {
  const int64_t groups = static_cast<int64_t>(params.slots) * params.experts;
  const int64_t mapped_pairs = params.row_map != nullptr ? params.pairs : 0;
  const PlanLayout at = plan_layout(params.rows, groups, mapped_pairs);
  int32_t* row_group = params.plan + at.row_group;
  int32_t* pair_pos = params.plan + at.pair_pos;
  std::fill(pair_pos, pair_pos + mapped_pairs, -1);

  int64_t invalid = 0;
  for (int64_t row = 0; row < params.rows; ++row) {
    const int64_t pair = params.row_map != nullptr ? params.row_map[row] : row;
    if (pair < 0 || pair >= params.pairs) {
      invalid += pair != -1;
      row_group[row] = kNoRow;
      continue;
    }
    if (params.row_map != nullptr) pair_pos[pair] = static_cast<int32_t>(row);
    row_group[row] = pair_group(params, pair, &invalid);
  }
  group_rows(params.plan, params.rows, groups, mapped_pairs, invalid);
}

}  // namespace polylora::cpu
