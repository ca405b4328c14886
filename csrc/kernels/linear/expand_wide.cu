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

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;
constexpr int kUnitsPerBlock = 8;

struct ExpandTask {
  LinearTask linear;
  TokenSource tokens;
  Operands operands;
  int32_t v_elements;  // that shared memory has room for
};

// Shared memory: ring, item, v.
constexpr int kStages = 5;
constexpr int kPanelBytes = 16 * 1024;
constexpr int kRing = ExpandStream<__half, kThreads, kStages, kPanelBytes>::kBytes;
constexpr int kTokenAt = kRing + static_cast<int>(sizeof(WideItem));
constexpr int kVAt = kTokenAt + kWideTileRows * static_cast<int>(sizeof(int64_t));
constexpr int kLeastV = 16 * StreamV::pitch(kMaxRank);  // elements

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) expand_wide(const __grid_constant__ ExpandTask params) {
  using Stream = ExpandStream<T, kThreads, kStages, kPanelBytes>;
  const LinearTask& task = params.linear;
  unsigned char* smem = ptx::dynamic_smem();
  WideItem& item = *reinterpret_cast<WideItem*>(smem + kRing);
  const bool is_lookup = params.tokens.ids != nullptr;
  int64_t* token = is_lookup ? reinterpret_cast<int64_t*>(smem + kTokenAt) : nullptr;
  T* smem_v = reinterpret_cast<T*>(smem + kVAt);

  ptx::launch_next_grid();
  const auto tiles_of_plan = [&] {
    const int4 head = ptx::load_fresh16(task.header);
    const int tiles = ptx::load_fresh4(task.header + kPlanWideTiles);
    const bool fits = head.x == kPlanVersionValue && head.y == task.rows && head.z == task.groups;
    return fits ? min(max(tiles, 0), task.max_tiles) : 0;
  };
  int tiles = tiles_of_plan();
  const auto units_begin = [&](int block) { return int64_t{tiles} * task.units * block / gridDim.x; };
  int64_t unit = units_begin(blockIdx.x);
  bool guess = !task.follows_shrink;
  bool waited = false;
  int known_tile = -1;
#pragma unroll 1
  while (guess || unit < units_begin(blockIdx.x + 1)) {
    // a stretch of units of one tile and slice
    const int tile_index = static_cast<int>(unit / task.units);
    __syncthreads();  // all are done with the stretch before
    if (tile_index != known_tile) {
      known_tile = tile_index;
      WideJob::read(task, item, tile_index);
      if (guess) {
        guess = false;
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
      if (is_lookup) {
        if (threadIdx.x < kWideTileRows) token[threadIdx.x] = token_of(params.tokens, item.row[threadIdx.x]);
        __syncthreads();
      }
      load_v(smem_v, pitch, task, item, s, {row, row + rows}, params.operands);
      stream.run(smem_v, pitch, token);
    }
  }
  if (!waited) ptx::wait_for_previous_grid();  // no block may end before the kernel before has
}

// `ranks`: that most slices may have.
cudaError_t expand(ExpandTask& params, const LoraParams& p, int64_t ranks, cudaStream_t stream) {
  LinearTask& task = params.linear;
  if (task.max_tiles == 0 || task.units == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  // more blocks than run at once, where there is enough to do: the last to finish then has little left
  const int64_t most = int64_t{task.max_tiles} * task.units;
  const int64_t even = divide_up(most, kUnitsPerBlock);
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(min64(most, even > device.sms * kBlocksPerSm ? even : device.sms * kBlocksPerSm)));
  shape.threads = kThreads;
  shape.overlap = true;
  // few sizes of shared memory: multiples of 64 ranks above 32
  const int64_t columns = ranks <= 32 ? 32 : min64(divide_up(ranks, 64) * 64, kMaxRank);
  const int64_t room = (device.smem_bytes - kVAt) / 2;
  params.v_elements = static_cast<int32_t>(min64(kWideTileRows * StreamV::pitch(static_cast<int>(columns)), room));
  if (params.v_elements < kLeastV) params.v_elements = kLeastV;
  shape.smem_bytes = kVAt + params.v_elements * 2;
  return p.dtype == DType::kBFloat16 ? launch<&expand_wide<__nv_bfloat16>>(device, shape, params, stream)
                                     : launch<&expand_wide<__half>>(device, shape, params, stream);
}

}  // namespace

bool wide_expand_serves(const LoraParams& p) { return fast_expand_serves(p) && p.slices.groups > 0; }

cudaError_t expand_wide_path(const LoraParams& p, int planes, cudaStream_t stream) {
  ExpandTask params{wide_task(p), {}, {}, 0};
  if (planes > 0) {
    params.linear.follows_shrink = true;
    set_planes(params.linear, p, planes);
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

void wide_embedding_scratch(const EmbeddingParams& e, int64_t& bytes) { bytes = lookup_bytes(e); }

cudaError_t embedding_wide_path(const EmbeddingParams& e, cudaStream_t stream) {
  ExpandTask params{wide_task(e.lora), token_source(e), lookup_operands(e), 0};
  if (e.vocab < 1) return cudaSuccess;  // no token is known, and A may be empty
  set_lookup(params.linear, e);
  params.linear.follows_shrink = true;
  const cudaError_t error = embedding_lookup_path(e, stream);
  return error == cudaSuccess ? expand(params, e.lora, embedding_rank(e), stream) : error;
}

}  // namespace polylora::cuda
