// expand for prefill: y += scale * v B^T as a stream over y with a small product inside.
//
// A warp takes 16 rows and 32 outputs at a time, a piece of y. Pieces come through a ring of its own by cp.async, two
// neighbours at once, a granule: of a row, 128 bytes are asked for together, and stored together. The memory is slower
// with 64 at a time (H200, y of 8192 x 28672 read and written, without any products: 304 and 266 us). A thread reads
// back only what it copied itself, so that no warp waits for another one. Only B is shared: in panels of some hundred
// outputs, one in use and one on its way, with a barrier between them. Rows of the batch are on the M side of mma,
// outputs on its N side, numbered so that a thread owns 8 consecutive ones (as in narrow.cuh). While a block walks its
// outputs, v of the tile and slice stays in registers; of more than 128 ranks only with wgmma.
//
// Of more than 128 ranks, a panel has room for a piece of each warp, not for a granule: pieces come one by one, and the
// barriers keep the warps side by side together, whose pieces are neighbours.
//
// With mma, each warp reads B for its 16 rows: of 128 ranks 8 bytes for one of y. With wgmma four warps, 64 rows, read
// it once.
//
// What keeps a stream from the memory's speed: too few bytes in flight (hence the ring), and too many instructions and
// barriers for each of them (hence panels, and addresses that advance by constants).
#pragma once

#include <type_traits>

#include "linear/v_source.cuh"
#include "linear/wide.cuh"

namespace polylora::cuda {

/// How v lies in shared memory: a row of `pitch` elements for each row of the tile, a slice's ranks in blocks of 32
/// with zeros behind the last. Rank r = 8t + 2m + e of a block stands in place 8m + 2t + e, so that ldmatrix hands a
/// thread the ranks that it reads of B with one 16-byte load. For wgmma, which takes B in the order of its ranks, a
/// thread reads 16 bytes of v: its operands of both halves of a block.
struct StreamV {
  /// For even r: places of r and r + 1 follow each other.
  __device__ __forceinline__ static int place(int r) { return (r & ~31) + r % 8 / 2 * 8 + r % 32 / 8 * 2; }

  __device__ __forceinline__ static int columns(int rank) { return (rank + 31) / 32 * 32; }

  /// Of rows of up to `ranks` ranks: an odd number of 16-byte pieces, so that the rows that ldmatrix reads together lie
  /// in different banks.
  __host__ __device__ static constexpr int pitch(int ranks) { return ranks + 8; }
};

/// How a panel of B lies in shared memory: a row of `columns` elements for each output, zeros behind the rank.
struct StreamB {
  /// Where output n stands: the lanes of an mma read 8 rows in a row (their outputs: see narrow.cuh).
  __device__ __forceinline__ static int place(int n) { return (n / 32 * 4 + n % 8 / 2) * 8 + n % 32 / 8 * 2 + n % 2; }

  /// Element r of a row. Rows of an even number of blocks of 32 ranks swap neighbouring blocks in turn, against bank
  /// conflicts.
  __device__ __forceinline__ static int at(int place, int columns, int r) {
    return place * columns + (columns % 64 == 0 ? r ^ (place & 1) << 5 : r);
  }

  /// Block i of the rows whose place has the parity of g, from `b` = at(.., .., r) of block 0 on.
  template <typename T>
  __device__ __forceinline__ static const T* block(const T* b, int columns, int g, int i) {
    if (columns % 64 != 0) return b + 32 * i;
    return b + (i % 2 == 0 ? 32 * i : 32 * (i - 1) + ((g & 1) == 0 ? 32 : -32));
  }

  /// The same as wgmma wants it: 64 ranks of all `places` after each other, a row of 128 bytes each, swizzled.
  __device__ __forceinline__ static int swizzled_at(int place, int places, int r) {
    return (r / 64 * places + place) * 64 + (r % 64 ^ place % 8 * 8);
  }
};

inline constexpr int kPieceBytes = 16 * 32 * 2;  // of y: 16 rows, 32 outputs

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

/// v of slice s of rows [rows.begin, rows.end) of the item to shared memory; of sums, the one rounding happens here,
/// unscaled as in the plain formula. Who reads v syncs before.
template <typename T, bool kOftenOnePlane = false>
__device__ __forceinline__ void load_v(T* smem_v, int pitch, const LinearTask& task, const WideItem& item, int s,
                                       Part rows, const Operands& operands = {}, PlaneCounts counts = {}) {
  const int rank = item.rank[s];
  const int columns = StreamV::columns(rank);
  // quads of ranks in a row, as if their number were a power of 2; those beyond the columns are left out
  const int quads_log2 = rank <= 16 ? 2 : rank <= 32 ? 3 : rank <= 64 ? 4 : rank <= 128 ? 5 : 6;
  const int items = (min(rows.end, item.rows) - rows.begin) << quads_log2;
  const auto row_of = [&](int e) { return e >> quads_log2; };
  const auto rank_of = [&](int e) { return (e & ((1 << quads_log2) - 1)) * 4; };
  const auto put = [&](int e, uint2 bits) {
    uint32_t* to = reinterpret_cast<uint32_t*>(smem_v + row_of(e) * pitch + StreamV::place(rank_of(e)));
    to[0] = bits.x;
    to[4] = bits.y;
    if (rank <= 16) {  // the second half of the block
      to[2] = 0;
      to[6] = 0;
    }
  };
  const auto first_ranks = [](float4 v, int count) {
    return float4{count > 0 ? v.x : 0.f, count > 1 ? v.y : 0.f, count > 2 ? v.z : 0.f, count > 3 ? v.w : 0.f};
  };
  const auto round = [](float4 v) { return uint2{pack(v.x, v.y, T{}), pack(v.z, v.w, T{})}; };
  if (task.planes > 0) {
    // of a row's planes, up to 2^31 elements apart
    const float* from =
        task.plane + int64_t{item.plane_row + rows.begin} * task.plane_width + item.first_rank_tile[s] * kRankTile;
    const int most = counts.of_tile != nullptr ? counts.most : task.planes;
    // kItems * kPlanes loads on their way at once
    const auto add_all = [&](auto items_at_once, auto planes_at_once) {
      constexpr int kItems = decltype(items_at_once)::value;
      constexpr int kPlanes = decltype(planes_at_once)::value;
#pragma unroll 1
      for (int first = ptx::thread_again(); first < items; first += kItems * blockDim.x) {
        float4 sum[kItems][kPlanes];
        const auto load = [&](int plane) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            const int e = first + i * blockDim.x;
            const float* at = from + plane * task.plane_elements + row_of(e) * task.plane_width + rank_of(e);
            const bool real = e < items && rank_of(e) < rank;
            int planes = task.planes;
            if (counts.of_tile != nullptr && real)
              planes = counts.of_tile[item.first_rank_tile[s] + rank_of(e) / kRankTile];
#pragma unroll
            for (int j = 0; j < kPlanes; ++j) {
              sum[i][j] = {0.f, 0.f, 0.f, 0.f};
              if (real && plane + j < planes) sum[i][j] = *reinterpret_cast<const float4*>(at);
              at += task.plane_elements;
            }
          }
        };
        load(0);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          float4 all = sum[i][0];
#pragma unroll
          for (int j = 1; j < kPlanes; ++j) add(all, sum[i][j]);
          sum[i][0] = all;
        }
        if (kItems == 1) {
          float4 all = sum[0][0];
#pragma unroll 1
          for (int plane = kPlanes; plane < most; plane += kPlanes) {
            load(plane);
#pragma unroll
            for (int j = 0; j < kPlanes; ++j) add(all, sum[0][j]);
          }
          sum[0][0] = all;
        }
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int e = first + i * blockDim.x;
          // beyond the rank stand products of x and nothing: NaN where x is not finite
          if (e < items && rank_of(e) < columns) put(e, round(first_ranks(sum[i][0], rank - rank_of(e))));
        }
      }
    };
    if (kOftenOnePlane && most == 1) return add_all(Constant<6>{}, Constant<1>{});
    if (most <= 2) return add_all(Constant<4>{}, Constant<2>{});
    if (most <= 4) return add_all(Constant<2>{}, Constant<4>{});
    return add_all(Constant<1>{}, Constant<8>{});
  }
  if (operands.v != nullptr) {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int first = ptx::thread_again(); first < items; first += kAtOnce * blockDim.x) {
      uint2 bits[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int e = first + i * blockDim.x;
        bits[i] = uint2{0, 0};
        if (e < items && rank_of(e) < rank) {
          bits[i] =
              *reinterpret_cast<const uint2*>(operands.row(task, s, item.row[rows.begin + row_of(e)]) + rank_of(e));
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int e = first + i * blockDim.x;
        if (e < items && rank_of(e) < columns) put(e, bits[i]);
      }
    }
    return;
  }
  const SliceEntry& entry = item.entry[s];
#pragma unroll 1
  for (int e = ptx::thread_again(); e < items; e += blockDim.x) {
    if (rank_of(e) >= columns) continue;
    put(e, round(load_v4(task, item.row[rows.begin + row_of(e)], entry.v_col, rank_of(e), rank)));
  }
}

// One panel of B, where its rows allow no 16-byte pieces. `at`: where rank r of output n goes.
template <typename T, typename At>
__device__ __forceinline__ void copy_b_slowly(T* to, const T* from, int64_t stride, int places, int outputs,
                                              int columns, int rank, At&& at) {
  for (int e = ptx::thread_again(); e < places * columns; e += blockDim.x) {
    const int n = e / columns;
    const int r = e - n * columns;
    const bool inside = n < outputs && r < rank;
    reinterpret_cast<uint16_t*>(to)[at(n, r)] =
        inside ? reinterpret_cast<const uint16_t*>(from)[n * stride + r] : uint16_t{0};
  }
}

/// Walks neighbouring units of a tile and slice. 256 or 512 threads; kGranules granules of y a warp, kPanelBytes of B
/// twice; of slices of up to kMostRanks. kWgmma: of all rows of a tile.
template <typename T, int kThreads, int kGranules, int kPanelBytes, int kMostRanks = kMaxRank, bool kWgmma = false>
class ExpandStream {
  static constexpr int kPieces = 2;                                            // of a granule
  static constexpr int kGranuleBytes = kThreads / 32 * kPieces * kPieceBytes;  // of all warps

 public:
  static constexpr int kEarlyBytes = (kGranules - 1) * kGranuleBytes;  // that the first copies of y take
  static constexpr int kPanelsAt = kGranules * kGranuleBytes;
  static constexpr int kBytes = kPanelsAt + 2 * kPanelBytes;  // of the ring

  __device__ __forceinline__ ExpandStream(const LinearTask& task, const WideItem& item, unsigned char* ring)
      : task_(task), item_(item), ring_(ring), thread_(ptx::thread_again()) {}

  /// Turns to `count` units from `first` on of slice s, of rows [rows.begin, rows.end), multiples of 16, of the item.
  __device__ __forceinline__ void set(int s, int first, int count, Part rows) {
    s_ = s;
    const LinearSlice& slice = task_.slice[s];
    const int n_begin = first * kUnitN;
    const SliceEntry& entry = item_.entry[s];
    columns_ = kWgmma ? (entry.rank + 63) / 64 * 64 : StreamV::columns(entry.rank);
    outputs_ = min(count * kUnitN, slice.width - n_begin);
    panel_steps_ = panel_steps_of(columns_);
    // rows g, g + 8 of the warp's 16; 8 outputs of the piece's 32
    const int row = warp() % 8 * 16 + g();
    const int64_t low = item_.row[row], high = item_.row[row + 8];
    v_row_ = warp() % 8 * 16 - rows.begin;
    busy_ = v_row_ >= 0 && warp() % 8 * 16 < min(rows.end, item_.rows);
    has_low_ = busy_ && row < item_.rows;
    has_high_ = busy_ && row + 8 < item_.rows;
    const int first_output = (is_single() ? 1 : kPieces) * kOutputs * (warp() / 8) + 8 * t();
    left_ = outputs_ - first_output;
    T* y = static_cast<T*>(task_.y) + slice.col + n_begin + first_output;
    low_ = y + low * task_.y_stride;
    high_ = y + high * task_.y_stride;
    b_ = static_cast<const T*>(slice.b) + entry.b_offset + int64_t{n_begin} * entry.b_stride;
  }
  /// Nothing: its pieces are none.
  __device__ __forceinline__ void set_none() {
    left_ = 0;
    has_low_ = has_high_ = false;
  }

  /// Starts the first copies. All threads are done with the ring.
  __device__ __forceinline__ void start() const {
    start_last_panel();
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      start_y(i);
      ptx::commit_copies();
    }
  }

  /// Instead, while the ring's place for B is still in use: the first kAhead granules of y, one by one, or all from
  /// `first` on; they go with the caller's next commit. Then B.
  static constexpr int kAhead = kGranules - 1;
  __device__ __forceinline__ void start_y(int i) const {
    if (is_single()) {
      for (int j = 0; j < kPieces; ++j) start_piece(i * kGranuleBytes + j * kPieceBytes, kPieces * i + j);
    } else {
      start_granule(i * kGranuleBytes, i);
    }
  }
  __device__ __forceinline__ void start_all_y(int first) const {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i >= first) start_y(i);
    }
  }
  __device__ __forceinline__ void start_last_panel() const {
    start_panel(0);
    ptx::commit_copies();
  }

  /// All units. v of the slice is in shared memory, or on its way: the first panel syncs. `token`: rows without one
  /// stay as they are. `b_is_last`: after start_last_panel.
  __device__ __forceinline__ void run(const T* smem_v, int pitch, const int64_t* token = nullptr,
                                      bool b_is_last = false) {
    thread_ = ptx::thread_again();
    if (b_is_last || is_single()) ptx::wait_copies<0>();
    if (token != nullptr) {
      const int row = warp() % 8 * 16 + g();
      has_low_ &= token[row] >= 0;
      has_high_ &= token[row + 8] >= 0;
    }
    if constexpr (kWgmma) {
      const T* v = smem_v + (v_row_ + g()) * pitch + t() * 8;
      const auto walk_if = [&](auto times) {
        constexpr int kTimes = decltype(times)::value;
        if constexpr (64 * kTimes <= kMostRanks) {
          if (columns_ == 64 * kTimes) walk_together<kTimes>(v, pitch);
        }
      };
      walk_if(Constant<1>{});
      walk_if(Constant<2>{});
      walk_if(Constant<3>{});
      walk_if(Constant<4>{});
    } else {
      const T* v = smem_v + (v_row_ + lane() % 16) * pitch + lane() / 16 * 8;
      const auto walk_if = [&](auto blocks) {
        constexpr int kBlocks = decltype(blocks)::value;
        if constexpr (32 * kBlocks <= kMostRanks) {
          if (columns_ == 32 * kBlocks) walk<kBlocks>(v);
        }
      };
      walk_if(Constant<1>{});
      walk_if(Constant<2>{});
      walk_if(Constant<3>{});
      walk_if(Constant<4>{});
      if constexpr (kMostRanks > 128) {
        if (columns_ > 128) walk<0>(v);
      }
    }
    ptx::wait_copies<0>();
  }

 private:
  static constexpr int kOutputs = 32;             // of a piece
  static constexpr int kSide = kThreads / 256;    // warps side by side
  static constexpr int kStep = kOutputs * kSide;  // outputs of a piece of each of these

  __device__ __forceinline__ int warp() const { return thread_ / 32; }
  __device__ __forceinline__ int lane() const { return thread_ % 32; }
  __device__ __forceinline__ int g() const { return lane() / 4; }
  __device__ __forceinline__ int t() const { return lane() % 4; }

  // this thread's part of the warp's first granule: of a piece 16 bytes of row g, and 512 bytes further 16 of row g + 8
  __device__ __forceinline__ unsigned char* my_ring() const {
    return ring_ + warp() * (kPieces * kPieceBytes) + lane() * 16;
  }

  // Whether a panel has room for a piece of each warp alone.
  __device__ __forceinline__ bool is_single() const { return kMostRanks > 128 && columns_ > 128; }

  // The piece, the granule `ahead` from here.
  __device__ __forceinline__ void start_piece(int slot, int ahead) const {
    unsigned char* to = my_ring() + slot;
    if (left_ <= ahead * kStep) return;
    if (has_low_) ptx::copy_async16(to, low_ + ahead * kStep, 16);
    if (has_high_) ptx::copy_async16(to + 512, high_ + ahead * kStep, 16);
  }
  __device__ __forceinline__ void start_granule(int slot, int ahead) const {
    unsigned char* to = my_ring() + slot;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int n = ahead * kPieces * kStep + i * kOutputs;
      if (left_ <= n) break;
      if (has_low_) ptx::copy_async16(to + i * kPieceBytes, low_ + n, 16);
      if (has_high_) ptx::copy_async16(to + i * kPieceBytes + 512, high_ + n, 16);
    }
  }

  __host__ __device__ static constexpr int panel_steps_of(int columns) { return kPanelBytes / (columns * 2 * kStep); }

  // kColumns: columns_, where it is known; 0: it is not.
  template <int kColumns>
  __device__ __forceinline__ int panel_steps() const {
    return kColumns > 0 ? panel_steps_of(kColumns) : panel_steps_;
  }

  __device__ __forceinline__ T* panel_at(int panel) const {
    return reinterpret_cast<T*>(ring_ + kPanelsAt + panel % 2 * kPanelBytes);
  }

  template <int kColumns = 0>
  __device__ __forceinline__ void start_panel(int panel) const {
    const int columns = kColumns > 0 ? kColumns : columns_;
    const int places = panel_steps<kColumns>() * kStep;
    const int outputs = outputs_ - panel * places;
    if (outputs <= 0) return;
    const SliceEntry& entry = item_.entry[s_];
    const int64_t stride = entry.b_stride;
    T* to = panel_at(panel);
    const auto at = [&](int n, int r) {
      if (!kWgmma) return StreamB::at(StreamB::place(n), columns, r);
      return StreamB::swizzled_at(StreamB::place(n), places, r);
    };
    if (__builtin_expect(((static_cast<int>(entry.b_offset) | entry.b_stride) & 7) != 0, 0)) {
      return copy_b_slowly(to, b_ + panel * places * stride, stride, places, outputs, columns, entry.rank, at);
    }
    // a thread brings 8 ranks of every so-many-th output; their number an output as if it were a power of 2
    const int pieces_log2 = columns <= 32 ? 2 : columns <= 64 ? 3 : columns <= 128 ? 4 : 5;
    const int r = (thread_ & ((1 << pieces_log2) - 1)) * 8;
    if (r >= columns) return;
    const int bytes = min(max(entry.rank - r, 0), 8) * 2;
    const int used = min(places, (outputs + kOutputs - 1) / kOutputs * kOutputs);
    const int apart = kThreads >> pieces_log2;
    const int first = (thread_ >> pieces_log2) & (apart - 1);  // it is less: the compiler does not know
    const T* from = b_ + (panel * places + first) * stride + r;
    constexpr int kMost = kPanelBytes / 16 / kThreads;  // as of a number of columns that is a power of 2
    static_assert(panel_steps_of(96) == panel_steps_of(128) && panel_steps_of(160) == panel_steps_of(256));
    // nearly always: no bounds, and no counts, of which each that is not constant is seven instructions
    if (kColumns > 0 && kColumns <= 128 && __builtin_expect(outputs >= places && entry.rank % 8 == 0, 1)) {
      const bool real = r < entry.rank;
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const int n = first + i * apart;
        if (i * apart >= places) break;
        ptx::copy_async16(to + at(n, r), from, real ? 16 : 0);
        from += apart * stride;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int n = first + i * apart;
      if (n >= used) break;
      const bool real = n < outputs && bytes > 0;
      ptx::copy_async16(to + at(n, r), real ? from : b_, static_cast<uint32_t>(real ? bytes : 0));
      from += apart * stride;
    }
  }

  // What every step of a walk shares: a panel of B is there, another one on its way; a granule of y is there, another
  // one on its way; a piece gets its products.
  //
  // Of what is on its way, younger than a panel are the granules, or single pieces, started since the panel before
  // began: as many as that panel has; at the walk's begin kAhead. Younger than a granule are the next kAhead - 1, and
  // the next panel, unless it was started before that granule, kAhead granules ago. A single piece came before its
  // panel.
  template <int kColumns>
  __device__ __forceinline__ void begin_panel(int panel) const {
    static_assert(kAhead == 1 || panel_steps_of(kMostRanks) >= kAhead * kPieces);
    ptx::wait_copies<kAhead>();
    if (kWgmma) fence_panel();
    __syncthreads();  // the panel is there for all, and all are done with the one before
    start_panel<kColumns>(panel + 1);
    ptx::commit_copies();
  }
  // `in_panel`: granules since it began.
  __device__ __forceinline__ void begin_granule(int slot, int in_panel) const {
    if (in_panel < kAhead) {
      ptx::wait_copies<kAhead>();
    } else {
      ptx::wait_copies<kAhead - 1>();
    }
    start_granule(slot == 0 ? kAhead * kGranuleBytes : slot - kGranuleBytes, kAhead);
    ptx::commit_copies();
  }
  // Of the ring, single pieces have the places of the granules ahead, and one more.
  __device__ __forceinline__ void begin_piece(int slot) const {
    static_assert(kMostRanks <= 128 || kAhead == 1);
    start_piece(slot == 0 ? kGranuleBytes : slot == kPieceBytes ? 0 : kPieceBytes, kPieces);
    ptx::commit_copies();
  }
  // Of the piece `n` outputs on, which stands at `at` of the ring.
  __device__ __forceinline__ void add_products(const float (&acc)[4][4], int at, int n) const {
    const float scale = item_.entry[s_].scale;
    const unsigned char* from = my_ring() + at;
    const uint4 base[2] = {*reinterpret_cast<const uint4*>(from), *reinterpret_cast<const uint4*>(from + 512)};
    uint4 sum[2];  // without a branch: of a row that is not there, of whatever stands in the ring
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float delta[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) delta[j] = acc[j / 2][half * 2 + j % 2];
      sum[half] = add_scaled<T>(base[half], scale, delta);
    }
    if (has_low_ && left_ > n) ptx::store16(low_ + n, sum[0]);
    if (has_high_ && left_ > n) ptx::store16(high_ + n, sum[1]);
  }
  __device__ __forceinline__ void end_granule(int& slot) {
    slot = slot == kAhead * kGranuleBytes ? 0 : slot + kGranuleBytes;
    advance(kPieces * kStep);
  }
  __device__ __forceinline__ void end_piece(int& slot) {
    slot = slot == 0 ? kPieceBytes : slot == kPieceBytes ? kGranuleBytes : 0;
    advance(kStep);
  }
  __device__ __forceinline__ void advance(int outputs) {
    low_ += outputs;
    high_ += outputs;
    left_ -= outputs;
  }

  // kBlocks: blocks of 32 ranks whose v stays in registers; 0: more than 128 ranks, whose v is read for every piece.
  template <int kBlocks>
  __device__ __forceinline__ void walk(const T* v) {
    constexpr int kHeld = kBlocks > 0 ? kBlocks : 1;
    constexpr int kGroup = kBlocks > 0 ? kPieces : 1;  // pieces in a row
    // multiplied before they are stored; of more ranks there are not the registers
    constexpr int kTogether = kBlocks == 1 ? kGroup : 1;
    static_assert(kBlocks == 0 || panel_steps_of(32 * kBlocks) % kGroup == 0);
    uint32_t held[kHeld][2][4] = {};  // without a first value they would count as in use ever since the kernel began
    const int columns = kBlocks > 0 ? 32 * kBlocks : columns_;
    int slot = 0, panel = 0, left_in_panel = 0;
    const T* b = nullptr;
#pragma unroll 1
    for (int left = outputs_; left > 0; left -= kGroup * kStep) {
      if (left_in_panel == 0) {
        left_in_panel = panel_steps<32 * kBlocks>();
        begin_panel<32 * kBlocks>(panel);
        b = panel_at(panel) + StreamB::at(warp() / 8 * kGroup * kOutputs + g(), columns, 8 * t());
        ++panel;
        if (kBlocks > 0 && panel == 1 && busy_) {
#pragma unroll
          for (int i = 0; i < kHeld; ++i) {
            ptx::load_matrices(held[i][0], v + 32 * i);
            ptx::load_matrices(held[i][1], v + 32 * i + 16);
          }
        }
      }
      if (kBlocks > 0) {
        begin_granule(slot, (panel_steps<32 * kBlocks>() - left_in_panel) / kPieces);
      } else {
        begin_piece(slot);
      }
#pragma unroll 1
      for (int piece = 0; piece < kGroup; piece += kTogether) {
        if (busy_ && left_ + 8 * t() > piece * kOutputs) {
          float acc[kTogether][4][4] = {};
#pragma unroll
          for (int p = 0; p < kTogether; ++p) {
#pragma unroll
            for (int i = 0; i < (kBlocks > 0 ? kBlocks : kMaxRank / 32); ++i) {
              if (kBlocks == 0 && 32 * i >= columns) break;
              if (kBlocks == 0) {
                ptx::load_matrices(held[0][0], v + 32 * i);
                ptx::load_matrices(held[0][1], v + 32 * i + 16);
              }
              const uint32_t (&rows)[2][4] = held[kBlocks > 0 ? i : 0];
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const T* from = StreamB::block(b, columns, g(), i) + (p * kOutputs + j * 8) * columns;
                const uint4 weights = *reinterpret_cast<const uint4*>(from);
                const uint32_t b0[2] = {weights.x, weights.y};
                const uint32_t b1[2] = {weights.z, weights.w};
                ptx::mma_m16n8k16<T>(acc[p][j], rows[0], b0);
                ptx::mma_m16n8k16<T>(acc[p][j], rows[1], b1);
              }
            }
          }
#pragma unroll
          for (int p = 0; p < kTogether; ++p) {
            add_products(acc[p], slot + (piece + p) * kPieceBytes, (piece + p) * kOutputs);
          }
        }
        b += kTogether * kOutputs * columns;
      }
      b += kGroup * (kStep - kOutputs) * columns;  // of the warps beside
      left_in_panel -= kGroup;
      if (kBlocks > 0) {
        end_granule(slot);
      } else {
        end_piece(slot);
      }
    }
  }

  // With wgmma. `v`: this lane's of row g, `pitch` before row g + 1. Its 16 bytes of a block of 32 ranks are the
  // operands of two products of 16 ranks in their natural order, as B has them (StreamV::place). Up to 64 kTimes ranks.
  template <int kTimes>
  __device__ __forceinline__ void walk_together(const T* v, int pitch) {
#if defined(POLYLORA_HAS_WGMMA)
    constexpr int kSteps = panel_steps_of(64 * kTimes);
    constexpr int kGroup = 64 * kTimes <= 128 ? kPieces : 1;  // pieces that are multiplied at once
    static_assert(kSteps % kGroup == 0);
    constexpr int kStepB = kStep * 128 >> 4;             // of a descriptor: to the next piece
    constexpr int kRanks64 = kSteps * kStepB;            // to the next 64 ranks
    constexpr int kSideB = kGroup * kOutputs * 128 / 2;  // elements: to the next warps' outputs
    uint32_t held[4 * kTimes][4] = {};                   // a first value: see walk
    int slot = 0, panel = 0, left_in_panel = 0;
    uint64_t b = 0;
#pragma unroll 1
    for (int left = outputs_; left > 0; left -= kGroup * kStep) {
      if (left_in_panel == 0) {
        left_in_panel = kSteps;
        begin_panel<64 * kTimes>(panel);
        b = ptx::swizzled_rows(panel_at(panel) + warp() / 8 * kSideB);
        ++panel;
        if (panel == 1) {
          const int blocks = StreamV::columns(item_.entry[s_].rank) / 32;
#pragma unroll
          for (int i = 0; i < 2 * kTimes; ++i) {
            if (i >= blocks) break;  // B has zeros there
            const uint4 low = *reinterpret_cast<const uint4*>(v + 32 * i);
            const uint4 high = *reinterpret_cast<const uint4*>(v + 32 * i + 8 * pitch);
            uint32_t (&first)[4] = held[2 * i];
            uint32_t (&second)[4] = held[2 * i + 1];
            first[0] = low.x, first[1] = high.x, first[2] = low.y, first[3] = high.y;
            second[0] = low.z, second[1] = high.z, second[2] = low.w, second[3] = high.w;
          }
        }
      }
      float acc[kGroup][4][4] = {};
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4 * kTimes; ++i) {
        const uint64_t at = ptx::further(b, i / 4 * kRanks64 + i % 4 * 2);
        if constexpr (kGroup == 2) {
          ptx::wgmma_m64n64k16(reinterpret_cast<float (*)[8]>(acc), held[i], at, T{});
        } else {
          ptx::wgmma_m64n32k16(reinterpret_cast<float (*)[8]>(acc), held[i], at, T{});
        }
      }
      ptx::wgmma_commit();
      if constexpr (kGroup == 2) {
        begin_granule(slot, (kSteps - left_in_panel) / kPieces);
      } else {
        begin_piece(slot);
      }
      ptx::wgmma_wait<0>();
      ptx::use_after_wait(acc);
      // of a granule, the second piece may be none: its place in the panel is there
      if (busy_) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) add_products(acc[i], slot + i * kPieceBytes, i * kOutputs);
      }
      if constexpr (kGroup == 2) {
        end_granule(slot);
      } else {
        end_piece(slot);
      }
      left_in_panel -= kGroup;
      b += kGroup * kStepB;
    }
#endif
  }
  // What was copied, wgmma sees after the next barrier.
  __device__ __forceinline__ static void fence_panel() {
#if defined(POLYLORA_HAS_WGMMA)
    ptx::fence_async_proxy();
#endif
  }

  const LinearTask& task_;
  const WideItem& item_;  // read again where it is needed: registers are short
  unsigned char* const ring_;
  int thread_;  // read again where it matters: what follows from it fills registers
  int s_;
  int columns_;      // of v and B
  int outputs_;      // of all pieces
  int panel_steps_;  // of a warp in a panel
  int v_row_;        // of v's rows in shared memory, the warp's first
  bool busy_, has_low_, has_high_;
  int left_;        // outputs from this thread's next on
  T *low_, *high_;  // this thread's next outputs
  const T* b_;      // of the first output
};

}  // namespace polylora::cuda
