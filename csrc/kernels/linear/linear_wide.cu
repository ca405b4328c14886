// linear for prefill in one launch, sm_90a: a cluster of blocks takes a wide tile of up to 128 rows of one group.
//
//   every block:  its part of K: x and A of all slices through a ring of stages (cp.async), wgmma   -> sums of its part
//                 the first of y, then of B, on their way meanwhile
//                 the cluster's barrier, and v of a slice from the sums of its parts, added in the order of K
//                 its part of the outputs                                                           (ExpandStream)
//
// x is read once, where its ranks fit the registers, and y once. K is shared so that few rows, too, occupy the device,
// and A comes from L2 once for every tile. Sums of few ranks go through planes in L2, one for each part; those of many
// through the blocks' shared memory (exchange.cuh). Of more ranks than registers hold, there are further passes over x,
// which are shared as one walk over K: most blocks have a part of one pass alone, longer than of all would be, and
// fewer sums (PassShares). These go through planes again, as do those of more ranks than shared memory has room for.
// One launch instead of two: no block waits for the last one of a grid, and y streams while v is exchanged. Also shrink
// on its own, through planes.
//
// What the block works on is read before the kernel before has ended, and compared after it (as in linear_cluster.cu).
// Where that was decode's kernel for the short runs of the same call, nothing that is read here may change: both run
// side by side. The order of all sums depends on the capacities of the call, on the ranks of the row's own adapter
// where they take several passes, and, of more tiles than clusters of two, on which launch takes the tile.
#include <algorithm>

#include "linear/block_share.cuh"
#include "linear/exchange.cuh"
#include "linear/paths.h"

// what only 9.0a compiles would count as unused in the passes for other devices
#pragma nv_diag_suppress 177

namespace polylora::cuda {
namespace {

constexpr int kThreads = 512;  // four warpgroups: two share the rows of a pass over x, two its ranks
constexpr int kSmem = 227 * 1024;
constexpr int kExchangeAt = kSmem - kExchangeBytes;
constexpr int kShareAt = kExchangeAt - static_cast<int>(sizeof(BlockShare));
constexpr int kItemAt = kShareAt - static_cast<int>(sizeof(WideItem));
constexpr int v_at(int pitch) { return kItemAt - kWideTileRows * pitch * 2; }

constexpr int kPanelBytes = 32 * 1024;  // of B

// Up to so many rank tiles of a pass over x, sums take one way through L2, where every block adds what it expands;
// beyond, of one pass, two through the cluster's shared memory, where each sum is added once. H200, qkv of 1024 rows,
// us: r16 19.2 and 20.6, r64 32.5 and 29.1.
constexpr bool adds_through_l2(int tiles_of_pass) { return tiles_of_pass <= 4; }

/// kTiles: rank tiles that a warpgroup takes of a pass over x.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) linear_wide(const __grid_constant__ LinearTask task) {
#if POLYLORA_HAS_WGMMA
  constexpr int kAllTiles = 2 * kTiles;
  constexpr bool kThroughL2 = adds_through_l2(kAllTiles);
  using Copies = WideCopies<T, kThreads, kAllTiles>;
  // Shared memory: y, B, v, item, barriers, and where all but the first of y come later, x and A. Many ranks take the
  // place of that, too; else it comes after the last of x. Sums to add come right before v, and y and B no sooner than
  // they are out of the way.
  constexpr bool kEarlyY = kTiles <= 4;
  // no slice has more ranks than v has columns, and up to 128 these are one pass
  constexpr int kMostRanks = kAllTiles * kRankTile <= 128 ? kAllTiles * kRankTile : kMaxRank;
  using Stream = ExpandStream<T, kThreads, kThroughL2 ? 3 : 2, kPanelBytes, kMostRanks, !kThroughL2>;
  constexpr int kRingAt = kEarlyY ? Stream::kEarlyBytes : 0;
  // the widest v, of a slice or of all
  constexpr int kPitch = StreamV::pitch(kThroughL2 ? kMostRanks : 32 * kMaxBlocks);
  static_assert(kThroughL2 || kMostRanks <= 32 * kMaxBlocks);
  constexpr int kMostStages = (kItemAt - kRingAt) / Copies::kStageBytes;
  constexpr int kStages = kMostStages < 8 ? kMostStages : 8;
  // chunks whose products go on while the next is waited for: where as many as three others can be on their way
  constexpr int kOpen = kStages > 4 ? 1 : 0;
  constexpr int kChunksAhead = kStages - 1 - kOpen;
  static_assert(Stream::kBytes <= v_at(kPitch) && kRingAt % 1024 == 0);
  unsigned char* smem = ptx::dynamic_smem();
  unsigned char* ring = smem + kRingAt;  // of x and A
  WideItem& item = *reinterpret_cast<WideItem*>(smem + kItemAt);
  ExchangeBarriers& exchange = *reinterpret_cast<ExchangeBarriers*>(smem + kExchangeAt);
  BlockShare& share = *reinterpret_cast<BlockShare*>(smem + kShareAt);
  const auto parts = [] { return static_cast<int>(ptx::cluster_size()); };
  // of v: all slices' side by side, right from the blocks that add it; or a slice's at a time, from planes
  const auto is_direct = [&] {
    return !kThroughL2 && task.y != nullptr && item.rank_tiles <= kAllTiles && item.blocks <= kMaxBlocks;
  };
  const auto counts = [&] { return kThroughL2 ? PlaneCounts{} : PlaneCounts{share.planes, share.most_planes}; };
  const auto v_pitch = [&] { return is_direct() ? StreamV::pitch(32 * item.blocks) : kPitch; };
  const auto smem_v = [&] { return reinterpret_cast<T*>(smem + v_at(v_pitch())); };
  const auto shared_v = [&] { return SharedV<T>(task, item, smem_v(), v_pitch(), parts()); };
  const auto inbox_at = [&] { return v_at(v_pitch()) - SumUnits(item, parts()).inbox_bytes(); };
  // whether the first of y, and of B, may come while sums are on their way
  const auto y_early = [&] { return !is_direct() || inbox_at() >= Stream::kEarlyBytes; };
  const auto b_early = [&] { return !is_direct() || inbox_at() >= Stream::kPanelsAt + kPanelBytes; };
  // of few ranks, every block has a part of each pass
  const auto first_base = [&] { return kThroughL2 || item.rank_tiles == 0 ? 0 : share.first_pass * kAllTiles; };
  const auto has_part = [&](int base) {
    return base < item.rank_tiles && (kThroughL2 || base <= share.last_pass * kAllTiles);
  };
  // the next slice of which this block has outputs
  const auto next_slice = [&](int slice) {
    if (task.y == nullptr) return task.slices;
    for (++slice; slice < task.slices && share.units[slice] == 0; ++slice) {
    }
    return slice;
  };
  const auto turn_to = [&](Stream& stream, int slice) {
    stream.set(slice, share.first_unit[slice], share.units[slice], {0, kWideTileRows});
  };

  if (!task.holds_next || task.follows_own) ptx::launch_next_grid();
  if (!kThroughL2 && threadIdx.x == 0) exchange.init();
  bool guess = !task.follows_own;
  int index = blockIdx.x / parts();
#pragma unroll 1
  while (true) {
    WideJob::read(task, item, index, [&](int lane) {
      const int passes = kThroughL2 ? 1 : BlockShare::passes_of<kAllTiles>(item);
      if (passes > 0) share.set_k(task, passes, ptx::cluster_rank(), parts(), lane);
    });
    // ---- shrink
    int slice = task.slices;       // of which this block has outputs: the first
    int started = Stream::kAhead;  // granules of y
    bool is_new = true, again = false;
    Stream stream(task, item, smem);
    stream.set_none();
#pragma unroll 1
    for (int base = first_base(); has_part(base) || guess; base += kAllTiles) {
      const int group = ptx::thread_again() / 128;
      const int first_tile = group / 2 * kTiles;  // of a pass
      const Copies copies(task, item, base);
      const Part chunks =
          kThroughL2 ? Part{share.begin, share.end} : share.chunks_of(base / kAllTiles, chunks_of_k(task));
      if (guess) {
        ptx::wait_for_previous_grid();
        if (task.holds_next) ptx::launch_next_grid();
      }
      // read before all of x is asked for: else it would come last
      const bool differs = guess && WideJob::differs(task, item);
      const bool real = index < item.tiles && has_part(base);
#pragma unroll 1
      for (int i = 0; i < kChunksAhead; ++i) {
        if (real && chunks.begin + i < chunks.end) copies.start(ring + i * Copies::kStageBytes, chunks.begin + i);
        ptx::commit_copies();
      }
      if (is_new) {
        is_new = guess = false;
        const int warp = ptx::thread_again() / 32;
        if (warp == kThreads / 64 && item.rank_tiles > 0) {  // while x is on its way
          share.set_others<kThroughL2 ? 0 : kAllTiles>(task, item, ptx::cluster_rank(), parts(),
                                                       ptx::thread_again() % 32);
        }
        again = __syncthreads_or(differs);
        if (again) {
          ptx::wait_copies<0>();
          __syncthreads();
        }
      }
      if (!real || again) break;
      const bool is_last = !has_part(base + kAllTiles);
      if (kEarlyY && is_last) {
        slice = next_slice(-1);
        if (slice < task.slices) {
          turn_to(stream, slice);
          if (y_early()) started = 0;
        }
      }
      float acc[kTiles][8];
#pragma unroll
      for (int i = 0; i < kTiles * 8; ++i) acc[i / 8][i % 8] = 0.f;
      int stage = 0;
#pragma unroll 1
      for (int chunk = chunks.begin; chunk < chunks.end; ++chunk) {
        ptx::wait_copies<kChunksAhead - 1>();
        ptx::fence_async_proxy();
        if (kOpen == 0) ptx::wgmma_wait<0>();
        __syncthreads();  // the chunk is there for all, and all are done with what the next copies replace
        ptx::wgmma_fence();
        const unsigned char* at = ring + stage * Copies::kStageBytes;
        const uint64_t x = ptx::swizzled_rows(at + group % 2 * 64 * kChunkK * 2);
        const uint64_t a = ptx::swizzled_rows(at + Copies::kABytes + first_tile * kRankTile * kChunkK * 2);
#pragma unroll
        for (int step = 0; step < kChunkK / 16; ++step) {
          // all ranks at once: each product reads x from shared memory, which is what bounds them
          const uint64_t x_step = ptx::further(x, 2 * step), a_step = ptx::further(a, 2 * step);
          if constexpr (kTiles == 8) ptx::wgmma_m64n128k16(acc, x_step, a_step, T{});
          if constexpr (kTiles == 6) ptx::wgmma_m64n96k16(acc, x_step, a_step, T{});
          if constexpr (kTiles == 4) ptx::wgmma_m64n64k16(acc, x_step, a_step, T{});
          if constexpr (kTiles == 2) ptx::wgmma_m64n32k16(acc, x_step, a_step, T{});
          if constexpr (kTiles == 1) ptx::wgmma_m64n16k16(acc, x_step, a_step, T{});
        }
        ptx::wgmma_commit();
        const int next = chunk + kChunksAhead;
        if (next < chunks.end) {
          const int to = stage <= kOpen ? stage + kChunksAhead : stage - 1 - kOpen;
          copies.start(ring + to * Copies::kStageBytes, next);
        } else if (kEarlyY && started < Stream::kAhead) {
          stream.start_y(started++);
        }
        ptx::commit_copies();
        if (kOpen > 0) ptx::wgmma_wait<kOpen>();
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      ptx::wgmma_wait<0>();

      const int lane = ptx::thread_again() % 32;
      const int warp_of_rows = ptx::thread_again() % 256 / 32;
      if (!is_direct()) {
        const int plane = kThroughL2             ? static_cast<int>(ptx::cluster_rank())
                          : base == first_base() ? share.first_plane
                                                 : 0;
        store_sums<kTiles, 1>(task, item, plane, warp_of_rows * 16 + lane / 4, base + first_tile, lane % 4 * 2,
                              [&](int i, int second_row, int half) {
                                return float2{acc[i][4 * half + 2 * second_row], acc[i][4 * half + 2 * second_row + 1]};
                              });
        __syncthreads();  // all are done with the ring
        continue;
      }

      // the sums to their owners; none is sent before all blocks are done with their rings
      const SumUnits units(item, parts());
      const int part = ptx::cluster_rank();
      if (threadIdx.x == 0) {
        exchange.sums.expect(units.bytes(part));
        exchange.v.expect(shared_v().bytes(part, units.row_groups()));
      }
      ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
      const unsigned char* inbox = smem + inbox_at();
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (first_tile + i >= item.rank_tiles) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row_group = warp_of_rows * 2 + j;
          if (row_group >= units.row_groups()) break;
          units.send(inbox, &exchange.sums.barrier, part, row_group, first_tile + i,
                     {acc[i][2 * j], acc[i][2 * j + 1], acc[i][4 + 2 * j], acc[i][5 + 2 * j]});
        }
      }
    }
    if (again) continue;
    if (index >= item.tiles) break;

    // ---- v, and while it is on its way the first of y, and of B
    const bool direct = is_direct();
    if (item.rank_tiles > 0) {
      if (!direct) ptx::cluster_arrive();
      if (!kEarlyY) slice = next_slice(-1);
      bool is_first = true;
      do {
        const bool more = slice < task.slices;
        if (more && (!kEarlyY || !is_first)) turn_to(stream, slice);
        if (!is_first || !kEarlyY || !y_early()) started = 0;
#pragma unroll 1
        for (int early = 1; early >= 0; --early) {
          // sums to add may stand in the way of y, or of B
          if (more && early == (!is_first || y_early())) {
            stream.start_all_y(started);
            ptx::commit_copies();
          }
          if (more && early == (!is_first || b_early())) stream.start_last_panel();
          if (!early || !is_first) continue;
          if (!direct) {
            __syncwarp();  // for a barrier that wants the warp together
            ptx::cluster_wait();
            continue;
          }
          // what this block owns of the sums
          const SumUnits units(item, parts());
          const int part = ptx::cluster_rank();
          const unsigned char* inbox = smem + inbox_at();
          exchange.sums.wait();
          const SharedV<T> v = shared_v();
          const int first = units.first(part), end = units.first(part + 1);
#pragma unroll 1
          for (int i = first + ptx::thread_again() / 32; i < end; i += kThreads / 32) {
            const SumUnits::Unit unit = units.unit(i);
            float4 sums[2] = {units.add_parts(inbox, i - first, 0), {0.f, 0.f, 0.f, 0.f}};
            if (unit.is_two) sums[1] = units.add_parts(inbox, i - first, 1);
            v.send(&exchange.v.barrier, unit, sums[0], sums[1]);
          }
          __syncthreads();  // the inbox is free
        }
        if (is_first && direct) exchange.v.wait();
        is_first = false;
        if (!more) break;

        // ---- expand
        T* v = smem_v();
        if (!direct) load_v(v, v_pitch(), task, item, slice, {0, kWideTileRows}, {}, counts());
        stream.run(direct ? v + 32 * item.first_block[slice] : v, v_pitch(), nullptr, true);
        __syncthreads();  // all are done with the ring and v
        slice = next_slice(slice);
      } while (slice < task.slices);
      if (task.y == nullptr) {
        const int begin = item.rows * ptx::cluster_rank() / parts();
        const int end = item.rows * (ptx::cluster_rank() + 1) / parts();
        if (task.planes > 0) add_planes_to_v(task, item, begin, end, counts());
      }
    }
    if (index < task.skip_at && index + static_cast<int>(gridDim.x) / parts() >= task.skip_at) {
      index += task.skipped_tiles;
    }
    index += gridDim.x / parts();
    if (index >= item.tiles) break;
    __syncthreads();
  }
  if (task.follows_own) ptx::wait_for_previous_grid();  // no block may end before the kernel before has
#else
  __trap();  // linear.cu sends no other device here
#endif
}

template <typename T, int kTiles>
cudaError_t launch_wide(const Device& device, const LaunchShape& shape, const LinearTask& task, cudaStream_t stream) {
  return launch<&linear_wide<T, kTiles>>(device, shape, task, stream);
}

template <typename T>
cudaError_t launch_wide(int rank_tiles, const Device& device, const LaunchShape& shape, const LinearTask& task,
                        cudaStream_t stream) {
  if (rank_tiles <= 2) return launch_wide<T, 1>(device, shape, task, stream);
  if (rank_tiles <= 4) return launch_wide<T, 2>(device, shape, task, stream);
  if (rank_tiles <= 8) return launch_wide<T, 4>(device, shape, task, stream);
  const int passes = static_cast<int>(divide_up(rank_tiles, 16));
  if (rank_tiles <= 12 * passes) return launch_wide<T, 6>(device, shape, task, stream);
  return launch_wide<T, 8>(device, shape, task, stream);
}

constexpr int kMaxParts = 16;

// Which clusters take the tiles. A cluster's blocks are the parts of K.
struct WideLaunches {
  WideClusters all{};
  WideClusters few{};        // of a launch beside that one; blocks 0: none
  int first = 0, count = 0;  // tiles of that launch

  // Planes of v in scratch: one for each part, a row for each of the batch; and of that launch, 128 for each tile.
  static int planes(const LoraParams& p, const WideClusters& clusters) {
    return p.y == nullptr && clusters.blocks == 1 ? 0 : clusters.blocks;
  }
  int64_t bytes(const LoraParams& p) const { return plane_bytes(p, planes(p, all), p.rows); }
  int64_t few_rows() const { return int64_t{count} * kWideTileRows; }
  int64_t few_bytes(const LoraParams& p) const { return plane_bytes(p, planes(p, few), few_rows()); }
};

// More tiles than clusters of two: those left over have larger clusters, as the others would take a second turn as
// long as the first. Those beyond the expected ones the first launch's clusters take in turn.
cudaError_t launches_of(const LoraParams& p, const Device& device, WideLaunches& launches) {
  const auto best = [&](int64_t tiles, int least, int most, WideClusters& clusters) {
    return best_clusters<&linear_wide<__nv_bfloat16, 1>>(tiles, device, kThreads, kSmem, least, most, clusters);
  };
  if (batch_invariant()) return best(1, 4, 4, launches.all);
  // alone where a block's sums are v; else two that share the outputs, and st.async is illegal without a cluster
  const int least = p.y == nullptr ? 1 : 2;
  const int64_t half_of_k = divide_up(p.k, kChunkK) / 2;
  const int most = half_of_k < least ? least : static_cast<int>(min64(half_of_k, kMaxParts));
  const int64_t tiles = expected_wide_tiles(p, PartialTiles::kNearlyAlways);
  cudaError_t error = best(1, least, least, launches.all);
  if (error != cudaSuccess || launches.all.count < 1) return error;
  const int64_t left = tiles % launches.all.count;
  if (left == tiles || left == 0) return best(tiles, least, most, launches.all);
  WideClusters few;
  error = best(left, least, most, few);
  if (few.blocks == least) return error;  // as well all in one launch
  launches.few = few;
  launches.first = static_cast<int>(tiles - left);
  launches.count = static_cast<int>(divide_up(left, few.count) * few.count);
  return error;
}

}  // namespace

cudaError_t wide_scratch(const LoraParams& p, int64_t& bytes) {
  Device device;
  WideLaunches launches;
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) error = launches_of(p, device, launches);
  bytes = launches.bytes(p) + launches.few_bytes(p);
  return error;
}

cudaError_t linear_wide_path(const LoraParams& p, cudaStream_t stream) {
  const LinearTask task = wide_task(p);
  if (task.max_tiles == 0 || (p.y != nullptr && task.units == 0)) return cudaSuccess;
  Device device;
  WideLaunches launches;
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) error = launches_of(p, device, launches);
  const auto launch = [&](LinearTask of_launch, const WideClusters& clusters, int64_t plane_rows, int64_t skipped) {
    const int planes = launches.planes(p, clusters);
    if (planes > 0) set_planes(of_launch, p, planes, plane_rows, skipped);
    if (p.y != nullptr && clusters.blocks >= task.slices) share_by_slices(of_launch, clusters.blocks);
    const LaunchShape shape = cluster_shape(of_launch, clusters, kThreads, kSmem);
    return dispatch_16_bit(p.dtype, [&](auto element) {
      return launch_wide<decltype(element)>(expected_rank_tiles(p), device, shape, of_launch, stream);
    });
  };
  if (error != cudaSuccess) return error;
  LinearTask all = task;
  all.follows_own = p.plan.runs == Runs::kLong;
  if (launches.few.blocks == 0) return launch(all, launches.all, p.rows, 0);
  all.holds_next = true;
  all.skip_at = launches.first;
  all.skipped_tiles = launches.count;
  error = launch(all, launches.all, p.rows, 0);
  LinearTask few = task;
  few.follows_own = true;
  few.tile += launches.first;
  few.tiles_before = launches.first;
  few.max_tiles = std::min(task.max_tiles - launches.first, launches.count);
  few.planes_by_tile = true;
  return error == cudaSuccess ? launch(few, launches.few, launches.few_rows(), launches.bytes(p)) : error;
}

}  // namespace polylora::cuda
