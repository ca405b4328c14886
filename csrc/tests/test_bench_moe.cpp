// The host side of bench_moe: cases, options and routings are those of `polylora bench moe`, bytes the documented ones,
// and what judges results tells right from wrong.
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "moe_cases.h"
#include "moe_options.h"
#include "moe_rotation.h"
#include "moe_routing.h"
#include "plan_check.h"
#include "polylora/cpu.h"
#include "row_errors.h"

namespace polylora::bench {
namespace {

constexpr int64_t kL2 = 50 << 20;
constexpr int64_t kH100Bytes = 79000000000;

template <typename Body>
bool refuses(const Body& body) {
  try {
    body();
  } catch (const UsageError&) {
    return true;
  }
  return false;
}

void test_names_are_read_back() {
  std::set<std::string> names;
  for (const MoeCase& c : moe_preset_cases("full")) {
    CHECK(names.insert(c.name()).second, "%s twice", c.name().c_str());
    CHECK(parse_moe_case(c.name()).name() == c.name(), "%s", c.name().c_str());
  }
  CHECK(names.size() == 100, "%zu", names.size());
  for (const char* preset : {"quick", "issue"}) {
    for (const MoeCase& c : moe_preset_cases(preset)) {
      CHECK(names.count(c.name()) == 1, "%s is not in full", c.name().c_str());
    }
  }
  names.clear();
  for (const MoeCase& c : select_moe_cases(parse_moe_options({"--check"}))) {
    CHECK(names.insert(c.name()).second && c.pool_bytes() < 16 << 20, "%s is twice, or not small", c.name().c_str());
  }
  CHECK(names.size() == 15, "%zu", names.size());
  CHECK(moe_preset_cases("quick").size() == 4 && moe_preset_cases("issue").size() == 19, "sizes of presets");

  const MoeCase c = parse_moe_case(" moe:48x32,e8,k3,swiglu_oai,gated,interleaved  r4 M70 ");
  CHECK(c.name() == "moe:48x32,e8,k3,swiglu_oai,gated,interleaved r4 M70", "%s", c.name().c_str());
  CHECK(c.model.hidden == 48 && c.model.inner == 32 && c.model.experts == 8 && c.model.top_k == 3, "sizes");
  CHECK(c.model.gated && c.model.interleaved && c.model.activation() == Activation::kSwigluOai, "activation");
  const MoeCase plain = parse_moe_case("moe:64x48,e16,k5,relu2 r16 M40");
  CHECK(!plain.model.gated && plain.model.slices() == 1 && plain.model.activation() == Activation::kRelu2, "relu2");
}

void test_cases_that_make_no_sense_are_refused() {
  for (const char* text : {"",
                           "qwen35-35b",
                           "qwen35-35b r16",
                           "qwen35-35b r16 M1 x",
                           "qwen r16 M1",
                           "qwen35-35b 16 M1",
                           "qwen35-35b r16 m1",
                           "qwen35-35b r0 M1",
                           "qwen35-35b r257 M1",
                           "qwen35-35b r16 M0",
                           "qwen35-35b r16 M1x",
                           "moe:64x32,e8,k9,silu r8 M1",
                           "moe:64x32,e8,k2,gelu r8 M1",
                           "moe:64,e8,k2,silu r8 M1",
                           "moe:64x32,8,k2,silu r8 M1",
                           "moe:64x32,e8,k2 r8 M1",
                           "moe:64x32,e8,k2,silu,interleaved r8 M1",
                           "moe:64x32,e8,k2,swiglu_oai r8 M1",
                           "moe:64x32,e8,k2,silu,gated,gated r8 M1",
                           "moe:0x32,e8,k2,silu r8 M1"}) {
    CHECK(refuses([&] { parse_moe_case(text); }), "'%s' was taken", text);
  }
}

// docs/benchmarks.md and tests/test_bench_moe.py hold the Python benchmark to the same weights and bars.
void test_documented_weights_and_bars() {
  struct Documented {
    const char* name;
    double weights;  // MB
    double bar;      // us
  };
  for (const Documented& row : {Documented{"qwen35-35b r16 M1", 2.0, 5},
                                {"qwen35-35b r16 M16", 30.9, 12.5},
                                {"qwen35-35b r16 M64", 112.8, 42},
                                {"qwen35-35b r16 M256", 320.5, 125},
                                {"qwen35-35b r16 M2048", 251.7, 150},
                                {"qwen35-35b r64 M1", 7.9, 6.5},
                                {"qwen35-35b r64 M2048", 1006.6, 420},
                                {"nemotron3-super r16 M1", 5.2, 6},
                                {"nemotron3-super r16 M64", 289.3, 108},
                                {"nemotron3-super r16 M256", 735.9, 300},
                                {"nemotron3-super r64 M256", 2929.0, 1100}}) {
    const MoeCase c = parse_moe_case(row.name);
    const MoeRouting routing = RoutingDealer(c, 1, kRoutingSeed).next();
    const double mb = static_cast<double>(routing.groups_hit() * (c.up_bytes() + c.down_bytes())) / 1e6;
    CHECK(std::fabs(mb / row.weights - 1) < 0.03, "%s: %g MB, documented %g", row.name, mb, row.weights);
    CHECK(moe_bar_us(c) == row.bar, "%s: %g", row.name, moe_bar_us(c));
  }
  CHECK(moe_bar_us(parse_moe_case("nemotron3-super r64 M2048")) == 0, "a case without a bar");
  CHECK(yardstick_us(3e6) == 1, "%g", yardstick_us(3e6));
  CHECK(moe_floor_us(h100_limits(), 256 * kMiB) == 86.9, "%g", moe_floor_us(h100_limits(), 256 * kMiB));
}

void test_bytes() {
  const MoeCase c = parse_moe_case("qwen35-35b r16 M64");
  CHECK(c.up_bytes() == 2 * 16 * (2048 + 512) * 2, "%lld", static_cast<long long>(c.up_bytes()));
  CHECK(c.down_bytes() == 16 * (512 + 2048) * 2, "%lld", static_cast<long long>(c.down_bytes()));
  CHECK(c.pool_bytes() == 8 * 256 * (c.up_bytes() + c.down_bytes()), "%lld", static_cast<long long>(c.pool_bytes()));
  CHECK(c.model.base_bytes() == 3 * 512 * 2048 * 2, "%lld", static_cast<long long>(c.model.base_bytes()));
  CHECK(c.pairs() == 512 && c.groups() == 2048, "pairs and groups");
  const MoeCase plain = parse_moe_case("nemotron3-super r16 M1");
  CHECK(plain.up_bytes() == 16 * (1024 + 2688) * 2 && plain.up_bytes() == plain.down_bytes(), "one slice");
  CHECK(plain.model.base_bytes() == 2 * 2688 * 1024 * 2, "up and down");
}

void test_adapters_of_tokens() {
  MoeCase c = parse_moe_case("qwen35-35b r16 M2047");
  CHECK(c.slot_of(9, 0) == 1 && c.slot_of(9, 3) == 4 && c.slot_of(2046, 7) == 5, "row i has adapter i mod 8");
  for (const int64_t rows : {2048, 2050, 4097}) {
    c.rows = rows;
    for (const int64_t turn : {0, 6}) {
      for (int64_t row = 0; row < rows; ++row) {
        int64_t segment = 0;
        while (segment < 3 && row >= (segment + 1) * rows / 4) ++segment;
        CHECK(c.slot_of(row, turn) == (segment + turn) % 8, "row %lld of %lld: %d", static_cast<long long>(row),
              static_cast<long long>(rows), c.slot_of(row, turn));
      }
    }
  }
}

void check_routing(const MoeCase& c, const MoeRouting& r) {
  const auto top_k = static_cast<size_t>(c.model.top_k);
  const auto pairs = static_cast<size_t>(c.pairs());
  CHECK(r.topk_ids.size() == pairs && r.topk_weights.size() == pairs && r.row_map.size() == pairs, "%zu", pairs);
  for (size_t row = 0; row < static_cast<size_t>(c.rows); ++row) {
    const auto first = static_cast<std::ptrdiff_t>(row * top_k);
    const std::set<int32_t> experts(r.topk_ids.begin() + first, r.topk_ids.begin() + first + c.model.top_k);
    CHECK(experts.size() == top_k, "row %zu: an expert comes twice", row);
    CHECK(*experts.begin() >= 0 && *experts.rbegin() < c.model.experts, "row %zu: experts", row);
    double sum = 0;
    for (size_t j = 0; j < top_k; ++j) {
      sum += static_cast<double>(r.topk_weights[row * top_k + j]);
      CHECK(r.topk_weights[row * top_k + j] > 0, "row %zu: a weight", row);
    }
    CHECK(std::fabs(sum - 1) < 1e-5, "row %zu: weights add up to %g", row, sum);
  }
  int64_t counted = 0;
  for (size_t at = 0; at < pairs; ++at) {
    const auto pair = static_cast<size_t>(r.row_map[at]);
    CHECK(r.position[pair] == static_cast<int32_t>(at), "the inverse of the row map at %zu", at);
    const int32_t expert = r.topk_ids[pair];
    CHECK(r.group[at] == r.slots[pair / top_k] * c.model.experts + expert, "the group at %zu", at);
    if (at == 0) continue;
    const auto before = static_cast<size_t>(r.row_map[at - 1]);
    const int32_t expert_before = r.topk_ids[before];
    CHECK(expert_before < expert || (expert_before == expert && before < pair), "the order at %zu", at);
  }
  for (const int32_t rows : r.expert_rows) counted += rows;
  CHECK(counted == c.pairs(), "%lld pairs of experts", static_cast<long long>(counted));
}

void test_routings() {
  for (const char* text : {"qwen35-35b r16 M1", "qwen35-35b r16 M64", "moe:32x16,e4,k4,silu,gated r8 M2050"}) {
    const MoeCase c = parse_moe_case(text);
    RoutingDealer dealer(c, 3, 1);
    RoutingDealer again(c, 3, 1);
    for (int64_t turn = 0; turn < 3; ++turn) {
      const MoeRouting routing = dealer.next();
      check_routing(c, routing);
      CHECK(routing.slots[0] == turn % kMoeSlots, "%s: the adapters move on", text);
      CHECK(again.next().topk_ids == routing.topk_ids, "%s: the same seed draws the same", text);
    }
  }
}

void test_experts_are_equally_likely() {
  const MoeCase c = parse_moe_case("moe:32x16,e16,k3,silu,gated r8 M2000");
  const MoeRouting routing = RoutingDealer(c, 1, 5).next();
  const double expected = 2000.0 * 3 / 16;
  for (const int32_t rows : routing.expert_rows)
    CHECK(std::fabs(rows - expected) < 5 * std::sqrt(expected), "%d", rows);
  std::map<int32_t, int> first;
  for (size_t row = 0; row < 2000; ++row) ++first[routing.topk_ids[row * 3]];
  for (const auto& [expert, rows] : first)
    CHECK(std::abs(rows - 125) < 60, "expert %d is first %d times", expert, rows);
}

void test_no_pair_comes_again_before_the_others() {
  const MoeCase c = parse_moe_case("qwen35-35b r16 M8");
  constexpr int64_t kPools = 2;
  RoutingDealer dealer(c, kPools, 1);
  std::map<std::pair<int64_t, int32_t>, std::set<int32_t>> seen;
  std::set<std::pair<int64_t, int32_t>> of_token_0;
  for (int64_t turn = 0; turn < 64; ++turn) {
    const MoeRouting routing = dealer.next();
    of_token_0.insert({routing.pool, routing.slots[0]});
    for (size_t pair = 0; pair < routing.topk_ids.size(); ++pair) {
      std::set<int32_t>& experts = seen[{routing.pool, routing.slots[pair / 8]}];
      CHECK(experts.insert(routing.topk_ids[pair]).second, "turn %lld: again", static_cast<long long>(turn));
    }
    for (auto& [key, experts] : seen) {
      if (experts.size() == 256) experts.clear();
    }
  }
  CHECK(of_token_0.size() == kPools * kMoeSlots, "%zu adapters of pools come up", of_token_0.size());
}

void test_rotation() {
  struct Documented {
    const char* name;
    int64_t layers;
  };
  // docs/benchmarks.md: on an H100 4 routings at M 1, 2 from M 16 on
  for (const Documented& row :
       {Documented{"qwen35-35b r16 M1", 4}, {"qwen35-35b r16 M16", 2}, {"qwen35-35b r64 M256", 2}}) {
    const MoeCase c = parse_moe_case(row.name);
    const MoeRouting routing = RoutingDealer(c, 1, kRoutingSeed).next();
    const MoeRotation rotation = moe_rotation(c, routing.groups_hit(), routing.experts_hit(), kL2);
    CHECK(rotation.layers == row.layers, "%s: %lld", row.name, static_cast<long long>(rotation.layers));
    const double half = static_cast<double>(routing.groups_hit() * std::min(c.up_bytes(), c.down_bytes()));
    CHECK(rotation.routings >= rotation.layers, "%s: %lld", row.name, static_cast<long long>(rotation.routings));
    CHECK(static_cast<double>(rotation.routings) * half > static_cast<double>(kColdL2s * kL2), "%s is warm", row.name);
  }
  CHECK(moe_rotation(parse_moe_case("moe:8x8,e1,k1,silu r1 M1"), 1, 1, kL2).layers == kMaxRoutings, "an end");
}

void test_pools_fit_the_memory() {
  for (const MoeCase& c : moe_preset_cases("issue")) {
    const MoePools pools = moe_pools(c, true, kL2, kH100Bytes);
    CHECK(pools.cold && pools.pools >= 1, "%s: %lld pools", c.name().c_str(), static_cast<long long>(pools.pools));
    const int64_t half = c.groups() * std::min(c.up_bytes(), c.down_bytes());
    CHECK(pools.pools * half >= kPoolL2s * kL2, "%s: %lld pools", c.name().c_str(),
          static_cast<long long>(pools.pools));
  }
  const MoeCase c = parse_moe_case("kimi-k25 r64 M16384");
  for (int64_t available = 4 * kH100Bytes; available > 1 << 30; available /= 2) {
    const MoePools pools = moe_pools(c, true, kL2, available);
    const int64_t used = c.model.experts * c.model.base_bytes() + c.buffer_bytes() + pools.pools * c.pool_bytes();
    CHECK(pools.pools == 0 || static_cast<double>(used) <= kMemoryShare * static_cast<double>(available), "%lld bytes",
          static_cast<long long>(used));
    CHECK(moe_pools(c, false, kL2, available).pools >= pools.pools, "room without a base");
  }
  CHECK(moe_pools(c, true, kL2, kH100Bytes / 2).pools == 0, "no room for the base and a pool");
  CHECK(!moe_pools(parse_moe_case("qwen35-35b r16 M1"), false, kL2, 700 << 20).cold, "one pool only, and it says so");
}

void test_options() {
  const MoeOptions options =
      parse_moe_options({"--preset=issue", "--filter", "qwen35-35b r16", "--seams", "fused,added", "--path", "general",
                         "--json", "--reps", "31", "--no-calibrate"});
  CHECK(options.json && !options.calibrate && options.reps == 31 && options.base, "flags");
  CHECK(options.seams == (std::vector<Seams>{Seams::kFused, Seams::kAdded}), "seams");
  CHECK(select_moe_cases(options).size() == 5, "%zu cases", select_moe_cases(options).size());
  CHECK(select_moe_cases(parse_moe_options({})).size() == 4, "quick by default");
  CHECK(parse_moe_options({}).seams == std::vector<Seams>{Seams::kBeside}, "beside by default");
  CHECK(!parse_moe_options({"--base", "none"}).base, "no base");
  const MoeOptions one = parse_moe_options({"--case", "qwen35-35b r16 M64"});
  CHECK(select_moe_cases(one).size() == 1, "explicit cases stand alone");
  CHECK(parse_moe_options({"-h"}).help && moe_usage().find("--seams") != std::string::npos, "help");
  using Words = std::vector<std::string>;
  for (const Words& words : {Words{"--seams", "apart"},
                             {"--seams", ""},
                             {"--seams", "fused,"},
                             {"--seams"},
                             {"--base", "triton"},
                             {"--base", "none", "--seams", "added"},
                             {"--preset", "chain"},
                             {"--op", "plan"},
                             {"--chain"},
                             {"--filter", "no such name"},
                             {"--case", "qwen35-35b"},
                             {"--path", "fast"},
                             {"--path", "cluster"},
                             {"--path", "wide"},
                             {"--json=1"},
                             {"word"}}) {
    CHECK(refuses([&] { select_moe_cases(parse_moe_options(words)); }), "'%s' was taken", words[0].c_str());
  }
}

void test_plans_are_judged() {
  const MoeCase c = parse_moe_case("moe:32x16,e8,k3,silu,gated r8 M300");
  const MoeRouting routing = RoutingDealer(c, 1, 1).next();
  std::vector<int32_t> plan(static_cast<size_t>(plan_layout(c.pairs(), c.groups(), c.pairs()).words));
  MoePlanParams p{};
  p.plan = plan.data();
  p.topk_ids = routing.topk_ids.data();
  p.token_slots = routing.slots.data();
  p.row_map = routing.row_map.data();
  p.rows = p.pairs = c.pairs();
  p.top_k = c.model.top_k;
  p.slots = kMoeSlots;
  p.experts = p.global_experts = c.model.experts;
  cpu::moe_plan(p, testing::serial);
  const auto mistake = [&] { return plan_mistake(plan, routing.group, c.groups(), routing.position); };
  CHECK(mistake().empty(), "%s", mistake().c_str());
  const PlanLayout at = plan_layout(c.pairs(), c.groups(), c.pairs());
  for (const int64_t word : {at.row_group + 7, at.order + 7, at.run_group + 2, at.run_start + 2, at.pair_pos + 7,
                             int64_t{kPlanVersion}, int64_t{kPlanPairs}, int64_t{kPlanTiles}, int64_t{kPlanInvalid}}) {
    ++plan[static_cast<size_t>(word)];
    CHECK(!mistake().empty(), "word %lld is not looked at", static_cast<long long>(word));
    --plan[static_cast<size_t>(word)];
  }
}

void test_errors_are_judged_by_group() {
  const auto place = [](size_t row) { return "row " + std::to_string(row); };
  // two rows of group 5, one of group 6, ||reference|| 10 each
  std::vector<RowError> rows(3, RowError{0.01, 100, 0, 3, 1, 2});
  const std::vector<int64_t> keys = {5, 6, 5};
  const Verdict fine = judge("op", rows, keys, place);
  CHECK(fine.failure.empty() && std::fabs(fine.error - 0.01) < 1e-12, "%g %s", fine.error, fine.failure.c_str());
  rows[2].difference = 0.0702;  // group 5 is at 0.02002 then, all rows together at 0.0173
  const Verdict wrong = judge("op", rows, keys, place);
  CHECK(wrong.failure.find("op: ") == 0 && wrong.failure.find("row 0, column 3: got 1, want 2") != std::string::npos,
        "'%s'", wrong.failure.c_str());
  rows[2].difference = 0.01;
  rows[1].not_finite = 1;
  CHECK(judge("op", rows, keys, place).failure.find("row 1") != std::string::npos, "a value that is not finite");
  rows[1] = {std::numeric_limits<double>::quiet_NaN(), 100, 0, 0, 0, 0};
  CHECK(!judge("op", rows, keys, place).failure.empty(), "NaN is not small");
  rows[1] = {1e-30, 0, 0, 0, 0, 0};
  CHECK(!judge("op", rows, keys, place).failure.empty(), "what should be 0 and is not");
  rows[1] = {0, 0, 0, 0, 0, 0};
  CHECK(judge("op", rows, keys, place).failure.empty(), "what should be 0 and is");
}

}  // namespace
}  // namespace polylora::bench

int main() {
  using namespace polylora::bench;
  test_names_are_read_back();
  test_cases_that_make_no_sense_are_refused();
  test_documented_weights_and_bars();
  test_bytes();
  test_adapters_of_tokens();
  test_routings();
  test_experts_are_equally_likely();
  test_no_pair_comes_again_before_the_others();
  test_rotation();
  test_pools_fit_the_memory();
  test_options();
  test_plans_are_judged();
  test_errors_are_judged_by_group();
  return polylora::testing::report();
}
