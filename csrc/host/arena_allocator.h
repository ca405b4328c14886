// Offset allocator of the slot pool: hands out ranges of an arena it never touches (device memory, usually).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

namespace polylora::host {

struct ArenaStats {
  int64_t capacity;      // units
  int64_t used;          // units handed out, rounding included
  int64_t largest_free;  // units of the longest free range
  int64_t allocations;   // live allocations
  int64_t free_ranges;   // > 1 means the arena is fragmented
};

/// Best fit over a coalescing free list. Adapters come in few sizes (one a site and rank), so a freed range is
/// usually filled again exactly and best fit keeps the long ranges whole. O(log ranges) a call.
///
/// Units are whatever the caller counts in: rows of A, elements of B.
class ArenaAllocator {
 public:
  /// Throws std::invalid_argument unless alignment >= 1 and capacity is a non-negative multiple of it.
  ArenaAllocator(int64_t capacity, int64_t alignment);

  /// Offset (a multiple of the alignment) of `size` free units, nullopt where no free range is long enough.
  /// Throws std::invalid_argument for size < 1.
  std::optional<int64_t> alloc(int64_t size);

  /// Gives a range back and merges it with its free neighbours. Throws std::invalid_argument for an offset that is
  /// not allocated (a double free).
  void free(int64_t offset);

  /// Adds [capacity, new_capacity) as free space. Throws std::invalid_argument for a smaller or unaligned capacity.
  void grow(int64_t new_capacity);

  /// The smallest capacity at which alloc(size) succeeds without another range being freed.
  int64_t capacity_for(int64_t size) const;

  ArenaStats stats() const;
  std::vector<std::pair<int64_t, int64_t>> allocated_ranges() const;  // (offset, size), ascending
  std::vector<std::pair<int64_t, int64_t>> free_ranges() const;       // (offset, size), ascending

 private:
  int64_t rounded(int64_t size) const;
  void insert_free(int64_t offset, int64_t size);
  void erase_free(std::map<int64_t, int64_t>::iterator range);

  int64_t capacity_ = 0;
  int64_t alignment_;
  int64_t used_ = 0;
  std::map<int64_t, int64_t> free_by_offset_;           // offset -> size
  std::set<std::pair<int64_t, int64_t>> free_by_size_;  // (size, offset)
  std::unordered_map<int64_t, int64_t> allocated_;      // offset -> size
};

}  // namespace polylora::host
