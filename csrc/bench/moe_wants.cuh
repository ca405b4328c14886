// What every value of a stage should be, computed by one thread in fp64 from the same inputs: function objects of a row
// and a column.
#pragma once

#include <cuda_bf16.h>

#include "moe_cases.h"
#include "naive.cuh"
#include "polylora/params.h"

namespace polylora::bench {

using Element = __nv_bfloat16;

__device__ inline double at(const Element* matrix, int64_t index) { return static_cast<double>(widen(matrix[index])); }

// A half of the ops' work: what they add to y, v given.
struct Delta {
  LoraParams lora;
  const int32_t* group;  // [pairs] by position
  const float* weight;   // [pairs] by pair; null: none
  const double* v;       // [pairs, lora.v_width]; null: there is no delta
  __device__ double operator()(int64_t row, int s, int64_t n) const {
    if (v == nullptr) return 0;
    const double delta = expanded<Element, double, double>(lora.slices, group[row], s, n, v + row * lora.v_width);
    return weight ? delta * static_cast<double>(weight[pair_of(lora, row)]) : delta;
  }
};

// A delta as moe_delta writes it: slice after slice.
struct DeltaWant {
  Delta delta;
  int64_t width;  // of a slice
  __device__ double operator()(int64_t row, int64_t column) const {
    return delta(row, static_cast<int>(column / width), column % width);
  }
};

// y + delta in the columns of y.
struct AddedWant {
  Delta delta;
  const Element* before;
  int64_t pitch, slice_step, col_stride;
  __device__ double operator()(int64_t row, int64_t column) const {
    const int64_t s = col_stride > 1 ? column % col_stride : column / slice_step;
    return at(before, row * pitch + column) + delta(row, static_cast<int>(s), (column - s * slice_step) / col_stride);
  }
};

struct ActWant {
  Delta computed;        // of seams that make it themselves
  const Element* delta;  // [pairs, pitch] slice after slice; null: none is given
  const Element* y1;     // [pairs, pitch]
  int64_t pitch, inner, slice_step, col_stride;
  Activation act;
  bool gated;
  __device__ double value(int64_t row, int s, int64_t n) const {
    const double given = delta ? at(delta, row * pitch + s * inner + n) : 0.0;
    return at(y1, row * pitch + s * slice_step + n * col_stride) + given + computed(row, s, n);
  }
  __device__ double operator()(int64_t row, int64_t n) const {
    double first = value(row, 0, n);
    double up = gated ? value(row, 1, n) : 1.0;
    if (act == Activation::kRelu2) return first > 0 ? first * first * up : 0.0;
    double steepness = 1;
    if (act == Activation::kSwigluOai) {
      const double limit = kActLimit;
      steepness = static_cast<double>(kActAlpha);
      first = fmin(first, limit);
      up = fmax(fmin(up, limit), -limit) + 1;
    }
    return first / (1 + exp(-steepness * first)) * up;
  }
};

struct SumWant {
  Delta computed;           // unweighted
  const Element* delta;     // [pairs, hidden], weighted; null: none is given
  const Element* y2;        // [pairs, hidden]
  const int32_t* position;  // [rows, top_k]
  const float* weights;     // [rows, top_k]
  int64_t hidden;
  int32_t top_k;
  __device__ double operator()(int64_t token, int64_t column) const {
    double sum = 0;
    for (int32_t j = 0; j < top_k; ++j) {
      const int64_t row = position[token * top_k + j];
      const double y = at(y2, row * hidden + column) + computed(row, 0, column);
      sum += static_cast<double>(weights[token * top_k + j]) * y;
      if (delta) sum += at(delta, row * hidden + column);
    }
    return sum;
  }
};

struct GemmWant {
  const Element* x;        // [rows of x, k]
  const Element* w;        // [experts, n, k]
  const int32_t* group;    // [pairs] by position
  const int32_t* row_map;  // [pairs]; null: x has a row for each position
  int32_t top_k, experts;
  int64_t n, k;
  __device__ double operator()(int64_t row, int64_t column) const {
    const Element* of_x = x + (row_map ? row_map[row] / top_k : row) * k;
    const Element* of_w = w + (int64_t{group[row] % experts} * n + column) * k;
    double sum = 0;
#pragma unroll 1
    for (int64_t i = 0; i < k; ++i) sum += at(of_x, i) * at(of_w, i);
    return sum;
  }
};

}  // namespace polylora::bench
