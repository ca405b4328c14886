"""Sites of a model applied to tensors: what an engine does beside its base GEMMs, free of any engine's modules.

    plans = BatchPlans(pool.acquire(names), pool.max_adapters, device)    # once a batch
    LinearSite(pool, "model.layers.0.mlp.down_proj").add_(out, x, plans)  # once a layer and step

Everything works on the current stream without synchronising, and for inference only: a tensor that autograd would
have to follow is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from polylora.ops import ACTIVATIONS
from polylora.plan import plan_size

if TYPE_CHECKING:
    from polylora.pool import AdapterPool

# Row counts a batch remembers plans for: prefill and decode are two, generation that grows without a cache is endless.
_REMEMBERED = 8


class BatchPlans:
    """The slots of the sequences of one batch, and the plans made from them, each made once.

    Args:
        slots: adapter slot of each sequence, -1 for the base model.
        num_slots: slots of the pool (``max_adapters``).
        device: of the rows.

    Rows are tokens, sequence by sequence (``[sequences, tokens, ...]`` flattened), or sequences expanded to several
    beams each: row i belongs to sequence ``i * sequences // rows``.
    """

    def __init__(self, slots: Sequence[int], num_slots: int, device: torch.device | str):
        if not slots:
            raise ValueError("polylora::BatchPlans: slots must be one a sequence, got none")
        self.sequences = len(slots)
        self.num_slots = num_slots
        # Not inference tensors even where the caller is in inference mode: plans are refilled by later calls, which
        # need not be.
        with torch.inference_mode(False):
            self._slots = torch.tensor(list(slots), dtype=torch.int32, device=device)
        self._rows: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._plans: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._moe: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()

    def row_slots(self, rows: int) -> torch.Tensor:
        """int32 ``[rows]``: the slot of each row. Raises ValueError where rows do not divide among the sequences."""
        if rows % self.sequences:
            raise ValueError(
                f"polylora: this batch is of {self.sequences} sequences: rows of a layer must be a multiple of that, "
                f"got {rows}"
            )
        return _remembered(self._rows, rows, lambda: self._slots.repeat_interleave(rows // self.sequences))

    def plan(self, rows: int) -> torch.Tensor:
        """The plan of ``rows`` rows, for linears and embeddings; the same one for all layers."""

        def make() -> torch.Tensor:
            plan = self._buffer(plan_size(rows, self.num_slots))
            torch.ops.polylora.plan(plan, self.row_slots(rows), self.num_slots)
            return plan

        return _remembered(self._plans, rows, make)

    def moe_plan(self, topk_ids: torch.Tensor, experts: int, row_map: torch.Tensor | None = None) -> torch.Tensor:
        """The plan of one MoE layer. Valid until the next call for as many tokens: layers share the memory.

        Args:
            topk_ids: int32 or int64 ``[tokens, top_k]``.
            row_map: int32 ``[rows]``, see :func:`polylora.ops.moe_plan`.
        """
        pairs = topk_ids.numel()
        rows = pairs if row_map is None else row_map.numel()
        size = plan_size(rows, self.num_slots * experts, 0 if row_map is None else pairs)
        plan = _remembered(self._moe, (rows, size), lambda: self._buffer(size))
        slots = self.row_slots(topk_ids.shape[0])
        torch.ops.polylora.moe_plan(plan, topk_ids, slots, self.num_slots, experts, None, row_map)
        return plan

    def _buffer(self, words: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(words, dtype=torch.int32, device=self._slots.device)


def _remembered(cache: OrderedDict, key, make):
    found = cache.get(key)
    if found is None:
        if len(cache) >= _REMEMBERED:
            cache.popitem(last=False)
        found = cache[key] = make()
    return found


class _PoolSite:
    """A site of a pool whose op arguments are gathered again only when the pool's tensors moved."""

    op: str

    def __init__(self, pool: AdapterPool, path: str):
        self.pool, self.path = pool, path
        self._table = pool.site(path)
        self._generation = -1
        self._args: dict = {}

    @property
    def args(self) -> dict:
        if self._generation != self.pool.generation:
            self._generation = self.pool.generation
            self._args = self._table.args(self.op)
        return self._args

    def _refuse_grad(self, out: torch.Tensor) -> None:
        if out.requires_grad:
            raise RuntimeError(
                f"polylora: {self.path}: output must not require grad, adapters are served for inference only; call "
                "the model under torch.no_grad() or torch.inference_mode()"
            )


class LinearSite(_PoolSite):
    """A linear layer, fused or not, with as many slices as its table says."""

    op = "linear_"

    def add_(self, out: torch.Tensor, x: torch.Tensor, plans: BatchPlans) -> torch.Tensor:
        """Adds each row's own delta.

        Args:
            out: ``[..., N]``, the base layer's output.
            x: ``[..., K]``, its input; the same leading dimensions.

        Returns:
            ``out``, changed in place; a changed copy where its rows cannot be viewed as a matrix.
        """
        self._refuse_grad(out)
        y = rows_of(out)
        torch.ops.polylora.linear_(y=y, x=rows_of(x), plan=plans.plan(y.shape[0]), **self.args)
        return out if out.is_contiguous() else y.view(out.shape)


class EmbeddingSite(_PoolSite):
    """A token embedding: A is looked up."""

    op = "embedding_"

    def add_(self, out: torch.Tensor, token_ids: torch.Tensor, plans: BatchPlans) -> torch.Tensor:
        """Adds each row's own delta to ``out`` ``[..., D]``, the base embedding of ``token_ids`` ``[...]``."""
        self._refuse_grad(out)
        y = rows_of(out)
        torch.ops.polylora.embedding_(y=y, token_ids=token_ids.reshape(-1), plan=plans.plan(y.shape[0]), **self.args)
        return out if out.is_contiguous() else y.view(out.shape)


class GateUpSite(_PoolSite):
    """First half of an MoE layer with the activation: ``h = act(y1 + delta)``."""

    op = "moe_gate_up_act"

    def __init__(self, pool: AdapterPool, path: str, act: str, alpha: float = 1.702, limit: float = 7.0):
        super().__init__(pool, path)
        self._act = {"act": ACTIVATIONS[act], "alpha": alpha, "limit": limit}

    def act(
        self,
        h: torch.Tensor,
        y1: torch.Tensor,
        x: torch.Tensor,
        plan: torch.Tensor,
        top_k: int,
        row_map: torch.Tensor | None = None,
    ) -> None:
        """Writes ``h`` ``[rows, I]`` from the base GEMM's ``y1`` ``[rows, I or 2I]`` and the tokens ``x``."""
        self._refuse_grad(y1)
        torch.ops.polylora.moe_gate_up_act(
            h=h, y1=y1, x=x, plan=plan, top_k=top_k, row_map=row_map, **self._act, **self.args
        )


class DownSite(_PoolSite):
    """Second half of an MoE layer with the weighted sum over experts: ``out = sum_k w_k (y2 + delta)``."""

    op = "moe_down_reduce"

    def reduce(
        self,
        out: torch.Tensor,
        y2: torch.Tensor,
        h: torch.Tensor,
        plan: torch.Tensor,
        topk_weights: torch.Tensor,
        row_map: torch.Tensor | None = None,
    ) -> None:
        """Writes ``out`` ``[tokens, H]`` from the base GEMM's ``y2`` ``[rows, H]`` and the activated ``h``."""
        self._refuse_grad(y2)
        torch.ops.polylora.moe_down_reduce(
            out=out, y2=y2, h=h, plan=plan, topk_weights=topk_weights, row_map=row_map, **self.args
        )


def rows_of(t: torch.Tensor) -> torch.Tensor:
    """``[..., n]`` as ``[rows, n]`` with contiguous rows: a view where the strides allow one, else a copy."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
