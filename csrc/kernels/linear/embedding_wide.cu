// embedding for many rows in one launch, sm_90: a cluster of blocks takes a wide tile.
//
//   every block:  tokens and v of its part of the tile's rows, looked up once and sent to all blocks of the cluster
//                 the first of y and of B on their way meanwhile
//                 its part of the outputs                                                           (ExpandStream)
//
// Where A is [ranks, vocabulary] every element of v is a sector of its own; looked up by each block that expands it, v
// would be as many sectors as y. What the block works on is read before the kernel before has ended, and compared after
// it (as in linear_cluster.cu).
#include "linear/exchange.cuh"
#include "linear/paths.h"

// what only 9.0a compiles would count as unused in the passes for other devices
#pragma nv_diag_suppress 177

namespace polylora::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kGranules = 2;  // of y, a warp
constexpr int kPanelBytes = 32 * 1024;
constexpr int kMaxParts = 16;

struct LookupTask {
  LinearTask linear;
  TokenSource tokens;
};

// Shared memory: the stream's ring, item, tokens, v, its barrier.
constexpr int kItemAt = ExpandStream<__half, kThreads, kGranules, kPanelBytes>::kBytes;
constexpr int kTokenAt = kItemAt + static_cast<int>(sizeof(WideItem));
constexpr int kVAt = kTokenAt + kWideTileRows * static_cast<int>(sizeof(int64_t));
constexpr int kBarrierAt = kVAt + kWideTileRows * StreamV::pitch(kMaxRank) * 2;
constexpr int kSmem = kBarrierAt + 16;
static_assert(kSmem <= 227 * 1024 && kVAt % 16 == 0);

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) embedding_wide(const __grid_constant__ LookupTask params) {
#if POLYLORA_HAS_WGMMA
  using Stream = ExpandStream<T, kThreads, kGranules, kPanelBytes>;
  static_assert(sizeof(ByteBarrier) == kSmem - kBarrierAt);
  const LinearTask& task = params.linear;
  unsigned char* smem = ptx::dynamic_smem();
  WideItem& item = *reinterpret_cast<WideItem*>(smem + kItemAt);
  int64_t* token = reinterpret_cast<int64_t*>(smem + kTokenAt);
  T* v = reinterpret_cast<T*>(smem + kVAt);
  ByteBarrier& v_arrived = *reinterpret_cast<ByteBarrier*>(smem + kBarrierAt);
  const int parts = static_cast<int>(ptx::cluster_size());
  const int part = static_cast<int>(ptx::cluster_rank());

  ptx::launch_next_grid();
  if (threadIdx.x == 0) v_arrived.init();
  WideJob::read(task, item, blockIdx.x / parts);
  bool guess = true;
  int s = 0;
#pragma unroll 1
  while (true) {
    // a slice of a tile
    while (item.index < item.tiles && s < task.slices && item.rank[s] == 0) ++s;
    const bool more = item.index < item.tiles && s < task.slices;
    if (guess) ptx::wait_for_previous_grid();
    const bool differs = guess && WideJob::differs(task, item);
    Stream stream(task, item, smem);
    if (more) {
      if (threadIdx.x < kWideTileRows) token[threadIdx.x] = token_of(params.tokens, item.row[threadIdx.x]);
      const int units = (task.slice[s].width + kUnitN - 1) / kUnitN;
      const int first = units * part / parts;
      stream.set(s, first, units * (part + 1) / parts - first, {0, kWideTileRows});
      stream.start();
    }
    const bool again = __syncthreads_or(differs);  // the tokens are there
    guess = false;
    if (again) {
      ptx::wait_copies<0>();
      __syncthreads();
      WideJob::read(task, item, blockIdx.x / parts);
      s = 0;
      continue;
    }
    if (more) {
      const int columns = StreamV::columns(item.rank[s]);
      const int pitch = StreamV::pitch(columns);
      if (threadIdx.x == 0) v_arrived.expect(static_cast<uint32_t>(item.rows * columns * 2));
      ptx::cluster_arrive();  // this block is done with v of the slice before
      const int first_row = item.rows * part / parts;
      const int pieces = columns / 8;  // a row
      const int count = (item.rows * (part + 1) / parts - first_row) * pieces;
      const Lookup lookup(task.slice[s], item.entry[s].a_row, item.rank[s], params.tokens.token_major);
      int base = 0;
#pragma unroll 1
      do {
        const int i = base + static_cast<int>(threadIdx.x);
        const int row = first_row + i / pieces;
        const int piece = i % pieces;
        uint4 bits{0, 0, 0, 0};
        if (i < count) bits = lookup.load_piece(token[row], piece);
        if (base == 0) ptx::cluster_wait();
        const T* to = v + row * pitch + piece * 8;
#pragma unroll 1
        for (int p = 0; i < count && p < parts; ++p) {
          ptx::store_async(ptx::map_to_rank(to, p), bits, ptx::map_to_rank(&v_arrived.barrier, p));
        }
        base += kThreads;
      } while (base < count);
      v_arrived.wait();
      stream.run(v, pitch, token);
      ++s;
      __syncthreads();  // all are done with ring and tokens
      continue;
    }
    const int next = item.index + static_cast<int>(gridDim.x) / parts;
    if (next >= item.tiles) break;
    __syncthreads();
    WideJob::read(task, item, next);
    s = 0;
  }
#else
  __trap();  // linear.cu sends no other device here
#endif
}

}  // namespace

cudaError_t embedding_wide_path(const EmbeddingParams& e, cudaStream_t stream) {
  const LoraParams& p = e.lora;
  LookupTask params{wide_task(p), token_source(e)};
  LinearTask& task = params.linear;
  if (e.vocab < 1 || task.max_tiles == 0 || task.units == 0) return cudaSuccess;  // A may be empty
  set_lookup(task, e);
  Device device;
  WideClusters clusters{};
  cudaError_t error = current_device(device);
  if (error == cudaSuccess) {  // two blocks at least: st.async is illegal without a cluster
    error = best_clusters<&embedding_wide<__nv_bfloat16>>(expected_wide_tiles(p, PartialTiles::kOnAverage), device,
                                                          kThreads, kSmem, 2, kMaxParts, clusters);
  }
  if (error != cudaSuccess) return error;
  const LaunchShape shape = cluster_shape(task, clusters, kThreads, kSmem);
  return dispatch_16_bit(
      p.dtype, [&](auto element) { return launch<&embedding_wide<decltype(element)>>(device, shape, params, stream); });
}

}  // namespace polylora::cuda
