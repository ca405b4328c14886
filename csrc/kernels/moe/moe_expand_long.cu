// expand for MoE's long runs, sm_80 and later: v B^T for up to 128 rows of a group (slot, expert), then h = act(y1 +
// delta) or the weighted deltas (finish.cuh). Bit for bit what moe_expand.cu makes of them.
//
// A unit is a wide tile of the plan and 32 outputs a warp. A warp reads B of its outputs once, into registers, and
// keeps it for all rows of the tile, 16 at a time; what it reads of y for the next 16 is on its way while it finishes
// these. The block has looked up the tile's rows and rounded its v, once for all its warps; of its units' latencies,
// the SM's other blocks make use. Ranks beyond kSteps rank tiles are there, but read again for every 16 rows.
#include "moe/finish.cuh"
#include "moe/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kGroup = 32;  // outputs of a warp
constexpr int kMmas = kGroup / 8;
constexpr int kTurns = 6;  // of a block
// Blocks an SM that registers must do for, by the rank tiles of B that a warp keeps; of a slice's deltas, which keep
// nothing of y, two more are there on 9.0.
constexpr int blocks_of(int b_tiles) { return b_tiles <= 2 ? 4 : b_tiles == 4 ? 3 : 2; }
constexpr int kMoreOfDeltas = 2;

/// A unit's tile, in shared memory.
struct alignas(8) LongRow {
  int32_t row;
  float weight;
};
struct LongItem : StreamTile {
  LongRow row[kWideTileRows];  // beyond the tile's end the last
};
static_assert(sizeof(LongItem) % 16 == 0);  // v lies behind it
static_assert(kStreamThreads == kWideTileRows);

/// Looks up a tile, a row a thread; the block calls it.
__device__ __forceinline__ void load_item(const StreamTask& task, int index, LongItem& to) {
  const int j = static_cast<int>(threadIdx.x);
  const PlanTile tile(task, task.tile + index, kWideTileRows);
  const int row = row_at(task, tile.pos + min(j, tile.rows - 1));
  if (j == 0) {
    load_ranks(task, tile.group, to);
    to.rows = tile.rows;
  }
  to.row[j] = {row, task.row_weight != nullptr ? task.row_weight[pair_of(task, row)] : 1.f};
  __syncthreads();
}

/// v of a tile as operands, as it stands in the planes: 16 columns for each rank tile; the block calls it.
template <typename T>
__device__ __forceinline__ void make_long_v(const ExpandTask& task, const LongItem& item, T* v) {
  constexpr int kThreadsARow = kRankTile / 4;
  constexpr int kApart = kStreamThreads / kThreadsARow;  // rows between two of a thread's
  constexpr int kRows = kWideTileRows / kApart;
  const StreamTask& stream = task.stream;
  const int first = static_cast<int>(threadIdx.x) / kThreadsARow;
  const int column = static_cast<int>(threadIdx.x) % kThreadsARow * 4;
  const int of_first = item.tiles_of_first();
#pragma unroll 1
  for (int tile = 0; tile < item.rank_tiles; ++tile) {
    const int s = tile < of_first ? 0 : 1;
    const int r = tile * kRankTile + column;
    const int left = item.rank[s] + item.first_rank_tile[s] * kRankTile - r;
    const auto load_sum = [&](int i, int plane) {  // beyond the tile's end those of its last row
      const float* from = stream.plane + int64_t{item.row[first + kApart * i].row} * stream.plane_width + r;
      return *reinterpret_cast<const float4*>(from + plane * stream.plane_elements);
    };
    float4 sum[kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (kApart * i < item.rows) sum[i] = load_sum(i, 0);
    }
#pragma unroll 1
    for (int p = 1; p < stream.planes; ++p) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (kApart * i < item.rows) add(sum[i], load_sum(i, p));
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (kApart * i < item.rows)
        *reinterpret_cast<uint2*>(v + (first + kApart * i) * task.v_pitch + r) = pack_ranks<T>(sum[i], left);
    }
  }
}

/// Two elements, of which `count` are there.
__device__ __forceinline__ uint32_t load_two(const uint16_t* from, int count, bool aligned) {
  if (count >= 2 && aligned) return ptx::load4(from);
  uint32_t two = 0;
  if (count > 0) two = from[0];
  if (count > 1) two |= uint32_t{from[1]} << 16;
  return two;
}

/// B of a warp's outputs as operands: output 8t + 2i + e of 32 is column 2t + e of mma i.
struct LongB {
  const uint16_t* from;  // of this lane's output of the first mma, and its first rank
  int64_t step;          // from mma to mma
  int outputs, ranks;    // that are there from this lane's on
  bool aligned, is_whole;

  __device__ __forceinline__ LongB(const LongItem& item, int s, int r, int n0, int outputs_of_warp) {
    const int n = static_cast<int>(threadIdx.x) % 32 / 8 * 8 + static_cast<int>(threadIdx.x) % 8 / 4;
    const int k = static_cast<int>(threadIdx.x) % 4 * 2;
    const int stride = item.b_stride[s];
    from = static_cast<const uint16_t*>(item.b[s]) + int64_t{n0 + n} * stride + r + k;
    step = 2 * int64_t{stride};
    outputs = outputs_of_warp - n;
    ranks = item.rank[s] - r - k;
    aligned = stride % 2 == 0 && reinterpret_cast<uintptr_t>(item.b[s]) % 4 == 0;
    is_whole = aligned && item.rank[s] - r >= kRankTile && outputs_of_warp >= kGroup;
  }

  /// 16 ranks of mma i's outputs; zeros for what is not there.
  __device__ __forceinline__ void load(int i, uint32_t (&b)[2]) const {
    const int left = 2 * i < outputs ? ranks : 0;
    b[0] = load_two(from + i * step, left, aligned);
    b[1] = load_two(from + i * step + 8, left - 8, aligned);
  }
  /// The same where all are there.
  __device__ __forceinline__ void load_whole(int i, uint32_t (&b)[2]) const {
    b[0] = ptx::load4(from + i * step);
    b[1] = ptx::load4(from + i * step + 8);
  }
};

/// `base` + row * pitch, in bytes.
template <typename P>
__device__ __forceinline__ P* at_row(P* base, int row, uint32_t pitch) {
  return reinterpret_cast<P*>(reinterpret_cast<uintptr_t>(base) + uint64_t{static_cast<uint32_t>(row)} * pitch);
}

template <typename T, Finish kFinish, int kSlices, int kSteps>
__global__ void __launch_bounds__(kStreamThreads, blocks_of(kSlices* kSteps))
    moe_expand_long(const __grid_constant__ ExpandTask task) {
  constexpr bool kReadsY = kFinish != Finish::kDelta;
  const StreamTask& stream = task.stream;
  LongItem& item = *reinterpret_cast<LongItem*>(ptx::dynamic_smem());
  T* const smem_v = reinterpret_cast<T*>(ptx::dynamic_smem() + sizeof(LongItem));
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const uint32_t y_pitch = static_cast<uint32_t>(task.y_stride) * 2;
  const uint32_t out_pitch = static_cast<uint32_t>(task.out_stride) * 2;

  ptx::wait_for_previous_grid();
  ptx::launch_next_grid();  // after the wait: of what the next kernel reads early, all but the deltas is there
  const PlanWords words(stream);
  const int tiles = words.wide_tiles(stream);
  const WarpGroups<kGroup> groups(task);
#pragma unroll 1
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    load_item(stream, index, item);
    const int32_t rank[kStreamSlices] = {item.rank[0], item.rank[1]};
    const float scale[kStreamSlices] = {item.scale[0], item.scale[1]};
    const int second = item.first_rank_tile[1] * kRankTile;
    int group = groups.begin;
#pragma unroll 1
    do {
      const int n0 = task.n_begin + group * kGroup;
      const int outputs = group < groups.end ? task.n_end - n0 : 0;
      const int n = n0 + 8 * t;  // of this lane
      const int rows = 8 * t < outputs ? item.rows : 0;
      T* const out_at = ptx::keep(static_cast<T*>(task.out) + out_column<kFinish>(task, n));
      const T* y_at[kSlices];
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        y_at[s] = static_cast<const T*>(task.y) + task.col[s] + n;
        if (kReadsY) y_at[s] = ptx::keep(y_at[s]);
      }
      uint4 y[2][kSlices] = {};
      const auto load_y = [&](int half, int row) {
        if (!kReadsY || row >= rows) return;
        const int at = item.row[row].row;
#pragma unroll
        for (int s = 0; s < kSlices; ++s) y[half][s] = ptx::load16(at_row(y_at[s], at, y_pitch));
      };
      load_y(0, g);
      load_y(1, g + 8);
      uint32_t b[kSlices][kSteps][kMmas][2] =
          {};  // set: else ptxas (13.0) may drop one of the loads of the two branches
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const LongB from(item, s, step * kRankTile, n0, outputs);
          if (from.is_whole) {  // nearly always
#pragma unroll
            for (int i = 0; i < kMmas; ++i) from.load_whole(i, b[s][step][i]);
          } else {
#pragma unroll
            for (int i = 0; i < kMmas; ++i) from.load(i, b[s][step][i]);
          }
        }
      }
      if (group == groups.begin) {
        make_long_v(task, item, smem_v);
        __syncthreads();  // v is there
      }
      int v_at = lane % 16 * task.v_pitch + lane / 16 * 8;
#pragma unroll 1
      for (int first = 0; first < item.rows && outputs > 0; first += kTileRows) {
        float acc[kSlices * kMmas][4] = {};
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          const T* of_slice = smem_v + v_at + s * second;
          uint32_t v[4];
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            if (step * kRankTile >= rank[s]) break;
            ptx::load_matrices(v, of_slice + step * kRankTile);
#pragma unroll
            for (int i = 0; i < kMmas; ++i) ptx::mma_m16n8k16<T>(acc[s * kMmas + i], v, b[s][step][i]);
          }
#pragma unroll 1
          for (int r = kSteps * kRankTile; kSlices == 2 && r < rank[s];
               r += kRankTile) {  // one slice has all of v_width
            ptx::load_matrices(v, of_slice + r);
            const LongB from(item, s, r, n0, outputs);
#pragma unroll
            for (int i = 0; i < kMmas; ++i) {
              uint32_t more[2];
              from.load(i, more);
              ptx::mma_m16n8k16<T>(acc[s * kMmas + i], v, more);
            }
          }
        }
        v_at += kTileRows * task.v_pitch;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first + g + 8 * half;
          if (row < rows) {
            float delta[kSlices][8];
            take_delta<kSlices>(acc, kMmas, half, delta);
            const LongRow at = item.row[row];
            finish8<T, kFinish, kSlices>(task, y[half], rank, scale, at.weight, delta,
                                         at_row(out_at, at.row, out_pitch));
          }
          load_y(half, row + kTileRows);
        }
      }
      group += kStreamWarps;
    } while (group < groups.end);
    __syncthreads();  // all are done with the item and v
  }
  if (kFinish == Finish::kAct && !words.all_active(stream)) activate_base_rows<T, kSlices>(task);
}

// Tiles are wide ones, and v stands as in the planes.
void to_wide_tiles(const LoraParams& p, ExpandTask& task) {
  to_wide_tiles(p, task.stream);
  task.v_pitch = task.stream.plane_width + 8;  // an odd number of 16-byte pieces: no bank conflicts
}

int64_t smem_bytes(const ExpandTask& task) { return sizeof(LongItem) + int64_t{kWideTileRows} * task.v_pitch * 2; }

template <typename T, Finish kFinish, int kSlices, int kSteps>
cudaError_t launch_expand(const Device& device, ExpandTask& task, int most_blocks, cudaStream_t stream) {
  constexpr int kBlocks = blocks_of(kSlices * kSteps) + (kFinish == Finish::kDelta && kSlices == 1 ? kMoreOfDeltas : 0);
  const int blocks = most_blocks < kBlocks ? most_blocks : kBlocks;
  // parts of a tile's outputs: as many units as even out the blocks' last turns, and work for all of a block's warps
  const int64_t all_blocks = int64_t{blocks} * device.sms;
  const int64_t most = divide_up(task.n_end - task.n_begin, kGroup * kStreamWarps);
  const int64_t wanted = min64(most, divide_up(kTurns * all_blocks, task.stream.max_tiles));
  task.stream.parts = static_cast<int32_t>(divide_up(most, most / wanted));
  LaunchShape shape = stream_shape(all_blocks, task.stream.max_tiles, task.stream.parts);
  shape.smem_bytes = smem_bytes(task);
  return launch<&moe_expand_long<T, kFinish, kSlices, kSteps>>(device, shape, task, stream);
}

template <typename T, Finish kFinish, int kSlices>
cudaError_t launch_expand(const LoraParams& p, const Device& device, ExpandTask& task, int most_blocks,
                          cudaStream_t stream) {
  const int64_t rank = even_rank(p);
  return (rank <= 16   ? launch_expand<T, kFinish, kSlices, 1>
          : rank <= 32 ? launch_expand<T, kFinish, kSlices, 2>
                       : launch_expand<T, kFinish, kSlices, 4>)(device, task, most_blocks, stream);
}

template <Finish kFinish>
cudaError_t launch_expand(const LoraParams& p, ExpandTask task, int most_blocks, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  to_wide_tiles(p, task);
  return dispatch_expand(p, [&](auto element, auto slices) {
    return launch_expand<decltype(element), kFinish, decltype(slices)::value>(p, device, task, most_blocks, stream);
  });
}

}  // namespace

bool moe_expand_long_serves(const LoraParams& p, int64_t out_stride) {
  Device device;
  if (current_device(device) != cudaSuccess) return false;
  ExpandTask task = expand_task(p, 1);
  to_wide_tiles(p, task);
  return has_long_runs(p) && !p.v_of_x && even_rank(p) <= 4 * kRankTile && smem_bytes(task) <= device.smem_bytes &&
         p.y_stride <= INT32_MAX && out_stride <= INT32_MAX;
}

cudaError_t moe_expand_long_act_path(const GateUpActParams& g, int planes, cudaStream_t stream) {
  return launch_expand<Finish::kAct>(g.lora, act_task(g, planes), kAllBlocks, stream);
}

cudaError_t moe_expand_long_deltas_path(const LoraParams& p, int planes, int most_blocks, cudaStream_t stream) {
  return launch_expand<Finish::kDelta>(p, add_task(p, planes), most_blocks, stream);
}

cudaError_t moe_expand_long_delta_path(const LoraParams& p, int planes, void* delta, int32_t n_begin, int32_t n_end,
                                       cudaStream_t stream) {
  return launch_expand<Finish::kDelta>(p, delta_task(p, planes, delta, n_begin, n_end), kAllBlocks, stream);
}

}  // namespace polylora::cuda
