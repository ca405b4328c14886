// shrink for MoE's long runs, sm_90a: x A^T for up to 128 rows of a group (slot, expert), A read once for all of them.
//
// A unit is a wide tile of the plan and a part of K, all slices. Its x and A come through one ring of the block's
// (cp.async), and the block's four warps multiply them by wgmma, 64 rows at a time: no warp has a sum of another's, so
// that sums go from registers into the part's plane. moe_shrink.cu, whose units have 16 rows, reads A from L2 again for
// each of them, and spends three times the instructions on a row.
//
//   stage   more than 64 rows:  64 of K: rows 0 to 63, rows 64 to 127 of x; 16 ranks of A, the next 16, ...
//           fewer:             128 of K: the rows' first 64 of K, their second 64; 16 ranks' first 64 of K, ..., second
//
// so that a step, which has a barrier, brings about as many bytes. The ring never runs dry between the units that were
// looked up together: while one is multiplied, the next one's copies are under way. Rows and ranks that are not there
// may hold anything in shared memory: they end in sums that nobody stores.
#include "linear/paths.h"
#include "moe/paths.h"
#include "moe/stream.cuh"

// what only 9.0a compiles would count as unused in the passes for other devices
#pragma nv_diag_suppress 177

namespace polylora::cuda {
namespace {

constexpr int kHalfRows = 64;  // of a wgmma
constexpr int kHalfBytes = kHalfRows * kChunkK * 2;
constexpr int kUnits = 8;                            // looked up at once; of 1024 tiles a block an SM has as many
constexpr int kBlocks = 2;                           // an SM
constexpr int kXBytes = 2 * kHalfBytes;              // of a stage
constexpr int kTileBytes = kRankTile * kChunkK * 2;  // of a rank tile of A
// By rank tiles a pass over x. Stages of the ring: two blocks are to have room, or one beside the base's GEMM.
constexpr int stages_of(int tiles) { return tiles == 1 ? 5 : tiles == 2 ? 4 : 3; }
// Whether up to 64 rows come with 128 of K: of many ranks, 64 are a stage's worth.
constexpr bool is_deep(int tiles) { return tiles <= 4; }

/// A unit's tile, in shared memory.
struct LongItem : StreamTile {
  int32_t row[kWideTileRows];    // those of the tile alone
  int32_t x_row[kWideTileRows];  // of x
};
static_assert(sizeof(LongItem) % 16 == 0);

template <int kTiles>
struct alignas(1024) LongSmem {  // as the swizzle wants it
  static constexpr int kStages = stages_of(kTiles);
  static constexpr int kStageBytes = kXBytes + (is_deep(kTiles) ? 2 : 1) * kTiles * kTileBytes;
  static_assert(kXBytes % 1024 == 0 && kStageBytes % 1024 == 0);

  unsigned char ring[kStages][kStageBytes];
  LongItem item[kUnits];
};

/// Looks up the tiles first, first + stride, ... below `tiles`, kUnits at most; the block calls it. As load_items of
/// stream.cuh it may be given the capacity for `tiles`.
__device__ __forceinline__ void load_long_items(const StreamTask& task, int first, int stride, int tiles,
                                                LongItem (&item)[kUnits]) {
  constexpr int kThreadsAUnit = kStreamThreads / kUnits;
  constexpr int kRows = kWideTileRows / kThreadsAUnit;  // of a thread
  const int i = static_cast<int>(threadIdx.x) / kThreadsAUnit;
  const int j = static_cast<int>(threadIdx.x) % kThreadsAUnit;
  const int64_t index = first + int64_t{i} * stride;
  if (index < tiles) {
    LongItem& to = item[i];
    const PlanTile tile(task, task.tile + index, kWideTileRows);
    // all reads of a kind before the first that depends on one of them
    int row[kRows], x_row[kRows];
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      row[n] = 0;
      if (j + n * kThreadsAUnit < tile.rows) row[n] = row_at(task, tile.pos + j + n * kThreadsAUnit);
    }
    if (j == 0) {
      load_ranks(task, tile.group, to);
      to.rows = tile.rows;
    }
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      x_row[n] = row[n];
      if (task.x_div > 0 && j + n * kThreadsAUnit < tile.rows) x_row[n] = pair_of(task, row[n]);
    }
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      if (j + n * kThreadsAUnit >= tile.rows) break;
      to.row[j + n * kThreadsAUnit] = row[n];
      to.x_row[j + n * kThreadsAUnit] = task.x_div > 0 ? x_row[n] / task.x_div : x_row[n];
    }
  }
  __syncthreads();
}

/// What the block asks for, a step at a time, ahead of its products. Units without ranks have no steps.
template <typename T, int kTiles>
class LongLoads {
  using Smem = LongSmem<kTiles>;

 public:
  __device__ __forceinline__ LongLoads(const StreamTask& task, Smem& smem)
      : task_(task), smem_(smem), chunks_(task), at_(piece_at(thread_row(), threadIdx.x % 8)) {}

  /// Begins with the units that were looked up.
  __device__ __forceinline__ void begin(int count) {
    item_ = 0;
    count_ = count;
    stage_ = 0;
    enter();
  }

  /// The next step's copies, into the stage that is free.
  __device__ __forceinline__ void start() {
    if (item_ < count_) {
      copy();
      chunk_ += is_deep_ ? 2 : 1;
      if (chunk_ >= chunks_.end) next_pass();
    }
    ptx::commit_copies();
    stage_ = stage_ + 1 == Smem::kStages ? 0 : stage_ + 1;
  }

 private:
  static constexpr int kApart = kStreamThreads / 8;  // rows between two pieces of a thread
  static constexpr int kRows = kWideTileRows / kApart;
  static_assert(kApart == kRankTile);

  __device__ __forceinline__ static int thread_row() { return static_cast<int>(threadIdx.x) / 8; }
  __device__ __forceinline__ static int thread_k() { return static_cast<int>(threadIdx.x) % 8 * 8; }

  // The next unit with any ranks, from item_ on: where its x is.
  __device__ __forceinline__ void enter() {
    while (item_ < count_ && smem_.item[item_].rank_tiles == 0) ++item_;
    if (item_ >= count_) return;
    const LongItem& item = smem_.item[item_];
    is_deep_ = is_deep(kTiles) && item.rows <= kHalfRows;
    rows_ = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool is_second = is_deep_ && i >= kRows / 2;  // 64 of K
      const int row = thread_row() + kApart * (is_second ? i - kRows / 2 : i);
      if (row >= item.rows) continue;
      rows_ |= 1u << i;
      x_[i] = static_cast<uint32_t>(int64_t{item.x_row[row]} * task_.x_stride / 8) + (is_second ? kChunkK / 8 : 0);
    }
    base_ = 0;
    enter_pass(item);
  }

  // Where the ranks of a pass are.
  __device__ __forceinline__ void enter_pass(const LongItem& item) {
    chunk_ = chunks_.begin;
    ranks_ = 0;
    const int of_first = item.tiles_of_first();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int s = base_ + t < of_first ? 0 : 1;
      const int rank = (base_ + t - item.first_rank_tile[s]) * kRankTile + thread_row();
      a_[t] = static_cast<const T*>(item.a[s]) + int64_t{rank} * task_.slice[s].a_stride;
      if (base_ + t < item.rank_tiles && rank < item.rank[s]) ranks_ |= 1u << t;
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

  // Zeros beyond K, of what is there. Addresses that take one instruction each: kept from the compiler, which would
  // make each from the task anew.
  __device__ __forceinline__ void copy() const {
    const int k = chunk_ * kChunkK + thread_k();
    const int apart = is_deep_ ? kChunkK : 0;  // from the first half of x to the second
    const int end = min(task_.k, chunks_.end * kChunkK);
    const bool inside = k < end;
    const bool second_inside = k + apart < end;
    unsigned char* to = ptx::keep(smem_.ring[stage_] + at_);
    const auto* x = static_cast<const T*>(task_.x);
    const auto first = reinterpret_cast<uintptr_t>(ptx::keep(x + (inside ? k : 0)));
    const auto second = reinterpret_cast<uintptr_t>(ptx::keep(x + (second_inside ? k : -apart)));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool is_second = i >= kRows / 2;
      const auto* from = reinterpret_cast<const T*>((is_second ? second : first) + uint64_t{x_[i]} * 16);
      if (rows_ >> i & 1) {
        ptx::copy_async16(to + i * kTileBytes, from, (is_second ? second_inside : inside) ? 16 : 0);
      }
    }
    const uint32_t from_k = inside ? k : 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (ranks_ >> t & 1) ptx::copy_async16(to + kXBytes + t * kTileBytes, a_[t] + from_k, inside ? 16 : 0);
    }
    if (!is_deep_) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (ranks_ >> t & 1) {
        ptx::copy_async16(to + kXBytes + (kTiles + t) * kTileBytes, a_[t] + (second_inside ? k + kChunkK : 0),
                          second_inside ? 16 : 0);
      }
    }
  }

  const StreamTask& task_;
  Smem& smem_;
  const BlockChunks chunks_;
  const int at_;  // of this thread's piece of each 16 rows
  int item_ = 0, count_ = 0, chunk_ = 0, base_ = 0, stage_ = 0;
  bool is_deep_ = false;
  uint32_t rows_ = 0;        // a bit for each piece of x that this thread brings: whether its row is there
  uint32_t ranks_ = 0;       // the same of A, for each rank tile
  uint32_t x_[kRows] = {};   // in pieces of 8 elements: 32 bits hold 64 GiB
  const T* a_[kTiles] = {};  // of this thread's rank
};

#if POLYLORA_HAS_WGMMA
/// acc += x a^T of 64 rows, kTiles rank tiles and 16 elements of K.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply(float (*acc)[8], uint64_t x, uint64_t a) {
  constexpr int kTile = kTileBytes >> 4;
  static_assert(kTiles == 1 || kTiles == 2 || kTiles % 4 == 0);
  if constexpr (kTiles == 1) ptx::wgmma_m64n16k16(acc, x, a, T{});
  if constexpr (kTiles == 2) ptx::wgmma_m64n32k16(acc, x, a, T{});
#pragma unroll
  for (int i = 0; i + 4 <= kTiles; i += 4) ptx::wgmma_m64n64k16(acc + i, x, a + i * kTile, T{});
}

/// A pass over x and `chunks` of K, of a unit of up to 64 kHalves rows: its products, and their sums into the plane.
/// The block calls it.
template <typename T, int kTiles, int kHalves>
__device__ __forceinline__ void shrink_pass(const StreamTask& task, LongSmem<kTiles>& smem, const LongItem& item,
                                            int base, int chunks, LongLoads<T, kTiles>& loads, int& stage) {
  constexpr int kStages = LongSmem<kTiles>::kStages;
  constexpr bool kDeep = kHalves == 1 && is_deep(kTiles);
  float acc[kHalves][kTiles][8];
#pragma unroll
  for (int i = 0; i < kHalves * kTiles * 8; ++i) acc[i / (kTiles * 8)][i / 8 % kTiles][i % 8] = 0.f;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk += kDeep ? 2 : 1) {
    ptx::wait_copies<kStages - 2>();
    ptx::fence_async_proxy();
    ptx::wgmma_wait<0>();
    __syncthreads();  // the chunk is there for all, and all are done with the stage that is filled next
    ptx::wgmma_fence();
    const uint64_t x = ptx::swizzled_rows(smem.ring[stage]);
    const uint64_t a = ptx::swizzled_rows(smem.ring[stage] + kXBytes);
    // K ascending either way: a row's bits are not to tell how many share its tile
#pragma unroll
    for (int part = 0; part < (kDeep ? 2 : 1); ++part) {
      const int x_at = part * kHalfBytes, a_at = part * kTiles * kTileBytes;
#pragma unroll
      for (int step = 0; step < kChunkK / 16; ++step) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          multiply<T, kTiles>(acc[half], x + ((x_at + half * kHalfBytes) >> 4) + 2 * step, a + (a_at >> 4) + 2 * step);
        }
      }
    }
    ptx::wgmma_commit();
    loads.start();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  ptx::wgmma_wait<0>();
  // ranks 8n + 2t, 8n + 2t + 1 of rows g and g + 8 of this warp's 16
  const int lane = threadIdx.x % 32;
  const int first = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  float* plane = task.plane + blockIdx.y * task.plane_elements + base * kRankTile + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      const int row = half * kHalfRows + first + low * 8;
      if (row >= item.rows) continue;
      float* to = plane + int64_t{item.row[row]} * task.plane_width;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (base + t >= item.rank_tiles) break;
        const float (&sums)[8] = acc[half][t];
        *reinterpret_cast<float2*>(to + t * kRankTile) = {sums[low * 2], sums[low * 2 + 1]};
        *reinterpret_cast<float2*>(to + t * kRankTile + 8) = {sums[4 + low * 2], sums[5 + low * 2]};
      }
    }
  }
}
#endif

template <typename T, int kTiles>
__global__ void __launch_bounds__(kStreamThreads, kBlocks) moe_shrink_long(const __grid_constant__ StreamTask task) {
#if POLYLORA_HAS_WGMMA
  using Smem = LongSmem<kTiles>;
  Smem& smem = *reinterpret_cast<Smem*>(ptx::dynamic_smem());

  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();  // after the wait: of what the next kernel reads early, all but the planes is there
  const PlanWords words(task);
  load_long_items(task, blockIdx.x, gridDim.x, task.max_tiles, smem.item);  // does not wait for the header
  const int tiles = words.wide_tiles(task);
  const BlockChunks chunks(task);
  LongLoads<T, kTiles> loads(task, smem);
#pragma unroll 1
  for (int first = blockIdx.x; first < tiles; first += kUnits * gridDim.x) {
    if (first != static_cast<int>(blockIdx.x)) load_long_items(task, first, gridDim.x, tiles, smem.item);
    const int count = min(kUnits, static_cast<int>((tiles - first + gridDim.x - 1) / gridDim.x));
    loads.begin(count);
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < Smem::kStages - 1; ++i) loads.start();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const LongItem& item = smem.item[i];
#pragma unroll 1
      for (int base = 0; base < item.rank_tiles; base += kTiles) {
        const int of_block = chunks.end - chunks.begin;
        if (item.rows > kHalfRows) {
          shrink_pass<T, kTiles, 2>(task, smem, item, base, of_block, loads, stage);
        } else {
          shrink_pass<T, kTiles, 1>(task, smem, item, base, of_block, loads, stage);
        }
      }
    }
    ptx::wait_copies<0>();
    __syncthreads();  // all are done with the items
  }
#else
  __trap();  // moe_stream.cu sends no other device here
#endif
}

// Of all SMs.
int64_t all_blocks(const Device& device, int most_blocks) { return min64(kBlocks, most_blocks) * device.sms; }

template <int kTiles>
cudaError_t launch_shrink(const Device& device, const StreamTask& task, DType dtype, int most_blocks,
                          cudaStream_t stream) {
  LaunchShape shape = stream_shape(all_blocks(device, most_blocks), task.max_tiles, task.parts);
  shape.smem_bytes = sizeof(LongSmem<kTiles>);
  return dispatch_16_bit(dtype, [&](auto element) {
    return launch<&moe_shrink_long<decltype(element), kTiles>>(device, shape, task, stream);
  });
}

}  // namespace

bool moe_shrink_long_serves(const LoraParams& p) {
  Device device;
  if (current_device(device) != cudaSuccess || device.major != 9 || !POLYLORA_COMPILED_90A) return false;
  // its sums are other bits than those of moe_shrink.cu, which short calls take
  if (p.v_of_x || p.k == 0 || batch_invariant()) return false;
  // A is read for at least two tiles' rows, if their groups are hit alike, and there are units for all SMs
  return has_long_runs(p) && p.plan.max_wide_tiles >= device.sms;
}

cudaError_t moe_long_planes(const LoraParams& p, int most_blocks, int& planes) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t most = divide_up(p.k, kChunkK) / kStreamWarps;
  planes = stream_parts(p.plan.max_wide_tiles, all_blocks(device, most_blocks), most);
  return cudaSuccess;
}

cudaError_t moe_shrink_long_path(const LoraParams& p, int planes, int most_blocks, cudaStream_t stream) {
  if (p.plan.max_wide_tiles == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  StreamTask task = stream_task(p, planes);
  to_wide_tiles(p, task);
  task.parts = planes;
  const int64_t rank_tiles = p.slices.count * divide_up(even_rank(p), kRankTile);
  return (rank_tiles <= 1   ? launch_shrink<1>
          : rank_tiles <= 2 ? launch_shrink<2>
          : rank_tiles <= 4 ? launch_shrink<4>
                            : launch_shrink<8>)(device, task, p.dtype, most_blocks, stream);
}

}  // namespace polylora::cuda
