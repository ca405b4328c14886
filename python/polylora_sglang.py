"""SGLang's plugin: adds polylora to the LoRA backends that SGLang can be started with, without a change to SGLang.

:func:`register` is this package's entry point in SGLang's group ``sglang.srt.plugins``, which SGLang calls in every
process. It changes nothing by itself; the backend is chosen on the command line::

    sglang serve --model-path ... --enable-lora --lora-backend polylora ...

or with ``sglang.Engine(..., lora_backend="polylora")``. Where ``SGLANG_PLUGINS`` is set, it must name ``polylora``.
What the backend serves, and what it leaves to SGLang's own kernels: :mod:`polylora.sglang_plugin`.

``POLYLORA_SGLANG=0`` turns it off. With an SGLang of another version than :data:`SUPPORTED` one line in the log says
so, and ``polylora`` is not among the backends. Chosen where it cannot run, the backend raises while the server starts:
SGLang's own kernels never take its place unnoticed.

A module beside the package, because the package loads the library of ops, which only the workers need.
"""

from __future__ import annotations

import logging
import os
from typing import get_type_hints

NAME = "polylora"
#: Versions whose LoRA interface this was written against; it changes with the third number.
SUPPORTED = ("0.5.23",)

logger = logging.getLogger("sglang.polylora")


def register() -> None:
    """Makes :data:`NAME` one of SGLang's LoRA backends. May be called any number of times."""
    if os.environ.get("POLYLORA_SGLANG", "1") == "0":
        return
    import sglang

    if not _supported(sglang.__version__):
        known = ", ".join(SUPPORTED)
        logger.warning(
            "polylora: SGLang %s is not among the versions it knows (%s); there is no --lora-backend %s.",
            sglang.__version__,
            known,
            NAME,
        )
        return
    from sglang.srt.lora.backend.lora_registry import register_lora_backend
    from sglang.srt.server_args import ServerArgs

    register_lora_backend(NAME)(_backend)
    _allow_on_command_line(ServerArgs)


def _supported(version: str) -> bool:
    """Whether the first three numbers of a version are those of one of :data:`SUPPORTED`."""
    return ".".join(version.split("+")[0].split(".")[:3]) in SUPPORTED


def _backend() -> type:
    """SGLang calls it in the processes that run a model, to build one."""
    from polylora.sglang_plugin.backend import PolyloraLoRABackend

    return PolyloraLoRABackend


def _allow_on_command_line(server_args: type) -> None:
    """``--lora-backend`` takes one of a list that SGLang's registry does not extend."""
    for mark in get_type_hints(server_args, include_extras=True)["lora_backend"].__metadata__:
        choices = getattr(mark, "choices", None)
        if choices is not None and NAME not in choices:
            choices.append(NAME)
