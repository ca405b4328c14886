// expand for decode, sm_80 and later: y += scale * v B^T for up to 8 or 16 rows of one group and one slice, or that
// delta alone. v comes from shrink_narrow.cu in planes, from the caller, or is looked up by token.
//
// A block takes a part of the outputs, its warps a unit in turn. v is made once a block, in shared memory. B and y of a
// warp's first unit are on their way meanwhile. After our own shrink, all but v may be read before that has ended, and
// blocks that find no job share the outputs of the others' (share_jobs). Else the job is read before the kernel before
// has ended, and again after it (as in linear_cluster.cu).
#include "linear/narrow.cuh"
#include "linear/paths.h"
#include "linear/v_source.cuh"

namespace polylora::cuda {
namespace {

struct NarrowTask {
  LinearTask linear;
  TokenSource tokens;
};

// Outputs of a unit: of 32 ranks as many that a warp has as many bytes on their way as of 64. H200, with 32 outputs and
// with 64, us: gate_up r32 M16 17.1 and 16.6, M64 of 32 adapters 26.3 and 24.9, qkvz r32 M64 18.8 and 17.2.
constexpr int outputs_of_unit(int ranks, bool moe) { return moe || ranks == 64 ? 32 : 64; }

/// kRanks: at a time.
template <typename T, int kRanks, int kRows, bool kMoe>
__global__ void __launch_bounds__(narrow_warps(kMoe) * 32, narrow_blocks_per_sm(kMoe))
    expand_narrow(const __grid_constant__ NarrowTask params) {
  using Expand = NarrowExpand<T, (kRanks >= kWideRanks), kRows, outputs_of_unit(kRanks, kMoe), kRanks>;
  constexpr int kWarps = narrow_warps(kMoe);
  constexpr int kLanesOfV = kWarps * 32 / kTileRows;  // of a row of v
  const LinearTask& task = params.linear;
  const bool is_lookup = params.tokens.ids != nullptr;
  T* smem_v = reinterpret_cast<T*>(ptx::dynamic_smem());
  const int pitch = narrow_v_pitch(task.rank_cap);
  const int s = task.slice_of_part(static_cast<int>(blockIdx.x));
  const LinearSlice& slice = task.slice[s];
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int units = (slice.width + Expand::kOutputs - 1) / Expand::kOutputs;
  const int parts = task.first_part[s + 1] - task.first_part[s];
  const int part = static_cast<int>(blockIdx.x) - task.first_part[s];
  const Part all = {units * part / parts, units * (part + 1) / parts};  // of the blocks that share a job

  ptx::launch_next_grid();
  const bool other_call = kMoe && has_row_map(task);
  NarrowJob<kRows> job;
  int index = blockIdx.z;
  Part n = all;
  job.read(task, index, s);
  if (other_call) job.jobs = 0;
  if (task.follows_own) {  // what the plan says is final
    const Sharing sharing = share_jobs(job.jobs, index, static_cast<int>(gridDim.z), all.end - all.begin, kWarps);
    n = sharing.of(all);
    if (sharing.index != index) {
      index = sharing.index;
      job.read(task, index, s);
    }
  }
  bool guess = !task.follows_own;
  bool waited = false;
#pragma unroll 1
  while (true) {
    const int jobs = job.jobs;
    const int rows = job.rows(index);
    const SliceEntry entry = job.entry();
    const int a_rows = task.a_rows_used > 0 ? task.a_rows_used : entry.rank;
    const bool fits = entry_fits(entry, a_rows, slice.a_rows, slice.width, slice.b_elements, task.v_width) &&
                      entry.rank <= min(task.rank_cap, slice.max_rank);
    const int rank = index < jobs && rows > 0 && fits ? entry.rank : 0;
    uint32_t has = job.has(index);
    const int alignment = static_cast<int>(entry.b_offset) | entry.b_stride;
    if (guess) {
      waited = true;
      ptx::wait_for_previous_grid();
    }
    const int32_t now = guess ? ptx::load_fresh4(job.at) : job.word;
    Expand expand(slice);
    expand.clear();
    if (task.sets_y) expand.start_from_nothing();
    expand.begin(task, job, n.begin + warp, entry.b_offset, entry.b_stride);
    const uint32_t reads = task.sets_y ? 0 : ~0u;  // y, of the rows
    if (rank > 0 && expand.unit < n.end) expand.load(0, rank, has & reads, entry.b_stride, alignment);
    if (rank > 0 && are_close(entry.b_stride, rank)) {  // what the warps take next, towards L2; row by row is too slow
      const int first = (n.begin + kWarps) * Expand::kOutputs;
      prefetch_b(static_cast<const T*>(slice.b) + entry.b_offset + int64_t{first} * entry.b_stride, entry.b_stride,
                 rank, min(n.end * Expand::kOutputs, slice.width) - first);
    }
    if (guess) {
      guess = false;
      if (__any_sync(0xffffffffu, now != job.word)) {  // all warps end with what is there now: no barrier is needed
        job.read(task, index, s);
        continue;
      }
    }
    if (index >= jobs) break;

    if (rank > 0) {
      // a thread's part of v, before the wait for it
      const int v_row = static_cast<int>(threadIdx.x) / kLanesOfV;
      const int v_lane = static_cast<int>(threadIdx.x) % kLanesOfV;
      const int end_of_v = v_row < rows ? whole_rank_tiles(rank) : 0;
      const int64_t batch_row = job.row(task, v_row % kRows);  // of all lanes at once
      float scale = entry.scale;
      if (kMoe && task.row_weight != nullptr) scale *= task.row_weight[job.row(task, g)];
      const int plane_row = min(job.plane_row(task, index) + v_row, task.plane_rows - 1);
      const float* from_planes = task.plane + int64_t{plane_row} * task.plane_width + s * task.rank_cap;
      if (!waited) {
        waited = true;
        ptx::wait_for_previous_grid();  // v is there
      }
      // v as 16-bit operands; of sums, the one rounding happens here, unscaled as in the plain formula
#pragma unroll 1
      for (int r = v_lane * 4; r < end_of_v; r += kLanesOfV * 4) {
        uint2 bits;
        if (is_lookup) {
          const Lookup lookup(slice, entry.a_row, rank, params.tokens.token_major);
          bits = lookup.load(token_of(params.tokens, batch_row), r);
        } else {
          const float4 sum = task.planes > 0 ? add_planes(task, from_planes + r, task.planes)
                                             : load_v4(task, batch_row, entry.v_col, r, rank);
          bits = {pack(sum.x, sum.y, T{}), pack(sum.z, sum.w, T{})};
        }
        *reinterpret_cast<uint2*>(smem_v + v_row * pitch + r) = bits;
      }
      if (is_lookup) {
#pragma unroll
        for (int i = 0; i < Expand::kEights; ++i) {
          if (token_of(params.tokens, job.row(task, g + 8 * i)) < 0) has &= ~(1u << i);
        }
      }
      __syncthreads();
      int r = 0;
#pragma unroll 1
      while (expand.unit < n.end) {
        r = expand.multiply(r, rank, alignment, smem_v + g * pitch, pitch);
        r = expand.turn(kWarps, n.end, r, rank, scale, has, has & reads, entry.b_stride, alignment);
      }
    } else if (task.sets_y && rows > 0) {
      if (!waited) {
        waited = true;
        ptx::wait_for_previous_grid();
      }
#pragma unroll 1
      for (; expand.unit < n.end; expand.next(kWarps, 0)) expand.store(-0.f, has);
    }
    index += gridDim.z;
    if (index >= jobs) break;
    __syncthreads();           // all are done with v
    job.read(task, index, s);  // there are more jobs than blocks for them: none is shared
  }
  if (!waited) ptx::wait_for_previous_grid();  // no block may end before the kernel before has
}

// `rank`: that most slices may have. `blocks`: of all jobs together.
cudaError_t expand(NarrowTask& params, const LoraParams& p, int64_t rank, const Device& device, int64_t blocks,
                   cudaStream_t stream) {
  LinearTask& task = params.linear;
  if (task.max_tiles == 0 || task.units == 0) return cudaSuccess;
  const bool moe = is_moe(p);
  const int job_rows = narrow_job_rows(p);
  // 64 outputs of 32 ranks for 16 rows would take more registers than there are
  const int ranks = rank < kWideRanks ? 16 : moe || (rank == kWideRanks && job_rows == 8) ? 32 : 64;
  // a unit of outputs a warp, as long as the blocks are not far more than the device holds
  int64_t units = 0;
  for (int i = 0; i < p.slices.count; ++i) units += divide_up(p.slices.width[i], outputs_of_unit(ranks, moe));
  const int64_t fit = blocks / narrow_jobs(p);
  const int64_t parts = min64(divide_up(units, narrow_warps(moe)), fit);
  share_parts(task, static_cast<int>(parts > task.slices ? parts : task.slices));
  LaunchShape shape;
  const int32_t all_parts = task.first_part[task.slices];
  shape.grid = dim3(all_parts, 1, narrow_grid_jobs(p, job_rows, narrow_blocks_per_sm(moe) * device.sms, all_parts));
  shape.threads = narrow_warps(moe) * 32;
  shape.smem_bytes = job_rows * narrow_v_pitch(task.rank_cap) * 2;
  shape.overlap = true;
  return dispatch_16_bit(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (moe) {
      return ranks == 16 ? launch<&expand_narrow<T, 16, 8, true>>(device, shape, params, stream)
                         : launch<&expand_narrow<T, 32, 8, true>>(device, shape, params, stream);
    }
    if (job_rows == 16) {
      return ranks == 16 ? launch<&expand_narrow<T, 16, 16, false>>(device, shape, params, stream)
                         : launch<&expand_narrow<T, 64, 16, false>>(device, shape, params, stream);
    }
    return ranks == 16   ? launch<&expand_narrow<T, 16, 8, false>>(device, shape, params, stream)
           : ranks == 32 ? launch<&expand_narrow<T, 32, 8, false>>(device, shape, params, stream)
                         : launch<&expand_narrow<T, 64, 8, false>>(device, shape, params, stream);
  });
}

}  // namespace

cudaError_t expand_narrow_path(const LoraParams& p, int planes, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  NarrowTask params{narrow_task(p, planes), {}};
  params.linear.follows_own = planes > 0;
  return expand(params, p, even_rank(p), device, narrow_blocks(p, device.sms, false), stream);
}

cudaError_t expand_deltas_narrow_path(const LoraParams& p, int planes, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  NarrowTask params{narrow_task(p, planes), {}};
  params.linear.follows_own = true;
  params.linear.sets_y = true;
  return expand(params, p, even_rank(p), device, narrow_blocks(p, device.sms, true), stream);
}

cudaError_t embedding_narrow_path(const EmbeddingParams& e, cudaStream_t stream) {
  const LoraParams& p = e.lora;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  NarrowTask params{narrow_task(p, 0), token_source(e)};
  if (e.vocab < 1) return cudaSuccess;  // no token is known, and A may be empty
  set_lookup(params.linear, e);
  // a lookup of few rows is short: half as many, so that the next kernel's may stand beside
  const int64_t blocks = (p.rows <= kDecodeRows ? 1 : 2) * device.sms;
  return expand(params, p, embedding_rank(e), device, blocks, stream);
}

}  // namespace polylora::cuda
