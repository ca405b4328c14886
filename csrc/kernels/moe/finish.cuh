// What the kernels of expand for MoE share: v of a unit, and what becomes of its outputs.
#pragma once

#include <type_traits>

#include "common/rows.cuh"
#include "moe/activate.cuh"
#include "moe/stream.cuh"

namespace polylora::cuda {

enum class Finish { kAdd, kAct, kDelta };

struct ExpandTask {
  StreamTask stream;
  const void* y;     // what is added to
  int64_t y_stride;  //
  int64_t col[kStreamSlices];
  void* out;  // y, h, or the deltas, whose slices begin in `col`
  int64_t out_stride;
  int32_t n_begin, n_end;  // of the outputs, those of this launch; n_begin is column 0 of the deltas
  int32_t v_pitch;         // elements, of v in shared memory
  const float* v;          // instead of the planes: a row for each of x, of the caller's; null: the planes
  int64_t v_stride;        //
  bool interleaved;        // output n of gate and up in columns 2n and 2n + 1
  ActivationOf act;
  PlanView plan;  // act: to find the rows without an adapter
};

/// The groups of kGroup outputs of a warp: begin, begin + kStreamWarps, ...; at least one step, which may have none.
template <int kGroup>
struct WarpGroups {
  int begin, end;

  __device__ __forceinline__ explicit WarpGroups(const ExpandTask& task) {
    const int groups = (task.n_end - task.n_begin + kGroup - 1) / kGroup;
    const int part = blockIdx.y;
    begin = groups * part / task.stream.parts + static_cast<int>(threadIdx.x) / 32;
    end = groups * (part + 1) / task.stream.parts;
  }
};

/// Where 16-byte piece `piece` of an output lies: outputs in the order in which ldmatrix reads them, pieces shifted so
/// that eight rows of a matrix lie in different banks.
template <int kRanks>
__device__ __forceinline__ int b_piece_at(int slot, int piece) {
  constexpr int kPieces = kRanks / 8;
  constexpr int kShift = kPieces == 2 ? 2 : kPieces == 4 ? 1 : 0;
  return (slot * kPieces + (piece ^ ((slot >> kShift) & (kPieces - 1)))) * 16;
}
/// Output 8t + 2i + e of 32 is column 2t + e of mma i.
__device__ __forceinline__ int slot_of(int n) { return n / 32 * 32 + n % 8 / 2 * 8 + n % 32 / 8 * 2 + n % 2; }

/// `count` of 8 elements that no 16-byte piece of memory holds, zeros behind. Out of line: few calls have such.
template <typename T>
__device__ __attribute__((noinline)) void copy_elements(unsigned char* to, const T* from, int count) {
  uint32_t pair[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) pair[i / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(from)[i]} << (i % 2 * 16);
  }
  *reinterpret_cast<uint4*>(to) = {pair[0], pair[1], pair[2], pair[3]};
}

/// Passes over the ranks of a group of outputs; the last one brings y.
template <int kRanks>
__device__ __forceinline__ int passes_of(const int32_t (&rank)[kStreamSlices]) {
  return max((max(rank[0], rank[1]) + kRanks - 1) / kRanks, 1);
}

/// Four ranks of v as operands, zeros for those that are not among the `left`, whose sums are 0, or NaN where x is not
/// finite.
template <typename T>
__device__ __forceinline__ uint2 pack_ranks(float4 sum, int left) {
  if (left < 1) sum.x = 0.f;
  if (left < 2) sum.y = 0.f;
  if (left < 3) sum.z = 0.f;
  if (left < 4) sum.w = 0.f;
  return {pack(sum.x, sum.y, T{}), pack(sum.z, sum.w, T{})};
}

/// v of a unit as operands, from the planes or, of kMayBeGiven, the caller's; the block calls it.
template <typename T, int kSlices, bool kMayBeGiven>
__device__ __forceinline__ void make_v(const ExpandTask& task, const StreamItem& item, T* v) {
  constexpr int kThreadsARow = kStreamThreads / kTileRows;
  const StreamTask& stream = task.stream;
  const int row = static_cast<int>(threadIdx.x) / kThreadsARow;
  if (row >= item.rows) return;
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const int rank = item.rank[s];
    const bool given = kMayBeGiven && task.v != nullptr;
    const float* from =
        given ? task.v + item.x_row[row] * task.v_stride + item.v_col[s]
              : stream.plane + int64_t{item.row[row]} * stream.plane_width + item.first_rank_tile[s] * kRankTile;
#pragma unroll 2
    for (int r = static_cast<int>(threadIdx.x) % kThreadsARow * 4; r < whole_rank_tiles(rank); r += kThreadsARow * 4) {
      float4 sum{0.f, 0.f, 0.f, 0.f};
      if (given) {  // in any column, and nothing beyond the rank is there
        if (r < rank) sum.x = from[r];
        if (r + 1 < rank) sum.y = from[r + 1];
        if (r + 2 < rank) sum.z = from[r + 2];
        if (r + 3 < rank) sum.w = from[r + 3];
      }
#pragma unroll 4
      for (int p = 0; p < stream.planes; ++p) {
        add(sum, *reinterpret_cast<const float4*>(from + p * stream.plane_elements + r));
      }
      *reinterpret_cast<uint2*>(v + (s * kTileRows + row) * task.v_pitch + r) = pack_ranks<T>(sum, rank - r);
    }
  }
}

/// y + scale * delta of gate and up, or of up alone, through the activation.
template <typename T, int kSlices>
__device__ __forceinline__ uint4 activate(const ActivationOf& act, const uint4 (&y)[kSlices],
                                          const float (&scale)[kSlices], const float (&delta)[kSlices][8]) {
  float value[kSlices][8];
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const uint32_t words[4] = {y[s].x, y[s].y, y[s].z, y[s].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 base = unpack(words[i], T{});
      value[s][2 * i] = fmaf(scale[s], delta[s][2 * i], base.x);
      value[s][2 * i + 1] = fmaf(scale[s], delta[s][2 * i + 1], base.y);
    }
  }
  if (kSlices == 2) {
    activate_gated(act.act, value[0], value[kSlices - 1], act.alpha, act.limit);
  } else {
    activate_all(act.act, value[0]);
  }
  return {pack(value[0][0], value[0][1], T{}), pack(value[0][2], value[0][3], T{}), pack(value[0][4], value[0][5], T{}),
          pack(value[0][6], value[0][7], T{})};
}

/// Every second element of 16: those of gate, and those of up.
__device__ __forceinline__ void take_apart(uint4 low, uint4 high, uint4& gate, uint4& up) {
  const uint32_t in[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint32_t even[4], odd[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    even[i] = (in[2 * i] & 0xffff) | in[2 * i + 1] << 16;
    odd[i] = in[2 * i] >> 16 | (in[2 * i + 1] & 0xffff0000);
  }
  gate = {even[0], even[1], even[2], even[3]};
  up = {odd[0], odd[1], odd[2], odd[3]};
}
__device__ __forceinline__ void put_together(uint4 gate, uint4 up, uint4& low, uint4& high) {
  const uint32_t even[4] = {gate.x, gate.y, gate.z, gate.w}, odd[4] = {up.x, up.y, up.z, up.w};
  uint32_t out[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = (even[i] & 0xffff) | odd[i] << 16;
    out[2 * i + 1] = even[i] >> 16 | (odd[i] & 0xffff0000);
  }
  low = {out[0], out[1], out[2], out[3]};
  high = {out[4], out[5], out[6], out[7]};
}

/// Groups of outputs of rows without an adapter that make a block worth while.
inline constexpr int kGroupsOfBaseRows = 32;

/// h of the rows that no adapter touches: they stand in no tile. Warps, kWarps a block, take pieces of 256 outputs of a
/// row.
template <typename T, int kSlices, int kWarps = kStreamWarps>
__device__ __forceinline__ void activate_base_rows(const ExpandTask& task) {
  constexpr int kPiece = 256;
  const int lane = threadIdx.x % 32;
  const int warps = gridDim.x * gridDim.y * kWarps;
  const int warp = (blockIdx.y * gridDim.x + blockIdx.x) * kWarps + threadIdx.x / 32;
  const int pieces = (task.stream.width + kPiece - 1) / kPiece;
  const int64_t units = int64_t{task.stream.rows} * pieces;
#pragma unroll 1
  for (int64_t first = warp; first < units; first += int64_t{32} * warps) {
    const int64_t mine = first + int64_t{lane} * warps;
    const bool is_base = mine < units && group_of(task.plan, mine / pieces) == kNoAdapter;
    uint32_t found = __ballot_sync(0xffffffffu, is_base);
#pragma unroll 1
    while (found != 0) {
      const int64_t unit = first + int64_t{__ffs(found) - 1} * warps;
      found &= found - 1;
      const int64_t row = unit / pieces;
      const int n = static_cast<int>(unit % pieces) * kPiece + lane * 8;
      if (n >= task.stream.width) continue;
      const T* from = static_cast<const T*>(task.y) + row * task.y_stride;
      uint4 y[kSlices];
      if (kSlices == 2 && task.interleaved) {
        take_apart(ptx::load16(from + task.col[0] + 2 * n), ptx::load16(from + task.col[0] + 2 * n + 8), y[0],
                   y[kSlices - 1]);
      } else {
#pragma unroll
        for (int s = 0; s < kSlices; ++s) y[s] = ptx::load16(from + task.col[s] + n);
      }
      const float scale[kSlices] = {}, delta[kSlices][8] = {};
      ptx::store16(static_cast<T*>(task.out) + row * task.out_stride + n,
                   activate<T, kSlices>(task.act, y, scale, delta));
    }
  }
}

/// Where y of a unit's rows lies in shared memory, from the first of 32 outputs on.
struct StagedY {
  const unsigned char* at;
  int row_bytes, slice_bytes;

  __device__ __forceinline__ uint4 load(int slice, int row, int piece) const {
    return *reinterpret_cast<const uint4*>(at + slice * slice_bytes + row * row_bytes + piece * 16);
  }
};

/// Where 8 outputs from `n` on go within a row of `out`: those of the first slice.
template <Finish kFinish>
__device__ __forceinline__ int64_t out_column(const ExpandTask& task, int n) {
  if (kFinish == Finish::kAct) return n;
  return task.col[0] + (kFinish == Finish::kDelta ? n - task.n_begin : task.interleaved ? 2 * n : n);
}

/// The last of 8 outputs' ways. `y`: of each slice; `out`: where those of the first slice go, those of a second one
/// as far behind them as its column is.
template <typename T, Finish kFinish, int kSlices>
__device__ __forceinline__ void finish8(const ExpandTask& task, uint4 (&y)[kSlices], const int (&rank)[kStreamSlices],
                                        const float (&scale)[kStreamSlices], float weight,
                                        const float (&delta)[kSlices][8], T* out) {
  const int64_t apart = task.col[kSlices - 1] - task.col[0];
  float factor[kSlices];
  // only down has weights, and that of a pair without a delta may be anything
#pragma unroll
  for (int s = 0; s < kSlices; ++s)
    factor[s] = kFinish == Finish::kAct ? scale[s] : rank[s] > 0 ? scale[s] * weight : 0.f;
  if (kFinish == Finish::kAct) {
    ptx::store16(out, activate<T, kSlices>(task.act, y, factor, delta));
  } else if (kFinish == Finish::kDelta) {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      ptx::store16(out + s * apart, add_scaled<T>(uint4{0, 0, 0, 0}, factor[s], delta[s]));
    }
  } else {
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      if (rank[s] > 0) y[s] = add_scaled<T>(y[s], factor[s], delta[s]);
    }
    if (kSlices == 2 && task.interleaved) {
      if (rank[0] + rank[1] == 0) return;
      uint4 low, high;
      put_together(y[0], y[kSlices - 1], low, high);
      ptx::store16(out, low);
      ptx::store16(out + 8, high);
      return;
    }
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      if (rank[s] > 0) ptx::store16(out + s * apart, y[s]);
    }
  }
}

/// Of 32 outputs' `acc`, what a lane has of its row g or, with `half` 1, g + 8: column 2t + e of mma i is output
/// 8t + 2i + e.
template <int kSlices>
__device__ __forceinline__ void take_delta(const float (*acc)[4], int slice_stride, int half,
                                           float (&delta)[kSlices][8]) {
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
#pragma unroll
    for (int e = 0; e < 8; ++e) delta[s][e] = acc[s * slice_stride + e / 2][half * 2 + e % 2];
  }
}

/// The last of 32 outputs' ways. `n`: this lane's first output, `out`: of its two rows.
template <typename T, Finish kFinish, int kSlices>
__device__ __forceinline__ void finish32(const ExpandTask& task, const float (*acc)[4], int slice_stride,
                                         const StagedY& staged, int n, int rows, const int (&rank)[kStreamSlices],
                                         const float (&scale)[kStreamSlices], const float (&weight)[2],
                                         T* const (&out)[2]) {
  constexpr bool kReadsY = kFinish != Finish::kDelta;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const int64_t column = out_column<kFinish>(task, n);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (g + 8 * half >= rows) continue;
    float delta[kSlices][8];
    take_delta<kSlices>(acc, slice_stride, half, delta);
    uint4 y[kSlices] = {};
    if (kReadsY && kSlices == 2 && task.interleaved) {
      take_apart(staged.load(0, g + 8 * half, 2 * t), staged.load(0, g + 8 * half, 2 * t + 1), y[0], y[kSlices - 1]);
    } else if (kReadsY) {
#pragma unroll
      for (int s = 0; s < kSlices; ++s) y[s] = staged.load(s, g + 8 * half, t);
    }
    finish8<T, kFinish, kSlices>(task, y, rank, scale, weight[half], delta, out[half] + column);
  }
}

// ---- host

inline ExpandTask expand_task(const LoraParams& p, int planes) {
  ExpandTask task{};
  task.stream = stream_task(p, planes);
  task.y = p.y;
  task.y_stride = p.y_stride;
  for (int s = 0; s < p.slices.count; ++s) task.col[s] = p.slices.col[s];
  task.n_end = p.slices.width[0];
  task.interleaved = p.slices.col_stride == 2;
  const int64_t rank_cap = divide_up(min64(p.v_width, kMaxRank), kRankTile) * kRankTile;
  task.v_pitch = static_cast<int32_t>(rank_cap + 8);  // an odd number of 16-byte pieces: no bank conflicts
  task.plan = p.plan;
  task.v = p.v_of_x ? p.v : nullptr;
  task.v_stride = p.v_stride;
  return task;
}

/// The task of each finish. Into p.y, which is added to, or which holds the deltas alone:
inline ExpandTask add_task(const LoraParams& p, int planes) {
  ExpandTask task = expand_task(p, planes);
  task.out = p.y;
  task.out_stride = p.y_stride;
  return task;
}
inline ExpandTask act_task(const GateUpActParams& g, int planes) {
  ExpandTask task = expand_task(g.lora, planes);
  task.out = g.h;
  task.out_stride = g.h_stride;
  task.act = {g.act, g.alpha, g.limit};
  return task;
}
inline ExpandTask delta_task(const LoraParams& p, int planes, void* delta, int32_t n_begin, int32_t n_end) {
  ExpandTask task = expand_task(p, planes);
  task.out = delta;
  task.out_stride = n_end - n_begin;
  task.col[0] = 0;
  task.n_begin = n_begin;
  task.n_end = n_end;
  return task;
}

/// Sets what follows from a call's capacities, with groups of `group_outputs` outputs; returns the launch's shape but
/// for shared memory.
inline LaunchShape spread_expand(const LoraParams& p, int blocks, int group_outputs, bool base_rows, ExpandTask& task) {
  StreamTask& s = task.stream;
  const int64_t groups = divide_up(task.n_end - task.n_begin, group_outputs);
  s.parts = stream_parts(s.max_tiles, blocks, groups / kStreamWarps);
  // rows without an adapter want blocks, too
  const int64_t base_blocks = base_rows ? divide_up(p.rows * groups, kGroupsOfBaseRows * s.parts) : 0;
  return stream_shape(blocks, s.max_tiles > base_blocks ? s.max_tiles : base_blocks, s.parts);
}

/// Calls launch(T{}, slices) with the type of the call's elements and, as a type of its own, 1 or 2 for its slices.
template <typename Launch>
cudaError_t dispatch_expand(const LoraParams& p, const Launch& launch) {
  return dispatch_16_bit(p.dtype, [&](auto element) {
    return p.slices.count == 2 ? launch(element, std::integral_constant<int, 2>{})
                               : launch(element, std::integral_constant<int, 1>{});
  });
}

}  // namespace polylora::cuda
