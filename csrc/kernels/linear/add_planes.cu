// Adds the planes of v that blocks of shrink wrote, each over its part of K, in their order: into v, the end of the
// public shrink where linear_wide.cu does not run; or in place, into the first plane, before expand_wide.cu, of whose
// blocks each would else read all planes of its tile. A block takes 2 to 16 rows of a wide tile.
#include "linear/paths.h"
#include "linear/wide.cuh"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerSm = 4;

// Rows of a block: few, since a block waits for memory once for each few of them, but enough for each thread to have
// four ranks of one, and for the blocks of all tiles that the plan has room for to run at once. H200, `mma`, 16 rows
// and as here, us: qkv r128 M2048 80.7 and 75.7, M512 49.0 and 41.7, qkvz r128 M2048 86.1 and 82.5, o r128 M2048 39.9
// and 39.2; 35 cases 0.976.
int rows_of_block(int64_t tiles, int rank_tiles, int sms) {
  int rows = 2;
  while (rows < 16 &&
         (rows * rank_tiles * (kRankTile / 4) < kThreads || tiles * (kWideTileRows / rows) > int64_t{kPerSm} * sms)) {
    rows *= 2;
  }
  return rows;
}

template <bool kInPlace>
__global__ void __launch_bounds__(kThreads, kPerSm) add_planes_kernel(const __grid_constant__ LinearTask task) {
  WideItem& item = *reinterpret_cast<WideItem*>(ptx::dynamic_smem());
  // shrink waited before it let this begin: so all before it is done, and expand may read all but v at once
  ptx::launch_next_grid();
  const int blocks = static_cast<int>(gridDim.x) / task.max_tiles;  // of a tile
  const int rows = kWideTileRows / blocks;
  const int index = blockIdx.x / blocks;
  WideJob::read(task, item, index);
  ptx::wait_for_previous_grid();
  const int begin = blockIdx.x % blocks * rows;
  if (index >= item.tiles) return;
  const int end = min(begin + rows, item.rows);
  if (!kInPlace) return add_planes_to_v(task, item, begin, end);
  const int quads = item.rank_tiles * (kRankTile / 4);  // a row
#pragma unroll 1
  for (int e = threadIdx.x; e < (end - begin) * quads; e += blockDim.x) {
    float* at = task.plane + int64_t{item.plane_row + begin + e / quads} * task.plane_width + e % quads * 4;
    *reinterpret_cast<float4*>(at) = add_planes(task, at, task.planes);
  }
}

template <bool kInPlace>
cudaError_t launch_add(const LoraParams& p, int planes, cudaStream_t stream) {
  if (p.plan.max_wide_tiles == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  LinearTask task = wide_task(p);
  set_planes(task, p, planes, p.rows);
  LaunchShape shape;
  const int rows = rows_of_block(task.max_tiles, expected_rank_tiles(p), device.sms);
  shape.grid = dim3(static_cast<unsigned>(int64_t{task.max_tiles} * (kWideTileRows / rows)));
  shape.threads = kThreads;
  shape.smem_bytes = sizeof(WideItem);
  shape.overlap = true;
  return launch<&add_planes_kernel<kInPlace>>(device, shape, task, stream);
}

}  // namespace

cudaError_t add_planes_to_v_path(const LoraParams& p, int planes, cudaStream_t stream) {
  return launch_add<false>(p, planes, stream);
}

cudaError_t add_planes_in_place_path(const LoraParams& p, int planes, cudaStream_t stream) {
  return launch_add<true>(p, planes, stream);
}

}  // namespace polylora::cuda
