"""What the runs of ``polylora bench`` share: the loop over cases, check before time, who failed and why."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from typing import Any, Protocol

import torch

import polylora
from polylora.bench.report import OK, Record, Sink, cell, number
from polylora.bench.timing import Call, Timing

Progress = Callable[[str], None]


class Timer(Protocol):
    """What a run needs of :class:`polylora.bench.timing.CudaTimer`."""

    device: torch.device
    l2_bytes: int

    def free_bytes(self) -> int: ...
    def scope(self) -> contextlib.AbstractContextManager: ...
    def wake(self) -> None: ...
    def synchronize(self) -> None: ...
    def calls(self, calls: Sequence[Call]) -> Timing: ...
    def calls_after(self, calls: Sequence[Call], change: Call) -> Timing: ...
    def added(self, base: Sequence[Call], calls: Sequence[Call]) -> tuple[Timing, Timing]: ...
    def beyond(self, base: Sequence[Call], calls: Sequence[Call]) -> tuple[Timing, Timing]: ...
    def host(self, call: Call) -> Timing: ...


class Case(Protocol):
    """What a run needs of a case."""

    @property
    def name(self) -> str: ...


class Implementation(Protocol):
    """What a run needs of :class:`polylora.bench.peers.Implementation`."""

    name: str
    ours: bool

    def prepare(self, problem: Any) -> list[Call]: ...
    def scope(self) -> contextlib.AbstractContextManager: ...
    def declines(self, error: Exception) -> bool: ...
    def close(self) -> None: ...


class DeviceLost(RuntimeError):
    """The device does not answer any more: nothing after this can be measured."""


def describe_run(dtype: torch.dtype) -> Record:
    """The ``run`` record: when, on what, with which versions."""
    record = {
        "kind": "run",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "polylora": polylora.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        it = torch.cuda.get_device_properties(torch.cuda.current_device())
        record |= {"device": it.name, "sms": it.multi_processor_count, "capability": f"{it.major}.{it.minor}"}
        record["l2_bytes"] = getattr(it, "L2_cache_size", None)
    with contextlib.suppress(metadata.PackageNotFoundError):
        record["triton"] = metadata.version("triton")
    invariant = os.environ.get("POLYLORA_BATCH_INVARIANT")
    return record | ({"batch_invariant": invariant} if invariant else {})


def timed(timing: Timing) -> Record:
    """The fields of a time in a record."""
    times = {"us": timing.us, "low_us": timing.low, "high_us": timing.high}
    return times | {"calls": timing.calls, "samples": timing.samples}


def compared_head(implementations: Sequence[Implementation]) -> list[str]:
    """The columns that :func:`compared` fills; none without polylora, one less without peers."""
    ours = [i.name for i in implementations if i.ours]
    if not ours:
        return []
    return [f"{ours[0]}/floor"] + (["best peer/ours"] if len(ours) < len(implementations) else [])


def compared(found: Sequence[Record]) -> list[str]:
    """polylora's time over the floor, and the best peer's over polylora's, of a case's records."""
    ours = [record for record in found if record["ours"]]
    if not ours:
        return []
    mine = ours[0]
    cells = [cell(mine, "ratio")]
    if len(ours) < len(found):
        best = min((r["us"] for r in found if not r["ours"] and r["status"] == OK), default=math.nan)
        cells.append(number(best / mine["us"] if mine["status"] == OK and mine["us"] > 0 else None))
    return cells


class Run:
    """A run over cases. ``failures`` are polylora's, one line each.

    Args:
        timer: how.
        sink: takes records and tables as they come.
        progress: is told what happens.
        error_bound: a result that is farther than this from float64 gets no time.
    """

    def __init__(self, timer: Timer, sink: Sink, progress: Progress, error_bound: float) -> None:
        self.timer, self.sink, self.progress, self.error_bound = timer, sink, progress, error_bound
        self.failures: list[str] = []
        self.out: set[tuple[str, str]] = set()  # (implementation, case) that failed once
        self._problems: dict[str, list[str]] = {}
        self._total = self._done = 0
        self._started = time.perf_counter()

    def expect(self, cases: int) -> None:
        """How many cases all passes together will measure, for the progress lines."""
        self._total, self._done, self._started = cases, 0, time.perf_counter()

    def each(self, what: str, cases: Sequence[Any], measure: Callable[[Any], None]) -> None:
        """Measures case after case; one that does not fit the memory is left out and named. Then says what failed."""
        for case in cases:
            self._tell(what + case.name)
            try:
                measure(case)
            except torch.OutOfMemoryError:
                self.note("left out", f"{what}{case.name}: it does not fit the device's memory")
            self._done += 1
            if self.timer.device.type == "cuda":
                torch.cuda.empty_cache()
        self.tell_problems()

    def _tell(self, name: str) -> None:
        spent = time.perf_counter() - self._started
        left = f", about {spent / self._done * (self._total - self._done):.0f} s left" if self._done else ""
        self.progress(f"{self._done + 1} of {self._total}{left}: {name}")

    def note(self, who: str, text: str) -> None:
        """Something to be said after the table, and in the progress now."""
        self._problems.setdefault(who, []).append(text)
        self.progress(f"{who}: {text}")

    def tell_problems(self) -> None:
        if self._problems:
            self.sink.text()
        for who, texts in self._problems.items():
            more = f" (and {len(texts) - 1} more like it)" if len(texts) > 1 else ""
            self.sink.text(f"{who}: {texts[0]}{more}")
        self._problems = {}

    def checked(
        self,
        record: Record,
        problem: Any,
        implementation: Implementation,
        measure: Callable[[Any, list[Call]], Record],
    ) -> Record:
        """Prepares, checks and, where the check passes, measures; the record says what came of it.

        Args:
            record: what is known before: ``kind``, ``case`` and more of the caller's.
            problem: ``problem.check(calls)`` returns the error of the calls' results.
            implementation: its ``prepare(problem)`` makes the calls.
            measure: returns what it adds to the record of a right result.
        """
        record |= {"implementation": implementation.name, "ours": implementation.ours}
        try:
            with implementation.scope():
                calls = implementation.prepare(problem)
                error = problem.check(calls)
                record["error"] = error if math.isfinite(error) else None
                if error <= self.error_bound:  # not so for NaN
                    record |= {"status": OK} | measure(implementation, calls)
                else:
                    detail = f"error {error:.3g} against float64 must be at most {self.error_bound:g}"
                    record |= {"status": "wrong", "detail": detail}
        except Exception as error:  # kernels of others raise whatever they like
            status = "unserved" if implementation.declines(error) else "error"
            record |= {"status": status, "detail": f"{type(error).__name__}: {error}"}
        finally:
            implementation.close()
        self._judge(record)
        self.sink.record(record)
        if record["status"] == "error":
            self.still_alive(f"{implementation.name} on {record['case']}")
        return record

    def still_alive(self, after: str) -> None:
        """Raises DeviceLost where the device does not answer any more."""
        try:
            self.timer.synchronize()
        except Exception as error:
            raise DeviceLost(f"{after} left the device unusable: {error}") from None

    def _judge(self, record: Record) -> None:
        if record["status"] == OK:
            return
        name, case = record["implementation"], record["case"]
        self.out.add((name, case))
        if record["status"] == "unserved":
            return
        text = f"{case} ({record['kind']}): {str(record['detail']).strip().splitlines()[0][:300]}"
        self.note(f"{name} {'FAILED' if record['ours'] else 'left out'}", text)
        if record["ours"]:
            self.failures.append(f"{name} on {text}")
