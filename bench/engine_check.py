"""Each LoRA layer of a running engine against float32: what went in, the base's weights, the slots.

Greedy texts say whether two kernels decode alike; where a model passes on every last bit (a router among random
experts), they part, and say nothing about which is right. A layer by itself does: its output against the same formula
in float32, on the same input, relative to what LoRA adds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: vLLM's activations of MoE layers, by the name of it. Others are not checked.
GATED = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
PLAIN = {f"{name}_no_mul": f for name, f in GATED.items()} | {"relu2_no_mul": lambda x: torch.relu(x) ** 2}


class LayerCheck:
    """Watches a model's layers until :meth:`stop`. Eager passes alone are seen: a captured graph runs no hooks.

    Args:
        model: with LoRA layers as vLLM makes them: linears with ``base_layer``, ``lora_a_stacked`` ``[slots, 1, R, K]``
            a slice and ``lora_b_stacked`` ``[slots, 1, width, R]``; MoE layers with unquantised Triton experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.errors: dict[str, list[float]] = {}  # by the last part of a layer's name
        self._undo: list[Callable[[], Any]] = []
        for name, layer in model.named_modules():
            last = name.rpartition(".")[2]
            if _is_linear(layer):
                hook = layer.register_forward_hook(functools.partial(self._linear, last))
                self._undo.append(hook.remove)
            elif hasattr(layer, "w13_lora_a_stacked"):
                self._watch_experts(last, layer)

    def stop(self) -> dict[str, dict[str, float]]:
        """By the last part of the layers' names: how many calls were seen, and the largest ``error``.

        The error of a call: ``||got - right|| / ||right - without LoRA||`` over the rows with an adapter; where none of
        them adds anything to the layer, relative to ``||right||``.
        """
        for undo in self._undo:
            undo()
        return {name: {"calls": len(found), "error": max(found)} for name, found in sorted(self.errors.items())}

    def _add(self, name: str, got: Tensor, right: Tensor, without: Tensor, slots: Tensor) -> None:
        rows = slots >= 0
        if rows.any():
            delta = (right - without)[rows].norm()
            of = delta if delta > 0 else right[rows].norm()
            self.errors.setdefault(name, []).append(((got.float() - right)[rows].norm() / of).item())

    # ------------------------------------------------------------------------------------------------------- linears

    def _linear(self, name: str, layer: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        x, got = args[0].flatten(0, -2), (output[0] if isinstance(output, tuple) else output).flatten(0, -2)
        base = layer.base_layer
        bias = None if getattr(base, "skip_bias_add", False) else getattr(base, "bias", None)
        without = base.quant_method.apply(base, x, bias).float()
        slots = _slots_of(layer, len(x))
        right, deltas = without.clone(), _deltas(layer.lora_a_stacked, layer.lora_b_stacked, x, slots)
        right[:, : deltas.size(1)] += deltas
        if got.size(1) * 2 == right.size(1):  # with the activation behind it
            act = _fused_activation(layer)
            if act not in GATED:
                return
            name, (right, without) = f"{name}+act", (_activated(act, t) for t in (right, without))
        self._add(name, got, right, without, slots)

    # ------------------------------------------------------------------------------------------------------- experts

    def _watch_experts(self, name: str, layer: nn.Module) -> None:
        experts = layer._moe_kernel.fused_experts
        signature, apply = inspect.signature(type(experts).apply), experts.apply  # the instance's may be another's
        if layer.moe_config.activation.value not in GATED | PLAIN:
            return

        def watched(*args, **kwargs):
            given = signature.bind(experts, *args, **kwargs).arguments
            x = given["hidden_states"].clone()  # whose memory may be that of the output
            result = apply(*args, **kwargs)
            slots = _slots_of(layer, len(x))
            right, without = (self._experts(layer, given, x, of) for of in (slots, torch.full_like(slots, -1)))
            self._add(name, given["output"], right, without, slots)
            return result

        had = "apply" in vars(experts)
        experts.apply = watched
        self._undo.append(lambda: setattr(experts, "apply", apply) if had else delattr(experts, "apply"))

    def _experts(self, layer: nn.Module, given: dict, x: Tensor, slots: Tensor) -> Tensor:
        """The layer in float32, with the adapters of ``slots [tokens]``."""
        out = torch.zeros(len(x), x.size(1), device=x.device)
        act = layer.moe_config.activation.value
        ids = given["topk_ids"] if given["expert_map"] is None else given["expert_map"][given["topk_ids"].long()]
        for expert in ids.unique().tolist():
            if expert < 0:
                continue
            tokens, at = (ids == expert).nonzero(as_tuple=True)
            y = x[tokens].float() @ given["w1"][expert].float().T
            y += _deltas(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked, x[tokens], slots[tokens], expert)
            h = _activated(act, y)
            z = h @ given["w2"][expert].float().T
            z += _deltas(layer.w2_lora_a_stacked, layer.w2_lora_b_stacked, h, slots[tokens], expert)
            out.index_add_(0, tokens, given["topk_weights"][tokens, at, None].float() * z)
        return out


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "lora_a_stacked", None), tuple) and hasattr(layer.base_layer, "quant_method")


def _slots_of(layer: nn.Module, rows: int) -> Tensor:
    """The slot of each row; behind the step's tokens none has one."""
    indices = layer.punica_wrapper.token_lora_indices[:rows]
    slots = torch.full((rows,), -1, dtype=torch.long, device=indices.device)
    slots[: len(indices)] = indices
    return slots


def _deltas(a: tuple[Tensor, ...], b: tuple[Tensor, ...], x: Tensor, slots: Tensor, expert: int = 0) -> Tensor:
    """The deltas of rows of one expert, or of a linear, slices side by side. An outer half that all experts share has
    one."""
    deltas = [x.new_zeros(len(x), of.size(2), dtype=torch.float32) for of in b]
    for slot in slots.unique().tolist():
        for delta, of_a, of_b in zip(deltas, a, b, strict=True) if slot >= 0 else ():
            rows = slots == slot
            half = of_a[slot, min(expert, of_a.size(1) - 1)].float(), of_b[slot, min(expert, of_b.size(1) - 1)].float()
            delta[rows] = x[rows].float() @ half[0].T @ half[1].T
    return torch.cat(deltas, 1)


def _fused_activation(layer: nn.Module) -> str | None:
    """The activation whose output a layer of gate and up gives, which polylora's plugin has noted there."""
    from polylora.ops import ACTIVATIONS
    from polylora.vllm_plugin.tables import FUSED

    number = getattr(layer, FUSED, None)
    return next((name for name, code in ACTIVATIONS.items() if code == number), None)


def _activated(act: str, y: Tensor) -> Tensor:
    if act in PLAIN:
        return PLAIN[act](y)
    gate, up = y.chunk(2, 1)
    return GATED[act](gate) * up
