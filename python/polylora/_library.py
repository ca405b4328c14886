"""Loads the library of torch ops, once a process.

Two copies of a library on torch's stable ABI that register the same ops crash the process, so a second copy is
refused here with a sentence instead.
"""

from __future__ import annotations

from pathlib import Path

import torch

#: Of the namespaces polylora and polylora_meta (their checks alone).
OPS = (
    "plan", "moe_plan", "shrink", "expand_", "linear_", "linear_delta", "add_delta_", "embedding_", "moe_gate_up_",
    "moe_down_", "moe_gate_up_act", "moe_down_reduce", "moe_delta", "moe_act", "moe_reduce",
)  # fmt: skip

LIBRARY = Path(__file__).parent / "lib" / "libpolylora_ops.so"


def load_library() -> Path:
    """Loads ``torch.ops.polylora`` and returns the library's path.

    Raises:
        ImportError: torch is older than 2.10, the library was not built, or from other sources, or another copy is
            already loaded.
    """
    if _torch_version() < (2, 10):
        raise ImportError(f"polylora needs torch >= 2.10, got {torch.__version__}")
    if not LIBRARY.is_file():
        raise ImportError(f"polylora: {LIBRARY} is missing; build it with `make build` or `pip install .`")
    path = str(LIBRARY.resolve())
    registered = torch._C._jit_get_schemas_for_operator("polylora::plan")
    if registered and path not in torch.ops.loaded_libraries:
        others = sorted(p for p in torch.ops.loaded_libraries if "polylora" in p) or ["an unknown file"]
        raise ImportError(f"polylora: the ops are already loaded from {others[0]}, cannot load {path} as well")
    torch.ops.load_library(path)
    names = [f"{namespace}::{op}" for namespace in ("polylora", "polylora_meta") for op in OPS]
    missing = [name for name in names if not torch._C._jit_get_schemas_for_operator(name)]
    if missing:
        raise ImportError(
            f"polylora: {path} was built from other sources, it has no {missing[0]}; build it again with `make build` "
            "or `pip install .`"
        )
    return LIBRARY


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


#: Why a library has no CUDA kernels.
NO_KERNELS = "no nvcc at build time, or POLYLORA_CUDA=OFF"


def has_cuda_kernels() -> bool:
    """Whether the library was built with the CUDA kernels; if not: :data:`NO_KERNELS`."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("polylora::plan", "CUDA")
