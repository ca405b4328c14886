// The kernels for any machine: every architecture's baseline.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "convert.h"
#include "kernels.h"
#include "unroll.h"

namespace polylora::cpu {
namespace generic {

inline constexpr int kDotRows = 2;         // rows and ranks of one tile of dot products
inline constexpr int kDotRanks = 1;        //
inline constexpr int kDotRanksOneRow = 2;  // ranks of a tile of a single row: enough chains to hide the latency
inline constexpr int kProductRows = 2;     // rows and blocks of 16 outputs of one tile of the product
inline constexpr int kProductBlocks = 1;   //

// The kernels are written on the lanes: this order.
#include "lanes_generic.inl"

#include "kernels.inl"

}  // namespace generic

const Kernels* kernels_generic(DType dtype) { return generic::kernels_of(dtype); }

}  // namespace polylora::cpu
