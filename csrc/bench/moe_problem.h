// An MoE case in device memory: adapters in as many pools as it takes to keep them cold, routings, buffers between the
// stages, and what the library's ops are told of them.
#pragma once

#include <cstdint>
#include <vector>

#include "device.h"
#include "moe_cases.h"
#include "moe_rotation.h"
#include "moe_routing.h"
#include "polylora/params.h"

namespace polylora::bench {

/// Where the ops find a call's routing.
struct RoutingView {
  const int32_t* topk_ids;    // [rows, top_k]
  const float* topk_weights;  // [rows, top_k]
  const int32_t* slots;       // [rows]
  const int32_t* row_map;     // [pairs] position to pair
  const int32_t* position;    // [pairs] pair to position
  const int32_t* group;       // [pairs] slot * experts + expert, by position: for checks alone
};

class MoeProblem {
 public:
  /// Without `with_base` there are no base weights; y1 and y2 are then random. Throws CudaError where memory ends.
  MoeProblem(const MoeCase& c, bool with_base, const Device& device, cudaStream_t stream);

  const MoeCase& shape() const { return case_; }
  bool has_base() const { return has_base_; }
  bool cold() const { return pools_needed_.cold; }
  int64_t pools() const { return pools_needed_.pools; }
  int64_t layers() const { return rotation_.layers; }      // routings of forwards, the first ones
  int64_t routings() const { return rotation_.routings; }  // of ops alone: all

  const MoeRouting& routing(int64_t call) const { return routings_[at(call)]; }
  RoutingView view(int64_t call) const;

  /// A and B of the (adapter, expert) pairs that a call hits, mean over the routings of forwards: of gate and up, and
  /// of down.
  double up_weight_bytes() const { return groups_hit_ * static_cast<double>(case_.up_bytes()); }
  double down_weight_bytes() const { return groups_hit_ * static_cast<double>(case_.down_bytes()); }

  int64_t plan_words() const { return plan_layout(case_.pairs(), case_.groups(), case_.pairs()).words; }
  PlanView plan_of(const int32_t* plan) const { return plan_view(plan, case_.pairs(), case_.groups(), case_.pairs()); }

  /// The plan's arguments, and those of the two halves: x to y1, and h to y2. `plan`: [plan_words]. Callers set what
  /// else their op takes.
  MoePlanParams plan_params(int64_t call, int32_t* plan) const;
  LoraParams up_params(int64_t call, const int32_t* plan) const;
  LoraParams down_params(int64_t call, const int32_t* plan) const;

  /// NaN in all that a forward writes; without a base y1 and y2 as they were at first.
  void poison(cudaStream_t stream) const;

  // matrices of bf16, contiguous
  char* x() const { return x_.as<char>(); }                    // [rows, H]
  char* sorted_x() const { return sorted_x_.as<char>(); }      // [pairs, H], by position as all that follows
  char* y1() const { return y1_.as<char>(); }                  // [pairs, slices * I]
  char* h() const { return h_.as<char>(); }                    // [pairs, I]
  char* y2() const { return y2_.as<char>(); }                  // [pairs, H]
  char* out() const { return out_.as<char>(); }                // [rows, H]
  char* up_delta() const { return up_delta_.as<char>(); }      // [pairs, slices * I]
  char* down_delta() const { return down_delta_.as<char>(); }  // [pairs, H]
  char* w13() const { return w13_.as<char>(); }                // [experts, slices * I, H]
  char* w2() const { return w2_.as<char>(); }                  // [experts, H, I]

  /// Columns of y1: slice s, output n stands in s * slice_step() + n * col_stride().
  int64_t slice_step() const { return case_.model.interleaved ? 1 : case_.model.inner; }
  int64_t col_stride() const { return case_.model.interleaved ? 2 : 1; }

 private:
  // One half of a pool, as SGLang lays it out: A [groups, slices * rank, k], B [groups, slices * width, rank].
  struct Half {
    DeviceBuffer a, b;
    DeviceBuffer table;  // [groups, slices]
  };
  struct Pool {
    Half up, down;
  };

  size_t at(int64_t call) const { return static_cast<size_t>(call % routings()); }
  void draw(int64_t l2_bytes);
  void upload_routings();
  void make_pools(cudaStream_t stream);
  void make_buffers(cudaStream_t stream);
  Half make_half(int64_t slices, int64_t k, int64_t width, uint64_t seed, cudaStream_t stream) const;
  LoraParams half_params(const Half& half, int64_t slices, int64_t k, int64_t width, int64_t call,
                         const int32_t* plan) const;

  MoeCase case_;
  bool has_base_;
  MoePools pools_needed_;
  MoeRotation rotation_;
  double groups_hit_ = 0;  // of a call, mean
  std::vector<MoeRouting> routings_;
  std::vector<Pool> pools_;
  int64_t pitch_ = 0;  // words of a routing's part of what follows
  DeviceBuffer topk_ids_, topk_weights_, slots_, row_map_, position_, group_;  // [routings, pitch]
  DeviceBuffer x_, sorted_x_, y1_, h_, y2_, out_, up_delta_, down_delta_, w13_, w2_;
};

}  // namespace polylora::bench
