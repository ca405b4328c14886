// The ops: check the arguments, fill the params, run the backend. One template serves the CPU, CUDA and the fakes.
#include <algorithm>
#include <iterator>
#include <limits>

#include "backend.h"
#include "checks.h"

namespace polylora::ops {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// Outputs of a slice: grids count them in blocks of 256 in their y dimension, which ends at 65535.
constexpr int64_t kMaxWidth = 1 << 23;

const int32_t* int32_data(const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); }

// Of a map that is there, which says more than what it holds: an empty tensor has no data, but null is no map.
const int32_t* map_data(const Tensor& map) {
  static const int32_t none = -1;  // never read
  return map.size(0) > 0 ? int32_data(map) : &none;
}

// Whether there are pairs of tokens and experts, of which positions of a row map are some. Without them no row exists.
bool has_pairs(const LoraParams& p) { return p.row_map == nullptr || p.plan.pairs > 0; }

// Table, weights and outputs of the slices. What an op does not take is null; widths without cols stand slice after
// slice.
struct SliceArgs {
  const TensorList* a;
  const TensorList* b;
  const Tensor& table;
  const IntList* widths;
  const IntList* cols;
  int64_t col_stride;
};

// Of a list that holds either one arena for all slices or one tensor a slice, the tensor of slice s.
const Tensor& of_slice(const TensorList& list, int64_t s) { return list.size() == 1 ? list[0] : list[s]; }

void check_list(const Checker& check, const char* arg, const TensorList& list, int64_t slices) {
  if (list.size() != 1 && static_cast<int64_t>(list.size()) != slices) {
    check.fail(arg, "a list of 1 or " + std::to_string(slices) + " tensors (the slices of the table)",
               std::to_string(list.size()) + " tensors");
  }
}

// What A is multiplied with; without a tensor: nothing.
struct Input {
  const char* name;
  const Tensor* tensor;
};
constexpr Input kNoInput{"", nullptr};

// Fills everything but the pointers' use. `columns`: that A must have where it has no input (embedding; kAny: any).
SliceSet slice_set(const Checker& check, const SliceArgs& args, Input input, int32_t dtype, int64_t columns = kAny) {
  check.contiguous("table", args.table, {kAny, kAny, sizeof(SliceEntry) / sizeof(int32_t)}, dtype::kInt32);
  check.aligned("table", args.table, alignof(SliceEntry));
  const int64_t groups = args.table.size(0);
  const int64_t count = args.table.size(1);
  if (count < 1 || count > kMaxSlices) {
    check.fail("table", "of 1 to " + std::to_string(kMaxSlices) + " slices", describe(args.table));
  }
  check.range("table.size(0)", groups, 0, kMaxInt32);
  SliceSet set{};
  set.table = static_cast<const SliceEntry*>(args.table.data_ptr());
  set.groups = static_cast<int32_t>(groups);
  set.count = static_cast<int32_t>(count);
  set.col_stride = static_cast<int32_t>(args.col_stride);
  std::fill(std::begin(set.a_rows), std::end(set.a_rows), -1);
  std::fill(std::begin(set.b_elements), std::end(set.b_elements), -1);
  if (args.a) {
    check_list(check, "a", *args.a, count);
    for (const Tensor& t : *args.a) {
      check.matrix("a", t, kAny, columns, dtype);
      if (input.tensor != nullptr && t.size(1) != input.tensor->size(1)) {
        check.fail(input.name, "of " + std::to_string(t.size(1)) + " columns, as a has", describe(*input.tensor));
      }
    }
    for (int64_t s = 0; s < count; ++s) {
      const Tensor& t = of_slice(*args.a, s);
      set.a[s] = t.data_ptr();
      set.a_stride[s] = Checker::pitch(t);
      set.a_rows[s] = t.size(0);
    }
  }
  if (args.b) {
    check_list(check, "b", *args.b, count);
    for (const Tensor& t : *args.b) check.contiguous("b", t, {kAny}, dtype);
    for (int64_t s = 0; s < count; ++s) {
      set.b[s] = of_slice(*args.b, s).data_ptr();
      set.b_elements[s] = of_slice(*args.b, s).size(0);
    }
  }
  if (args.widths) {
    if (static_cast<int64_t>(args.widths->size()) != count) {
      check.fail("widths", std::to_string(count) + " integers (the slices of the table)",
                 std::to_string(args.widths->size()));
    }
    if (args.cols && static_cast<int64_t>(args.cols->size()) != count) {
      check.fail("cols", std::to_string(count) + " integers (the slices of the table)",
                 std::to_string(args.cols->size()));
    }
    for (int64_t s = 0; s < count; ++s) {
      check.range("widths", (*args.widths)[s], 0, kMaxWidth);
      set.col[s] = args.cols ? (*args.cols)[s] : sum_of_widths(set);
      set.width[s] = static_cast<int32_t>((*args.widths)[s]);
    }
  }
  return set;
}

// Every slice must lie inside a row of `y`, and no two may share a column: different threads add to them.
void check_columns(const Checker& check, const char* arg, const Tensor& y, const SliceSet& set) {
  const auto place = [&](int32_t s) {
    return "slice " + std::to_string(s) + " from column " + std::to_string(set.col[s]);
  };
  for (int32_t s = 0; s < set.count; ++s) {
    if (set.width[s] == 0) continue;
    const int64_t columns = y.size(1);
    const bool starts_inside = set.col[s] >= 0 && set.col[s] < columns;
    if (!starts_inside || set.width[s] - 1 > (columns - 1 - set.col[s]) / set.col_stride) {
      check.fail("cols", std::string("columns inside ") + arg + ", which is " + describe(y),
                 place(s) + ", " + std::to_string(set.width[s]) + " outputs");
    }
  }
  const auto end = [&](int32_t s) { return set.col[s] + int64_t{set.width[s] - 1} * set.col_stride; };
  for (int32_t s = 1; s < set.count; ++s) {
    for (int32_t other = 0; other < s; ++other) {
      if (set.width[s] == 0 || set.width[other] == 0) continue;
      const bool interleaved = (set.col[s] - set.col[other]) % set.col_stride != 0;
      if (interleaved || set.col[s] > end(other) || set.col[other] > end(s)) continue;
      check.fail("cols", "apart from each other", place(other) + " overlapping " + place(s));
    }
  }
}

// The same, or, where slices have no columns, that y is as wide as they are together.
void check_slices_of(const Checker& check, const char* arg, const Tensor& y, const LoraParams& p,
                     const SliceArgs& slices) {
  if (slices.cols) {
    check_columns(check, arg, y, p.slices);
  } else {
    check.matrix(arg, y, p.rows, sum_of_widths(p.slices), y.dtype());
  }
}

PlanView checked_plan(const Checker& check, const Tensor& plan, int64_t rows, int64_t groups, int64_t pairs) {
  const int64_t words = plan_layout(rows, groups, pairs).words;
  if (plan.dim() != 1 || plan.size(0) != words || plan.dtype() != dtype::kInt32) {
    check.fail("plan",
               "[" + std::to_string(words) + "] int32 (made for " + std::to_string(rows) + " rows, " +
                   std::to_string(groups) + " groups" + (pairs ? ", " + std::to_string(pairs) + " mapped pairs)" : ")"),
               describe(plan));
  }
  check.contiguous("plan", plan, {words}, dtype::kInt32);
  check.aligned("plan", plan, alignof(Tile));
  return plan_view(int32_data(plan), rows, groups, pairs);
}

// As checked_plan, of a plan that an op reads. On the CPU its header can be looked at; on CUDA that would synchronise,
// and the kernels find no active rows in a plan made for other rows or groups.
PlanView filled_plan(const Checker& check, const Tensor& plan, int64_t rows, int64_t groups, int64_t pairs) {
  const PlanView view = checked_plan(check, plan, rows, groups, pairs);
  if (plan.is_cpu() && !plan_fits(view)) {
    const auto text = [](int64_t r, int64_t g, int64_t n) {
      return std::to_string(r) + " rows, " + std::to_string(g) + " groups, " + std::to_string(n) + " mapped pairs";
    };
    check.fail("plan", "filled for " + text(rows, groups, pairs),
               "one filled for " + text(view.header[kPlanRows], view.header[kPlanGroups], view.header[kPlanPairs]));
  }
  return view;
}

// On the CPU what the kernels must take as it comes can be looked at: entries of the groups in use, and the row map.
void check_on_cpu(const Checker& check, const LoraParams& p, int64_t a_rows_used, const int32_t* a_cols) {
  for (int32_t run = 0; run < p.plan.header[kPlanRuns]; ++run) {
    const int64_t group = p.plan.run_group[run];
    for (int32_t s = 0; s < p.slices.count; ++s) {
      const SliceEntry& entry = p.slices.table[group * p.slices.count + s];
      if (entry.rank == 0) continue;
      if (!entry_fits(entry, a_rows_used < 0 ? entry.rank : a_rows_used, p.slices.a_rows[s], p.slices.width[s],
                      p.slices.b_elements[s], p.v_width) ||
          (a_cols != nullptr && entry.rank > a_cols[s])) {
        check.fail("table", "made for these tensors, widths and v_width (" + std::to_string(p.v_width) + ")",
                   "an entry of group " + std::to_string(group) + ", slice " + std::to_string(s) +
                       " outside them: a_row " + std::to_string(entry.a_row) + ", rank " + std::to_string(entry.rank) +
                       ", v_col " + std::to_string(entry.v_col) + ", b_offset " + std::to_string(entry.b_offset) +
                       ", b_stride " + std::to_string(entry.b_stride));
      }
    }
  }
  for (int64_t row = 0; p.row_map != nullptr && row < p.rows; ++row) {
    const int64_t pair = p.row_map[row];
    if (p.plan.row_group[row] != kNoRow && (pair < 0 || pair >= p.plan.pairs)) {
      check.fail("row_map", "the one the plan was made with",
                 "pair " + std::to_string(pair) + " of " + std::to_string(p.plan.pairs) + " in position " +
                     std::to_string(row));
    }
  }
}

// Whether there is anything to add; what can be looked at on the CPU is checked before it is.
bool adds_something(const Checker& check, const Tensor& like, const LoraParams& p, int64_t a_rows_used = -1,
                    const int32_t* a_cols = nullptr) {
  if (p.rows == 0 || p.slices.groups == 0) return false;
  if (!like.is_cpu()) return has_pairs(p);
  check_on_cpu(check, p, a_rows_used, a_cols);
  return p.plan.header[kPlanRuns] > 0;
}

void set_v_width(const Checker& check, LoraParams& p, int64_t v_width) {
  check.range("v_width", v_width, 0, kMaxInt32);
  p.v_width = static_cast<int32_t>(v_width);
}

// Working memory of `bytes` for one call, or nothing.
OptionalTensor scratch(LoraParams& p, const Tensor& like, int64_t bytes) {
  if (bytes == 0) return std::nullopt;
  Tensor memory = empty_bytes(bytes, like);
  p.scratch = memory.data_ptr();
  return memory;
}

template <class Backend>
void run_shrink(const Backend& backend, LoraParams& p, const Tensor& like) {
  const OptionalTensor memory = scratch(p, like, backend.shrink_scratch(p));
  backend.shrink(p);
}

// shrink and expand in one call, in whatever form the backend wants v between them.
template <class Backend>
void run_linear(const Checker& check, LoraParams& p, const Tensor& like, int64_t v_width) {
  set_v_width(check, p, v_width);
  if (!adds_something(check, like, p)) return;
  const Backend backend(like);
  const OptionalTensor memory = scratch(p, like, backend.linear_scratch(p));
  backend.linear(p);
}

const int32_t* checked_row_map(const Checker& check, const OptionalTensor& row_map, int64_t rows) {
  if (!row_map) return nullptr;
  check.contiguous("row_map", *row_map, {rows}, dtype::kInt32);
  return map_data(*row_map);
}

void set_x(LoraParams& p, const Tensor& x) {
  p.k = x.size(1);
  p.x = x.data_ptr();
  p.x_stride = Checker::pitch(x);
}

void set_y(LoraParams& p, const Tensor& y) {
  p.y = y.data_ptr();
  p.y_stride = Checker::pitch(y);
}

// ---------------------------------------------------------------------------------------------------------- plans

template <class Backend>
void plan(Tensor plan, Tensor group_ids, int64_t num_groups) {
  const Checker check("plan", plan);
  const bool is_int64 = check.ids("group_ids", group_ids, {kAny});
  const int64_t rows = group_ids.size(0);
  check.range("num_groups", num_groups, 0, kMaxInt32);
  check.range("group_ids.size(0)", rows, 0, kMaxInt32 / 8);
  checked_plan(check, plan, rows, num_groups, 0);
  const PlanParams params{static_cast<int32_t*>(plan.data_ptr()), group_ids.data_ptr(), is_int64, rows, num_groups};
  Backend(plan).plan(params);
}

template <class Backend>
void moe_plan(Tensor plan, Tensor topk_ids, Tensor token_slots, int64_t num_slots, int64_t num_experts,
              OptionalTensor expert_map, OptionalTensor row_map) {
  const Checker check("moe_plan", plan);
  MoePlanParams p{};
  p.ids_are_int64 = check.ids("topk_ids", topk_ids, {kAny, kAny});
  const int64_t tokens = topk_ids.size(0);
  const int64_t top_k = topk_ids.size(1);
  check.range("topk_ids.numel()", tokens * top_k, 0, kMaxInt32 / 8);
  check.contiguous("token_slots", token_slots, {tokens}, dtype::kInt32);
  check.range("num_slots", num_slots, 0, kMaxInt32);
  check.range("num_experts", num_experts, 1, kMaxInt32);
  check.range("num_slots * num_experts", num_slots * num_experts, 0, kMaxInt32);
  p.pairs = tokens * top_k;
  p.rows = p.pairs;
  p.global_experts = static_cast<int32_t>(num_experts);
  if (expert_map) {
    check.contiguous("expert_map", *expert_map, {kAny}, dtype::kInt32);
    p.expert_map = int32_data(*expert_map);
    p.global_experts = static_cast<int32_t>(expert_map->size(0));
  }
  if (row_map) {
    check.contiguous("row_map", *row_map, {kAny}, dtype::kInt32);
    check.range("row_map.size(0)", row_map->size(0), 0, kMaxInt32 / 8);
    p.row_map = map_data(*row_map);
    p.rows = row_map->size(0);
  }
  checked_plan(check, plan, p.rows, num_slots * num_experts, row_map ? p.pairs : 0);
  p.plan = static_cast<int32_t*>(plan.data_ptr());
  p.topk_ids = topk_ids.data_ptr();
  p.token_slots = int32_data(token_slots);
  p.top_k = static_cast<int32_t>(top_k);
  p.slots = static_cast<int32_t>(num_slots);
  p.experts = static_cast<int32_t>(num_experts);
  Backend(plan).moe_plan(p);
}

// ---------------------------------------------------------------------------------------------------------- dense

template <class Backend>
void shrink(Tensor v, Tensor x, TensorList a, Tensor table, Tensor plan) {
  const Checker check("shrink", v);
  LoraParams p{};
  p.dtype = check.compute_dtype("x", x);
  check.matrix("x", x, kAny, kAny, x.dtype());
  p.rows = x.size(0);
  check.matrix("v", v, p.rows, kAny, dtype::kFloat32);
  set_x(p, x);
  p.v = static_cast<float*>(v.data_ptr());
  p.v_stride = Checker::pitch(v);
  p.v_width = static_cast<int32_t>(v.size(1));
  p.slices = slice_set(check, {&a, nullptr, table, nullptr, nullptr, 1}, {"x", &x}, x.dtype());
  p.plan = filled_plan(check, plan, p.rows, p.slices.groups, 0);
  if (adds_something(check, v, p)) run_shrink(Backend(v), p, v);
}

template <class Backend>
void expand_(Tensor y, Tensor v, TensorList b, Tensor table, Tensor plan, IntList widths, IntList cols) {
  const Checker check("expand_", y);
  LoraParams p{};
  p.dtype = check.compute_dtype("y", y);
  check.matrix("y", y, kAny, kAny, y.dtype());
  p.rows = y.size(0);
  check.matrix("v", v, p.rows, kAny, dtype::kFloat32);
  set_y(p, y);
  p.v = static_cast<float*>(v.data_ptr());
  p.v_stride = Checker::pitch(v);
  p.v_width = static_cast<int32_t>(v.size(1));
  p.slices = slice_set(check, {nullptr, &b, table, &widths, &cols, 1}, kNoInput, y.dtype());
  check_columns(check, "y", y, p.slices);
  p.plan = filled_plan(check, plan, p.rows, p.slices.groups, 0);
  if (adds_something(check, y, p)) Backend(y).expand(p);
}

// Of linear_ and linear_delta. Where slices have no columns, y is the deltas, slice after slice.
LoraParams linear_params(const Checker& check, const char* y_name, const Tensor& y, const Tensor& x,
                         const SliceArgs& slices, const Tensor& plan) {
  LoraParams p{};
  p.dtype = check.compute_dtype(y_name, y);
  check.matrix(y_name, y, kAny, kAny, y.dtype());
  p.rows = y.size(0);
  check.matrix("x", x, p.rows, kAny, y.dtype());
  set_x(p, x);
  set_y(p, y);
  p.slices = slice_set(check, slices, {"x", &x}, y.dtype());
  check_slices_of(check, y_name, y, p, slices);
  p.plan = filled_plan(check, plan, p.rows, p.slices.groups, 0);
  return p;
}

template <class Backend>
void linear_(Tensor y, Tensor x, TensorList a, TensorList b, Tensor table, Tensor plan, IntList widths, IntList cols,
             int64_t v_width) {
  const Checker check("linear_", y);
  LoraParams p = linear_params(check, "y", y, x, {&a, &b, table, &widths, &cols, 1}, plan);
  run_linear<Backend>(check, p, y, v_width);
}

template <class Backend>
void linear_delta(Tensor delta, Tensor x, TensorList a, TensorList b, Tensor table, Tensor plan, IntList widths,
                  int64_t v_width) {
  const Checker check("linear_delta", delta);
  LoraParams p = linear_params(check, "delta", delta, x, {&a, &b, table, &widths, nullptr, 1}, plan);
  set_v_width(check, p, v_width);
  if (!adds_something(check, delta, p)) return;
  const Backend backend(delta);
  const OptionalTensor memory = scratch(p, delta, backend.linear_delta_scratch(p));
  backend.linear_delta(p);
}

template <class Backend>
void add_delta_(Tensor y, Tensor delta, Tensor table, Tensor plan, IntList widths, IntList cols) {
  const Checker check("add_delta_", y);
  AddDeltaParams p{};
  p.lora.dtype = check.compute_dtype("y", y);
  check.matrix("y", y, kAny, kAny, y.dtype());
  p.lora.rows = y.size(0);
  set_y(p.lora, y);
  p.lora.slices = slice_set(check, {nullptr, nullptr, table, &widths, &cols, 1}, kNoInput, y.dtype());
  check_columns(check, "y", y, p.lora.slices);
  check.matrix("delta", delta, p.lora.rows, sum_of_widths(p.lora.slices), y.dtype());
  p.delta = delta.data_ptr();
  p.delta_stride = Checker::pitch(delta);
  p.lora.plan = filled_plan(check, plan, p.lora.rows, p.lora.slices.groups, 0);
  if (p.lora.rows > 0 && p.lora.slices.groups > 0) Backend(y).add_delta(p);
}

template <class Backend>
void embedding_(Tensor y, Tensor token_ids, TensorList a, TensorList b, Tensor table, Tensor plan, IntList widths,
                IntList cols, int64_t vocab, bool token_major) {
  const Checker check("embedding_", y);
  EmbeddingParams p{};
  p.lora.dtype = check.compute_dtype("y", y);
  check.matrix("y", y, kAny, kAny, y.dtype());
  p.lora.rows = y.size(0);
  p.ids_are_int64 = check.ids("token_ids", token_ids, {p.lora.rows});
  p.token_ids = token_ids.data_ptr();
  check.range("vocab", vocab, 0, kMaxInt32);
  p.vocab = vocab;
  set_y(p.lora, y);
  // rank rows over the vocabulary, or token rows over the rank: the columns of A are checked accordingly
  p.lora.slices = slice_set(check, {&a, &b, table, &widths, &cols, 1}, kNoInput, y.dtype(), token_major ? kAny : vocab);
  const Tensor* apart = nullptr;  // the first of more than a row: the others' strides mean nothing
  for (const Tensor& t : a) {
    if (token_major && vocab > t.size(0)) {
      check.fail("vocab", "at most the " + std::to_string(t.size(0)) + " tokens of a", std::to_string(vocab));
    }
    if (t.size(0) <= 1) continue;
    if (apart == nullptr) apart = &t;
    if (Checker::pitch(t) != Checker::pitch(*apart)) check.fail("a", "tensors of one row stride", describe(t));
  }
  const int64_t pitch = Checker::pitch(apart != nullptr ? *apart : a[0]);
  p.token_major = token_major;
  p.token_stride = token_major ? pitch : 1;
  p.rank_stride = token_major ? 1 : pitch;
  for (int32_t s = 0; token_major && s < p.lora.slices.count; ++s) {
    p.a_cols[s] = static_cast<int32_t>(std::min(of_slice(a, s).size(1), kMaxInt32));
  }
  check_columns(check, "y", y, p.lora.slices);
  p.lora.plan = filled_plan(check, plan, p.lora.rows, p.lora.slices.groups, 0);
  p.lora.v_width = static_cast<int32_t>(kMaxInt32);
  if (adds_something(check, y, p.lora, token_major ? vocab : -1, token_major ? p.a_cols : nullptr)) {
    const Backend backend(y);
    const OptionalTensor memory = scratch(p.lora, y, backend.embedding_scratch(p));
    backend.embedding(p);
  }
}

// ------------------------------------------------------------------------------------------------------------ MoE

// What the ops of an MoE layer share. `y` names the matrix whose rows are the plan's positions.
struct MoeArgs {
  const char* y_name;
  const Tensor& y;
  const SliceArgs& slices;
  const Tensor& plan;
  int64_t pairs;
  const OptionalTensor& row_map;
  int64_t mapped_pairs = 0;  // of the plan; with a row map: the pairs
};

// `x`: what A multiplies, of `x_rows` rows; null where an op has no A.
LoraParams moe_params(const Checker& check, const MoeArgs& args, const char* x_name, const Tensor* x, int64_t x_rows) {
  LoraParams p{};
  p.dtype = check.compute_dtype(args.y_name, args.y);
  check.matrix(args.y_name, args.y, kAny, kAny, args.y.dtype());
  p.rows = args.y.size(0);
  if (!args.row_map && p.rows != args.pairs) {
    check.fail(args.y_name, "of " + std::to_string(args.pairs) + " rows, one a (token, expert) pair", describe(args.y));
  }
  if (x != nullptr) {
    check.matrix(x_name, *x, x_rows, kAny, args.y.dtype());
    set_x(p, *x);
  }
  set_y(p, args.y);
  p.row_map = checked_row_map(check, args.row_map, p.rows);
  check.range("col_stride", args.slices.col_stride, 1, kMaxInt32);
  p.slices = slice_set(check, args.slices, {x_name, x}, args.y.dtype());
  check_slices_of(check, args.y_name, args.y, p, args.slices);
  const int64_t mapped_pairs = args.row_map ? args.pairs : args.mapped_pairs;
  p.plan = filled_plan(check, args.plan, p.rows, p.slices.groups, mapped_pairs);
  return p;
}

// Gate/up: the pairs of a token share its row of x.
LoraParams gate_up_params(const Checker& check, const char* y_name, const Tensor& y, const Tensor& x,
                          const SliceArgs& slices, const Tensor& plan, int64_t top_k, const OptionalTensor& row_map) {
  check.range("top_k", top_k, 1, kMaxInt32);
  check.matrix("x", x, kAny, kAny, x.dtype());
  const int64_t pairs = x.size(0) * top_k;
  LoraParams p = moe_params(check, {y_name, y, slices, plan, pairs, row_map}, "x", &x, kAny);
  p.x_div = static_cast<int32_t>(top_k);
  return p;
}

// Down: every position has its own row of h, and the top-k weight of its pair.
LoraParams down_params(const Checker& check, const char* y_name, const Tensor& y, const Tensor& h,
                       const SliceArgs& slices, const Tensor& plan, const Tensor& topk_weights,
                       const OptionalTensor& row_map) {
  check.contiguous("topk_weights", topk_weights, {kAny, kAny}, dtype::kFloat32);
  const int64_t rows = y.dim() > 0 ? y.size(0) : kAny;
  const int64_t pairs = topk_weights.size(0) * topk_weights.size(1);
  LoraParams p = moe_params(check, {y_name, y, slices, plan, pairs, row_map}, "h", &h, rows);
  p.row_weight = static_cast<const float*>(topk_weights.data_ptr());
  return p;
}

template <class Backend>
void moe_gate_up_(Tensor y, Tensor x, TensorList a, TensorList b, Tensor table, Tensor plan, IntList widths,
                  IntList cols, int64_t v_width, int64_t top_k, int64_t col_stride, OptionalTensor row_map) {
  const Checker check("moe_gate_up_", y);
  const SliceArgs slices{&a, &b, table, &widths, &cols, col_stride};
  LoraParams p = gate_up_params(check, "y", y, x, slices, plan, top_k, row_map);
  run_linear<Backend>(check, p, y, v_width);
}

template <class Backend>
void moe_down_(Tensor y, Tensor h, TensorList a, TensorList b, Tensor table, Tensor plan, Tensor topk_weights,
               IntList widths, IntList cols, int64_t v_width, OptionalTensor row_map) {
  const Checker check("moe_down_", y);
  const SliceArgs slices{&a, &b, table, &widths, &cols, 1};
  LoraParams p = down_params(check, "y", y, h, slices, plan, topk_weights, row_map);
  run_linear<Backend>(check, p, y, v_width);
}

// The activation of a seam, and h.
void set_act(const Checker& check, GateUpActParams& p, const Tensor& h, const Tensor& y1, int64_t act, double alpha,
             double limit) {
  const SliceSet& set = p.lora.slices;
  if (set.count > 2 || (set.count == 2 && set.width[0] != set.width[1])) {
    check.fail("widths", "[I], or [I, I] where gated", std::to_string(set.count) + " slices of unequal width");
  }
  check.range("act", act, 0, static_cast<int64_t>(Activation::kSwigluOai));
  p.act = static_cast<Activation>(act);
  if (p.act == Activation::kSwigluOai && set.count != 2) check.fail("act", "gated for swiglu_oai", "one slice");
  check.matrix("h", h, p.lora.rows, set.width[0], y1.dtype());
  p.h = h.data_ptr();
  p.h_stride = Checker::pitch(h);
  p.alpha = static_cast<float>(alpha);
  p.limit = static_cast<float>(limit);
}

// The sum of a seam, and out.
void set_sum(const Checker& check, DownReduceParams& p, const Tensor& out, const Tensor& y2, const Tensor& topk_weights,
             bool y2_weighted) {
  if (p.lora.slices.count != 1) {
    check.fail("widths", "one integer", std::to_string(p.lora.slices.count) + " slices");
  }
  p.tokens = topk_weights.size(0);
  p.top_k = static_cast<int32_t>(topk_weights.size(1));
  check.matrix("out", out, p.tokens, p.lora.slices.width[0], y2.dtype());
  p.out = out.data_ptr();
  p.out_stride = Checker::pitch(out);
  p.y_weighted = y2_weighted;
}

template <class Backend>
void moe_gate_up_act(Tensor h, Tensor y1, Tensor x, TensorList a, TensorList b, Tensor table, Tensor plan,
                     IntList widths, IntList cols, int64_t v_width, int64_t top_k, int64_t act, double alpha,
                     double limit, int64_t col_stride, OptionalTensor row_map) {
  const Checker check("moe_gate_up_act", h);
  const SliceArgs slices{&a, &b, table, &widths, &cols, col_stride};
  GateUpActParams p{};
  p.lora = gate_up_params(check, "y1", y1, x, slices, plan, top_k, row_map);
  set_act(check, p, h, y1, act, alpha, limit);
  set_v_width(check, p.lora, v_width);
  if (p.lora.rows == 0 || p.lora.slices.width[0] == 0) return;
  adds_something(check, h, p.lora);  // for its checks: rows without an adapter are written, too
  if (!has_pairs(p.lora)) return;
  const Backend backend(h);
  const OptionalTensor memory = scratch(p.lora, h, backend.gate_up_act_scratch(p));
  backend.gate_up_act(p);
}

template <class Backend>
void moe_down_reduce(Tensor out, Tensor y2, Tensor h, TensorList a, TensorList b, Tensor table, Tensor plan,
                     Tensor topk_weights, IntList widths, IntList cols, int64_t v_width, OptionalTensor row_map,
                     bool y2_weighted) {
  const Checker check("moe_down_reduce", out);
  const SliceArgs slices{&a, &b, table, &widths, &cols, 1};
  DownReduceParams p{};
  p.lora = down_params(check, "y2", y2, h, slices, plan, topk_weights, row_map);
  set_sum(check, p, out, y2, topk_weights, y2_weighted);
  set_v_width(check, p.lora, v_width);
  if (p.tokens == 0 || p.lora.slices.width[0] == 0) return;
  adds_something(check, out, p.lora);  // for its checks: tokens without an adapter are written, too
  const Backend backend(out);
  const OptionalTensor memory = scratch(p.lora, out, backend.down_reduce_scratch(p));
  backend.down_reduce(p);
}

template <class Backend>
void moe_delta(Tensor delta, Tensor x, TensorList a, TensorList b, Tensor table, Tensor plan, IntList widths,
               int64_t v_width, int64_t top_k, OptionalTensor topk_weights, OptionalTensor row_map, OptionalTensor v) {
  const Checker check("moe_delta", delta);
  check.range("top_k", top_k, 0, kMaxInt32);
  check.compute_dtype("x", x);
  check.matrix("x", x, kAny, kAny, x.dtype());
  check.matrix("delta", delta, kAny, kAny, x.dtype());
  int64_t pairs = top_k > 0 ? x.size(0) * top_k : delta.size(0);
  if (topk_weights) {
    check.contiguous("topk_weights", *topk_weights, {kAny, kAny}, dtype::kFloat32);
    const int64_t weights = topk_weights->size(0) * topk_weights->size(1);
    if (top_k > 0 && weights != pairs) {
      check.fail("topk_weights", "one for each of " + std::to_string(pairs) + " pairs", describe(*topk_weights));
    }
    pairs = weights;
  } else if (row_map && top_k == 0) {
    check.fail("topk_weights", "given with a row_map where top_k is 0: they tell the number of pairs", "None");
  }
  const SliceArgs slices{v ? nullptr : &a, &b, table, &widths, nullptr, 1};
  const int64_t x_rows = top_k > 0 ? kAny : delta.size(0);
  LoraParams p = moe_params(check, {"delta", delta, slices, plan, pairs, row_map}, "x", &x, x_rows);
  p.x_div = static_cast<int32_t>(top_k);
  if (topk_weights) p.row_weight = static_cast<const float*>(topk_weights->data_ptr());
  set_v_width(check, p, v_width);
  if (v) {
    check.matrix("v", *v, x.size(0), v_width, dtype::kFloat32);
    p.v = static_cast<float*>(v->data_ptr());
    p.v_stride = Checker::pitch(*v);
    p.v_of_x = true;
  }
  if (!adds_something(check, delta, p)) return;
  const Backend backend(delta);
  const OptionalTensor memory = scratch(p, delta, backend.moe_delta_scratch(p));
  backend.moe_delta(p);
}

template <class Backend>
void moe_act(Tensor h, Tensor y1, Tensor delta, Tensor table, Tensor plan, IntList widths, IntList cols, int64_t act,
             double alpha, double limit, int64_t col_stride, int64_t mapped_pairs) {
  const Checker check("moe_act", h);
  check.range("mapped_pairs", mapped_pairs, 0, kMaxInt32 / 8);
  check.matrix("y1", y1, kAny, kAny, y1.dtype());
  const SliceArgs slices{nullptr, nullptr, table, &widths, &cols, col_stride};
  GateUpActParams p{};
  const OptionalTensor no_map;
  p.lora = moe_params(check, {"y1", y1, slices, plan, y1.size(0), no_map, mapped_pairs}, "", nullptr, 0);
  set_act(check, p, h, y1, act, alpha, limit);
  check.matrix("delta", delta, p.lora.rows, sum_of_widths(p.lora.slices), y1.dtype());
  p.delta = delta.data_ptr();
  p.delta_stride = Checker::pitch(delta);
  if (p.lora.rows > 0 && p.lora.slices.width[0] > 0) Backend(h).moe_act(p);
}

template <class Backend>
void moe_reduce(Tensor out, Tensor y2, Tensor delta, Tensor table, Tensor plan, Tensor topk_weights, IntList widths,
                IntList cols, OptionalTensor row_map, bool y2_weighted) {
  const Checker check("moe_reduce", out);
  check.contiguous("topk_weights", topk_weights, {kAny, kAny}, dtype::kFloat32);
  const SliceArgs slices{nullptr, nullptr, table, &widths, &cols, 1};
  const int64_t pairs = topk_weights.size(0) * topk_weights.size(1);
  DownReduceParams p{};
  p.lora = moe_params(check, {"y2", y2, slices, plan, pairs, row_map}, "", nullptr, 0);
  p.lora.row_weight = static_cast<const float*>(topk_weights.data_ptr());
  set_sum(check, p, out, y2, topk_weights, y2_weighted);
  check.matrix("delta", delta, p.lora.rows, p.lora.slices.width[0], y2.dtype());
  p.delta = delta.data_ptr();
  p.delta_stride = Checker::pitch(delta);
  if (p.tokens > 0 && p.lora.slices.width[0] > 0) Backend(out).moe_reduce(p);
}

template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("plan", &Boxed<&plan<Backend>>::call);
  m.impl("moe_plan", &Boxed<&moe_plan<Backend>>::call);
  m.impl("shrink", &Boxed<&shrink<Backend>>::call);
  m.impl("expand_", &Boxed<&expand_<Backend>>::call);
  m.impl("linear_", &Boxed<&linear_<Backend>>::call);
  m.impl("linear_delta", &Boxed<&linear_delta<Backend>>::call);
  m.impl("add_delta_", &Boxed<&add_delta_<Backend>>::call);
  m.impl("embedding_", &Boxed<&embedding_<Backend>>::call);
  m.impl("moe_gate_up_", &Boxed<&moe_gate_up_<Backend>>::call);
  m.impl("moe_down_", &Boxed<&moe_down_<Backend>>::call);
  m.impl("moe_gate_up_act", &Boxed<&moe_gate_up_act<Backend>>::call);
  m.impl("moe_down_reduce", &Boxed<&moe_down_reduce<Backend>>::call);
  m.impl("moe_delta", &Boxed<&moe_delta<Backend>>::call);
  m.impl("moe_act", &Boxed<&moe_act<Backend>>::call);
  m.impl("moe_reduce", &Boxed<&moe_reduce<Backend>>::call);
}

}  // namespace
}  // namespace polylora::ops

STABLE_TORCH_LIBRARY_IMPL(polylora, CPU, m) { polylora::ops::register_ops<polylora::ops::CpuBackend>(m); }
STABLE_TORCH_LIBRARY_IMPL(polylora_meta, Meta, m) { polylora::ops::register_ops<polylora::ops::MetaBackend>(m); }

#ifdef POLYLORA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(polylora, CUDA, m) { polylora::ops::register_ops<polylora::ops::CudaBackend>(m); }
#endif
