"""Which shapes are measured: modules of real models, and cases of them by rank, rows and adapters.

A case is written ``llama8b.qkv r16 M16 a16``: module, rank of all adapters, rows, distinct adapters. Decode (up to 256
rows): row i has adapter i mod a. Prefill: a equal segments. Instead of a module's name its shape will do:
``4096->4096+1024+1024 r16 M16``, for an embedding ``vocab:128256->4096 r16 M16``. Names mean the same shapes as in the
C++ benchmarks (``csrc/bench/cases.h``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from polylora.bench.floor import floor_us

#: Rows up to which a batch counts as decode.
DECODE_ROWS = 256
#: Rows up to which a decode batch counts as small.
SMALL_ROWS = 32
#: What means are taken over: layers by rows, and what is as large as a vocabulary apart from them.
REGIMES = ("M <= 32", "M 64-256", "prefill", "lm_head", "embedding")
MAX_RANK, MAX_SLICES = 256, 8
#: Bytes of an element of weights, x and y: 16-bit types.
ELEMENT = 2
#: Bytes that memory moves at least, whatever is asked of it.
SECTOR = 32


@dataclass(frozen=True)
class Module:
    """A linear layer with its fused slices, or an embedding.

    Attributes:
        name: of the model and the module, or the shape.
        k: inputs; 0 of an embedding.
        widths: outputs of each slice; an embedding has one.
        vocab: above 0: an embedding, A is looked up by token id.
        token_major: A of the embedding is ``[vocab, rank]`` instead of ``[rank, vocab]``.
    """

    name: str
    k: int
    widths: tuple[int, ...]
    vocab: int = 0
    token_major: bool = False

    @classmethod
    def parse(cls, text: str) -> Module:
        """A module from its name or shape. Raises ValueError with what was expected."""
        if text in MODULES:
            return MODULES[text]
        if shape := re.fullmatch(r"(\d+)->(\d+(?:\+\d+)*)", text):
            return cls(text, int(shape[1]), tuple(map(int, shape[2].split("+"))))
        if shape := re.fullmatch(r"vocab:(\d+)->(\d+)(\.token_major)?", text):
            return cls(text, 0, (int(shape[2]),), int(shape[1]), bool(shape[3]))
        raise ValueError(f"a module must be K->N+N, vocab:V->N or one of {', '.join(MODULES)}, got {text!r}")

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def shape(self) -> str:
        inputs = f"vocab:{self.vocab}" if self.is_embedding else str(self.k)
        return f"{inputs}->{'+'.join(map(str, self.widths))}{'.token_major' if self.token_major else ''}"

    @property
    def is_embedding(self) -> bool:
        return self.vocab > 0

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
        Module("llama8b.embed", 0, (4096,), 128256),
        Module("qwen35moe.embed", 0, (2048,), 248320),
        Module("llama8b.embed.token_major", 0, (4096,), 128256, True),
        Module("qwen35moe.embed.token_major", 0, (2048,), 248320, True),
    )
}


def check_ranges(case: str, *ranges: tuple[str, int, int]) -> None:
    """Raises ValueError where one of ``(what, value, top)`` has a value outside [1, top]."""
    for what, value, top in ranges:
        if not 1 <= value <= top:
            raise ValueError(f"case {case}: {what} must be in [1, {top}], got {value}")


def regime_of(rows: int) -> str:
    """The one of :data:`REGIMES` that a layer with so many rows belongs to."""
    return "M <= 32" if rows <= SMALL_ROWS else "M 64-256" if rows <= DECODE_ROWS else "prefill"


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
        module = self.module
        inputs = ("vocabulary", module.vocab) if module.is_embedding else ("inputs", module.k)
        check_ranges(
            self.name,
            ("rank", self.rank, MAX_RANK),
            ("rows", self.rows, 2**27),
            ("adapters", self.adapters, self.rows),
            ("slices", len(module.widths), 1 if module.is_embedding else MAX_SLICES),
            (*inputs, 2**31 - 1),
            ("narrowest slice", min(module.widths, default=0), 2**23),
        )

    @classmethod
    def parse(cls, text: str) -> Case:
        """A case from its name; ``a`` may be left out. Raises ValueError with what was expected."""
        match = re.fullmatch(r"\s*(\S+)\s+r(\d+)\s+M(\d+)(?:\s+a(\d+))?\s*", text)
        if match is None:
            raise ValueError(f"a case must look like 'llama8b.qkv r16 M16 a16' or '64->64+32 r8 M1', got {text!r}")
        name, rank, rows, adapters = match.groups()
        return cls(Module.parse(name), int(rank), int(rows), int(adapters) if adapters else usual_adapters(int(rows)))

    @property
    def name(self) -> str:
        return f"{self.module.name} r{self.rank} M{self.rows} a{self.adapters}"

    @property
    def is_decode(self) -> bool:
        return self.rows <= DECODE_ROWS

    @property
    def regime(self) -> str:
        """The one of :data:`REGIMES` whose means the case counts in."""
        if self.module.is_embedding:
            return "embedding"
        if self.module.is_lm_head:
            return "lm_head"
        return regime_of(self.rows)

    @property
    def weight_bytes(self) -> int:
        """What a call needs of all adapters, once: A and B.

        Of an embedding's A, what memory moves for it: a sector an element, or the sectors of a row where A is
        token-major.
        """
        module = self.module
        b = self.adapters * self.rank * module.width * ELEMENT
        if not module.is_embedding:
            return b + self.adapters * self.rank * len(module.widths) * module.k * ELEMENT
        sectors = -(-self.rank * ELEMENT // SECTOR) if module.token_major else self.rank
        return b + self.rows * sectors * SECTOR

    @property
    def set_bytes(self) -> int:
        """A and B of all adapters as they lie in memory: an embedding's A whole."""
        module = self.module
        return self.adapters * self.rank * (len(module.widths) * (module.k + module.vocab) + module.width) * ELEMENT

    @property
    def xy_bytes(self) -> int:
        """Moved: x once and y twice, as it is read and written."""
        return self.rows * (self.module.k + 2 * self.module.width) * ELEMENT

    @property
    def footprint(self) -> int:
        """Bytes that x and y take."""
        return self.rows * (self.module.k + self.module.width) * ELEMENT

    @property
    def floor_us(self) -> float:
        return floor_us(self.weight_bytes, self.xy_bytes, self.footprint)

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


#: Rows of an lm_head: of decode, and the last ones of a few prompts. Rows of an embedding in the shorter presets.
_HEAD_ROWS, _EMBEDDING_ROWS = (1, 16, 64), (1, 64, 2048)
_HEADS = [name for name, module in MODULES.items() if module.is_lm_head]
_EMBEDDINGS = [name for name, module in MODULES.items() if module.is_embedding]
_LAYERS = [name for name in MODULES if name not in _HEADS + _EMBEDDINGS]


def _quick() -> list[Case]:
    return [
        *_grid(["llama8b.qkv"], [16], _usual(1, 16, 64, 256, 2048, 8192)),
        *_grid(["llama8b.down"], [16], _usual(1, 64, 2048)),
        *_grid(["qwen35moe.qkvz"], [64], _usual(1, 64, 2048)),
    ]


def _issue() -> list[Case]:
    modules = ("llama8b.qkv", "llama8b.down", "qwen35moe.qkvz")
    return [
        *_grid(modules, (16, 64), _usual(1, 16, 64, 256, 2048, 8192)),
        *_grid(_HEADS, [16], _usual(*_HEAD_ROWS)),
        *_grid(("llama8b.embed", "qwen35moe.embed"), [16], _usual(*_EMBEDDING_ROWS)),
    ]


def _full() -> list[Case]:
    ranks = (8, 16, 32, 64, 128)
    decode = _usual(1, 4, 8, 16, 32, 64, 128, 256)
    prefill = [(1024, 8), *((2048, a) for a in (1, 4, 8)), (4096, 4), *((8192, a) for a in (1, 4, 8))]
    return [
        *_grid(_LAYERS, ranks, decode + prefill),
        *_grid(_HEADS, ranks, _usual(*_HEAD_ROWS)),
        *_grid(_EMBEDDINGS, ranks, _usual(1, 16, 64, 256, 2048, 8192)),
    ]


#: By name: a dozen cases; decode and prefill of three modules at two ranks, lm_heads and embeddings; everything.
PRESETS = {"quick": _quick, "issue": _issue, "full": _full}


def select(cases: Sequence[Case], filters: Sequence[str]) -> list[Case]:
    """The cases that any filter lets through; all where there is no filter.

    All words of a filter must fit: ``r16``, ``M1`` and ``a4`` exactly, any other word as a part of the module's name.
    """

    def fits(case: Case, text: str) -> bool:
        exact = case.name.split()[1:]
        return all(w in exact if re.fullmatch(r"[rMa]\d+", w) else w in case.module.name for w in text.split())

    return [case for case in cases if not filters or any(fits(case, text) for text in filters)]
