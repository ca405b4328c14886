"""moe_gate_up_act and moe_act on a plan of rows: gate and up of a gated MLP that has no experts, against float64."""

from __future__ import annotations

import pytest
import reference as ref
import torch
from cases import activated, ops
from polylora.ops import ACTIVATIONS
from polylora.plan import plan_size
from polylora.table import SliceTable
from torch import Tensor

K, RANK = 96, 16
ACTS = ("silu", "gelu_tanh")
IDS = {
    "mixed": lambda rows, groups: torch.arange(rows) * 7 % (groups + 1) - 1,
    "segments": lambda rows, groups: torch.arange(rows) * groups // rows,
    "one": lambda rows, groups: torch.full((rows,), groups - 1),
    "none": lambda rows, groups: torch.full((rows,), -1),
}


class Mlp:
    """Weights of ``groups`` adapters, of ``ranks`` (of gate and up) in turn, else of ``rank``, 5, 0 and 8, up of the
    second one absent; NaN beyond them."""

    def __init__(
        self,
        groups: int,
        width: int,
        dtype: torch.dtype,
        device: str,
        rank: int = RANK,
        ranks: list[list[int]] | None = None,
    ) -> None:
        ranks = ranks or [[rank, rank], [5, 0], [0, 0], [8, 8]]
        rank = max(map(max, ranks))
        self.ranks = [ranks[g % len(ranks)] for g in range(groups)]
        self.a = [(torch.randn(groups, 1, rank, K) / K**0.5).to(dtype) for _ in range(2)]
        self.b = [torch.randn(groups, 1, width, rank).to(dtype) for _ in range(2)]
        for g, pair in enumerate(self.ranks):
            for s, r in enumerate(pair):
                self.a[s][g, 0, r:], self.b[s][g, 0, :, r:] = torch.nan, torch.nan
        self.a, self.b = [t.to(device) for t in self.a], [t.to(device) for t in self.b]
        self.table = SliceTable.from_vllm(self.a, self.b, self.ranks)
        self.groups, self.width, self.device, self.dtype = groups, width, device, dtype

    def plan(self, ids: Tensor) -> Tensor:
        plan = torch.zeros(plan_size(len(ids), self.groups), dtype=torch.int32, device=self.device)
        ops.plan(plan, ids.to(self.device, torch.int32), self.groups)
        return plan

    def rows(self, rows: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(rows, n).to(self.dtype).to(self.device) for n in (2 * self.width, K))

    def check(self, h: Tensor, y: Tensor, x: Tensor, ids: Tensor, act: str) -> None:
        """Of each adapter by itself, and of the rows without."""
        y, x = y.cpu(), x.cpu()
        for g in sorted(set(ids.tolist())):
            rows = (ids == g).nonzero().flatten()
            pieces = []
            for s, of_slice in enumerate(y[rows].chunk(2, 1)):
                r = 0 if g < 0 else self.ranks[g][s]
                a, b = (self.a[s][g, 0, :r].cpu(), self.b[s][g, 0, :, :r].cpu()) if r else (x[:0], of_slice[:0].T)
                pieces.append(ref.add(of_slice, ref.lora_delta(x[rows], a, b, 1.0)))
            want = activated(act, pieces)
            base = ref.activate(act, [of_slice.double() for of_slice in y[rows].chunk(2, 1)])
            has_delta = g >= 0 and max(self.ranks[g]) > 0
            ref.assert_close(f"h of group {g}", h.cpu()[rows], want, want.exact - base if has_delta else None)


def gate_up_act(mlp: Mlp, y: Tensor, x: Tensor, ids: Tensor, act: str) -> Tensor:
    t, h = mlp.table, torch.full((len(y), mlp.width), torch.nan, dtype=y.dtype, device=y.device)
    ops.moe_gate_up_act(h, y, x, t.a, t.b, t.table, mlp.plan(ids), t.widths, t.cols, t.v_width, 1, ACTIVATIONS[act])
    return h


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("rows, groups", [(1, 1), (5, 3), (16, 16), (64, 4), (128, 8), (200, 3), (300, 40), (700, 4)])
def test_rows_of_adapters_and_of_none(device, dtype, path, rows, groups, ids):
    torch.manual_seed(rows)
    mlp, ids = Mlp(groups, 136, dtype, device), IDS[ids](rows, groups)
    y, x = mlp.rows(rows)
    before = y.clone()
    mlp.check(gate_up_act(mlp, y, x, ids, "silu"), y, x, ids, "silu")
    assert torch.equal(y, before)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("width", [8, 72, 1040])
@pytest.mark.parametrize("rank", [3, 32, 33, 64, 128, 256])
def test_widths_ranks_and_activations(device, dtype, path, width, rank, act):
    torch.manual_seed(width)
    mlp, ids = Mlp(5, width, dtype, device, rank), IDS["mixed"](50, 5)
    y, x = mlp.rows(50)
    mlp.check(gate_up_act(mlp, y, x, ids, act), y, x, ids, act)


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("rows, groups", [(1, 1), (8, 8), (64, 8), (200, 3), (300, 8), (1024, 8), (1030, 8)])
@pytest.mark.parametrize("ranks", [[[64, 64]], [[256, 8], [8, 256], [0, 0], [40, 0], [33, 100], [0, 16], [128, 128]]])
def test_many_ranks(device, dtype, path, ranks, rows, groups, ids):
    """Gate and up of an adapter need not have as many; twice the same bits, and rows of no adapter the base's."""
    torch.manual_seed(rows)
    mlp, ids = Mlp(groups, 72, dtype, device, ranks=ranks), IDS[ids](rows, groups)
    y, x = mlp.rows(rows)
    once, again = (gate_up_act(mlp, y, x, ids, "silu") for _ in range(2))
    mlp.check(once, y, x, ids, "silu")
    assert torch.equal(once, again)
    without = (ids < 0).nonzero().flatten()
    base = gate_up_act(mlp, y, x, IDS["none"](rows, groups), "silu")
    assert torch.equal(once.cpu()[without], base.cpu()[without])


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_deltas_made_before_and_bits_that_are_alike_again(device, dtype, path, rows):
    """What linear_delta makes, moe_act adds; and one call gives what the call before gave."""
    mlp, ids = Mlp(3, 72, dtype, device), IDS["mixed"](rows, 3)
    y, x = mlp.rows(rows)
    t, plan, delta = mlp.table, mlp.plan(ids), torch.full_like(y, torch.nan)
    ops.linear_delta(delta, x, t.a, t.b, t.table, plan, t.widths, t.v_width)
    h = torch.full((rows, 72), torch.nan, dtype=dtype, device=device)
    ops.moe_act(h, y, delta, t.table, plan, t.widths, t.cols, ACTIVATIONS["silu"])
    mlp.check(h, y, x, ids, "silu")
    once, again = (gate_up_act(mlp, y, x, ids, "silu") for _ in range(2))
    assert torch.equal(once, again)
