// expand for MoE, sm_80 and later: v B^T for up to 16 rows of a group (slot, expert) at a time, then what the caller
// wants of it: y += delta; h = act(y1 + delta), gate and up side by side or interleaved; or the weighted deltas on
// their own, for moe_act.cu and moe_sum.cu (finish.cuh).
//
// A unit is a tile and a part of the outputs, in groups of kGroup, which the block's warps take in turn. A warp brings
// a group's B (up to kRanks ranks of all slices) and y through a ring of its own. v is made once a unit, from the
// planes of moe_shrink.cu or the caller's v, rounded once to 16 bits, unscaled. Of what this kernel reads only the
// planes are the work of the kernel before, so the first copies begin before it has ended.
//
// Outputs of 32 are numbered so that a lane owns 8 consecutive ones: column 2t + e of mma i is output 8t + 2i + e.
#include "moe/finish.cuh"
#include "moe/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kRingBytes = 48 * 1024;  // of a block
constexpr int kMostStages = 6;

// Outputs of a group, and blocks an SM: instructions bound this kernel, latencies between those of a warp most of all.
constexpr int group_of(int slices, int ranks) { return ranks == 16 && slices == 1 ? 64 : 32; }
constexpr int blocks_of(int slices, int ranks) { return slices == 1 ? ranks == 64 ? 3 : 4 : ranks == 64 ? 2 : 3; }

template <int kSlices, int kRanks, bool kReadsY>
struct ExpandSmem {
  static constexpr int kGroup = group_of(kSlices, kRanks);
  static constexpr int kBBytes = kGroup * kRanks * 2;     // of a slice
  static constexpr int kYBytes = kTileRows * kGroup * 2;  // of a slice
  static constexpr int kStageBytes = kSlices * (kBBytes + (kReadsY ? kYBytes : 0));
  static constexpr int kFit = kRingBytes / (kStreamWarps * kStageBytes);
  static constexpr int kStages = kFit < 2 ? 2 : kFit > kMostStages ? kMostStages : kFit;

  unsigned char ring[kStreamWarps][kStages][kStageBytes];
  StreamItem item[kBatch];
  // behind: v of all slices, [kSlices][kTileRows][v_pitch]
};

/// What a warp asks for, a step at a time, ahead of its products.
template <typename T, int kSlices, int kRanks, Finish kFinish>
class ExpandLoads {
  static constexpr bool kReadsY = kFinish != Finish::kDelta;
  using Smem = ExpandSmem<kSlices, kRanks, kReadsY>;
  static constexpr int kGroup = Smem::kGroup;
  // of a group's B a lane brings a piece of every kApart-th output
  static constexpr int kPieces = kRanks / 8;
  static constexpr int kApart = 32 / kPieces;
  static constexpr int kCopies = kGroup / kApart;

 public:
  __device__ __forceinline__ ExpandLoads(const ExpandTask& task, Smem& smem) : task_(task), smem_(smem), groups_(task) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) b_at_[i] = b_piece_at<kRanks>(slot_of(lane_row() + kApart * i), lane_rank() / 8);
  }

  /// Begins a batch.
  __device__ __forceinline__ void begin(int count) {
    item_ = 0;
    count_ = count;
    stage_ = 0;
    to_ = smem_.ring[threadIdx.x / 32][0];
    enter();
  }

  /// The next step's copies, into the stage that is free.
  __device__ __forceinline__ void start() {
    if (item_ < count_) {
      if (group_ < groups_.end && (kFinish != Finish::kAdd || rank_[0] + rank_[kSlices - 1] > 0)) copy();
      if (++pass_ == passes_) {
        pass_ = 0;
        group_ += kStreamWarps;
        if (group_ >= groups_.end) {
          ++item_;
          enter();
        }
      }
    }
    ptx::commit_copies();
    stage_ = stage_ + 1 == Smem::kStages ? 0 : stage_ + 1;
    to_ = smem_.ring[threadIdx.x / 32][stage_];
  }

 private:
  __device__ __forceinline__ static int lane_row() { return static_cast<int>(threadIdx.x) % 32 / kPieces; }
  __device__ __forceinline__ static int lane_rank() { return static_cast<int>(threadIdx.x) % kPieces * 8; }

  __device__ __forceinline__ void enter() {
    group_ = groups_.begin;
    pass_ = 0;
    if (item_ >= count_) return;
    const StreamItem& item = smem_.item[item_];
    rows_ = item.rows;
    passes_ = passes_of<kRanks>(item.rank);
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      rank_[s] = item.rank[s];
      b_stride_[s] = item.b_stride[s];
      b_[s] = static_cast<const T*>(item.b[s]) + lane_row() * int64_t{b_stride_[s]} + lane_rank();
      aligned_[s] = b_stride_[s] % 8 == 0 && (reinterpret_cast<uintptr_t>(b_[s]) & 15) == 0;
    }
  }

  __device__ __forceinline__ void copy() const {
    const int n0 = task_.n_begin + group_ * kGroup;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const int left = rank_[s] - pass_ * kRanks;
      if (left > 0) copy_b(to_ + s * Smem::kBBytes, s, left, n0);
    }
    if (kReadsY && pass_ + 1 == passes_) copy_y(to_ + kSlices * Smem::kBBytes, n0);
  }

  // Of `left` ranks as many as a stage takes; zeros behind them, up to whole rank tiles.
  __device__ __forceinline__ void copy_b(unsigned char* to, int s, int left, int n0) const {
    const T* from = b_[s] + int64_t{n0} * b_stride_[s] + pass_ * kRanks;
    const int64_t step = int64_t{kApart} * b_stride_[s];
    if (aligned_[s] && left >= kRanks && n0 + kGroup <= task_.n_end) {  // nearly always
#pragma unroll
      for (int i = 0; i < kCopies; ++i) ptx::copy_async16(to + b_at_[i], from + i * step, 16);
      return;
    }
    if (lane_rank() >= whole_rank_tiles(left)) return;
    const T* safe = static_cast<const T*>(task_.stream.slice[s].b);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int count = n0 + lane_row() + kApart * i < task_.n_end ? min(max(left - lane_rank(), 0), 8) : 0;
      if (aligned_[s]) {
        ptx::copy_async16(to + b_at_[i], count > 0 ? from + i * step : safe, count * 2);
      } else {
        copy_elements(to + b_at_[i], from + i * step, count);
      }
    }
  }

  __device__ __forceinline__ void copy_y(unsigned char* to, int n0) const {
    const bool interleaved = kSlices == 2 && task_.interleaved;
    const StreamItem& item = smem_.item[item_];
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int pieces = interleaved ? kGroup / 4 : kGroup / 8;  // of a row
    const int n = n0 + lane % pieces * (interleaved ? 4 : 8);
    if (n >= task_.n_end) return;
    for (int row = lane / pieces; row < rows_; row += 32 / pieces) {
      const T* y = static_cast<const T*>(task_.y) + item.row[row] * task_.y_stride;
      unsigned char* at = to + (row * pieces + lane % pieces) * 16;
      if (interleaved) {
        ptx::copy_async16(at, y + task_.col[0] + 2 * n, 16);
        continue;
      }
#pragma unroll
      for (int s = 0; s < kSlices; ++s) ptx::copy_async16(at + s * Smem::kYBytes, y + task_.col[s] + n, 16);
    }
  }

  const ExpandTask& task_;
  Smem& smem_;
  const WarpGroups<kGroup> groups_;
  unsigned char* to_ = nullptr;
  int item_ = 0, count_ = 0, group_ = 0, pass_ = 0, passes_ = 1, stage_ = 0, rows_ = 0;
  int rank_[kSlices] = {}, b_stride_[kSlices] = {};
  bool aligned_[kSlices] = {};
  const T* b_[kSlices] = {};  // of this lane's first output and rank
  int b_at_[kCopies];
};

template <typename T, Finish kFinish, int kSlices, int kRanks>
__global__ void __launch_bounds__(kStreamThreads, blocks_of(kSlices, kRanks))
    moe_expand(const __grid_constant__ ExpandTask task) {
  constexpr bool kReadsY = kFinish != Finish::kDelta;
  using Smem = ExpandSmem<kSlices, kRanks, kReadsY>;
  constexpr int kStages = Smem::kStages;
  constexpr int kGroup = Smem::kGroup;
  Smem& smem = *reinterpret_cast<Smem*>(ptx::dynamic_smem());
  T* smem_v = reinterpret_cast<T*>(ptx::dynamic_smem() + sizeof(Smem));
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;

  // v of the caller's: the kernel before is not this call's moe_shrink, and may still write anything
  bool waited = kFinish == Finish::kDelta && task.v != nullptr;
  if (waited) ptx::wait_for_previous_grid();
  ptx::launch_next_grid();
  const PlanWords words(task.stream);
  load_items(task.stream, blockIdx.x, gridDim.x, task.stream.max_tiles, smem.item);  // does not wait for the header
  const int tiles = words.tiles(task.stream);
  const WarpGroups<kGroup> groups(task);
  ExpandLoads<T, kSlices, kRanks, kFinish> loads(task, smem);
#pragma unroll 1
  for (int first = blockIdx.x; first < tiles; first += kBatch * gridDim.x) {
    if (first != static_cast<int>(blockIdx.x)) load_items(task.stream, first, gridDim.x, tiles, smem.item);
    const int count = items_of(first, gridDim.x, tiles);
    loads.begin(count);
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) loads.start();
    if (!waited) ptx::wait_for_previous_grid();  // the planes are there
    waited = true;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const StreamItem& item = smem.item[i];
      if (i > 0) __syncthreads();  // all are done with v of the unit before
      make_v<T, kSlices, kFinish == Finish::kDelta>(task, item, smem_v);
      const int rows = item.rows;
      const int32_t rank[kStreamSlices] = {item.rank[0], item.rank[1]};
      const float scale[kStreamSlices] = {item.scale[0], item.scale[1]};
      const float weight[2] = {item.weight[g], item.weight[g + 8]};
      T* const out[2] = {static_cast<T*>(task.out) + item.row[g] * task.out_stride,
                         static_cast<T*>(task.out) + item.row[g + 8] * task.out_stride};
      const int passes = passes_of<kRanks>(rank);
      __syncthreads();  // v is there
      int group = groups.begin;
#pragma unroll 1
      do {
        float acc[kSlices * kGroup / 8][4] = {};
#pragma unroll 1
        for (int pass = 0; pass < passes; ++pass) {
          ptx::wait_copies<kStages - 2>();
          __syncwarp();  // the stage is there, and all lanes are done with the one that is filled next
          loads.start();
          const unsigned char* at = smem.ring[warp][stage];
          stage = stage + 1 == kStages ? 0 : stage + 1;
          if (group >= groups.end) continue;
#pragma unroll
          for (int s = 0; s < kSlices; ++s) {
#pragma unroll
            for (int step = 0; step < kRanks / 16; ++step) {
              const int r = pass * kRanks + step * 16;
              if (r >= rank[s]) break;
              uint32_t v[4];
              ptx::load_matrices(v, smem_v + (s * kTileRows + lane % 16) * task.v_pitch + r + lane / 16 * 8);
#pragma unroll
              for (int j = 0; j < kGroup / 16; ++j) {
                uint32_t b[4];
                const int slot = (2 * j + lane / 16) * 8 + lane % 8;
                ptx::load_matrices(b, at + s * Smem::kBBytes + b_piece_at<kRanks>(slot, 2 * step + lane / 8 % 2));
                const uint32_t low[2] = {b[0], b[1]};
                const uint32_t high[2] = {b[2], b[3]};
                ptx::mma_m16n8k16<T>(acc[s * (kGroup / 8) + 2 * j], v, low);
                ptx::mma_m16n8k16<T>(acc[s * (kGroup / 8) + 2 * j + 1], v, high);
              }
            }
          }
          if (pass + 1 < passes) continue;
          const bool interleaved = kSlices == 2 && task.interleaved;
#pragma unroll
          for (int sub = 0; sub < kGroup / 32; ++sub) {
            const int n = task.n_begin + group * kGroup + sub * 32 + 8 * t;
            if (n >= task.n_end) continue;
            const StagedY staged{at + kSlices * Smem::kBBytes + sub * (interleaved ? 128 : 64),
                                 interleaved ? kGroup * 4 : kGroup * 2, Smem::kYBytes};
            finish32<T, kFinish, kSlices>(task, acc + sub * 4, kGroup / 8, staged, n, rows, rank, scale, weight, out);
          }
        }
        group += kStreamWarps;
      } while (group < groups.end);
    }
    ptx::wait_copies<0>();
    __syncthreads();  // all are done with the items
  }
  if (!waited) ptx::wait_for_previous_grid();  // no block may end before the kernel before has
  if (kFinish == Finish::kAct && !words.all_active(task.stream)) activate_base_rows<T, kSlices>(task);
}

template <Finish kFinish, int kSlices, int kRanks>
int64_t smem_bytes(const ExpandTask& task) {
  return sizeof(ExpandSmem<kSlices, kRanks, kFinish != Finish::kDelta>) +
         int64_t{kSlices} * kTileRows * task.v_pitch * 2;
}

template <typename T, Finish kFinish, int kSlices, int kRanks>
cudaError_t launch_expand(const LoraParams& p, const Device& device, ExpandTask& task, int most_blocks,
                          cudaStream_t stream) {
  const int blocks = blocks_of(kSlices, kRanks);
  LaunchShape shape = spread_expand(p, (most_blocks < blocks ? most_blocks : blocks) * device.sms,
                                    group_of(kSlices, kRanks), kFinish == Finish::kAct, task);
  shape.smem_bytes = smem_bytes<kFinish, kSlices, kRanks>(task);
  return launch<&moe_expand<T, kFinish, kSlices, kRanks>>(device, shape, task, stream);
}

template <typename T, Finish kFinish, int kSlices>
cudaError_t launch_expand(const LoraParams& p, const Device& device, ExpandTask& task, int most_blocks,
                          cudaStream_t stream) {
  const int64_t rank = even_rank(p);
  if (rank <= 16) return launch_expand<T, kFinish, kSlices, 16>(p, device, task, most_blocks, stream);
  if (rank <= 32 || device.smem_bytes < smem_bytes<kFinish, kSlices, 64>(task)) {
    return launch_expand<T, kFinish, kSlices, 32>(p, device, task, most_blocks, stream);
  }
  return launch_expand<T, kFinish, kSlices, 64>(p, device, task, most_blocks, stream);
}

template <Finish kFinish>
cudaError_t launch_expand(const LoraParams& p, ExpandTask& task, int most_blocks, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  return dispatch_expand(p, [&](auto element, auto slices) {
    return launch_expand<decltype(element), kFinish, decltype(slices)::value>(p, device, task, most_blocks, stream);
  });
}

}  // namespace

cudaError_t moe_expand_add_path(const LoraParams& p, int planes, cudaStream_t stream) {
  ExpandTask task = add_task(p, planes);
  return p.plan.max_tiles == 0 ? cudaSuccess : launch_expand<Finish::kAdd>(p, task, kAllBlocks, stream);
}

cudaError_t moe_expand_act_path(const GateUpActParams& g, int planes, cudaStream_t stream) {
  ExpandTask task = act_task(g, planes);
  return launch_expand<Finish::kAct>(g.lora, task, kAllBlocks, stream);
}

cudaError_t moe_expand_deltas_path(const LoraParams& p, int planes, int most_blocks, cudaStream_t stream) {
  ExpandTask task = add_task(p, planes);
  return p.plan.max_tiles == 0 ? cudaSuccess : launch_expand<Finish::kDelta>(p, task, most_blocks, stream);
}

cudaError_t moe_expand_delta_path(const LoraParams& p, int planes, void* delta, int32_t n_begin, int32_t n_end,
                                  cudaStream_t stream) {
  ExpandTask task = delta_task(p, planes, delta, n_begin, n_end);
  return p.plan.max_tiles == 0 ? cudaSuccess : launch_expand<Finish::kDelta>(p, task, kAllBlocks, stream);
}

}  // namespace polylora::cuda
