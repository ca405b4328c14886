"""SGLang's memory pool as slice tables: in place, with the true rank and the scale of the adapter in each slot.

An entry of a table says where weights lie relative to their tensor, so that all layers of one shape have the same
entries: they share one table. SGLang tells ranks and scales with each batch; a table changes only when a slot has got
another adapter. It changes in place: captured graphs see the new ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from polylora.table import SliceTable


class Weights(NamedTuple):
    """A layer's weights as the ops take them."""

    table: SliceTable
    a: list[Tensor]
    b: list[Tensor]


class PoolTables:
    """The tables of one memory pool.

    Args:
        slots: adapter slots of the pool.
    """

    def __init__(self, slots: int) -> None:
        self.ranks = [0] * slots
        self.scales = [0.0] * slots
        self._tables: dict[tuple, SliceTable] = {}
        # By address. An entry holds its tensors, so that no other tensor can have the address while it is here.
        self._weights: dict[tuple, Weights] = {}

    def set_slots(self, ranks: Sequence[int], scales: Sequence[float]) -> None:
        """Takes the adapters of a batch, by slot. Rank 0: not in this batch; what the slot holds is not touched.

        Copies are queued on the current stream, and only where a slot has got another rank or scale. Raises ValueError
        for a rank above the pool's, RuntimeError for a change while a graph is captured.
        """
        changed = [
            slot
            for slot, (rank, scale) in enumerate(zip(ranks, scales, strict=True))
            if rank > 0 and (rank, scale) != (self.ranks[slot], self.scales[slot])
        ]
        if not changed:
            return
        for key, table in self._tables.items():
            for slot in changed:
                table.set_slot(slot, ranks[slot], _scale(key, scales[slot]), upload=False)
            table.upload()
        for slot in changed:
            self.ranks[slot], self.scales[slot] = ranks[slot], scales[slot]

    # -------------------------------------------------------------------------------------------------- kinds of layers

    def linear(self, a: Tensor, b: Tensor, widths: Sequence[int]) -> Weights:
        """``a [slots, slices * r_max, K]``, slice s of an adapter of rank r at rows ``s * r``; ``b [slots, N, r_max]``;
        ``widths``: outputs of the slices, N together."""
        return self._of("linear", a, b, tuple(widths), _linear)

    def embedding(self, a: Tensor, b: Tensor) -> Weights:
        """``a [slots, r_max, vocab]``, ``b [slots, dim, r_max]``."""
        return self._of("embedding", a, b, (b.size(1),), _embedding)

    def experts(self, a: Tensor, b: Tensor, slices: int) -> Weights:
        """One half of an MoE layer: ``a [slots, experts or 1, slices * r_max, K]`` (slice s at rows ``s * r_max``),
        ``b [slots, experts or 1, slices * width, r_max]``, which SGLang has multiplied by the scale."""
        return self._of("experts", a, b, (b.size(2) // slices,) * slices, SliceTable.from_sglang_moe)

    def half_a(self, a: Tensor, slices: int) -> Weights:
        """A alone, as in :meth:`linear`."""
        return self._of("linear", a, None, (_STAND_IN,) * slices, _linear)

    def half_b(self, b: Tensor, widths: Sequence[int]) -> Weights:
        """B alone, as in :meth:`linear`."""
        return self._of("linear", None, b, tuple(widths), _linear)

    def _of(self, kind, a: Tensor | None, b: Tensor | None, widths: tuple[int, ...], build) -> Weights:
        place = (kind, _address(a), _address(b), widths)
        weights = self._weights.get(place)
        if weights is None:
            table = self._table((kind, _layout(a), _layout(b), widths), a, b, build)
            weights = Weights(table, _like(a, table.a), _like(b, table.b))
            self._weights[place] = weights
        return weights

    def _table(self, key: tuple, a: Tensor | None, b: Tensor | None, build: Callable[..., SliceTable]) -> SliceTable:
        table = self._tables.get(key)
        if table is None:
            scales = [_scale(key, scale) for scale in self.scales]
            table = build(*_both(a, b, key[-1]), self.ranks, scales, widths=key[-1])
            self._tables[key] = table
        return table


#: Outputs of the B, and inputs of the A, that stands in for a missing half.
_STAND_IN = 8


def _both(a: Tensor | None, b: Tensor | None, widths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A and B, where one is missing zeros in its place."""
    if b is None:
        b = a.new_zeros(a.size(0), sum(widths), a.size(1) // len(widths))
    if a is None:
        a = b.new_zeros(b.size(0), len(widths) * b.size(2), _STAND_IN)
    return a, b


def _scale(key: tuple, scale: float) -> float:
    return 1.0 if key[0] == "experts" else scale


def _address(t: Tensor | None) -> tuple | None:
    return None if t is None else (t.data_ptr(), t.shape)


def _layout(t: Tensor | None) -> tuple | None:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def _like(t: Tensor | None, views: list[Tensor]) -> list[Tensor]:
    """``t`` seen as a table of its shape sees its tensor; of a missing half the stand-in."""
    return views if t is None else [t.as_strided(view.size(), view.stride()) for view in views]


def _linear(a, b, ranks, scales, *, widths):
    return SliceTable.from_sglang_dense(a, b, ranks, scales, widths=widths)


def _embedding(a, b, ranks, scales, *, widths):
    return SliceTable.from_sglang_embedding(a, b, ranks, scales)
