"""The data of an MoE case on a device: base weights, adapters, routings; and the error of a result against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from polylora.bench.moe_cases import SLOTS, Experts, MoeCase
from polylora.bench.problem import COLD

if TYPE_CHECKING:
    from polylora.bench.moe_base import Base

#: Of the free memory, what a case may take: the rest is for peers with weights in a layout of their own.
MEMORY_SHARE = 0.75
#: The adapters of one half together take at least this many times the L2, so that pairs drawn at random are cold.
POOL_SHARE = 8
#: Routings at most: what is left warm beyond is less than a tenth.
MAX_ROUTINGS = 512
#: Tokens whose results are compared, evenly spaced.
CHECKED_TOKENS = 64
#: The deltas are at least this much of the base's output: a wrong one shows.
LORA_MATTERS = 0.3


@dataclass(frozen=True)
class Pool:
    """All adapters of a layer in SGLang's layout; B carries the scale. L = :data:`SLOTS`, c = 2 where gated, else 1.

    Attributes:
        up_a, up_b: ``[L, E, c * R, H]``, ``[L, E, c * I, R]``: slices one behind the other, interleaved or not.
        down_a, down_b: ``[L, E, R, I]``, ``[L, E, H, R]``. 1 instead of E: all experts share it.
    """

    up_a: torch.Tensor
    up_b: torch.Tensor
    down_a: torch.Tensor
    down_b: torch.Tensor

    def of(self, slot: int, expert: int) -> list[torch.Tensor]:
        """The four matrices of one adapter in one expert, float64."""
        halves = self.up_a, self.up_b, self.down_a, self.down_b
        return [t[slot, expert if t.size(1) > 1 else 0].double() for t in halves]


@dataclass(frozen=True)
class Routing:
    """Where the tokens of one call go.

    Attributes:
        turn: of :meth:`MoeCase.requests`.
        topk_ids: int32 ``[rows, top_k]``, distinct in a row.
        topk_weights: float32 ``[rows, top_k]``, sums of 1.
        slots: int32 ``[rows]``.
        pool: of :attr:`MoeProblem.pools`.
    """

    turn: int
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    slots: torch.Tensor
    pool: int

    def hit(self, experts: int) -> tuple[int, int]:
        """(adapter, expert) pairs that occur, and experts."""
        keys = self.slots.long()[:, None] * experts + self.topk_ids
        return keys.unique().numel(), self.topk_ids.unique().numel()

    def weight_bytes(self, case: MoeCase) -> int:
        """A and B of the pairs that occur, each once."""
        pairs, _ = self.hit(case.model.experts)
        return pairs * sum(case.half_bytes) + self.slots.unique().numel() * case.shared_bytes

    def to(self, device: torch.device) -> Routing:
        moved = [t.to(device) for t in (self.topk_ids, self.topk_weights, self.slots)]
        return Routing(self.turn, *moved, self.pool)


def draw_routings(case: MoeCase, pools: int = 1, seed: int = 0) -> Iterator[Routing]:
    """Routings without end, on the CPU. From call to call the adapters move on by one, and the pools take turns so that
    every adapter of every pool comes up.

    Where every token has an adapter of its own, its experts are dealt from a shuffled deck: as likely as any, but
    none comes again before fewer than ``top_k`` cards are left.
    """
    generator = torch.Generator().manual_seed(seed)
    model, turn = case.model, 0
    decks: dict[tuple[int, int], list[int]] = {}

    def deal(key: tuple[int, int]) -> list[int]:
        if len(decks.setdefault(key, [])) < model.top_k:
            decks[key] = torch.randperm(model.experts, generator=generator).tolist()
        hand, decks[key] = decks[key][: model.top_k], decks[key][model.top_k :]
        return hand

    while True:
        requests, pool = case.requests(turn), (turn % SLOTS + turn // SLOTS) % pools
        slots = [slot for length, slot in requests for _ in range(length)]
        if case.rows <= SLOTS:
            ids = torch.tensor([deal((pool, slot)) for slot in slots])
        else:
            ids = torch.rand(case.rows, model.experts, generator=generator).topk(model.top_k).indices
        weights = torch.randn(case.rows, model.top_k, generator=generator).softmax(1)
        yield Routing(turn, ids.int(), weights, torch.tensor(slots, dtype=torch.int32), pool)
        turn += 1


def activate(act: str, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The activation; ``gate`` None: there is no gate."""
    if act == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    of = up if gate is None else gate
    done = of.relu().square() if act == "relu2" else torch.nn.functional.silu(of)
    return done if gate is None else done * up


def split(model: Experts, y1: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Gate (None: there is none) and up of ``[rows, c * I]``."""
    if not model.gated:
        return None, y1
    return (y1[:, 0::2], y1[:, 1::2]) if model.interleaved else y1.chunk(2, 1)


class MoeProblem:
    """Random inputs of a case. Values are such that deltas are as large as the base's values, at every stage.

    Attributes:
        case, device: the case; of all tensors.
        x: bf16 ``[rows, H]``.
        w13, w2: base weights, ``[E, c * I, H]`` and ``[E, H, I]``.
        pools: adapters, so many that drawing pairs from them at random finds them cold.
        routings: so many that the pairs' weights of either half are cold when all take turns.
        layers: the first of them, enough where the base's weights pass through the L2 as well; two at least.
        weight_bytes: of A and B of the (adapter, expert) pairs that a call hits, mean over ``layers``.
        cold: whether memory sufficed for all pools.
        base: the layer without adapters, set by whoever measures.
    """

    base: Base

    def __init__(self, case: MoeCase, device: torch.device, l2_bytes: int, free_bytes: int, seed: int = 0):
        self.case, self.device, self.dtype = case, device, torch.bfloat16
        wanted = math.ceil(POOL_SHARE * l2_bytes / (SLOTS * case.model.experts * min(case.half_bytes)))
        room = int((MEMORY_SHARE * free_bytes - case.memory_bytes(0)) // case.pool_bytes)
        if room < 1:
            raise torch.OutOfMemoryError(f"{case.name} takes {case.memory_bytes() / 1e9:.0f} GB")
        self.cold = room >= wanted
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int, scale: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=self.dtype).mul_(scale)

        model, rank = case.model, case.rank
        hidden, inner, experts, slices = model.hidden, model.inner, model.experts, model.slices
        outer = 1 if case.outer else experts
        self.x = random(case.rows, hidden, scale=1.0)
        self.w13 = random(experts, slices * inner, hidden, scale=hidden**-0.5)
        self.w2 = random(experts, hidden, inner, scale=inner**-0.5)
        self.pools = [
            Pool(
                random(SLOTS, outer, slices * rank, hidden, scale=hidden**-0.5),
                random(SLOTS, experts, slices * inner, rank, scale=rank**-0.5),
                random(SLOTS, experts, rank, inner, scale=inner**-0.5),
                random(SLOTS, outer, hidden, rank, scale=rank**-0.5),
            )
            for _ in range(min(wanted, room))
        ]
        drawn = draw_routings(case, len(self.pools), seed)
        first = next(drawn)
        hits, experts_hit = first.hit(experts)
        layers = 1 + COLD * l2_bytes // (hits * sum(case.half_bytes) + experts_hit * model.base_bytes)
        alone = 1 + COLD * l2_bytes // (hits * min(case.half_bytes))
        layers, alone = (max(2, min(int(n), MAX_ROUTINGS)) for n in (layers, alone))
        self.routings = [first.to(device), *(next(drawn).to(device) for _ in range(max(layers, alone) - 1))]
        self.layers = self.routings[:layers]
        self.weight_bytes = sum(routing.weight_bytes(case) for routing in self.layers) / len(self.layers)

    # ------------------------------------------------------------------------------------------------------- checks

    @cached_property
    def tokens(self) -> torch.Tensor:
        """int64: the tokens that are compared."""
        count = min(self.case.rows, CHECKED_TOKENS)
        return torch.linspace(0, self.case.rows - 1, count, device=self.device).round().long()

    @cached_property
    def references(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of the first and the last of ``layers``: the base's output and the right one, float64 ``[tokens, H]``."""
        return [self._reference(self.layers[i]) for i in (0, -1)]

    def _reference(self, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        model, pool = self.case.model, self.pools[routing.pool]
        ids, weights = routing.topk_ids[self.tokens], routing.topk_weights[self.tokens].double()
        slots, x = routing.slots[self.tokens], self.x[self.tokens].double()
        base = torch.zeros(len(x), model.hidden, dtype=torch.float64, device=self.device)
        whole = base.clone()
        for expert in ids.unique().tolist():
            w13, w2 = self.w13[expert].double(), self.w2[expert].double()
            for slot in slots[(ids == expert).any(1)].unique().tolist():
                at, j = ((ids == expert) & (slots == slot)[:, None]).nonzero(as_tuple=True)
                y1, weight = x[at] @ w13.T, weights[at, j, None]
                h = activate(model.act, *split(model, y1))
                base.index_add_(0, at, weight * (h @ w2.T))
                up_a, up_b, down_a, down_b = pool.of(slot, expert)
                y1 = y1 + self._up_delta(up_a, up_b, x[at])
                h = activate(model.act, *split(model, y1))
                y2 = h @ w2.T + (h @ down_a.T) @ down_b.T
                whole.index_add_(0, at, weight * y2)
        return base, whole

    def _up_delta(self, up_a: torch.Tensor, up_b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``[rows, c * I]`` in the columns of the base's y1."""
        model = self.case.model
        a = up_a.view(model.slices, self.case.rank, model.hidden)
        b = up_b.view(model.slices, model.inner, self.case.rank)
        parts = [(x @ a[s].T) @ b[s].T for s in range(model.slices)]
        return torch.stack(parts, 2).flatten(1) if model.interleaved else torch.cat(parts, 1)

    def check(self, calls: Sequence[Callable[[], torch.Tensor]]) -> float:
        """Runs the calls of the first and the last of ``layers`` over poisoned buffers and returns the larger error.

        The error of a token is ``||out - right|| / ||right - base||``, with the base's own roundings to bf16 in it; the
        error of a call that of its worst token. NaN where anything in the output is not finite.
        """
        errors = []
        for i, (base, whole) in zip((0, -1), self.references, strict=True):
            delta = (whole - base).norm(dim=1)
            if (least := (delta / base.norm(dim=1)).min().item()) < LORA_MATTERS:
                raise ValueError(
                    f"polylora bench: the deltas of {self.case.name} must matter, got {least:.2g} at least"
                )
            errors.append(self._error(calls[i], whole, delta))
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def check_base(self) -> float:
        """As :meth:`check`, of the base layer against its own reference, by ``||base||``."""
        layers = [self.base.layer(self.layers[i]) for i in (0, -1)]
        pairs = zip(layers, self.references, strict=True)
        errors = [self._error(layer.forward, right, right.norm(dim=1)) for layer, (right, _) in pairs]
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def _error(self, call: Callable[[], torch.Tensor], right: torch.Tensor, size: torch.Tensor) -> float:
        self.base.poison()
        out = call()
        if not out.isfinite().all():
            return math.nan
        return ((out[self.tokens].double() - right).norm(dim=1) / size).max().item()
