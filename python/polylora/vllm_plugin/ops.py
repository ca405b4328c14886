"""``torch.ops.polylora_vllm.*``: what the wrapper's methods do, as ops that ``torch.compile`` does not look into.

vLLM traces a model once, without a graph break, and drops the guards: whatever depends on the step, and every look-up
by address, has to happen inside an op. They take tensors alone, so that the compiled pieces of equal layers stay equal.

Arguments that recur:

===========  ========================================================================================================
``a, b``     slot tensors, one a slice: ``[slots, 1, R, K]`` and ``[slots, 1, width, R]``
``rows``     int32, the slot of each row of the step: :class:`polylora.vllm_plugin.step.StepRows`, which makes the plan
``no_lora``  bool ``[1]`` on the host: no row of the step has an adapter. Nothing is launched then, so that a graph
             captured for such steps holds nothing of LoRA
``turn``     written by :func:`before_base` and read by :func:`linear`, in name alone: keeps them in this order
===========  ========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polylora.ops import ACTIVATIONS
from polylora.table import SliceTable
from polylora.vllm_plugin.activation import vllms_activation
from polylora.vllm_plugin.side import is_batch_invariant, may_run_beside, side_stream_of
from polylora.vllm_plugin.step import Fork, StepRows, step_of
from polylora.vllm_plugin.tables import announce_whole, table_of_a, table_of_b

#: Rows up to which deltas are made beside the base's GEMM.
BESIDE_ROWS = 64

#: Ranks of a slot up to which gate, up and activation are one kernel where deltas are not made beside; of up to
#: FUSED_ROWS rows with an activation that its kernel for few rows knows, FEW_ROWS_FUSED_RANKS. H200, 4096 -> 2 x 14336,
#: 8 adapters, that and linear_ with vLLM's activation, us: r16, 96 rows 13 and 24, 256 19 and 28, 1024 48 and 98, 4096
#: 166 and 349. That and linear_ alone: r64, 128 rows 27 and 21, 256 31 and 26, 512 49 and 62, 1024 77 and 80, and the
#: activation takes 7, 12, 26, 52; but r128, 128 rows 45 and 32, 256 52 and 39. More rows of r64 were not measured.
FUSED_RANKS = 16
FEW_ROWS_FUSED_RANKS = 64
FUSED_ROWS = 1024
FEW_ROWS_ACTS = {ACTIVATIONS["silu"], ACTIVATIONS["gelu_tanh"]}
FEW_ROWS_GROUPS = 256

_LIBRARY = torch.library.Library("polylora_vllm", "FRAGMENT")


def before_base(turn: Tensor, x: Tensor, a: Sequence[Tensor], rows: Tensor, no_lora: Tensor) -> None:
    """Tells that the base's GEMM of ``x [M, K]`` comes next: of few rows, :func:`linear` makes its deltas beside it."""
    if no_lora.item() or x.size(0) > BESIDE_ROWS or not may_run_beside() or not _is_row_major(x):
        return
    t = table_of_a(a)
    step = step_of(rows)
    plan = step.plan(x.size(0))
    delta = x.new_empty(x.size(0), sum(t.widths))
    side = side_stream_of(x.device, first=False)  # after the GEMM: else its blocks wait for a place, and all for them
    step.fork = Fork(x.data_ptr(), t, plan, delta, side, side.mark())


def linear(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], rows: Tensor, no_lora: Tensor, turn: Tensor
) -> None:
    """``y += (x A^T) B^T`` of each row's adapter, slices side by side. ``y [M, >= sum of widths]``, ``x [M, K]``."""
    if no_lora.item():
        return
    x = _row_major(x)
    t = table_of_a(a)
    plan, delta = _plan_and_delta(x, t, step_of(rows))
    if delta is None:
        torch.ops.polylora.linear_(y, x, t.a, t.b, t.table, plan, t.widths, t.cols, t.v_width)
    else:
        torch.ops.polylora.add_delta_(y, delta, t.table, plan, t.widths, t.cols)


def gate_up_act(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    rows: Tensor,
    no_lora: Tensor,
    turn: Tensor,
    act: int,
) -> Tensor:
    """``act(y + delta)`` ``[M, I]`` of gate and up ``y [M, 2 I]``, with the deltas of :func:`linear`. May overwrite y.

    ``act``: :data:`polylora.ops.ACTIVATIONS`. Where no row has an adapter, vLLM's own activation.
    """
    t = table_of_a(a)
    if no_lora.item():
        return vllms_activation(t, y)
    x = _row_major(x)
    plan, delta = _plan_and_delta(x, t, step_of(rows))
    # the fused one rounds less than vLLM's: a row would tell whether another of its step has an adapter
    if delta is None and (is_batch_invariant() or not _is_one_kernel(x, t, act)):
        torch.ops.polylora.linear_(y, x, t.a, t.b, t.table, plan, t.widths, t.cols, t.v_width)
        return vllms_activation(t, y)
    h = y.new_empty(y.size(0), t.widths[0])
    if delta is None:
        torch.ops.polylora.moe_gate_up_act(h, y, x, t.a, t.b, t.table, plan, t.widths, t.cols, t.v_width, 1, act)
    else:
        torch.ops.polylora.moe_act(h, y, delta, t.table, plan, t.widths, t.cols, act)
    return h


def _is_row_major(x: Tensor) -> bool:
    return x.stride(-1) == 1 and (x.size(0) < 2 or x.stride(0) >= x.size(1))


def _row_major(x: Tensor) -> Tensor:
    """``x``, or a copy of one that was seen through a transpose, as vLLM's own kernels make it."""
    return x if _is_row_major(x) else x.contiguous()


def _is_one_kernel(x: Tensor, t: SliceTable, act: int) -> bool:
    ranks = t.v_width / len(t.widths)
    if ranks <= FUSED_RANKS:
        return True
    # else MoE's kernels would take it, which are slow here
    is_served = act in FEW_ROWS_ACTS and t.table.size(0) <= FEW_ROWS_GROUPS and x.size(1) % 32 == 0
    return is_served and x.size(0) <= FUSED_ROWS and ranks <= FEW_ROWS_FUSED_RANKS


def _plan_and_delta(x: Tensor, t: SliceTable, step: StepRows) -> tuple[Tensor, Tensor | None]:
    """The plan of x's rows, and their deltas, made beside the GEMM of the base that :func:`before_base` told of, or
    None."""
    fork, step.fork = step.fork, None
    if fork is None or (fork.x, fork.table, fork.delta.size(0)) != (x.data_ptr(), t, x.size(0)):
        return step.plan(x.size(0)), None
    with fork.side.fork(fork.mark):
        torch.ops.polylora.linear_delta(fork.delta, x, t.a, t.b, t.table, fork.plan, t.widths, t.v_width)
    fork.side.join()
    return fork.plan, fork.delta


def shrink(v: Tensor, x: Tensor, a: Sequence[Tensor], rows: Tensor, no_lora: Tensor) -> None:
    """``v[s] = x A_s^T`` of each row's adapter, zeros elsewhere. ``v`` float32 ``[slices, M, R]``, ``x [M, K]``."""
    if no_lora.item():
        return
    announce_whole(a)  # of a classification head's full weights, which vLLM shrinks by, too
    t = table_of_a(a)
    x = _row_major(x)
    packed = v.new_zeros(x.size(0), t.v_width)
    torch.ops.polylora.shrink(packed, x, t.a, t.table, step_of(rows).plan(x.size(0)))
    v.copy_(_by_slice(packed, v))


def expand(y: Tensor, v: Tensor, b: Sequence[Tensor], rows: Tensor, no_lora: Tensor, offset: int) -> None:
    """``y[:, offset + ...] += v[s] B_s^T`` of each row's adapter. ``v [slices, M, R]`` of any float dtype."""
    if no_lora.item():
        return
    t = table_of_b(b)
    packed = torch.empty(v.size(1), t.v_width, dtype=torch.float32, device=v.device)
    _by_slice(packed, v).copy_(v)
    plan = step_of(rows).plan(v.size(1))
    torch.ops.polylora.expand_(y, packed, t.b, t.table, plan, t.widths, [offset + col for col in t.cols])


def _by_slice(packed: Tensor, v: Tensor) -> Tensor:
    """polylora's v ``[M, v_width]``, slices padded to multiples of 8 columns, seen as vLLM's ``[slices, M, R]``."""
    return packed.view(packed.size(0), v.size(0), -1)[..., : v.size(2)].transpose(0, 1)


def _register(
    name: str, function: Callable, arguments: str, result: str = "()", fake: Callable = lambda *args: None
) -> None:
    _LIBRARY.define(f"{name}({arguments}) -> {result}")
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, function, device)
    torch.library.register_fake(f"polylora_vllm::{name}", fake, lib=_LIBRARY)


_register("before_base", before_base, "Tensor(a!) turn, Tensor x, Tensor[] a, Tensor rows, Tensor no_lora")
_register("linear", linear, "Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor rows, Tensor no_lora, Tensor turn")
_register(
    "gate_up_act",
    gate_up_act,
    "Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor rows, Tensor no_lora, Tensor turn, int act",
    "Tensor",
    lambda y, *args: y.new_empty(y.size(0), y.size(1) // 2),
)
_register("shrink", shrink, "Tensor(a!) v, Tensor x, Tensor[] a, Tensor rows, Tensor no_lora")
_register("expand", expand, "Tensor(a!) y, Tensor v, Tensor[] b, Tensor rows, Tensor no_lora, SymInt offset")
