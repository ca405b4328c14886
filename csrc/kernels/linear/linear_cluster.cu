// linear in one launch for decode, sm_90 and later: a cluster of blocks owns one slice of up to 8 rows of one group.
//
//   every block:  while the grid before still runs: its part of A and B towards L2 (a guess; nothing rests on it)
//                 starts the copy of its part of B into shared memory, by the copy engine
//                 its part of K, all ranks -> partial v                     (tensor cores, weights on the M side)
//                 partial v to every block of the cluster through distributed shared memory
//                 one cluster barrier; y is on its way meanwhile
//                 the sum of the partials, in the order of the blocks; its part of the slice's outputs
//
// Weights are mma fragments as they come, 16 bytes a load: a dot product may sum k in any order, so thread t of a quad
// takes elements 8t..8t+7 of a row of A and of x alike and calls them columns 2t, 2t+1, 2t+8, 2t+9 of two mma steps.
// B likewise, over the rank. Weights are on the M side, the rows of x on the N side of 8: short segments waste nothing.
//
// One row is bound by the instructions on the way, not by bytes: code that runs once a call is fetched once a call.
// Hence one slice a cluster, one shape of inner loop, 32-bit offsets, and the rare cases out of line.
//
// Rank and K need no padding: nothing of A or B beyond the true rank is read (it may be NaN).
#include "common/ptx.cuh"
#include "linear/paths.h"

// what only 9.0 and later compile would count as unused in the passes for older devices
#pragma nv_diag_suppress 177

namespace polylora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = 8;       // rows of a cluster: the N side of mma
constexpr int kUnitK = 32;     // k elements that a quad loads at once: 4 threads x 16 bytes
constexpr int kUnitN = 16;     // outputs of one mma
constexpr int kPassTiles = 2;  // rank tiles of 16 that a pass over K accumulates
constexpr int kPassRanks = 16 * kPassTiles;
constexpr int kUnrollK = 3;           // units of K in flight
constexpr int kUnrollN = 2;           // units of outputs in flight
constexpr int kPad = 4;               // floats between rows in shared memory, against bank conflicts
constexpr int kMaxSmem = 110 * 1024;  // two blocks an SM: the next call's can prepare beside this one's

// The call, as small as it can be: a block's first reads of its parameters miss every cache.
struct ClusterSlice {
  const void* a;
  const void* b;
  int64_t b_elements;
  int32_t a_stride, a_rows;
  int32_t width, col;
};
struct ClusterTask {
  const int32_t* header;
  const Tile* tile;
  const int32_t* order;
  const SliceEntry* table;
  const void* x;
  void* y;
  int32_t x_stride, y_stride;
  int32_t k;
  int32_t rows, groups;  // that the plan must have been made for
  int32_t slices;
  int32_t v_width;  // that the caller allows the table
  int32_t v_ranks;  // ranks that shared memory has room for, multiple of kPassRanks
  int32_t v_rows;   // rows likewise
  int32_t b_bytes;  // room for this block's part of B; what does not fit is read from global memory
  ClusterSlice slice[kMaxSlices];
};

// A part of `total` units for block `block` of `blocks`.
struct Part {
  int begin, end;
};
__device__ __forceinline__ Part part_of(int total, int block, int blocks) {
  return {total * block / blocks, total * (block + 1) / blocks};
}

// Ranks r..r+3 of row `out` of B from global memory, zeros beyond the true rank and width, which are not read. Out of
// line: the way of the parts of B that are too large for shared memory, unaligned, or of a rank not a multiple of 8.
template <typename T>
__device__ __noinline__ uint2 load_ranks(const T* b, int pitch, int out, int width, int r, int rank, bool aligned) {
  if (out >= width) return {0u, 0u};
  const T* row = b + int64_t{out} * pitch;
  if (aligned && r + 4 <= rank) return *reinterpret_cast<const uint2*>(row + r);
  uint32_t pair[2] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (r + i < rank) pair[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(row)[r + i]} << (i % 2 * 16);
  }
  return {pair[0], pair[1]};
}

__device__ __forceinline__ void add(float4& sum, float4 part) {
  sum.x += part.x;
  sum.y += part.y;
  sum.z += part.z;
  sum.w += part.w;
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
__device__ __forceinline__ float2 unpack(uint32_t v, __nv_bfloat16) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v));
}
__device__ __forceinline__ float2 unpack(uint32_t v, __half) {
  return __half22float2(reinterpret_cast<const __half2&>(v));
}

// acc += weights * rows over 32 elements of K or of the rank: `low` and `high` are 8 elements each of rows g and g + 8
// of the weights, `rows` the same 8 elements of row g of the other side.
template <typename T>
__device__ __forceinline__ void mma_32(float (&acc)[4], uint4 low, uint4 high, uint4 rows) {
  const uint32_t a0[4] = {low.x, high.x, low.y, high.y};
  const uint32_t a1[4] = {low.z, high.z, low.w, high.w};
  const uint32_t b0[2] = {rows.x, rows.y};
  const uint32_t b1[2] = {rows.z, rows.w};
  ptx::mma_m16n8k16<T>(acc, a0, b0);
  ptx::mma_m16n8k16<T>(acc, a1, b1);
}

__device__ __forceinline__ Tile load_tile(const Tile* at) {
  const int4 v = ptx::load_fresh16(at);
  return {v.x, v.y, v.z, v.w};
}

__device__ __forceinline__ SliceEntry load_entry(const SliceEntry* at) {
  const int4 v = ptx::load_fresh16(at);
  const int4 w = ptx::load_fresh16(reinterpret_cast<const int4*>(at) + 1);
  const int64_t b_offset =
      static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(w.y)) << 32 | static_cast<uint32_t>(w.x));
  return {v.x, v.y, v.z, v.w, b_offset, __int_as_float(w.z), w.w};
}

// Before the grid before has ended: this block's part of the weights of the entry that the plan and the table name now,
// towards L2. They may still be on their way, so this is a guess: it only prefetches, and all is read again after the
// wait.
template <typename T>
__device__ __forceinline__ void prefetch_weights(const ClusterSlice& slice, const SliceEntry& entry, Part k, int k_size,
                                                 Part n) {
  constexpr int kLine = 32 / sizeof(T);  // a sector: what one prefetch brings
  const int rank = min(entry.rank, kMaxRank);
  const T* a = static_cast<const T*>(slice.a) + int64_t{entry.a_row} * slice.a_stride + k.begin * kUnitK;
  const int length = min(k.end * kUnitK, k_size) - k.begin * kUnitK;
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < rank; r += kWarps) {
#pragma unroll 1
    for (int at = threadIdx.x % 32 * kLine; at < length; at += 32 * kLine) {
      ptx::prefetch_l2(a + int64_t{r} * slice.a_stride + at);
    }
  }
  const T* b = static_cast<const T*>(slice.b) + entry.b_offset + int64_t{n.begin * kUnitN} * entry.b_stride;
  const int elements = rank > 0 ? min((n.end - n.begin) * kUnitN * entry.b_stride, 1 << 20) : 0;
#pragma unroll 1
  for (int at = threadIdx.x * kLine; at < elements; at += kThreads * kLine) ptx::prefetch_l2(b + at);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) linear_cluster(const __grid_constant__ ClusterTask task) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ uint64_t b_arrived;
  __shared__ alignas(16) float reduce[kWarps][kRows][kPassRanks + kPad];  // a pass's partials of the warps
  const int blocks = ptx::cluster_size();
  const int block = ptx::cluster_rank();
  const int v_pitch = task.v_ranks + kPad;
  const int v16_pitch = task.v_ranks + 8;
  const int block_floats = task.v_rows * v_pitch;
  float* smem_partial = reinterpret_cast<float*>(smem);                      // [blocks][v_rows][v_pitch]
  T* smem_v16 = reinterpret_cast<T*>(smem_partial + blocks * block_floats);  // [v_rows][v16_pitch]
  T* smem_b = smem_v16 + task.v_rows * v16_pitch;

  const int clusters = gridDim.x / blocks;
  const int cluster = blockIdx.x / blocks;
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const ClusterSlice slice = task.slice[blockIdx.y];
  const SliceEntry* table = task.table + blockIdx.y;
  const int k_size = task.k;
  const Part k = part_of((k_size + kUnitK - 1) / kUnitK, block, blocks);
  const Part n = part_of((slice.width + kUnitN - 1) / kUnitN, block, blocks);

  ptx::launch_next_grid();
  // every block of the cluster must run before any writes into its shared memory
  ptx::cluster_arrive();
  if (threadIdx.x == 0) ptx::init_barrier(&b_arrived);

  // a guess at the first tile, before the grid before has ended: good for prefetching, and to know where to look again
  const Tile guess = load_tile(task.tile + cluster);
  const bool guess_is_sane = static_cast<uint32_t>(guess.group) < static_cast<uint32_t>(task.groups) &&
                             static_cast<uint32_t>(guess.pos) < static_cast<uint32_t>(task.rows);
  const int guess_group = guess_is_sane ? guess.group : 0;
  const int guess_pos = guess_is_sane ? guess.pos : 0;
  const SliceEntry* guess_entry = table + int64_t{guess_group} * task.slices;
  const int32_t* guess_order = task.order + min(guess_pos + g, task.rows - 1);
  prefetch_weights<T>(slice, load_entry(guess_entry), k, k_size, n);
  ptx::wait_for_previous_grid();

  // the truth, in one step if the guess was right
  const int4 head0 = ptx::load_fresh16(task.header);
  const int4 head1 = ptx::load_fresh16(task.header + 4);
  const Tile first_tile = load_tile(task.tile + cluster);
  const SliceEntry first_entry = load_entry(guess_entry);
  const int first_row = ptx::load_fresh4(guess_order);
  const bool fits = head0.x == kPlanVersionValue && head0.y == task.rows && head0.z == task.groups;
  const int tiles = fits ? head1.y : 0;

  uint32_t parity = 0;
  // a tile of the plan has up to 16 rows: first the first halves of all, then the second
  for (int half_tile = cluster; half_tile < 2 * tiles; half_tile += clusters) {
    const int half = half_tile >= tiles;
    Tile tile = first_tile;
    SliceEntry entry = first_entry;
    int row = first_row;
    if (half_tile != cluster || half != 0 || tile.group != guess_group || tile.pos != guess_pos) {
      tile = load_tile(task.tile + half_tile - half * tiles);
      entry = load_entry(table + int64_t{tile.group} * task.slices);
      row = g + half * kRows < tile.rows ? ptx::load_fresh4(task.order + tile.pos + half * kRows + g) : -1;
    }
    const int rows = min(tile.rows - half * kRows, kRows);
    const int rank = entry.rank;
    if (rows <= 0 || !entry_fits(entry, rank, slice.a_rows, slice.width, slice.b_elements, task.v_width)) continue;
    if (g >= rows) row = -1;
    const T* b = static_cast<const T*>(slice.b) + entry.b_offset;
    const bool b_aligned = ((static_cast<int>(entry.b_offset) | entry.b_stride) & 7) == 0;
    const int n_first = n.begin * kUnitN;
    const int b_rows = min(n.end * kUnitN, slice.width) - n_first;
    const bool in_smem = b_aligned && rank % 8 == 0 && b_rows * entry.b_stride * 2 <= task.b_bytes;
    __syncthreads();  // the tile before is done with smem_b and smem_v16
    if (threadIdx.x == 0) {
      // the last row ends with its rank: what lies between it and the next row is not ours to read
      const int bytes = in_smem && b_rows > 0 ? ((b_rows - 1) * entry.b_stride + rank) * 2 : 0;
      ptx::expect_bytes(&b_arrived, bytes);
      if (bytes > 0) ptx::copy_bulk(smem_b, b + int64_t{n_first} * entry.b_stride, bytes, &b_arrived);
    }

    // partial v: this block's part of K
    const T* x = static_cast<const T*>(task.x) + int64_t{row} * task.x_stride + 8 * t;
    const T* a = static_cast<const T*>(slice.a) + int64_t{entry.a_row + g} * slice.a_stride + 8 * t;
    const int a_8rows = 8 * slice.a_stride;
#pragma unroll 1
    for (int base = 0; base < rank; base += kPassRanks) {
      float acc[kPassTiles][4] = {};
#pragma unroll 1
      for (int unit = k.begin + warp; unit < k.end; unit += kWarps * kUnrollK) {
        uint4 frag_a[kUnrollK][kPassTiles][2];
        uint4 frag_x[kUnrollK];
#pragma unroll
        for (int u = 0; u < kUnrollK; ++u) {
          const int at = (unit + u * kWarps) * kUnitK;
          const bool inside = unit + u * kWarps < k.end && at + 8 * t < k_size;
          frag_x[u] = ptx::load16_if(inside && row >= 0, x + at);
#pragma unroll
          for (int i = 0; i < 2 * kPassTiles; ++i) {
            frag_a[u][i / 2][i % 2] =
                ptx::load_weights16_if(inside && base + 8 * i + g < rank, a + int64_t{base / 8 + i} * a_8rows + at);
          }
        }
#pragma unroll
        for (int u = 0; u < kUnrollK; ++u) {
#pragma unroll
          for (int i = 0; i < kPassTiles; ++i) mma_32<T>(acc[i], frag_a[u][i][0], frag_a[u][i][1], frag_x[u]);
        }
      }
#pragma unroll
      for (int i = 0; i < kPassTiles; ++i) {
        float* to = &reduce[warp][2 * t][16 * i + g];
        to[0] = acc[i][0];
        to[kPassRanks + kPad] = acc[i][1];
        to[8] = acc[i][2];
        to[kPassRanks + kPad + 8] = acc[i][3];
      }
      __syncthreads();
      // the cluster has read the partials of the tile before (at first: has started)
      if (base == 0) ptx::cluster_wait();
      // sum of the warps, in order, to every block of the cluster: a thread takes a block, a row and 4 ranks
      constexpr int kQuads = kPassRanks / 4;
#pragma unroll 1
      for (int e = threadIdx.x; e < blocks * rows * kQuads; e += kThreads) {
        const int quad = e % kQuads;
        const int to_block = e / kQuads % blocks;
        const int to_row = e / kQuads / blocks;
        if (base + 4 * quad >= rank) continue;
        float4 sum = *reinterpret_cast<const float4*>(&reduce[0][to_row][4 * quad]);
#pragma unroll
        for (int w = 1; w < kWarps; ++w) add(sum, *reinterpret_cast<const float4*>(&reduce[w][to_row][4 * quad]));
        const float* to = smem_partial + block * block_floats + to_row * v_pitch + base + 4 * quad;
        ptx::store_to_rank(ptx::map_to_rank(to, to_block), sum);
      }
      if (base + kPassRanks < rank) __syncthreads();
    }
    ptx::cluster_arrive();

    // while the others arrive: y of this warp's first units, by row; transposed later as mma wants it
    T* y = static_cast<T*>(task.y) + int64_t{row} * task.y_stride + slice.col + 2 * t;
    uint32_t y_in[kUnrollN][2];
#pragma unroll
    for (int i = 0; i < kUnrollN; ++i) {
      const int unit = n.begin + warp + i * kWarps;
      const bool live = row >= 0 && unit < n.end;
      y_in[i][0] = y_in[i][1] = 0u;
      if (live) y_in[i][0] = *reinterpret_cast<const uint32_t*>(y + unit * kUnitN);
      if (live && unit * kUnitN + 8 < slice.width) {
        y_in[i][1] = *reinterpret_cast<const uint32_t*>(y + unit * kUnitN + 8);
      }
    }
    ptx::cluster_wait();

    // v: the blocks' partials in order, as 16-bit operands of the second product: its one rounding, unscaled as in the
    // plain formula, so that a scale above 1 cannot overflow float16 earlier than there
    const int quads = (rank + 3) / 4;
#pragma unroll 1
    for (int e = threadIdx.x; e < rows * 64; e += kThreads) {
      const int quad = e % 64;
      if (quad >= quads) continue;
      const int to_row = e / 64;
      const float* at = smem_partial + to_row * v_pitch + 4 * quad;
      float4 sum = *reinterpret_cast<const float4*>(at);
#pragma unroll 4
      for (int from = 1; from < blocks; ++from) add(sum, *reinterpret_cast<const float4*>(at + from * block_floats));
      *reinterpret_cast<uint2*>(smem_v16 + to_row * v16_pitch + 4 * quad) = {pack(sum.x, sum.y, T{}),
                                                                             pack(sum.z, sum.w, T{})};
    }
    __syncthreads();
    ptx::cluster_arrive();  // this block has read the partials
    ptx::wait_barrier(&b_arrived, parity);
    parity ^= 1;

    const T* v = smem_v16 + min(g, task.v_rows - 1) * v16_pitch + 4 * t;
    const int b_pitch = entry.b_stride;
    const int n_last = min(n.end * kUnitN, slice.width);
#pragma unroll 1
    for (int unit = n.begin + warp; unit < n.end; unit += kWarps * kUnrollN) {
      uint32_t y_next[kUnrollN][2];
#pragma unroll
      for (int i = 0; i < kUnrollN; ++i) {
        const int next = unit + (kUnrollN + i) * kWarps;
        const bool live = row >= 0 && next < n.end;
        y_next[i][0] = y_next[i][1] = 0u;
        if (live) y_next[i][0] = *reinterpret_cast<const uint32_t*>(y + next * kUnitN);
        if (live && next * kUnitN + 8 < slice.width) {
          y_next[i][1] = *reinterpret_cast<const uint32_t*>(y + next * kUnitN + 8);
        }
      }
      float acc[kUnrollN][4] = {};
      if (in_smem) {
        const T* from = smem_b + (unit * kUnitN - n_first + g) * b_pitch + 4 * t;
#pragma unroll 2
        for (int r0 = 0; r0 < rank; r0 += 16) {
          uint2 frag_v{0, 0};
          uint2 frag_b[kUnrollN][2] = {};
          if (r0 + 4 * t < rank) {
            if (row >= 0) frag_v = *reinterpret_cast<const uint2*>(v + r0);
#pragma unroll
            for (int i = 0; i < 2 * kUnrollN; ++i) {
              if ((unit + i / 2 * kWarps) * kUnitN + i % 2 * 8 >= n_last) continue;
              const int offset = (i / 2 * kWarps * kUnitN + i % 2 * 8) * b_pitch + r0;
              frag_b[i / 2][i % 2] = *reinterpret_cast<const uint2*>(from + offset);
            }
          }
          const uint32_t operand_v[2] = {frag_v.x, frag_v.y};
#pragma unroll
          for (int i = 0; i < kUnrollN; ++i) {
            const uint32_t operand_b[4] = {frag_b[i][0].x, frag_b[i][1].x, frag_b[i][0].y, frag_b[i][1].y};
            ptx::mma_m16n8k16<T>(acc[i], operand_b, operand_v);
          }
        }
      } else if (b_aligned && rank % 8 == 0) {
        const T* from = b + int64_t{unit * kUnitN + g} * b_pitch + 8 * t;
        constexpr int kChunks = 2;  // of 32 ranks, in flight together
#pragma unroll 1
        for (int r0 = 0; r0 < rank; r0 += 32 * kChunks) {
          uint4 frag_b[kChunks][kUnrollN][2];
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            const bool live = r0 + 32 * c + 8 * t < rank;
#pragma unroll
            for (int i = 0; i < 2 * kUnrollN; ++i) {
              const bool inside = (unit + i / 2 * kWarps) * kUnitN + i % 2 * 8 < n_last;
              const int offset = (i / 2 * kWarps * kUnitN + i % 2 * 8) * b_pitch + r0 + 32 * c;
              frag_b[c][i / 2][i % 2] = ptx::load_weights16_if(live && inside, from + offset);
            }
          }
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            const int r = r0 + 32 * c;
            uint4 frag_v{0, 0, 0, 0};
            if (r + 8 * t < rank && row >= 0) frag_v = *reinterpret_cast<const uint4*>(v + 4 * t + r);
#pragma unroll
            for (int i = 0; i < kUnrollN; ++i) mma_32<T>(acc[i], frag_b[c][i][0], frag_b[c][i][1], frag_v);
          }
        }
      } else {
#pragma unroll 1
        for (int r0 = 0; r0 < rank; r0 += 16) {
          uint2 frag_v{0, 0};
          if (row >= 0 && r0 + 4 * t < rank) frag_v = *reinterpret_cast<const uint2*>(v + r0);
          const uint32_t operand_v[2] = {frag_v.x, frag_v.y};
#pragma unroll
          for (int i = 0; i < kUnrollN; ++i) {
            const int out = (unit + i * kWarps) * kUnitN + g;
            uint2 low = load_ranks(b, b_pitch, out, slice.width, r0 + 4 * t, rank, b_aligned);
            uint2 high = load_ranks(b, b_pitch, out + 8, slice.width, r0 + 4 * t, rank, b_aligned);
            const uint32_t operand_b[4] = {low.x, high.x, low.y, high.y};
            ptx::mma_m16n8k16<T>(acc[i], operand_b, operand_v);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kUnrollN; ++i) {
        const float2 low = unpack(ptx::transpose_m8n8(y_in[i][0]), T{});
        const float2 high = unpack(ptx::transpose_m8n8(y_in[i][1]), T{});
        const uint32_t out_low =
            ptx::transpose_m8n8(pack(fmaf(entry.scale, acc[i][0], low.x), fmaf(entry.scale, acc[i][1], low.y), T{}));
        const uint32_t out_high =
            ptx::transpose_m8n8(pack(fmaf(entry.scale, acc[i][2], high.x), fmaf(entry.scale, acc[i][3], high.y), T{}));
        const int n0 = (unit + i * kWarps) * kUnitN;
        const bool live = row >= 0 && unit + i * kWarps < n.end;
        if (live) *reinterpret_cast<uint32_t*>(y + n0) = out_low;
        if (live && n0 + 8 < slice.width) *reinterpret_cast<uint32_t*>(y + n0 + 8) = out_high;
        y_in[i][0] = y_next[i][0];
        y_in[i][1] = y_next[i][1];
      }
    }
  }
  ptx::cluster_wait();
#else
  __trap();  // linear.cu sends no older device here
#endif
}

template <typename T>
cudaError_t launch_cluster(const ClusterTask& task, dim3 grid, int blocks, int smem, cudaStream_t stream) {
  // attributes belong to the current device; setting them again costs less than remembering where they were set
  cudaError_t error = cudaFuncSetAttribute(linear_cluster<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSmem);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(linear_cluster<T>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, linear_cluster<T>, task);
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// How a call is spread over the device, from its capacities alone.
struct Shape {
  ClusterTask task;
  int blocks;  // a cluster
  dim3 grid;
  int64_t smem;
};

Shape shape_of(const LoraParams& p) {
  Shape shape{};
  ClusterTask& task = shape.task;
  task.header = p.plan.header;
  task.tile = p.plan.tile;
  task.order = p.plan.order;
  task.table = p.slices.table;
  task.x = p.x;
  task.y = p.y;
  task.x_stride = static_cast<int32_t>(p.x_stride);
  task.y_stride = static_cast<int32_t>(p.y_stride);
  task.k = static_cast<int32_t>(p.k);
  task.rows = p.plan.rows;
  task.groups = p.plan.groups;
  task.slices = p.slices.count;
  task.v_width = p.v_width;
  int64_t widest = 0;
  for (int s = 0; s < p.slices.count; ++s) {
    task.slice[s] = {p.slices.a[s],
                     p.slices.b[s],
                     p.slices.b_elements[s],
                     static_cast<int32_t>(p.slices.a_stride[s]),
                     static_cast<int32_t>(min64(p.slices.a_rows[s], INT32_MAX)),
                     p.slices.width[s],
                     static_cast<int32_t>(p.slices.col[s])};
    widest = widest > p.slices.width[s] ? widest : p.slices.width[s];
  }
  // about one block an SM; few blocks a cluster where each would have little to do, or where there is much for all
  const int64_t runs = plan_max_runs(p.rows, p.plan.groups);
  const int64_t slice_bytes = (p.k + widest) * (p.v_width / p.slices.count) * 2;
  shape.blocks = slice_bytes >= 16 * 24 * 1024 ? 16 : 8;
  const int64_t most_blocks = slice_bytes > 1024 * 1024 ? 75 : 150;
  while (shape.blocks > 2 && runs * p.slices.count * shape.blocks > most_blocks) shape.blocks /= 2;
  task.v_rows = static_cast<int32_t>(min64(p.rows, kRows));
  task.v_ranks = (static_cast<int>(min64(p.v_width, kMaxRank)) + kPassRanks - 1) / kPassRanks * kPassRanks;
  const auto v_bytes = [&] {
    return int64_t{4} * shape.blocks * task.v_rows * (task.v_ranks + kPad) +
           int64_t{2} * task.v_rows * (task.v_ranks + 8);
  };
  while (shape.blocks > 1 && v_bytes() > kMaxSmem / 2) shape.blocks /= 2;
  const int64_t b_want = (widest / shape.blocks + 2 * kUnitN) * (task.v_ranks + 8) * 2;
  task.b_bytes = static_cast<int>(min64(b_want, kMaxSmem - v_bytes()) / 16 * 16);
  shape.smem = v_bytes() + task.b_bytes;
  shape.grid = dim3(static_cast<unsigned>(min64(p.plan.max_tiles, 528 / shape.blocks) * shape.blocks), p.slices.count);
  return shape;
}

}  // namespace

bool cluster_path_serves(const LoraParams& p) {
  if (p.dtype == DType::kFloat32 || p.k % 8 != 0 || p.x_stride % 8 != 0 || !aligned(p.x, 16)) return false;
  if (p.x_div != 0 || p.row_map || p.row_weight || p.slices.col_stride != 1) return false;
  constexpr int64_t kMax = 1 << 24;  // strides and sizes that 32-bit offsets hold
  if (!aligned(p.y, 4) || p.y_stride % 2 != 0 || p.y_stride > kMax || p.x_stride > kMax || p.k > kMax) return false;
  if (!aligned(p.plan.header, 16) || !aligned(p.slices.table, 16)) return false;
  for (int s = 0; s < p.slices.count; ++s) {
    if (!aligned(p.slices.a[s], 16) || !aligned(p.slices.b[s], 16) || p.slices.a_stride[s] % 8 != 0) return false;
    if (p.slices.width[s] % 8 != 0 || p.slices.col[s] % 2 != 0 || p.slices.a_stride[s] > kMax ||
        p.slices.width[s] > kMax) {
      return false;
    }
  }
  return true;
}

cudaError_t linear_cluster_path(const LoraParams& p, cudaStream_t stream) {
  if (p.plan.max_tiles == 0) return cudaSuccess;
  const Shape shape = shape_of(p);
  const int smem = static_cast<int>(shape.smem);
  return p.dtype == DType::kBFloat16 ? launch_cluster<__nv_bfloat16>(shape.task, shape.grid, shape.blocks, smem, stream)
                                     : launch_cluster<__half>(shape.task, shape.grid, shape.blocks, smem, stream);
}

}  // namespace polylora::cuda
