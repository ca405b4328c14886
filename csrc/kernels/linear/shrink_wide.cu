// shrink for prefill, sm_80 and later: v = x A^T over wide tiles of up to 128 rows of one group.
//
// A block takes a wide tile and a part of K, all slices: x is read once. Chunks of 64 elements of K come through a ring
// in shared memory (cp.async, swizzled); tensor cores (mma) multiply them, rows of the batch on the M side, ranks on
// the N side; a warp takes 32 rows and every second tile of 16 ranks. Few rows: blocks share the K of a tile, each
// writes a plane of v of its own, and add_planes.cu adds them in order.
//
// More ranks than the registers hold: further passes over x. Hopper has a kernel of its own: shrink_wgmma.cu.
#include "linear/paths.h"
#include "linear/shrink_wide.cuh"

namespace polylora::cuda {
namespace {

constexpr int kStages = 3;

template <typename T, int kTiles>
__global__ void __launch_bounds__(kWideThreads, kTiles > 8 ? 1 : 2)
    shrink_wide(const __grid_constant__ LinearTask task) {
  unsigned char* smem = ptx::dynamic_smem();
  WideItem& item = *reinterpret_cast<WideItem*>(smem + wide_ring_bytes(kTiles, kStages));
  using Copies = WideCopies<T, kTiles>;

  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();  // after the wait: what the kernel before wrote may be read by the next without one
  WideJob job;
  const int index = blockIdx.x / task.planes;
  job.read(task, item, index);
  if (index >= item.tiles) return;

  const int part = blockIdx.x % task.planes;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const Part chunks = chunks_of(task, part);
  const int first_row = warp % 4 * 32;
  const int first_tile = warp / 4;

#pragma unroll 1
  for (int base = 0; base < item.rank_tiles; base += kTiles) {
    const Copies copies(task, item, base);
    float acc[kTiles / 2][2][2][4] = {};  // [rank tile][8 ranks][16 rows]
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (chunks.begin + i < chunks.end) copies.start(smem + i * Copies::kStageBytes, chunks.begin + i);
      ptx::commit_copies();
    }
    int stage = 0;
#pragma unroll 1
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      ptx::wait_copies<kStages - 2>();
      __syncthreads();  // the chunk is there, and all are done with the stage that is filled next
      const int next = chunk + kStages - 1;
      if (next < chunks.end) copies.start(smem + (stage == 0 ? kStages - 1 : stage - 1) * Copies::kStageBytes, next);
      ptx::commit_copies();
      const unsigned char* at = smem + stage * Copies::kStageBytes;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      if (first_row >= item.rows) continue;
#pragma unroll
      for (int step = 0; step < kChunkK / 16; ++step) {
        uint32_t rows[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          ptx::load_matrices(rows[m], at + piece_at(first_row + 16 * m + lane % 16, 2 * step + lane / 16));
        }
#pragma unroll
        for (int i = 0; i < kTiles / 2; ++i) {
          uint32_t ranks[4];
          const int row = (2 * i + first_tile) * kRankTile + lane / 16 * 8 + lane % 8;
          ptx::load_matrices(ranks, at + Copies::kABytes + piece_at(row, 2 * step + lane / 8 % 2));
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const uint32_t b[2] = {ranks[2 * n], ranks[2 * n + 1]};
#pragma unroll
            for (int m = 0; m < 2; ++m) ptx::mma_m16n8k16<T>(acc[i][n][m], rows[m], b);
          }
        }
      }
    }
    ptx::wait_copies<0>();

    // ranks 8n + 2t, 8n + 2t + 1 of rows g, g + 8 of every 16
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
      const int rank_tile = base + 2 * i + first_tile;
      if (rank_tile >= item.rank_tiles) break;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int n = j / 4, m = j / 2 % 2, half = j % 2;
        const int row = first_row + 16 * m + 8 * half + g;
        const float2 pair{acc[i][n][m][2 * half], acc[i][n][m][2 * half + 1]};
        if (row < item.rows) store_v<T>(task, item, part, rank_tile, row, 8 * n + 2 * t, pair);
      }
    }
    __syncthreads();  // before the next pass fills the ring
  }
}

template <typename T, int kTiles>
cudaError_t launch_shrink(const WideShrink& how, cudaStream_t stream) {
  constexpr int kSmem = wide_ring_bytes(kTiles, kStages) + static_cast<int>(sizeof(WideItem));
  LaunchShape shape = how.shape;
  shape.smem_bytes = kSmem;
  return launch<&shrink_wide<T, kTiles>, kSmem>(how.device, shape, how.task, stream);
}

template <typename T>
cudaError_t launch_shrink(const WideShrink& how, cudaStream_t stream) {
  if (how.rank_tiles <= 2) return launch_shrink<T, 2>(how, stream);
  if (how.rank_tiles <= 4) return launch_shrink<T, 4>(how, stream);
  if (how.rank_tiles <= 8) return launch_shrink<T, 8>(how, stream);
  return launch_shrink<T, 16>(how, stream);
}

constexpr int kMaxPlanes = 16;

// K is shared by as many blocks as the device has room for, each with a few chunks at least and a plane of v.
int parts_of_k(const LoraParams& p, const Device& device) {
  const int64_t tiles = batch_invariant() ? 16 : divide_up(p.rows, kWideTileRows);
  const int64_t parts = min64(device.sms / tiles, divide_up(p.k, kChunkK) / 4);
  return static_cast<int>(parts < 1 ? 1 : min64(parts, kMaxPlanes));
}

}  // namespace

bool wide_shrink_serves(const LoraParams& p) { return fast_shrink_serves(p) && p.slices.groups > 0; }

cudaError_t wide_scratch(const LoraParams& p, bool packed, int64_t& bytes) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int parts = parts_of_k(p, device);
  const int64_t elements = p.rows * packed_v_width(p.v_width, p.slices.count);
  bytes = (packed ? divide_up(2 * elements, 16) * 16 : 0) + (parts > 1 ? parts * elements * 4 : 0);
  return cudaSuccess;
}

cudaError_t shrink_wide_path(const LoraParams& p, bool portable, bool packed, cudaStream_t stream) {
  if (p.plan.max_wide_tiles == 0) return cudaSuccess;
  WideShrink how;
  cudaError_t error = current_device(how.device);
  if (error != cudaSuccess) return error;
  LinearTask& task = how.task;
  task = linear_task(p);
  task.tile = p.plan.wide_tile;
  task.max_tiles = static_cast<int32_t>(p.plan.max_wide_tiles);
  LinearTask sum = task;  // what the planes are added to
  if (packed) {
    sum.v_form = VForm::kPacked;
    sum.v = p.scratch;
    sum.v_stride = static_cast<int32_t>(packed_v_width(p.v_width, p.slices.count));
  }
  task = sum;
  task.planes = parts_of_k(p, how.device);
  if (task.planes > 1) {
    task.v_form = VForm::kPlanes;
    task.v_stride = static_cast<int32_t>(packed_v_width(p.v_width, p.slices.count));
    task.v_plane = p.rows * task.v_stride;
    task.v = static_cast<char*>(p.scratch) + (packed ? divide_up(2 * task.v_plane, 16) * 16 : 0);
  }
  how.shape.grid = dim3(static_cast<unsigned>(task.max_tiles * task.planes));
  how.shape.threads = kWideThreads;
  how.shape.overlap = true;
  // ranks of the slices are unknown here: an even share of v each. More of them take another pass.
  how.rank_tiles = p.slices.count * static_cast<int>(divide_up(min64(p.v_width, int64_t{kMaxRank} * p.slices.count),
                                                               int64_t{kRankTile} * p.slices.count));
  if (how.device.major == 9 && !portable) {
    error = shrink_wgmma(how, p.dtype, stream);
  } else {
    error =
        p.dtype == DType::kBFloat16 ? launch_shrink<__nv_bfloat16>(how, stream) : launch_shrink<__half>(how, stream);
  }
  if (error != cudaSuccess || task.planes == 1) return error;
  return add_planes(task, sum, p.dtype, how.device, stream);
}

}  // namespace polylora::cuda
