"""A case's random data on a device, and the error of a result against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from polylora.bench.cases import ELEMENT, Case
from polylora.bench.floor import HOT_BYTES

#: Weight sets together hold at least this many times the L2, so that a call finds its weights cold.
COLD = 3
#: Of the free memory, what weight sets may take: a peer with a layout of its own takes as much again.
MEMORY_SHARE = 0.4
#: Elements between the starts of two weight sets are a multiple of this: all are aligned like allocations of their own.
_ALIGN = 128


def weight_sets(case: Case, l2_bytes: int) -> int:
    """Weight sets to rotate among, at least two. Where x and y stream through the L2, they help to cool it."""
    streamed = case.xy_bytes if case.footprint > HOT_BYTES else 0
    return max(2, math.ceil(COLD * l2_bytes / (case.weight_bytes + streamed)))


def sets_that_fit(case: Case, free_bytes: int) -> int:
    """Weight sets that the device has the memory for; one where not even one fits, which allocating it will say."""
    return max(1, int(MEMORY_SHARE * free_bytes) // case.set_bytes)


class Problem:
    """Random inputs of a case.

    Attributes:
        case: the case.
        device, dtype: of all tensors.
        x: ``[rows, K]``; of an embedding ``[rows, 0]``.
        tokens: of an embedding, one a weight set: int64 ``[rows]``.
        y0: ``[rows, sum of widths]``, the base layer's output; ``y`` the same shape, what calls add into.
        a: one a weight set, ``[slots, slices, rank, K]`` contiguous. Of an embedding ``[slots, rank, vocab]``, or
            ``[slots, vocab, rank]`` where it is token-major.
        b: one a weight set, ``[slots, sum of widths, rank]`` contiguous.
        scales: by slot; powers of two, so that folding them into B rounds nothing.
        slot_of_row: int32 ``[rows]``.

    Slots = the case's adapters. The delta is of y0's size, so that an error shows.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, sets: int, seed: int = 0):
        if dtype.itemsize != ELEMENT and device.type == "cuda":
            raise ValueError(f"polylora bench: dtype must be a 16-bit type, got {dtype}")
        self.case, self.device, self.dtype = case, device, dtype
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        module, slots = case.module, case.adapters
        self.x = random(case.rows, module.k)
        self.y0 = random(case.rows, module.width)
        self.y = self.y0.clone()

        def stack(*shape: int, scale: float) -> list[torch.Tensor]:
            size = math.prod(shape)
            whole = random(sets, -(-size // _ALIGN) * _ALIGN).mul_(scale)
            return [row[:size].view(shape) for row in whole]

        self.tokens: list[torch.Tensor] = []
        if module.is_embedding:
            pitch = -(-case.rows // _ALIGN) * _ALIGN
            ids = torch.randint(module.vocab, (sets, pitch), generator=generator, device=device)
            self.tokens = [row[: case.rows] for row in ids]
            order = (module.vocab, case.rank) if module.token_major else (case.rank, module.vocab)
            self.a = stack(slots, *order, scale=1.0)
        else:
            self.a = stack(slots, len(module.widths), case.rank, module.k, scale=module.k**-0.5)
        self.b = stack(slots, module.width, case.rank, scale=case.rank**-0.5)
        self.scales = [(1.0, 0.5, 2.0)[slot % 3] for slot in range(slots)]
        self.slot_of_row = torch.tensor(case.slot_of_row(), dtype=torch.int32, device=device)

    @property
    def sets(self) -> int:
        return len(self.a)

    @property
    def starts(self) -> list[int]:
        """First column of each slice in y, and the end of the last."""
        ends = [0]
        for width in self.case.module.widths:
            ends.append(ends[-1] + width)
        return ends

    def error(self, weight_set: int) -> float:
        """``||(y - y0) - delta|| / ||delta||`` in float64, y being y0 after one call with that weight set."""
        starts = self.starts
        wrong = torch.zeros((), dtype=torch.float64, device=self.device)
        size = torch.zeros_like(wrong)
        for slot, scale in enumerate(self.scales):
            rows = (self.slot_of_row == slot).nonzero().squeeze(1)
            for s, v in enumerate(self._shrunk(weight_set, slot, rows)):
                columns = slice(starts[s], starts[s + 1])
                delta = scale * (v @ self.b[weight_set][slot, columns].double().T)
                got = self.y[rows, columns].double() - self.y0[rows, columns].double()
                wrong += (got - delta).square().sum()
                size += delta.square().sum()
        return (wrong / size).sqrt().item()

    def _shrunk(self, weight_set: int, slot: int, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """``[rows, rank]`` of each slice in float64: x A^T, or the tokens' columns of A."""
        a = self.a[weight_set][slot]
        if self.case.module.is_embedding:
            ids = self.tokens[weight_set][rows]
            yield (a[ids] if self.case.module.token_major else a[:, ids].T).double()
            return
        x = self.x[rows].double()
        for of_slice in a:
            yield x @ of_slice.double().T

    def check(self, calls: Sequence[Callable[[], object]]) -> float:
        """Runs the calls of the first and the last weight set on fresh y and returns the larger error; NaN stays."""
        errors = []
        for weight_set in sorted({0, len(calls) - 1}):
            self.y.copy_(self.y0)
            calls[weight_set]()
            errors.append(self.error(weight_set))
        return math.nan if any(map(math.isnan, errors)) else max(errors)
