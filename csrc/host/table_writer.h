// The host copy of a slice table: every entry is checked here before a kernel can follow it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "polylora/slice_table.h"

namespace polylora::host {

/// What the entries of one slice may address. The kernels trust the table, so these bounds are the only ones.
struct SliceLimits {
  int64_t width;       // outputs
  int64_t a_rows;      // rows of the slice's A tensor
  int64_t a_cols;      // its columns; bounds the rank of a token-major A only
  int64_t b_elements;  // elements of the slice's B tensor
  int32_t a_id;        // equal for slices whose A tensor is one and the same: only those may share v columns
};

/// Entries of one group before they are packed: 64-bit, so that what does not fit the table is seen.
struct EntryValues {
  int64_t a_row, rank, v_col, b_stride, b_offset;
  float scale;
};

class TableWriter {
 public:
  /// token_rows: 0, or the vocabulary size of a token-major embedding A ([tokens, rank]: an entry takes token_rows
  /// rows of A and `rank` of its columns).
  TableWriter(int64_t groups, std::vector<SliceLimits> limits, int64_t v_width, int64_t token_rows);

  /// Checks and writes all slices of one group. Nothing is written where anything is wrong.
  void set_group(int64_t group, const EntryValues* values);

  /// Throws std::invalid_argument naming group, slice, field, what was expected and what came.
  void check_group(int64_t group, const EntryValues* values) const;

  /// Marks [begin, end) absent (rank 0).
  void clear_groups(int64_t begin, int64_t end);

  /// New bounds after an arena grew. Refuses to shrink: entries inside the old bounds stay valid.
  void set_limits(std::vector<SliceLimits> limits);
  void set_v_width(int64_t v_width);

  /// Half-open ranges of groups changed since mark_clean().
  std::vector<std::pair<int64_t, int64_t>> dirty_ranges() const;
  void mark_clean();

  int64_t groups() const { return groups_; }
  int64_t slices() const { return static_cast<int64_t>(limits_.size()); }
  int64_t v_width() const { return v_width_; }
  const SliceEntry* entries() const { return entries_.data(); }  // [groups, slices]

 private:
  void check_limits(const std::vector<SliceLimits>& limits) const;

  int64_t groups_;
  std::vector<SliceLimits> limits_;
  int64_t v_width_;
  int64_t token_rows_;
  std::vector<SliceEntry> entries_;
  std::vector<uint8_t> dirty_;
};

}  // namespace polylora::host
