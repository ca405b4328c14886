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
// - Operands of the tensor cores are read as they lie in memory (narrow.cuh).
// - Up to 16 ranks, a lane adds the partials of the quad of v that it multiplies with: v needs no
//   shared memory. Else v goes through shared memory; many values of it are added by a block each, which sends them on.
//
// The order of all sums depends on the capacities of the call alone.
#include "linear/narrow.cuh"
#include "linear/paths.h"

// what only 9.0 and later compile would count as unused in the passes for older devices
#pragma nv_diag_suppress 177

namespace polylora::cuda {
namespace {

constexpr int kRows = 8;  // of a cluster
constexpr int kWarpsPerSm = 16;
constexpr int kMostSmem = 64 * 1024;  // more than any call takes
constexpr int kFewQuads = 64;         // quads of v up to which every block adds all of them

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

template <typename T, bool kWide, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, kWarpsPerSm / kWarps)
    linear_cluster(const __grid_constant__ ClusterTask params) {
#if POLYLORA_HAS_CLUSTERS
  const LinearTask& task = params.linear;
  const ClusterSmem& at = params.smem;
  constexpr int kThreads = kWarps * 32;
  using Expand = NarrowExpand<T, kWide, kRows>;
  constexpr int kOutputs = Expand::kOutputs;
  constexpr int kStepUnits = kWide ? 5 : 4;  // units of K in flight
  unsigned char* smem = ptx::dynamic_smem();
  uint64_t* partials_arrived = reinterpret_cast<uint64_t*>(smem);
  uint64_t* v_arrived = partials_arrived + 1;
  float* partial = reinterpret_cast<float*>(smem + at.partial);
  float4* inbox = reinterpret_cast<float4*>(smem + at.inbox);
  T* smem_v = reinterpret_cast<T*>(smem + at.v);

  const int blocks_log2 = task.blocks_log2;
  const int blocks = 1 << blocks_log2;
  const int block = blockIdx.x & (blocks - 1);  // of the cluster; x counts those that share the outputs, too
  if (threadIdx.x == 0) {
    ptx::init_barrier(partials_arrived);
    ptx::init_barrier(v_arrived);
  }
  if (!task.holds_next) ptx::launch_next_grid();
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
  const Part k = part_of(k_block, split, task.k_split_log2);
  const int first_rank = (warp >> task.k_split_log2) * kRankTile;
  // units of outputs: the block's; its warps take them in turn
  const Part n = part_of((slice.width + kOutputs - 1) / kOutputs, blockIdx.x, blocks_log2 + task.parts_log2);

  int index = blockIdx.z;
  NarrowJob<kRows> job;
  job.read(task, index, blockIdx.y);

  // what follows from the job
  int jobs, rank, rows, a_row, b_stride;
  int64_t b_offset;
  float scale;
  NarrowShrink<T, kStepUnits, kRows> shrink;
  int quads_a_row, quads;  // of v
  uint32_t quads_inverse;  // 2^32 / quads_a_row, rounded up
  const auto prepare = [&] {
    jobs = job.jobs;
    rows = job.rows(index);
    const SliceEntry entry = job.entry();
    const bool fits = entry_fits(entry, entry.rank, slice.a_rows, slice.width, slice.b_elements, task.v_width) &&
                      entry.rank <= task.rank_cap;
    rank = index < jobs && rows > 0 && fits ? entry.rank : 0;
    a_row = entry.a_row;
    b_stride = entry.b_stride;
    b_offset = entry.b_offset;
    scale = entry.scale;
    shrink.set_rows(task, job, rows);
    quads_a_row = rank_tiles_of(rank) * (kRankTile / 4);
    quads = rows * quads_a_row;
    quads_inverse = rank > 0 ? 0xffffffffu / static_cast<uint32_t>(quads_a_row) + 1 : 0;
  };
  prepare();
  shrink.set_ranks(slice, a_row, first_rank, rank);

  // a guess at the weights, towards L2: a row of A a thread, then rows of B
  if (rank > 0) {
    const int bytes = (k_block.end - k_block.begin) * kUnitK * 2;
    if (static_cast<int>(threadIdx.x) < rank && bytes > 0) {
      ptx::prefetch_bulk(static_cast<const T*>(slice.a) +
                             int64_t{a_row + static_cast<int>(threadIdx.x)} * slice.a_stride + k_block.begin * kUnitK,
                         bytes);
    }
    const int first = n.begin * kOutputs;
    const int outputs = min(n.end * kOutputs, slice.width) - first;
    prefetch_b(static_cast<const T*>(slice.b) + b_offset + int64_t{first} * b_stride, b_stride, rank, outputs);
  }
  bool guess = true;
  uint32_t phases = 0;  // parities of the barriers: partials in bit 0, v in bit 1
#pragma unroll 1
  while (true) {
    Expand expand(slice);
    // ---- shrink: 16 ranks at a time, the warp's part of K
    {
      shrink.clear();
      int r = first_rank;
      int u = k.begin;
      if (guess) {
        ptx::wait_for_previous_grid();
        if (task.holds_next) ptx::launch_next_grid();
      }
      if (r < rank) shrink.load(u, k.end);
      int32_t now = job.word;
      if (guess) now = ptx::load_fresh4(job.at);
      expand.begin(task, job, n.begin + warp, b_offset, b_stride);  // while these are on their way
#pragma unroll 1
      while (r < rank) {
        shrink.multiply(u, k.end);
        u += kStepUnits;
        if (u >= k.end) {
          shrink.store(partial + (split * kRows + g) * at.partial_pitch + r, at.partial_pitch, r, rank,
                       g < rows ? 1 : 0);
          r += (kWarps >> task.k_split_log2) * kRankTile;
          if (r >= rank) break;
          shrink.set_ranks(slice, a_row, r, rank);
          u = k.begin;
        }
        shrink.load(u, k.end);
      }
      if (guess) {
        guess = false;
        if (__any_sync(0xffffffffu, now != job.word)) {  // a wrong guess has spoilt nothing but this warp's partial
          job.read(task, index, blockIdx.y);
          prepare();
          shrink.set_ranks(slice, a_row, first_rank, rank);
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
      expand.clear();
      const int alignment = static_cast<int>(b_offset) | b_stride;
      const uint32_t has = g < rows ? 1 : 0;
      int r = 0;
      if (expand.unit < n.end) expand.load(r, rank, has, b_stride, alignment);
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
          expand.v_frag[0] = pack(sum.x, sum.y, T{});
          expand.v_frag[2] = pack(sum.z, sum.w, T{});
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
#pragma unroll 1
      while (expand.unit < n.end) {
        r = expand.multiply(r, rank, alignment, direct ? nullptr : smem_v + g * at.v_pitch, at.v_pitch);
        r = expand.turn(kWarps, n.end, r, rank, scale, has, has, b_stride, alignment);
      }
      phases ^= 1;
    }

    index += gridDim.z;
    if (index >= jobs) break;
    __syncthreads();  // all threads are done with shared memory
    if (blocks > 1 && !arrived) ptx::cluster_arrive_relaxed();
    arrived = blocks > 1;
    job.read(task, index, blockIdx.y);
    prepare();
    shrink.set_ranks(slice, a_row, first_rank, rank);
  }
  if (arrived) ptx::cluster_wait();
#else
  __trap();  // linear.cu sends no older device here
#endif
}

ClusterSmem smem_of(const LinearTask& task) {
  ClusterSmem at{};
  at.partial_pitch = task.rank_cap + 8;
  at.v_pitch = narrow_v_pitch(task.rank_cap);
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

// `most_blocks_log2`: of a cluster that the device can run.
Spread spread(const LoraParams& p, int most_blocks_log2) {
  Spread how{{narrow_task(p, 0), {}}, false, 4};
  LinearTask& task = how.params.linear;
  // ranks of the slices are unknown here: an even share of v each
  const int64_t rank = even_rank(p);
  how.wide = rank >= kWideRanks;
  // Measured: the larger clusters, the better, as long as all blocks run at once, the next call's beside them, or have
  // much to read each. Blocks of four warps, for few and short work, count as half.
  const int64_t clusters = narrow_jobs(p) * p.slices.count;
  const int64_t bytes = decode_weight_bytes(p) / clusters;  // of a tile and slice
  how.warps = !how.wide && bytes <= 256 * 1024 && clusters <= 48 ? 4 : 8;
  while (task.blocks_log2 < most_blocks_log2) {
    const int64_t blocks = (clusters << (task.blocks_log2 + 1)) * how.warps / 8;
    const int64_t each = (bytes >> (task.blocks_log2 + 1)) * 8 / how.warps;
    const bool better = blocks <= 132 || (blocks <= 200 && each >= 48 * 1024) || (blocks <= 300 && each >= 80 * 1024) ||
                        each >= 128 * 1024;
    if (!better) break;
    ++task.blocks_log2;
  }
  // Far more outputs than inputs (lm_head): clusters that share them, each with v of its own.
  int64_t width = 0;
  for (int i = 0; i < p.slices.count; ++i) width = width > p.slices.width[i] ? width : p.slices.width[i];
  const auto b_bytes = [&] { return width * rank * 2 >> (task.blocks_log2 + task.parts_log2); };  // of a block
  while (clusters << (task.blocks_log2 + task.parts_log2 + 1) <= 132 && b_bytes() >= 64 * 1024) ++task.parts_log2;
  task.k_split_log2 = k_split_log2_of(rank, how.warps);
  how.params.smem = smem_of(task);
  return how;
}

template <typename T>
cudaError_t launch_cluster(const Device& device, const LaunchShape& shape, const Spread& how, cudaStream_t stream) {
  if (how.wide) return launch<&linear_cluster<T, true, 8>>(device, shape, how.params, stream);
  if (how.warps == 8) return launch<&linear_cluster<T, false, 8>>(device, shape, how.params, stream);
  return launch<&linear_cluster<T, false, 4>>(device, shape, how.params, stream);
}

}  // namespace

bool cluster_path_serves(const LoraParams& p) {
  return fast_shrink_serves(p) && fast_expand_serves(p) && p.k % kUnitK == 0 && p.slices.groups > 0;
}

cudaError_t linear_cluster_path(const LoraParams& p, cudaStream_t stream) {
  Device device;
  cudaError_t error = current_device(device);
  int most_blocks_log2 = 4;
  for (; error == cudaSuccess && most_blocks_log2 > 0; --most_blocks_log2) {
    int clusters = 0;
    error = resident_clusters<&linear_cluster<__nv_bfloat16, true, 8>>(device, 256, kMostSmem, 1 << most_blocks_log2,
                                                                       clusters);
    if (clusters > 0) break;
  }
  if (error != cudaSuccess) return error;
  Spread how = spread(p, most_blocks_log2);
  LinearTask& task = how.params.linear;
  task.holds_next = p.plan.runs == Runs::kShort;
  if (task.max_tiles == 0 || task.units == 0) return cudaSuccess;
  LaunchShape shape;
  const int64_t blocks = int64_t{1} << (task.blocks_log2 + task.parts_log2);  // of a job and slice
  shape.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.slices.count),
                    narrow_grid_jobs(p, kRows, kWarpsPerSm / how.warps * int64_t{device.sms}, blocks * p.slices.count));
  shape.threads = how.warps * 32;
  shape.smem_bytes = how.params.smem.bytes;
  shape.cluster = 1 << task.blocks_log2;
  shape.overlap = true;
  return dispatch_16_bit(p.dtype,
                         [&](auto element) { return launch_cluster<decltype(element)>(device, shape, how, stream); });
}

}  // namespace polylora::cuda
