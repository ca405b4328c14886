"""``polylora demo``: every adapter of a model in one batch, held against PEFT with each adapter alone.

The models and adapters are real, trained ones that ship with the package (:mod:`polylora.fixtures`). For each model:

1. all adapters are loaded from disk; one prompt is continued by the base model and by every adapter, in one batch;
2. a text no model has seen goes through one mixed batch, and through one PEFT model an adapter; the log-probabilities
   of the text's tokens are compared;
3. the same tokens are generated here in one batch, with PEFT one adapter after the other, and, for the adapters that
   PEFT's own mixed batch (``adapter_names``) takes, with that. It takes adapters of linears and embeddings alone, and
   only where all of these see ``[sequences, tokens, ...]``.
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import polylora
from polylora.engines import attach

MODELS = {"qwen": "tiny-qwen3_5-moe", "nemotron": "tiny-nemotron-h"}
TEXTS, TEXT_BYTES = 4, 160
DEFAULT_TOKENS = 64
PROMPT = "If the file does not exist, then "


@dataclass(frozen=True)
class Bounds:
    """What an adapter's rows must keep to pass.

    Attributes:
        divergence: largest mean of 0.5 * (difference of log-probability)^2 to PEFT.
        difference: largest |difference of log-probability| of a single token; None where a single token may go to
            another expert, because two roundings of the router's input differ.
        greedy: all tokens that a row writes must be those PEFT writes.
        share: least share of the adapter's delta in the logits. Below it agreement proves nothing.
    """

    divergence: float
    difference: float | None
    greedy: bool = False
    share: float = 0.12


BOUNDS = {
    torch.float32: Bounds(1e-7, 1e-2, greedy=True),  # measured: 2e-10, 2e-4
    torch.bfloat16: Bounds(4e-3, None),  # measured: 8e-4. PEFT keeps the adapters in float32
    torch.float16: Bounds(1e-3, None),  # measured: 2e-4
}


class DemoError(RuntimeError):
    """The demo cannot run here; the text says what is missing."""


def run(
    models: Sequence[str] = tuple(MODELS),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: int = DEFAULT_TOKENS,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Runs the demo.

    Args:
        models: keys of ``MODELS``.
        device: "cpu" or "cuda".
        dtype: of models and adapters.
        tokens: to generate for each row.
        progress: is told what happens.

    Returns:
        All numbers, JSON-ready: ``device``, ``dtype``, ``versions``, ``models`` (by name: ``samples``, ``adapters``,
        ``speed``), ``bounds``, ``failures`` (texts, empty when all passed) and ``seconds``.

    Raises:
        DemoError: transformers or peft is not installed, or the fixtures are missing.
    """
    try:
        import peft
        import transformers
    except ImportError as error:
        raise DemoError(
            f"polylora demo: needs transformers and peft: pip install 'transformers>=5.12' 'peft>=0.18' ({error})"
        ) from None
    started = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much on a busy machine
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions, or the comparison is one of roundings to TF32
    try:
        result = _run(models, device, dtype, tokens, progress)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = tf32
    result["versions"] |= {"transformers": transformers.__version__, "peft": peft.__version__}
    result["seconds"] = time.perf_counter() - started
    return result


def _run(models, device: str, dtype: torch.dtype, tokens: int, progress: Callable[[str], None]) -> dict[str, Any]:
    bounds = BOUNDS[dtype]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu (one thread)",
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {
            "polylora": polylora.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "bounds": {
            "divergence": bounds.divergence,
            "difference": bounds.difference,
            "greedy": bounds.greedy,
            "share": bounds.share,
        },
        "models": {},
        "failures": [],
    }
    for key in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = _Demo(MODELS[key], device, dtype, tokens, progress).run()
        result["models"][MODELS[key]] = one
        result["failures"] += _failures(MODELS[key], one, bounds)
    return result


def _failures(model: str, one: dict[str, Any], bounds: Bounds) -> list[str]:
    found = []
    for name, row in one["adapters"].items():
        for key, what, limit, sign in (
            ("divergence", "mean 0.5*dlogp^2", bounds.divergence, -1),
            ("difference", "max |dlogp|", bounds.difference, -1),
            ("share", "share of the delta", bounds.share, 1),
        ):
            # A NaN passes no comparison, so it fails.
            if limit is not None and not sign * row[key] >= sign * limit:
                side = "least" if sign > 0 else "most"
                found.append(f"{model}, {name}: {what} must be at {side} {limit:g}, got {row[key]:.3g}")
        if bounds.greedy and row["same_greedy_tokens"] != one["tokens"]:
            found.append(
                f"{model}, {name}: greedy tokens equal to PEFT's must be all {one['tokens']}, got "
                f"{row['same_greedy_tokens']}"
            )
    return found


class _Demo:
    """One model."""

    def __init__(self, model: str, device: str, dtype: torch.dtype, tokens: int, progress: Callable[[str], None]):
        from polylora import fixtures

        self.name, self.device, self.dtype, self.tokens = model, device, dtype, tokens
        self.progress = lambda text: progress(f"{model}: {text}")
        self.fixtures = fixtures
        self.tokenizer = fixtures.ByteTokenizer()
        self.adapters = fixtures.adapter_names(model)
        if not (fixtures.fixture_path(model) / "config.json").is_file() or not self.adapters:
            raise DemoError(f"polylora demo: the fixture {model} is missing from {fixtures.fixture_path(model).parent}")

    def run(self) -> dict[str, Any]:
        names = [None, *self.adapters]
        self.progress(f"loading the model and {len(self.adapters)} adapters")
        model = self._model()
        engine = attach(model, max_adapters=len(self.adapters), dtype=self.dtype)
        for name in self.adapters:
            engine.load(name, self.fixtures.adapter_path(self.name, name))
        touched = {name: engine.sites(name) for name in self.adapters}
        mixer, linears = self._peft_mixer()

        self.progress(f"one batch of {len(names)} rows, each with its own adapter, {self.tokens} tokens a row")
        with engine.batch(names):
            ours, seconds = self._generate(model, len(names))
        ids = self._texts()
        logits = []
        with torch.no_grad():
            for text in ids:
                with engine.batch(names):
                    logits.append(model(input_ids=text.expand(len(names), -1), use_cache=False).logits.float())
        logits = torch.stack(logits, 1)  # [row, text, token, vocabulary]

        mixed = ([None, *linears] * len(names))[: len(names)]
        with engine.batch(mixed):
            _, mixed_seconds = self._generate(model, len(names))
        engine.detach()
        self.progress(f"PEFT with adapter_names: {', '.join(linears) or 'it takes none of these adapters'}")
        mixed_names = ["__base__" if name is None else name for name in mixed]
        mixed_peft = self._generate(mixer, len(names), adapter_names=mixed_names)[1] if linears else None

        rows, texts, alone = {}, {None: ours[0]}, {}
        _, alone[None] = self._generate(model, 1)
        for i, name in enumerate(self.adapters, 1):
            self.progress(f"PEFT with {name} alone")
            reference = self._peft(name)
            with torch.no_grad():
                want = reference(input_ids=ids, use_cache=False).logits.float()
            written, alone[name] = self._generate(reference, 1)
            texts[name] = ours[i]
            config = self._config(name)
            rows[name] = {
                "rank": sorted({config.r, *config.rank_pattern.values()}),
                "rslora": bool(config.use_rslora),
                "targets": self._targets(config),
                "sites": len(touched[name]),
                **_compare(logits[i], want, logits[0], ids),
                "same_greedy_tokens": _common(ours[i], written[0]),
                "peft_alone_tokens_per_s": self.tokens / alone[name],
            }
        total = len(names) * self.tokens
        return {
            "prompt": PROMPT,
            "rows": len(names),
            "tokens": self.tokens,
            "samples": {name or "(base)": self.tokenizer.decode(text) for name, text in texts.items()},
            "adapters": rows,
            "speed": {
                "all_here": total / seconds,
                "all_peft_one_by_one": total / sum(alone.values()),
                "linears": linears,
                "linears_here": total / mixed_seconds if linears else None,
                "linears_peft_adapter_names": total / mixed_peft if linears else None,
            },
        }

    # ------------------------------------------------------------------------------------------------ parts

    def _model(self):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.fixtures.fixture_path(self.name), dtype=self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    def _peft(self, name: str):
        from peft import PeftModel

        model = PeftModel.from_pretrained(self._model(), self.fixtures.adapter_path(self.name, name), adapter_name=name)
        return model.eval()

    def _config(self, name: str):
        from peft import PeftConfig

        return PeftConfig.from_pretrained(self.fixtures.adapter_path(self.name, name))

    def _targets(self, config) -> str:
        modules = config.target_modules or []
        named = {"regex"} if isinstance(modules, str) else set(modules)
        ends = sorted(named & {"embed_tokens", "embeddings", "lm_head"})
        linears = named - set(ends)
        parts = [f"{len(linears)} linears" if len(linears) > 2 else "+".join(sorted(linears))] if linears else []
        experts = [p.rpartition(".")[2] for p in config.target_parameters or []]
        return ", ".join([*parts, *(["experts"] if len(experts) > 1 else [f"experts' {p}" for p in experts]), *ends])

    def _texts(self) -> torch.Tensor:
        """``[TEXTS, 1 + TEXT_BYTES]``: held-out text from the start of a paragraph on."""
        lines = [line for line in self.fixtures.held_out_text().splitlines() if len(line) >= TEXT_BYTES]
        rows = [self.tokenizer.encode(line[:TEXT_BYTES]) for line in lines[:TEXTS]]
        return torch.tensor(rows, device=self.device)

    def _generate(self, model, rows: int, **kwargs) -> tuple[torch.Tensor, float]:
        """Greedy continuation of the prompt in ``rows`` rows, exactly ``tokens`` each, and the seconds it took (the
        better of two)."""
        batch = {k: v.to(self.device) for k, v in self.tokenizer.batch([PROMPT] * rows).items()}

        def write(tokens: int) -> torch.Tensor:
            out = model.generate(
                **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=self.tokenizer.pad_id, **kwargs,
            )  # fmt: skip
            if self.device == "cuda":
                torch.cuda.synchronize()
            return out[:, batch["input_ids"].shape[1] :]

        write(2)  # what is done once is no part of the speed
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            out = write(self.tokens)
            seconds.append(time.perf_counter() - started)
        return out, min(seconds)

    def _peft_mixer(self) -> tuple[Any, list[str]]:
        """A PEFT model with every adapter that its ``adapter_names`` can serve, and their names.

        PEFT refuses adapters of parameters, and of linears that a model calls with sequences and tokens flattened, as
        MoE blocks do with their shared experts.
        """
        names = [name for name in self.adapters if not self._config(name).target_parameters]
        model, taken = None, []
        ids = torch.zeros(2, 3, dtype=torch.int64, device=self.device)
        for name in names:
            if model is None:
                model = self._peft(name)
            else:
                model.load_adapter(str(self.fixtures.adapter_path(self.name, name)), name)
            try:
                with torch.no_grad():
                    model(input_ids=ids, adapter_names=[name, "__base__"], use_cache=False)
                taken.append(name)
            except ValueError:
                # Also out of the model: adapter_names looks at the inputs of every layer that has any adapter.
                if len(model.peft_config) > 1:
                    model.delete_adapter(name)
                else:
                    model = None
        return model, taken


def _compare(got: torch.Tensor, want: torch.Tensor, base: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Of logits ``[texts, tokens, vocabulary]`` on ``ids`` ``[texts, tokens]``."""

    def log_probability(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])

    difference = log_probability(got) - log_probability(want)
    return {
        "divergence": (0.5 * difference.square()).mean().item(),
        "difference": difference.abs().max().item(),
        "share": ((got - base).norm() / base.norm()).item(),
        "peft_share": ((want - base).norm() / base.norm()).item(),
    }


def _common(a: torch.Tensor, b: torch.Tensor) -> int:
    """Leading tokens that two rows share."""
    different = (a != b).nonzero()
    return int(different[0]) if len(different) else len(a)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def report(result: dict[str, Any]) -> str:
    """The result as plain text, at most 120 columns."""
    lines = [f"polylora {result['versions']['polylora']} on {result['device']}, {result['dtype']}"]
    for name, one in result["models"].items():
        lines += ["", f"== {name}: one batch, a row an adapter. Prompt: {one['prompt']!r}", ""]
        width = max(map(len, one["samples"]))
        for row, text in one["samples"].items():
            # Bytes of a model are not always printable.
            shown = text.replace("\n", "\\n").encode("ascii", "backslashreplace").decode()
            lines.append(f"  {row:<{width}}  {''.join(c if c.isprintable() else '?' for c in shown)}"[:120])
        title = f"{TEXTS} x {TEXT_BYTES} bytes of unseen text in mixed batches, against PEFT with each adapter alone:"
        lines += ["", f"  {title}"]
        lines += _table(one)
        speed, rows = one["speed"], one["rows"]
        title = f"generating {rows} rows x {one['tokens']} tokens, greedy:"
        lines += ["", f"  {title:<78}{'tokens/s':>10}"]
        for what, value in (
            ("all adapters and the base, polylora, one batch", speed["all_here"]),
            ("the same, PEFT, one adapter after the other", speed["all_peft_one_by_one"]),
            (f"{' + '.join(speed['linears'])} and the base, polylora, one batch", speed["linears_here"]),
            ("the same, PEFT, one batch with adapter_names (it takes no others)", speed["linears_peft_adapter_names"]),
        ):
            if value is None:
                continue
            lines.append(f"    {what:<76}{value:>10.1f}")
    bounds = result["bounds"]
    lines += ["", f"{result['seconds']:.0f} s"]
    limits = [f"mean 0.5*dlogp^2 <= {bounds['divergence']:g}", f"delta >= {bounds['share']:.0%}"]
    if bounds["difference"] is not None:
        limits.insert(1, f"max |dlogp| <= {bounds['difference']:g}")
    if bounds["greedy"]:
        limits.append("greedy text equal")
    stated = ", ".join(limits)
    if result["failures"]:
        lines += [f"FAIL ({stated}):", *(f"  {text}" for text in result["failures"])]
    else:
        lines.append(f"PASS: every row says what PEFT says ({stated})")
    return "\n".join(lines)


def _table(one: dict[str, Any]) -> list[str]:
    head = ("adapter", "rank", "sites", "mean 0.5*dlogp^2", "max |dlogp|", "delta", "greedy", "targets")
    body = []
    for name, row in one["adapters"].items():
        ranks = "-".join(map(str, sorted({row["rank"][0], row["rank"][-1]}))) + (" rs" if row["rslora"] else "")
        same = f"{row['same_greedy_tokens']}/{one['tokens']}"
        numbers = (f"{row['divergence']:.1e}", f"{row['difference']:.1e}", f"{row['share']:.0%}")
        body.append((name, ranks, str(row["sites"]), *numbers, same, row["targets"]))
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    left = (0, 1, len(head) - 1)

    def one_line(cells: tuple[str, ...]) -> str:
        padded = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"    {'  '.join(padded)}".rstrip()[:120]

    return [one_line(head), *map(one_line, body)]
