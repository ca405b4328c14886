"""The base MoE layer, taken apart: the grouped GEMMs that engines run, with the seams where LoRA comes in.

==========  =========================================================================================================
``triton``  SGLang's fused MoE of its package ``sglang_lora_ops``: pairs in their order, the down GEMM multiplies the
            top-k weights in
``torch``   ``torch.nn.functional.grouped_mm`` over pairs sorted by expert; needs nothing but torch
==========  =========================================================================================================

A layer's stages follow one another: ``route``, ``gate_up``, ``act``, ``down``, ``reduce``. Whoever adds LoRA calls them
one by one and does something between two of them, or in the place of ``act`` and ``reduce``.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from polylora.bench.moe_cases import Experts
from polylora.bench.moe_problem import MoeProblem, Routing, activate, split


class Base:
    """One layer's buffers, the same for all calls: they follow one another on a stream.

    Attributes:
        name: ``triton`` or ``torch``.
        weighted: y2 carries the top-k weights.
        mapped: rows of y1, h and y2 are in an order of the base's own: layers have a row map after ``route``.
        problem: whose weights it multiplies with.
        h: ``[pairs, I]``, what :meth:`Layer.act` writes. ``out``: ``[rows, H]``, what :meth:`Layer.reduce` writes.
    """

    name = ""
    weighted = False
    mapped = False

    def __init__(self, problem: MoeProblem) -> None:
        case = problem.case
        self.problem = problem
        self.h = torch.empty(case.pairs, case.model.inner, device=problem.device, dtype=problem.dtype)
        self.out = torch.empty(case.rows, case.model.hidden, device=problem.device, dtype=problem.dtype)

    def layer(self, routing: Routing) -> Layer:
        """The layer with one call's routing."""
        raise NotImplementedError

    def poison(self) -> None:
        """Fills the buffers with NaN: what a call does not write shows."""
        for buffer in (self.h, self.out):
            buffer.fill_(torch.nan)


class Layer:
    """A base layer and one routing.

    Attributes:
        row_map: after :meth:`route`: int32 ``[pairs]``, the pair in each row of y1, h and y2; None: rows are pairs.
    """

    row_map: torch.Tensor | None = None

    def __init__(self, base: Base, routing: Routing) -> None:
        self.base, self.problem, self.routing, self.case = base, base.problem, routing, base.problem.case
        self.h, self.out = base.h, base.out

    def route(self) -> None:
        """Groups the pairs by expert, as the base's GEMMs want it."""
        raise NotImplementedError

    def gate_up(self) -> torch.Tensor:
        """y1 ``[pairs, c * I]``."""
        raise NotImplementedError

    def act(self, y1: torch.Tensor) -> torch.Tensor:
        """h ``[pairs, I]``, which is :attr:`h`."""
        raise NotImplementedError

    def down(self, h: torch.Tensor) -> torch.Tensor:
        """y2 ``[pairs, H]``."""
        raise NotImplementedError

    def reduce(self, y2: torch.Tensor) -> torch.Tensor:
        """The output ``[rows, H]``, which is :attr:`out`."""
        raise NotImplementedError

    def forward(self) -> torch.Tensor:
        """The whole layer without LoRA."""
        self.route()
        return self.reduce(self.down(self.act(self.gate_up())))


def _act_into(h: torch.Tensor, y1: torch.Tensor, model: Experts) -> None:
    h.copy_(activate(model.act, *split(model, y1.float())))


def _sum_into(out: torch.Tensor, y2: torch.Tensor, row_of_pair: torch.Tensor, weights: torch.Tensor) -> None:
    rows, top_k = weights.shape
    out.copy_((y2[row_of_pair].view(rows, top_k, -1).float() * weights[:, :, None]).sum(1))


def _compiled(function: Any, device: torch.device) -> Any:
    """One kernel instead of one an operation, where there is a GPU to compile for."""
    return torch.compile(function, dynamic=True) if device.type == "cuda" else function


# ------------------------------------------------------------------------------------------------------------- torch


class TorchBase(Base):
    name = "torch"
    mapped = True

    def __init__(self, problem: MoeProblem) -> None:
        super().__init__(problem)
        torch.compiler.reset()  # a limit of recompilations would leave later cases uncompiled
        self.experts = torch.arange(problem.case.model.experts, device=problem.device, dtype=torch.int32)
        self.pairs = torch.arange(problem.case.pairs, device=problem.device)
        self.act, self.sum = _compiled(_act_into, problem.device), _compiled(_sum_into, problem.device)

    def layer(self, routing: Routing) -> Layer:
        return _TorchLayer(self, routing)


class _TorchLayer(Layer):
    base: TorchBase

    def route(self) -> None:
        ids, order = self.routing.topk_ids.view(-1).sort(stable=True)
        self.ends = torch.searchsorted(ids, self.base.experts, right=True, out_int32=True)
        self.tokens, self.row_map = order // self.case.model.top_k, order.int()
        self.row_of_pair = torch.empty_like(order).scatter_(0, order, self.base.pairs)

    def _gemm(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.grouped_mm(rows, weights.transpose(1, 2), offs=self.ends)

    def gate_up(self) -> torch.Tensor:
        return self._gemm(self.problem.x[self.tokens], self.problem.w13)

    def act(self, y1: torch.Tensor) -> torch.Tensor:
        self.base.act(self.h, y1, self.case.model)
        return self.h

    def down(self, h: torch.Tensor) -> torch.Tensor:
        return self._gemm(h, self.problem.w2)

    def reduce(self, y2: torch.Tensor) -> torch.Tensor:
        self.base.sum(self.out, y2, self.row_of_pair, self.routing.topk_weights)
        return self.out


# ------------------------------------------------------------------------------------------------------------ triton


class TritonBase(Base):
    """The stages of ``sglang_lora_ops.api.MoELegacy.forward``, with buffers that stay. Its activations are silu and
    relu2; another one is compiled from torch, as SGLang does it."""

    name = "triton"
    weighted = True

    def __init__(self, problem: MoeProblem, api: ModuleType) -> None:
        super().__init__(problem)
        model, package = problem.case.model, api.__name__.rpartition(".")[0]
        self.align = importlib.import_module(f"{package}._moe_align").moe_align_block_size
        self.kernels = importlib.import_module(f"{package}.fused_moe_triton_kernels")
        triton = importlib.import_module("triton.language")
        legacy = api.MoELegacy(problem.w13, problem.w2, model.top_k, model.gated)
        self.up_config, self.down_config = legacy.configs(problem.case.rows)
        unquantised = ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant")
        self.options = {"compute_type": triton.bfloat16} | dict.fromkeys(unquantised, False)

        def buffer(width: int) -> torch.Tensor:
            return torch.empty(problem.case.pairs, width, device=problem.device, dtype=problem.dtype)

        self.y1, self.y2 = buffer(model.slices * model.inner), buffer(model.hidden)
        torch.compiler.reset()
        self.other_act = _compiled(_act_into, problem.device)

    def layer(self, routing: Routing) -> Layer:
        return _TritonLayer(self, routing)

    def poison(self) -> None:
        super().poison()
        for buffer in (self.y1, self.y2):
            buffer.fill_(torch.nan)


class _TritonLayer(Layer):
    base: TritonBase

    def route(self) -> None:
        config, experts = self.base.up_config, self.case.model.experts
        self.blocks = self.base.align(self.routing.topk_ids, config["BLOCK_SIZE_M"], experts)

    def _gemm(self, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, top_k: int, last: bool) -> torch.Tensor:
        base, routing = self.base, self.routing
        rows = y.view(self.case.rows, self.case.model.top_k, -1)
        base.kernels.invoke_fused_moe_kernel(
            x, w, None, rows, None, None, None, routing.topk_weights, routing.topk_ids, *self.blocks, last, top_k,
            base.down_config if last else base.up_config, **base.options,
        )  # fmt: skip
        return y

    def gate_up(self) -> torch.Tensor:
        return self._gemm(self.problem.x, self.problem.w13, self.base.y1, self.case.model.top_k, last=False)

    def act(self, y1: torch.Tensor) -> torch.Tensor:
        model = self.case.model
        if model.act == "silu" and model.gated and not model.interleaved:
            ids = self.routing.topk_ids
            self.base.kernels.act_and_mul_triton(y1, self.h, self.base.up_config, ids, None, False, "silu")
        elif model.act == "relu2" and not model.gated:
            torch.square(torch.relu(y1), out=self.h)
        else:
            self.base.other_act(self.h, y1, self.case.model)
        return self.h

    def down(self, h: torch.Tensor) -> torch.Tensor:
        return self._gemm(h, self.problem.w2, self.base.y2, 1, last=True)

    def reduce(self, y2: torch.Tensor) -> torch.Tensor:
        self.base.kernels.moe_sum_reduce_triton(y2.view(self.case.rows, self.case.model.top_k, -1), self.out, 1.0)
        return self.out


#: By name.
BASES = ("triton", "torch")


def make_base(problem: MoeProblem, api: ModuleType | None) -> Base:
    """The base of ``sglang_lora_ops.api``, or torch's where ``api`` is None."""
    return TorchBase(problem) if api is None else TritonBase(problem, api)
