"""The run of ``polylora bench linear``: every implementation is checked on a case, then timed on the same data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import polylora
from polylora.bench.cases import Case, Module
from polylora.bench.peers import BesideCall, Call, Implementation, Polylora, PolyloraBeside
from polylora.bench.problem import COLD, Problem, sets_that_fit, weight_sets
from polylora.bench.report import OK, Record, Sink, Table, cell, number, write_means
from polylora.bench.run import DeviceLost, Progress, Run, Timer, compared, compared_head, describe_run, timed

__all__ = ["DeviceLost", "Options", "run"]

#: A result may be this far from float64: ||result - reference|| / ||delta||, the rounding of y included.
ERROR_BOUND = 2e-2
#: Shapes of which the host time of a call is measured: the GPU does nearly nothing.
OVERHEAD_CASES = (Case(Module("64->64", 64, (64,)), 8, 1, 1), Case(Module("64->64+64+64", 64, (64, 64, 64)), 8, 4, 4))


@dataclass
class Options:
    """What to run.

    Attributes:
        cases: see :mod:`polylora.bench.cases`.
        implementations: in the order of the tables.
        dtype: bfloat16 or float16.
        chain: also what the op adds to a chain of base GEMMs.
        idle: also a replay in which no row has an adapter (polylora only).
        overhead: also the host time of an eager call.
    """

    cases: Sequence[Case]
    implementations: Sequence[Implementation]
    dtype: torch.dtype = torch.bfloat16
    chain: bool = False
    idle: bool = False
    overhead: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


def run(options: Options, timer: Timer, sink: Sink, progress: Progress = lambda text: None) -> list[str]:
    """Checks and times everything.

    Args:
        options: what.
        timer: how.
        sink: takes records and tables as they come.
        progress: is told what happens.

    Returns:
        What polylora failed at, one line each; empty when all is well. Peers that fail are named in the tables.

    Raises:
        DeviceLost: a kernel left the device unusable. What was measured before is in the sink.
    """
    return _Run(options, timer, sink, progress).run()


class _Run(Run):
    def __init__(self, options: Options, timer: Timer, sink: Sink, progress: Progress) -> None:
        super().__init__(timer, sink, progress, ERROR_BOUND)
        self.options = options
        self.implementations = list(options.implementations)
        self.ours = [i for i in self.implementations if i.ours]
        # in a chain, polylora's deltas also beside the GEMM
        beside = [PolyloraBeside()] if any(i.name == Polylora().name for i in self.ours) else []
        self.in_chain = self.ours[:1] + beside + [i for i in self.implementations if i not in self.ours[:1]]
        self.names = [case.name for case in options.cases]

    def run(self) -> list[str]:
        options = self.options
        self.sink.record(describe_run(options.dtype) | options.notes)
        self.timer.wake()
        passes = [("", self._alone_table, self._alone, options.cases)]
        if options.chain:  # an embedding follows no GEMM
            linears = [case for case in options.cases if not case.module.is_embedding]
            passes.append(("chain, ", self._chain_table, self._chain, linears))
        if options.idle and self.ours:
            passes.append(("idle, ", self._idle_table, self._idle, options.cases))
        self.expect(sum(len(cases) for *_, cases in passes))
        for what, open_table, measure, cases in passes:
            self.table = open_table()
            self.each(what, cases, measure)
            if measure == self._alone:
                write_means(self.sink, self.sink.records)
                self._plans()
        if options.overhead:
            self.progress("host time of eager calls")
            self._overhead()
        return self.failures

    # ------------------------------------------------------------------------------------------------------- tables

    def _alone_table(self) -> Table:
        names = [i.name for i in self.implementations]
        head = ["case", "weights MB", "x+y MB", "floor", *names, *compared_head(self.implementations)]
        self.sink.text("us a call in a CUDA graph, cold weights:\n")
        return Table(self.sink, head, self.names)

    def _chain_table(self) -> Table:
        head = ["case", "base GEMM"]
        for i in self.in_chain:
            head += [i.name, "quartiles".rjust(14)]
        self.sink.text(
            "\nus that a call adds to a chain of base GEMMs (torch.mm), each followed by the call, or, beside, with "
            "its delta\nmade on a second stream during the GEMM:\n"
        )
        return Table(self.sink, head, self.names)

    def _idle_table(self) -> Table:
        self.sink.text("\nus a call, replayed with no row that has an adapter:\n")
        return Table(self.sink, ["case", *(i.name for i in self.ours)], self.names)

    # ----------------------------------------------------------------------------------------------------- measuring

    def _problem(self, case: Case) -> Problem:
        wanted, room = weight_sets(case, self.timer.l2_bytes), sets_that_fit(case, self.timer.free_bytes())
        if room < wanted:
            self.note("weights warm", f"{case.name}: memory for {room} of the {wanted} sets that keep weights cold")
        return Problem(case, self.timer.device, self.options.dtype, min(wanted, room))

    def _measure(
        self,
        kind: str,
        case: Case,
        problem: Problem,
        implementation: Implementation,
        measure: Callable[[Implementation, list[Call]], Record],
    ) -> Record:
        """Checks and measures one implementation on a problem; see :meth:`polylora.bench.run.Run.checked`."""
        record: Record = {
            "kind": kind,
            "case": case.name,
            "regime": case.regime,
            "op": "embedding" if case.module.is_embedding else "linear",
            "module": case.module.name,
            "k": case.module.k,
            "widths": list(case.module.widths),
            "rank": case.rank,
            "rows": case.rows,
            "adapters": case.adapters,
            "weights_mb": case.weight_bytes / 1e6,
            "xy_mb": case.xy_bytes / 1e6,
            "floor_us": case.floor_us,
            "sets": problem.sets,
            "cold": problem.sets >= weight_sets(case, self.timer.l2_bytes),
        }
        if case.module.is_embedding:
            record |= {"vocab": case.module.vocab, "layout": "token" if case.module.token_major else "rank"}
        return self.checked(record, problem, implementation, measure)

    def _measure_all(
        self,
        kind: str,
        case: Case,
        problem: Problem,
        implementations: Sequence[Implementation],
        measure: Callable[[Implementation, list[Call]], Record],
    ) -> list[Record | None]:
        """One record for each; None for one that failed on this case before."""
        return [
            None if (i.name, case.name) in self.out else self._measure(kind, case, problem, i, measure)
            for i in implementations
        ]

    def _alone(self, case: Case) -> None:
        def measure(_: Implementation, calls: list[Call]) -> Record:
            timing = self.timer.calls(calls)
            return timed(timing) | {"ratio": timing.us / case.floor_us}

        with self.timer.scope():
            problem = self._problem(case)
            found = [self._measure("linear", case, problem, i, measure) for i in self.implementations]
        cells = [case.name, number(case.weight_bytes / 1e6), number(case.xy_bytes / 1e6), number(case.floor_us)]
        cells += map(cell, found)
        self.table.row(cells + compared(found))

    def _chain(self, case: Case) -> None:
        k, n, size = case.module.k, case.module.width, torch.finfo(self.options.dtype).bits // 8
        base_bytes = k * n * size  # a layer's base weights pass through the L2 as well
        layers = max(1, math.ceil(COLD * self.timer.l2_bytes / (base_bytes + case.weight_bytes)))
        with self.timer.scope():
            problem = self._problem(case)
            weights = torch.randn(layers, n, k, device=problem.device, dtype=problem.dtype).mul_(k**-0.5)
            x, y = problem.x, problem.y

            def layer(weight: torch.Tensor) -> Call:
                transposed = weight.T
                return lambda: torch.mm(x, transposed, out=y)

            base = [layer(weight) for weight in weights]

            def measure(_: Implementation, calls: list[Call]) -> Record:
                if isinstance(calls[0], BesideCall):
                    rounds = math.lcm(len(base), len(calls))
                    gemms = [base[i % len(base)] for i in range(rounds)]
                    around = [calls[i % len(calls)].around(gemm) for i, gemm in enumerate(gemms)]
                    alone, added = self.timer.beyond(gemms, around)
                else:
                    alone, added = self.timer.added(base, calls)
                return timed(added) | {"base_us": alone.us}

            found = self._measure_all("chain", case, problem, self.in_chain, measure)
        times = [record["base_us"] for record in found if record and record["status"] == OK]
        cells = [case.name, number(min(times, default=None))]
        for record in found:
            fine = record is not None and record["status"] == OK
            cells += [cell(record), f"{record['low_us']:.2f}..{record['high_us']:.2f}" if fine else ""]
        self.table.row(cells)

    def _idle(self, case: Case) -> None:
        with self.timer.scope():
            problem = self._problem(case)
            nobody = torch.full_like(problem.slot_of_row, -1)

            def measure(implementation: Implementation, calls: list[Call]) -> Record:
                def empty_plan() -> None:
                    implementation.plan.fill(nobody)
                    problem.y.copy_(problem.y0)

                timing = self.timer.calls_after(calls, empty_plan)
                if not torch.equal(problem.y, problem.y0):
                    return {"status": "wrong", "detail": "rows without an adapter must keep their bits"}
                return timed(timing)

            found = self._measure_all("idle", case, problem, self.ours, measure)
        self.table.row([case.name, *map(cell, found)])

    # ------------------------------------------------------------------------------------------- plan and host time

    def _plans(self) -> None:
        """The plan, once for each number of rows and slots."""
        if not self.ours:
            return
        sizes = sorted({(case.rows, case.adapters): case for case in self.options.cases}.items())
        self.sink.text("\nThe plan, once a step for all layers, us in a CUDA graph:\n")
        table = Table(self.sink, ["rows, adapters", "us"], [f"M{rows} a{slots}" for (rows, slots), _ in sizes])
        for (rows, slots), case in sizes:
            with self.timer.scope():
                slot_of_row = torch.tensor(case.slot_of_row(), dtype=torch.int32, device=self.timer.device)
                plan = polylora.Plan(rows, slots, device=self.timer.device)
                timing = self.timer.calls([lambda plan=plan, ids=slot_of_row: plan.fill(ids)])
            self.sink.record({"kind": "plan", "rows": rows, "slots": slots} | timed(timing))
            table.row([f"M{rows} a{slots}", number(timing.us)])

    def _overhead(self) -> None:
        self.sink.text("\nHost time of one eager call, us (the bar for polylora: 6):\n")
        rows = [*(i.name for i in self.implementations), "plan", "polylora, by keywords", "torch add_"]
        table = Table(self.sink, ["call", *(case.name for case in OVERHEAD_CASES)], rows)
        columns = [self._host_times(case) for case in OVERHEAD_CASES]
        for name in rows:
            if any(name in column for column in columns):
                table.row([name, *(number(column.get(name)) for column in columns)])
        self.tell_problems()

    def _host_times(self, case: Case) -> dict[str, float]:
        """us by what is called."""
        found: dict[str, float] = {}

        def add(name: str, call: Call) -> Record:
            timing = self.timer.host(call)
            found[name] = timing.us
            return timed(timing)

        with self.timer.scope():
            problem = Problem(case, self.timer.device, self.options.dtype, 1)
            for i in self.implementations:
                self._measure("overhead", case, problem, i, lambda i, calls: add(i.name, calls[0]))
            for name, call in self._other_calls(problem):
                record = {"kind": "overhead", "case": case.name, "implementation": name, "status": OK}
                self.sink.record(record | add(name, call))
        return found

    def _other_calls(self, problem: Problem) -> Iterable[tuple[str, Call]]:
        case = problem.case
        yield "torch add_", lambda: problem.y.add_(problem.y0)
        if not self.ours:
            return
        plan = polylora.Plan(case.rows, case.adapters, device=problem.device)
        yield "plan", lambda: plan.fill(problem.slot_of_row)
        ranks, widths = [case.rank] * case.adapters, case.module.widths
        table = polylora.SliceTable.from_dense_pool(problem.a[0], problem.b[0], ranks, problem.scales, widths=widths)
        args, linear_ = table.args("linear_"), torch.ops.polylora.linear_
        yield "polylora, by keywords", lambda: linear_(problem.y, problem.x, plan=plan.tensor, **args)
