// expand on its own, sm_80 and later: the public op, and the second half of linear where linear_wide.cu does not run
// and of embedding.
//
// The units of all wide tiles are shared evenly by the blocks, each a range of neighbours, walked by ExpandStream.
// After our own first half, all but v may be read before that has ended: it lets this kernel start only when all that
// came before it is done. Else tile, table and rows are read before the kernel before has ended, and compared after it.
#include "linear/expand_stream.cuh"
#include "linear/paths.h"

namespace polylora::cuda {
namespace {

// How the blocks share an SM. Side by side, the warps of a large one take whole lines of y: what calls of many outputs
// need to be at the memory's speed. H200, 8192 rows, 4096 outputs, r16 and r64, small and large, us: 52.6
// and 47.0, 60.2 and 52.9; 512 rows, 6144 outputs: 7.9 and 9.2.
struct SmallBlock {
  static constexpr int kThreads = 256, kPerSm = 2, kPanelBytes = 16 * 1024;
};
struct LargeBlock {
  static constexpr int kThreads = 512, kPerSm = 1, kPanelBytes = 32 * 1024;
};
constexpr int64_t kManyUnits = 2048;  // of all tiles
constexpr int kGranules = 2;          // of y, a warp

struct ExpandTask {
  LinearTask linear;
  TokenSource tokens;
  Operands operands;
  int32_t v_elements;  // that shared memory has room for
};

// Shared memory: ring, item, tokens, v.
template <typename Block>
struct ExpandSmem {
  static constexpr int kItemAt = ExpandStream<__half, Block::kThreads, kGranules, Block::kPanelBytes>::kBytes;
  static constexpr int kTokenAt = kItemAt + static_cast<int>(sizeof(WideItem));
  static constexpr int kVAt = kTokenAt + kWideTileRows * static_cast<int>(sizeof(int64_t));
};
constexpr int kLeastV = 16 * StreamV::pitch(kMaxRank);  // elements

template <typename T, typename Block>
__global__ void __launch_bounds__(Block::kThreads, Block::kPerSm)
    expand_wide(const __grid_constant__ ExpandTask params) {
  using Stream = ExpandStream<T, Block::kThreads, kGranules, Block::kPanelBytes>;
  using Smem = ExpandSmem<Block>;
  const LinearTask& task = params.linear;
  unsigned char* smem = ptx::dynamic_smem();
  WideItem& item = *reinterpret_cast<WideItem*>(smem + Smem::kItemAt);
  const auto is_lookup = [&] { return params.tokens.ids != nullptr; };
  T* smem_v = reinterpret_cast<T*>(smem + Smem::kVAt);

  ptx::launch_next_grid();
  const auto tiles_of_plan = [&] {
    const int4 head = ptx::load_fresh16(task.header);
    const int tiles = ptx::load_fresh4(task.header + task.tiles_word);
    const bool fits = head.x == kPlanVersionValue && head.y == task.rows && head.z == task.groups;
    return fits ? min(max(tiles, 0), task.max_tiles) : 0;
  };
  int tiles = tiles_of_plan();
  const auto units_begin = [&](int block) { return int64_t{tiles} * task.units * block / gridDim.x; };
  int64_t unit = units_begin(blockIdx.x);
  bool waited = false;
  const auto is_guess = [&] { return !waited && !task.follows_own; };  // what was read
  int known_tile = -1;
#pragma unroll 1
  while (is_guess() || unit < units_begin(blockIdx.x + 1)) {
    // a stretch of units of one tile and slice
    const int tile_index = static_cast<int>(unit / task.units);
    __syncthreads();  // all are done with the stretch before
    if (tile_index != known_tile) {
      known_tile = tile_index;
      WideJob::read(task, item, tile_index);
      if (is_guess()) {
        waited = true;
        ptx::wait_for_previous_grid();
        if (__syncthreads_or(WideJob::differs(task, item) ||
                             item.tiles != tiles)) {  // threads may have read different headers
          tiles = tiles_of_plan();
          unit = units_begin(blockIdx.x);
          known_tile = -1;
          continue;
        }
        if (unit >= units_begin(blockIdx.x + 1)) break;
      }
    }
    const int first = static_cast<int>(unit - int64_t{tile_index} * task.units);
    const int s = task.slice_of(first);
    const int slice_end = s + 1 < task.slices ? task.slice[s + 1].unit_begin : task.units;
    const int count = static_cast<int>(min(int64_t{slice_end - first}, units_begin(blockIdx.x + 1) - unit));
    unit += count;
    if (item.rank[s] == 0) continue;
    // v of as many rows at a time as there is room for: nearly always all
    const int pitch = StreamV::pitch(StreamV::columns(item.rank[s]));
    const int rows = min(params.v_elements / pitch & ~15, kWideTileRows);
#pragma unroll 1
    for (int row = 0; row < item.rows; row += rows) {
      if (row > 0) __syncthreads();  // all are done with the ring and v
      Stream stream(task, item, smem);
      stream.set(s, first - task.slice[s].unit_begin, count, {row, row + rows});
      stream.start();
      if (!waited) {
        waited = true;
        ptx::wait_for_previous_grid();  // v is there
      }
      int64_t* token = is_lookup() ? reinterpret_cast<int64_t*>(smem + Smem::kTokenAt) : nullptr;
      if (is_lookup()) {
        if (threadIdx.x < kWideTileRows) token[threadIdx.x] = token_of(params.tokens, item.row[threadIdx.x]);
        __syncthreads();
      }
      load_v<T, true>(smem_v, pitch, task, item, s, {row, row + rows}, params.operands);
      stream.run(smem_v, pitch, token);
    }
  }
  if (!waited) ptx::wait_for_previous_grid();  // no block may end before the kernel before has
}

// Of rows of v for so many ranks, in few sizes of shared memory: multiples of 64 ranks above 32.
int v_pitch(int64_t ranks) {
  return StreamV::pitch(static_cast<int>(ranks <= 32 ? 32 : min64(divide_up(ranks, 64) * 64, kMaxRank)));
}

// `ranks`: that most slices may have.
template <typename T, typename Block>
cudaError_t expand(const Device& device, ExpandTask& params, int64_t ranks, cudaStream_t stream) {
  LaunchShape shape;
  const int64_t units = int64_t{params.linear.max_tiles} * params.linear.units;
  shape.grid = dim3(static_cast<unsigned>(min64(units, device.sms * Block::kPerSm)));
  shape.threads = Block::kThreads;
  shape.overlap = true;
  constexpr int kVAt = ExpandSmem<Block>::kVAt;
  const int64_t room = (device.smem_bytes - kVAt) / 2;
  params.v_elements = static_cast<int32_t>(min64(kWideTileRows * v_pitch(ranks), room));
  if (params.v_elements < kLeastV) params.v_elements = kLeastV;
  shape.smem_bytes = kVAt + params.v_elements * 2;
  return launch<&expand_wide<T, Block>>(device, shape, params, stream);
}

template <typename T>
cudaError_t expand(ExpandTask& params, int64_t ranks, cudaStream_t stream) {
  const LinearTask& task = params.linear;
  if (task.max_tiles == 0 || task.units == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const bool many = int64_t{task.max_tiles} * task.units >= kManyUnits;
  // a tile's v in pieces would bring B again for each, and leave warps without rows
  const int64_t large = ExpandSmem<LargeBlock>::kVAt + int64_t{kWideTileRows} * v_pitch(ranks) * 2;
  return many && device.smem_bytes >= large ? expand<T, LargeBlock>(device, params, ranks, stream)
                                            : expand<T, SmallBlock>(device, params, ranks, stream);
}

cudaError_t expand(ExpandTask& params, const LoraParams& p, int64_t ranks, cudaStream_t stream) {
  return dispatch_16_bit(p.dtype, [&](auto element) { return expand<decltype(element)>(params, ranks, stream); });
}

}  // namespace

bool wide_expand_serves(const LoraParams& p) { return fast_expand_serves(p) && p.slices.groups > 0; }

cudaError_t expand_wide_path(const LoraParams& p, int planes, cudaStream_t stream) {
  ExpandTask params{wide_task(p), {}, {}, 0};
  if (planes > 0) {
    params.linear.follows_own = true;
    set_planes(params.linear, p, planes, p.rows);
  }
  return expand(params, p, even_rank(p), stream);
}

bool wide_embedding_serves(const EmbeddingParams& e) {
  const LoraParams& p = e.lora;
  if (!wide_expand_serves(p)) return false;
  for (int s = 0; s < p.slices.count; ++s) {
    if (p.slices.a_stride[s] > INT32_MAX) return false;
  }
  return true;
}

void mma_embedding_scratch(const EmbeddingParams& e, int64_t& bytes) { bytes = lookup_bytes(e); }

cudaError_t embedding_mma_path(const EmbeddingParams& e, cudaStream_t stream) {
  ExpandTask params{wide_task(e.lora), token_source(e), lookup_operands(e), 0};
  if (e.vocab < 1) return cudaSuccess;  // no token is known, and A may be empty
  set_lookup(params.linear, e);
  params.linear.follows_own = true;
  const cudaError_t error = embedding_lookup_path(e, stream);
  return error == cudaSuccess ? expand(params, e.lora, embedding_rank(e), stream) : error;
}

}  // namespace polylora::cuda
