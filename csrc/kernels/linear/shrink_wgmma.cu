// shrink for prefill on Hopper (sm_90a): shrink_wide.cu with wgmma.
//
// The same tiles, parts of K and ring; the tensor cores read x and A from the ring by themselves, so that a chunk costs
// a thread its copies and a handful of instructions, and the ring is as deep as shared memory allows: a stream from
// memory wants tens of KiB in flight on every SM. Two warpgroups take 64 rows each.
//
// What the block works on is read before the kernel before has ended, and compared after it (as in linear_cluster.cu).
#include "linear/shrink_wide.cuh"

// what only 9.0a compiles would count as unused in the passes for other devices
#pragma nv_diag_suppress 177

namespace polylora::cuda {
namespace {

constexpr int kAlign = 1024;  // of the ring: its swizzle repeats
constexpr int kRingBytes = 208 * 1024;

constexpr int stages_of(int rank_tiles) {
  const int stages = kRingBytes / wide_ring_bytes(rank_tiles, 1);
  return stages < 8 ? stages : 8;
}

// The ring and the item.
constexpr int smem_bytes(int rank_tiles) {
  return kAlign + wide_ring_bytes(rank_tiles, stages_of(rank_tiles)) + static_cast<int>(sizeof(WideItem));
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kWideThreads, 1) shrink_wgmma_kernel(const __grid_constant__ LinearTask task) {
#if POLYLORA_HAS_WGMMA
  constexpr int kStages = stages_of(kTiles);
  using Copies = WideCopies<T, kTiles>;
  unsigned char* smem = ptx::dynamic_smem();
  smem += -static_cast<int>(reinterpret_cast<uintptr_t>(smem)) & (kAlign - 1);
  WideItem& item = *reinterpret_cast<WideItem*>(smem + wide_ring_bytes(kTiles, kStages));
  const int part = blockIdx.x % task.planes;
  const Part chunks = chunks_of(task, part);
  const int group = threadIdx.x / 128;

  const int index = blockIdx.x / task.planes;
  WideJob job;
  job.read(task, item, index);
  bool guess = true;
#pragma unroll 1
  for (int base = 0; base < item.rank_tiles || guess; base += kTiles) {
    const Copies copies(task, item, base);
    if (guess) ptx::wait_for_previous_grid();
    const bool real = index < item.tiles && item.rank_tiles > 0;
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      if (real && chunks.begin + i < chunks.end) copies.start(smem + i * Copies::kStageBytes, chunks.begin + i);
      ptx::commit_copies();
    }
    if (guess) {
      guess = false;
      ptx::launch_next_grid();  // after the wait: what the kernel before wrote may be read by the next without one
      if (__syncthreads_or(job.differs())) {
        ptx::wait_copies<0>();
        __syncthreads();
        job.read(task, item, index);
        base = -kTiles;
        continue;
      }
    }
    if (!real) break;
    float acc[kTiles][8];
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i) acc[i / 8][i % 8] = 0.f;
    int stage = 0;
#pragma unroll 1
    for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      ptx::wait_copies<kStages - 2>();
      ptx::fence_async_proxy();
      ptx::wgmma_wait<0>();
      __syncthreads();  // the chunk is there for all, and all are done with the chunk before
      ptx::wgmma_fence();
      const unsigned char* at = smem + stage * Copies::kStageBytes;
      const uint64_t x = ptx::swizzled_rows(at + group * 64 * kChunkK * 2);
      const uint64_t a = ptx::swizzled_rows(at + Copies::kABytes);
#pragma unroll
      for (int step = 0; step < kChunkK / 16; ++step) {
#pragma unroll
        for (int i = 0; i < kTiles / 4 * 4; i += 4) {
          ptx::wgmma_m64n64k16(acc + i, x + 2 * step, a + i * (kRankTile * kChunkK * 2 >> 4) + 2 * step, 1, T{});
        }
#pragma unroll
        for (int i = kTiles / 4 * 4; i < kTiles; ++i) {
          ptx::wgmma_m64n16k16(acc + i, x + 2 * step, a + i * (kRankTile * kChunkK * 2 >> 4) + 2 * step, 1, T{});
        }
      }
      ptx::wgmma_commit();
      const int next = chunk + kStages - 1;
      if (next < chunks.end) copies.start(smem + (stage == 0 ? kStages - 1 : stage - 1) * Copies::kStageBytes, next);
      ptx::commit_copies();
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    ptx::wgmma_wait<0>();
    ptx::wait_copies<0>();

    const int lane = threadIdx.x % 32;
    const int first_row = threadIdx.x / 32 * 16 + lane / 4;
    const int first_rank = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (base + i >= item.rank_tiles) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = first_row + j % 2 * 8;
        if (row < item.rows) {
          store_v<T>(task, item, part, base + i, row, first_rank + j / 2 * 8, {acc[i][2 * j], acc[i][2 * j + 1]});
        }
      }
    }
    __syncthreads();  // before the next pass fills the ring
  }
#else
  __trap();  // shrink_wide.cu sends no other device here
#endif
}

template <typename T, int kTiles>
cudaError_t launch_shrink(const WideShrink& how, cudaStream_t stream) {
  LaunchShape shape = how.shape;
  shape.smem_bytes = smem_bytes(kTiles);
  return launch<&shrink_wgmma_kernel<T, kTiles>, smem_bytes(kTiles)>(how.device, shape, how.task, stream);
}

template <typename T>
cudaError_t launch_shrink(const WideShrink& how, cudaStream_t stream) {
  if (how.rank_tiles <= 1) return launch_shrink<T, 1>(how, stream);
  if (how.rank_tiles <= 2) return launch_shrink<T, 2>(how, stream);
  if (how.rank_tiles <= 3) return launch_shrink<T, 3>(how, stream);
  if (how.rank_tiles <= 4) return launch_shrink<T, 4>(how, stream);
  if (how.rank_tiles <= 6) return launch_shrink<T, 6>(how, stream);
  if (how.rank_tiles <= 8) return launch_shrink<T, 8>(how, stream);
  if (how.rank_tiles <= 12) return launch_shrink<T, 12>(how, stream);
  return launch_shrink<T, 16>(how, stream);
}

}  // namespace

cudaError_t shrink_wgmma(const WideShrink& how, DType dtype, cudaStream_t stream) {
  return dtype == DType::kBFloat16 ? launch_shrink<__nv_bfloat16>(how, stream) : launch_shrink<__half>(how, stream);
}

}  // namespace polylora::cuda
