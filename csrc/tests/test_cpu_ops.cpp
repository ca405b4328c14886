// The CPU ops against their definitions in double precision: random shapes, layouts and plans, NaN in all memory that
// must not be read, every instruction set of the machine. And bit for bit: over ways to split the work, over batches.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "check.h"
#include "polylora/activation.h"
#include "polylora/cpu.h"
#include "reference.h"

namespace polylora {
namespace {

using testing::Buffer;
using testing::close;
using testing::Estimate;
using testing::Random;
using testing::round_to;
using testing::sum_slack;

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};
constexpr uint32_t kVPoison = 0x7fc0dead;  // a NaN v that nobody wrote

/// Where values come from: small integers make every sum exact, so that results must match bit for bit.
struct Values {
  bool exact;

  double draw(Random& random) const {
    return exact ? static_cast<double>(random.between(-2, 2)) : random.uniform() * 2.0 - 1.0;
  }
  double draw_scale(Random& random) const {
    return exact ? std::ldexp(1.0, static_cast<int>(random.between(-2, 2))) : random.uniform() * 3.0 - 1.0;
  }
};

struct Shape {
  DType dtype = DType::kBFloat16;
  int32_t groups = 1;
  int32_t slices = 1;
  int64_t k = 1;
  int32_t max_rank = 8;
  int32_t max_width = 40;
  int32_t col_stride = 1;
  bool equal_widths = false;
  bool embedding = false;  // A is [tokens, ranks] or [ranks, tokens]; k = vocabulary
  bool token_major = false;
};

/// Weights of one fused module, in arenas or one tensor a slice; some entries share A, some are absent.
class Module {
 public:
  Module(const Shape& shape, const Values& values, Random& random) : shape_(shape) {
    place_outputs(random);
    const bool stacked = random.chance(0.5);
    const int arenas = stacked ? 1 : shape.slices;
    std::vector<int64_t> a_rows(static_cast<size_t>(arenas), random.between(0, 3));
    std::vector<int64_t> b_size(static_cast<size_t>(arenas), random.between(0, 9));
    std::vector<int32_t> token_ranks(static_cast<size_t>(arenas), 0);
    a_stride_ = shape.k + random.between(0, 5);
    if (shape.token_major) a_stride_ = shape.max_rank + random.between(0, 3);
    for (int32_t g = 0; g < shape.groups; ++g) {
      int32_t v_at = static_cast<int32_t>(random.between(0, 2));
      int32_t sharer = -1;  // slice whose A the next may share
      for (int32_t s = 0; s < shape.slices; ++s) {
        const size_t arena = stacked ? 0 : static_cast<size_t>(s);
        SliceEntry entry{};
        entry.rank = static_cast<int32_t>(random.between(0, shape.max_rank));
        if (random.chance(0.2)) entry.rank = random.chance(0.3) ? -3 : 0;
        entry.epilogue = 0;
        if (entry.rank > 0) {
          entry.scale = static_cast<float>(values.draw_scale(random));
          if (stacked && sharer >= 0 && random.chance(0.4)) {
            const SliceEntry& first = table_[static_cast<size_t>(g * shape.slices + sharer)];
            entry.rank = first.rank;
            entry.a_row = first.a_row;
            entry.v_col = first.v_col;
          } else {
            entry.a_row = static_cast<int32_t>(a_rows[arena]);
            a_rows[arena] += (shape.token_major ? shape.k : entry.rank) + random.between(0, 2);
            entry.v_col = v_at;
            v_at += entry.rank + static_cast<int32_t>(random.between(0, 2));
            sharer = s;
          }
          entry.b_stride = entry.rank + static_cast<int32_t>(random.between(0, 3));
          entry.b_offset = b_size[arena];
          b_size[arena] += int64_t{entry.b_stride} * widths[static_cast<size_t>(s)] + random.between(0, 5);
        } else {  // an absent entry may hold anything
          entry.a_row = entry.v_col = entry.b_stride = 1 << 30;
          entry.b_offset = int64_t{1} << 60;
          entry.scale = std::nanf("");
        }
        table_.push_back(entry);
      }
      v_width = std::max(v_width, v_at);
    }
    for (int arena = 0; arena < arenas; ++arena) {
      a_.emplace_back(shape.dtype, a_rows[static_cast<size_t>(arena)] * a_stride_);
      b_.emplace_back(shape.dtype, b_size[static_cast<size_t>(arena)]);
    }
    fill(values, random);
  }

  SliceSet slices() const {
    SliceSet set{};
    set.table = table_.data();
    set.groups = shape_.groups;
    set.count = shape_.slices;
    for (int32_t s = 0; s < shape_.slices; ++s) {
      set.a[s] = a_[a_.size() == 1 ? 0 : static_cast<size_t>(s)].data();
      set.a_stride[s] = a_stride_;
      set.b[s] = b_[b_.size() == 1 ? 0 : static_cast<size_t>(s)].data();
      set.width[s] = widths[static_cast<size_t>(s)];
      set.col[s] = cols[static_cast<size_t>(s)];
    }
    set.col_stride = shape_.col_stride;
    return set;
  }

  const SliceEntry& entry(int32_t g, int32_t s) const { return table_[static_cast<size_t>(g * shape_.slices + s)]; }

  double a(int32_t g, int32_t s, int32_t j, int64_t k) const {
    const Buffer& arena = a_[a_.size() == 1 ? 0 : static_cast<size_t>(s)];
    const int64_t row = entry(g, s).a_row;
    return shape_.token_major ? arena.get((row + k) * a_stride_ + j) : arena.get((row + j) * a_stride_ + k);
  }

  double b(int32_t g, int32_t s, int32_t n, int32_t j) const {
    const SliceEntry& e = entry(g, s);
    return b_[b_.size() == 1 ? 0 : static_cast<size_t>(s)].get(e.b_offset + int64_t{n} * e.b_stride + j);
  }

  /// scale * weight * v B^T for output n, v given in double.
  Estimate delta(int32_t g, int32_t s, int32_t n, const std::vector<Estimate>& v, double weight) const {
    const SliceEntry& e = entry(g, s);
    double sum = 0.0, sizes = 0.0, slack = 0.0;
    for (int32_t j = 0; j < e.rank; ++j) {
      const double factor = double{e.scale} * weight * b(g, s, n, j);
      sum += factor * v[static_cast<size_t>(j)].value;
      sizes += std::fabs(factor * v[static_cast<size_t>(j)].value);
      slack += std::fabs(factor) * v[static_cast<size_t>(j)].slack;
    }
    return {sum, slack + sum_slack(sizes, e.rank)};
  }

  int64_t token_stride() const { return shape_.token_major ? a_stride_ : 1; }
  int64_t rank_stride() const { return shape_.token_major ? 1 : a_stride_; }
  const Shape& shape() const { return shape_; }

  std::vector<int32_t> widths;
  std::vector<int64_t> cols;
  int64_t y_width = 0;
  int32_t v_width = 0;

 private:
  void place_outputs(Random& random) {
    int64_t at = random.between(0, 5);
    for (int32_t s = 0; s < shape_.slices; ++s) {
      const bool same = s > 0 && shape_.equal_widths;
      widths.push_back(same ? widths[0] : static_cast<int32_t>(random.between(1, shape_.max_width)));
      if (shape_.col_stride == 2 && shape_.slices == 2) {  // side by side, interleaved
        cols.push_back(at + s);
        y_width = std::max<int64_t>(y_width, at + s + 2 * widths.back());
      } else {
        cols.push_back(at);
        at += int64_t{widths.back()} * shape_.col_stride + random.between(0, 4);
        y_width = at;
      }
    }
  }

  void fill(const Values& values, Random& random) {
    for (int32_t g = 0; g < shape_.groups; ++g) {
      for (int32_t s = 0; s < shape_.slices; ++s) {
        const SliceEntry& e = entry(g, s);
        const size_t arena = a_.size() == 1 ? 0 : static_cast<size_t>(s);
        for (int32_t j = 0; j < e.rank; ++j) {
          for (int64_t k = 0; k < shape_.k; ++k) {
            const int64_t at = shape_.token_major ? (e.a_row + k) * a_stride_ + j : (e.a_row + j) * a_stride_ + k;
            a_[arena].set(at, values.draw(random));
          }
          for (int32_t n = 0; n < widths[static_cast<size_t>(s)]; ++n) {
            b_[arena].set(e.b_offset + int64_t{n} * e.b_stride + j, values.draw(random));
          }
        }
      }
    }
  }

  Shape shape_;
  int64_t a_stride_ = 0;
  std::vector<SliceEntry> table_;
  std::vector<Buffer> a_, b_;
};

/// A plan over explicit row groups, with what MoE adds.
struct Batch {
  int64_t rows = 0;
  int64_t tokens = 0;
  int32_t top_k = 1;
  std::vector<int32_t> row_group;  // what the rows belong to, by the definition
  std::vector<int32_t> row_map;    // empty: none
  std::vector<float> weights;      // [pairs]
  std::vector<int32_t> plan;
  PlanView view{};

  int64_t pair(int64_t row) const { return row_map.empty() ? row : row_map[static_cast<size_t>(row)]; }
};

Batch dense_batch(int64_t rows, int32_t groups, Random& random) {
  Batch batch;
  batch.rows = rows;
  std::vector<int64_t> ids;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t id = random.between(-1, groups - 1);
    if (random.chance(0.05)) id = static_cast<int64_t>(random.bits());
    ids.push_back(id);
    batch.row_group.push_back(id >= 0 && id < groups ? static_cast<int32_t>(id) : kNoAdapter);
  }
  batch.plan.resize(static_cast<size_t>(plan_layout(rows, groups, 0).words));
  cpu::plan({batch.plan.data(), ids.data(), true, rows, groups}, testing::serial);
  batch.view = plan_view(batch.plan.data(), rows, groups, 0);
  return batch;
}

/// Duplicates in the top-k, tokens without an adapter, experts that live elsewhere; with a row map padded and permuted.
Batch moe_batch(int64_t tokens, int32_t top_k, int32_t slots, int32_t experts, bool mapped, const Values& values,
                Random& random) {
  Batch batch;
  batch.tokens = tokens;
  batch.top_k = top_k;
  const int64_t pairs = tokens * top_k;
  std::vector<int32_t> ids, token_slots;
  for (int64_t t = 0; t < tokens; ++t) token_slots.push_back(static_cast<int32_t>(random.between(-1, slots - 1)));
  for (int64_t p = 0; p < pairs; ++p) {
    ids.push_back(static_cast<int32_t>(random.between(random.chance(0.2) ? -1 : 0, experts - 1)));
    if (random.chance(0.03)) ids.back() = experts + 7;
    batch.weights.push_back(
        static_cast<float>(values.exact ? std::ldexp(1.0, -static_cast<int>(random.between(0, 3))) : random.uniform()));
  }
  batch.rows = pairs;
  if (mapped) {
    std::vector<int32_t> map(static_cast<size_t>(pairs));
    std::iota(map.begin(), map.end(), 0);
    for (size_t i = map.size(); i > 1; --i) std::swap(map[i - 1], map[random.bits() % i]);
    for (int32_t pair : map) {
      while (random.chance(0.2)) batch.row_map.push_back(random.chance(0.9) ? -1 : static_cast<int32_t>(pairs) + 5);
      if (!random.chance(0.05)) batch.row_map.push_back(pair);
    }
    batch.row_map.push_back(-1);
    batch.rows = static_cast<int64_t>(batch.row_map.size());
  }
  for (int64_t row = 0; row < batch.rows; ++row) {
    const int64_t pair = batch.pair(row);
    int32_t group = kNoRow;
    if (pair >= 0 && pair < pairs) {
      const int32_t expert = ids[static_cast<size_t>(pair)];
      const int32_t slot = token_slots[static_cast<size_t>(pair / top_k)];
      if (expert >= 0 && expert < experts) group = slot < 0 ? kNoAdapter : slot * experts + expert;
    }
    batch.row_group.push_back(group);
  }
  MoePlanParams params{};
  const int64_t groups = int64_t{slots} * experts;
  batch.plan.resize(static_cast<size_t>(plan_layout(batch.rows, groups, mapped ? pairs : 0).words));
  params.plan = batch.plan.data();
  params.topk_ids = ids.data();
  params.token_slots = token_slots.data();
  params.row_map = mapped ? batch.row_map.data() : nullptr;
  params.rows = batch.rows;
  params.pairs = pairs;
  params.top_k = top_k;
  params.slots = slots;
  params.experts = params.global_experts = experts;
  cpu::moe_plan(params, testing::serial);
  batch.view = plan_view(batch.plan.data(), batch.rows, groups, mapped ? pairs : 0);
  return batch;
}

/// The buffers of one call. Rows of x that no adapter uses stay NaN; y is filled with random values.
struct Call {
  Call(const Module& module, const Batch& batch, int32_t x_div, const Values& values, Random& random)
      : module(module), batch(batch), values(values) {
    const Shape& shape = module.shape();
    params.dtype = shape.dtype;
    params.rows = batch.rows;
    params.k = shape.k;
    params.x_div = x_div;
    params.x_stride = shape.k + random.between(0, 4);
    params.y_stride = module.y_width + random.between(0, 4);
    params.v_width = module.v_width;
    params.v_stride = module.v_width + random.between(0, 4);
    params.row_map = batch.row_map.empty() ? nullptr : batch.row_map.data();
    params.slices = module.slices();
    params.plan = batch.view;

    const int64_t pairs = batch.tokens * batch.top_k;
    x = Buffer(shape.dtype, (std::max(pairs, batch.rows) + 1) * params.x_stride);
    y = Buffer(shape.dtype, batch.rows * params.y_stride + 1);
    v.assign(static_cast<size_t>(batch.rows * params.v_stride + 1), 0.0f);
    for (float& value : v) std::memcpy(&value, &kVPoison, sizeof(value));
    for (int64_t row = 0; row < batch.rows; ++row) {
      const int32_t group = batch.row_group[static_cast<size_t>(row)];
      if (group >= 0 && !shape.embedding) {
        const int64_t at = x_row(row) * params.x_stride;
        for (int64_t k = 0; k < shape.k; ++k) x.set(at + k, values.draw(random));
      }
      if (group == kNoRow) continue;  // NaN stays
      for (int64_t n = 0; n < params.y_stride; ++n) y.set(row * params.y_stride + n, values.draw(random));
    }
    params.x = x.data();
    params.y = y.data();
    params.v = v.data();
  }

  std::vector<Estimate> want_v(int64_t row, int32_t s) const {
    const int32_t g = batch.row_group[static_cast<size_t>(row)];
    std::vector<Estimate> result;
    for (int32_t j = 0; j < module.entry(g, s).rank; ++j) {
      double sum = 0.0, sizes = 0.0;
      for (int64_t k = 0; k < params.k; ++k) {
        const double term = x.get(x_row(row) * params.x_stride + k) * module.a(g, s, j, k);
        sum += term;
        sizes += std::fabs(term);
      }
      result.push_back({sum, values.exact ? 0.0 : sum_slack(sizes, params.k)});
    }
    return result;
  }

  /// Delta of output n of slice s; value 0 where there is none.
  Estimate want_delta(int64_t row, int32_t s, int32_t n, const std::vector<Estimate>& v_row, double weight) const {
    Estimate delta = module.delta(batch.row_group[static_cast<size_t>(row)], s, n, v_row, weight);
    if (values.exact) delta.slack = 0.0;
    return delta;
  }

  int64_t x_row(int64_t row) const { return params.x_div == 0 ? row : batch.pair(row) / params.x_div; }

  int64_t y_at(int64_t row, int32_t s, int32_t n) const {
    return row * params.y_stride + module.cols[static_cast<size_t>(s)] + int64_t{n} * module.shape().col_stride;
  }

  const Module& module;
  const Batch& batch;
  Values values;
  LoraParams params{};
  Buffer x, y;
  std::vector<float> v;
};

bool has(const Call& call, int64_t row, int32_t s) {
  const int32_t g = call.batch.row_group[static_cast<size_t>(row)];
  return g >= 0 && call.module.entry(g, s).rank > 0;
}

using Ops = std::function<void(const cpu::ParallelFor&)>;

bool same_bits(const Buffer& a, const Buffer& b) { return a == b; }

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// Runs with three ways to split the work over the same start; `output` must come out bitwise the same.
template <class Output>
void run_ways(const Ops& run, Output* output, const char* name, int seed) {
  const Output before = *output;
  run(testing::serial);
  const Output first = *output;
  *output = before;
  run(testing::reversed);
  CHECK(same_bits(first, *output), "%s seed %d: reversed", name, seed);
  *output = before;
  run(testing::threaded);
  CHECK(same_bits(first, *output), "%s seed %d: threads", name, seed);
}

/// v of every active row is x A^T, every other word of v is as it was.
void check_v(const Call& call, int seed) {
  std::vector<char> written(call.v.size(), 0);
  for (int64_t row = 0; row < call.batch.rows; ++row) {
    for (int32_t s = 0; s < call.params.slices.count; ++s) {
      if (!has(call, row, s)) continue;
      const SliceEntry& entry = call.module.entry(call.batch.row_group[static_cast<size_t>(row)], s);
      const std::vector<Estimate> want = call.want_v(row, s);
      for (int32_t j = 0; j < entry.rank; ++j) {
        const size_t at = static_cast<size_t>(row * call.params.v_stride + entry.v_col + j);
        const Estimate& one = want[static_cast<size_t>(j)];
        CHECK(close(call.v[at], one, DType::kFloat32), "seed %d v[%d, %d] = %g, want %g +- %g", seed,
              static_cast<int>(row), entry.v_col + j, static_cast<double>(call.v[at]), one.value, one.slack);
        written[at] = 1;
      }
    }
  }
  for (size_t at = 0; at < call.v.size(); ++at) {
    uint32_t bits;
    std::memcpy(&bits, &call.v[at], sizeof(bits));
    if (written[at] == 0) CHECK(bits == kVPoison, "seed %d: v word %zu was written", seed, at);
  }
}

/// y = before + delta where a slice has one, bit for bit as before elsewhere. `wants_v` gives a row's v; empty: none.
void check_y(const Call& call, const Buffer& before,
             const std::function<std::vector<Estimate>(int64_t row, int32_t s)>& wants_v, int seed) {
  std::vector<char> written(static_cast<size_t>(before.size()), 0);
  for (int64_t row = 0; row < call.batch.rows; ++row) {
    if (call.batch.row_group[static_cast<size_t>(row)] < 0) continue;
    const double weight = call.params.row_weight != nullptr ? call.params.row_weight[call.batch.pair(row)] : 1.0;
    for (int32_t s = 0; s < call.params.slices.count; ++s) {
      if (!has(call, row, s)) continue;
      const std::vector<Estimate> v_row = wants_v(row, s);
      if (v_row.empty()) continue;
      for (int32_t n = 0; n < call.params.slices.width[s]; ++n) {
        const int64_t at = call.y_at(row, s, n);
        Estimate want = call.want_delta(row, s, n, v_row, weight);
        want.value += before.get(at);
        if (!call.values.exact) want.slack += std::fabs(want.value) * 0x1p-23;
        CHECK(close(call.y.get(at), want, call.params.dtype), "seed %d y[%d] slice %d output %d: %g, want %g +- %g",
              seed, static_cast<int>(row), s, n, call.y.get(at), want.value, want.slack);
        written[static_cast<size_t>(at)] = 1;
      }
    }
  }
  for (int64_t at = 0; at < before.size(); ++at) {
    if (written[static_cast<size_t>(at)] == 0) {
      CHECK(call.y.bits(at) == before.bits(at), "seed %d: y element %d was written", seed, static_cast<int>(at));
    }
  }
}

/// Every active row once more, alone in its batch: the same bits of v and y.
void check_alone(const Call& call, const Buffer& y_before, int seed) {
  for (int64_t row = 0; row < call.batch.rows; row += 3) {
    const int32_t group = call.batch.row_group[static_cast<size_t>(row)];
    if (group < 0 || call.params.row_map != nullptr) continue;
    std::vector<int32_t> plan(static_cast<size_t>(plan_layout(1, call.params.slices.groups, 0).words));
    cpu::plan({plan.data(), &group, false, 1, call.params.slices.groups}, testing::serial);
    LoraParams params = call.params;
    params.rows = 1;
    params.plan = plan_view(plan.data(), 1, params.slices.groups, 0);
    const int64_t size = testing::size_of(params.dtype);
    params.x = static_cast<const char*>(params.x) + call.x_row(row) * params.x_stride * size;
    params.x_div = 0;
    if (params.row_weight != nullptr) params.row_weight += row;
    std::vector<float> v(static_cast<size_t>(params.v_stride + 1), 0.0f);
    for (float& value : v) std::memcpy(&value, &kVPoison, sizeof(value));
    Buffer y(params.dtype, params.y_stride);
    for (int64_t n = 0; n < params.y_stride; ++n) y.set_bits(n, y_before.bits(row * params.y_stride + n));
    params.v = v.data();
    params.y = y.data();
    cpu::shrink(params, testing::serial);
    cpu::expand(params, testing::serial);
    bool same = std::memcmp(v.data(), call.v.data() + row * params.v_stride,
                            static_cast<size_t>(params.v_width) * sizeof(float)) == 0;
    for (int64_t n = 0; n < params.y_stride; ++n) same &= y.bits(n) == call.y.bits(row * params.y_stride + n);
    CHECK(same, "seed %d: row %d differs from the same row alone", seed, static_cast<int>(row));
  }
}

Shape random_shape(Random& random) {
  constexpr int64_t kWidths[] = {1, 7, 15, 16, 17, 31, 100, 259};
  constexpr int32_t kRanks[] = {1, 4, 8, 8, 16, 17, 40, 256};
  Shape shape;
  shape.dtype = kDTypes[random.between(0, 2)];
  shape.slices = static_cast<int32_t>(random.between(1, 8));
  shape.k = kWidths[random.between(0, 7)];
  shape.max_rank = kRanks[random.between(0, 7)];
  shape.max_width = static_cast<int32_t>(random.chance(0.2) ? 300 : 40);
  shape.col_stride = random.chance(0.25) ? 2 : 1;
  return shape;
}

void test_dense(int seed) {
  Random random(static_cast<uint64_t>(seed));
  const Values values{seed % 2 == 0};
  Shape shape = random_shape(random);
  shape.groups = static_cast<int32_t>(random.between(1, 6));
  const Module module(shape, values, random);
  const int64_t rows = random.chance(0.1) ? 0 : random.chance(0.1) ? random.between(100, 160) : random.between(1, 24);
  const Batch batch = dense_batch(rows, shape.groups, random);
  Call call(module, batch, 0, values, random);
  run_ways([&](const auto& parallel_for) { cpu::shrink(call.params, parallel_for); }, &call.v, "shrink", seed);
  check_v(call, seed);
  const Buffer before = call.y;
  run_ways([&](const auto& parallel_for) { cpu::expand(call.params, parallel_for); }, &call.y, "expand", seed);
  check_y(call, before, [&](int64_t row, int32_t s) { return call.want_v(row, s); }, seed);
  check_alone(call, before, seed);
}

void test_moe(int seed) {
  Random random(static_cast<uint64_t>(seed) + 50000);
  const Values values{seed % 2 == 0};
  Shape shape = random_shape(random);
  shape.slices = static_cast<int32_t>(random.between(1, 2));
  const int32_t slots = static_cast<int32_t>(random.between(1, 3));
  const int32_t experts = static_cast<int32_t>(random.between(1, 5));
  const int32_t top_k = static_cast<int32_t>(random.between(1, 4));
  shape.groups = slots * experts;
  const Module module(shape, values, random);
  const Batch batch = moe_batch(random.between(0, 12), top_k, slots, experts, random.chance(0.5), values, random);
  Call call(module, batch, random.chance(0.5) ? top_k : static_cast<int32_t>(random.between(0, 1)), values, random);
  if (random.chance(0.5)) call.params.row_weight = batch.weights.data();
  run_ways([&](const auto& parallel_for) { cpu::shrink(call.params, parallel_for); }, &call.v, "moe shrink", seed);
  check_v(call, seed);
  const Buffer before = call.y;
  run_ways([&](const auto& parallel_for) { cpu::expand(call.params, parallel_for); }, &call.y, "moe expand", seed);
  check_y(call, before, [&](int64_t row, int32_t s) { return call.want_v(row, s); }, seed);
  check_alone(call, before, seed);
}

void test_embedding(int seed) {
  Random random(static_cast<uint64_t>(seed) + 100000);
  const Values values{seed % 2 == 0};
  Shape shape = random_shape(random);
  shape.groups = static_cast<int32_t>(random.between(1, 4));
  shape.embedding = true;
  shape.token_major = random.chance(0.5);
  const Module module(shape, values, random);
  const Batch batch = dense_batch(random.between(0, 24), shape.groups, random);
  Call call(module, batch, 0, values, random);
  EmbeddingParams params{};
  params.lora = call.params;
  params.lora.x = nullptr;
  params.ids_are_int64 = random.chance(0.5);
  params.vocab = shape.k;
  params.token_stride = module.token_stride();
  params.rank_stride = module.rank_stride();
  std::vector<int64_t> wide;
  std::vector<int32_t> narrow;
  for (int64_t row = 0; row < batch.rows; ++row) {
    wide.push_back(random.between(0, shape.k - 1));
    if (random.chance(0.2)) wide.back() = random.chance(0.5) ? shape.k : random.between(-(int64_t{1} << 31), -1);
    narrow.push_back(static_cast<int32_t>(wide.back()));
  }
  params.token_ids = params.ids_are_int64 ? static_cast<const void*>(wide.data()) : narrow.data();
  // What must stay as it is, whatever it is: -0 and NaNs with a payload too.
  for (int64_t row = 0; row < batch.rows; ++row) {
    const int64_t token = wide[static_cast<size_t>(row)];
    if (token >= 0 && token < shape.k) continue;
    for (int64_t n = 0; n < call.params.y_stride; ++n) {
      const uint32_t high = n % 2 == 0 ? 0x8000u : 0xff83u;
      call.y.set_bits(row * call.params.y_stride + n, shape.dtype == DType::kFloat32 ? high << 16 : high);
    }
  }
  const Buffer before = call.y;
  params.lora.v = nullptr;
  run_ways([&](const auto& parallel_for) { cpu::embedding(params, parallel_for); }, &call.y, "embedding", seed);
  const auto wants_v = [&](int64_t row, int32_t s) {
    std::vector<Estimate> result;
    const int64_t token = wide[static_cast<size_t>(row)];
    const int32_t g = batch.row_group[static_cast<size_t>(row)];
    if (token < 0 || token >= shape.k) return result;
    for (int32_t j = 0; j < module.entry(g, s).rank; ++j) result.push_back({module.a(g, s, j, token), 0.0});
    return result;
  };
  check_y(call, before, wants_v, seed);
}

double activation(Activation act, double g, double u, bool gated, double alpha, double limit) {
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  double a = 0.0;
  switch (act) {
    case Activation::kSilu:
      a = g * sigmoid(g);
      break;
    case Activation::kGelu:
      a = 0.5 * g * (1.0 + std::erf(g / std::sqrt(2.0)));
      break;
    case Activation::kGeluTanh:
      a = 0.5 * g * (1.0 + std::tanh(std::sqrt(2.0 / std::acos(-1.0)) * (g + 0.044715 * g * g * g)));
      break;
    case Activation::kRelu2:
      a = g > 0.0 ? g * g : 0.0;
      break;
    case Activation::kSwigluOai:
      g = std::min(g, limit);
      return g * sigmoid(alpha * g) * (std::clamp(u, -limit, limit) + 1.0);
  }
  return gated ? a * u : a;
}

void test_gate_up_act(int seed) {
  Random random(static_cast<uint64_t>(seed) + 150000);
  const Values values{false};
  Shape shape = random_shape(random);
  shape.slices = static_cast<int32_t>(random.between(1, 2));
  shape.equal_widths = true;
  shape.max_rank = std::min(shape.max_rank, 40);
  const bool gated = shape.slices == 2;
  const int32_t slots = static_cast<int32_t>(random.between(1, 3));
  const int32_t experts = static_cast<int32_t>(random.between(1, 5));
  const int32_t top_k = static_cast<int32_t>(random.between(1, 4));
  shape.groups = slots * experts;
  const Module module(shape, values, random);
  const Batch batch = moe_batch(random.between(0, 12), top_k, slots, experts, random.chance(0.5), values, random);
  Call call(module, batch, top_k, values, random);
  cpu::shrink(call.params, testing::serial);

  const int32_t width = module.widths[0];
  GateUpActParams params{};
  params.h_stride = width + random.between(0, 4);
  params.act = static_cast<Activation>(random.between(0, gated ? 4 : 3));
  params.alpha = 1.702f;
  params.limit = 0.7f;
  params.lora = call.params;
  Buffer h(shape.dtype, batch.rows * params.h_stride + 1);
  params.h = h.data();
  const Buffer y_before = call.y;
  const Buffer h_before = h;
  run_ways([&](const auto& parallel_for) { cpu::gate_up_act(params, parallel_for); }, &h, "gate_up_act", seed);
  CHECK(call.y == y_before, "seed %d: y1 was written", seed);

  for (int64_t row = 0; row < batch.rows; ++row) {
    const bool exists = batch.row_group[static_cast<size_t>(row)] != kNoRow;
    std::vector<Estimate> v_row[2];
    for (int32_t s = 0; s < shape.slices; ++s) {
      if (has(call, row, s)) v_row[s] = call.want_v(row, s);
    }
    for (int64_t n = 0; n < params.h_stride; ++n) {
      const int64_t at = row * params.h_stride + n;
      if (!exists || n >= width) {
        CHECK(h.bits(at) == h_before.bits(at), "seed %d: h[%d, %d] was written", seed, static_cast<int>(row),
              static_cast<int>(n));
        continue;
      }
      Estimate in[2] = {{0.0, 0.0}, {0.0, 0.0}};
      for (int32_t s = 0; s < shape.slices; ++s) {
        if (has(call, row, s)) in[s] = call.want_delta(row, s, static_cast<int32_t>(n), v_row[s], 1.0);
        in[s].value += y_before.get(call.y_at(row, s, static_cast<int32_t>(n)));
        in[s].slack += std::fabs(in[s].value) * 0x1p-23;
      }
      const auto act = [&](double g, double u) {
        return activation(params.act, g, u, gated, params.alpha, params.limit);
      };
      Estimate want{act(in[0].value, in[1].value), 0.0};
      for (double dg : {-in[0].slack, in[0].slack}) {
        for (double du : {-in[1].slack, in[1].slack}) {
          want.slack = std::max(want.slack, std::fabs(act(in[0].value + dg, in[1].value + du) - want.value));
        }
      }
      // exp, erf and tanh in fp32; 1 + tanh cancels for negative inputs.
      want.slack += 4e-7 * (std::fabs(want.value) + std::fabs(in[0].value) * (1.0 + std::fabs(in[1].value)));
      CHECK(close(h.get(at), want, shape.dtype), "seed %d act %d h[%d, %d] = %g, want %g +- %g", seed,
            static_cast<int>(params.act), static_cast<int>(row), static_cast<int>(n), h.get(at), want.value,
            want.slack);
    }
  }
}

void test_down_reduce(int seed) {
  Random random(static_cast<uint64_t>(seed) + 200000);
  const Values values{seed % 2 == 0};
  Shape shape = random_shape(random);
  shape.slices = 1;
  const int32_t slots = static_cast<int32_t>(random.between(1, 3));
  const int32_t experts = static_cast<int32_t>(random.between(1, 5));
  const int32_t top_k = static_cast<int32_t>(random.between(1, 8));
  shape.groups = slots * experts;
  const Module module(shape, values, random);
  const bool mapped = random.chance(0.5);
  const int64_t tokens = random.chance(0.05) ? 150 : random.between(0, 12);
  const Batch batch = moe_batch(tokens, top_k, slots, experts, mapped, values, random);
  Call call(module, batch, 0, values, random);
  call.params.row_weight = batch.weights.data();
  cpu::shrink(call.params, testing::serial);

  const int32_t width = module.widths[0];
  DownReduceParams params{};
  params.lora = call.params;
  params.out_stride = width + random.between(0, 4);
  params.tokens = tokens;
  params.top_k = top_k;
  params.y_weighted = random.chance(0.5);
  Buffer out(shape.dtype, tokens * params.out_stride + 1);
  params.out = out.data();
  const Buffer y_before = call.y;
  const Buffer out_before = out;
  run_ways([&](const auto& parallel_for) { cpu::down_reduce(params, parallel_for); }, &out, "down_reduce", seed);
  CHECK(call.y == y_before, "seed %d: y2 was written", seed);

  // Position of each pair: the last one that holds it.
  std::vector<int64_t> position(static_cast<size_t>(tokens * top_k), -1);
  for (int64_t row = 0; row < batch.rows; ++row) {
    if (batch.row_group[static_cast<size_t>(row)] != kNoRow) position[static_cast<size_t>(batch.pair(row))] = row;
  }
  for (int64_t token = 0; token < tokens; ++token) {
    std::vector<Estimate> want(static_cast<size_t>(width), {0.0, 0.0});
    for (int32_t j = 0; j < top_k; ++j) {
      const int64_t pair = token * top_k + j;
      const int64_t row = position[static_cast<size_t>(pair)];
      if (row < 0) continue;
      const double weight = batch.weights[static_cast<size_t>(pair)];
      std::vector<Estimate> v_row;
      if (has(call, row, 0)) v_row = call.want_v(row, 0);
      for (int32_t n = 0; n < width; ++n) {
        Estimate& sum = want[static_cast<size_t>(n)];
        const double y_part = y_before.get(call.y_at(row, 0, n)) * (params.y_weighted ? 1.0 : weight);
        sum.value += y_part;
        sum.slack += values.exact ? 0.0 : sum_slack(std::fabs(y_part), top_k);
        if (v_row.empty()) continue;
        const Estimate delta = call.want_delta(row, 0, n, v_row, weight);
        sum.value += delta.value;
        sum.slack += delta.slack + (values.exact ? 0.0 : sum_slack(std::fabs(delta.value), top_k));
      }
    }
    for (int64_t n = 0; n < params.out_stride; ++n) {
      const int64_t at = token * params.out_stride + n;
      if (n >= width) {
        CHECK(out.bits(at) == out_before.bits(at), "seed %d: out was written behind its width", seed);
        continue;
      }
      const Estimate& one = want[static_cast<size_t>(n)];
      CHECK(close(out.get(at), one, shape.dtype), "seed %d out[%d, %d] = %g, want %g +- %g", seed,
            static_cast<int>(token), static_cast<int>(n), out.get(at), one.value, one.slack);
    }
  }
}

/// Every 16-bit pattern to fp32 and back; fp32 to 16 bits rounds as the definition says.
void test_conversions() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const cpu::Kernels& kernel = cpu::kernels(dtype);
    for (uint32_t first = 0; first < 0x10000; first += 37) {
      Buffer in(dtype, 37), out(dtype, 37);
      float sum[37] = {};
      for (uint32_t i = 0; i < 37; ++i) in.set_bits(i, (first + i) & 0xffffu);
      kernel.accumulate(sum, in.data(), 1.0f, nullptr, 37);
      kernel.store(out.data(), sum, 37);
      for (int i = 0; i < 37; ++i) {
        const double value = in.get(i);
        CHECK(std::isnan(value) ? std::isnan(sum[i]) && std::isnan(out.get(i))
                                : static_cast<double>(sum[i]) == value && out.get(i) == value,
              "bits %04x become %g", in.bits(i), static_cast<double>(sum[i]));
      }
    }
    Random random(5);
    for (int round = 0; round < 4000; ++round) {
      float value[19];
      Buffer out(dtype, 19);
      for (float& one : value) {
        uint32_t bits = static_cast<uint32_t>(random.bits());
        if (random.chance(0.5)) bits = (bits & 0x8fffffffu) | 0x30000000u;    // near fp16's range
        if (random.chance(0.3)) bits &= 0xffffe000u << random.between(0, 4);  // ties
        if (random.chance(0.05)) bits |= 0x7f800000u;
        std::memcpy(&one, &bits, sizeof(one));
      }
      kernel.store(out.data(), value, 19);
      for (int i = 0; i < 19; ++i) {
        const double want = round_to(value[i], dtype);
        CHECK(std::isnan(want) ? std::isnan(out.get(i)) : out.get(i) == want, "%a becomes %g",
              static_cast<double>(value[i]), out.get(i));
      }
    }
  }
}

/// Infinities and NaN of one row reach the outputs they reach in the definition, and no other row.
void test_non_finite() {
  Random random(9);
  Shape shape;
  shape.groups = 2;
  shape.k = 50;
  shape.max_rank = 1;
  for (DType dtype : kDTypes) {
    shape.dtype = dtype;
    for (int round = 0; round < 40; ++round) {
      const Module module(shape, {false}, random);
      const Batch batch = dense_batch(9, 2, random);
      Call call(module, batch, 0, {false}, random);
      if (!has(call, 4, 0)) continue;
      call.x.set(4 * call.params.x_stride + 48, round % 2 == 0 ? INFINITY : NAN);
      const Buffer before = call.y;
      cpu::shrink(call.params, testing::serial);
      cpu::expand(call.params, testing::serial);
      for (int64_t row = 0; row < 9; ++row) {
        for (int32_t n = 0; n < module.widths[0]; ++n) {
          const bool finite = std::isfinite(call.y.get(call.y_at(row, 0, n)));
          CHECK(finite == (row != 4), "row %d of a batch whose row 4 is not finite", static_cast<int>(row));
        }
      }
    }
  }
}

/// Activations at the ends of the range are what the formulas, in torch's order of operations, make of them.
void test_activation_ends() {
  const float inf = INFINITY;
  const float g[] = {inf,    -inf,    NAN,   0.0f,   -0.0f,  88.0f,   -88.0f,
                     104.0f, -104.0f, 1e30f, -1e30f, 1e-30f, -1e-30f, 20.0f};
  constexpr int kCount = sizeof(g) / sizeof(g[0]);
  const float u[kCount] = {2, 2, 2, inf, 2, 2, 2, 2, 2, 2, 2, 2, NAN, -inf};
  const cpu::Kernels& kernel = cpu::kernels(DType::kFloat32);
  for (int a = 0; a < 5; ++a) {
    const Activation act = static_cast<Activation>(a);
    float h[kCount];
    kernel.activate(h, g, nullptr, u, nullptr, kCount, act, 1.702f, 7.0f);
    for (int i = 0; i < kCount; ++i) {
      const bool nan_in = std::isnan(g[i]) || std::isnan(u[i]);
      const double want = nan_in ? NAN : activation(act, g[i], u[i], true, 1.702f, 7.0f);
      // Below fp32's normal range, and where x^3 overflows, only the size matters.
      const bool same = std::isnan(want) ? std::isnan(h[i])
                        : std::isinf(round_to(want, DType::kFloat32))
                            ? h[i] == static_cast<float>(want)
                            : std::fabs(h[i] - want) <= 1e-6 * std::fabs(want) + 1e-36;
      CHECK(same, "act %d of gate %g up %g: %g, want %g", a, static_cast<double>(g[i]), static_cast<double>(u[i]),
            static_cast<double>(h[i]), want);
    }
  }
}

/// The vector activations against the scalar ones that the CUDA kernels share.
void test_activation_agrees() {
  const cpu::Kernels& kernel = cpu::kernels(DType::kFloat32);
  Random random(77);
  for (int round = 0; round < 200; ++round) {
    constexpr int kCount = 50;
    float g[kCount], u[kCount], h[kCount];
    for (int i = 0; i < kCount; ++i) {
      g[i] = static_cast<float>((random.uniform() - 0.5) * std::ldexp(1.0, static_cast<int>(random.between(-6, 6))));
      u[i] = static_cast<float>((random.uniform() - 0.5) * 20.0);
    }
    const Activation act = static_cast<Activation>(round % 5);
    kernel.activate(h, g, nullptr, u, nullptr, kCount, act, 1.702f, 7.0f);
    for (int i = 0; i < kCount; ++i) {
      const float want = gated_activation(act, g[i], u[i], 1.702f, 7.0f);
      // 1 + tanh and 1 + erf cancel for negative inputs: the error is then relative to the input.
      const double room = 1e-6 * std::fabs(want) + 3e-7 * std::fabs(double{g[i]} * (1.0 + std::fabs(u[i])));
      CHECK(std::fabs(double{h[i]} - want) <= room, "act %d of gate %g up %g: %g, want %g", round % 5,
            static_cast<double>(g[i]), static_cast<double>(u[i]), static_cast<double>(h[i]), static_cast<double>(want));
    }
  }
}

/// Memory that exists only where it is touched; null where the system refuses so much address space.
class Sparse {
 public:
  explicit Sparse(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    data_ = at == MAP_FAILED ? nullptr : static_cast<char*>(at);
  }
  ~Sparse() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;

  char* data() const { return data_; }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  char* data_;
};

/// Offsets of x, A, B, v and y beyond 2^31 elements.
void test_far_offsets() {
  constexpr int64_t kStride = int64_t{1} << 30;  // elements between rows of x and y
  constexpr int32_t kRows = 4, kK = 20, kRank = 3, kWidth = 70;
  constexpr int32_t kARow = 1 << 20;
  constexpr int64_t kAStride = 1 << 12;
  constexpr int64_t kBOffset = (int64_t{1} << 32) + 8;
  constexpr int32_t kBStride = 1 << 26;
  const Sparse x(kRows * kStride * 4), y(kRows * kStride * 4), v(kRows * kStride * 4), a((kARow + 8) * kAStride * 4),
      b((kBOffset + int64_t{kWidth} * kBStride) * 4);
  if (!x.data() || !y.data() || !v.data() || !a.data() || !b.data()) {
    std::printf("far offsets: skipped, no address space\n");
    return;
  }
  const SliceEntry entry{kARow, kRank, 5, kBStride, kBOffset, 0.5f, 0};
  const int32_t ids[kRows] = {0, 0, 0, 0};
  std::vector<int32_t> plan(static_cast<size_t>(plan_layout(kRows, 1, 0).words));
  cpu::plan({plan.data(), ids, false, kRows, 1}, testing::serial);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t k = 0; k < kK; ++k) x.as<float>()[r * kStride + k] = static_cast<float>(r + k % 3);
  }
  for (int64_t j = 0; j < kRank; ++j) {
    for (int64_t k = 0; k < kK; ++k) a.as<float>()[(kARow + j) * kAStride + k] = static_cast<float>(j + 1);
    for (int64_t n = 0; n < kWidth; ++n) b.as<float>()[kBOffset + n * kBStride + j] = static_cast<float>(n - j);
  }
  LoraParams params{};
  params.dtype = DType::kFloat32;
  params.rows = kRows;
  params.k = kK;
  params.x = x.data();
  params.y = y.data();
  params.v = v.as<float>();
  params.x_stride = params.y_stride = params.v_stride = kStride;
  params.x_div = 0;
  params.v_width = 8;
  params.slices.table = &entry;
  params.slices.groups = params.slices.count = params.slices.col_stride = 1;
  params.slices.a[0] = a.data();
  params.slices.a_stride[0] = kAStride;
  params.slices.b[0] = b.data();
  params.slices.width[0] = kWidth;
  params.slices.col[0] = kStride - kWidth;
  params.plan = plan_view(plan.data(), kRows, 1, 0);
  cpu::shrink(params, testing::serial);
  cpu::expand(params, testing::serial);
  for (int64_t r = 0; r < kRows; ++r) {
    double x_sum = 0.0;
    for (int64_t k = 0; k < kK; ++k) x_sum += static_cast<double>(r + k % 3);
    for (int64_t n = 0; n < kWidth; ++n) {
      double want = 0.0;
      for (int64_t j = 0; j < kRank; ++j) want += 0.5 * x_sum * static_cast<double>((j + 1) * (n - j));
      const double got = y.as<float>()[r * kStride + kStride - kWidth + n];
      CHECK(got == want, "far y[%d, %d] = %g, want %g", static_cast<int>(r), static_cast<int>(n), got, want);
    }
  }
}

/// `bytes` zero bytes that end where a page begins that may not be touched.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t pages = (bytes + page - 1) / page * page;
    size_ = static_cast<size_t>(pages + page);
    void* at = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) std::abort();
    start_ = static_cast<char*>(at);
    if (mprotect(start_ + pages, static_cast<size_t>(page), PROT_NONE) != 0) std::abort();
    data_ = start_ + pages - bytes;
  }
  ~Guarded() { munmap(start_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data() const { return data_; }

 private:
  size_t size_;
  char* start_;
  char* data_;
};

/// No op touches a byte behind its buffers: it would not survive this.
void test_guard_pages() {
  constexpr int32_t kRows = 5, kK = 37;
  for (DType dtype : kDTypes) {
    for (int32_t rank : {1, 5, 8, 16, 21}) {
      for (int32_t width : {1, 15, 16, 70}) {
        const int64_t size = testing::size_of(dtype);
        const Guarded x(kRows * kK * size), y(kRows * width * size), h(kRows * width * size), v(kRows * rank * 4),
            a(rank * kK * size), b(width * rank * size);
        const SliceEntry entry{0, rank, 0, rank, 0, 1.0f, 0};
        const int32_t ids[kRows] = {0, 0, 0, 0, 0};
        const float weights[kRows] = {1, 1, 1, 1, 1};
        std::vector<int32_t> plan(static_cast<size_t>(plan_layout(kRows, 1, 0).words));
        cpu::plan({plan.data(), ids, false, kRows, 1}, testing::serial);
        GateUpActParams act{};
        LoraParams& params = act.lora;
        params.dtype = dtype;
        params.rows = kRows;
        params.k = params.x_stride = kK;
        params.x = x.data();
        params.y = y.data();
        params.y_stride = width;
        params.v = reinterpret_cast<float*>(v.data());
        params.v_stride = params.v_width = rank;
        params.slices.table = &entry;
        params.slices.groups = params.slices.count = params.slices.col_stride = 1;
        params.slices.a[0] = a.data();
        params.slices.a_stride[0] = kK;
        params.slices.b[0] = b.data();
        params.slices.width[0] = width;
        params.plan = plan_view(plan.data(), kRows, 1, 0);
        cpu::shrink(params, testing::serial);
        cpu::expand(params, testing::serial);
        act.h = h.data();
        act.h_stride = width;
        cpu::gate_up_act(act, testing::serial);
        DownReduceParams down{};
        down.lora = params;
        down.lora.row_weight = weights;
        down.out = h.data();
        down.out_stride = width;
        down.tokens = kRows;
        down.top_k = 1;
        cpu::down_reduce(down, testing::serial);
        CHECK(h.data()[0] == 0 && y.data()[0] == 0, "zeros in, zeros out");
      }
    }
  }
}

void test_all(int seeds) {
  test_conversions();
  test_non_finite();
  test_activation_ends();
  test_activation_agrees();
  test_far_offsets();
  test_guard_pages();
  for (int seed = 0; seed < seeds; ++seed) {
    test_dense(seed);
    test_moe(seed);
    test_embedding(seed);
    test_gate_up_act(seed);
    test_down_reduce(seed);
  }
}

}  // namespace
}  // namespace polylora

int main() {
  using namespace polylora;
  constexpr std::pair<cpu::Isa, const char*> kIsas[] = {
      {cpu::Isa::kGeneric, "generic"}, {cpu::Isa::kAvx2, "avx2"}, {cpu::Isa::kAvx512, "avx512"}};
  for (const auto& [isa, name] : kIsas) {
    if (!cpu::select_isa(isa)) {
      std::printf("%s: not on this machine\n", name);
      continue;
    }
    const int64_t failed = testing::failed;
    test_all(120);
    std::printf("%s: %s\n", name, testing::failed == failed ? "ok" : "FAILED");
  }
  return testing::report();
}
