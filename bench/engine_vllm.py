"""vLLM without LoRA, with its own LoRA kernels and with polylora's, one after the other: docs/benchmarks.md.

Exit codes: 0 done; 1 a side failed or ran other kernels, or the two disagree; 2 bad usage, or no vLLM; 3 no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engine_models
import engine_report
import engine_side
import polylora
from engine_report import SIDES
from polylora.bench import report
from polylora_cli import DONE, NO, NO_GPU, USAGE, positive

#: polylora's first tokens may be so many times as far from vLLM's as vLLM's in batches of another size are.
OWN_NOISE = 1.5
HERE = Path(__file__).resolve().parent
#: Of every side, unless set: no network, and no flashinfer, which is not needed to measure this.
OFFLINE = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
           "VLLM_HOST_IP": "127.0.0.1", "TOKENIZERS_PARALLELISM": "false",
           "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="engine_vllm.py", description=__doc__.splitlines()[0])
    presets = ", ".join(f"{name} ({layers} layers)" for name, (_, layers) in engine_models.PRESETS.items())
    parser.add_argument("--model", default="llama8b", help=f"a folder with config.json, or {presets}")
    parser.add_argument("--layers", type=positive, help="of a preset")
    parser.add_argument("--weights", choices=("dummy", "auto"), default="dummy", help="auto: those in the folder")
    parser.add_argument("--work", metavar="DIR", help="for models and adapters, removed at the end (default /tmp)")
    parser.add_argument("--ranks", type=_numbers, default=[16], help="of the adapters, in turn (default 16)")
    parser.add_argument(
        "--adapters", type=_numbers, default=[1, 8, 32], help="in a batch (default 1,8,32); 0: LoRA on, unused"
    )
    parser.add_argument("--batch", type=_numbers, default=[1, 8, 32, 128], help="requests (default 1,8,32,128)")
    parser.add_argument("--prompt", type=_numbers, default=[128, 2048], help="lengths of prompts: time to first token "
                        "at each, time per output token at the shortest (default 128,2048)")  # fmt: skip
    parser.add_argument("--output", type=int, default=128, help="tokens (default 128)")
    parser.add_argument("--repeat", type=int, default=5, help="of each batch, after one more (default 5)")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(SIDES), help=",".join(SIDES))
    parser.add_argument("--compare", action="store_true", help="instead: do both kernels decode alike?")
    parser.add_argument("--slots", type=positive, help="of the engine (default: as many as --adapters); with "
                        "--compare fewer: adapters come and go while it serves")  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=0.1, help="of log-probabilities, with --compare")
    parser.add_argument("--compile", action="store_true", help="vLLM's own choice of torch.compile and graphs, instead "
                        "of graphs of whole decode steps and no compilation")  # fmt: skip
    parser.add_argument("--engine", action="append", default=[], metavar="KEY=JSON", help="a setting of vLLM's LLM")
    parser.add_argument("--json", metavar="FILE", help="records, one a line")
    parser.add_argument("--plot", metavar="FILE", help=".svg or .png")
    arguments = parser.parse_args(argv)
    try:
        arguments.engine = {k: json.loads(v) for k, v in (text.split("=", 1) for text in arguments.engine)}
    except ValueError:
        parser.error(f"--engine must be KEY=JSON, got {' '.join(arguments.engine)}")
    least = {"output": 16, "repeat": 1, "batch": 1, "prompt": 1, "ranks": 1, "adapters": 0}
    for name, bound in least.items():
        value = getattr(arguments, name)
        if (got := min(value) if isinstance(value, list) else value) < bound:
            parser.error(f"--{name} must be at least {bound}, got {got}")
    most = max(arguments.adapters)
    if arguments.slots is not None and arguments.slots < most and not arguments.compare:
        parser.error(f"--slots must be at least {most}, the most of --adapters, unless with --compare, "
                     f"got {arguments.slots}")  # fmt: skip
    batch, prompt = max(arguments.batch), arguments.prompt[0]
    chunk = arguments.engine.get("max_num_batched_tokens", engine_side.STEP_TOKENS)
    if not arguments.compare and arguments.output < (bound := engine_side.least_output(batch, prompt, chunk)):
        parser.error(f"--output must be at least {bound}, for {batch} requests of {prompt} tokens to decode together, "
                     f"got {arguments.output}")  # fmt: skip
    if max(arguments.ranks) > 512:
        parser.error(f"--ranks must be at most 512, got {max(arguments.ranks)}")
    if unknown := set(arguments.sides) - set(SIDES):
        parser.error(f"--sides must be of {', '.join(SIDES)}, got {', '.join(sorted(unknown))}")
    if arguments.work and not Path(arguments.work).is_dir():
        parser.error(f"--work must be a folder that exists, got {arguments.work}")
    if arguments.model not in engine_models.PRESETS and not Path(arguments.model, "config.json").is_file():
        parser.error(f"--model must be a folder with config.json or of {presets}, got {arguments.model}")
    if arguments.json and not Path(arguments.json).resolve().parent.is_dir():
        parser.error(f"--json must be in a folder that exists, got {arguments.json}")
    if arguments.plot:
        try:
            report.check_plot(arguments.plot)
        except report.PlotError as error:
            parser.error(f"--plot: {error}")
    return arguments


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, got {text!r}") from None


def cells(arguments: argparse.Namespace, side: str) -> list[tuple[int, int, int, int]]:
    """(adapters, batch, prompt, output). No more adapters than requests; the base has none; output 1: first token."""
    outputs = [(p, arguments.output if p == arguments.prompt[0] else 1) for p in arguments.prompt]
    counts = [0] if side == "base" else arguments.adapters
    return [(a, b, *both) for both in outputs for b in arguments.batch for a in counts if a <= b]


def environment(side: str, plugin: Path) -> dict[str, str]:
    """Of a side's process. ``plugin``: the folder of :func:`write_plugin`."""
    found = OFFLINE | os.environ | {"POLYLORA_VLLM": "1" if side == "polylora" else "0"}
    paths = [HERE, Path(polylora.__file__).parents[1], *([plugin] if side == "polylora" else [])]
    found["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *filter(None, [found.get("PYTHONPATH")])])
    if side == "polylora" and "VLLM_PLUGINS" in found:
        found["VLLM_PLUGINS"] += ",polylora"
    return found


def write_plugin(folder: Path) -> Path:
    """An installed package, as far as entry points go: vLLM finds polylora's plugin where this is on PYTHONPATH."""
    info = folder / "polylora_vllm-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: polylora-vllm\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\npolylora = polylora_vllm:register\n")
    return folder


def run_side(spec: dict[str, Any], work: Path) -> tuple[list[dict], int]:
    """Measures one side in a process; its records, also where it failed, and its exit code. Its output is progress."""
    spec_file, records_file = work / f"{spec['side']}.json", work / f"{spec['side']}.jsonl"
    spec_file.write_text(json.dumps(spec))
    records_file.write_text("")
    command = [sys.executable, str(HERE / "engine_side.py"), str(spec_file), str(records_file)]
    code = subprocess.run(command, env=environment(spec["side"], work / "plugin"), stdout=sys.stderr).returncode
    return report.load(records_file), code


def measure(arguments: argparse.Namespace, work: Path, sink: report.Sink, run: Callable = run_side) -> list[str]:
    """Runs the sides; returns what failed."""
    model, sides, need = Path(arguments.model), arguments.sides, max(arguments.adapters)
    if arguments.model in engine_models.PRESETS:
        model = engine_models.write_model(work / arguments.model, arguments.model, arguments.layers)
    if arguments.compare:
        sides, need = ["vllm", "polylora"], max(1, min(need, max(arguments.batch) - 1))
    adapters = engine_models.write_adapters(work / "adapters", model, arguments.ranks, need)
    write_plugin(work / "plugin")
    shape = (need, max(arguments.batch), arguments.prompt[0], arguments.output) if arguments.compare else None
    failures = []
    for side in sides:
        spec = {
            "side": side, "model": str(model), "adapters": [str(path) for path in adapters], "ranks": arguments.ranks,
            "weights": arguments.weights, "compile": arguments.compile, "engine": arguments.engine,
            "slots": arguments.slots or max(1, need), "batches": arguments.batch,
            "length": arguments.prompt[-1] + arguments.output + 8, "compare": shape,
            "repeat": arguments.repeat, "cells": [] if shape else cells(arguments, side),
        }  # fmt: skip
        found, code = run(spec, work)
        for record in found:
            sink.record(record)
        failures += [f"{side}: {r['detail']}" for r in found if r.get("status", "ok") != "ok"]
        if code:
            failures.append(f"{side}: its process ended with exit code {code}")
    if arguments.compare:
        return failures or _compare(arguments, sink)
    engine_report.write_tables(sink, sink.records)
    return failures


def _compare(arguments: argparse.Namespace, sink: report.Sink) -> list[str]:
    """Compares polylora's texts with vLLM's, and vLLM's with its own where each request is by itself."""
    texts = {(r["side"], r["alone"]): r["requests"] for r in sink.records if r["kind"] == "generated"}
    theirs, found = texts["vllm", False], {}
    for what, others in (("polylora", texts["polylora", False]), ("vLLM, requests by themselves", texts["vllm", True])):
        found[what] = of = engine_report.compare(others, theirs, arguments.tolerance)
        sink.record({"kind": "compare", "what": what, "tolerance": arguments.tolerance} | of)
        sink.text(f"{what}: {of['requests']} greedy texts: {of['equal']} equal to vLLM's, {of['ties']} part at a tie, "
                  f"{len(of['apart'])} apart. Largest difference of log-probabilities: {of['before']:.4f} before, "
                  f"{of['at']:.4f} where they part; of first tokens {of['first']:.4f} (root mean square).")  # fmt: skip
    layers = {r["side"]: r["layers"] for r in sink.records if r["kind"] == "layers"}
    ours, own = found.values()
    failures = engine_report.write_layers(sink, layers) if any(layers.values()) else []
    failures += [f"adapters without any effect: {ours['silent']}"] if ours["silent"] else []
    if len(ours["apart"]) > len(own["apart"]):
        failures.append(f"requests beyond the tolerance: {', '.join(ours['apart'])}")
    if ours["first"] > max(arguments.tolerance, OWN_NOISE * own["first"]):
        failures.append(f"first tokens differ by {ours['first']:.4f}, vLLM's from its own by {own['first']:.4f}")
    return failures


def main(argv: Sequence[str] | None = None, run: Callable = run_side) -> int:
    arguments = parse(argv)
    import torch

    needs = ("a GPU that torch sees", torch.cuda.is_available(), NO_GPU), ("vLLM", find_spec("vllm"), USAGE)
    for what, there, code in needs if run is run_side else ():
        if not there:
            print(f"engine_vllm.py: needs {what}", file=sys.stderr)
            return code
    target = open(arguments.json, "w", encoding="utf-8") if arguments.json else nullcontext()  # noqa: SIM115
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder, target as lines:
        sink = report.Sink(sys.stdout, lines)
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        sink.record({"kind": "run", "date": date, "polylora": polylora.__version__} | vars(arguments))
        started = time.perf_counter()
        try:
            failures = measure(arguments, Path(folder), sink, run)
        except ValueError as error:  # a model that gets no adapters
            print(f"engine_vllm.py: --model: {error}", file=sys.stderr)
            return USAGE
        print(f"engine_vllm.py: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if arguments.plot and not arguments.compare:
        engine_report.plot(sink.records, arguments.plot)
    for text in failures:
        print(f"engine_vllm.py: failed: {text}", file=sys.stderr)
    return NO if failures else DONE


if __name__ == "__main__":
    sys.exit(main())
