// shrink for prefill, sm_80 and later: v = x A^T over wide tiles of up to 128 rows of one group.
//
// A block takes a wide tile and a part of K, all slices: x is read once. Chunks of 64 elements of K come through a ring
// in shared memory (cp.async, swizzled); tensor cores (mma) multiply them, rows of the batch on the M side, ranks on
// the N side; a warp takes 32 rows and every second tile of 16 ranks. Few rows: blocks share the K of a tile, each
// writes a plane of v of its own, and add_planes.cu adds them in order.
//
// More ranks than the registers hold: further passes over x. Hopper has a kernel of its own: linear_wide.cu.
#include "linear/paths.h"
#include "linear/wide.cuh"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;

// Stages of the ring: a block alone on its SM has to have about 100 KiB of x on its way. Devices of less than 160 KiB
// of shared memory a block: 3.
constexpr int kFewStages = 3;
constexpr int many_stages(int tiles) { return tiles <= 2 ? 7 : tiles <= 4 ? 6 : tiles <= 8 ? 4 : 3; }

constexpr int smem_bytes(int tiles, int stages) {
  return stages * shrink_stage_bytes(tiles) + static_cast<int>(sizeof(WideItem));
}

template <typename T, int kTiles, int kStages>
__global__ void __launch_bounds__(kThreads, kTiles > 8 ? 1 : 2) shrink_wide(const __grid_constant__ LinearTask task) {
  unsigned char* smem = ptx::dynamic_smem();
  WideItem& item = *reinterpret_cast<WideItem*>(smem + kStages * shrink_stage_bytes(kTiles));
  using Copies = WideCopies<T, kThreads, kTiles>;

  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();  // after the wait: what the kernel before wrote may be read by the next without one
  const int parts = max(task.planes, 1);
  const int index = blockIdx.x / parts;
  WideJob::read(task, item, index);
  if (index >= item.tiles) return;

  const int part = blockIdx.x % parts;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const Part chunks = chunks_of(task, part, parts);
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
    for (int m = 0; m < 2; ++m) {
      store_sums<kTiles / 2, 2>(task, item, part, first_row + 16 * m + g, base + first_tile, 2 * t,
                                [&](int i, int second_row, int half) {
                                  const float (&four)[4] = acc[i][half][m];
                                  return float2{four[2 * second_row], four[2 * second_row + 1]};
                                });
    }
    __syncthreads();  // before the next pass fills the ring
  }
}

struct WideShrink {
  Device device;
  LinearTask task;
  LaunchShape shape;  // but for shared memory
};

template <typename T, int kTiles>
cudaError_t launch_shrink(const WideShrink& how, cudaStream_t stream) {
  constexpr int kManyStages = many_stages(kTiles);
  LaunchShape shape = how.shape;
  shape.smem_bytes = smem_bytes(kTiles, kManyStages);
  if (how.device.smem_bytes >= shape.smem_bytes) {
    return launch<&shrink_wide<T, kTiles, kManyStages>>(how.device, shape, how.task, stream);
  }
  shape.smem_bytes = smem_bytes(kTiles, kFewStages);
  return launch<&shrink_wide<T, kTiles, kFewStages>>(how.device, shape, how.task, stream);
}

template <typename T>
cudaError_t launch_shrink(const WideShrink& how, int rank_tiles, cudaStream_t stream) {
  if (rank_tiles <= 2) return launch_shrink<T, 2>(how, stream);
  if (rank_tiles <= 4) return launch_shrink<T, 4>(how, stream);
  // where shared memory is too small for 16: passes over x
  if (rank_tiles <= 8 || how.device.smem_bytes < smem_bytes(16, kFewStages)) return launch_shrink<T, 8>(how, stream);
  return launch_shrink<T, 16>(how, stream);
}

constexpr int kMaxParts = 16;

// K is shared by as many blocks as end soonest, each with a few chunks at least and a plane of v: of twice the tiles
// expected and once those that are nearly always enough, since one tile more than fits costs half as much again. H200,
// qkv r128 of 8192 rows, 2 and 3 parts, us: 64 tiles 216 and 271, 70 tiles 307 and 279.
int parts_of_k(const LoraParams& p, const Device& device) {
  const bool fixed = batch_invariant();
  const int64_t tiles = fixed ? 16 : expected_wide_tiles(p, PartialTiles::kOnAverage);
  const int64_t more_tiles = fixed ? 16 : expected_wide_tiles(p, PartialTiles::kNearlyAlways);
  const int64_t most = min64(divide_up(p.k, kChunkK) / 4, kMaxParts);
  const auto turns = [&](int parts) {
    return Turns{2 * divide_up(tiles * parts, device.sms) + divide_up(more_tiles * parts, device.sms), parts};
  };
  int best = 1;
  for (int parts = 2; parts <= most; ++parts) {
    if (turns(parts).are_over_before(turns(best))) best = parts;
  }
  return best;
}

}  // namespace

bool wide_shrink_serves(const LoraParams& p) { return fast_shrink_serves(p) && p.slices.groups > 0; }

cudaError_t mma_parts(const LoraParams& p, int& parts) {
  Device device;
  const cudaError_t error = current_device(device);
  parts = error == cudaSuccess ? parts_of_k(p, device) : 0;
  return error;
}

cudaError_t shrink_mma_path(const LoraParams& p, int planes, cudaStream_t stream) {
  if (p.plan.max_wide_tiles == 0) return cudaSuccess;
  WideShrink how;
  const cudaError_t error = current_device(how.device);
  if (error != cudaSuccess) return error;
  LinearTask& task = how.task;
  task = wide_task(p);
  if (planes > 0) set_planes(task, p, planes, p.rows);
  how.shape.grid = dim3(static_cast<unsigned>(int64_t{task.max_tiles} * (planes > 0 ? planes : 1)));
  how.shape.threads = kThreads;
  how.shape.overlap = true;
  const int tiles = expected_rank_tiles(p);
  return dispatch_16_bit(p.dtype, [&](auto element) { return launch_shrink<decltype(element)>(how, tiles, stream); });
}

}  // namespace polylora::cuda
