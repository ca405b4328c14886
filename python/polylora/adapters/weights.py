"""What an adapter is once it is read: per site, the distinct A matrices and who uses them.

A *site* (:class:`polylora.models.Site`) is one call of an op: a linear layer, a fused linear, one half of an MoE
layer, an embedding. The structure mirrors the slice table: packing an adapter into a pool is one pass over it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Entry:
    """The weights of one (expert, slice) of a site.

    Attributes:
        a: index into :attr:`SiteWeights.a`. Slices trained on one fused module share it.
        b: ``[width, rank]``, the slice's rows of B.
        scale: factor of the delta (``alpha / r``, ``alpha / sqrt(r)`` for rsLoRA).
    """

    a: int
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.b.shape[1])


@dataclass
class SiteWeights:
    """The weights one adapter has for one site.

    Attributes:
        a: distinct A matrices, each ``[rank, k]`` (embedding: ``[rank, vocab]``). Ranks may differ.
        entries: ``[experts or 1][slices]``; ``None`` where the adapter does not touch that slice.
    """

    a: list[torch.Tensor] = field(default_factory=list)
    entries: list[list[Entry | None]] = field(default_factory=list)


@dataclass
class AdapterWeights:
    """One adapter, bound to a model table: ``sites[site.path]``."""

    name: str
    sites: dict[str, SiteWeights]

    @property
    def max_rank(self) -> int:
        return max((a.shape[0] for site in self.sites.values() for a in site.a), default=0)
