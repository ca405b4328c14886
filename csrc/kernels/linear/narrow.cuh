// What the kernels for few rows share: the job of a warp, its products, its outputs.
//
// Rows of the batch are on the M side of mma, weights on its N side: the registers of a 16-byte load of weights are
// operands as they are. Lanes that would read beyond a rank, a width or the rows of a tile read a neighbour's element
// instead and drop the result; only the summed index needs true zeros.
//
// Column 2t + e of mma i stands for output 8t + 2i + e of 32, so that lane 4g + t owns 8 consecutive outputs of row g:
// 16 bytes of y at a time, without a transpose.
#pragma once

#include "linear/paths.h"
#include "linear/task.cuh"

namespace polylora::cuda {

/// Warps of a block of the two launches, and how many blocks an SM shall have room for. Pairs of MoE: beside a GEMM of
/// experts, whose many small blocks leave 14 thousand registers of an SM (H200, SGLang's, 10 of 128 threads).
__host__ __device__ constexpr int narrow_warps(bool moe) { return moe ? 4 : 8; }
__host__ __device__ constexpr int narrow_blocks_per_sm(bool moe) { return moe ? 5 : 2; }

inline constexpr int kUnitK = 32;  // elements of K that a quad of lanes loads at once

/// Pitch of v in shared memory, in elements: the rows that a warp touches together lie in different banks.
__host__ __device__ constexpr int narrow_v_pitch(int rank_cap) { return (rank_cap + 63) / 64 * 64 + 16; }

/// What a warp works on, up to kRows rows of a tile: words of the plan and the table, one a lane, so that one load a
/// lane reads them again. Lanes 0-3 and 7: the plan's version, rows, groups, tiles, longest run. 4-6: the tile. 8-14:
/// the slice's entry. 16-31: the job's rows, beyond its end the last.
///
/// Jobs of 8 rows: a tile is one where no run of the batch has more, else two, and its words are those of lanes 24-26.
template <int kRows>
struct NarrowJob {
  static_assert(kTileRows == 16 && (kRows == 8 || kRows == 16));
  const int32_t* at;
  int32_t word;
  int jobs;  // of the whole grid

  // Whatever stands in memory, nothing outside plan and table is read. Where the plan has no such job, only its words
  // are there: a batch without adapters ends a latency earlier.
  __device__ __forceinline__ void read(const LinearTask& task, int index, int slice) {
    const int lane = threadIdx.x % 32;
    static_assert(kPlanVersion == 0 && kPlanRows == 1 && kPlanGroups == 2);
    const int tile = min(kRows == 8 && lane >= 16 ? index / 2 : index, task.max_tiles - 1);
    at = lane < 4 || lane == 7 ? task.header + (lane < 3    ? lane
                                                : lane == 3 ? task.tiles_word
                                                            : task.longest_word)
                               : reinterpret_cast<const int32_t*>(task.tile + tile) + (lane & 3);
    word = ptx::load_fresh4(at);
    const int from = tile_lane();
    const uint32_t group = min(static_cast<uint32_t>(get(from)), static_cast<uint32_t>(task.groups - 1));
    const int row = get(from + 1) + first_row(index) + min(lane & (kRows - 1), max(rows(index) - 1, 0));
    const int32_t* second =
        lane < 16
            ? reinterpret_cast<const int32_t*>(task.table + int64_t{group} * task.slices + slice) + min(lane & 7, 6)
            : task.order + min(static_cast<uint32_t>(row), static_cast<uint32_t>(task.rows - 1));
    // all shuffles at once: they stand between two loads
    const int words[] = {get(0) - kPlanVersionValue, get(1) - task.rows, get(2) - task.groups, get(3)};
    jobs = (words[0] | words[1] | words[2]) == 0 ? min(words[3], task.max_tiles) << two_a_tile() : 0;
    if (index >= jobs) return;
    if (lane >= 8 && lane < 16 + kRows) {
      at = second;
      word = ptx::load_fresh4(at);
    }
  }
  __device__ __forceinline__ int32_t get(int lane) const { return __shfl_sync(0xffffffffu, word, lane); }
  __device__ __forceinline__ bool two_a_tile() const { return kRows == 8 && get(7) > kRows; }
  __device__ __forceinline__ int first_row(int index) const { return two_a_tile() ? index % 2 * kRows : 0; }
  __device__ __forceinline__ int tile_lane() const { return two_a_tile() ? 24 : 4; }

  // 0 where a tile has no second half.
  __device__ __forceinline__ int rows(int index) const {
    return min(max(get(tile_lane() + 2) - first_row(index), 0), kRows);
  }
  /// Of its `i`th row in the plan's order, inside it whatever the plan says.
  __device__ __forceinline__ int position(const LinearTask& task, int index, int i) const {
    const int first = get(tile_lane() + 1) + first_row(index);
    return min(static_cast<uint32_t>(first + i), static_cast<uint32_t>(task.rows - 1));
  }
  /// Of its first row in the planes.
  __device__ __forceinline__ int plane_row(const LinearTask& task, int index) const {
    return task.tiles_word == kPlanShortTiles ? index * kRows : position(task, index, 0);
  }
  __device__ __forceinline__ SliceEntry entry() const {
    const uint64_t offset =
        static_cast<uint64_t>(static_cast<uint32_t>(get(13))) << 32 | static_cast<uint32_t>(get(12));
    return {get(8), get(9), get(10), get(11), static_cast<int64_t>(offset), __int_as_float(get(14)), 0};
  }
  __device__ __forceinline__ int row(const LinearTask& task, int i) const {
    return min(static_cast<uint32_t>(get(16 + i)), static_cast<uint32_t>(task.rows - 1));
  }
  /// Which of rows g and g + 8 the job has: bits.
  __device__ __forceinline__ uint32_t has(int index) const {
    const int g = threadIdx.x % 32 / 4;
    const int all = rows(index);
    return (g < all ? 1u : 0u) | (g + 8 < all ? 2u : 0u);
  }
};

/// Whether the plan has a row map: it was made for another call then.
__device__ __forceinline__ bool has_row_map(const LinearTask& task) {
  return ptx::load_fresh4(task.header + kPlanPairs) != 0;
}

// Ranks r..r+3 of a row of B, zeros beyond the true rank, which are not read. Out of line: for what is unaligned, or a
// rank that is no multiple of 4.
template <typename T>
__device__ __attribute__((noinline)) uint2 load_ranks(const T* row, int r, int rank) {
  uint32_t pair[2] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (r + i < rank) pair[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(row)[r + i]} << (i % 2 * 16);
  }
  return {pair[0], pair[1]};
}

// The sum of 2^count_log2 quads (16 at most), `stride` quads apart, in order.
__device__ __forceinline__ float4 add_quads(const float4* quad, int stride, int count_log2) {
  float4 sum = quad[0];
  if (count_log2 == 0) return sum;
  add(sum, quad[stride]);
#pragma unroll
  for (int have = 2; have <= 8; have *= 2) {
    if (1 << count_log2 == have) return sum;
    float4 next[4];
#pragma unroll
    for (int base = 0; base < have; base += 4) {
#pragma unroll
      for (int i = 0; i < 4 && i < have; ++i) next[i] = quad[(have + base + i) * stride];
#pragma unroll
      for (int i = 0; i < 4 && i < have; ++i) add(sum, next[i]);
    }
  }
  return sum;
}

/// 16 ranks of x A^T for the job's rows, over units of K. Of 16 rows, the second 8 are loaded where there are any.
template <typename T, int kStepUnits, int kRows>
struct NarrowShrink {
  static constexpr int kEights = kRows / 8;

  const T* x[kEights];      // rows g and g + 8, element 8t on
  const T *a_low, *a_high;  // ranks r + g and r + g + 8
  int eights = kEights;     // of rows that there are
  float acc[2][4];
  uint4 a_frag[kStepUnits][2], x_frag[kStepUnits][kEights];

  // The registers of what a path may leave unset would be kept through the whole kernel.
  __device__ __forceinline__ void clear() {
    clear_sums();
#pragma unroll
    for (int i = 0; i < kStepUnits; ++i) {
      a_frag[i][0] = a_frag[i][1] = uint4{0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < kEights; ++j) x_frag[i][j] = uint4{0, 0, 0, 0};
    }
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0.f;
  }
  template <bool kMoe = false>
  __device__ __forceinline__ void set_rows(const LinearTask& task, const NarrowJob<kRows>& job, int rows) {
    eights = kEights == 1 || rows <= 8 ? 1 : 2;
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      int row = job.row(task, static_cast<int>(threadIdx.x) % 32 / 4 + 8 * i);
      if (kMoe && task.x_div > 1)
        row = static_cast<int>(static_cast<uint32_t>(row) / static_cast<uint32_t>(task.x_div));
      x[i] = static_cast<const T*>(task.x) + int64_t{row} * task.x_stride + threadIdx.x % 4 * 8;
    }
  }
  __device__ __forceinline__ void set_ranks(const LinearSlice& slice, int a_row, int r, int rank) {
    const int g = threadIdx.x % 32 / 4;
    const T* a = static_cast<const T*>(slice.a) + threadIdx.x % 4 * 8;
    a_low = a + int64_t{a_row + min(r + g, rank - 1)} * slice.a_stride;
    a_high = a + int64_t{a_row + min(r + g + 8, rank - 1)} * slice.a_stride;
  }
  /// Units u to u + kStepUnits, which lie at fixed distances from the first: an address each would be most of this.
  __device__ __forceinline__ void load(int u, int end) {
    const int64_t first = int64_t{u} * kUnitK;
    const T *low = a_low + first, *high = a_high + first;
    const T* row[kEights];
#pragma unroll
    for (int j = 0; j < kEights; ++j) row[j] = x[j] + first;
#pragma unroll
    for (int i = 0; i < kStepUnits; ++i) {
      if (u + i >= end) break;
      a_frag[i][0] = ptx::load_weights16(low + i * kUnitK);
      a_frag[i][1] = ptx::load_weights16(high + i * kUnitK);
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
        if (j < eights) x_frag[i][j] = ptx::load16(row[j] + i * kUnitK);
      }
    }
  }
  __device__ __forceinline__ void multiply(int u, int end) {
#pragma unroll
    for (int i = 0; i < kStepUnits; ++i) {
      if (u + i >= end) break;
      const Rows32 rows_of_x(x_frag[i][0], kEights == 1 ? uint4{0, 0, 0, 0} : x_frag[i][kEights - 1]);
      mma_32<T>(acc[0], rows_of_x, a_frag[i][0]);
      mma_32<T>(acc[1], rows_of_x, a_frag[i][1]);
    }
  }
  /// Ranks 2t, 2t + 1 of the first and second 8, of the rows that bits of `has` say are there; zeros beyond the true
  /// rank. `to`: of row g and rank r; `pitch`: of a row.
  __device__ __forceinline__ void store(float* to, int pitch, int r, int rank, uint32_t has) {
    const int t = threadIdx.x % 4;
    const int left = rank - r - 2 * t;
#pragma unroll
    for (int i = 0; i < 2 * kEights; ++i) {
      const int ranks = i % 2 * 8;
      const int eight = i / 2;
      const float2 pair{ranks < left ? acc[i % 2][2 * eight] : 0.f, ranks + 1 < left ? acc[i % 2][2 * eight + 1] : 0.f};
      if ((has >> eight & 1) != 0) *reinterpret_cast<float2*>(to + 8 * eight * pitch + 2 * t + ranks) = pair;
    }
    clear_sums();
  }
};

/// y += scale * v B^T, a unit of outputs at a time. kWide: made for ranks of 32 and more (units of 32 outputs and 64
/// ranks at a time, or 32, or of 64 and 32), else for less (64 outputs, or 32, and 16 ranks); all take any rank.
template <typename T, bool kWide, int kRows, int kUnitOutputs = kWide ? 32 : 64, int kRanks = kWide ? 64 : 16>
struct NarrowExpand {
  static_assert(kWide ? kRanks == 64 || kRanks == 32 : kRanks == 16);
  static_assert(kRanks < 64 || kUnitOutputs == 32);  // there are registers for 2048 elements of B
  static constexpr int kOutputs = kUnitOutputs;
  static constexpr int kHalves = kOutputs / 32;
  static constexpr int kEights = kRows / 8;
  const LinearSlice& slice;
  int unit;
  const T* b;     // of the unit's output g % 2
  T* y[kEights];  // rows g and g + 8
  float acc[kHalves * 4][4];
  uint4 b_frag[8], y_frag[kEights][kHalves];
  uint4 y_next[kEights][kHalves];  // of the warp's next unit, on its way before this one's is stored
  uint32_t v_frag[4];              // up to 16 ranks: from outside, or from shared memory

  __device__ __forceinline__ explicit NarrowExpand(const LinearSlice& of) : slice(of) {}

  __device__ __forceinline__ void begin(const LinearTask& task, const NarrowJob<kRows>& job, int first_unit,
                                        int64_t b_offset, int b_stride) {
    const int g = threadIdx.x % 32 / 4;
    unit = first_unit;
    b = static_cast<const T*>(slice.b) + b_offset + (unit * kOutputs + g % 2) * int64_t{b_stride};
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
      const int64_t row = job.row(task, g + 8 * i);
      y[i] = static_cast<T*>(task.y) + row * task.y_stride + slice.col + unit * kOutputs + threadIdx.x % 4 * 8;
    }
  }
  __device__ __forceinline__ void next(int units, int b_stride) {
    unit += units;
    b += units * kOutputs * int64_t{b_stride};
#pragma unroll
    for (int i = 0; i < kEights; ++i) y[i] += units * kOutputs;
    clear_sums();
  }
  __device__ __forceinline__ void clear() {
    clear_sums();
#pragma unroll
    for (int i = 0; i < 8; ++i) b_frag[i] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kEights * kHalves; ++i) {
      y_frag[i / kHalves][i % kHalves] = y_next[i / kHalves][i % kHalves] = {0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) v_frag[i] = 0;
  }

  /// In place of y: -0, so that the delta alone comes out, and -0 where a scale of -0 says that there is none.
  __device__ __forceinline__ void start_from_nothing() {
    const uint4 minus_zeros{0x80008000u, 0x80008000u, 0x80008000u, 0x80008000u};
#pragma unroll
    for (int i = 0; i < kEights * kHalves; ++i) {
      y_frag[i / kHalves][i % kHalves] = y_next[i / kHalves][i % kHalves] = minus_zeros;
    }
  }

  __device__ __forceinline__ static bool is_wide(int r, int rank, int alignment) {
    return kWide && r + 32 <= rank && (alignment & 7) == 0;
  }

  /// B of ranks r on, and y with the first. has: bit i says that row g + 8i is read and written. alignment: offset and
  /// stride of B, or-ed.
  __device__ __forceinline__ void load(int r, int rank, uint32_t has, int b_stride, int alignment) {
    load_b(0, r, rank, b_stride, alignment);
    if (r == 0) load_y(y_frag, 0, has);
  }

  /// Of a warp whose units are `units` apart, up to `end`: turns from what has been multiplied up to rank r to what
  /// comes next, which is asked for before this unit is stored. Returns the rank that it begins with. `reads`: of y.
  __device__ __forceinline__ int turn(int units, int end, int r, int rank, float scale, uint32_t has, uint32_t reads,
                                      int b_stride, int alignment) {
    if (r < rank) {
      load_b(0, r, rank, b_stride, alignment);
      return r;
    }
    const bool more = unit + units < end;
    if (more) {
      load_b(units, 0, rank, b_stride, alignment);
      load_y(y_next, units, reads);
    }
    store(scale, has);
    next(units, b_stride);
#pragma unroll
    for (int i = 0; i < kEights * kHalves; ++i) y_frag[i / kHalves][i % kHalves] = y_next[i / kHalves][i % kHalves];
    return 0;
  }

  /// What load brought. `v`: of row g in shared memory, `pitch` before the next; null: v_frag holds it. Returns the
  /// next rank.
  __device__ __forceinline__ int multiply(int r, int rank, int alignment, const T* v, int pitch) {
    const int t = threadIdx.x % 4;
    if (is_wide(r, rank, alignment)) {
#pragma unroll
      for (int i = 0; i < kRanks / 32; ++i) {
        if (i == 1 && !is_wide(r, rank, alignment)) break;
        const uint4 low = *reinterpret_cast<const uint4*>(v + r + 8 * t);
        uint4 high{0, 0, 0, 0};
        if (kEights == 2) high = *reinterpret_cast<const uint4*>(v + 8 * pitch + r + 8 * t);
        const Rows32 rows_of_v(low, high);
#pragma unroll
        for (int j = 0; j < kHalves * 4; ++j) mma_32<T>(acc[j], rows_of_v, b_frag[4 * i % 8 + j]);
        r += 32;
      }
      return r;
    }
    if (v != nullptr) {
      const uint2 low = *reinterpret_cast<const uint2*>(v + r + 4 * t);
      v_frag[0] = low.x;
      v_frag[2] = low.y;
      if (kEights == 2) {
        const uint2 high = *reinterpret_cast<const uint2*>(v + 8 * pitch + r + 4 * t);
        v_frag[1] = high.x;
        v_frag[3] = high.y;
      }
    }
#pragma unroll
    for (int j = 0; j < kHalves * 4; ++j) {
      const uint32_t weights[2] = {b_frag[j].x, b_frag[j].y};
      ptx::mma_m16n8k16<T>(acc[j], v_frag, weights);
    }
    return r + 16;
  }

  __device__ __forceinline__ void store(float scale, uint32_t has) const {
#pragma unroll
    for (int i = 0; i < kEights * kHalves; ++i) {
      const int eight = i / kHalves, half = i % kHalves;
      if (!has_piece(half, eight, has)) continue;
      float delta[8];
      take_delta(half, eight, delta);
      ptx::store16(y[eight] + half * 32, add_scaled<T>(y_frag[eight][half], scale, delta));
    }
  }

  /// Of this lane's y, the first or second 32 outputs of row g or g + 8 of the unit, or of the one `further` ones on:
  /// whether it is there.
  __device__ __forceinline__ bool has_piece(int half, int eight, uint32_t has, int further = 0) const {
    return (has >> eight & 1) != 0 &&
           (unit + further) * kOutputs + half * 32 + static_cast<int>(threadIdx.x) % 4 * 8 < slice.width;
  }
  /// What is to be added to it, unscaled.
  __device__ __forceinline__ void take_delta(int half, int eight, float (&delta)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) delta[j] = acc[half * 4 + j / 2][2 * eight + j % 2];
  }

 private:
  // Of the unit `further` ones on.
  __device__ __forceinline__ void load_y(uint4 (&to)[kEights][kHalves], int further, uint32_t has) const {
#pragma unroll
    for (int i = 0; i < kEights * kHalves; ++i) {
      const int eight = i / kHalves, half = i % kHalves;
      if (has_piece(half, eight, has, further))
        to[eight][half] = ptx::load16(y[eight] + further * kOutputs + half * 32);
    }
  }
  __device__ __forceinline__ void load_b(int further, int r, int rank, int b_stride, int alignment) {
    const int t = threadIdx.x % 4;
    const int g = threadIdx.x % 32 / 4;
    // output 8 * (g / 2) + 2j + g % 2 of 32 is row g of mma j; beyond the width: of the unit's first 8
    const T* first = b + int64_t{further * kOutputs} * b_stride;
    const T* half_of_b[kHalves];
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int eight = i * 32 + g / 2 * 8;
      half_of_b[i] = first + int64_t{(unit + further) * kOutputs + eight < slice.width ? eight : 0} * b_stride;
    }
    const auto b_row = [&](int j) { return half_of_b[j / 4 % kHalves] + int64_t{j % 4 * 2} * b_stride; };
    if (is_wide(r, rank, alignment)) {
#pragma unroll
      for (int j = 0; j < 4 * kHalves; ++j) b_frag[j] = ptx::load_weights16(b_row(j) + r + 8 * t);
      if (kRanks == 64 && is_wide(r + 32, rank, alignment)) {
#pragma unroll
        for (int j = 0; j < 4; ++j) b_frag[4 + j] = ptx::load_weights16(b_row(j) + r + 32 + 8 * t);
      }
    } else if ((alignment & 3) == 0 && rank % 4 == 0) {
      const bool inside = r + 4 * t < rank;
#pragma unroll
      for (int j = 0; j < kHalves * 4; ++j) {
        const uint2 ranks = ptx::load_weights8_if(inside, b_row(j) + r + 4 * t);
        b_frag[j].x = ranks.x;
        b_frag[j].y = ranks.y;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kHalves * 4; ++j) {
        const uint2 ranks = load_ranks(b_row(j), r + 4 * t, rank);
        b_frag[j].x = ranks.x;
        b_frag[j].y = ranks.y;
      }
    }
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < kHalves * 16; ++i) acc[i / 4][i % 4] = 0.f;
  }
};

/// What a block does first where the blocks for a slice's jobs share these.
struct Sharing {
  int index;         // of the job; beyond all of them: none
  int sharer;        // of the job's units
  int sharers_log2;  // how many there are
  __device__ __forceinline__ Part of(Part units) const { return part_of(units, sharer, sharers_log2); }
};

/// Capacities say how many jobs there can be, the plan how many there are. Where they are at most half of the `grid`
/// blocks for them, blocks without one share the outputs of the others' jobs, as far as there are `units` for all
/// `warps` of each. No sum depends on it. `z`: the block's place among them. Without divisions, whose code would have
/// to be fetched by every block.
__host__ __device__ constexpr Sharing share_jobs(int jobs, int z, int grid, int units, int warps) {
  Sharing sharing{z, 0, 0};
  if (jobs == 0) return sharing;
  while (jobs << (sharing.sharers_log2 + 1) <= grid && warps << sharing.sharers_log2 < units) ++sharing.sharers_log2;
  if (z >= jobs << sharing.sharers_log2) return {z, 0, 0};
  while (sharing.index >= jobs) {
    sharing.index -= jobs;
    ++sharing.sharer;
  }
  return sharing;
}

/// Whether rows of B lie so close together that what is between them is little.
__device__ __forceinline__ bool are_close(int b_stride, int rank) { return b_stride <= rank + 8; }

/// Elements of B that a block may prefetch: of all blocks together, little beside what L2 holds.
inline constexpr uint32_t kMostPrefetched = 48 * 1024;

/// The units of a block's rows of weights towards L2, before they may be used: `outputs` rows of B from `from` on, or
/// `most` elements. A prefetch takes a lane at a time, so its pieces are dealt to the warps in turn. Devices before 9.0
/// cannot.
template <typename T>
__device__ __forceinline__ void prefetch_b(const T* from, int b_stride, int rank, int outputs,
                                           uint32_t most = kMostPrefetched) {
#if POLYLORA_HAS_CLUSTERS
  if (outputs <= 0 || (reinterpret_cast<uintptr_t>(from) & 15) != 0 || b_stride % 8 != 0) return;
  outputs = min(outputs, static_cast<int>(most / static_cast<uint32_t>(rank)));
  const int threads = static_cast<int>(blockDim.x);
  const int mine = static_cast<int>(threadIdx.x % 32 * (blockDim.x / 32) + threadIdx.x / 32);
  if (are_close(b_stride, rank)) {  // in pieces of 1 KiB
    const int all = ((outputs - 1) * b_stride + rank) * 2 & ~15;
#pragma unroll 1
    for (int i = mine * 1024; i < all; i += threads * 1024) {
      ptx::prefetch_bulk(reinterpret_cast<const char*>(from) + i, min(all - i, 1024));
    }
  } else if (rank >= 8) {
#pragma unroll 1
    for (int i = mine; i < outputs; i += threads) ptx::prefetch_bulk(from + int64_t{i} * b_stride, rank / 8 * 16);
  }
#endif
}

// ---- host

// Ranks (an even share) from which on there are kernels of their own: kWide.
inline constexpr int64_t kWideRanks = 32;

// Rows up to which decode's kernels take all of a batch of many adapters, or of low ranks.
inline constexpr int64_t kMostDecodeRows = 1024;

// A wide tile for each adapter, however few its rows are, is what slows many adapters down. H200, qkv 4096 ->
// 4096+1024+1024 r16, decode's and wide, us: 512 rows of 64 adapters 18.9 and 97.9, of 32 15.8 and 51.1, of 16 18.0 and
// 30.5; 1024 rows of 64 29.4 and 109, of 32 32.6 and 55.5; r64, 512 rows of 32 42.4 and 87.6.
inline constexpr int64_t kRowsOfManyAdapters = 32;  // an adapter, at most

// Rows times rank up to which decode's kernels, 16 rows at a time, take a batch of few adapters, too: they read B once
// for each 16 rows, the wide ones once for each tile, but after a longer start. H200, r16, decode's and wide, us: 300
// rows of 3 adapters of qkv 8.9 and 12.1, of down 10.6 and 13.5; 512 rows of 8 of qkv 12.0 and 21.7, of 4 of
// gate_up 27.1 and 28.3; 1024 rows of 4 of qkv 18.1 and 19.0, of down 19.9 and 21.5; 2048 rows 49.9 and 26.6. r64, 512
// rows of 4 of qkv 22.3 and 21.8, of down 19.3 and 21.6; 1024 rows of qkv 37.8 and 28.9.
inline constexpr int64_t kMostDecodeRanks = 1024 * 16;

/// Whether a call is decode: these kernels add in another order than those for more rows.
inline bool is_few(const LoraParams& params) {
  if (batch_invariant()) return false;
  if (params.rows <= kDecodeRows || params.plan.runs == Runs::kShort) return true;
  const bool many_adapters = params.slices.groups * kRowsOfManyAdapters >= params.rows;
  const bool few_ranks = params.rows * even_rank(params) <= kMostDecodeRanks;
  return params.rows <= kMostDecodeRows && (many_adapters || few_ranks);
}

/// Jobs of a call, as far as its capacities tell. Short runs are a tile each, most of them of few rows.
inline int64_t narrow_jobs(const LoraParams& p) {
  const int64_t runs = plan_max_runs(p.rows, p.slices.groups);
  if (p.plan.runs == Runs::kShort) return runs;
  return runs > p.rows / kTileRows ? runs : p.rows / kTileRows;
}

/// Jobs of `job_rows` rows that a call can have. Of 8 rows a tile can be two.
inline int64_t narrow_most_jobs(const LoraParams& p, int job_rows) {
  if (job_rows == kTileRows) return p.plan.max_tiles;
  if (p.plan.runs == Runs::kShort) return 2 * p.plan.max_tiles;
  return min64(plan_max_tiles(p.rows, p.slices.groups, job_rows), 2 * p.plan.max_tiles);
}

/// Jobs of `job_rows` rows in a grid, of which they are the last dimension: a batch has fewer tiles than the plan has
/// room for, and blocks without one shall not stand before others. No more than run at once, of `blocks` that do and
/// `each` that share a job: blocks take several in turn, and a batch without adapters does not wait for a second wave.
inline unsigned narrow_grid_jobs(const LoraParams& p, int job_rows, int64_t blocks, int64_t each) {
  constexpr int64_t kMostBlocksZ = 65535;
  const int64_t at_once = blocks / each;
  return static_cast<unsigned>(min64(narrow_most_jobs(p, job_rows), min64(at_once < 1 ? 1 : at_once, kMostBlocksZ)));
}

/// Rows of a job of the two launches: 16, all of a tile, where runs can have more than 8 rows and the ranks are few, or
/// where the capacities say that most runs have more. H200, 8 and 16, us: many ranks, more slots than adapters (32),
/// r64, 128 rows of 8 adapters: qkv 17.7, 19.2, gate_up 26.2, 30.5, down 15.4, 16.8; 32 adapters r64, 64 rows of
/// qkv 26.8, 27.5; 8 adapters r16, 128 rows: qkv 8.7, 8.1, gate_up 14.8, 12.0; 256 rows of qkv 19.1, 9.0. r16, 32
/// slots, beside a GEMM: 128 rows of 8 adapters: qkv 10.8, 7.6, gate_up 22.3, 20.3, down 9.5, 8.0, of
/// 32: 13.6, 13.5, 26.8, 26.8, 12.7, 12.7; 32 rows of 32: 11.3, 11.2, 21.9, 22.1, 10.5, 10.5. The short runs of a
/// longer batch are those of decode, most of them of few rows.
inline int narrow_job_rows(const LoraParams& p) {
  constexpr int64_t kLeastRows = 16;
  const bool may_be_long = p.rows >= kLeastRows && even_rank(p) < kWideRanks;
  return !is_moe(p) && p.plan.runs == Runs::kAll && (may_be_long || p.rows > p.slices.groups * 8) ? 16 : 8;
}

/// Bytes of A and B that these read, with an even share of v for each slice.
inline int64_t decode_weight_bytes(const LoraParams& p) {
  const int64_t elements_a_rank = p.k * p.slices.count + sum_of_widths(p.slices);
  return narrow_jobs(p) * elements_a_rank * even_rank(p) * 2;
}

/// Blocks of the two launches of a call: two an SM, or, where deltas are made beside a GEMM of the base, fewer, the
/// less there is to read. A GEMM of few rows leaves some SMs free, has all registers of the others, and ends when its
/// slowest block does. H200, 8 adapters r16, added to a chain of GEMMs by 33, 66, 132 and 264 blocks, us: 8 rows of
/// o 2.81, 2.76, 2.81, 2.77, of down 5.67, 3.13, 4.52, 4.47, of gate_up 13.1, 8.1, 7.2, 6.8; 32 rows of
/// qkv 6.8, 3.6, 4.6, 4.5. Half as large ones, of MoE, are twice as many.
inline int64_t narrow_blocks(const LoraParams& p, int sms, bool beside) {
  constexpr int64_t kWarpsPerSm = 16;
  constexpr int64_t kBytesAWarp = 8 * 1024;  // beside
  const int64_t warps = narrow_warps(is_moe(p));
  const int64_t most = kWarpsPerSm / warps * sms;
  if (!beside) return most;
  const int64_t least = most / 8;
  const int64_t wanted = decode_weight_bytes(p) / (warps * kBytesAWarp);
  return wanted < least ? least : min64(wanted, most);
}

/// log2 of the warps that share K, of `warps` that share ranks first, then K.
inline int k_split_log2_of(int64_t rank, int warps) {
  int log2 = 0;
  while (divide_up(rank, kRankTile) << (log2 + 1) <= warps) ++log2;
  return log2;
}

/// Ranks that a slice can have, in whole rank tiles.
inline int64_t rank_cap_of(const LoraParams& p) { return divide_up(min64(p.v_width, kMaxRank), kRankTile) * kRankTile; }

/// Rows of a plane: of all runs one a position; short ones are far fewer than the call's rows, so theirs have one a
/// row that their tiles have room for.
inline int64_t narrow_plane_rows(const LoraParams& p) {
  return p.plan.runs == Runs::kShort ? p.plan.max_tiles * kTileRows : p.rows;
}

/// The task of kernels for few rows. Planes: in the call's scratch, rank_cap columns for each slice.
inline LinearTask narrow_task(const LoraParams& p, int planes) {
  LinearTask task = linear_task(p);
  task.tile = p.plan.tile;
  task.max_tiles = static_cast<int32_t>(p.plan.max_tiles);
  const bool all = p.plan.runs == Runs::kAll;
  task.tiles_word = all ? kPlanTiles : kPlanShortTiles;
  task.longest_word = all ? kPlanMaxRun : kPlanMaxShort;
  task.rank_cap = static_cast<int32_t>(rank_cap_of(p));
  task.planes = planes;
  task.plane = static_cast<float*>(p.scratch);
  task.plane_width = task.slices * task.rank_cap;
  task.plane_rows = static_cast<int32_t>(narrow_plane_rows(p));
  task.plane_elements = int64_t{task.plane_rows} * task.plane_width;
  return task;
}
inline int64_t narrow_plane_bytes(const LoraParams& p, int planes) {
  return planes * narrow_plane_rows(p) * p.slices.count * rank_cap_of(p) * int64_t{sizeof(float)};
}

}  // namespace polylora::cuda
