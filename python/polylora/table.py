"""Slice tables: one description for every pool layout, so that the kernels know only one.

A :class:`SliceTable` holds, per (group, slice), where the weights lie and how big they are (``slice_table.h``), beside
the tensors they lie in. Builders make one for each pool in use, in place, without copying a weight:

===================================  ==================================================================================
:meth:`SliceTable.from_dense_pool`   one tensor a slice, or all slices stacked; slots of a fixed capacity
:meth:`SliceTable.from_ragged_arena` any offsets; the table starts empty (:class:`polylora.pool.AdapterPool` uses it)
``from_sglang_dense / _moe``         SGLang's memory pool: dense slices packed at ``s * r``, MoE slices at ``s * r_max``
``from_sglang_embedding``            SGLang's ``[slots, r, vocab]``
``from_vllm / from_vllm_moe``        vLLM's tuples of stacked tensors, one a slice
``from_vllm_embedding``              vLLM's ``[slots, vocab, r]`` (token-major)
===================================  ==================================================================================

A group is a slot in a plain layer, ``slot * experts + expert`` in MoE.

Wrong arguments raise ``ValueError`` with ``polylora::SliceTable...: argument, expected, got``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polylora import _host

WORDS = _host.SLICE_ENTRY_BYTES // 4
_ARGUMENTS = {
    "shrink": ("a", "table"),
    "expand_": ("b", "table", "widths", "cols"),
    "linear_": ("a", "b", "table", "widths", "cols", "v_width"),
    "linear_delta": ("a", "b", "table", "widths", "v_width"),
    "add_delta_": ("table", "widths", "cols"),
    "embedding_": ("a", "b", "table", "widths", "cols", "vocab", "token_major"),
    "moe_gate_up_": ("a", "b", "table", "widths", "cols", "v_width", "col_stride"),
    "moe_gate_up_act": ("a", "b", "table", "widths", "cols", "v_width", "col_stride"),
    "moe_down_": ("a", "b", "table", "widths", "cols", "v_width"),
    "moe_down_reduce": ("a", "b", "table", "widths", "cols", "v_width"),
    "moe_delta": ("a", "b", "table", "widths", "v_width"),
    "moe_act": ("table", "widths", "cols", "col_stride"),
    "moe_reduce": ("table", "widths", "cols"),
}


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``n``."""
    return (n + multiple - 1) // multiple * multiple


@contextlib.contextmanager
def sent_to(to: torch.Tensor) -> Iterator[np.ndarray]:
    """Numbers for a contiguous tensor: the array that is yielded, of undefined contents, is copied to it afterwards.

    On the current stream, to CUDA from pinned memory, without a synchronisation.
    """
    on_cuda = to.device.type == "cuda"
    # A fresh pinned block a copy: the caching host allocator keeps it until the copy has run, so that the next write on
    # the host cannot reach a copy still in flight.
    staging = torch.empty(to.shape, dtype=to.dtype, device="cpu", pin_memory=on_cuda)
    yield staging.numpy()
    to.copy_(staging, non_blocking=on_cuda)


def _refuse(where: str, argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"polylora::SliceTable{where}: {argument} must be {expected}, got {got}")


def check_not_capturing(where: str) -> None:
    """Raises RuntimeError during CUDA graph capture: the copy would be captured and replayed with old contents."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"polylora::{where}: must not be called while a CUDA graph is captured")


@dataclass(frozen=True)
class _Placement:
    """Where the slots of a dense pool stand: ``first + slot * per_slot + expert * per_expert``, one number a slice.

    ``a_*`` count rows, ``b_*`` elements. ``packed``: slice s of A starts at row ``s * r`` of its slot, r the largest
    rank in the slot, instead of ``a_first``.
    """

    slots: int
    experts: int
    capacity: np.ndarray
    a_first: np.ndarray
    a_per_slot: np.ndarray
    a_per_expert: np.ndarray
    b_first: np.ndarray
    b_per_slot: np.ndarray
    b_per_expert: np.ndarray
    b_stride: np.ndarray
    v_col: np.ndarray
    packed: bool


class SliceTable:
    """A slice table on the device, its checked copy on the host, and the weights it speaks of.

    Attributes:
        a: 1 tensor (all slices lie in it) or one a slice, each ``[rows, k]`` (token-major embedding: ``[tokens, r]``).
        b: 1 tensor or one a slice, each 1-D contiguous.
        table: int32 ``[groups, slices, 8]`` on the device of the weights.
        widths: outputs of each slice.
        cols: first column of each slice in y.
        col_stride: output n of a slice stands in column ``col + n * col_stride`` (2: gate and up interleaved).
        v_width: columns of the intermediate v that the entries may use.
        vocab: vocabulary size of an embedding, else 0.
        token_major: A of the embedding is ``[tokens, r]``.
        groups: slots, or slots * experts.
        experts: experts of an MoE layer, else 1.

    Host writes (:meth:`set_slot`, :meth:`set_groups`, :meth:`clear_slot`) reach the device with :meth:`upload`, which
    copies the changed groups only, on the current stream, without waiting. Kernels queued before it on that stream
    see the old entries, kernels queued after it the new ones; other streams need the caller's event.
    """

    def __init__(
        self,
        a: torch.Tensor | Sequence[torch.Tensor],
        b: torch.Tensor | Sequence[torch.Tensor],
        *,
        groups: int,
        widths: Sequence[int],
        v_width: int,
        cols: Sequence[int] | None = None,
        col_stride: int = 1,
        experts: int = 1,
        vocab: int = 0,
        token_major: bool = False,
    ) -> None:
        """All entries start absent. ``cols`` defaults to slices side by side (interleaved: columns 0, 1, ...)."""
        self.widths = [int(w) for w in widths]
        self.col_stride = int(col_stride)
        self.cols = _default_cols(self.widths, self.col_stride) if cols is None else [int(c) for c in cols]
        self.vocab = int(vocab)
        self.token_major = bool(token_major)
        self.experts = int(experts)
        if len(self.cols) != len(self.widths):
            raise _refuse("", "cols", f"one a slice ({len(self.widths)})", len(self.cols))
        if self.col_stride < 1:
            raise _refuse("", "col_stride", ">= 1", self.col_stride)
        _check_cols(self.cols, self.widths, self.col_stride)
        if self.experts < 1 or groups % self.experts:
            raise _refuse("", "groups", f"a multiple of experts = {self.experts}", groups)
        if self.token_major and self.vocab < 1:
            raise _refuse("", "vocab", ">= 1 where A is token-major", self.vocab)
        self.a, self.b = self._checked_arenas(a, b)
        self._host = _host.TableWriter(
            groups, self._limits(), int(v_width), token_rows=self.vocab if self.token_major else 0
        )
        self._placement: _Placement | None = None
        with torch.inference_mode(False):  # entries may be written in either mode
            self.table = torch.zeros(groups, len(self.widths), WORDS, dtype=torch.int32, device=self.a[0].device)

    # ---------------------------------------------------------------------------------------------- arenas

    def _checked_arenas(
        self, a: torch.Tensor | Sequence[torch.Tensor], b: torch.Tensor | Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        a = [a] if isinstance(a, torch.Tensor) else list(a)
        b = [b] if isinstance(b, torch.Tensor) else list(b)
        for name, tensors in (("a", a), ("b", b)):
            if len(tensors) not in (1, len(self.widths)):
                raise _refuse("", name, f"1 tensor or one a slice ({len(self.widths)})", f"{len(tensors)} tensors")
            for i, t in enumerate(tensors):
                if t.dtype != a[0].dtype or t.device != a[0].device:
                    raise _refuse("", f"{name}[{i}]", f"{a[0].dtype} on {a[0].device}", f"{t.dtype} on {t.device}")
        if a[0].dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise _refuse("", "a[0]", "bfloat16, float16 or float32", a[0].dtype)
        for i, t in enumerate(a):
            if t.dim() != 2 or t.size(1) < 1 or (t.size(1) > 1 and t.stride(1) != 1) or not _rows_apart(t):
                raise _refuse(
                    "", f"a[{i}]", "2-D with contiguous rows", f"shape {list(t.shape)}, strides {list(t.stride())}"
                )
            if t.size(1) != a[0].size(1) and not self.token_major:
                raise _refuse("", f"a[{i}]", f"[rows, {a[0].size(1)}]", list(t.shape))
        for i, t in enumerate(b):
            if t.dim() != 1 or not t.is_contiguous():
                raise _refuse("", f"b[{i}]", "1-D contiguous", f"shape {list(t.shape)}, strides {list(t.stride())}")
        if self.vocab and not self.token_major and a[0].size(1) != self.vocab:
            raise _refuse("", "a[0]", f"[rows, vocab = {self.vocab}]", list(a[0].shape))
        return a, b

    def _limits(self) -> list[tuple[int, int, int, int, int]]:
        limits = []
        for s, width in enumerate(self.widths):
            a = self.a[s if len(self.a) > 1 else 0]
            b = self.b[s if len(self.b) > 1 else 0]
            a_id = next(i for i, t in enumerate(self.a) if _same_memory(t, a))
            limits.append((width, a.size(0), a.size(1), b.numel(), a_id))
        return limits

    def set_arenas(self, a: torch.Tensor | Sequence[torch.Tensor], b: torch.Tensor | Sequence[torch.Tensor]) -> None:
        """Takes larger arenas with the old contents at the old offsets; entries stay valid.

        Captured graphs and calls already prepared hold the old tensors: read :attr:`a` and :attr:`b` anew.
        """
        old = self.a, self.b
        new = self._checked_arenas(a, b)
        if new[0][0].dtype != old[0][0].dtype or new[0][0].device != old[0][0].device:
            raise _refuse(
                ".set_arenas",
                "a",
                f"{old[0][0].dtype} on {old[0][0].device}",
                f"{new[0][0].dtype} on {new[0][0].device}",
            )
        self.a, self.b = new
        try:
            self._host.set_limits(self._limits())
        except ValueError:
            self.a, self.b = old
            raise

    @property
    def groups(self) -> int:
        return self._host.groups

    @property
    def slots(self) -> int:
        return self.groups // self.experts

    @property
    def v_width(self) -> int:
        return self._host.v_width

    @v_width.setter
    def v_width(self, columns: int) -> None:
        self._host.v_width = columns

    def words(self) -> np.ndarray:
        """Read-only int32 ``[groups, slices, 8]`` view of the host copy."""
        return self._host.words()

    def args(self, op: str = "linear_") -> dict[str, Any]:
        """What this table contributes to a call of ``torch.ops.polylora.<op>``, by argument name."""
        if op not in _ARGUMENTS:
            raise _refuse(".args", "op", f"one of {', '.join(_ARGUMENTS)}", op)
        return {name: getattr(self, name) for name in _ARGUMENTS[op]}

    # ---------------------------------------------------------------------------------------------- entries

    def set_groups(
        self,
        groups: Any,
        *,
        a_row: Any,
        rank: Any,
        v_col: Any,
        b_stride: Any,
        b_offset: Any,
        scale: Any = 1.0,
    ) -> None:
        """Writes all slices of some groups on the host, after checking all of them; nothing is written on an error.

        Args:
            groups: ``[n]`` group indices.
            a_row: first row of A; ``rank``: true rank, 0 = absent; ``v_col``: first column of v (equal for slices that
                share one A); ``b_stride``, ``b_offset``: row pitch and first element of B; ``scale``: finite. Each
                broadcasts to ``[n, slices]``.
        """
        groups = np.ascontiguousarray(groups, dtype=np.int64).reshape(-1)
        shape = (groups.size, len(self.widths))

        def whole(values: Any, dtype: type) -> np.ndarray:
            return np.ascontiguousarray(np.broadcast_to(np.asarray(values), shape), dtype=dtype)

        self._host.set_groups(
            groups,
            whole(a_row, np.int64),
            whole(rank, np.int64),
            whole(v_col, np.int64),
            whole(b_stride, np.int64),
            whole(b_offset, np.int64),
            whole(scale, np.float32),
        )

    def set_slot(self, slot: int, ranks: Any, scales: Any = 1.0, *, upload: bool = True) -> None:
        """Says what a slot of a dense pool holds now; for engines that swap adapters while serving.

        Args:
            slot: in ``[0, slots)``.
            ranks: true ranks; one number, ``[slices]`` or ``[experts, slices]``. 0 = the adapter leaves that slice out.
            scales: factors of the delta in the same shapes; 1.0 where the engine folds them into B.
            upload: copy to the device at once (else call :meth:`upload` after a batch of changes).
        """
        p = self._placement
        if p is None:
            raise _refuse(".set_slot", "table", "built from a dense pool", "a ragged arena: use set_groups")
        if not 0 <= slot < p.slots:
            raise _refuse(".set_slot", "slot", f"in [0, {p.slots})", slot)
        shape = (p.experts, len(self.widths))
        try:
            ranks = np.broadcast_to(np.asarray(ranks, dtype=np.int64), shape)
            scales = np.broadcast_to(np.asarray(scales, dtype=np.float32), shape)
        except ValueError:
            expected = f"a number, [{shape[1]}] or [{shape[0]}, {shape[1]}]"
            got = f"{list(np.shape(ranks))} and {list(np.shape(scales))}"
            raise _refuse(".set_slot", "ranks and scales", expected, got) from None
        if (ranks > p.capacity).any() or (ranks < 0).any():
            # Beyond the slot's capacity lies the next slot: another tenant.
            raise _refuse(".set_slot", "ranks", f"in [0, {p.capacity.tolist()}] by slice", ranks.max(0).tolist())
        expert = np.arange(p.experts, dtype=np.int64)[:, None]
        a_first = p.a_first[None, :]
        if p.packed:
            a_first = np.arange(shape[1], dtype=np.int64)[None, :] * ranks.max()
        self.set_groups(
            slot * p.experts + expert[:, 0],
            a_row=a_first + slot * p.a_per_slot + expert * p.a_per_expert,
            rank=ranks,
            v_col=p.v_col,
            b_stride=p.b_stride,
            b_offset=p.b_first + slot * p.b_per_slot + expert * p.b_per_expert,
            scale=scales,
        )
        if upload:
            self.upload()

    def clear_slot(self, slot: int, *, upload: bool = True) -> None:
        """Marks a slot absent (rank 0 everywhere)."""
        if not 0 <= slot < self.slots:
            raise _refuse(".clear_slot", "slot", f"in [0, {self.slots})", slot)
        self._host.clear_groups(slot * self.experts, (slot + 1) * self.experts)
        if upload:
            self.upload()

    def upload(self) -> None:
        """Copies changed groups to the device: asynchronous, from pinned memory, on the current stream.

        Raises RuntimeError while a CUDA graph is captured.
        """
        ranges = self._host.dirty_ranges()
        if not ranges:
            return
        check_not_capturing("SliceTable.upload")
        words = self.words()
        for begin, end in ranges:
            with sent_to(self.table[begin:end]) as staging:
                staging[...] = words[begin:end]
        self._host.mark_clean()

    # ---------------------------------------------------------------------------------------------- builders

    @classmethod
    def from_ragged_arena(
        cls,
        a: torch.Tensor | Sequence[torch.Tensor],
        b: torch.Tensor | Sequence[torch.Tensor],
        *,
        slots: int,
        widths: Sequence[int],
        v_width: int,
        experts: int = 1,
        cols: Sequence[int] | None = None,
        col_stride: int = 1,
        vocab: int = 0,
    ) -> SliceTable:
        """A table over arenas ``a [rows, k]`` and ``b [elements]``; fill it with :meth:`set_groups`.

        Embeddings: ``vocab`` and ``a [rows, vocab]``, one row a rank.
        """
        return cls(
            a,
            b,
            groups=slots * experts,
            widths=widths,
            v_width=v_width,
            cols=cols,
            col_stride=col_stride,
            experts=experts,
            vocab=vocab,
        )

    @classmethod
    def from_dense_pool(
        cls,
        a: torch.Tensor | Sequence[torch.Tensor],
        b: torch.Tensor | Sequence[torch.Tensor],
        ranks: Sequence[Any] | None = None,
        scales: Any = 1.0,
        *,
        widths: Sequence[int] | None = None,
        cols: Sequence[int] | None = None,
        col_stride: int = 1,
    ) -> SliceTable:
        """A pool of slots of a fixed capacity R.

        Args:
            a: one tensor a slice, ``[slots, R, k]`` or ``[slots, experts, R, k]`` (R may differ from slice to slice);
                or one tensor ``[slots, slices, R, k]`` / ``[slots, experts, slices, R, k]``.
            b: one tensor a slice, ``[slots, width, R]`` or ``[slots, experts, width, R]``; or one tensor with the
                slices' rows one after another, ``[slots, sum(widths), R]`` / ``[slots, experts, sum(widths), R]``.
                An experts dimension of 1 is shared by all experts.
            ranks: true ranks by slot, each a number, ``[slices]`` or ``[experts, slices]``; ``None``: all slots empty.
            scales: one number, or by slot in the shapes of ``ranks``.
            widths: outputs of each slice; needed where ``b`` is one tensor and there is more than one slice.
        """
        where = ".from_dense_pool"
        if isinstance(b, torch.Tensor):
            moe = b.dim() == 4
            if widths is None:
                widths = [b.size(-2)]
        else:
            moe = bool(b) and b[0].dim() == 4
            widths = [t.size(-2) for t in b] if widths is None else widths
        slices = len(widths)
        dims = 4 if moe else 3
        if isinstance(a, torch.Tensor):
            _check_dims(where, "a", a, dims + 1)
            if a.size(-3) != slices:
                raise _refuse(where, "a", f"a dimension of {slices} slices before [R, k]", list(a.shape))
            flat, pitch = _as_rows(where, "a", a, slices)
            a_bases, a_first = [flat], [s * pitch for s in range(slices)]
            capacity = [a.size(-2)] * slices
        else:
            for i, t in enumerate(a):
                _check_dims(where, f"a[{i}]", t, dims)
            a_bases, a_first, capacity = list(a), [0] * len(a), [t.size(-2) for t in a]
        b_bases = [b] if isinstance(b, torch.Tensor) else list(b)
        for i, t in enumerate(b_bases):
            _check_dims(where, f"b[{i}]", t, dims)
            room = max(capacity) if len(b_bases) == 1 else capacity[i] if i < len(capacity) else t.size(-1)
            if t.size(-1) != room:  # a transposed B, of which a part would be served
                raise _refuse(where, f"b[{i}]", f"[..., width, R = {room}], as a has R = {room}", list(t.shape))
        return cls._dense(
            where,
            a_bases,
            b_bases,
            ranks,
            scales,
            widths=widths,
            capacity=capacity,
            a_first=a_first,
            b_first=_starts(widths) if len(b_bases) == 1 else [0] * slices,
            cols=cols,
            col_stride=col_stride,
        )

    @classmethod
    def from_sglang_dense(
        cls,
        a: torch.Tensor,
        b: torch.Tensor,
        ranks: Sequence[Any] | None = None,
        scales: Any = 1.0,
        *,
        widths: Sequence[int],
        cols: Sequence[int] | None = None,
    ) -> SliceTable:
        """SGLang's memory pool of one (fused) linear.

        Args:
            a: ``[slots, slices * r_max, k]``; slice s of an adapter of rank r lies at rows ``[s * r, (s + 1) * r)``
                of its slot: packed by the true rank, not by ``r_max``.
            b: ``[slots, sum(widths), r_max]``.
            ranks: by slot; r is the largest number of a slot. SGLang's base slot has rank 0.
            scales: by slot; SGLang passes them beside the weights (``batch_info.scalings``).
        """
        where = ".from_sglang_dense"
        _check_dims(where, "a", a, 3)
        _check_dims(where, "b", b, 3)
        if a.size(1) != len(widths) * b.size(2):
            raise _refuse(where, "a", f"[slots, {len(widths)} slices * {b.size(2)}, k]", list(a.shape))
        return cls._dense(
            where,
            [a],
            [b],
            ranks,
            scales,
            widths=widths,
            capacity=[b.size(2)] * len(widths),
            a_first=[0] * len(widths),
            b_first=_starts(widths),
            cols=cols,
            packed=True,
        )

    @classmethod
    def from_sglang_moe(
        cls,
        a: torch.Tensor,
        b: torch.Tensor,
        ranks: Sequence[Any] | None = None,
        scales: Any = 1.0,
        *,
        widths: Sequence[int],
        cols: Sequence[int] | None = None,
        col_stride: int = 1,
    ) -> SliceTable:
        """SGLang's MoE pool of one half of the experts.

        Args:
            a: ``[slots, experts or 1, slices * r_max, k]``, slice s at row ``s * r_max``; 1: shared by all experts.
            b: ``[slots, experts or 1, sum(widths), r_max]``.
            ranks: by slot.
            scales: 1.0: SGLang folds the scale into B here.
        """
        where = ".from_sglang_moe"
        _check_dims(where, "a", a, 4)
        _check_dims(where, "b", b, 4)
        r_max = b.size(3)
        if a.size(2) != len(widths) * r_max:
            raise _refuse(where, "a", f"[slots, experts, {len(widths)} slices * {r_max}, k]", list(a.shape))
        return cls._dense(
            where,
            [a],
            [b],
            ranks,
            scales,
            widths=widths,
            capacity=[r_max] * len(widths),
            a_first=[s * r_max for s in range(len(widths))],
            b_first=_starts(widths),
            cols=cols,
            col_stride=col_stride,
        )

    @classmethod
    def from_sglang_embedding(
        cls, a: torch.Tensor, b: torch.Tensor, ranks: Sequence[Any] | None = None, scales: Any = 1.0
    ) -> SliceTable:
        """SGLang's embedding pool: ``a [slots, r_max, vocab]``, ``b [slots, dim, r_max]``."""
        return cls._embedding(".from_sglang_embedding", a, b, ranks, scales, token_major=False)

    @classmethod
    def from_vllm(
        cls,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        ranks: Sequence[Any] | None = None,
        scales: Any = 1.0,
        *,
        cols: Sequence[int] | None = None,
    ) -> SliceTable:
        """vLLM's stacked tensors of one (fused) linear.

        Args:
            a: one a slice, ``[slots, 1, R, k]`` (``lora_a_stacked``).
            b: one a slice, ``[slots, 1, width, R]`` (``lora_b_stacked``).
            ranks: by slot. vLLM fills a slot up with zeros: R works as well, the true rank is faster.
            scales: 1.0: vLLM folds the scale into B.
        """
        a = [_drop_single(".from_vllm", f"a[{i}]", t) for i, t in enumerate(a)]
        b = [_drop_single(".from_vllm", f"b[{i}]", t) for i, t in enumerate(b)]
        return cls.from_dense_pool(a, b, ranks, scales, cols=cols)

    @classmethod
    def from_vllm_moe(
        cls,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        ranks: Sequence[Any] | None = None,
        scales: Any = 1.0,
        *,
        widths: Sequence[int] | None = None,
        interleaved: bool = False,
        cols: Sequence[int] | None = None,
        col_stride: int | None = None,
    ) -> SliceTable:
        """vLLM's MoE tensors, w13 (gate and up, or up alone) or w2.

        Args:
            a: one a slice, ``[slots, experts or 1, R, k]``; 1: shared by all experts.
            b: one a slice, ``[slots, experts or 1, width, R]``.
            ranks, scales: as in :meth:`from_vllm`.
            widths: where gate and up were trained as one (one A, one B of ``sum(widths)`` rows), the halves to serve
                apart, as the fused activation needs; they share A.
            interleaved: with ``widths``: rows of gate and up alternate in B. ``col_stride`` then defaults to the
                number of slices.
        """
        where = ".from_vllm_moe"
        a, b = list(a), list(b)
        for name, tensors in (("a", a), ("b", b)):
            for i, t in enumerate(tensors):
                _check_dims(where, f"{name}[{i}]", t, 4)
        if widths is None or len(widths) == len(b):
            if interleaved:
                raise _refuse(where, "interleaved", "False unless one B holds several slices", True)
            return cls.from_dense_pool(a, b, ranks, scales, widths=widths, cols=cols, col_stride=col_stride or 1)
        if len(a) != 1 or len(b) != 1:
            raise _refuse(where, "a and b", f"1 or {len(widths)} tensors", f"{len(a)} and {len(b)}")
        slices = len(widths)
        if interleaved and len(set(widths)) != 1:
            raise _refuse(where, "widths", "equal where rows interleave", list(widths))
        return cls._dense(
            where,
            a,
            b,
            ranks,
            scales,
            widths=widths,
            capacity=[a[0].size(-2)] * slices,
            a_first=[0] * slices,
            b_first=list(range(slices)) if interleaved else _starts(widths),
            b_row_step=slices if interleaved else 1,
            shared_a=True,
            cols=cols,
            col_stride=col_stride or (slices if interleaved else 1),
        )

    @classmethod
    def from_vllm_embedding(
        cls, a: torch.Tensor, b: torch.Tensor, ranks: Sequence[Any] | None = None, scales: Any = 1.0
    ) -> SliceTable:
        """vLLM's embedding tensors: ``a [slots, vocab, R]`` (token-major), ``b [slots, 1, dim, R]``."""
        where = ".from_vllm_embedding"
        return cls._embedding(where, a, _drop_single(where, "b", b), ranks, scales, token_major=True)

    @classmethod
    def _embedding(
        cls,
        where: str,
        a: torch.Tensor,
        b: torch.Tensor,
        ranks: Sequence[Any] | None,
        scales: Any,
        *,
        token_major: bool,
    ) -> SliceTable:
        """``a [slots, R, vocab]`` (token-major ``[slots, vocab, R]``), ``b [slots, dim, R]``."""
        _check_dims(where, "a", a, 3)
        _check_dims(where, "b", b, 3)
        capacity, vocab = (a.size(2), a.size(1)) if token_major else (a.size(1), a.size(2))
        return cls._dense(
            where,
            [a],
            [b],
            ranks,
            scales,
            widths=[b.size(1)],
            capacity=[capacity],
            a_first=[0],
            b_first=[0],
            vocab=vocab,
            token_major=token_major,
        )

    @classmethod
    def _dense(
        cls,
        where: str,
        a: list[torch.Tensor],
        b: list[torch.Tensor],
        ranks: Sequence[Any] | None,
        scales: Any,
        *,
        widths: Sequence[int],
        capacity: Sequence[int],
        a_first: Sequence[int],
        b_first: Sequence[int],
        b_row_step: int = 1,
        cols: Sequence[int] | None = None,
        col_stride: int = 1,
        vocab: int = 0,
        token_major: bool = False,
        packed: bool = False,
        shared_a: bool = False,
    ) -> SliceTable:
        """All dense pools. ``a``: ``[slots, (experts,) rows, k]``; ``b``: ``[slots, (experts,) rows, R]``; one tensor
        or one a slice. ``a_first`` and ``b_first``: first row of each slice within its slot (and expert)."""
        slices = len(widths)
        for name, tensors in (("a", a), ("b", b)):
            if len(tensors) not in (1, slices):
                raise _refuse(where, name, f"1 tensor or one a slice ({slices})", f"{len(tensors)} tensors")
        if len(a_first) != slices:
            raise _refuse(where, "a", f"one tensor a slice ({slices})", f"{len(a)} tensors")
        slots = a[0].size(0)
        experts = max(t.size(1) if t.dim() == 4 else 1 for t in (*a, *b))
        for name, tensors in (("a", a), ("b", b)):
            for i, t in enumerate(tensors):
                if t.size(0) != slots:
                    raise _refuse(where, f"{name}[{i}]", f"{slots} slots", list(t.shape))
                if t.dim() == 4 and t.size(1) not in (1, experts):
                    raise _refuse(where, f"{name}[{i}]", f"{experts} experts, or 1 for all", list(t.shape))
        for s in range(slices):
            t = b[s if len(b) > 1 else 0]
            rows = b_first[s] + (widths[s] - 1) * b_row_step + 1
            if rows > t.size(-2) or (len(b) > 1 and widths[s] != t.size(-2)):
                expected = f"{sum(widths)} rows for widths {list(widths)}"
                raise _refuse(where, f"b[{s if len(b) > 1 else 0}]", expected, list(t.shape))
        if len(b) == 1 and b[0].size(-2) != sum(widths):
            raise _refuse(where, "b", f"{sum(widths)} rows for widths {list(widths)}", list(b[0].shape))

        # A slot takes no more ranks than both of its sides have room for.
        capacity = [min(c, b[s if len(b) > 1 else 0].size(-1)) for s, c in enumerate(capacity)]
        a_flat = [_arena_of_a(where, f"a[{i}]", t) for i, t in enumerate(a)]
        b_flat = [_arena_of_b(where, f"b[{i}]", t) for i, t in enumerate(b)]
        a_at = [a_flat[s if len(a) > 1 else 0] for s in range(slices)]
        b_at = [b_flat[s if len(b) > 1 else 0] for s in range(slices)]

        # v columns by capacity, not by what is loaded: v_width never changes. Multiples of 8 keep them aligned.
        v_starts = _starts([round_up(c, 8) for c in capacity])
        v_width = round_up(capacity[0], 8) if shared_a else v_starts[-1] + round_up(capacity[-1], 8)
        table = cls(
            [at.tensor for at in a_flat],
            [at.tensor for at in b_flat],
            groups=slots * experts,
            widths=widths,
            v_width=v_width,
            cols=cols,
            col_stride=col_stride,
            experts=experts,
            vocab=vocab,
            token_major=token_major,
        )

        def by_slice(values: Sequence[int]) -> np.ndarray:
            return np.asarray(values, dtype=np.int64)

        table._placement = _Placement(
            slots=slots,
            experts=experts,
            capacity=by_slice(capacity),
            a_first=by_slice(a_first),
            a_per_slot=by_slice([at.per_slot for at in a_at]),
            a_per_expert=by_slice([at.per_expert for at in a_at]),
            b_first=by_slice([first * at.pitch for first, at in zip(b_first, b_at, strict=True)]),
            b_per_slot=by_slice([at.per_slot for at in b_at]),
            b_per_expert=by_slice([at.per_expert for at in b_at]),
            b_stride=by_slice([at.pitch * b_row_step for at in b_at]),
            v_col=by_slice([0] * slices if shared_a else v_starts),
            packed=packed,
        )
        if ranks is not None:
            if isinstance(ranks, int) or len(ranks) != slots:
                got = ranks if isinstance(ranks, int) else len(ranks)
                raise _refuse(where, "ranks", f"one a slot ({slots})", got)
            one_scale = isinstance(scales, (int, float))
            if not one_scale and len(scales) != slots:
                raise _refuse(where, "scales", f"one a slot ({slots})", len(scales))
            for slot, rank in enumerate(ranks):
                table.set_slot(slot, rank, scales if one_scale else scales[slot], upload=False)
            table.upload()
        return table


@dataclass(frozen=True)
class _Arena:
    """A flat view of a pool tensor and the steps of its dimensions: rows for A, elements for B."""

    tensor: torch.Tensor
    per_slot: int
    per_expert: int
    pitch: int


def _default_cols(widths: Sequence[int], col_stride: int) -> list[int]:
    return list(range(len(widths))) if col_stride > 1 else _starts(widths)


def _check_cols(cols: Sequence[int], widths: Sequence[int], col_stride: int) -> None:
    """No column of y may belong to two slices: whose delta is added last would be anyone's guess."""
    if min(cols, default=0) < 0:
        raise _refuse("", "cols", ">= 0", list(cols))
    # By parity (column modulo stride), then by column; neighbours are the first to meet.
    runs = sorted((col % col_stride, col, width) for col, width in zip(cols, widths, strict=True))
    for (parity, col, width), (other, start, _) in zip(runs, runs[1:], strict=False):
        if parity == other and start < col + width * col_stride:
            got = f"{list(cols)} for widths {list(widths)}, col_stride {col_stride}"
            raise _refuse("", "cols", "such that no two slices share a column", got)


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


def _rows_apart(t: torch.Tensor) -> bool:
    return t.size(0) <= 1 or t.stride(0) >= t.size(1)


def _same_memory(t: torch.Tensor, u: torch.Tensor) -> bool:
    if t is u:
        return True
    if t.device.type == "meta" or t.numel() == 0:
        return False
    return t.data_ptr() == u.data_ptr() and t.shape == u.shape and t.stride() == u.stride()


def _check_dims(where: str, name: str, t: torch.Tensor, dims: int) -> None:
    if t.dim() != dims or t.numel() == 0:
        raise _refuse(where, name, f"{dims}-D and not empty", f"shape {list(t.shape)}")


def _drop_single(where: str, name: str, t: torch.Tensor) -> torch.Tensor:
    _check_dims(where, name, t, 4)
    if t.size(1) != 1:
        raise _refuse(where, name, "[slots, 1, ..., ...]", list(t.shape))
    return t.squeeze(1)


def _as_rows(where: str, name: str, t: torch.Tensor, slices: int) -> tuple[torch.Tensor, int]:
    """``[..., slices, R, k]`` as ``[..., slices * step, k]`` rows without copying, and the rows from slice to slice."""
    pitch = _pitch(t)
    if slices > 1 and (t.stride(-3) % pitch or t.stride(-3) == 0):
        raise _refuse(where, name, "slices whole rows apart", f"strides {list(t.stride())}")
    step = t.stride(-3) // pitch if slices > 1 else t.size(-2)
    rows = (slices - 1) * step + t.size(-2)
    return t.as_strided((*t.shape[:-3], rows, t.size(-1)), (*t.stride()[:-3], pitch, 1)), step


def _pitch(t: torch.Tensor) -> int:
    """Row pitch of the last two dimensions; a single row has none of its own."""
    return t.stride(-2) if t.size(-2) > 1 else max(t.stride(-2), t.size(-1))


def _outer(t: torch.Tensor) -> tuple[int, int]:
    """Strides of the slot and expert dimensions; 0 where the dimension has one member."""
    slot = t.stride(0) if t.size(0) > 1 else 0
    expert = t.stride(1) if t.dim() == 4 and t.size(1) > 1 else 0
    return slot, expert


def _arena_of_a(where: str, name: str, t: torch.Tensor) -> _Arena:
    """``[slots, (experts,) rows, k]`` as ``[all rows, k]``; every step must be a whole number of rows."""
    pitch = _pitch(t)
    slot, expert = _outer(t)
    if (t.size(-1) > 1 and t.stride(-1) != 1) or pitch < t.size(-1) or slot % pitch or expert % pitch:
        raise _refuse(
            where,
            name,
            "contiguous rows, slots and experts a whole number of rows apart",
            f"shape {list(t.shape)}, strides {list(t.stride())}",
        )
    experts = t.size(1) if t.dim() == 4 else 1
    rows = ((t.size(0) - 1) * slot + (experts - 1) * expert) // pitch + t.size(-2)
    return _Arena(t.as_strided((rows, t.size(-1)), (pitch, 1)), slot // pitch, expert // pitch, pitch)


def _arena_of_b(where: str, name: str, t: torch.Tensor) -> _Arena:
    """``[slots, (experts,) rows, R]`` as a run of elements."""
    pitch = _pitch(t)
    slot, expert = _outer(t)
    if (t.size(-1) > 1 and t.stride(-1) != 1) or pitch < t.size(-1):
        raise _refuse(where, name, "contiguous rows", f"shape {list(t.shape)}, strides {list(t.stride())}")
    experts = t.size(1) if t.dim() == 4 else 1
    size = (t.size(0) - 1) * slot + (experts - 1) * expert + (t.size(-2) - 1) * pitch + t.size(-1)
    return _Arena(t.as_strided((size,), (1,)), slot, expert, pitch)
