"""``polylora bench``: arguments, refusals and exit codes of its commands, which are those of :mod:`polylora_cli`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polylora_cli import DONE, NO, NO_GPU, USAGE

if TYPE_CHECKING:
    from polylora.bench.peers import Implementation
    from polylora.bench.report import Sink
    from polylora.bench.run import Progress, Timer

_PATHS = ("auto", "cluster", "wide", "mma", "general")


def add_bench(commands: Any) -> None:
    """Adds the commands to the subparsers of ``polylora bench``."""
    linear = commands.add_parser("linear", help="linear layers: check, then time")
    _add_cases(linear, "'llama8b.qkv r16 M16 a16' or '4096->4096+1024 r16 M1'", "'qkv r16 M1'")
    _add_common(linear, "vllm, csgmv, triton, v2")
    linear.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    linear.add_argument("--chain", action="store_true", help="also what the op adds to a chain of base GEMMs")
    linear.add_argument("--idle", action="store_true", help="also a replay in which no row has an adapter")
    linear.add_argument("--overhead", action="store_true", help="also the host time of an eager call")
    linear.set_defaults(run=_bench_linear)

    moe = commands.add_parser("moe", help="MoE layers: check, then time what LoRA adds to the whole forward")
    _add_cases(moe, "'qwen35-35b r16 M16' or 'moe:2048x512,e256,k8,silu,gated r16 M1'", "'nemotron3 r16 M1'")
    _add_common(moe, "vllm, classic, virtual, v2")
    moe.add_argument("--base", choices=("auto", "triton", "torch"), default="auto", help="whose base GEMMs: SGLang's "
                     "Triton kernels or torch's (default triton where it can be imported)")  # fmt: skip
    moe.add_argument("--seams", type=_seams, default=["beside"], metavar="NAMES", help="where polylora's ops stand: "
                     "beside (deltas on a second stream beside the GEMMs), fused (all after them), added (into the "
                     "base's buffers), tokens (beside, of a case whose experts share A: 'CASE outer'), or several "
                     "(default beside)")  # fmt: skip
    moe.set_defaults(run=_bench_moe)

    plot = commands.add_parser("plot", help="draw saved results; needs no GPU")
    plot.add_argument("results", metavar="RESULTS", help="JSON lines of a run")
    plot.add_argument("-o", "--output", required=True, metavar="FILE", help=".svg or .png")
    plot.set_defaults(run=_bench_plot)


def _add_cases(parser: argparse.ArgumentParser, case: str, words: str) -> None:
    parser.add_argument("--preset", choices=("quick", "issue", "full"), default="quick", help="cases (default quick)")
    parser.add_argument("--case", action="append", default=[], metavar="CASE", help="this case instead of a preset, "
                        f"e.g. {case}; may be repeated")  # fmt: skip
    parser.add_argument("--filter", action="append", default=[], metavar="WORDS", help="only cases that fit all words, "
                        f"e.g. {words}; repeated: any of them")  # fmt: skip


def _add_common(parser: argparse.ArgumentParser, peers: str) -> None:
    parser.add_argument("--paths", type=_paths, metavar="PATH,...",
                        help=f"kernel paths of polylora: {', '.join(_PATHS)} (default auto)")  # fmt: skip
    parser.add_argument("--peers", type=_names, metavar="PEER,...",
                        help=f"of {peers}; or none (default: those that can be imported)")  # fmt: skip
    parser.add_argument("--peers-path", metavar="DIR", help="folder that holds the peers' packages")
    parser.add_argument("--json", metavar="FILE", help="JSON lines there ('-': to stdout instead of the tables)")
    parser.add_argument("--plot", metavar="FILE", help="draw the results: .svg or .png (needs matplotlib)")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"must be names between commas, each once, got {text!r}")
    return names


def _paths(text: str) -> list[str]:
    names = _names(text)
    if unknown := [name for name in names if name not in _PATHS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(_PATHS)}, got {unknown[0]!r}")
    return names


def _seams(text: str) -> list[str]:
    from polylora.bench.moe_peers import OUTER_SEAMS, SEAMS

    names = _names(text)
    if unknown := [name for name in names if name not in SEAMS + OUTER_SEAMS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(SEAMS + OUTER_SEAMS)}, got {unknown[0]!r}")
    return names


class _Stop(Exception):
    """Ends a command: the exit code and what to say."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def _refuse(text: str) -> _Stop:
    return _Stop(USAGE, text)


def _run(what: str, command: Callable[[], list[str]]) -> int:
    """Runs a command, which returns what polylora failed at, and says how it ended."""
    from polylora.bench import run

    try:
        failures = command()
    except _Stop as stop:
        print(f"polylora bench {what}: {stop}", file=sys.stderr)
        return stop.code
    except run.DeviceLost as error:
        print(f"polylora bench {what}: {error}", file=sys.stderr)
        return NO
    for text in failures:
        print(f"polylora bench {what}: failed: {text}", file=sys.stderr)
    return NO if failures else DONE


def _chosen(arguments: argparse.Namespace, parse: Callable[[str], Any], presets: Mapping[str, Callable]) -> list[Any]:
    from polylora.bench import cases

    try:
        chosen = [parse(text) for text in arguments.case] or presets[arguments.preset]()
    except ValueError as error:
        raise _refuse(f"--case: {error}") from None
    chosen = cases.select(chosen, arguments.filter)
    if not chosen:
        raise _refuse(f"--filter must leave a case of the preset {arguments.preset}, got {arguments.filter}")
    return chosen


def _check_files(arguments: argparse.Namespace) -> None:
    from polylora.bench import report

    if arguments.peers_path is not None and not Path(arguments.peers_path).is_dir():
        raise _refuse(f"--peers-path must be a folder, got {arguments.peers_path}")
    target = arguments.json
    if target not in (None, "-") and (Path(target).is_dir() or not Path(target).resolve().parent.is_dir()):
        raise _refuse(f"--json must be a file in a folder that exists, got {target}")
    if arguments.plot is not None:
        try:
            report.check_plot(arguments.plot)
        except report.PlotError as error:
            raise _refuse(f"--plot: {error}") from None


def _wanted(arguments: argparse.Namespace, known: Mapping[str, Any]) -> list[str]:
    wanted = list(known) if arguments.peers is None else [] if arguments.peers == ["none"] else arguments.peers
    if unknown := [name for name in wanted if name not in known]:
        raise _refuse(f"--peers must be none or of {', '.join(known)}, got {', '.join(unknown)}")
    return wanted


def _peers(what: str, arguments: argparse.Namespace, known: Mapping[str, Any]) -> list[Implementation]:
    """The peers; on the way refuses what makes no sense, and where there is no GPU."""
    from polylora.bench import peers

    wanted = _wanted(arguments, known)
    _check_files(arguments)
    if why := _why_no_gpu():
        raise _Stop(
            NO_GPU,
            f"needs a GPU: {why}. `polylora info` says what was built and what torch sees; "
            "`polylora bench plot` draws saved results without a GPU.",
        )
    found, missing = peers.find_peers(wanted, arguments.peers_path, known)
    for name, why in missing.items():
        print(f"polylora bench {what}: without {name}: {why}", file=sys.stderr)
    if missing and arguments.peers is not None:
        raise _refuse(f"--peers must name what can be imported, got {', '.join(missing)}; see --peers-path")
    return found


def _why_no_gpu() -> str:
    """Why the ops cannot run on a GPU here; empty where they can."""
    import torch

    import polylora
    from polylora._library import NO_KERNELS

    if not torch.cuda.is_available():
        return "no CUDA device is there (torch.cuda.is_available() is false)"
    return "" if polylora.has_cuda_kernels() else f"this build has no CUDA kernels ({NO_KERNELS})"


def _own_paths(arguments: argparse.Namespace) -> list[str]:
    return arguments.paths or [os.environ.get("POLYLORA_PATH") or "auto"]


def _measure(arguments: argparse.Namespace, measure: Callable[[Timer, Sink, Progress], list[str]]) -> list[str]:
    """Runs ``measure(timer, sink, progress)`` with results going where they were asked for."""
    from polylora.bench import report, timing

    started = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    target = arguments.json
    with contextlib.ExitStack() as stack:
        lines = sys.stdout if target == "-" else None
        if target not in (None, "-"):
            lines = stack.enter_context(open(target, "w", encoding="utf-8"))
        sink = report.Sink(None if target == "-" else sys.stdout, lines)
        failures = measure(timing.CudaTimer(), sink, progress)
    if arguments.plot is not None:
        try:
            report.plot(sink.records, arguments.plot)
        except report.PlotError as error:
            raise _Stop(NO, f"--plot: {error}") from None
    return failures


def _notes(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"preset": None if arguments.case else arguments.preset, "filter": arguments.filter}


def _bench_linear(arguments: argparse.Namespace) -> int:
    import torch

    from polylora.bench import cases, linear, peers

    def command() -> list[str]:
        chosen = _chosen(arguments, cases.Case.parse, cases.PRESETS)
        found = _peers("linear", arguments, peers.PEERS)
        options = linear.Options(
            cases=chosen,
            implementations=[peers.Polylora(path) for path in _own_paths(arguments)] + found,
            dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype],
            chain=arguments.chain,
            idle=arguments.idle,
            overhead=arguments.overhead,
            notes=_notes(arguments),
        )
        return _measure(arguments, lambda *how: linear.run(options, *how))

    return _run("linear", command)


def _bench_moe(arguments: argparse.Namespace) -> int:
    from polylora.bench import moe, moe_cases, moe_peers

    def command() -> list[str]:
        chosen = _chosen(arguments, moe_cases.MoeCase.parse, moe_cases.PRESETS)
        found = _peers("moe", arguments, moe_peers.MOE_PEERS)
        try:
            base = moe_peers.find_base(arguments.base)
        except ImportError as error:
            raise _refuse(f"--base must be one that can be imported, got triton: {error}; see --peers-path") from None
        ours = [moe_peers.MoePolylora(path, s) for path in _own_paths(arguments) for s in arguments.seams]
        options = moe.Options(chosen, ours + found, base, _notes(arguments) | {"seams": arguments.seams})
        return _measure(arguments, lambda *how: moe.run(options, *how))

    return _run("moe", command)


def _bench_plot(arguments: argparse.Namespace) -> int:
    from polylora.bench import report

    try:
        report.plot(report.load(arguments.results), arguments.output)
    except (report.ResultsError, report.PlotError) as error:
        print(f"polylora bench plot: {error}", file=sys.stderr)
        return USAGE
    return DONE
