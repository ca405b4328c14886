"""vLLM's plugin: puts polylora's kernels behind vLLM's LoRA layers, without a change to vLLM.

:func:`register` is this package's entry point in vLLM's group ``vllm.general_plugins``, which vLLM calls in every
process, with LoRA or without. Nothing else turns it on: where polylora is installed beside vLLM, a server started with
``--enable-lora`` uses it, and logs ``Using PolyloraPunicaWrapper.`` in its workers. What it leaves to vLLM's own
kernels, and why: :mod:`polylora.vllm_plugin`.

``POLYLORA_VLLM=0`` turns it off, ``POLYLORA_VLLM_BESIDE=0`` only the side streams
(``polylora/vllm_plugin/beside.py``). Where ``VLLM_PLUGINS`` is set, it must name ``polylora``. Whatever else stands
against it leaves vLLM as it is, and one line in the log of a process says so: at the start a vLLM of another minor
version than :data:`SUPPORTED`, a platform that is not CUDA, or anything unforeseen; as soon as LoRA is used a polylora
that cannot be loaded.

A module beside the package, because the package loads torch and the library of ops: that takes time, and it can fail.
A server without LoRA never loads it.
"""

from __future__ import annotations

import functools
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
    try:
        reason = _refusal()
        if reason is None:
            from vllm.config.lora import LoRAConfig
            from vllm.platforms import current_platform

            _mark_hash(LoRAConfig)
            _reach_ray_workers()
            _choose_wrapper(type(current_platform))
    except Exception as error:  # vLLM would not catch it, and a server that can serve without polylora must start
        reason = f"this vLLM cannot be given its kernels ({type(error).__name__}: {error})"
    if reason is not None:
        _say(reason)


def _reach_ray_workers() -> None:
    """Lets vLLM copy what is set of ``POLYLORA_*`` to its Ray workers, whose kernels would else differ."""
    name = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    prefixes = [prefix for prefix in os.environ.get(name, "").split(",") if prefix.strip()]
    if "POLYLORA_" not in prefixes and any(key.startswith("POLYLORA_") for key in os.environ):
        os.environ[name] = ",".join([*prefixes, "POLYLORA_"])


@functools.cache  # once a process
def _say(reason: str) -> None:
    logger.warning("polylora: %s; vLLM's own LoRA kernels stay.", reason)


def _refusal() -> str | None:
    """Why vLLM is left as it is, or None."""
    import vllm

    if ".".join(vllm.__version__.split(".")[:2]) not in SUPPORTED:
        return f"vLLM {vllm.__version__} is not among the versions it knows ({', '.join(SUPPORTED)})"
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return f"the platform is not CUDA ({type(current_platform).__name__})"
    return None


@functools.cache  # the first answer of a process holds
def _loads(module: str = "polylora") -> bool:
    """Loads a module of the package; whether vLLM can have its kernels. Otherwise the log says why not."""
    try:
        importlib.import_module(module)
        has_kernels = importlib.import_module("polylora").has_cuda_kernels()
        reason = None if has_kernels else "its library was built without CUDA kernels"
    except Exception as error:  # whatever it is, see register()
        reason = f"it cannot be loaded ({type(error).__name__}: {error})"
    if reason is not None:
        _say(reason)
    return reason is None


def _choose_wrapper(platform: type) -> None:
    """vLLM asks its platform for the wrapper's name whenever it builds one, which it does for LoRA alone."""
    original = platform.get_punica_wrapper
    if getattr(original, "_polylora", False):
        return

    def get_punica_wrapper(cls) -> str:
        return WRAPPER if _loads() and _loads(WRAPPER.rpartition(".")[0]) else original()

    get_punica_wrapper._polylora = True
    platform.get_punica_wrapper = classmethod(get_punica_wrapper)


def _mark_hash(config: type) -> None:
    """Lets the hash of the LoRA settings tell polylora's wrapper from vLLM's.

    The key of vLLM's cache of compiled models is made of such hashes; the wrapper, whose methods are traced into the
    model, is not part of it, and a model compiled with one would be run with the other.
    """
    original = config.compute_hash
    if getattr(original, "_polylora", False):
        return

    def compute_hash(self) -> str:
        return f"{original(self)}-polylora-{VERSION}" if _loads() else original(self)

    compute_hash._polylora = True
    config.compute_hash = compute_hash
