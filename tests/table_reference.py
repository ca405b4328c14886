"""A float64 interpreter of slice tables: what any kernel must make of a table, in the plainest terms.

It goes through v as the kernels do (one column range a distinct A, shared where ``v_col`` is shared), so that wrong
``v_col`` or ``v_width`` show, and reads nothing that the table does not name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from polylora import _host
from torch import Tensor


@dataclass(frozen=True)
class TableEntry:
    a_row: int
    rank: int
    v_col: int
    b_stride: int
    b_offset: int
    scale: float
    epilogue: int


def read_entry(table: Tensor, group: int, slice_: int) -> TableEntry:
    """Decodes the 32 bytes of one entry of ``table`` (int32 ``[groups, slices, 8]``)."""
    raw = table[group, slice_].cpu().contiguous().view(torch.uint8)
    at = _host.SLICE_ENTRY_OFFSETS

    def field(name: str, dtype: torch.dtype) -> Tensor:
        return raw[at[name] : at[name] + dtype.itemsize].clone().view(dtype)

    ints = {name: int(field(name, torch.int32)) for name in ("a_row", "rank", "v_col", "b_stride", "epilogue")}
    return TableEntry(b_offset=int(field("b_offset", torch.int64)), scale=float(field("scale", torch.float32)), **ints)


def apply_table_linear(
    x: Tensor,
    row_groups: Sequence[int],
    table: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    widths: Sequence[int],
    cols: Sequence[int],
    *,
    v_width: int,
    y_width: int | None = None,
    col_stride: int = 1,
    token_major: bool = False,
) -> Tensor:
    """``y [rows, y_width]`` float64, the deltas alone; untouched elements are 0.

    ``x``: ``[rows, k]``, or token ids ``[rows]`` for an embedding.
    """
    rows = len(row_groups)
    y = torch.zeros(rows, y_width or sum(widths), dtype=torch.float64)
    for row, group in enumerate(row_groups):
        if group < 0:
            continue
        v = torch.full((v_width,), torch.nan, dtype=torch.float64)
        entries = [read_entry(table, group, s) for s in range(len(widths))]
        written: set[int] = set()
        for s, e in enumerate(entries):
            if e.rank == 0 or e.v_col in written:
                continue
            written.add(e.v_col)
            v[e.v_col : e.v_col + e.rank] = _shrink(x[row], a[s if len(a) > 1 else 0], e, token_major)
        for s, e in enumerate(entries):
            if e.rank == 0:
                continue
            assert e.epilogue == 0
            arena = b[s if len(b) > 1 else 0]
            part = arena.as_strided((widths[s], e.rank), (e.b_stride, 1), arena.storage_offset() + e.b_offset)
            delta = part.double() @ (e.scale * v[e.v_col : e.v_col + e.rank])
            y[row, cols[s] : cols[s] + (widths[s] - 1) * col_stride + 1 : col_stride] += delta
    return y


def _shrink(x: Tensor, a: Tensor, e: TableEntry, token_major: bool) -> Tensor:
    if x.dim():
        return a[e.a_row : e.a_row + e.rank].double() @ x.double()
    token = int(x)
    return (a[e.a_row + token, : e.rank] if token_major else a[e.a_row : e.a_row + e.rank, token]).double()


def poison_unread(
    table: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], widths: Sequence[int], token_rows: int = 0
) -> None:
    """Fills every element that no entry names with NaN, in place. ``token_rows``: vocabulary of a token-major A."""
    a_live = [torch.zeros(t.shape, dtype=torch.bool) for t in a]
    b_live = [torch.zeros(t.shape, dtype=torch.bool) for t in b]
    for group in range(table.size(0)):
        for s, width in enumerate(widths):
            e = read_entry(table, group, s)
            if e.rank == 0:
                continue
            if token_rows:
                a_live[s if len(a) > 1 else 0][e.a_row : e.a_row + token_rows, : e.rank] = True
            else:
                a_live[s if len(a) > 1 else 0][e.a_row : e.a_row + e.rank] = True
            b_live[s if len(b) > 1 else 0].as_strided((width, e.rank), (e.b_stride, 1), e.b_offset).fill_(True)
    for tensors, live in ((a, a_live), (b, b_live)):
        for t, mask in zip(tensors, live, strict=True):
            t.masked_fill_(~mask, torch.nan)


def assert_matches(got: Tensor, want: Tensor, bound: float = 1e-9) -> None:
    """Equal up to float64 rounding, nothing non-finite, and not a pair of zeros (a bypass would pass)."""
    assert torch.isfinite(got).all(), "NaN or infinity came out of memory that must not be read"
    assert want.abs().max() > 0, "a weak case: no delta at all"
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)
