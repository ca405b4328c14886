"""From tensors by name to weights by site: every tensor finds its slices, or the adapter is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from polylora.models.base import ModelTable, Site

from .config import MAX_RANK
from .errors import AdapterError
from .peft_reader import KEY_PREFIX, PeftAdapter, read_with_problems
from .weights import AdapterWeights, Entry, SiteWeights

# Some trainers save the raw state dict, with peft's adapter name still in the keys.
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<emb>embedding_)?(?P<half>[AB])(?:\.default)?(?:\.weight)?")
_EXPERT_PATH = re.compile(r"(?P<experts>.+)\.(?P<expert>\d{1,6})\.(?P<leaf>\w+)")

# What the projections of experts are called: by Hugging Face, by Mixtral, and fused.
_EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj", "w1", "w3", "w2", "gate_up_proj")

# From peft 0.19 on, A of an expert parameter reads the module's input. Before, A lay along the parameter's first axis
# after the experts, whatever that was.
_PEFT_KNOWS_AXES = (0, 19)

# Keys that are no LoRA pair, by a part of their name, and what they mean.
_FOREIGN = (
    ("lora_magnitude_vector", "a DoRA magnitude"),
    ("modules_to_save", "a whole copy of a base module"),
    ("trainable_tokens", "retrained embedding rows"),
    ("lora_diag", "a KaSA diagonal"),
    ("bias", "a bias"),
    ("weight", "a whole base weight"),
)


def load_adapter(path: str | os.PathLike, table: ModelTable, name: str | None = None) -> AdapterWeights:
    """Read a PEFT folder and bind it to a model.

    Args:
        path: the folder.
        table: the model's sites (:func:`polylora.models.model_table`).
        name: of the adapter; the folder's name when None.

    Returns:
        The adapter's weights by site, as :func:`bind` describes them.

    Raises:
        AdapterError: as :func:`read_peft` and :func:`bind`; problems of both are in one list.
    """
    adapter, problems = read_with_problems(path, name)
    bound, more = _bind(adapter, table)
    if problems or more:
        raise AdapterError(adapter.name, problems + more)
    return bound


def bind(adapter: PeftAdapter, table: ModelTable) -> AdapterWeights:
    """Give every tensor of an adapter its place in a model.

    Args:
        adapter: from :func:`read_peft`.
        table: fused or unfused; an adapter trained on either kind of module binds to both.

    Returns:
        For each site the adapter touches: the distinct A matrices ``[rank, k]`` (equal ones once, so shrink computes
        them once) and, an expert and a slice, an entry with B ``[width, rank]`` in the adapter's dtype and the scale;
        ``None`` for slices it does not touch. Embeddings: A ``[rank, vocab]``. Tensors may be views of the adapter's.

    Raises:
        AdapterError: tensors that match no site or meet another's slice, halves without the other, wrong ranks and
            shapes, expert tensors that fit more than one parameter, an adapter without weights. All are listed.
    """
    bound, problems = _bind(adapter, table)
    if problems:
        raise AdapterError(adapter.name, problems)
    return bound


@dataclass
class _Pair:
    """A and B of one module: keys and tensors. ``path`` is the module as the adapter spells it."""

    path: str
    keys: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    embedding: bool = False

    def named(self, half: str) -> str:
        return f"tensor {KEY_PREFIX + self.keys[half]!r}"


def _bind(adapter: PeftAdapter, table: ModelTable) -> tuple[AdapterWeights, list[str]]:
    binder = _Binder(adapter, table)
    binder.run()
    return AdapterWeights(adapter.name, binder.finish()), binder.problems


class _Binder:
    def __init__(self, adapter: PeftAdapter, table: ModelTable):
        self.adapter, self.table, self.config = adapter, table, adapter.config
        self.problems: list[str] = []
        # site path -> (expert, slice) -> (A, B, scale)
        self.found: dict[str, dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, float]]] = {}
        # experts module -> its sites, gate/up first
        self.experts: dict[str, dict[str, Site]] = {}
        for site in table.sites.values():
            if site.experts:
                self.experts.setdefault(site.sources[0].path.rpartition(".")[0], {})[site.kind] = site

    def run(self) -> None:
        pairs = self._pairs()
        self._check_base_weights(pairs)
        if not pairs and not self.problems:
            targets = self.config.raw.get("target_modules") or list(self.config.target_parameters)
            self.problems.append(f"no weights: expected lora_A and lora_B tensors for {targets!r:.200}, got none")
        for pair in pairs.values():
            missing = [half for half in "AB" if half not in pair.tensors]
            if missing:
                (there,) = pair.keys
                self._problem(f"{pair.named(there)} is alone: expected lora_{missing[0]} beside it, got none")
            elif pair.embedding:
                self._embedding(pair)
            elif pair.tensors["A"].ndim == 3 or pair.tensors["B"].ndim == 3:
                self._stacked_experts(pair)
            else:
                self._matrices(pair)
        if self.config.ensure_weight_tying:
            self._check_tying()

    def finish(self) -> dict[str, SiteWeights]:
        """The collected weights, in the table's order, equal A matrices of a site merged."""
        bound = {}
        if self.problems:
            return bound
        for path, site in self.table.sites.items():
            if path not in self.found:
                continue
            distinct = _DistinctA()
            rows = [[None] * len(site.slices) for _ in range(site.experts or 1)]
            for (expert, index), (a, b, scale) in sorted(self.found[path].items(), key=lambda item: item[0]):
                rows[expert][index] = Entry(distinct.index(a), b, scale * site.output_scale)
            bound[path] = SiteWeights(distinct.matrices, rows)
        return bound

    def _problem(self, text: str) -> None:
        self.problems.append(text)

    # -- sorting keys ------------------------------------------------------------------------------------------------

    def _pairs(self) -> dict[tuple[str, bool], _Pair]:
        pairs: dict[tuple[str, bool], _Pair] = {}
        for key, tensor in self.adapter.tensors.items():
            match = _LORA_KEY.fullmatch(key)
            if not match:
                named = f"tensor {KEY_PREFIX + key!r}"
                what = next((text for part, text in _FOREIGN if part in key), "something else")
                self._problem(f"{named} is no LoRA weight: expected lora_A or lora_B, got {what}")
                continue
            pair = pairs.setdefault((match["module"], bool(match["emb"])), _Pair(match["module"]))
            pair.embedding = bool(match["emb"])
            if match["half"] in pair.keys:
                other = KEY_PREFIX + pair.keys[match["half"]]
                self._problem(f"tensor {KEY_PREFIX + key!r} is there twice: expected one, got {other!r} too")
            pair.keys[match["half"]], pair.tensors[match["half"]] = key, tensor
        return pairs

    def _check_base_weights(self, pairs) -> None:
        """Whole matrices saved beside adapted embeddings: only there, and only of the base's own shape."""
        adapted = {path for path, _ in pairs}
        for key, shape in self.adapter.base_weights.items():
            path = key.removesuffix(".base_layer.weight")
            site = self._vocabulary_site(path)
            named = f"tensor {KEY_PREFIX + key!r}"
            if site is None:
                self._problem(f"{named} is no LoRA weight: expected lora_A or lora_B, got a whole base weight")
                continue
            dims = (site.k, site.width) if site.kind == "embedding" else (site.width, site.k)
            if shape != dims:
                self._problem(f"{named} has the wrong shape: expected {list(dims)} (the base), got {list(shape)}")
            elif path not in adapted:
                self._problem(f"{named} replaces a base weight: expected an adapter of that module, got none")

    def _vocabulary_site(self, path: str) -> Site | None:
        feeds = self._feeds(path)
        site = self.table.sites[feeds[0][0]] if feeds and len(feeds) == 1 else None
        return site if site is not None and site.parallel == "vocab" else None

    def _feeds(self, path: str) -> tuple[tuple[str, int], ...] | None:
        return next((self.table.feeds[p] for p in self.table.spellings(path) if p in self.table.feeds), None)

    def _experts(self, path: str) -> tuple[str, dict[str, Site]] | None:
        return next(((p, self.experts[p]) for p in self.table.spellings(path) if p in self.experts), None)

    def _check_tying(self) -> None:
        """With tied adapters the head follows the embedding; a file with only one of them leaves the other out."""
        sites = [s for s in self.table.sites.values() if s.parallel == "vocab"]
        there = [s.path for s in sites if s.path in self.found]
        if there and len(there) != len(sites):
            expected = " and ".join(s.path for s in sites)
            self._problem(f"config key 'ensure_weight_tying': expected weights of {expected}, got {there[0]} only")

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_rank(self, pair: _Pair, path: str, rank: int, targeted: bool, is_module: bool = True) -> bool:
        expected = self.config.rank(path)
        # peft leaves layers and modules out only where it looks for modules, not for target_parameters.
        excluded = self.config.excludes(path) if is_module else None
        if not targeted:
            # peft makes no adapter there and ignores what the file has for it.
            keys = [key for key in ("target_modules", "target_parameters") if self.config.raw.get(key)]
            excluded = f"not in {' or '.join(keys or ['target_modules'])}"
        if excluded:
            self._problem(f"{pair.named('A')} contradicts the config: expected no weights ({excluded}), got some")
        elif rank > MAX_RANK:
            self._problem(f"{pair.named('A')} has too high a rank: expected at most {MAX_RANK}, got {rank}")
        elif rank != expected:
            self._problem(f"{pair.named('A')} has the wrong rank: expected {expected} (config), got {rank}")
        else:
            return True
        return False

    def _is_targeted(self, path: str, site: Site) -> bool:
        """Whether the config names the module at ``path``, as the adapter or as the table spells it."""
        if any(self.config.targets(name, site.kind != "embedding") for name in self.table.spellings(path)):
            return True
        if site.parallel != "vocab" or not self.config.ensure_weight_tying:
            return False
        ends = [s for s in self.table.sites.values() if s.parallel == "vocab"]
        return any(self.config.targets(s.path, s.kind != "embedding") for s in ends)

    def _are_experts_targeted(self, parent: str, site: Site, slices: Sequence[int], expert: int = 0) -> bool:
        """Whether the config names these slices of the experts module ``parent``, by any of the names they have had:
        one module an expert before transformers 5, a parameter since, which newer peft takes the old names for."""
        if not self.config.says_targets:
            return True
        named: set[int] = set()
        _, sites = self._experts(parent)
        for leaf in _EXPERT_LEAVES:
            place = self._expert_slices(sites, leaf)
            if place is None or place[0] is not site or named.issuperset(place[1]):
                continue
            spelled = [f"{p}{middle}.{leaf}" for p in self.table.spellings(parent) for middle in (f".{expert}", "")]
            if any(self.config.targets(name) or self.config.targets_parameter(name) for name in spelled):
                named.update(place[1])
        return named.issuperset(slices)

    def _check_shapes(self, pair: _Pair, expected: dict[str, tuple[int, ...]]) -> bool:
        good = True
        for half, shape in expected.items():
            got = tuple(pair.tensors[half].shape)
            if got != shape:
                named = pair.named(half)
                self._problem(f"{named} has the wrong shape: expected {list(shape)}, got {list(got)}")
                good = False
        return good

    def _unmatched(self, pair: _Pair) -> None:
        for half in "AB":
            expected = f"a module of {self.table.model_type} that takes an adapter"
            self._problem(f"{pair.named(half)} matches no site: expected {expected}, got {pair.path!r}")

    def _add(self, pair: _Pair, site: Site, expert: int, index: int, a: torch.Tensor, b: torch.Tensor, path: str):
        place = self.found.setdefault(site.path, {})
        if (expert, index) in place:
            what = f"slice {site.slices[index].name!r} of {site.path}" + (f", expert {expert}" if site.experts else "")
            self._problem(f"{pair.named('B')} meets another tensor: expected one adapter of {what}, got two")
        place[expert, index] = (a, b, self.config.scale(path))

    # -- formats -----------------------------------------------------------------------------------------------------

    def _embedding(self, pair: _Pair) -> None:
        """``lora_embedding_A [r, vocab]``, ``lora_embedding_B [dim, r]``."""
        feeds = self._feeds(pair.path)
        site = self.table.sites[feeds[0][0]] if feeds else None
        if site is None or site.kind != "embedding":
            self._unmatched(pair)
            return
        rank = pair.tensors["A"].shape[0]
        if self._check_shapes(pair, {"A": (rank, site.k), "B": (site.width, rank)}) and self._check_rank(
            pair, pair.path, rank, self._is_targeted(pair.path, site)
        ):
            self._add(pair, site, 0, 0, pair.tensors["A"], pair.tensors["B"].contiguous(), pair.path)

    def _matrices(self, pair: _Pair) -> None:
        """``lora_A`` and ``lora_B`` with two dimensions: a linear, one expert, or all experts flattened by peft."""
        if any(t.ndim != 2 for t in pair.tensors.values()):
            a, b = (list(pair.tensors[half].shape) for half in "AB")
            self._problem(f"{pair.named('A')} has the wrong shape: expected two dimensions, got {a} (A) and {b} (B)")
            return
        inner = pair.path.endswith(".base_layer")
        experts = self._experts(pair.path.removesuffix(".base_layer"))
        match = _EXPERT_PATH.fullmatch(pair.path)
        one_of = self._experts(match["experts"]) if match else None
        feeds = self._feeds(pair.path)
        if experts:
            self._flattened_experts(pair, experts[0], experts[1], inner)
        elif one_of:
            self._one_expert(pair, match["experts"], one_of[1], int(match["expert"]), match["leaf"])
        elif feeds and self.table.sites[feeds[0][0]].kind == "linear":
            self._linear(pair, feeds)
        else:
            self._unmatched(pair)

    def _linear(self, pair: _Pair, feeds: tuple[tuple[str, int], ...]) -> None:
        """A module that feeds one slice or several: A goes to each as it is, B is cut by rows."""
        places = [(self.table.sites[path], index) for path, index in feeds]
        rank, k = pair.tensors["A"].shape[0], places[0][0].k
        widths = [site.slices[index].width for site, index in places]
        if self._check_shapes(pair, {"A": (rank, k), "B": (sum(widths), rank)}) and self._check_rank(
            pair, pair.path, rank, self._is_targeted(pair.path, places[0][0])
        ):
            for (site, index), b in zip(places, pair.tensors["B"].contiguous().split(widths), strict=True):
                self._add(pair, site, 0, index, pair.tensors["A"], b, pair.path)

    def _expert_slices(self, sites: dict[str, Site], leaf: str) -> tuple[Site, tuple[int, ...]] | None:
        """Site and slices that ``leaf`` names: HF's and Mixtral's names, w1 being what is not multiplied by."""
        gate_up, down = sites["moe_gate_up"], sites["moe_down"]
        if leaf in ("down_proj", "w2"):
            return down, (0,)
        gated = {"gate_proj": (0,), "w1": (0,), "up_proj": (1,), "w3": (1,), "gate_up_proj": (0, 1)}
        slices = gated.get(leaf) if gate_up.gated else {"up_proj": (0,), "w1": (0,)}.get(leaf)
        return (gate_up, slices) if slices else None

    def _one_expert(self, pair: _Pair, parent: str, sites: dict[str, Site], expert: int, leaf: str) -> None:
        """``...experts.{e}.{gate,up,down}_proj``; ``gate_up_proj`` has its rows as the parameter has."""
        place = self._expert_slices(sites, leaf)
        if place is None or expert >= place[0].experts:
            self._unmatched(pair)
            return
        site, slices = place
        rank = pair.tensors["A"].shape[0]
        widths = [site.slices[index].width for index in slices]
        if self._check_shapes(pair, {"A": (rank, site.k), "B": (sum(widths), rank)}) and self._check_rank(
            pair, pair.path, rank, self._are_experts_targeted(parent, site, slices, expert)
        ):
            for index, b in zip(slices, _split(site, slices, pair.tensors["B"].contiguous()), strict=True):
                self._add(pair, site, expert, index, pair.tensors["A"], b, pair.path)

    def _stacked_experts(self, pair: _Pair) -> None:
        """``...experts.w1.lora_A [E or 1, r, in]``, ``lora_B [E or 1, out, r]``: 1 is shared by all experts."""
        parent, _, leaf = pair.path.rpartition(".")
        experts = self._experts(parent)
        place = self._expert_slices(experts[1], leaf) if experts else None
        if place is None:
            self._unmatched(pair)
            return
        site, slices = place
        a, b = pair.tensors["A"], pair.tensors["B"]
        widths = [site.slices[index].width for index in slices]
        counts = {half: t.shape[0] if t.shape[0] == 1 else site.experts for half, t in pair.tensors.items()}
        rank = a.shape[1] if a.ndim == 3 else self.config.rank(pair.path)
        shapes = {"A": (counts["A"], rank, site.k), "B": (counts["B"], sum(widths), rank)}
        if not self._check_shapes(pair, shapes):
            return
        if not self._check_rank(pair, pair.path, rank, self._are_experts_targeted(parent, site, slices)):
            return
        b = b.contiguous()
        for expert in range(site.experts):
            one_a, one_b = a[min(expert, counts["A"] - 1)], b[min(expert, counts["B"] - 1)]
            for index, part in zip(slices, _split(site, slices, one_b), strict=True):
                self._add(pair, site, expert, index, one_a, part, pair.path)

    def _flattened_experts(self, pair: _Pair, path: str, sites: dict[str, Site], inner: bool) -> None:
        """peft's ``target_parameters``: A ``[experts * r, in]`` by expert, then rank; B ``[out, r * experts]`` by rank.

        Two parameters of one module nest: gate_up (the first that the module defines) inside, down outside. One alone
        is not nested, so its position does not tell which it is.
        """
        spelled = pair.path.removesuffix(".base_layer")
        nested = inner or any(f"{spelled}.base_layer.lora_A" in key for key in self.adapter.tensors)
        if nested:
            candidates = [sites["moe_gate_up" if inner else "moe_down"]]
        else:
            candidates = self._targeted(spelled, list(sites.values()))
        fits = [fit for site in candidates for fit in self._fits(pair, spelled, site)]
        if len(fits) > 1:
            # Both orientations fit a square parameter; who wrote it decides.
            fits = [(site, swapped) for site, swapped in fits if swapped == self._is_swapped(site)]
        if len(fits) == 1:
            self._add_flattened(pair, spelled, *fits[0])
            return
        a, b = (list(pair.tensors[half].shape) for half in "AB")
        got = f"{a} (A) and {b} (B)"
        leaves = [site.path.rpartition(".")[2] for site in candidates]
        if fits or self._ambiguous(pair, spelled, candidates):
            hint = "target_parameters and peft_version in the config to tell which parameter and which way round"
            self._problem(f"{pair.named('A')} is ambiguous: expected {hint}, got {got}, which fit more than one way")
            return
        expected = []
        for site, leaf in zip(candidates, leaves, strict=True):
            rows = self.config.rank(f"{spelled}.{leaf}") * site.experts
            expected.append(f"[{rows}, {site.k}] (A) and [{site.width}, {rows}] (B) for {leaf}")
        self._problem(f"{pair.named('A')} has the wrong shape: expected {' or '.join(expected)}, got {got}")

    def _targeted(self, spelled: str, sites: list[Site]) -> list[Site]:
        """Those of an experts module's parameters that the config names; all where it names none."""

        def is_named(site: Site) -> bool:
            return self.config.targets_parameter(f"{spelled}.{site.path.rpartition('.')[2]}")

        return [site for site in sites if is_named(site)] or sites

    def _fits(self, pair: _Pair, spelled: str, site: Site) -> Iterator[tuple[Site, bool]]:
        """(site, swapped) for both orientations of the parameter that the pair's shapes fit."""
        path = f"{spelled}.{site.path.rpartition('.')[2]}"
        rows = self.config.rank(path) * site.experts
        for swapped, (k, width) in ((False, (site.k, site.width)), (True, (site.width, site.k))):
            if pair.tensors["A"].shape == (rows, k) and pair.tensors["B"].shape == (width, rows):
                yield site, swapped

    def _ambiguous(self, pair: _Pair, spelled: str, candidates: list[Site]) -> bool:
        """Several fit, and no peft version to choose by."""
        return sum(1 for site in candidates for _ in self._fits(pair, spelled, site)) > 1

    def _is_swapped(self, site: Site) -> bool | None:
        """Whether the peft that wrote the adapter took the parameter's output axis for its input; None: unknown."""
        version = self.config.peft_version
        if version is None:
            return None
        if version < _PEFT_KNOWS_AXES:
            return not site.transposed
        return site.transposed and not site.peft_transposed

    def _add_flattened(self, pair: _Pair, spelled: str, site: Site, swapped: bool) -> None:
        path = f"{spelled}.{site.path.rpartition('.')[2]}"
        rank = self.config.rank(path)
        # A file's shapes alone may tell which parameter it is of.
        targeted = not self.config.target_parameters
        targeted = targeted or self._are_experts_targeted(spelled, site, range(len(site.slices)))
        if not self._check_rank(pair, path, rank, targeted, is_module=False):
            return
        a, b = pair.tensors["A"], pair.tensors["B"]
        # [experts, rank, in] and [experts, out, rank]
        a, b = a.reshape(site.experts, rank, -1), b.reshape(b.shape[0], rank, site.experts).permute(2, 0, 1)
        if swapped:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        a, b = a.contiguous(), b.contiguous()
        parts = _split(site, range(len(site.slices)), b)
        for expert in range(site.experts):
            for index, part in enumerate(parts):
                self._add(pair, site, expert, index, a[expert], part[expert], path)


def _split(site: Site, slices: Sequence[int], b: torch.Tensor) -> Sequence[torch.Tensor]:
    """B ``[..., rows, rank]`` of several slices of a site, cut into theirs: side by side, or every other row."""
    if site.interleaved and len(slices) > 1:
        return [b[..., i :: len(slices), :].contiguous() for i in slices]
    return b.split([site.slices[index].width for index in slices], dim=-2)


class _DistinctA:
    """A matrices of one site, equal ones once: exports repeat the A of a fused module for each of its slices."""

    def __init__(self):
        self.matrices: list[torch.Tensor] = []
        self._seen: dict[tuple, list[int]] = {}

    def index(self, a: torch.Tensor) -> int:
        """Index of ``a``, added when no equal one is there."""
        a = a.contiguous()
        # A short fingerprint first; comparing whole matrices with one another would be quadratic in the experts.
        key = (a.dtype, a.shape, tuple(a.flatten()[:4].tolist()), tuple(a.flatten()[-4:].tolist()))
        for known in self._seen.setdefault(key, []):
            if self.matrices[known].data_ptr() == a.data_ptr() or torch.equal(self.matrices[known], a):
                return known
        self._seen[key].append(len(self.matrices))
        self.matrices.append(a)
        return len(self.matrices) - 1
