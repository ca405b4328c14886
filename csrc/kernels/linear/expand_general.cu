// expand, general path: any width, any pitch, any rank.
//
// A block takes one tile, one slice and 256 outputs; a thread takes one output for all rows of the tile, so B is
// read once a tile. v comes through shared memory, scaled in fp32; y is read and rounded once.
#include "common/dtype.cuh"
#include "common/rows.cuh"
#include "linear/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRankChunk = 64;  // ranks of v in shared memory at a time

template <typename T>
__global__ void __launch_bounds__(kThreads) expand_general(const __grid_constant__ LoraParams p) {
  const Tile tile = p.plan.tile[blockIdx.x];
  if (static_cast<int>(blockIdx.x) >= load_head(p.plan).tiles) return;
  const int slice = blockIdx.z;
  const int rows = tile.rows;
  const SliceEntry entry = entry_of(p, tile.group, slice);
  const int64_t n = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  const bool has_output = n < p.slices.width[slice];
  if (entry.rank <= 0 || int64_t{blockIdx.y} * kThreads >= p.slices.width[slice]) return;

  __shared__ int32_t row_of[kTileRows];
  __shared__ const float* v_row[kTileRows];
  __shared__ float scale_of[kTileRows];
  __shared__ float v[kTileRows][kRankChunk];
  if (threadIdx.x < rows) {
    row_of[threadIdx.x] = p.plan.order[tile.pos + threadIdx.x];
    v_row[threadIdx.x] = p.v + v_row_of(p, row_of[threadIdx.x]) * p.v_stride + entry.v_col;
    scale_of[threadIdx.x] = v_scale(p, entry, row_of[threadIdx.x]);
  }

  const T* b = static_cast<const T*>(p.slices.b[slice]) + entry.b_offset + n * entry.b_stride;
  float sum[kTileRows] = {};
  for (int j0 = 0; j0 < entry.rank; j0 += kRankChunk) {
    const int ranks = min(kRankChunk, entry.rank - j0);
    __syncthreads();
    for (int e = threadIdx.x; e < rows * ranks; e += kThreads) {
      const int i = e / ranks;
      const int j = e % ranks;
      v[i][j] = v_row[i][j0 + j] * scale_of[i];
    }
    __syncthreads();
    if (!has_output) continue;
    float part[kTileRows] = {};  // sums of their own, as errors grow with the length of one
    for (int j = 0; j < ranks; ++j) {
      const float b_j = to_float(b[j0 + j]);
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
        if (i < rows) part[i] = fmaf(v[i][j], b_j, part[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) sum[i] += part[i];
  }
  if (!has_output) return;
  T* y = static_cast<T*>(p.y) + output_col(p.slices, slice, n);
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= rows) break;
    T& out = y[row_of[i] * p.y_stride];
    out = from_float<T>(to_float(out) + sum[i]);
  }
}

}  // namespace

cudaError_t expand_general_path(const LoraParams& params, cudaStream_t stream) {
  int32_t widest = 0;
  for (int s = 0; s < params.slices.count; ++s) widest = max(widest, params.slices.width[s]);
  if (params.plan.max_tiles == 0 || widest == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(params.plan.max_tiles), (widest + kThreads - 1) / kThreads,
                  params.slices.count);
  return dispatch_dtype(params.dtype, [&](auto element) {
    expand_general<decltype(element)><<<grid, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace polylora::cuda
