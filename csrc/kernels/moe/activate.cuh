// Activations of some outputs at once, in fp32 by the device's approximations of exp2 and 1/x (2 ulp): far below the
// rounding to 16 bits that follows. One switch for all of them, so that their chains of latencies overlap.
#pragma once

#include "common/ptx.cuh"
#include "polylora/activation.h"

namespace polylora::cuda {

/// An activation and its parameters.
struct ActivationOf {
  Activation act;
  float alpha, limit;
};

/// 1 / (1 + e^-x); 0 and 1 at the infinities.
__device__ __forceinline__ float fast_sigmoid(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return ptx::reciprocal(1.f + ptx::exp2(-kLog2E * x));
}

/// value = act(value)
template <int kCount>
__device__ __forceinline__ void activate_all(Activation act, float (&value)[kCount]) {
  switch (act) {
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[i] *= fast_sigmoid(value[i]);
      break;
    case Activation::kGeluTanh:  // (1 + tanh(u)) / 2 = sigmoid(2u)
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float x = value[i];
        value[i] = x * fast_sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
      }
      break;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[i] = activation(Activation::kGelu, value[i]);
      break;
    case Activation::kRelu2:
#pragma unroll
      for (int i = 0; i < kCount; ++i) value[i] = activation(Activation::kRelu2, value[i]);
      break;
    case Activation::kSwigluOai:  // gated only
      break;
  }
}

/// gate = act(gate) * up
template <int kCount>
__device__ __forceinline__ void activate_gated(Activation act, float (&gate)[kCount], const float (&up)[kCount],
                                               float alpha, float limit) {
  if (act == Activation::kSwigluOai) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float g = gate[i] > limit ? limit : gate[i];
      const float u = up[i] > limit ? limit : (up[i] < -limit ? -limit : up[i]);
      gate[i] = g * fast_sigmoid(alpha * g) * (u + 1.f);
    }
    return;
  }
  activate_all(act, gate);
#pragma unroll
  for (int i = 0; i < kCount; ++i) gate[i] *= up[i];
}

}  // namespace polylora::cuda
