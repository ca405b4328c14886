"""Model tables: which sites a model has, and which Hugging Face modules feed each of their slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["linear", "embedding", "moe_gate_up", "moe_down"]
Parallel = Literal["column", "row", "replicated", "vocab"]

# Where the decoder of one and the same language model hangs: in a text-only class, in multimodal wrappers of newer and
# older transformers, and in the remote code Nemotron-H was first published with. Longest first.
DECODER_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "backbone.", "model.")


@dataclass(frozen=True)
class Part:
    """A run of a slice's outputs that tensor parallelism cuts on its own.

    Attributes:
        width: outputs.
        units: indivisible heads or groups in it; 0 when any even cut will do.
    """

    width: int
    units: int = 0


@dataclass(frozen=True)
class Slice:
    """One output of a site. ``name`` as the field says it ("q", "k", "gate", ...), ``width`` outputs.

    Attributes:
        units: indivisible heads or groups, for tensor parallelism (fewer than ranks: replicated); 0 when any even cut
            will do.
        parts: set where one module holds several things that are cut one by one (``in_proj_qkv`` of an unfused
            table); empty otherwise.
    """

    name: str
    width: int
    units: int = 0
    parts: tuple[Part, ...] = ()

    @property
    def cuts(self) -> tuple[Part, ...]:
        """The parts tensor parallelism cuts, covering the width once."""
        return self.parts or (Part(self.width, self.units),)


@dataclass(frozen=True)
class Source:
    """A Hugging Face module (or expert parameter) that feeds consecutive slices of a site.

    Attributes:
        path: module path without ``base_model.model.``, e.g. ``model.layers.0.self_attn.q_proj``. For expert
            parameters the path of the parameter, e.g. ``model.layers.0.mlp.experts.gate_up_proj``.
        slices: names of the slices it feeds, in the order of its output rows.
    """

    path: str
    slices: tuple[str, ...]


@dataclass(frozen=True)
class Site:
    """One call of an op.

    Attributes:
        path: name of the site; the fused module's path as engines name it (``...self_attn.qkv_proj``), or the
            Hugging Face module's own path in an unfused table.
        kind: which op serves it.
        k: input width (embedding: vocabulary size).
        slices: outputs, in the order they lie in the fused output.
        sources: Hugging Face modules that feed the slices; together they cover every slice once.
        experts: number of experts; 0 for anything but MoE.
        parallel: how tensor parallelism cuts the base layer.
        gated: MoE gate/up: two slices (gate, up) instead of one.
        interleaved: gate and up rows alternate in the output (gpt-oss).
        transposed: expert parameters are stored ``[experts, in, out]`` (gpt-oss, llama4).
        peft_transposed: the experts class tells peft (``is_transposed``) that they are. Where it does not, peft takes
            the input axis for the output axis and trains A and B the other way round.
        output_scale: factor the module itself applies to its output, base and adapter alike (embeddings of Gemma in
            Hugging Face). An adapter's entries have it folded into their scale.
    """

    path: str
    kind: Kind
    k: int
    slices: tuple[Slice, ...]
    sources: tuple[Source, ...]
    experts: int = 0
    parallel: Parallel = "column"
    gated: bool = False
    interleaved: bool = False
    transposed: bool = False
    peft_transposed: bool = False
    output_scale: float = 1.0

    @property
    def width(self) -> int:
        """Outputs of all slices."""
        return sum(s.width for s in self.slices)


@dataclass(frozen=True)
class ModelTable:
    """All sites of one model.

    Attributes:
        model_type: ``config.model_type`` it was made for.
        sites: by path, in the order of the forward pass.
        feeds: module path -> the (site path, slice index) its output rows go to, in row order. Filled from the sites'
            sources; builders add the names of fused modules, which some trainers adapt directly.
        prefix: where the decoder hangs, one of ``DECODER_PREFIXES``.
        renames: (old, new) parts of module paths by which older checkpoints knew the same modules.
    """

    model_type: str
    sites: dict[str, Site]
    feeds: dict[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    prefix: str = "model."
    renames: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for site in self.sites.values():
            index = {s.name: i for i, s in enumerate(site.slices)}
            for source in site.sources:
                self.feeds[source.path] = tuple((site.path, index[name]) for name in source.slices)
            self.feeds.setdefault(site.path, tuple((site.path, i) for i in range(len(site.slices))))

    def spellings(self, path: str) -> list[str]:
        """``path`` first, then the names this table could know the same module by."""
        found = [path]
        for old, new in self.renames:
            if old in path:
                found.append(path.replace(old, new))
        for name in list(found):
            for prefix in DECODER_PREFIXES:
                if name.startswith(prefix):
                    rest = name.removeprefix(prefix)
                    found.append(rest if rest.startswith("lm_head") else self.prefix + rest)
                    break
        return found


class TableBuilder:
    """Collects the sites of one model, fused as engines run them or one a Hugging Face module.

    Args:
        model_type: for the table.
        fused: engine's modules (True) or Hugging Face's (False).
        prefix: where the decoder hangs.
    """

    def __init__(self, model_type: str, fused: bool, prefix: str):
        self.model_type = model_type
        self.fused = fused
        self.prefix = prefix
        self._sites: dict[str, Site] = {}
        self._feeds: dict[str, tuple[tuple[str, int], ...]] = {}

    def _add(self, site: Site) -> None:
        if site.path in self._sites:
            raise ValueError(f"polylora: model table {self.model_type!r}: site {site.path!r} added twice")
        self._sites[site.path] = site

    def linear(self, path: str, k: int, width: int, parallel: Parallel = "column", units: int = 0) -> None:
        """A linear layer that no engine fuses with another."""
        name = path.rpartition(".")[2]
        self._add(Site(path, "linear", k, (Slice(name, width, units),), (Source(path, (name,)),), parallel=parallel))

    def fuse(
        self,
        path: str,
        k: int,
        modules: Sequence[tuple[str, Sequence[Slice]]],
        parallel: Parallel = "column",
        also: Sequence[str] = (),
    ) -> None:
        """Linear layers with one input that engines run as one.

        Args:
            path: of the engine's module.
            k: input width.
            modules: Hugging Face modules in the order of the fused output, each with the slices it feeds.
            parallel: how the fused module is cut.
            also: other paths trainers know the fused module by.
        """
        if self.fused:
            slices = tuple(s for _, parts in modules for s in parts)
            sources = tuple(Source(source, tuple(s.name for s in parts)) for source, parts in modules)
            self._add(Site(path, "linear", k, slices, sources, parallel=parallel))
            rows = tuple((path, i) for i in range(len(slices)))
        else:
            for source, parts in modules:
                name = source.rpartition(".")[2]
                one = Slice(
                    name,
                    sum(s.width for s in parts),
                    parts[0].units if len(parts) == 1 else 0,
                    tuple(Part(s.width, s.units) for s in parts) if len(parts) > 1 else (),
                )
                self._add(Site(source, "linear", k, (one,), (Source(source, (name,)),), parallel=parallel))
            rows = tuple((source, 0) for source, _ in modules)
        for name in (path, *also):
            self._feeds[name] = rows

    def attention(self, path: str, hidden: int, heads: int, kv_heads: int, head_dim: int, q_factor: int = 1) -> None:
        """``q/k/v_proj`` and ``o_proj`` under ``path``; ``q_factor`` 2 where q carries an output gate, head by head."""
        q, kv = heads * head_dim, kv_heads * head_dim
        self.fuse(
            f"{path}.qkv_proj",
            hidden,
            [
                (f"{path}.q_proj", [Slice("q", q * q_factor, heads)]),
                (f"{path}.k_proj", [Slice("k", kv, kv_heads)]),
                (f"{path}.v_proj", [Slice("v", kv, kv_heads)]),
            ],
            also=[f"{path}.W_pack"],
        )
        self.linear(f"{path}.o_proj", q, hidden, "row")

    def gated_mlp(self, path: str, hidden: int, intermediate: int) -> None:
        """``gate_proj``, ``up_proj`` and ``down_proj`` under ``path``."""
        self.fuse(
            f"{path}.gate_up_proj",
            hidden,
            [(f"{path}.{name}_proj", [Slice(name, intermediate)]) for name in ("gate", "up")],
        )
        self.linear(f"{path}.down_proj", intermediate, hidden, "row")

    def experts(
        self,
        path: str,
        experts: int,
        hidden: int,
        intermediate: int,
        gated: bool = True,
        interleaved: bool = False,
        transposed: bool = False,
        peft_transposed: bool = False,
    ) -> None:
        """The two expert parameters of the module ``path``; the same sites in both kinds of table."""
        names = ("gate", "up") if gated else ("up",)
        up = f"{path}.gate_up_proj" if gated else f"{path}.up_proj"
        stored = {"transposed": transposed, "peft_transposed": peft_transposed}
        self._add(
            Site(
                up,
                "moe_gate_up",
                hidden,
                tuple(Slice(name, intermediate) for name in names),
                (Source(up, names),),
                experts=experts,
                gated=gated,
                interleaved=interleaved,
                **stored,
            )
        )
        down = f"{path}.down_proj"
        slices, sources = (Slice("down", hidden),), (Source(down, ("down",)),)
        self._add(Site(down, "moe_down", intermediate, slices, sources, experts=experts, parallel="row", **stored))

    def embedding(self, path: str, vocab: int, dim: int, output_scale: float = 1.0) -> None:
        """A token embedding. Engines apply Gemma's factor outside the module, so a fused table leaves it out."""
        name = path.rpartition(".")[2]
        scale = 1.0 if self.fused else output_scale
        slices, sources = (Slice(name, dim),), (Source(path, (name,)),)
        self._add(Site(path, "embedding", vocab, slices, sources, parallel="vocab", output_scale=scale))

    def build(self, renames: tuple[tuple[str, str], ...] = ()) -> ModelTable:
        """The table of what was added."""
        return ModelTable(self.model_type, self._sites, self._feeds, self.prefix, renames)


def head_dim_of(config) -> int:
    """``config.head_dim`` where the family has it, else hidden size over heads, as the Hugging Face classes do."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
