// moe_gate_up_act and moe_act: h = act(y1 + delta), general path.
//
// A block takes one position and 256 outputs of h; a thread takes one output, gate and up. Positions without an
// adapter pass through the activation alone; positions of kNoRow are left alone.
#include "common/row_product.cuh"
#include "moe/paths.h"
#include "polylora/activation.h"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) gate_up_act_general(const __grid_constant__ GateUpActParams g) {
  const LoraParams& p = g.lora;
  const int64_t row = blockIdx.x;
  const int64_t n = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const int32_t group = group_of(p.plan, row);
  if (group == kNoRow) return;
  const bool has_output = n < p.slices.width[0];

  __shared__ float smem_v[kMaxRank];
  float value[2] = {};  // gate and up, or up alone
  for (int slice = 0; slice < p.slices.count; ++slice) {
    float sum = 0.f;
    if (group >= 0 && g.delta != nullptr) {
      if (has_output) {
        const T* delta = static_cast<const T*>(g.delta) + row * g.delta_stride;
        sum = to_float(delta[int64_t{slice} * p.slices.width[0] + n]);
      }
    } else if (group >= 0) {
      const SliceEntry entry = load_scaled_v(p, group, slice, row, smem_v);
      if (has_output && entry.rank > 0) sum = row_times_b<T>(p, entry, slice, n, smem_v);
    }
    if (has_output) {
      const T* y1 = static_cast<const T*>(p.y) + row * p.y_stride;
      const float total = to_float(y1[output_col(p.slices, slice, n)]) + sum;
      // a constant index keeps the pair in registers
      if (slice == 0) {
        value[0] = total;
      } else {
        value[1] = total;
      }
    }
  }
  if (!has_output) return;
  const float h =
      p.slices.count == 2 ? gated_activation(g.act, value[0], value[1], g.alpha, g.limit) : activation(g.act, value[0]);
  static_cast<T*>(g.h)[row * g.h_stride + n] = from_float<T>(h);
}

}  // namespace

cudaError_t gate_up_act_general_path(const GateUpActParams& params, cudaStream_t stream) {
  const int32_t width = params.lora.slices.width[0];
  if (params.lora.rows == 0 || width == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(params.lora.rows), (width + kThreads - 1) / kThreads);
  return dispatch_dtype(params.lora.dtype, [&](auto element) {
    gate_up_act_general<decltype(element)><<<grid, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace polylora::cuda
