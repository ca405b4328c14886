"""What the commands of ``polylora`` do. Their arguments and exit codes: :mod:`polylora_cli`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from polylora_cli import DONE, NO, USAGE
from polylora_cli import main as main


def refuse(text: str) -> int:
    print(text, file=sys.stderr)
    return USAGE


# ------------------------------------------------------------------------------------------------------------- demo


def run_demo(arguments: argparse.Namespace) -> int:
    import torch

    import polylora
    from polylora import demo

    usable = torch.cuda.is_available() and polylora.has_cuda_kernels()
    if arguments.device == "cuda" and not usable:
        why = "no CUDA device is there" if polylora.has_cuda_kernels() else "this build has no CUDA kernels (no nvcc)"
        return refuse(f"polylora demo: --device must be one that works here, got cuda: {why}")
    device = "cuda" if usable and arguments.device != "cpu" else "cpu"
    if arguments.device == "auto" and device == "cpu" and torch.cuda.is_available():
        print("polylora demo: there is a GPU, but this build has no CUDA kernels: running on the CPU", file=sys.stderr)
    target = arguments.json
    if target not in (None, "-") and (Path(target).is_dir() or not Path(target).resolve().parent.is_dir()):
        return refuse(f"polylora demo: --json must be a file in a folder that exists, got {target}")

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
        return refuse(str(error))
    if target == "-":
        print(json.dumps(result, indent=1))
    else:
        print(demo.report(result))
        if target is not None:
            Path(target).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return NO if result["failures"] else DONE


# ------------------------------------------------------------------------------------------------------------- info


def run_info(arguments: argparse.Namespace) -> int:
    from polylora._library import NO_KERNELS

    values = _collect_info()
    if arguments.json:
        print(json.dumps(values, indent=1))
        return DONE
    print(f"polylora {values['polylora']}  ({values['library']})")
    print("CUDA kernels: " + ("built in" if values["cuda_kernels"] else f"not built in ({NO_KERNELS})"))
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


#: Tensors that match no site from which on an adapter looks like another model's.
_MANY = 8


def run_check(arguments: argparse.Namespace) -> int:
    from polylora.adapters import AdapterError, load_adapter
    from polylora.engines.base_weights import saved_base_weights
    from polylora.models import UnknownModelError, model_table

    for what, path, file in (
        ("ADAPTER_DIR", arguments.adapter, "adapter_config.json"),
        ("--model", arguments.model, "config.json"),
    ):
        if not (Path(path) / file).is_file():
            return refuse(f"polylora check: {what} must be a folder with {file}, got {path}")
    try:
        from transformers import AutoConfig
    except ImportError as error:
        return refuse(f"polylora check: needs transformers: pip install 'transformers>=5.12' 'peft>=0.18' ({error})")
    try:
        config = AutoConfig.from_pretrained(arguments.model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config makes transformers raise
        return refuse(f"polylora check: --model must have a config that transformers reads, got: {error}")

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
    if len(strangers := [p for p in problems if " matches no site" in p]) > _MANY:
        base = json.loads((Path(arguments.adapter) / "adapter_config.json").read_text()).get("base_model_name_or_path")
        print(
            f"polylora check: {len(problems)} problems, {len(strangers)} of them tensors of modules that a "
            f"{config.model_type} has not: another model's adapter? Its own config says {base!r}.",
            file=sys.stderr,
        )
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


if __name__ == "__main__":
    sys.exit(main())
