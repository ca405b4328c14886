// embedding: A is looked up by token id, then multiplied with B, in one launch.
//
// A block takes one row and 256 outputs. It gathers the row's rank values of A (a column where A is [rank, vocab],
// a row where it is [vocab, rank]) into shared memory, scaled; a thread takes one output.
#include "common/row_product.cuh"
#include "linear/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) embedding_general(const __grid_constant__ EmbeddingParams e) {
  const LoraParams& p = e.lora;
  const int64_t row = blockIdx.x;
  const int slice = blockIdx.z;
  const int64_t n = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const int32_t group = group_of(p.plan, row);
  if (group < 0) return;
  const int64_t token =
      e.ids_are_int64 ? static_cast<const int64_t*>(e.token_ids)[row] : static_cast<const int32_t*>(e.token_ids)[row];
  if (token < 0 || token >= e.vocab) return;
  const SliceEntry entry = p.slices.table[int64_t{group} * p.slices.count + slice];
  const int64_t a_rows_used = e.token_major ? e.vocab : entry.rank;
  if (!entry_fits(entry, a_rows_used, p.slices.a_rows[slice], p.slices.width[slice], p.slices.b_elements[slice],
                  INT32_MAX) ||
      (e.token_major && entry.rank > e.a_cols[slice])) {
    return;
  }

  __shared__ float smem_v[kMaxRank];
  const T* a = static_cast<const T*>(p.slices.a[slice]) + int64_t{entry.a_row} * p.slices.a_stride[slice] +
               token * e.token_stride;
  for (int j = threadIdx.x; j < entry.rank; j += kThreads) smem_v[j] = to_float(a[j * e.rank_stride]) * entry.scale;
  __syncthreads();
  if (n >= p.slices.width[slice]) return;
  T& out = static_cast<T*>(p.y)[row * p.y_stride + output_col(p.slices, slice, n)];
  out = from_float<T>(to_float(out) + row_times_b<T>(p, entry, slice, n, smem_v));
}

}  // namespace

cudaError_t embedding_general_path(const EmbeddingParams& params, cudaStream_t stream) {
  int32_t widest = 0;
  for (int s = 0; s < params.lora.slices.count; ++s) widest = max(widest, params.lora.slices.width[s]);
  if (params.lora.rows == 0 || widest == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(params.lora.rows), (widest + kThreads - 1) / kThreads,
                  params.lora.slices.count);
  return dispatch_dtype(params.lora.dtype, [&](auto element) {
    embedding_general<decltype(element)><<<grid, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace polylora::cuda
