"""PEFT folders: ``adapter_config.json`` and ``adapter_model.safetensors``, read without trusting them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from .config import LoraConfig, parse_config
from .errors import AdapterError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

# A config is a few kilobytes; one with a rank for every expert of a large model is a few megabytes.
_MAX_CONFIG_BYTES = 64 << 20
_DTYPES = ("F32", "F16", "BF16")
_BASE_WEIGHT = ".base_layer.weight"


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as it lies on disk, not yet bound to a model.

    Attributes:
        name: for messages and for the pool.
        config: what decides ranks and scales.
        tensors: key without ``base_model.model.`` -> tensor (fp32, fp16 or bf16, finite, on the CPU, its own memory).
        base_weights: ``<module>.base_layer.weight`` -> shape. Whole base matrices that peft saves beside an adapted
            embedding; never read.
    """

    name: str
    config: LoraConfig
    tensors: Mapping[str, torch.Tensor]
    base_weights: Mapping[str, tuple[int, ...]]


def read_peft(path: str | os.PathLike, name: str | None = None) -> PeftAdapter:
    """Read a PEFT folder.

    Args:
        path: the folder.
        name: of the adapter; the folder's name when None.

    Returns:
        Config and tensors. No tensor shares memory with the file.

    Raises:
        AdapterError: a file is missing, not a regular file, outside the folder, truncated or corrupt; the config asks
            for something other than plain LoRA; a tensor has another dtype, no elements, or NaN or Inf in it. All
            offending keys and tensors are listed.
    """
    adapter, problems = read_with_problems(path, name)
    if problems:
        raise AdapterError(adapter.name, problems)
    return adapter


def read_with_problems(path: str | os.PathLike, name: str | None = None) -> tuple[PeftAdapter, list[str]]:
    """As :func:`read_peft`, but hands back what is wrong with config and tensors, for a caller that finds more.

    Raises:
        AdapterError: files that cannot be read at all.
    """
    folder = Path(path)
    name = name if name is not None else (folder.name or folder.resolve().name)
    if not folder.is_dir():
        raise AdapterError(name, [f"expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, got {str(folder)!r}"])
    config_file, weights_file = _find_files(folder, name)
    config, problems = parse_config(_load_json(config_file, name))
    tensors, base_weights, more = _load_tensors(weights_file, name)
    return PeftAdapter(name, config, tensors, base_weights), problems + more


def _find_files(folder: Path, name: str) -> tuple[Path, Path]:
    files, problems = [], []
    for wanted in (CONFIG_NAME, WEIGHTS_NAME):
        file = folder / wanted
        if not os.path.lexists(file):
            hint = ""
            if wanted == WEIGHTS_NAME and os.path.lexists(folder / "adapter_model.bin"):
                hint = " (adapter_model.bin is a pickle, which can run code: save it anew from peft as safetensors)"
            problems.append(f"missing file: expected {wanted}, got none{hint}")
            continue
        try:
            real, home = file.resolve(strict=True), folder.resolve()
            regular = stat.S_ISREG(real.stat().st_mode)
        except (OSError, RuntimeError) as error:
            problems.append(f"unreadable file {wanted}: expected a regular file, got {error}")
            continue
        # The Hugging Face cache links snapshots/<revision>/<file> to blobs/<hash> of the same repository.
        cached = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
        if not (real.is_relative_to(home) or cached):
            problems.append(f"link out of the folder: expected {wanted} inside {str(home)!r}, got {str(real)!r}")
        elif not regular:
            problems.append(f"unreadable file {wanted}: expected a regular file, got another kind of file")
        files.append(real)
    if problems:
        raise AdapterError(name, problems)
    return files[0], files[1]


def _load_json(file: Path, name: str):
    try:
        size = file.stat().st_size
        if size > _MAX_CONFIG_BYTES:
            raise AdapterError(name, [f"{CONFIG_NAME} too large: expected {_MAX_CONFIG_BYTES} bytes, got {size}"])
        return json.loads(file.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(name, [f"unreadable {CONFIG_NAME}: expected JSON, got {_reason(error)}"]) from None


def _load_tensors(file: Path, name: str) -> tuple[dict, dict, list[str]]:
    tensors, base_weights, problems = {}, {}, []
    try:
        with safe_open(file, framework="pt", device="cpu") as archive:
            for key in archive.keys():  # noqa: SIM118 (not a mapping)
                view = archive.get_slice(key)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                short = key.removeprefix(KEY_PREFIX)
                problem = _key_problem(key, shape, dtype)
                if short in tensors or short in base_weights:
                    problem = f"tensor {key!r} is there twice: expected it with or without {KEY_PREFIX!r}, got both"
                if problem:
                    problems.append(problem)
                elif short.endswith(_BASE_WEIGHT):
                    base_weights[short] = shape
                else:
                    # A copy: the file is mapped, and may be cut short or rewritten while the adapter is in use.
                    tensor = archive.get_tensor(key).clone()
                    tensors[short] = tensor
                    if not bool(torch.isfinite(tensor).all()):
                        bad = int((~torch.isfinite(tensor)).sum())
                        problems.append(f"tensor {key!r} is not finite: expected numbers, got {bad} NaN or Inf")
    except BaseException as error:
        # The library raises its own error, OSError, TypeError and, from a Rust panic, a bare BaseException.
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)):
            raise
        raise AdapterError(name, [f"unreadable {WEIGHTS_NAME}: expected safetensors, got {_reason(error)}"]) from None
    return tensors, base_weights, problems


def _key_problem(key: str, shape: tuple[int, ...], dtype: str) -> str | None:
    if ".." in key or "/" in key or "\\" in key or not key.isprintable():
        return f"tensor {key!r} has a strange name: expected a dotted module path, got one with '..' or a path in it"
    # A saved base matrix is not read, so it may be of any type (quantised bases are).
    if dtype not in _DTYPES and not key.endswith(_BASE_WEIGHT):
        return f"tensor {key!r} has the wrong dtype: expected one of {', '.join(_DTYPES)}, got {dtype}"
    if not shape or 0 in shape:
        return f"tensor {key!r} is empty: expected 2 or 3 dimensions of at least 1, got {list(shape)}"
    return None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
