"""Schemas, fakes, torch.library.opcheck, torch.compile: what the ops promise a compiler."""

from __future__ import annotations

import re

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
from test_ops_bad_input import DTYPE, OUTPUT, changes, refusal, valid_calls
from torch._subclasses.fake_tensor import FakeTensorMode


def cleaned(value):
    """Poison and noise replaced by finite values: opcheck compares with ==."""
    if isinstance(value, list):
        return [cleaned(v) for v in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return out.copy_(value.nan_to_num(0.5, 1.0, -1.0).clamp(-2, 2))
    return value


@pytest.mark.parametrize("op", OUTPUT)
def test_opcheck(device, op):
    call = {name: cleaned(value) for name, value in valid_calls(device)[op].items()}
    # the tail of an order, and sections above the counts, are unspecified: a plan made twice into one buffer agrees
    torch.library.opcheck(getattr(ops, op).default, (), call)


def variants(device: str) -> dict[str, tuple[str, dict]]:
    """Calls with every optional argument, other id types, one tensor a slice, wide and interleaved outputs."""
    dense = make_dense_case(device, DTYPE, rows=8, widths=(40, 24), layout="per_slice", ids_dtype=torch.int64)
    token_major = make_embedding_case(device, DTYPE, rows=8, token_major=True, token_dtype=torch.int32)
    moe = make_moe_case(device, DTYPE, row_map=True, expert_map=True, ids_dtype=torch.int64)
    up = make_moe_half(moe, down=False, width=24, interleaved=True)
    down = make_moe_half(moe, down=True, width=24)
    h = torch.zeros((moe.positions, 24), dtype=DTYPE, device=device)
    gate = dict(x=up.x, **up.args(), plan=moe.plan, top_k=moe.top_k, col_stride=2, row_map=moe.row_map)
    reduce = dict(h=down.x, **down.args(), plan=moe.plan, topk_weights=moe.topk_weights, row_map=moe.row_map)
    of_up = {name: value for name, value in gate.items() if name not in ("cols", "col_stride")}
    delta = torch.zeros((moe.positions, 48), dtype=DTYPE, device=device)
    seam = {"table": up.pools.table, "plan": moe.plan, "widths": up.widths, "cols": up.cols, "col_stride": 2}
    added = {name: value for name, value in reduce.items() if name not in ("h", "a", "b", "v_width")}
    plan = {"plan": moe.plan, "topk_ids": moe.topk_ids, "token_slots": moe.token_slots, "num_slots": moe.slots}
    maps = {"num_experts": moe.experts, "expert_map": moe.expert_map, "row_map": moe.row_map}
    return {
        "plan of int64 ids": ("plan", {"plan": dense.plan, "group_ids": dense.group_ids, "num_groups": 5}),
        "one tensor a slice": ("linear_", dense.linear_args()),
        "token-major A": ("embedding_", embedding_args(token_major)),
        "moe_plan with maps": ("moe_plan", plan | maps),
        "gate_up, mapped, interleaved": ("moe_gate_up_", dict(y=up.y.view, **gate)),
        "gate_up_act, mapped, interleaved": ("moe_gate_up_act", dict(h=h, y1=up.y.view, act=4, **gate)),
        "down, mapped": ("moe_down_", dict(y=down.y.view, **reduce)),
        "down_reduce, mapped, weighted y2": (
            "moe_down_reduce",
            dict(out=h[: moe.tokens], y2=down.y.view, y2_weighted=True, **reduce),
        ),
        "delta, mapped": ("moe_delta", dict(delta=delta, **of_up)),
        "delta of v, mapped": (
            "moe_delta",
            dict(delta=delta, v=torch.ones((moe.tokens, up.pools.v_width), device=device), **of_up),
        ),
        "act, mapped, interleaved": (
            "moe_act",
            dict(h=h, y1=up.y.view, delta=delta, act=4, mapped_pairs=moe.topk_ids.numel(), **seam),
        ),
        "reduce, mapped": (
            "moe_reduce",
            dict(out=h[: moe.tokens], y2=down.y.view, delta=delta[:, :24], y2_weighted=True, **added),
        ),
    }


VARIANTS = list(variants("cpu"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_of_optional_arguments(device, variant):
    op, call = variants(device)[variant]
    torch.library.opcheck(getattr(ops, op).default, (), {name: cleaned(value) for name, value in call.items()})


@pytest.mark.parametrize("op", OUTPUT)
def test_the_schema_names_the_one_argument_that_is_written(op):
    arguments = getattr(ops, op).default._schema.arguments
    written = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    assert written == [OUTPUT[op]]


def fake_call(mode: FakeTensorMode, op: str, call: dict) -> None:
    def fake(value):
        if isinstance(value, list):
            return [fake(v) for v in value]
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    with mode:
        getattr(ops, op)(**{name: fake(value) for name, value in call.items()})


@pytest.mark.parametrize("op", OUTPUT)
def test_fakes_accept_what_the_op_accepts(device, op):
    fake_call(FakeTensorMode(), op, valid_calls(device)[op])


@pytest.mark.parametrize("op", OUTPUT)
def test_fakes_refuse_what_the_op_refuses(device, op):
    """In the same words, but for the device; what only the data tell, a fake cannot refuse."""
    call = valid_calls(device)[op]
    wrong = []
    for what, changed, _ in changes(op, call):
        message = refusal(op, call | changed).split("\n")[0]
        try:
            fake_call(FakeTensorMode(), op, call | changed)
            said = None
        except Exception as error:
            said = str(error).split("\n")[0]
        same = said == re.sub(r" on (cpu|cuda:\d+)", "", message)
        if not same and "one filled for" not in message:  # which its header tells, on the CPU
            wrong.append(f"{op}({', '.join(changed)}: {what}): {said}, the op: {message}")
    assert not wrong, f"{len(wrong)} fakes amiss:\n" + "\n".join(wrong)


@pytest.mark.parametrize("op", OUTPUT)
def test_fakes_refuse_tensors_of_two_devices(device, op):
    """Devices are there while an op is traced; meta stands for the other one here."""
    call = valid_calls(device)[op]
    first = call[OUTPUT[op]].device
    for name, value in call.items():
        moved = [t.to("meta") for t in value if isinstance(t, torch.Tensor)] if isinstance(value, list) else value
        moved = moved.to("meta") if isinstance(moved, torch.Tensor) else moved
        if name == OUTPUT[op] or moved == [] or not isinstance(moved, list | torch.Tensor):
            continue
        with pytest.raises(RuntimeError, match=rf"polylora::{op}: {name} must be on {first}, got one on meta"):
            fake_call(FakeTensorMode(), op, call | {name: moved})


def test_fakes_know_symbolic_sizes(device):
    """Wrong sizes of a call whose rows are dynamic are refused while it is traced."""

    def run(y, x, a, b, table, plan, widths, cols, v_width):
        torch.ops.polylora.linear_(y, x, a, b, table, plan, widths, cols, v_width)

    args = make_dense_case(device, DTYPE, rows=8, gaps=False).linear_args()
    for name, wrong in (("x", args["x"][1:]), ("plan", args["plan"][:-4]), ("v_width", -1)):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=rf"polylora::linear_: {name} must be .*, got "):
            torch.compile(run, fullgraph=True, dynamic=True, backend="eager")(**args | {name: wrong})


def test_fakes_leave_a_call_of_sizes_that_data_tell_to_the_op(device):
    """Rows that a mask picks: nobody knows how many before it runs. Whatever is wrong with the call is said then."""

    def run(y, x, mask, a, b, table, plan, widths, cols, v_width):
        y = y[mask]
        torch.ops.polylora.linear_(y, x[mask], a, b, table, plan, widths, cols, v_width)
        return y

    case = make_dense_case(device, DTYPE, rows=8, gaps=False)
    args = {name: cleaned(value) for name, value in case.linear_args().items()}
    every = torch.ones(8, dtype=torch.bool, device=device)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        ref.assert_same_bits("masked", compiled(mask=every, **args), run(mask=every, **args))
        with pytest.raises(RuntimeError, match=r"polylora::linear_: plan must be .*, got "):
            compiled(mask=torch.arange(8, device=device) < 3, **args)
        for name, wrong in (("a", [t.double() for t in args["a"]]), ("widths", args["widths"][1:]), ("v_width", -1)):
            torch._dynamo.reset()
            traced = []
            compiled = torch.compile(run, fullgraph=True, backend=lambda graph, _, to=traced: to.append(1) or graph)
            with pytest.raises(RuntimeError, match=rf"polylora::linear_: {name} must be .*, got "):
                compiled(mask=every, **args | {name: wrong})
            assert traced, f"{name}: refused while it was traced"


def test_fakes_take_no_overridden_hint_for_a_size(device):
    """``hint_override`` tunes the generated code for a size that is not the traced call's."""

    def run(y, x, a, b, table, plan, widths, cols, v_width):
        y = y * 1
        torch.ops.polylora.linear_(y, x, a, b, table, plan, widths, cols, v_width)
        return y

    case = make_dense_case(device, DTYPE, rows=8, gaps=False)
    args = {name: cleaned(value) for name, value in case.linear_args().items()}
    want = run(**args)
    for hinted in (("y", "x"), ("x",)):  # x alone: its rows turn out to be those of y
        torch._dynamo.reset()
        call = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in args.items()}
        for name in ("y", "x"):
            override = {"hint_override": 1024} if name in hinted else {}
            torch._dynamo.mark_dynamic(call[name], 0, **override)
        ref.assert_same_bits(str(hinted), torch.compile(run, fullgraph=True, backend="aot_eager")(**call), want)


# ------------------------------------------------------------------------------------------------- torch.compile


def fused_qkv(x, weight, start, a, b, table, plan, widths, cols, v_width):
    """A fused projection of which only a middle part carries LoRA: linear_ into a view."""
    buffer = x @ weight
    part = buffer[:, start : start + sum(widths) + 3]
    torch.ops.polylora.linear_(part, x, a, b, table, plan, widths, cols, v_width)
    return buffer


def fused_case(device: str, rows: int = 24, seed: int = 0):
    case = make_dense_case(device, torch.bfloat16, rows=rows, k=64, widths=(64, 32), gaps=False, groups=3, seed=seed)
    gen = torch.Generator().manual_seed(seed)
    weight = (torch.randn((64, 160), generator=gen) * 0.1).to(torch.bfloat16).to(device)
    x = case.x.nan_to_num(0.25)
    args = case.linear_args()
    rest = [args[name] for name in ("a", "b", "table", "plan", "widths", "cols", "v_width")]
    return (x, weight, 32, *rest), case


def generated_code(function, *args, **options) -> tuple[torch.Tensor, str]:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, **options)
    result, codes = run_and_get_code(compiled, *args)
    return result, "\n".join(codes)


def test_compiled_linear_into_a_view_of_a_fused_buffer_copies_nothing(device):
    from torch._dynamo.utils import counters

    args, _ = fused_case(device)
    want = fused_qkv(*args)
    counters.clear()
    got, code = generated_code(fused_qkv, *args)
    ref.assert_same_bits("compiled", got, want)
    assert code.count("torch.ops.polylora.linear_.default(") == 1, code
    # the product is the only buffer, and no kernel of the compiler's own (a copy) touches it
    assert code.count(f"= empty_strided_{device}((24, 160)") == 1, code
    assert code.count(f"= empty_strided_{device}(") == 1, code
    for copy in ("cpp_fused", "triton_poi", "aten.clone", "aten.copy", ".copy_("):
        assert copy not in code.split("def call(")[-1].split("def benchmark")[0], f"{copy} in\n{code}"
    missed = {k: v for k, v in counters["inductor"].items() if "missed_reinplacing" in k and v}
    assert not missed, missed


def test_two_linears_into_two_parts_of_one_buffer_copy_nothing(device):
    """q and the rest of a fused buffer served by two calls, and shrink + expand_ on a third part."""
    args, _ = fused_case(device)
    _, case = fused_case(device, seed=1)
    other = case.linear_args()
    x, weight, start, *lora = args

    def layer(x, weight, a, b, table, plan, a2, b2, table2, plan2):
        buffer = x @ weight
        torch.ops.polylora.linear_(buffer[:, :99], x, a, b, table, plan, [64, 32], [0, 64], lora[-1])
        torch.ops.polylora.linear_(buffer[:, 61:], x, a2, b2, table2, plan2, [64, 32], [0, 64], other["v_width"])
        return buffer

    full = (x, weight, *lora[:4], other["a"], other["b"], other["table"], other["plan"])
    want = layer(*full)
    got, code = generated_code(layer, *full)
    ref.assert_same_bits("compiled", got, want)
    assert code.count(f"= empty_strided_{device}(") == 1, code


def test_compiled_with_dynamic_rows_is_compiled_once(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_qkv, fullgraph=True, dynamic=True, backend=counter)
    for rows in (24, 7, 40, 133):
        args, _ = fused_case(device, rows=rows, seed=rows)
        ref.assert_same_bits(f"{rows} rows", compiled(*args[:-1], args[-1]), fused_qkv(*args))
    assert counter.frame_count <= 2


def test_inductor_with_marked_dynamic_rows(device):
    torch._dynamo.reset()
    compiled = torch.compile(fused_qkv, fullgraph=True, dynamic=True)
    for rows in (24, 41):
        args, _ = fused_case(device, rows=rows, seed=3)
        ref.assert_same_bits(f"{rows} rows", compiled(*args), fused_qkv(*args))


def test_plan_and_ops_inside_one_compiled_function(device):
    """The plan made inside the graph: its tensor is written, then read by another op."""

    def step(ids, y, x, a, b, table, v_width):
        plan = torch.empty(ref.plan_layout(24, 3)["words"], dtype=torch.int32, device=ids.device)
        torch.ops.polylora.plan(plan, ids, 3)
        y = y * 1
        v = torch.zeros((24, v_width), dtype=torch.float32, device=ids.device)
        torch.ops.polylora.shrink(v, x, a, table, plan)
        torch.ops.polylora.expand_(y, v, b, table, plan, [64, 32], [0, 64])
        return y

    args, case = fused_case(device)
    full = (case.group_ids, torch.ones((24, 96), dtype=torch.bfloat16, device=device), args[0], *args[3:6], args[-1])
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*full)
    ref.assert_same_bits("compiled", got, step(*full))


def test_embedding_and_moe_ops_compile_in_one_graph(device):
    calls = valid_calls(device)

    def run(name, **call):
        call = {k: v + 0 if k == OUTPUT[name] else v for k, v in call.items()}
        getattr(torch.ops.polylora, name)(**call)
        return call[OUTPUT[name]]

    for op in (name for name in calls if name == "embedding_" or name.startswith("moe_") and name != "moe_plan"):
        call = {name: cleaned(value) for name, value in calls[op].items()}
        want = run(op, **call)
        torch._dynamo.reset()
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(op, **call)
        ref.assert_same_bits(op, got, want)


def test_functions_of_the_python_layer_match_the_ops(device):
    """polylora.ops.<name> takes the op's arguments, in the op's order."""
    import inspect

    import polylora

    for op in OUTPUT:
        names = list(inspect.signature(getattr(polylora.ops, op)).parameters)
        assert names == [argument.name for argument in getattr(ops, op).default._schema.arguments], op


def test_inference_mode(device):
    with torch.inference_mode():
        case = make_dense_case(device, torch.bfloat16)
        ops.linear_(**case.linear_args())
        case.check()


def test_one_plan_serves_many_layers_and_stays_as_it_is(device):
    """A plan survives being used by many layers."""
    case = make_dense_case(device, torch.bfloat16, rows=40)
    for _ in range(3):
        case.y.reset()
        ops.linear_(**case.linear_args())
        case.check()
    assert torch.equal(case.plan[:16], plan_rows(case.group_ids, len(case.adapters))[:16])
