"""int32 arrays that a step sends to the device in one copy, at addresses that stay: for the plugins of engines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from polylora.table import round_up, sent_to


class PackedInts:
    """Arrays of given sizes in one buffer.

    Each begins at a multiple of 256 bytes: Triton's kernels are compiled for pointers as aligned as an allocation's,
    and compiled anew for others.

    Args:
        sizes: elements of each.
        device: of the buffer, which is not initialised.

    Attributes:
        parts: int32 views of the buffer, one a size.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str) -> None:
        self._sizes = tuple(sizes)
        self._buffer = torch.empty(sum(map(_aligned, self._sizes)), dtype=torch.int32, device=device)
        self.parts: list[Tensor] = self._split(self._buffer)

    @contextlib.contextmanager
    def sent(self) -> Iterator[list[np.ndarray]]:
        """New contents, to be written into the arrays that are yielded: one copy, as :func:`polylora.table.sent_to`."""
        with sent_to(self._buffer) as staging:
            yield self._split(staging)

    def _split(self, buffer) -> list:
        parts, begin = [], 0
        for size in self._sizes:
            parts.append(buffer[begin : begin + size])
            begin += _aligned(size)
        return parts


def _aligned(words: int) -> int:
    """int32 words up to the next 256 bytes."""
    return round_up(words, 64)
