// moe_act: h = act(y1 + delta), sm_80 and later; the deltas are another call's (moe_delta), of rows with an adapter.
//
// A stream: a warp takes a row and 128 outputs, a lane 4 of them. In short calls the deltas are asked for before it is
// known whether the row has any: one latency instead of two. After a base model's GEMM no cache holds this code any
// more, and a short call waits for it longer than for its data: hence few outputs a lane, and little code.
#include "common/fragments.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "linear/task.cuh"
#include "moe/act_task.cuh"
#include "moe/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kOutputs = 4;  // of a lane
constexpr int kPiece = 32 * kOutputs;

template <typename T, int kSlices>
__global__ void __launch_bounds__(kWarps * 32) moe_act(const __grid_constant__ ActTask task) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int n = static_cast<int>(blockIdx.y) * kPiece + static_cast<int>(threadIdx.x) % 32 * kOutputs;
  // lets nobody start early: blocks of the next moe_delta that stand ready before the base's GEMM take its places
  // (H200, nemotron3-super, one token: 15 us more)
  ptx::wait_for_previous_grid();
  if (row >= task.rows || n >= task.width) return;
  const int32_t group_read = task.row_group[row];
  const bool fits = load_head(task.header, task.rows, task.groups, task.pairs).fits;
  const T* from = static_cast<const T*>(task.y) + row * task.y_stride;
  const T* deltas = static_cast<const T*>(task.delta) + row * task.delta_stride + n;
  // Set: else ptxas (13.0) takes the deltas' second load, which long calls reach, for the first one and drops it.
  uint2 y[kSlices], delta[kSlices] = {};
  uint4 both{};
  const bool interleaved = kSlices == 2 && task.interleaved;
  if (interleaved) {
    both = ptx::load16(from + 2 * n);
  } else {
    y[0] = ptx::load8(from + n);
    if (kSlices == 2) y[kSlices - 1] = ptx::load8(from + task.up_col + n);
  }
  // loads that the compiler may not move: it would let y1 wait for the group
  const auto load_deltas = [&] {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) delta[s] = ptx::load8(deltas + s * task.width);
  };
  if (task.is_short) load_deltas();
  const int32_t group = fits ? group_read : kNoAdapter;
  if (group == kNoRow) return;
  if (group < 0) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) delta[s] = {0x80008000u, 0x80008000u};  // -0 leaves any y as it is
  } else if (!task.is_short) {
    load_deltas();
  }
  if (interleaved) {
    y[0] = {(both.x & 0xffff) | both.y << 16, (both.z & 0xffff) | both.w << 16};
    y[kSlices - 1] = {both.x >> 16 | (both.y & 0xffff0000), both.z >> 16 | (both.w & 0xffff0000)};
  }
  float value[kSlices][kOutputs];
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const float2 y_low = unpack(y[s].x, T{}), y_high = unpack(y[s].y, T{});
    const float2 low = unpack(delta[s].x, T{}), high = unpack(delta[s].y, T{});
    value[s][0] = y_low.x + low.x;
    value[s][1] = y_low.y + low.y;
    value[s][2] = y_high.x + high.x;
    value[s][3] = y_high.y + high.y;
  }
  if (kSlices == 2) {
    activate_gated(task.act.act, value[0], value[kSlices - 1], task.act.alpha, task.act.limit);
  } else {
    activate_all(task.act.act, value[0]);
  }
  T* h = static_cast<T*>(task.h) + row * task.h_stride + n;
  *reinterpret_cast<uint2*>(h) = {pack(value[0][0], value[0][1], T{}), pack(value[0][2], value[0][3], T{})};
}

}  // namespace

cudaError_t moe_add_act_path(const GateUpActParams& g, cudaStream_t stream) {
  if (moe_act_long_serves(g)) return moe_act_long_path(g, stream);
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const LoraParams& p = g.lora;
  const ActTask task = seam_task(g);
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(divide_up(p.rows, kWarps)), static_cast<unsigned>(divide_up(task.width, kPiece)));
  shape.threads = kWarps * 32;
  shape.overlap = true;
  const bool gated = p.slices.count == 2;
  return dispatch_16_bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    return gated ? launch<&moe_act<T, 2>>(device, shape, task, stream)
                 : launch<&moe_act<T, 1>>(device, shape, task, stream);
  });
}

}  // namespace polylora::cuda
