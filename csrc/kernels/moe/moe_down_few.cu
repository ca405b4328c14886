// expand of down and the sum over a token's experts for few tokens: out[t] = sum_j w[t, j] * (y2[t, j] + delta).
//
// A block takes a token and a part of the outputs and walks the token's pairs: no atomics, one rounding, one write, and
// deltas never leave registers. A few lanes share an output, 8 ranks each, so that a warp reads whole rows of B, those
// of eight pairs at once. B of a pair is read for its token alone: where many tokens share groups moe_expand.cu reads
// less. The planes of v are the work of the kernel before; what else is read, is asked for before it has ended.
#include "common/dtype.cuh"
#include "common/fragments.cuh"
#include "common/launch.cuh"
#include "linear/task.cuh"
#include "moe/pairs.cuh"
#include "moe/paths.h"
#include "moe/stream.cuh"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPairs = kFewTokenPairs;
constexpr int kAtOnce = 8;  // pairs

struct FewTask {
  DownReduceParams d;
  PairSource pairs;
  StreamTask stream;
  int32_t lanes_log2;  // that share an output
  int32_t v_pitch;     // of v in shared memory: ranks that an entry can have, a multiple of 8
};

struct FewSmem {
  TokenPair pair[kPairs];
  SliceEntry entry[kPairs];
  // behind: v of the pairs, [top_k][v_pitch]
};

template <typename T>
__device__ __forceinline__ float dot8(uint4 b, const float* v) {
  const uint32_t words[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i], T{});
    sum = fmaf(pair.x, v[2 * i], sum);
    sum = fmaf(pair.y, v[2 * i + 1], sum);
  }
  return sum;
}

/// Whether ranks r to r + 7 of an entry's B can be read as one piece.
__device__ __forceinline__ bool is_piece(const SliceEntry& entry, int r) {
  return r + 8 <= entry.rank && entry.b_stride % 8 == 0 && entry.b_offset % 8 == 0;  // B itself is aligned
}

template <typename T>
__global__ void __launch_bounds__(kThreads) moe_down_few(const __grid_constant__ FewTask task) {
  const DownReduceParams& d = task.d;
  const LoraParams& p = d.lora;
  const StreamTask& stream = task.stream;
  FewSmem& smem = *reinterpret_cast<FewSmem*>(ptx::dynamic_smem());
  float* smem_v = reinterpret_cast<float*>(ptx::dynamic_smem() + sizeof(FewSmem));
  const int64_t token = blockIdx.x;
  const int lanes = 1 << task.lanes_log2;
  const int sub = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int outputs = kThreads >> task.lanes_log2;  // of the block at once
  const int chunks = (stream.width + outputs - 1) / outputs;
  const int first_chunk = static_cast<int>(int64_t{chunks} * blockIdx.y / gridDim.y);
  const int last_chunk = static_cast<int>(int64_t{chunks} * (blockIdx.y + 1) / gridDim.y);

  ptx::launch_next_grid();
  if (threadIdx.x < kPairs) {
    const int j = static_cast<int>(threadIdx.x);
    const TokenPair pair = j < d.top_k ? load_pair(task.pairs, token * d.top_k + j) : TokenPair{-1, kNoAdapter, 0.f};
    smem.pair[j] = pair;
    smem.entry[j] = pair.group >= 0 ? entry_of(p, pair.group, 0) : SliceEntry{};
  }
  __syncthreads();
  bool waited = false;
#pragma unroll 1
  for (int chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int n = chunk * outputs + (static_cast<int>(threadIdx.x) >> task.lanes_log2);
    const bool inside = n < stream.width;
    float base = 0.f, delta = 0.f;
#pragma unroll 1
    for (int first = 0; first < d.top_k; first += kAtOnce) {
      uint4 b[kAtOnce];
      uint32_t y[kAtOnce];  // bits: to convert is to wait
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int j = first + i;
        const bool has = j < d.top_k && inside && smem.pair[j].row >= 0;
        const SliceEntry& entry = smem.entry[min(j, kPairs - 1)];
        const T* b_row = static_cast<const T*>(p.slices.b[0]) + entry.b_offset + int64_t{n} * entry.b_stride;
        b[i] = {0, 0, 0, 0};
        if (has && is_piece(entry, 8 * sub)) b[i] = ptx::load_weights16(b_row + 8 * sub);
        y[i] = 0;
        if (has && sub == 0) {
          const int64_t at = int64_t{smem.pair[j].row} * p.y_stride + output_col(p.slices, 0, n);
          y[i] = static_cast<const uint16_t*>(p.y)[at];
        }
      }
      if (!waited) {
        waited = true;
        ptx::wait_for_previous_grid();  // the planes are there
        // v, times scale and weight
        constexpr int kThreadsAPair = 8;
#pragma unroll 1
        for (int j = static_cast<int>(threadIdx.x) / kThreadsAPair; j < d.top_k; j += kThreads / kThreadsAPair) {
          const SliceEntry& entry = smem.entry[j];
          const float scale = entry.scale * smem.pair[j].weight;
          const float* from = stream.plane + int64_t{smem.pair[j].row} * stream.plane_width;
#pragma unroll 2
          for (int r = static_cast<int>(threadIdx.x) % kThreadsAPair; r < entry.rank; r += kThreadsAPair) {
            float sum = 0.f;
#pragma unroll 4
            for (int i = 0; i < stream.planes; ++i) sum += from[i * stream.plane_elements + r];
            smem_v[j * task.v_pitch + r] = sum * scale;
          }
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int j = first + i;
        if (j >= d.top_k || smem.pair[j].row < 0) continue;
        if (sub == 0) base = fmaf(d.y_weighted ? 1.f : smem.pair[j].weight, unpack(y[i], T{}).x, base);
        const SliceEntry& entry = smem.entry[j];
        const float* v = smem_v + j * task.v_pitch;
        int r = 8 * sub;
        if (is_piece(entry, r)) {
          delta += dot8<T>(b[i], v + r);
          r += 8 * lanes;
        }
        const T* b_row = static_cast<const T*>(p.slices.b[0]) + entry.b_offset + int64_t{n} * entry.b_stride;
#pragma unroll 1
        for (; r < entry.rank && inside; r += 8 * lanes) {
          if (is_piece(entry, r)) {
            delta += dot8<T>(ptx::load_weights16(b_row + r), v + r);
            continue;
          }
#pragma unroll 1
          for (int e = r; e < min(r + 8, entry.rank); ++e) delta = fmaf(to_float(b_row[e]), v[e], delta);
        }
      }
    }
    for (int step = lanes / 2; step > 0; step /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, step);
    if (!waited) {  // no pair at all: yet out may still be in use
      waited = true;
      ptx::wait_for_previous_grid();
    }
    if (inside && sub == 0) {
      static_cast<T*>(d.out)[token * d.out_stride + n] = from_float<T>(base + delta);
    }
  }
  if (!waited) ptx::wait_for_previous_grid();
}

}  // namespace

cudaError_t moe_down_few_path(const DownReduceParams& d, int planes, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  FewTask task{d, pair_source(d), stream_task(d.lora, planes), 0, 0};
  task.v_pitch = static_cast<int32_t>(divide_up(min64(d.lora.v_width, kMaxRank), 8) * 8);
  const int64_t rank = even_rank(d.lora);
  while (task.lanes_log2 < 3 && rank > 8 << task.lanes_log2) ++task.lanes_log2;
  constexpr int kBlocksPerSm = 8;
  const int64_t chunks = divide_up(task.stream.width, kThreads >> task.lanes_log2);
  const int64_t parts = min64(chunks, divide_up(kBlocksPerSm * device.sms, d.tokens));
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(d.tokens), static_cast<unsigned>(parts));
  shape.threads = kThreads;
  shape.smem_bytes = sizeof(FewSmem) + int64_t{d.top_k} * task.v_pitch * int64_t{sizeof(float)};
  shape.overlap = true;
  return dispatch_16_bit(d.lora.dtype, [&](auto element) {
    return launch<&moe_down_few<decltype(element)>>(device, shape, task, stream);
  });
}

}  // namespace polylora::cuda
