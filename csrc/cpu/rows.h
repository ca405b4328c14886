// How the ops walk a plan: blocks of rows of one group, and the product of such a block with a piece of B.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels.h"
#include "polylora/cpu.h"

namespace polylora::cpu {

/// Rows of a block: enough to use a converted piece of B often, few enough for their results to stay in cache.
inline constexpr int32_t kBlockRows = 64;

/// Outputs of one unit of parallel work; a multiple of kProductCols.
inline constexpr int32_t kUnitCols = 256;

/// Rows of one group. Without an adapter the group is kNoAdapter.
struct RowBlock {
  int32_t group;
  const int32_t* rows;
  int32_t count;
};

/// The active rows in blocks, no block across two runs.
std::vector<RowBlock> active_blocks(const PlanView& plan);

/// Rows of the plan's `row_group` that carry no adapter, but exist.
std::vector<int32_t> base_rows(const PlanView& plan, int64_t rows);

inline const SliceEntry& entry_of(const SliceSet& slices, int32_t group, int32_t slice) {
  return slices.table[static_cast<int64_t>(group) * slices.count + slice];
}

inline bool present(const SliceEntry& entry) { return entry.rank > 0; }

/// False where an earlier slice of the group has the same v_col and with it the same A.
bool owns_v(const SliceSet& slices, int32_t group, int32_t slice);

inline int64_t pair_of(const LoraParams& params, int64_t row) {
  return params.row_map != nullptr ? params.row_map[row] : row;
}

inline int64_t x_row_of(const LoraParams& params, int64_t row) {
  return params.x_div == 0 ? row : pair_of(params, row) / params.x_div;
}

inline const void* element_at(const void* base, int64_t index, int32_t element_size) {
  return static_cast<const char*>(base) + index * element_size;
}

inline void* element_at(void* base, int64_t index, int32_t element_size) {
  return static_cast<char*>(base) + index * element_size;
}

/// to[n] = from[n * stride], bit for bit. And back.
void gather(void* to, const void* from, int64_t stride, int32_t count, int32_t element_size);
void scatter(void* to, int64_t stride, const void* from, int32_t count, int32_t element_size);

/// Work items a part of a ParallelFor should have for its threads to be worth waking.
int64_t grain_for(int64_t items, int64_t total_operations);

/// Writes the unscaled v of a row and slice, `rank` floats.
using LoadV = std::function<void(int64_t row, int32_t slice, float* v)>;

/// v as shrink left it, or as it was given.
LoadV load_from(const LoraParams& params);

/// y += delta for every row of the blocks; expand and embedding are this.
void expand_blocks(const LoraParams& params, const std::vector<RowBlock>& blocks, const LoadV& load_v,
                   const ParallelFor& parallel_for);

/// scale * v B^T of a block of rows and one slice, piece by piece.
class BlockProduct {
 public:
  BlockProduct(const LoraParams& params, const LoadV& load_v)
      : params_(params), load_v_(load_v), kernels_(kernels(params.dtype)) {}

  /// Loads and scales the rows' v once for all the columns that follow. False where the slice is absent.
  bool start(const RowBlock& block, int32_t slice);

  /// Outputs [n, n + cols) of every row: result of row r at acc + r * kProductCols.
  void columns(int32_t n, int32_t cols, float* acc);

  /// As above, into memory of the object.
  const float* columns(int32_t n, int32_t cols);

 private:
  const LoraParams& params_;
  const LoadV& load_v_;
  const Kernels& kernels_;
  const SliceEntry* entry_ = nullptr;
  const void* b_ = nullptr;
  int32_t count_ = 0;
  std::vector<float> scaled_;  // [rows, rank]
  std::vector<float> pack_;    // [rank, kProductCols]
  std::vector<float> acc_;     // [rows, kProductCols]
};

}  // namespace polylora::cpu
