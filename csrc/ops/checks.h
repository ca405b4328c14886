// Argument checks of the ops. A refusal names the op, the argument, what was expected and what came.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "boxing.h"
#include "polylora/params.h"

namespace polylora::ops {

inline constexpr int64_t kAny = -1;

using Sizes = std::initializer_list<int64_t>;

/// Checks of one call. `like` is the tensor whose device all others must share; on meta they have shapes, strides and
/// dtypes, but no place and no data.
class Checker {
 public:
  Checker(const char* op, const Tensor& like);

  [[noreturn]] void fail(const std::string& arg, const std::string& expected, const std::string& got) const;

  /// 2-D, last stride 1, row stride >= columns (rows do not overlap), of `dtype`. kAny matches any size.
  void matrix(const char* arg, const Tensor& t, int64_t rows, int64_t cols, int32_t dtype) const;

  /// Contiguous, of exactly these sizes (kAny matches any size), of `dtype`.
  void contiguous(const char* arg, const Tensor& t, Sizes sizes, int32_t dtype) const;

  /// Contiguous int32 or int64 of these sizes; returns whether it is int64.
  bool ids(const char* arg, const Tensor& t, Sizes sizes) const;

  /// dtype of x, y, A, B: bfloat16, float16 or float32.
  DType compute_dtype(const char* arg, const Tensor& t) const;

  /// The data starts on `bytes` bytes: kernels read it in pieces of that size.
  void aligned(const char* arg, const Tensor& t, int64_t bytes) const;

  /// lo <= value <= hi.
  void range(const char* arg, int64_t value, int64_t lo, int64_t hi) const;

  /// Row pitch of a checked matrix. Of a matrix of one row torch may report any stride, which is never used; it becomes
  /// one that fast paths take.
  static int64_t pitch(const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : (t.size(1) + 7) / 8 * 8; }

 private:
  void device(const char* arg, const Tensor& t) const;

  const char* op_;
  int32_t device_type_;
  int32_t device_index_;
};

/// "[8, 2048] float16 on cuda:0"; on meta without a device.
std::string describe(const Tensor& t);

}  // namespace polylora::ops
