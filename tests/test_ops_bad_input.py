"""Every argument of every op, wrong in every way: an exception naming op and argument, nothing written, no abort."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import pytest
import reference as ref
import torch
from cases import embedding_args, make_dense_case, make_embedding_case, make_moe_case, make_moe_half, ops, plan_rows
from torch import Tensor

DTYPE = torch.bfloat16


def valid_calls(device: str) -> dict[str, dict]:
    """One small correct call of each op, by keyword."""
    dense = make_dense_case(device, DTYPE, rows=8, k=48, widths=(40, 24), groups=3, seed=1)
    embed = make_embedding_case(device, DTYPE, rows=8, groups=3, seed=1)
    moe = make_moe_case(device, DTYPE, tokens=6, top_k=3, slots=2, experts=4, seed=1, no_expert=0.0)
    up = make_moe_half(moe, down=False, width=24)
    down = make_moe_half(moe, down=True, width=24)
    v = torch.zeros((8, dense.pools.v_width), device=device)
    linear = dense.linear_args()
    gate_up = dict(y=up.y.view, x=up.x, **up.args(), plan=moe.plan, top_k=3, col_stride=1)
    act = {name: value for name, value in gate_up.items() if name != "y"}
    out = torch.zeros((18, 24), dtype=DTYPE, device=device)
    reduce = dict(h=down.x, **down.args(), plan=moe.plan, topk_weights=moe.topk_weights)
    delta = torch.zeros((18, 48), dtype=DTYPE, device=device)
    of_up = only(gate_up, "a", "b", "table", "plan", "widths", "v_width")
    seam = ("table", "plan", "widths", "cols")
    return {
        "plan": {"plan": dense.plan, "group_ids": dense.group_ids, "num_groups": 3},
        "moe_plan": {
            "plan": moe.plan,
            "topk_ids": moe.topk_ids,
            "token_slots": moe.token_slots,
            "num_slots": 2,
            "num_experts": 4,
        },
        "shrink": dict(v=v, **{name: linear[name] for name in ("x", "a", "table", "plan")}),
        "expand_": dict(v=v, **{name: linear[name] for name in ("y", "b", "table", "plan", "widths", "cols")}),
        "linear_": linear,
        "linear_delta": dict(
            delta=torch.zeros((8, 64), dtype=DTYPE, device=device),
            **only(linear, "x", "a", "b", "table", "plan", "widths", "v_width"),
        ),
        "add_delta_": dict(
            y=linear["y"], delta=torch.zeros((8, 64), dtype=DTYPE, device=device), **only(linear, *seam)
        ),
        "embedding_": embedding_args(embed),
        "moe_gate_up_": gate_up,
        "moe_down_": dict(y=down.y.view, **reduce),
        "moe_gate_up_act": dict(h=out, y1=up.y.view, **act, act=0),
        "moe_down_reduce": dict(out=out[:6], y2=down.y.view, **reduce),
        "moe_delta": dict(delta=delta, x=up.x, **of_up, top_k=3, topk_weights=moe.topk_weights),
        "moe_act": dict(h=out, y1=up.y.view, delta=delta, **only(act, *seam), act=0, col_stride=1, mapped_pairs=0),
        "moe_reduce": dict(out=out[:6], y2=down.y.view, delta=delta[:, :24], **only(reduce, *seam, "topk_weights")),
    }


def only(call: dict, *names: str) -> dict:
    return {name: call[name] for name in names}


# Arguments by kind. A wrong size may be blamed on whichever argument it then disagrees with.
MATRICES = {
    "shrink": ("v", "x"),
    "expand_": ("y", "v"),
    "linear_": ("y", "x"),
    "linear_delta": ("delta", "x"),
    "add_delta_": ("y", "delta"),
    "embedding_": ("y",),
    "moe_gate_up_": ("y", "x"),
    "moe_down_": ("y", "h"),
    "moe_gate_up_act": ("h", "y1", "x"),
    "moe_down_reduce": ("out", "y2", "h"),
    "moe_delta": ("delta", "x"),
    "moe_act": ("h", "y1", "delta"),
    "moe_reduce": ("out", "y2", "delta"),
}
OUTPUT = {"plan": "plan", "moe_plan": "plan", "shrink": "v", "expand_": "y", "linear_": "y",
          "linear_delta": "delta", "add_delta_": "y", "embedding_": "y",
          "moe_gate_up_": "y", "moe_down_": "y", "moe_gate_up_act": "h", "moe_down_reduce": "out", "moe_delta": "delta",
          "moe_act": "h", "moe_reduce": "out"}  # fmt: skip
SIZED = ("plan", "token_ids", "topk_weights", "row_map", "top_k", "vocab")

Change = tuple[str, dict, tuple[str, ...]]  # description, changed arguments, arguments that may be blamed


def strided(t: Tensor, last: int = 2) -> Tensor:
    """The same values, last stride ``last``."""
    wide = torch.zeros((*t.shape[:-1], t.shape[-1] * last), dtype=t.dtype, device=t.device)
    wide[..., ::last] = t
    return wide[..., ::last]


def matrix_changes(op: str, name: str, t: Tensor) -> Iterator[Change]:
    others = tuple(n for n in (*MATRICES[op], *SIZED, "a", "b", "widths", "cols") if n != name)
    yield "float64", {name: t.double()}, (name,)
    yield "int32", {name: t.int()}, (name,)
    if t.dtype == DTYPE:
        yield "another half", {name: t.half()}, (name, *others)
    yield "1-D", {name: t[0]}, (name,)
    yield "3-D", {name: t[None]}, (name,)
    yield "0-D", {name: t[0, 0]}, (name,)
    yield "last stride 2", {name: strided(t)}, (name,)
    yield "transposed", {name: t.T.contiguous().T}, (name,)
    yield "row stride 0", {name: t[:1].expand(*t.shape)}, (name,)
    yield "overlapping rows", {name: t.contiguous().flatten().as_strided(t.shape, (t.shape[1] - 1, 1))}, (name,)
    yield "a row more", {name: torch.cat([t, t[:1]])}, (name, *others)
    yield "a row less", {name: t[:-1]}, (name, *others)
    if name in ("x", "h", "delta") or (op, name) in (("moe_down_reduce", "out"), ("moe_reduce", "out")):
        yield "a column less", {name: t[:, :-1]}, (name, *others)
        yield "a column more", {name: torch.cat([t, t[:, :1]], 1)}, (name, *others)
    if name in ("y", "y1", "y2"):
        yield "too few columns", {name: t[:, :5]}, (name, *others)


def list_changes(op: str, name: str, tensors: list[Tensor], slices: int) -> Iterator[Change]:
    t = tensors[0]
    yield "empty", {name: []}, (name,)
    yield "one too many", {name: [t] * (slices + 1)}, (name,)
    yield "9 tensors", {name: [t] * 9}, (name,)
    yield "float64", {name: [t.double()]}, (name,)
    yield "float32", {name: [t.float()]}, (name,)
    if slices > 1:
        yield "second of another dtype", {name: [t] * (slices - 1) + [t.half()]}, (name,)
    yield "strided", {name: [strided(t)]}, (name,)
    yield "0-D", {name: [t.flatten()[0]]}, (name,)
    if name == "a":
        yield "1-D", {name: [t[0]]}, (name,)
        yield "3-D", {name: [t[None]]}, (name,)
        yield "row stride 0", {name: [t[:1].expand(*t.shape)]}, (name,)
        if op != "embedding_":
            yield "K mismatched", {name: [t[:, :-1]]}, (name, "x", "h")
        else:
            yield "vocabulary mismatched", {name: [t[:, :-1]]}, (name, "vocab")
    else:
        yield "2-D", {name: [t[None]]}, (name,)


def table_changes(op: str, t: Tensor) -> Iterator[Change]:
    lists = ("table", "widths", "cols", "a", "b", "plan")
    yield "int64", {"table": t.long()}, ("table",)
    yield "float32", {"table": t.float()}, ("table",)
    yield "2-D", {"table": t.flatten(1)}, ("table",)
    yield "7 words", {"table": t[..., :7].contiguous()}, ("table",)
    yield "strided", {"table": strided(t)}, ("table",)
    yield "9 slices", {"table": t[:, :1].repeat(1, 9, 1)}, lists
    yield "0 slices", {"table": t[:, :0].contiguous()}, lists
    if op != "shrink":  # with one arena nothing else there says how many slices there are
        yield "a slice more", {"table": t[:, :1].repeat(1, t.shape[1] + 1, 1)}, lists
    yield "a group more", {"table": torch.cat([t, t[:1]])}, lists


def plan_changes(t: Tensor) -> Iterator[Change]:
    yield "a word more", {"plan": torch.cat([t, t[:1]])}, ("plan",)
    yield "four words less", {"plan": t[:-4]}, ("plan",)
    yield "empty", {"plan": t[:0]}, ("plan",)
    yield "int64", {"plan": t.long()}, ("plan",)
    yield "2-D", {"plan": t[None]}, ("plan",)
    yield "strided", {"plan": strided(t)}, ("plan",)


def ids_changes(name: str, t: Tensor) -> Iterator[Change]:
    yield "float32", {name: t.float()}, (name,)
    yield "int16", {name: t.short()}, (name,)
    yield "another number of dimensions", {name: t[None]}, (name,)
    yield "0-D", {name: t.flatten()[0]}, (name,)
    yield "strided", {name: strided(t)}, (name,)
    yield "one more", {name: torch.cat([t, t[:1]])}, (name, "plan", "y", "token_slots", "topk_ids")


def changes(op: str, call: dict) -> Iterator[Change]:
    slices = len(call.get("widths", call.get("a", [0])))
    if "table" in call:
        slices = call["table"].shape[1]
        yield from table_changes(op, call["table"])
    yield from plan_changes(call["plan"])
    for name in MATRICES.get(op, ()):
        yield from matrix_changes(op, name, call[name])
    for name in ("a", "b"):
        if name in call:
            yield from list_changes(op, name, call[name], slices)
    for name in ("group_ids", "topk_ids", "token_ids"):
        if name in call:
            yield from ids_changes(name, call[name])
    if "widths" in call:
        widths, cols = call["widths"], call.get("cols")
        for name in ("widths", "cols") if cols else ("widths",):
            yield "one missing", {name: call[name][:-1]}, (name,)
            yield "one more", {name: call[name] + [0]}, (name,)
            yield "nine", {name: [1] * 9}, (name,)
            yield "negative", {name: [-1] + call[name][1:]}, ("widths", "cols")
        if cols:
            yield "beyond y", {"cols": cols[:-1] + [10**6]}, ("cols", "widths")
            yield "far beyond y", {"cols": cols[:-1] + [2**62]}, ("cols", "widths")
        yield "wider than y", {"widths": [10**6] * len(widths)}, ("widths", "cols", "out", "h", "delta")
        yield "beyond 32 bits", {"widths": [2**32 + w for w in widths]}, ("widths", "cols", "out", "h")
    if "v_width" in call:
        yield "negative", {"v_width": -1}, ("v_width",)
        yield "beyond 32 bits", {"v_width": 2**33}, ("v_width",)
    if op == "plan":
        yield "negative", {"num_groups": -1}, ("num_groups",)
        yield "more than the plan holds", {"num_groups": 300}, ("plan",)
        yield "beyond 32 bits", {"num_groups": 2**32 + 3}, ("num_groups", "plan")
    if op == "moe_plan":
        yield "negative", {"num_slots": -1}, ("num_slots",)
        yield "beyond 32 bits", {"num_slots": 2**40, "num_experts": 2**20}, ("num_slots", "num_experts")
        yield "zero", {"num_experts": 0}, ("num_experts",)
        yield "negative", {"num_experts": -4}, ("num_experts",)
        slots = call["token_slots"]
        yield "int64", {"token_slots": slots.long()}, ("token_slots",)
        yield "2-D", {"token_slots": slots[None]}, ("token_slots",)
        yield "one less", {"token_slots": slots[:-1]}, ("token_slots", "topk_ids")
        yield "strided", {"token_slots": strided(slots)}, ("token_slots",)
        for name in ("expert_map", "row_map"):
            good = torch.zeros(18, dtype=torch.int32, device=slots.device)
            yield "int64", {name: good.long()}, (name,)
            yield "2-D", {name: good[None]}, (name,)
            yield "strided", {name: strided(good)}, (name,)
        yield "of another length", {"row_map": good[:5]}, ("row_map", "plan")
    elif "topk_weights" in call or "top_k" in call:
        good = torch.zeros(18, dtype=torch.int32, device=call["plan"].device)
        yield "int64", {"row_map": good.long()}, ("row_map",)
        yield "2-D", {"row_map": good[None]}, ("row_map",)
        yield "one less", {"row_map": good[:-1]}, ("row_map", "y", "y1", "y2", "delta")
        yield "given, though not to moe_plan", {"row_map": good}, ("row_map", "plan")
    if "topk_weights" in call:
        weights = call["topk_weights"]
        yield "bfloat16", {"topk_weights": weights.bfloat16()}, ("topk_weights",)
        yield "1-D", {"topk_weights": weights.flatten()}, ("topk_weights",)
        yield "strided", {"topk_weights": strided(weights)}, ("topk_weights",)
        yield "a token less", {"topk_weights": weights[:-1]}, ("topk_weights", *MATRICES[op])
    if "top_k" in call:
        yield "zero", {"top_k": 0}, ("top_k", *(MATRICES[op] if op == "moe_delta" else ()))
        yield "negative", {"top_k": -3}, ("top_k",)
        yield "of another layer", {"top_k": 2}, ("top_k", "topk_weights", *MATRICES[op])
        yield "beyond 64 bits with the tokens", {"top_k": 2**62}, ("top_k", *MATRICES[op])
    if "col_stride" in call:
        yield "zero", {"col_stride": 0}, ("col_stride",)
        yield "negative", {"col_stride": -1}, ("col_stride", "cols")
        yield "beyond y", {"col_stride": 100}, ("col_stride", "cols")
    if op in ("moe_gate_up_act", "moe_act"):
        yield "unequal", {"widths": [24, 23]}, ("widths",)
        yield "negative", {"act": -1}, ("act",)
        yield "unknown", {"act": 5}, ("act",)
        one = {"table": call["table"][:, :1].contiguous(), "widths": [24], "cols": [1]}
        yield "swiglu without a gate", one | {"act": 4}, ("act",)
        three = {"table": call["table"][:, :1].repeat(1, 3, 1), "widths": [8] * 3, "cols": [0, 8, 16]}
        yield "3 slices", three, ("widths", "table")
    if op == "moe_delta":
        v = torch.zeros((6, call["v_width"]), device=call["plan"].device)
        yield "a token less", {"v": v[:-1]}, ("v",)
        yield "a column less", {"v": v[:, :-1]}, ("v",)
        yield "bfloat16", {"v": v.bfloat16()}, ("v",)
        yield "last stride 2", {"v": strided(v)}, ("v",)
        yield "None with a row map and no top_k", {
            "topk_weights": None, "top_k": 0, "x": call["x"].repeat_interleave(3, 0),
            "row_map": torch.zeros(18, dtype=torch.int32, device=call["plan"].device),
        }, ("topk_weights",)  # fmt: skip
    if op == "moe_act":
        yield "of a plan without a row map", {"mapped_pairs": 18}, ("plan",)
        yield "negative", {"mapped_pairs": -1}, ("mapped_pairs",)
    if op in ("moe_down_reduce", "moe_reduce"):
        two = {"table": call["table"].repeat(1, 2, 1), "widths": [12, 12], "cols": [0, 12]}
        yield "2 slices", two, ("widths", "table")
    if op == "embedding_":
        yield "negative", {"vocab": -1}, ("vocab",)
        yield "beyond a", {"vocab": call["vocab"] + 1}, ("vocab", "a")


def refusal(op: str, call: dict) -> str:
    """The message of the exception that a call raises."""
    output = call[OUTPUT[op]]
    before = output.clone() if output.numel() else output
    with pytest.raises(Exception) as caught:
        getattr(ops, op)(**call)
    if output.numel():
        ref.assert_same_bits("written by a refused call", output, before)
    return str(caught.value)


def assert_names(op: str, message: str, blamed: tuple[str, ...]) -> None:
    found = re.search(rf"polylora::{re.escape(op)}: (\w+).*(must|expected).*got .+", message.split("\n")[0])
    assert found, f"not a sentence of op, argument, what was expected and what came: {message}"
    taken = [argument.name for argument in getattr(ops, op).default._schema.arguments]
    assert found[1] in taken, f"{op} takes no {found[1]}: {message}"
    assert found[1] in blamed, f"blames {found[1]}, not {' or '.join(blamed)}: {message}"


@pytest.mark.parametrize("op", OUTPUT)
def test_valid_calls_are_accepted(device, op):
    getattr(ops, op)(**valid_calls(device)[op])


@pytest.mark.parametrize("op", OUTPUT)
def test_every_wrong_argument_is_named(device, op):
    call = valid_calls(device)[op]
    wrong = []
    for what, changed, blamed in changes(op, call):
        try:
            assert_names(op, refusal(op, call | changed), blamed)
        except (AssertionError, pytest.fail.Exception) as error:
            wrong.append(f"{op}({', '.join(changed)}: {what}): {str(error).splitlines()[0]}")
    assert not wrong, f"{len(wrong)} refusals amiss:\n" + "\n".join(wrong)


@pytest.mark.cuda_only
@pytest.mark.parametrize("op", OUTPUT)
def test_tensors_of_another_device_are_named(device, op):
    call = valid_calls(device)[op]
    tensors = [n for n, value in call.items() if isinstance(value, Tensor | list) and not isinstance(value, int)]
    for name in tensors:
        value = call[name]
        if isinstance(value, list) and not isinstance(value[0], Tensor):
            continue
        moved = value.cpu() if isinstance(value, Tensor) else [t.cpu() for t in value]
        message = refusal(op, call | {name: moved})
        # with the output elsewhere, all the others are
        assert_names(op, message, (name,) if name != OUTPUT[op] else tuple(call))


@pytest.mark.parametrize("op", OUTPUT)
def test_a_meta_tensor_among_real_ones_does_not_crash(device, op):
    call = valid_calls(device)[op]
    for name, value in call.items():
        if isinstance(value, Tensor):
            with contextlib.suppress(RuntimeError, NotImplementedError):
                getattr(ops, op)(**call | {name: value.to("meta")})


def test_the_message_reads_as_promised(device):
    call = valid_calls(device)["linear_"]
    message = refusal("linear_", call | {"x": torch.zeros((8, 20), dtype=torch.float16, device=device)})
    where = "cuda:0" if device == "cuda" else "cpu"
    want = rf"polylora::linear_: x must be \[8, \w+\] bfloat16 on {where}, got \[8, 20\] float16"
    assert re.match(want, message), message
    message = refusal("linear_", call | {"x": torch.zeros((8, 20), dtype=DTYPE, device=device)})
    assert re.match(r"polylora::linear_: x must be of 48 columns, as a has, got \[8, 20\] bfloat16", message), message


def test_one_row_may_have_any_row_stride(device):
    """Torch reports any stride for a dimension of size 1."""
    case = make_dense_case(device, DTYPE, rows=1, ids=[0], absent=0.0)
    for stride in (0, 1, 7):
        case.y.reset()
        args = case.linear_args()
        args["x"] = case.x.as_strided(case.x.shape, (stride, 1))
        args["y"] = case.y.view.as_strided(case.y.view.shape, (stride, 1))
        ops.linear_(**args)
        case.check()


def broken(call: Callable[[], None]) -> bool:
    try:
        call()
    except RuntimeError:
        return True
    return False


@pytest.mark.trap(4)
def test_a_refused_call_leaves_the_next_one_alone(device, dtype):
    """State behind the op (counters, scratch) after an error."""
    case = make_dense_case(device, dtype, rows=40)
    args = case.linear_args()
    assert broken(lambda: ops.linear_(**args | {"x": case.x[:, :-1]}))
    assert broken(lambda: ops.linear_(**args | {"v_width": -5}))
    ops.linear_(**args)
    case.check()


def guarded_call(case, **changed) -> None:
    """Runs linear_, which may refuse; whatever it does must stay inside y."""
    broken(lambda: ops.linear_(**case.linear_args() | changed))
    if case.y.buffer.is_cuda:
        torch.cuda.synchronize()


def test_a_plan_of_more_rows_but_equal_size_reaches_no_row_outside_y(device, dtype):
    """Sections are rounded up, so the plans of 7 and of 8 rows are equally long: only the header tells them apart."""
    assert ref.plan_layout(7, 3)["words"] == ref.plan_layout(8, 3)["words"]
    case = make_dense_case(device, dtype, ids=[0, 1, 2, 0, 1, 2, 0], groups=3, absent=0.0)
    eight = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1], dtype=torch.int32, device=device)
    guarded_call(case, plan=plan_rows(eight, 3))
    inside = torch.ones(case.y.view.shape, dtype=torch.bool)
    case.y.assert_written_only("rows behind y", inside)


def test_a_plan_of_more_groups_but_equal_size_reads_no_entry_outside_the_table(device, dtype):
    """Above one group a row, a plan's length does not depend on the groups: a MoE plan fits a dense layer."""
    assert ref.plan_layout(8, 8)["words"] == ref.plan_layout(8, 500)["words"]
    case = make_dense_case(device, dtype, ids=[0, 1, 2, 3, 4, 5, 6, 7], groups=9, absent=0.0, shared_a=0.0)
    table = case.pools.table  # group 8 lies in memory, but outside the table of 8 groups that the op is given
    guarded_call(case, table=table[:8], plan=plan_rows(torch.full((8,), 8, dtype=torch.int32, device=device), 9))
    case.y.assert_written_only("rows of a group that the table lacks", torch.zeros(case.y.view.shape, dtype=torch.bool))
