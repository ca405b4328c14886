// The benchmarks' host side: the floor reproduces the documented one; cases and options parse, and refuse what is
// wrong.
#include <cmath>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "cases.h"
#include "check.h"
#include "floor.h"
#include "options.h"
#include "rotation.h"
#include "stats.h"

namespace polylora::bench {
namespace {

void test_interpolation() {
  const DeviceLimits h100 = h100_limits();
  const auto at = [&](double bytes) { return interpolate_us(h100.mib, h100.read_cold_us, bytes); };
  for (size_t i = 0; i < h100.mib.size(); ++i) {
    CHECK(std::fabs(at(h100.mib[i] * kMiB) - h100.read_cold_us[i]) < 1e-9, "size %zu", i);
  }
  CHECK(at(1) == 1.34, "below the smallest size: %g", at(1));
  CHECK(std::fabs(at(12 * kMiB) - (4.17 + 7.16) / 2) < 1e-9, "midpoint: %g", at(12 * kMiB));
  CHECK(std::fabs(at(512 * kMiB) - 2 * 86.9) < 1e-9, "above the largest size: %g", at(512 * kMiB));
  double last = 0;
  for (double bytes = 1e4; bytes < 1e9; bytes *= 1.07) {
    CHECK(at(bytes) >= last, "falls at %g bytes", bytes);
    last = at(bytes);
  }
  CHECK(interpolate_us({}, {}, 1e6) == 0, "an empty table");
}

/// A row of the documented table: weights and x + y in MB, floor in us.
struct Documented {
  const char* name;
  double weights;
  double activations;
  double floor;
};

void check_floors(const std::vector<Case>& cases, Op op, const std::vector<Documented>& rows) {
  CHECK(cases.size() == rows.size(), "%zu cases, %zu documented", cases.size(), rows.size());
  const DeviceLimits h100 = h100_limits();
  for (size_t i = 0; i < std::min(rows.size(), cases.size()); ++i) {
    const Traffic traffic = traffic_of(cases[i], op);
    const double floor = floor_us(h100, traffic);
    CHECK(cases[i].name() == rows[i].name, "%s, documented %s", cases[i].name().c_str(), rows[i].name);
    CHECK(std::fabs(traffic.weights / 1e6 - rows[i].weights) < 0.006, "%s: %g MB of weights, documented %g",
          rows[i].name, traffic.weights / 1e6, rows[i].weights);
    CHECK(std::fabs(traffic.moved / 1e6 - rows[i].activations) < 0.006, "%s: %g MB of x and y, documented %g",
          rows[i].name, traffic.moved / 1e6, rows[i].activations);
    CHECK(std::fabs(floor - rows[i].floor) < 0.1, "%s: floor %g, documented %g", rows[i].name, floor, rows[i].floor);
  }
}

/// A preset's cases with lm_heads alone, or without.
std::vector<Case> heads_of(const std::string& preset, bool heads) {
  std::vector<Case> kept;
  for (const Case& c : preset_cases(preset, Op::kLinear)) {
    if ((regime_of(c) == Regime::kLmHead) == heads) kept.push_back(c);
  }
  return kept;
}

void test_documented_floors() {
  const std::vector<Documented> rows = {
      {"llama8b.qkv r16 M1 a1", 0.59, 0.03, 1.6},           {"llama8b.qkv r16 M16 a16", 9.44, 0.52, 4.6},
      {"llama8b.qkv r16 M64 a32", 18.87, 2.10, 8.2},        {"llama8b.qkv r16 M256 a32", 18.87, 8.39, 9.1},
      {"llama8b.qkv r16 M2048 a4", 2.36, 67.11, 25.5},      {"llama8b.qkv r16 M8192 a4", 2.36, 268.44, 96.2},
      {"llama8b.qkv r64 M1 a1", 2.36, 0.03, 2.2},           {"llama8b.qkv r64 M16 a16", 37.75, 0.52, 14.0},
      {"llama8b.qkv r64 M64 a32", 75.50, 2.10, 26.3},       {"llama8b.qkv r64 M256 a32", 75.50, 8.39, 27.3},
      {"llama8b.qkv r64 M2048 a4", 9.44, 67.11, 27.8},      {"llama8b.qkv r64 M8192 a4", 9.44, 268.44, 98.4},
      {"llama8b.down r16 M1 a1", 0.59, 0.05, 1.6},          {"llama8b.down r16 M16 a16", 9.44, 0.72, 4.7},
      {"llama8b.down r16 M64 a32", 18.87, 2.88, 8.3},       {"llama8b.down r16 M256 a32", 18.87, 11.53, 9.6},
      {"llama8b.down r16 M2048 a4", 2.36, 92.27, 34.3},     {"llama8b.down r16 M8192 a4", 2.36, 369.10, 131.5},
      {"llama8b.down r64 M1 a1", 2.36, 0.05, 2.2},          {"llama8b.down r64 M16 a16", 37.75, 0.72, 14.0},
      {"llama8b.down r64 M64 a32", 75.50, 2.88, 26.4},      {"llama8b.down r64 M256 a32", 75.50, 11.53, 27.8},
      {"llama8b.down r64 M2048 a4", 9.44, 92.27, 36.6},     {"llama8b.down r64 M8192 a4", 9.44, 369.10, 133.8},
      {"qwen35moe.qkvz r16 M1 a1", 0.66, 0.05, 1.6},        {"qwen35moe.qkvz r16 M16 a16", 10.49, 0.85, 5.0},
      {"qwen35moe.qkvz r16 M64 a32", 20.97, 3.41, 9.0},     {"qwen35moe.qkvz r16 M256 a32", 20.97, 13.63, 10.6},
      {"qwen35moe.qkvz r16 M2048 a4", 2.62, 109.05, 40.3},  {"qwen35moe.qkvz r16 M8192 a4", 2.62, 436.21, 155.1},
      {"qwen35moe.qkvz r64 M1 a1", 2.62, 0.05, 2.3},        {"qwen35moe.qkvz r64 M16 a16", 41.94, 0.85, 15.4},
      {"qwen35moe.qkvz r64 M64 a32", 83.89, 3.41, 29.2},    {"qwen35moe.qkvz r64 M256 a32", 83.89, 13.63, 30.7},
      {"qwen35moe.qkvz r64 M2048 a4", 10.49, 109.05, 42.9}, {"qwen35moe.qkvz r64 M8192 a4", 10.49, 436.21, 157.7},
  };
  check_floors(heads_of("issue", false), Op::kLinear, rows);
}

// tests/test_bench_cases.py holds the Python benchmark to the same rows.
void test_floors_of_vocabularies() {
  check_floors(heads_of("issue", true), Op::kLinear,
               {{"llama8b.lm_head r16 M1 a1", 4.24, 0.52, 2.94},
                {"llama8b.lm_head r16 M16 a16", 67.76, 8.34, 24.79},
                {"llama8b.lm_head r16 M64 a32", 135.53, 33.36, 50.05},
                {"qwen35moe.lm_head r16 M1 a1", 8.01, 1.00, 4.20},
                {"qwen35moe.lm_head r16 M16 a16", 128.19, 15.96, 45.05},
                {"qwen35moe.lm_head r16 M64 a32", 256.38, 63.83, 106.57}});
  check_floors(preset_cases("quick", Op::kEmbedding), Op::kEmbedding,
               {{"llama8b.embed r16 M1 a1", 0.13, 0.02, 1.34},
                {"llama8b.embed r16 M64 a32", 4.23, 1.05, 3.02},
                {"llama8b.embed r16 M2048 a4", 1.57, 33.55, 7.12},
                {"qwen35moe.embed r16 M1 a1", 0.07, 0.01, 1.34},
                {"qwen35moe.embed r16 M64 a32", 2.13, 0.52, 2.25},
                {"qwen35moe.embed r16 M2048 a4", 1.31, 16.78, 4.44}});
}

void test_lm_heads_stay_out_of_the_means_of_layers() {
  int64_t count[4] = {};
  for (const Case& c : preset_cases("issue", Op::kLinear)) ++count[static_cast<int>(regime_of(c))];
  for (const Regime regime : {Regime::kSmall, Regime::kDecode, Regime::kPrefill}) {
    const int i = static_cast<int>(regime);
    CHECK(count[i] == 12, "%s: %lld", kRegimeNames[i], static_cast<long long>(count[i]));
  }
  CHECK(count[static_cast<int>(Regime::kLmHead)] == 6, "lm_head: %lld",
        static_cast<long long>(count[static_cast<int>(Regime::kLmHead)]));
  Case c = parse_case("k=8,n=8,r=8,m=1,name=lm_head", Op::kLinear);
  CHECK(regime_of(c) == Regime::kSmall, "a name is model.module: %s", kRegimeNames[static_cast<int>(regime_of(c))]);
  c = parse_case("k=8,n=8,r=8,m=1,name=my.lm_head", Op::kLinear);
  CHECK(regime_of(c) == Regime::kLmHead, "%s", kRegimeNames[static_cast<int>(regime_of(c))]);
}

RotationNeeds needs_of(const Case& c, Op op) {
  const Traffic traffic = traffic_of(c, op);
  return {traffic.weights, weight_set_bytes(c, op), static_cast<int64_t>(traffic.footprint),
          traffic.footprint <= kHotBytes};
}

constexpr int64_t kL2 = 50 << 20;
constexpr int64_t kH100Bytes = 79000000000;

void test_every_case_is_cold_on_an_h100() {
  for (const Op op : {Op::kLinear, Op::kEmbedding}) {
    for (const Case& c : preset_cases("full", op)) {
      const RotationNeeds needs = needs_of(c, op);
      const Rotation rotation = rotate(needs, kL2, kH100Bytes);
      CHECK(rotation.cold && rotation.sets >= 2, "%s %s: %lld sets", op_name(op), c.name().c_str(),
            static_cast<long long>(rotation.sets));
      const double passing = needs.needed + (needs.hot ? 0 : static_cast<double>(needs.copy_bytes));
      CHECK(static_cast<double>(rotation.sets) * passing >= static_cast<double>(kColdL2s * kL2), "%s %s: %lld sets",
            op_name(op), c.name().c_str(), static_cast<long long>(rotation.sets));
    }
  }
}

void test_rotation_never_outgrows_the_memory() {
  // 64 adapters of 0.5 GB in all, a set
  const Case head = parse_case("name=qwen35moe.lm_head,k=2048,n=248320,r=16,m=64,a=64", Op::kLinear);
  const Case embedding = parse_case("vocab=248320,n=2048,r=64,m=64,a=32", Op::kEmbedding);
  CHECK(rotate(needs_of(head, Op::kLinear), kL2, kH100Bytes).cold, "0.5 GB a set");
  for (const RotationNeeds& needs : {needs_of(head, Op::kLinear), needs_of(embedding, Op::kEmbedding)}) {
    for (int64_t available = kH100Bytes; available > 1 << 20; available /= 2) {
      const Rotation rotation = rotate(needs, kL2, available);
      const double used = static_cast<double>(rotation.sets * needs.set_bytes + rotation.copies * needs.copy_bytes);
      CHECK(rotation.sets == 1 || used <= kMemoryShare * static_cast<double>(available), "%g of %g bytes", used,
            static_cast<double>(available));
      CHECK(rotation.sets >= 1, "%lld sets", static_cast<long long>(rotation.sets));
    }
    CHECK(!rotate(needs, kL2, 2 * needs.set_bytes).cold, "one set only, and it says so");
  }
  CHECK(rotate({}, kL2, 0).sets == 1, "an idle case reads no weights");
}

void test_floor_of_other_ops() {
  const DeviceLimits h100 = h100_limits();
  Case c = parse_case("k=4096,n=4096,r=16,m=16,a=16", Op::kLinear);
  const double whole = traffic_of(c, Op::kLinear).weights;
  CHECK(traffic_of(c, Op::kShrink).weights + traffic_of(c, Op::kExpand).weights == whole, "the halves' weights");
  CHECK(traffic_of(c, Op::kShrink).moved == 16 * (4096 * 2 + 16 * 4), "%g", traffic_of(c, Op::kShrink).moved);
  CHECK(traffic_of(c, Op::kExpand).moved == 16 * (2 * 4096 * 2 + 16 * 4), "%g", traffic_of(c, Op::kExpand).moved);
  c.idle = true;
  CHECK(floor_us(h100, traffic_of(c, Op::kLinear)) == h100.node_us, "an idle call is a graph node");

  c = parse_case("k=4096,n=4096,r=8-64,m=6,a=6", Op::kLinear);
  CHECK(weight_bytes(c, Op::kLinear) == (8 + 16 + 32 + 64 + 8 + 16) * 8192 * 2, "mixed ranks: %g",
        weight_bytes(c, Op::kLinear));
  c = parse_case("k=4096,n=4096,r=16,m=4,pitch=64", Op::kLinear);
  CHECK(c.b_pitch == 64 && c.name() == "4096->4096 r16 M4 a4 pitch64", "%s", c.name().c_str());
  c = parse_case("k=4096,n=4096,r=16,m=4,a=32,slots=64", Op::kLinear);
  CHECK(c.adapters == 4 && c.slots == 64, "adapters without rows have no weights to read: %d", c.adapters);

  c = parse_case("vocab=128256,n=4096,r=64,m=3,a=1", Op::kEmbedding);
  CHECK(weight_bytes(c, Op::kEmbedding) == 4096 * 64 * 2 + 3 * 64 * 32, "a sector an element: %g",
        weight_bytes(c, Op::kEmbedding));
  c.token_major = true;
  CHECK(weight_bytes(c, Op::kEmbedding) == 4096 * 64 * 2 + 3 * 128, "rows of A: %g", weight_bytes(c, Op::kEmbedding));
}

void test_rows() {
  Case c = parse_case("k=8,n=8,r=8,m=10,a=4", Op::kLinear);
  CHECK(c.order == RowOrder::kInterleaved && c.adapter_of(7) == 3, "row 7: %d", c.adapter_of(7));
  c = parse_case("k=8,n=8,r=8,m=300,a=3,order=serving", Op::kLinear);
  CHECK(c.adapter_of(0) == 1 && c.adapter_of(1) == 2 && c.adapter_of(2) == 0 && c.adapter_of(299) == 0, "serving");
  CHECK(c.name().find(" serving") != std::string::npos, "%s", c.name().c_str());
  for (const char* text : {"k=8,n=8,r=8,m=2048", "k=8,n=8,r=8,m=1000,a=7", "k=8,n=8,r=8,m=7,a=7,order=segments"}) {
    c = parse_case(text, Op::kLinear);
    std::vector<int64_t> rows(static_cast<size_t>(c.adapters));
    int32_t last = 0;
    for (int64_t row = 0; row < c.rows; ++row) {
      const int32_t adapter = c.adapter_of(row);
      CHECK(adapter >= last && adapter < c.adapters, "%s row %lld: %d", text, static_cast<long long>(row), adapter);
      last = adapter;
      ++rows[static_cast<size_t>(adapter)];
    }
    for (const int64_t count : rows) {
      CHECK(std::llabs(count - c.rows / c.adapters) <= 1, "%s: %lld rows", text, static_cast<long long>(count));
    }
  }
  c.idle = true;
  CHECK(c.adapter_of(3) == kNoAdapter, "%d", c.adapter_of(3));
}

void test_cases() {
  const Case c = parse_case("k=4096,n=4096+1024+1024,r=16,m=16,a=16", Op::kLinear);
  CHECK(c.name() == "4096->4096+1024+1024 r16 M16 a16", "%s", c.name().c_str());
  CHECK(c.width() == 6144 && c.v_width() == 48 && c.max_rank() == 16, "%lld", static_cast<long long>(c.width()));
  CHECK(parse_case("k=8,n=8,r=8-64,m=1,name=mine", Op::kLinear).name() == "mine r8-64 M1 a1", "name and ranks");
  CHECK((parse_ranks("8-64") == std::vector<int32_t>{8, 16, 32, 64}), "doubling");
  CHECK((parse_ranks("3-16") == std::vector<int32_t>{3, 6, 12, 16}), "the end is always there");
  CHECK(parse_case("m=300,slots=40", Op::kPlan).name() == "plan M300 a4 slots40", "plan");
  const Case embedding = parse_case("vocab=100,n=8,r=8,m=9,layout=token", Op::kEmbedding);
  CHECK(embedding.token_major && embedding.name() == "vocab:100->8.token_major r8 M9 a9", "%s",
        embedding.name().c_str());

  for (const char* text : {"",
                           "k=8",
                           "k=8,n=8,r=8",
                           "k=8,n=8,m=1",
                           "n=8,r=8,m=1",
                           "k=8,r=8,m=1",
                           "k=8,n=8,r=0,m=1",
                           "k=8,n=8,r=257,m=1",
                           "k=8,n=8,r=8-4,m=1",
                           "k=8,n=8,r=8-16-32,m=1",
                           "k=8,n=8+,r=8,m=1",
                           "k=8,n=1+1+1+1+1+1+1+1+1,r=8,m=1",
                           "k=8x,n=8,r=8,m=1",
                           "k=8,n=8,r=8,m=0",
                           "k=8,n=8,r=8,m=1,q=1",
                           "k=8,n=8,r=8,m=1,a",
                           "k=8,n=8,r=8,m=4,a=4,slots=3",
                           "k=8,n=8,r=8,m=4,pitch=12",
                           "k=8,n=8,r=8-64,m=4,pitch=32",
                           "k=8,n=8,r=8,m=1,vocab=9",
                           "k=8,n=8,r=8,m=1,order=up",
                           "k=99999999999999999999,n=8,r=8,m=1"}) {
    bool refused = false;
    try {
      parse_case(text, Op::kLinear);
    } catch (const UsageError&) {
      refused = true;
    }
    CHECK(refused, "'%s' was taken", text);
  }
}

void test_presets() {
  for (const Op op : {Op::kLinear, Op::kShrink, Op::kExpand, Op::kEmbedding, Op::kPlan}) {
    for (const char* preset : {"quick", "issue", "full", "check"}) {
      std::set<std::string> names;
      for (const Case& c : preset_cases(preset, op)) {
        CHECK(names.insert(c.name()).second, "%s %s: %s twice", op_name(op), preset, c.name().c_str());
        CHECK(c.adapters <= c.rows && c.adapters <= c.slots, "%s", c.name().c_str());
        CHECK(c.widths.size() <= static_cast<size_t>(kMaxSlices), "%s", c.name().c_str());
        CHECK(floor_us(h100_limits(), traffic_of(c, op)) >= 0.95, "%s", c.name().c_str());
      }
    }
  }
}

void test_options() {
  const Options options = parse_options(
      {"--op=expand", "--preset", "issue", "--filter", "qkv ", "--filter=down", "--path", "auto", "--path", "general",
       "--json", "--reps", "31", "--min-ms=2.5", "--dtype", "fp16", "--no-calibrate"},
      false);
  CHECK(options.op == Op::kExpand && options.json && options.fp16 && !options.calibrate, "flags");
  CHECK(options.reps == 31 && options.min_ms == 2.5 && options.paths.size() == 2, "values");
  CHECK(select_cases(options).size() == 24, "%zu cases", select_cases(options).size());
  CHECK(select_cases(parse_options({"--case", "k=8,n=8,r=8,m=1"}, false)).size() == 1, "explicit cases stand alone");
  CHECK(select_cases(parse_options({"--chain"}, false)).size() == 18, "the chain's own preset");
  CHECK(select_cases(parse_options({"--idle"}, false))[0].idle, "idle");
  for (const bool embedding : {false, true}) {
    const Options check = parse_options({"--check"}, embedding);
    CHECK(check.check && !check.calibrate && l2_that_counts(check, 1 << 20) == 1,
          "what times nothing needs nothing cold");
    const std::vector<Case> small = select_cases(check);
    CHECK(small.size() == (embedding ? 16 : 17), "%zu cases", small.size());
    for (const Case& c : small) CHECK(traffic_of(c, check.op).weights < 4e6, "%s is not small", c.name().c_str());
    CHECK(select_cases(parse_options({"--check", "--preset", "quick"}, embedding))[0].k != small[0].k || embedding,
          "preset");
  }
  CHECK(l2_that_counts(options, 1 << 20) == 1 << 20, "what is timed is cold");
  CHECK(!select_cases(parse_options({}, true)).empty(), "embedding");
  CHECK(parse_options({"-h"}, false).help && usage("bench_linear", false).find("--chain") != std::string::npos, "help");

  using Arguments = std::vector<std::string>;
  for (const Arguments& arguments : {Arguments{"--op", "embedding"},
                                     {"--op"},
                                     {"--preset", "all"},
                                     {"--reps", "0"},
                                     {"--reps", "many"},
                                     {"--min-ms", "-1"},
                                     {"--json=1"},
                                     {"--what"},
                                     {"word"},
                                     {"--filter", "nothing has this name"},
                                     {"--path="},
                                     {"--path", "fast"},
                                     {"--baseline", "torch"},
                                     {"--baseline", "cutlass", "--dtype", "fp16"},
                                     {"--baseline", "beside"},
                                     {"--baseline", "beside", "--chain", "--op", "expand"},
                                     {"--op", "plan", "--idle"},
                                     {"--op", "shrink", "--chain"},
                                     {"--op", "shrink", "--baseline", "naive"},
                                     {"--case", "k=1"}}) {
    bool refused = false;
    try {
      select_cases(parse_options(arguments, false));
    } catch (const UsageError&) {
      refused = true;
    }
    CHECK(refused, "'%s' was taken", arguments[0].c_str());
  }
}

void test_statistics() {
  CHECK(median({3, 1, 2}) == 2 && median({4, 1, 2, 3}) == 2.5 && median({}) == 0, "median");
  CHECK(std::fabs(geometric_mean({1, 4, 16}) - 4) < 1e-12 && geometric_mean({}) == 0, "geometric mean");
  CHECK(quantile({4, 1, 3, 2, 5}, 0.25) == 2 && quantile({1, 2}, 0.75) == 1.75 && quantile({}, 0.5) == 0, "quantile");
  CHECK(quantile({7}, 0.25) == 7 && quantile({3, 1, 2}, 1) == 3, "quantile at an end");
  CHECK(format("%s %d", "text", 7) == "text 7", "format");
}

}  // namespace
}  // namespace polylora::bench

int main() {
  using namespace polylora::bench;
  test_interpolation();
  test_documented_floors();
  test_floors_of_vocabularies();
  test_lm_heads_stay_out_of_the_means_of_layers();
  test_every_case_is_cold_on_an_h100();
  test_rotation_never_outgrows_the_memory();
  test_floor_of_other_ops();
  test_rows();
  test_cases();
  test_presets();
  test_options();
  test_statistics();
  return polylora::testing::report();
}
