"""The activation of a gated MLP, in one pass over gate and up with their deltas.

vLLM's MLPs call ``gate_up_proj``, ``act_fn`` and ``down_proj``. Deltas that are added where the first of these ends
are a pass over outputs that the second reads again. So the layer of gate and up gives ``h = act(y + delta)``, and
``act_fn`` hands on what is as narrow as that. The model's own forward pass stays as it is: h goes the way that y went,
and code that wants gate and up apart meets another width, which is an error and no loss.

:func:`fuse_activations` finds the MLPs whose forward pass gives the layer's output to ``act_fn`` and to nothing else.
Which steps: all of them, with vLLM's own activation where no row has an adapter. That one rounds act(gate) to 16 bits
before it is multiplied, the fused one does not; so a row of the base model in a step with adapters may differ in its
last bits from the same row in a step without. Not with ``POLYLORA_BATCH_INVARIANT=1``, which keeps vLLM's.
"""

from __future__ import annotations

import dis
import functools
import logging
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from vllm.lora.layers import MergedColumnParallelLinearWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from polylora.ops import ACTIVATIONS
from polylora.table import SliceTable
from polylora.vllm_plugin.tables import FUSED, TABLE, say_once

# vLLM's activation of a layer, by its table: what its output is where no row has an adapter. Its own kernel, also where
# vLLM would have Inductor make one: that would be compiled while a graph is captured.
_VLLMS: weakref.WeakKeyDictionary[SliceTable, Callable[[Tensor], Tensor]] = weakref.WeakKeyDictionary()

# What may stand from the one call to the other: instructions that only carry a value along, and the function that newer
# versions give act_fn to, which knows the activations that are one with a quantisation, and calls others.
_CARRIES = (
    "CALL", "COPY", "LOAD_CONST", "LOAD_FAST", "NOP", "POP_TOP", "PRECALL", "PUSH_NULL", "STORE_FAST", "SWAP",
    "UNPACK_SEQUENCE",
)  # fmt: skip
_CALLS_IT = ("maybe_fused_act_quant", "down_proj")


class AfterFused(nn.Module):
    """Takes the place of ``act_fn``: what is ``width`` wide already went through it."""

    def __init__(self, vllms: nn.Module, width: int) -> None:
        super().__init__()
        self.vllms = vllms
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] == self.width else self.vllms(x)


def follow_models(wrapper: type) -> None:
    """Has :func:`fuse_activations` look at every model that is given LoRA layers; may be called any number of times."""
    original = LoRAModelManager._create_lora_modules
    if getattr(original, "_polylora", False):
        return

    @functools.wraps(original)
    def _create_lora_modules(self) -> None:
        original(self)
        fuse_activations(self.model, wrapper)

    _create_lora_modules._polylora = True
    LoRAModelManager._create_lora_modules = _create_lora_modules


def fuse_activations(model: nn.Module, wrapper: type) -> None:
    """Prepares the MLPs of a model whose gate and up are an adopted layer with a ``wrapper``."""
    for mlp in list(model.modules()):
        layer, act = getattr(mlp, "gate_up_proj", None), getattr(mlp, "act_fn", None)
        code = _code_of(act)
        if code is None or not _is_served(layer, wrapper) or not feeds_activation(type(mlp).forward):
            continue
        if any(_is_quantised(child) for child in mlp.children() if child is not layer):
            continue  # down: vLLM has the activation and the quantisation of its output in one kernel
        table = getattr(layer, TABLE)
        _VLLMS[table] = act.forward_cuda if table.table.is_cuda else act.forward_native
        setattr(layer, FUSED, code)
        mlp.act_fn = AfterFused(act, table.widths[0])
        say_once(f"{type(mlp).__name__}: {type(act).__name__} and the deltas of gate and up are one.", logging.INFO)


def _code_of(act: object) -> int | None:
    """The number of an activation that the ops have, or None. Subclasses may compute something else."""
    if type(act) is SiluAndMul:
        return ACTIVATIONS["silu"]
    if type(act) is GeluAndMul:
        return ACTIVATIONS["gelu_tanh" if act.approximate == "tanh" else "gelu"]
    return None


def _is_served(layer: object, wrapper: type) -> bool:
    """Gate and up as two slices of a width that the fast kernels take, on this rank alone, in the layer's own order."""
    if type(layer) is not MergedColumnParallelLinearWithLoRA or not isinstance(layer.punica_wrapper, wrapper):
        return False
    table = getattr(layer, TABLE, None)
    if table is None or len(table.widths) != 2 or table.widths[0] != table.widths[1] or table.widths[0] % 8:
        return False
    if table.b[0].dtype not in (torch.bfloat16, torch.float16):
        return False
    return not (layer.base_layer.gather_output and layer.tp_size > 1)


def _is_quantised(linear: nn.Module) -> bool:
    method = getattr(getattr(linear, "base_layer", linear), "quant_method", None)
    return method is not None and not isinstance(method, UnquantizedLinearMethod)


def feeds_activation(forward: Callable) -> bool:
    """Whether a method calls ``self.gate_up_proj`` once, gives what it returns to ``self.act_fn``, called once, and
    reads it nowhere else."""
    try:
        code = [i for i in dis.get_instructions(forward) if i.opname != "CACHE"]
    except TypeError:  # no Python function
        return False
    names = [i.argval if i.opname in ("LOAD_ATTR", "LOAD_METHOD") else None for i in code]
    if names.count("gate_up_proj") != 1 or names.count("act_fn") != 1:
        return False
    begin, end = names.index("gate_up_proj"), names.index("act_fn")
    calls = [at for at, i in enumerate(code) if i.opname.startswith("CALL")]
    called = min((at for at in calls if at > end), default=0)
    between = code[begin + 1 : end] + code[end + 1 : called]
    if begin > end or not all(i.opname.startswith(_CARRIES) or i.argval in _CALLS_IT for i in between):
        return False
    if sum(begin < at < end for at in calls) != 1:  # the layer's own call
        return False
    return not _reads(code[called:], {name for i in between if _stores(i) for name in _locals(i)})


def _stores(instruction: dis.Instruction) -> bool:
    return instruction.opname.startswith("STORE_FAST")


def _locals(instruction: dis.Instruction) -> tuple[str, ...]:
    """The locals of an instruction; newer Pythons have some that name two."""
    return instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)


def _reads(code: Sequence[dis.Instruction], values: set[str]) -> bool:
    """Whether one of the locals is loaded before it is stored anew."""
    for i in code:
        if i.opname.startswith("LOAD_FAST") and values & set(_locals(i)):
            return True
        if _stores(i):
            values = values - set(_locals(i))
    return False


def vllms_activation(table: SliceTable, y: Tensor) -> Tensor:
    """What vLLM's own activation makes of gate and up ``y [M, 2 width]``: ``[M, width]``."""
    return _VLLMS[table](y)
