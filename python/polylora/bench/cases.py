"""Which shapes are measured: modules of real models, and cases of them by rank, rows and adapters.

A case is written ``llama8b.qkv r16 M16 a16``: module, rank of all adapters, rows, distinct adapters. Decode (up to 256
rows): row i has adapter i mod a. Prefill: a equal segments. Instead of a module's name its shape will do:
``4096->4096+1024+1024 r16 M16``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from polylora.bench.floor import floor_us

#: Rows up to which a batch counts as decode.
DECODE_ROWS = 256
#: Regimes by rows, in which means are taken: name and the largest number of rows (None: any).
REGIMES = (("M <= 32", 32), ("M 64-256", DECODE_ROWS), ("prefill", None))
MAX_RANK, MAX_SLICES = 256, 8
#: Bytes of an element of weights, x and y: 16-bit types.
ELEMENT = 2


@dataclass(frozen=True)
class Module:
    """A linear layer with its fused slices: ``k`` inputs, ``widths`` outputs of each slice."""

    name: str
    k: int
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def shape(self) -> str:
        return f"{self.k}->{'+'.join(map(str, self.widths))}"

    @property
    def is_lm_head(self) -> bool:
        return self.name.endswith(".lm_head")


def _mamba_in_proj(heads: int = 128, head_dim: int = 64, n_groups: int = 8, state: int = 128) -> tuple[int, ...]:
    """Gate, x, B, C and dt of a Mamba2 layer."""
    inner = heads * head_dim
    return inner, inner, n_groups * state, n_groups * state, heads


#: By name.
MODULES = {
    module.name: module
    for module in (
        Module("llama8b.qkv", 4096, (4096, 1024, 1024)),
        Module("llama8b.o", 4096, (4096,)),
        Module("llama8b.gate_up", 4096, (14336, 14336)),
        Module("llama8b.down", 14336, (4096,)),
        Module("qwen35moe.qkvz", 2048, (2048, 2048, 4096, 4096)),
        Module("qwen35moe.ba", 2048, (32, 32)),
        Module("deepseek.qkv_a", 7168, (1536, 576)),
        Module("nemotron3.in_proj", 4096, _mamba_in_proj()),
        Module("llama8b.lm_head", 4096, (128256,)),
        Module("qwen35moe.lm_head", 2048, (248320,)),
    )
}


def usual_adapters(rows: int) -> int:
    """Distinct adapters of a case that names none: as many as rows in decode up to 32, four in prefill."""
    return min(rows, 32) if rows <= DECODE_ROWS else 4


@dataclass(frozen=True)
class Case:
    """``rows`` rows of ``module``, ``adapters`` distinct adapters, all of ``rank``, in as many slots."""

    module: Module
    rank: int
    rows: int
    adapters: int

    def __post_init__(self) -> None:
        for what, value, top in (
            ("rank", self.rank, MAX_RANK),
            ("rows", self.rows, 2**27),
            ("adapters", self.adapters, self.rows),
            ("slices", len(self.module.widths), MAX_SLICES),
            ("inputs", self.module.k, 2**31 - 1),
            ("narrowest slice", min(self.module.widths, default=0), 2**23),
        ):
            if not 1 <= value <= top:
                raise ValueError(f"case {self.name}: {what} must be in [1, {top}], got {value}")

    @classmethod
    def parse(cls, text: str) -> Case:
        """A case from its name; ``a`` may be left out. Raises ValueError with what was expected."""
        match = re.fullmatch(r"\s*(\S+)\s+r(\d+)\s+M(\d+)(?:\s+a(\d+))?\s*", text)
        if match is None:
            raise ValueError(f"a case must look like 'llama8b.qkv r16 M16 a16' or '64->64+32 r8 M1', got {text!r}")
        name, rank, rows, adapters = match.groups()
        module = MODULES.get(name)
        if module is None:
            shape = re.fullmatch(r"(\d+)->(\d+(?:\+\d+)*)", name)
            if shape is None:
                raise ValueError(f"a module must be K->N+N or one of {', '.join(MODULES)}, got {name!r}")
            module = Module(name, int(shape[1]), tuple(map(int, shape[2].split("+"))))
        return cls(module, int(rank), int(rows), int(adapters) if adapters else usual_adapters(int(rows)))

    @property
    def name(self) -> str:
        return f"{self.module.name} r{self.rank} M{self.rows} a{self.adapters}"

    @property
    def is_decode(self) -> bool:
        return self.rows <= DECODE_ROWS

    @property
    def regime(self) -> str:
        return next(name for name, most in REGIMES if most is None or self.rows <= most)

    @property
    def weight_bytes(self) -> int:
        """A and B of all adapters, once."""
        a, b = len(self.module.widths) * self.module.k, self.module.width
        return self.adapters * self.rank * (a + b) * ELEMENT

    @property
    def xy_bytes(self) -> int:
        """x once and y twice: it is read and written."""
        return self.rows * (self.module.k + 2 * self.module.width) * ELEMENT

    @property
    def floor_us(self) -> float:
        return floor_us(self.weight_bytes, self.xy_bytes)

    def segments(self) -> list[tuple[int, int]]:
        """(rows, adapter) of each request, in the rows' order: one row each in decode, equal parts in prefill."""
        if self.is_decode:
            return [(1, row % self.adapters) for row in range(self.rows)]
        ends = [i * self.rows // self.adapters for i in range(self.adapters + 1)]
        return [(ends[i + 1] - ends[i], i) for i in range(self.adapters)]

    def slot_of_row(self) -> list[int]:
        """The slot of every row."""
        return [adapter for length, adapter in self.segments() for _ in range(length)]


def _grid(modules: Iterable[str], ranks: Iterable[int], shapes: Sequence[tuple[int, int]]) -> list[Case]:
    return [Case(MODULES[m], rank, rows, a) for m in modules for rank in ranks for rows, a in shapes]


def _usual(*rows: int) -> list[tuple[int, int]]:
    return [(m, usual_adapters(m)) for m in rows]


def _quick() -> list[Case]:
    return [
        *_grid(["llama8b.qkv"], [16], _usual(1, 16, 64, 256, 2048, 8192)),
        *_grid(["llama8b.down"], [16], _usual(1, 64, 2048)),
        *_grid(["qwen35moe.qkvz"], [64], _usual(1, 64, 2048)),
    ]


def _issue() -> list[Case]:
    modules = ("llama8b.qkv", "llama8b.down", "qwen35moe.qkvz")
    return _grid(modules, (16, 64), _usual(1, 16, 64, 256, 2048, 8192))


def _full() -> list[Case]:
    ranks = (8, 16, 32, 64, 128)
    heads = [name for name, module in MODULES.items() if module.is_lm_head]
    decode = _usual(1, 4, 8, 16, 32, 64, 128, 256)
    prefill = [(1024, 8), *((2048, a) for a in (1, 4, 8)), (4096, 4), *((8192, a) for a in (1, 4, 8))]
    layers = [name for name in MODULES if name not in heads]
    return _grid(layers, ranks, decode + prefill) + _grid(heads, ranks, _usual(1, 16, 64))


#: By name: a dozen cases; decode and prefill of three modules at two ranks; everything.
PRESETS = {"quick": _quick, "issue": _issue, "full": _full}


def select(cases: Sequence[Case], filters: Sequence[str]) -> list[Case]:
    """The cases that any filter lets through; all where there is no filter.

    All words of a filter must fit: ``r16``, ``M1`` and ``a4`` exactly, any other word as a part of the module's name.
    """

    def fits(case: Case, text: str) -> bool:
        exact = case.name.split()[1:]
        return all(w in exact if re.fullmatch(r"[rMa]\d+", w) else w in case.module.name for w in text.split())

    return [case for case in cases if not filters or any(fits(case, text) for text in filters)]
