"""What is measured on MoE layers: polylora's ops at the base's seams, and the MoE LoRA of vLLM and SGLang.

===========  ========================================================================================================
``vllm``     ``vllm_lora_ops``: fused_moe_lora between the stages of SGLang's base
``classic``  ``sglang_lora_ops``: SGLang's hooks, an adapter at a time
``virtual``  ``sglang_lora_ops``: its hooks over virtual experts
``v2``       ``sglang_lora_ops``: its plan-driven layer (lora_triton), a whole forward of its own
===========  ========================================================================================================

polylora's plan is part of its forward, once a layer. So is v2's grouping of rows. That of the others is not in the
figure: their packages have stand-ins for the CUDA kernels that do it, whose time would say nothing. All read the same
weights, SGLang and polylora in place; vLLM has gate and up in tensors of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

import polylora
from polylora.bench.moe_base import Layer
from polylora.bench.moe_cases import SLOTS
from polylora.bench.moe_problem import MoeProblem, Pool, Routing
from polylora.bench.peers import Call, Implementation, Polylora
from polylora.ops import ACTIVATIONS

#: Where polylora's ops stand in the forward. ``beside``: ``moe_delta`` on a stream of its own beside each of the base's
#: GEMMs, the plan before the first of them, then ``moe_act`` and ``moe_reduce``. ``fused``: ``moe_gate_up_act`` in the
#: place of the base's activation, ``moe_down_reduce`` in that of its sum. ``added``: ``moe_gate_up_`` and ``moe_down_``
#: before them.
SEAMS = ("beside", "fused", "added")
#: Where all experts share A of gate and up. ``tokens``: as ``beside``, x multiplied by it once a token instead of once
#: a pair, by ``shrink``.
OUTER_SEAMS = ("tokens",)


class Unserved(RuntimeError):
    """The case is not for this peer; the text says why."""


# ---------------------------------------------------------------------------------------------------------- polylora


class _Halves:
    """The tables of one pool: positional arguments of the ops from ``a`` to ``v_width``, but for the plan."""

    def __init__(self, problem: MoeProblem, pool: Pool) -> None:
        model, ranks = problem.case.model, [problem.case.rank] * SLOTS
        cols = [0, 1] if model.interleaved else None
        self.col_stride = 2 if model.interleaved else 1
        self.up = polylora.SliceTable.from_sglang_moe(
            pool.up_a, pool.up_b, ranks, widths=[model.inner] * model.slices, cols=cols, col_stride=self.col_stride
        )
        self.down = polylora.SliceTable.from_sglang_moe(pool.down_a, pool.down_b, ranks, widths=[model.hidden])
        # the entries of a token's adapter, where all experts share A
        self.outer = self.up.table[:: model.experts].contiguous() if problem.case.outer else None


@dataclass
class _Ops:
    """One layer's calls.

    Attributes:
        fill: the plan.
        up_delta, down_delta: what needs no result of the base's GEMM; None where nothing is made before it.
        up: after the gate/up GEMM, of y1. ``down``: after the down GEMM, of y2.
    """

    fill: Call
    up_delta: Call | None
    up: Callable[[torch.Tensor], None]
    down_delta: Call | None
    down: Callable[[torch.Tensor], None]


class MoePolylora(Polylora):
    """polylora's ops in a layer.

    Args:
        path: what ``POLYLORA_PATH`` forces; ``auto``: nothing.
        seams: one of :data:`SEAMS` or, for cases of shared outer halves, :data:`OUTER_SEAMS`.
    """

    def __init__(self, path: str = "auto", seams: str = SEAMS[0]) -> None:
        super().__init__(path)
        self.seams = seams
        self.by_token = seams in OUTER_SEAMS
        self.apart = seams == "beside" or self.by_token  # deltas by ops of their own
        self.name += "" if seams == SEAMS[0] else f":{seams}"

    def prepare(self, problem: MoeProblem) -> list[Call]:
        case, model = problem.case, problem.case.model
        if self.by_token and not case.outer:
            raise Unserved(f"{self.name} wants all experts to share A of gate and up ('{case.name} outer')")
        self.tables = [_Halves(problem, pool) for pool in problem.pools]
        # what runs beside a GEMM is short, and would come last were it not for its priority
        beside = self.apart and problem.device.type == "cuda"
        self.side = torch.cuda.Stream(problem.device, priority=-1) if beside else None
        widths = model.slices * model.inner, model.hidden
        empty = {"device": problem.device, "dtype": problem.dtype}
        self.deltas = [torch.empty(case.pairs, width, **empty) for width in widths] if self.apart else []
        if self.by_token:
            v = torch.empty(case.rows, self.tables[0].up.v_width, dtype=torch.float32, device=problem.device)
            self.tokens = polylora.Plan(case.rows, SLOTS, device=problem.device).tensor, v
        shared = self._new_plan(problem, problem.base.layer(problem.routings[0]))
        return [self._forward(problem, problem.base.layer(routing), shared) for routing in problem.layers]

    def declines(self, error: Exception) -> bool:
        return isinstance(error, Unserved) or super().declines(error)

    def close(self) -> None:
        self.deltas, self.tokens = [], None

    @staticmethod
    def _new_plan(problem: MoeProblem, layer: Layer) -> torch.Tensor:
        case = problem.case
        pairs = case.pairs if layer.base.mapped else 0
        return polylora.Plan(case.pairs, SLOTS * case.model.experts, pairs, device=problem.device).tensor

    def _beside(self, side_calls: Sequence[Call], gemm: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Calls beside a GEMM, or before it."""
        if self.side is None:
            for call in side_calls:
                call()
            return gemm()
        here = torch.cuda.current_stream(self.side.device)
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            for call in side_calls:
                call()
        y = gemm()
        here.wait_stream(self.side)
        return y

    def _forward(self, problem: MoeProblem, layer: Layer, plan: torch.Tensor) -> Call:
        ops = self._ops(problem, layer, plan)
        added = self.seams == "added"

        def routed() -> torch.Tensor:
            if not layer.base.mapped:  # else the plan waits for it
                layer.route()
            return layer.gate_up()

        def forward() -> torch.Tensor:
            if layer.base.mapped:
                layer.route()
            y1 = self._beside([ops.fill] + ([ops.up_delta] if ops.up_delta else []), routed)
            ops.up(y1)
            h = layer.act(y1) if added else layer.h
            y2 = self._beside([ops.down_delta] if ops.down_delta else [], lambda: layer.down(h))
            ops.down(y2)
            return layer.reduce(y2) if added else layer.out

        return forward

    def _ops(self, problem: MoeProblem, layer: Layer, plan: torch.Tensor) -> _Ops:
        case, routing, x, h, ops = problem.case, layer.routing, problem.x, layer.h, torch.ops.polylora
        tables, model = self.tables[routing.pool], case.model
        u, d, top_k, stride = tables.up, tables.down, model.top_k, tables.col_stride
        up, down = (x, u.a, u.b, u.table, plan), (h, d.a, d.b, d.table, plan)
        up_rest, down_rest = (u.widths, u.cols, u.v_width), (d.widths, d.cols, d.v_width)
        weights, act, weighted = routing.topk_weights, ACTIVATIONS[model.act], layer.base.weighted

        def fill() -> None:
            ops.moe_plan(plan, routing.topk_ids, routing.slots, SLOTS, model.experts, None, layer.row_map)

        if self.apart:
            pairs = case.pairs if layer.base.mapped else 0
            of_up, of_down = self.deltas

            def delta_of_up() -> None:
                ops.moe_delta(of_up, *up, u.widths, u.v_width, top_k, None, layer.row_map)

            def delta_of_tokens() -> None:
                rows, v = self.tokens
                ops.plan(rows, routing.slots, SLOTS)
                ops.shrink(v, x, u.a, tables.outer, rows)
                ops.moe_delta(of_up, *up, u.widths, u.v_width, top_k, None, layer.row_map, v)

            return _Ops(
                fill,
                delta_of_tokens if self.by_token else delta_of_up,
                lambda y1: ops.moe_act(
                    h, y1, of_up, u.table, plan, u.widths, u.cols, act, 1.702, 7.0, stride, pairs
                ),
                lambda: ops.moe_delta(of_down, *down, d.widths, d.v_width, 0, weights, layer.row_map),
                lambda y2: ops.moe_reduce(
                    layer.out, y2, of_down, d.table, plan, weights, d.widths, d.cols, layer.row_map, weighted
                ),
            )  # fmt: skip
        if self.seams == "fused":
            return _Ops(
                fill,
                None,
                lambda y1: ops.moe_gate_up_act(h, y1, *up, *up_rest, top_k, act, 1.702, 7.0, stride, layer.row_map),
                None,
                lambda y2: ops.moe_down_reduce(layer.out, y2, *down, weights, *down_rest, layer.row_map, weighted),
            )
        # where the base multiplies the weights in with the sum, a delta added before must not have them yet
        early = weights if weighted else torch.ones_like(weights)
        return _Ops(
            fill,
            None,
            lambda y1: ops.moe_gate_up_(y1, *up, *up_rest, top_k, stride, layer.row_map),
            None,
            lambda y2: ops.moe_down_(y2, *down, early, *down_rest, layer.row_map),
        )

    def alone(self, problem: MoeProblem) -> dict[str, list[Call]]:
        """The ops without a base, one call a routing: ``plan``, ``gate_up``, ``down``. After :meth:`prepare`.

        Each routing has a plan of its own, filled here; y1, h and y2 are those of the first routing's base.
        """
        first = problem.base.layer(problem.routings[0])
        first.route()
        y1 = first.gate_up().clone()
        y2 = first.down(first.act(y1)).clone()

        def half(delta: Call | None, seam: Callable[[torch.Tensor], None], y: torch.Tensor) -> Call:
            def call() -> None:
                if delta is not None:
                    delta()
                seam(y)

            return call

        found: dict[str, list[Call]] = {"plan": [], "gate_up": [], "down": []}
        for routing in problem.routings:
            layer = problem.base.layer(routing)
            layer.route()
            ops = self._ops(problem, layer, self._new_plan(problem, layer))
            ops.fill()
            found["plan"].append(ops.fill)
            found["gate_up"].append(half(ops.up_delta, ops.up, y1))
            found["down"].append(half(ops.down_delta, ops.down, y2))
        return found


# ------------------------------------------------------------------------------------------------------------- peers


class _Peer(Implementation):
    """What the peers share.

    Args:
        api: the module ``api`` of their package.
    """

    package = ""
    #: Activations it knows, and whether the base must have pairs in their order and weighted.
    acts: tuple[str, ...] = ("silu", "relu2")
    pair_order = True

    def __init__(self, api: ModuleType) -> None:
        self.api = api

    def prepare(self, problem: MoeProblem) -> list[Call]:
        model = problem.case.model
        if model.act not in self.acts or model.interleaved:
            raise Unserved(f"{self.name} has no {'interleaved ' if model.interleaved else ''}{model.act}")
        if problem.case.outer:
            raise Unserved(f"{self.name} has no adapters here whose experts share A or B")
        if self.pair_order and not problem.base.weighted:
            raise Unserved(f"{self.name} adds into weighted pairs in their order, which {problem.base.name} has not")
        self.start(problem)
        return [self.forward(problem, routing) for routing in problem.layers]

    def start(self, problem: MoeProblem) -> None:
        """What the calls share."""

    def forward(self, problem: MoeProblem, routing: Routing) -> Call:
        """The layer with LoRA as one call."""
        raise NotImplementedError

    def declines(self, error: Exception) -> bool:
        return isinstance(error, Unserved)


class VllmMoe(_Peer):
    """vLLM: both ops add into the buffers of the base."""

    name = "vllm"
    package = "vllm_lora_ops"

    def start(self, problem: MoeProblem) -> None:
        self.api.clear_ptr_caches()  # they are keyed on addresses, and those are used again
        rank, inner, slices = problem.case.rank, problem.case.model.inner, problem.case.model.slices
        self.weights = [
            (
                [pool.up_a[:, :, s * rank : (s + 1) * rank].contiguous() for s in range(slices)],
                [pool.up_b[:, :, s * inner : (s + 1) * inner].contiguous() for s in range(slices)],
                [pool.down_a],
                [pool.down_b],
            )
            for pool in problem.pools
        ]

    def forward(self, problem: MoeProblem, routing: Routing) -> Call:
        api, case, model, device = self.api, problem.case, problem.case.model, problem.device
        layer, weights = problem.base.layer(routing), routing.topk_weights
        up_a, up_b, down_a, down_b = self.weights[routing.pool]
        meta = api.make_meta(routing.slots, SLOTS, device)
        enabled = torch.ones(SLOTS + 1, dtype=torch.int32, device=device)
        shrink, expand = api.moe_lora_configs(case.rows, model.experts, model.inner, case.rank, "w13")
        block = int(shrink.get("BLOCK_SIZE_M") or 64)
        route = api.moe_route(routing.topk_ids, meta, model.experts, block, enabled, align="torch")

        def forward() -> torch.Tensor:
            layer.route()
            y1 = layer.gate_up()
            rows = y1.view(case.rows, model.top_k, -1)
            api._call(rows, problem.x, up_a, up_b, weights, route, meta, enabled, shrink, expand, False)
            h = layer.act(y1)
            y2 = layer.down(h)
            rows = y2.view(case.rows, model.top_k, -1)
            api.fused_moe_lora_w2(rows, h, down_a, down_b, weights, route, meta, enabled)
            return layer.reduce(y2)

        return forward

    def close(self) -> None:
        self.weights = []
        self.api.clear_ptr_caches()


class Classic(_Peer):
    """SGLang's hooks. Their grouping is made with them, before the call."""

    name = "classic"
    package = "sglang_lora_ops"
    virtual = False

    def start(self, problem: MoeProblem) -> None:
        model = problem.case.model
        self.legacy = self.api.MoELegacy(problem.w13, problem.w2, model.top_k, model.gated, model.act)

    def forward(self, problem: MoeProblem, routing: Routing) -> Call:
        case, x, layer, pool = problem.case, problem.x, problem.base.layer(routing), problem.pools[routing.pool]
        lengths, adapters = map(list, zip(*case.requests(routing.turn), strict=True))
        batch = self.api.build_csgmv_batch(lengths, adapters, [case.rank] * SLOTS, [1.0] * SLOTS, device=problem.device)
        weights = pool.up_a, pool.up_b, pool.down_a, pool.down_b
        info = self.legacy.lora_info(batch, *weights, case.rank, self.virtual, False)
        hooks = self.legacy.hooks(x, info, routing.topk_ids)  # the virtual experts' grouping stays with the hooks too

        def forward() -> torch.Tensor:
            layer.route()
            y1 = layer.gate_up()
            rows = y1.view(case.rows, case.model.top_k, -1)
            hooks.after_gate_up(x, rows, routing.topk_weights, routing.topk_ids)
            h = layer.act(y1)
            y2 = layer.down(h)
            rows = y2.view(case.rows, case.model.top_k, -1)
            hooks.after_down(h, rows, routing.topk_weights, routing.topk_ids)
            return layer.reduce(y2)

        return forward


class Virtual(Classic):
    """SGLang's hooks over slots * experts virtual experts."""

    name = "virtual"
    virtual = True


class V2Moe(_Peer):
    """SGLang's layer with its own base GEMMs. It must run once on a stream before that is captured, as all calls do."""

    name = "v2"
    package = "sglang_lora_ops"
    pair_order = False

    def start(self, problem: MoeProblem) -> None:
        case, model = problem.case, problem.case.model
        self.v2 = self.api.MoEV2(problem.w13, problem.w2, model.top_k, case.rank, model.gated, model.act)

    def forward(self, problem: MoeProblem, routing: Routing) -> Call:
        v2, pool, case = self.v2, problem.pools[routing.pool], problem.case
        arguments = (problem.x, routing.topk_ids, routing.topk_weights)
        arguments += (pool.up_a, pool.up_b, pool.down_a, pool.down_b, routing.slots)
        graph = problem.device.type == "cuda"
        return lambda: v2.forward(*arguments, is_prefill=not case.is_decode, use_cuda_graph=graph)


#: By name, in the order of the tables.
MOE_PEERS = {peer.name: peer for peer in (VllmMoe, Classic, Virtual, V2Moe)}


def find_base(wanted: str) -> ModuleType | None:
    """``sglang_lora_ops.api``, or None for torch's GEMMs.

    Args:
        wanted: ``auto``: torch where the package cannot be imported. To be asked after
            :func:`polylora.bench.peers.find_peers`,
            which may have been told a folder to look in.

    Raises:
        ImportError: ``triton`` is wanted and cannot be had.
    """
    if wanted == "torch":
        return None
    try:
        return importlib.import_module("sglang_lora_ops.api")
    except Exception as error:  # whatever importing somebody else's package raises
        if wanted == "triton":
            raise ImportError(f"sglang_lora_ops: {type(error).__name__}: {error}") from None
    return None
