// The plan of few rows: one block, a thread a row, four barriers.
//
//   every thread:  the group of its row; a key of group and row, unlike all others
//                  its place: how many keys are smaller
//   from here on a thread has a place in the sorted order, not a row
//                  where its run begins and ends, from a bit mask of the places where the group changes
//                  what runs before its own there are, by one scan of four 16-bit counts in a word
//                  its row of the order; the tile that begins there; at the run's first place, the run
//
// One token's plan lets no kernel start before it ends. Where the next is moe_delta, beside the base's GEMM, its blocks
// would stand ready before the GEMM's and take places that those then do not find. H200, us that LoRA r16 adds to a
// layer, let in early and late: one token of qwen35-35b 4.1 and 3.0, nemotron3-super 4.2 and 2.7, qwen35-397b 9.5 and
// 8.8; two of qwen35-35b 5.8 and 8.9, four 6.9 and 9.6, two of qwen35-397b 12.7 and 6.9.
//
// The time is that of a few dependent reads and barriers. All comparisons are 2 instructions each: at
// 1024 rows they would take longer than to count.
#include "common/ptx.cuh"
#include "plan/task.cuh"

namespace polylora::cuda {
namespace {

constexpr int kThreads = static_cast<int>(kPlanSmallRows);
constexpr int kWarps = kThreads / 32;
constexpr int kRowBits = 9;
static_assert(kPlanSmallRows == 1 << kRowBits);

// RunCounts but for the rows, in one word. All are below 2^16.
__device__ __forceinline__ uint64_t packed(const RunCounts& counts) {
  return static_cast<uint64_t>(counts.runs) | static_cast<uint64_t>(counts.short_runs) << 16 |
         static_cast<uint64_t>(counts.long_tiles) << 32 | static_cast<uint64_t>(counts.long_wide_tiles) << 48;
}
__device__ __forceinline__ RunCounts unpacked(uint64_t word) {
  return {0, static_cast<int32_t>(word & 0xffff), static_cast<int32_t>(word >> 16 & 0xffff),
          static_cast<int32_t>(word >> 32 & 0xffff), static_cast<int32_t>(word >> 48)};
}

// Keys that are compared at once.
template <typename Key>
struct alignas(16) Keys {
  static constexpr int kCount = 16 / sizeof(Key);
  Key key[kCount];
};

template <typename Key>
struct SmallSmem {
  Keys<Key> keys[kThreads / Keys<Key>::kCount];
  int32_t sorted[kThreads];   // groups
  uint32_t boundary[kWarps];  // bit i: the group of place 32 * warp + i differs from the one before
  uint64_t counts[kWarps];
  int32_t rows[kWarps], invalid[kWarps], max_run[kWarps], max_short[kWarps];
};

template <typename Key>
__global__ void __launch_bounds__(kThreads) plan_few_rows(const __grid_constant__ PlanTask task) {
  SmallSmem<Key>& smem = *reinterpret_cast<SmallSmem<Key>*>(ptx::dynamic_smem());
  const int place = threadIdx.x;
  const int warp = place / 32, lane = place % 32;
  const int warps = blockDim.x / 32;
  const int rows = static_cast<int>(task.source.p.rows);
  const int32_t groups = static_cast<int32_t>(task.source.groups);
  ptx::wait_for_previous_grid();
  const int top_k = task.source.p.top_k;
  if (top_k <= 1 || rows > top_k) ptx::launch_next_grid();

  // ---- a thread a row
  int32_t group[1], invalid = 0;
  task.source.load<kThreads>(place, rows, group, invalid);
  if (place < rows) task.row_group[place] = group[0];
  const bool active = group[0] >= 0;
  const Key key = static_cast<Key>(active ? group[0] : groups) << kRowBits | static_cast<Key>(place);
  smem.keys[place / Keys<Key>::kCount].key[place % Keys<Key>::kCount] = key;
  const int32_t invalid_here = __popc(__ballot_sync(0xffffffffu, invalid != 0));
  if (lane == 0) smem.invalid[warp] = invalid_here;
  clear_inverse(task, place, blockDim.x);
  __syncthreads();
  if (task.pair_pos && place < rows) invert(task, place);
  int smaller = 0;
#pragma unroll 8
  for (int i = 0; i < static_cast<int>(blockDim.x) / Keys<Key>::kCount; ++i) {
    const Keys<Key> others = smem.keys[i];
#pragma unroll
    for (int j = 0; j < Keys<Key>::kCount; ++j) smaller += others.key[j] < key;
  }
  smem.sorted[smaller] = static_cast<int32_t>(key >> kRowBits);
  if (active) task.order[smaller] = place;
  __syncthreads();

  // ---- a thread a place; threads beyond the rows stand behind them, among rows without a group
  const int32_t mine = smem.sorted[place];
  const uint32_t boundary_here = __ballot_sync(0xffffffffu, place == 0 || smem.sorted[place - 1] != mine);
  if (lane == 0) smem.boundary[warp] = boundary_here;
  __syncthreads();
  int at = warp;
  uint32_t bits = boundary_here & 0xffffffffu >> (31 - lane);
  while (bits == 0) bits = smem.boundary[--at];  // place 0 is one
  const int start = 32 * at + 31 - __clz(static_cast<int>(bits));
  at = warp;
  bits = boundary_here & 0xfffffffeu << lane;
  while (bits == 0 && ++at < warps) bits = smem.boundary[at];
  const int end = bits == 0 ? static_cast<int>(blockDim.x) : 32 * at + __ffs(bits) - 1;
  const bool in_run = mine < groups;
  const bool is_head = in_run && place == start;
  const int32_t run_rows = in_run ? end - start : 0;

  const uint64_t of_run = packed(RunCounts::of(run_rows));
  uint64_t word = is_head ? of_run : 0;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t below = __shfl_up_sync(0xffffffffu, word, distance);
    if (lane >= distance) word += below;
  }
  const int32_t rows_here = __popc(__ballot_sync(0xffffffffu, in_run));
  const int32_t max_run = __reduce_max_sync(0xffffffffu, run_rows);
  const int32_t max_short = __reduce_max_sync(0xffffffffu, run_rows <= kShortRun ? run_rows : 0);
  if (lane == 31) {
    smem.counts[warp] = word;
    smem.rows[warp] = rows_here;
    smem.max_run[warp] = max_run;
    smem.max_short[warp] = max_short;
  }
  __syncthreads();
  uint64_t all_words = 0;
  int32_t all_rows = 0;
  RunLimits limits;
  for (int w = 0; w < warps; ++w) {
    if (w == warp) word += all_words;
    all_words += smem.counts[w];
    all_rows += smem.rows[w];
    limits.invalid += smem.invalid[w];
    limits.max_run = max(limits.max_run, smem.max_run[w]);
    limits.max_short = max(limits.max_short, smem.max_short[w]);
  }
  RunCounts all = unpacked(all_words);
  all.rows = all_rows;

  if (in_run) {
    const RunCounts before = unpacked(word - of_run);  // the run's head counts at each of its places
    const int offset = place - start;
    if (is_head) {
      task.run_group[before.runs] = mine;
      task.run_start[before.runs] = start;
    }
    if (offset % kTileRows == 0) {
      task.tile[before.next_tile(run_rows, all) + offset / kTileRows] = {mine, place, min(kTileRows, end - place),
                                                                         before.runs};
    }
    const int wide_rows = rows_of_wide_tiles(run_rows);
    if (offset % wide_rows == 0) {
      task.wide_tile[before.next_wide_tile(run_rows, all) + offset / wide_rows] = {
          mine, place, min(wide_rows, end - place), before.runs};
    }
  }
  if (place == 0) {
    task.run_start[all.runs] = all.rows;
    write_header(task, all, limits);
  }
}

}  // namespace

cudaError_t plan_small(const PlanTask& task, const Device& device, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(1);
  shape.threads = static_cast<int>(task.source.p.rows > 32 ? (task.source.p.rows + 31) / 32 * 32 : 32);
  shape.overlap = true;
  const bool fits = task.source.groups < int64_t{1} << (32 - kRowBits);  // a key, `groups` included, in 32 bits
  shape.smem_bytes = fits ? sizeof(SmallSmem<uint32_t>) : sizeof(SmallSmem<uint64_t>);
  return fits ? launch<&plan_few_rows<uint32_t>>(device, shape, task, stream)
              : launch<&plan_few_rows<uint64_t>>(device, shape, task, stream);
}

}  // namespace polylora::cuda
