// -0 in the deltas of a call, to which linear then adds: x + -0 is x, and a slice that is absent stays -0.
#include "common/dtype.cuh"
#include "common/launch.cuh"
#include "linear/paths.h"
#include "linear/task.cuh"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;

struct ClearTask {
  void* deltas;
  int64_t stride, rows, width;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) clear_deltas(const __grid_constant__ ClearTask task) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
#pragma unroll 1
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < task.rows * task.width; i += step) {
    static_cast<T*>(task.deltas)[i / task.width * task.stride + i % task.width] = from_float<T>(-0.f);
  }
}

}  // namespace

cudaError_t clear_deltas_path(const LoraParams& p, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 4096;
  Device device;
  const cudaError_t error = current_device(device);
  const ClearTask task{p.y, p.y_stride, p.rows, sum_of_widths(p.slices)};
  if (error != cudaSuccess || task.rows == 0 || task.width == 0) return error;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(min64(divide_up(task.rows * task.width, kThreads), kMostBlocks)));
  shape.threads = kThreads;
  return dispatch_dtype(
      p.dtype, [&](auto element) { return launch<&clear_deltas<decltype(element)>>(device, shape, task, stream); });
}

}  // namespace polylora::cuda
