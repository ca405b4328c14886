"""Slice tables over every pool layout: the same adapters must come out of each, with everything unread poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import polylora
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from polylora.table import SliceTable
from table_reference import apply_table_linear, assert_matches, poison_unread, read_entry
from torch import Tensor

K = 24
WIDTHS = [13, 5, 8]
R = 16


@dataclass
class Weights:
    """One adapter of one site: ``a[e][s] [rank, k]``, ``b[e][s] [width, rank]``, rank 0 = absent."""

    a: list[list[Tensor]]
    b: list[list[Tensor]]
    scale: float = 1.0

    @property
    def ranks(self) -> list[list[int]]:
        return [[t.size(0) for t in row] for row in self.a]


@dataclass
class Site:
    """Adapters by slot (None: an empty slot) and what a dense gather makes of them."""

    widths: list[int]
    k: int
    slots: list[Weights | None]
    experts: int = 1

    @property
    def ranks(self) -> list:
        return [[[0] * len(self.widths)] * self.experts if w is None else w.ranks for w in self.slots]

    @property
    def scales(self) -> list[float]:
        return [1.0 if w is None else w.scale for w in self.slots]

    def rows(self) -> list[int]:
        """Every group, base rows among them, the first group at both ends."""
        groups = len(self.slots) * self.experts
        return [0, -1, *range(groups), -1, 0]

    def want(self, x: Tensor, row_groups: list[int], cols: list[int], y_width: int, col_stride: int = 1) -> Tensor:
        y = torch.zeros(len(row_groups), y_width, dtype=torch.float64)
        for row, group in enumerate(row_groups):
            w = self.slots[group // self.experts] if group >= 0 else None
            if w is None:
                continue
            for s, width in enumerate(self.widths):
                a, b = w.a[group % self.experts][s].double(), w.b[group % self.experts][s].double()
                v = a @ x[row].double() if x.dim() == 2 else a[:, int(x[row])]
                y[row, cols[s] : cols[s] + (width - 1) * col_stride + 1 : col_stride] += w.scale * (b @ v)
        return y


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def adapter(widths: list[int], k: int, ranks: list[list[int]], scale: float) -> Weights:
    return Weights(
        [[randn(r, k) for r in row] for row in ranks],
        [[randn(width, r) for width, r in zip(widths, row, strict=True)] for row in ranks],
        scale,
    )


def make_site(ranks: list, widths: list[int] = WIDTHS, k: int = K, experts: int = 1, scales=None) -> Site:
    """``ranks``: by slot None, a number, [slices] or [experts][slices]."""
    torch.manual_seed(0)
    slots: list[Weights | None] = []
    for i, rank in enumerate(ranks):
        if rank is None:
            slots.append(None)
            continue
        by_slice = [rank] * len(widths) if isinstance(rank, int) else rank
        by_expert = by_slice if isinstance(by_slice[0], list) else [by_slice] * experts
        slots.append(adapter(widths, k, by_expert, scales[i] if scales else 1.0))
    return Site(widths, k, slots, experts)


def nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def check(table: SliceTable, site: Site, x: Tensor | None = None, cols: list[int] | None = None, y_width: int = 0):
    """Poisons what the table does not name, then compares it with the dense gather."""
    poison_unread(table.table, table.a, table.b, table.widths, table.vocab if table.token_major else 0)
    row_groups = site.rows()
    x = randn(len(row_groups), site.k) if x is None else x
    cols, y_width = cols or table.cols, y_width or sum(site.widths)
    got = apply_table_linear(
        x,
        row_groups,
        table.table,
        table.a,
        table.b,
        table.widths,
        table.cols,
        v_width=table.v_width,
        y_width=y_width,
        col_stride=table.col_stride,
        token_major=table.token_major,
    )
    assert_matches(got, site.want(x, row_groups, cols, y_width, table.col_stride))


# ---------------------------------------------------------------------------------------------------------------
# Layouts: each fills a pool of NaN the way its engine does, and makes the table


def fill_stacked(site: Site, r: int = R) -> tuple[list[Tensor], list[Tensor]]:
    """One tensor a slice: A [slots, experts, R, k], B [slots, experts, width, R]."""
    slots = len(site.slots)
    a = [nan(slots, site.experts, r, site.k) for _ in site.widths]
    b = [nan(slots, site.experts, width, r) for width in site.widths]
    for i, w in enumerate(site.slots):
        for e in range(site.experts if w else 0):
            for s in range(len(site.widths)):
                rank = w.a[e][s].size(0)
                a[s][i, e, :rank] = w.a[e][s]
                b[s][i, e, :, :rank] = w.b[e][s]
    return a, b


def by_slice(site: Site) -> SliceTable:
    a, b = fill_stacked(site)
    if site.experts == 1:
        a, b = [t.squeeze(1) for t in a], [t.squeeze(1) for t in b]
    return SliceTable.from_dense_pool(a, b, site.ranks, site.scales)


def one_tensor(site: Site) -> SliceTable:
    a, b = fill_stacked(site)
    a, b = torch.stack(a, dim=2), torch.cat(b, dim=2)
    if site.experts == 1:
        a, b = a.squeeze(1), b.squeeze(1)
    return SliceTable.from_dense_pool(a, b, site.ranks, site.scales, widths=site.widths)


def strided(site: Site) -> SliceTable:
    """Views of wider tensors: A rows and B rows with a pitch, slots apart."""
    a, b = fill_stacked(site)
    wide_a, wide_b = [], []
    for t in a:
        big = nan(2 * t.size(0), t.size(1), t.size(2) + 3, t.size(3) + 4)
        view = big[::2, :, 1 : 1 + t.size(2), : t.size(3)]
        view.copy_(t)
        wide_a.append(view if site.experts > 1 else view.squeeze(1))
    for t in b:
        big = nan(2 * t.size(0), t.size(1), t.size(2) + 1, t.size(3) + 5)
        view = big[::2, :, 1:, 3 : 3 + t.size(3)]
        view.copy_(t)
        wide_b.append(view if site.experts > 1 else view.squeeze(1))
    return SliceTable.from_dense_pool(wide_a, wide_b, site.ranks, site.scales)


def vllm(site: Site) -> SliceTable:
    a, b = fill_stacked(site)
    make = SliceTable.from_vllm_moe if site.experts > 1 else SliceTable.from_vllm
    return make(tuple(a), tuple(b), site.ranks, site.scales)


def sglang(site: Site) -> SliceTable:
    slots, slices = len(site.slots), len(site.widths)
    moe = site.experts > 1
    a, b = nan(slots, site.experts, slices * R, site.k), nan(slots, site.experts, sum(site.widths), R)
    for i, w in enumerate(site.slots):
        for e in range(site.experts if w else 0):
            at, step = 0, R if moe else max(w.ranks[0])
            for s, width in enumerate(site.widths):
                rank = w.a[e][s].size(0)
                a[i, e, s * step : s * step + rank] = w.a[e][s]
                b[i, e, at : at + width, :rank] = w.b[e][s]
                at += width
    if moe:
        return SliceTable.from_sglang_moe(a, b, site.ranks, site.scales, widths=site.widths)
    return SliceTable.from_sglang_dense(a.squeeze(1), b.squeeze(1), site.ranks, site.scales, widths=site.widths)


def ragged(site: Site) -> SliceTable:
    """No slots at all: true ranks one after another with gaps, B with its own pitch each."""
    table = SliceTable.from_ragged_arena(
        nan(600, site.k),
        nan(20000),
        slots=len(site.slots),
        experts=site.experts,
        widths=site.widths,
        v_width=R * len(site.widths),
    )
    a_row, b_offset = 1, 8
    for i, w in enumerate(site.slots):
        for e in range(site.experts if w else 0):
            fields: dict[str, list] = {"a_row": [], "rank": [], "v_col": [], "b_stride": [], "b_offset": []}
            v_col = 0
            for s, width in enumerate(site.widths):
                rank = w.a[e][s].size(0)
                pitch = rank + 3
                for name, value in zip(fields, (a_row, rank, v_col, pitch, b_offset), strict=True):
                    fields[name].append(value)
                if rank:
                    table.a[0][a_row : a_row + rank] = w.a[e][s]
                    table.b[0].as_strided((width, rank), (pitch, 1), b_offset).copy_(w.b[e][s])
                a_row, b_offset, v_col = a_row + rank + 1, b_offset + width * pitch + 5, v_col + rank
            table.set_groups([i * site.experts + e], **fields, scale=w.scale)
    table.upload()
    return table


LAYOUTS = [by_slice, one_tensor, strided, vllm, sglang, ragged]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)


@layouts
def test_mixed_ranks_per_slot(layout):
    check(layout(make_site([4, 16, None, 1, 7])), make_site([4, 16, None, 1, 7]))


@layouts
def test_scales(layout):
    site = make_site([4, 8, 2], scales=[2.0, 0.125, -1.5])
    check(layout(site), site)


@layouts
def test_absent_slices(layout):
    site = make_site([[4, 0, 4], [0, 0, 8], [0, 5, 0], [0, 0, 0], 3])
    check(layout(site), site)


@layouts
def test_two_slices_loaded_rank_below_slot_rank(layout):
    """An MLA fused_qkv_a of two unequal slices with a rank below the slot's: the second slice was read at the place
    it would have at the slot's rank, and NaN came out."""
    site = make_site([3, 16, 8], widths=[19, 7])
    check(layout(site), site)


@pytest.mark.parametrize("slices", range(1, 9))
@layouts
def test_every_number_of_slices(layout, slices: int):
    site = make_site([5, 2, None, 16], widths=[3 + s for s in range(slices)])
    check(layout(site), site)


@layouts
def test_moe(layout):
    site = make_site([4, None, [[2, 7], [0, 3], [8, 0], [0, 0]], 16], widths=[9, 9], experts=4, scales=[1, 1, 2, 0.5])
    check(layout(site), site)


@layouts
def test_non_gated_moe(layout):
    site = make_site([4, 8], widths=[11], experts=3)
    check(layout(site), site)


# ---------------------------------------------------------------------------------------------------------------
# Shared weights


def share(site: Site, a: bool = False, b: bool = False) -> Site:
    """All experts get the first expert's A (or B)."""
    for w in site.slots:
        if w and a:
            w.a = [w.a[0]] * site.experts
        if w and b:
            w.b = [w.b[0]] * site.experts
    return site


def test_shared_outer_moe_vllm():
    site = share(make_site([4, 7], widths=[9, 9], experts=3), a=True)
    a, b = fill_stacked(site)
    table = SliceTable.from_vllm_moe([t[:, :1].clone() for t in a], b, site.ranks, site.scales)
    check(table, site)
    entries = [read_entry(table.table, 3 + e, 0) for e in range(3)]
    assert len({e.a_row for e in entries}) == 1, "A of all experts must coincide"

    site = share(make_site([4, 7], widths=[20], experts=3), b=True)
    a, b = fill_stacked(site)
    check(SliceTable.from_vllm_moe(a, [t[:, :1].clone() for t in b], site.ranks, site.scales), site)


def test_shared_outer_moe_by_expand():
    """The experts dimension may be an expanded one (stride 0)."""
    site = share(make_site([4, 7], widths=[9, 9], experts=3), a=True)
    a, b = fill_stacked(site)
    check(SliceTable.from_vllm_moe([t[:, :1].clone().expand(-1, 3, -1, -1) for t in a], b, site.ranks), site)


def test_shared_outer_moe_sglang():
    site = share(make_site([4, 7], widths=[9, 9], experts=3), a=True)
    a, b = fill_stacked(site)
    a, b = torch.cat(a, dim=2)[:, :1].clone(), torch.cat(b, dim=2)
    check(SliceTable.from_sglang_moe(a, b, site.ranks, widths=site.widths), site)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gate_up_trained_as_one_serves_two_slices(interleaved: bool):
    site = make_site([4, 7], widths=[9, 9], experts=3)
    for w in site.slots:
        w.a = [[row[0], row[0]] for row in w.a]
    a, b = fill_stacked(site)
    whole = torch.stack(b, dim=3).flatten(2, 3) if interleaved else torch.cat(b, dim=2)
    table = SliceTable.from_vllm_moe(
        [a[0]], [whole], site.ranks, site.scales, widths=site.widths, interleaved=interleaved
    )
    assert (table.cols, table.col_stride) == (([0, 1], 2) if interleaved else ([0, 9], 1))
    assert table.v_width == R, "shared A takes its columns of v once"
    check(table, site)


def test_shared_a_in_a_ragged_arena():
    site = make_site([6])
    w = site.slots[0]
    w.a = [[w.a[0][0]] * 3]
    table = SliceTable.from_ragged_arena(nan(20, K), nan(600), slots=1, widths=WIDTHS, v_width=8)
    table.a[0][5:11] = w.a[0][0]
    offsets = [0, 200, 400]
    for s, width in enumerate(WIDTHS):
        table.b[0].as_strided((width, 6), (8, 1), offsets[s]).copy_(w.b[0][s])
    table.set_groups([0], a_row=5, rank=6, v_col=0, b_stride=8, b_offset=offsets)
    table.upload()
    check(table, site)


# ---------------------------------------------------------------------------------------------------------------
# Embeddings


@pytest.mark.parametrize("layout", ["vllm", "sglang", "ragged"])
def test_embedding(layout: str):
    vocab, dim = 37, 12
    site = make_site([4, None, 16, 1], widths=[dim], k=vocab, scales=[2.0, 1.0, 1.0, 0.5])
    a, b = fill_stacked(site)
    a, b = a[0].squeeze(1), b[0]
    if layout == "vllm":
        table = SliceTable.from_vllm_embedding(a.transpose(1, 2).contiguous(), b, site.ranks, site.scales)
        assert table.args("embedding_")["token_major"]
    elif layout == "sglang":
        table = SliceTable.from_sglang_embedding(a, b.squeeze(1), site.ranks, site.scales)
    else:
        table = SliceTable.from_ragged_arena(
            a.flatten(0, 1), b.flatten(), slots=4, widths=[dim], v_width=R, vocab=vocab
        )
        for slot, w in enumerate(site.slots):
            if w:
                table.set_groups(
                    [slot], a_row=slot * R, rank=w.ranks[0], v_col=0, b_stride=R, b_offset=slot * dim * R, scale=w.scale
                )
        table.upload()
    assert table.args("embedding_")["vocab"] == vocab
    tokens = torch.tensor([0, 1, 5, vocab - 1, 7, 8, 9, 36])
    check(table, site, x=tokens[: len(site.rows())])


# ---------------------------------------------------------------------------------------------------------------
# Zero copy, updates, arguments


@pytest.mark.parametrize("layout", [by_slice, one_tensor, strided, vllm, sglang], ids=lambda f: f.__name__)
def test_builders_copy_no_weight(layout, monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []
    dense = SliceTable._dense.__func__

    def spy(cls, where, a, b, *args, **kwargs):
        seen.extend((*a, *b))
        return dense(cls, where, a, b, *args, **kwargs)

    monkeypatch.setattr(SliceTable, "_dense", classmethod(spy))
    table = layout(make_site([4, 8]))
    inside = {t.untyped_storage().data_ptr() for t in seen}
    assert {t.untyped_storage().data_ptr() for t in (*table.a, *table.b)} <= inside
    for t in table.a:
        assert t.dim() == 2 and t.stride(1) == 1 and t.stride(0) >= t.size(1)
    for t in table.b:
        assert t.dim() == 1 and t.is_contiguous()


def test_slots_change_while_serving():
    site = make_site([4, 9, 2])
    a, b = fill_stacked(site)
    table = SliceTable.from_vllm(a, b)
    assert not table.table.any(), "without ranks all slots are empty"
    address = table.table.data_ptr()
    table.set_slot(0, 4)
    table.set_slot(2, [2, 2, 2], [1.0, 1.0, 1.0])
    table.set_slot(1, 16, upload=False)
    assert not table.table[1].any(), "not uploaded yet"
    table.set_slot(1, site.ranks[1], 1.0)
    check(table, site)

    table.clear_slot(1)
    site.slots[1] = None
    check(table, site)
    assert table.table.data_ptr() == address, "captured graphs hold the address"


def test_upload_touches_changed_groups_only():
    site = make_site([4, 9, 2])
    a, b = fill_stacked(site)
    table = SliceTable.from_vllm(a, b, site.ranks)
    table.table[0].fill_(77)
    table.set_slot(2, 1)
    assert (table.table[0] == 77).all()
    assert read_entry(table.table, 2, 0).rank == 1
    table.upload()
    assert (table.table[0] == 77).all()


def test_v_columns_are_aligned_and_fixed_by_capacity():
    site = make_site([3, 5])
    a, b = fill_stacked(site, r=10)
    table = SliceTable.from_vllm(a, b, site.ranks)
    assert table.v_width == 48
    assert [read_entry(table.table, 0, s).v_col for s in range(3)] == [0, 16, 32]
    check(table, site)


def test_offsets_beyond_32_bits():
    """8 slots x 512 experts x 16 x 2688 elements and more: arithmetic only, the tensors have no memory."""
    slots, experts, r, n = 64, 512, 64, 2688
    table = SliceTable.from_vllm_moe(
        [torch.empty(slots, experts, r, 1024, dtype=torch.bfloat16, device="meta")],
        [torch.empty(slots, experts, n, r, dtype=torch.bfloat16, device="meta")],
        [16] * slots,
    )
    group = slots * experts - 1
    words = torch.from_numpy(table.words().copy())
    entry = read_entry(words, group, 0)
    assert entry.b_offset == group * n * r > 2**32
    assert entry.a_row == group * r
    assert entry.b_stride == r
    assert read_entry(words, 7 * experts + 3, 0).b_offset == (7 * experts + 3) * n * r


def test_a_rows_beyond_int32_are_refused():
    far_apart = torch.empty_strided((2, 8, K), (2**31 * K, K, 1), device="meta")
    with pytest.raises(ValueError, match=r"a_row of group 1, slice 0 must be in \[0, 2147483647\], got 2147483648"):
        SliceTable.from_dense_pool([far_apart], [torch.empty(2, 5, 8, device="meta")], [1, 1])


def test_args_name_the_arguments_of_each_op():
    site = make_site([4], widths=[5, 6])
    table = by_slice(site)
    assert set(table.args()) == {"a", "b", "table", "widths", "cols", "v_width"}
    assert set(table.args("shrink")) == {"a", "table"}
    assert set(table.args("moe_gate_up_act")) == {*table.args(), "col_stride"}
    assert set(table.args("embedding_")) == {"a", "b", "table", "widths", "cols", "vocab", "token_major"}
    assert table.args("expand_")["cols"] == [0, 5]
    with pytest.raises(ValueError, match=r"polylora::SliceTable.args: op must be one of shrink, .*, got linear$"):
        table.args("linear")


def test_outputs_anywhere():
    """q, k, v at columns of the caller's choice in a wider y."""
    site = make_site([4, 2], widths=[5, 6])
    a, b = fill_stacked(site)
    table = SliceTable.from_vllm(a, b, site.ranks, cols=[20, 3])
    check(table, site, cols=[20, 3], y_width=30)


def test_arenas_may_grow_and_not_shrink():
    table = SliceTable.from_ragged_arena(torch.ones(8, K), torch.ones(100), slots=2, widths=[5], v_width=8)
    table.set_groups([0], a_row=4, rank=4, v_col=0, b_stride=8, b_offset=60)
    with pytest.raises(ValueError, match="rows of A of slice 0"):
        table.set_arenas(torch.ones(7, K), torch.ones(100))
    assert table.a[0].size(0) == 8, "a refused arena was taken"
    with pytest.raises(ValueError, match=r"set_arenas: a must be torch.float32"):
        table.set_arenas(torch.ones(16, K, dtype=torch.bfloat16), torch.ones(200, dtype=torch.bfloat16))
    table.set_arenas(torch.ones(16, K), torch.ones(200))
    table.set_groups([1], a_row=12, rank=4, v_col=0, b_stride=8, b_offset=160)


# ---------------------------------------------------------------------------------------------------------------
# Refusals


def stacked(slots: int = 2, r: int = 8, widths=(5, 6), k: int = K) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.ones(slots, 1, r, k) for _ in widths], [torch.ones(slots, 1, w, r) for w in widths]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: SliceTable.from_vllm(a, b, [4]), r"from_dense_pool: ranks must be one a slot \(2\), got 1"),
        (
            lambda a, b: SliceTable.from_vllm(a, b, [4, 9]),
            r"set_slot: ranks must be in \[0, \[8, 8\]\] by slice, got \[9, 9\]",
        ),
        (lambda a, b: SliceTable.from_vllm(a, b, [4, -1]), r"set_slot: ranks must be in"),
        (
            lambda a, b: SliceTable.from_vllm(a, b, [4, [1, 2, 3]]),
            r"ranks and scales must be a number, \[2\] or \[1, 2\]",
        ),
        (lambda a, b: SliceTable.from_vllm(a, b, [4, 4], [1.0]), r"scales must be one a slot \(2\), got 1"),
        (lambda a, b: SliceTable.from_vllm(a, b, [4, 4], float("nan")), r"scale of group 0, slice 0 must be finite"),
        (lambda a, b: SliceTable.from_vllm(a[:1], b, [4, 4]), r"a must be one tensor a slice \(2\), got 1 tensors"),
        (
            lambda a, b: SliceTable.from_vllm([a[0], a[1].half()], b),
            r"a\[1\] must be torch.float32 on cpu, got torch.float16",
        ),
        (lambda a, b: SliceTable.from_vllm([a[0], a[1][..., :5]], b), r"a\[1\] must be \[rows, 24\]"),
        (lambda a, b: SliceTable.from_vllm([t[:, 0] for t in a], b), r"from_vllm: a\[0\] must be 4-D and not empty"),
        (
            lambda a, b: SliceTable.from_vllm([t.expand(2, 3, 8, K) for t in a], b),
            r"a\[0\] must be \[slots, 1, ..., ...\]",
        ),
        (lambda a, b: SliceTable.from_vllm([t[:1] for t in a], b), r"b\[0\] must be 1 slots, got \[2, 5, 8\]"),
        (lambda a, b: SliceTable.from_vllm([t.mT.contiguous().mT for t in a], b), r"a\[0\] must be contiguous rows"),
        (lambda a, b: SliceTable.from_vllm(a, [t.mT.contiguous().mT for t in b]), r"b\[0\] must be contiguous rows"),
        (
            lambda a, b: SliceTable.from_vllm([t.double() for t in a], [t.double() for t in b]),
            r"a\[0\] must be bfloat16",
        ),
        (
            lambda a, b: SliceTable.from_sglang_dense(a[0][:, 0], b[0][:, 0], widths=[2, 3]),
            r"from_sglang_dense: a must be \[slots, 2 slices \* 8, k\], got \[2, 8, 24\]",
        ),
        (
            lambda a, b: SliceTable.from_sglang_dense(torch.ones(2, 16, K), b[0][:, 0], widths=[2, 2]),
            r"b must be 4 rows for widths \[2, 2\], got \[2, 5, 8\]",
        ),
        (lambda a, b: SliceTable.from_vllm(a, b).set_slot(2, 1), r"set_slot: slot must be in \[0, 2\), got 2"),
        (lambda a, b: SliceTable.from_vllm(a, b).clear_slot(-1), r"clear_slot: slot must be in \[0, 2\), got -1"),
        (
            lambda a, b: SliceTable.from_ragged_arena(
                a[0][0, 0], b[0].flatten(), slots=1, widths=[5], v_width=8
            ).set_slot(0, 1),
            r"set_slot: table must be built from a dense pool",
        ),
    ],
)
def test_refuses(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(*stacked())


def ragged(widths, cols, col_stride=1) -> SliceTable:
    return SliceTable.from_ragged_arena(
        torch.ones(8, K), torch.ones(512), slots=1, widths=widths, v_width=8, cols=cols, col_stride=col_stride
    )


@pytest.mark.parametrize(
    ("widths", "cols", "col_stride"),
    [
        ([8, 8], [0, 4], 1),
        ([8, 8], [4, 0], 1),
        ([8, 8], [3, 3], 1),
        ([9, 1], [0, 8], 1),
        ([4, 4, 20], [8, 30, 5], 1),
        ([8, 8], [0, 2], 2),
        ([8, 1], [1, 15], 2),
        ([8, 8, 8], None, 2),
    ],
)
def test_slices_that_share_columns_are_refused(widths, cols, col_stride: int):
    with pytest.raises(ValueError, match=r"SliceTable: cols must be such that no two slices share a column, got \["):
        ragged(widths, cols, col_stride)


@pytest.mark.parametrize("cols", [[-1, 8], [0, -8]])
def test_negative_columns_are_refused(cols):
    with pytest.raises(ValueError, match="SliceTable: cols must be >= 0, got"):
        ragged([8, 8], cols)


@pytest.mark.parametrize(
    ("widths", "cols", "col_stride"),
    [([8, 8], [8, 0], 1), ([8, 8], [0, 1], 2), ([8, 8], [1, 0], 2), ([8, 3], [0, 16], 2), ([8, 3], [0, 17], 2)],
)
def test_slices_side_by_side_and_interleaved(widths, cols, col_stride: int):
    assert ragged(widths, cols, col_stride).cols == cols


@given(
    slices=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 20)), min_size=1, max_size=4),
    col_stride=st.integers(1, 3),
)
def test_columns_are_refused_exactly_where_two_slices_meet(slices, col_stride: int):
    widths, cols = [w for w, _ in slices], [c for _, c in slices]
    taken = [c + n * col_stride for w, c in slices for n in range(w)]
    if len(set(taken)) == len(taken):
        ragged(widths, cols, col_stride)
        return
    with pytest.raises(ValueError, match="share a column"):
        ragged(widths, cols, col_stride)


def test_a_refused_slot_stays_as_it_was():
    a, b = stacked()
    table = SliceTable.from_vllm(a, b, [4, 4])
    before = table.table.clone()
    with pytest.raises(ValueError):
        table.set_slot(1, [8, 9])
    table.upload()
    assert torch.equal(table.table, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_upload_is_refused_during_capture():
    a, b = stacked()
    table = SliceTable.from_vllm([t.cuda() for t in a], [t.cuda() for t in b], [4, 4])
    with pytest.raises(RuntimeError, match="must not be called while a CUDA graph is captured"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            table.set_slot(0, 2)


def test_a_transposed_b_is_refused():
    """Its ranks for outputs would leave most of y untouched, without a word."""
    a = torch.zeros(4, 1, 8, 64)
    with pytest.raises(ValueError, match=r"b\[0\] must be \[..., width, R = 8\], as a has R = 8, got \[4, 8, 32\]"):
        SliceTable.from_dense_pool(a, torch.zeros(4, 8, 32), [8] * 4)
    assert SliceTable.from_dense_pool(a, torch.zeros(4, 32, 8), [8] * 4).widths == [32]


def test_one_rank_for_all_slots_is_refused_by_name():
    with pytest.raises(ValueError, match=r"ranks must be one a slot \(4\), got 8"):
        SliceTable.from_dense_pool(torch.zeros(4, 1, 8, 64), torch.zeros(4, 32, 8), 8)


def test_a_plan_of_other_rows_is_refused_by_name():
    with pytest.raises(ValueError, match=r"polylora::Plan.fill: group_ids must be \[6\], got \[2\]"):
        polylora.Plan(6, groups=4).fill(torch.zeros(2, dtype=torch.int32))
