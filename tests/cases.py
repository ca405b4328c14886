"""Cases for the op tests: random adapters, poisoned pools in every layout, guarded buffers, and what must come out."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import polylora  # noqa: F401  registers torch.ops.polylora
import reference as ref
import torch
from reference import NO_ROW, Adapter, Product, assert_close, assert_same_bits
from torch import Tensor


class PathOp:
    """An op of polylora; a call that the forced path does not serve goes the way that the op picks itself."""

    turn = threading.Lock()

    def __init__(self, op) -> None:
        self.op = op

    def __getattr__(self, name: str):
        return getattr(self.op, name)

    def __call__(self, *args, **kwargs):
        try:
            return self.op(*args, **kwargs)
        except RuntimeError as error:
            if "cudaErrorNotSupported" not in str(error):
                raise
            with PathOp.turn:  # of threads, one at a time changes the environment
                forced = os.environ.pop("POLYLORA_PATH", None)
                if not forced:
                    raise
                try:
                    return self.op(*args, **kwargs)  # what was refused has written nothing
                finally:
                    os.environ["POLYLORA_PATH"] = forced


class PathOps:
    """torch.ops.polylora on every path. Which shapes a path must serve itself: test_ops_safety.py."""

    def __getattr__(self, name: str) -> PathOp:
        return PathOp(getattr(torch.ops.polylora, name))


ops = PathOps()

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("slots", "packed", "ragged", "per_slice")
MIXED_RANKS = (1, 2, 3, 4, 7, 8, 16, 17, 32, 64, 100, 128)
UNEQUAL = (111, 19, 80, 1, 64, 99, 7, 33)  # slice widths; the first s of them for s slices


# ---------------------------------------------------------------------------------------------------------------
# Buffers


def noise(shape: Sequence[int], dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    """Random bits: finite values of every size, infinities, NaNs."""
    width = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(width)
    return torch.randint(info.min, info.max, tuple(shape), dtype=width, generator=gen).view(dtype)


class Guarded:
    """A matrix inside a larger buffer of noise: rows before and after it, columns left and right of it."""

    def __init__(self, data: Tensor, device: str, gen: torch.Generator, left: int = 0, right: int = 0):
        rows, width = data.shape
        self.inside = (slice(1, 1 + rows), slice(left, left + width))
        self.before = noise((rows + 2, left + width + right), data.dtype, gen)
        self.before[self.inside] = data
        self.buffer = self.before.to(device, copy=True)
        self.view = self.buffer[self.inside]

    def reset(self) -> None:
        self.buffer.copy_(self.before)

    def assert_written_only(self, what: str, where: Tensor) -> None:
        """Every bit but those of ``where`` (bool [rows, width]) is as it was."""
        kept = torch.ones(self.before.shape, dtype=torch.bool)
        kept[self.inside] = ~where
        assert_same_bits(f"{what}: outside the rows and slices to write", self.buffer, self.before, kept)


# ---------------------------------------------------------------------------------------------------------------
# Adapters and pools


def randn(shape: Sequence[int], gen: torch.Generator, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    return (torch.randn(tuple(shape), generator=gen, dtype=torch.float32) * factor).to(dtype)


def spread(shape: Sequence[int], gen: torch.Generator, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """Of either sign and size 0.5 to 1.5: products of a few of them are never near 0, as those of randn are."""
    sign = torch.randint(0, 2, tuple(shape), generator=gen) * 2.0 - 1.0
    return (sign * (0.5 + torch.rand(tuple(shape), generator=gen)) * factor).to(dtype)


def make_adapter(
    widths: Sequence[int],
    k: int,
    ranks: Sequence[int],
    gen: torch.Generator,
    dtype: torch.dtype,
    shared_a: bool = False,
) -> Adapter:
    """One adapter of given rank per slice (0: absent). Its deltas are about as large as N(0, 1) outputs."""
    out = Adapter([], [], [])
    shared = spread((max(ranks), k), gen, dtype, k**-0.5) if shared_a and max(ranks, default=0) else None
    for width, rank in zip(widths, ranks, strict=False):
        rank = shared.shape[0] if shared is not None and rank else rank
        absent = rank == 0
        out.a.append(None if absent else shared if shared is not None else spread((rank, k), gen, dtype, k**-0.5))
        out.b.append(None if absent else spread((width, rank), gen, dtype, rank**-0.5))
        factor = torch.rand((), generator=gen).item() * 1.5 + 0.5
        out.scale.append(float(np.float32(factor)))
    return out


def make_adapters(
    groups: int,
    widths: Sequence[int],
    k: int,
    gen: torch.Generator,
    dtype: torch.dtype,
    ranks: Sequence[int] = MIXED_RANKS,
    absent: float = 0.2,
    shared_a: float = 0.2,
) -> list[Adapter]:
    """``groups`` adapters: rank drawn per slice from ``ranks``, slices absent or sharing one A at the given rates."""
    rng = random.Random(int(torch.randint(0, 2**31, (), generator=gen)))
    adapters = []
    for g in range(groups):
        drawn = [0 if rng.random() < absent else rng.choice(list(ranks)) for _ in widths]
        if g == 0:
            drawn[-1] = max(ranks)  # one adapter of the highest rank, never absent altogether
        adapters.append(make_adapter(widths, k, drawn, gen, dtype, shared_a=rng.random() < shared_a))
    return adapters


@dataclass
class Pools:
    """The arguments a, b, table of an op."""

    a: list[Tensor]
    b: list[Tensor]
    table: Tensor
    v_width: int
    entries: np.ndarray  # the table before packing

    def args(self) -> dict:
        return {"a": self.a, "b": self.b, "table": self.table}


def poisoned(shape: Sequence[int], dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    """NaN or 100 * randn, a coin per element: a leak of either kind shows (0 * NaN, and NaN dropped by a max)."""
    nan = torch.rand(tuple(shape), generator=gen) < 0.5
    return torch.where(nan, torch.nan, 100 * torch.randn(tuple(shape), generator=gen)).to(dtype)


def make_pools(
    adapters: Sequence[Adapter],
    widths: Sequence[int],
    k: int,
    dtype: torch.dtype,
    device: str,
    gen: torch.Generator,
    layout: str = "slots",
    aligned: bool = False,
    slot_rank: int | None = None,
) -> Pools:
    """Adapters -> pools full of poison with the weights written into them, and the table that finds them.

    layout: "slots" [slots, slices, R, K], slice s at s * R; "packed" the same slots, slice s right after slice s - 1;
    "ragged" no slots: true ranks at shuffled, gapped places; "per_slice" one tensor a slice.
    aligned: pitches and offsets multiples of 8 elements. slot_rank: R, at least the highest rank.
    """
    groups, slices = len(adapters), len(widths)
    rank_max = max([1] + [ad.rank(s) for ad in adapters for s in range(slices)])
    slot_rank = max(slot_rank or 0, ref.round_up(rank_max, 8) if aligned else rank_max + rank_max % 2)
    arenas = slices if layout == "per_slice" else 1
    a_at, b_at = [0] * arenas, [0] * arenas  # next free row / element of each arena
    entries = np.zeros((groups, slices), dtype=ref.ENTRY)
    entries["a_row"], entries["v_col"], entries["b_offset"], entries["b_stride"] = -7, 2**31 - 1, 2**40, -3
    entries["scale"] = np.nan  # absent entries hold junk: only their rank may be read
    v_width = 0
    rng = random.Random(int(torch.randint(0, 2**31, (), generator=gen)))
    order = list(range(groups))
    if layout == "ragged":
        rng.shuffle(order)
    for g in order:
        adapter, first_of_a, packed = adapters[g], {}, 0
        slot_a, slot_b = list(a_at), list(b_at)
        for s in range(slices):
            rank, arena = adapter.rank(s), s if layout == "per_slice" else 0
            if layout == "ragged":
                gap = rng.randrange(3)
                a_row, b_stride = a_at[0] + gap, ref.round_up(rank, 8) if aligned else rank + rng.randrange(3)
                b_offset = ref.round_up(b_at[0], 8) if aligned else b_at[0] + rng.randrange(8)
                v_col = packed
            else:
                b_stride = slot_rank
                in_slot = 0 if arenas > 1 else packed if layout == "packed" else s * slot_rank
                a_row = slot_a[arena] + in_slot
                b_offset = slot_b[arena] + (0 if arenas > 1 else sum(widths[:s]) * slot_rank)
                v_col = packed if layout == "packed" else s * slot_rank
            known = first_of_a.get(id(adapter.a[s])) if rank and arenas == 1 else None
            if known is not None:
                a_row, v_col = known  # a shared A is stored and shrunk once
            elif rank:
                first_of_a[id(adapter.a[s])] = (a_row, v_col)
                packed += rank
                if layout == "ragged":
                    a_at[0] = a_row + rank
            if rank:
                entries[g, s] = (a_row, rank, v_col, b_stride, b_offset, adapter.scale[s], 0)
                v_width = max(v_width, v_col + rank)
                if layout == "ragged":
                    b_at[0] = b_offset + widths[s] * b_stride
        if layout != "ragged":
            for arena in range(arenas):
                a_at[arena] += slot_rank * (slices if arenas == 1 else 1)
                b_at[arena] += slot_rank * (sum(widths) if arenas == 1 else widths[arena])

    for g, s in np.ndindex(groups, slices):  # an absent slice may name the v column of a present one: it owns nothing
        if entries[g, s]["rank"] == 0 and rng.random() < 0.5:
            others = entries[g][entries[g]["rank"] > 0]
            entries[g, s]["v_col"] = others["v_col"][-1] if len(others) else 0

    a_pitch = k + (8 if aligned else rng.randrange(3))  # A rows may be wider apart than K
    a = [poisoned((rows + 3, a_pitch), dtype, gen) for rows in a_at]
    b = [poisoned((size + 5,), dtype, gen) for size in b_at]
    for g, s in np.ndindex(groups, slices):
        row, rank, _, stride, offset, *_ = entries[g, s].tolist()
        if rank:
            arena = s if arenas > 1 else 0
            a[arena][row : row + rank, :k] = adapters[g].a[s]
            b[arena].as_strided((widths[s], rank), (stride, 1), offset).copy_(adapters[g].b[s])
    a = [t.to(device)[:, :k] for t in a]
    return Pools(a, [t.to(device) for t in b], ref.pack_table(entries, device), max(v_width, 1), entries)


# ---------------------------------------------------------------------------------------------------------------
# Group ids

OUT_OF_RANGE = (-2, -100, -(2**31), 2**31 - 1)


def make_ids(pattern: str, rows: int, groups: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    pick = lambda: rng.randrange(groups)  # noqa: E731
    if pattern == "none":
        return [-1] * rows
    if pattern == "one":
        return [0] * rows
    if pattern == "base_and_one":
        return [rng.choice([-1, groups - 1]) for _ in range(rows)]
    if pattern == "mixed":  # decode: any row any adapter, -1 anywhere
        return [-1 if rng.random() < 0.2 else pick() for _ in range(rows)]
    if pattern == "segments":  # prefill: long runs, some of them base, some groups empty
        ids: list[int] = []
        while len(ids) < rows:
            ids += [pick() if rng.random() < 0.8 else -1] * rng.randrange(1, max(2, rows // 3))
        return ids[:rows]
    if pattern == "two_segments":  # group 0 at both ends, others between
        third = rows // 3
        return [0] * third + [rng.randrange(1, groups) for _ in range(rows - 2 * third)] + [0] * third
    if pattern == "invalid":
        return [rng.choice((groups, groups + 7, *OUT_OF_RANGE)) if rng.random() < 0.3 else pick() for _ in range(rows)]
    if pattern == "skewed":  # one long run, the other groups a row each
        return [0] * max(rows - groups + 1, 0) + list(range(1, groups))[:rows]
    raise ValueError(pattern)


# ---------------------------------------------------------------------------------------------------------------
# What must come out


@dataclass
class Part:
    """Rows and columns of one group and slice, and their values."""

    what: str
    rows: Tensor
    cols: Tensor
    want: Product
    delta: Tensor | None  # float64, None where there is no adapter
    rank: int = 0


def check_parts(parts: Sequence[Part], got: Tensor) -> None:
    got = got.detach().cpu()
    for part in parts:
        # few samples of v may all lie near 0: the tenth-of-the-delta rule is for parts with enough of them
        delta = part.delta if part.rank * len(part.rows) >= 32 else None
        assert_close(part.what, got[part.rows][:, part.cols], part.want, delta)


def written(parts: Sequence[Part], shape: Sequence[int]) -> Tensor:
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    for part in parts:
        mask[part.rows[:, None], part.cols[None, :]] = True
    return mask


def assert_lora_matters(parts: Sequence[Part]) -> None:
    """The generator's own proof: what LoRA adds is more than 12% of the output, so a bypass cannot pass."""
    parts = [part for part in parts if part.delta is not None and part.delta.numel()]
    if min(sum(part.rank * len(part.rows) for part in parts), sum(part.delta.numel() for part in parts)) < 32:
        return  # a handful of values may all lie near 0
    finite = [torch.isfinite(part.want.exact) & torch.isfinite(part.delta) for part in parts]
    added = sum(part.delta[ok].square().sum().item() for part, ok in zip(parts, finite, strict=False)) ** 0.5
    output = sum(part.want.exact[ok].square().sum().item() for part, ok in zip(parts, finite, strict=False)) ** 0.5
    assert added > 0.12 * output, f"a weak case: delta {added:.3g} of an output of {output:.3g}"


# ---------------------------------------------------------------------------------------------------------------
# Dense cases: linear_, shrink, expand_, embedding_


@dataclass
class DenseCase:
    adapters: list[Adapter]
    widths: list[int]
    cols: list[int]
    row_group: list[int]
    invalid: int
    pools: Pools
    group_ids: Tensor
    plan: Tensor
    x: Tensor  # [rows, K], NaN in rows of no adapter and around it
    y: Guarded
    parts: list[Part]
    token_ids: Tensor | None = None
    kwargs: dict = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.row_group)

    def outputs(self) -> dict:
        return {"widths": self.widths, "cols": self.cols}

    def linear_args(self) -> dict:
        return dict(
            y=self.y.view,
            x=self.x,
            **self.pools.args(),
            plan=self.plan,
            **self.outputs(),
            v_width=self.pools.v_width,
        )

    def check(self, what: str = "y") -> None:
        """Values of all parts, and not one other bit changed."""
        check_parts(self.parts, self.y.view)
        self.y.assert_written_only(what, written(self.parts, self.y.view.shape))


def columns(widths: Sequence[int], gaps: bool, unit: int) -> tuple[list[int], int]:
    """Start columns of the slices (with gaps of noise: in reverse order) and the width of y."""
    if not gaps:
        return [sum(widths[:s]) for s in range(len(widths))], sum(widths)
    cols, at = [0] * len(widths), unit
    for s in reversed(range(len(widths))):
        cols[s] = at
        at = ref.round_up(at + widths[s] + 1, unit)
    return cols, at


def plan_rows(group_ids: Tensor, groups: int) -> Tensor:
    plan = ref.new_plan(len(group_ids), groups, device=group_ids.device.type)
    ops.plan(plan, group_ids, groups)
    return plan


def make_dense_case(
    device: str,
    dtype: torch.dtype,
    *,
    rows: int = 33,
    k: int = 80,
    widths: Sequence[int] = (111, 19, 80),
    groups: int = 5,
    ranks: Sequence[int] = MIXED_RANKS,
    layout: str = "slots",
    ids: str | Sequence[int] = "mixed",
    ids_dtype: torch.dtype = torch.int32,
    absent: float = 0.2,
    shared_a: float = 0.2,
    aligned: bool = False,
    gaps: bool = True,
    adapters: list[Adapter] | None = None,
    slot_rank: int | None = None,
    x: Tensor | None = None,
    base: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> DenseCase:
    """A linear_ call and what must come out of it. ``base`` may alter y's values, x replaces the activations."""
    gen = torch.Generator().manual_seed(1000 + seed)
    widths = list(widths)
    if adapters is None:
        adapters = make_adapters(groups, widths, k, gen, dtype, ranks, absent, shared_a)
    groups = len(adapters)
    pools = make_pools(adapters, widths, k, dtype, device, gen, layout, aligned, slot_rank)
    id_list = make_ids(ids, rows, groups, seed) if isinstance(ids, str) else list(ids)
    rows = len(id_list)
    group_ids = torch.tensor(id_list, dtype=ids_dtype).to(device)
    row_group, invalid = ref.dense_row_groups(group_ids, groups)

    unit = 8 if aligned else 1
    cols, y_width = columns(widths, gaps, unit)
    values = noise((rows, y_width), dtype, gen)
    if x is None:
        x = spread((rows, k), gen, dtype)
        x[[r for r in range(rows) if row_group[r] < 0]] = torch.nan
    parts = []
    for g in ref.used_groups(row_group):
        at = ref.rows_of(row_group, g)
        for s, width in enumerate(widths):
            cols_s = torch.arange(cols[s], cols[s] + width)
            y_s = randn((len(at), width), gen, dtype)
            y_s = y_s if base is None else base(y_s)
            values[at[:, None], cols_s[None, :]] = y_s
            rank = adapters[g].rank(s)
            if rank:
                delta = ref.lora_delta(x[at], adapters[g].a[s], adapters[g].b[s], adapters[g].scale[s])
                what = f"group {g} slice {s} (rank {rank}, {len(at)} rows)"
                parts.append(Part(what, at, cols_s, ref.add(y_s, delta), delta.exact if base is None else None, rank))
    if base is None:
        assert_lora_matters(parts)
    y = Guarded(values, device, gen, left=3 * unit, right=5 * unit) if gaps else Guarded(values, device, gen)
    padded = Guarded(x, device, gen, right=unit * 2) if gaps else Guarded(x, device, gen)
    return DenseCase(
        adapters,
        widths,
        cols,
        row_group,
        invalid,
        pools,
        group_ids,
        plan_rows(group_ids, groups),
        padded.view,
        y,
        parts,
    )


def make_embedding_case(
    device: str,
    dtype: torch.dtype,
    *,
    rows: int = 33,
    vocab: int = 57,
    widths: Sequence[int] = (99,),
    groups: int = 4,
    ranks: Sequence[int] = (1, 4, 8, 17, 64),
    token_major: bool = False,
    ids: str | Sequence[int] = "mixed",
    tokens: str = "invalid",
    token_dtype: torch.dtype = torch.int64,
    aligned: bool = False,
    seed: int = 0,
) -> DenseCase:
    """An embedding_ call. Slots [slots, r, vocab] or, token_major, [slots, vocab, r], poison behind the true rank."""
    gen = torch.Generator().manual_seed(2000 + seed)
    widths, slices, unit = list(widths), len(widths), 8 if aligned else 1
    width_r = ref.round_up(max(ranks) + 3, unit)
    adapters = make_adapters(groups, widths, vocab, gen, dtype, ranks, absent=0.2 if slices > 1 else 0.0)
    for adapter in adapters:  # A is looked up, so its elements, not their sums over K, make the size of v
        seen: dict[int, Tensor] = {}
        adapter.a = [
            None if a is None else seen.setdefault(id(a), (a.float() * vocab**0.5).to(dtype)) for a in adapter.a
        ]
    pools = make_pools(adapters, widths, vocab, dtype, device, gen, "slots", aligned)
    if token_major:
        entries = pools.entries
        a = poisoned((groups * slices * vocab, width_r), dtype, gen)
        for g, s in np.ndindex(groups, slices):
            rank = adapters[g].rank(s)
            if rank:
                first = next(i for i in range(s + 1) if adapters[g].a[i] is adapters[g].a[s])
                row = (g * slices + first) * vocab
                a[row : row + vocab, :rank] = adapters[g].a[s].T
                entries[g, s]["a_row"] = row
        pools.a, pools.table = [a.to(device)], ref.pack_table(entries, device)

    id_list = make_ids(ids, rows, groups, seed) if isinstance(ids, str) else list(ids)
    rows = len(id_list)
    group_ids = torch.tensor(id_list, dtype=torch.int32).to(device)
    row_group, invalid = ref.dense_row_groups(group_ids, groups)
    token_list = torch.randint(0, vocab, (rows,), generator=gen)
    junk = torch.tensor([-1, vocab, vocab + 1000, -(2**31), 2**31 - 1])
    if tokens == "invalid":
        bad = torch.rand(rows, generator=gen) < 0.2
        token_list[bad] = junk[torch.randint(0, len(junk), (int(bad.sum()),), generator=gen)]
    token_list[torch.tensor(row_group) < 0] = vocab + 5  # ids of rows without an adapter must not be followed
    cols, y_width = columns(widths, True, unit)
    values = noise((rows, y_width), dtype, gen)
    parts = []
    known = (token_list >= 0) & (token_list < vocab)
    for g in ref.used_groups(row_group):
        at = ref.rows_of(row_group, g)
        at = at[known[at]]
        for s, width in enumerate(widths):
            rank = adapters[g].rank(s)
            if rank and len(at):
                cols_s = torch.arange(cols[s], cols[s] + width)
                y_s = randn((len(at), width), gen, dtype)
                values[at[:, None], cols_s[None, :]] = y_s
                delta = ref.lookup_delta(token_list[at], adapters[g].a[s], adapters[g].b[s], adapters[g].scale[s])
                what = f"group {g} slice {s} (rank {rank}, {len(at)} rows)"
                parts.append(Part(what, at, cols_s, ref.add(y_s, delta), delta.exact, rank))
    assert_lora_matters(parts)
    y = Guarded(values, device, gen, left=unit, right=4 * unit)
    plan = plan_rows(group_ids, groups)
    case = DenseCase(adapters, widths, cols, row_group, invalid, pools, group_ids, plan, torch.empty(0), y, parts)
    case.token_ids = token_list.to(token_dtype).to(device)
    case.kwargs = {"vocab": vocab, "token_major": token_major}
    return case


def embedding_args(case: DenseCase) -> dict:
    return dict(
        y=case.y.view,
        token_ids=case.token_ids,
        **case.pools.args(),
        plan=case.plan,
        **case.outputs(),
        **case.kwargs,
    )


# ---------------------------------------------------------------------------------------------------------------
# MoE


@dataclass
class MoeCase:
    """Routing of one MoE layer and the plan of its positions."""

    tokens: int
    top_k: int
    slots: int
    experts: int
    topk_ids: Tensor
    topk_weights: Tensor
    token_slots: Tensor
    expert_map: Tensor | None
    row_map: Tensor | None
    rows: ref.MoeRows
    plan: Tensor
    gen: torch.Generator
    device: str
    dtype: torch.dtype

    @property
    def groups(self) -> int:
        return self.slots * self.experts

    @property
    def positions(self) -> int:
        return len(self.rows.row_group)

    def of_token(self, position: int) -> int:
        return self.rows.pair[position] // self.top_k


def make_row_map(moe_groups: list[int], pairs: int, block: int, rng: random.Random, extra: int = 3) -> list[int]:
    """Pairs permuted by expert, every expert padded with -1 to a multiple of ``block``, as fused MoE kernels do it."""
    experts: dict[int, list[int]] = {}
    for pair, expert in enumerate(moe_groups):
        experts.setdefault(expert, []).append(pair)
    out: list[int] = []
    for expert in sorted(experts):
        members = experts[expert]
        rng.shuffle(members)
        out += members + [-1] * (ref.round_up(len(members), block) - len(members))
    return out + [-1] * extra


def make_moe_case(
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int = 19,
    top_k: int = 4,
    slots: int = 3,
    experts: int = 8,
    row_map: bool | Sequence[int] = False,
    expert_map: bool = False,
    invalid: bool = False,
    slot_ids: str = "mixed",
    no_expert: float = 0.1,
    ids_dtype: torch.dtype = torch.int32,
    block: int = 4,
    seed: int = 0,
) -> MoeCase:
    """``row_map``: whether there is one, drawn at random; or the map itself."""
    gen = torch.Generator().manual_seed(3000 + seed)
    rng = random.Random(seed)
    global_experts = experts * 2 + 1 if expert_map else experts
    mapping = None
    if expert_map:
        local = rng.sample(range(global_experts), experts)
        mapping = torch.tensor([local.index(e) if e in local else -1 for e in range(global_experts)]).int()
    topk = [[rng.randrange(global_experts) for _ in range(top_k)] for _ in range(tokens)]  # duplicates occur
    for row in topk:
        for j in range(top_k):
            if rng.random() < no_expert:
                row[j] = -1
            if invalid and rng.random() < 0.2:
                row[j] = rng.choice([global_experts, -2, global_experts + 100, 2**31 - 1, -(2**31)])
    slot = make_ids(slot_ids, tokens, slots, seed)
    if invalid:
        slot = [rng.choice([slots, -2, 2**31 - 1]) if rng.random() < 0.2 else s for s in slot]
    weights = torch.rand((tokens, top_k), generator=gen) + 0.25
    mapped = None
    if not isinstance(row_map, bool):
        mapped = torch.tensor(row_map, dtype=torch.int32)
    elif row_map:
        flat = [e for row in topk for e in row]
        positions = make_row_map(
            [e if 0 <= e < global_experts else global_experts for e in flat], len(flat), block, rng
        )
        if invalid:
            positions = [rng.choice([len(flat), -2, len(flat) + 50]) if p < 0 else p for p in positions]
        mapped = torch.tensor(positions, dtype=torch.int32)
    topk_ids = torch.tensor(topk, dtype=ids_dtype).reshape(tokens, top_k)
    token_slots = torch.tensor(slot, dtype=torch.int32)
    found = ref.moe_rows(topk_ids, token_slots, slots, experts, mapping, mapped)
    on = lambda t: None if t is None else t.to(device)  # noqa: E731
    case = MoeCase(
        tokens, top_k, slots, experts, on(topk_ids), on(weights), on(token_slots), on(mapping), on(mapped), found,
        torch.empty(0), gen, device, dtype,
    )  # fmt: skip
    case.plan = plan_moe(case)
    # the weight of a pair without a row multiplies nothing
    alive = torch.zeros(tokens * top_k, dtype=torch.bool)
    for group, pair in zip(found.row_group, found.pair, strict=False):
        if group != NO_ROW:
            alive[pair] = True
    case.topk_weights = on(torch.where(alive.view(tokens, top_k), weights, torch.nan))
    return case


def plan_moe(case: MoeCase) -> Tensor:
    pairs = case.tokens * case.top_k if case.row_map is not None else 0
    plan = ref.new_plan(case.positions, case.groups, pairs, case.device)
    ops.moe_plan(plan, case.topk_ids, case.token_slots, case.slots, case.experts, case.expert_map, case.row_map)
    return plan


@dataclass
class MoeHalf:
    """Gate/up or down of an MoE layer: weights, the base output, and what must come out."""

    pools: Pools
    widths: list[int]
    cols: list[int]
    col_stride: int
    x: Tensor  # [tokens, K] for gate/up, [positions, K] for down
    y: Guarded  # base output of all positions that exist, noise elsewhere
    parts: list[Part]  # y + delta, positions with an adapter
    base_parts: list[Part]  # y, positions without one
    adapters: list[Adapter]  # of each group

    def args(self) -> dict:
        return dict(**self.pools.args(), widths=self.widths, cols=self.cols, v_width=self.pools.v_width)


def make_moe_half(
    case: MoeCase,
    *,
    down: bool,
    k: int = 80,
    width: int = 33,
    widths: Sequence[int] | None = None,
    gated: bool = True,
    interleaved: bool = False,
    ranks: Sequence[int] = (1, 3, 8, 16),
    absent: float = 0.15,
    shared_a: float = 0.2,
    shared_outer: bool = False,
    layout: str = "slots",
    aligned: bool = False,
    weighted: bool = True,
    gaps: bool = True,
) -> MoeHalf:
    """``weighted``: the deltas carry the top-k weight (down), as in moe_down_. ``widths``: of any slices, instead."""
    gen, dtype = case.gen, case.dtype
    widths = list(widths) if widths else [width] * (2 if gated and not down else 1)
    slices = len(widths)
    adapters: list[Adapter] = []
    for _ in range(case.slots):
        one = make_adapters(1 if shared_outer else case.experts, widths, k, gen, dtype, ranks, absent, shared_a)
        adapters += one * case.experts if shared_outer else one
    pools = make_pools(adapters, widths, k, dtype, case.device, gen, layout, aligned)
    unit = 8 if aligned else 1
    left = unit if gaps else 0
    cols = [left + (s if interleaved else sum(widths[:s])) for s in range(slices)]
    stride = slices if interleaved else 1
    y_width = left + sum(widths) + (2 * unit if gaps else 0)

    row_group, positions = case.rows.row_group, case.positions
    source = [case.rows.pair[p] if down else case.of_token(p) for p in range(positions)]
    active = [p for p in range(positions) if row_group[p] >= 0]
    x = spread((positions if down else case.tokens, k), gen, dtype)
    read = set(active) if down else {source[p] for p in active}
    x[[r for r in range(len(x)) if r not in read]] = torch.nan
    values = noise((positions, y_width), dtype, gen)
    parts, base_parts = [], []
    weights = case.topk_weights.cpu().flatten()
    for g in sorted(set(row_group) - {NO_ROW}):
        at = ref.rows_of(row_group, g)
        for s, width in enumerate(widths):
            cols_s = torch.arange(width) * stride + cols[s]
            y_s = randn((len(at), width), gen, dtype)
            values[at[:, None], cols_s[None, :]] = y_s
            rank = adapters[g].rank(s) if g >= 0 else 0
            if rank == 0:
                same = Product(y_s.double(), y_s, torch.zeros(y_s.shape, dtype=torch.float64))
                base_parts.append(Part(f"group {g} slice {s} (no adapter)", at, cols_s, same, None))
                continue
            rows = at if down else torch.tensor([source[p] for p in at.tolist()])
            w = weights[[case.rows.pair[p] for p in at.tolist()]] if down and weighted else None
            delta = ref.lora_delta(x[rows], adapters[g].a[s], adapters[g].b[s], adapters[g].scale[s], w)
            what = f"group {g} (slot {g // case.experts} expert {g % case.experts}) slice {s} (rank {rank})"
            parts.append(Part(what, at, cols_s, ref.add(y_s, delta), delta.exact, rank))
    assert_lora_matters(parts)
    y = Guarded(values, case.device, gen, 2 * unit, unit) if gaps else Guarded(values, case.device, gen)
    x = Guarded(x, case.device, gen, right=unit).view if gaps else x.to(case.device)
    return MoeHalf(pools, widths, cols, stride, x, y, parts, base_parts, adapters)


def expected_deltas(case: MoeCase, half: MoeHalf, down: bool, weighted: bool) -> list[Part]:
    """What moe_delta makes, slice after slice: zeros where a slice is absent."""
    x, weights = half.x.cpu(), case.topk_weights.cpu().flatten()
    parts = []
    for g in ref.used_groups(case.rows.row_group):
        at = ref.rows_of(case.rows.row_group, g)
        pairs = [case.rows.pair[p] for p in at.tolist()]
        rows = at if down else torch.tensor([pair // case.top_k for pair in pairs])
        adapter = half.adapters[g]
        for s, width in enumerate(half.widths):
            cols = torch.arange(width) + sum(half.widths[:s])
            rank, what = adapter.rank(s), f"delta of group {g} slice {s}"
            if rank == 0:
                zeros = torch.zeros((len(at), width), dtype=torch.float64)
                parts.append(Part(what, at, cols, Product(zeros, zeros.to(case.dtype), zeros), None))
                continue
            w = weights[pairs] if weighted else None
            delta = ref.lora_delta(x[rows], adapter.a[s], adapter.b[s], adapter.scale[s], w)
            parts.append(Part(what, at, cols, delta, delta.exact, rank))
    return parts


def given_v(case: MoeCase, half: MoeHalf, down: bool) -> Tensor:
    """v of the rows of x as shrink makes it; NaN where no adapter has a rank."""
    x, entries = half.x.cpu().float(), half.pools.entries
    v = torch.full((len(x), half.pools.v_width), torch.nan)
    for position, group in enumerate(case.rows.row_group):
        if group < 0:
            continue
        row = position if down else case.of_token(position)
        for s in range(len(half.widths)):
            _, rank, v_col, *_ = entries[group, s].tolist()
            if rank:
                v[row, v_col : v_col + rank] = half.adapters[group].a[s].float() @ x[row]
    return v.to(case.device)


def assemble(half: MoeHalf) -> Product:
    """All parts as one [positions, y width] quantity; NaN where no row or no slice is."""
    shape = half.y.view.shape
    out = Product(
        torch.full(shape, torch.nan, dtype=torch.float64),
        torch.full(shape, torch.nan, dtype=half.y.before.dtype),
        torch.zeros(shape, dtype=torch.float64),
    )
    for part in half.parts + half.base_parts:
        at = (part.rows[:, None], part.cols[None, :])
        out.exact[at], out.naive[at], out.slack[at] = part.want.exact, part.want.naive, part.want.slack
    return out


def expected_act(case: MoeCase, half: MoeHalf, act: str, alpha: float, limit: float) -> list[Part]:
    """h = act(y1 + delta), per group, for every position but those of kNoRow."""
    whole = assemble(half)
    width = half.widths[0]
    cols = [torch.arange(width) * half.col_stride + c for c in half.cols]
    parts = []
    for g in sorted(set(case.rows.row_group) - {NO_ROW}):
        at = ref.rows_of(case.rows.row_group, g)
        pieces = [whole[at[:, None], c[None, :]] for c in cols]
        h = activated(act, pieces, alpha, limit)
        rank = max([part.rank for part in half.parts if part.what.startswith(f"group {g} ")], default=0)
        base = ref.activate(act, [half.y.before[half.y.inside][at][:, c].double() for c in cols], alpha, limit)
        delta = h.exact - base if rank else None
        parts.append(Part(f"h of group {g}", at, torch.arange(width), h, delta, rank))
    assert_lora_matters(parts)
    return parts


def activated(act: str, pieces: list[Product], alpha: float = 1.702, limit: float = 7.0) -> Product:
    """The activation of one slice, or of gate and up."""
    exact = ref.activate(act, [p.exact for p in pieces], alpha, limit)
    naive = ref.activate(act, [p.naive for p in pieces], alpha, limit)
    slack = 4 * ref.UNIT[torch.float32] * exact.abs()
    for i, _piece in enumerate(pieces):
        for sign in (-1, 1):
            moved = [p.exact + sign * p.slack if j == i else p.exact for j, p in enumerate(pieces)]
            slack = torch.maximum(slack, (ref.activate(act, moved, alpha, limit) - exact).abs())
    return Product(exact, naive, slack)


def expected_reduce(case: MoeCase, half: MoeHalf, y2_weighted: bool) -> list[Part]:
    """out[t] = sum_j w * (y2 + delta), per slot. ``half`` made with weighted=y2_weighted."""
    whole = assemble(half)
    width, dtype = half.widths[0], case.dtype
    cols = torch.arange(width) + half.cols[0]
    y2 = half.y.before[half.y.inside][:, cols]
    exact = torch.zeros((case.tokens, width), dtype=torch.float64)
    base, slack, naive = exact.clone(), exact.clone(), torch.zeros((case.tokens, width), dtype=torch.float32)
    weights = case.topk_weights.cpu()
    slot_of = case.token_slots.cpu().tolist()
    pair_pos = {case.rows.pair[p]: p for p in range(case.positions) if case.rows.row_group[p] != NO_ROW}
    for t in range(case.tokens):
        for j in range(case.top_k):
            p = pair_pos.get(t * case.top_k + j)
            if p is None:
                continue
            w = 1.0 if y2_weighted else weights[t, j].item()
            exact[t] += w * whole.exact[p, cols]
            base[t] += w * y2[p].double()
            naive[t] += (whole.naive[p, cols].float() * w).to(dtype).float()
            slack[t] += (w * whole.slack[p, cols]) ** 2 + (4 * ref.UNIT[torch.float32] * w * whole.exact[p, cols]) ** 2
    parts = []
    for slot in sorted(set(slot_of)):
        at = ref.rows_of(slot_of, slot) if slot >= 0 else torch.tensor([t for t, s in enumerate(slot_of) if s == slot])
        want = Product(exact[at], naive[at].to(dtype), slack[at].sqrt())
        active = 0 <= slot < case.slots and any(f"(slot {slot} " in part.what for part in half.parts)
        delta = (exact - base)[at] if active else None
        parts.append(Part(f"out of slot {slot}", at, torch.arange(width), want, delta, 1 if active else 0))
    assert_lora_matters(parts)
    return parts
