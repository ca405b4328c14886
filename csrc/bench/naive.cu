#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "naive.cuh"
#include "naive.h"

namespace polylora::bench {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct NaiveArgs {
  LoraParams lora;
  const int32_t* row_adapter;  // [rows] the group of each; the plan is not read
  const int32_t* token_ids;    // [rows]; null: x is multiplied
  int64_t token_stride;        //
  int64_t rank_stride;         //
  int64_t v_pitch;             //
};

// A warp takes one (row, column of v); columns that no slice of the row's adapter has are left alone.
template <typename T, typename Sum>
__global__ void __launch_bounds__(kThreads) naive_shrink(const NaiveArgs args, Sum* v) {
  const LoraParams& p = args.lora;
  const int64_t row = blockIdx.x;
  const int32_t adapter = args.row_adapter[row];
  const int column = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (adapter < 0) return;
  for (int s = 0; s < p.slices.count; ++s) {
    const SliceEntry entry = p.slices.table[int64_t{adapter} * p.slices.count + s];
    const int j = column - entry.v_col;
    if (j < 0 || j >= entry.rank) continue;
    const T* a = static_cast<const T*>(p.slices.a[s]) + int64_t{entry.a_row} * p.slices.a_stride[s];
    Sum sum = 0;
    if (args.token_ids) {
      sum = widen(a[args.token_ids[row] * args.token_stride + j * args.rank_stride]);
    } else {
      const T* x = static_cast<const T*>(p.x) + x_row(p, row) * p.x_stride;
      a += j * p.slices.a_stride[s];
      for (int64_t k = lane; k < p.k; k += 32) sum += static_cast<Sum>(widen(x[k])) * static_cast<Sum>(widen(a[k]));
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    if (lane == 0) v[row * args.v_pitch + column] = sum;
    return;
  }
}

// A thread takes one output: added to delta where there is one, else to y.
template <typename T, typename V, typename Sum>
__global__ void __launch_bounds__(kThreads) naive_expand(const NaiveArgs args, const V* v, float* delta, int width) {
  const LoraParams& p = args.lora;
  const int64_t row = blockIdx.x;
  const int32_t adapter = args.row_adapter[row];
  int64_t n = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (adapter < 0 || n >= width) return;
  const int64_t column = n;
  int s = 0;
  while (n >= p.slices.width[s]) n -= p.slices.width[s++];
  const Sum sum = expanded<T, V, Sum>(p.slices, adapter, s, n, v + row * args.v_pitch);
  if (delta) {
    delta[row * width + column] += static_cast<float>(sum);
  } else {
    T& y = static_cast<T*>(p.y)[row * p.y_stride + column];
    y = static_cast<T>(static_cast<float>(static_cast<Sum>(widen(y)) + sum));
  }
}

NaiveArgs arguments(const Problem& problem, int64_t call) {
  NaiveArgs args{};
  args.row_adapter = problem.row_adapters_device();
  args.v_pitch = problem.v_width();
  if (problem.op() == Op::kEmbedding) {
    const EmbeddingParams e = problem.embedding_params(call);
    args.lora = e.lora;
    args.token_ids = static_cast<const int32_t*>(e.token_ids);
    args.token_stride = e.token_stride;
    args.rank_stride = e.rank_stride;
  } else {
    args.lora = problem.lora_params(call);
  }
  return args;
}

template <typename Launch>
void with_element(DType dtype, Launch&& launch) {
  if (dtype == DType::kFloat16) {
    launch(__half{});
  } else {
    launch(__nv_bfloat16{});
  }
}

template <typename Sum>
cudaError_t launch_shrink(const NaiveArgs& args, Sum* v, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.lora.rows), static_cast<unsigned>((args.v_pitch + kWarps - 1) / kWarps));
  with_element(args.lora.dtype,
               [&](auto element) { naive_shrink<decltype(element)><<<grid, kThreads, 0, stream>>>(args, v); });
  return cudaGetLastError();
}

template <typename Sum, typename V>
cudaError_t launch_expand(const Problem& problem, int64_t call, const V* v, float* delta, cudaStream_t stream) {
  const NaiveArgs args = arguments(problem, call);
  const int64_t width = problem.shape().width();
  const dim3 grid(static_cast<unsigned>(problem.shape().rows),
                  static_cast<unsigned>((width + kThreads - 1) / kThreads));
  with_element(problem.dtype(), [&](auto element) {
    naive_expand<decltype(element), V, Sum><<<grid, kThreads, 0, stream>>>(args, v, delta, static_cast<int>(width));
  });
  return cudaGetLastError();
}

}  // namespace

void reference_shrink(const Problem& problem, int64_t call, double* v, cudaStream_t stream) {
  check(launch_shrink(arguments(problem, call), v, stream), "reference shrink");
}

void reference_shrink(const LoraParams& lora, const int32_t* row_group, double* v, cudaStream_t stream) {
  NaiveArgs args{};
  args.lora = lora;
  args.row_adapter = row_group;
  args.v_pitch = lora.v_width;
  check(launch_shrink(args, v, stream), "reference shrink");
}

void reference_expand(const Problem& problem, int64_t call, const double* v, float* delta, cudaStream_t stream) {
  check(launch_expand<double>(problem, call, v, delta, stream), "reference expand");
}

void reference_expand_given(const Problem& problem, int64_t call, float* delta, cudaStream_t stream) {
  check(launch_expand<double>(problem, call, static_cast<const float*>(problem.v(call)), delta, stream),
        "reference expand");
}

NaiveBaseline::NaiveBaseline(const Problem& problem)
    : problem_(problem),
      v_(problem.shape().rows * problem.v_width() * static_cast<int64_t>(sizeof(float)), "v of the naive baseline") {}

cudaError_t NaiveBaseline::run(int64_t call, cudaStream_t stream) const {
  const cudaError_t error = launch_shrink(arguments(problem_, call), v_.as<float>(), stream);
  if (error != cudaSuccess) return error;
  return launch_expand<float>(problem_, call, static_cast<const float*>(v_.as<float>()), nullptr, stream);
}

}  // namespace polylora::bench
