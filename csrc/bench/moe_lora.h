// The library's ops in an MoE layer, put together as one of --seams, and each by itself.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "floor.h"
#include "moe_base.h"
#include "moe_options.h"
#include "moe_problem.h"
#include "side_stream.h"
#include "timing.h"

namespace polylora::bench {

/// An op by itself: call i takes routing i and a plan of that.
struct MoeOp {
  std::string name;
  Call run;
  Traffic traffic;
};

class MoeLora {
 public:
  /// `base` null: there are no GEMMs between the ops.
  MoeLora(const MoeProblem& problem, const MoeBase* base, Seams seams);

  Seams seams() const { return seams_; }

  /// The scratch that the path in force wants. Throws what the ops would where that path does not serve.
  void reserve();

  /// The layer with LoRA. `call`: of problem.layers(). May be captured.
  void forward(int64_t call, cudaStream_t stream) const;

  /// The ops by themselves, over y1, h and y2 as they are. Makes a plan for each routing.
  std::vector<MoeOp> alone(cudaStream_t stream);

  // what checks read
  const int32_t* plan() const { return plan_.as<int32_t>(); }  // of the last forward
  /// y1 and y2 before the ops of Seams::kAdded added to them, in the last forward.
  char* y1_before() const { return y1_before_.as<char>(); }
  char* y2_before() const { return y2_before_.as<char>(); }
  /// From now on forwards of Seams::kAdded keep them.
  void keep_before(bool keep);
  /// NaN and -1 in the plan, the scratch and what is kept.
  void poison(cudaStream_t stream) const;

 private:
  void forward_beside(int64_t call, cudaStream_t stream) const;
  void forward_fused(int64_t call, cudaStream_t stream) const;
  void forward_added(int64_t call, cudaStream_t stream) const;

  // the ops; `plan`: of the call's routing
  void make_plan(int64_t call, int32_t* plan, cudaStream_t stream) const;
  void up_delta(int64_t call, const int32_t* plan, cudaStream_t stream) const;
  void act(int64_t call, const int32_t* plan, cudaStream_t stream) const;
  void down_delta(int64_t call, const int32_t* plan, cudaStream_t stream) const;
  void reduce(int64_t call, const int32_t* plan, cudaStream_t stream) const;
  void gate_up_act(int64_t call, const int32_t* plan, cudaStream_t stream) const;
  void down_reduce(int64_t call, const int32_t* plan, cudaStream_t stream) const;
  void gate_up_add(int64_t call, const int32_t* plan, cudaStream_t stream) const;
  void down_add(int64_t call, const int32_t* plan, cudaStream_t stream) const;

  LoraParams up(int64_t call, const int32_t* plan) const;
  LoraParams down(int64_t call, const int32_t* plan) const;
  LoraParams up_delta_params(int64_t call, const int32_t* plan) const;
  LoraParams down_delta_params(int64_t call, const int32_t* plan) const;
  LoraParams down_add_params(int64_t call, const int32_t* plan) const;
  GateUpActParams act_params(const LoraParams& lora) const;
  DownReduceParams reduce_params(const LoraParams& lora) const;
  int32_t* plan_of(int64_t call) const;

  const MoeProblem& problem_;
  const MoeBase* base_;
  Seams seams_;
  SideStream side_{SideStream::Order::kFirst};
  DeviceBuffer plan_;       // of the forward at hand
  DeviceBuffer plans_;      // [routings, plan_pitch_], of ops alone
  int64_t plan_pitch_ = 0;  // words
  DeviceBuffer scratch_;
  DeviceBuffer ones_;  // [pairs]: weights where the base multiplies them in with its sum
  bool keeps_before_ = false;
  DeviceBuffer y1_before_, y2_before_;
};

}  // namespace polylora::bench
