// How the blocks of a cluster add their parts of K: in each other's shared memory, without a detour through L2.
//
// Of a pass over x, a block holds its part's sums in the registers of its tensor cores. They are cut into units, each
// owned by one block: it gets the unit's sums from all blocks, adds them in the order of K, and sends what is wanted of
// them to all blocks that expand the slice. The barrier that counts what arrives serves embedding_wide.cu, too.
#pragma once

#include "linear/expand_stream.cuh"

namespace polylora::cuda {

inline constexpr int kExchangeBytes = 32;  // of ExchangeBarriers

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/// In shared memory: a barrier that counts the bytes that other blocks send. Its phase stands beside it: registers are
/// short.
struct ByteBarrier {
  uint64_t barrier;
  uint32_t parity;
  uint32_t unused;

  /// One thread; then the cluster's barrier, before anything is sent.
  __device__ __forceinline__ void init() {
    ptx::init_barrier(&barrier);
    parity = 1;
  }
  __device__ __forceinline__ void expect(uint32_t bytes) {
    parity ^= 1;
    ptx::expect_bytes(&barrier, bytes);
  }
  /// All threads, after a barrier behind expect.
  __device__ __forceinline__ void wait() { ptx::wait_barrier_cluster(&barrier, parity); }
};
struct ExchangeBarriers {
  ByteBarrier sums, v;

  __device__ __forceinline__ void init() {
    sums.init();
    v.init();
  }
};
static_assert(sizeof(ExchangeBarriers) == kExchangeBytes);

/// The units: 8 rows of one of the item's blocks of 32 ranks, a pair of rank tiles. Of a pair, the second may not be
/// there. A rank tile's part of a unit is a fragment, as a warp's accumulators hold it: of lane 4g + t ranks 2t, 2t +
/// 1, 8 + 2t, 9 + 2t of row g.
class SumUnits {
 public:
  static constexpr int kRows = 8;
  static constexpr int kFragmentBytes = kRows * kRankTile * 4;

  __device__ __forceinline__ SumUnits(const WideItem& item, int parts)
      : item_(item), parts_(parts), lane_(ptx::thread_again() % 32) {
    pairs_ = item.blocks;
    units_ = row_groups() * pairs_;
    per_part_ = 1.f / static_cast<float>(parts_);
    per_pair_ = 1.f / static_cast<float>(pairs_);
    per_unit_ = 1.f / static_cast<float>(units_);
  }

  __device__ __forceinline__ int row_groups() const { return (item_.rows + kRows - 1) / kRows; }

  /// The first unit of block `part`, and past the last one of the block before.
  __device__ __forceinline__ int first(int part) const { return divide(part * units_ + parts_ - 1, per_part_); }

  /// Bytes that an owner has to have room for.
  __device__ __forceinline__ int inbox_bytes() const {
    return divide(units_ + parts_ - 1, per_part_) * parts_ * 2 * kFragmentBytes;
  }

  /// Bytes that block `part` is sent.
  __device__ __forceinline__ uint32_t bytes(int part) const {
    return (fragments_before(first(part + 1)) - fragments_before(first(part))) * parts_ * kFragmentBytes;
  }

  /// Sends this warp's fragment of rows 8 `row_group`.. and rank tile `tile` to its owner.
  __device__ __forceinline__ void send(const unsigned char* inbox, const uint64_t* barrier, int part, int row_group,
                                       int tile, float4 sums) const {
    const RankTile at_tile = item_.rank_tile[tile];
    const int unit = row_group * pairs_ + item_.first_block[at_tile.slice] + at_tile.first_rank / 32;
    const int owner = divide(unit * parts_, per_unit_);
    const unsigned char* to = inbox + at(unit - first(owner), at_tile.first_rank / kRankTile % 2, part);
    ptx::store_async(ptx::map_to_rank(to, owner), sums, ptx::map_to_rank(barrier, owner));
  }

  struct Unit {
    int row;  // the item's, of this lane
    int pair;
    int tile;     // the first of the pair
    bool is_two;  // whether there is a second
  };
  __device__ __forceinline__ Unit unit(int index) const {
    const int row_group = divide(index, per_pair_);
    const int pair = index - row_group * pairs_;
    const int tile = item_.block_tile[pair];
    return {row_group * kRows + lane_ / 4, pair, tile, item_.block_tile[pair + 1] - tile == 2};
  }

  /// A fragment of the `slot`th own unit: the parts in their order.
  __device__ __forceinline__ float4 add_parts(const unsigned char* inbox, int slot, int half) const {
    const unsigned char* from = inbox + at(slot, half, 0);
    float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 4
    for (int part = 1; part < parts_; ++part) {
      add(sum, *reinterpret_cast<const float4*>(from + part * kFragmentBytes));
    }
    return sum;
  }

 private:
  // a / b of numbers up to a few thousand by b's reciprocal, exact: (a + 1/2) / b is nowhere near an integer
  __device__ __forceinline__ static int divide(int a, float reciprocal) {
    return static_cast<int>((static_cast<float>(a) + 0.5f) * reciprocal);
  }

  __device__ __forceinline__ int at(int slot, int half, int part) const {
    return ((slot * 2 + half) * parts_ + part) * kFragmentBytes + lane_ * 16;
  }

  __device__ __forceinline__ int fragments_before(int unit) const {
    const int row_group = divide(unit, per_pair_);
    return row_group * item_.rank_tiles + item_.block_tile[unit - row_group * pairs_];
  }

  const WideItem& item_;
  const int parts_;
  const int lane_;
  int pairs_, units_;
  float per_part_, per_pair_, per_unit_;
};

/// v of all slices in the shared memory of every block that expands them, as StreamV lays rows of 32 ranks for each of
/// the item's blocks out.
template <typename T>
class SharedV {
 public:
  __device__ __forceinline__ SharedV(const LinearTask& task, const WideItem& item, const T* v, int pitch, int parts)
      : task_(task), item_(item), v_(v), pitch_(pitch), parts_(parts) {
    by_slice_ = item.is_distinct && task.first_part[task.slices] == parts;
  }

  /// Bytes that block `part` is sent.
  __device__ __forceinline__ uint32_t bytes(int part, int row_groups) const {
    int columns = 32 * item_.blocks;
    if (by_slice_) columns = StreamV::columns(item_.rank[task_.slice_of_part(part)]);
    return static_cast<uint32_t>(columns * row_groups * SumUnits::kRows * 2);
  }

  /// A unit, of whose rank tiles' sums this lane has those of a fragment, to all blocks that expand its slice.
  __device__ __forceinline__ void send(const uint64_t* barrier, const SumUnits::Unit& unit, float4 first,
                                       float4 second) const {
    const RankTile tile = item_.rank_tile[unit.tile];
    const int t = ptx::thread_again() % 4;
    // beyond the rank stand products of x and nothing: NaN where x is not finite
    const int left = item_.rank[tile.slice] - tile.first_rank - 2 * t;
    const auto packed = [&](float a, float b, int r) { return pack(r < left ? a : 0.f, r + 1 < left ? b : 0.f, T{}); };
    const uint4 bits{packed(first.x, first.y, 0), packed(first.z, first.w, 8), packed(second.x, second.y, 16),
                     packed(second.z, second.w, 24)};
    const T* to = v_ + unit.row * pitch_ + 32 * unit.pair + 8 * t;  // StreamV::place(2 * t), which would spill
    const int begin = by_slice_ ? task_.first_part[tile.slice] : 0;
    const int end = by_slice_ ? task_.first_part[tile.slice + 1] : parts_;
#pragma unroll 1
    for (int part = begin; part < end; ++part) {
      ptx::store_async(ptx::map_to_rank(to, part), bits, ptx::map_to_rank(barrier, part));
    }
  }

 private:
  const LinearTask& task_;
  const WideItem& item_;
  const T* v_;
  const int pitch_, parts_;
  bool by_slice_;
};
#endif

}  // namespace polylora::cuda
