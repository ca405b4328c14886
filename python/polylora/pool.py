"""The adapter pool: any number of adapters of mixed ranks in ragged arenas, without padding to a largest rank.

For every distinct input width K there is one arena of A rows ``[rows, K]`` (embeddings: K = vocabulary, one row a
rank), and one arena of B elements for all sites. Every site (:class:`polylora.models.base.Site`) has one
:class:`polylora.table.SliceTable` over them with ``max_adapters`` slots. An adapter takes, per site, one range of A
rows and one range of B elements:

- each distinct A matrix once, whoever shares it (slices of a fused module, experts of a shared-outer MoE LoRA);
- each distinct B matrix once, row pitch ``round_up(rank, 8)`` and start a multiple of 8 elements, as the fast path
  wants them; columns between rank and pitch are never read.

Loading and unloading run on the current stream and wait for nothing (adapters whose weights lie on the GPU already
are first looked through for NaN and Inf, which waits). A pool served on another stream needs the
caller's event between the two.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polylora import _host
from polylora.table import SliceTable, check_not_capturing, round_up

if TYPE_CHECKING:
    from polylora.adapters.weights import AdapterWeights, SiteWeights
    from polylora.models.base import ModelTable, Site

_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_B_ALIGN = 8  # elements: 16 bytes of bf16, what one vector load takes
_V_ALIGN = 8  # columns of v, one 32-byte sector of fp32
_MAX_SCALE = float(np.finfo(np.float32).max)
_FIRST_A_ROWS = 8
_FIRST_B_ELEMENTS = 1024


class PoolError(RuntimeError):
    """Base of the pool's own errors."""


class PoolFull(PoolError):
    """No slot is free. The pool never evicts: unload an adapter first."""


class PoolFrozen(PoolError):
    """The pool is frozen and the adapter needs more memory than it has."""


class SlotInUse(PoolError):
    """The adapter is acquired by someone and cannot be unloaded."""


class UnknownAdapter(PoolError, LookupError):
    """No adapter of that name is loaded."""


class _Arena:
    """A tensor ``[capacity, ...]`` and who has which part of it."""

    def __init__(self, what: str, shape: tuple[int, ...], alignment: int, dtype: torch.dtype, device: torch.device):
        self.what = what
        with torch.inference_mode(False):  # adapters may come in either mode
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.ranges = _host.ArenaAllocator(shape[0], alignment)
        self.alignment = alignment

    def grow(self, capacity: int) -> None:
        """Moves the contents to a larger tensor; offsets stay."""
        old = self.tensor
        capacity = round_up(capacity, self.alignment)
        with torch.inference_mode(False):
            new = torch.zeros((capacity, *old.shape[1:]), dtype=old.dtype, device=old.device)
        new[: old.size(0)].copy_(old)
        self.ranges.grow(capacity)
        self.tensor = new


@dataclass
class _Block:
    arena: _Arena
    offset: int
    size: int


@dataclass
class _Loaded:
    slot: int
    blocks: list[_Block]
    sites: list[str]
    bytes: int
    max_rank: int
    pins: int = 0


@dataclass
class _SitePlan:
    """One site of an adapter, laid out relative to the start of its two blocks."""

    a_rows: int
    b_elements: int
    a_at: list[int]  # first row of each A
    b_at: dict[tuple, int] = field(default_factory=dict)  # first element of each distinct B
    b_tensors: list[torch.Tensor] = field(default_factory=list)  # in the order of b_at
    v_width: int = 0


class AdapterPool:
    """Adapters by name in slots ``0 .. max_adapters - 1``; the base model is slot -1 and takes none.

    Attributes:
        dtype, device: of the arenas. Weights are converted on the way in, rounding to nearest even.
        generation: grows whenever a tensor or ``v_width`` that an op call uses was replaced. Prepared calls and
            captured graphs of an older generation must be made anew; :meth:`freeze` keeps it constant.

    ``v_width`` of a site is the largest sum of the distinct ranks that any loaded adapter has there (each rounded up
    to 8), grows when a load needs more and never shrinks, so that shapes seldom change. :meth:`freeze` fixes it at
    ``round_up(max_rank, 8) * slices``, which every adapter the pool accepts fits.

    Methods may be called from several threads; they take one lock.
    """

    def __init__(
        self,
        sites: ModelTable | Mapping[str, Site],
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        max_adapters: int = 8,
        max_rank: int = 64,
        a_rows: Mapping[int, int] | int | None = None,
        b_elements: int | None = None,
    ) -> None:
        """
        Args:
            sites: a model table, or sites by path.
            max_adapters: slots.
            max_rank: adapters with a larger rank are refused, 1..256.
            a_rows: rows to start with, by K or for every K; :meth:`capacity_for` computes them.
            b_elements: elements of B to start with.
        """
        if dtype not in _WEIGHT_DTYPES:
            raise ValueError(f"polylora::AdapterPool: dtype must be bfloat16, float16 or float32, got {dtype}")
        if max_adapters < 1:
            raise ValueError(f"polylora::AdapterPool: max_adapters must be >= 1, got {max_adapters}")
        if not 1 <= max_rank <= _host.MAX_RANK:
            raise ValueError(f"polylora::AdapterPool: max_rank must be in [1, {_host.MAX_RANK}], got {max_rank}")
        self.dtype = dtype
        self.device = torch.device(device)
        self.max_adapters = max_adapters
        self.max_rank = max_rank
        self.generation = 0
        self._frozen = False
        self._lock = threading.RLock()
        self._loaded: dict[str, _Loaded] = {}
        self._sites: dict[str, Site] = dict(getattr(sites, "sites", sites))

        def first_rows(k: int) -> int:
            rows = a_rows.get(k, 0) if isinstance(a_rows, Mapping) else (a_rows or 0)
            return max(rows, _FIRST_A_ROWS)

        self._a = {
            k: _Arena(f"A rows of K = {k}", (first_rows(k), k), 1, dtype, self.device)
            for k in sorted({site.k for site in self._sites.values()})
        }
        first_elements = round_up(max(b_elements or 0, _FIRST_B_ELEMENTS), _B_ALIGN)
        self._b = _Arena("B elements", (first_elements,), _B_ALIGN, dtype, self.device)
        self._tables = {
            path: SliceTable.from_ragged_arena(
                self._a[site.k].tensor,
                self._b.tensor,
                slots=max_adapters,
                experts=max(site.experts, 1),
                widths=[s.width for s in site.slices],
                v_width=_V_ALIGN,
                col_stride=len(site.slices) if site.interleaved else 1,
                vocab=site.k if site.kind == "embedding" else 0,
            )
            for path, site in self._sites.items()
        }

    # ------------------------------------------------------------------------------------------------ reading

    def site(self, path: str) -> SliceTable:
        """The table of a site: ``a``, ``b``, ``table``, ``widths``, ``cols``, ``col_stride``, ``v_width``. The object
        stays the same for the life of the pool; its tensors change with :attr:`generation`."""
        if path not in self._tables:
            raise KeyError(f"polylora::AdapterPool.site: path must be a site of the model, got {path!r}")
        return self._tables[path]

    @property
    def sites(self) -> Mapping[str, Site]:
        return self._sites

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, by slot."""
        with self._lock:
            return sorted(self._loaded, key=lambda name: self._loaded[name].slot)

    @property
    def frozen(self) -> bool:
        return self._frozen

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __len__(self) -> int:
        return len(self._loaded)

    def slot(self, name: str | None) -> int:
        """Slot of a loaded adapter; -1 for ``None``, the base model. Raises UnknownAdapter."""
        if name is None:
            return _host.NO_ADAPTER
        with self._lock:
            return self._get(name, "slot").slot

    def stats(self) -> dict[str, Any]:
        """``adapters`` (slot, rank, bytes, pins by name), ``free_slots``, ``a`` (by K) and ``b``: capacity, used,
        largest_free (rows, elements), allocations and free_ranges (counts); ``bytes`` of all arenas."""
        with self._lock:
            return {
                "adapters": {
                    name: {"slot": it.slot, "rank": it.max_rank, "bytes": it.bytes, "pins": it.pins}
                    for name, it in self._loaded.items()
                },
                "free_slots": self.max_adapters - len(self._loaded),
                "frozen": self._frozen,
                "generation": self.generation,
                "a": {k: arena.ranges.stats() for k, arena in self._a.items()},
                "b": self._b.ranges.stats(),
                "bytes": sum(arena.tensor.nbytes for arena in (*self._a.values(), self._b)),
            }

    def capacity_for(self, adapters: int, rank: int) -> tuple[dict[int, int], int]:
        """``(a_rows by K, b_elements)`` that hold ``adapters`` adapters of ``rank`` on every slice of every site.

        An upper bound where adapters share matrices or leave slices out.
        """
        a_rows = dict.fromkeys(self._a, 0)
        b_elements = 0
        for site in self._sites.values():
            experts = max(site.experts, 1)
            a_rows[site.k] += adapters * experts * len(site.slices) * rank
            b_elements += adapters * experts * site.width * round_up(rank, _B_ALIGN)
        return a_rows, b_elements

    # ------------------------------------------------------------------------------------------------ memory

    def reserve(self, a_rows: Mapping[int, int] | None = None, b_elements: int = 0) -> None:
        """Grows the arenas to at least these capacities. Raises PoolFrozen where a frozen pool would have to grow."""
        with self._lock:
            check_not_capturing("AdapterPool.reserve")
            wanted = [(self._b, b_elements)]
            for k, rows in (a_rows or {}).items():
                if k not in self._a:
                    raise ValueError(
                        f"polylora::AdapterPool.reserve: a_rows must name widths in {list(self._a)}, got {k}"
                    )
                wanted.append((self._a[k], rows))
            wanted = [(arena, n) for arena, n in wanted if n > arena.ranges.capacity]
            for arena, n in wanted:
                self._refuse_growth_if_frozen(arena, n, n)
            try:
                for arena, n in wanted:
                    arena.grow(n)
            finally:  # an arena that has grown before another one failed is in use already
                self._renew_tables([arena for arena, _ in wanted])

    def freeze(self) -> None:
        """Fixes every address and size an op call uses; call before capturing CUDA graphs. Loading and unloading go
        on within the memory there is; an adapter that needs more raises PoolFrozen. Cannot be undone."""
        with self._lock:
            if self._frozen:
                return
            for path, site in self._sites.items():
                self._raise_v_width(path, round_up(self.max_rank, _V_ALIGN) * len(site.slices))
            self._frozen = True

    def _raise_v_width(self, path: str, columns: int) -> None:
        table = self._tables[path]
        if columns > table.v_width:
            table.v_width = columns
            self.generation += 1

    def _refuse_growth_if_frozen(self, arena: _Arena, size: int, capacity: int) -> None:
        if not self._frozen:
            return
        stats = arena.ranges.stats()
        raise PoolFrozen(
            f"polylora::AdapterPool: frozen with {stats['capacity']} {arena.what}, {stats['used']} used, longest free "
            f"range {stats['largest_free']}; {size} needed: reserve at least {capacity} before freeze()"
        )

    def _renew_tables(self, grown: Sequence[_Arena]) -> None:
        if not grown:
            return
        for path, site in self._sites.items():
            self._tables[path].set_arenas(self._a[site.k].tensor, self._b.tensor)
        self.generation += 1

    def _allocate(self, wanted: Sequence[tuple[_Arena, int]]) -> list[_Block]:
        """One block for each ``(arena, size)``, all or none; grows each arena at most once."""
        blocks: list[_Block] = []
        grown: list[_Arena] = []
        try:
            for i, (arena, size) in enumerate(wanted):
                offset = arena.ranges.alloc(size)
                if offset is None:
                    # Room for the rest of this adapter too, or the arena would be copied once a site.
                    rest = sum(round_up(n, arena.alignment) for other, n in wanted[i:] if other is arena)
                    needed = arena.ranges.capacity_for(rest)
                    self._refuse_growth_if_frozen(arena, rest, needed)
                    grown.append(arena)
                    arena.grow(max(needed, 2 * arena.ranges.capacity))
                    offset = arena.ranges.alloc(size)
                blocks.append(_Block(arena, offset, size))
        except BaseException:
            self._free(blocks, wipe=False)
            raise
        finally:
            self._renew_tables(grown)
        return blocks

    def _free(self, blocks: Iterable[_Block], *, wipe: bool = True) -> None:
        """Gives blocks back, zeroed: the next tenant of the memory must not find these weights."""
        blocks = list(blocks)
        if wipe:
            for block in blocks:
                block.arena.tensor[block.offset : block.offset + block.size].zero_()
        for block in blocks:
            block.arena.ranges.free(block.offset)

    # ------------------------------------------------------------------------------------------------ adapters

    def load(self, adapter: AdapterWeights) -> int:
        """Loads an adapter and returns its slot. All or nothing: on any exception the pool is as before (an arena may
        have grown).

        Raises:
            ValueError: the name is loaded already, or weights do not fit their sites or are NaN or Inf (one error names
                them all), or a weight overflows float16.
            PoolFull: no free slot.
            PoolFrozen: not enough memory, and the pool must not grow.
        """
        with self._lock:
            check_not_capturing("AdapterPool.load")
            if not isinstance(adapter.name, str) or not adapter.name:
                raise ValueError(
                    f"polylora::AdapterPool.load: name must be a string that is not empty, got {adapter.name!r}"
                )
            if adapter.name in self._loaded:
                raise ValueError(
                    f"polylora::AdapterPool.load: name must be one that is not loaded, got {adapter.name!r}, which has "
                    f"slot {self._loaded[adapter.name].slot}"
                )
            problems = self._problems(adapter)
            if problems:
                raise ValueError(
                    f"polylora::AdapterPool.load: adapter {adapter.name!r} does not fit the model:\n  "
                    + "\n  ".join(problems)
                )
            used = {it.slot for it in self._loaded.values()}
            slot = next((s for s in range(self.max_adapters) if s not in used), None)
            if slot is None:
                raise PoolFull(
                    f"polylora::AdapterPool.load: all {self.max_adapters} slots are taken; unload an adapter first or "
                    f"give max_adapters="
                )

            plans = {path: _plan_site(weights) for path, weights in adapter.sites.items()}
            wanted = []
            for path, plan in plans.items():
                wanted += [(self._a[self._sites[path].k], plan.a_rows), (self._b, plan.b_elements)]
            blocks = self._allocate(wanted)
            touched: list[str] = []
            try:
                for i, (path, weights) in enumerate(adapter.sites.items()):
                    self._write_weights(path, weights, plans[path], blocks[2 * i], blocks[2 * i + 1])
                for i, (path, weights) in enumerate(adapter.sites.items()):
                    touched.append(path)
                    self._raise_v_width(path, plans[path].v_width)
                    self._write_entries(path, slot, weights, plans[path], blocks[2 * i], blocks[2 * i + 1])
            except BaseException:
                for path in touched:
                    self._tables[path].clear_slot(slot)
                self._free(blocks)
                raise
            size = sum(b.size * (b.arena.tensor[0].numel() if b.arena.tensor.dim() > 1 else 1) for b in blocks)
            self._loaded[adapter.name] = _Loaded(
                slot=slot,
                blocks=blocks,
                sites=list(plans),
                bytes=size * self.dtype.itemsize,
                max_rank=max(a.size(0) for weights in adapter.sites.values() for a in weights.a),
            )
            return slot

    def unload(self, name: str) -> None:
        """Removes an adapter: its entries become absent first, then its weights are zeroed and given back.

        Raises SlotInUse while it is acquired, UnknownAdapter.
        """
        with self._lock:
            check_not_capturing("AdapterPool.unload")
            it = self._get(name, "unload")
            if it.pins:
                raise SlotInUse(
                    f"polylora::AdapterPool.unload: adapter {name!r} must be released first, {it.pins} acquired"
                )
            for path in it.sites:
                self._tables[path].clear_slot(it.slot)
            self._free(it.blocks)
            del self._loaded[name]

    def acquire(self, names: Sequence[str | None]) -> list[int]:
        """Slots of ``names`` (-1 for ``None``), each kept from being unloaded until released as often as acquired.

        Raises UnknownAdapter; then nothing is acquired.
        """
        with self._lock:
            found = [None if name is None else self._get(name, "acquire") for name in names]
            for it in found:
                if it is not None:
                    it.pins += 1
            return [_host.NO_ADAPTER if it is None else it.slot for it in found]

    def release(self, names: Sequence[str | None]) -> None:
        """Undoes :meth:`acquire`. Raises ValueError where a name is released more often than acquired; then nothing is
        released."""
        with self._lock:
            counts: dict[str, int] = {}
            for name in names:
                if name is not None:
                    counts[name] = counts.get(name, 0) + 1
            for name, n in counts.items():
                pins = self._get(name, "release").pins
                if n > pins:
                    raise ValueError(
                        f"polylora::AdapterPool.release: adapter {name!r} must be released at most as often as "
                        f"acquired ({pins}), got {n}"
                    )
            for name, n in counts.items():
                self._loaded[name].pins -= n

    @contextmanager
    def acquired(self, names: Sequence[str | None]) -> Iterator[list[int]]:
        """:meth:`acquire` for the length of a ``with`` block."""
        slots = self.acquire(names)
        try:
            yield slots
        finally:
            self.release(names)

    def _get(self, name: str, method: str) -> _Loaded:
        it = self._loaded.get(name)
        if it is None:
            raise UnknownAdapter(
                f"polylora::AdapterPool.{method}: name must be one of {sorted(self._loaded)}, got {name!r}"
            )
        return it

    # ------------------------------------------------------------------------------------------------ packing

    def _problems(self, adapter: AdapterWeights) -> list[str]:
        """Everything about an adapter that does not fit; looked at before any memory is touched."""
        if not adapter.sites:
            return ["it has weights for no site"]
        problems = []
        for path, weights in adapter.sites.items():
            site = self._sites.get(path)
            if site is None:
                problems.append(f"{path}: the model has no such site")
            else:
                problems += [f"{path}: {problem}" for problem in self._site_problems(site, weights)]
        return problems

    def _site_problems(self, site: Site, weights: SiteWeights) -> list[str]:
        problems = []
        for i, a in enumerate(weights.a):
            if a.dim() != 2 or a.size(1) != site.k or not 1 <= a.size(0) <= self.max_rank:
                problems.append(f"A {i} must be [1..{self.max_rank} (max_rank), {site.k}], got {list(a.shape)}")
            if a.dtype not in _WEIGHT_DTYPES:
                problems.append(f"A {i} must be bfloat16, float16 or float32, got {a.dtype}")
            elif not _is_finite(a):
                problems.append(f"A {i} must be finite, got NaN or Inf")
        experts = max(site.experts, 1)
        if len(weights.entries) != experts:
            problems.append(f"entries must be for {experts} experts, got {len(weights.entries)}")
        used, finite = set(), set()
        for e, row in enumerate(weights.entries):
            where = f"expert {e}, " if site.experts else ""
            if len(row) != len(site.slices):
                problems.append(f"{where}entries must be for {len(site.slices)} slices, got {len(row)}")
                continue
            for s, entry in zip(site.slices, row, strict=True):
                if entry is None:
                    continue
                if not 0 <= entry.a < len(weights.a):
                    problems.append(f"{where}slice {s.name}: a must be in [0, {len(weights.a)}), got {entry.a}")
                    continue
                used.add(entry.a)
                expected = [s.width, weights.a[entry.a].size(0) if weights.a[entry.a].dim() == 2 else "rank"]
                if list(entry.b.shape) != expected:
                    problems.append(f"{where}slice {s.name}: B must be {expected}, got {list(entry.b.shape)}")
                if entry.b.dtype not in _WEIGHT_DTYPES:
                    problems.append(
                        f"{where}slice {s.name}: B must be bfloat16, float16 or float32, got {entry.b.dtype}"
                    )
                elif _identity(entry.b) not in finite:  # one that experts share is looked at once
                    if _is_finite(entry.b):
                        finite.add(_identity(entry.b))
                    else:
                        problems.append(f"{where}slice {s.name}: B must be finite, got NaN or Inf")
                if not abs(entry.scale) <= _MAX_SCALE:  # NaN fails too
                    problems.append(f"{where}slice {s.name}: scale must be finite, got {entry.scale}")
        unused = [i for i in range(len(weights.a)) if i not in used]
        if unused and not problems:
            problems.append(f"A {unused} must be used by a slice")
        if not weights.a:
            problems.append("it has no weights")
        return problems

    def _write_weights(self, path: str, weights: SiteWeights, plan: _SitePlan, a: _Block, b: _Block) -> None:
        pieces = []
        for at, tensor in zip(plan.a_at, weights.a, strict=True):
            pieces.append((a, at, tensor, None))
        for at, tensor in zip(plan.b_at.values(), plan.b_tensors, strict=True):
            pieces.append((b, at, tensor, round_up(tensor.size(1), _B_ALIGN)))
        for block in (a, b):
            target = block.arena.tensor[block.offset : block.offset + block.size]
            mine = [(at, tensor, pitch) for owner, at, tensor, pitch in pieces if owner is block]
            # To a GPU: converted on the host and sent in one copy, not one for each of an MoE site's small matrices.
            # Strides and types are torch's copy_. A multi-matrix packer in portable C++ (-O3, one thread) was slower on
            # every adapter layout but a transposed matrix (1.1-1.4x faster): 2x and more where types convert, 5-12x on
            # interleaved experts, about level on plain copies.
            on_host = all(tensor.device.type == "cpu" for _, tensor, _ in mine)
            staged = self.device.type == "cuda" and on_host
            to = torch.zeros(target.shape, dtype=self.dtype, pin_memory=True) if staged else target
            for at, tensor, pitch in mine:
                rows, columns = tensor.shape
                # A by rows of the arena, B by elements
                part = to[at : at + rows] if pitch is None else to[at : at + rows * pitch].view(rows, pitch)
                part[:, :columns].copy_(tensor)
            if self.dtype == torch.float16 and any(tensor.dtype != torch.float16 for _, tensor, _ in mine):
                self._check_overflow(path, block, mine)
            if staged:
                target.copy_(to, non_blocking=True)

    def _check_overflow(self, path: str, block: _Block, pieces: Sequence[tuple[int, torch.Tensor, Any]]) -> None:
        limit = torch.finfo(torch.float16).max
        for at, tensor, _ in pieces:
            largest = 0.0 if tensor.dtype == torch.float16 else float(tensor.abs().max())
            # 65520 is where rounding to nearest leaves the finite range.
            if largest >= limit + 16:
                raise ValueError(
                    f"polylora::AdapterPool.load: {path}: weights must fit float16 (|w| < {limit + 16:g}), got "
                    f"{largest:g} in {block.arena.what}, at {at}"
                )

    def _write_entries(self, path: str, slot: int, weights: SiteWeights, plan: _SitePlan, a: _Block, b: _Block) -> None:
        experts, slices = len(weights.entries), len(weights.entries[0])
        # a_row, rank, v_col, b_stride, b_offset
        fields = np.zeros((5, experts, slices), dtype=np.int64)
        scale = np.zeros((experts, slices), dtype=np.float32)
        for e, row in enumerate(weights.entries):
            v_cols = _v_columns(weights, row)
            for s, entry in enumerate(row):
                if entry is None:
                    continue
                fields[:, e, s] = (
                    a.offset + plan.a_at[entry.a],
                    entry.rank,
                    v_cols[entry.a],
                    round_up(entry.rank, _B_ALIGN),
                    b.offset + plan.b_at[_identity(entry.b)],
                )
                scale[e, s] = entry.scale
        a_row, rank, v_col, b_stride, b_offset = fields
        table = self._tables[path]
        table.set_groups(
            np.arange(slot * experts, (slot + 1) * experts),
            a_row=a_row,
            rank=rank,
            v_col=v_col,
            b_stride=b_stride,
            b_offset=b_offset,
            scale=scale,
        )
        table.upload()


def _is_finite(t: torch.Tensor) -> bool:
    return bool(torch.isfinite(t).all())


def _identity(t: torch.Tensor) -> tuple:
    """Equal for two views of the same elements: experts that share one B (``expand``) are stored once."""
    return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device


def _v_columns(weights: SiteWeights, row: Sequence[Any]) -> dict[int, int]:
    """First column of v for each A of one group, in the order of use; slices that share A share the columns."""
    columns: dict[int, int] = {}
    at = 0
    for entry in row:
        if entry is not None and entry.a not in columns:
            columns[entry.a] = at
            at += round_up(weights.a[entry.a].size(0), _V_ALIGN)
    return columns


def _plan_site(weights: SiteWeights) -> _SitePlan:
    a_at, rows = [], 0
    for a in weights.a:
        a_at.append(rows)
        rows += a.size(0)
    plan = _SitePlan(a_rows=rows, b_elements=0, a_at=a_at)
    for row in weights.entries:
        for entry in row:
            if entry is None or _identity(entry.b) in plan.b_at:
                continue
            plan.b_at[_identity(entry.b)] = plan.b_elements
            plan.b_tensors.append(entry.b)
            plan.b_elements += entry.b.size(0) * round_up(entry.rank, _B_ALIGN)
        columns = _v_columns(weights, row)
        width = max((c + round_up(weights.a[a].size(0), _V_ALIGN) for a, c in columns.items()), default=0)
        plan.v_width = max(plan.v_width, width)
    return plan
