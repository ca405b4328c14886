// h = act(y + delta) of few rows of gate and up that have no experts, a dense MLP's, sm_80 and later: expand_narrow.cu
// with the activation in the place of the sum, after shrink_narrow.cu.
//
// A block takes a job, up to 8 or 16 rows of one group, and some of its outputs; its warps take 32 of gate and the same
// of up in turn. v of both is made once a block, in shared memory, from the planes. B and y of a warp's first outputs
// are on their way meanwhile; of all that is read, only the planes are the work of the kernel before.
#include "linear/narrow.cuh"
#include "linear/paths.h"
#include "linear/v_source.cuh"
#include "moe/finish.cuh"
#include "moe/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kBlocksPerSm = 2;
// Compiled for devices before 9.0 the form for many ranks has too few registers at that, and the other one for sharing.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kWideBlocksPerSm = 1;
constexpr bool kSharesJobs = false;
#else
constexpr int kWideBlocksPerSm = kBlocksPerSm;
constexpr bool kSharesJobs = true;
#endif
constexpr int kOutputs = 32;                         // of gate, and of up
constexpr int kLanesOfV = kThreads / 2 / kTileRows;  // of a row of v of either

struct NarrowActTask {
  LinearTask linear;
  ExpandTask expand;  // for the activation and the rows without an adapter
};

/// kWide: made for ranks of 32 and more, 32 of gate and of up at a time, else for less, 16; both take any rank. For 64
/// there are too few registers, and for 32 just enough: y's addresses are made anew for each unit.
///
/// After a GEMM of the base no cache holds this code any more, so there is little of it: the activation is the kernel's
/// own, and loads stand in one place. H200, 4096 -> 2 x 14336 r16, 128 rows of 8 adapters, 60 and 37 KiB of code: 13.4
/// and 12.3 us, behind a GEMM 12.5 and 10.1.
template <typename T, bool kWide, int kRows, Activation kAct>
__global__ void __launch_bounds__(kThreads, kWide ? kWideBlocksPerSm : kBlocksPerSm)
    act_narrow(const __grid_constant__ NarrowActTask params) {
  constexpr int kRanks = kWide ? 32 : 16;  // at a time
  using Expand = NarrowExpand<T, kWide, kRows, kOutputs, kRanks>;
  const LinearTask& task = params.linear;
  T* smem_v = reinterpret_cast<T*>(ptx::dynamic_smem());  // [2][kRows][pitch]
  const int pitch = narrow_v_pitch(task.rank_cap);
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const int units = (task.slice[0].width + kOutputs - 1) / kOutputs;
  const Part all = {
      units * static_cast<int>(blockIdx.x) / static_cast<int>(gridDim.x),  // of the blocks that share a job
      units * (static_cast<int>(blockIdx.x) + 1) / static_cast<int>(gridDim.x)};

  ptx::launch_next_grid();
  const int32_t active = ptx::load_fresh4(task.header + kPlanActiveRows);
  const bool other_call = has_row_map(task);
  bool waited = false;
  int jobs = 0;
  int index = blockIdx.y;
  Part n = all;
  bool is_first = true;
#pragma unroll 1
  while (true) {
    NarrowJob<kRows> job;
    job.read(task, index, 0);
    jobs = other_call ? 0 : job.jobs;
    if (kSharesJobs && is_first) {
      is_first = false;
      const Sharing sharing = share_jobs(jobs, index, static_cast<int>(gridDim.y), all.end - all.begin, kWarps);
      n = sharing.of(all);
      if (sharing.index != index) {
        index = sharing.index;
        continue;
      }
    }
    if (index >= jobs) break;
    NarrowJob<kRows> job_of_up = job;  // up's entry lies behind gate's, whose words lanes 8 to 14 have
    if (threadIdx.x % 32 / 8 == 1) job_of_up.word = ptx::load_fresh4(job.at + sizeof(SliceEntry) / sizeof(int32_t));
    const int rows = job.rows(index);
    const uint32_t has = job.has(index);
    Expand gate(task.slice[0]), up(task.slice[1]);
    int rank[2], b_stride[2], alignment[2];
    float scale[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      Expand& expand = s == 0 ? gate : up;
      const LinearSlice& slice = task.slice[s];
      const SliceEntry entry = (s == 0 ? job : job_of_up).entry();
      const bool fits = entry_fits(entry, entry.rank, slice.a_rows, slice.width, slice.b_elements, task.v_width) &&
                        entry.rank <= task.rank_cap;
      rank[s] = fits && rows > 0 ? entry.rank : 0;
      scale[s] = rank[s] > 0 ? entry.scale : 0.f;
      b_stride[s] = entry.b_stride;
      alignment[s] = static_cast<int>(entry.b_offset) | entry.b_stride;
      expand.clear();
      expand.begin(task, job, n.begin + warp, entry.b_offset, entry.b_stride);
      if (rank[s] > 0 && are_close(b_stride[s], rank[s])) {  // what the warps take next, towards L2
        const int first = (n.begin + (rank[s] > kRanks ? 0 : kWarps)) * kOutputs;
        prefetch_b(static_cast<const T*>(slice.b) + entry.b_offset + int64_t{first} * b_stride[s], b_stride[s], rank[s],
                   min(n.end * kOutputs, slice.width) - first, kMostPrefetched / 2);
      }
    }
    const int most = max(rank[0], rank[1]);
    bool have_v = false;
    uint4 y[Expand::kEights][2] = {};
    int r_gate = 0, r_up = 0;
#pragma unroll 1
    while (true) {
      if (gate.unit < n.end) {
        if (kWide && r_gate == 0) {
#pragma unroll
          for (int i = 0; i < Expand::kEights; ++i) {
            const int64_t row = job.row(task, g + 8 * i);  // of all lanes at once
            if (!gate.has_piece(0, i, has)) continue;
            const T* from = static_cast<const T*>(task.y) + row * task.y_stride + gate.unit * kOutputs + 8 * t;
            y[i][0] = ptx::load16(from + task.slice[0].col);
            y[i][1] = ptx::load16(from + task.slice[1].col);
          }
        }
        gate.load(r_gate, rank[0], kWide ? 0 : has, b_stride[0], alignment[0]);
        up.load(r_up, rank[1], kWide ? 0 : has, b_stride[1], alignment[1]);
      }
      if (!have_v) {  // as 16-bit operands: the one rounding, unscaled as in the plain formula
        have_v = true;
        // a thread's part of v, gate's in the first half of them, up's in the second, before the wait for it
        const int thread = ptx::thread_again();  // else what it is divided into is kept from the beginning, and spills
        const int v_slice = thread / (kThreads / 2);
        const int v_row = thread / kLanesOfV % kTileRows;
        const int v_lane = thread % kLanesOfV;
        const int v_rank = v_slice == 0 ? rank[0] : rank[1];
        const int end_of_v = v_row < rows ? whole_rank_tiles(v_rank) : 0;
        const int plane_row = min(job.plane_row(task, index) + v_row, task.plane_rows - 1);
        const int from = plane_row * task.plane_width + v_slice * task.rank_cap;
        const int to = (v_slice * kRows + v_row) * pitch;
        if (!waited) ptx::wait_for_previous_grid();
        waited = true;
#pragma unroll 1
        for (int r = v_lane * 4; r < end_of_v; r += kLanesOfV * 4) {
          const float4 sum = add_planes(task, task.plane + (from + r), task.planes);
          *reinterpret_cast<uint2*>(smem_v + to + r) = {pack(sum.x, sum.y, T{}), pack(sum.z, sum.w, T{})};
        }
        __syncthreads();
      }
      if (gate.unit >= n.end) break;
      const T* v = smem_v + g * pitch;
      if (kWide) {
        r_gate = r_gate < rank[0] ? gate.multiply(r_gate, rank[0], alignment[0], v, pitch) : kMaxRank;
        r_up = r_up < rank[1] ? up.multiply(r_up, rank[1], alignment[1], v + kRows * pitch, pitch) : kMaxRank;
        if (r_gate < rank[0] || r_up < rank[1]) continue;
      } else {  // the same 16 of both
        if (r_gate < rank[0]) gate.multiply(r_gate, rank[0], alignment[0], v, pitch);
        if (r_up < rank[1]) up.multiply(r_up, rank[1], alignment[1], v + kRows * pitch, pitch);
        r_gate = r_up = r_gate + kRankTile;
        if (r_gate < most) continue;
      }
      r_gate = r_up = 0;
#pragma unroll
      for (int i = 0; i < Expand::kEights; ++i) {
        const int64_t row = job.row(task, g + 8 * i);  // of all lanes at once
        if (!gate.has_piece(0, i, has)) continue;
        float delta[2][8];
        gate.take_delta(0, i, delta[0]);
        up.take_delta(0, i, delta[1]);
        T* h = static_cast<T*>(params.expand.out) + row * params.expand.out_stride + gate.unit * kOutputs + 8 * t;
        const uint4 base[2] = {kWide ? y[i][0] : gate.y_frag[i][0], kWide ? y[i][1] : up.y_frag[i][0]};
        ptx::store16(h, activate<T, 2>({kAct, 0.f, 0.f}, base, scale, delta));
      }
      gate.next(kWarps, b_stride[0]);
      up.next(kWarps, b_stride[1]);
    }
    __syncthreads();  // all are done with v
    index += gridDim.y;
  }
  if (!waited) ptx::wait_for_previous_grid();  // no block may end before the kernel before has
  if (jobs == 0 || active != task.rows) activate_base_rows<T, 2, kWarps>(params.expand);
}

// Groups up to which a plan of one row a pair counts as a dense layer's. More are experts', of which each has few rows.
constexpr int64_t kMostGroups = 256;

}  // namespace

bool act_narrow_serves(const GateUpActParams& g) {
  const LoraParams& p = g.lora;
  const bool is_dense = p.x_div == 1 && p.row_map == nullptr && p.row_weight == nullptr && !p.v_of_x;
  const bool is_known = g.act == Activation::kSilu || g.act == Activation::kGeluTanh;
  return is_dense && is_known && p.slices.count == 2 && p.slices.col_stride == 1 && p.slices.groups <= kMostGroups &&
         moe_act_serves(g) && narrow_shrink_serves(as_linear(p));
}

cudaError_t act_narrow_scratch(const GateUpActParams& g, int64_t& bytes) {
  const LoraParams p = as_linear(g.lora);  // without experts, a pair is a row of x
  int planes = 0;
  const cudaError_t error = narrow_parts(p, false, planes);
  bytes = narrow_plane_bytes(p, planes);
  return error;
}

cudaError_t act_narrow_path(const GateUpActParams& g, cudaStream_t stream) {
  const LoraParams p = as_linear(g.lora);  // without experts, a pair is a row of x
  Device device;
  cudaError_t error = current_device(device);
  int planes = 0;
  if (error == cudaSuccess) error = narrow_parts(p, false, planes);
  if (error == cudaSuccess) error = shrink_narrow_path(p, planes, stream);
  if (error != cudaSuccess) return error;
  NarrowActTask task{narrow_task(p, planes), act_task(g, 0)};
  const int64_t units = divide_up(p.slices.width[0], kOutputs);
  const int64_t fit = kBlocksPerSm * device.sms / narrow_jobs(p);
  const int64_t parts = min64(divide_up(units, kWarps), fit < 1 ? 1 : fit);
  const int job_rows = narrow_job_rows(p);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(parts), narrow_grid_jobs(p, job_rows, kBlocksPerSm * device.sms, parts));
  shape.threads = kThreads;
  shape.smem_bytes = 2 * job_rows * narrow_v_pitch(task.linear.rank_cap) * 2;
  shape.overlap = true;
  return dispatch_16_bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto of_ranks = [&](auto is_wide) {
      constexpr bool kWide = decltype(is_wide)::value;
      const bool full = job_rows == kTileRows;
      if (g.act == Activation::kSilu) {
        return full ? launch<&act_narrow<T, kWide, 16, Activation::kSilu>>(device, shape, task, stream)
                    : launch<&act_narrow<T, kWide, 8, Activation::kSilu>>(device, shape, task, stream);
      }
      return full ? launch<&act_narrow<T, kWide, 16, Activation::kGeluTanh>>(device, shape, task, stream)
                  : launch<&act_narrow<T, kWide, 8, Activation::kGeluTanh>>(device, shape, task, stream);
    };
    return even_rank(p) < kWideRanks ? of_ranks(std::false_type{}) : of_ranks(std::true_type{});
  });
}

}  // namespace polylora::cuda
