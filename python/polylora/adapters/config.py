"""``adapter_config.json``: what changes the numbers is read or refused, never ignored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .patterns import Pattern

# Fixed by the kernels' slice table.
MAX_RANK = 256

# Keys that ask for something other than y += scale * B A x, with what an adapter needs there to be plain LoRA.
_MUST_BE_OFF = {
    "use_dora": "False (DoRA rescales the base weight)",
    "lora_bias": "False (a bias beside B)",
    "modules_to_save": "none (whole copies of base modules)",
    "trainable_token_indices": "none (retrained embedding rows)",
    "alora_invocation_tokens": "none (aLoRA switches on in mid-sequence)",
    "layer_replication": "none (the base model is another one)",
    "use_qalora": "False (A reads pooled inputs)",
    "use_bdlora": "none (block-diagonal factors)",
    "arrow_config": "none (adapters chosen token by token)",
    "kasa_config": "none (the base weight is truncated)",
    "monteclora_config": "none (sampled weights)",
}

# Keys that do not touch the result of a trained adapter, or that the tensors themselves answer.
_NEUTRAL = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    )
)

# Read below.
_READ = frozenset(
    (
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "use_rslora",
    )
)

# Initialisations that only choose where training starts. The others move a part of the base weight into A and B, so the
# adapter is right on its own base only; peft writes True here when it has converted such an adapter back.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

# What peft takes for every linear of the model, in any case.
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """The part of ``adapter_config.json`` that decides the numbers.

    Attributes:
        r: rank where ``rank_pattern`` says nothing else.
        lora_alpha: alpha where ``alpha_pattern`` says nothing else.
        use_rslora: scale is ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        rank_pattern: regular expression of a module path's tail -> rank.
        alpha_pattern: the same for alpha.
        target_modules: modules that are adapted: tails of paths, one regular expression, "all-linear", or None where
            the config does not say.
        target_parameters: expert parameters trained as such.
        peft_version: (major, minor) of the peft that wrote the adapter; None when it does not say.
        ensure_weight_tying: the adapter of the embedding also serves the tied ``lm_head``.
        layers: the only layers the adapter may have weights in; None for all.
        exclude_modules: modules that are not to be adapted: tails of paths, or one regular expression.
        raw: the file as parsed.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: frozenset[str] | str | None = None
    target_parameters: tuple[str, ...] = ()
    peft_version: tuple[int, int] | None = None
    ensure_weight_tying: bool = False
    layers: frozenset[int] | None = None
    exclude_modules: tuple[str, ...] | str = ()
    raw: Mapping[str, Any] = field(default_factory=dict)

    def rank(self, path: str) -> int:
        """Rank of the module (expert parameter) at ``path``."""
        return self._decide(path)[0]

    def scale(self, path: str) -> float:
        """Factor of ``B A x`` of the module (expert parameter) at ``path``."""
        return self._decide(path)[1]

    @cached_property
    def _matchers(self) -> tuple[list[tuple[Pattern, int]], list[tuple[Pattern, float]]]:
        ranks = [(Pattern(key), value) for key, value in self.rank_pattern.items()]
        return ranks, [(Pattern(key), value) for key, value in self.alpha_pattern.items()]

    @cached_property
    def _target(self) -> Pattern:
        return Pattern(self.target_modules)

    @cached_property
    def _exclude(self) -> Pattern:
        return Pattern(self.exclude_modules)

    @cached_property
    def _decided(self) -> dict[str, tuple[int, float]]:
        return {}

    def _decide(self, path: str) -> tuple[int, float]:
        """(rank, scale) at ``path``. The first pattern that matches counts, in the file's order, as in peft."""
        if path not in self._decided:
            ranks, alphas = self._matchers
            rank = next((value for matcher, value in ranks if matcher.matches_tail(path)), self.r)
            alpha = next((value for matcher, value in alphas if matcher.matches_tail(path)), self.lora_alpha)
            self._decided[path] = rank, float(alpha / math.sqrt(rank) if self.use_rslora else alpha / rank)
        return self._decided[path]

    def excludes(self, path: str) -> str | None:
        """Why the config says that the module at ``path`` has no adapter; None when it does not say so."""
        layer = re.search(r"\.layers\.(\d+)\.", path)
        if self.layers is not None and layer and int(layer[1]) not in self.layers:
            return f"layers_to_transform names layers {sorted(self.layers)}"
        if isinstance(self.exclude_modules, str):
            return "exclude_modules matches it" if self._exclude.matches(path) else None
        tails = [t for t in self.exclude_modules if path == t or path.endswith(f".{t}")]
        return f"exclude_modules names {tails[0]!r}" if tails else None

    @property
    def says_targets(self) -> bool:
        """False where any module may have an adapter: neither kind of target is given."""
        return self.target_modules is not None or bool(self.target_parameters)

    def targets(self, path: str, linear: bool = True) -> bool:
        """Whether ``target_modules`` names the module at ``path``, by peft's rule; an embedding is no linear."""
        if self.target_modules is None:
            return not self.says_targets
        if isinstance(self.target_modules, str):
            return linear if self.target_modules.lower() == _ALL_LINEAR else self._target.matches(path)
        return any(tail in self.target_modules for tail in _tails(path))

    def targets_parameter(self, path: str) -> bool:
        """Whether ``target_parameters`` names the expert parameter at ``path``."""
        return any(tail in self.target_parameters for tail in _tails(path))


def parse_config(raw: Any) -> tuple[LoraConfig, list[str]]:
    """Read a parsed ``adapter_config.json``.

    Args:
        raw: what ``json.loads`` gave.

    Returns:
        The config and every problem with it; with problems the config is not to be used.
    """
    if not isinstance(raw, dict):
        return LoraConfig(), [f"adapter_config.json: expected an object, got {type(raw).__name__}"]
    problems = _refusals(raw)

    def take(key: str, default, good, expected: str, null_is_default: bool = True):
        value = raw.get(key)
        if value is None and (null_is_default or key not in raw):
            return default
        if good(value):
            return value
        problems.append(f"config key {key!r}: expected {expected}, got {_show(value)}")
        return default

    ranks = take("rank_pattern", {}, lambda v: _is_pattern(v, _is_rank), f"simple regular expressions -> 1..{MAX_RANK}")
    alphas = take("alpha_pattern", {}, lambda v: _is_pattern(v, _is_number), "simple regular expressions -> numbers")
    modules = take(
        "target_modules", None, lambda v: _is_names(v) or _is_regex(v), "names or a simple regular expression"
    )
    parameters = take("target_parameters", [], _is_names, "a list of parameter names")
    exclude = take(
        "exclude_modules", [], lambda v: _is_names(v) or _is_regex(v), "names or a simple regular expression"
    )
    layers = take("layers_to_transform", None, _is_layers, "a layer number or a list of them")
    if isinstance(layers, int):
        layers = [layers]
    config = LoraConfig(
        # null means "not set" where PEFT has such a value; as a rank or alpha it fails there, and 8 would be a guess
        r=take("r", 8, _is_rank, f"a rank of 1..{MAX_RANK}", null_is_default=False),
        lora_alpha=take("lora_alpha", 8, _is_number, "a finite number", null_is_default=False),
        use_rslora=take("use_rslora", False, lambda v: isinstance(v, bool), "true or false"),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=frozenset(modules) if isinstance(modules, list) else modules,
        target_parameters=tuple(parameters),
        peft_version=_version(raw.get("peft_version")),
        ensure_weight_tying=bool(raw.get("ensure_weight_tying")),
        layers=frozenset(layers) if layers else None,
        exclude_modules=exclude if isinstance(exclude, str) else tuple(exclude),
        raw=raw,
    )
    return config, problems


def _refusals(raw: dict) -> list[str]:
    problems = []
    if raw.get("peft_type") != "LORA":
        problems.append(f"config key 'peft_type': expected 'LORA', got {_show(raw.get('peft_type'))}")
    for key, expected in _MUST_BE_OFF.items():
        if raw.get(key):
            problems.append(f"config key {key!r}: expected {expected}, got {_show(raw[key])}")
    if raw.get("bias", "none") not in ("none", None):
        problems.append(f"config key 'bias': expected 'none', got {_show(raw['bias'])}")
    init = raw.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or init in _PLAIN_INITS):
        expected = "true, false or one of " + ", ".join(_PLAIN_INITS)
        hint = " (others change the base weights; peft can convert such an adapter when it saves it)"
        problems.append(f"config key 'init_lora_weights': expected {expected}{hint}, got {_show(init)}")
    for key in sorted(set(raw) - _READ - _NEUTRAL - set(_MUST_BE_OFF)):
        if raw[key]:
            problems.append(f"unknown config key {key!r}: expected it absent or empty, got {_show(raw[key])}")
    return problems


def _show(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value) -> bool:
    return _is_int(value) and 1 <= value <= MAX_RANK


def _is_number(value) -> bool:
    # A float's range, not an int's: an alpha of 10**400 is no number to scale by.
    return (_is_int(value) and abs(value) < 2**63) or (isinstance(value, float) and math.isfinite(value))


def _is_regex(value) -> bool:
    if not isinstance(value, str):
        return False
    try:
        Pattern(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _is_pattern(value, good) -> bool:
    return isinstance(value, dict) and all(_is_regex(key) and good(item) for key, item in value.items())


def _is_names(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_layers(value) -> bool:
    return _is_int(value) or (isinstance(value, list) and all(_is_int(item) for item in value))


def _tails(path: str) -> Iterator[str]:
    """``path`` and its dotted tails: what peft compares names with."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def _version(value) -> tuple[int, int] | None:
    match = re.match(r"(\d{1,4})\.(\d{1,4})", value) if isinstance(value, str) else None
    return (int(match[1]), int(match[2])) if match else None
