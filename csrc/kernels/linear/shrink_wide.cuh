// What the shrink kernels for wide tiles share: the item, the ring in shared memory, and where the sums go.
#pragma once

#include "linear/task.cuh"

namespace polylora::cuda {

inline constexpr int kWideThreads = 256;
inline constexpr int kChunkK = 64;  // elements of K in a stage: 128 bytes a row
inline constexpr int kMaxRankTiles = kMaxSlices * kMaxRank / kRankTile;

/// What a block works on, in shared memory.
struct WideItem {
  int32_t head[8];  // of the plan: version, rows, groups, wide tiles; of the tile: group, position, rows
  SliceEntry entry[kMaxSlices];
  int32_t row[kWideTileRows];  // beyond the tile's end the last
  // derived
  int32_t tiles;                   // of the plan
  int32_t rows, pos;               // of the tile
  int32_t rank[kMaxSlices];        // 0: absent
  int32_t packed_col[kMaxSlices];  // of PackedV; slices that share A share it
  int32_t rank_tiles;
  RankTile rank_tile[kMaxRankTiles];
};

/// The words that a WideItem is made of, one a thread, so that one load a thread reads them again: the item is read
/// before the kernel before has ended, and compared after it.
class WideJob {
 public:
  /// Whatever stands in memory, nothing outside plan and table is read. All threads call it; it syncs at its end.
  __device__ __forceinline__ void read(const LinearTask& task, WideItem& item, int index) {
    const int thread = threadIdx.x;
    static_assert(kPlanVersion == 0 && kPlanRows == 1 && kPlanGroups == 2);
    at_ = nullptr;
    if (thread < 4) at_ = task.header + (thread < 3 ? thread : kPlanWideTiles);
    if (thread >= 4 && thread < 7) {
      at_ = reinterpret_cast<const int32_t*>(task.tile + min(index, task.max_tiles - 1)) + thread - 4;
    }
    if (at_ != nullptr) item.head[thread] = word_ = ptx::load_fresh4(at_);
    __syncthreads();
    const uint32_t group = min(static_cast<uint32_t>(item.head[4]), static_cast<uint32_t>(task.groups - 1));
    const int rows = min(max(item.head[6], 1), min(kWideTileRows, task.rows));
    const int pos = min(max(item.head[5], 0), task.rows - rows);
    constexpr int kWords = sizeof(SliceEntry) / 4;
    if (thread >= 8 && thread < 8 + kWords * task.slices) {
      at_ = reinterpret_cast<const int32_t*>(task.table + int64_t{group} * task.slices) + thread - 8;
      reinterpret_cast<int32_t*>(item.entry)[thread - 8] = word_ = ptx::load_fresh4(at_);
    }
    if (thread >= kWideThreads - kWideTileRows) {
      const int i = thread - (kWideThreads - kWideTileRows);
      at_ = task.order + pos + min(i, rows - 1);
      word_ = ptx::load_fresh4(at_);
      item.row[i] = min(static_cast<uint32_t>(word_), static_cast<uint32_t>(task.rows - 1));
    }
    __syncthreads();
    if (thread < task.slices) {
      const LinearSlice& slice = task.slice[thread];
      const SliceEntry entry = item.entry[thread];
      const bool fits = entry_fits(entry, entry.rank, slice.a_rows, slice.width, slice.b_elements, task.v_width);
      item.rank[thread] = fits ? entry.rank : 0;
    }
    __syncthreads();
    if (thread == 0) {
      const bool known = item.head[0] == kPlanVersionValue && item.head[1] == task.rows && item.head[2] == task.groups;
      item.tiles = known ? min(item.head[3], task.max_tiles) : 0;
      item.rows = rows;
      item.pos = pos;
      const uint32_t first = pack_columns(item.entry, item.rank, task.slices, item.packed_col);
      int tiles = 0;
      for (int s = 0; s < task.slices; ++s) {
        for (int r = 0; (first >> s & 1) != 0 && r < item.rank[s]; r += kRankTile) {
          item.rank_tile[tiles++] = {static_cast<int16_t>(s), static_cast<int16_t>(r)};
        }
      }
      item.rank_tiles = tiles;
    }
    __syncthreads();
  }

  /// Whether memory now holds something else.
  __device__ __forceinline__ bool differs() const { return at_ != nullptr && ptx::load_fresh4(at_) != word_; }

 private:
  const int32_t* at_ = nullptr;
  int32_t word_ = 0;
};

/// Bytes of the ring.
__host__ __device__ constexpr int wide_ring_bytes(int rank_tiles, int stages) {
  return stages * (kWideTileRows + rank_tiles * kRankTile) * kChunkK * 2;
}

/// Where 16-byte piece `piece` of row `row` of a stage lies, in bytes: the 128-byte swizzle of the tensor cores' own
/// layouts, free of bank conflicts for ldmatrix, too.
__device__ __forceinline__ int piece_at(int row, int piece) { return row * kChunkK * 2 + ((piece ^ (row & 7)) << 4); }

/// The chunks of K of a part.
__device__ __forceinline__ Part chunks_of(const LinearTask& task, int part) {
  const int chunks = (task.k + kChunkK - 1) / kChunkK;
  return {chunks * part / task.planes, chunks * (part + 1) / task.planes};
}

/// Brings the chunks of x and A of a pass over `kTiles` rank tiles into stages of the ring: a thread brings one 16-byte
/// piece of every 32nd row. Rows and ranks that are not there become zeros.
template <typename T, int kTiles>
class WideCopies {
 public:
  static constexpr int kStageBytes = (kWideTileRows + kTiles * kRankTile) * kChunkK * 2;
  static constexpr int kABytes = kWideTileRows * kChunkK * 2;  // from a stage's begin to its part of A

  __device__ __forceinline__ WideCopies(const LinearTask& task, const WideItem& item, int first_rank_tile)
      : task_(task) {
#pragma unroll
    for (int i = 0; i < kWideTileRows / 32; ++i) {
      const int row = thread_row() + 32 * i;
      x_[i] = row < item.rows ? static_cast<uint32_t>(int64_t{item.row[row]} * task.x_stride / 8) : kNothing;
    }
#pragma unroll
    for (int i = 0; i < kARows; ++i) {
      const int row = thread_row() + 32 * i;
      const int tile = first_rank_tile + row / kRankTile;
      a_[i] = nullptr;
      if (row < kTiles * kRankTile && tile < item.rank_tiles) {
        const RankTile at = item.rank_tile[tile];
        const SliceEntry& entry = item.entry[at.slice];
        const LinearSlice& slice = task.slice[at.slice];
        const int r = at.first_rank + row % kRankTile;
        if (r < item.rank[at.slice]) a_[i] = static_cast<const T*>(slice.a) + int64_t{entry.a_row + r} * slice.a_stride;
      }
    }
  }

  __device__ __forceinline__ void start(unsigned char* stage, int chunk) const {
    unsigned char* to = stage + piece_at(thread_row(), threadIdx.x % 8);
    const int k = chunk * kChunkK + static_cast<int>(threadIdx.x) % 8 * 8;
    const bool inside = k < task_.k;
    const T* x = static_cast<const T*>(task_.x);
#pragma unroll
    for (int i = 0; i < kWideTileRows / 32; ++i) {
      const bool real = inside && x_[i] != kNothing;
      ptx::copy_async16(to + i * 32 * kChunkK * 2, real ? x + int64_t{x_[i]} * 8 + k : x, real ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kARows; ++i) {
      if (kTiles % 2 == 1 && i == kARows - 1 && thread_row() >= kRankTile) break;  // half of the last 32 rows
      const bool real = inside && a_[i] != nullptr;
      ptx::copy_async16(to + kABytes + i * 32 * kChunkK * 2, real ? a_[i] + k : x, real ? 16 : 0);
    }
  }

 private:
  static constexpr int kARows = (kTiles + 1) / 2;
  static constexpr uint32_t kNothing = ~0u;

  __device__ __forceinline__ static int thread_row() { return threadIdx.x / 8; }

  const LinearTask& task_;
  uint32_t x_[kWideTileRows / 32];  // in pieces from x on: 32 bits hold 64 GiB
  const T* a_[kARows];
};

/// Two sums, of neighbouring ranks of a row, to v: `r` counts from the rank tile's first.
template <typename T>
__device__ __forceinline__ void store_v(const LinearTask& task, const WideItem& item, int part, int rank_tile, int row,
                                        int r, float2 sums) {
  const RankTile tile = item.rank_tile[rank_tile];
  const int rank = item.rank[tile.slice];
  r += tile.first_rank;
  if (task.v_form == VForm::kRows) {
    float* to = static_cast<float*>(task.v) + int64_t{item.row[row]} * task.v_stride + item.entry[tile.slice].v_col + r;
    if (r < rank) to[0] = sums.x;
    if (r + 1 < rank) to[1] = sums.y;
    return;
  }
  // zeros from the rank on, to the end of its block of 32
  const float2 masked{r < rank ? sums.x : 0.f, r + 1 < rank ? sums.y : 0.f};
  const bool last_half = tile.first_rank % 32 == 0 && tile.first_rank + kRankTile >= rank;
  const int64_t at = int64_t{item.pos + row} * task.v_stride + item.packed_col[tile.slice];
  if (task.v_form == VForm::kPacked) {
    T* to = static_cast<T*>(task.v) + at;
    *reinterpret_cast<uint32_t*>(to + PackedV::place(r)) = pack(masked.x, masked.y, T{});
    if (last_half) *reinterpret_cast<uint32_t*>(to + PackedV::place(r + kRankTile)) = 0;
  } else {
    float* to = static_cast<float*>(task.v) + part * task.v_plane + at + r;
    *reinterpret_cast<float2*>(to) = masked;
    if (last_half) *reinterpret_cast<float2*>(to + kRankTile) = {0.f, 0.f};
  }
}

// ---- host

/// A call of shrink on wide tiles, spread over the device.
struct WideShrink {
  Device device;
  LinearTask task;
  LaunchShape shape;   // but for shared memory
  int rank_tiles = 0;  // to expect
};

/// Hopper's kernel.
cudaError_t shrink_wgmma(const WideShrink& how, DType dtype, cudaStream_t stream);

/// Adds the planes of `planes` to v of `sum`, which is packed or in rows.
cudaError_t add_planes(const LinearTask& planes, const LinearTask& sum, DType dtype, const Device& device,
                       cudaStream_t stream);

}  // namespace polylora::cuda
