// shrink, general path: any K, any pitch, any rank.
//
// A block takes one tile (up to 16 rows of one group) and one slice; a warp takes one row of A at a time and all
// rows of the tile, so A is read once a tile. Lane l sums k = l, l + 32, ...; a butterfly adds the lanes. The order
// depends on K alone: a row's bits are the same in any batch.
#include "common/dtype.cuh"
#include "common/rows.cuh"
#include "linear/paths.h"

namespace polylora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRankBlocks = 4;  // blocks that share the ranks of a slice: a decode batch has few tiles

template <typename T>
__global__ void __launch_bounds__(kWarps * 32) shrink_general(const __grid_constant__ LoraParams p) {
  const Tile tile = p.plan.tile[blockIdx.x];
  if (static_cast<int>(blockIdx.x) >= load_head(p.plan).tiles) return;
  const int slice = blockIdx.y;
  const int rows = tile.rows;
  const SliceEntry entry = entry_of(p, tile.group, slice);
  if (entry.rank <= 0 || !computes_v(p, tile.group, slice)) return;

  __shared__ const T* x_row[kTileRows];
  __shared__ float* v_row[kTileRows];
  if (threadIdx.x < rows) {
    const int64_t row = p.plan.order[tile.pos + threadIdx.x];
    x_row[threadIdx.x] = static_cast<const T*>(p.x) + x_row_of(p, row) * p.x_stride;
    v_row[threadIdx.x] = p.v + row * p.v_stride + entry.v_col;
  }
  __syncthreads();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const T* a_base = static_cast<const T*>(p.slices.a[slice]) + int64_t{entry.a_row} * p.slices.a_stride[slice];
  for (int j = blockIdx.z * kWarps + warp; j < entry.rank; j += kRankBlocks * kWarps) {
    const T* a = a_base + j * p.slices.a_stride[slice];
    float sum[kTileRows] = {};
    for (int64_t k = lane; k < p.k; k += 32) {
      const float a_k = to_float(a[k]);
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) {
        if (i < rows) sum[i] = fmaf(a_k, to_float(x_row[i][k]), sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      if (i >= rows) break;
      float total = sum[i];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
      if (lane == 0) v_row[i][j] = total;
    }
  }
}

}  // namespace

cudaError_t shrink_general_path(const LoraParams& params, cudaStream_t stream) {
  if (params.plan.max_tiles == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(params.plan.max_tiles), params.slices.count, kRankBlocks);
  return dispatch_dtype(params.dtype, [&](auto element) {
    shrink_general<decltype(element)><<<grid, kWarps * 32, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace polylora::cuda
