"""Whole base matrices that peft saves beside adapters of embeddings and heads, ``<module>.base_layer.weight``.

PEFT loads them into the base model. Here a batch has one base for all its adapters: they must say what it says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from polylora.adapters.peft_reader import KEY_PREFIX, WEIGHTS_NAME

_SUFFIX = ".base_layer.weight"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Of a saved matrix in memory at a time.
PIECE_BYTES = 64 << 20


def saved_base_weights(folder: str | os.PathLike) -> list[str]:
    """Keys of the base weights in an adapter's file, sorted. Raises what :func:`safetensors.safe_open` does."""
    with safe_open(Path(folder) / WEIGHTS_NAME, framework="pt", device="cpu") as archive:
        return sorted(key for key in archive.keys() if key.endswith(_SUFFIX))  # noqa: SIM118 (not a mapping)


def base_weight_problems(folder: str | os.PathLike, weight_of: Callable[[str], torch.Tensor]) -> list[str]:
    """Compares each saved base weight with the model's, in the model's dtype, a piece at a time.

    Args:
        folder: of an adapter that was read without problems.
        weight_of: called with a module path as the adapter spells it; the weight in the model, of the saved one's
            shape.

    Returns:
        One text for each that differs or cannot be compared.
    """
    try:
        return [
            problem
            for key in saved_base_weights(folder)
            if (problem := _problem(folder, key, weight_of(key.removeprefix(KEY_PREFIX).removesuffix(_SUFFIX))))
        ]
    except (OSError, SafetensorError) as error:
        return [f"unreadable {WEIGHTS_NAME}: expected the file it was just read from, got {error}"]


def _problem(folder: str | os.PathLike, key: str, weight: torch.Tensor) -> str | None:
    if weight.dtype not in _FLOATS:
        return f"tensor {key!r} cannot be compared: expected a module in float32, bfloat16 or float16, got one in " + (
            f"{str(weight.dtype).removeprefix('torch.')}, and PEFT would load the tensor"
        )
    for begin, piece in _pieces(folder, key):
        mine = weight[begin : begin + len(piece)]
        different = (piece.to(weight.device, weight.dtype) != mine).flatten(1).any(1).nonzero()  # NaN differs
        if len(different):
            saved, here = (str(t.dtype).removeprefix("torch.") for t in (piece, weight))
            return (
                f"tensor {key!r} is not the model's: expected the weight of its module in {here}, got other numbers "
                f"(saved in {saved}) from row {begin + int(different[0])} on, which PEFT would load into the base model"
            )
    return None


def _pieces(folder: str | os.PathLike, key: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of a tensor and the number of the first, without the whole in memory."""
    with safe_open(Path(folder) / WEIGHTS_NAME, framework="pt", device="cpu") as archive:
        view = archive.get_slice(key)
        rows, *rest = view.get_shape()
        step = max(1, PIECE_BYTES // (view[:1].element_size() * max(1, torch.Size(rest).numel())))
        for begin in range(0, rows, step):
            yield begin, view[begin : begin + step]
