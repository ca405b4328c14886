"""vLLM's plugin: puts polylora's kernels behind vLLM's LoRA layers, without a change to vLLM.

:func:`register` is for vLLM's entry point group ``vllm.general_plugins``, which vLLM calls in every process. It is not
among this package's entry points yet; to turn it on, put a folder on ``PYTHONPATH`` that holds
``polylora_vllm-0.1.dist-info/METADATA`` and, beside it, ``entry_points.txt``::

    Metadata-Version: 2.1
    Name: polylora-vllm
    Version: 0.1

    [vllm.general_plugins]
    polylora = polylora_vllm:register

Where ``VLLM_PLUGINS`` is set, it must name ``polylora``. Then, at the start of a worker, vLLM logs ``Using
PolyloraPunicaWrapper.``; what it leaves to vLLM's own kernels, and why: :mod:`polylora.vllm_plugin`.

``POLYLORA_VLLM=0`` turns it off, ``POLYLORA_VLLM_BESIDE=0`` only the side streams
(``polylora/vllm_plugin/beside.py``). A vLLM of another minor version than :data:`SUPPORTED`, a platform that is not
CUDA, or a polylora that cannot be loaded leave vLLM as it is, and one line in the log says so.

A module beside the package, because the package loads the library of ops, which is one of the things that can fail.
"""

from __future__ import annotations

import importlib
import logging
import os

from polylora_cli import VERSION

#: Minor versions whose LoRA interface this was written against.
SUPPORTED = ("0.26", "0.33")
WRAPPER = "polylora.vllm_plugin.wrapper.PolyloraPunicaWrapper"

logger = logging.getLogger("vllm.polylora")  # below vLLM's own logger, which has the handlers


def register() -> None:
    """Makes vLLM use :data:`WRAPPER` for every LoRA model of this process. May be called any number of times."""
    if os.environ.get("POLYLORA_VLLM", "1") == "0":
        return
    reason = _refusal()
    if reason is not None:
        logger.warning("polylora: %s; vLLM's own LoRA kernels stay.", reason)
        return
    from vllm.config.lora import LoRAConfig
    from vllm.platforms import current_platform

    _choose_wrapper(type(current_platform))
    _mark_hash(LoRAConfig)


def _refusal() -> str | None:
    """Why vLLM is left as it is, or None."""
    import vllm

    if ".".join(vllm.__version__.split(".")[:2]) not in SUPPORTED:
        return f"vLLM {vllm.__version__} is not among the versions it knows ({', '.join(SUPPORTED)})"
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return f"the platform is not CUDA ({type(current_platform).__name__})"
    try:
        polylora = importlib.import_module("polylora")
    except Exception as error:  # whatever it is, a server that can serve without polylora must start
        return f"it cannot be loaded ({type(error).__name__}: {error})"
    if not polylora.has_cuda_kernels():
        return "its library was built without CUDA kernels"
    return None


def _choose_wrapper(platform: type) -> None:
    """vLLM asks its platform for the wrapper's name whenever it builds one."""
    platform.get_punica_wrapper = classmethod(lambda cls: WRAPPER)


def _mark_hash(config: type) -> None:
    """Lets the hash of the LoRA settings tell polylora's wrapper from vLLM's.

    The key of vLLM's cache of compiled models is made of such hashes; the wrapper, whose methods are traced into the
    model, is not part of it, and a model compiled with one would be run with the other.
    """
    original = config.compute_hash
    if getattr(original, "_polylora", False):
        return

    def compute_hash(self) -> str:
        return f"{original(self)}-polylora-{VERSION}"

    compute_hash._polylora = True
    config.compute_hash = compute_hash
