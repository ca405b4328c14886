// expand for prefill, sm_80 and later: y += scale * v B^T, a stream over y with a small product inside.
//
// The units (a wide tile of up to 128 rows, 64 outputs) are shared evenly by the blocks, each a range of neighbours: v
// of a tile and slice stays in shared memory while a block walks its outputs. y and B come through a ring of stages by
// cp.async; a thread reads back only the pieces of y that it copied itself. Rows of the batch are on the M side of mma,
// a warp takes 16; outputs on its N side, numbered so that a thread owns 8 consecutive ones (as in linear_cluster.cu).
//
// What keeps a stream from the memory's speed: too few bytes in flight (hence the ring, as deep as two blocks an SM can
// have it), and too many instructions (hence addresses that advance by constants).
//
// v comes rounded and in the order of mma's operands from our own shrink, else as fp32 sums (VForm). After our own
// shrink, all but v may be read before that has ended: it lets this kernel start only when all that came before it is
// done.
#include "linear/paths.h"
#include "linear/task.cuh"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kYBytes = kWideTileRows * kUnitN * 2;
constexpr int kBlocksPerSm = 2;
constexpr int kUnitsPerBlock = 8;

struct ExpandItem {
  int64_t unit_end;  // of the block
  SliceEntry entry[kMaxSlices];
  int32_t row[kWideTileRows];
  int32_t pos, rows;               // of the tile
  int32_t rank[kMaxSlices];        // 0: absent
  int32_t packed_col[kMaxSlices];  // of PackedV
};

// Shared memory, in this order: the item; y [stage][warp][piece][lane], 16 bytes each; B [stage][64][ranks of a stage];
// v [128][v_pitch].
constexpr int kYAt = static_cast<int>((sizeof(ExpandItem) + 15) / 16 * 16);
constexpr int b_bytes(int ranks) { return kUnitN * ranks * 2; }
// an odd number of 16-byte pieces: the rows that ldmatrix reads together lie in different banks
__host__ __device__ constexpr int v_pitch_of(int rank_cap) { return rank_cap + 8; }
constexpr int smem_bytes(int stages, int ranks, int rank_cap) {
  return kYAt + stages * (kYBytes + b_bytes(ranks)) + kWideTileRows * v_pitch_of(rank_cap) * 2;
}

// Four ranks of v of a row, zeros from the rank on.
__device__ __forceinline__ float4 load_v_quad(const LinearTask& task, const SliceEntry& entry, int64_t row, int r) {
  const float* from = static_cast<const float*>(task.v) + row * task.v_stride + entry.v_col + r;
  if (r + 4 <= entry.rank && (reinterpret_cast<uintptr_t>(from) & 15) == 0)
    return *reinterpret_cast<const float4*>(from);
  float4 v{0.f, 0.f, 0.f, 0.f};
  if (r < entry.rank) v.x = from[0];
  if (r + 1 < entry.rank) v.y = from[1];
  if (r + 2 < entry.rank) v.z = from[2];
  if (r + 3 < entry.rank) v.w = from[3];
  return v;
}

// Ranks [first, end) of v of a tile and slice to shared memory, in the places of PackedV; both multiples of 32, or
// `end` the end of the last block. Packed v is on its way when this returns; of sums, the one rounding happens here,
// unscaled as in the plain formula.
template <typename T>
__device__ __attribute__((noinline)) void load_v(T* smem_v, const LinearTask& task, const ExpandItem& item, int s,
                                                 int first, int end) {
  const int pitch = v_pitch_of(task.rank_cap);
  if (task.v_form == VForm::kPacked) {
    const T* from = static_cast<const T*>(task.v) + int64_t{item.pos} * task.v_stride + item.packed_col[s] + first;
    const int pieces = (end - first) / 8;  // a row
    const int row = threadIdx.x / 2;
    if (row < item.rows) {
      for (int i = threadIdx.x % 2; i < pieces; i += 2) {
        ptx::copy_async16(smem_v + row * pitch + i * 8, from + int64_t{row} * task.v_stride + i * 8, 16);
      }
    }
    return;
  }
  const SliceEntry entry = item.entry[s];
  const int quads = (end - first) / 4;  // a row
#pragma unroll 2
  for (int e = threadIdx.x; e < item.rows * quads; e += kThreads) {
    const int row = e / quads;
    const int r = first + (e - row * quads) * 4;
    const float4 v = load_v_quad(task, entry, item.row[row], r);
    uint32_t* to = reinterpret_cast<uint32_t*>(smem_v + row * pitch + PackedV::place(r) - first);
    to[0] = pack(v.x, v.y, T{});
    to[4] = pack(v.z, v.w, T{});
  }
}

// Where output n of a unit of B stands in a stage: the lanes of an mma read 8 rows in a row (their outputs: see
// linear_cluster.cu). Rows of 64 ranks swap their halves in turn, against bank conflicts.
__device__ __forceinline__ int b_place(int n) { return (n / 32 * 4 + n % 8 / 2) * 8 + n % 32 / 8 * 2 + n % 2; }
template <int kRanks>
__device__ __forceinline__ int b_at(int place, int r) {
  return place * kRanks + (kRanks == 64 ? r ^ (place & 1) << 5 : r);
}

// One chunk of a unit of B into its stage, where B's rows allow no 16-byte pieces.
template <typename T, int kRanks>
__device__ __attribute__((noinline)) void copy_b_slowly(T* to, const T* from, int64_t stride, int outputs, int ranks) {
  for (int e = threadIdx.x; e < kUnitN * kRanks; e += kThreads) {
    const int n = e / kRanks;
    const int r = e % kRanks;
    const bool inside = n < outputs && r < ranks;
    reinterpret_cast<uint16_t*>(to)[b_at<kRanks>(b_place(n), r)] =
        inside ? reinterpret_cast<const uint16_t*>(from)[n * stride + r] : uint16_t{0};
  }
}

/// kRanks of B a stage, 32 or 64.
template <typename T, int kStages, int kRanks>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) expand_wide(const __grid_constant__ LinearTask task) {
  constexpr int kAhead = kStages - 1;
  unsigned char* smem = ptx::dynamic_smem();
  ExpandItem& item = *reinterpret_cast<ExpandItem*>(smem);
  const int thread = threadIdx.x;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  unsigned char* my_y = smem + kYAt + (warp * 4 * 32 + lane) * 16;
  T* smem_b = reinterpret_cast<T*>(smem + kYAt + kStages * kYBytes);
  T* smem_v = smem_b + kStages * kUnitN * kRanks;
  const int v_pitch = v_pitch_of(task.rank_cap);

  bool waited = !task.follows_shrink;
  if (waited) ptx::wait_for_previous_grid();
  ptx::launch_next_grid();
  const int4 head0 = ptx::load_fresh16(task.header);
  const int wide_tiles = ptx::load_fresh4(task.header + kPlanWideTiles);
  const bool fits = head0.x == kPlanVersionValue && head0.y == task.rows && head0.z == task.groups;
  const int64_t units = int64_t{fits ? min(max(wide_tiles, 0), task.max_tiles) : 0} * task.units;
  if (thread == 0) item.unit_end = units * (blockIdx.x + 1) / gridDim.x;
  __syncthreads();
  int64_t unit = units * blockIdx.x / gridDim.x;

  int known_tile = -1;
#pragma unroll 1
  while (unit < item.unit_end) {
    // a stretch of units of one tile and slice
    const int tile_index = static_cast<int>(unit / task.units);
    const int first = static_cast<int>(unit - int64_t{tile_index} * task.units);
    const int s = task.slice_of(first);
    const LinearSlice& slice = task.slice[s];
    const int slice_end = s + 1 < task.slices ? task.slice[s + 1].unit_begin : task.units;
    const int count = static_cast<int>(min(int64_t{slice_end - first}, item.unit_end - unit));
    unit += count;
    __syncthreads();  // all are done with the stretch before
    if (tile_index != known_tile) {
      known_tile = tile_index;
      const int4 words = ptx::load_fresh16(task.tile + tile_index);
      if (thread < task.slices) {
        const LinearSlice& mine = task.slice[thread];
        const SliceEntry entry = task.table[int64_t{words.x} * task.slices + thread];
        const bool good = entry_fits(entry, entry.rank, mine.a_rows, mine.width, mine.b_elements, task.v_width);
        item.entry[thread] = entry;
        item.rank[thread] = good ? entry.rank : 0;
      }
      if (thread == 0) {
        item.pos = words.y;
        item.rows = words.z;
      }
      if (thread >= 128) item.row[thread - 128] = task.order[words.y + min(thread - 128, words.z - 1)];
      __syncthreads();
      if (task.v_form == VForm::kPacked) {
        if (thread == 0) pack_columns(item.entry, item.rank, task.slices, item.packed_col);
        __syncthreads();
      }
    }
    const SliceEntry& entry = item.entry[s];  // read again where it is needed: registers are short
    const int rank = item.rank[s];
    if (rank == 0) continue;
    const int n_begin = (first - slice.unit_begin) * kUnitN;
    const int chunks = (rank + kRanks - 1) / kRanks;
    const int v_end = PackedV::columns(rank);
    const bool v_fits = v_end <= task.rank_cap;

    // This thread's pieces of y: rows g, g + 8 of the warp's 16; 8 outputs of the first and second 32 of a unit.
    // `left`: outputs of the slice from this lane's first on.
    const auto piece_of_row = [&](int i) {  // in 16-byte pieces from y on: 32 bits hold 64 GiB
      return static_cast<uint32_t>((int64_t{item.row[warp * 16 + g + i]} * task.y_stride + slice.col + n_begin) / 8) +
             t;
    };
    const uint32_t low = piece_of_row(0), high = piece_of_row(8);
    const auto y_at = [&](uint32_t piece, int n) { return static_cast<T*>(task.y) + int64_t{piece} * 8 + n; };
    const bool has_low = warp * 16 + g < item.rows;
    const bool has_high = warp * 16 + g + 8 < item.rows;
    const int left = slice.width - n_begin - 8 * t;
    // This thread's pieces of B: one of 8 ranks of one output, or of two outputs.
    constexpr int kPieces = kRanks / 8;
    const int b_n = thread / kPieces;
    const int b_r = thread % kPieces * 8;
    T* b_to = smem_b + b_at<kRanks>(b_place(b_n), b_r);
    const bool b_aligned = ((static_cast<int>(entry.b_offset) | entry.b_stride) & 7) == 0;
    const T* b_from = static_cast<const T*>(slice.b) + entry.b_offset + int64_t{n_begin + b_n} * entry.b_stride + b_r;

    // Steps: chunks of ranks of units. Each starts the copies of the step kAhead further on, its stages of y and B.
    int next_unit = 0, next_chunk = 0, unit_now = 0, chunk = 0;
    bool have_v = false;
    float acc[8][4] = {};
#pragma unroll 1
    for (int step = -kAhead; unit_now < count; ++step) {
      if (step >= 0) {
        ptx::wait_copies<kAhead - 1>();
        __syncthreads();  // the step's copies are there for all, and all are done with the step before
      }
      if (next_unit < count) {
        const int n = next_unit * kUnitN;
        if (next_chunk == 0) {
          unsigned char* to = my_y + next_unit % kStages * kYBytes;
          if (has_low && left > n) ptx::copy_async16(to, y_at(low, n), 16);
          if (has_low && left > n + 32) ptx::copy_async16(to + 512, y_at(low, n + 32), 16);
          if (has_high && left > n) ptx::copy_async16(to + 1024, y_at(high, n), 16);
          if (has_high && left > n + 32) ptx::copy_async16(to + 1536, y_at(high, n + 32), 16);
        }
        const int stage = (step + kAhead) % kStages * kUnitN * kRanks;
        if (b_aligned) {
          T* to = b_to + stage;
          const int bytes = min(max(rank - next_chunk * kRanks - b_r, 0), 8) * 2;
#pragma unroll
          for (int i = 0; i < kRanks / 32; ++i) {  // output n + 32 stands 32 places further
            const bool real = bytes > 0 && n_begin + n + b_n + 32 * i < slice.width;
            const T* from = b_from + int64_t{32 * i} * entry.b_stride;
            ptx::copy_async16(to + 32 * i * kRanks, real ? from : static_cast<const T*>(task.y), real ? bytes : 0);
          }
        } else {
          const T* from = static_cast<const T*>(slice.b) + entry.b_offset + int64_t{n_begin + n} * entry.b_stride;
          copy_b_slowly<T, kRanks>(smem_b + stage, from + next_chunk * kRanks, entry.b_stride,
                                   slice.width - n_begin - n, rank - next_chunk * kRanks);
        }
        b_from += kRanks;
        if (++next_chunk == chunks) {
          next_chunk = 0;
          ++next_unit;
          b_from += int64_t{kUnitN} * entry.b_stride - chunks * kRanks;
        }
      }
      ptx::commit_copies();
      if (step < 0) continue;
      if (!have_v) {
        if (!waited) ptx::wait_for_previous_grid();  // v is there
        waited = true;
        const int from =
            v_fits ? 0 : chunk * kRanks;  // a rank above what the capacities promised: v anew for each step
        load_v(smem_v, task, item, s, from, v_fits ? v_end : min(from + kRanks, v_end));
        ptx::commit_copies();
        ptx::wait_copies<0>();
        __syncthreads();
        have_v = v_fits;
      }

      const bool busy = warp * 16 < item.rows;
      if (busy) {
        const T* b = smem_b + step % kStages * kUnitN * kRanks;
        const T* v = smem_v + (warp * 16 + lane % 16) * v_pitch + lane / 16 * 8 + (v_fits ? chunk * kRanks : 0);
#pragma unroll 1
        for (int half = 0; half < kRanks / 32; ++half) {
          if (half > 0 && chunk * kRanks + 32 >= rank) break;
          uint32_t v0[4], v1[4];
          ptx::load_matrices(v0, v + 32 * half);
          ptx::load_matrices(v1, v + 32 * half + 16);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const uint4 weights = *reinterpret_cast<const uint4*>(b + b_at<kRanks>(j * 8 + g, 32 * half + 8 * t));
            const uint32_t b0[2] = {weights.x, weights.y};
            const uint32_t b1[2] = {weights.z, weights.w};
            ptx::mma_m16n8k16<T>(acc[j], v0, b0);
            ptx::mma_m16n8k16<T>(acc[j], v1, b1);
          }
        }
      }
      if (++chunk < chunks) continue;
      chunk = 0;
      const int n = unit_now * kUnitN;
      const auto finish = [&](int i, T* y) {  // piece i
        float delta[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) delta[j] = acc[i % 2 * 4 + j / 2][i / 2 * 2 + j % 2];
        const uint4 base = *reinterpret_cast<const uint4*>(my_y + unit_now % kStages * kYBytes + i * 512);
        ptx::store16(y, add_scaled<T>(base, entry.scale, delta));
      };
      if (has_low && left > n) finish(0, y_at(low, n));
      if (has_low && left > n + 32) finish(1, y_at(low, n + 32));
      if (has_high && left > n) finish(2, y_at(high, n));
      if (has_high && left > n + 32) finish(3, y_at(high, n + 32));
#pragma unroll
      for (int i = 0; i < 32; ++i) acc[i / 4][i % 4] = 0.f;
      ++unit_now;
    }
    ptx::wait_copies<0>();
  }
  if (!waited) ptx::wait_for_previous_grid();  // no block may end before the kernel before has
}

template <typename T, int kStages, int kRanks>
cudaError_t launch_expand(const Device& device, const LaunchShape& shape, const LinearTask& task, cudaStream_t stream) {
  LaunchShape how = shape;
  how.smem_bytes = smem_bytes(kStages, kRanks, task.rank_cap);
  return launch<&expand_wide<T, kStages, kRanks>, smem_bytes(kStages, kRanks, kMaxRank)>(device, how, task, stream);
}

template <typename T>
cudaError_t launch_expand(const Device& device, const LaunchShape& shape, const LinearTask& task, cudaStream_t stream) {
  return task.rank_cap <= 32 ? launch_expand<T, 5, 32>(device, shape, task, stream)
                             : launch_expand<T, 3, 64>(device, shape, task, stream);
}

}  // namespace

bool wide_expand_serves(const LoraParams& p) { return fast_expand_serves(p); }

cudaError_t expand_wide_path(const LoraParams& p, bool packed, cudaStream_t stream) {
  LinearTask task = linear_task(p);
  task.tile = p.plan.wide_tile;
  task.max_tiles = static_cast<int32_t>(p.plan.max_wide_tiles);
  if (task.max_tiles == 0 || task.units == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  if (packed) {
    task.follows_shrink = true;
    task.v_form = VForm::kPacked;
    task.v = p.scratch;
    task.v_stride = static_cast<int32_t>(packed_v_width(p.v_width, p.slices.count));
  }
  // ranks of the slices are unknown here; above what an even share of v allows, v is read anew for each unit
  const int64_t ranks = divide_up(p.v_width, p.slices.count);
  task.rank_cap = static_cast<int32_t>(ranks <= 32 ? 32 : min64(divide_up(ranks, 64) * 64, kMaxRank));
  // more blocks than run at once, where there is enough to do: the last to finish then has little left
  const int64_t most = int64_t{task.max_tiles} * task.units;
  const int64_t even = divide_up(most, kUnitsPerBlock);
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(min64(most, even > device.sms * kBlocksPerSm ? even : device.sms * kBlocksPerSm)));
  shape.threads = kThreads;
  shape.overlap = true;
  return p.dtype == DType::kBFloat16 ? launch_expand<__nv_bfloat16>(device, shape, task, stream)
                                     : launch_expand<__half>(device, shape, task, stream);
}

}  // namespace polylora::cuda
