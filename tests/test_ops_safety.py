"""Arguments that are right one by one and wrong together: no access outside what the call was given.

A table, a row map and a plan are device memory: on CUDA their contents cannot be looked at without a
synchronisation, so the kernels take what fails as absent. On the CPU it is an exception.
"""

from __future__ import annotations

import pytest
import reference as ref
import torch
from cases import (
    Guarded,
    check_parts,
    embedding_args,
    make_dense_case,
    make_embedding_case,
    make_moe_case,
    make_moe_half,
    ops,
)
from test_ops_bad_input import broken


def nothing_but_refused_or_absent(device: str, call, buffer, what: str) -> None:
    """On the CPU the call raises; on CUDA it runs and writes no byte of the guarded buffer."""
    refused = broken(call)
    if device == "cuda":
        torch.cuda.synchronize()
        assert not refused, f"{what}: the host cannot know"
    else:
        assert refused, f"{what}: must be refused"
    buffer.assert_written_only(what, torch.zeros(buffer.view.shape, dtype=torch.bool))


@pytest.mark.parametrize("col", [2**63 - 1, 2**63 - 2, 2**62, -(2**63), -1])
@pytest.mark.parametrize("slice_index", [0, 1])
def test_a_column_near_the_end_of_int64_does_not_wrap_around(device, dtype, col, slice_index):
    case = make_dense_case(device, dtype, rows=4, widths=(8, 8), gaps=True)
    cols = list(case.cols)
    cols[slice_index] = col
    with pytest.raises(RuntimeError, match="polylora::linear_: cols must be columns inside y"):
        ops.linear_(**case.linear_args() | {"cols": cols})
    case.y.assert_written_only("refused", torch.zeros(case.y.view.shape, dtype=torch.bool))


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_overlapping_slices_are_refused(device, dtype, shift):
    case = make_dense_case(device, dtype, rows=4, widths=(8, 8), gaps=True)
    cols = [case.cols[0], case.cols[0] + shift]
    with pytest.raises(RuntimeError, match="polylora::linear_: cols must be (apart|columns inside)"):
        ops.linear_(**case.linear_args() | {"cols": cols})


def test_interleaved_slices_do_not_overlap(device, dtype):
    moe = make_moe_case(device, dtype, tokens=5, top_k=2)
    half = make_moe_half(moe, down=False, width=24, interleaved=True)
    ops.moe_gate_up_(y=half.y.view, x=half.x, **half.args(), plan=moe.plan, top_k=2, col_stride=2)


@pytest.mark.parametrize("v_width", [0, 1, 7])
def test_a_v_width_below_what_the_table_uses_reaches_nothing(device, dtype, v_width):
    case = make_dense_case(device, dtype, rows=9, ranks=(16,), absent=0.0, shared_a=0.0, groups=2)
    call = case.linear_args() | {"v_width": v_width}
    if v_width == 0 or device == "cpu":
        nothing_but_refused_or_absent(device, lambda: ops.linear_(**call), case.y, f"v_width {v_width}")


def test_shrink_into_a_v_of_too_few_columns_writes_none_of_them(device, dtype):
    case = make_dense_case(device, dtype, rows=9, ranks=(16,), absent=0.0, shared_a=0.0, groups=2)
    args = case.linear_args()
    v = torch.full((9, 1), 7.0, device=device)
    broken(lambda: ops.shrink(v, args["x"], args["a"], args["table"], args["plan"]))
    assert (v == 7.0).all()


@pytest.mark.parametrize("width", [50_000, 1_000_000])
def test_widths_beyond_the_tables_b_add_nothing(device, dtype, width):
    case = make_dense_case(device, dtype, rows=3, widths=(8,), layout="ragged", absent=0.0, ids="one")
    y = torch.zeros((3, width), dtype=dtype, device=device)
    call = case.linear_args() | {"y": y, "widths": [width], "cols": [0]}
    assert broken(lambda: ops.linear_(**call)) == (device == "cpu")
    assert (y == 0).all()


def test_a_vocabulary_beyond_a_is_refused(device, dtype):
    case = make_embedding_case(device, dtype, rows=6, token_major=True)
    with pytest.raises(RuntimeError, match="polylora::embedding_: vocab must be at most"):
        ops.embedding_(**embedding_args(case) | {"vocab": 2**31 - 1})


@pytest.mark.parametrize(
    "word, value",
    [(0, -1), (0, 2**31 - 1), (1, 257), (1, 2**31 - 1), (2, -8), (2, 2**31 - 1), (3, -1), (4, -2), (5, 2**30)],
    ids=["a_row<0", "a_row", "rank", "huge_rank", "v_col<0", "v_col", "b_stride<0", "b_offset<0", "b_offset"],
)
def test_an_entry_outside_its_arenas_is_never_followed(device, dtype, word, value):
    case = make_dense_case(device, dtype, rows=20, groups=2, absent=0.0, ids="one", shared_a=0.0)
    table = case.pools.table.clone()
    table[:, :, word] = value
    if word == 4:
        table[:, :, 5] = -1
    call = case.linear_args() | {"table": table}
    nothing_but_refused_or_absent(device, lambda: ops.linear_(**call), case.y, f"word {word} = {value}")


@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), 10**6])
def test_a_row_map_that_changed_after_the_plan_reaches_nothing(device, dtype, value):
    """An engine that reuses its map's buffer between plan and op."""
    moe = make_moe_case(device, dtype, row_map=True)
    up, down = make_moe_half(moe, down=False, width=24), make_moe_half(moe, down=True, width=24)
    changed = torch.full_like(moe.row_map, value)
    delta = torch.zeros((moe.positions, sum(up.widths)), dtype=dtype, device=device)
    out = torch.zeros((moe.tokens, 24), dtype=dtype, device=device)
    h = torch.zeros((moe.positions, 24), dtype=dtype, device=device)
    v = torch.zeros((moe.tokens, up.pools.v_width), device=device)
    gate = dict(x=up.x, **up.args(), plan=moe.plan, top_k=moe.top_k, row_map=changed)
    reduce = dict(h=down.x, **down.args(), plan=moe.plan, topk_weights=moe.topk_weights, row_map=changed)
    calls = [
        lambda: ops.moe_gate_up_(y=up.y.view, **gate),
        lambda: ops.moe_gate_up_act(h=h, y1=up.y.view, act=0, **gate),
        lambda: ops.moe_down_(y=down.y.view, **reduce),
        lambda: ops.moe_down_reduce(out=out, y2=down.y.view, **reduce),
        lambda: ops.moe_delta(delta, up.x, up.pools.a, up.pools.b, up.pools.table, moe.plan, up.widths,
                              up.pools.v_width, top_k=moe.top_k, row_map=changed),
        lambda: ops.moe_delta(delta, up.x, [], up.pools.b, up.pools.table, moe.plan, up.widths, up.pools.v_width,
                              top_k=moe.top_k, row_map=changed, v=v),
    ]  # fmt: skip
    for call in calls:
        assert broken(call) == (device == "cpu")
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("shape", [{}, {"k": 64, "width": 64, "aligned": True}], ids=["odd", "aligned"])
def test_no_tokens_and_a_map_that_the_plan_was_not_made_with_reach_nothing(device, dtype, path, shape):
    """A plan without a map is as long as one with a map of no pairs: its active rows would read an x of no rows."""
    moe = make_moe_case(device, dtype, no_expert=0.0, slot_ids="one")
    up, down = make_moe_half(moe, down=False, **shape), make_moe_half(moe, down=True, **shape)
    row_map = torch.zeros(moe.positions, dtype=torch.int32, device=device)
    gate = dict(x=up.x[:0], **up.args(), plan=moe.plan, top_k=moe.top_k, row_map=row_map)
    of_down = dict(down.args(), plan=moe.plan, topk_weights=moe.topk_weights[:0], row_map=row_map)

    def buffer(columns: int) -> Guarded:
        data = torch.full((moe.positions, columns), torch.nan, dtype=dtype)
        return Guarded(data, device, moe.gen, left=8, right=8)

    def delta(columns: int, cols: list[int], **call) -> None:
        out = buffer(columns)
        nothing_but_refused_or_absent(device, lambda: ops.moe_delta(out.view, **call), out, "delta")

    y, h = up.y, buffer(up.widths[0])
    nothing_but_refused_or_absent(device, lambda: ops.moe_gate_up_(y.view, **gate), y, "gate/up")
    nothing_but_refused_or_absent(device, lambda: ops.moe_gate_up_act(h.view, y.view, act=0, **gate), h, "h")
    nothing_but_refused_or_absent(device, lambda: ops.moe_down_(down.y.view, down.x, **of_down), down.y, "down")
    delta(sum(up.widths), **gate)
    delta(down.widths[0], x=down.x, **of_down)


@pytest.mark.parametrize("name", ["table", "plan"])
def test_a_misaligned_table_or_plan_is_refused(device, name):
    """Kernels read both 16 bytes at a time."""
    case = make_dense_case(device, torch.bfloat16, rows=5)
    args = case.linear_args()
    whole = torch.zeros(args[name].numel() + 4, dtype=torch.int32, device=device)
    moved = whole[1 : 1 + args[name].numel()].view(args[name].shape)
    moved.copy_(args[name])
    with pytest.raises(RuntimeError, match=f"polylora::linear_: {name} must be aligned to 16 bytes"):
        ops.linear_(**args | {name: moved})


@pytest.mark.parametrize("rows", [5, 2100])
def test_ranks_beyond_the_columns_of_a_token_major_a_reach_nothing(device, dtype, rows):
    """They are the next token's, and behind the last token nobody's."""
    shape = {"ranks": (16,), "groups": 2, "token_major": True, "aligned": True, "ids": "one"}
    case = make_embedding_case(device, dtype, rows=rows, **shape)
    call = embedding_args(case)
    call["a"] = [a[:, :15] for a in call["a"]]
    nothing_but_refused_or_absent(device, lambda: ops.embedding_(**call), case.y, "15 columns for rank 16")


def paths_of_this_device() -> list[str]:
    major = torch.cuda.get_device_capability()[0]
    return ["general"] + ["mma"] * (major >= 8) + ["wide"] * (major == 9) + ["cluster"] * (major >= 9)


@pytest.mark.cuda_only
@pytest.mark.parametrize("rows", [1, 8, 33, 256, 700])
@pytest.mark.parametrize("forced", ["cluster", "wide", "mma", "general"])
def test_every_path_is_reached(device, monkeypatch, forced, rows):
    """Forced, a path refuses what it does not serve: that it runs shows that the call went through it."""
    if forced not in paths_of_this_device() or (forced == "cluster" and rows > 256):
        pytest.skip(f"{forced} does not serve {rows} rows on this device")
    monkeypatch.setenv("POLYLORA_PATH", forced)
    polylora_ops = torch.ops.polylora  # without the tests' way around a refusal
    for dtype in (torch.bfloat16, torch.float16):
        case = make_dense_case(device, dtype, rows=rows, aligned=True, k=256, widths=(256, 64, 64))
        args = case.linear_args()
        polylora_ops.linear_(**args)
        case.check()
        v = torch.zeros((rows, args["v_width"]), device=device)
        case.y.reset()
        polylora_ops.shrink(v, *(args[name] for name in ("x", "a", "table", "plan")))
        polylora_ops.expand_(args["y"], v, *(args[name] for name in ("b", "table", "plan", "widths", "cols")))
        case.check()
        lookup = make_embedding_case(device, dtype, rows=rows, widths=(256, 64), aligned=True)
        polylora_ops.embedding_(**embedding_args(lookup))
        lookup.check()


@pytest.mark.cuda_only
@pytest.mark.parametrize("stride", [0, 1, 7, 2**31 + 1])
@pytest.mark.parametrize("forced", ["cluster", "wide", "mma"])
def test_one_row_of_any_stride_takes_the_fast_paths(device, monkeypatch, forced, stride):
    """Torch reports any stride for a dimension of size 1."""
    if forced not in paths_of_this_device():
        pytest.skip(f"no {forced} on this device")
    monkeypatch.setenv("POLYLORA_PATH", forced)
    polylora_ops = torch.ops.polylora  # without the tests' way around a refusal

    def strided(t: torch.Tensor) -> torch.Tensor:
        return t.as_strided(t.shape, (stride, 1))

    case = make_dense_case(device, torch.bfloat16, ids=[0], aligned=True, k=256, widths=(256, 64), ranks=(1,), groups=1)
    args = case.linear_args()
    args |= {"x": strided(case.x), "y": strided(case.y.view)}
    polylora_ops.linear_(**args)
    case.check()
    v = strided(torch.zeros((1, args["v_width"]), device=device))
    case.y.reset()
    polylora_ops.shrink(v, *(args[name] for name in ("x", "a", "table", "plan")))
    polylora_ops.expand_(args["y"], v, *(args[name] for name in ("b", "table", "plan", "widths", "cols")))
    case.check()
    moe = make_moe_case(device, tokens=1, top_k=1, slots=1, experts=1, slot_ids="one", no_expert=0.0)
    up = make_moe_half(moe, down=False, k=64, width=64, aligned=True)
    polylora_ops.moe_gate_up_(strided(up.y.view), strided(up.x), **up.args(), plan=moe.plan, top_k=1)
    check_parts(up.parts, up.y.view)


@pytest.mark.cuda_only
def test_a_forced_path_refuses_what_it_does_not_serve(device, monkeypatch):
    linear = torch.ops.polylora.linear_
    refused = {
        "cluster": ({"rows": 300}, {"k": 99, "aligned": False}, {"dtype": torch.float32}),
        "wide": ({"k": 99, "aligned": False}, {"dtype": torch.float32}),
        "mma": ({"k": 99, "aligned": False}, {"dtype": torch.float32}),
    }
    for path in set(refused) & set(paths_of_this_device()):
        monkeypatch.setenv("POLYLORA_PATH", path)
        for odd in refused[path]:
            shape = {"rows": 8, "k": 256, "widths": (256, 64), "aligned": True, "dtype": torch.bfloat16} | odd
            case = make_dense_case(device, shape.pop("dtype"), **shape)
            with pytest.raises(RuntimeError, match="cudaErrorNotSupported"):
                linear(**case.linear_args())
    monkeypatch.setenv("POLYLORA_PATH", "no such path")
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        linear(**make_dense_case(device, torch.bfloat16).linear_args())


@pytest.mark.cuda_only
def test_a_forced_path_holds_for_seams_of_layers_without_slots(device, monkeypatch):
    """Streams of weights want a group; what is left of the call is the general path's."""
    moe = make_moe_case(device, torch.bfloat16, tokens=4, slots=1, slot_ids="none")
    half = make_moe_half(moe, down=True, k=64, width=64, aligned=True)
    out = torch.zeros((4, 64), dtype=torch.bfloat16, device=device)
    call = half.args() | {"table": half.pools.table[:0], "plan": ref.new_plan(moe.positions, 0, device=device)}
    ops.moe_plan(call["plan"], moe.topk_ids, moe.token_slots, 0, moe.experts)
    call |= {"out": out, "y2": half.y.view, "h": half.x, "topk_weights": moe.topk_weights}
    monkeypatch.setenv("POLYLORA_PATH", "general")
    torch.ops.polylora.moe_down_reduce(**call)
    monkeypatch.setenv("POLYLORA_PATH", "mma")
    with pytest.raises(RuntimeError, match="cudaErrorNotSupported"):
        torch.ops.polylora.moe_down_reduce(**call)
    monkeypatch.setenv("POLYLORA_PATH", "no such path")
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        torch.ops.polylora.moe_down_reduce(**call)


@pytest.mark.cuda_only
def test_a_forced_decode_path_refuses_batch_invariance(device, monkeypatch, batch_invariant):
    """Its order of sums depends on the rows of a batch."""
    monkeypatch.setenv("POLYLORA_PATH", "cluster")
    case = make_dense_case(device, torch.bfloat16, rows=8, k=256, widths=(256, 64), aligned=True)
    with pytest.raises(RuntimeError, match="cudaErrorNotSupported"):
        torch.ops.polylora.linear_(**case.linear_args())
