"""The experts of MoE layers: vLLM's slot tensors as slice tables, the plan of a layer's pairs, and both halves' deltas.

A pair is a token and one of its top-k experts. vLLM's intermediate buffers have one row a pair, in the order of the
tokens (pair = token * top_k + j), which is the order that polylora's MoE ops work in; so no alignment, no padding and
no sorted ids are needed: one plan of the pairs, made on the device by the first half and handed on to the second.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.lora.layers import FusedMoEWithLoRA

from polylora.plan import plan_size
from polylora.table import SliceTable
from polylora.vllm_plugin.tables import refusal_of_slots, say_once

_TABLES = "_polylora_experts"  # of a layer; private names stay with the layer where vLLM forwards others to its base

# By the address of each slice of A: vLLM gives gate and up in either order. As in tables.py, a layer's tables hold its
# tensors, so that no other tensor can have an address while it is here.
_BY_A: weakref.WeakValueDictionary[int, ExpertTables] = weakref.WeakValueDictionary()


class ExpertTables:
    """The tables of one layer's experts, groups = slots * local experts.

    Attributes:
        gate_up: w13 with vLLM's slices: gate and up, up alone (not gated), or both as one slice (3D adapters).
        down: w2.
    """

    def __init__(self, layer: FusedMoEWithLoRA) -> None:
        # Where an outer half is shared, the layer's own tensor has one expert, which a table takes as it is; vLLM
        # hands the wrapper a view of it, expanded to all experts, at the same address.
        loaded = layer.adapter_enabled[: layer.max_loras].tolist()
        ranks = [layer.w2_lora_b_stacked[0].size(-1) if enabled else 0 for enabled in loaded]
        self.gate_up = SliceTable.from_vllm_moe(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked, ranks)
        self.down = SliceTable.from_vllm_moe(layer.w2_lora_a_stacked, layer.w2_lora_b_stacked, ranks)
        self._split: SliceTable | None = None

    def split_gate_up(self, layer: FusedMoEWithLoRA, interleaved: bool) -> SliceTable:
        """``gate_up`` with gate and up as slices of their own, as an activation wants them, and kept up to date, too.

        Args:
            layer: whose tables these are.
            interleaved: the rows of gate and up alternate where they are one slice, as in the base's weight.
        """
        if len(self.gate_up.widths) == 2 or not layer.moe_config.is_act_and_mul:
            return self.gate_up
        if self._split is None:
            ranks = list(self.gate_up.words()[:, :, 1].reshape(self.slots, self.experts, 1))
            widths = [self.gate_up.widths[0] // 2] * 2
            a, b = layer.w13_lora_a_stacked, layer.w13_lora_b_stacked
            self._split = SliceTable.from_vllm_moe(a, b, ranks, widths=widths, interleaved=interleaved)
        return self._split

    @property
    def experts(self) -> int:
        return self.down.experts

    @property
    def slots(self) -> int:
        return self.down.slots

    def set_slot(self, slot: int, lora_a: Sequence[Tensor | None], lora_b: Sequence[Tensor | None]) -> None:
        """Takes the true ranks of the adapter that the layer was given: tensors ``[experts or 1, rank, k]`` of
        ``[w1, w2, w3]``, or of ``[w13, w2]`` where an adapter has gate and up as one; None where one is absent."""
        halves = zip(lora_a, lora_b, strict=True)
        first, down, *third = [0 if a is None or b is None else a.size(1) for a, b in halves]
        self.gate_up.set_slot(slot, [first, *third][: len(self.gate_up.widths)])
        self.down.set_slot(slot, down)
        if self._split is not None:
            self._split.set_slot(slot, first)

    def clear_slot(self, slot: int) -> None:
        self.gate_up.clear_slot(slot)
        self.down.clear_slot(slot)
        if self._split is not None:
            self._split.clear_slot(slot)

    def cols(self, a: Sequence[Tensor]) -> list[int]:
        """Where the outputs of gate_up's slices begin, in a buffer that has them in the order of ``a``."""
        cols = self.gate_up.cols  # gate and up are equally wide
        return cols if a[0].data_ptr() == self.gate_up.a[0].data_ptr() else cols[::-1]


# ---------------------------------------------------------------------------------------------------------- the layers


def adopt_experts(layer: FusedMoEWithLoRA) -> ExpertTables | None:
    """Makes the layer's tables, keeps them up to date from now on and returns them; None, and a line in the log, for a
    layer that is not served."""
    tables = getattr(layer, _TABLES, None)
    if tables is not None:
        return tables
    b = layer.w13_lora_b_stacked
    reason = refusal_of_slots(b[0].size(-1), len(b), b[0].dtype)
    if layer.fully_sharded:
        reason = "fully sharded LoRA"
    if reason is not None:
        say_once(f"{type(layer).__name__} keeps vLLM's kernels: {reason}.")
        return None
    tables = ExpertTables(layer)
    for t in (*layer.w13_lora_a_stacked, *layer.w2_lora_a_stacked):
        _BY_A[t.data_ptr()] = tables
    setattr(layer, _TABLES, tables)
    _follow_slots(layer, tables)
    return tables


def _follow_slots(layer: FusedMoEWithLoRA, tables: ExpertTables) -> None:
    """Replaces the layer's ``set_lora`` and ``reset_lora`` by ones that tell the tables as well."""
    set_lora, reset_lora = layer.set_lora, layer.reset_lora

    @functools.wraps(set_lora)
    def set_and_tell(index: int, lora_a, lora_b) -> None:
        set_lora(index, lora_a, lora_b)  # which resets the slot first, and thereby clears the tables'
        tables.set_slot(index, lora_a, lora_b)

    @functools.wraps(reset_lora)
    def reset_and_tell(index: int) -> None:
        reset_lora(index)
        tables.clear_slot(index)

    layer.set_lora, layer.reset_lora = set_and_tell, reset_and_tell


def tables_of(a: Sequence[Tensor]) -> ExpertTables | None:
    """The tables of the layer that slot tensors A of either half belong to; None: vLLM's kernels serve it."""
    return _BY_A.get(a[0].data_ptr())


# ------------------------------------------------------------------------------------------------------------ the step


def empty_plan(tables: ExpertTables, topk_ids: Tensor) -> Tensor:
    """Room for a plan of all pairs, int32, in the current stream's memory."""
    words = plan_size(topk_ids.numel(), tables.down.groups)
    return torch.empty(words, dtype=torch.int32, device=topk_ids.device)


def fill_plan(
    plan: Tensor, tables: ExpertTables, topk_ids: Tensor, token_slots: Tensor, expert_map: Tensor | None
) -> None:
    """Groups the pairs by slot and local expert, in the current stream.

    Args:
        plan: of :func:`empty_plan`, written.
        topk_ids: ``[tokens, top_k]``, int32 or int64; with an expert map the global numbers.
        token_slots: int32 ``[tokens]``, -1 = no adapter.
        expert_map: int32 ``[global experts]``, -1 = on another rank.
    """
    ops = torch.ops.polylora
    ops.moe_plan(plan, topk_ids.contiguous(), token_slots, tables.slots, tables.experts, expert_map)


def add_gate_up(tables: ExpertTables, y: Tensor, x: Tensor, plan: Tensor, top_k: int, cols: Sequence[int]) -> None:
    """``y[pair] += (x[token] A^T) B^T`` of each pair's slot and expert. ``y [pairs, N]``, ``x [tokens, K]``."""
    t = tables.gate_up
    torch.ops.polylora.moe_gate_up_(y, x, t.a, t.b, t.table, plan, t.widths, cols, t.v_width, top_k)


def add_down(tables: ExpertTables, y: Tensor, h: Tensor, plan: Tensor, topk_weights: Tensor) -> None:
    """``y[pair] += w[pair] (h[pair] A^T) B^T``. ``y [pairs, hidden]``, ``h [pairs, I]``, ``w [tokens, top_k]``."""
    t = tables.down
    weights = topk_weights.float().contiguous()
    torch.ops.polylora.moe_down_(y, h, t.a, t.b, t.table, plan, weights, t.widths, t.cols, t.v_width)
