"""The run of ``polylora bench moe``: what LoRA adds to the forward of an MoE layer.

Added = the whole forward with LoRA minus the forward without, the same base GEMMs in both, measured in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from polylora.bench.moe_base import make_base
from polylora.bench.moe_cases import BARS, SLOTS, MoeCase
from polylora.bench.moe_peers import MoePolylora
from polylora.bench.moe_problem import MoeProblem
from polylora.bench.peers import Call, Implementation
from polylora.bench.report import OK, Record, Sink, Table, cell, number, write_means
from polylora.bench.run import Progress, Run, Timer, compared, compared_head, describe_run, timed

#: A result may be this far from float64: ||out - right|| / ||right - base||, of the worst token. The base's roundings
#: of y1, h and y2 to bf16 are in it, about 1e-2; a token that lacks the delta of one of 22 experts is at 0.2 or so.
ERROR_BOUND = 3e-2
#: The ops by themselves, as :meth:`MoePolylora.alone` names them.
OPS = ("plan", "gate_up", "down")


@dataclass
class Options:
    """What to run.

    Attributes:
        cases: see :mod:`polylora.bench.moe_cases`.
        implementations: in the order of the tables.
        base: ``sglang_lora_ops.api``, whose base GEMMs are run; None: torch's.
        notes: more fields of the ``run`` record.
    """

    cases: Sequence[MoeCase]
    implementations: Sequence[Implementation]
    base: ModuleType | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def run(options: Options, timer: Timer, sink: Sink, progress: Progress = lambda text: None) -> list[str]:
    """Checks and times everything.

    Args:
        options: what.
        timer: how.
        sink: takes records and tables as they come.
        progress: is told what happens.

    Returns:
        What polylora or the base failed at, one line each; empty when all is well. Peers that fail are named in the
        tables.

    Raises:
        DeviceLost: a kernel left the device unusable. What was measured before is in the sink.
    """
    return _MoeRun(options, timer, sink, progress).run()


class _MoeRun(Run):
    def __init__(self, options: Options, timer: Timer, sink: Sink, progress: Progress) -> None:
        super().__init__(timer, sink, progress, ERROR_BOUND)
        self.options = options
        self.implementations = list(options.implementations)
        self.ours = [i for i in self.implementations if i.ours]
        self.bars = any(case.name in BARS for case in options.cases)

    def run(self) -> list[str]:
        cases, base = self.options.cases, "torch" if self.options.base is None else "triton"
        self.sink.record(describe_run(torch.bfloat16) | {"base": base} | self.options.notes)
        self.timer.wake()
        self.expect(len(cases))
        self.sink.text(f"us that LoRA adds to an MoE layer's forward in a CUDA graph, the base's GEMMs by {base}:\n")
        self.table = Table(self.sink, self._head(), [case.name for case in cases])
        self.each("", cases, self._case)
        title = "Added time over the weights' at 3 TB/s, geometric means of the cases that add any"
        write_means(self.sink, self.sink.records, title)
        return self.failures

    def _head(self) -> list[str]:
        head = ["case", "weights MB", "at 3 TB/s", *(["bar"] if self.bars else []), "base"]
        for i in self.implementations:
            head += [i.name, "quartiles".rjust(16)]
        return head + compared_head(self.implementations) + ([f"{op} alone" for op in OPS] if self.ours else [])

    def _case(self, case: MoeCase) -> None:
        with self.timer.scope():
            problem = self._problem(case)
            if problem is None:
                return
            base = [problem.base.layer(routing).forward for routing in problem.layers]

            def measure(implementation: Implementation, calls: list[Call]) -> Record:
                alone, added = self.timer.beyond(base, calls)
                found = timed(added) | {"base_us": alone.us, "ratio": self._ratio(added.us, floor)}
                if isinstance(implementation, MoePolylora):
                    ops = implementation.alone(problem)
                    found |= {f"{op}_us": self.timer.calls(ops[op]).us for op in OPS}
                return found

            floor = case.floor_us(problem.weight_bytes)
            found = [self._measure(case, problem, i, measure) for i in self.implementations]
        self._row(case, problem, found)

    @staticmethod
    def _ratio(us: float, floor: float) -> float | None:
        """None where nothing is added, as a fused seam may: it has no place in a geometric mean."""
        return us / floor if us > 0 else None

    def _problem(self, case: MoeCase) -> MoeProblem | None:
        """None: the base does not run or is wrong, which is said and fails the run."""
        problem = MoeProblem(case, self.timer.device, self.timer.l2_bytes, self.timer.free_bytes())
        try:
            problem.base = make_base(problem, self.options.base)
            error = problem.check_base()
            if error <= ERROR_BOUND:  # not so for NaN
                if not problem.cold:
                    self.note("weights warm", f"{case.name}: memory for {len(problem.pools)} pools is not enough")
                return problem
            text = f"error {error:.3g} against float64 must be at most {ERROR_BOUND:g}"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # kernels of others raise whatever they like
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        self.note("the base FAILED", f"{case.name}: {text}")
        self.failures.append(f"the base on {case.name}: {text}")
        self.still_alive(f"the base on {case.name}")
        return None

    def _measure(
        self,
        case: MoeCase,
        problem: MoeProblem,
        implementation: Implementation,
        measure: Callable[[Implementation, list[Call]], Record],
    ) -> Record:
        model = case.model
        record: Record = {
            "kind": "moe",
            "case": case.name,
            "regime": case.regime,
            "model": model.name,
            "hidden": model.hidden,
            "inner": model.inner,
            "experts": model.experts,
            "top_k": model.top_k,
            "act": model.act,
            "gated": model.gated,
            "interleaved": model.interleaved,
            "rank": case.rank,
            "rows": case.rows,
            "outer": case.outer,
            "slots": SLOTS,
            "weights_mb": problem.weight_bytes / 1e6,
            "floor_us": case.floor_us(problem.weight_bytes),
            "bar_us": BARS.get(case.name),
            "base": problem.base.name,
            "pools": len(problem.pools),
            "routings": len(problem.layers),
            "cold": problem.cold,
        }
        if isinstance(implementation, MoePolylora):
            record["seams"] = implementation.seams
        return self.checked(record, problem, implementation, measure)

    def _row(self, case: MoeCase, problem: MoeProblem, found: list[Record]) -> None:
        fine = [record for record in found if record["status"] == OK]
        cells = [case.name, number(problem.weight_bytes / 1e6, 1), number(case.floor_us(problem.weight_bytes))]
        cells += [number(BARS.get(case.name))] if self.bars else []
        cells.append(number(min((record["base_us"] for record in fine), default=None)))
        for record in found:
            spread = f"{record['low_us']:.2f}..{record['high_us']:.2f}" if record in fine else ""
            cells += [cell(record), spread]
        cells += compared(found)
        if self.ours:
            mine = next(record for record in found if record["ours"])
            cells += [number(mine.get(f"{op}_us")) for op in OPS]
        self.table.row(cells)
