// plan and moe_plan against a brute force on random small cases, garbage ids included.
#include <algorithm>
#include <limits>
#include <vector>

#include "check.h"
#include "polylora/cpu.h"

namespace polylora {
namespace {

using testing::Random;

constexpr int32_t kJunk = 0x5eed5eed;

/// What a plan must hold, straight from the definition.
struct Expected {
  std::vector<int32_t> row_group;
  std::vector<int32_t> pair_pos;
  int64_t groups = 0;
  int32_t invalid = 0;
};

void check_plan(const std::vector<int32_t>& plan, const Expected& want, int64_t rows, int64_t pairs, int seed) {
  const PlanView view = plan_view(plan.data(), rows, want.groups, pairs);
  std::vector<int32_t> order, run_group, run_start, tiles, wide_tiles, long_tiles, short_wide_tiles;
  int32_t longest = 0, longest_short = 0;
  for (int32_t group = 0; group < want.groups; ++group) {
    const int32_t start = static_cast<int32_t>(order.size());
    for (int32_t row = 0; row < rows; ++row) {
      if (want.row_group[static_cast<size_t>(row)] == group) order.push_back(row);
    }
    const int32_t count = static_cast<int32_t>(order.size()) - start;
    if (count == 0) continue;
    longest = std::max(longest, count);
    const auto cut = [&](int32_t size, std::vector<int32_t>& into) {
      for (int32_t done = 0; done < count; done += size) {
        into.insert(into.end(),
                    {group, start + done, std::min(size, count - done), static_cast<int32_t>(run_group.size())});
      }
    };
    int32_t even = kTileRows;  // the smallest multiple that needs as few tiles as can be
    while ((count + even - 1) / even > (count + kWideTileRows - 1) / kWideTileRows) even += kTileRows;
    if (count <= kShortRun) {
      longest_short = std::max(longest_short, count);
      cut(kTileRows, tiles);
      cut(kWideTileRows, short_wide_tiles);
    } else {
      cut(kTileRows, long_tiles);
      cut(even, wide_tiles);
    }
    run_group.push_back(group);
    run_start.push_back(start);
  }
  run_start.push_back(static_cast<int32_t>(order.size()));
  const auto short_tiles = static_cast<int32_t>(tiles.size() / kTileWords);
  const auto long_wide_tiles = static_cast<int32_t>(wide_tiles.size() / kTileWords);
  tiles.insert(tiles.end(), long_tiles.begin(), long_tiles.end());
  wide_tiles.insert(wide_tiles.end(), short_wide_tiles.begin(), short_wide_tiles.end());
  CHECK(short_tiles <= plan_max_short_tiles(rows, want.groups), "seed %d", seed);
  CHECK(long_wide_tiles <= plan_max_long_tiles(rows, want.groups), "seed %d", seed);

  const int32_t header[kPlanHeaderWords] = {kPlanVersionValue,
                                            static_cast<int32_t>(rows),
                                            static_cast<int32_t>(want.groups),
                                            static_cast<int32_t>(order.size()),
                                            static_cast<int32_t>(run_group.size()),
                                            static_cast<int32_t>(tiles.size() / kTileWords),
                                            want.invalid,
                                            longest,
                                            static_cast<int32_t>(pairs),
                                            static_cast<int32_t>(wide_tiles.size() / kTileWords),
                                            short_tiles,
                                            long_wide_tiles,
                                            longest_short};
  for (int word = 0; word < kPlanHeaderWords; ++word) {
    CHECK(view.header[word] == header[word], "seed %d header word %d: %d, want %d", seed, word, view.header[word],
          header[word]);
  }
  const auto same = [](const int32_t* got, const std::vector<int32_t>& wanted) {
    return std::equal(wanted.begin(), wanted.end(), got);
  };
  CHECK(same(view.row_group, want.row_group), "seed %d", seed);
  CHECK(same(view.order, order), "seed %d", seed);
  CHECK(same(view.run_group, run_group), "seed %d", seed);
  CHECK(same(view.run_start, run_start), "seed %d", seed);
  CHECK(same(reinterpret_cast<const int32_t*>(view.tile), tiles), "seed %d", seed);
  CHECK(same(reinterpret_cast<const int32_t*>(view.wide_tile), wide_tiles), "seed %d", seed);
  CHECK(pairs == 0 || same(view.pair_pos, want.pair_pos), "seed %d", seed);
  CHECK(plan.back() == kJunk, "seed %d: written behind the plan", seed);
}

/// Mostly below `limit`, sometimes -1, sometimes garbage.
int64_t random_id(Random& random, int64_t limit, bool is_int64) {
  const int64_t kind = random.between(0, 19);
  if (kind == 0 || limit == 0) return -1;
  if (kind == 1) return limit;
  if (kind == 2) return random.between(-5, -2);
  if (kind == 3) return is_int64 ? static_cast<int64_t>(random.bits()) : static_cast<int32_t>(random.bits());
  if (kind == 4) return is_int64 ? (int64_t{1} << 32) : std::numeric_limits<int32_t>::min();
  return random.between(0, limit - 1);
}

struct Ids {
  bool is_int64;
  std::vector<int64_t> wide;
  std::vector<int32_t> narrow;

  const void* data() const {
    return is_int64 ? static_cast<const void*>(wide.data()) : static_cast<const void*>(narrow.data());
  }
};

Ids random_ids(Random& random, int64_t count, int64_t limit) {
  Ids ids{random.chance(0.5), {}, {}};
  for (int64_t i = 0; i < count; ++i) {
    ids.wide.push_back(random_id(random, limit, ids.is_int64));
    ids.narrow.push_back(static_cast<int32_t>(ids.wide.back()));
  }
  return ids;
}

std::vector<int32_t> empty_plan(int64_t rows, int64_t groups, int64_t pairs) {
  return std::vector<int32_t>(static_cast<size_t>(plan_layout(rows, groups, pairs).words + 1), kJunk);
}

void dense_case(int seed) {
  Random random(static_cast<uint64_t>(seed));
  const int64_t rows = random.chance(0.1) ? random.between(0, 600) : random.between(0, 40);
  const int64_t groups = random.between(0, random.chance(0.2) ? 200 : 6);
  const Ids ids = random_ids(random, rows, groups);
  Expected want;
  want.groups = groups;
  for (int64_t id : ids.wide) {
    const bool valid = id >= 0 && id < groups;
    if (!valid && id != -1) ++want.invalid;
    want.row_group.push_back(valid ? static_cast<int32_t>(id) : -1);
  }
  std::vector<int32_t> plan = empty_plan(rows, groups, 0);
  cpu::plan({plan.data(), ids.data(), ids.is_int64, rows, groups}, testing::serial);
  check_plan(plan, want, rows, 0, seed);
}

void moe_case(int seed) {
  Random random(static_cast<uint64_t>(seed) + 1000003);
  const int64_t tokens = random.between(0, 12);
  const int32_t top_k = static_cast<int32_t>(random.between(1, 6));
  const int64_t pairs = tokens * top_k;
  const int32_t slots = static_cast<int32_t>(random.between(0, 4));
  const int32_t experts = static_cast<int32_t>(random.between(1, 9));
  const bool mapped_experts = random.chance(0.5);
  const int32_t global_experts = mapped_experts ? static_cast<int32_t>(random.between(1, 20)) : experts;
  const bool mapped_rows = random.chance(0.5);
  const int64_t rows = mapped_rows ? random.between(0, 100) : pairs;

  const Ids ids = random_ids(random, pairs, global_experts);
  std::vector<int32_t> token_slots, expert_map, row_map;
  for (int64_t t = 0; t < tokens; ++t) token_slots.push_back(static_cast<int32_t>(random_id(random, slots, false)));
  for (int32_t e = 0; e < global_experts; ++e) {
    expert_map.push_back(static_cast<int32_t>(random_id(random, experts, false)));
  }
  for (int64_t p = 0; p < rows; ++p) row_map.push_back(static_cast<int32_t>(random_id(random, pairs, false)));

  Expected want;
  want.groups = int64_t{slots} * experts;
  if (mapped_rows) want.pair_pos.assign(static_cast<size_t>(pairs), -1);
  for (int64_t p = 0; p < rows; ++p) {
    int32_t group = kNoRow;
    const int64_t pair = mapped_rows ? row_map[static_cast<size_t>(p)] : p;
    if (pair < 0 || pair >= pairs) {
      if (pair != -1) ++want.invalid;
    } else {
      if (mapped_rows) want.pair_pos[static_cast<size_t>(pair)] = static_cast<int32_t>(p);
      const int64_t id = ids.wide[static_cast<size_t>(pair)];
      const bool known = id >= 0 && id < global_experts;
      const int64_t expert = known && mapped_experts ? expert_map[static_cast<size_t>(id)] : id;
      const int64_t slot = token_slots[static_cast<size_t>(pair / top_k)];
      if (id == -1 || (known && expert == -1)) {
        group = kNoRow;
      } else if (!known || expert < 0 || expert >= experts) {
        ++want.invalid;
      } else if (slot >= 0 && slot < slots) {
        group = static_cast<int32_t>(slot * experts + expert);
      } else {
        group = kNoAdapter;
        if (slot != -1) ++want.invalid;
      }
    }
    want.row_group.push_back(group);
  }

  const int64_t mapped_pairs = mapped_rows ? pairs : 0;
  std::vector<int32_t> plan = empty_plan(rows, want.groups, mapped_pairs);
  // A non-null pointer, even without rows: null means "no map".
  row_map.push_back(0);
  MoePlanParams params{};
  params.plan = plan.data();
  params.topk_ids = ids.data();
  params.ids_are_int64 = ids.is_int64;
  params.token_slots = token_slots.data();
  params.expert_map = mapped_experts ? expert_map.data() : nullptr;
  params.row_map = mapped_rows ? row_map.data() : nullptr;
  params.rows = rows;
  params.pairs = pairs;
  params.top_k = top_k;
  params.slots = slots;
  params.experts = experts;
  params.global_experts = global_experts;
  cpu::moe_plan(params, testing::serial);
  check_plan(plan, want, rows, mapped_pairs, seed);
}

}  // namespace
}  // namespace polylora

int main() {
  for (int seed = 0; seed < 10000; ++seed) {
    polylora::dense_case(seed);
    polylora::moe_case(seed);
  }
  return polylora::testing::report();
}
