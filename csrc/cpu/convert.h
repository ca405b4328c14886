// Element types of the CPU path and their scalar conversions. Every conversion to a 16-bit type rounds once, to nearest
// even; NaN stays NaN, fp16 overflow becomes infinity. The vector kernels give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace polylora::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity or NaN, made quiet as the hardware does
    const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
    return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | quiet);
  }
  // A fp16 magnitude read as the high bits of a float is 2^-112 times its value; subnormals come out right too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
}

inline void from_float(float value, float* out) { *out = value; }

inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

inline void from_float(float value, Float16* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: rebias the exponent by 112, round the low 13 bits
    const uint32_t rebiased = magnitude - 0x38000000u;
    half = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the addition
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace polylora::cpu
