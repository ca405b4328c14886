// 16-bit operands of mma: packing, unpacking, and products over elements as they lie in memory.
//
// A dot product may sum k in any order. So a thread loads 8 consecutive elements of a row (16 bytes) and calls them
// columns 2t, 2t+1, 2t+8, 2t+9 of two mma steps; with both operands read that way, no shuffle is needed. Weights stand
// on the N side of mma: there, the registers of a 16-byte load are operands as they are, where those of the M side
// would have to be moved together for every mma.
#pragma once

#include "common/ptx.cuh"

namespace polylora::cuda {

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
/// An instruction for each element; __bfloat1622float2 takes two for the second.
__device__ __forceinline__ float2 unpack(uint32_t v, __nv_bfloat16) {
  return {__int_as_float(static_cast<int>(v << 16)), __int_as_float(static_cast<int>(v & 0xffff0000u))};
}
__device__ __forceinline__ float2 unpack(uint32_t v, __half) {
  return __half22float2(reinterpret_cast<const __half2&>(v));
}

/// Rows g and g + 8 of the left side, 32 elements: lane 4g + t holds elements 8t to 8t + 7 of both.
struct Rows32 {
  uint32_t step0[4], step1[4];

  __device__ __forceinline__ Rows32(uint4 low, uint4 high)
      : step0{low.x, high.x, low.y, high.y}, step1{low.z, high.z, low.w, high.w} {}
};

/// acc[16 x 8] += rows * weights^T over 32 elements; `weights`: elements 8t to 8t + 7 of row g of 8.
template <typename T>
__device__ __forceinline__ void mma_32(float (&acc)[4], const Rows32& rows, uint4 weights) {
  const uint32_t b0[2] = {weights.x, weights.y};
  const uint32_t b1[2] = {weights.z, weights.w};
  ptx::mma_m16n8k16<T>(acc, rows.step0, b0);
  ptx::mma_m16n8k16<T>(acc, rows.step1, b1);
}

__device__ __forceinline__ void add(float4& sum, float4 part) {
  sum.x += part.x;
  sum.y += part.y;
  sum.z += part.z;
  sum.w += part.w;
}

/// base + scale * delta for 8 outputs of a row: word i holds outputs 2i and 2i + 1, `delta` 8 values in that order.
template <typename T>
__device__ __forceinline__ uint4 add_scaled(uint4 base, float scale, const float (&delta)[8]) {
  const uint32_t in[4] = {base.x, base.y, base.z, base.w};
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 y = unpack(in[i], T{});
    out[i] = pack(fmaf(scale, delta[2 * i], y.x), fmaf(scale, delta[2 * i + 1], y.y), T{});
  }
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace polylora::cuda
