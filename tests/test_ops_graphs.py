"""Streams and CUDA graphs: captured once at capacity, replayed for any mix of adapters."""

from __future__ import annotations

import pytest
import reference as ref
import torch
from cases import (
    check_parts,
    expected_act,
    expected_reduce,
    make_dense_case,
    make_ids,
    make_moe_case,
    make_moe_half,
    ops,
    written,
)

pytestmark = pytest.mark.cuda_only

SHAPES = pytest.mark.parametrize(
    "shape",
    [
        {"k": 99, "widths": (111, 19)},
        {"k": 256, "widths": (256, 64, 64), "aligned": True},
        {"k": 128, "widths": (136, 64), "aligned": True, "ranks": (16, 4)},
    ],
    ids=["odd", "aligned", "low ranks"],
)
ROWS = 96


def captured(step) -> torch.cuda.CUDAGraph:
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def load(case, other) -> None:
    """Puts another step's content into the tensors of a captured one."""
    for mine, new in (
        (case.group_ids, other.group_ids),
        (case.x, other.x),
        (case.y.buffer, other.y.before),
        (case.pools.table, other.pools.table),
        *zip(case.pools.a, other.pools.a, strict=False),
        *zip(case.pools.b, other.pools.b, strict=False),
    ):
        mine.copy_(new)


def graph_cases(dtype, shape, patterns, rows=ROWS, groups=8) -> list:
    """Cases of one shape and pool size, of different adapters and mixes."""
    pools = {"rows": rows, "groups": groups, "ranks": (1, 4, 16, 33), "slot_rank": 64, "layout": "slots", "absent": 0.2}
    pools |= shape
    cases = [make_dense_case("cuda", dtype, ids=p, seed=10 + i, **pools) for i, p in enumerate(patterns)]
    for case in cases[1:]:  # A rows may lie any distance apart: one shape for all
        first = cases[0]
        first.pools.v_width = max(first.pools.v_width, case.pools.v_width)
        assert [t.shape for t in case.pools.a] == [t.shape for t in first.pools.a]
    return cases


def replay_all(cases) -> None:
    """Captures the first, and replays it with the content of each."""
    live = cases[0]

    def step() -> None:
        ops.plan(live.plan, live.group_ids, len(live.adapters))
        ops.linear_(**live.linear_args())

    graph = captured(step)
    for i, case in enumerate(cases):
        load(live, case)
        graph.replay()
        torch.cuda.synchronize()
        check_parts(case.parts, live.y.view)
        live.y.before = case.y.before
        live.y.assert_written_only(f"replay {i}", written(case.parts, live.y.view.shape))
        assert int(live.plan[6]) == case.invalid


@pytest.mark.trap(3, 10)
@SHAPES
@pytest.mark.parametrize("rows, groups", [(ROWS, 8), (512, 4), (1100, 20)])
def test_graph_captured_once_replays_for_every_mix(device, dtype, path, rows, groups, shape):
    """Captured with one adapter; replayed with more segments than then, with others, with {base, one}, with none."""
    patterns = ["one", "mixed", "segments", "base_and_one", "none", "skewed", "two_segments", "invalid", "mixed"]
    replay_all(graph_cases(dtype, shape, patterns, rows, groups))


@pytest.mark.trap(3)
@pytest.mark.parametrize("rank", [16, 100])
def test_graph_of_more_tiles_than_clusters(device, dtype, path, rank):
    """Two launches of wide, of which the second begins before the first is over."""
    shape = {"k": 1056, "widths": (72, 40), "aligned": True, "ranks": (rank, 8), "slot_rank": rank}
    one, even, ragged = [0] * 8505, [row // 1215 for row in range(8505)], [min(row // 130, 6) for row in range(8505)]
    patterns = [one, even, "none", ragged, "mixed", even]
    replay_all(graph_cases(dtype, shape, patterns, 8505, 7))


@pytest.mark.trap(3)
def test_graph_captured_with_no_adapter_serves_adapters(device, path):
    cases = graph_cases(torch.bfloat16, {"k": 256, "widths": (256, 64), "aligned": True}, ["none", "mixed", "one"])
    live = cases[0]

    def step() -> None:
        ops.plan(live.plan, live.group_ids, 8)
        v = torch.full((ROWS, live.pools.v_width), torch.nan, device="cuda")
        ops.shrink(v, live.x, live.pools.a, live.pools.table, live.plan)
        ops.expand_(live.y.view, v, live.pools.b, live.pools.table, live.plan, live.widths, live.cols)

    graph = captured(step)
    for case in cases:
        load(live, case)
        graph.replay()
        check_parts(case.parts, live.y.view)


@pytest.mark.trap(10)
def test_base_and_one_adapter_in_a_graph_captured_with_both(device, path):
    """{base, one LoRA}: the one adapter was dropped where the graph was keyed on the number of adapters."""
    shape = {"k": 256, "widths": (256, 64), "aligned": True}
    cases = graph_cases(torch.bfloat16, shape, ["base_and_one", "base_and_one", "one", "none"])
    live = cases[0]

    def step() -> None:
        ops.plan(live.plan, live.group_ids, 8)
        ops.linear_(**live.linear_args())

    graph = captured(step)
    for case in cases:
        load(live, case)
        graph.replay()
        check_parts(case.parts, live.y.view)


def test_a_graph_of_many_layers_on_one_plan(device, path):
    """The same scratch for every layer: a layer must not see the v of the one before."""
    cases = [
        make_dense_case(
            "cuda", torch.bfloat16, rows=ROWS, groups=8, ids="mixed", seed=5, k=k, widths=widths, aligned=True
        )
        for k, widths in ((256, (512, 64)), (512, (256,)), (64, (64, 64, 64)))
    ]

    def step() -> None:
        ops.plan(cases[0].plan, cases[0].group_ids, 8)
        for case in cases:
            ops.linear_(**case.linear_args() | {"plan": cases[0].plan})

    graph = captured(step)
    for _ in range(3):
        for case in cases:
            case.y.reset()
        graph.replay()
        for case in cases:
            case.check()


@pytest.mark.parametrize("tokens", [24, 7])
@pytest.mark.parametrize("row_map", [False, True], ids=["pair_order", "row_map"])
def test_moe_layer_in_a_graph_replays_for_any_routing(device, dtype, path, row_map, tokens):
    routings = []
    for seed in range(6):
        slot_ids = ["one", "mixed", "base_and_one", "none", "mixed", "segments"][seed]
        case = make_moe_case("cuda", dtype, tokens=tokens, top_k=4, experts=8, slot_ids=slot_ids, seed=seed)
        if row_map:  # a map of fixed capacity
            pairs = tokens * 4
            positions = torch.full((pairs + 40,), -1, dtype=torch.int32)
            positions[torch.randperm(pairs + 40, generator=case.gen)[:pairs]] = torch.arange(pairs).int()
            case.row_map = positions.cuda()
            case.rows = ref.moe_rows(case.topk_ids, case.token_slots, case.slots, case.experts, None, positions)
            case.plan = ref.new_plan(case.positions, case.groups, pairs, "cuda")
            # plan is filled inside the graph
        sizes = {
            "ranks": (2, 8),
            "layout": "slots",
            "absent": 0.0,
            "gaps": False,
            "aligned": True,
            "k": 64,
            "width": 64,
        }
        up = make_moe_half(case, down=False, **sizes)
        down = make_moe_half(case, down=True, weighted=False, **sizes)
        routings.append((case, up, down))
    live, up, down = routings[0]
    h = torch.empty((live.positions, 64), dtype=dtype, device="cuda")
    out = torch.empty((live.tokens, 64), dtype=dtype, device="cuda")
    h2, out2, side = torch.empty_like(h), torch.empty_like(out), torch.cuda.Stream(priority=-1)
    deltas = [torch.empty((live.positions, width), dtype=dtype, device="cuda") for width in (128, 64)]
    mapped = pairs if row_map else 0

    def beside() -> None:
        """The deltas on a second stream, as an engine has them beside its GEMMs."""
        here, u, d = torch.cuda.current_stream(), up.pools, down.pools
        side.wait_stream(here)
        with torch.cuda.stream(side):
            more = {"top_k": live.top_k, "row_map": live.row_map}
            ops.moe_delta(deltas[0], up.x, u.a, u.b, u.table, live.plan, up.widths, u.v_width, **more)
            more = {"topk_weights": live.topk_weights, "row_map": live.row_map}
            ops.moe_delta(deltas[1], down.x, d.a, d.b, d.table, live.plan, down.widths, d.v_width, **more)
        here.wait_stream(side)
        ops.moe_act(h2, up.y.view, deltas[0], u.table, live.plan, up.widths, up.cols, 0, mapped_pairs=mapped)
        at = (d.table, live.plan, live.topk_weights, down.widths, down.cols)
        ops.moe_reduce(out2, down.y.view, deltas[1], *at, row_map=live.row_map)

    def step() -> None:
        ops.moe_plan(live.plan, live.topk_ids, live.token_slots, live.slots, live.experts, None, live.row_map)
        shared = {"plan": live.plan, "row_map": live.row_map}
        ops.moe_gate_up_act(h, up.y.view, up.x, **up.args(), **shared, top_k=live.top_k, act=0)
        ops.moe_down_reduce(out, down.y.view, down.x, **down.args(), **shared, topk_weights=live.topk_weights)
        beside()

    graph = captured(step)
    for case, case_up, case_down in routings:
        for mine, new in (
            (live.topk_ids, case.topk_ids),
            (live.token_slots, case.token_slots),
            (live.topk_weights, case.topk_weights),
            (up.x, case_up.x), (up.y.buffer, case_up.y.before), (up.pools.table, case_up.pools.table),
            (up.pools.a[0], case_up.pools.a[0]), (up.pools.b[0], case_up.pools.b[0]),
            (down.x, case_down.x), (down.y.buffer, case_down.y.before), (down.pools.table, case_down.pools.table),
            (down.pools.a[0], case_down.pools.a[0]), (down.pools.b[0], case_down.pools.b[0]),
        ):  # fmt: skip
            mine.copy_(new)
        if row_map:
            live.row_map.copy_(case.row_map)
        graph.replay()
        torch.cuda.synchronize()
        for got in (h, h2):
            check_parts(expected_act(case, case_up, "silu", 1.702, 7.0), got)
        for got in (out, out2):
            check_parts(expected_reduce(case, case_down, False), got)


@pytest.mark.trap(2)
def test_ops_run_on_the_current_stream(device, dtype, path):
    """x and the ids arrive late on a side stream: an op on stream 0 would read what was there before."""
    case = make_dense_case("cuda", dtype, rows=64, k=256, widths=(256, 64), aligned=True)
    x, ids = case.x.clone(), case.group_ids.clone()
    case.x.fill_(torch.nan)
    case.group_ids.fill_(1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        case.x.copy_(x)
        case.group_ids.copy_(ids)
        ops.plan(case.plan, case.group_ids, len(case.adapters))
        ops.linear_(**case.linear_args())
        done = case.y.buffer.clone()
    side.synchronize()
    case.y.buffer.copy_(done)
    case.check()


def test_ops_do_not_synchronise(device, path):
    """All of them return while the stream is still busy, and torch's sync checker stays silent."""
    case = make_dense_case("cuda", torch.bfloat16, rows=64)
    moe = make_moe_case("cuda", tokens=20)
    up = make_moe_half(moe, down=False)
    ops.linear_(**case.linear_args())  # first calls load kernels and memory
    ops.moe_gate_up_(up.y.view, up.x, **up.args(), plan=moe.plan, top_k=moe.top_k)
    case.y.reset()
    up.y.reset()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(500_000_000)
        busy = torch.cuda.Event()
        busy.record()
        ops.plan(case.plan, case.group_ids, len(case.adapters))
        ops.linear_(**case.linear_args())
        ops.moe_plan(moe.plan, moe.topk_ids, moe.token_slots, moe.slots, moe.experts, None, None)
        ops.moe_gate_up_(up.y.view, up.x, **up.args(), plan=moe.plan, top_k=moe.top_k)
        assert not busy.query(), "an op waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    case.check()
    check_parts(up.parts, up.y.view)


@pytest.mark.trap(5)
def test_skewed_segments_while_another_stream_holds_the_device(device, path):
    """A kernel that waits for all its blocks to be resident would hang, or starve, beside a busy stream."""
    case = make_dense_case(
        "cuda", torch.bfloat16, rows=2000, ids="skewed", groups=40, k=512, widths=(1024, 128), aligned=True
    )
    side, big = torch.cuda.Stream(), torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        with torch.cuda.stream(side):
            for _ in range(10):
                big @ big
        case.y.reset()
        ops.plan(case.plan, case.group_ids, len(case.adapters))
        ops.linear_(**case.linear_args())
    torch.cuda.synchronize()
    case.check()


@pytest.mark.trap(4)
def test_scratch_is_large_enough_on_this_device_and_clean_again_afterwards(device, path):
    """K far larger than N at few rows (a split-K shape), back to back with many rows, without a wait between."""
    small = make_dense_case(
        "cuda", torch.bfloat16, rows=1, ids=[0], k=16384, widths=(64,), ranks=(16,), absent=0.0, aligned=True
    )
    large = make_dense_case(
        "cuda", torch.bfloat16, rows=700, ids="mixed", k=512, widths=(512, 64), groups=64, aligned=True
    )
    bits = []
    for _ in range(6):
        small.y.reset()
        large.y.reset()
        for case in (small, large):
            ops.linear_(**case.linear_args())
        bits.append((small.y.buffer.clone(), large.y.buffer.clone()))
    small.check()
    large.check()
    for one, many in bits[1:]:
        ref.assert_same_bits("one row", one, bits[0][0])
        ref.assert_same_bits("many rows", many, bits[0][1])


def test_plan_in_a_graph_above_the_single_launch_limit(device):
    rows, groups = 20000, 300
    ids = torch.tensor(make_ids("one", rows, groups), dtype=torch.int32, device="cuda")
    plan = ref.new_plan(rows, groups, device="cuda")
    graph = captured(lambda: ops.plan(plan, ids, groups))
    for pattern in ("mixed", "none", "segments", "invalid", "skewed"):
        ids.copy_(torch.tensor(make_ids(pattern, rows, groups), dtype=torch.int32))
        graph.replay()
        row_group, invalid = ref.dense_row_groups(ids, groups)
        ref.check_plan(plan, row_group, groups, invalid)
