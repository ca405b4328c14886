"""The constants and layouts Python takes from the C++ headers."""

from __future__ import annotations

import pytest
from polylora import _host


def test_slice_entry_is_eight_words_of_known_places():
    assert _host.SLICE_ENTRY_BYTES == 32
    assert _host.SLICE_ENTRY_OFFSETS == {
        "a_row": 0,
        "rank": 4,
        "v_col": 8,
        "b_stride": 12,
        "b_offset": 16,
        "scale": 24,
        "epilogue": 28,
    }


def test_group_ids_that_are_no_groups():
    assert _host.NO_ADAPTER == -1
    assert _host.NO_ROW == -2


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, _host.PLAN_SMALL_ROWS, 513, _host.PLAN_ONE_LAUNCH_ROWS, 16385])
@pytest.mark.parametrize("groups", [1, 8, 4096])
@pytest.mark.parametrize("pairs", [0, 33])
def test_plan_sections_do_not_overlap(rows: int, groups: int, pairs: int):
    at = _host.plan_layout(rows, groups, pairs)
    runs, tiles = at["max_runs"], at["max_tiles"]
    assert runs == min(rows, groups)
    assert tiles >= min(rows, rows // _host.K_TILE_ROWS + runs)
    assert at["max_wide_tiles"] >= min(rows, rows // _host.K_WIDE_TILE_ROWS + runs)
    sizes = {
        "row_group": rows,
        "order": rows,
        "run_group": runs,
        "run_start": runs + 1,
        "tile": 4 * tiles,
        "pair_pos": pairs,
        "wide_tile": 4 * at["max_wide_tiles"],
        "workspace": 16 * 8 + 17 * groups if rows > _host.PLAN_SMALL_ROWS else 0,
    }
    end = _host.PLAN_HEADER_WORDS
    for name, size in sizes.items():
        assert at[name] >= end
        assert at[name] % 4 == 0, f"{name} is not 16-byte aligned"
        end = at[name] + size
    assert at["words"] >= end
    assert at["words"] == _host.plan_size(rows, groups, pairs)


def test_plan_header_words_are_distinct_and_inside():
    words = list(_host.PLAN_HEADER.values())
    assert len(set(words)) == len(words)
    assert max(words) < _host.PLAN_HEADER_WORDS


@pytest.mark.parametrize("wrong", [(-1, 1, 0), (1, -1, 0), (1, 1, -1), (2**31, 1, 0)])
def test_plan_size_refuses_what_does_not_fit_int32(wrong: tuple[int, int, int]):
    with pytest.raises(ValueError, match=r"polylora::plan_layout: .* must be in \[0, 2\^31\), got"):
        _host.plan_size(*wrong)
