"""The ``polylora`` command. Results go to stdout, progress and refusals to stderr.

Exit codes: 0 done, 1 the answer is no (an adapter refused, a bound missed), 2 the question makes no sense here (wrong
arguments, missing folder, no such device), 3 the command needs a GPU and cannot use one here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DONE, NO, USAGE, NO_GPU = 0, 1, 2, 3


class _Version(argparse.Action):
    """Looks the version up when asked: parsing alone must not load torch."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        import polylora

        print(f"polylora {polylora.__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. ``argv`` without the program's name; the process's own when None."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="polylora", description="Multi-LoRA kernels: every row its own adapter.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="run real adapters in one batch and hold each row against PEFT")
    demo.add_argument("--model", choices=("qwen", "nemotron", "both"), default="both")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    demo.add_argument("--tokens", type=_positive, metavar="N", help="tokens to generate a row (default 64)")
    demo.add_argument("--json", metavar="FILE", help="write all numbers there ('-': to stdout instead of the tables)")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="versions, devices, ops, and whether the CUDA kernels are in")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    check = commands.add_parser("check", help="say whether an adapter can be served on a model; needs no weights")
    check.add_argument("adapter", metavar="ADAPTER_DIR", help="PEFT folder")
    check.add_argument("--model", required=True, metavar="MODEL_DIR", help="folder with the model's config.json")
    check.add_argument("--json", action="store_true", help="as JSON")
    check.set_defaults(run=_check)

    bench = commands.add_parser("bench", help="measure the ops on a GPU, beside other LoRA kernels where installed")
    _add_bench(bench.add_subparsers(required=True, metavar="WHAT"))
    return parser


def _add_bench(commands: Any) -> None:
    linear = commands.add_parser("linear", help="linear layers: check, then time")
    linear.add_argument("--preset", choices=("quick", "issue", "full"), default="quick", help="cases (default quick)")
    linear.add_argument("--case", action="append", default=[], metavar="CASE", help="this case instead of a preset, "
                        "e.g. 'llama8b.qkv r16 M16 a16' or '4096->4096+1024 r16 M1'; may be repeated")  # fmt: skip
    linear.add_argument("--filter", action="append", default=[], metavar="WORDS", help="only cases that fit all words, "
                        "e.g. 'qkv r16 M1'; repeated: any of them")  # fmt: skip
    linear.add_argument("--paths", type=_paths, metavar="PATH,...",
                        help="kernel paths of polylora: auto, cluster, wide, mma, general (default auto)")  # fmt: skip
    linear.add_argument("--peers", type=_names, metavar="PEER,...",
                        help="of vllm, csgmv, triton, v2; or none (default: those that can be imported)")  # fmt: skip
    linear.add_argument("--peers-path", metavar="DIR", help="folder that holds the peers' packages")
    linear.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    linear.add_argument("--json", metavar="FILE", help="JSON lines there ('-': to stdout instead of the tables)")
    linear.add_argument("--plot", metavar="FILE", help="draw the results: .svg or .png (needs matplotlib)")
    linear.add_argument("--chain", action="store_true", help="also what the op adds to a chain of base GEMMs")
    linear.add_argument("--idle", action="store_true", help="also a replay in which no row has an adapter")
    linear.add_argument("--overhead", action="store_true", help="also the host time of an eager call")
    linear.set_defaults(run=_bench_linear)

    plot = commands.add_parser("plot", help="draw saved results; needs no GPU")
    plot.add_argument("results", metavar="RESULTS", help="JSON lines of a run")
    plot.add_argument("-o", "--output", required=True, metavar="FILE", help=".svg or .png")
    plot.set_defaults(run=_bench_plot)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"must be names between commas, each once, got {text!r}")
    return names


def _paths(text: str) -> list[str]:
    known = ("auto", "cluster", "wide", "mma", "general")
    names = _names(text)
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {unknown[0]!r}")
    return names


def _refuse(text: str) -> int:
    print(text, file=sys.stderr)
    return USAGE


# ------------------------------------------------------------------------------------------------------------- demo


def _demo(arguments: argparse.Namespace) -> int:
    import torch

    import polylora
    from polylora import demo

    usable = torch.cuda.is_available() and polylora.has_cuda_kernels()
    if arguments.device == "cuda" and not usable:
        why = "no CUDA device is there" if polylora.has_cuda_kernels() else "this build has no CUDA kernels (no nvcc)"
        return _refuse(f"polylora demo: --device must be one that works here, got cuda: {why}")
    device = "cuda" if usable and arguments.device != "cpu" else "cpu"
    if arguments.device == "auto" and device == "cpu" and torch.cuda.is_available():
        print("polylora demo: there is a GPU, but this build has no CUDA kernels: running on the CPU", file=sys.stderr)
    target = arguments.json
    if target not in (None, "-") and (Path(target).is_dir() or not Path(target).resolve().parent.is_dir()):
        return _refuse(f"polylora demo: --json must be a file in a folder that exists, got {target}")

    started = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {text}", file=sys.stderr, flush=True)

    try:
        result = demo.run(
            tuple(demo.MODELS) if arguments.model == "both" else (arguments.model,),
            device,
            getattr(torch, arguments.dtype),
            arguments.tokens or demo.DEFAULT_TOKENS,
            progress,
        )
    except demo.DemoError as error:
        return _refuse(str(error))
    if target == "-":
        print(json.dumps(result, indent=1))
    else:
        print(demo.report(result))
        if target is not None:
            Path(target).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return NO if result["failures"] else DONE


# ------------------------------------------------------------------------------------------------------------- info


def _info(arguments: argparse.Namespace) -> int:
    values = _collect_info()
    if arguments.json:
        print(json.dumps(values, indent=1))
        return DONE
    print(f"polylora {values['polylora']}  ({values['library']})")
    print("CUDA kernels: " + ("built in" if values["cuda_kernels"] else "not built in (no nvcc at build time)"))
    print("versions:     " + ", ".join(f"{k} {v}" for k, v in values["versions"].items()))
    print("devices:      " + "; ".join(values["devices"]))
    print("ops:          " + ", ".join(values["ops"]))
    print("models:       " + ", ".join(values["models"]))
    return DONE


def _collect_info() -> dict[str, Any]:
    from importlib import metadata

    import torch

    import polylora
    from polylora._library import LIBRARY
    from polylora.models import known_model_types

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "peft", "numpy", "safetensors"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = [f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            it = torch.cuda.get_device_properties(i)
            devices.append(f"cuda:{i} ({it.name}, sm_{it.major}{it.minor}, {it.total_memory / 2**30:.0f} GiB)")
    names = {schema.name.removeprefix("polylora::") for schema in torch._C._jit_get_all_schemas() if
             schema.name.startswith("polylora::")}  # fmt: skip
    return {
        "polylora": polylora.__version__,
        "library": str(LIBRARY),
        "cuda_kernels": polylora.has_cuda_kernels(),
        "versions": versions,
        "devices": devices,
        "ops": sorted(names),
        "models": known_model_types(),
    }


# ------------------------------------------------------------------------------------------------------------ check


def _check(arguments: argparse.Namespace) -> int:
    from polylora.adapters import AdapterError, load_adapter
    from polylora.engines.base_weights import saved_base_weights
    from polylora.models import UnknownModelError, model_table

    for what, path, file in (
        ("ADAPTER_DIR", arguments.adapter, "adapter_config.json"),
        ("--model", arguments.model, "config.json"),
    ):
        if not (Path(path) / file).is_file():
            return _refuse(f"polylora check: {what} must be a folder with {file}, got {path}")
    try:
        from transformers import AutoConfig
    except ImportError as error:
        return _refuse(f"polylora check: needs transformers: pip install 'transformers>=5.12' 'peft>=0.18' ({error})")
    try:
        config = AutoConfig.from_pretrained(arguments.model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config makes transformers raise
        return _refuse(f"polylora check: --model must have a config that transformers reads, got: {error}")

    problems: list[str] = []
    adapter = None
    try:
        adapter = load_adapter(arguments.adapter, model_table(config, fused=False))
    except AdapterError as error:
        problems = str(error).splitlines()
    except UnknownModelError as error:
        problems = [str(error)]
    result = {"adapter": str(arguments.adapter), "model_type": config.model_type, "problems": problems}
    if adapter is not None:
        result |= _describe(adapter, model_table(config, fused=False))
        result["base_weights_not_compared"] = saved_base_weights(arguments.adapter)
    if arguments.json:
        print(json.dumps(result, indent=1))
    elif not problems:
        print(_check_report(result))
    for problem in problems:
        print(problem, file=sys.stderr)
    return NO if problems else DONE


def _describe(adapter, table) -> dict[str, Any]:
    """Sites, ranks and scales of an adapter that fits."""
    sites = []
    for path, weights in adapter.sites.items():
        site = table.sites[path]
        entries = [entry for row in weights.entries for entry in row if entry is not None]
        sites.append(
            {
                "path": path,
                "kind": site.kind,
                "k": site.k,
                "width": site.width,
                "ranks": sorted({entry.rank for entry in entries}),
                "scales": sorted({entry.scale for entry in entries}),
                "experts": site.experts,
                "matrices": len(weights.a) + len({id(entry.b) for entry in entries}),
            }
        )
    count = {id(t): t.numel() for w in adapter.sites.values() for t in w.a}
    for weights in adapter.sites.values():
        count |= {id(e.b): e.b.numel() for row in weights.entries for e in row if e is not None}
    return {"sites": sites, "parameters": sum(count.values()), "max_rank": adapter.max_rank}


def _check_report(result: dict[str, Any]) -> str:
    """One line for the sites of all layers that are alike."""
    import re

    alike: dict[tuple, list[str]] = {}
    for site in result["sites"]:
        shape = re.sub(r"\.\d+\.", ".*.", site["path"])
        key = (shape, site["kind"], site["k"], site["width"], tuple(site["ranks"]), tuple(site["scales"]))
        alike.setdefault(key, []).append(site["path"])
    rows = [("sites", "", "kind", "in", "out", "rank", "scale")]
    for (shape, kind, k, width, ranks, scales), paths in alike.items():
        name = paths[0] if len(paths) == 1 else shape
        span = [f"{numbers[0]:g}" + (f"-{numbers[-1]:g}" if len(numbers) > 1 else "") for numbers in (ranks, scales)]
        rows.append((name, f"x{len(paths)}", kind, str(k), str(width), *span))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{result['adapter']}: can be served on {result['model_type']}: {len(result['sites'])} sites, "
             f"{result['parameters']:,} parameters, largest rank {result['max_rank']}"]  # fmt: skip
    lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    saved = result["base_weights_not_compared"]
    if saved:
        lines.append(
            "base weights in the adapter, not compared here: an engine serves it only if they are the model's:"
        )
        lines += [f"  {key}" for key in saved]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ bench


def _bench_linear(arguments: argparse.Namespace) -> int:
    import torch

    from polylora.bench import cases, linear, peers, report, timing

    def refuse(text: str) -> int:
        return _refuse(f"polylora bench linear: {text}")

    try:
        chosen = [cases.Case.parse(text) for text in arguments.case] or cases.PRESETS[arguments.preset]()
    except ValueError as error:
        return refuse(f"--case: {error}")
    chosen = cases.select(chosen, arguments.filter)
    if not chosen:
        return refuse(f"--filter must leave a case of the preset {arguments.preset}, got {arguments.filter}")
    wanted = list(peers.PEERS) if arguments.peers is None else [] if arguments.peers == ["none"] else arguments.peers
    if unknown := [name for name in wanted if name not in peers.PEERS]:
        return refuse(f"--peers must be none or of {', '.join(peers.PEERS)}, got {', '.join(unknown)}")
    if arguments.peers_path is not None and not Path(arguments.peers_path).is_dir():
        return refuse(f"--peers-path must be a folder, got {arguments.peers_path}")
    target = arguments.json
    if target not in (None, "-") and (Path(target).is_dir() or not Path(target).resolve().parent.is_dir()):
        return refuse(f"--json must be a file in a folder that exists, got {target}")
    if arguments.plot is not None:
        try:
            report.check_plot(arguments.plot)
        except report.PlotError as error:
            return refuse(f"--plot: {error}")

    if why := _why_no_gpu():
        print(
            f"polylora bench linear: needs a GPU: {why}. `polylora info` says what was built and what torch sees; "
            "`polylora bench plot` draws saved results without a GPU.",
            file=sys.stderr,
        )
        return NO_GPU
    found, missing = peers.find_peers(wanted, arguments.peers_path)
    for name, why in missing.items():
        print(f"polylora bench linear: without {name}: {why}", file=sys.stderr)
    if missing and arguments.peers is not None:
        return refuse(f"--peers must name what can be imported, got {', '.join(missing)}; see --peers-path")

    started = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    options = linear.Options(
        cases=chosen,
        implementations=[peers.Polylora(p) for p in arguments.paths or [os.environ.get("POLYLORA_PATH") or "auto"]]
        + found,
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype],
        chain=arguments.chain,
        idle=arguments.idle,
        overhead=arguments.overhead,
        notes={"preset": None if arguments.case else arguments.preset, "filter": arguments.filter},
    )
    with contextlib.ExitStack() as stack:
        lines = sys.stdout if target == "-" else None
        if target not in (None, "-"):
            lines = stack.enter_context(open(target, "w", encoding="utf-8"))
        sink = report.Sink(None if target == "-" else sys.stdout, lines)
        try:
            failures = linear.run(options, timing.CudaTimer(), sink, progress)
        except linear.DeviceLost as error:
            print(f"polylora bench linear: {error}", file=sys.stderr)
            return NO
    if arguments.plot is not None:
        try:
            report.plot(sink.records, arguments.plot)
        except report.PlotError as error:
            print(f"polylora bench linear: --plot: {error}", file=sys.stderr)
            return NO
    for text in failures:
        print(f"polylora bench linear: failed: {text}", file=sys.stderr)
    return NO if failures else DONE


def _why_no_gpu() -> str:
    """Why the ops cannot run on a GPU here; empty where they can."""
    import torch

    import polylora

    if not torch.cuda.is_available():
        return "no CUDA device is there (torch.cuda.is_available() is false)"
    return "" if polylora.has_cuda_kernels() else "this build has no CUDA kernels (no nvcc at build time)"


def _bench_plot(arguments: argparse.Namespace) -> int:
    from polylora.bench import report

    try:
        report.plot(report.load(arguments.results), arguments.output)
    except (report.ResultsError, report.PlotError) as error:
        return _refuse(f"polylora bench plot: {error}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
