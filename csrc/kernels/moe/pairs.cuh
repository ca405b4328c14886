// What the kernels that sum over a token's experts know of its pairs.
#pragma once

#include "common/rows.cuh"

namespace polylora::cuda {

/// Where it stands. Small: a block's first reads of its parameters miss every cache.
struct PairSource {
  const int32_t* header;
  const int32_t* row_group;  // [rows]
  const int32_t* pair_pos;   // [pairs]; null: rows are pairs
  const float* weight;       // [pairs]
  int64_t rows;
  int32_t plan_rows, plan_groups, plan_pairs;  // that the plan must have been made for
};

inline PairSource pair_source(const DownReduceParams& d) {
  const PlanView& plan = d.lora.plan;
  return {plan.header, plan.row_group, plan.pair_pos, d.lora.row_weight,
          d.lora.rows, plan.rows,      plan.groups,   plan.pairs};
}

struct TokenPair {
  int32_t row;    // of y2; -1: contributes nothing
  int32_t group;  // kNoAdapter: y2 alone
  float weight;
};

/// May be called before griddepcontrol.wait where the kernel before is this call's moe_shrink: what it reads was there
/// before that let the next kernel start.
__device__ __forceinline__ TokenPair load_pair(const PairSource& from, int64_t pair) {
  // reads that need not wait for each other first, what they mean afterwards
  const float weight = from.weight[pair];
  const int64_t mapped = from.pair_pos != nullptr ? from.pair_pos[pair] : pair;
  const bool inside = mapped >= 0 && mapped < from.rows;
  int32_t group = from.row_group[inside ? mapped : 0];
  int64_t row = mapped;
  if (!load_head(from.header, from.plan_rows, from.plan_groups, from.plan_pairs).fits) {
    row = pair;
    group = kNoAdapter;
  }
  if (row < 0 || row >= from.rows || group == kNoRow) return {-1, kNoAdapter, 0.f};
  return {static_cast<int32_t>(row), group, weight};
}

}  // namespace polylora::cuda
