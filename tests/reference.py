"""What every op must compute: float64, from per-group dense weights, never from a slice table.

Also the plan's layout and content by brute force, the naive same-dtype formula that the error bound is stated in, and
the comparisons. Nothing here imports the package, so that a mistake there cannot repeat itself here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------
# Slice table and plan layout, recomputed

ENTRY = np.dtype(
    [
        ("a_row", "<i4"),
        ("rank", "<i4"),
        ("v_col", "<i4"),
        ("b_stride", "<i4"),
        ("b_offset", "<i8"),
        ("scale", "<f4"),
        ("epilogue", "<i4"),
    ]
)
assert ENTRY.itemsize == 32

NO_ADAPTER, NO_ROW = -1, -2
HEADER = {
    "version": 0,
    "rows": 1,
    "groups": 2,
    "active_rows": 3,
    "runs": 4,
    "tiles": 5,
    "invalid": 6,
    "max_run": 7,
    "pairs": 8,
    "wide_tiles": 9,
    "short_tiles": 10,
    "long_tiles": 11,
    "max_short": 12,
}
HEADER_WORDS = 16
PLAN_VERSION = 3
TILE_ROWS = 16
WIDE_TILE_ROWS = 128
SHORT_RUN = 16
SMALL_ROWS = 512
ONE_LAUNCH_ROWS = 16384
MAX_SLICES = 8


def pack_table(entries: np.ndarray, device: str) -> Tensor:
    """[groups, slices] of ENTRY -> int32 [groups, slices, 8]."""
    words = np.ascontiguousarray(entries).view(np.int32).reshape(*entries.shape, 8)
    return torch.from_numpy(words.copy()).to(device)


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def plan_layout(rows: int, groups: int, pairs: int = 0) -> dict[str, int]:
    """Word offsets of a plan's sections; ``words`` is the total."""
    runs = min(rows, groups)
    tiles = min(rows, rows // TILE_ROWS + runs)
    wide_tiles = min(rows, rows // WIDE_TILE_ROWS + runs)
    blocks = 16 if rows <= ONE_LAUNCH_ROWS else min(16 + rows // max(groups, 1), 128)
    workspace = 8 * blocks + (blocks + 1) * round_up(groups, 4) if rows > SMALL_ROWS else 0
    sections = [
        ("row_group", rows),
        ("order", rows),
        ("run_group", runs),
        ("run_start", runs + 1),
        ("tile", 4 * tiles),
        ("pair_pos", pairs),
        ("wide_tile", 4 * wide_tiles),
        ("workspace", workspace),
    ]
    layout, at = {}, HEADER_WORDS
    for name, words in sections:
        layout[name] = at
        at += round_up(words, 4)
    layout["words"] = at
    return layout


def new_plan(rows: int, groups: int, pairs: int = 0, device: str = "cpu") -> Tensor:
    """An unwritten plan: junk that no kernel may rely on."""
    words = plan_layout(rows, groups, pairs)["words"]
    return torch.full((words,), -0x5A5A5A5B, dtype=torch.int32, device=device)


def dense_row_groups(group_ids: Tensor, groups: int) -> tuple[list[int], int]:
    """group of every row, and how many ids were out of range."""
    ids = group_ids.cpu().tolist()
    invalid = sum(1 for g in ids if g != -1 and not 0 <= g < groups)
    return [g if 0 <= g < groups else NO_ADAPTER for g in ids], invalid


@dataclass
class MoeRows:
    """What moe_plan must find."""

    row_group: list[int]  # [rows]
    pair: list[int]  # [rows] pair of a position, -1 where there is none
    pair_pos: list[int]  # [pairs] position of a pair, -1 where it has none
    invalid: int


def moe_rows(
    topk_ids: Tensor,
    token_slots: Tensor,
    slots: int,
    experts: int,
    expert_map: Tensor | None = None,
    row_map: Tensor | None = None,
) -> MoeRows:
    top_k = topk_ids.shape[1]
    ids = topk_ids.cpu().flatten().tolist()
    token_slot = token_slots.cpu().tolist()
    pairs = len(ids)
    local = expert_map.cpu().tolist() if expert_map is not None else list(range(experts))
    positions = row_map.cpu().tolist() if row_map is not None else list(range(pairs))
    out = MoeRows([], [], [-1] * pairs, 0)
    for position, pair in enumerate(positions):
        group, bad = NO_ROW, 0
        if not 0 <= pair < pairs:
            bad, pair = int(pair != -1), -1
        else:
            out.pair_pos[pair] = position  # ascending positions: the higher one wins
            expert = ids[pair]
            if not 0 <= expert < len(local):
                bad = int(expert != -1)
            elif not 0 <= local[expert] < experts:
                bad = int(local[expert] != -1)
            else:
                slot = token_slot[pair // top_k]
                if 0 <= slot < slots:
                    group = slot * experts + local[expert]
                else:
                    group, bad = NO_ADAPTER, int(slot != -1)
        out.row_group.append(group)
        out.pair.append(pair)
        out.invalid += bad
    return out


def check_plan(
    plan: Tensor, row_group: list[int], groups: int, invalid: int | None, pair_pos: list[int] | None = None
) -> None:
    """Every word of a plan that a kernel may read, against brute force."""
    rows, pairs = len(row_group), len(pair_pos) if pair_pos is not None else 0
    at = plan_layout(rows, groups, pairs)
    words = plan.cpu().tolist()
    assert len(words) == at["words"]

    order = sorted((r for r in range(rows) if row_group[r] >= 0), key=lambda r: row_group[r])  # sorted is stable
    runs: list[list[int]] = []  # group, start, length
    for position, row in enumerate(order):
        if not runs or runs[-1][0] != row_group[row]:
            runs.append([row_group[row], position, 0])
        runs[-1][2] += 1

    def tiles_of(cut: Callable[[int], int]) -> list[tuple[int, int, int, int]]:
        """(group, pos, rows, run) of the tiles of ``cut(rows of the run)`` rows, the run's last one of the rest."""
        return [
            (group, start + first, min(cut(length), length - first), run)
            for run, (group, start, length) in enumerate(runs)
            for first in range(0, length, cut(length))
        ]

    def even(length: int) -> int:
        """As few tiles of up to WIDE_TILE_ROWS as can be, of an even share each, rounded up to TILE_ROWS."""
        return round_up(math.ceil(length / math.ceil(length / WIDE_TILE_ROWS)), TILE_ROWS)

    def is_short(tile: tuple[int, int, int, int]) -> bool:
        return runs[tile[3]][2] <= SHORT_RUN

    tiles, wide_tiles = tiles_of(lambda _: TILE_ROWS), tiles_of(even)

    header = {name: words[word] for name, word in HEADER.items()}
    want = {
        "version": PLAN_VERSION,
        "rows": rows,
        "groups": groups,
        "active_rows": len(order),
        "runs": len(runs),
        "tiles": len(tiles),
        "invalid": header["invalid"] if invalid is None else invalid,
        "max_run": max((length for _, _, length in runs), default=0),
        "pairs": pairs,
        "wide_tiles": len(wide_tiles),
        "short_tiles": sum(is_short(tile) for tile in tiles),
        "long_tiles": sum(not is_short(tile) for tile in wide_tiles),
        "max_short": max((length for _, _, length in runs if length <= SHORT_RUN), default=0),
    }
    assert header == want, f"header: got {header}, want {want}"

    def section(name: str, length: int) -> list[int]:
        return words[at[name] : at[name] + length]

    assert_same_list("row_group", section("row_group", rows), row_group)
    assert_same_list("order", section("order", len(order)), order)
    assert_same_list("run_group", section("run_group", len(runs)), [run[0] for run in runs])
    assert_same_list("run_start", section("run_start", len(runs) + 1), [run[1] for run in runs] + [len(order)])
    for name, want_tiles in (("tile", tiles), ("wide_tile", wide_tiles)):
        tile_words = section(name, 4 * len(want_tiles))
        got_tiles = [tuple(tile_words[at : at + 4]) for at in range(0, len(tile_words), 4)]
        assert_same_list(f"{name}s (group, pos, rows, run), sorted", sorted(got_tiles), sorted(want_tiles))
        short_first = [is_short(tile) == (name == "tile") for tile in got_tiles]
        assert short_first == sorted(short_first, reverse=True), f"{name}s: those of short runs at one end"
    if pair_pos is not None:
        assert_same_list("pair_pos", section("pair_pos", pairs), pair_pos)


def assert_same_list(name: str, got: list, want: list) -> None:
    if got != want:
        at = next((i for i, (g, w) in enumerate(zip(got, want, strict=False)) if g != w), min(len(got), len(want)))
        raise AssertionError(f"{name}[{at}]: got {got[at : at + 8]}, want {want[at : at + 8]} (of {len(want)})")


# ---------------------------------------------------------------------------------------------------------------
# The LoRA products

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # half an ulp at 1.0


@dataclass
class Adapter:
    """Dense weights of one group, in the op's dtype, on the CPU. ``a[s]`` None: the slice is absent (rank 0)."""

    a: list[Tensor | None]  # [rank, K] per slice; the same object for slices that share one A
    b: list[Tensor | None]  # [N_s, rank] per slice
    scale: list[float] = field(default_factory=list)  # per slice, exact in fp32

    def rank(self, s: int) -> int:
        return 0 if self.a[s] is None else self.a[s].shape[0]


@dataclass
class Product:
    """A quantity three ways. ``slack`` is the size of the roundings that no implementation escapes."""

    exact: Tensor  # float64
    naive: Tensor  # the op's dtype, every intermediate rounded to it
    slack: Tensor  # float64, see lora_delta

    def __getitem__(self, index) -> Product:
        return Product(self.exact[index], self.naive[index], self.slack[index])


def half_matmul(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T as a same-dtype GEMM gives it: fp32 sums, one rounding. (CPU half GEMMs differ between machines.)"""
    return (x.float() @ w.float().T).to(x.dtype)


def lora_delta(x: Tensor, a: Tensor, b: Tensor, scale: float, row_weight: Tensor | None = None) -> Product:
    """scale * w * (x a^T) b^T. x [m, K], a [r, K], b [n, r], row_weight [m] or None.

    ``slack`` has, in quadrature over the terms of the sums, one rounding of v to the dtype (the operand of a tensor
    core) and eight fp32 roundings of each sum. The naive formula makes these roundings too, but may be lucky.
    """
    x64, a64, b64 = x.double(), a.double(), b.double()
    factor = torch.full((x.shape[0], 1), scale, dtype=torch.float64)
    v = half_matmul(x, a)
    naive = half_matmul(v, b) * scale
    if row_weight is not None:
        factor = factor * row_weight.double()[:, None]
        naive = naive * row_weight.to(x.dtype)[:, None]
    v64 = x64 @ a64.T
    exact = factor * (v64 @ b64.T)
    operand = UNIT[x.dtype] * ((v64**2) @ (b64**2).T).sqrt()
    sums = 8 * UNIT[torch.float32] * (((x64**2) @ (a64**2).T + v64**2) @ (b64**2).T).sqrt()
    return Product(exact, naive, factor.abs() * (operand + sums))


def lookup_delta(tokens: Tensor, a: Tensor, b: Tensor, scale: float) -> Product:
    """Embedding: scale * A[:, t]^T B^T. a [r, vocab]."""
    one_hot_free = a.T[tokens].contiguous()  # [m, r]
    v64, b64 = one_hot_free.double(), b.double()
    naive = half_matmul(one_hot_free, b) * scale
    operand = UNIT[a.dtype] * ((v64**2) @ (b64**2).T).sqrt()
    sums = 8 * UNIT[torch.float32] * ((v64**2) @ (b64**2).T).sqrt()
    return Product(scale * (v64 @ b64.T), naive, abs(scale) * (operand + sums))


def add(base: Tensor, delta: Product) -> Product:
    return Product(base.double() + delta.exact, base + delta.naive, delta.slack)


def rows_of(row_group: list[int], group: int) -> Tensor:
    return torch.tensor([r for r, g in enumerate(row_group) if g == group], dtype=torch.int64)


def used_groups(row_group: list[int]) -> list[int]:
    return sorted({g for g in row_group if g >= 0})


# ---------------------------------------------------------------------------------------------------------------
# Activations: act in {0 silu, 1 gelu, 2 gelu_tanh, 3 relu2, 4 swiglu_oai}, any float dtype

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3, "swiglu_oai": 4}


def activate(act: str, parts: list[Tensor], alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """parts: [u] or [gate, up]."""
    gate = parts[0]
    if act == "swiglu_oai":
        gate, up = gate.clamp(max=limit), parts[1].clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    one = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "relu2": lambda t: torch.relu(t) ** 2,
    }[act](gate)
    return one * parts[1] if len(parts) == 2 else one


# ---------------------------------------------------------------------------------------------------------------
# Comparisons


def assert_close(what: str, got: Tensor, want: Product, delta: Tensor | None = None) -> None:
    """Error of these elements at most twice that of the naive formula; non-finite masks equal.

    got, want: [m, n] of one group and slice. The bound is max(2 * naive error, floor). The floor is one rounding
    into the output (its rms over many elements, its maximum for a single one) plus want.slack; it decides only where
    the naive formula was lucky.
    delta: what LoRA added, float64; given, the error must also be below a tenth of it (a bypass cannot pass).
    """
    if got.numel() == 0:
        return
    got, exact, naive = got.cpu().double(), want.exact, want.naive.double()
    must = ~torch.isfinite(exact.to(want.naive.dtype))  # a value that overflows the dtype rounds to inf
    may = must | ~torch.isfinite(naive)
    bad = ~torch.isfinite(got)
    wrong = (must & ~bad) | (bad & ~may)
    if wrong.any():
        i, j = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: non-finite mask differs at {int(wrong.sum())} of {wrong.numel()} elements, first [{i}, {j}]: "
            f"got {got[i, j]}, want {exact[i, j]} (naive {naive[i, j]})"
        )
    use = torch.isfinite(exact) & torch.isfinite(got) & torch.isfinite(naive)
    off = torch.where(use, got - exact, 0.0)
    error = off.norm().item()
    naive_error = torch.where(use, naive - exact, 0.0).norm().item()
    size = torch.where(use, exact, 0.0)
    effective = (size**2).sum() ** 2 / (size**4).sum().clamp(min=1e-300)  # elements that make up the norm
    rounding = UNIT[want.naive.dtype] * min(1.01, 0.5 + 0.6 * max(effective.item(), 1.0) ** -0.5) * size.norm().item()
    floor = rounding + torch.where(use, want.slack, 0.0).norm().item() + tiny(want.naive.dtype) * size.numel() ** 0.5
    bound = max(2 * naive_error, floor)
    if error > bound:
        i, j = divmod(int(off.abs().argmax()), off.shape[1])
        raise AssertionError(
            f"{what}: error {error:.3e} above the bound {bound:.3e} (naive formula {naive_error:.3e}), "
            f"worst at [{i}, {j}] of {list(got.shape)}: got {got[i, j].item():.8g}, want {exact[i, j].item():.8g}"
        )
    if delta is not None and delta.numel() >= 64:
        added = torch.where(use, delta, 0.0).norm().item()
        assert error <= 0.1 * added, f"{what}: error {error:.3e} is not below a tenth of the delta {added:.3e}"


def tiny(dtype: torch.dtype) -> float:
    """Half the smallest subnormal: a rounding that is not relative."""
    return {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150}[dtype]


def bits(t: Tensor) -> Tensor:
    """A copy of t as integers, on the CPU."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}[t.element_size()]
    return t.detach().cpu().contiguous().clone().view(width)


def assert_same_bits(what: str, got: Tensor, want: Tensor, where: Tensor | None = None) -> None:
    """Bitwise equality (NaN payloads included) at ``where`` (bool, default everywhere)."""
    differ = bits(got) != bits(want)
    if where is not None:
        differ &= where
    if differ.any():
        at = differ.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: {int(differ.sum())} elements differ, first at {at}: "
            f"got {got.cpu()[tuple(at)].item()!r}, want {want.cpu()[tuple(at)].item()!r}"
        )
