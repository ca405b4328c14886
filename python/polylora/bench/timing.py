"""Timing on a GPU: CUDA graphs of many calls, replayed back to back; host time by the wall clock.

A sample is one replay over its calls, between two events. All replays are queued at once, so that the host is never
waited for; the first few are left out. Calls rotate among weight sets, and a graph holds whole rounds of them.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Call = Callable[[], object]

#: Replays measured, and left out before them.
REPLAYS, WARM_REPLAYS = 21, 3
#: A replay takes at least this many us: what stands between two replays then does not count.
REPLAY_US = 1000.0
#: Calls in a graph: at least, and at most unless one round of the weight sets has more.
MIN_CALLS, MAX_CALLS = 8, 4000
#: Eager calls in a sample of host time: few enough for the launch queue (1024) to take them without waiting.
HOST_CALLS = 200


@dataclass(frozen=True)
class Timing:
    """us a call: the median of the samples, and their quartiles."""

    us: float
    low: float
    high: float
    calls: int
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float], calls: int) -> Timing:
        """From samples in us of ``calls`` calls each."""
        each = [sample / calls for sample in samples]
        low, _, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        return cls(median(each), low, high, calls, len(each))


def whole_rounds(calls: int, sets: int) -> int:
    """The smallest multiple of ``sets`` that is not below ``calls``."""
    return math.ceil(calls / sets) * sets


def calls_for(us: float, sets: int) -> int:
    """Calls in a graph of calls of ``us`` each: whole rounds that take :data:`REPLAY_US`."""
    wanted = math.ceil(REPLAY_US / max(us, 0.1))
    return whole_rounds(min(max(wanted, MIN_CALLS), MAX_CALLS), sets)


class CudaTimer:
    """Times calls on one stream of the current device.

    Whatever the calls need must be made inside :meth:`scope`: kernels that keep scratch memory by stream, or that must
    run once before they can be captured, have then seen the stream that is captured.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.device)
        properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = getattr(properties, "L2_cache_size", 0) or 50 * 2**20

    def free_bytes(self) -> int:
        """Bytes that can be allocated now, torch's own reserve among them."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def scope(self):
        """A context in which work goes to the timer's stream."""
        return torch.cuda.stream(self.stream)

    def wake(self, seconds: float = 0.3) -> None:
        """Keeps the GPU busy until its clocks are up."""
        with self.scope():
            square = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                for _ in range(20):
                    torch.mm(square, square)
                self.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------------------------------------------- graphs

    def capture(self, calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
        """A graph of ``count`` calls, in turn from ``calls``, each of which must have run before on this stream."""
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # what a collection would free must not be freed while a stream is captured
        try:
            with self.scope():
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    for i in range(count):
                        calls[i % len(calls)]()
                except BaseException:
                    self._abandon(graph)
                    raise
                graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return graph

    @staticmethod
    def _abandon(graph: torch.cuda.CUDAGraph) -> None:
        """Ends a capture that failed, so that the stream can be used again; the first error is the one to tell."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()

    def replay(self, graphs: Sequence[torch.cuda.CUDAGraph], replays: int, warm: int) -> list[list[float]]:
        """us of each replay, one list a graph; the graphs take turns, ``warm`` rounds are left out."""
        with self.scope():
            events = [torch.cuda.Event(enable_timing=True)]
            events[0].record()
            for _ in range(warm + replays):
                for graph in graphs:
                    graph.replay()
                    events.append(torch.cuda.Event(enable_timing=True))
                    events[-1].record()
        self.synchronize()
        times = [1000 * a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
        return [times[i :: len(graphs)][warm:] for i in range(len(graphs))]

    def _fit(self, calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
        """A graph long enough to be timed, and its calls. Runs every call once before."""
        with self.scope():
            for call in calls:
                call()
        count = whole_rounds(MIN_CALLS, len(calls))
        graph = self.capture(calls, count)
        us = median(self.replay([graph], 3, 1)[0])
        wanted = calls_for(us / count, len(calls))
        if us < 0.9 * REPLAY_US and wanted > count:
            graph.reset()
            graph, count = self.capture(calls, wanted), wanted
        return graph, count

    def calls(self, calls: Sequence[Call]) -> Timing:
        """us a call in a graph in which the calls, one a weight set, take turns."""
        graph, count = self._fit(calls)
        (times,) = self.replay([graph], REPLAYS, WARM_REPLAYS)
        graph.reset()
        return Timing.of(times, count)

    def calls_after(self, calls: Sequence[Call], change: Call) -> Timing:
        """As :meth:`calls`, but ``change`` runs between capture and replay: the graph meets other data."""
        graph, count = self._fit(calls)
        with self.scope():
            change()
        (times,) = self.replay([graph], REPLAYS, WARM_REPLAYS)
        graph.reset()
        return Timing.of(times, count)

    def added(self, base: Sequence[Call], calls: Sequence[Call]) -> tuple[Timing, Timing]:
        """us a layer of ``base`` alone, and what ``calls`` add to it.

        Two graphs, the base calls alone and each followed by one of ``calls``, take turns; every pair of replays is a
        sample of the difference. Both lists go round on their own.
        """

        def layer(i: int) -> Call:
            def both() -> None:
                base[i % len(base)]()
                calls[i % len(calls)]()

            return both

        return self._in_turn(base, calls, lambda count: [layer(i) for i in range(count)])

    def beyond(self, base: Sequence[Call], calls: Sequence[Call]) -> tuple[Timing, Timing]:
        """us a call of ``base``, and how much longer one of ``calls`` takes, which does the base's work as well.

        Two graphs take turns as in :meth:`added`. ``calls`` is as long as ``base``: both find the same data.
        """
        if len(base) != len(calls):
            raise ValueError(f"polylora bench: calls must be as many as the base's {len(base)}, got {len(calls)}")
        return self._in_turn(base, calls, lambda count: calls)

    def _in_turn(
        self, base: Sequence[Call], warm: Sequence[Call], more: Callable[[int], Sequence[Call]]
    ) -> tuple[Timing, Timing]:
        """A graph of ``count`` base calls and one of as many calls of ``more(count)``; ``warm`` runs once before."""
        alone, count = self._fit(base)
        with self.scope():
            for call in warm:
                call()
        plus = self.capture(more(count), count)
        without, with_ = self.replay([alone, plus], REPLAYS, WARM_REPLAYS)
        alone.reset()
        plus.reset()
        return Timing.of(without, count), Timing.of([b - a for a, b in zip(without, with_, strict=True)], count)

    # --------------------------------------------------------------------------------------------------------- host

    def host(self, call: Call) -> Timing:
        """us of host time of one eager call: a loop of calls, by the wall clock, without waiting for the GPU."""
        samples = []
        with self.scope():
            for _ in range(WARM_REPLAYS + REPLAYS):
                self.synchronize()
                start = time.perf_counter()
                for _ in range(HOST_CALLS):
                    call()
                samples.append(1e6 * (time.perf_counter() - start))
            self.synchronize()
        return Timing.of(samples[WARM_REPLAYS:], HOST_CALLS)
