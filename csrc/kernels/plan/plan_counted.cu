// The plan of many rows: the phases of counting.cuh and placing.cuh in one launch of one cluster, or in three.
#include "plan/placing.cuh"

namespace polylora::cuda {
namespace {

constexpr int kClusterBlocks = 16;  // the workspace has room for them, whatever the rows

__device__ __forceinline__ void sync_blocks() {
  if (gridDim.x == 1) {
    __syncthreads();
    return;
  }
#if POLYLORA_HAS_CLUSTERS
  __syncwarp();  // the barrier's instructions want whole warps
  // release and acquire: what a block has written to the workspace, the others read
  ptx::cluster_arrive();
  ptx::cluster_wait();
#endif
}

__global__ void __launch_bounds__(kPlanThreads) plan_at_once(const __grid_constant__ PlanTask task) {
  clear_smem(task);
  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();
  count_rows(task);
  sync_blocks();
  scan_range<kClusterBlocks>(task);
  sync_blocks();
  place(task);
}

__global__ void __launch_bounds__(kPlanThreads) plan_count(const __grid_constant__ PlanTask task) {
  clear_smem(task);
  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();
  count_rows(task);
}

__global__ void __launch_bounds__(kPlanThreads) plan_scan(const __grid_constant__ PlanTask task) {
  if (threadIdx.x == 0) plan_smem().mine = {};
  __syncthreads();
  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();
  scan_range<32>(task);
}

__global__ void __launch_bounds__(kPlanThreads) plan_place(const __grid_constant__ PlanTask task) {
  clear_smem(task);
  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();
  __syncthreads();
  // the counters of the first launch are gone; its groups are not
  if (task.strips > 0) {
    count_strips(task, [&](int64_t row, int64_t end, int32_t (&group)[kPlanBatch]) {
#pragma unroll
      for (int i = 0; i < kPlanBatch; ++i) {
        const int64_t at = row + kPlanThreads * i;
        group[i] = at < end ? task.row_group[at] : kNoAdapter;
      }
    });
    __syncthreads();
    add_strips(task, [](int64_t, uint32_t) {});
  }
  place(task);
}

// Shares rows and groups among `blocks`; returns the shared memory of a block.
int64_t share(PlanTask& task, const Device& device, int blocks) {
  const int64_t rows = task.source.p.rows;
  const int64_t groups = task.source.groups;
  const int64_t strip_bytes = counter_words(groups) * 4;
  const int64_t room = device.smem_bytes - static_cast<int64_t>(sizeof(PlanSmem));
  int64_t strips = min64(kPlanWarps, (rows + blocks * 32 - 1) / (blocks * 32));
  if (strip_bytes > 0) strips = min64(strips, room / strip_bytes);
  const auto rows_of = [&](int64_t of) { return (rows + blocks * of * 32 - 1) / (blocks * of * 32) * 32; };
  if (strips > 0 && strips * rows_of(strips) >= 1 << 16) strips = 0;  // more than 16 bits count
  task.strips = static_cast<int32_t>(strips);
  task.strip_rows = rows_of(strips > 0 ? strips : 1);
  task.range_log2 = 0;
  while (int64_t{blocks} << task.range_log2 < groups) ++task.range_log2;
  return static_cast<int64_t>(sizeof(PlanSmem)) + strips * strip_bytes;
}

// Blocks of the cluster: few steps of a block's threads through its rows and its groups.
cudaError_t cluster_blocks(const PlanTask& task, const Device& device, int& blocks) {
  const int64_t rows = task.source.p.rows;
  const int64_t groups = task.source.groups;
  blocks = 1;
  if (device.major < 9 || (rows <= 1024 && groups <= kPlanThreads)) return cudaSuccess;
  blocks = 8;
  if (rows <= 4096 && groups <= 8 * kPlanThreads) return cudaSuccess;
  int clusters = 0;
  const cudaError_t error =
      resident_clusters<&plan_at_once>(device, kPlanThreads, device.smem_bytes, kClusterBlocks, clusters);
  if (clusters > 0) blocks = kClusterBlocks;
  return error;
}

}  // namespace

cudaError_t plan_counted(PlanTask task, const Device& device, cudaStream_t stream) {
  const int64_t rows = task.source.p.rows;
  LaunchShape shape;
  shape.threads = kPlanThreads;
  shape.overlap = true;
  if (rows <= kPlanOneLaunchRows) {
    cudaError_t error = cluster_blocks(task, device, shape.cluster);
    if (error != cudaSuccess) return error;
    shape.grid = dim3(static_cast<unsigned>(shape.cluster));
    shape.smem_bytes = share(task, device, shape.cluster);
    return launch<&plan_at_once>(device, shape, task, stream);
  }
  // not more blocks than the workspace has room for; the fewer rows each has, the longer the columns of plan_scan
  const int64_t blocks = min64(plan_max_blocks(rows, task.source.groups), (rows + 511) / 512);
  shape.grid = dim3(static_cast<unsigned>(blocks));
  shape.smem_bytes = share(task, device, static_cast<int>(blocks));
  // the first launch counts a block's rows as one strip
  PlanTask count = task;
  LaunchShape of_count = shape, of_scan = shape;
  if (task.strips > 0) {
    count.strips = 1;
    count.strip_rows = task.strips * task.strip_rows;
    of_count.smem_bytes = static_cast<int64_t>(sizeof(PlanSmem)) + counter_words(task.source.groups) * 4;
  }
  of_scan.smem_bytes = sizeof(PlanSmem);
  cudaError_t error = launch<&plan_count>(device, of_count, count, stream);
  if (error == cudaSuccess) error = launch<&plan_scan>(device, of_scan, task, stream);
  return error == cudaSuccess ? launch<&plan_place>(device, shape, task, stream) : error;
}

}  // namespace polylora::cuda
