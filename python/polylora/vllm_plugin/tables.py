"""vLLM's slot tensors as slice tables: in place, with the true rank of the adapter in each slot.

A slot has room for ``max_lora_rank`` ranks and is padded with zeros; a table that knows the adapter's own rank spares
the kernels the padding. vLLM tells it to the layer, by ``set_lora`` and ``reset_lora``, which are therefore followed
on every layer that is given our wrapper. Tables change in place: a captured graph sees the new ranks.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from vllm.lora.layers import BaseLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from polylora._host import MAX_SLICES
from polylora.adapters import MAX_RANK
from polylora.table import SliceTable

logger = logging.getLogger("vllm.polylora")

_SERVED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_said: set[str] = set()
# Of a layer; private names stay with the layer where vLLM forwards others to its base.
TABLE = "_polylora_table"
FUSED = "_polylora_activation"  # the number of the activation (polylora.ops.ACTIVATIONS) whose output it gives, or None

# By the address of the first slice. A layer's table lives as long as the layer; a table holds its tensors, so that
# no other tensor can have the address while it is here.
_BY_A: weakref.WeakValueDictionary[int, SliceTable] = weakref.WeakValueDictionary()
_BY_B: weakref.WeakValueDictionary[int, SliceTable] = weakref.WeakValueDictionary()
_WHOLE: list[SliceTable] = []


# ------------------------------------------------------------------------------------------------------ what is served


def say_once(sentence: str, level: int = logging.WARNING) -> bool:
    """Logs a sentence unless it was said before. Returns True."""
    if sentence not in _said:
        _said.add(sentence)
        logger.log(level, "polylora: %s", sentence)
    return True


def refusal_of_slots(rank: int, slices: int, dtype: torch.dtype) -> str | None:
    """Why slot tensors of ``rank`` are left to vLLM's kernels, or None."""
    if rank > MAX_RANK:
        return f"slots of rank {rank} (the most is {MAX_RANK})"
    if slices > MAX_SLICES:
        return f"{slices} slices (the most is {MAX_SLICES})"
    if dtype not in _SERVED_DTYPES:
        return f"LoRA weights of {dtype}"
    return None


# --------------------------------------------------------------------------------------------------------- the layers


def follow_layers(wrapper: type, adopt: Callable[[nn.Module], object]) -> None:
    """Has every layer that is given a ``wrapper`` adopted; may be called any number of times."""
    original = BaseLayerWithLoRA.set_mapping
    if getattr(original, "_polylora", False):
        return

    @functools.wraps(original)
    def set_mapping(self, punica_wrapper):
        original(self, punica_wrapper)
        if isinstance(punica_wrapper, wrapper):
            adopt(self)

    set_mapping._polylora = True
    BaseLayerWithLoRA.set_mapping = set_mapping


def go_through(wrapper: type) -> None:
    """Has every adopted linear with a ``wrapper`` tell it when the base's GEMM comes, and leave it the rest where the
    activation is part of it; may be called any number of times."""
    original = BaseLinearLayerWithLoRA._apply_sync
    if getattr(original, "_polylora", False):
        return

    @functools.wraps(original)
    def _apply_sync(self, x, bias=None):
        if isinstance(self.punica_wrapper, wrapper) and getattr(self, TABLE, None) is not None:
            self.punica_wrapper.before_base(x, self.lora_a_stacked)
            if getattr(self, FUSED) is not None:
                return self.punica_wrapper.apply_fused(self, x, bias)
        return original(self, x, bias)

    _apply_sync._polylora = True
    BaseLinearLayerWithLoRA._apply_sync = _apply_sync


def adopt(layer: nn.Module) -> None:
    """Makes the layer's table and keeps it up to date from now on. Layers that are not served are named in the log."""
    if getattr(layer, TABLE, None) is not None:
        return
    name = type(layer).__name__
    if not isinstance(layer, BaseLinearLayerWithLoRA | VocabParallelEmbeddingWithLoRA | LogitsProcessorWithLoRA):
        say_once(f"{name} keeps vLLM's kernels.")
        return
    a, b = _slices_of(layer)
    reason = refusal_of_slots(b[0].size(-1), len(b), b[0].dtype)
    if isinstance(layer, BaseLinearLayerWithLoRA) and layer.lora_config.fully_sharded_loras:
        reason = "fully sharded LoRA"
    if reason is not None:
        say_once(f"{name} keeps vLLM's kernels: {reason}.")
        return
    table = _table_of(layer, a, b)
    _announce(table)
    setattr(layer, TABLE, table)
    setattr(layer, FUSED, None)  # asked for at every call, and a module looks long for what it has not
    _follow_slots(layer, table)


def _slices_of(layer: nn.Module) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    return ((a,), (b,)) if isinstance(a, Tensor) else (a, b)


def _table_of(layer: nn.Module, a: Sequence[Tensor], b: Sequence[Tensor]) -> SliceTable:
    """A table of what the slots hold now. Of an adapter that was there before, the slot's whole rank is used."""
    used = torch.stack([t.flatten(1).any(1) for t in a]).any(0).tolist()
    ranks = [b[0].size(-1) if any_weight else 0 for any_weight in used]
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        return SliceTable.from_vllm_embedding(a[0], b[0], ranks)
    return SliceTable.from_vllm(a, b, ranks)


def _follow_slots(layer: nn.Module, table: SliceTable) -> None:
    """Replaces the layer's ``set_lora`` and ``reset_lora`` by ones that tell the table as well."""
    set_lora, reset_lora = layer.set_lora, layer.reset_lora

    @functools.wraps(set_lora)
    def set_and_tell(index: int, lora_a, lora_b) -> None:
        set_lora(index, lora_a, lora_b)  # which resets the slot first, and thereby clears the table's
        table.set_slot(index, true_ranks(layer, len(table.widths), lora_a, lora_b))

    @functools.wraps(reset_lora)
    def reset_and_tell(index: int) -> None:
        reset_lora(index)
        table.clear_slot(index)

    layer.set_lora, layer.reset_lora = set_and_tell, reset_and_tell


def true_ranks(layer: nn.Module, slices: int, lora_a, lora_b) -> list[int]:
    """The rank of each slice of an adapter, 0 where it leaves one out.

    Args:
        lora_a: ``[r, k]`` (an embedding: ``[r, vocab]``), for all slices, or a list of such, None where one is absent.
        lora_b: ``[outputs, r]`` or a list. Fewer than slices: some cover several, as the layer itself knows.
    """
    if isinstance(lora_a, Tensor):
        return [lora_a.size(0)] * slices
    if isinstance(lora_b, list) and len(lora_b) != slices:
        lora_a, lora_b = layer.expand_packed_lora(lora_a, lora_b)
    halves = zip(lora_a, lora_b, strict=True)
    return [0 if a is None or b is None else a.size(0) for a, b in halves]


# --------------------------------------------------------------------------------------------------------- the look-up


def _announce(table: SliceTable) -> None:
    _BY_A[table.a[0].data_ptr()] = table
    _BY_B[table.b[0].data_ptr()] = table


def table_of_a(a: Sequence[Tensor]) -> SliceTable:
    """The table of slot tensors A, one a slice. Raises LookupError for tensors of no layer that announced itself."""
    return _look_up(_BY_A, "a", a)


def table_of_b(b: Sequence[Tensor]) -> SliceTable:
    """The table of slot tensors B, one a slice. Raises LookupError for tensors of no layer that announced itself."""
    return _look_up(_BY_B, "b", b)


def _look_up(tables: Mapping[int, SliceTable], name: str, slices: Sequence[Tensor]) -> SliceTable:
    table = tables.get(slices[0].data_ptr())
    if table is None:
        got = f"a tensor {list(slices[0].shape)}"
        raise LookupError(f"polylora_vllm: {name}[0] must be a layer's whose set_mapping was called, got {got}")
    return table


def announce_whole(a: Sequence[Tensor]) -> None:
    """Makes a table for tensors ``[slots, 1, R, K]`` that are multiplied like an A but belong to no LoRA layer, if
    there is none: every slot is used whole, and the table is kept for good."""
    if a[0].data_ptr() in _BY_A:
        return
    table = SliceTable.from_vllm(
        a, [t.new_zeros(t.size(0), 1, 8, t.size(-2)) for t in a], [a[0].size(-2)] * a[0].size(0)
    )
    _WHOLE.append(table)
    _announce(table)
