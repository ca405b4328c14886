// Where the group of a row comes from: an id a row, or MoE's experts, slots and maps.
#pragma once

#include "polylora/params.h"

namespace polylora::cuda {

/// Rows of a dense or an MoE plan. One type for both, so that the sort is compiled once.
struct RowSource {
  MoePlanParams p;  // dense: topk_ids = group ids, and nothing else but rows and plan
  int64_t groups;
  bool is_moe;

  static RowSource dense(const PlanParams& dense) {
    MoePlanParams p{};
    p.plan = dense.plan;
    p.topk_ids = dense.group_ids;
    p.ids_are_int64 = dense.ids_are_int64;
    p.rows = dense.rows;
    return {p, dense.groups, false};
  }
  static RowSource moe(const MoePlanParams& p) { return {p, int64_t{p.slots} * p.experts, true}; }

  /// Group of `row`, kNoAdapter or kNoRow; sets `invalid` when an id was out of range.
  __device__ __forceinline__ int32_t group(int64_t row, bool& invalid) const {
    if (!is_moe) {
      const int64_t id = load_id(row);
      if (id >= 0 && id < groups) return static_cast<int32_t>(id);
      invalid = id != kNoAdapter;
      return kNoAdapter;
    }
    int64_t pair = row;
    if (p.row_map) {
      pair = p.row_map[row];
      if (pair < 0 || pair >= p.pairs) {
        invalid = pair != -1;
        return kNoRow;
      }
    }
    int64_t expert = load_id(pair);
    if (expert < 0 || expert >= p.global_experts) {
      invalid = expert != -1;
      return kNoRow;
    }
    if (p.expert_map) {
      expert = p.expert_map[expert];
      if (expert < 0 || expert >= p.experts) {
        invalid = expert != -1;
        return kNoRow;
      }
    }
    const int32_t slot = p.token_slots[pair / p.top_k];
    if (slot < 0 || slot >= p.slots) {
      invalid = slot != kNoAdapter;
      return kNoAdapter;
    }
    return static_cast<int32_t>(moe_group(slot, expert, p.experts));
  }

 private:
  __device__ __forceinline__ int64_t load_id(int64_t i) const {
    return p.ids_are_int64 ? static_cast<const int64_t*>(p.topk_ids)[i]
                           : int64_t{static_cast<const int32_t*>(p.topk_ids)[i]};
  }
};

}  // namespace polylora::cuda
