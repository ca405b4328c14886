// Element types: loads to fp32, one rounding on the way back, and the dispatch from DType to a C++ type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "polylora/params.h"

namespace polylora::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Calls launch(T{}) with the C++ type of `dtype`.
template <typename Launch>
cudaError_t dispatch_dtype(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kBFloat16:
      return launch(__nv_bfloat16{});
    case DType::kFloat16:
      return launch(__half{});
    case DType::kFloat32:
      return launch(float{});
  }
  return cudaErrorInvalidValue;
}

/// The same of kernels for 16-bit elements alone, whose callers have looked.
template <typename Launch>
cudaError_t dispatch_16_bit(DType dtype, const Launch& launch) {
  return dtype == DType::kBFloat16 ? launch(__nv_bfloat16{}) : launch(__half{});
}

}  // namespace polylora::cuda
