// out[t] = sum_j w[t, j] * y2[t, j] + delta[t, j], deltas already weighted (moe_expand.cu): a stream over y2 and the
// deltas.
//
// A block takes a token and up to 1024 outputs, a thread 8 of them; j ascends, in fp32, with one rounding. Four pairs
// are on their way at once. What the kernel before writes are the deltas alone: y2 of the first pairs is asked for
// before it has ended.
#include "common/fragments.cuh"
#include "common/launch.cuh"
#include "linear/task.cuh"
#include "moe/pairs.cuh"
#include "moe/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 4;

struct SumTask {
  DownReduceParams d;
  const void* delta;  // [rows, n_end - n_begin]
  int32_t n_begin, n_end;
};

template <typename T>
__device__ __forceinline__ void add_weighted(float (&sum)[8], uint4 values, float weight) {
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i], T{});
    sum[2 * i] = fmaf(weight, pair.x, sum[2 * i]);
    sum[2 * i + 1] = fmaf(weight, pair.y, sum[2 * i + 1]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) moe_sum(const __grid_constant__ SumTask task) {
  const DownReduceParams& d = task.d;
  TokenPairs& pairs = *reinterpret_cast<TokenPairs*>(ptx::dynamic_smem());
  const int64_t token = blockIdx.x;
  const int n = task.n_begin + static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * 8;
  const bool inside = n < task.n_end;
  const int delta_stride = task.n_end - task.n_begin;
  ptx::launch_next_grid();
  bool waited = false;
  float sum[8] = {};
#pragma unroll 1
  for (int first = 0; first < d.top_k; first += kPairs) {
    if (first > 0) __syncthreads();
    load_pairs(d, token, first, pairs);
    __syncthreads();
    const int count = min(d.top_k - first, kPairs);
#pragma unroll 1
    for (int base = 0; base < count; base += kAtOnce) {
      uint4 y[kAtOnce], delta[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = base + i < count ? pairs.row[base + i] : -1;
        y[i] = {0, 0, 0, 0};
        if (row >= 0 && inside)
          y[i] = ptx::load16(static_cast<const T*>(d.lora.y) + row * d.lora.y_stride + output_col(d.lora.slices, 0, n));
      }
      if (!waited) ptx::wait_for_previous_grid();
      waited = true;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool has = base + i < count && pairs.row[base + i] >= 0 && pairs.group[base + i] >= 0;
        delta[i] = {0, 0, 0, 0};
        if (has && inside) {
          delta[i] = ptx::load16(static_cast<const T*>(task.delta) + int64_t{pairs.row[base + i]} * delta_stride + n -
                                 task.n_begin);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (base + i >= count || pairs.row[base + i] < 0) continue;
        add_weighted<T>(sum, y[i], d.y_weighted ? 1.f : pairs.weight[base + i]);
        add_weighted<T>(sum, delta[i], 1.f);
      }
    }
  }
  if (!waited) ptx::wait_for_previous_grid();
  if (!inside) return;
  uint4 out;
  out.x = pack(sum[0], sum[1], T{});
  out.y = pack(sum[2], sum[3], T{});
  out.z = pack(sum[4], sum[5], T{});
  out.w = pack(sum[6], sum[7], T{});
  ptx::store16(static_cast<T*>(d.out) + token * d.out_stride + n, out);
}

}  // namespace

cudaError_t moe_sum_path(const DownReduceParams& d, const void* delta, int32_t n_begin, int32_t n_end,
                         cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const SumTask task{d, delta, n_begin, n_end};
  LaunchShape shape;
  // a warp at least: it looks the pairs up
  const int64_t wanted = divide_up(divide_up(n_end - n_begin, 8), 32) * 32;
  shape.threads = static_cast<int>(min64(wanted, kThreads));
  shape.grid = dim3(static_cast<unsigned>(d.tokens),
                    static_cast<unsigned>(divide_up(n_end - n_begin, int64_t{shape.threads} * 8)));
  shape.smem_bytes = sizeof(TokenPairs);
  shape.overlap = true;
  return d.lora.dtype == DType::kBFloat16 ? launch<&moe_sum<__nv_bfloat16>>(device, shape, task, stream)
                                          : launch<&moe_sum<__half>>(device, shape, task, stream);
}

}  // namespace polylora::cuda
