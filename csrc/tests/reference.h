// The ops' definitions in double precision, element by element, written without a look at the implementations. Buffers
// are poisoned with NaN wherever no op may read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "polylora/params.h"

namespace polylora::testing {

/// Number format of a dtype: significand bits with the hidden one, exponent of the least normal, largest value.
struct Format {
  int bits;
  int min_exponent;
  double max;
};

inline Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return {8, -126, 0x1.fep127};
    case DType::kFloat16:
      return {11, -14, 65504.0};
    default:
      return {24, -126, 0x1.fffffep127};
  }
}

/// The nearest value of the format, ties to even.
inline double round_to(double value, DType dtype) {
  if (!std::isfinite(value) || value == 0.0) return value;
  const Format format = format_of(dtype);
  const int exponent = std::max(std::ilogb(value), format.min_exponent);
  const double unit = std::ldexp(1.0, exponent - format.bits + 1);
  const double rounded = std::nearbyint(value / unit) * unit;
  return std::fabs(rounded) > format.max ? std::copysign(std::numeric_limits<double>::infinity(), value) : rounded;
}

inline int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

/// Bits of a value of the format, by search of its fields; value must be representable.
inline uint32_t encode(double value, DType dtype) {
  if (dtype == DType::kFloat32) {
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    return bits;
  }
  const Format format = format_of(dtype);
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
  const uint32_t infinity = dtype == DType::kBFloat16 ? 0x7f80u : 0x7c00u;
  if (std::isnan(value)) return sign | infinity | 1u << (format.bits - 2);
  if (std::isinf(value)) return sign | infinity;
  if (value == 0.0) return sign;
  const double size = std::fabs(value);
  const int exponent = std::max(std::ilogb(size), format.min_exponent);
  const uint32_t significand = static_cast<uint32_t>(std::ldexp(size, format.bits - 1 - exponent));
  // Adding lets the hidden bit step the exponent field.
  return sign | ((static_cast<uint32_t>(exponent - format.min_exponent) << (format.bits - 1)) + significand);
}

inline double decode(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat32) {
    float single;
    std::memcpy(&single, &bits, 4);
    return single;
  }
  const Format format = format_of(dtype);
  const int fraction_bits = format.bits - 1;
  const uint32_t fraction = bits & ((1u << fraction_bits) - 1u);
  const int field = static_cast<int>((bits & 0x7fffu) >> fraction_bits);
  const int top = 0x7fff >> fraction_bits;
  double size;
  if (field == top) {
    size = fraction != 0 ? std::nan("") : std::numeric_limits<double>::infinity();
  } else if (field == 0) {
    size = std::ldexp(fraction, format.min_exponent - fraction_bits);
  } else {
    size = std::ldexp(fraction + (1u << fraction_bits), field - 1 + format.min_exponent - fraction_bits);
  }
  return (bits & 0x8000u) != 0 ? -size : size;
}

/// Elements of a dtype, NaN until set.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType dtype, int64_t count)
      : dtype_(dtype), count_(count), bytes_(static_cast<size_t>(count) * static_cast<size_t>(size_of(dtype)), 0xff) {}

  void set(int64_t at, double value) { set_bits(at, encode(round_to(value, dtype_), dtype_)); }
  double get(int64_t at) const { return decode(bits(at), dtype_); }

  void set_bits(int64_t at, uint32_t bits) { std::memcpy(place(at), &bits, static_cast<size_t>(size_of(dtype_))); }

  uint32_t bits(int64_t at) const {
    uint32_t bits = 0;
    std::memcpy(&bits, const_cast<Buffer*>(this)->place(at), static_cast<size_t>(size_of(dtype_)));
    return bits;
  }

  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  int64_t size() const { return count_; }
  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_; }

 private:
  unsigned char* place(int64_t at) { return bytes_.data() + at * size_of(dtype_); }

  DType dtype_ = DType::kFloat32;
  int64_t count_ = 0;
  std::vector<unsigned char> bytes_;
};

/// A value and how far fp32 sums may stray from it.
struct Estimate {
  double value;
  double slack;
};

/// fp32 sums of n terms stray at most about n * 2^-24 of the sum of the terms' sizes.
inline double sum_slack(double sizes, int64_t terms) { return sizes * static_cast<double>(terms + 4) * 0x1p-23; }

/// True where `got` is `want` rounded once, give or take the slack.
inline bool close(double got, const Estimate& want, DType dtype) {
  if (std::isnan(want.value)) return std::isnan(got);
  if (std::isinf(want.value)) return got == want.value;
  if (!std::isfinite(got)) return std::isinf(round_to(want.value + std::copysign(want.slack, want.value), dtype));
  const double low = round_to(want.value - want.slack, dtype);
  const double high = round_to(want.value + want.slack, dtype);
  return got >= low && got <= high;
}

}  // namespace polylora::testing
