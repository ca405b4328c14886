// Blocks of rows, strided copies and the block product: see rows.h.
#include "rows.h"

#include <algorithm>
#include <cstring>

namespace polylora::cpu {
namespace {

template <class T>
void copy_strided(char* to, int64_t to_stride, const char* from, int64_t from_stride, int32_t count) {
  for (int64_t n = 0; n < count; ++n) std::memcpy(to + n * to_stride, from + n * from_stride, sizeof(T));
}

void copy_elements(void* to, int64_t to_stride, const void* from, int64_t from_stride, int32_t count, int32_t size) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  if (size == 2) {
    copy_strided<uint16_t>(out, to_stride * 2, in, from_stride * 2, count);
  } else {
    copy_strided<uint32_t>(out, to_stride * 4, in, from_stride * 4, count);
  }
}

}  // namespace

std::vector<RowBlock> active_blocks(const PlanView& plan) {
  std::vector<RowBlock> blocks;
  const int32_t runs = plan.header[kPlanRuns];
  blocks.reserve(static_cast<size_t>(runs + plan.header[kPlanActiveRows] / kBlockRows));
  for (int32_t run = 0; run < runs; ++run) {
    for (int32_t at = plan.run_start[run]; at < plan.run_start[run + 1]; at += kBlockRows) {
      blocks.push_back({plan.run_group[run], plan.order + at, std::min(kBlockRows, plan.run_start[run + 1] - at)});
    }
  }
  return blocks;
}

std::vector<int32_t> base_rows(const PlanView& plan, int64_t rows) {
  std::vector<int32_t> found;
  for (int64_t row = 0; row < rows; ++row) {
    if (plan.row_group[row] == kNoAdapter) found.push_back(static_cast<int32_t>(row));
  }
  return found;
}

bool owns_v(const SliceSet& slices, int32_t group, int32_t slice) {
  const SliceEntry& entry = entry_of(slices, group, slice);
  for (int32_t earlier = 0; earlier < slice; ++earlier) {
    const SliceEntry& other = entry_of(slices, group, earlier);
    if (present(other) && other.v_col == entry.v_col) return false;
  }
  return true;
}

void gather(void* to, const void* from, int64_t stride, int32_t count, int32_t element_size) {
  copy_elements(to, 1, from, stride, count, element_size);
}

void scatter(void* to, int64_t stride, const void* from, int32_t count, int32_t element_size) {
  copy_elements(to, stride, from, 1, count, element_size);
}

int64_t grain_for(int64_t items, int64_t total_operations) {
  constexpr int64_t kOperationsPerPart = 1 << 18;  // some 20 us of one core
  const int64_t parts = std::max<int64_t>(1, total_operations / kOperationsPerPart);
  return std::max<int64_t>(1, items / parts);
}

LoadV load_from(const LoraParams& params) {
  return [&params](int64_t row, int32_t slice, float* v) {
    const SliceEntry& entry = entry_of(params.slices, params.plan.row_group[row], slice);
    const int64_t v_row = params.v_of_x ? x_row_of(params, row) : row;
    const float* from = params.v + v_row * params.v_stride + entry.v_col;
    std::copy(from, from + entry.rank, v);
  };
}

bool BlockProduct::start(const RowBlock& block, int32_t slice) {
  entry_ = &entry_of(params_.slices, block.group, slice);
  if (!present(*entry_)) return false;
  count_ = block.count;
  b_ = element_at(params_.slices.b[slice], entry_->b_offset, kernels_.element_size);
  const int32_t rank = entry_->rank;
  scaled_.resize(static_cast<size_t>(count_) * rank);
  pack_.resize(static_cast<size_t>(rank) * kProductCols);
  acc_.resize(static_cast<size_t>(count_) * kProductCols);
  for (int32_t r = 0; r < count_; ++r) {
    const int64_t row = block.rows[r];
    float* scaled = scaled_.data() + static_cast<int64_t>(r) * rank;
    load_v_(row, slice, scaled);
    float factor = entry_->scale;
    if (params_.row_weight != nullptr) factor *= params_.row_weight[pair_of(params_, row)];
    for (int32_t j = 0; j < rank; ++j) scaled[j] *= factor;
  }
  return true;
}

void BlockProduct::columns(int32_t n, int32_t cols, float* acc) {
  const void* b = element_at(b_, static_cast<int64_t>(n) * entry_->b_stride, kernels_.element_size);
  kernels_.product(scaled_.data(), count_, entry_->rank, b, entry_->b_stride, cols, pack_.data(), acc);
}

const float* BlockProduct::columns(int32_t n, int32_t cols) {
  columns(n, cols, acc_.data());
  return acc_.data();
}

}  // namespace polylora::cpu
