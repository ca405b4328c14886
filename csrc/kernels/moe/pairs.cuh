// What the kernels that sum over a token's experts know of its pairs.
#pragma once

#include "common/rows.cuh"

namespace polylora::cuda {

/// A token's pairs that are handled at once.
inline constexpr int kPairs = 32;

struct TokenPairs {
  int32_t row[kPairs];    // of y2; -1: contributes nothing
  int32_t group[kPairs];  // kNoAdapter: y2 alone
  float weight[kPairs];
};

/// Of pairs [first, first + kPairs) of a token, a thread each; the block syncs afterwards. May be called before
/// griddepcontrol.wait: what it reads was there before this call's moe_shrink let the next kernel start.
__device__ __forceinline__ void load_pairs(const DownReduceParams& d, int64_t token, int first, TokenPairs& to) {
  const int j = static_cast<int>(threadIdx.x);
  if (j >= kPairs) return;
  const PlanView& plan = d.lora.plan;
  to.row[j] = -1;
  to.group[j] = kNoAdapter;
  if (first + j >= d.top_k) return;
  const int64_t pair = token * d.top_k + first + j;
  // reads that need not wait for each other first, what they mean afterwards
  const float weight = d.lora.row_weight[pair];
  const int64_t mapped = plan.pair_pos != nullptr ? plan.pair_pos[pair] : pair;
  const bool inside = mapped >= 0 && mapped < d.lora.rows;
  int32_t group = plan.row_group[inside ? mapped : 0];
  int64_t row = mapped;
  if (!load_head(plan).fits) {
    row = pair;
    group = kNoAdapter;
  }
  if (row < 0 || row >= d.lora.rows || group == kNoRow) return;
  to.row[j] = static_cast<int32_t>(row);
  to.group[j] = group;
  to.weight[j] = weight;
}

}  // namespace polylora::cuda
