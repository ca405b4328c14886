// Adds the planes of v that blocks of shrink wrote, each over its part of K, in their order: the end of the public
// shrink where linear_wide.cu does not run. A block takes 16 rows of a wide tile.
#include "linear/paths.h"
#include "linear/wide.cuh"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;

__global__ void __launch_bounds__(kThreads, 4) add_planes_kernel(const __grid_constant__ LinearTask task) {
  WideItem& item = *reinterpret_cast<WideItem*>(ptx::dynamic_smem());
  ptx::launch_next_grid();
  const int index = blockIdx.x / (kWideTileRows / kRows);
  WideJob::read(task, item, index);  // shrink waited for all that came before it
  ptx::wait_for_previous_grid();
  const int begin = blockIdx.x % (kWideTileRows / kRows) * kRows;
  if (index < item.tiles) add_planes_to_v(task, item, begin, min(begin + kRows, item.rows));
}

}  // namespace

cudaError_t add_planes_path(const LoraParams& p, int planes, cudaStream_t stream) {
  if (p.plan.max_wide_tiles == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  LinearTask task = wide_task(p);
  set_planes(task, p, planes);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(int64_t{task.max_tiles} * (kWideTileRows / kRows)));
  shape.threads = kThreads;
  shape.smem_bytes = sizeof(WideItem);
  shape.overlap = true;
  return launch<&add_planes_kernel>(device, shape, task, stream);
}

}  // namespace polylora::cuda
