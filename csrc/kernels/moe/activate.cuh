// Activations of eight outputs at once, in fp32 by the device's approximations of exp2 and 1/x (2 ulp): far below the
// rounding to 16 bits that follows. One switch for all eight, so that their chains of latencies overlap.
#pragma once

#include "common/ptx.cuh"
#include "polylora/activation.h"

namespace polylora::cuda {

/// 1 / (1 + e^-x); 0 and 1 at the infinities.
__device__ __forceinline__ float fast_sigmoid(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return ptx::reciprocal(1.f + ptx::exp2(-kLog2E * x));
}

/// value = act(value)
__device__ __forceinline__ void activate8(Activation act, float (&value)[8]) {
  switch (act) {
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] *= fast_sigmoid(value[i]);
      break;
    case Activation::kGeluTanh:  // (1 + tanh(u)) / 2 = sigmoid(2u)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float x = value[i];
        value[i] = x * fast_sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
      }
      break;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = activation(Activation::kGelu, value[i]);
      break;
    case Activation::kRelu2:
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = activation(Activation::kRelu2, value[i]);
      break;
    case Activation::kSwigluOai:  // gated only
      break;
  }
}

/// gate = act(gate) * up
__device__ __forceinline__ void activate_gated(Activation act, float (&gate)[8], const float (&up)[8], float alpha,
                                               float limit) {
  if (act == Activation::kSwigluOai) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float g = gate[i] > limit ? limit : gate[i];
      const float u = up[i] > limit ? limit : (up[i] < -limit ? -limit : up[i]);
      gate[i] = g * fast_sigmoid(alpha * g) * (u + 1.f);
    }
    return;
  }
  activate8(act, gate);
#pragma unroll
  for (int i = 0; i < 8; ++i) gate[i] *= up[i];
}

}  // namespace polylora::cuda
