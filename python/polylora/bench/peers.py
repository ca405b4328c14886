"""What is measured: polylora's own paths, and the LoRA kernels of vLLM and SGLang where they can be imported.

The peers are not part of this package. They are called as their engines call them, through two importable packages,
each with a module ``api``:

==========  =========================================================================================================
``vllm``    ``vllm_lora_ops``: lora_shrink and lora_expand, the scale folded into B
``csgmv``   ``sglang_lora_ops``: SGLang's default backend, with the chunk tiers up to 128 rows
``triton``  ``sglang_lora_ops``: its Triton backend
``v2``      ``sglang_lora_ops``: its plan-driven backend (triton_v2)
==========  =========================================================================================================

An embedding is called as their layers do: A's values gathered (vLLM by torch, SGLang by a kernel for it), then expand.

All read the same weights: polylora and SGLang in place, vLLM from tensors of its own, as does whoever wants an
embedding's A the other way round. Grouping the rows (plan, metadata, routes) happens in ``prepare``, outside what is
timed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

import polylora
from polylora.bench.problem import Problem

Call = Callable[[], object]


class Implementation:
    """Something that adds the delta into ``problem.y``.

    Attributes:
        name: in tables and records.
        ours: whether it is polylora; what fails there fails the run.
    """

    name = ""
    ours = False

    def prepare(self, problem: Problem) -> list[Call]:
        """Groups the rows and returns one call a weight set, each of which adds that set's delta into ``problem.y``.

        What the calls need stays alive with them. To be called on the stream on which the calls will run.
        """
        raise NotImplementedError

    def scope(self) -> contextlib.AbstractContextManager:
        """A context that must be entered around ``prepare`` and around the calls."""
        return contextlib.nullcontext()

    def declines(self, error: Exception) -> bool:
        """Whether what ``prepare`` or a call raised says that the case is not served, which is no failure."""
        return False

    def close(self) -> None:
        """Forgets whatever outlives the calls."""


class Polylora(Implementation):
    """``torch.ops.polylora.linear_``, or ``embedding_``, over tables of its own for each weight set.

    Args:
        path: what ``POLYLORA_PATH`` forces; ``auto``: nothing, the op chooses.
    """

    ours = True

    def __init__(self, path: str = "auto") -> None:
        self.path = path
        self.name = "polylora" if path == "auto" else f"polylora:{path}"
        self.plan: polylora.Plan | None = None

    def prepare(self, problem: Problem) -> list[Call]:
        case = problem.case
        self.plan = polylora.Plan(case.rows, case.adapters, device=problem.device).fill(problem.slot_of_row)
        if case.module.is_embedding:
            return self._embedding(problem)
        linear_, plan, y, x = torch.ops.polylora.linear_, self.plan.tensor, problem.y, problem.x
        ranks = [case.rank] * case.adapters

        def call(a: torch.Tensor, b: torch.Tensor) -> Call:
            t = polylora.SliceTable.from_dense_pool(a, b, ranks, problem.scales, widths=case.module.widths)
            args = t.a, t.b, t.table, plan, t.widths, t.cols, t.v_width
            return lambda: linear_(y, x, *args)

        return [call(a, b) for a, b in zip(problem.a, problem.b, strict=True)]

    def _embedding(self, problem: Problem) -> list[Call]:
        embedding_, plan, y = torch.ops.polylora.embedding_, self.plan.tensor, problem.y
        ranks, token_major = [problem.case.rank] * problem.case.adapters, problem.case.module.token_major

        def call(a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> Call:
            if token_major:
                t = polylora.SliceTable.from_vllm_embedding(a, b[:, None], ranks, problem.scales)
            else:
                t = polylora.SliceTable.from_sglang_embedding(a, b, ranks, problem.scales)
            args = t.a, t.b, t.table, plan, t.widths, t.cols, t.vocab, t.token_major
            return lambda: embedding_(y, ids, *args)

        return [call(*parts) for parts in zip(problem.a, problem.b, problem.tokens, strict=True)]

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        before = os.environ.pop("POLYLORA_PATH", None)
        if self.path != "auto":
            os.environ["POLYLORA_PATH"] = self.path
        try:
            yield
        finally:
            os.environ.pop("POLYLORA_PATH", None)
            if before is not None:
                os.environ["POLYLORA_PATH"] = before

    def declines(self, error: Exception) -> bool:
        return self.path != "auto" and "cudaErrorNotSupported" in str(error)


class PolyloraBeside(Polylora):
    """``linear_delta`` on a second stream beside a base GEMM, then ``add_delta_``. Not for embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "polylora:beside"

    def prepare(self, problem: Problem) -> list[Call]:
        case = problem.case
        self.plan = polylora.Plan(case.rows, case.adapters, device=problem.device).fill(problem.slot_of_row)
        # of the GEMM's priority: its blocks come first
        side = torch.cuda.Stream(problem.device) if problem.device.type == "cuda" else None
        shared = problem, self.plan.tensor, torch.empty_like(problem.y), side
        return [BesideCall(*shared, a, b) for a, b in zip(problem.a, problem.b, strict=True)]


class BesideCall:
    """A call of :class:`PolyloraBeside`: by itself, and :meth:`around` a GEMM."""

    def __init__(
        self,
        problem: Problem,
        plan: torch.Tensor,
        delta: torch.Tensor,
        side: torch.cuda.Stream | None,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> None:
        ranks = [problem.case.rank] * problem.case.adapters
        t = polylora.SliceTable.from_dense_pool(a, b, ranks, problem.scales, widths=problem.case.module.widths)
        self._delta = delta, problem.x, t.a, t.b, t.table, plan, t.widths, t.v_width
        self._add = problem.y, delta, t.table, plan, t.widths, t.cols
        self._side = side

    def __call__(self) -> None:
        torch.ops.polylora.linear_delta(*self._delta)
        torch.ops.polylora.add_delta_(*self._add)

    def around(self, gemm: Call) -> Call:
        """One that runs the GEMM, too, which writes y."""
        side = self._side
        if side is None:
            return lambda: (gemm(), self())

        def layer() -> None:
            here = torch.cuda.current_stream(side.device)
            before = here.record_event()
            gemm()
            side.wait_event(before)
            with torch.cuda.stream(side):
                torch.ops.polylora.linear_delta(*self._delta)
            here.wait_stream(side)
            torch.ops.polylora.add_delta_(*self._add)

        return layer


class Vllm(Implementation):
    """vLLM: shrink into a zeroed fp32 buffer, then expand."""

    name = "vllm"
    package = "vllm_lora_ops"

    def __init__(self, api: ModuleType) -> None:
        self.api = api

    def prepare(self, problem: Problem) -> list[Call]:
        self.api.clear_ptr_caches()  # they are keyed on addresses, and those are used again
        meta = self.api.make_meta(problem.slot_of_row, problem.case.adapters, problem.device)
        scales = torch.tensor(problem.scales, device=problem.device, dtype=problem.dtype)[:, None, None]
        if problem.case.module.is_embedding:
            return self._embedding(problem, meta, scales)
        starts, lora_linear = problem.starts, self.api.lora_linear

        def call(a: torch.Tensor, b: torch.Tensor) -> Call:
            a_slices = [a[:, s].contiguous() for s in range(a.size(1))]
            pairs = zip(starts, starts[1:], strict=False)
            b_slices = [(b[:, begin:end] * scales).contiguous() for begin, end in pairs]
            return lambda: lora_linear(problem.x, a_slices, b_slices, problem.y, meta)

        return [call(a, b) for a, b in zip(problem.a, problem.b, strict=True)]

    def _embedding(self, problem: Problem, meta: object, scales: torch.Tensor) -> list[Call]:
        """A is ``[slots * vocab, rank]`` there; the first row of each token's slot belongs to a step's metadata."""
        module, rank, y, expand = problem.case.module, problem.case.rank, problem.y, self.api.expand
        first = problem.slot_of_row.long() * module.vocab

        def call(a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> Call:
            rows = (a if module.token_major else a.transpose(1, 2)).reshape(-1, rank)
            b = (b * scales).contiguous()
            return lambda: expand(F.embedding(ids + first, rows).unsqueeze(0), (b,), y, meta)

        return [call(*parts) for parts in zip(problem.a, problem.b, problem.tokens, strict=True)]

    def close(self) -> None:
        self.api.clear_ptr_caches()


class _Sglang(Implementation):
    """What SGLang's backends share: requests as (rows, adapter), A packed by slices in a slot, B as it is."""

    package = "sglang_lora_ops"

    def __init__(self, api: ModuleType) -> None:
        self.api = api

    def requests(self, problem: Problem) -> tuple[list[int], list[int], list[int], list[float]]:
        """Rows and adapter of each request, rank and scale of each slot."""
        lengths, adapters = map(list, zip(*problem.case.segments(), strict=True))
        return lengths, adapters, [problem.case.rank] * problem.case.adapters, problem.scales

    def weights(self, problem: Problem) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``[slots, slices * rank, K]`` and ``[slots, sum of widths, rank]``, one pair a weight set."""
        for a, b in zip(problem.a, problem.b, strict=True):
            yield a.flatten(1, 2), b

    def embedding_weights(self, problem: Problem) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """``[slots, rank, vocab]``, B as above and the token ids, once a weight set."""
        for a, b, ids in zip(problem.a, problem.b, problem.tokens, strict=True):
            yield (a.transpose(1, 2).contiguous() if problem.case.module.token_major else a), b, ids

    def part(self, name: str) -> ModuleType:
        """A module of the package beside ``api``."""
        return importlib.import_module(f"{self.api.__name__.rpartition('.')[0]}.{name}")


class Csgmv(_Sglang):
    """SGLang's chunked SGMV. Its server default keeps chunks at 16 rows, which is slower in prefill."""

    name = "csgmv"

    def prepare(self, problem: Problem) -> list[Call]:
        requests = self.requests(problem)
        batch = self.api.build_csgmv_batch(*requests, device=problem.device, max_lora_chunk_size=128)
        offsets = self.api.make_offsets(problem.starts, problem.device)
        if problem.case.module.is_embedding:
            return self._embedding(problem, batch, offsets)
        lora, x, y = self.api.csgmv_lora, problem.x, problem.y

        def call(a: torch.Tensor, b: torch.Tensor) -> Call:
            return lambda: lora(x, a, b, batch, offsets, y)

        return [call(a, b) for a, b in self.weights(problem)]

    def _embedding(self, problem: Problem, batch: object, offsets: Sequence[torch.Tensor]) -> list[Call]:
        look_up, expand, y = self.api.csgmv_embedding_a, self.api.csgmv_expand, problem.y
        vocab = problem.case.module.vocab

        def call(a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> Call:
            return lambda: expand(look_up(ids, a, batch, vocab), b, batch, *offsets, base_output=y)

        return [call(*parts) for parts in self.embedding_weights(problem)]


class Triton(_Sglang):
    """SGLang's Triton backend: rows merged by adapter in decode, one segment a request in prefill."""

    name = "triton"

    def prepare(self, problem: Problem) -> list[Call]:
        phase = "decode" if problem.case.is_decode else "prefill"
        batch = self.api.build_triton_batch(*self.requests(problem), device=problem.device, phase=phase)
        if problem.case.module.is_embedding:
            return self._embedding(problem, batch)
        offsets = self.api.make_offsets(problem.starts, problem.device)
        lora, x, y = self.api.tri_lora, problem.x, problem.y

        def call(a: torch.Tensor, b: torch.Tensor) -> Call:
            return lambda: lora(x, a, b, batch, offsets, y)

        return [call(a, b) for a, b in self.weights(problem)]

    def _embedding(self, problem: Problem, batch: object) -> list[Call]:
        """The lookup goes by requests, in decode too; expand by the merged rows."""
        by_request = self.api.build_triton_batch(*self.requests(problem), device=problem.device, phase="prefill")
        look_up, expand, y = self.api.tri_embedding_a, self.part("sgemm_lora_b").sgemm_lora_b_fwd, problem.y
        vocab = problem.case.module.vocab

        def call(a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> Call:
            return lambda: expand(look_up(ids, a, by_request, vocab), b, batch, y)

        return [call(*parts) for parts in self.embedding_weights(problem)]


class V2(_Sglang):
    """SGLang's triton_v2. Routes and scratch are made by the first call on a stream, before any capture."""

    name = "v2"

    def prepare(self, problem: Problem) -> list[Call]:
        phase = "decode" if problem.case.is_decode else "prefill"
        dense = self.api.V2Dense(problem.case.adapters, problem.device)
        dense.begin(*self.requests(problem), phase=phase, graph_mode=problem.device.type == "cuda")
        if problem.case.module.is_embedding:
            return self._embedding(problem, dense)
        offsets = tuple(problem.starts)
        kind = "lm_head" if problem.case.module.is_lm_head else "linear"
        lora, x, y = dense.lora, problem.x, problem.y

        def call(a: torch.Tensor, b: torch.Tensor) -> Call:
            return lambda: lora(x, a, b, offsets, y, kind)

        return [call(a, b) for a, b in self.weights(problem)]

    def _embedding(self, problem: Problem, dense: Any) -> list[Call]:
        look_up = self.part("embedding_lora_a").embedding_lora_a_tokens_fwd
        bridge, runner, y = self.part("dense_v2.runner").Bridge, dense.runner, problem.y
        offsets, rows, vocab = tuple(problem.starts), problem.case.rows, problem.case.module.vocab

        def call(a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> Call:
            def run() -> None:
                plan = dense.plan(a, b, offsets, rows, "embedding")
                looked_up = look_up(ids, a, runner.token_slots, runner.lora_ranks, vocab)
                runner.run_b(bridge(looked_up), b, y, offsets=offsets, plan=plan)

            return run

        return [call(*parts) for parts in self.embedding_weights(problem)]


#: By name, in the order of the tables.
PEERS = {peer.name: peer for peer in (Vllm, Csgmv, Triton, V2)}


def find_peers(
    names: Sequence[str], folder: str | Path | None = None, peers: Mapping[str, type[Implementation]] = PEERS
) -> tuple[list[Implementation], dict[str, str]]:
    """The named peers that can be imported, and why the others cannot.

    Args:
        names: keys of ``peers``.
        folder: looked in for their packages before everything else.
        peers: by name: classes with a ``package``, made from its module ``api``.
    """
    found: list[Implementation] = []
    missing: dict[str, str] = {}
    if folder is not None and (text := str(Path(folder).resolve())) not in sys.path:
        sys.path.insert(0, text)  # and there it stays: the packages import their parts when they are used
    for name in names:
        peer: Any = peers[name]
        try:
            found.append(peer(importlib.import_module(f"{peer.package}.api")))
        except Exception as error:  # whatever importing somebody else's package raises
            missing[name] = f"{peer.package}: {type(error).__name__}: {error}"
    return found, missing
