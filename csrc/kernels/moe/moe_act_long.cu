// moe_act of many deltas, sm_80 and later: h = act(y1 + delta), bit for bit what moe_act.cu makes of them.
//
// moe_act.cu is made for the latency of short calls, and spends 119 instructions on 128 outputs of a row: of many,
// these and the latencies of its many blocks take longer than the bytes. Here a warp takes a row, a lane 8 outputs at a
// time, those of y1 and of the delta on their way together.
//
// Rows come last to first: what the base's GEMM wrote last is still in L2, and what is written last here are the rows
// that its next GEMM begins with. y1 and the deltas, which nobody reads again, are to leave L2 before those.
#include "common/fragments.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "moe/act_task.cuh"
#include "moe/finish.cuh"
#include "moe/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kPiece = 32 * 8;  // outputs of a warp

template <typename T, int kSlices>
__global__ void __launch_bounds__(kWarps * 32) moe_act_long(const __grid_constant__ ActTask task) {
  constexpr int kAtOnce = 2 / kSlices;  // pieces
  const int64_t row = task.rows - 1 - (int64_t{blockIdx.x} * kWarps + threadIdx.x / 32);
  ptx::wait_for_previous_grid();  // lets nobody start early: see moe_act.cu
  if (row < 0) return;
  const int32_t group_read = task.row_group[row];
  const bool fits = load_head(task.header, task.rows, task.groups, task.pairs).fits;
  const int32_t group = fits ? group_read : kNoAdapter;
  if (group == kNoRow) return;
  const bool interleaved = kSlices == 2 && task.interleaved;
  const int apart = interleaved ? 2 : 1;  // elements of y1 between two outputs
  const int64_t to_second = interleaved ? 8 : task.up_col;
  const int first = static_cast<int>(threadIdx.x) % 32 * 8;
  // of the lane's first output; kept, else the compiler makes them from the task anew for each piece
  const T* from = ptx::keep(static_cast<const T*>(task.y) + row * task.y_stride + first * apart);
  const T* deltas = ptx::keep(static_cast<const T*>(task.delta) + row * task.delta_stride + first);
  T* h = ptx::keep(static_cast<T*>(task.h) + row * task.h_stride + first);
#pragma unroll 1
  for (int left = task.width - first; left > 0; left -= kAtOnce * kPiece) {
    static_assert(kAtOnce == 1 || kSlices == 1);  // pieces of one slice lie side by side
    uint4 y[kAtOnce][kSlices], delta[kAtOnce][kSlices];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i * kPiece >= left) break;
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        y[i][s] = ptx::load_once16(from + i * kPiece + s * to_second);
        delta[i][s] = {0x80008000u, 0x80008000u, 0x80008000u, 0x80008000u};  // -0 leaves any y as it is
        if (group >= 0) delta[i][s] = ptx::load_once16(deltas + i * kPiece + s * task.width);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i * kPiece >= left) break;
      if (interleaved) take_apart(y[i][0], y[i][kSlices - 1], y[i][0], y[i][kSlices - 1]);
      float values[kSlices][8], scale[kSlices];
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        const uint32_t words[4] = {delta[i][s].x, delta[i][s].y, delta[i][s].z, delta[i][s].w};
        scale[s] = 1.f;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 pair = unpack(words[e], T{});
          values[s][2 * e] = pair.x;
          values[s][2 * e + 1] = pair.y;
        }
      }
      ptx::store16(h + i * kPiece, activate<T, kSlices>(task.act, y[i], scale, values));
    }
    from += kAtOnce * kPiece * apart;
    deltas += kAtOnce * kPiece;
    h += kAtOnce * kPiece;
  }
}

}  // namespace

bool moe_act_long_serves(const GateUpActParams& g) {
  return 2 * g.lora.rows * sum_of_widths(g.lora.slices) >= kLongDeltas;
}

cudaError_t moe_act_long_path(const GateUpActParams& g, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const ActTask task = seam_task(g);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(divide_up(g.lora.rows, kWarps)));
  shape.threads = kWarps * 32;
  shape.overlap = true;
  return dispatch_16_bit(g.lora.dtype, [&](auto element) {
    using T = decltype(element);
    return g.lora.slices.count == 2 ? launch<&moe_act_long<T, 2>>(device, shape, task, stream)
                                    : launch<&moe_act_long<T, 1>>(device, shape, task, stream);
  });
}

}  // namespace polylora::cuda
