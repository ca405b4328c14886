"""polylora: multi-LoRA kernels. Every row of a batch may use another adapter of another rank.

The ops are ``torch.ops.polylora.*`` (documented in :mod:`polylora.ops`); :class:`polylora.Plan` groups the rows of a
step; :class:`polylora.SliceTable` says where the weights lie; :class:`polylora.AdapterPool` holds loaded adapters;
:mod:`polylora.engines.hf` puts them under a Hugging Face model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polylora_cli import VERSION as __version__

from polylora._library import has_cuda_kernels, load_library

load_library()

from polylora import ops  # noqa: E402  (the ops must be registered before their fakes)
from polylora.adapters import MAX_RANK, AdapterError  # noqa: E402
from polylora.plan import Plan, plan_size  # noqa: E402
from polylora.pool import AdapterPool  # noqa: E402
from polylora.table import SliceTable  # noqa: E402

if TYPE_CHECKING:
    import torch

    from polylora.engines.hf import HfEngine

__all__ = [
    "AdapterError",
    "AdapterPool",
    "EngineError",
    "Plan",
    "SliceTable",
    "__version__",
    "attach",
    "has_cuda_kernels",
    "ops",
    "plan_size",
]


def __getattr__(name: str) -> type[Exception]:
    if name == "EngineError":  # what raises it is loaded by attach alone
        from polylora.engines.errors import EngineError

        return EngineError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attach(
    model: torch.nn.Module,
    *,
    max_adapters: int = 8,
    max_rank: int = MAX_RANK,
    dtype: torch.dtype | None = None,
) -> HfEngine:
    """Puts polylora under a Hugging Face model.

    Args:
        model: a causal language model of a family that :func:`polylora.models.known_model_types` lists, on one device,
            in ``eval()``.
        max_adapters: adapters loaded at a time.
        max_rank: adapters with a larger rank are refused at load.
        dtype: of the adapters' weights here; the dtype of the model's linears when None.

    Returns:
        The engine, :class:`polylora.engines.HfEngine`, which also says what is raised.
    """
    from polylora.engines.hf import HfEngine  # needs transformers, which the ops do not

    return HfEngine(model, max_adapters=max_adapters, max_rank=max_rank, dtype=dtype)
