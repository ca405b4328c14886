// shrink for MoE, sm_80 and later: sums over parts of K of x A^T, for up to 16 rows of a group (slot, expert) at a
// time.
//
// A unit is a tile and a part of K, all slices: x is read once. Its chunks of 64 elements of K go to the block's warps
// in turn; a warp brings those of x and of A through a ring of its own and multiplies them, rows on the M side of mma,
// ranks on its N side. Then the block adds its warps' sums, in order, and writes them to the part's plane;
// moe_expand.cu adds the planes. While a block adds, its warps' next copies are on their way.
//
// Rows and ranks that are not there may hold anything in shared memory: they end in sums that nobody reads.
#include "linear/paths.h"
#include "moe/paths.h"
#include "moe/stream.cuh"

namespace polylora::cuda {
namespace {

// Stages of a warp's ring, by rank tiles a pass over x.
constexpr int stages_of(int tiles) { return tiles == 4 ? 2 : 4; }
constexpr int blocks_of(int tiles) { return tiles == 1 ? 3 : 2; }  // an SM
constexpr int kTileBytes = kTileRows * kChunkK * 2;                // of x, or of a rank tile of A
static_assert(kTileRows == kRankTile);

template <int kTiles>
struct ShrinkSmem {
  static constexpr int kStages = stages_of(kTiles);
  static constexpr int kPitch = kTiles * kRankTile + 8;

  unsigned char ring[kStreamWarps][kStages][(1 + kTiles) * kTileBytes];
  float partial[kStreamWarps][kTileRows][kPitch];
  StreamItem item[kBatch];
};

/// What a warp asks for, a step at a time, ahead of its products.
template <typename T, int kTiles>
class ShrinkLoads {
  using Smem = ShrinkSmem<kTiles>;

 public:
  __device__ __forceinline__ ShrinkLoads(const StreamTask& task, Smem& smem)
      : task_(task), smem_(smem), chunks_(task) {}

  /// Begins a batch.
  __device__ __forceinline__ void begin(int count) {
    item_ = 0;
    count_ = count;
    stage_ = 0;
    to_ = smem_.ring[threadIdx.x / 32][0];
    enter();
  }

  /// The next step's copies, into the stage that is free.
  __device__ __forceinline__ void start() {
    if (item_ < count_) {
      if (chunk_ < chunks_.end) copy();
      chunk_ += kStreamWarps;
      if (chunk_ >= chunks_.end) next_pass();
    }
    ptx::commit_copies();
    stage_ = stage_ + 1 == Smem::kStages ? 0 : stage_ + 1;
    to_ = smem_.ring[threadIdx.x / 32][stage_];
  }

 private:
  static constexpr int kApart = 4;  // rows between two pieces of a lane

  __device__ __forceinline__ static int lane_row() { return static_cast<int>(threadIdx.x) % 32 / 8; }
  __device__ __forceinline__ static int lane_k() { return static_cast<int>(threadIdx.x) % 8 * 8; }

  // An item begins: where its x is.
  __device__ __forceinline__ void enter() {
    base_ = 0;
    if (item_ >= count_) return;
    const StreamItem& item = smem_.item[item_];
    rows_ = item.rows;
#pragma unroll
    for (int i = 0; i < kTileRows / kApart; ++i) {
      const int row = item.x_row[lane_row() + kApart * i];
      x_[i] = static_cast<uint32_t>(int64_t{row} * task_.x_stride / 8);
    }
    enter_pass(item);
  }

  // Where the ranks of a pass are; none where an item has none.
  __device__ __forceinline__ void enter_pass(const StreamItem& item) {
    chunk_ = chunks_.begin;
    tiles_ = min(kTiles, item.rank_tiles - base_);
    whole_ = true;
    const int of_first = item.tiles_of_first();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int s = base_ + t < of_first ? 0 : 1;
      const int first = (base_ + t - item.first_rank_tile[s]) * kRankTile;
      left_[t] = item.rank[s] - first;
      stride_[t] = task_.slice[s].a_stride;
      a_[t] = static_cast<const T*>(item.a[s]) + int64_t{first + lane_row()} * stride_[t] + lane_k();
      if (t < tiles_ && left_[t] < kRankTile) whole_ = false;
    }
  }

  __device__ __forceinline__ void next_pass() {
    base_ += kTiles;
    if (base_ < smem_.item[item_].rank_tiles) {
      enter_pass(smem_.item[item_]);
      return;
    }
    ++item_;
    enter();
  }

  __device__ __forceinline__ void copy() const {
    const T* x = static_cast<const T*>(task_.x);
    const int k = chunk_ * kChunkK;
    if (tiles_ <= 0) return;
    if (whole_ && k + kChunkK <= task_.k) {  // nearly always
#pragma unroll
      for (int i = 0; i < kTileRows / kApart; ++i) {
        if (kApart * i >= rows_) break;
        ptx::copy_async16(to_ + at(i), x + int64_t{x_[i]} * 8 + k + lane_k(), 16);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (t >= tiles_) break;
        const T* from = a_[t] + k;
#pragma unroll
        for (int i = 0; i < kRankTile / kApart; ++i) {
          ptx::copy_async16(to_ + (1 + t) * kTileBytes + at(i), from + i * (kApart * int64_t{stride_[t]}), 16);
        }
      }
      return;
    }
    const bool inside = k + lane_k() < task_.k;
#pragma unroll
    for (int i = 0; i < kTileRows / kApart; ++i) {
      ptx::copy_async16(to_ + at(i), inside ? x + int64_t{x_[i]} * 8 + k + lane_k() : x, inside ? 16 : 0);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t >= tiles_) break;
#pragma unroll
      for (int i = 0; i < kRankTile / kApart; ++i) {
        const bool real = inside && lane_row() + kApart * i < left_[t];
        const T* from = a_[t] + k + i * (kApart * int64_t{stride_[t]});
        ptx::copy_async16(to_ + (1 + t) * kTileBytes + at(i), real ? from : x, real ? 16 : 0);
      }
    }
  }

  // Of this lane's `i`th piece in a rank tile or in x.
  __device__ __forceinline__ static int at(int i) { return piece_at(lane_row() + kApart * i, threadIdx.x % 8); }

  const StreamTask& task_;
  Smem& smem_;
  const WarpChunks chunks_;
  unsigned char* to_ = nullptr;
  int item_ = 0, count_ = 0, chunk_ = 0, base_ = 0, stage_ = 0;
  int rows_ = 0, tiles_ = 0;
  bool whole_ = true;                    // all ranks of all tiles of the pass are there
  uint32_t x_[kTileRows / kApart] = {};  // in pieces of 8 elements: 32 bits hold 64 GiB
  const T* a_[kTiles] = {};
  int stride_[kTiles] = {}, left_[kTiles] = {};
};

/// Adds the sums of the block's warps, of rank tiles from `base` on, in order, into a plane. The block calls it.
template <int kTiles>
__device__ __forceinline__ void add_partials(const StreamTask& task, ShrinkSmem<kTiles>& smem,
                                             const float (&acc)[kTiles][2][4], const StreamItem& item, int base) {
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const int rows = item.rows;
  // ranks 8n + 2t, 8n + 2t + 1 of rows g and g + 8
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float* to = &smem.partial[threadIdx.x / 32][g][j * kRankTile + n * 8 + 2 * t];
      *reinterpret_cast<float2*>(to) = {acc[j][n][0], acc[j][n][1]};
      if (rows > 8) *reinterpret_cast<float2*>(to + 8 * ShrinkSmem<kTiles>::kPitch) = {acc[j][n][2], acc[j][n][3]};
    }
  }
  __syncthreads();
  constexpr int kQuads = kTiles * (kRankTile / 4);  // a row
  const int quad = static_cast<int>(threadIdx.x) % kQuads;
  float* plane = task.plane + blockIdx.y * task.plane_elements + base * kRankTile + quad * 4;
  if (quad * 4 < (item.rank_tiles - base) * kRankTile) {
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x) / kQuads; row < rows; row += kStreamThreads / kQuads) {
      float4 sum = *reinterpret_cast<const float4*>(&smem.partial[0][row][quad * 4]);
#pragma unroll
      for (int w = 1; w < kStreamWarps; ++w)
        add(sum, *reinterpret_cast<const float4*>(&smem.partial[w][row][quad * 4]));
      *reinterpret_cast<float4*>(plane + int64_t{item.row[row]} * task.plane_width) = sum;
    }
  }
  __syncthreads();
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kStreamThreads, blocks_of(kTiles))
    moe_shrink(const __grid_constant__ StreamTask task) {
  using Smem = ShrinkSmem<kTiles>;
  constexpr int kStages = Smem::kStages;
  Smem& smem = *reinterpret_cast<Smem*>(ptx::dynamic_smem());
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();  // after the wait: of what the next kernel reads early, all but the planes is there
  const PlanWords words(task);
  load_items(task, blockIdx.x, gridDim.x, task.max_tiles, smem.item);  // does not wait for the header
  const int tiles = words.tiles(task);
  const WarpChunks chunks(task);
  ShrinkLoads<T, kTiles> loads(task, smem);
#pragma unroll 1
  for (int first = blockIdx.x; first < tiles; first += kBatch * gridDim.x) {
    if (first != static_cast<int>(blockIdx.x)) load_items(task, first, gridDim.x, tiles, smem.item);
    const int count = items_of(first, gridDim.x, tiles);
    loads.begin(count);
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) loads.start();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const StreamItem& item = smem.item[i];
      const int rank_tiles = item.rank_tiles;
#pragma unroll 1
      for (int base = 0; base == 0 || base < rank_tiles; base += kTiles) {
        float acc[kTiles][2][4] = {};
        int chunk = chunks.begin;
#pragma unroll 1
        do {
          ptx::wait_copies<kStages - 2>();
          __syncwarp();  // the chunk is there, and all lanes are done with the stage that is filled next
          loads.start();
          const unsigned char* at = smem.ring[warp][stage];
          stage = stage + 1 == kStages ? 0 : stage + 1;
          if (chunk < chunks.end) {
#pragma unroll
            for (int step = 0; step < kChunkK / 16; ++step) {
              uint32_t x[4];
              ptx::load_matrices(x, at + piece_at(lane % 16, 2 * step + lane / 16));
#pragma unroll
              for (int j = 0; j < kTiles; ++j) {
                if (base + j >= rank_tiles) break;
                uint32_t ranks[4];
                ptx::load_matrices(
                    ranks, at + (1 + j) * kTileBytes + piece_at(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
                const uint32_t low[2] = {ranks[0], ranks[1]};
                const uint32_t high[2] = {ranks[2], ranks[3]};
                ptx::mma_m16n8k16<T>(acc[j][0], x, low);
                ptx::mma_m16n8k16<T>(acc[j][1], x, high);
              }
            }
          }
          chunk += kStreamWarps;
        } while (chunk < chunks.end);
        if (rank_tiles > 0) add_partials<kTiles>(task, smem, acc, item, base);
      }
    }
    ptx::wait_copies<0>();
    __syncthreads();  // all are done with the items
  }
}

template <int kTiles>
cudaError_t launch_shrink(const Device& device, const StreamTask& task, DType dtype, int most_blocks,
                          cudaStream_t stream) {
  const int blocks = most_blocks < blocks_of(kTiles) ? most_blocks : blocks_of(kTiles);
  LaunchShape shape = stream_shape(blocks * device.sms, task.max_tiles, task.parts);
  shape.smem_bytes = sizeof(ShrinkSmem<kTiles>);
  return dispatch_16_bit(
      dtype, [&](auto element) { return launch<&moe_shrink<decltype(element), kTiles>>(device, shape, task, stream); });
}

// Of a pass over x: one, two or four, ranks beyond it in further passes. Where shared memory has no room for more,
// fewer.
int tiles_a_pass(const LoraParams& p, const Device& device) {
  const int64_t rank_tiles = p.slices.count * divide_up(even_rank(p), kRankTile);
  constexpr int64_t kTwo = sizeof(ShrinkSmem<2>), kFour = sizeof(ShrinkSmem<4>);
  if (rank_tiles <= 1 || device.smem_bytes < kTwo) return 1;
  return rank_tiles <= 2 || device.smem_bytes < kFour ? 2 : 4;
}

}  // namespace

cudaError_t moe_planes(const LoraParams& p, int most_blocks, int& planes) {
  constexpr int kMostPlanes = 8;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t most = min64(divide_up(p.k, kChunkK) / kStreamWarps, kMostPlanes);
  const int blocks = blocks_of(tiles_a_pass(p, device));
  planes = batch_invariant() ? 1 : stream_parts(p.plan.max_tiles, min64(blocks, most_blocks) * device.sms, most);
  return cudaSuccess;
}

int64_t moe_plane_bytes(const LoraParams& p, int planes) {
  return planes * p.rows * plane_width(p.v_width, p.slices.count) * int64_t{sizeof(float)};
}

cudaError_t moe_shrink_path(const LoraParams& p, int planes, int most_blocks, cudaStream_t stream) {
  if (p.plan.max_tiles == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  StreamTask task = stream_task(p, planes);
  task.parts = planes;
  const int tiles = tiles_a_pass(p, device);
  return (tiles == 1   ? launch_shrink<1>
          : tiles == 2 ? launch_shrink<2>
                       : launch_shrink<4>)(device, task, p.dtype, most_blocks, stream);
}

}  // namespace polylora::cuda
