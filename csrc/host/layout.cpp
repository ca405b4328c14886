// Constants and layouts of the public headers, so that Python never repeats a number of them.
#include <cstddef>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "polylora/plan_layout.h"
#include "polylora/slice_table.h"

namespace polylora::host {

namespace py = pybind11;

namespace {

PlanLayout checked_layout(int64_t rows, int64_t groups, int64_t pairs) {
  auto check = [](const char* name, int64_t value) {
    if (value < 0 || value > INT32_MAX) {
      throw py::value_error(std::string("polylora::plan_layout: ") + name + " must be in [0, 2^31), got " +
                            std::to_string(value));
    }
  };
  check("rows", rows);
  check("groups", groups);
  check("pairs", pairs);
  return plan_layout(rows, groups, pairs);
}

py::dict layout_dict(int64_t rows, int64_t groups, int64_t pairs) {
  const PlanLayout at = checked_layout(rows, groups, pairs);
  py::dict d;
  d["row_group"] = at.row_group;
  d["order"] = at.order;
  d["run_group"] = at.run_group;
  d["run_start"] = at.run_start;
  d["tile"] = at.tile;
  d["pair_pos"] = at.pair_pos;
  d["wide_tile"] = at.wide_tile;
  d["workspace"] = at.workspace;
  d["words"] = at.words;
  d["max_runs"] = plan_max_runs(rows, groups);
  d["max_tiles"] = plan_max_tiles(rows, groups);
  d["max_wide_tiles"] = plan_max_tiles(rows, groups, kWideTileRows);
  return d;
}

}  // namespace

void bind_layout(py::module_& m) {
  m.attr("NO_ADAPTER") = kNoAdapter;
  m.attr("NO_ROW") = kNoRow;
  m.attr("K_TILE_ROWS") = kTileRows;
  m.attr("K_WIDE_TILE_ROWS") = kWideTileRows;
  m.attr("SHORT_RUN") = kShortRun;
  m.attr("PLAN_SMALL_ROWS") = kPlanSmallRows;
  m.attr("PLAN_ONE_LAUNCH_ROWS") = kPlanOneLaunchRows;
  m.attr("PLAN_VERSION") = static_cast<int32_t>(kPlanVersionValue);
  m.attr("PLAN_HEADER_WORDS") = static_cast<int32_t>(kPlanHeaderWords);
  py::dict header;
  header["version"] = static_cast<int32_t>(kPlanVersion);
  header["rows"] = static_cast<int32_t>(kPlanRows);
  header["groups"] = static_cast<int32_t>(kPlanGroups);
  header["active_rows"] = static_cast<int32_t>(kPlanActiveRows);
  header["runs"] = static_cast<int32_t>(kPlanRuns);
  header["tiles"] = static_cast<int32_t>(kPlanTiles);
  header["invalid"] = static_cast<int32_t>(kPlanInvalid);
  header["max_run"] = static_cast<int32_t>(kPlanMaxRun);
  header["pairs"] = static_cast<int32_t>(kPlanPairs);
  header["wide_tiles"] = static_cast<int32_t>(kPlanWideTiles);
  header["short_tiles"] = static_cast<int32_t>(kPlanShortTiles);
  header["long_tiles"] = static_cast<int32_t>(kPlanLongTiles);
  header["max_short"] = static_cast<int32_t>(kPlanMaxShort);
  m.attr("PLAN_HEADER") = header;

  m.attr("MAX_SLICES") = kMaxSlices;
  m.attr("MAX_RANK") = kMaxRank;
  m.attr("SLICE_ENTRY_BYTES") = sizeof(SliceEntry);
  py::dict fields;
  fields["a_row"] = offsetof(SliceEntry, a_row);
  fields["rank"] = offsetof(SliceEntry, rank);
  fields["v_col"] = offsetof(SliceEntry, v_col);
  fields["b_stride"] = offsetof(SliceEntry, b_stride);
  fields["b_offset"] = offsetof(SliceEntry, b_offset);
  fields["scale"] = offsetof(SliceEntry, scale);
  fields["epilogue"] = offsetof(SliceEntry, epilogue);
  m.attr("SLICE_ENTRY_OFFSETS") = fields;

  m.def("plan_layout", &layout_dict, py::arg("rows"), py::arg("groups"), py::arg("pairs") = 0,
        "Offsets (int32 words) of the sections of a plan, its total ``words``, and ``max_runs``, ``max_tiles``, "
        "``max_wide_tiles``.\n\n"
        "Raises ValueError where an argument is negative or does not fit int32.");
  m.def(
      "plan_size",
      [](int64_t rows, int64_t groups, int64_t pairs) { return checked_layout(rows, groups, pairs).words; },
      py::arg("rows"), py::arg("groups"), py::arg("pairs") = 0, "Number of int32 words of a plan.");
}

}  // namespace polylora::host
