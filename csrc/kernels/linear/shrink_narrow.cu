// shrink for decode, sm_80 and later, before expand_narrow.cu: planes of v = x A^T for up to 8 or 16 rows of one group
// and one slice. A block takes a part of K; its warps share ranks first, then K. Each block writes its sums to a plane.
//
// Where blocks can store into each other's memory, linear_cluster.cu does both halves in one launch.
//
// Of few pairs of an MoE layer, too, beside a GEMM of the base: in blocks half as large, and of fewer registers.
#include "linear/narrow.cuh"
#include "linear/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kStepUnits = 4;  // units of K in flight

template <typename T, int kRows, bool kMoe>
__global__ void __launch_bounds__(narrow_warps(kMoe) * 32, narrow_blocks_per_sm(kMoe))
    shrink_narrow(const __grid_constant__ LinearTask task) {
  constexpr int kWarps = narrow_warps(kMoe);
  constexpr int kLanesOfV = kWarps * 32 / kTileRows;               // of a row of v
  float* partial = reinterpret_cast<float*>(ptx::dynamic_smem());  // [k_split][kRows][pitch]
  const int pitch = task.rank_cap + 8;                             // rows that a warp touches lie in different banks
  const LinearSlice& slice = task.slice[blockIdx.y];
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int units = task.k / kUnitK;
  const Part k_block = {units * static_cast<int>(blockIdx.x) / task.planes,
                        units * (static_cast<int>(blockIdx.x) + 1) / task.planes};
  const int split = warp & ((1 << task.k_split_log2) - 1);
  const Part k = part_of(k_block, split, task.k_split_log2);
  const int first_rank = (warp >> task.k_split_log2) * kRankTile;

  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();  // after the wait: what the kernel before wrote may be read by the next without one
  const bool other_call = kMoe && has_row_map(task);
  NarrowJob<kRows> job;
#pragma unroll 1
  for (int index = blockIdx.z;; index += gridDim.z) {
    job.read(task, index, blockIdx.y);
    if (other_call || index >= job.jobs) break;
    const int rows = job.rows(index);
    const SliceEntry entry = job.entry();
    const int rank = entry.rank;
    // what is read here stays inside A; what expand makes of an entry whose B or v does not fit is up to it
    if (rows == 0 || rank < 1 || rank > task.rank_cap || entry.a_row < 0 || entry.a_row > slice.a_rows - rank) continue;
    const uint32_t has = job.has(index);
    const int first_row = job.plane_row(task, index);
    NarrowShrink<T, kStepUnits, kRows> shrink;
    shrink.clear();
    shrink.template set_rows<kMoe>(task, job, rows);
#pragma unroll 1
    for (int r = first_rank; r < rank; r += (kWarps >> task.k_split_log2) * kRankTile) {
      shrink.set_ranks(slice, entry.a_row, r, rank);
#pragma unroll 1
      for (int u = k.begin; u < k.end; u += kStepUnits) {
        shrink.load(u, k.end);
        shrink.multiply(u, k.end);
      }
      shrink.store(partial + (split * kRows + g) * pitch + r, pitch, r, rank, has);
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x) / kLanesOfV;
    const int plane_row = min(first_row + row, task.plane_rows - 1);
    const float* from = partial + row * pitch;
    float* to = task.plane + blockIdx.x * task.plane_elements + int64_t{plane_row} * task.plane_width +
                static_cast<int>(blockIdx.y) * task.rank_cap;
    const int end = row < rows ? whole_rank_tiles(rank) : 0;
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x) % kLanesOfV * 4; r < end; r += kLanesOfV * 4) {
      *reinterpret_cast<float4*>(to + r) =
          add_quads(reinterpret_cast<const float4*>(from + r), kRows * pitch / 4, task.k_split_log2);
    }
    __syncthreads();  // before the next job's sums
  }
}

// Units of K that a warp should have at least.
constexpr int kUnitsPerWarp = 4;
constexpr int kMaxParts = 16;

}  // namespace

bool narrow_shrink_serves(const LoraParams& p) { return wide_shrink_serves(p) && p.k % kUnitK == 0; }

cudaError_t narrow_parts(const LoraParams& p, bool beside, int& parts) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t split = int64_t{1} << k_split_log2_of(even_rank(p), narrow_warps(is_moe(p)));
  const int64_t most = min64(divide_up(p.k, kUnitK * kUnitsPerWarp * split), kMaxParts);
  const int64_t fit = narrow_blocks(p, device.sms, beside) / (narrow_jobs(p) * p.slices.count);
  parts = static_cast<int>(min64(most < 1 ? 1 : most, fit < 1 ? 1 : fit));
  return cudaSuccess;
}

cudaError_t shrink_narrow_path(const LoraParams& p, int planes, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  LinearTask task = narrow_task(p, planes);
  if (task.max_tiles == 0 || task.units == 0) return cudaSuccess;
  const bool moe = is_moe(p);
  task.k_split_log2 = k_split_log2_of(even_rank(p), narrow_warps(moe));
  const int job_rows = narrow_job_rows(p);
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(planes), static_cast<unsigned>(p.slices.count),
           narrow_grid_jobs(p, job_rows, narrow_blocks_per_sm(moe) * device.sms, int64_t{planes} * p.slices.count));
  shape.threads = narrow_warps(moe) * 32;
  shape.smem_bytes = (int64_t{4} << task.k_split_log2) * job_rows * (task.rank_cap + 8);
  shape.overlap = !moe;  // else these blocks stand ready before the GEMM's, and take places that it then lacks
  return dispatch_16_bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    return moe              ? launch<&shrink_narrow<T, 8, true>>(device, shape, task, stream)
           : job_rows == 16 ? launch<&shrink_narrow<T, 16, false>>(device, shape, task, stream)
                            : launch<&shrink_narrow<T, 8, false>>(device, shape, task, stream);
  });
}

}  // namespace polylora::cuda
