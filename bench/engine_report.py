"""What the engine benchmark says: medians over the repetitions, tables, the plot, and whether two sides agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from polylora.bench import report

Spread = tuple[float, float, float]  # median, least, most
SIDES = ("base", "vllm", "polylora")
LABELS = {"base": "without LoRA", "vllm": "vLLM", "polylora": "polylora"}
_TITLES = {"tpot": "Time per output token, ms", "ttft": "Time to first token, ms (mean over a batch's requests)"}


def spread(record: dict | None, what: str) -> Spread | None:
    """``what``, a field of the samples, over a record's repetitions; None where there is no such time."""
    if record is None or record["status"] != "ok" or record["samples"][0][what] is None:
        return None
    values = [sample[what] for sample in record["samples"]]
    return median(values), min(values), max(values)


def lines(records: Sequence[dict], what: str) -> Iterator[tuple[tuple[int, int, int], dict[str, Spread | None]]]:
    """(prompt, batch, adapters) and every side's time; the base's, which knows no adapters, stands in each."""
    cells = {(r["side"], r["prompt"], r["batch"], r["adapters"]): r for r in records if r["kind"] == "engine"}
    shapes = sorted({key[1:] for key in cells if key[0] != "base"} or {key[1:] for key in cells})
    for prompt, batch, adapters in shapes:
        found = {side: spread(cells.get((side, prompt, batch, adapters)), what) for side in SIDES}
        found["base"] = spread(cells.get(("base", prompt, batch, 0)), what)
        if any(found.values()):
            yield (prompt, batch, adapters), found


def write_tables(sink: report.Sink, records: Sequence[dict]) -> None:
    for what, title in _TITLES.items():
        sink.text(f"\n{title}: median (least..most)\n")
        sides = [LABELS[side].rjust(22) for side in SIDES]
        table = report.Table(sink, ["prompt", "batch", "adapters", *sides, "vLLM adds", "polylora adds"])
        for shape, found in lines(records, what):
            cells = [f"{s[0]:.2f} ({s[1]:.2f}..{s[2]:.2f})" if s else "-" for s in (found[side] for side in SIDES)]
            base = found["base"]
            added = [f"{found[s][0] / base[0] - 1:+.1%}" if base and found[s] else "-" for s in SIDES[1:]]
            table.row([*map(str, shape), *cells, *added])


def plot(records: Sequence[dict], path: str) -> None:
    """Bars of the medians with their spread, a panel each for time per output token and to first token."""
    report.check_plot(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    run = {k: v for r in records if r["kind"] in ("run", "wrapper") for k, v in r.items()}
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "polylora"}
    with rc_context(style):
        figure = Figure(figsize=(13, 8), facecolor="white", layout="constrained")
        for axes, (what, title) in zip(figure.subplots(len(_TITLES)), _TITLES.items(), strict=True):
            rows = list(lines(records, what))
            for i, side in enumerate(SIDES):
                bars = [(j + 0.28 * (i - 1), found[side]) for j, (_, found) in enumerate(rows) if found[side]]
                errors = [[s[0] - s[1] for _, s in bars], [s[2] - s[0] for _, s in bars]]
                axes.bar([x for x, _ in bars], [s[0] for _, s in bars], 0.26, yerr=errors, zorder=2,
                         label=LABELS[side], color=("#7f7f7f", "#e69f00", "#0072b2")[i])  # fmt: skip
            names = [f"{batch} x {prompt}\n{adapters} ad." for (prompt, batch, adapters), _ in rows]
            axes.set_xticks(range(len(rows)), names, fontsize=8)
            axes.set_ylabel("ms (log scale)" if what == "ttft" else "ms")
            axes.set_yscale("log" if what == "ttft" and rows else "linear")
            axes.grid(axis="y", color="#dddddd", linewidth=0.7, zorder=0)
            axes.set_title(title, loc="left", fontsize=10)
        figure.suptitle(f"{run.get('model')} on {run.get('device')}, {run.get('date', '')[:10]}; requests x prompt")
        figure.legend(*axes.get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.endswith(".svg") else {})


def compare(ours: dict[str, dict], theirs: dict[str, dict], tolerance: float) -> dict[str, Any]:
    """How far two sides' greedy tokens agree (both as ``engine_side.generate`` returns them).

    A tie: where the tokens part, each side's own log-probabilities of the two lie within ``tolerance``. ``before`` is
    the largest difference of a chosen token's log-probability up to there, ``at`` that of the two tokens there. What
    comes after has other texts before it and says nothing. ``silent``: adapters that leave each text as the base's.
    ``first``: how far log-probabilities of the first token differ, root mean square over all tokens that both sides
    name there: of all that is compared, this alone has the same text before it.
    """
    found: dict[str, Any] = {"requests": len(ours), "equal": 0, "ties": 0, "apart": [], "before": 0.0, "at": 0.0}
    firsts = [[dict(side["logprobs"][0]) for side in (mine, theirs[name])] for name, mine in ours.items()]
    squares = [(p[token] - q[token]) ** 2 for p, q in firsts for token in p.keys() & q.keys()]
    found["first"] = (sum(squares) / len(squares)) ** 0.5 if squares else math.inf
    changed = {r["adapter"]: False for r in ours.values() if r["adapter"] is not None}
    plain = {tuple(r["prompt"]): r["tokens"] for r in ours.values() if r["adapter"] is None}
    for name, mine in ours.items():
        other, adapter, before = theirs[name], mine["adapter"], 0.0
        if adapter is not None:
            changed[adapter] |= mine["tokens"] != plain.get(tuple(mine["prompt"]))
        parted, equal = False, len(mine["tokens"]) == len(other["tokens"])
        for x, y, p, q in zip(mine["tokens"], other["tokens"], mine["logprobs"], other["logprobs"], strict=False):
            p, q = dict(p), dict(q)
            if x == y:
                before = max(before, abs(p[x] - q[x]))
                continue
            # a token that is not among a side's best is at most as likely as the last of them
            (px, py), (qx, qy) = ((of.get(x, min(of.values())), of.get(y, min(of.values()))) for of in (p, q))
            parted, equal = px - py <= tolerance and qy - qx <= tolerance and {x, y} <= p.keys() & q.keys(), False
            found["at"] = max(found["at"], abs(px - qx), abs(py - qy))
            break
        found["before"] = max(found["before"], before)
        found["equal" if equal else "ties"] += equal or parted
        if not (equal or parted) or before > tolerance:
            found["apart"].append(name)
    return found | {"silent": sorted(adapter for adapter, was in changed.items() if not was)}


#: A layer's error may be so many times that of vLLM's kernels, and so much more: roundings of 16 bits.
LAYER_FACTOR, LAYER_SLACK = 1.5, 5e-3


def write_layers(sink: report.Sink, layers: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """The layers of both sides against float32 (:mod:`engine_check`), and which of polylora's are too far from it.

    A layer of polylora's with its activation behind it (``gate_up_proj+act``) is held against vLLM's without.
    """
    mine, theirs = layers["polylora"], layers["vllm"]
    sink.text("\nEach LoRA layer against float32, the largest error of its calls, relative to what LoRA adds:\n")
    table = report.Table(sink, ["layer", "calls", "vLLM", "polylora"], first=mine)
    failures = []
    for name, of in mine.items():
        other = theirs.get(name.removesuffix("+act"), {}).get("error")
        table.row([name, str(of["calls"]), report.number(other, 4), report.number(of["error"], 4)])
        allowed = LAYER_SLACK + LAYER_FACTOR * (other or 0.0)
        if not of["error"] <= allowed:
            failures.append(f"{name}: an error of {of['error']:.4f}, at most {allowed:.4f} is allowed")
    missing = [name for name in theirs if not {name, f"{name}+act"} & mine.keys()]
    return failures + [f"{name}: not seen with polylora" for name in missing]
