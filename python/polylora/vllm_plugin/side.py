"""A second stream, on which LoRA's deltas are made beside the base's GEMMs.

Memory: what the side stream writes or reads is allocated on the step's stream before the point that the side waits
for, and freed after the step's stream has joined it; what the ops allocate for themselves belongs to the side stream.
Captured graphs hold the side stream's kernels as a branch.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
from vllm import envs


class SideStream:
    """Of a device; the CPU has none, and needs none.

    Args:
        first: its blocks come before those of kernels that are already waiting for a place.
    """

    def __init__(self, device: torch.device, first: bool) -> None:
        priority = -1 if first else 0
        self._stream = torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None

    def mark(self) -> torch.cuda.Event | None:
        """A point of the current stream, for :meth:`fork`."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream())
        return event

    @contextlib.contextmanager
    def fork(self, mark: torch.cuda.Event | None = None) -> Iterator[None]:
        """What is launched inside waits for the current stream's work up to ``mark`` (so far), and for no later."""
        if self._stream is None:
            yield
            return
        self._stream.wait_event(mark or self.mark())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The current stream's later work waits for the side's."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


side_stream_of = functools.cache(SideStream)


def may_run_beside() -> bool:
    """Whether deltas may be made beside the base's GEMMs.

    Not with ``POLYLORA_VLLM_BESIDE=0``; nor with ``POLYLORA_BATCH_INVARIANT=1``: they are rounded once more than where
    they are added at once, and which of the two a row meets depends on the other rows of its step.
    """
    return os.environ.get("POLYLORA_VLLM_BESIDE", "1") != "0" and not is_batch_invariant()


def is_batch_invariant() -> bool:
    """Whether a row's result must not depend on the other rows of its step."""
    return os.environ.get("POLYLORA_BATCH_INVARIANT") == "1"


def follow_batch_invariance() -> None:
    """Where vLLM is to be batch invariant (``VLLM_BATCH_INVARIANT``), so are polylora's ops, unless told otherwise."""
    if envs.VLLM_BATCH_INVARIANT:
        os.environ.setdefault("POLYLORA_BATCH_INVARIANT", "1")  # which the kernels' launchers read, too
