"""plan and moe_plan against brute force: order, runs, tiles, header, inverse row map."""

from __future__ import annotations

import pytest
import reference as ref
import torch
from cases import make_ids, make_moe_case, ops, plan_rows
from polylora import _host
from polylora.plan import PassPlans

ROWS_WORD, ACTIVE_WORD = (_host.PLAN_HEADER[name] for name in ("rows", "active_rows"))
PATTERNS = ("mixed", "none", "one", "base_and_one", "segments", "two_segments", "invalid", "skewed")


def run_plan(ids: list[int], groups: int, device: str, dtype: torch.dtype = torch.int32) -> None:
    group_ids = torch.tensor(ids, dtype=dtype, device=device)
    row_group, invalid = ref.dense_row_groups(group_ids, groups)
    ref.check_plan(plan_rows(group_ids, groups), row_group, groups, invalid)


@pytest.mark.trap(7)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 17, 33, 300])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_order_runs_and_tiles_match_brute_force(device, pattern, rows, ids_dtype):
    for groups in (2, 5, 64, 1000):
        run_plan(make_ids(pattern, rows, groups, seed=rows), groups, device, ids_dtype)


@pytest.mark.parametrize("rows", [1, 33, 300])
def test_single_group(device, rows):
    run_plan([0] * rows, 1, device)
    run_plan([-1, 0, 1] * rows, 1, device)


def test_zero_groups_serve_no_row(device):
    run_plan([-1] * 9, 0, device)
    run_plan([0, 1, -1], 0, device)


@pytest.mark.parametrize("rows", [255, 511, 512, 513, 1024, 1025, 4096, 4097, 16384, 16385, 70001])
@pytest.mark.parametrize("groups", [3, 257, 5000])
def test_plans_at_and_above_the_limits_of_each_schedule(device, rows, groups):
    gen = torch.Generator().manual_seed(rows)
    ids = torch.randint(-2, groups + 1, (rows,), generator=gen).tolist()
    run_plan(ids, groups, device)


def assert_same_plan(got: torch.Tensor, want: torch.Tensor, rows: int, groups: int, pairs: int = 0) -> None:
    """Every section as far as a plan defines it, word for word: for plans that brute force takes too long for."""
    at, header = ref.plan_layout(rows, groups, pairs), {name: int(want[word]) for name, word in ref.HEADER.items()}
    sizes = {
        "row_group": rows,
        "order": header["active_rows"],
        "run_group": header["runs"],
        "run_start": header["runs"] + 1,
        "tile": 4 * header["tiles"],
        "wide_tile": 4 * header["wide_tiles"],
        "pair_pos": pairs,
    }
    got = got.cpu()
    assert torch.equal(got[:16], want[:16]), f"header: got {got[:16].tolist()}, want {want[:16].tolist()}"
    for name, size in sizes.items():
        first = at[name]
        assert torch.equal(got[first : first + size], want[first : first + size]), name


@pytest.mark.parametrize(
    "rows, groups",
    [
        (400_000, 3),
        (400_000, 2048),
        (400_000, 32768),
        (16384, 32768),
        (300, 32768),
        (5000, 200_000),  # more groups than shared memory counts
        (8_500_000, 3),  # more rows in a block than 16 bits count
        (200, 2**24 - 1),
        (200, 2**24),
    ],
)
def test_large_plans_are_those_of_the_cpu(device, rows, groups):
    if device == "cpu":
        pytest.skip("compares a GPU's plan with the CPU's")
    gen = torch.Generator().manual_seed(rows + groups)
    mixed = torch.randint(-2, groups + 1, (rows,), generator=gen, dtype=torch.int32)
    skewed = torch.where(torch.rand(rows, generator=gen) < 0.9, groups // 2, mixed)
    for ids in (mixed, skewed, torch.full_like(mixed, groups - 1), mixed.sort(descending=True).values):
        assert_same_plan(plan_rows(ids.to(device), groups), plan_rows(ids, groups), rows, groups)


@pytest.mark.parametrize("tokens, top_k, slots, experts", [(50_000, 8, 8, 512), (50_000, 8, 64, 512), (64, 8, 64, 512)])
def test_large_moe_plans_are_those_of_the_cpu(device, tokens, top_k, slots, experts):
    if device == "cpu":
        pytest.skip("compares a GPU's plan with the CPU's")
    gen = torch.Generator().manual_seed(tokens)
    topk = torch.randint(-1, 2 * experts, (tokens, top_k), generator=gen, dtype=torch.int32)
    token_slots = torch.randint(-1, slots, (tokens,), generator=gen, dtype=torch.int32)
    expert_map = torch.arange(2 * experts, dtype=torch.int32).flip(0)
    expert_map[expert_map >= experts] = -1
    pairs, groups = tokens * top_k, slots * experts
    row_map = torch.cat([torch.randperm(pairs, generator=gen), torch.full((pairs // 8,), -1)]).to(torch.int32)
    row_map[::97] = 5  # one pair at many positions
    for mapping in (None, row_map):
        rows, mapped = (pairs, 0) if mapping is None else (len(mapping), pairs)
        want, got = (ref.new_plan(rows, groups, mapped, device=where) for where in ("cpu", device))
        ops.moe_plan(want, topk, token_slots, slots, experts, expert_map, mapping)
        on_device = [t if t is None else t.to(device) for t in (topk, token_slots, expert_map, mapping)]
        ops.moe_plan(got, on_device[0], on_device[1], slots, experts, on_device[2], on_device[3])
        assert_same_plan(got, want, rows, groups, mapped)


def test_many_rows_of_one_group_among_many_empty_groups(device):
    run_plan([4999] * 20000, 5000, device)
    run_plan([-1] * 20000, 5000, device)
    run_plan([0] * 8000 + [4999] * 8001 + [-1] * 1000, 5000, device)


def test_every_row_its_own_group(device):
    run_plan(list(reversed(range(300))), 300, device)
    run_plan([3 * i for i in range(300)], 900, device)


def test_out_of_range_ids_count_as_none_and_are_counted(device):
    for dtype, far in ((torch.int32, [2**31 - 1, -(2**31)]), (torch.int64, [2**32, 2**32 + 1, -(2**40), 2**63 - 1])):
        # the low 32 bits of 2**32 + 1 are a valid group: they must not be taken for one
        run_plan([0, 5, -1, 4, -2, 1, *far, 3], 5, device, dtype)


def test_plan_is_the_same_bits_from_run_to_run(device):
    ids = torch.tensor(make_ids("mixed", 3000, 200), dtype=torch.int32, device=device)
    first = plan_rows(ids, 200)
    for _ in range(5):
        again = plan_rows(ids, 200)
        row_group, invalid = ref.dense_row_groups(ids, 200)
        ref.check_plan(again, row_group, 200, invalid)
        assert torch.equal(first[:16], again[:16])


def test_stale_content_of_a_plan_does_not_matter(device):
    """One buffer, replanned for many mixes, as an engine does it every step."""
    plan = ref.new_plan(300, 7, device=device)
    for seed, pattern in enumerate(PATTERNS):
        ids = torch.tensor(make_ids(pattern, 300, 7, seed), dtype=torch.int64, device=device)
        ops.plan(plan, ids, 7)
        row_group, invalid = ref.dense_row_groups(ids, 7)
        ref.check_plan(plan, row_group, 7, invalid)


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 1000, 8192, 8193, 16384, 16385, 100000])
def test_plan_layout_equals_the_packages(rows):
    host = pytest.importorskip("polylora._host")
    import polylora

    for groups in (0, 1, 2, 17, 512, 200000):
        for pairs in (0, 1, rows):
            want = ref.plan_layout(rows, groups, pairs)
            assert polylora.plan_size(rows, groups, pairs=pairs) == want["words"]
            got = host.plan_layout(rows, groups, pairs)
            for name, offset in want.items():
                value = got[name] if isinstance(got, dict) else getattr(got, name)
                assert value == offset, f"{name} of plan_layout({rows}, {groups}, {pairs}): {value}, want {offset}"


def test_capacity_holds_every_tile():
    """rows / 16 + runs tiles always suffice: the worst mixes are many runs of one row."""
    for rows in range(1, 200):
        for groups in range(1, 40):
            layout = ref.plan_layout(rows, groups)
            capacity = (layout["pair_pos"] - layout["tile"]) // 4
            ones = min(rows, groups)  # every group one row, one of them all that is left
            tiles = ones - 1 + -(-(rows - ones + 1) // 16)
            assert tiles <= capacity, (rows, groups)


# ---------------------------------------------------------------------------------------------------------- MoE


def check_moe(case) -> None:
    pair_pos = case.rows.pair_pos if case.row_map is not None else None
    ref.check_plan(case.plan, case.rows.row_group, case.groups, case.rows.invalid, pair_pos)


@pytest.mark.trap(15)
@pytest.mark.parametrize("row_map", [False, True], ids=["pair_order", "row_map"])
@pytest.mark.parametrize("expert_map", [False, True], ids=["all_experts", "expert_map"])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("tokens, top_k, slots, experts", [(0, 2, 2, 4), (1, 1, 1, 1), (1, 8, 3, 16), (19, 4, 3, 8),
                                                           (64, 22, 4, 64), (300, 2, 5, 3)])  # fmt: skip
def test_moe_groups_with_minus_one_experts_and_duplicates(
    device, tokens, top_k, slots, experts, ids_dtype, expert_map, row_map
):
    check_moe(
        make_moe_case(
            device, tokens=tokens, top_k=top_k, slots=slots, experts=experts, ids_dtype=ids_dtype,
            expert_map=expert_map, row_map=row_map, seed=tokens,
        )
    )  # fmt: skip


@pytest.mark.parametrize("row_map", [False, True], ids=["pair_order", "row_map"])
@pytest.mark.parametrize("expert_map", [False, True], ids=["all_experts", "expert_map"])
def test_moe_out_of_range_slots_experts_and_positions_are_counted(device, expert_map, row_map):
    for seed in range(3):
        check_moe(
            make_moe_case(
                device, tokens=40, invalid=True, no_expert=0.2, expert_map=expert_map, row_map=row_map, seed=seed
            )
        )


def test_moe_expert_map_values_out_of_range_are_no_row(device):
    topk = torch.tensor([[0, 1], [2, 3], [4, 0]], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 1, -1], dtype=torch.int32, device=device)
    mapping = torch.tensor([2, 3, -2, -1, 0], dtype=torch.int32, device=device)  # 3 local experts: 3 and -2 are invalid
    plan = ref.new_plan(6, 6, device=device)
    ops.moe_plan(plan, topk, slots, 2, 3, mapping, None)
    ref.check_plan(plan, [2, -2, -2, -2, -1, -1], 6, 2)


def test_moe_pair_at_two_positions_takes_the_higher(device):
    topk = torch.tensor([[1, 0]], dtype=torch.int64, device=device)
    slots = torch.tensor([0], dtype=torch.int32, device=device)
    row_map = torch.tensor([1, 0, -1, 1, -1, 1], dtype=torch.int32, device=device)
    plan = ref.new_plan(6, 2, 2, device=device)
    ops.moe_plan(plan, topk, slots, 1, 2, None, row_map)
    ref.check_plan(plan, [0, 1, -2, 0, -2, 0], 2, 0, [1, 5])


@pytest.mark.parametrize("slot_ids", ["none", "one", "base_and_one", "segments"])
def test_moe_slot_mixes(device, slot_ids):
    check_moe(make_moe_case(device, tokens=50, top_k=3, slot_ids=slot_ids))
    check_moe(make_moe_case(device, tokens=50, top_k=3, slot_ids=slot_ids, row_map=True, block=16))


def test_moe_row_map_of_padding_alone(device):
    topk = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    slots = torch.tensor([0], dtype=torch.int32, device=device)
    row_map = torch.full((40,), -1, dtype=torch.int32, device=device)
    plan = ref.new_plan(40, 2, 2, device=device)
    ops.moe_plan(plan, topk, slots, 1, 2, None, row_map)
    ref.check_plan(plan, [-2] * 40, 2, 0, [-1, -1])


@pytest.mark.parametrize("tokens", [0, 5])
def test_moe_row_map_without_positions(device, tokens):
    """A map still, though an empty tensor has no data: all pairs are without a position."""
    check_moe(make_moe_case(device, tokens=tokens, row_map=[]))


@pytest.mark.parametrize("row_map", [False, True], ids=["pair_order", "row_map"])
def test_moe_above_the_single_launch_limit(device, row_map):
    check_moe(make_moe_case(device, tokens=2500, top_k=8, slots=3, experts=128, row_map=row_map, block=16))


def test_plans_of_a_pass_by_stream_and_capture(device, monkeypatch):
    """Made once where they are read; nothing that runs elsewhere, on other rows, changes one."""
    slots = torch.tensor([2, -1, 0, 1, 2, 2, -1, 0], dtype=torch.int32, device=device)
    plans, here, made = PassPlans(slots, 3), [(0, False)], {}
    monkeypatch.setattr(PassPlans, "_where", lambda self: here[0])
    first = plans.plan(8, made)
    kept = first.clone()
    assert kept[ROWS_WORD] == 8
    for other in ((0, True), (7, False), (7, True)):
        here[0] = other
        there = plans.plan(5, made)
        assert there[ROWS_WORD] == 5 and there.data_ptr() != first.data_ptr() and torch.equal(first, kept)
    here[0] = (0, False)
    slots.fill_(-1)
    again = plans.plan(8, made)
    assert again.data_ptr() == first.data_ptr() and torch.equal(again, kept), "made once a pass"
    assert plans.plan(3, made)[ROWS_WORD] == 3, "of other rows made anew"
    assert plans.plan(8, {})[ACTIVE_WORD] == 0, "and in the next pass"
