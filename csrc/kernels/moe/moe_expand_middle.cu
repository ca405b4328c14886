// expand for MoE's runs of a middling length, sm_80 and later: v B^T for up to 32 rows of a group (slot, expert) at a
// time, of one slice of up to 16 ranks, then whatever moe_expand.cu makes of it (finish.cuh), bit for bit.
//
// moe_expand.cu works on a run of 17 to 32 rows twice, and instructions bind it: B, its ring, addresses and bounds cost
// as much for the 6 rows of a second tile as for 16. Here a unit is a wide tile of the plan and a part of the outputs.
// A warp walks over its groups of 64 outputs with v of 32 rows in registers, both row tiles of mma, and a lane holds
// where its four rows begin; B and y come through a ring of its own, which goes on from walk to walk. Of y a lane
// brings what it will add to itself. No barrier stands between units that were looked up together. Runs of more than 32
// rows take several walks.
//
// Of what this kernel reads only the planes are the work of the kernel before, as in moe_expand.cu.
#include "moe/finish.cuh"
#include "moe/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kRows = 2 * kTileRows;  // of a walk
constexpr int kHalves = kRows / 8;    // rows g, g + 8, ... of a lane
constexpr int kGroup = 64;            // outputs of a step
constexpr int kSubs = kGroup / 32;
constexpr int kUnits = 4;  // looked up at once
// Blocks an SM that registers must do for. relu2 is what models without a gate have; code for any activation is six
// times as long and keeps more.
constexpr int blocks_of(Finish finish, bool relu2) { return finish == Finish::kAct && !relu2 ? 3 : 4; }

/// A unit's tile, in shared memory.
struct alignas(8) MiddleRow {
  int32_t row;
  float weight;
};
struct MiddleItem : StreamTile {
  MiddleRow row[kWideTileRows];  // those of the tile alone
};
static_assert(sizeof(MiddleItem) % 16 == 0);

template <bool kReadsY>
struct MiddleSmem {
  static constexpr int kBBytes = kGroup * kRankTile * 2;
  static constexpr int kStageBytes = kBBytes + (kReadsY ? kRows * kGroup * 2 : 0);
  static constexpr int kStages = kReadsY ? 2 : 5;  // four blocks are to have room

  unsigned char ring[kStreamWarps][kStages][kStageBytes];
  MiddleItem item[kUnits];
};

/// Looks up the tiles first, first + stride, ... below `tiles`, kUnits at most, a warp each; the block calls it. As
/// load_items of stream.cuh it may be given the capacity for `tiles`.
__device__ __forceinline__ void load_middle_items(const StreamTask& task, int first, int stride, int tiles,
                                                  MiddleItem (&item)[kUnits]) {
  static_assert(kUnits == kStreamWarps);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t index = first + static_cast<int64_t>(threadIdx.x) / 32 * stride;
  if (index < tiles) {
    MiddleItem& to = item[threadIdx.x / 32];
    const PlanTile tile(task, task.tile + index, kWideTileRows);
    if (lane == 0) {
      load_ranks(task, tile.group, to);
      to.rows = tile.rows;
    }
#pragma unroll 1
    for (int j = lane; j < tile.rows; j += 32) {
      const int row = row_at(task, tile.pos + j);
      to.row[j] = {row, task.row_weight != nullptr ? task.row_weight[pair_of(task, row)] : 1.f};
    }
  }
  __syncthreads();
}

/// What a warp asks for, a step at a time, ahead of its products.
template <typename T, Finish kFinish>
class MiddleLoads {
  static constexpr bool kReadsY = kFinish != Finish::kDelta;
  using Smem = MiddleSmem<kReadsY>;
  static constexpr int kApart = 16;  // outputs between two of a lane's pieces of B
  static constexpr int kCopies = kGroup / kApart;
  static constexpr int kStep = kStreamWarps * kGroup;  // outputs from one step of a warp to its next

 public:
  __device__ __forceinline__ MiddleLoads(const ExpandTask& task, Smem& smem)
      : task_(task), smem_(smem), groups_(task), b_at_{b_at(0), b_at(1)} {}

  /// Begins with the units that were looked up.
  __device__ __forceinline__ void begin(int count) {
    item_ = first_ = 0;
    count_ = groups_.begin < groups_.end ? count : 0;
    stage_ = 0;
    enter();
  }

  /// The next step's copies, into the stage that is free.
  __device__ __forceinline__ void start() {
    if (item_ < count_) {
      if (kFinish != Finish::kAdd || rank_ > 0) copy(smem_.ring[threadIdx.x / 32][stage_]);
      group_ += kStreamWarps;
      b_ += b_step_;
#pragma unroll
      for (int i = 0; i < kHalves; ++i) y_[i] += kStep;
      if (group_ >= groups_.end) {
        first_ += kRows;
        if (first_ >= smem_.item[item_].rows) {
          ++item_;
          first_ = 0;
        }
        enter();
      }
    }
    ptx::commit_copies();
    stage_ = stage_ + 1 == Smem::kStages ? 0 : stage_ + 1;
  }

 private:
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ static int lane_rank() { return lane() % 2 * 8; }
  __device__ __forceinline__ static int b_at(int i) {
    return b_piece_at<kRankTile>(slot_of(lane() / 2 + kApart * i), lane() % 2);
  }

  // A walk begins.
  __device__ __forceinline__ void enter() {
    group_ = groups_.begin;
    if (item_ >= count_) return;
    const MiddleItem& item = smem_.item[item_];
    const int n0 = task_.n_begin + group_ * kGroup;
    rank_ = item.rank[0];
    stride_ = item.b_stride[0];
    b_step_ = int64_t{kStep} * stride_;
    b_ = static_cast<const T*>(item.b[0]) + int64_t{n0 + lane() / 2} * stride_ + lane_rank();
    aligned_ = stride_ % 8 == 0 && (reinterpret_cast<uintptr_t>(b_) & 15) == 0;
    rows_ = item.rows - first_ - lane() / 4;
    if (!kReadsY) return;
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int row = item.row[first_ + lane() / 4 + (8 * i < rows_ ? 8 * i : 0)].row;
      y_[i] = static_cast<const T*>(task_.y) + row * task_.y_stride + task_.col[0] + n0 + lane() % 4 * 8;
    }
  }

  __device__ __forceinline__ void copy(unsigned char* to) const {
    const int outputs = task_.n_end - task_.n_begin - group_ * kGroup;  // that are there
    if (aligned_ && rank_ == kRankTile && outputs >= kGroup) {          // nearly always
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        ptx::copy_async16(to + i / 2 * (32 * kRankTile * 2) + b_at_[i % 2], b_ + int64_t{kApart * i} * stride_, 16);
      }
    } else {
      copy_some(to, outputs);
    }
    if (!kReadsY) return;
    unsigned char* y_to = to + Smem::kBBytes + lane() * 16;
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      if (8 * i >= rows_) break;
#pragma unroll
      for (int sub = 0; sub < kSubs; ++sub) {
        if (sub * 32 + lane() % 4 * 8 < outputs)
          ptx::copy_async16(y_to + (kSubs * i + sub) * 512, y_[i] + sub * 32, 16);
      }
    }
  }

  // Zeros for ranks and outputs that are not there.
  __device__ __forceinline__ void copy_some(unsigned char* to, int outputs) const {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int count = lane() / 2 + kApart * i < outputs ? min(max(rank_ - lane_rank(), 0), 8) : 0;
      unsigned char* at = to + i / 2 * (32 * kRankTile * 2) + b_at_[i % 2];
      const T* from = b_ + int64_t{kApart * i} * stride_;
      if (aligned_) {
        ptx::copy_async16(at, count > 0 ? from : static_cast<const T*>(task_.stream.slice[0].b), count * 2);
      } else {
        copy_elements(at, from, count);
      }
    }
  }

  const ExpandTask& task_;
  Smem& smem_;
  const WarpGroups<kGroup> groups_;
  const int b_at_[2];  // of a lane's pieces of 32 outputs; those of the next 32 lie behind
  int item_ = 0, count_ = 0, first_ = 0, group_ = 0, stage_ = 0;
  int rows_ = 0;  // of the walk, from this lane's first on
  int rank_ = 0, stride_ = 0;
  int64_t b_step_ = 0;
  bool aligned_ = false;
  const T* b_ = nullptr;      // of this lane's first output and rank
  const T* y_[kHalves] = {};  // of its rows and outputs; of rows that are not there, another's
};

/// v of a walk's rows as operands of two mma, from the planes, rounded once to 16 bits, unscaled; zeros for rows and
/// ranks that are not there.
template <typename T>
__device__ __forceinline__ void load_v(const StreamTask& stream, const MiddleItem& item, int first,
                                       uint32_t (&v)[2][4]) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  first += static_cast<int>(threadIdx.x) % 32 / 4;
  const int left = item.rank_tiles > 0 ? item.rank[0] - 2 * t : 0;
  float2 low[kHalves] = {}, high[kHalves] = {};
#pragma unroll 1
  for (int p = 0; p < stream.planes && item.rank_tiles > 0; ++p) {
    const float* plane = stream.plane + p * stream.plane_elements + 2 * t;
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      if (first + 8 * i >= item.rows) continue;
      const float* from = plane + int64_t{item.row[first + 8 * i].row} * stream.plane_width;
      const float2 more_low = *reinterpret_cast<const float2*>(from);
      const float2 more_high = *reinterpret_cast<const float2*>(from + 8);
      low[i] = {low[i].x + more_low.x, low[i].y + more_low.y};
      high[i] = {high[i].x + more_high.x, high[i].y + more_high.y};
    }
  }
#pragma unroll
  for (int i = 0; i < kHalves; ++i) {
    v[i / 2][i % 2] = pack(left > 0 ? low[i].x : 0.f, left > 1 ? low[i].y : 0.f, T{});
    v[i / 2][2 + i % 2] = pack(left > 8 ? high[i].x : 0.f, left > 9 ? high[i].y : 0.f, T{});
  }
}

/// kRelu2: the activation of kAct; else it may be any.
template <typename T, Finish kFinish, bool kRelu2>
__global__ void __launch_bounds__(kStreamThreads, blocks_of(kFinish, kRelu2))
    moe_expand_middle(const __grid_constant__ ExpandTask task) {
  constexpr bool kReadsY = kFinish != Finish::kDelta;
  using Smem = MiddleSmem<kReadsY>;
  constexpr int kStages = Smem::kStages;
  const StreamTask& stream = task.stream;
  Smem& smem = *reinterpret_cast<Smem*>(ptx::dynamic_smem());
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const ActivationOf act = kRelu2 ? ActivationOf{Activation::kRelu2, 0.f, 0.f} : task.act;
  // of matrices of B: two mma's outputs, both halves of their ranks
  const int b_at = b_piece_at<kRankTile>(lane / 16 * 8 + lane % 8, lane / 8 % 2);

  ptx::launch_next_grid();
  const PlanWords words(stream);
  load_middle_items(stream, blockIdx.x, gridDim.x, stream.max_tiles, smem.item);  // does not wait for the header
  const int tiles = words.wide_tiles(stream);
  const WarpGroups<kGroup> groups(task);
  MiddleLoads<T, kFinish> loads(task, smem);
  bool waited = false;
#pragma unroll 1
  for (int index = blockIdx.x; index < tiles; index += kUnits * gridDim.x) {
    if (index != static_cast<int>(blockIdx.x)) load_middle_items(stream, index, gridDim.x, tiles, smem.item);
    const int count = min(kUnits, static_cast<int>((tiles - index + gridDim.x - 1) / gridDim.x));
    loads.begin(count);
    const unsigned char* const ring = smem.ring[threadIdx.x / 32][0];
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) loads.start();
    if (!waited) ptx::wait_for_previous_grid();  // the planes are there
    waited = true;
#pragma unroll 1
    for (int i = 0; i < count && groups.begin < groups.end; ++i) {
      const MiddleItem& item = smem.item[i];
#pragma unroll 1
      for (int first = 0; first < item.rows; first += kRows) {
        uint32_t v[2][4];
        load_v<T>(stream, item, first, v);
        const bool has_delta = item.rank[0] > 0;
        const bool has_second = item.rows - first > kTileRows;  // row tile
        const int rows = item.rows - first - g;
        float factor[kHalves];
        T* out[kHalves];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const MiddleRow at = item.row[first + g + (8 * half < rows ? 8 * half : 0)];
          // only down has weights, and that of a pair without a delta may be anything
          factor[half] = has_delta ? kFinish == Finish::kAct ? item.scale[0] : item.scale[0] * at.weight : 0.f;
          out[half] = static_cast<T*>(task.out) + at.row * task.out_stride +
                      out_column<kFinish>(task, task.n_begin + groups.begin * kGroup + 8 * t);
        }
        int outputs = task.n_end - task.n_begin - groups.begin * kGroup - 8 * t;  // from this lane's first on
#pragma unroll 1
        for (int group = groups.begin; group < groups.end; group += kStreamWarps) {
          ptx::wait_copies<kStages - 2>();
          __syncwarp();  // the stage is there, and all lanes are done with the one that is filled next
          loads.start();
          const unsigned char* const at = ring + stage * Smem::kStageBytes;
          stage = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
          for (int sub = 0; sub < kSubs; ++sub) {
            uint32_t b[2][4];
#pragma unroll
            for (int j = 0; j < 2; ++j) ptx::load_matrices(b[j], at + b_at + (2 * sub + j) * 512);
            const bool mine = sub * 32 < outputs && (kFinish != Finish::kAdd || has_delta);
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
              if (tile == 1 && !has_second) break;
              float acc[4][4] = {};
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const uint32_t ranks[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                ptx::mma_m16n8k16<T>(acc[j], v[tile], ranks);
              }
#pragma unroll
              for (int low = 0; low < 2; ++low) {
                const int half = 2 * tile + low;
                if (!mine || 8 * half >= rows) continue;
                float delta[1][8];
                take_delta<1>(acc, 4, low, delta);
                uint4 y[1] = {};
                if (kReadsY) {
                  y[0] = *reinterpret_cast<const uint4*>(at + Smem::kBBytes + (kSubs * half + sub) * 512 + lane * 16);
                }
                const float scale[1] = {factor[half]};
                ptx::store16(out[half] + sub * 32, kFinish == Finish::kAct
                                                       ? activate<T, 1>(act, y, scale, delta)
                                                       : add_scaled<T>(y[0], factor[half], delta[0]));
              }
            }
          }
          outputs -= kStreamWarps * kGroup;
#pragma unroll
          for (int half = 0; half < kHalves; ++half) out[half] += kStreamWarps * kGroup;
        }
      }
    }
    ptx::wait_copies<0>();
    __syncthreads();  // all are done with the items
  }
  if (!waited) ptx::wait_for_previous_grid();  // no block may end before the kernel before has
  if (kFinish == Finish::kAct && !words.all_active(stream)) activate_base_rows<T, 1>(task);
}

template <Finish kFinish>
constexpr int64_t smem_bytes() {
  return sizeof(MiddleSmem<kFinish != Finish::kDelta>);
}

template <Finish kFinish>
cudaError_t launch_expand(const LoraParams& p, ExpandTask task, int most_blocks, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  to_wide_tiles(p, task.stream);
  const bool relu2 = task.act.act == Activation::kRelu2;
  const int blocks = blocks_of(kFinish, relu2);
  LaunchShape shape = spread_expand(p, (most_blocks < blocks ? most_blocks : blocks) * device.sms, kGroup,
                                    kFinish == Finish::kAct, task);
  shape.smem_bytes = smem_bytes<kFinish>();
  return dispatch_16_bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    return kFinish == Finish::kAct && relu2
               ? launch<&moe_expand_middle<T, kFinish, kFinish == Finish::kAct>>(device, shape, task, stream)
               : launch<&moe_expand_middle<T, kFinish, false>>(device, shape, task, stream);
  });
}

}  // namespace

bool moe_expand_middle_serves(const LoraParams& p) {
  Device device;
  if (current_device(device) != cudaSuccess || device.smem_bytes < smem_bytes<Finish::kAct>()) return false;
  return has_middle_runs(p) && !p.v_of_x && p.slices.count == 1 && p.v_width <= kRankTile;
}

cudaError_t moe_expand_middle_add_path(const LoraParams& p, int planes, cudaStream_t stream) {
  return p.plan.max_tiles == 0 ? cudaSuccess : launch_expand<Finish::kAdd>(p, add_task(p, planes), kAllBlocks, stream);
}

cudaError_t moe_expand_middle_act_path(const GateUpActParams& g, int planes, cudaStream_t stream) {
  return launch_expand<Finish::kAct>(g.lora, act_task(g, planes), kAllBlocks, stream);
}

cudaError_t moe_expand_middle_deltas_path(const LoraParams& p, int planes, int most_blocks, cudaStream_t stream) {
  return p.plan.max_tiles == 0 ? cudaSuccess
                               : launch_expand<Finish::kDelta>(p, add_task(p, planes), most_blocks, stream);
}

cudaError_t moe_expand_middle_delta_path(const LoraParams& p, int planes, void* delta, int32_t n_begin, int32_t n_end,
                                         cudaStream_t stream) {
  if (p.plan.max_tiles == 0) return cudaSuccess;
  return launch_expand<Finish::kDelta>(p, delta_task(p, planes, delta, n_begin, n_end), kAllBlocks, stream);
}

}  // namespace polylora::cuda
