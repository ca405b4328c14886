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
constexpr int kOutputs = 32;  // of gate, and of up

struct NarrowActTask {
  LinearTask linear;
  ExpandTask expand;  // for the activation and the rows without an adapter
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) act_narrow(const __grid_constant__ NarrowActTask params) {
  using Expand = NarrowExpand<T, false, kRows, kOutputs>;
  const LinearTask& task = params.linear;
  T* smem_v = reinterpret_cast<T*>(ptx::dynamic_smem());  // [2][kRows][pitch]
  const int pitch = narrow_v_pitch(task.rank_cap);
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const int units = (task.slice[0].width + kOutputs - 1) / kOutputs;
  const Part n = {units * static_cast<int>(blockIdx.x) / static_cast<int>(gridDim.x),
                  units * (static_cast<int>(blockIdx.x) + 1) / static_cast<int>(gridDim.x)};

  ptx::launch_next_grid();
  const int32_t active = ptx::load_fresh4(task.header + kPlanActiveRows);
  bool waited = false;
  int jobs = 0;
#pragma unroll 1
  for (int index = blockIdx.y;; index += gridDim.y) {
    NarrowJob<kRows> of_slice[2];
    of_slice[0].read(task, index, 0);
    of_slice[1].read(task, index, 1);
    const NarrowJob<kRows>& job = of_slice[0];
    jobs = job.jobs;
    if (index >= jobs) break;
    const int rows = job.rows(index);
    const uint32_t has = job.has(index);
    Expand gate(task.slice[0]), up(task.slice[1]);
    int rank[2], b_stride[2], alignment[2];
    float scale[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      Expand& expand = s == 0 ? gate : up;
      const LinearSlice& slice = task.slice[s];
      const SliceEntry entry = of_slice[s].entry();
      const bool fits = entry_fits(entry, entry.rank, slice.a_rows, slice.width, slice.b_elements, task.v_width) &&
                        entry.rank <= task.rank_cap;
      rank[s] = fits && rows > 0 ? entry.rank : 0;
      scale[s] = rank[s] > 0 ? entry.scale : 0.f;
      b_stride[s] = entry.b_stride;
      alignment[s] = static_cast<int>(entry.b_offset) | entry.b_stride;
      expand.clear();
      expand.begin(task, job, n.begin + warp, entry.b_offset, entry.b_stride);
      if (expand.unit < n.end) expand.load(0, rank[s], has, b_stride[s], alignment[s]);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {  // what the warps take next, towards L2
      if (rank[s] == 0 || !are_close(b_stride[s], rank[s])) continue;
      const int first = (n.begin + kWarps) * kOutputs;
      prefetch_b((s == 0 ? gate : up).b + (first - (n.begin + warp) * kOutputs - g % 2) * int64_t{b_stride[s]},
                 b_stride[s], rank[s], min(n.end * kOutputs, task.slice[s].width) - first);
    }
    if (!waited) {
      waited = true;
      ptx::wait_for_previous_grid();
    }

    // ---- v as 16-bit operands: the one rounding, unscaled as in the plain formula
    const int first = job.plane_row(task, index);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int quads_a_row = (rank[s] + kRankTile - 1) / kRankTile * (kRankTile / 4);
#pragma unroll 1
      for (int i = threadIdx.x; i < rows * quads_a_row; i += kThreads) {
        const int row = i / quads_a_row;
        const int r = (i - row * quads_a_row) * 4;
        const float4 sum = add_planes(task, min(first + row, task.plane_rows - 1), s * task.rank_cap + r);
        *reinterpret_cast<uint2*>(smem_v + (s * kRows + row) * pitch + r) = {pack(sum.x, sum.y, T{}),
                                                                             pack(sum.z, sum.w, T{})};
      }
    }
    __syncthreads();

    // ---- the warp's outputs
    const auto multiply = [&](Expand& expand, int s) {
      const T* v = smem_v + (s * kRows + g) * pitch;
      int r = 0;
#pragma unroll 1
      while (r < rank[s]) {
        r = expand.multiply(r, rank[s], alignment[s], v, pitch);
        if (r < rank[s]) expand.load(r, rank[s], has, b_stride[s], alignment[s]);
      }
    };
#pragma unroll 1
    while (gate.unit < n.end) {
      multiply(gate, 0);
      multiply(up, 1);
#pragma unroll
      for (int i = 0; i < Expand::kEights; ++i) {
        const int64_t row = job.row(task, g + 8 * i);  // of all lanes at once
        if (!gate.has_piece(0, i, has)) continue;
        float delta[2][8];
        gate.take_delta(0, i, delta[0]);
        up.take_delta(0, i, delta[1]);
        const uint4 y[2] = {gate.y_frag[i][0], up.y_frag[i][0]};
        T* h = static_cast<T*>(params.expand.out) + row * params.expand.out_stride + gate.unit * kOutputs + 8 * t;
        ptx::store16(h, activate<T, 2>(params.expand.act, y, scale, delta));
      }
      gate.next(kWarps, b_stride[0]);
      up.next(kWarps, b_stride[1]);
      if (gate.unit >= n.end) break;
      gate.load(0, rank[0], has, b_stride[0], alignment[0]);
      up.load(0, rank[1], has, b_stride[1], alignment[1]);
    }
    __syncthreads();  // all are done with v
  }
  if (jobs == 0 || active != task.rows) activate_base_rows<T, 2, kWarps>(params.expand);
  if (!waited) ptx::wait_for_previous_grid();  // no block may end before the kernel before has
}

// Groups up to which a plan of one row a pair counts as a dense layer's. More are experts', of which each has few rows.
constexpr int64_t kMostGroups = 256;

// Ranks from which on 16 at a time are too few.
constexpr int64_t kManyRanks = 32;

// What linear's kernels take: without experts, a pair is a row of x.
LoraParams dense(const LoraParams& p) {
  LoraParams as_linear = p;
  as_linear.x_div = 0;
  return as_linear;
}

}  // namespace

bool act_narrow_serves(const GateUpActParams& g) {
  const LoraParams& p = g.lora;
  const bool is_dense = p.x_div == 1 && p.row_map == nullptr && p.row_weight == nullptr && !p.v_of_x;
  return is_dense && p.slices.count == 2 && p.slices.col_stride == 1 && p.slices.groups <= kMostGroups &&
         even_rank(p) < kManyRanks && moe_act_serves(g) && narrow_shrink_serves(dense(p));
}

cudaError_t act_narrow_scratch(const GateUpActParams& g, int64_t& bytes) {
  const LoraParams p = dense(g.lora);
  int planes = 0;
  const cudaError_t error = narrow_parts(p, false, planes);
  bytes = narrow_plane_bytes(p, planes);
  return error;
}

cudaError_t act_narrow_path(const GateUpActParams& g, cudaStream_t stream) {
  const LoraParams p = dense(g.lora);
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
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(parts), narrow_grid_jobs(task.linear, kBlocksPerSm * device.sms, parts));
  shape.threads = kThreads;
  shape.smem_bytes = 2 * narrow_job_rows(p) * narrow_v_pitch(task.linear.rank_cap) * 2;
  shape.overlap = true;
  return dispatch_16_bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    return narrow_job_rows(p) == 16 ? launch<&act_narrow<T, 16>>(device, shape, task, stream)
                                    : launch<&act_narrow<T, 8>>(device, shape, task, stream);
  });
}

}  // namespace polylora::cuda
