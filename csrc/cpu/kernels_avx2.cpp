// The kernels for x86-64 with AVX2, FMA and F16C.
#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "convert.h"
#include "unroll.h"

// Only functions defined between push and pop use the wider instructions; the headers above stay baseline.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace polylora::cpu {
namespace avx2 {

inline constexpr int kDotRows = 2;         // rows and ranks of one tile of dot products
inline constexpr int kDotRanks = 2;        //
inline constexpr int kDotRanksOneRow = 4;  // ranks of a tile of a single row: enough chains to hide the latency
inline constexpr int kProductRows = 4;     // rows and blocks of 16 outputs of one tile of the product
inline constexpr int kProductBlocks = 1;   //

// The kernels are written on the lanes: this order.
#include "lanes_avx2.inl"

#include "kernels.inl"

}  // namespace avx2
}  // namespace polylora::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace polylora::cpu {

const Kernels* kernels_avx2(DType dtype) { return avx2::kernels_of(dtype); }

}  // namespace polylora::cpu

#else

namespace polylora::cpu {

const Kernels* kernels_avx2(DType) { return nullptr; }

}  // namespace polylora::cpu

#endif
