"""The experts: the deltas that SGLang's MoE runners ask for between their GEMMs.

A runner that serves LoRA asks ``build_lora_hooks`` for two functions a layer, which add the deltas of gate and up
before the activation, and those of down before the top-k sum. For batches of polylora's backend they are these.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING

import torch
from sglang.srt.lora import lora_moe_runners
from sglang.srt.lora.lora_moe_runners import LoRAHooks, LoRAInfo
from sglang.srt.lora.utils import capturing_lora_graph
from torch import Tensor

from polylora.plan import plan_size

if TYPE_CHECKING:
    from polylora.sglang_plugin.backend import PolyloraLoRABackend

_backends: weakref.WeakSet[PolyloraLoRABackend] = weakref.WeakSet()


def serve_experts(backend: PolyloraLoRABackend) -> None:
    """Has the runners' functions made here for the batches of ``backend``; other backends keep SGLang's. May be called
    any number of times."""
    _backends.add(backend)
    original = lora_moe_runners.build_lora_hooks
    if getattr(original, "_polylora", False):
        return

    @functools.wraps(original)
    def build_lora_hooks(hidden_states: Tensor, lora_info: LoRAInfo | None, topk_ids: Tensor) -> LoRAHooks:
        owner = next((b for b in _backends if b.owns(lora_info)), None)
        if owner is None:
            return original(hidden_states, lora_info, topk_ids)
        if not (lora_info.has_active_lora or capturing_lora_graph()):
            return LoRAHooks()
        deltas = ExpertDeltas(owner, lora_info, topk_ids)
        return LoRAHooks(after_gate_up=deltas.after_gate_up, after_down=deltas.after_down)

    build_lora_hooks._polylora = True
    lora_moe_runners.build_lora_hooks = build_lora_hooks


class ExpertDeltas:
    """The deltas of one MoE layer in one pass.

    Args:
        backend: has the tables and the slots of the rows.
        lora_info: the layer's weights; its batch is the backend's.
        topk_ids: ``[tokens, top_k]``, of the experts of this rank; -1: on another one.
    """

    def __init__(self, backend: PolyloraLoRABackend, lora_info: LoRAInfo, topk_ids: Tensor) -> None:
        tables, rows = backend.tables, backend.batch_info.rows
        tokens, self.top_k = topk_ids.shape
        r_max = lora_info.gate_up_lora_b_weights.size(3)
        slices = lora_info.gate_up_lora_a_weights.size(2) // r_max
        self._up = tables.experts(lora_info.gate_up_lora_a_weights, lora_info.gate_up_lora_b_weights, slices)
        self._down = tables.experts(lora_info.down_lora_a_weights, lora_info.down_lora_b_weights, 1)
        table = self._up.table
        slots, experts = rows.num_slots, table.experts
        size = plan_size(topk_ids.numel(), slots * experts)
        self._plan = torch.empty(size, dtype=torch.int32, device=topk_ids.device)
        torch.ops.polylora.moe_plan(self._plan, topk_ids.contiguous(), rows.first(tokens), slots, experts)

    def after_gate_up(self, x: Tensor, y: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        """``y[t, j] += scale * B (A x[t])`` of the token's adapter and its j-th expert, gate beside up.

        Args:
            x: ``[tokens, hidden]``; ``y``: ``[tokens, top_k, slices * width]``, contiguous.
        """
        a, b, t = self._up.a, self._up.b, self._up.table
        pairs = y.view(-1, y.size(-1))
        torch.ops.polylora.moe_gate_up_(
            pairs, x, a, b, t.table, self._plan, t.widths, t.cols, t.v_width, self.top_k, t.col_stride
        )

    def after_down(self, h: Tensor, y: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        """``y[t, j] += w[t, j] * scale * B (A h[t, j])``.

        Args:
            h: ``[tokens * top_k, width]``; ``y``: ``[tokens, top_k, hidden]``, contiguous.
            topk_weights: ``[tokens, top_k]``.
        """
        a, b, t = self._down.a, self._down.b, self._down.table
        weights = topk_weights.to(torch.float32).contiguous()
        pairs = y.view(-1, y.size(-1))
        torch.ops.polylora.moe_down_(pairs, h, a, b, t.table, self._plan, weights, t.widths, t.cols, t.v_width)
