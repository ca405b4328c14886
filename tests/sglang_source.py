"""SGLang's own Python files, imported where SGLang is not installed, with stand-ins for what they cannot have there.

``POLYLORA_SGLANG_SOURCE`` names an unpacked wheel of SGLang, or the folder that it is installed in. What stands in for
what, where it is not installed:

- packages that its LoRA layers never call (web servers, Triton on a machine without it, serialisers): empty modules;
- SGLang's own HTTP front end, and its readers of Hugging Face's configurations: empty modules;
- pinned memory, where there is no GPU: ordinary memory;
- process groups: a name for one rank of several, which are run one after another.

Everything else, base layers and those with LoRA, the memory pool, the manager that fills it and prepares a batch, the
base class of backends, their registry, SGLang's plugins and command line, is SGLang's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch

SOURCE = os.environ.get("POLYLORA_SGLANG_SOURCE")
#: Stand-ins where they are not installed.
MISSING = (
    "IPython", "aiohttp", "compressed_tensors", "dill", "einops", "fastapi", "gguf", "openai", "orjson",
    "partial_json_parser", "pybase64", "requests", "sgl_kernel", "starlette", "torchvision", "triton", "tvm_ffi",
    "uvicorn", "uvloop", "zmq",
)  # fmt: skip
#: Stand-ins where SGLang is not installed.
NOT_CALLED = (
    "sglang.srt.entrypoints", "sglang.srt.utils.hf_transformers", "sglang.srt.utils.hf_transformers_utils",
)  # fmt: skip
#: Packages whose modules are SGLang's, but whose ``__init__`` is not run, where SGLang is not installed.
HOLLOW = ("sglang", "sglang.srt.configs")


def require_sglang() -> None:
    """Makes ``import sglang`` work, from the source tree; skips the module that calls it where there is none."""
    if SOURCE is None:
        pytest.skip("POLYLORA_SGLANG_SOURCE names no source tree of SGLang", allow_module_level=True)
    if importlib.util.find_spec("msgspec") is None:
        pytest.skip("msgspec is not installed, which SGLang's settings are made of", allow_module_level=True)
    if "sglang" in sys.modules:
        return
    assert (Path(SOURCE) / "sglang/srt/lora/backend/lora_registry.py").is_file(), SOURCE
    sys.path.insert(0, SOURCE)
    if importlib.util.find_spec("sgl_kernel") is None:  # SGLang is unpacked, not installed
        # torch's own look-ups of Triton come first: they take a stand-in for the real one
        for name in ("torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.runtime.triton_heuristics"):
            importlib.import_module(name)
        sys.meta_path.insert(0, StandIns(NOT_CALLED))
        sys.meta_path.insert(0, Hollow())
        sys.meta_path.append(StandIns(MISSING, importer="sglang"))


class AnyType(type):
    """The type of stand-in classes: any attribute, any index."""

    def __getattr__(cls, name):
        return anything(name)

    def __getitem__(cls, item):
        return cls


class Anything(metaclass=AnyType):
    """A base class, a decorator, a constant, whatever an import or a class body makes of it."""

    def __init_subclass__(cls, **kwargs):
        pass

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        return anything(name)

    def __getitem__(self, item):
        return self

    def __or__(self, other):
        return self

    __ror__ = __or__


def anything(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    if name.endswith(("Error", "Exception")):
        return type(name, (Exception,), {})
    return type(name, (Anything,), {}) if name[0].isupper() else Anything()


class StandIn(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name):
        value = anything(name)
        setattr(self, name, value)
        return value


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for some names and whatever is below them, for all importers or those of one package."""

    def __init__(self, names, importer: str | None = None):
        self.names, self.importer = names, importer

    def find_spec(self, name, path=None, target=None):
        if not below(name, self.names) or not self.serves(importing_module()):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def serves(self, module: str) -> bool:
        return self.importer is None or below(module, (self.importer, *self.names))

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        if module.__name__ == "IPython":
            module.version_info = (9, 0)  # matplotlib, in the same process, compares it


class Hollow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages with their modules, but without what their ``__init__`` imports."""

    def find_spec(self, name, path=None, target=None):
        if name not in HOLLOW:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = StandIn(spec.name)
        module.__path__ = [str(Path(SOURCE, *spec.name.split(".")))]
        return module

    def exec_module(self, module):
        if module.__name__ == "sglang":
            module.__version__ = importlib.import_module("sglang._version").__version__


def below(name: str, packages) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def importing_module() -> str:
    """The name of the module whose import statement is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and not below(name, ("importlib",)):
            return name
        frame = frame.f_back
    return ""


# -------------------------------------------------------------------------------------------------- a rank, and batches


@pytest.fixture
def serving(device, monkeypatch):
    """A function that makes this process rank ``rank`` of ``ranks``, until it is called again or the test ends.

    Returns SGLang's server arguments. New tensors are bfloat16 on the device of the test, unless told otherwise.
    """
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
        for name in ("tensor", "empty", "zeros", "arange"):
            monkeypatch.setattr(torch, name, unpinned(getattr(torch, name)))
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as inner:

        def serve(rank=0, ranks=1, dtype=torch.bfloat16, **server_args):
            inner.close()
            runtime = importlib.import_module("sglang.srt.runtime_context")
            args = {"enable_lora": True, "max_loras_per_batch": 4, "lora_backend": "polylora", **server_args}
            published = inner.enter_context(runtime.get_context().override_server_args(device=device, **args))
            inner.enter_context(runtime.get_parallel().override(**one_rank(rank, ranks)))
            torch.set_default_dtype(dtype)
            torch.set_default_device(device if device != "cpu" else None)
            torch.manual_seed(0)
            return published

        yield serve
    torch.set_default_dtype(before)
    torch.set_default_device(None)


def unpinned(function):
    def call(*args, pin_memory=False, **kwargs):
        return function(*args, **kwargs)

    return call


def one_rank(rank: int, ranks: int) -> dict:
    """SGLang's parallel state of one rank, tensor-parallel alone."""
    group = types.SimpleNamespace(rank_in_group=rank, world_size=ranks, all_reduce=lambda t: t)
    alone = types.SimpleNamespace(rank_in_group=0, world_size=1, is_last_rank=True)
    sizes = {"tp_size": ranks, "attn_tp_size": ranks, "attn_dp_size": 1, "moe_ep_size": 1, "moe_tp_size": ranks}
    at = {"tp_rank": rank, "attn_tp_rank": rank, "attn_dp_rank": 0, "moe_ep_rank": 0, "moe_tp_rank": rank}
    return {**sizes, **at, "tp_group": group, "attn_tp_group": group, "pp_group": alone}


def forward_batch(lora_ids, lengths=None, *, verify=0, logprob_starts=None):
    """SGLang's batch, as far as LoRA looks at it.

    Args:
        lora_ids: of each request; None: the base model.
        lengths: rows of each request: a prefill. None: decode, or with ``verify`` > 0 the verification of so many
            tokens a request.
        logprob_starts: of a prefill whose logits are wanted from these rows on.
    """
    mode = importlib.import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
    kind = mode.EXTEND if lengths is not None else mode.TARGET_VERIFY if verify else mode.DECODE
    return types.SimpleNamespace(
        forward_mode=kind,
        batch_size=len(lora_ids),
        lora_ids=list(lora_ids),
        extend_seq_lens_cpu=lengths,
        extend_num_tokens=None if lengths is None else sum(lengths),
        return_logprob=logprob_starts is not None,
        extend_logprob_start_lens_cpu=logprob_starts,
        spec_info=types.SimpleNamespace(draft_token_num=verify),
    )


def has_sglangs_kernels() -> bool:
    """Whether SGLang's Triton kernels are themselves."""
    return torch.cuda.is_available() and not isinstance(importlib.import_module("triton"), StandIn)
