"""The MoE ops: both halves, in place and fused into the engine's seams, in both row orders."""

from __future__ import annotations

import pytest
import reference as ref
import torch
from cases import (
    LAYOUTS,
    Guarded,
    assert_lora_matters,
    check_parts,
    expected_act,
    expected_deltas,
    expected_reduce,
    given_v,
    make_moe_case,
    make_moe_half,
    ops,
    written,
)

ORDER = pytest.mark.parametrize("row_map", [False, True], ids=["pair_order", "row_map"])
GATED = pytest.mark.parametrize("gated, interleaved", [(False, False), (True, False), (True, True)],
                                ids=["non_gated", "gated", "interleaved"])  # fmt: skip

SHAPES = pytest.mark.parametrize("shape", [{}, {"k": 128, "width": 64, "aligned": True}], ids=["odd", "aligned"])


def run_gate_up(case, half) -> None:
    ops.moe_gate_up_(
        half.y.view, half.x, **half.args(), plan=case.plan, top_k=case.top_k, col_stride=half.col_stride,
        row_map=case.row_map,
    )  # fmt: skip
    check_parts(half.parts, half.y.view)
    half.y.assert_written_only("y of gate/up", written(half.parts, half.y.view.shape))


def run_down(case, half) -> None:
    ops.moe_down_(
        half.y.view, half.x, **half.args(), plan=case.plan, topk_weights=case.topk_weights, row_map=case.row_map
    )
    check_parts(half.parts, half.y.view)
    half.y.assert_written_only("y of down", written(half.parts, half.y.view.shape))


def blank(case, rows, width) -> Guarded:
    return Guarded(torch.full((rows, width), torch.nan, dtype=case.dtype), case.device, case.gen, left=8, right=8)


def run_delta(case, half, **more) -> torch.Tensor:
    """The deltas by themselves; what stands in rows without an adapter is nobody's business, so it is made NaN."""
    args = {"x": half.x, "plan": case.plan, "row_map": case.row_map} | half.args() | more
    del args["cols"]
    delta = blank(case, case.positions, sum(half.widths))
    ops.moe_delta(delta.view, **args)
    delta.assert_written_only("delta", torch.ones(delta.view.shape, dtype=torch.bool))
    active = torch.tensor([group >= 0 for group in case.rows.row_group], dtype=torch.bool, device=case.device)
    if case.positions:
        delta.view[~active] = torch.nan
    return delta.view


def run_act(case, half, act, alpha=1.702, limit=7.0, v=None) -> None:
    """In one op, and with the deltas made before; of v where it is given."""
    parts = expected_act(case, half, act, alpha, limit)
    shape = (case.positions, half.widths[0])
    names = {"act": ref.ACTIVATIONS[act], "alpha": alpha, "limit": limit, "col_stride": half.col_stride}
    h = blank(case, *shape)
    ops.moe_gate_up_act(
        h.view, half.y.view, half.x, **half.args(), plan=case.plan, top_k=case.top_k, row_map=case.row_map, **names
    )
    check_parts(parts, h.view)
    h.assert_written_only("h", written(parts, shape))

    delta = run_delta(case, half, top_k=case.top_k, v=v)
    apart = blank(case, *shape)
    pairs = 0 if case.row_map is None else case.topk_ids.numel()
    ops.moe_act(
        apart.view, half.y.view, delta, half.pools.table, case.plan, half.widths, half.cols, **names,
        mapped_pairs=pairs,
    )  # fmt: skip
    check_parts(parts, apart.view)
    apart.assert_written_only("h with a delta", written(parts, shape))
    half.y.assert_written_only("y1, which is only read", torch.zeros(half.y.view.shape, dtype=torch.bool))


def run_reduce(case, half, y2_weighted, v=None) -> None:
    """In one op, and with the deltas made before; of v where it is given."""
    parts = expected_reduce(case, half, y2_weighted)
    shape = (case.tokens, half.widths[0])
    out = blank(case, *shape)
    ops.moe_down_reduce(
        out.view, half.y.view, half.x, **half.args(), plan=case.plan, topk_weights=case.topk_weights,
        row_map=case.row_map, y2_weighted=y2_weighted,
    )  # fmt: skip
    check_parts(parts, out.view)
    out.assert_written_only("out", torch.ones(shape, dtype=torch.bool))

    delta = run_delta(case, half, topk_weights=case.topk_weights, v=v)
    apart = blank(case, *shape)
    ops.moe_reduce(
        apart.view, half.y.view, delta, half.pools.table, case.plan, case.topk_weights, half.widths, half.cols,
        row_map=case.row_map, y2_weighted=y2_weighted,
    )  # fmt: skip
    check_parts(parts, apart.view)
    apart.assert_written_only("out with a delta", torch.ones(shape, dtype=torch.bool))
    half.y.assert_written_only("y2, which is only read", torch.zeros(half.y.view.shape, dtype=torch.bool))


# -------------------------------------------------------------------------------------------- gate/up and down


@pytest.mark.trap(13, 15)
@ORDER
@GATED
@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_gate_up_adds_into_the_engines_buffer(device, dtype, path, tokens, gated, interleaved, row_map):
    case = make_moe_case(device, dtype, tokens=tokens, row_map=row_map, seed=tokens)
    run_gate_up(case, make_moe_half(case, down=False, gated=gated, interleaved=interleaved))


@pytest.mark.trap(13, 15)
@ORDER
@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_down_adds_the_weighted_delta(device, dtype, path, tokens, row_map):
    case = make_moe_case(device, dtype, tokens=tokens, row_map=row_map, seed=tokens)
    run_down(case, make_moe_half(case, down=True))


@ORDER
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pool_layout(device, dtype, path, layout, row_map):
    case = make_moe_case(device, dtype, row_map=row_map)
    run_gate_up(case, make_moe_half(case, down=False, layout=layout))
    run_down(case, make_moe_half(case, down=True, layout=layout))


@ORDER
@GATED
def test_aligned_expert_pools_take_the_fast_path(device, dtype, path, gated, interleaved, row_map):
    case = make_moe_case(device, dtype, tokens=40, row_map=row_map, block=16)
    shape = {"k": 128, "width": 64, "aligned": True}
    run_gate_up(case, make_moe_half(case, down=False, gated=gated, interleaved=interleaved, **shape))
    run_down(case, make_moe_half(case, down=True, **shape))


@ORDER
def test_a_and_b_shared_by_all_experts(device, dtype, path, row_map):
    """Shared-outer LoRA: the entries of all experts of a slot coincide."""
    case = make_moe_case(device, dtype, row_map=row_map, tokens=25)
    run_gate_up(case, make_moe_half(case, down=False, shared_outer=True))
    run_down(case, make_moe_half(case, down=True, shared_outer=True))


@ORDER
@GATED
@SHAPES
def test_a_shared_by_all_experts_is_multiplied_once_a_token(device, dtype, path, shape, gated, interleaved, row_map):
    case = make_moe_case(device, dtype, row_map=row_map, tokens=25, block=16)
    half = make_moe_half(case, down=False, shared_outer=True, gated=gated, interleaved=interleaved, **shape)
    plan = ref.new_plan(case.tokens, case.slots, device=device)
    ops.plan(plan, case.token_slots, case.slots)
    v = torch.full((case.tokens, half.pools.v_width), torch.nan, device=device)
    ops.shrink(v, half.x, half.pools.a, half.pools.table[:: case.experts].contiguous(), plan)
    run_act(case, half, "silu", v=v)


@ORDER
@SHAPES
@pytest.mark.parametrize("rank", [8, 128])
def test_v_of_every_row_instead_of_its_x(device, dtype, path, shape, rank, row_map):
    """Down: what reduced v over the ranks of a row-parallel layer has no x of its own."""
    case = make_moe_case(device, dtype, row_map=row_map, tokens=25, block=16)
    half = make_moe_half(case, down=True, weighted=False, ranks=(rank, max(rank // 2, 1)), **shape)
    run_reduce(case, half, y2_weighted=False, v=given_v(case, half, down=True))


@ORDER
@SHAPES
@pytest.mark.parametrize("rank", [8, 128])
def test_where_v_is_given_x_and_a_say_nothing(device, dtype, path, shape, rank, row_map):
    """Not how wide x is, where A lies, nor whether gate and up have an A each."""
    case = make_moe_case(device, dtype, row_map=row_map, tokens=25, block=16)
    half = make_moe_half(case, down=False, shared_outer=True, ranks=(rank,), shared_a=1.0, layout="ragged", **shape)
    v = given_v(case, half, down=False)
    want = run_delta(case, half, top_k=case.top_k, v=v)
    check_parts(expected_deltas(case, half, down=False, weighted=False), want)
    x = torch.full((case.tokens, 5), torch.nan, dtype=dtype, device=device)[:, 1:4]
    table = half.pools.table.clone()
    table[:, :, 0] = torch.arange(2 * len(table), device=device).view(-1, 2) + 10**6
    for a in ([], half.pools.a, [x[:1], x[:2]]):
        got = run_delta(case, half, top_k=case.top_k, v=v, x=x, a=a, table=table)
        ref.assert_same_bits("deltas of v", got, want)


@SHAPES
def test_v_stays_what_it_is_while_the_map_changes(device, dtype, path, shape):
    """One v a token, and two steps that permute their pairs in the same buffers."""
    case = make_moe_case(device, dtype, row_map=True, tokens=25, block=16)
    half = make_moe_half(case, down=False, shared_outer=True, **shape)
    v = given_v(case, half, down=False)
    first = run_delta(case, half, top_k=case.top_k, v=v)
    moved = torch.randperm(case.positions, generator=case.gen)
    case.row_map.copy_(case.row_map[moved.to(device)])
    case.rows = ref.moe_rows(case.topk_ids, case.token_slots, case.slots, case.experts, None, case.row_map)
    ops.moe_plan(case.plan, case.topk_ids, case.token_slots, case.slots, case.experts, None, case.row_map)
    second = run_delta(case, half, top_k=case.top_k, v=v)
    check_parts(expected_deltas(case, half, down=False, weighted=False), second)
    active = torch.tensor(case.rows.row_group) >= 0
    ref.assert_same_bits("deltas where they moved", second.cpu()[active], first.cpu()[moved][active])


@ORDER
@SHAPES
def test_deltas_of_tokens_with_the_weights_of_their_pairs(device, dtype, path, shape, row_map):
    case = make_moe_case(device, dtype, row_map=row_map, tokens=25, block=16)
    half = make_moe_half(case, down=False, **shape)
    delta = run_delta(case, half, top_k=case.top_k, topk_weights=case.topk_weights)
    check_parts(expected_deltas(case, half, down=False, weighted=True), delta)


@ORDER
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths", [(64, 32), (40, 7, 19), (8, 64, 16, 16), (111, 19, 80, 1, 64, 99, 7, 33)],
                         ids=["2", "3", "4", "8"])  # fmt: skip
def test_any_number_of_unequal_slices(device, dtype, path, widths, layout, row_map):
    case = make_moe_case(device, dtype, row_map=row_map, tokens=9)
    for down in (False, True):
        half = make_moe_half(case, down=down, widths=widths, layout=layout)
        (run_down if down else run_gate_up)(case, half)
        more = {"topk_weights": case.topk_weights} if down else {"top_k": case.top_k}
        check_parts(expected_deltas(case, half, down, weighted=down), run_delta(case, half, **more))


@pytest.mark.trap(15)
@ORDER
def test_minus_one_experts_under_expert_parallelism(device, dtype, path, row_map):
    """Half the experts live elsewhere: their rows are noise, weights NaN, and stay so."""
    case = make_moe_case(device, dtype, tokens=30, expert_map=True, row_map=row_map, no_expert=0.3)
    assert ref.NO_ROW in case.rows.row_group
    run_gate_up(case, make_moe_half(case, down=False))
    run_down(case, make_moe_half(case, down=True))


@pytest.mark.trap(15)
@ORDER
def test_the_same_expert_twice_in_a_tokens_top_k(device, dtype, path, row_map):
    case = make_moe_case(device, dtype, tokens=20, top_k=6, experts=2, no_expert=0.0, row_map=row_map)
    run_gate_up(case, make_moe_half(case, down=False))
    run_down(case, make_moe_half(case, down=True))
    run_reduce(case, make_moe_half(case, down=True, weighted=False), y2_weighted=False)


@pytest.mark.trap(7)
@SHAPES
@pytest.mark.parametrize("row_map", [[], [-1] * 7], ids=["no_positions", "padding"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_maps_without_any_pair(device, dtype, path, tokens, row_map, shape):
    """Nothing to do but sums of nothing: an expert-parallel rank to which no token of the step came."""
    case = make_moe_case(device, dtype, tokens=tokens, row_map=row_map)
    run_gate_up(case, make_moe_half(case, down=False, **shape))
    run_down(case, make_moe_half(case, down=True, **shape))
    run_act(case, make_moe_half(case, down=False, **shape), "silu")
    run_reduce(case, make_moe_half(case, down=True, weighted=False, **shape), y2_weighted=False)


@ORDER
def test_invalid_slots_experts_and_positions_are_nobody(device, dtype, path, row_map):
    case = make_moe_case(device, dtype, tokens=40, invalid=True, row_map=row_map)
    assert case.rows.invalid > 0
    run_gate_up(case, make_moe_half(case, down=False))
    run_down(case, make_moe_half(case, down=True))
    run_act(case, make_moe_half(case, down=False), "silu")
    run_reduce(case, make_moe_half(case, down=True, weighted=False), y2_weighted=False)


@ORDER
@pytest.mark.parametrize("slot_ids", ["none", "one", "base_and_one"])
def test_no_adapter_one_adapter_and_both(device, dtype, path, slot_ids, row_map):
    case = make_moe_case(device, dtype, tokens=21, slot_ids=slot_ids, row_map=row_map)
    run_gate_up(case, make_moe_half(case, down=False))
    run_down(case, make_moe_half(case, down=True))
    run_act(case, make_moe_half(case, down=False), "silu")
    run_reduce(case, make_moe_half(case, down=True, weighted=False), y2_weighted=False)


@ORDER
@pytest.mark.parametrize("k, width", [(1, 1), (19, 99), (99, 19), (80, 111), (513, 7)])
def test_any_expert_widths(device, dtype, path, k, width, row_map):
    case = make_moe_case(device, dtype, tokens=9, row_map=row_map)
    run_gate_up(case, make_moe_half(case, down=False, k=k, width=width))
    run_down(case, make_moe_half(case, down=True, k=k, width=width))


@pytest.mark.parametrize("rank", [1, 7, 32, 64, 128, 256])
def test_any_expert_rank(device, dtype, path, rank):
    case = make_moe_case(device, dtype, tokens=9, experts=4)
    run_gate_up(case, make_moe_half(case, down=False, ranks=(rank, max(rank // 2, 1))))
    run_down(case, make_moe_half(case, down=True, ranks=(rank,)))


# -------------------------------------------------------------------------------------------- gate_up_act


FORMS = [
    (act, *form)
    for act in ref.ACTIVATIONS
    for form in ((False, False), (True, False), (True, True))
    if form[0] or act != "swiglu_oai"
]


@ORDER
@pytest.mark.parametrize("act, gated, interleaved", FORMS)
def test_every_activation(device, dtype, path, act, gated, interleaved, row_map):
    case = make_moe_case(device, dtype, tokens=30, row_map=row_map)
    run_act(case, make_moe_half(case, down=False, gated=gated, interleaved=interleaved), act)


@pytest.mark.parametrize("alpha, limit", [(1.702, 7.0), (1.702, 0.5), (0.7, 1.25)])
def test_swiglu_oai_clamps_before_it_activates(device, dtype, path, alpha, limit):
    """Limits small enough that most gates and ups are cut."""
    case = make_moe_case(device, dtype, tokens=30)
    run_act(case, make_moe_half(case, down=False, interleaved=True), "swiglu_oai", alpha, limit)


@ORDER
@pytest.mark.parametrize("tokens", [0, 1, 7, 33, 100])
def test_act_writes_every_row_that_exists_and_no_other(device, dtype, path, tokens, row_map):
    case = make_moe_case(device, dtype, tokens=tokens, row_map=row_map, expert_map=True, seed=tokens)
    run_act(case, make_moe_half(case, down=False, layout="ragged"), "silu")


@ORDER
def test_act_on_aligned_shapes(device, dtype, path, row_map):
    case = make_moe_case(device, dtype, tokens=50, row_map=row_map, block=16)
    for interleaved in (False, True):
        run_act(case, make_moe_half(case, down=False, k=128, width=96, aligned=True, interleaved=interleaved), "silu")
    run_act(case, make_moe_half(case, down=False, k=128, width=96, aligned=True, gated=False), "relu2")


@pytest.mark.trap(7, 13)
def test_act_of_extreme_gates_is_finite_where_the_formula_is(device, dtype, path):
    """silu(-100), gelu(-30), exp overflow inside a sigmoid: 0, not NaN."""
    big = 200.0
    gate = torch.tensor([-big, -30, -11, -1e-3, 0, 1e-3, 11, 30, big]).to(dtype)
    rows, width = 4, len(gate)
    y1 = torch.cat([gate, torch.ones(width, dtype=dtype)]).repeat(rows, 1).to(device)
    plan = ref.new_plan(rows, 1, device=device)
    ops.moe_plan(plan, torch.zeros((rows, 1), dtype=torch.int32, device=device),
                 torch.full((rows,), -1, dtype=torch.int32, device=device), 1, 1, None, None)  # fmt: skip
    table = torch.zeros((1, 2, 8), dtype=torch.int32, device=device)
    a, b = torch.zeros((8, 16), dtype=dtype, device=device), torch.zeros(64, dtype=dtype, device=device)
    x = torch.zeros((rows, 16), dtype=dtype, device=device)
    for act, number in ref.ACTIVATIONS.items():
        h = torch.full((rows, width), torch.nan, dtype=dtype, device=device)
        ops.moe_gate_up_act(h, y1, x, [a], [b], table, plan, [width] * 2, [0, width], 1, 1, number)
        exact = ref.activate(act, [y1[:, :width].double().cpu(), y1[:, width:].double().cpu()])
        # near zero an fp32 erf or tanh has an absolute error of a few ulps of 1, times the gate
        off = (h.double().cpu() - exact).abs()
        allowed = ref.UNIT[dtype] * exact.abs() + 4e-7 * gate.double().abs() + ref.tiny(dtype)
        assert (off <= 2 * allowed).all(), f"{act}: {h[0].tolist()}, want {exact[0].tolist()}"


# -------------------------------------------------------------------------------------------- down_reduce

WEIGHTED = pytest.mark.parametrize("y2_weighted", [False, True], ids=["plain_y2", "weighted_y2"])


@WEIGHTED
@ORDER
@pytest.mark.parametrize("tokens", [0, 1, 7, 33, 100])
def test_reduce_sums_every_tokens_pairs(device, dtype, path, tokens, row_map, y2_weighted):
    case = make_moe_case(device, dtype, tokens=tokens, row_map=row_map, seed=tokens)
    run_reduce(case, make_moe_half(case, down=True, weighted=y2_weighted), y2_weighted)


@pytest.mark.trap(15)
@WEIGHTED
@ORDER
def test_reduce_ignores_pairs_of_other_ranks(device, dtype, path, row_map, y2_weighted):
    """y2 of a missing pair is noise and its weight NaN; a token without any pair gets zero."""
    case = make_moe_case(device, dtype, tokens=40, expert_map=True, no_expert=0.6, top_k=2, row_map=row_map)
    run_reduce(case, make_moe_half(case, down=True, weighted=y2_weighted, layout="packed"), y2_weighted)


@WEIGHTED
@ORDER
def test_reduce_on_aligned_shapes(device, dtype, path, row_map, y2_weighted):
    case = make_moe_case(device, dtype, tokens=50, row_map=row_map, block=16)
    run_reduce(case, make_moe_half(case, down=True, weighted=y2_weighted, k=96, width=256, aligned=True), y2_weighted)


def test_reduce_of_pairs_missing_from_the_row_map(device, dtype, path):
    """A pair with a valid expert but no position (dropped by the engine) contributes nothing."""
    case = make_moe_case(device, dtype, tokens=12, row_map=True, no_expert=0.0)
    dropped = case.row_map.clone()
    dropped[::5] = -1
    case.row_map = dropped
    case.rows = ref.moe_rows(case.topk_ids, case.token_slots, case.slots, case.experts, None, dropped)
    ops.moe_plan(case.plan, case.topk_ids, case.token_slots, case.slots, case.experts, None, dropped)
    run_reduce(case, make_moe_half(case, down=True, weighted=False), y2_weighted=False)


@pytest.mark.trap(12)
@ORDER
@pytest.mark.parametrize("y2_weighted", [False, True])
def test_reduce_adds_in_ascending_order_of_a_tokens_experts(device, dtype, path, row_map, y2_weighted):
    """2^15 - 2^15 + 2^-10 is 2^-10 from the left and 0 from the right, whatever order the positions stand in."""
    values = torch.tensor([2.0**15, -(2.0**15), 2.0**-10]).to(dtype)  # 25 bits apart, within fp16
    topk = torch.tensor([[2, 0, 1]] * 5, dtype=torch.int32, device=device)
    positions = torch.tensor([p for t in range(5) for p in (3 * t + 2, 3 * t, -1, 3 * t + 1)], dtype=torch.int32)
    row_map = positions.to(device) if row_map else None
    y2 = values.repeat(5)[:, None].repeat(1, 40)
    if row_map is not None:
        y2 = torch.where(positions[:, None] >= 0, y2[positions.clamp(min=0).long()], torch.nan)
    rows = y2.shape[0]
    plan = ref.new_plan(rows, 3, 15 if row_map is not None else 0, device)
    slots = torch.full((5,), -1, dtype=torch.int32, device=device)
    ops.moe_plan(plan, topk, slots, 1, 3, None, row_map)
    table = torch.zeros((3, 1, 8), dtype=torch.int32, device=device)
    a, b = torch.zeros((8, 16), dtype=dtype, device=device), torch.zeros(64, dtype=dtype, device=device)
    h, out = torch.zeros((rows, 16), dtype=dtype, device=device), torch.empty((5, 40), dtype=dtype, device=device)
    weights = torch.ones((5, 3), device=device)
    ops.moe_down_reduce(
        out, y2.to(device), h, [a], [b], table, plan, weights, [40], [0], 1, row_map=row_map, y2_weighted=y2_weighted
    )
    ref.assert_same_bits("sums", out, torch.full((5, 40), 2.0**-10, dtype=dtype))


# -------------------------------------------------------------------------------------------- deltas made before


@pytest.mark.parametrize("tokens", [30, 1200], ids=["short", "long"])
@pytest.mark.parametrize("gated, interleaved", [(False, False), (True, False), (True, True)],
                         ids=["non_gated", "gated", "interleaved"])  # fmt: skip
@ORDER
def test_seams_add_the_deltas_they_are_given(device, dtype, path, tokens, gated, interleaved, row_map):
    """Of rows with an adapter, and of no other: theirs are NaN. Long calls read the deltas at another place."""
    top_k, experts, width = 4, 16, 1024
    gen = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(experts, generator=gen)[:top_k] for _ in range(tokens)]).int()
    ids[torch.rand(ids.shape, generator=gen) < 0.1] = -1
    slots = torch.randint(-1, 2, (tokens,), generator=gen, dtype=torch.int32)
    pairs = tokens * top_k
    positions = torch.randperm(pairs + 8, generator=gen).int() if row_map else torch.arange(pairs).int()
    positions[positions >= pairs] = -1
    rows = len(positions)
    assert (2 * rows * width > 8 << 20) == (tokens > 30)  # bytes of one slice's deltas: the kernels' limit
    exists = (positions >= 0) & (ids.flatten()[positions.clamp(min=0).long()] >= 0)
    active = exists & (slots[positions.clamp(min=0).long() // top_k] >= 0)
    plan = ref.new_plan(rows, 2 * experts, pairs if row_map else 0, device)
    mapped = positions.to(device) if row_map else None
    ops.moe_plan(plan, ids.to(device), slots.to(device), 2, experts, None, mapped)

    def random(columns: int) -> torch.Tensor:
        return torch.randn((rows, columns), generator=gen).to(dtype)

    slices = 2 if gated else 1
    y1, delta, y2, of_down = random(slices * width), random(slices * width), random(width), random(width)
    delta[~active], of_down[~active] = torch.nan, torch.nan
    table = torch.zeros((2 * experts, slices, 8), dtype=torch.int32, device=device)
    cols, stride = ([0, 1], 2) if interleaved else ([0, width][:slices], 1)
    h = torch.full((rows, width), 7.0, dtype=dtype, device=device)
    ops.moe_act(h, y1.to(device), delta.to(device), table, plan, [width] * slices, cols, ref.ACTIVATIONS["silu"],
                col_stride=stride, mapped_pairs=pairs if row_map else 0)  # fmt: skip
    sums = [y1[:, c::stride][:, :width].double() for c in cols]
    for s, part in enumerate(sums):
        part += torch.where(active[:, None], delta[:, s * width : (s + 1) * width].double(), 0.0)
    right = torch.where(exists[:, None], ref.activate("silu", sums), 7.0)
    off = (h.double().cpu() - right).abs()
    assert (off <= 1.01 * ref.UNIT[dtype] * right.abs() + 1e-6 * (1 + right.abs())).all(), f"h: off by {off.max()}"

    weights = torch.rand((tokens, top_k), generator=gen)
    out = torch.full((tokens, width), torch.nan, dtype=dtype, device=device)
    table = table[:, :1].contiguous()
    ops.moe_reduce(out, y2.to(device), of_down.to(device), table, plan, weights.to(device), [width], [0],
                   row_map=mapped)  # fmt: skip
    right, sizes = torch.zeros((2, tokens, width), dtype=torch.float64)
    for row in exists.nonzero().flatten().tolist():
        pair = int(positions[row])
        value = weights.flatten()[pair].double() * y2[row].double()
        value += of_down[row].double() if active[row] else 0.0
        right[pair // top_k] += value
        sizes[pair // top_k] += value.abs()
    off = (out.double().cpu() - right).abs()
    assert (off <= 1.01 * ref.UNIT[dtype] * right.abs() + 2e-6 * (1 + sizes)).all(), f"out: off by {off.max()}"


@pytest.mark.parametrize("tokens", [1, 10], ids=["no_tiles", "tiles"])
def test_layers_without_any_slot_are_the_base_model(device, dtype, path, tokens):
    """An empty table, which nothing may read, and no kernel of shrink before the seams."""
    top_k, inner, hidden, pairs = 4, 64, 72, 4 * tokens
    gen = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen).to(dtype).to(device)

    plan = ref.new_plan(pairs, 0, device=device)
    ids = torch.arange(top_k, dtype=torch.int32, device=device).repeat(tokens, 1)
    ops.moe_plan(plan, ids, torch.zeros(tokens, dtype=torch.int32, device=device), 0, top_k, None, None)
    a, b = [random(8, hidden)], [random(64)]
    y1, y2, h, out = random(pairs, inner), random(pairs, hidden), random(pairs, inner), random(tokens, hidden)
    weights = torch.rand((tokens, top_k), generator=gen).to(device)
    table = torch.zeros((0, 1, 8), dtype=torch.int32, device=device)
    ops.moe_gate_up_act(h, y1, random(tokens, hidden), a, b, table, plan, [inner], [0], 8, top_k, 3)
    right = y1.double().clamp(min=0) ** 2
    assert ((h.double() - right).abs() <= 1.01 * ref.UNIT[dtype] * right + ref.tiny(dtype)).all()
    of_down = [random(8, inner)]
    ops.moe_down_reduce(out, y2, h, of_down, b, table, plan, weights, [hidden], [0], 8)
    right = (y2.view(tokens, top_k, hidden).double() * weights[:, :, None].double()).sum(1)
    assert ((out.double() - right).abs() <= 1.01 * ref.UNIT[dtype] * right.abs() + 1e-5).all()


# -------------------------------------------------------------------------------------------- streams of weights

STREAM_SHAPES = pytest.mark.parametrize(
    "k, width, ranks",
    [(64, 64, (16,)), (328, 136, (4, 8, 16, 24)), (512, 256, (8, 32)), (200, 72, (64, 5)), (1024, 520, (128, 16)),
     (128, 40, (256, 1))],
    ids=["one_chunk", "odd_chunks", "r32", "r64", "r128", "r256"],
)  # fmt: skip


@ORDER
@GATED
@STREAM_SHAPES
@pytest.mark.parametrize("tokens", [1, 29])
def test_streams_of_gate_up_weights(device, dtype, path, tokens, gated, interleaved, k, width, ranks, row_map):
    case = make_moe_case(device, dtype, tokens=tokens, row_map=row_map, block=16, seed=tokens)
    shape = {"k": k, "width": width, "ranks": ranks, "aligned": True, "gated": gated, "interleaved": interleaved}
    run_act(case, make_moe_half(case, down=False, **shape), "silu" if gated else "relu2")
    run_gate_up(case, make_moe_half(case, down=False, **shape))


@ORDER
@STREAM_SHAPES
@pytest.mark.parametrize("tokens, top_k, experts", [(1, 4, 8), (29, 4, 8), (300, 4, 8), (70, 22, 24), (9, 40, 48)],
                         ids=["one", "few", "long_runs", "many_pairs", "top_40"])  # fmt: skip
def test_streams_of_down_weights(device, dtype, path, tokens, top_k, experts, k, width, ranks, row_map):
    """Up to 1024 pairs each token reads its own, above them groups do; more than 32 pairs a token are no few either."""
    case = make_moe_case(
        device, dtype, tokens=tokens, top_k=top_k, experts=experts, row_map=row_map, block=16, seed=tokens
    )
    half = make_moe_half(case, down=True, weighted=False, k=k, width=width, ranks=ranks, aligned=True)
    run_reduce(case, half, y2_weighted=False)
    if tokens < 100:
        run_down(case, make_moe_half(case, down=True, k=k, width=width, ranks=ranks, aligned=True))


@pytest.mark.parametrize("tokens", [3, 300])
def test_long_runs_of_one_expert(device, dtype, path, tokens):
    """All pairs of a slot in one group: tiles of 16 rows, many a run."""
    case = make_moe_case(device, dtype, tokens=tokens, top_k=2, slots=2, experts=1, no_expert=0.0)
    shape = {"k": 256, "width": 96, "ranks": (16,), "aligned": True}
    run_act(case, make_moe_half(case, down=False, **shape), "silu")
    run_reduce(case, make_moe_half(case, down=True, weighted=False, **shape), y2_weighted=False)


@pytest.mark.trap(15, 29)
@GATED
@pytest.mark.parametrize("ranks", [(16, 5), (64, 1), (8, 128)], ids=str)
@pytest.mark.parametrize(
    "more",
    [{"tokens": 1}, {"tokens": 8}, {"slots": 2, "experts": 2, "no_expert": 0.0}, {"slots": 1, "experts": 1},
     {"expert_map": True, "no_expert": 0.3}, {"invalid": True}, {"slot_ids": "base_and_one"}, {"slot_ids": "none"}],
    ids=["one token", "32 pairs", "each expert twice", "more than 16 rows of one", "experts elsewhere", "invalid ids",
         "base rows", "no adapter"],
)  # fmt: skip
def test_up_to_32_pairs(device, dtype, path, more, ranks, gated, interleaved):
    """On a GPU their deltas have kernels of their own."""
    case = make_moe_case(device, dtype, **{"tokens": 7} | more)
    assert case.positions <= 32
    shape = {"k": 128, "width": 64, "ranks": ranks, "aligned": True}
    run_act(case, make_moe_half(case, down=False, gated=gated, interleaved=interleaved, **shape), "silu")
    run_reduce(case, make_moe_half(case, down=True, weighted=False, **shape), y2_weighted=False)


@pytest.mark.trap(6)
@ORDER
@pytest.mark.parametrize(
    "tokens, slots, experts, k", [(19, 3, 5, 80), (7, 3, 5, 96), (640, 35, 4, 72)], ids=["few", "32 pairs", "long runs"]
)
@pytest.mark.parametrize("down", [False, True], ids=["gate_up", "down"])
def test_inf_and_nan_of_a_row_stay_in_that_row(device, dtype, path, tokens, slots, experts, k, down, row_map):
    """All others keep their bits: what lies beyond K, a rank or a run is not multiplied, whatever was there before."""
    case = make_moe_case(
        device, dtype, tokens=tokens, slots=slots, experts=experts, slot_ids="segments", row_map=row_map, block=16
    )
    half = make_moe_half(case, down=down, k=k, width=40, ranks=(16, 5), aligned=True)
    more = {"topk_weights": case.topk_weights} if down else {"top_k": case.top_k}
    before = run_delta(case, half, **more).cpu()
    spoilt = range(0, half.x.shape[0], 3)
    half.x[spoilt, ::8] = torch.inf
    half.x[spoilt, 1::8] = torch.nan
    after = run_delta(case, half, **more).cpu()
    kept = torch.ones(before.shape, dtype=torch.bool)
    kept[[p for p in range(case.positions) if (p if down else case.of_token(p)) in spoilt]] = False
    ref.assert_same_bits("deltas of other rows", after, before, kept)
    active = torch.tensor([group >= 0 for group in case.rows.row_group])
    assert kept[active].any() and not kept[active].all() and before[active][kept[active]].isfinite().all()


@pytest.mark.cuda_only
@ORDER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "tokens, slots, experts, slot_ids, k, ranks",
    [
        (640, 2, 70, "mixed", 264, (64, 5)),
        (640, 35, 4, "segments", 200, (16, 4)),
        (640, 35, 4, "segments", 520, (64, 5)),
        (640, 35, 4, "segments", 136, (128, 16)),
        (1024, 25, 4, "segments", 1032, (16, 64)),
    ],
    ids=["many", "few", "few of 64 ranks", "more ranks than a pass takes", "K in two parts"],
)
def test_prompts_of_many_groups(device, dtype, tokens, slots, experts, slot_ids, k, ranks, row_map):
    """16 rows for each group and a wide tile for each of 132 SMs: on 9.0, shrink has a kernel of its own. Of a few rows
    a tile, or of many."""
    case = make_moe_case(
        device, dtype, tokens=tokens, slots=slots, experts=experts, slot_ids=slot_ids, row_map=row_map, block=16
    )
    assert case.positions >= 16 * case.groups and case.positions // 128 + case.groups >= 132
    shape = {"k": k, "width": 40, "ranks": ranks, "aligned": True}
    run_act(case, make_moe_half(case, down=False, **shape), "silu")
    run_reduce(case, make_moe_half(case, down=True, weighted=False, **shape), y2_weighted=False)


@ORDER
def test_streams_keep_their_order_with_batch_invariance(device, dtype, path, batch_invariant, row_map):
    case = make_moe_case(device, dtype, tokens=40, row_map=row_map, block=16)
    shape = {"k": 512, "width": 128, "ranks": (16,), "aligned": True}
    run_act(case, make_moe_half(case, down=False, **shape), "silu")
    run_reduce(case, make_moe_half(case, down=True, weighted=False, **shape), y2_weighted=False)


# -------------------------------------------------------------------------------------------- like real models


@ORDER
def test_nemotron_like_latent_relu2_with_22_of_many_experts(device, path, row_map):
    case = make_moe_case(device, torch.bfloat16, tokens=11, top_k=22, slots=2, experts=48, row_map=row_map, block=8)
    run_act(case, make_moe_half(case, down=False, k=256, width=168, gated=False, aligned=True, ranks=(4, 8)), "relu2")
    half = make_moe_half(case, down=True, k=168, width=256, aligned=True, ranks=(4, 8), weighted=False)
    run_reduce(case, half, y2_weighted=False)


@ORDER
def test_qwen_like_gated_with_8_of_64_experts(device, path, row_map):
    case = make_moe_case(device, torch.bfloat16, tokens=24, top_k=8, slots=3, experts=64, row_map=row_map, block=16)
    run_act(case, make_moe_half(case, down=False, k=512, width=128, aligned=True, ranks=(8, 16)), "silu")
    half = make_moe_half(case, down=True, k=128, width=512, aligned=True, ranks=(8, 16), weighted=False)
    run_reduce(case, half, y2_weighted=False)


@ORDER
def test_gpt_oss_like_interleaved_swiglu(device, path, row_map):
    case = make_moe_case(device, torch.bfloat16, tokens=16, top_k=4, slots=3, experts=32, row_map=row_map)
    run_act(case, make_moe_half(case, down=False, k=320, width=160, interleaved=True, aligned=True), "swiglu_oai")


@pytest.mark.trap(27)
def test_the_checks_refuse_a_bypassed_moe_lora(device, dtype):
    case = make_moe_case(device, dtype, tokens=30)
    half = make_moe_half(case, down=False)
    assert_lora_matters(half.parts)
    with pytest.raises(AssertionError, match="above the bound"):
        check_parts(half.parts, half.y.view)
    parts = expected_act(case, half, "silu", 1.702, 7.0)
    whole = half.y.before[half.y.inside]
    h = ref.activate("silu", [whole[:, half.cols[0] : half.cols[0] + 33], whole[:, half.cols[1] : half.cols[1] + 33]])
    with pytest.raises(AssertionError, match="above the bound"):
        check_parts(parts, h)
