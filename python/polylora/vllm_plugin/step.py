"""Which adapter each row of a step uses, and the plan made of it.

vLLM tells the wrapper before a forward pass which adapter each token uses, and only if that changed; it does not tell
how many rows the pass will have once they are padded to a captured graph's. So the rows are kept on the device at one
address, -1 behind the last token, and the plan is made *inside* the pass, by the first LoRA op of it: a captured graph
holds the plan's kernel, and each replay plans for the rows of its own step.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available

from polylora.packed import PackedInts
from polylora.plan import PassPlans
from polylora.table import SliceTable, round_up
from polylora.vllm_plugin.side import SideStream

if TYPE_CHECKING:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

_STEPS: weakref.WeakValueDictionary[int, StepRows] = weakref.WeakValueDictionary()
_MARK = "_polylora_plan"


def slots_of(ids: Sequence[int], slot_ids: Sequence[int | None]) -> np.ndarray:
    """The slot of each row, int32 ``[rows]``; -1: the base model.

    Args:
        ids: vLLM's number of the adapter of each row; 0 or less: none.
        slot_ids: the number of the adapter in each slot, None where there is none.

    Raises KeyError for an adapter that is in no slot.
    """
    ids = np.asarray(ids, dtype=np.int64)
    slots = np.full(ids.shape, -1, dtype=np.int32)
    for slot, adapter in enumerate(slot_ids):
        if adapter is not None and adapter > 0:
            slots[ids == adapter] = slot
    lost = ids[(ids > 0) & (slots < 0)]
    if lost.size:
        raise KeyError(f"polylora: the adapter of number {lost[0]} is in no slot, these are: {list(slot_ids)}")
    return slots


class Fork(NamedTuple):
    """A GEMM of the base that is about to start, beside which deltas can be made.

    ``x``: the address of its input; ``table``: of the layer; ``plan``: of its rows; ``delta``: memory for
    ``[rows, outputs]``, allocated before the point ``mark`` of the step's stream, from which on ``side`` may write it.
    """

    x: int
    table: SliceTable
    plan: Tensor
    delta: Tensor
    side: SideStream
    mark: torch.cuda.Event | None


class StepRows:
    """The rows of one of vLLM's two mappings, tokens or logits, at one address for good.

    It takes over the tensors of ``meta``, which vLLM's own kernels and expert parallelism read: they are parts of one
    buffer, so that a step takes one copy from pinned memory and no synchronisation.

    Args:
        meta: whose tensors are replaced; its counters on the host are kept up to date.
        capacity: rows of the longest forward pass.
        num_slots: adapter slots.
    """

    def __init__(self, meta: LoRAKernelMeta, capacity: int, num_slots: int, device: torch.device | str) -> None:
        self.capacity = round_up(capacity, 256)  # graphs are padded, and may be a little longer than a step
        self.num_slots = num_slots
        self._meta = meta
        sizes = self.capacity, self.capacity, num_slots + 1, num_slots + 1, num_slots + 2
        self._packed = PackedInts(sizes, device)
        self.rows, order, active, counts, starts = self._packed.parts
        self._plans = PassPlans(self.rows, num_slots)
        meta.token_lora_mapping, meta.token_indices_sorted_by_lora_ids = self.rows, order
        meta.active_lora_ids, meta.num_tokens_per_lora, meta.lora_token_start_loc = active, counts, starts
        self.no_lora = meta.no_lora_flag_cpu
        self.turn = torch.zeros(1, dtype=torch.int32, device="cpu")
        self.fork: Fork | None = None
        _STEPS[self.rows.data_ptr()] = self
        self.update(np.empty(0, dtype=np.int32))
        # a graph that is captured before the first step (of a vision tower) must hold LoRA's kernels, as vLLM's would
        self.no_lora.fill_(False)

    def update(self, slots: np.ndarray) -> None:
        """Takes the rows of the coming steps. ``slots``: int32 ``[rows]``, -1 = none. No synchronisation.

        The rows behind them, up to the capacity, have no adapter: a graph that is padded to more rows than the step
        has must not follow what an earlier step left there.
        """
        if slots.size > self.capacity:
            raise ValueError(f"polylora: a step has up to {self.capacity} rows, got {slots.size}")
        self.fork = None  # of a pass that raised, or whose layer took another way
        with self._packed.sent() as parts:
            adapters = self._fill(slots, *parts)
        self._set_counters(adapters)

    @staticmethod
    def _fill(slots: np.ndarray, rows, order, active, counts, starts) -> int:
        """Fills the slot of each row, the order of the rows, then adapters, their rows, and where these start as vLLM's
        ``LoRAKernelMeta`` does, and returns how many groups of rows there are: adapters, and one of the rows without;
        0 where no row has one."""
        rows[: slots.size], rows[slots.size :] = slots, -1
        order[:], active[:], counts[:], starts[:] = 0, -1, 0, 0
        if not (slots >= 0).any():
            return 0
        order[: slots.size] = np.argsort(slots, kind="stable")
        found, sizes = np.unique(slots, return_counts=True)
        active[: found.size], counts[: found.size] = found, sizes
        starts[1 : 1 + found.size] = np.cumsum(sizes)
        return found.size

    def _set_counters(self, adapters: int) -> None:
        """The numbers that ops read on the host. ``adapters``: 0 = no row has one."""
        captured = self._meta.captured_lora_counts
        at = bisect.bisect_left(captured, adapters)
        self._meta.num_active_loras_cpu.fill_(captured[at] if adapters and at < len(captured) else adapters)
        self.no_lora.fill_(adapters == 0)

    def plan(self, rows: int) -> Tensor:
        """The plan of the first ``rows`` rows, int32 ``[plan_size(rows, num_slots)]``, filled once a forward pass.

        Which streams and captures have which: :class:`polylora.plan.PassPlans`.
        """
        if rows > self.capacity:
            raise ValueError(f"polylora: a forward pass has up to {self.capacity} rows, got {rows}")
        return self._plans.plan(rows, _made_in_this_pass())


def _made_in_this_pass() -> dict:
    """Which plans this forward pass has made, for :class:`polylora.plan.PassPlans`.

    vLLM makes a new context for each pass. Without one (vision towers, logits) nothing is remembered.
    """
    if not is_forward_context_available():
        return {}
    context = get_forward_context()
    marks = getattr(context, _MARK, None)
    if marks is None:
        marks = {}
        setattr(context, _MARK, marks)
    return marks


def step_of(rows: Tensor) -> StepRows:
    """The step that ``rows`` is a tensor of. Raises LookupError for another tensor."""
    step = _STEPS.get(rows.data_ptr())
    if step is None:
        raise LookupError(f"polylora_vllm: rows must be a PolyloraPunicaWrapper's, got a tensor {list(rows.shape)}")
    return step
