"""What a benchmark run leaves behind: means over the right cases, records that survive a file, a plot."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys

import pytest
from polylora.bench import report


def record(implementation, ratio, case="c1", regime="M <= 32", status="ok", ours=False):
    times = {"us": 2 * ratio, "ratio": ratio} if status == "ok" else {"detail": "why"}
    return {
        "kind": "linear",
        "case": case,
        "regime": regime,
        "implementation": implementation,
        "ours": ours,
        "status": status,
    } | times


RECORDS = [
    {"kind": "run", "date": "2026-11-22T10:00:00+00:00", "device": "a card", "dtype": "bfloat16"},
    record("polylora", 2.0, ours=True),
    record("polylora", 8.0, "c2", ours=True),
    record("fast", 3.0),
    record("fast", 27.0, "c2"),
    record("slow", 4.0),
    record("slow", 9.0, "c2"),
    record("polylora", 1.5, "c3", "prefill", ours=True),
    record("fast", 0, "c3", "prefill", status="wrong"),
    record("slow", 6.0, "c3", "prefill"),
    {"kind": "chain", "case": "c1", "implementation": "polylora", "ours": True, "status": "ok", "us": 1.0},
]


def test_means_are_geometric_and_by_regime():
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(report.geometric_mean([]))
    found = report.ratios(RECORDS)
    assert found["M <= 32"]["polylora"] == {"c1": 2.0, "c2": 8.0}
    assert found["M 64-256"] == {}
    assert "fast" not in found["prefill"], "a wrong result has no time"


def test_the_best_peer_is_chosen_case_by_case():
    found = report.ratios(RECORDS)
    assert found["M <= 32"]["best peer"] == {"c1": 3.0, "c2": 9.0}
    assert found["prefill"]["best peer"] == {"c3": 6.0}
    assert "best peer" not in report.ratios(RECORDS[:3])["M <= 32"]


def test_a_mean_over_fewer_cases_says_so():
    out = io.StringIO()
    report.write_means(report.Sink(out), [*RECORDS, record("slow", 1.0, "c4")])
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in cells_of(out)}
    assert rows["regime"] == ["cases", "polylora", "fast", "slow", "best peer"]
    assert rows["M <= 32"] == ["3", "4.00 (2)", "9.00 (2)", "3.30", "3.00"]
    assert rows["prefill"] == ["1", "1.50", "-", "6.00", "6.00"]
    assert "M 64-256" not in rows


def cells_of(out: io.StringIO) -> list[str]:
    return [line for line in out.getvalue().splitlines() if line.startswith("| ")]


def test_tables_stay_aligned_when_a_cell_is_not_a_number():
    out = io.StringIO()
    sink = report.Sink(out)
    table = report.Table(sink, ["case", "us", "a long title"], ["a rather long case"])
    for r in (record("x", 1.0), record("x", 5000.0), record("x", 0, status="wrong"), record("x", 0, status="unserved")):
        table.row(["c", report.cell(r), report.cell(None)])
    lines = out.getvalue().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["2.00", "10000", "wrong", "-"]


def test_every_line_is_out_before_the_next_case():
    class Counted(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed = len(self.getvalue())

    out, lines = Counted(), Counted()
    sink = report.Sink(out, lines)
    sink.text("text")
    sink.record(RECORDS[0])
    assert out.flushed == len("text\n") and json.loads(lines.getvalue()[: lines.flushed]) == RECORDS[0]


def test_records_survive_the_file(tmp_path):
    path = tmp_path / "results.jsonl"
    with open(path, "w", encoding="utf-8") as lines:
        sink = report.Sink(None, lines)
        for r in RECORDS:
            sink.record(r)
        print(file=lines)
    assert report.load(path) == RECORDS == sink.records


@pytest.mark.parametrize("text", ["{", "[1]\n", '{"case": 1}\n', "3\n"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "run"}\n' + text)
    with pytest.raises(report.ResultsError, match="line 2"):
        report.load(path)
    with pytest.raises(report.ResultsError, match="cannot be read"):
        report.load(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_plot_is_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (first, second):
        report.plot([*RECORDS, record("polylora", 0.9, "c5", "M 64-256", ours=True)], path)
        assert path.stat().st_size > 5000
    assert first.read_bytes() == second.read_bytes(), "the same records make the same file"
    with pytest.raises(report.PlotError, match="no case with a time"):
        report.plot(RECORDS[:1], first)


def test_without_matplotlib_the_refusal_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(report.PlotError, match=r"pip install matplotlib.*\[bench\]"):
        report.plot(RECORDS, tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()


def test_a_plot_that_could_not_be_written_is_refused(tmp_path):
    for name in ("a.pdf", "a", "no/folder.svg"):
        with pytest.raises(report.PlotError, match="the plot must be"):
            report.check_plot(tmp_path / name)


def test_reports_load_no_matplotlib():
    code = "import sys, polylora.bench.report, polylora.bench.linear; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
