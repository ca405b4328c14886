// The activations between the halves of an MoE layer, in fp32. The kernels call these; the CPU path has vector
// versions, which its tests hold against them.
#pragma once

#include <cmath>

#include "polylora/params.h"

namespace polylora {

POLYLORA_HD inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

/// act(u) where not gated; the factor of `up` where gated. kSwigluOai has no such form: see gated_activation.
POLYLORA_HD inline float activation(Activation act, float x) {
  switch (act) {
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kGelu:
      return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu2: {
      // not fmaxf: it would turn a NaN into 0
      const float positive = x < 0.f ? 0.f : x;
      return positive * positive;
    }
    case Activation::kSwigluOai:
      break;
  }
  return x;
}

POLYLORA_HD inline float gated_activation(Activation act, float gate, float up, float alpha, float limit) {
  if (act != Activation::kSwigluOai) return activation(act, gate) * up;
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : (up < -limit ? -limit : up);
  return g * sigmoid(alpha * g) * (u + 1.f);
}

}  // namespace polylora
