// The CUDA kernels of the plan, run thread by thread on the CPU (emulator/emulator.h), against the plan of the CPU.
//
// Every array ends at a page that faults. Until a kernel has waited for the one before it, ids and maps hold noise, and
// the plan must not have changed: the grid before may read it. Between the three launches, a kernel sees nothing of
// what the last one wrote before it has waited for it.
#include <cstdio>
#include <functional>
#include <memory>
#include <string>

#include "check.h"
#include "common/launch.cuh"
#include "polylora/cpu.h"
#include "polylora/cuda.h"

namespace polylora::testing {
namespace {

using emulator::GuardedBytes;

constexpr unsigned char kJunk = 0xa5;

/// Values in guarded memory, which hold noise until `restore`.
template <typename T>
class Input {
 public:
  explicit Input(std::vector<T> truth)
      : truth_(std::move(truth)), bytes_(static_cast<int64_t>(truth_.size() * sizeof(T))) {}

  void spoil(Random& random) {
    for (int64_t i = 0; i < bytes_.size(); ++i) bytes_.data()[i] = static_cast<unsigned char>(random.bits());
  }
  void restore() {
    if (!truth_.empty()) std::memcpy(bytes_.data(), truth_.data(), truth_.size() * sizeof(T));
  }
  bool is_unchanged() const {
    return truth_.empty() || std::memcmp(bytes_.data(), truth_.data(), truth_.size() * sizeof(T)) == 0;
  }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.data()); }

 private:
  std::vector<T> truth_;
  GuardedBytes bytes_;
};

/// Ids of either type.
struct Ids {
  Ids(const std::vector<int64_t>& ids, bool is_int64)
      : is_int64(is_int64),
        wide(is_int64 ? ids : std::vector<int64_t>()),
        narrow(is_int64 ? std::vector<int32_t>() : std::vector<int32_t>(ids.begin(), ids.end())) {}

  const void* data() const {
    return is_int64 ? static_cast<const void*>(wide.data()) : static_cast<const void*>(narrow.data());
  }
  void spoil(Random& random) { wide.spoil(random), narrow.spoil(random); }
  void restore() { wide.restore(), narrow.restore(); }
  bool is_unchanged() const { return wide.is_unchanged() && narrow.is_unchanged(); }

  bool is_int64;
  Input<int64_t> wide;
  Input<int32_t> narrow;
};

/// Bytes of one section of two plans that both define.
void check_same(const std::string& what, const char* section, const int32_t* got, const int32_t* want, int64_t words) {
  for (int64_t i = 0; i < words; ++i) {
    CHECK(got[i] == want[i], "%s: %s, word %lld: %d, want %d", what.c_str(), section, static_cast<long long>(i), got[i],
          want[i]);
    if (got[i] != want[i]) return;
  }
}

/// Every section of the plan at `got` as in `want`, as far as plans define it; nothing behind the sections is written.
void check_plan(const std::string& what, const int32_t* got, const int32_t* want, int64_t rows, int64_t groups,
                int64_t pairs) {
  const PlanLayout at = plan_layout(rows, groups, pairs);
  const int64_t active = want[kPlanActiveRows], runs = want[kPlanRuns];
  check_same(what, "header", got, want, kPlanHeaderWords);
  check_same(what, "row_group", got + at.row_group, want + at.row_group, rows);
  check_same(what, "order", got + at.order, want + at.order, active);
  check_same(what, "run_group", got + at.run_group, want + at.run_group, runs);
  check_same(what, "run_start", got + at.run_start, want + at.run_start, runs + 1);
  check_same(what, "tile", got + at.tile, want + at.tile, want[kPlanTiles] * kTileWords);
  check_same(what, "wide_tile", got + at.wide_tile, want + at.wide_tile, want[kPlanWideTiles] * kTileWords);
  check_same(what, "pair_pos", got + at.pair_pos, want + at.pair_pos, pairs);
  int32_t junk;
  std::memset(&junk, kJunk, 4);
  const auto untouched = [&](const char* section, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      CHECK(got[i] == junk, "%s: written behind %s, word %lld of %lld", what.c_str(), section,
            static_cast<long long>(i - first), static_cast<long long>(end - first));
      if (got[i] != junk) return;
    }
  };
  untouched("row_group", at.row_group + rows, at.order);
  untouched("order", at.order + active, at.run_group);
  untouched("run_group", at.run_group + runs, at.run_start);
  untouched("run_start", at.run_start + runs + 1, at.tile);
  untouched("tile", at.tile + want[kPlanTiles] * kTileWords, at.pair_pos);
  untouched("pair_pos", at.pair_pos + pairs, at.wide_tile);
  untouched("wide_tile", at.wide_tile + want[kPlanWideTiles] * kTileWords, at.workspace);
}

/// Runs `launch` into guarded memory. The launches that it must make: one up to kPlanOneLaunchRows rows, else three.
void run(const std::string& what, uint64_t seed, int64_t rows, int64_t groups, int64_t pairs,
         const std::function<void(Random&)>& spoil, const std::function<void()>& restore,
         const std::function<cudaError_t(int32_t*)>& launch, const std::vector<int32_t>& want) {
  Random random(seed);
  GuardedBytes bytes(plan_layout(rows, groups, pairs).words * 4, kJunk);
  int32_t* plan = reinterpret_cast<int32_t*>(bytes.data());
  std::vector<unsigned char> truth;  // of the plan, while a kernel has not waited for the one before
  int begun = 0, waited = 0;
  spoil(random);
  cuda::launches.clear();
  emulator::options().seed = seed;
  emulator::options().grid_begins = [&] {
    truth.assign(bytes.data(), bytes.data() + bytes.size());
    if (begun++ > 0) std::memset(bytes.data(), 0x7b, static_cast<size_t>(bytes.size()));
  };
  emulator::options().previous_grid = [&] {
    if (waited++ == 0) {
      restore();
      CHECK(std::equal(truth.begin(), truth.end(), bytes.data()), "%s: wrote before it waited", what.c_str());
    }
    std::copy(truth.begin(), truth.end(), bytes.data());
  };
  CHECK(launch(plan) == cudaSuccess, "%s", what.c_str());
  emulator::options().grid_begins = nullptr;
  emulator::options().previous_grid = nullptr;
  const size_t launches = rows <= kPlanOneLaunchRows ? 1 : 3;
  CHECK(cuda::launches.size() == launches && waited == begun, "%s: %zu launches", what.c_str(), cuda::launches.size());
  for (const cuda::LaunchShape& shape : cuda::launches) CHECK(shape.overlap, "%s: waits to be launched", what.c_str());
  check_plan(what, plan, want.data(), rows, groups, pairs);
}

std::vector<int32_t> empty_plan(int64_t rows, int64_t groups, int64_t pairs) {
  return std::vector<int32_t>(static_cast<size_t>(plan_layout(rows, groups, pairs).words));
}

int64_t garbage(Random& random, int64_t limit, bool is_int64) {
  switch (random.between(0, 4)) {
    case 0:
      return limit;
    case 1:
      return random.between(-9, -2);
    case 2:
      return is_int64 ? int64_t{1} << 32 : INT32_MIN;  // its lower half is a group
    case 3:
      return is_int64 ? INT64_MIN : INT32_MAX;
    default:
      return -1;
  }
}

int64_t make_id(Random& random, const std::string& pattern, int64_t row, int64_t rows, int64_t groups, bool is_int64) {
  if (pattern == "none" || groups == 0) return -1;
  if (pattern == "first") return 0;
  if (pattern == "last") return groups - 1;
  if (pattern == "sorted") return row * groups / rows;
  if (pattern == "reversed") return (rows - 1 - row) * groups / rows;
  if (pattern == "each") return row % groups;
  if (pattern == "short and long") {  // runs of 15 to 18, of 127 to 130 and of many rows
    int64_t group = 0;
    for (int64_t left = row; group < groups - 1; ++group) {
      const int64_t length = group % 3 == 0 ? 15 + group / 3 % 4 : group % 3 == 1 ? 127 + group / 3 % 4 : 300;
      if (left < length) break;
      left -= length;
    }
    return group;
  }
  if (pattern == "skewed") {
    return random.chance(0.9) ? groups / 2 : random.between(-1, groups - 1);
  }
  if (pattern == "invalid" && random.chance(0.3)) return garbage(random, groups, is_int64);
  return random.between(-1, groups - 1);
}

void dense(const std::string& pattern, int64_t rows, int64_t groups, bool is_int64, uint64_t seed) {
  Random random(seed);
  std::vector<int64_t> values;
  for (int64_t r = 0; r < rows; ++r) values.push_back(make_id(random, pattern, r, rows, groups, is_int64));
  Ids ids(values, is_int64);
  std::vector<int32_t> want = empty_plan(rows, groups, 0);
  ids.restore();
  cpu::plan({want.data(), ids.data(), is_int64, rows, groups}, serial);
  const std::string what = pattern + (is_int64 ? ", int64, " : ", int32, ") + std::to_string(rows) + " rows, " +
                           std::to_string(groups) + " groups";
  run(
      what, seed, rows, groups, 0, [&](Random& noise) { ids.spoil(noise); }, [&] { ids.restore(); },
      [&](int32_t* plan) { return cuda::plan({plan, ids.data(), is_int64, rows, groups}, nullptr); }, want);
  CHECK(ids.is_unchanged(), "%s: ids changed", what.c_str());
}

struct MoeShape {
  int64_t tokens;
  int32_t top_k, slots, experts;
  bool is_int64 = false, expert_map = false, row_map = false, invalid = false;
};

void moe(const MoeShape& shape, uint64_t seed) {
  Random random(seed);
  const int64_t pairs = shape.tokens * shape.top_k;
  const int64_t groups = int64_t{shape.slots} * shape.experts;
  const int32_t global_experts = shape.expert_map ? 2 * shape.experts + 3 : shape.experts;
  const auto id_below = [&](int64_t limit, bool is_int64) {
    return shape.invalid && random.chance(0.2) ? garbage(random, limit, is_int64)
           : random.chance(0.05)               ? int64_t{-1}
                                               : random.between(0, limit - 1);
  };
  std::vector<int64_t> topk;
  std::vector<int32_t> slot_of, expert_of, pair_of;
  for (int64_t i = 0; i < pairs; ++i) {
    // every third token asks for one expert twice
    const bool again = i % shape.top_k > 0 && i / shape.top_k % 3 == 0;
    topk.push_back(again ? topk.back() : id_below(global_experts, shape.is_int64));
  }
  for (int64_t t = 0; t < shape.tokens; ++t) slot_of.push_back(static_cast<int32_t>(id_below(shape.slots, false)));
  for (int32_t e = 0; e < global_experts; ++e) {
    expert_of.push_back(e % 2 == 0 ? -1 : static_cast<int32_t>(id_below(shape.experts, false)));
  }
  const int64_t rows = shape.row_map ? pairs + pairs / 4 + 5 : pairs;
  for (int64_t p = 0; p < rows; ++p) {  // pairs twice, some never, padding
    pair_of.push_back(pairs == 0 || random.chance(0.2) ? -1 : static_cast<int32_t>(id_below(pairs, false)));
  }
  Ids ids(topk, shape.is_int64);
  Input<int32_t> slots(slot_of), experts(expert_of), map(pair_of);
  MoePlanParams params{};
  params.topk_ids = ids.data();
  params.ids_are_int64 = shape.is_int64;
  params.token_slots = slots.data();
  params.expert_map = shape.expert_map ? experts.data() : nullptr;
  params.row_map = shape.row_map ? map.data() : nullptr;
  params.rows = rows;
  params.pairs = pairs;
  params.top_k = shape.top_k;
  params.slots = shape.slots;
  params.experts = shape.experts;
  params.global_experts = global_experts;
  const auto restore = [&] { ids.restore(), slots.restore(), experts.restore(), map.restore(); };
  const int64_t mapped = shape.row_map ? pairs : 0;
  std::vector<int32_t> want = empty_plan(rows, groups, mapped);
  restore();
  params.plan = want.data();
  cpu::moe_plan(params, serial);
  const std::string what = "moe of " + std::to_string(shape.tokens) + " tokens, " + std::to_string(shape.slots) +
                           " * " + std::to_string(shape.experts) + " groups" + (shape.is_int64 ? ", int64" : "") +
                           (shape.expert_map ? ", expert map" : "") + (shape.row_map ? ", row map" : "") +
                           (shape.invalid ? ", invalid ids" : "");
  run(
      what, seed, rows, groups, mapped,
      [&](Random& noise) { ids.spoil(noise), slots.spoil(noise), experts.spoil(noise), map.spoil(noise); }, restore,
      [&](int32_t* plan) {
        params.plan = plan;
        return cuda::moe_plan(params, nullptr);
      },
      want);
  CHECK(ids.is_unchanged() && slots.is_unchanged() && experts.is_unchanged() && map.is_unchanged(),
        "%s: inputs changed", what.c_str());
}

void few_rows() {
  uint64_t seed = 1;
  for (int64_t rows : {0, 1, 2, 16, 17, 31, 32, 33, 64, 200, 255, 256, 257, 500, 511, 512}) {
    for (int64_t groups : {0, 1, 3, 64, 2048, 4096}) {
      for (const char* pattern : {"random", "invalid", "sorted", "reversed", "last", "none"}) {
        dense(pattern, rows, groups, seed % 2 == 0, seed);
        ++seed;
      }
    }
  }
  for (const char* pattern : {"short and long", "skewed", "each"}) dense(pattern, 512, 40, false, ++seed);
  dense("random", 200, (1 << 24) - 1, false,
        ++seed);  // the last group count whose keys have 32 bits, and the first of 64
  dense("last", 40, (1 << 24) - 1, false, ++seed);
  dense("random", 200, 1 << 24, false, ++seed);
  dense("last", 40, 1 << 24, true, ++seed);
}

/// What the counting sort must get right, however many blocks it has.
void many_rows() {
  uint64_t seed = 1000;
  for (int64_t rows : {513, 1000, 2048, 5000}) {
    for (int64_t groups : {1, 3, 64, 2048, 4096}) {
      dense("random", rows, groups, seed % 2 == 0, seed);
      ++seed;
    }
  }
  for (const char* pattern : {"invalid", "none", "first", "last", "sorted", "reversed", "skewed", "each"}) {
    dense(pattern, 1500, 700, seed % 2 == 0, seed);
    ++seed;
  }
  dense("short and long", 5000, 60, true, ++seed);
  dense("last", 5000, 3, false, ++seed);  // more tiles of one run than a warp writes alone
  dense("random", 600, 0, false, ++seed);
  dense("random", 600, 20000, true, ++seed);
  dense("first", 513, 3001, false, ++seed);
}

void cluster_of(int major, int sms, int smem_bytes, const std::string& name) {
  cuda::emulated_device = {0, major, sms, smem_bytes};
  std::printf("%s\n", name.c_str());
  many_rows();
  const int blocks = cuda::launches.back().cluster;
  CHECK((blocks > 1) == (major >= 9), "%s: cluster of %d blocks", name.c_str(), blocks);
}

/// Cluster sizes follow from rows, groups and the device.
void cluster_sizes() {
  const auto blocks = [](int64_t rows, int64_t groups) {
    dense("random", rows, groups, false, 77);
    return cuda::launches.back().cluster;
  };
  CHECK(blocks(1024, 512) == 1, "one block");
  CHECK(blocks(1025, 64) == 8 && blocks(600, 513) == 8, "eight blocks");
  CHECK(blocks(4097, 64) == 16 && blocks(600, 9000) == 16, "sixteen blocks");
  cuda::emulated_device.sms = 12;
  CHECK(blocks(4097, 64) == 8, "eight blocks where there are no clusters of sixteen");
  cuda::emulated_device.sms = 132;
  CHECK(blocks(16384, 2048) == 16, "sixteen blocks");
}

void three_launches() {
  uint64_t seed = 3000;
  for (const char* pattern : {"random", "invalid", "first", "none", "sorted", "skewed"}) {
    dense(pattern, 17000, 2048, seed % 2 == 0, seed);
    ++seed;
  }
  dense("random", 16385, 3, false, ++seed);
  dense("reversed", 17000, 64, true, ++seed);
  dense("short and long", 17000, 130, false, ++seed);
  dense("random", 17000, 40000, false, ++seed);
  dense("last", 70001, 1, false, ++seed);
  for (int variant = 0; variant < 4; ++variant) {
    moe({2130, 8, 8, 256, variant % 2 == 0, variant / 2 == 0, variant % 2 == 0, true}, ++seed);
  }
}

/// Counters that have no room in shared memory.
void counters_in_memory() {
  for (int64_t rows : {300, 2000, 17000}) {
    cuda::emulated_device.smem_bytes = 20 * 1024;
    for (const char* pattern : {"random", "invalid", "skewed"}) dense(pattern, rows, 5000, false, 5000 + rows);
    moe({rows / 4, 4, 30, 200, true, true, true, true}, 5000 + rows);
    for (const cuda::LaunchShape& shape : cuda::launches) CHECK(shape.smem_bytes <= 20 * 1024, "shared memory");
    cuda::emulated_device.smem_bytes = 227 * 1024;
  }
}

void experts() {
  uint64_t seed = 4000;
  for (int64_t tokens : {0, 1, 8, 30, 150, 500}) {
    for (int variant = 0; variant < 16; ++variant) {
      moe({tokens, variant % 3 == 0 ? 1 : 8, 4, 16, variant % 2 == 1, variant / 2 % 2 == 1, variant / 4 % 2 == 1,
           variant / 8 == 1},
          ++seed);
    }
  }
  moe({8, 8, 8, 512, true, false, false, true}, ++seed);
  moe({256, 8, 8, 256, false, true, true, true}, ++seed);
}

}  // namespace
}  // namespace polylora::testing

int main() {
  using namespace polylora;
  testing::few_rows();
  testing::cluster_of(9, 132, 227 * 1024, "clusters");
  testing::cluster_of(8, 108, 163 * 1024, "one block");
  testing::cluster_of(8, 84, 99 * 1024, "one block of less shared memory");
  cuda::emulated_device = {0, 9, 132, 227 * 1024};
  testing::cluster_sizes();
  testing::experts();
  testing::three_launches();
  testing::counters_in_memory();
  return testing::report();
}
