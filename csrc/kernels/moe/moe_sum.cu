// out[t] = sum_j w[t, j] * y2[t, j] + delta[t, j], deltas already weighted (moe_expand.cu): a stream over y2 and the
// deltas.
//
// A thread takes 8 outputs of a token, or 2 where there are few, and all of its pairs, j ascending, in fp32, with one
// rounding. Up to 12 pairs are on their way at once. A lane of each warp looks up what is known of a pair; where rows
// are pairs, y2 is asked for before that is there, and in short calls the deltas are, too. Where the kernel before is
// moe_expand.cu of the same call, what it writes are the deltas alone: y2 of the first pairs is asked for before it has
// ended. Short calls wait for the instructions of their few warps: those of a pair are what they are made of.
#include "common/fragments.cuh"
#include "common/launch.cuh"
#include "linear/task.cuh"
#include "moe/pairs.cuh"
#include "moe/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 128;

struct SumTask {
  PairSource pairs;
  const void* y2;  // of output 0
  const void* delta;
  void* out;
  int64_t y_stride, delta_stride, out_stride;
  int32_t outputs, top_k;
  bool y_weighted;
  bool follows_own;  // the kernel before is of the same call
  bool is_short;
};

// 16-bit elements of a thread.
template <int kOutputs>
struct Piece {
  uint32_t words[kOutputs / 2];
};

template <int kOutputs>
__device__ __forceinline__ Piece<kOutputs> load_piece(const void* from) {
  if constexpr (kOutputs == 8) {
    const uint4 bits = ptx::load16(from);
    return {{bits.x, bits.y, bits.z, bits.w}};
  } else {
    return {{ptx::load4(from)}};
  }
}

// y2 is not to drive the deltas out of L2: where they do not stay, they are written to memory, too.
template <int kOutputs>
__device__ __forceinline__ Piece<kOutputs> load_base(const void* from) {
  if constexpr (kOutputs == 8) {
    const uint4 bits = ptx::load_once16(from);
    return {{bits.x, bits.y, bits.z, bits.w}};
  } else {
    return load_piece<kOutputs>(from);
  }
}

template <typename T, int kOutputs>
__device__ __forceinline__ void add_weighted(float (&sum)[kOutputs], const Piece<kOutputs>& values, float weight) {
#pragma unroll
  for (int i = 0; i < kOutputs / 2; ++i) {
    const float2 pair = unpack(values.words[i], T{});
    sum[2 * i] = fmaf(weight, pair.x, sum[2 * i]);
    sum[2 * i + 1] = fmaf(weight, pair.y, sum[2 * i + 1]);
  }
}

template <typename T, int kOutputs, bool kMapped>
__global__ void __launch_bounds__(kThreads) moe_sum(const __grid_constant__ SumTask task) {
  constexpr int kAtOnce = kOutputs == 8 ? 8 : 12;
  constexpr uint32_t kAll = 0xffffffffu;
  const int64_t token = blockIdx.x;
  const int n = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kOutputs;
  const int safe_n = min(n, task.outputs - kOutputs);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const T* y2 = static_cast<const T*>(task.y2) + safe_n;
  const T* deltas = static_cast<const T*>(task.delta) + safe_n;
  if (task.follows_own) ptx::launch_next_grid();  // else see moe_act.cu
  bool waited = !task.follows_own;
  if (waited) ptx::wait_for_previous_grid();
  float sum[kOutputs] = {};
#pragma unroll 1
  for (int first = 0; first < task.top_k; first += kAtOnce) {
    const int64_t pair = token * task.top_k + first;
    const int count = min(task.top_k - first, kAtOnce);
    const TokenPair mine = load_pair(task.pairs, pair + min(lane, count - 1));
    // of pair i: a row that is there, whether it counts or not
    const auto at_row = [&](const T* from, int64_t stride, int i, const T* last) {
      if (kMapped) return from + max(__shfl_sync(kAll, mine.row, i), 0) * stride;
      return i == 0 ? from + pair * stride : last + stride;
    };
    Piece<kOutputs> y[kAtOnce], delta[kAtOnce];
    const T* at = nullptr;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      at = at_row(y2, task.y_stride, i, at);
      y[i] = {};
      if (i < count) y[i] = load_base<kOutputs>(at);
    }
    if (!waited) ptx::wait_for_previous_grid();
    waited = true;
    const auto those_active = [&] { return __ballot_sync(kAll, lane < count && mine.row >= 0 && mine.group >= 0); };
    const uint32_t wanted = task.is_short ? (1u << count) - 1 : those_active();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      at = at_row(deltas, task.delta_stride, i, at);
      delta[i] = {};
      if (wanted >> i & 1) delta[i] = load_piece<kOutputs>(at);
    }
    const uint32_t counts = __ballot_sync(kAll, lane < count && mine.row >= 0);
    const uint32_t active = those_active();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float weight = task.y_weighted ? 1.f : __shfl_sync(kAll, mine.weight, i);
      if (counts >> i & 1) add_weighted<T>(sum, y[i], weight);
      if (active >> i & 1) add_weighted<T>(sum, delta[i], 1.f);
    }
  }
  if (!waited) ptx::wait_for_previous_grid();  // no pair at all: yet out may still be in use
  if (n >= task.outputs) return;
  T* out = static_cast<T*>(task.out) + token * task.out_stride + n;
  uint32_t words[kOutputs / 2];
#pragma unroll
  for (int i = 0; i < kOutputs / 2; ++i) words[i] = pack(sum[2 * i], sum[2 * i + 1], T{});
  if constexpr (kOutputs == 8) {
    ptx::store16(out, uint4{words[0], words[1], words[2], words[3]});
  } else {
    *reinterpret_cast<uint32_t*>(out) = words[0];
  }
}

template <int kOutputs>
cudaError_t launch_sum(const Device& device, const DownReduceParams& d, const SumTask& task, cudaStream_t stream) {
  LaunchShape shape;
  const int64_t wanted = divide_up(divide_up(task.outputs, kOutputs), 32) * 32;
  shape.threads = static_cast<int>(min64(wanted, kThreads));
  shape.grid = dim3(static_cast<unsigned>(d.tokens),
                    static_cast<unsigned>(divide_up(task.outputs, int64_t{shape.threads} * kOutputs)));
  shape.overlap = true;
  const bool mapped = task.pairs.pair_pos != nullptr;
  return dispatch_16_bit(d.lora.dtype, [&](auto element) {
    using T = decltype(element);
    return mapped ? launch<&moe_sum<T, kOutputs, true>>(device, shape, task, stream)
                  : launch<&moe_sum<T, kOutputs, false>>(device, shape, task, stream);
  });
}

// Outputs [n_begin, n_end); `delta` begins with the first of them.
cudaError_t sum_outputs(const DownReduceParams& d, const void* delta, int64_t delta_stride, int32_t n_begin,
                        int32_t n_end, bool follows_own, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t outputs = n_end - n_begin;
  SumTask task{};
  task.pairs = pair_source(d);
  task.delta = delta;
  task.y_stride = d.lora.y_stride;
  task.delta_stride = delta_stride;
  task.out_stride = d.out_stride;
  task.y2 = static_cast<const uint16_t*>(d.lora.y) + d.lora.slices.col[0] + n_begin;
  task.out = static_cast<uint16_t*>(d.out) + n_begin;
  task.outputs = static_cast<int32_t>(outputs);
  task.top_k = d.lora.rows > 0 ? d.top_k : 0;
  task.y_weighted = d.y_weighted;
  task.follows_own = follows_own;
  task.is_short = 2 * d.lora.rows * outputs <= kShortDeltas;
  const bool few = d.tokens * outputs / 8 <= int64_t{device.sms} * kThreads;
  return (few ? launch_sum<2> : launch_sum<8>)(device, d, task, stream);
}

}  // namespace

cudaError_t moe_sum_path(const DownReduceParams& d, const void* delta, int32_t n_begin, int32_t n_end,
                         cudaStream_t stream) {
  return sum_outputs(d, delta, n_end - n_begin, n_begin, n_end, true, stream);
}

cudaError_t moe_add_reduce_path(const DownReduceParams& d, cudaStream_t stream) {
  return sum_outputs(d, d.delta, d.delta_stride, 0, d.lora.slices.width[0], false, stream);
}

}  // namespace polylora::cuda
