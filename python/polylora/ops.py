"""The ops, documented, with their fakes (what ``torch.compile`` needs to know).

Each function here is ``torch.ops.polylora.<name>`` with a docstring; call whichever reads better. All work in place,
never synchronise, run on the current stream and may be captured into a CUDA graph. Wrong shape, dtype, device or
stride raises ``RuntimeError`` naming the op, the argument, what was expected and what came. ``torch.compile`` raises it
while it traces; but of a call with a size that is unknown then (unbacked, or with an overridden hint) all but the
devices is checked when it runs, as the alignment of tensors always is.

Arguments that recur:

==============  =====================================================================================================
``table``       int32 ``[groups, slices, 8]``: where the weights of each (group, slice) lie, see
                :class:`polylora.SliceTable`. Its contents are trusted: build it with the builders, which check it.
``plan``        int32 ``[plan_size(rows, groups)]``, filled by :func:`plan` or :func:`moe_plan` for the same rows.
``a``           list of one arena for all slices or one tensor a slice, each ``[a_rows, K]``, last stride 1.
``b``           list of one arena for all slices or one tensor a slice, each 1-D contiguous.
``widths``      outputs of each slice. ``cols``: the column of y in which its output 0 stands.
``v_width``     columns of the intermediate ``v`` that the table was made for.
==============  =====================================================================================================

``x``, ``y``, ``a`` and ``b`` are bfloat16, float16 or float32, all the same; products accumulate in fp32 and are
rounded once into y. Rows without an adapter, and columns outside the slices, keep their bits.

Source: csrc/ops/ops.cpp (checks), csrc/kernels and csrc/cpu (implementations), csrc/include/polylora (layouts).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from polylora._library import OPS

#: ``act`` of :func:`moe_gate_up_act` and :func:`moe_act`, by name.
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3, "swiglu_oai": 4}

_ops = torch.ops.polylora


def plan(plan: Tensor, group_ids: Tensor, num_groups: int) -> None:
    """Groups the rows of a step, on the device; all layers of the step reuse the result.

    Args:
        plan: int32 ``[plan_size(rows, num_groups)]``, written.
        group_ids: int32 or int64 ``[rows]``; -1 = no adapter. Ids out of range count as -1, and the header counts
            them (:meth:`polylora.Plan.stats`).
        num_groups: groups of the tables that will be used with it.
    """
    _ops.plan(plan, group_ids, num_groups)


def moe_plan(
    plan: Tensor,
    topk_ids: Tensor,
    token_slots: Tensor,
    num_slots: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    row_map: Tensor | None = None,
) -> None:
    """Groups the (token, expert) pairs of a step: group = slot * num_experts + local expert.

    Args:
        plan: int32 ``[plan_size(rows, num_slots * num_experts, pairs)]``, written; rows = pairs = tokens * top_k and
            ``pairs`` 0 in ``plan_size`` without a row map.
        topk_ids: int32 or int64 ``[tokens, top_k]``; -1 = no expert.
        token_slots: int32 ``[tokens]``; -1 = no adapter.
        num_slots: adapter slots.
        num_experts: experts held here.
        expert_map: int32 ``[global experts]`` to local expert, -1 = held elsewhere (expert parallelism).
        row_map: int32 ``[rows]``: the pair (token * top_k + j) that stands in each position of a permuted buffer,
            -1 = padding. The plan's rows are then positions.

    Ids out of range count as "no such row" (expert, row map) or "no adapter" (slot), and the header counts them.
    """
    _ops.moe_plan(plan, topk_ids, token_slots, num_slots, num_experts, expert_map, row_map)


def shrink(v: Tensor, x: Tensor, a: Sequence[Tensor], table: Tensor, plan: Tensor) -> None:
    """``v[row, v_col + j] = x[row] . A[j]``, unscaled; parts of absent slices are not written.

    Args:
        v: float32 ``[rows, v_width]``, written. For row-parallel layers: all-reduce it before :func:`expand_`.
        x: ``[rows, K]``.
    """
    _ops.shrink(v, x, a, table, plan)


def expand_(
    y: Tensor, v: Tensor, b: Sequence[Tensor], table: Tensor, plan: Tensor, widths: Sequence[int], cols: Sequence[int]
) -> None:
    """``y[row, cols[s] + n] += sum_j scale * v[row, v_col + j] * B[n, j]``.

    Args:
        y: ``[rows, ...]``, any row stride; the slices may lie anywhere in a row.
        v: float32 ``[rows, v_width]`` of :func:`shrink`.
    """
    _ops.expand_(y, v, b, table, plan, widths, cols)


def linear_(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    table: Tensor,
    plan: Tensor,
    widths: Sequence[int],
    cols: Sequence[int],
    v_width: int,
) -> None:
    """``y += scale * (x A^T) B^T`` for all slices of a linear layer: the fast path, one call a layer.

    Args:
        y: ``[rows, ...]``, any row stride: the base layer's output, or a view into a fused buffer.
        x: ``[rows, K]``, the base layer's input.
    """
    _ops.linear_(y, x, a, b, table, plan, widths, cols, v_width)


def linear_delta(
    delta: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    table: Tensor,
    plan: Tensor,
    widths: Sequence[int],
    v_width: int,
) -> None:
    """What :func:`linear_` would add, by itself: it needs nothing of the base's GEMM.

    In decode, run it on a second stream beside that GEMM, then :func:`add_delta_`: what a step waits for is then the
    short sum alone. For prompts :func:`linear_` is faster.

    Args:
        delta: ``[rows, sum of widths]``, slice after slice, rounded once to its dtype (in fp16, infinite above 65504,
            where :func:`linear_` only rounds the sum). Rows with an adapter are written whole, -0 where a slice is
            absent; the others hold anything afterwards.
        x: ``[rows, K]``, the base layer's input.
    """
    _ops.linear_delta(delta, x, a, b, table, plan, widths, v_width)


def add_delta_(
    y: Tensor, delta: Tensor, table: Tensor, plan: Tensor, widths: Sequence[int], cols: Sequence[int]
) -> None:
    """``y += delta`` on the rows with an adapter, with the deltas of :func:`linear_delta`.

    Args:
        y: ``[rows, ...]``, any row stride: the base layer's output. It keeps its bits where the delta is -0.
        delta: ``[rows, sum of widths]``, slice after slice.
        table: of it, the numbers of groups and slices alone.
    """
    _ops.add_delta_(y, delta, table, plan, widths, cols)


def embedding_(
    y: Tensor,
    token_ids: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    table: Tensor,
    plan: Tensor,
    widths: Sequence[int],
    cols: Sequence[int],
    vocab: int,
    token_major: bool = False,
) -> None:
    """``y[row] += scale * B A[:, token]``: A is looked up instead of multiplied.

    Args:
        y: ``[rows, ...]``, the base embedding's output.
        token_ids: int32 or int64 ``[rows]``. A row whose id lies outside ``[0, vocab)`` keeps its bits.
        a: ``[ranks, vocab]`` each (``a_row`` = first rank row), or with ``token_major`` ``[tokens, r]``
            (``a_row`` = the row of token 0).
        vocab: tokens A knows.
    """
    _ops.embedding_(y, token_ids, a, b, table, plan, widths, cols, vocab, token_major)


def moe_gate_up_(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    table: Tensor,
    plan: Tensor,
    widths: Sequence[int],
    cols: Sequence[int],
    v_width: int,
    top_k: int,
    col_stride: int = 1,
    row_map: Tensor | None = None,
) -> None:
    """Adds the delta of the first half of an MoE layer into the engine's buffer.

    Args:
        y: ``[tokens * top_k, ...]`` in pair order, or ``[rows, ...]`` permuted with ``row_map``.
        x: ``[tokens, K]``, the layer's input; the pairs of a token share its row.
        plan: of :func:`moe_plan`, with the same row map.
        widths: ``[I]``, or ``[I, I]`` for gate and up.
        col_stride: columns between two outputs of a slice: 2 where gate and up are interleaved (cols ``[0, 1]``).
    """
    _ops.moe_gate_up_(y, x, a, b, table, plan, widths, cols, v_width, top_k, col_stride, row_map)


def moe_down_(
    y: Tensor,
    h: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    table: Tensor,
    plan: Tensor,
    topk_weights: Tensor,
    widths: Sequence[int],
    cols: Sequence[int],
    v_width: int,
    row_map: Tensor | None = None,
) -> None:
    """Adds ``w * delta`` of the second half of an MoE layer into the engine's buffer of weighted expert outputs.

    Args:
        y: ``[tokens * top_k, ...]`` in pair order, or ``[rows, ...]`` permuted with ``row_map``.
        h: one row for each row of y: the activated intermediate.
        topk_weights: float32 ``[tokens, top_k]``.
    """
    _ops.moe_down_(y, h, a, b, table, plan, topk_weights, widths, cols, v_width, row_map)


def moe_gate_up_act(
    h: Tensor,
    y1: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    table: Tensor,
    plan: Tensor,
    widths: Sequence[int],
    cols: Sequence[int],
    v_width: int,
    top_k: int,
    act: int,
    alpha: float = 1.702,
    limit: float = 7.0,
    col_stride: int = 1,
    row_map: Tensor | None = None,
) -> None:
    """``h = act(y1 + delta)``: replaces the engine's activation, so that y1 is read once and never written.

    Args:
        h: ``[rows, I]``, written for every row that exists here (base-only rows included).
        y1: ``[rows, I]`` or ``[rows, 2 I]``, the base GEMM's output.
        act: :data:`ACTIVATIONS`. One slice: ``act(u)``. Two: ``act(gate) * up``; swiglu_oai is
            ``c * sigmoid(alpha * c) * (clamp(u, -limit, limit) + 1)`` with
            ``c = min(g, limit)``.

    Other arguments as :func:`moe_gate_up_`.
    """
    _ops.moe_gate_up_act(
        h, y1, x, a, b, table, plan, widths, cols, v_width, top_k, act, alpha, limit, col_stride, row_map
    )


def moe_down_reduce(
    out: Tensor,
    y2: Tensor,
    h: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    table: Tensor,
    plan: Tensor,
    topk_weights: Tensor,
    widths: Sequence[int],
    cols: Sequence[int],
    v_width: int,
    row_map: Tensor | None = None,
    y2_weighted: bool = False,
) -> None:
    """``out[t] = sum_j w[t, j] * (y2[t, j] + delta)``: replaces the engine's top-k sum.

    Args:
        out: ``[tokens, H]``, written.
        y2: ``[rows, H]``, the base GEMM's output; rows that do not exist here (padding, experts of another rank)
            contribute nothing, whatever they hold.
        y2_weighted: y2 already carries its top-k weights; they then multiply the delta only.

    Other arguments as :func:`moe_down_`. The experts of a token add up in ascending j, in fp32.
    """
    _ops.moe_down_reduce(out, y2, h, a, b, table, plan, topk_weights, widths, cols, v_width, row_map, y2_weighted)


def moe_delta(
    delta: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    table: Tensor,
    plan: Tensor,
    widths: Sequence[int],
    v_width: int,
    top_k: int = 0,
    topk_weights: Tensor | None = None,
    row_map: Tensor | None = None,
    v: Tensor | None = None,
) -> None:
    """The deltas of one half of an MoE layer, by themselves: they need nothing of the base's GEMM.

    Run it on a second stream beside that GEMM, then :func:`moe_act` or :func:`moe_reduce`: in decode nearly all of
    LoRA's time hides behind the base model's.

    Args:
        delta: ``[rows, sum of widths]``, slice after slice. Rows with an adapter are written whole, zeros where a slice
            is absent; the others hold anything afterwards.
        x: ``[tokens, K]`` where ``top_k`` is above 0 (gate/up: the pairs of a token share its row); else ``[rows, K]``
            (down: the activated intermediate).
        topk_weights: float32 ``[tokens, top_k]``: each delta is multiplied by that of its pair (down).
        row_map: as in :func:`moe_plan`; without ``top_k`` it needs ``topk_weights``.
        v: float32 ``[rows of x, v_width]``, what :func:`shrink` made of x with a plan of the tokens: where all experts
            of an adapter share one A (shared-outer LoRA), it is multiplied once a token instead of once a pair. Then
            the rows and dtype of x are all that counts of it, and a is not looked at: ``[]`` will do. The table's
            ``v_col`` must be those of the table that ``shrink`` was given.
    """
    _ops.moe_delta(delta, x, a, b, table, plan, widths, v_width, top_k, topk_weights, row_map, v)


def moe_act(
    h: Tensor,
    y1: Tensor,
    delta: Tensor,
    table: Tensor,
    plan: Tensor,
    widths: Sequence[int],
    cols: Sequence[int],
    act: int,
    alpha: float = 1.702,
    limit: float = 7.0,
    col_stride: int = 1,
    mapped_pairs: int = 0,
) -> None:
    """``h = act(y1 + delta)`` with the deltas of :func:`moe_delta`: replaces the engine's activation.

    Args:
        h, y1, act, alpha, limit: as in :func:`moe_gate_up_act`. ``widths``, ``cols``, ``col_stride``: of y1.
        delta: ``[rows, I]`` or ``[rows, 2 I]``, gate then up, rounded once to its dtype.
        table: of it, the numbers of groups and slices alone.
        mapped_pairs: (token, expert) pairs of the plan, where it was made with a row map; else 0.
    """
    _ops.moe_act(h, y1, delta, table, plan, widths, cols, act, alpha, limit, col_stride, mapped_pairs)


def moe_reduce(
    out: Tensor,
    y2: Tensor,
    delta: Tensor,
    table: Tensor,
    plan: Tensor,
    topk_weights: Tensor,
    widths: Sequence[int],
    cols: Sequence[int],
    row_map: Tensor | None = None,
    y2_weighted: bool = False,
) -> None:
    """``out[t] = sum_j (w[t, j] * y2[t, j] + delta)`` with the weighted deltas of :func:`moe_delta`.

    Args:
        out, y2, topk_weights, y2_weighted: as in :func:`moe_down_reduce`, whose order of sums it keeps.
        delta: ``[rows, H]``, weights multiplied in.
        table: of it, the numbers of groups and slices alone.
    """
    _ops.moe_reduce(out, y2, delta, table, plan, topk_weights, widths, cols, row_map, y2_weighted)


# ------------------------------------------------------------------------------------------------------------ fakes
# The ops' own checks (csrc/ops), on tensors without data or device: a wrong call fails while tracing, with the same
# sentence but for "on cuda:0"; devices are compared here. How tensors are aligned, and what a plan was filled for, the
# op sees. Where a single size is unknown all but the devices is left to it, dtypes and plain numbers too: nearly every
# check compares sizes, and a made-up one would refuse right calls.


def _shape_of(value):
    """A tensor's shape, strides and dtype, or a number, as the traced call has them; no guard comes of it."""
    if isinstance(value, Tensor):
        sizes, strides = ([_shape_of(n) for n in numbers] for numbers in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
    if isinstance(value, list | tuple):
        return [_shape_of(item) for item in value]
    if isinstance(value, torch.SymInt):
        return _size_of(value.node)
    return value


def _size_of(node) -> int:
    """What a symbolic size is in the call that is traced. Its hint is that, unless ``mark_dynamic`` overrode it."""
    expr, shape_env = node.expr, node.shape_env
    if expr.is_number:
        return int(expr)
    overridden = set(getattr(shape_env, "var_to_hint_override", ()))  # not in every torch
    overridden |= {symbol for key in overridden for symbol in shape_env.replace(key).free_symbols}
    if node.hint is None or not overridden.isdisjoint(expr.free_symbols):
        raise _Unknown
    return int(node.hint)


class _Unknown(Exception):
    """Data will tell a size, or its hint was made up: the op checks the call when it runs."""


def _check_devices(name: str, call: dict) -> None:
    """All tensors are where the first one is."""
    first = None
    for arg, value in call.items():
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(tensor, Tensor):
                continue
            first = first or tensor.device
            if tensor.device != first:
                raise RuntimeError(f"polylora::{name}: {arg} must be on {first}, got one on {tensor.device}")


def _register_fake(name: str) -> None:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    check = getattr(torch.ops.polylora_meta, name)
    names = [argument.name for argument in check.default._schema.arguments]

    @torch.library.register_fake(f"polylora::{name}")
    def fake(*args, **kwargs) -> None:
        call = dict(zip(names, args, strict=False)) | kwargs
        _check_devices(name, call)
        with unset_fake_temporarily(), contextlib.suppress(_Unknown):
            check(**{arg: _shape_of(value) for arg, value in call.items()})


for _name in OPS:
    _register_fake(_name)
