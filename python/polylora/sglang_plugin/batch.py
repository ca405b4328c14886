"""Which adapter each row of a batch uses, on the device, and the plan made of it.

SGLang prepares a batch on the host before the forward pass, and does not tell how many rows the pass will have once
they are padded to a captured graph's. So the slots of the rows are copied to the device, -1 behind the last row, and
the plan is made *inside* the pass: a captured graph holds the plan's kernel, and each replay plans for the rows of its
own batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from sglang.srt.lora.utils import LoRABatchInfo, MoELoRABatchInfo
from torch import Tensor

from polylora.packed import PackedInts
from polylora.plan import PassPlans
from polylora.table import round_up, sent_to

_PADDING = 256  # of an eager pass: tensor parallelism pads its rows to a multiple of the ranks


class Rows:
    """The slots of the rows of a pass, and their plan.

    Args:
        slots: int32 ``[capacity]`` on the device, -1 = no adapter; filled by the owner, which calls :meth:`renew`.
        num_slots: adapter slots.
    """

    def __init__(self, slots: Tensor, num_slots: int) -> None:
        self.slots = slots
        self.num_slots = num_slots
        self.count = 0
        self._plans = PassPlans(slots, num_slots)
        self._made: dict = {}

    def renew(self, count: int) -> None:
        """Takes note that ``slots`` holds another batch, of ``count`` rows."""
        self.count = count
        self.forget()

    def forget(self) -> None:
        """The next calls of :meth:`plan` make it anew."""
        self._made.clear()

    def first(self, rows: int) -> Tensor:
        """The slots of the batch's rows and of the padding behind them, int32 ``[rows]``.

        Raises ValueError for fewer rows than the batch has (which of its rows would they be?), or more than there is
        room for.
        """
        if not self.count <= rows <= self.slots.numel():
            expected = f"{self.count} rows, padded to {self.slots.numel()} at the most"
            raise ValueError(f"polylora: a layer of this batch has {expected}, got {rows}")
        return self.slots[:rows]

    def split(self, counts: Sequence[int]) -> list[Rows]:
        """The rows in parts that follow each other, each with a plan of its own."""
        parts = [Rows(slots, self.num_slots) for slots in self.slots[: self.count].split(list(counts))]
        for part, count in zip(parts, counts, strict=True):
            part.renew(count)
        return parts

    def plan(self, rows: int) -> Tensor:
        """The plan of the first ``rows`` rows, int32 ``[plan_size(rows, num_slots)]``, made once a pass.

        Which streams and captures have which: :class:`polylora.plan.PassPlans`. Raises ValueError as :meth:`first`.
        """
        self.first(rows)
        return self._plans.plan(rows, self._made)


@dataclass
class HeadRows:
    """The rows whose logits a prefill computes, or one part of them: what SGLang's lm_head looks at, and the rows."""

    rows: Rows
    expected_tokens: int
    use_cuda_graph: ClassVar[bool] = False


@dataclass(eq=False)
class Batch(LoRABatchInfo):
    """SGLang's description of a batch, one segment a request, for the kernels of its own that read it; and the rows."""

    rows: Rows | None = None


class BatchBuffer:
    """Memory on the device for the description of one batch at a time.

    Args:
        slots: adapter slots.
        requests, tokens: the most that a batch has.
        graph: captured graphs read it; it then stays for good, and what lies behind a batch is kept empty.
    """

    def __init__(self, slots: int, requests: int, tokens: int, device: torch.device | str, *, graph: bool) -> None:
        self.slots, self.requests, self.tokens = slots, requests, round_up(max(tokens, 1), _PADDING)
        # ranks, scalings and whether there is an adapter, by slot; slots of requests, where these begin; slots of rows
        sizes = slots, slots, slots, requests, requests + 1, self.tokens
        with torch.inference_mode(False):  # batches may come in either mode
            self._packed = PackedInts(sizes, device)
            ranks, scalings, enabled, indices, starts, rows = self._packed.parts
            self.rows = Rows(rows, slots)
        self._enabled = enabled
        self.info = Batch(
            use_cuda_graph=graph,
            bs=0,
            num_segments=0,
            seg_indptr=starts,
            weight_indices=indices,
            lora_ranks=ranks,
            scalings=scalings.view(torch.float32),
            max_len=0,
            seg_lens=None,
            rows=self.rows,
        )
        self.fill([], [], [], [0] * slots, [0.0] * slots)

    def fill(
        self,
        weight_indices: Sequence[int],
        row_slots: Sequence[int],
        lengths: Sequence[int],
        ranks: Sequence[int],
        scalings: Sequence[float],
    ) -> Batch:
        """Takes a batch: one copy from pinned memory on the current stream, no synchronisation.

        Args:
            weight_indices: pool slot of each request, as SGLang's kernels understand it (rank 0: no adapter).
            row_slots: slot of each request's rows, -1 = no adapter.
            lengths: rows of each request.
            ranks, scalings: by slot.

        Raises ValueError where the batch does not fit.
        """
        requests, tokens = len(lengths), int(sum(lengths))
        if requests > self.requests or tokens > self.tokens:
            got = f"{requests} and {tokens}"
            raise ValueError(f"polylora: a batch has up to {self.requests} requests and {self.tokens} rows, got {got}")
        with self._packed.sent() as (to_ranks, to_scalings, to_enabled, to_indices, to_starts, to_rows):
            to_ranks[:], to_scalings.view(np.float32)[:] = ranks, scalings
            to_enabled[:] = to_ranks > 0
            to_indices[:requests], to_indices[requests:] = weight_indices, 0
            to_starts[0], to_starts[1 : requests + 1], to_starts[requests + 1 :] = 0, np.cumsum(lengths), tokens
            to_rows[:tokens], to_rows[tokens:] = np.repeat(np.asarray(row_slots, dtype=np.int32), lengths), -1
        self.rows.renew(tokens)
        info = self.info
        info.bs = info.num_segments = requests
        info.max_len, info.expected_tokens = max(lengths, default=0), tokens
        info.moe_lora_info = None
        return info

    def moe_info(self, segments: int) -> MoELoRABatchInfo:
        """What SGLang's MoE layers read. ``segments``: requests; all that there is room for, where a graph is captured
        that must serve any number."""
        info = self.info
        return MoELoRABatchInfo(
            seg_indptr=info.seg_indptr[: segments + 1],
            req_to_lora=info.weight_indices[:segments],
            adapter_enabled=self._enabled,
            token_lora_mapping=self.rows.slots[: self.rows.count],
        )


def head_rows(row_slots: Sequence[int], lengths: Sequence[int], num_slots: int, device: torch.device | str) -> Rows:
    """The rows of a prefill whose logits are wanted, ``lengths`` of each request; arguments as :class:`BatchBuffer`."""
    slots = np.repeat(np.asarray(row_slots, dtype=np.int32), lengths)
    on_device = torch.empty(slots.size, dtype=torch.int32, device=device)
    with sent_to(on_device) as staging:
        staging[:] = slots
    rows = Rows(on_device, num_slots)
    rows.renew(slots.size)
    return rows
