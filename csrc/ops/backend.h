// Where an op runs: the CPU functions, the CUDA launchers or nowhere, behind the same names.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>

#include "boxing.h"
#include "polylora/cpu.h"
#include "polylora/params.h"

#ifdef POLYLORA_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "polylora/cuda.h"

// Weak: CPU builds of torch do not have it, and the library must load there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace polylora::ops {

/// Tensors without data (meta): an op is its checks. The fakes of python/polylora/ops.py are this.
struct MetaBackend {
  explicit MetaBackend(const Tensor&) {}

  void plan(const PlanParams&) const {}
  void moe_plan(const MoePlanParams&) const {}
  void shrink(const LoraParams&) const {}
  void expand(const LoraParams&) const {}
  int64_t shrink_scratch(const LoraParams&) const { return 0; }
  int64_t linear_scratch(const LoraParams&) const { return 0; }
  void linear(const LoraParams&) const {}
  int64_t linear_delta_scratch(const LoraParams&) const { return 0; }
  void linear_delta(const LoraParams&) const {}
  void add_delta(const AddDeltaParams&) const {}
  int64_t embedding_scratch(const EmbeddingParams&) const { return 0; }
  void embedding(const EmbeddingParams&) const {}
  int64_t gate_up_act_scratch(const GateUpActParams&) const { return 0; }
  void gate_up_act(const GateUpActParams&) const {}
  int64_t down_reduce_scratch(const DownReduceParams&) const { return 0; }
  void down_reduce(const DownReduceParams&) const {}
  int64_t moe_delta_scratch(const LoraParams&) const { return 0; }
  void moe_delta(const LoraParams&) const {}
  void moe_act(const GateUpActParams&) const {}
  void moe_reduce(const DownReduceParams&) const {}
};

struct CpuBackend {
  explicit CpuBackend(const Tensor&) {}

  static void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    if (n > 0) torch::stable::parallel_for(0, n, grain, body);
  }

  void plan(const PlanParams& p) const { cpu::plan(p, parallel_for); }
  void moe_plan(const MoePlanParams& p) const { cpu::moe_plan(p, parallel_for); }
  void shrink(const LoraParams& p) const { cpu::shrink(p, parallel_for); }
  void expand(const LoraParams& p) const { cpu::expand(p, parallel_for); }
  int64_t shrink_scratch(const LoraParams&) const { return 0; }
  int64_t linear_scratch(const LoraParams& p) const { return p.rows * p.v_width * int64_t{sizeof(float)}; }
  void linear(const LoraParams& p) const { cpu::expand(shrunk(p), parallel_for); }
  int64_t linear_delta_scratch(const LoraParams& p) const { return linear_scratch(p); }
  void linear_delta(const LoraParams& p) const { cpu::delta(shrunk(p), -0.0f, parallel_for); }
  void add_delta(const AddDeltaParams& d) const { cpu::add_delta(d, parallel_for); }
  int64_t embedding_scratch(const EmbeddingParams&) const { return 0; }
  void embedding(const EmbeddingParams& p) const { cpu::embedding(p, parallel_for); }
  int64_t gate_up_act_scratch(const GateUpActParams& g) const { return linear_scratch(g.lora); }
  void gate_up_act(const GateUpActParams& g) const {
    GateUpActParams with_v = g;
    with_v.lora = shrunk(g.lora);
    cpu::gate_up_act(with_v, parallel_for);
  }
  int64_t down_reduce_scratch(const DownReduceParams& d) const { return linear_scratch(d.lora); }
  void down_reduce(const DownReduceParams& d) const {
    DownReduceParams with_v = d;
    with_v.lora = shrunk(d.lora);
    cpu::down_reduce(with_v, parallel_for);
  }
  int64_t moe_delta_scratch(const LoraParams& p) const { return p.v_of_x ? 0 : linear_scratch(p); }
  void moe_delta(const LoraParams& p) const { cpu::delta(p.v_of_x ? p : shrunk(p), 0.0f, parallel_for); }
  void moe_act(const GateUpActParams& g) const { cpu::moe_act(g, parallel_for); }
  void moe_reduce(const DownReduceParams& d) const { cpu::moe_reduce(d, parallel_for); }

 private:
  // With v in the call's scratch.
  static LoraParams shrunk(const LoraParams& p) {
    LoraParams with_v = p;
    with_v.v = static_cast<float*>(p.scratch);
    with_v.v_stride = p.v_width;
    if (p.rows > 0 && p.slices.groups > 0 && p.plan.header[kPlanRuns] > 0) cpu::shrink(with_v, parallel_for);
    return with_v;
  }
};

#ifdef POLYLORA_WITH_CUDA
/// Runs on the current stream of the tensor's device.
class CudaBackend {
 public:
  explicit CudaBackend(const Tensor& like) {
    if (aoti_torch_get_current_cuda_stream == nullptr) {
      throw std::runtime_error("polylora: this torch has no CUDA support, yet a CUDA tensor came");
    }
    // torch's guard costs several calls even where it has nothing to switch
    int current = -1;
    if (cudaGetDevice(&current) != cudaSuccess || current != like.device_index()) guard_.emplace(like.device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void plan(const PlanParams& p) const { check("plan", cuda::plan(p, stream_)); }
  void moe_plan(const MoePlanParams& p) const { check("moe_plan", cuda::moe_plan(p, stream_)); }
  void shrink(const LoraParams& p) const { check("shrink", cuda::shrink(p, stream_)); }
  void expand(const LoraParams& p) const { check("expand", cuda::expand(p, stream_)); }
  int64_t shrink_scratch(const LoraParams& p) const { return scratch("shrink", cuda::shrink_scratch, p); }
  int64_t linear_scratch(const LoraParams& p) const { return scratch("linear", cuda::linear_scratch, p); }
  void linear(const LoraParams& p) const { check("linear", cuda::linear(p, stream_)); }
  int64_t linear_delta_scratch(const LoraParams& p) const {
    return scratch("linear_delta", cuda::linear_delta_scratch, p);
  }
  void linear_delta(const LoraParams& p) const { check("linear_delta", cuda::linear_delta(p, stream_)); }
  void add_delta(const AddDeltaParams& p) const { check("add_delta", cuda::add_delta(p, stream_)); }
  int64_t embedding_scratch(const EmbeddingParams& p) const { return scratch("embedding", cuda::embedding_scratch, p); }
  void embedding(const EmbeddingParams& p) const { check("embedding", cuda::embedding(p, stream_)); }
  int64_t gate_up_act_scratch(const GateUpActParams& p) const {
    return scratch("gate_up_act", cuda::gate_up_act_scratch, p);
  }
  void gate_up_act(const GateUpActParams& p) const { check("gate_up_act", cuda::gate_up_act(p, stream_)); }
  int64_t down_reduce_scratch(const DownReduceParams& p) const {
    return scratch("down_reduce", cuda::down_reduce_scratch, p);
  }
  void down_reduce(const DownReduceParams& p) const { check("down_reduce", cuda::down_reduce(p, stream_)); }
  int64_t moe_delta_scratch(const LoraParams& p) const { return scratch("moe_delta", cuda::moe_delta_scratch, p); }
  void moe_delta(const LoraParams& p) const { check("moe_delta", cuda::moe_delta(p, stream_)); }
  void moe_act(const GateUpActParams& p) const { check("moe_act", cuda::moe_act(p, stream_)); }
  void moe_reduce(const DownReduceParams& p) const { check("moe_reduce", cuda::moe_reduce(p, stream_)); }

 private:
  template <typename Params>
  static int64_t scratch(const char* kernel, cudaError_t (*ask)(const Params&, int64_t&), const Params& params) {
    int64_t bytes = 0;
    check(kernel, ask(params, bytes));
    return bytes;
  }

  static void check(const char* kernel, cudaError_t error) {
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string("polylora: launching ") + kernel + " failed: " + cudaGetErrorName(error) +
                               " (" + cudaGetErrorString(error) + ")");
    }
  }

  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};
#endif

}  // namespace polylora::ops
