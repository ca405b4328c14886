#include "arena_allocator.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "bindings.h"

namespace polylora::host {

namespace {

// Bounds every sum below far from overflow.
constexpr int64_t kMaxCapacity = int64_t{1} << 60;

[[noreturn]] void refuse(const std::string& what, int64_t got) {
  throw std::invalid_argument("polylora::ArenaAllocator: " + what + ", got " + std::to_string(got));
}

}  // namespace

ArenaAllocator::ArenaAllocator(int64_t capacity, int64_t alignment) : alignment_(alignment) {
  if (alignment < 1 || alignment > kMaxCapacity) refuse("alignment must be >= 1", alignment);
  grow(capacity);
}

int64_t ArenaAllocator::rounded(int64_t size) const {
  if (size < 1 || size > kMaxCapacity) refuse("size must be in [1, 2^60]", size);
  return (size + alignment_ - 1) / alignment_ * alignment_;
}

std::optional<int64_t> ArenaAllocator::alloc(int64_t size) {
  size = rounded(size);
  const auto fit = free_by_size_.lower_bound({size, 0});
  if (fit == free_by_size_.end()) return std::nullopt;
  const auto [range_size, offset] = *fit;
  erase_free(free_by_offset_.find(offset));
  if (range_size > size) insert_free(offset + size, range_size - size);
  allocated_.emplace(offset, size);
  used_ += size;
  return offset;
}

void ArenaAllocator::free(int64_t offset) {
  const auto found = allocated_.find(offset);
  if (found == allocated_.end()) refuse("offset must be that of a live allocation", offset);
  int64_t size = found->second;
  allocated_.erase(found);
  used_ -= size;

  // Merge with the free range behind, then with the one before.
  auto next = free_by_offset_.lower_bound(offset);
  if (next != free_by_offset_.end() && next->first == offset + size) {
    size += next->second;
    erase_free(next);
  }
  auto previous = free_by_offset_.lower_bound(offset);
  if (previous != free_by_offset_.begin()) {
    --previous;
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      size += previous->second;
      erase_free(previous);
    }
  }
  insert_free(offset, size);
}

void ArenaAllocator::grow(int64_t new_capacity) {
  if (new_capacity < capacity_ || new_capacity > kMaxCapacity || new_capacity % alignment_ != 0) {
    refuse("capacity must be a multiple of " + std::to_string(alignment_) + " and >= " + std::to_string(capacity_),
           new_capacity);
  }
  if (new_capacity == capacity_) return;
  // As if the new part had been allocated and were freed now: it merges with a free tail.
  allocated_.emplace(capacity_, new_capacity - capacity_);
  used_ += new_capacity - capacity_;
  const int64_t tail = capacity_;
  capacity_ = new_capacity;
  free(tail);
}

int64_t ArenaAllocator::capacity_for(int64_t size) const {
  size = rounded(size);
  if (!free_by_size_.empty() && free_by_size_.rbegin()->first >= size) return capacity_;
  int64_t tail = 0;
  if (!free_by_offset_.empty()) {
    const auto last = std::prev(free_by_offset_.end());
    if (last->first + last->second == capacity_) tail = last->second;
  }
  return capacity_ - tail + size;
}

ArenaStats ArenaAllocator::stats() const {
  return ArenaStats{capacity_, used_, free_by_size_.empty() ? 0 : free_by_size_.rbegin()->first,
                    static_cast<int64_t>(allocated_.size()), static_cast<int64_t>(free_by_offset_.size())};
}

std::vector<std::pair<int64_t, int64_t>> ArenaAllocator::allocated_ranges() const {
  std::vector<std::pair<int64_t, int64_t>> ranges(allocated_.begin(), allocated_.end());
  std::sort(ranges.begin(), ranges.end());
  return ranges;
}

std::vector<std::pair<int64_t, int64_t>> ArenaAllocator::free_ranges() const {
  return {free_by_offset_.begin(), free_by_offset_.end()};
}

void ArenaAllocator::insert_free(int64_t offset, int64_t size) {
  free_by_offset_.emplace(offset, size);
  free_by_size_.emplace(size, offset);
}

void ArenaAllocator::erase_free(std::map<int64_t, int64_t>::iterator range) {
  free_by_size_.erase({range->second, range->first});
  free_by_offset_.erase(range);
}

void bind_arena_allocator(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<ArenaAllocator>(m, "ArenaAllocator",
                             "Offset allocator over ``capacity`` units: best fit, coalescing free list. Offsets and "
                             "sizes are multiples of ``alignment``.")
      .def(py::init<int64_t, int64_t>(), py::arg("capacity"), py::arg("alignment") = 1)
      .def("alloc", &ArenaAllocator::alloc, py::arg("size"),
           "Offset of ``size`` free units, ``None`` where no free range is long enough.")
      .def("free", &ArenaAllocator::free, py::arg("offset"), "Gives a range back. ValueError on a double free.")
      .def("grow", &ArenaAllocator::grow, py::arg("capacity"), "Raises the capacity.")
      .def("capacity_for", &ArenaAllocator::capacity_for, py::arg("size"),
           "The smallest capacity at which ``alloc(size)`` succeeds.")
      .def("allocated_ranges", &ArenaAllocator::allocated_ranges, "Live ``(offset, size)``, ascending.")
      .def("free_ranges", &ArenaAllocator::free_ranges, "Free ``(offset, size)``, ascending.")
      .def_property_readonly("capacity", [](const ArenaAllocator& arena) { return arena.stats().capacity; })
      .def(
          "stats",
          [](const ArenaAllocator& arena) {
            const ArenaStats stats = arena.stats();
            py::dict d;
            d["capacity"] = stats.capacity;
            d["used"] = stats.used;
            d["largest_free"] = stats.largest_free;
            d["allocations"] = stats.allocations;
            d["free_ranges"] = stats.free_ranges;
            return d;
          },
          "``capacity``, ``used``, ``largest_free`` in units; ``allocations``, ``free_ranges`` counted.");
}

}  // namespace polylora::host
