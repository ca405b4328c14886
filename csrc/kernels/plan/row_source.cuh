// Where the group of a row comes from: an id a row, or MoE's experts, slots and maps.
#pragma once

#include "polylora/params.h"

namespace polylora::cuda {

/// Rows of a dense or an MoE plan. One type for both, so that the kernels are compiled once.
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

  /// Groups of the rows `first`, `first` + kApart, ...; of those from `end` on, something below 0. Adds up the ids that
  /// are out of range. A latency a step, not a row: what the rows of a thread read does not wait for each other, and a
  /// slot does not wait for its expert.
  template <int kApart, int kRows>
  __device__ __forceinline__ void load(int64_t first, int64_t end, int32_t (&group)[kRows], int32_t& invalid) const {
    int32_t pair[kRows], id[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      pair[i] = first + kApart * i < end ? static_cast<int32_t>(first + kApart * i) : kNone;
    if (!is_moe) {
      load_ids(pair, groups, id);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        invalid += id[i] == kOutOfRange;
        group[i] = id[i] >= 0 ? id[i] : kNoAdapter;
      }
      return;
    }
    if (p.row_map) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (pair[i] >= 0) pair[i] = checked(p.row_map[pair[i]], p.pairs);
      }
    }
    load_ids(pair, p.global_experts, id);
    int32_t slot[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t token = static_cast<uint32_t>(pair[i]) / static_cast<uint32_t>(p.top_k);
      slot[i] = pair[i] >= 0 ? p.token_slots[token] : kNone;
    }
    if (p.expert_map) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (id[i] >= 0) id[i] = checked(p.expert_map[id[i]], p.experts);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t in_slots = checked(slot[i], p.slots);
      const int32_t expert = pair[i] >= 0 ? id[i] : pair[i];  // the first that is out of range counts
      const int32_t judged = expert >= 0 ? in_slots : expert;
      invalid += judged == kOutOfRange;
      group[i] = expert < 0     ? kNoRow
                 : in_slots < 0 ? kNoAdapter
                                : static_cast<int32_t>(moe_group(in_slots, expert, p.experts));
    }
  }

 private:
  // What an id is that names nothing: -1, or out of range.
  static constexpr int32_t kNone = -1, kOutOfRange = -2;

  template <typename Id>
  __device__ __forceinline__ static int32_t checked(Id id, int64_t limit) {
    if (id >= 0 && id < limit) return static_cast<int32_t>(id);
    return id == -1 ? kNone : kOutOfRange;
  }

  template <int kRows>
  __device__ __forceinline__ void load_ids(const int32_t (&at)[kRows], int64_t limit, int32_t (&id)[kRows]) const {
    if (p.ids_are_int64) {
      load_ids_of<int64_t>(at, limit, id);
    } else {
      load_ids_of<int32_t>(at, limit, id);
    }
  }
  template <typename Id, int kRows>
  __device__ __forceinline__ void load_ids_of(const int32_t (&at)[kRows], int64_t limit, int32_t (&id)[kRows]) const {
    Id read[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) read[i] = at[i] >= 0 ? static_cast<const Id*>(p.topk_ids)[at[i]] : Id{kNone};
#pragma unroll
    for (int i = 0; i < kRows; ++i) id[i] = checked(read[i], limit);
  }
};

}  // namespace polylora::cuda
