"""Hypothesis over the shapes that examples by hand leave out. HYPOTHESIS_PROFILE=search looks longer."""

from __future__ import annotations

import pytest
import reference as ref
import torch
from cases import LAYOUTS, make_dense_case, make_moe_case, make_moe_half, ops, plan_rows

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# the device and dtype fixtures are constants of a test, not state that examples share
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@shared
@given(
    groups=st.integers(1, 60),
    runs=st.lists(st.tuples(st.integers(-3, 63), st.integers(1, 40)), max_size=30),
    ids_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_plan_of_any_runs(device, groups, runs, ids_dtype):
    ids = [g for g, length in runs for _ in range(length)]
    group_ids = torch.tensor(ids, dtype=ids_dtype, device=device)
    row_group, invalid = ref.dense_row_groups(group_ids, groups)
    ref.check_plan(plan_rows(group_ids, groups), row_group, groups, invalid)


@shared
@given(
    tokens=st.integers(0, 30),
    top_k=st.integers(1, 9),
    slots=st.integers(1, 5),
    experts=st.integers(1, 20),
    row_map=st.booleans(),
    expert_map=st.booleans(),
    invalid=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_moe_plan_of_any_routing(device, tokens, top_k, slots, experts, row_map, expert_map, invalid, seed):
    case = make_moe_case(
        device, tokens=tokens, top_k=top_k, slots=slots, experts=experts, row_map=row_map, expert_map=expert_map,
        invalid=invalid, seed=seed,
    )  # fmt: skip
    pair_pos = case.rows.pair_pos if row_map else None
    ref.check_plan(case.plan, case.rows.row_group, case.groups, case.rows.invalid, pair_pos)


@shared
@given(
    rows=st.integers(0, 70),
    k=st.integers(1, 300),
    widths=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    groups=st.integers(2, 9),
    ranks=st.lists(st.integers(1, 256), min_size=1, max_size=4),
    layout=st.sampled_from(LAYOUTS),
    ids=st.sampled_from(["mixed", "one", "base_and_one", "segments", "two_segments", "invalid", "skewed"]),
    absent=st.sampled_from([0.0, 0.3, 0.8]),
    shared_a=st.sampled_from([0.0, 0.5]),
    aligned=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_linear_of_any_shape(device, dtype, path, aligned, k, widths, **shape):
    if aligned:
        k, widths = ref.round_up(k, 8), [ref.round_up(n, 8) for n in widths]
    case = make_dense_case(device, dtype, k=k, widths=widths, aligned=aligned, **shape)
    ops.linear_(**case.linear_args())
    case.check()


@shared
@given(
    tokens=st.integers(1, 20),
    top_k=st.integers(1, 6),
    k=st.integers(1, 200),
    width=st.integers(1, 150),
    gated=st.booleans(),
    interleaved=st.booleans(),
    row_map=st.booleans(),
    expert_map=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
)
def test_moe_halves_of_any_shape(
    device, dtype, path, tokens, top_k, k, width, gated, interleaved, row_map, expert_map, layout, seed
):
    from test_ops_moe import run_act, run_down, run_gate_up, run_reduce

    case = make_moe_case(
        device, dtype, tokens=tokens, top_k=top_k, row_map=row_map, expert_map=expert_map, seed=seed, experts=5
    )
    shape = {"k": k, "width": width, "layout": layout}
    gates = {"gated": gated, "interleaved": interleaved and gated}
    run_gate_up(case, make_moe_half(case, down=False, **gates, **shape))
    run_act(case, make_moe_half(case, down=False, **gates, **shape), "silu")
    run_down(case, make_moe_half(case, down=True, **shape))
    run_reduce(case, make_moe_half(case, down=True, weighted=False, **shape), y2_weighted=False)
