"""The same bits from run to run, at any place of a batch, alone or in company, from any number of threads."""

from __future__ import annotations

import threading

import pytest
import reference as ref
import torch
from cases import (
    embedding_args,
    make_dense_case,
    make_embedding_case,
    make_moe_case,
    make_moe_half,
    ops,
    plan_rows,
)

SHAPES = pytest.mark.parametrize(
    "shape",
    [{"k": 99, "widths": (111, 19)}, {"k": 256, "widths": (256, 64, 64), "aligned": True},
     {"k": 1024, "widths": (136, 64), "aligned": True}],
    ids=["odd", "aligned", "K in many parts"],
)  # fmt: skip


def linear_on(case, rows: list[int], y0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """linear_ of these rows of a case, as a batch of their own."""
    pick = torch.tensor(rows, device=case.group_ids.device)
    ids = case.group_ids[pick].contiguous()
    y = y0[pick].clone()
    args = case.linear_args() | {"y": y, "x": x[pick].contiguous(), "plan": plan_rows(ids, len(case.adapters))}
    ops.linear_(**args)
    return y


@pytest.mark.trap(4, 12)
@SHAPES
@pytest.mark.parametrize("rows", [1, 7, 33, 300])
def test_linear_gives_the_same_bits_from_run_to_run(device, dtype, path, rows, shape):
    case = make_dense_case(device, dtype, rows=rows, **shape)
    ops.linear_(**case.linear_args())
    first = case.y.buffer.clone()
    deltas = [linear_delta_of(case) for _ in range(3)]
    for again in deltas[1:]:
        ref.assert_same_bits("deltas", again, deltas[0])
    other = make_dense_case(device, dtype, rows=77, k=64, widths=(40,), seed=9)
    for _ in range(4):  # another shape between two runs: whatever scratch there is gets reused
        ops.linear_(**other.linear_args())
        case.y.reset()
        ops.linear_(**case.linear_args())
        ref.assert_same_bits("second run", case.y.buffer, first)


def both_deltas(moe, up, down) -> list[torch.Tensor]:
    found = []
    for half, more in ((up, {"top_k": moe.top_k}), (down, {"topk_weights": moe.topk_weights})):
        delta = torch.zeros((moe.positions, sum(half.widths)), dtype=moe.dtype, device=moe.device)
        p = half.pools
        ops.moe_delta(
            delta, half.x, p.a, p.b, p.table, moe.plan, half.widths, p.v_width, row_map=moe.row_map, **more
        )  # fmt: skip
        found.append(delta)
    return found


def linear_delta_of(case) -> torch.Tensor:
    args = {name: value for name, value in case.linear_args().items() if name not in ("y", "cols")}
    delta = torch.zeros((case.rows, sum(case.widths)), dtype=case.x.dtype, device=case.x.device)
    ops.linear_delta(delta, **args)
    return delta


@pytest.mark.trap(12)
def test_every_other_op_gives_the_same_bits_from_run_to_run(device, dtype, path):
    dense, embed = make_dense_case(device, dtype, rows=40), make_embedding_case(device, dtype, rows=40)
    moe = make_moe_case(device, dtype, tokens=30, row_map=True)
    up, down = make_moe_half(moe, down=False), make_moe_half(moe, down=True)

    def run() -> list[torch.Tensor]:
        for case in (dense, embed, up, down):
            case.y.reset()
        v = torch.full((40, dense.pools.v_width), 7.0, device=device)
        ops.shrink(v, dense.x, dense.pools.a, dense.pools.table, dense.plan)
        ops.expand_(dense.y.view, v, dense.pools.b, dense.pools.table, dense.plan, dense.widths, dense.cols)
        ops.embedding_(**embedding_args(embed))
        h = torch.zeros((moe.positions, up.widths[0]), dtype=dtype, device=device)
        shared = {"plan": moe.plan, "row_map": moe.row_map}
        ops.moe_gate_up_act(h, up.y.view, up.x, **up.args(), **shared, top_k=moe.top_k, act=0)
        out = torch.zeros((moe.tokens, down.widths[0]), dtype=dtype, device=device)
        weights = moe.topk_weights
        ops.moe_down_reduce(out, down.y.view, down.x, **down.args(), **shared, topk_weights=weights)
        ops.moe_gate_up_(up.y.view, up.x, **up.args(), **shared, top_k=moe.top_k)
        ops.moe_down_(down.y.view, down.x, **down.args(), **shared, topk_weights=weights)
        h2, out2, (delta, of_down) = torch.zeros_like(h), torch.zeros_like(out), both_deltas(moe, up, down)
        at, mapped = (up.pools.table, moe.plan, up.widths, up.cols), moe.topk_ids.numel()
        ops.moe_act(h2, up.y.view, delta, *at, 0, mapped_pairs=mapped)
        at = (down.pools.table, moe.plan, weights, down.widths, down.cols)
        ops.moe_reduce(out2, down.y.view, of_down, *at, row_map=moe.row_map)
        results = (v, dense.y.buffer, embed.y.buffer, h, out, up.y.buffer, down.y.buffer, h2, out2)
        return [t.clone() for t in results]

    first = run()
    for _ in range(3):
        for i, (again, want) in enumerate(zip(run(), first, strict=False)):
            ref.assert_same_bits(f"result {i}", again, want)


def batch_and_whole(device, dtype, shape, groups=4):
    case = make_dense_case(device, dtype, rows=70, groups=groups, ids="mixed", ranks=(3, 16, 64), **shape)
    y0, x = case.y.view.clone(), case.x.clone()
    return case, y0, x, linear_on(case, list(range(70)), y0, x)


@SHAPES
def test_a_row_has_the_same_bits_at_any_place_of_a_batch(device, dtype, path, shape):
    case, y0, x, whole = batch_and_whole(device, dtype, shape)
    for rows in (list(reversed(range(70))), list(range(33, 70)) + list(range(33)), [5] * 70):
        ref.assert_same_bits(f"rows from {rows[0]}", linear_on(case, rows, y0, x), whole[torch.tensor(rows)])


@SHAPES
def test_a_row_has_the_same_bits_alone_and_in_any_batch(device, dtype, path, batch_invariant, shape):
    case, y0, x, whole = batch_and_whole(device, dtype, shape)
    for row in (0, 1, 15, 16, 17, 40, 69):
        ref.assert_same_bits(f"row {row} alone", linear_on(case, [row], y0, x)[0], whole[row])
    for rows in (list(range(0, 70, 3)), [5] * 20, list(range(70)) * 6):
        ref.assert_same_bits(f"{len(rows)} rows", linear_on(case, rows, y0, x), whole[torch.tensor(rows)])


@SHAPES
def test_a_row_has_the_same_bits_whether_its_run_is_short_or_long(device, dtype, path, batch_invariant, shape):
    case, y0, x, whole = batch_and_whole(device, dtype, shape, groups=20)
    for rows in ([*range(70), *[5] * 1200], [*range(70)] * 18, [*range(70)] * 8):
        ref.assert_same_bits(f"{len(rows)} rows", linear_on(case, rows, y0, x), whole[torch.tensor(rows)])


def test_a_row_has_the_same_bits_among_strangers(device, dtype, path):
    """Other adapters, of other ranks, around it must not change a row."""
    case = make_dense_case(device, dtype, rows=40, groups=6, ids=[0] * 40, ranks=(1, 8, 128), absent=0.0)
    y0, x = case.y.view.clone(), case.x.clone()
    alone = linear_on(case, list(range(40)), y0, x)
    for other in (1, 3, 5, -1):
        case.group_ids[1::2] = other
        mixed = linear_on(case, list(range(40)), y0, x.nan_to_num(0.0))
        ref.assert_same_bits(f"even rows beside group {other}", mixed[::2], alone[::2])


def test_embedding_row_has_the_same_bits_alone(device, dtype, path, batch_invariant):
    case = make_embedding_case(device, dtype, rows=50, tokens="valid")
    y0 = case.y.view.clone()
    ops.embedding_(**embedding_args(case))
    for row in (0, 17, 49):
        y, ids = y0[row : row + 1].clone(), case.group_ids[row : row + 1]
        plan = plan_rows(ids, len(case.adapters))
        ops.embedding_(**embedding_args(case) | {"y": y, "token_ids": case.token_ids[row : row + 1], "plan": plan})
        ref.assert_same_bits(f"row {row} alone", y[0], case.y.view[row])


def test_moe_results_do_not_depend_on_the_order_of_positions(device, dtype, path):
    """Pair order and a permuted order of the same pairs: the same bits for every pair, and for every token."""
    plain = make_moe_case(device, dtype, tokens=25, no_expert=0.0)
    up, down = make_moe_half(plain, down=False, gaps=False), make_moe_half(plain, down=True, gaps=False, weighted=False)
    pairs = plain.positions
    row_map = torch.randperm(pairs, generator=plain.gen)
    position = torch.argsort(row_map).to(device)
    row_map = row_map.int().to(device)
    plan = ref.new_plan(pairs, plain.groups, pairs, device)
    ops.moe_plan(plan, plain.topk_ids, plain.token_slots, plain.slots, plain.experts, None, row_map)

    def spread(t: torch.Tensor) -> torch.Tensor:
        out = torch.full((pairs, t.shape[1]), torch.nan, dtype=t.dtype, device=device)
        out[position] = t
        return out

    h = torch.empty((pairs, up.widths[0]), dtype=dtype, device=device)
    ops.moe_gate_up_act(h, up.y.view, up.x, **up.args(), plan=plain.plan, top_k=plain.top_k, act=0)
    moved = torch.empty((pairs, up.widths[0]), dtype=dtype, device=device)
    ops.moe_gate_up_act(
        moved, spread(up.y.view), up.x, **up.args(), plan=plan, top_k=plain.top_k, act=0, row_map=row_map
    )
    ref.assert_same_bits("h", moved[position], h)
    out = torch.empty((plain.tokens, down.widths[0]), dtype=dtype, device=device)
    ops.moe_down_reduce(out, down.y.view, down.x, **down.args(), plan=plain.plan, topk_weights=plain.topk_weights)
    again = torch.empty_like(out)
    ops.moe_down_reduce(
        again, spread(down.y.view), spread(down.x), **down.args(), plan=plan, topk_weights=plain.topk_weights,
        row_map=row_map,
    )  # fmt: skip
    ref.assert_same_bits("out", again, out)


def test_thread_count_does_not_change_bits(dtype):
    case = make_dense_case("cpu", dtype, rows=300, k=512, widths=(512, 128))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            case.y.reset()
            ops.linear_(**case.linear_args())
            results.append(case.y.buffer.clone())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        ref.assert_same_bits("another number of threads", result, results[0])


@pytest.mark.trap(4, 5)
def test_calls_from_several_threads_at_once(device, path):
    """Skewed batches from four host threads, on cuda each on its own stream: no shared scratch, no deadlock."""
    cases = [
        make_dense_case(device, torch.bfloat16, rows=200, ids="skewed", groups=20, k=256, widths=(256, 64), seed=i,
                        aligned=i % 2 == 0)
        for i in range(4)
    ]  # fmt: skip
    errors: list[Exception] = []

    def work(case) -> None:
        try:
            stream = torch.cuda.Stream() if device == "cuda" else None
            if stream:
                stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                for _ in range(10):
                    case.y.reset()
                    ops.plan(case.plan, case.group_ids, len(case.adapters))
                    ops.linear_(**case.linear_args())
            if stream:
                stream.synchronize()
        except Exception as error:  # a thread's exception would be lost
            errors.append(error)

    workers = [threading.Thread(target=work, args=(case,)) for case in cases]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive(), "a call hangs"
    assert not errors, errors[0]
    for case in cases:
        case.check()
