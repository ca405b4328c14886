"""The checks of the host table writer: nothing a kernel could follow out of bounds gets into a table."""

from __future__ import annotations

import numpy as np
import pytest
from polylora import _host

# width, a_rows, a_cols, b_elements, a_id
LIMITS = [(10, 64, 32, 1000, 0), (20, 64, 32, 1000, 0)]
GOOD = {"a_row": [0, 8], "rank": [8, 4], "v_col": [0, 8], "b_stride": [8, 8], "b_offset": [0, 80], "scale": [1.0, 2.0]}


def writer(limits=None, v_width=16, **kwargs):
    return _host.TableWriter(4, limits or LIMITS, v_width, **kwargs)


def write(w, groups=(0,), **changes):
    fields = {**GOOD, **changes}
    n = len(groups)
    arrays = {
        name: np.ascontiguousarray(
            np.broadcast_to(np.asarray(value), (n, w.slices)), dtype=np.float32 if name == "scale" else np.int64
        )
        for name, value in fields.items()
    }
    w.set_groups(np.asarray(groups, dtype=np.int64), **arrays)


def test_a_good_entry_is_stored_word_for_word():
    w = writer([(10, 64, 32, 2**33, 0)] * 2)
    write(w, groups=[2], b_offset=[2**32 + 5, 80])
    words = w.words()
    assert words.shape == (4, 2, 8) and words.dtype == np.int32
    assert words[2, 0, :4].tolist() == [0, 8, 0, 8]
    assert words[2, 0, 4:6].copy().view(np.int64)[0] == 2**32 + 5
    assert words[2, 1, 6:7].copy().view(np.float32)[0] == 2.0
    assert words[2, :, 7].tolist() == [0, 0]
    assert not words[[0, 1, 3]].any()


def test_the_view_is_read_only_and_follows_writes():
    w = writer()
    view = w.words()
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0, 0] = 1
    write(w)
    assert view[0, 0, 1] == 8
    del w
    assert view[0, 0, 1] == 8, "the view keeps its memory alive"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": [257, 4]}, r"rank of group 0, slice 0 must be in \[0, 256\], got 257"),
        ({"rank": [-1, 4]}, r"rank of group 0, slice 0 must be in \[0, 256\], got -1"),
        ({"a_row": [57, 8]}, r"a_row \+ rank of group 0, slice 0 must be at most the 64 rows of A, got 65"),
        ({"a_row": [-1, 8]}, r"a_row of group 0, slice 0 must be in \[0, 2147483647\], got -1"),
        ({"a_row": [2**31, 8]}, r"a_row of group 0, slice 0 must be in \[0, 2147483647\], got 2147483648"),
        ({"v_col": [0, 13]}, r"v_col \+ rank of group 0, slice 1 must be at most v_width = 16, got 17"),
        ({"v_col": [-1, 8]}, r"v_col of group 0, slice 0 must be in"),
        ({"v_col": [2**40, 8]}, r"v_col of group 0, slice 0 must be in"),
        ({"b_stride": [7, 8]}, r"b_stride of group 0, slice 0 must be in \[8, 2147483647\], got 7"),
        ({"b_stride": [2**31, 8]}, r"b_stride of group 0, slice 0 must be in \[8, 2147483647\], got 2147483648"),
        ({"b_offset": [-8, 80]}, r"b_offset of group 0, slice 0 must be in"),
        ({"b_offset": [2**62, 80]}, r"b_offset of group 0, slice 0 must be in"),
        ({"b_offset": [921, 80]}, r"b_offset \+ .* must be at most the 1000 elements of B, got 1001"),
        ({"b_offset": [0, 845]}, r"slice 1 must be at most the 1000 elements of B, got 1001"),
        ({"scale": [np.nan, 1.0]}, r"scale of group 0, slice 0 must be finite"),
        ({"scale": [1.0, np.inf]}, r"scale of group 0, slice 1 must be finite"),
        ({"v_col": [0, 7]}, r"disjoint ranges or one and the same, got \[0, 8\) and \[7, 11\)"),
        ({"v_col": [3, 0]}, r"disjoint ranges or one and the same"),
        ({"v_col": [0, 0]}, r"equal only where A, a_row and rank are equal"),
        ({"v_col": [0, 0], "rank": [8, 8]}, r"equal only where A, a_row and rank are equal"),
        ({"v_col": [0, 0], "a_row": [8, 8]}, r"equal only where A, a_row and rank are equal"),
    ],
)
def test_refuses(changes: dict, message: str):
    w = writer()
    with pytest.raises(ValueError, match=r"polylora::SliceTable: .*" + message):
        write(w, **changes)
    assert not w.words().any() and not w.dirty_ranges(), "a refused entry was written"


def test_shared_a_needs_one_tensor():
    shared = {"a_row": [8, 8], "rank": [8, 8], "v_col": [0, 0]}
    write(writer(), **shared)
    with pytest.raises(ValueError, match="different A tensors"):
        write(writer([LIMITS[0], (20, 64, 32, 1000, 1)]), **shared)


def test_the_last_element_may_be_used_and_not_one_more():
    w = writer()
    write(w, b_offset=[1000 - 9 * 8 - 8, 1000 - 19 * 8 - 4], a_row=[56, 60], v_col=[8, 0])
    assert w.dirty_ranges() == [(0, 1)]


@pytest.mark.parametrize("group", [-1, 4, 2**40])
def test_refuses_groups_outside(group: int):
    with pytest.raises(ValueError, match=r"group must be in \[0, 3\]"):
        write(writer(), groups=[group])


def test_several_groups_are_written_wholly_or_not_at_all():
    w = writer()
    rank = np.full((3, 2), 4, dtype=np.int64)
    rank[2, 1] = 300
    with pytest.raises(ValueError, match="group 2, slice 1"):
        write(w, groups=[0, 1, 2], rank=rank)
    assert not w.words().any()


def test_rank_0_is_stored_as_zeros_whatever_else_it_says():
    w = writer()
    write(w, rank=[0, 4], a_row=[-7, 8], v_col=[2**40, 8], b_stride=[-3, 8], b_offset=[2**62, 80], scale=[np.nan, 1.0])
    assert not w.words()[0, 0].any()
    assert w.words()[0, 1, 1] == 4


def test_token_major_entries_take_vocab_rows_and_rank_columns():
    w = writer([(10, 60, 16, 1000, 0)], v_width=32, token_rows=20)
    one = {"v_col": [0], "b_stride": [32], "b_offset": [0], "scale": [1.0]}
    write(w, a_row=[40], rank=[16], **one)
    with pytest.raises(ValueError, match=r"a_row \+ vocab .* must be at most the 60 rows of A, got 61"):
        write(w, a_row=[41], rank=[16], **one)
    with pytest.raises(ValueError, match=r"rank .* must be at most the 16 columns of a token-major A, got 17"):
        write(w, a_row=[0], rank=[17], **one)


def test_dirty_groups_come_as_ranges():
    w = writer()
    assert w.dirty_ranges() == []
    write(w, groups=[0])
    write(w, groups=[2, 3])
    assert w.dirty_ranges() == [(0, 1), (2, 4)]
    w.mark_clean()
    assert w.dirty_ranges() == []
    w.clear_groups(1, 3)
    assert w.dirty_ranges() == [(1, 3)]
    assert not w.words()[2].any() and w.words()[3].any()


def test_limits_and_v_width_keep_existing_entries_valid():
    w = writer()
    write(w)
    with pytest.raises(ValueError, match=r"v_width must be in \[12, 2147483647\], got 11"):
        w.v_width = 11
    w.v_width = 12
    w.v_width = 40
    with pytest.raises(ValueError, match="rows of A of slice 0 must be in"):
        w.set_limits([(10, 63, 32, 1000, 0), LIMITS[1]])
    with pytest.raises(ValueError, match="width of slice 1 must be in"):
        w.set_limits([LIMITS[0], (21, 64, 32, 1000, 0)])
    w.set_limits([(10, 65, 32, 2000, 0), (20, 64, 32, 2000, 0)])
    write(w, a_row=[57, 8], b_offset=[0, 1800])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _host.TableWriter(0, LIMITS, 8), "groups must be in"),
        (lambda: _host.TableWriter(1, [], 8), r"slices must be in \[1, 8\], got 0"),
        (lambda: _host.TableWriter(1, LIMITS * 5, 8), r"slices must be in \[1, 8\], got 10"),
        (lambda: _host.TableWriter(1, [(0, 1, 1, 1, 0)], 8), "width of slice 0 must be in"),
        (lambda: _host.TableWriter(1, LIMITS, -1), "v_width must be in"),
    ],
)
def test_refuses_to_be_made(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_wrong_shapes():
    w = writer()
    good = np.zeros((1, 2), dtype=np.int64)
    scale = np.zeros((1, 2), dtype=np.float32)
    with pytest.raises(ValueError, match=r"rank must be \[1, 2\], got \[1, 3\]"):
        w.set_groups(np.zeros(1, dtype=np.int64), good, np.zeros((1, 3), dtype=np.int64), good, good, good, scale)
    with pytest.raises(ValueError, match="groups must be 1-dimensional"):
        w.set_groups(np.zeros((1, 1), dtype=np.int64), good, good, good, good, good, scale)
