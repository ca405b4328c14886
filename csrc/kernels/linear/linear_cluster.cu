// linear in one launch for decode, sm_90 and later: a cluster of blocks owns one slice of up to 8 rows of one group.
//
//   every block:  while the kernel before still runs: what it will work on, and its weights towards L2 (a guess)
//                 its part of K, all ranks -> partial v                                              (tensor cores)
//                 the partials to the blocks that add them, by asynchronous stores into their shared memory
//                 the first of B and y on their way meanwhile
//                 v, added in the order of the blocks; its part of the outputs
//
// One row is bound by the instructions of a warp and the latencies between them, not by bytes. Hence:
//
// - The guess: every warp reads tile, entry and rows before griddepcontrol.wait, and again after it, together with the
//   first weights and rows that the guess leads to. If both readings agree, which only a new plan or table prevents,
//   one latency has passed where three would follow each other. If not, the warp starts over. No barrier is needed for
//   it: after the wait all warps read the same. Nothing else read early is used; weights are only prefetched into L2.
//   Addresses are computed before the wait, too.
// - Rows of the batch are on the M side of mma, weights on its N side: the registers of a 16-byte load of weights are
//   operands as they are. Lanes that would read beyond a rank, a width or the rows of a tile read a neighbour's element
//   instead and drop the result; only the summed index needs true zeros.
// - Column 2t + e of mma i stands for output 8t + 2i + e of 32, so that lane 4g + t owns 8 consecutive outputs of row
//   g: 16 bytes of y at a time, without a transpose.
// - Up to 16 ranks, a lane adds the partials of the quad of v that it multiplies with: v needs no
//   shared memory. Else v goes through shared memory; many values of it are added by a block each, which sends them on.
//
// The order of all sums depends on the capacities of the call alone.
#include "linear/paths.h"
#include "linear/task.cuh"

// what only 9.0 and later compile would count as unused in the passes for older devices
#pragma nv_diag_suppress 177

namespace polylora::cuda {
namespace {

constexpr int kUnitK = 32;     // elements of K that a quad of lanes loads at once
constexpr int kRows = 8;       // of a cluster: half of a tile
constexpr int kFewQuads = 64;  // quads of v up to which every block adds all of them
constexpr int kMaxSmem = 160 * 1024;

// Shared memory of a block, in this order, after two barriers. From the host: constants cost no registers.
struct ClusterSmem {
  int partial;  // float [k_split][kRows][partial_pitch]
  int inbox;    // float4 [blocks][quads]
  int v;        // 16-bit [kRows][v_pitch]
  int partial_pitch,
      v_pitch;  // elements; their odd parts keep the rows that a warp touches together in different banks
  int bytes;
};
struct ClusterTask {
  LinearTask linear;
  ClusterSmem smem;
};

// What a warp works on: words of the plan and the table, one a lane, so that one load a lane reads them again. Lanes
// 0-3 and 7: the plan's version, rows, groups, tiles, longest run. 4-6, 24-26: the tile, where a tile is one job or
// two. 8-14: the slice's entry. 16-23: the job's rows, beyond its end the last.
struct Job {
  const int32_t* at;
  int32_t word;

  // Whatever stands in memory, nothing outside plan and table is read.
  __device__ __forceinline__ void read(const LinearTask& task, int index, int slice) {
    const int lane = threadIdx.x % 32;
    static_assert(kPlanVersion == 0 && kPlanRows == 1 && kPlanGroups == 2 && kPlanTiles == 5 && kPlanMaxRun == 7);
    const int tile = min(lane < 16 ? index : index / 2, task.max_tiles - 1);
    at = lane < 4 || lane == 7 ? task.header + (lane == 3 ? kPlanTiles : lane)
                               : reinterpret_cast<const int32_t*>(task.tile + tile) + (lane & 3);
    word = ptx::load_fresh4(at);
    const int from = tile_lane();
    const uint32_t group = min(static_cast<uint32_t>(get(from)), static_cast<uint32_t>(task.groups - 1));
    const int row = get(from + 1) + (two_a_tile() ? index % 2 * kRows : 0) + min(lane & 7, max(rows(index) - 1, 0));
    const int32_t* second =
        lane < 16
            ? reinterpret_cast<const int32_t*>(task.table + int64_t{group} * task.slices + slice) + min(lane & 7, 6)
            : task.order + min(static_cast<uint32_t>(row), static_cast<uint32_t>(task.rows - 1));
    if (lane >= 8 && lane < 24) {
      at = second;
      word = ptx::load_fresh4(at);
    }
  }
  __device__ __forceinline__ int32_t get(int lane) const { return __shfl_sync(0xffffffffu, word, lane); }
  __device__ __forceinline__ bool two_a_tile() const { return get(7) > kRows; }
  __device__ __forceinline__ int tile_lane() const { return two_a_tile() ? 24 : 4; }

  // Of the whole grid.
  __device__ __forceinline__ int jobs(const LinearTask& task) const {
    const bool fits = get(0) == kPlanVersionValue && get(1) == task.rows && get(2) == task.groups;
    return fits ? min(get(3), task.max_tiles) << two_a_tile() : 0;
  }
  // 0 where a tile has no second half.
  __device__ __forceinline__ int rows(int index) const {
    return min(max(get(tile_lane() + 2) - (two_a_tile() ? index % 2 * kRows : 0), 0), kRows);
  }
  __device__ __forceinline__ SliceEntry entry() const {
    const uint64_t offset =
        static_cast<uint64_t>(static_cast<uint32_t>(get(13))) << 32 | static_cast<uint32_t>(get(12));
    return {get(8), get(9), get(10), get(11), static_cast<int64_t>(offset), __int_as_float(get(14)), 0};
  }
  __device__ __forceinline__ int row(const LinearTask& task, int i) const {
    return min(static_cast<uint32_t>(get(16 + i)), static_cast<uint32_t>(task.rows - 1));
  }
};

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

/// kWide: made for ranks of 32 and more (units of 32 outputs, 64 ranks at a time), else for less (64 outputs, 16
/// ranks); both take any rank.
template <typename T, bool kWide, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 16 / kWarps) linear_cluster(const __grid_constant__ ClusterTask params) {
#if POLYLORA_HAS_CLUSTERS
  const LinearTask& task = params.linear;
  const ClusterSmem& at = params.smem;
  constexpr int kThreads = kWarps * 32;
  constexpr int kOutputs = kWide ? 32 : 64;  // of a unit
  constexpr int kHalves = kOutputs / 32;
  constexpr int kStepUnits = kWide ? 4 : 3;  // units of K in flight
  unsigned char* smem = ptx::dynamic_smem();
  uint64_t* partials_arrived = reinterpret_cast<uint64_t*>(smem);
  uint64_t* v_arrived = partials_arrived + 1;
  float* partial = reinterpret_cast<float*>(smem + at.partial);
  float4* inbox = reinterpret_cast<float4*>(smem + at.inbox);
  T* smem_v = reinterpret_cast<T*>(smem + at.v);

  const int blocks_log2 = task.blocks_log2;
  const int blocks = 1 << blocks_log2;
  const int block = blockIdx.x & (blocks - 1);
  if (threadIdx.x == 0) {
    ptx::init_barrier(partials_arrived);
    ptx::init_barrier(v_arrived);
  }
  ptx::launch_next_grid();
  // every block of the cluster must run, with its barriers made, before any stores into its shared memory
  if (blocks > 1) ptx::cluster_arrive_relaxed();  // init_barrier has made the barriers visible
  bool arrived = blocks > 1;

  const LinearSlice& slice = task.slice[blockIdx.y];
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  // units of K: the block's, and of these the warp's, which it shares with others by rank
  const Part k_block = part_of(task.k / kUnitK, block, blocks_log2);
  const int split = warp & ((1 << task.k_split_log2) - 1);
  Part k = part_of(k_block.end - k_block.begin, split, task.k_split_log2);
  k = {k_block.begin + k.begin, k_block.begin + k.end};
  const int first_rank = (warp >> task.k_split_log2) * kRankTile;
  // units of outputs: the block's; its warps take them in turn
  const Part n = part_of((slice.width + kOutputs - 1) / kOutputs, blockIdx.z << blocks_log2 | block,
                         blocks_log2 + task.parts_log2);

  int index = blockIdx.x >> blocks_log2;
  Job job;
  job.read(task, index, blockIdx.y);

  // what follows from the job
  int jobs, rank, rows, a_row, b_stride;
  int64_t b_offset, row;
  float scale;
  const T* x;
  int quads_a_row, quads;  // of v
  uint32_t quads_inverse;  // 2^32 / quads_a_row, rounded up
  const auto prepare = [&] {
    jobs = job.jobs(task);
    rows = job.rows(index);
    const SliceEntry entry = job.entry();
    const bool fits = entry_fits(entry, entry.rank, slice.a_rows, slice.width, slice.b_elements, task.v_width) &&
                      entry.rank <= task.rank_cap;
    rank = index < jobs && rows > 0 && fits ? entry.rank : 0;
    a_row = entry.a_row;
    b_stride = entry.b_stride;
    b_offset = entry.b_offset;
    scale = entry.scale;
    row = job.row(task, g);
    x = static_cast<const T*>(task.x) + row * task.x_stride + 8 * t;
    quads_a_row = (rank + kRankTile - 1) / kRankTile * (kRankTile / 4);
    quads = rows * quads_a_row;
    quads_inverse = rank > 0 ? 0xffffffffu / static_cast<uint32_t>(quads_a_row) + 1 : 0;
  };
  prepare();
  const T *a_low = nullptr, *a_high = nullptr;
  const auto set_ranks = [&](int r) {
    const T* a = static_cast<const T*>(slice.a) + 8 * t;
    a_low = a + int64_t{a_row + min(r + g, rank - 1)} * slice.a_stride;
    a_high = a + int64_t{a_row + min(r + g + 8, rank - 1)} * slice.a_stride;
  };
  set_ranks(first_rank);

  // a guess at the weights, towards L2: a row of A a thread, then rows of B
  if (rank > 0) {
    const int bytes = (k_block.end - k_block.begin) * kUnitK * 2;
    if (static_cast<int>(threadIdx.x) < rank && bytes > 0) {
      ptx::prefetch_bulk(static_cast<const T*>(slice.a) +
                             int64_t{a_row + static_cast<int>(threadIdx.x)} * slice.a_stride + k_block.begin * kUnitK,
                         bytes);
    }
    const int first = n.begin * kOutputs;
    const int outputs = min(min(n.end * kOutputs, slice.width) - first, (48 << 10) / rank);
    const T* from = static_cast<const T*>(slice.b) + b_offset + int64_t{first} * b_stride;
    if ((reinterpret_cast<uintptr_t>(from) & 15) == 0 && b_stride % 8 == 0) {
      if (b_stride <= rank + 8) {  // rows close together: in pieces of 1 KiB
        const int all = ((outputs - 1) * b_stride + rank) * 2 & ~15;
#pragma unroll 1
        for (int i = threadIdx.x * 1024; i < all; i += kThreads * 1024) {
          ptx::prefetch_bulk(reinterpret_cast<const char*>(from) + i, min(all - i, 1024));
        }
      } else if (rank >= 8) {
#pragma unroll 1
        for (int i = threadIdx.x; i < outputs; i += kThreads) {
          ptx::prefetch_bulk(from + int64_t{i} * b_stride, rank / 8 * 16);
        }
      }
    }
  }
  bool guess = true;
  uint32_t phases = 0;  // parities of the barriers: partials in bit 0, v in bit 1
#pragma unroll 1
  while (true) {
    const T* b;
    T* y;
    const T* b_half[kHalves];
    // output 8 * (g / 2) + 2j + g % 2 of 32 is row g of mma j; beyond the width: of the unit's first 8
    const auto b_of_half = [&](int unit, int i) {
      const int eight = i * 32 + g / 2 * 8;
      return b + int64_t{unit * kOutputs + eight < slice.width ? eight : 0} * b_stride;
    };
    // ---- shrink: 16 ranks at a time, the warp's part of K
    {
      float acc[2][4] = {};
      // cleared: the registers of what a path may leave unset would be kept through the whole kernel
      uint4 a_frag[kStepUnits][2] = {}, x_frag[kStepUnits] = {};
      int r = first_rank;
      int u = k.begin;
      const auto load = [&] {
#pragma unroll
        for (int i = 0; i < kStepUnits; ++i) {
          if (u + i >= k.end) break;
          const int offset = (u + i) * kUnitK;
          a_frag[i][0] = ptx::load_weights16(a_low + offset);
          a_frag[i][1] = ptx::load_weights16(a_high + offset);
          x_frag[i] = ptx::load16(x + offset);
        }
      };
      if (guess) ptx::wait_for_previous_grid();
      if (r < rank) load();
      int32_t now = job.word;
      if (guess) now = ptx::load_fresh4(job.at);
      // while these are on their way: where the warp's first outputs lie
      b = static_cast<const T*>(slice.b) + b_offset + ((n.begin + warp) * kOutputs + g % 2) * int64_t{b_stride};
      y = static_cast<T*>(task.y) + row * task.y_stride + slice.col + (n.begin + warp) * kOutputs + 8 * t;
#pragma unroll
      for (int i = 0; i < kHalves; ++i) b_half[i] = b_of_half(n.begin + warp, i);
#pragma unroll 1
      while (r < rank) {
#pragma unroll
        for (int i = 0; i < kStepUnits; ++i) {
          if (u + i >= k.end) break;
          const Rows32 rows_of_x(x_frag[i], {0, 0, 0, 0});
          mma_32<T>(acc[0], rows_of_x, a_frag[i][0]);
          mma_32<T>(acc[1], rows_of_x, a_frag[i][1]);
        }
        u += kStepUnits;
        if (u >= k.end) {
          // ranks 2t, 2t + 1 of the first and second 8, of row g; zeros beyond the true rank
          float* to = partial + (split * kRows + g) * at.partial_pitch + r + 2 * t;
          const int left = rank - r - 2 * t;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int ranks = i * 8;
            const float2 pair{ranks < left ? acc[i][0] : 0.f, ranks + 1 < left ? acc[i][1] : 0.f};
            if (g < rows) *reinterpret_cast<float2*>(to + ranks) = pair;
          }
#pragma unroll
          for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = 0.f;
          r += (kWarps >> task.k_split_log2) * kRankTile;
          if (r >= rank) break;
          set_ranks(r);
          u = k.begin;
        }
        load();
      }
      if (guess) {
        guess = false;
        if (__any_sync(0xffffffffu, now != job.word)) {  // a wrong guess has spoilt nothing but this warp's partial
          job.read(task, index, blockIdx.y);
          prepare();
          set_ranks(first_rank);
          continue;
        }
      }
    }
    if (index >= jobs) break;

    if (rank > 0) {
      // ---- the blocks' partials to those that add them
      const bool few = quads <= kFewQuads;
      const bool direct = !kWide && rank <= kRankTile && (few || blocks == 1);
      const int chunk = few ? quads : (quads + blocks - 1) >> blocks_log2;  // quads that a block adds
      const int first_mine = few ? 0 : block * chunk;
      const int mine = min(max(quads - first_mine, 0), chunk);
      const auto row_of = [&](int quad) { return static_cast<int>(__umulhi(quad, quads_inverse)); };
      const auto in_partial = [&](int quad) {
        const int row = row_of(quad);
        return reinterpret_cast<const float4*>(partial + row * at.partial_pitch) + (quad - row * quads_a_row);
      };
      const int partial_stride = kRows * at.partial_pitch / 4;
      if (blocks > 1 && threadIdx.x == 0) {
        ptx::expect_bytes(partials_arrived, static_cast<uint32_t>(mine * 16) << blocks_log2);
        if (!few) ptx::expect_bytes(v_arrived, static_cast<uint32_t>(quads * 8));
      }
      __syncthreads();
      if (blocks > 1) {
        if (arrived) ptx::cluster_wait();  // the others run, and are done with what came before
        arrived = false;
        // Neighbouring lanes store to one block, to neighbouring places: a warp's stores to several blocks go one by
        // one.
        const int lanes_log2 = min(32 - __clz(chunk - 1), 5);
        const int first_to = threadIdx.x >> lanes_log2;
#pragma unroll 1
        for (int i = threadIdx.x & ((1 << lanes_log2) - 1); i < chunk; i += 32) {
          float4 sum{0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
          for (int to = first_to; to < blocks; to += kThreads >> lanes_log2) {
            const int quad = few ? i : to * chunk + i;
            if (quad >= quads) break;
            if (!few || to == first_to) sum = add_quads(in_partial(quad), partial_stride, task.k_split_log2);
            ptx::store_async(ptx::map_to_rank(inbox + block * chunk + i, to), sum,
                             ptx::map_to_rank(partials_arrived, to));
          }
        }
      }

      // ---- expand: the warp's units of outputs
      float acc[kHalves * 4][4] = {};
      uint4 b_frag[8] = {}, y_frag[kHalves] = {};
      uint32_t v_frag[4] = {};  // where direct
      int unit = n.begin + warp;
      const int alignment = static_cast<int>(b_offset) | b_stride;
      const auto is_wide = [&](int r) { return kWide && r + 32 <= rank && (alignment & 7) == 0; };
      // of this lane's y: the first or second 32 outputs
      const auto has_piece = [&](int i) { return g < rows && unit * kOutputs + i * 32 + 8 * t < slice.width; };
      const auto b_row = [&](int j) { return b_half[j / 4 % kHalves] + int64_t{j % 4 * 2} * b_stride; };
      bool have_v = false;
      int r = 0;
#pragma unroll 1
      while (true) {
        if (unit < n.end) {
          if (r == 0) {
#pragma unroll
            for (int i = 0; i < kHalves; ++i) {
              if (has_piece(i)) y_frag[i] = ptx::load16(y + i * 32);
            }
          }
          if (is_wide(r)) {
#pragma unroll
            for (int j = 0; j < 4; ++j) b_frag[j] = ptx::load_weights16(b_row(j) + r + 8 * t);
            if (is_wide(r + 32)) {
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
        if (!have_v) {
          have_v = true;
          if (blocks > 1) ptx::wait_barrier_cluster(partials_arrived, phases & 1);
          // v: the partials in order, as 16-bit operands of the second product: its one rounding, unscaled as in the
          // plain formula, so that a scale above 1 cannot overflow float16 earlier than there
          const auto add_all = [&](int slot, int quad) {
            const bool alone = blocks == 1;
            return add_quads(alone ? in_partial(quad) : inbox + slot, alone ? partial_stride : chunk,
                             alone ? task.k_split_log2 : blocks_log2);
          };
          if (direct) {
            if (g < rows) {
              const float4 sum = add_all(g * quads_a_row + t, g * quads_a_row + t);
              v_frag[0] = pack(sum.x, sum.y, T{});
              v_frag[2] = pack(sum.z, sum.w, T{});
            }
          } else {
            const bool all = few || blocks == 1;
#pragma unroll 1
            for (int i = all ? threadIdx.x : threadIdx.x % 32; i < (all ? quads : mine); i += all ? kThreads : 32) {
              const int quad = all ? i : first_mine + i;
              const float4 sum = add_all(i, quad);
              const uint2 rounded{pack(sum.x, sum.y, T{}), pack(sum.z, sum.w, T{})};
              const int row = row_of(quad);
              T* to = smem_v + row * at.v_pitch + 4 * (quad - row * quads_a_row);
              if (all) {
                *reinterpret_cast<uint2*>(to) = rounded;
              } else {
#pragma unroll 1
                for (int other = warp; other < blocks; other += kWarps) {
                  ptx::store_async(ptx::map_to_rank(to, other), rounded, ptx::map_to_rank(v_arrived, other));
                }
              }
            }
            if (all) {
              __syncthreads();
            } else {
              ptx::wait_barrier_cluster(v_arrived, phases >> 1);
              phases ^= 2;
            }
          }
        }
        if (unit >= n.end) break;
        if (is_wide(r)) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (i == 1 && !is_wide(r)) break;
            const T* v = smem_v + g * at.v_pitch + r + 8 * t;
            const uint4 low = *reinterpret_cast<const uint4*>(v);
            const Rows32 rows_of_v(low, {0, 0, 0, 0});
#pragma unroll
            for (int j = 0; j < kHalves * 4; ++j) mma_32<T>(acc[j], rows_of_v, b_frag[4 * i % 8 + j]);
            r += 32;
          }
        } else {
          if (!direct) {
            const T* v = smem_v + g * at.v_pitch + r + 4 * t;
            const uint2 low = *reinterpret_cast<const uint2*>(v);
            v_frag[0] = low.x;
            v_frag[2] = low.y;
          }
#pragma unroll
          for (int j = 0; j < kHalves * 4; ++j) {
            const uint32_t weights[2] = {b_frag[j].x, b_frag[j].y};
            ptx::mma_m16n8k16<T>(acc[j], v_frag, weights);
          }
          r += 16;
        }
        if (r < rank) continue;
#pragma unroll
        for (int i = 0; i < kHalves; ++i) {
          if (!has_piece(i)) continue;
          float delta[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) delta[j] = acc[i * 4 + j / 2][j % 2];
          ptx::store16(y + i * 32, add_scaled<T>(y_frag[i], scale, delta));
        }
#pragma unroll
        for (int i = 0; i < kHalves * 16; ++i) acc[i / 4][i % 4] = 0.f;
        r = 0;
        unit += kWarps;
        b += kWarps * kOutputs * int64_t{b_stride};
        y += kWarps * kOutputs;
#pragma unroll
        for (int i = 0; i < kHalves; ++i) b_half[i] = b_of_half(unit, i);
      }
      phases ^= 1;
    }

    index += gridDim.x >> blocks_log2;
    if (index >= jobs) break;
    __syncthreads();  // all threads are done with shared memory
    if (blocks > 1 && !arrived) ptx::cluster_arrive_relaxed();
    arrived = blocks > 1;
    job.read(task, index, blockIdx.y);
    prepare();
    set_ranks(first_rank);
  }
  if (arrived) ptx::cluster_wait();
#else
  __trap();  // linear.cu sends no older device here
#endif
}

ClusterSmem smem_of(const LinearTask& task) {
  ClusterSmem at{};
  at.partial_pitch = task.rank_cap + 8;
  at.v_pitch = (task.rank_cap + 63) / 64 * 64 + 16;
  const int quads = kRows * task.rank_cap / 4;
  const int few = quads < kFewQuads ? quads : kFewQuads;
  const int blocks = 1 << task.blocks_log2;
  at.partial = 16;
  at.inbox = at.partial + (4 << task.k_split_log2) * kRows * at.partial_pitch;
  at.v = at.inbox + (blocks == 1 ? 0 : 16 * (quads + blocks > blocks * few ? quads + blocks : blocks * few));
  at.bytes = at.v + 2 * kRows * at.v_pitch;
  return at;
}

// How a call is spread over the device, from its capacities alone.
struct Spread {
  ClusterTask params;
  bool wide;  // kernels for ranks of 32 and more
  int warps;  // of a block
};

Spread spread(const LoraParams& p) {
  Spread how{{linear_task(p), {}}, false, 4};
  LinearTask& task = how.params.linear;
  task.tile = p.plan.tile;
  task.max_tiles = static_cast<int32_t>(p.plan.max_tiles);
  task.rank_cap = static_cast<int32_t>(divide_up(min64(p.v_width, kMaxRank), kRankTile) * kRankTile);
  // ranks of the slices are unknown here: an even share of v each
  const int64_t rank = divide_up(p.v_width, p.slices.count);
  how.wide = rank >= 32;
  // Measured: the larger clusters, the better, as long as all blocks run at once, the next call's beside them, or have
  // much to read each. Blocks of four warps, for few and short work, count as half.
  int64_t outputs = 0;
  for (int s = 0; s < p.slices.count; ++s) outputs += p.slices.width[s];
  const int64_t runs = plan_max_runs(p.rows, p.slices.groups);
  const int64_t clusters = (runs > p.rows / kTileRows ? runs : p.rows / kTileRows) * p.slices.count;
  const int64_t bytes = (p.k * p.slices.count + outputs) * rank * 2 / p.slices.count;  // of a tile and slice
  how.warps = !how.wide && bytes <= 256 * 1024 && clusters <= 48 ? 4 : 8;
  while (task.blocks_log2 < 4) {
    const int64_t blocks = (clusters << (task.blocks_log2 + 1)) * how.warps / 8;
    const int64_t each = (bytes >> (task.blocks_log2 + 1)) * 8 / how.warps;
    const bool better = blocks <= 132 || (blocks <= 200 && each >= 48 * 1024) || (blocks <= 300 && each >= 80 * 1024) ||
                        each >= 128 * 1024;
    if (!better) break;
    ++task.blocks_log2;
  }
  // the warps of a block: over the ranks first, then over K
  const int64_t rank_tiles = divide_up(rank, kRankTile);
  while (rank_tiles << (task.k_split_log2 + 1) <= how.warps) ++task.k_split_log2;
  how.params.smem = smem_of(task);
  return how;
}

template <typename T>
cudaError_t launch_cluster(const Device& device, const LaunchShape& shape, const Spread& how, cudaStream_t stream) {
  if (how.wide) return launch<&linear_cluster<T, true, 8>, kMaxSmem>(device, shape, how.params, stream);
  if (how.warps == 8) return launch<&linear_cluster<T, false, 8>, kMaxSmem>(device, shape, how.params, stream);
  return launch<&linear_cluster<T, false, 4>, kMaxSmem>(device, shape, how.params, stream);
}

}  // namespace

bool cluster_path_serves(const LoraParams& p) {
  return fast_shrink_serves(p) && fast_expand_serves(p) && p.k % kUnitK == 0 && p.slices.groups > 0;
}

cudaError_t linear_cluster_path(const LoraParams& p, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const Spread how = spread(p);
  const LinearTask& task = how.params.linear;
  if (task.max_tiles == 0 || task.units == 0) return cudaSuccess;
  const int64_t most = 4 * device.sms / (p.slices.count << task.blocks_log2);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(min64(task.max_tiles, most > 1 ? most : 1)) << task.blocks_log2,
                    static_cast<unsigned>(p.slices.count), 1u << task.parts_log2);
  shape.threads = how.warps * 32;
  shape.smem_bytes = how.params.smem.bytes;
  shape.cluster = 1 << task.blocks_log2;
  shape.overlap = true;
  return p.dtype == DType::kBFloat16 ? launch_cluster<__nv_bfloat16>(device, shape, how, stream)
                                     : launch_cluster<__half>(device, shape, how, stream);
}

}  // namespace polylora::cuda
