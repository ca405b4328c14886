#include "table_writer.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <tuple>

#include "bindings.h"

namespace polylora::host {

namespace py = pybind11;

namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxElements = int64_t{1} << 61;  // keeps b_offset + (width - 1) * b_stride below 2^63

[[noreturn]] void refuse(const std::string& argument, const std::string& expected, const std::string& got) {
  throw std::invalid_argument("polylora::SliceTable: " + argument + " must be " + expected + ", got " + got);
}

void check_range(const std::string& argument, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    refuse(argument, "in [" + std::to_string(low) + ", " + std::to_string(high) + "]", std::to_string(value));
  }
}

std::string at(int64_t group, int64_t slice, const char* field) {
  return std::string(field) + " of group " + std::to_string(group) + ", slice " + std::to_string(slice);
}

}  // namespace

TableWriter::TableWriter(int64_t groups, std::vector<SliceLimits> limits, int64_t v_width, int64_t token_rows)
    : groups_(groups), limits_(std::move(limits)), v_width_(v_width), token_rows_(token_rows) {
  check_range("groups", groups, 1, kMaxInt32);
  check_range("slices", slices(), 1, kMaxSlices);
  check_range("v_width", v_width, 0, kMaxInt32);
  check_range("vocab", token_rows, 0, kMaxInt32);
  check_limits(limits_);
  entries_.assign(groups * slices(), SliceEntry{});
  dirty_.assign(groups, 0);
}

void TableWriter::check_limits(const std::vector<SliceLimits>& limits) const {
  for (size_t s = 0; s < limits.size(); ++s) {
    const std::string slice = " of slice " + std::to_string(s);
    check_range("width" + slice, limits[s].width, 1, kMaxInt32);
    check_range("rows of A" + slice, limits[s].a_rows, 0, kMaxElements);
    check_range("columns of A" + slice, limits[s].a_cols, 0, kMaxElements);
    check_range("elements of B" + slice, limits[s].b_elements, 0, kMaxElements);
  }
}

void TableWriter::check_group(int64_t group, const EntryValues* values) const {
  check_range("group", group, 0, groups_ - 1);
  for (int64_t s = 0; s < slices(); ++s) {
    const EntryValues& e = values[s];
    const SliceLimits& limit = limits_[s];
    check_range(at(group, s, "rank"), e.rank, 0, kMaxRank);
    if (e.rank == 0) continue;  // absent: the other fields are not stored

    check_range(at(group, s, "a_row"), e.a_row, 0, kMaxInt32);
    const int64_t rows_taken = token_rows_ > 0 ? token_rows_ : e.rank;
    if (e.a_row + rows_taken > limit.a_rows) {
      refuse(at(group, s, token_rows_ > 0 ? "a_row + vocab" : "a_row + rank"),
             "at most the " + std::to_string(limit.a_rows) + " rows of A", std::to_string(e.a_row + rows_taken));
    }
    if (token_rows_ > 0 && e.rank > limit.a_cols) {
      refuse(at(group, s, "rank"), "at most the " + std::to_string(limit.a_cols) + " columns of a token-major A",
             std::to_string(e.rank));
    }

    check_range(at(group, s, "v_col"), e.v_col, 0, kMaxInt32);
    if (e.v_col + e.rank > v_width_) {
      refuse(at(group, s, "v_col + rank"), "at most v_width = " + std::to_string(v_width_),
             std::to_string(e.v_col + e.rank));
    }

    check_range(at(group, s, "b_stride"), e.b_stride, e.rank, kMaxInt32);
    check_range(at(group, s, "b_offset"), e.b_offset, 0, kMaxElements);
    const int64_t b_end = e.b_offset + (limit.width - 1) * e.b_stride + e.rank;
    if (b_end > limit.b_elements) {
      refuse(at(group, s, "b_offset + (width - 1) * b_stride + rank"),
             "at most the " + std::to_string(limit.b_elements) + " elements of B", std::to_string(b_end));
    }
    if (!std::isfinite(e.scale)) refuse(at(group, s, "scale"), "finite", std::to_string(e.scale));

    // Slices share v columns wholly (then they share A) or not at all.
    for (int64_t t = 0; t < s; ++t) {
      const EntryValues& other = values[t];
      if (other.rank == 0) continue;
      const std::string pair =
          "v_col of group " + std::to_string(group) + ", slices " + std::to_string(t) + " and " + std::to_string(s);
      if (e.v_col == other.v_col) {
        if (e.a_row != other.a_row || e.rank != other.rank || limit.a_id != limits_[t].a_id) {
          refuse(pair, "equal only where A, a_row and rank are equal",
                 "a_row " + std::to_string(other.a_row) + " and " + std::to_string(e.a_row) + ", rank " +
                     std::to_string(other.rank) + " and " + std::to_string(e.rank) +
                     (limit.a_id != limits_[t].a_id ? ", different A tensors" : ""));
        }
      } else if (e.v_col < other.v_col + other.rank && other.v_col < e.v_col + e.rank) {
        refuse(pair, "disjoint ranges or one and the same",
               "[" + std::to_string(other.v_col) + ", " + std::to_string(other.v_col + other.rank) + ") and [" +
                   std::to_string(e.v_col) + ", " + std::to_string(e.v_col + e.rank) + ")");
      }
    }
  }
}

void TableWriter::set_group(int64_t group, const EntryValues* values) {
  check_group(group, values);
  SliceEntry* row = entries_.data() + group * slices();
  for (int64_t s = 0; s < slices(); ++s) {
    const EntryValues& e = values[s];
    row[s] = e.rank == 0 ? SliceEntry{}
                         : SliceEntry{static_cast<int32_t>(e.a_row),
                                      static_cast<int32_t>(e.rank),
                                      static_cast<int32_t>(e.v_col),
                                      static_cast<int32_t>(e.b_stride),
                                      e.b_offset,
                                      e.scale,
                                      0};
  }
  dirty_[group] = 1;
}

void TableWriter::clear_groups(int64_t begin, int64_t end) {
  check_range("first group", begin, 0, groups_);
  check_range("end group", end, begin, groups_);
  std::fill(entries_.begin() + begin * slices(), entries_.begin() + end * slices(), SliceEntry{});
  std::fill(dirty_.begin() + begin, dirty_.begin() + end, uint8_t{1});
}

void TableWriter::set_limits(std::vector<SliceLimits> limits) {
  check_range("slices", static_cast<int64_t>(limits.size()), slices(), slices());
  check_limits(limits);
  for (int64_t s = 0; s < slices(); ++s) {
    const std::string slice = " of slice " + std::to_string(s);
    check_range("width" + slice, limits[s].width, limits_[s].width, limits_[s].width);
    check_range("rows of A" + slice, limits[s].a_rows, limits_[s].a_rows, kMaxElements);
    check_range("columns of A" + slice, limits[s].a_cols, limits_[s].a_cols, kMaxElements);
    check_range("elements of B" + slice, limits[s].b_elements, limits_[s].b_elements, kMaxElements);
  }
  limits_ = std::move(limits);
}

void TableWriter::set_v_width(int64_t v_width) {
  int64_t used = 0;
  for (const SliceEntry& e : entries_) used = std::max<int64_t>(used, e.rank > 0 ? int64_t{e.v_col} + e.rank : 0);
  check_range("v_width", v_width, used, kMaxInt32);
  v_width_ = v_width;
}

std::vector<std::pair<int64_t, int64_t>> TableWriter::dirty_ranges() const {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (auto begin = std::find(dirty_.begin(), dirty_.end(), 1); begin != dirty_.end();) {
    const auto end = std::find(begin, dirty_.end(), 0);
    ranges.emplace_back(begin - dirty_.begin(), end - dirty_.begin());
    begin = std::find(end, dirty_.end(), 1);
  }
  return ranges;
}

void TableWriter::mark_clean() { std::fill(dirty_.begin(), dirty_.end(), uint8_t{0}); }

namespace {

using Limits = std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t, int32_t>>;
using Int64s = py::array_t<int64_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

std::vector<SliceLimits> to_limits(const Limits& limits) {
  std::vector<SliceLimits> out;
  for (const auto& [width, a_rows, a_cols, b_elements, a_id] : limits) {
    out.push_back(SliceLimits{width, a_rows, a_cols, b_elements, a_id});
  }
  return out;
}

// All groups are checked before the first is written: an update is whole or absent.
void set_groups(TableWriter& writer, const Int64s& groups, const Int64s& a_row, const Int64s& rank, const Int64s& v_col,
                const Int64s& b_stride, const Int64s& b_offset, const Floats& scale) {
  if (groups.ndim() != 1) refuse("groups", "1-dimensional", std::to_string(groups.ndim()) + " dimensions");
  const int64_t n = groups.shape(0);
  const int64_t slices = writer.slices();
  auto check_shape = [&](const char* name, const py::array& array) {
    if (array.ndim() != 2 || array.shape(0) != n || array.shape(1) != slices) {
      std::string got = "[";
      for (int64_t i = 0; i < array.ndim(); ++i) got += (i > 0 ? ", " : "") + std::to_string(array.shape(i));
      refuse(name, "[" + std::to_string(n) + ", " + std::to_string(slices) + "]", got + "]");
    }
  };
  check_shape("a_row", a_row);
  check_shape("rank", rank);
  check_shape("v_col", v_col);
  check_shape("b_stride", b_stride);
  check_shape("b_offset", b_offset);
  check_shape("scale", scale);
  std::vector<EntryValues> values(n * slices);
  for (int64_t i = 0; i < n * slices; ++i) {
    values[i] = EntryValues{a_row.data()[i],    rank.data()[i],     v_col.data()[i],
                            b_stride.data()[i], b_offset.data()[i], scale.data()[i]};
  }
  for (int64_t g = 0; g < n; ++g) writer.check_group(groups.data()[g], values.data() + g * slices);
  for (int64_t g = 0; g < n; ++g) writer.set_group(groups.data()[g], values.data() + g * slices);
}

// Read-only: a value written around the checks would be an address a kernel follows.
py::array words(py::object self) {
  const auto& writer = self.cast<const TableWriter&>();
  py::array_t<int32_t> view({writer.groups(), writer.slices(), int64_t{8}},
                            reinterpret_cast<const int32_t*>(writer.entries()), self);
  view.attr("setflags")(py::arg("write") = false);
  return view;
}

}  // namespace

void bind_table_writer(py::module_& m) {
  py::class_<TableWriter>(m, "TableWriter",
                          "Host copy of a slice table ``[groups, slices]``; checks every entry.\n\n"
                          "``limits``: per slice ``(width, a_rows, a_cols, b_elements, a_id)``; slices whose A is one\n"
                          "tensor have one ``a_id``. ``token_rows``: vocabulary size of a token-major embedding A,\n"
                          "else 0. All entries start absent. Errors are ValueError.")
      .def(py::init([](int64_t groups, const Limits& limits, int64_t v_width, int64_t token_rows) {
             return TableWriter(groups, to_limits(limits), v_width, token_rows);
           }),
           py::arg("groups"), py::arg("limits"), py::arg("v_width"), py::arg("token_rows") = 0)
      .def("set_groups", &set_groups, py::arg("groups"), py::arg("a_row"), py::arg("rank"), py::arg("v_col"),
           py::arg("b_stride"), py::arg("b_offset"), py::arg("scale"),
           "Writes all slices of ``groups`` (int64 ``[n]``; the rest int64 ``[n, slices]``, ``scale`` float32).\n\n"
           "All or nothing. Rank 0 marks a slice absent; its other fields are ignored.")
      .def("clear_groups", &TableWriter::clear_groups, py::arg("begin"), py::arg("end"),
           "Marks groups ``[begin, end)`` absent.")
      .def(
          "set_limits", [](TableWriter& writer, const Limits& limits) { writer.set_limits(to_limits(limits)); },
          py::arg("limits"), "New bounds, none below the old ones.")
      .def("dirty_ranges", &TableWriter::dirty_ranges, "Ranges ``(begin, end)`` of groups changed since mark_clean().")
      .def("mark_clean", &TableWriter::mark_clean)
      .def_property_readonly("groups", &TableWriter::groups)
      .def_property_readonly("slices", &TableWriter::slices)
      .def_property("v_width", &TableWriter::v_width, &TableWriter::set_v_width)
      .def(
          "words", [](py::object self) { return words(std::move(self)); },
          "Read-only int32 view ``[groups, slices, 8]`` of the entries; it follows later writes.");
}

}  // namespace polylora::host
