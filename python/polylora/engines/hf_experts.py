"""Experts of Hugging Face models: 3-D parameters in one module, served through the fused MoE seams.

transformers runs them by one of several implementations that the config names (eager, grouped_mm, batched_mm), which
none leaves a place to add a delta: the module's ``forward`` is replaced, on the instance, for batches in which an
adapter touches the experts. All other batches go through the original.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from polylora.layers import BatchPlans, DownSite, GateUpSite, rows_of
from polylora.models import Site
from polylora.pool import AdapterPool

from .errors import EngineError


class UnsupportedExperts(ValueError):
    """An experts module that does something the seams do not."""


@dataclass(frozen=True)
class ExpertsKind:
    """How an experts module computes, found out by looking and trying.

    Attributes:
        act: name of the activation, a key of :data:`polylora.ops.ACTIVATIONS`.
        alpha, limit: of ``swiglu_oai``.
        transposed: parameters are ``[experts, in, out]``.
        bias: names of the bias parameters (gate/up, down), or None.
        arguments: names of ``forward``'s arguments: hidden states, expert ids, weights.
    """

    act: str
    alpha: float
    limit: float
    transposed: bool
    bias: tuple[str, str] | None
    arguments: tuple[str, str, str]


_SIMPLE = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: torch.relu(x).square(),
}


def inspect_experts(module: torch.nn.Module, gate_up: Site, down: Site) -> ExpertsKind:
    """Says how ``module`` computes.

    Raises:
        UnsupportedExperts: it is not ``w2(act(w1 x))`` weighted and summed over a token's experts, with an activation
            the ops know and parameters of the sites' shapes.
    """
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if len(arguments) != 3:
        raise UnsupportedExperts(f"forward must take hidden states, expert ids and weights, got {arguments}")
    for name in ("has_post_expert_norm", "_is_expert_parallel"):
        if getattr(module, name, False):
            raise UnsupportedExperts(f"{name} must be off, got on")
    transposed = bool(getattr(module, "is_transposed", gate_up.transposed))
    for site in (gate_up, down):
        name = site.path.rpartition(".")[2]
        weight = getattr(module, name, None)
        shape = (site.experts, site.k, site.width) if transposed else (site.experts, site.width, site.k)
        if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != shape:
            got = list(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise UnsupportedExperts(f"{name} must be {list(shape)}, got {got}")
    bias = None
    if getattr(module, "has_bias", False):
        bias = tuple(f"{site.path.rpartition('.')[2]}_bias" for site in (gate_up, down))
        for name in bias:
            if not isinstance(getattr(module, name, None), torch.Tensor):
                raise UnsupportedExperts(f"{name} must be a tensor, got {type(getattr(module, name, None)).__name__}")
    if getattr(module, "is_concatenated", not gate_up.interleaved) == gate_up.interleaved:
        raise UnsupportedExperts(f"gate and up must be {'interleaved' if gate_up.interleaved else 'side by side'}")
    alpha, limit = float(getattr(module, "alpha", 1.702)), float(getattr(module, "limit", 7.0))
    act = _activation(module, gate_up, alpha, limit)
    return ExpertsKind(act, alpha, limit, transposed, bias, arguments)


def _activation(module: torch.nn.Module, gate_up: Site, alpha: float, limit: float) -> str:
    """The activation by trying it: names and classes of activations change between versions, values do not."""
    device = getattr(module, gate_up.path.rpartition(".")[2]).device
    values = torch.linspace(-9.0, 9.0, 256, device=device)
    gate, up = values.view(4, 64), values.flip(0).roll(31).view(4, 64)
    candidates = {}
    with torch.no_grad():
        if not gate_up.gated:
            got = module.act_fn(gate)
            candidates = {name: act(gate) for name, act in _SIMPLE.items()}
        else:
            both = torch.stack((gate, up), -1).flatten(1) if gate_up.interleaved else torch.cat((gate, up), 1)
            got = module._apply_gate(both) if hasattr(module, "_apply_gate") else module.act_fn(gate) * up
            candidates = {name: act(gate) * up for name, act in _SIMPLE.items()}
            g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
            candidates["swiglu_oai"] = g * torch.sigmoid(alpha * g) * (u + 1)
    for name, value in candidates.items():
        if got.shape == value.shape and torch.allclose(got, value, rtol=1e-4, atol=1e-4):
            return name
    act = type(getattr(module, "act_fn", module)).__name__
    raise UnsupportedExperts(f"the activation must be one of {', '.join(candidates)}, got {act}")


class ExpertsSite:
    """Both halves of one experts module, and the replacement of its ``forward``.

    Args:
        module: the experts module.
        gate_up, down: its sites.
        pool: holds the adapters.
        batch: called with nothing; the plans of the running batch when an adapter in it touches these experts, else
            None.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        gate_up: Site,
        down: Site,
        pool: AdapterPool,
        batch: Callable[[], BatchPlans | None],
    ):
        self.kind = inspect_experts(module, gate_up, down)
        self.module, self.experts, self.width = module, gate_up.experts, gate_up.slices[0].width
        self._names = tuple(site.path.rpartition(".")[2] for site in (gate_up, down))
        self._up = GateUpSite(pool, gate_up.path, self.kind.act, self.kind.alpha, self.kind.limit)
        self._down = DownSite(pool, down.path)
        self._batch, self._dtype, self._path = batch, pool.dtype, gate_up.path.rpartition(".")[0]

    def replacement(self, original: Callable) -> Callable:
        """The function to stand in for ``original``, the module's bound ``forward``."""
        names = self.kind.arguments

        def forward(*args, **kwargs):
            plans = self._batch()
            if plans is None:
                return original(*args, **kwargs)
            return self.forward(*args, *(kwargs[name] for name in names[len(args) :]), plans=plans)

        return forward

    def forward(
        self, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, plans: BatchPlans
    ) -> torch.Tensor:
        """``[tokens, H]``: base and adapters. Pairs are permuted by expert for the GEMMs and never moved back: the
        seams read through the row map.

        Raises:
            EngineError: the hidden states, or autocast, are of another dtype than the engine.
        """
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._dtype
        for what, dtype in (("its input", hidden.dtype), ("autocast", autocast)):
            if dtype != self._dtype:
                raise EngineError(
                    f"polylora: {self._path}: {what} must be {self._dtype}, the engine's dtype, got {dtype}; under "
                    "autocast, load the model in autocast's dtype or switch autocast off"
                )
        x = rows_of(hidden)
        top_k = topk_ids.shape[-1]
        ids = topk_ids.reshape(-1)
        sorted_ids, order = torch.sort(ids, stable=True)
        ends = torch.searchsorted(
            sorted_ids, torch.arange(self.experts, device=ids.device, dtype=ids.dtype), right=True
        )
        row_map = order.to(torch.int32)
        plan = plans.moe_plan(topk_ids, self.experts, row_map)

        y1 = self._gemm(0, x[order // top_k], ends, sorted_ids)
        h = y1.new_empty(y1.shape[0], self.width)
        self._up.act(h, y1, x, plan, top_k, row_map)
        y2 = self._gemm(1, h, ends, sorted_ids)
        out = torch.empty_like(x)
        self._down.reduce(out, y2, h, plan, topk_weights.float().contiguous(), row_map)
        return out.view(hidden.shape)

    def _gemm(self, half: int, x: torch.Tensor, ends: torch.Tensor, sorted_ids: torch.Tensor) -> torch.Tensor:
        weight = getattr(self.module, self._names[half])
        y = grouped_mm(x, weight if self.kind.transposed else weight.mT, ends)
        if self.kind.bias:
            y += getattr(self.module, self.kind.bias[half])[sorted_ids]
        return y


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` times the matrix of the group they belong to.

    Args:
        x: ``[rows, K]``, sorted by group.
        weight: ``[groups, K, N]``, any strides.
        ends: int64 ``[groups]``, the row after each group's last.

    Returns:
        ``[rows, N]``. On a GPU in bfloat16 one grouped kernel without synchronising, where torch has one and the
        strides allow it (16 bytes); else one GEMM for each group that has rows, after reading ``ends`` back.
    """
    if _has_grouped_kernel(x, weight):
        return torch.nn.functional.grouped_mm(x, weight, offs=ends.to(torch.int32))
    y = x.new_empty(x.shape[0], weight.shape[-1])
    begin = 0
    for group, end in enumerate(ends.tolist()):
        if end > begin:
            torch.mm(x[begin:end], weight[group], out=y[begin:end])
            begin = end
    return y


def _has_grouped_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and weight.shape[-1] % 8 == 0
        and weight.shape[-2] % 8 == 0
        and x.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
    )
