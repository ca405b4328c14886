"""Tensor and expert parallelism: the part of an adapter's weights that one rank needs."""

from __future__ import annotations

from dataclasses import replace

import torch

from polylora.models.base import Part, Site, Slice

from .weights import Entry, SiteWeights


def shard(site: Site, weights: SiteWeights, rank: int, world: int, vocab_padding: int = 1) -> SiteWeights:
    """One rank's part of the weights of a site.

    Column-parallel sites keep A whole and cut B by rows, slice by slice; heads that are fewer than ranks are
    replicated. Row-parallel ones cut A by columns and keep B whole. ``vocab``: an embedding cuts A by columns, a head
    B by rows, in equal blocks of the padded vocabulary, padding filled with zeros. Replicated sites are left alone.

    Args:
        site: of the whole model.
        weights: of the whole adapter, bound to a table with that site.
        rank: 0 to ``world - 1``.
        world: ranks.
        vocab_padding: multiple that the engine pads the vocabulary to before it cuts it (vLLM and SGLang: 64).

    Returns:
        Weights that fit :func:`shard_site`'s site. Tensors are contiguous and may be views.

    Raises:
        ValueError: a width that does not divide by ``world``.
    """
    _check_ranks(rank, world)
    if site.parallel == "replicated" or world == 1:
        return weights
    by_column = site.parallel == "column" or (site.parallel == "vocab" and site.kind != "embedding")
    if not by_column:
        block = _block(site, site.k, world, vocab_padding)
        return replace(weights, a=[_take(a, 1, rank * block, block) for a in weights.a])
    cut = [
        [
            None if entry is None else replace(entry, b=_cut_rows(site, piece, entry.b, rank, world, vocab_padding))
            for piece, entry in zip(site.slices, row, strict=True)
        ]
        for row in weights.entries
    ]
    return replace(weights, entries=cut)


def shard_site(site: Site, rank: int, world: int, vocab_padding: int = 1) -> Site:
    """The site as one rank has it: its ``k`` and its slices' widths. Arguments and errors as in :func:`shard`."""
    _check_ranks(rank, world)
    if site.parallel == "replicated" or world == 1:
        return site
    if site.parallel == "row" or site.kind == "embedding":
        return replace(site, k=_block(site, site.k, world, vocab_padding))
    return replace(site, slices=tuple(_local_slice(site, piece, world, vocab_padding) for piece in site.slices))


def expert_window(weights: SiteWeights, first: int, count: int) -> SiteWeights:
    """The weights of experts ``first`` to ``first + count - 1``, for a rank of expert parallelism.

    Raises:
        ValueError: a window that leaves the experts.
    """
    if not (first >= 0 and count > 0 and first + count <= len(weights.entries)):
        total = len(weights.entries)
        raise ValueError(f"polylora: expert_window: expected a window of 0..{total - 1}, got {count} from {first}")
    rows = weights.entries[first : first + count]
    used = sorted({entry.a for row in rows for entry in row if entry is not None})
    place = {old: new for new, old in enumerate(used)}

    def move(entry: Entry | None) -> Entry | None:
        return None if entry is None else replace(entry, a=place[entry.a])

    return SiteWeights([weights.a[i] for i in used], [[move(entry) for entry in row] for row in rows])


def _check_ranks(rank: int, world: int) -> None:
    if not (world >= 1 and 0 <= rank < world):
        raise ValueError(f"polylora: shard: expected rank in 0..world-1, got rank {rank}, world {world}")


def _divide(site: Site, size: int, world: int) -> int:
    if size % world:
        raise ValueError(f"polylora: shard: {site.path}: expected a size divisible by {world} ranks, got {size}")
    return size // world


def _block(site: Site, size: int, world: int, vocab_padding: int) -> int:
    if site.parallel == "vocab":
        size = -(-size // vocab_padding) * vocab_padding
        # Engines want the padded size divisible; a table without padding rounds up to whole blocks.
        return -(-size // world) if vocab_padding == 1 else _divide(site, size, world)
    return _divide(site, size, world)


def _part_block(site: Site, part: Part, world: int, vocab_padding: int) -> tuple[int, int]:
    """(rows a rank has of a part, ranks that share each of its heads)."""
    if part.units and part.units < world:
        if world % part.units:
            text = f"{world} ranks to be a multiple of {part.units} heads"
            raise ValueError(f"polylora: shard: {site.path}: expected {text}, got a remainder of {world % part.units}")
        return part.width // part.units, world // part.units
    if part.units:
        _divide(site, part.units, world)
    return _block(site, part.width, world, vocab_padding), 1


def _local_slice(site: Site, piece: Slice, world: int, vocab_padding: int) -> Slice:
    parts = []
    for part in piece.cuts:
        width, _ = _part_block(site, part, world, vocab_padding)
        parts.append(Part(width, max(1, part.units // world) if part.units else 0))
    width = sum(part.width for part in parts)
    if piece.parts:
        return replace(piece, width=width, parts=tuple(parts))
    return replace(piece, width=width, units=parts[0].units)


def _cut_rows(site: Site, piece: Slice, b: torch.Tensor, rank: int, world: int, vocab_padding: int) -> torch.Tensor:
    rows, start = [], 0
    for part in piece.cuts:
        block, sharers = _part_block(site, part, world, vocab_padding)
        own = b[start : start + part.width]
        rows.append(_take(own, 0, rank // sharers * block, block))
        start += part.width
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _take(tensor: torch.Tensor, dim: int, start: int, size: int) -> torch.Tensor:
    """``size`` rows (columns) from ``start``; zeros beyond the end."""
    start = min(start, tensor.shape[dim])
    there = tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))
    if there.shape[dim] == size:
        return there.contiguous()
    shape = list(tensor.shape)
    shape[dim] = size - there.shape[dim]
    return torch.cat([there, tensor.new_zeros(shape)], dim)
