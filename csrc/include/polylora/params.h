// What a launcher is told: plain structs, every pointer with its shape behind it. No torch type, no CUDA type, so
// that the CPU path, the CUDA path and the C++ benchmarks share them.
#pragma once

#include <cstdint>

#include "polylora/plan_layout.h"
#include "polylora/slice_table.h"

namespace polylora {

enum class DType : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

enum class Activation : int32_t {
  kSilu = 0,
  kGelu = 1,  // erf
  kGeluTanh = 2,
  kRelu2 = 3,     // max(x, 0)^2
  kSwigluOai = 4  // gated only: c * sigmoid(alpha * c) * (clamp(u, -limit, limit) + 1), c = min(g, limit)
};

/// The slices of one fused module: its table, weights and outputs.
struct SliceSet {
  const SliceEntry* table;         // [groups, count]
  int32_t groups;                  //
  int32_t count;                   // slices, 1..kMaxSlices
  const void* a[kMaxSlices];       // [a_rows, k] each, row pitch a_stride; may all be the same arena
  int64_t a_stride[kMaxSlices];    // elements
  int64_t a_rows[kMaxSlices];      // -1: the op has no A
  const void* b[kMaxSlices];       // [b_elements] each; may all be the same arena
  int64_t b_elements[kMaxSlices];  // -1: the op has no B
  int32_t width[kMaxSlices];       // outputs of the slice
  int64_t col[kMaxSlices];         // y column of its output 0
  int32_t col_stride;              // output n stands in column col + n * col_stride (2: gate and up interleaved)
};

/// Outputs of all slices: columns of a matrix in which they stand slice after slice.
inline int64_t sum_of_widths(const SliceSet& slices) {
  int64_t sum = 0;
  for (int32_t s = 0; s < slices.count; ++s) sum += slices.width[s];
  return sum;
}

/// Whether an entry with a rank above 0 stays inside what the call was given: A, B and the columns of v. Tables are
/// device memory that a caller may have filled by hand or for another call; an entry that fails counts as absent in the
/// kernels and is refused on the CPU. `a_rows_used`: rank, or the vocabulary where A is [tokens, rank]. a_rows and
/// b_elements are negative in an op without A or B; an op without v passes a v_width of INT32_MAX.
POLYLORA_HD inline bool entry_fits(const SliceEntry& entry, int64_t a_rows_used, int64_t a_rows, int64_t width,
                                   int64_t b_elements, int64_t v_width) {
  if (entry.rank < 1 || entry.rank > kMaxRank || entry.a_row < 0 || entry.v_col < 0) return false;
  if (entry.b_offset < 0 || entry.b_stride < 0 || entry.v_col + int64_t{entry.rank} > v_width) return false;
  if (a_rows >= 0 && entry.a_row + a_rows_used > a_rows) return false;
  return b_elements < 0 || width == 0 || (width - 1) * entry.b_stride + entry.rank <= b_elements - entry.b_offset;
}

/// Of a plan's runs, those that a kernel is to work on.
enum class Runs : int32_t { kAll, kShort, kLong };

/// A plan, read.
struct PlanView {
  const int32_t* header;     // [kPlanHeaderWords]
  const int32_t* row_group;  // [rows]
  const int32_t* order;      // [active rows]
  const int32_t* run_group;  // [runs]
  const int32_t* run_start;  // [runs + 1]
  const Tile* tile;          // [tiles]
  const Tile* wide_tile;     // [wide tiles]
  const int32_t* pair_pos;   // [pairs], null without a row map
  int64_t max_tiles;         // capacities, for the size of a grid
  int64_t max_wide_tiles;    //
  int32_t rows;              // what the caller's tensors ask of the plan; a plan made for anything else has no
  int32_t groups;            //   active rows (its sections lie elsewhere, its groups are another table's)
  int32_t pairs;             //
  Runs runs;
};

inline PlanView plan_view(const int32_t* plan, int64_t rows, int64_t groups, int64_t pairs) {
  const PlanLayout at = plan_layout(rows, groups, pairs);
  return PlanView{plan,
                  plan + at.row_group,
                  plan + at.order,
                  plan + at.run_group,
                  plan + at.run_start,
                  reinterpret_cast<const Tile*>(plan + at.tile),
                  reinterpret_cast<const Tile*>(plan + at.wide_tile),
                  pairs > 0 ? plan + at.pair_pos : nullptr,
                  plan_max_tiles(rows, groups),
                  plan_max_tiles(rows, groups, kWideTileRows),
                  static_cast<int32_t>(rows),
                  static_cast<int32_t>(groups),
                  static_cast<int32_t>(pairs),
                  Runs::kAll};
}

/// The same with decode's tiles of short runs alone, and prefill's of the others alone.
inline PlanView short_runs(PlanView plan) {
  plan.runs = Runs::kShort;
  plan.max_tiles = plan_max_short_tiles(plan.rows, plan.groups);
  return plan;
}
inline PlanView long_runs(PlanView plan) {
  plan.runs = Runs::kLong;
  plan.max_wide_tiles = plan_max_long_tiles(plan.rows, plan.groups);
  return plan;
}

/// Whether a plan in host memory was made for the call's rows, groups and pairs. Kernels ask the same in 16-byte loads.
inline bool plan_fits(const PlanView& plan) {
  return plan.header[kPlanVersion] == kPlanVersionValue && plan.header[kPlanRows] == plan.rows &&
         plan.header[kPlanGroups] == plan.groups && plan.header[kPlanPairs] == plan.pairs;
}

/// plan: group ids in, plan out.
struct PlanParams {
  int32_t* plan;          // [plan_layout(rows, groups, 0).words]
  const void* group_ids;  // [rows] int32 or int64; -1 = no adapter
  bool ids_are_int64;     //
  int64_t rows;           //
  int64_t groups;         //
};

/// moe_plan: group = slot * experts + expert of every position. Without a row map position = pair = token * top_k + j.
struct MoePlanParams {
  int32_t* plan;               // [plan_layout(rows, slots * experts, row_map ? pairs : 0).words]
  const void* topk_ids;        // [tokens, top_k] int32 or int64, contiguous; -1 = no expert
  bool ids_are_int64;          //
  const int32_t* token_slots;  // [tokens]; -1 = no adapter
  const int32_t* expert_map;   // [global_experts] to local expert or -1; null: the identity
  const int32_t* row_map;      // [rows] position to pair or -1; null: rows = pairs
  int64_t rows;                // positions
  int64_t pairs;               // tokens * top_k
  int32_t top_k;               //
  int32_t slots;               //
  int32_t experts;             // local experts
  int32_t global_experts;      // ids in topk_ids lie below it; = experts without an expert map
};

/// shrink, expand and linear, dense and MoE. Row p of the plan is row p of y and v. pair(p) = row_map ? row_map[p] : p.
struct LoraParams {
  DType dtype;              // of x, y, A and B
  int64_t rows;             // of the plan
  int64_t k;                // input width
  const void* x;            // [x_rows, k], row pitch x_stride
  int64_t x_stride;         //
  int32_t x_div;            // 0: row p reads x row p. Else it reads x row pair(p) / x_div: MoE gate/up, x_div = top_k
  void* y;                  // [rows, ...], row pitch y_stride
  int64_t y_stride;         //
  float* v;                 // [rows, v_width], row pitch v_stride; unscaled x A^T; of shrink and expand alone
  int64_t v_stride;         //
  bool v_of_x;              // moe_delta: v is given, a row for each of x: [x_rows, v_width]; no x and no A (a_rows -1)
  int32_t v_width;          //
  void* scratch;            // [bytes as *_scratch says], 16-byte aligned
  const int32_t* row_map;   // [rows] position to pair, or null: the identity
  const float* row_weight;  // [pairs] top-k weight of pair(p), multiplies its delta; or null
  SliceSet slices;
  PlanView plan;
};

/// Whether it is a half of an MoE layer: rows of x that pairs share, or a weight a pair.
inline bool is_moe(const LoraParams& p) { return p.x_div != 0 || p.row_weight != nullptr || p.row_map != nullptr; }

/// add_delta: y += delta, of rows with an adapter; x, A and B are unused.
struct AddDeltaParams {
  LoraParams lora;       //
  const void* delta;     // [rows, sum of widths], slice after slice, row pitch delta_stride
  int64_t delta_stride;  //
};

/// embedding: A is looked up by token id instead of multiplied. A[j, t] = a + a_row * a_stride + t * token_stride +
/// j * rank_stride. Ids outside [0, vocab) read nothing and leave their row of y untouched.
struct EmbeddingParams {
  LoraParams lora;             // x and v unused
  const void* token_ids;       // [rows] int32 or int64
  bool ids_are_int64;          //
  int64_t vocab;               //
  bool token_major;            // A is [tokens, rank]
  int64_t token_stride;        // elements
  int64_t rank_stride;         // elements
  int32_t a_cols[kMaxSlices];  // of A where it is [tokens, rank]: no entry has more ranks; else 0
};

/// moe_gate_up_act: h = act(y1 + delta); lora.y is y1 and is only read. One slice: act(u). Two: act(g) * u.
/// Every row but those of kNoRow is written. moe_act: the same with a delta that moe_delta made; x, A and B unused.
struct GateUpActParams {
  LoraParams lora;       //
  void* h;               // [rows, width[0]], row pitch h_stride
  int64_t h_stride;      //
  Activation act;        //
  float alpha, limit;    // kSwigluOai only
  const void* delta;     // moe_act: [rows, sum of widths], slice after slice, row pitch delta_stride; else null
  int64_t delta_stride;  //
};

/// moe_down_reduce: out[t] = sum_j w[t, j] * (y2[t, j] + delta); lora.y is y2 and is only read. Pairs of kNoRow
/// contribute nothing. lora.row_weight holds w. moe_reduce: the same with a delta that moe_delta made, weights and all.
struct DownReduceParams {
  LoraParams lora;       //
  void* out;             // [tokens, width[0]], row pitch out_stride
  int64_t out_stride;    //
  int64_t tokens;        //
  int32_t top_k;         //
  bool y_weighted;       // y2 already carries its top-k weight; w multiplies the delta only
  const void* delta;     // moe_reduce: [rows, width[0]], row pitch delta_stride; else null
  int64_t delta_stride;  //
};

}  // namespace polylora
