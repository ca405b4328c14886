// The vector kernels under the CPU ops, one set an instruction set and element type, chosen at run time: one binary
// runs on any machine of its architecture.
//
// Each result is one fixed chain of fp32 operations that depends on its own row and weights alone: not on how many rows
// or outputs a call brings. That is what makes a row bitwise the same in any batch, on any number of threads.
#pragma once

#include <cstdint>

#include "polylora/params.h"

namespace polylora::cpu {

/// Outputs one call of Kernels::product makes at most.
inline constexpr int32_t kProductCols = 64;

struct Kernels {
  /// v[r][j] = sum_k x[r][k] * a[j * a_stride + k], r in [0, rows), j in [0, rank).
  void (*dot)(const void* const* x, int32_t rows, const void* a, int64_t a_stride, int32_t rank, int64_t k,
              float* const* v);

  /// acc[r * kProductCols + n] = sum_j vs[r * rank + j] * b[n * b_stride + j], j ascending, n in [0, cols).
  /// `pack` is scratch of rank * kProductCols floats. Columns of acc from `cols` on are unspecified.
  void (*product)(const float* vs, int32_t rows, int32_t rank, const void* b, int64_t b_stride, int32_t cols,
                  float* pack, float* acc);

  /// y[n] = round(float(y[n]) + acc[n]).
  void (*add_to)(void* y, const float* acc, int32_t cols);

  /// sum[n] += weight * float(y[n]), then += delta[n] unless null.
  void (*accumulate)(float* sum, const void* y, float weight, const float* delta, int32_t cols);

  /// h[n] = round(act(float(gate[n]) + gate_delta[n]) * (float(up[n]) + up_delta[n])); without `up`, the act alone.
  /// A delta may be null.
  void (*activate)(void* h, const void* gate, const float* gate_delta, const void* up, const float* up_delta,
                   int32_t cols, Activation act, float alpha, float limit);

  /// y[n] = round(value[n]).
  void (*store)(void* y, const float* value, int32_t cols);

  /// Size of an element.
  int32_t element_size;
};

enum class Isa : int32_t { kGeneric = 0, kAvx2 = 1, kAvx512 = 2 };

/// Kernels of one instruction set; null where this build or machine does not have it.
const Kernels* kernels_generic(DType dtype);
const Kernels* kernels_avx2(DType dtype);
const Kernels* kernels_avx512(DType dtype);

/// The kernels in use: the best set this machine has.
const Kernels& kernels(DType dtype);

/// For tests: uses `isa` from now on. False where this machine does not have it. Not thread safe.
bool select_isa(Isa isa);

}  // namespace polylora::cpu
