// The plan's layout, exhaustively for small sizes: sections are disjoint, aligned and hold any plan there can be.
#include <algorithm>
#include <utility>
#include <vector>

#include "check.h"
#include "polylora/params.h"
#include "polylora/plan_layout.h"

namespace polylora {
namespace {

void check_sections(int64_t rows, int64_t groups, int64_t pairs) {
  const PlanLayout at = plan_layout(rows, groups, pairs);
  const int64_t runs = plan_max_runs(rows, groups);
  const int64_t tiles = plan_max_tiles(rows, groups);
  const int64_t wide_tiles = plan_max_tiles(rows, groups, kWideTileRows);
  const std::vector<std::pair<int64_t, int64_t>> sections = {{0, kPlanHeaderWords},
                                                             {at.row_group, rows},
                                                             {at.order, rows},
                                                             {at.run_group, runs},
                                                             {at.run_start, runs + 1},
                                                             {at.tile, tiles * kTileWords},
                                                             {at.pair_pos, pairs},
                                                             {at.wide_tile, wide_tiles * kTileWords},
                                                             {at.workspace, plan_workspace(rows, groups)}};
  for (size_t i = 0; i < sections.size(); ++i) {
    const int64_t end = i + 1 < sections.size() ? sections[i + 1].first : at.words;
    CHECK(sections[i].first % 4 == 0, "section %zu at word %lld", i, static_cast<long long>(sections[i].first));
    CHECK(sections[i].first + sections[i].second <= end, "section %zu of rows %lld groups %lld pairs %lld", i,
          static_cast<long long>(rows), static_cast<long long>(groups), static_cast<long long>(pairs));
  }
  CHECK(at.words % 4 == 0, "words %lld", static_cast<long long>(at.words));
}

/// Linear in rows plus groups, and none where one block compares all rows.
void check_workspace(int64_t rows, int64_t groups) {
  const int64_t words = plan_workspace(rows, groups);
  CHECK((words == 0) == (rows <= kPlanSmallRows), "workspace of rows %lld groups %lld: %lld words",
        static_cast<long long>(rows), static_cast<long long>(groups), static_cast<long long>(words));
  CHECK(words <= rows + 18 * round_up4(groups) + 128 * kPlanBlockWords + 128 * 4,
        "workspace of rows %lld groups %lld: %lld words", static_cast<long long>(rows), static_cast<long long>(groups),
        static_cast<long long>(words));
}

/// Most runs and tiles any distribution of at most `rows` rows over `groups` groups makes.
struct Most {
  int64_t runs;
  int64_t tiles;
};

std::vector<Most> most_by_rows(int64_t rows, int64_t groups) {
  // best[n]: most tiles of exactly n rows in the groups seen so far.
  std::vector<int64_t> best(static_cast<size_t>(rows + 1), -1);
  best[0] = 0;
  for (int64_t group = 0; group < groups; ++group) {
    std::vector<int64_t> with = best;
    for (int64_t n = 1; n <= rows; ++n) {
      for (int64_t own = 1; own <= n; ++own) {
        const int64_t rest = best[static_cast<size_t>(n - own)];
        if (rest >= 0) with[static_cast<size_t>(n)] = std::max(with[static_cast<size_t>(n)], rest + (own + 15) / 16);
      }
    }
    best = with;
  }
  std::vector<Most> most;
  int64_t tiles = 0;
  for (int64_t n = 0; n <= rows; ++n) {
    tiles = std::max(tiles, best[static_cast<size_t>(n)]);
    most.push_back({std::min(n, groups), tiles});
  }
  return most;
}

void check_capacities(int64_t max_rows, int64_t groups) {
  const std::vector<Most> most = most_by_rows(max_rows, groups);
  for (int64_t rows = 0; rows <= max_rows; ++rows) {
    const Most& need = most[static_cast<size_t>(rows)];
    CHECK(plan_max_runs(rows, groups) >= need.runs, "rows %lld groups %lld", static_cast<long long>(rows),
          static_cast<long long>(groups));
    CHECK(plan_max_tiles(rows, groups) >= need.tiles, "rows %lld groups %lld: %lld tiles, need %lld",
          static_cast<long long>(rows), static_cast<long long>(groups),
          static_cast<long long>(plan_max_tiles(rows, groups)), static_cast<long long>(need.tiles));
    // The bound wastes little: a grid is made of it.
    CHECK(groups == 0 || plan_max_tiles(rows, groups) <= need.tiles + 1, "rows %lld groups %lld: %lld tiles, need %lld",
          static_cast<long long>(rows), static_cast<long long>(groups),
          static_cast<long long>(plan_max_tiles(rows, groups)), static_cast<long long>(need.tiles));
  }
}

void check_view() {
  const int64_t rows = 37, groups = 5, pairs = 40;
  std::vector<int32_t> plan(static_cast<size_t>(plan_layout(rows, groups, pairs).words));
  const PlanLayout at = plan_layout(rows, groups, pairs);
  const PlanView view = plan_view(plan.data(), rows, groups, pairs);
  CHECK(view.row_group == plan.data() + at.row_group && view.order == plan.data() + at.order, "row sections");
  CHECK(view.run_group == plan.data() + at.run_group && view.run_start == plan.data() + at.run_start, "run sections");
  CHECK(static_cast<const void*>(view.tile) == plan.data() + at.tile, "tile section");
  CHECK(static_cast<const void*>(view.wide_tile) == plan.data() + at.wide_tile, "wide tile section");
  CHECK(view.max_wide_tiles == plan_max_tiles(rows, groups, kWideTileRows), "wide tiles");
  CHECK(view.pair_pos == plan.data() + at.pair_pos && view.max_tiles == plan_max_tiles(rows, groups), "pairs, tiles");
  CHECK(plan_view(plan.data(), rows, groups, 0).pair_pos == nullptr, "no pairs");
}

}  // namespace
}  // namespace polylora

int main() {
  using namespace polylora;
  for (int64_t rows = 0; rows <= 70; ++rows) {
    for (int64_t groups = 0; groups <= 20; ++groups) {
      for (int64_t pairs : {0, 1, 2, 3, 4, 5, 31, 32, 33}) check_sections(rows, groups, pairs);
    }
  }
  for (int64_t rows : {kPlanSmallRows, kPlanSmallRows + 1, kPlanOneLaunchRows, kPlanOneLaunchRows + 1, int64_t{400000},
                       int64_t{1} << 24}) {
    for (int64_t groups : {0, 1, 257, 32768, 1 << 20}) {
      check_sections(rows, groups, rows);
      check_workspace(rows, groups);
    }
  }
  for (int64_t groups = 0; groups <= 12; ++groups) check_capacities(100, groups);
  check_view();
  return testing::report();
}
