// add_delta: y += delta of the rows with an adapter; the deltas are another call's (linear_delta).
//
// A stream: a warp takes a row and 256 outputs, a lane 8 of them. In decode a GEMM's result waits for it: hence little
// code, and the deltas are asked for before it is known whether the row has any.
#include "common/dtype.cuh"
#include "common/fragments.cuh"
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "linear/paths.h"
#include "linear/task.cuh"

namespace polylora::cuda {
namespace {

constexpr int kWarps = 4;

struct AddTask {
  const int32_t* header;
  const int32_t* row_group;
  void* y;
  const void* delta;
  int64_t y_stride, delta_stride;
  int32_t rows, groups;
  int32_t width;
  int32_t first[kMaxSlices];  // column of the deltas; beyond the last slice: INT32_MAX
  int64_t shift[kMaxSlices];  // from there to y's

  __device__ __forceinline__ int64_t y_col(int n) const {
    int64_t by = shift[0];
#pragma unroll
    for (int s = 1; s < kMaxSlices; ++s) {
      if (n >= first[s]) by = shift[s];
    }
    return n + by;
  }
};

__device__ __forceinline__ int64_t row_of_warp() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; }

template <typename T>
__global__ void __launch_bounds__(kWarps * 32) add_delta(const __grid_constant__ AddTask task) {
  const int64_t row = row_of_warp();
  const int n = static_cast<int>(blockIdx.y * 32 + threadIdx.x % 32) * 8;
  // lets nobody start early: the next linear_delta's blocks would take the places of the GEMM beside it
  ptx::wait_for_previous_grid();
  if (row >= task.rows || n >= task.width) return;
  const int32_t group = task.row_group[row];
  const bool fits = load_head(task.header, task.rows, task.groups, 0).fits;
  const uint4 words = ptx::load16(static_cast<const T*>(task.delta) + row * task.delta_stride + n);
  T* y = static_cast<T*>(task.y) + row * task.y_stride + task.y_col(n);
  const uint4 base = ptx::load16(y);
  if (!fits || group < 0) return;
  constexpr uint32_t kNothing = 0x80008000u;  // -0 and -0: an absent slice, of which y keeps even the bits of a NaN
  if (words.x == kNothing && words.y == kNothing && words.z == kNothing && words.w == kNothing) return;
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  float delta[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(word[i], T{});
    delta[2 * i] = pair.x;
    delta[2 * i + 1] = pair.y;
  }
  ptx::store16(y, add_scaled<T>(base, 1.f, delta));
}

template <typename T>
__global__ void __launch_bounds__(kWarps * 32) add_delta_general(const __grid_constant__ AddTask task) {
  const int64_t row = row_of_warp();
  if (row >= task.rows) return;
  const bool fits = load_head(task.header, task.rows, task.groups, 0).fits;
  if (!fits || task.row_group[row] < 0) return;
  T* y = static_cast<T*>(task.y) + row * task.y_stride;
  const T* delta = static_cast<const T*>(task.delta) + row * task.delta_stride;
#pragma unroll 1
  for (int n = static_cast<int>(blockIdx.y * 32 + threadIdx.x % 32); n < task.width;
       n += static_cast<int>(gridDim.y) * 32) {
    const float added = to_float(delta[n]);
    if (added == 0.f && copysignf(1.f, added) < 0.f) continue;  // -0: see above
    T& out = y[task.y_col(n)];
    out = from_float<T>(to_float(out) + added);
  }
}

AddTask add_task(const AddDeltaParams& d) {
  const LoraParams& p = d.lora;
  AddTask task{};
  task.header = p.plan.header;
  task.row_group = p.plan.row_group;
  task.y = p.y;
  task.delta = d.delta;
  task.y_stride = p.y_stride;
  task.delta_stride = d.delta_stride;
  task.rows = p.plan.rows;
  task.groups = p.plan.groups;
  for (int s = 0; s < kMaxSlices; ++s) {
    task.first[s] = s < p.slices.count ? task.width : INT32_MAX;
    if (s >= p.slices.count) continue;
    task.shift[s] = p.slices.col[s] - task.width;
    task.width += p.slices.width[s];
  }
  return task;
}

// `outputs` a warp, as far as the grid's y goes.
constexpr int64_t kMostPieces = 65535;
LaunchShape shape_of(const AddTask& task, int outputs) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(divide_up(task.rows, kWarps)),
                    static_cast<unsigned>(min64(divide_up(task.width, outputs), kMostPieces)));
  shape.threads = kWarps * 32;
  return shape;
}

}  // namespace

bool add_delta_serves(const AddDeltaParams& d) {
  const LoraParams& p = d.lora;
  if (p.dtype == DType::kFloat32 || !is_aligned(p.y, 16) || !is_aligned(d.delta, 16)) return false;
  if (p.y_stride % 8 != 0 || d.delta_stride % 8 != 0 || sum_of_widths(p.slices) > kMostPieces * 256) return false;
  for (int s = 0; s < p.slices.count; ++s) {
    if (p.slices.width[s] % 8 != 0 || p.slices.col[s] % 8 != 0) return false;
  }
  return true;
}

cudaError_t add_delta_path(const AddDeltaParams& d, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  const AddTask task = add_task(d);
  if (error != cudaSuccess || task.width == 0) return error;
  LaunchShape shape = shape_of(task, 256);
  shape.overlap = true;
  return dispatch_16_bit(
      d.lora.dtype, [&](auto element) { return launch<&add_delta<decltype(element)>>(device, shape, task, stream); });
}

cudaError_t add_delta_general_path(const AddDeltaParams& d, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  const AddTask task = add_task(d);
  if (error != cudaSuccess || task.width == 0) return error;
  const LaunchShape shape = shape_of(task, 32);
  return dispatch_dtype(d.lora.dtype, [&](auto element) {
    return launch<&add_delta_general<decltype(element)>>(device, shape, task, stream);
  });
}

}  // namespace polylora::cuda
