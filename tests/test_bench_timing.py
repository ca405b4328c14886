"""The GPU timer with the GPU made up: what a sample is, which calls a graph holds, how a capture ends that fails."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch
from polylora.bench import timing
from polylora.bench.timing import MAX_CALLS, MIN_CALLS, REPLAY_US, REPLAYS, WARM_REPLAYS, Timing

SETUP_US = 7.0  # of the first replay of a graph


class MadeUpGpu:
    """Streams, events and graphs that keep a clock: a captured call takes the us that it returns."""

    def __init__(self):
        self.now = 0.0
        self.capturing = None
        self.graphs = []
        gpu = self

        class Graph:
            def __init__(self):
                self.us, self.calls, self.replays, self.alive = 0.0, 0, 0, True
                gpu.graphs.append(self)

            def capture_begin(self, pool=None, capture_error_mode="global"):
                assert gpu.capturing is None and capture_error_mode == "thread_local" and not gc.isenabled()
                gpu.capturing = self

            def capture_end(self):
                assert gpu.capturing is self
                gpu.capturing = None

            def replay(self):
                assert self.alive and gpu.capturing is None
                gpu.now += self.us + (SETUP_US if self.replays == 0 else 0)
                self.replays += 1

            def reset(self):
                self.alive = False

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, later):
                return (later.at - self.at) / 1000

        self.cuda = SimpleNamespace(
            CUDAGraph=Graph,
            Event=Event,
            Stream=lambda device: "stream",
            current_device=lambda: 0,
            get_device_properties=lambda device: SimpleNamespace(L2_cache_size=123),
            stream=lambda stream: contextlib.nullcontext(),
            synchronize=lambda device=None: None,
            mem_get_info=lambda device: (1000, 9999),
            memory_reserved=lambda device: 300,
            memory_allocated=lambda device: 200,
        )

    def call(self, us, seen=None):
        def run():
            if seen is not None:
                seen.append(us)
            if self.capturing is not None:
                self.capturing.us += us
                self.capturing.calls += 1

        return run


@pytest.fixture
def gpu(monkeypatch):
    gpu = MadeUpGpu()
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=gpu.cuda, device=torch.device))
    return gpu


def test_a_sample_is_divided_by_its_calls():
    of = Timing.of([100.0, 300.0, 200.0, 1000.0, 200.0], 100)
    assert (of.us, of.low, of.high) == (2.0, 2.0, 3.0)
    assert (of.calls, of.samples) == (100, 5)
    assert Timing.of([50.0], 10) == Timing(5.0, 5.0, 5.0, 10, 1)


def test_a_graph_holds_whole_rounds_of_the_weight_sets():
    assert [timing.whole_rounds(n, 3) for n in (1, 3, 4)] == [3, 3, 6]
    for us in (0.0, 0.7, 3.0, 40.0, 900.0, 5000.0):
        for sets in (1, 2, 17, 267, 9000):
            calls = timing.calls_for(us, sets)
            assert calls % sets == 0 and MIN_CALLS <= calls < MAX_CALLS + sets
            assert calls * us >= REPLAY_US or calls >= MAX_CALLS


@pytest.mark.parametrize(("us", "sets"), [(3.0, 1), (3.0, 40), (0.5, 3), (400.0, 3), (2.0, 2000)])
def test_us_a_call_are_the_calls_own(gpu, us, sets):
    of = timing.CudaTimer().calls([gpu.call(us)] * sets)
    assert of.us == pytest.approx(us) and of.low == of.us == of.high and of.samples == REPLAYS
    last = gpu.graphs[-1]
    assert of.calls == last.calls == round(last.us / us) and of.calls % sets == 0
    assert last.us >= REPLAY_US or of.calls >= MAX_CALLS
    assert last.replays >= REPLAYS + WARM_REPLAYS and not any(graph.alive for graph in gpu.graphs)


def test_weight_sets_take_turns(gpu):
    seen = []
    timing.CudaTimer().calls([gpu.call(us, seen) for us in (100.0, 200.0, 300.0)])
    assert seen == [100.0, 200.0, 300.0] * (len(seen) // 3), "also from one capture to the next"


def test_the_change_comes_after_the_capture_and_before_the_replays(gpu):
    change_at = []
    timer = timing.CudaTimer()
    timer.calls_after([gpu.call(200.0)], lambda: change_at.append((gpu.graphs[-1].calls, gpu.graphs[-1].replays)))
    (calls, replays), last = *change_at, gpu.graphs[-1]
    assert calls == last.calls > 0 and last.replays == replays + WARM_REPLAYS + REPLAYS


def test_what_a_call_adds_is_the_difference_of_two_graphs(gpu):
    base, added = timing.CudaTimer().added([gpu.call(50.0)] * 3, [gpu.call(4.0)] * 7)
    assert base.us == pytest.approx(50.0) and added.us == pytest.approx(4.0)
    assert base.calls == added.calls and base.calls % 3 == 0
    alone, plus = gpu.graphs[-2:]
    assert plus.calls == 2 * alone.calls and not alone.alive and not plus.alive


def test_what_a_whole_forward_takes_beyond_its_base_is_the_difference_too(gpu):
    base, more = timing.CudaTimer().beyond([gpu.call(50.0), gpu.call(70.0)], [gpu.call(55.0), gpu.call(71.0)])
    assert base.us == pytest.approx(60.0) and more.us == pytest.approx(3.0) and more.samples == REPLAYS
    alone, plus = gpu.graphs[-2:]
    assert plus.calls == alone.calls == base.calls == more.calls and not alone.alive and not plus.alive
    base, less = timing.CudaTimer().beyond([gpu.call(50.0)], [gpu.call(48.0)])
    assert less.us == pytest.approx(-2.0), "a fused seam may save more than it adds"
    with pytest.raises(ValueError, match="must be as many as the base's 2, got 1"):
        timing.CudaTimer().beyond([gpu.call(1.0)] * 2, [gpu.call(1.0)])


def test_graphs_take_turns_and_warm_rounds_are_left_out(gpu):
    timer = timing.CudaTimer()
    one, two = timer.capture([gpu.call(10.0)], 1), timer.capture([gpu.call(25.0)], 2)
    assert timer.replay([one, two], 4, 1) == [[pytest.approx(10.0)] * 4, [pytest.approx(50.0)] * 4]


def test_a_capture_that_fails_is_ended_and_its_error_told(gpu):
    def fail():
        if gpu.capturing is not None:
            raise RuntimeError("not while capturing")

    timer = timing.CudaTimer()
    with pytest.raises(RuntimeError, match="not while capturing"):
        timer.calls([gpu.call(5.0), fail])
    assert gpu.capturing is None and gc.isenabled()
    assert timer.calls([gpu.call(5.0)]).us == pytest.approx(5.0), "the timer still works"


def test_host_time_is_a_call_s(gpu):
    count = 0

    def call():
        nonlocal count
        count += 1

    of = timing.CudaTimer().host(call)
    assert count == timing.HOST_CALLS * (WARM_REPLAYS + REPLAYS) and 0 < of.us < 1000
    assert timing.CudaTimer().l2_bytes == 123


def test_what_torch_keeps_for_itself_counts_as_free(gpu):
    assert timing.CudaTimer().free_bytes() == 1100
