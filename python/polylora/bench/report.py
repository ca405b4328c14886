"""What a run says: JSON lines as they come, tables a row at a time, means by regime, and the plot.

A record is one JSON object a line. ``kind`` says which:

============  =========================================================================================================
``run``       first of a file: date, card, versions, dtype
``linear``    one implementation on one case (``op``: a linear layer or an embedding): ``us``, quartiles ``low_us``
              and ``high_us``, ``floor_us``, ``ratio``, or ``status`` other than ``ok`` and a ``detail``
``chain``     the same, ``us`` being what the op adds to a chain of base GEMMs of ``base_us`` each
``idle``      the same, replayed with no row that has an adapter
``moe``       one implementation on one MoE layer: ``us`` is what LoRA adds to its forward of ``base_us``, ``ratio``
              that over ``floor_us`` (None where nothing is added); polylora's ops alone: ``plan_us``, ``gate_up_us``,
              ``down_us``
``plan``      grouping ``rows`` rows of ``slots`` slots: ``us`` in a graph
``overhead``  host time ``us`` of one eager call
============  =========================================================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from polylora.bench.cases import REGIMES

Record = dict[str, Any]

#: ``status`` of a record that has a time.
OK = "ok"
#: Kinds of records whose ``ratio`` means are taken of. A file has one of them.
_WITH_RATIO = ("linear", "moe")
#: How a table shows the others.
_SHOWN = {"wrong": "wrong", "error": "error", "unserved": "-"}
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#b8a600")


class Sink:
    """Takes records and tables as they come; every line is flushed.

    Args:
        tables: where tables go; None: nowhere.
        lines: where records go, as JSON lines; None: nowhere.
    """

    def __init__(self, tables: TextIO | None, lines: TextIO | None = None) -> None:
        self.tables, self.lines = tables, lines
        self.records: list[Record] = []

    def record(self, record: Record) -> None:
        self.records.append(record)
        if self.lines is not None:
            print(json.dumps(record), file=self.lines, flush=True)

    def text(self, text: str = "") -> None:
        if self.tables is not None:
            print(text, file=self.tables, flush=True)


class Table:
    """An aligned Markdown table whose rows are written as they come.

    Args:
        sink: where it goes.
        head: column titles; the first column is text, the others are numbers.
        first: what the first column will hold, for its width.
    """

    def __init__(self, sink: Sink, head: Sequence[str], first: Iterable[str] = ()) -> None:
        self.sink = sink
        self.widths = [max(map(len, (head[0], *first))), *(max(len(title), 6) for title in head[1:])]
        self.row(head)
        rules = ["-" * (self.widths[0] + 2), *("-" * (width + 1) + ":" for width in self.widths[1:])]
        sink.text(f"|{'|'.join(rules)}|")

    def row(self, cells: Sequence[str]) -> None:
        shown = [cells[0].ljust(self.widths[0])]
        shown += [cell.rjust(width) for cell, width in zip(cells[1:], self.widths[1:], strict=True)]
        self.sink.text(f"| {' | '.join(shown)} |")


def number(value: float | None, digits: int = 2) -> str:
    """A table's cell."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.0f}"


def cell(record: Record | None, key: str = "us") -> str:
    """A table's cell for one implementation."""
    if record is None:
        return "-"
    return number(record[key]) if record["status"] == OK else _SHOWN[record["status"]]


# -------------------------------------------------------------------------------------------------------------- means


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean; NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def ratios(records: Iterable[Record]) -> dict[str, dict[str, dict[str, float]]]:
    """us over floor by regime, implementation and case, of the ``linear`` and ``moe`` records that have a ratio.

    The implementation ``best peer`` is, case by case, the fastest that is not polylora.
    """
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in REGIMES}
    best: dict[str, dict[str, float]] = {}
    for record in records:
        if record.get("kind") not in _WITH_RATIO or record["status"] != OK or record["ratio"] is None:
            continue
        regime, case, ratio = record["regime"], record["case"], record["ratio"]
        found[regime].setdefault(record["implementation"], {})[case] = ratio
        if not record["ours"]:
            of_regime = best.setdefault(regime, {})
            of_regime[case] = min(ratio, of_regime.get(case, math.inf))
    for regime, of_regime in best.items():
        found[regime]["best peer"] = of_regime
    return found


def write_means(sink: Sink, records: Sequence[Record], title: str = "Time over the floor, geometric means") -> None:
    """The table of geometric means of us over floor. A number in brackets: over so many cases only."""
    by_regime = {regime: found for regime, found in ratios(records).items() if found}
    names = list(dict.fromkeys(name for found in by_regime.values() for name in found if name != "best peer"))
    if any("best peer" in found for found in by_regime.values()):
        names.append("best peer")
    if not names:
        return
    sink.text(f"\n{title}:\n")
    table = Table(sink, ("regime", "cases", *(name.rjust(10) for name in names)), by_regime)
    for regime, found in by_regime.items():
        total = len({case for of_name in found.values() for case in of_name})
        cells = [regime, str(total)]
        for name in names:
            values = list(found.get(name, {}).values())
            some = f" ({len(values)})" if 0 < len(values) < total else ""
            cells.append(number(geometric_mean(values)) + some)
        table.row(cells)


# --------------------------------------------------------------------------------------------------------------- files


class ResultsError(ValueError):
    """Saved results cannot be read; the text says why."""


def load(path: str | Path) -> list[Record]:
    """Records saved by a run. Raises ResultsError where the file is not such a file."""
    records = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number_, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ResultsError(f"{path}, line {number_}: not JSON: {error}") from None
                if not isinstance(record, dict) or "kind" not in record:
                    raise ResultsError(f"{path}, line {number_}: must be a record with a kind")
                records.append(record)
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}") from None
    return records


# ---------------------------------------------------------------------------------------------------------------- plot


class PlotError(RuntimeError):
    """The plot cannot be drawn; the text says what is missing."""


def check_plot(path: str | Path) -> None:
    """Raises PlotError where :func:`plot` would not be able to write this file."""
    if Path(path).suffix not in (".svg", ".png"):
        raise PlotError(f"the plot must be a .svg or .png file, got {path}")
    if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
        raise PlotError(f"the plot must be a file in a folder that exists, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotError(
            f"drawing needs matplotlib: pip install matplotlib, or polylora with its extra [bench] ({error})"
        ) from None


def plot(records: Sequence[Record], path: str | Path) -> None:
    """Draws time over floor by regime, one colour an implementation: a dot a case, a bar their geometric mean.

    Args:
        records: of a run; ``linear`` or ``moe`` records and the ``run`` record for the title.
        path: .svg or .png.

    Raises:
        PlotError: matplotlib is not installed, or no case has a time.
    """
    check_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    by_regime = {regime: found for regime, found in ratios(records).items() if found}
    names = list(dict.fromkeys(n for found in by_regime.values() for n in found if n != "best peer"))
    if not names:
        raise PlotError("there is no case with a time to draw")
    run = next((record for record in records if record["kind"] == "run"), {})
    values = [value for found in by_regime.values() for of_name in found.values() for value in of_name.values()]
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style | {"svg.hashsalt": "polylora"}):  # with the salt, the same records make the same file
        figure = Figure(figsize=(max(9.0, 2.6 * len(by_regime)), 4.5), facecolor="white", layout="constrained")
        axes = figure.add_subplot(facecolor="white")
        for i, name in enumerate(names):
            _draw_bars(axes, by_regime, name, i, len(names))
        axes.set_yscale("log", base=2)
        axes.set_ylim(min(1.0, *values), max(values) * 1.25)
        ticks = [2**k for k in range(math.ceil(math.log2(max(*values, 2.0))) + 1)]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks(range(len(by_regime)), [_with_count(regime, found) for regime, found in by_regime.items()])
        axes.tick_params(axis="x", length=0)
        axes.axhline(1, color="black", linewidth=1, zorder=4)
        axes.grid(axis="y", color="#dddddd", linewidth=0.7, zorder=0)
        added = any(record["kind"] == "moe" for record in records)
        floor = "added time over the weights' at 3 TB/s" if added else "time over the H100 floor"
        axes.set_ylabel(f"{floor} (log scale)")
        axes.set_title(_title(run), loc="left", fontsize=10)
        figure.legend(frameon=False, ncols=min(len(names), 6), loc="outside lower center")
        metadata = {"Date": None} if Path(path).suffix == ".svg" else {}
        figure.savefig(path, dpi=160, metadata=metadata)


def _draw_bars(axes: Any, by_regime: dict[str, dict[str, dict[str, float]]], name: str, i: int, count: int) -> None:
    """Implementation ``i`` of ``count``: in each regime a bar from the floor to the mean, a number, a dot a case."""
    colour, step, label = _COLOURS[i % len(_COLOURS)], 0.84 / count, name
    for j, found in enumerate(by_regime.values()):
        values = sorted(found.get(name, {}).values())
        if not values:
            continue
        x, mean = j + (i - (count - 1) / 2) * step, geometric_mean(values)
        axes.bar(x, mean - 1, 0.9 * step, 1, color=colour, alpha=0.55, label=label, zorder=2)
        label = None  # once in the legend
        spread = [x + 0.6 * step * ((k + 0.5) / len(values) - 0.5) for k in range(len(values))]
        axes.plot(
            spread, values, "o", color=colour, markeredgecolor="white", markeredgewidth=0.6, markersize=4, zorder=3
        )
        place = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(f"{mean:.2f}" if mean < 10 else f"{mean:.1f}", (x, max(values)), (0, 4), fontsize=8, **place)


def _with_count(regime: str, found: dict[str, dict[str, float]]) -> str:
    cases = len({case for of_name in found.values() for case in of_name})
    return f"{regime}\n{cases} case{'s' if cases != 1 else ''}"


def _title(run: Record) -> str:
    parts = [run.get("device", "card unknown"), run.get("date", "")[:10], run.get("dtype", "")]
    card = ", ".join(part for part in parts if part)
    return f"LoRA on {card}\nbars and numbers: geometric means; dots: cases"
