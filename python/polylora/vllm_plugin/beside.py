"""LoRA's deltas of an MoE layer beside the base's GEMMs, for vLLM's unquantised Triton experts.

Those call, in this order, a GEMM (w13), ``apply_w13_lora``, ``activation``, a GEMM (w2), ``apply_w2_lora`` and
``moe_sum``. Where LoRA's halves run at their two places, the layer waits for them. They need little of the base,
though: gate and up the hidden states, down the activation. So they run on a stream of their own, of high priority,
while the GEMMs run, and are added where the base reads its result again anyway::

    stream of the step    | fork | GEMM w13        | join, moe_act, fork | GEMM w2        | join, moe_reduce
    side stream           |      | plan, moe_delta |                     | moe_delta      |

:func:`run_beside` replaces these methods on the experts *object* of one layer; nothing of vLLM's is copied. A step
without LoRA, and a call that is not served (:meth:`Beside.serves`), go through vLLM's methods as they are, and from
there to the wrapper. Should a later vLLM leave out a method that adds a delta, the call raises: none is lost silently.

Memory, and graphs: :mod:`polylora.vllm_plugin.side`.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

from polylora.ops import ACTIVATIONS
from polylora.vllm_plugin.experts import ExpertTables, empty_plan, fill_plan
from polylora.vllm_plugin.side import may_run_beside, side_stream_of
from polylora.vllm_plugin.tables import say_once

#: Of the deltas of one half: more, in steps of very many tokens, is not taken beside what vLLM has measured.
MAX_DELTA_BYTES = 512 << 20

_ACTIVATIONS = {
    MoEActivation.SILU: "silu",
    MoEActivation.GELU: "gelu",
    MoEActivation.GELU_TANH: "gelu_tanh",
    MoEActivation.SWIGLUOAI: "swiglu_oai",
    MoEActivation.SILU_NO_MUL: "silu",
    MoEActivation.GELU_NO_MUL: "gelu",
    MoEActivation.GELU_TANH_NO_MUL: "gelu_tanh",
    MoEActivation.RELU2_NO_MUL: "relu2",
}
_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0  # of swiglu_oai: the defaults of vLLM's kernel, which is given no others


def run_beside(layer: FusedMoEWithLoRA, tables: ExpertTables) -> None:
    """Lets the layer's deltas run beside its GEMMs, if its experts are of the kind that this knows."""
    experts = layer._moe_kernel.fused_experts
    if not may_run_beside() or "apply" in vars(experts) or not _knows(experts):
        return
    if layer.moe_config.activation is MoEActivation.SWIGLUOAI and len(layer.w13_lora_b_stacked) == 2:
        return  # gate and up apart, into a buffer where they alternate: vLLM's versions differ in what that means
    Beside(experts, layer, tables).install()
    say_once(f"{type(layer).__name__}: deltas run beside the base's GEMMs, on a side stream.", logging.INFO)


def _knows(experts: object) -> bool:
    """Triton experts that quantise nothing, with an activation that moe_act has. Subclasses may go another way."""
    if type(experts) is not TritonExperts:
        return False
    if experts.quant_dtype is not None or experts.weight_quant_dtype is not None:
        return False
    activation = experts.moe_config.activation
    return activation in _ACTIVATIONS and not (activation is MoEActivation.SILU and _clamp_limit(experts) is not None)


def _clamp_limit(experts: TritonExperts) -> float | None:
    """Where vLLM keeps the limit that makes silu another activation: since 0.33 in a configuration of its own."""
    config = getattr(experts, "activation_config", None)
    return experts.quant_config.gemm1_clamp_limit if config is None else config.clamp_limit


@dataclass
class _Call:
    """A call of the experts' ``apply``: the deltas that are under way, None once they are added."""

    plan: Tensor
    topk_weights: Tensor
    gate_up: Tensor | None
    down: Tensor | None = None
    reduced: bool = False


class Beside:
    """The methods of one layer's experts that are replaced, and what has to pass between them."""

    REPLACED = ("apply", "apply_w13_lora", "activation", "apply_w2_lora", "moe_sum")

    def __init__(self, experts: TritonExperts, layer: FusedMoEWithLoRA, tables: ExpertTables) -> None:
        self._experts = experts
        self._tables = tables
        self._activation = layer.moe_config.activation
        self._gate_up = tables.split_gate_up(layer, self._activation is MoEActivation.SWIGLUOAI)
        self._side = side_stream_of(self._gate_up.table.device, first=True)  # its few blocks would else come last
        self._vllms = {name: getattr(experts, name) for name in self.REPLACED}
        self._signature = inspect.signature(experts.apply)
        self._call: _Call | None = None

    def install(self) -> None:
        for name in self.REPLACED:
            setattr(self._experts, name, getattr(self, name))

    # ----------------------------------------------------------------------------------------- in place of vLLM's own

    def apply(self, *args, **kwargs):
        given = self._signature.bind(*args, **kwargs).arguments
        slots = self._slots(given["topk_ids"].size(0))
        if slots is None or not self.serves(given):
            return self._vllms["apply"](*args, **kwargs)
        call = self._call = self._new_call(given)
        try:
            self._start(call, given, slots)
            result = self._vllms["apply"](*args, **kwargs)
        except BaseException:
            self._side.join()  # the deltas' memory goes back to the step's stream
            raise
        finally:
            self._call = None
        if not call.reduced:
            self._side.join()
            raise RuntimeError("polylora: vLLM's experts did not call moe_sum, which adds LoRA's deltas")
        return result

    def apply_w13_lora(self, *args, **kwargs):
        return self._vllms["apply_w13_lora"](*args, **kwargs) if self._call is None else (None, None, None, None)

    def activation(self, activation: MoEActivation, output: Tensor, input: Tensor, *args, **kwargs) -> None:
        """``output [pairs, I] = act(input [pairs, N] + delta)``; then the deltas of down start."""
        if self._call is None:
            self._vllms["activation"](activation, output, input, *args, **kwargs)
            return
        call, t = self._call, self._gate_up
        act = ACTIVATIONS[_ACTIVATIONS[activation]]
        self._side.join()
        torch.ops.polylora.moe_act(
            output, input, call.gate_up, t.table, call.plan, t.widths, t.cols, act, _OAI_ALPHA, _OAI_LIMIT, t.col_stride
        )
        call.gate_up = None
        self._start_down(call, output)

    def apply_w2_lora(self, *args, **kwargs) -> None:
        if self._call is None:
            self._vllms["apply_w2_lora"](*args, **kwargs)

    def moe_sum(self, input: Tensor, output: Tensor, *args, **kwargs) -> None:
        """``output [tokens, hidden]`` = the sum of ``input [tokens, top_k, hidden]``, weighted before, and its deltas.

        Pairs of experts of other ranks, which newer versions name in further arguments, are not in the plan.
        """
        if self._call is None:
            self._vllms["moe_sum"](input, output, *args, **kwargs)
            return
        call, t = self._call, self._tables.down
        if call.down is None:
            raise RuntimeError("polylora: vLLM's experts did not call activation, which starts the deltas of down")
        self._side.join()
        torch.ops.polylora.moe_reduce(
            output, input.view(-1, input.size(-1)), call.down, t.table, call.plan, call.topk_weights, t.widths, t.cols,
            None, True,
        )  # fmt: skip
        call.down, call.reduced = None, True

    # ----------------------------------------------------------------------------------------------------- the deltas

    def _slots(self, tokens: int) -> Tensor | None:
        context = self._experts._lora_context
        token_slots = getattr(context.punica_wrapper, "token_slots", None)  # the layer may have another's by now
        return None if token_slots is None else token_slots(tokens, context.local_token_lora_mapping)

    def serves(self, given: dict) -> bool:
        """Whether a call of ``apply`` is taken: shapes, dtypes and settings decide it. ``given``: its arguments."""
        x, w1, topk_ids = given["hidden_states"], given["w1"], given["topk_ids"]
        t = self._gate_up
        widest = max(sum(t.widths), *self._tables.down.widths)
        return (
            given["activation"] is self._activation
            and not given["apply_router_weight_on_input"]
            and x.dtype == t.a[0].dtype
            # More experts than the layer says (shared ones, fused): their pairs would count as no rows.
            and w1.shape[:2] == (self._tables.experts, sum(t.widths))
            and self._experts._lora_context.aux_stream is None
            and topk_ids.numel() * widest * x.element_size() <= MAX_DELTA_BYTES
        )

    def _new_call(self, given: dict) -> _Call:
        x, pairs = given["hidden_states"], given["topk_ids"].numel()
        weights = given["topk_weights"].float().contiguous()
        return _Call(
            empty_plan(self._tables, given["topk_ids"]), weights, x.new_empty(pairs, sum(self._gate_up.widths))
        )

    def _start(self, call: _Call, given: dict, slots: Tensor) -> None:
        """Starts the plan and the deltas of gate and up."""
        x, topk_ids, t = given["hidden_states"], given["topk_ids"], self._gate_up
        with self._side.fork():
            fill_plan(call.plan, self._tables, topk_ids, slots, given["expert_map"])
            torch.ops.polylora.moe_delta(
                call.gate_up, x, t.a, t.b, t.table, call.plan, t.widths, t.v_width, topk_ids.size(1)
            )

    def _start_down(self, call: _Call, h: Tensor) -> None:
        t = self._tables.down
        call.down = h.new_empty(h.size(0), t.widths[0])
        with self._side.fork():
            torch.ops.polylora.moe_delta(
                call.down, h, t.a, t.b, t.table, call.plan, t.widths, t.v_width, 0, call.topk_weights
            )
