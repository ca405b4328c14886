"""Which MoE layers are measured: the experts of real models, and cases of them by rank and tokens.

A case is written ``qwen35-35b r16 M16``: model, rank of all adapters, tokens. There are :data:`SLOTS` adapters; up to
:data:`SEGMENTED_ROWS` tokens token i has adapter i mod 8, from there on there are four equal segments. Every token goes
to ``top_k`` distinct experts, all equally likely. Instead of a model's name its shape will do:
``moe:64x32,e8,k2,silu,gated r8 M5`` is hidden size 64, 32 wide experts, 8 of them, 2 a token. ``qwen35-35b r16 M16
outer``: all experts share an adapter's outer halves, A of gate and up and B of down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from polylora.bench.cases import DECODE_ROWS, ELEMENT, MAX_RANK, check_ranges, regime_of

#: Adapters.
SLOTS = 8
#: Tokens from which on there are segments, and how many.
SEGMENTED_ROWS, SEGMENTS = 2048, 4
#: Bytes a us at which the floor reads weights: what an H100 streams.
FLOOR_RATE = 3.0e6
#: Activations that are measured, by the names of :data:`polylora.ops.ACTIVATIONS`.
ACTIVATIONS = ("silu", "relu2", "swiglu_oai")


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer.

    Attributes:
        name: of the model, or the shape.
        hidden: width of the layer's input and output, H (a latent MoE's latent width).
        inner: width of an expert, I.
        experts: how many, E.
        top_k: experts a token.
        act: activation.
        gated: gate and up, or up alone.
        interleaved: gate and up alternate in the columns.
    """

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    act: str = "silu"
    gated: bool = True
    interleaved: bool = False

    @classmethod
    def parse(cls, text: str) -> Experts:
        """Experts from a model's name or a shape. Raises ValueError with what was expected."""
        if text in MODELS:
            return MODELS[text]
        shape = re.fullmatch(r"moe:(\d+)x(\d+),e(\d+),k(\d+),(\w+?)(,gated)?(,interleaved)?", text)
        if shape is None or shape[5] not in ACTIVATIONS:
            forms = f"moe:HxI,eE,kK,ACT[,gated[,interleaved]] with ACT of {', '.join(ACTIVATIONS)}"
            raise ValueError(f"a model must be {forms}, or one of {', '.join(MODELS)}, got {text!r}")
        return cls(text, *map(int, shape.group(1, 2, 3, 4)), shape[5], bool(shape[6]), bool(shape[7]))

    @property
    def slices(self) -> int:
        return 2 if self.gated else 1

    @property
    def base_bytes(self) -> int:
        """The base weights of one expert."""
        return (self.slices + 1) * self.inner * self.hidden * ELEMENT


#: By name.
MODELS = {
    model.name: model
    for model in (
        Experts("qwen35-35b", 2048, 512, 256, 8),
        Experts("nemotron3-super", 1024, 2688, 512, 22, "relu2", gated=False),
        Experts("qwen35-397b", 4096, 1024, 512, 10),
        Experts("kimi-k25", 7168, 2048, 384, 8),
        Experts("gptoss-120b", 2880, 2880, 128, 4, "swiglu_oai", interleaved=True),
    )
}


@dataclass(frozen=True)
class MoeCase:
    """``rows`` tokens through ``model`` with :data:`SLOTS` adapters of ``rank``, whose experts share A of gate and up
    and B of down where ``outer`` is set."""

    model: Experts
    rank: int
    rows: int
    outer: bool = False

    def __post_init__(self) -> None:
        model = self.model
        check_ranges(
            self.name,
            ("rank", self.rank, MAX_RANK),
            ("rows", self.rows, 2**20),
            ("hidden size", model.hidden, 2**20),
            ("experts' width", model.inner, 2**20),
            ("experts", model.experts, 2**15),
            ("experts a token", model.top_k, model.experts),
        )
        if model.act == "swiglu_oai" and not model.gated:
            raise ValueError(f"case {self.name}: swiglu_oai must be gated")

    @classmethod
    def parse(cls, text: str) -> MoeCase:
        """A case from its name. Raises ValueError with what was expected."""
        match = re.fullmatch(r"\s*(\S+)\s+r(\d+)\s+M(\d+)(\s+outer)?\s*", text)
        if match is None:
            raise ValueError(f"a case must look like 'qwen35-35b r16 M16' or 'qwen35-35b r16 M16 outer', got {text!r}")
        return cls(Experts.parse(match[1]), int(match[2]), int(match[3]), bool(match[4]))

    @property
    def name(self) -> str:
        return f"{self.model.name} r{self.rank} M{self.rows}{' outer' if self.outer else ''}"

    @property
    def module(self) -> Experts:
        """The model, under the name that :func:`polylora.bench.cases.select` looks at."""
        return self.model

    @property
    def is_decode(self) -> bool:
        return self.rows <= DECODE_ROWS

    @property
    def regime(self) -> str:
        """The one of :data:`polylora.bench.cases.REGIMES` whose means the case counts in."""
        return regime_of(self.rows)

    @property
    def pairs(self) -> int:
        """(token, expert) pairs."""
        return self.rows * self.model.top_k

    @property
    def half_bytes(self) -> tuple[int, int]:
        """A and B of one adapter in one expert, less what all experts share: of gate and up, of down."""
        model, own = self.model, 0 if self.outer else self.model.hidden
        up = self.rank * model.slices * (own + model.inner) * ELEMENT
        return up, self.rank * (model.inner + own) * ELEMENT

    @property
    def shared_bytes(self) -> int:
        """What all experts share of one adapter, of both halves."""
        return self.rank * (self.model.slices + 1) * self.model.hidden * ELEMENT if self.outer else 0

    @property
    def pool_bytes(self) -> int:
        """A and B of all adapters in all experts."""
        return SLOTS * (self.model.experts * sum(self.half_bytes) + self.shared_bytes)

    @property
    def buffer_bytes(self) -> int:
        """x, out, and what lies between the stages, twice where torch's grouped GEMM makes results of its own."""
        model = self.model
        between = 2 * self.pairs * (model.slices * model.inner + model.inner + 2 * model.hidden)
        return (between + 2 * self.rows * model.hidden) * ELEMENT

    def memory_bytes(self, pools: int = 1) -> int:
        """What the base layer, ``pools`` pools of adapters and the buffers take."""
        return self.model.experts * self.model.base_bytes + pools * self.pool_bytes + self.buffer_bytes

    def requests(self, turn: int = 0) -> list[tuple[int, int]]:
        """(tokens, adapter) of each request, in the tokens' order. ``turn``: the adapters, moved on by so many."""
        if self.rows < SEGMENTED_ROWS:
            return [(1, (row + turn) % SLOTS) for row in range(self.rows)]
        ends = [i * self.rows // SEGMENTS for i in range(SEGMENTS + 1)]
        return [(ends[i + 1] - ends[i], (i + turn) % SLOTS) for i in range(SEGMENTS)]

    def floor_us(self, weight_bytes: float) -> float:
        """us to read so many bytes of weights at :data:`FLOOR_RATE`."""
        return weight_bytes / FLOOR_RATE


def _grid(models: Iterable[str], ranks: Iterable[int], rows: Iterable[int]) -> list[MoeCase]:
    rows = list(rows)
    return [MoeCase(MODELS[model], rank, m) for model in models for rank in ranks for m in rows]


#: us that the ops may add on an H100, by case: the bars of the preset ``issue``.
BARS = {
    f"{model} r{rank} M{rows}": bar
    for model, rank, bars in (
        ("qwen35-35b", 16, {1: 5.0, 16: 12.5, 64: 42.0, 256: 125.0, 2048: 150.0}),
        ("qwen35-35b", 64, {1: 6.5, 16: 44.5, 64: 158.0, 256: 445.0, 2048: 420.0}),
        ("nemotron3-super", 16, {1: 6.0, 16: 31.0, 64: 108.0, 256: 300.0, 2048: 260.0}),
        ("nemotron3-super", 64, {1: 11.0, 16: 117.0, 64: 415.0, 256: 1100.0}),
    )
    for rows, bar in bars.items()
}


def _quick() -> list[MoeCase]:
    return _grid(["qwen35-35b"], [16], (1, 16, 64, 256))


def _issue() -> list[MoeCase]:
    return [MoeCase.parse(name) for name in BARS]


def _full() -> list[MoeCase]:
    return _grid(MODELS, (16, 64), (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384))


#: By name: four cases of one model; the documented ones, which have bars; every model.
PRESETS = {"quick": _quick, "issue": _issue, "full": _full}
