"""The run of `polylora bench moe` on the CPU, with a clock that is made up: cases, bytes, what is checked, what is
said; the peers over fakes of their packages; and on a GPU for real."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import polylora
import pytest
import torch
from polylora import cli
from polylora.bench import cases, moe, moe_cases, moe_peers, moe_problem, report, timing
from polylora.bench import command as command_module
from polylora.bench.moe_base import TorchBase, TritonBase, make_base
from polylora.bench.moe_cases import BARS, MODELS, PRESETS, SLOTS, Experts, MoeCase
from polylora.bench.moe_peers import MOE_PEERS, MoePolylora
from polylora.bench.moe_problem import MoeProblem, activate, draw_routings, split
from polylora.bench.timing import Timing

CPU = torch.device("cpu")
HEADER = Path(__file__).parents[1] / "csrc/bench/moe_cases.h"
CASES = [
    MoeCase.parse(text)
    for text in (
        "moe:64x32,e8,k2,silu,gated r8 M5",
        "moe:64x48,e16,k5,relu2 r16 M40",
        "moe:48x32,e8,k3,swiglu_oai,gated,interleaved r4 M70",
        "moe:32x16,e4,k2,silu,gated r8 M2050",
    )
]

pytestmark = pytest.mark.usefixtures("one_thread")


class MadeUpTimer:
    """Runs every call once and makes the times up."""

    device = CPU
    l2_bytes = 30_000

    def __init__(self, free=10**9, added=None):
        self.count, self.free, self.fixed = 0, free, added

    def free_bytes(self):
        return self.free

    def scope(self):
        return contextlib.nullcontext()

    def wake(self):
        pass

    def synchronize(self):
        pass

    def calls(self, calls):
        for call in calls:
            call()
        self.count += 1
        return Timing(float(self.count), self.count - 0.5, self.count + 0.5, 8, 21)

    def beyond(self, base, calls):
        assert len(base) == len(calls)
        times = self.calls(base), self.calls(calls)
        return times if self.fixed is None else (times[0], Timing(self.fixed, self.fixed, self.fixed, 8, 21))


class Scaled(MoePolylora):
    """A peer whose output lies ``factor`` of the way from the base's to polylora's."""

    ours = False

    def __init__(self, name, factor=1.0, fails=False):
        super().__init__()
        self.name, self.factor, self.fails = name, factor, fails

    def prepare(self, problem):
        def call(layer, whole):
            if self.fails:
                raise RuntimeError("out of shared memory\nRequired: a lot")
            base = layer.forward().float().clone()
            return (base + self.factor * (whole().float() - base)).to(problem.dtype)

        whole = super().prepare(problem)
        layers = [problem.base.layer(routing) for routing in problem.layers]
        return [lambda x=x, y=y: call(x, y) for x, y in zip(layers, whole, strict=True)]


def run(implementations, timer=None, chosen=CASES[:2], base=None):
    """(failures, records, tables, progress)"""
    tables, lines, said = io.StringIO(), io.StringIO(), []
    sink = report.Sink(tables, lines)
    failures = moe.run(moe.Options(chosen, implementations, base), timer or MadeUpTimer(), sink, said.append)
    records = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert records == sink.records
    return failures, records, tables.getvalue(), said


def of(records, implementation=None):
    return [r for r in records if r["kind"] == "moe" and implementation in (None, r["implementation"])]


def problem_of(case, l2_bytes=MadeUpTimer.l2_bytes, base=None, free=10**9):
    problem = MoeProblem(case, CPU, l2_bytes, free)
    problem.base = make_base(problem, base)
    return problem


# ------------------------------------------------------------------------------------------------------------- cases

# MB of A and B of the pairs that a call hits, at 8 adapters and uniform routing.
WEIGHTS_MB = {
    "qwen35-35b r16": {1: 2.0, 16: 30.9, 64: 112.8, 256: 320.5, 2048: 251.7},
    "nemotron3-super r16": {1: 5.2, 16: 81.8, 64: 289.3},
}


@pytest.mark.parametrize("name", [f"{m} M{rows}" for m, of_rows in WEIGHTS_MB.items() for rows in of_rows])
def test_the_weights_of_a_case_are_the_documented_ones(name):
    case, (model, _, rows) = MoeCase.parse(name), name.rpartition(" M")
    hits = [r.hit(case.model.experts)[0] for r in itertools.islice(draw_routings(case), 4)]
    found = sum(hits) / len(hits) * sum(case.half_bytes) / 1e6
    assert found == pytest.approx(WEIGHTS_MB[model][int(rows)], rel=0.02)
    assert case.floor_us(3e6) == 1.0


def test_presets_hold_what_they_promise():
    issue, quick, full = ([case.name for case in PRESETS[name]()] for name in ("issue", "quick", "full"))
    assert issue == list(BARS) and len(issue) == 19 and "nemotron3-super r64 M2048" not in issue
    assert quick == [f"qwen35-35b r16 M{rows}" for rows in (1, 16, 64, 256)]
    assert set(issue) <= set(full) and {MoeCase.parse(name).model.name for name in full} == set(MODELS)
    assert BARS["qwen35-35b r16 M16"] == 12.5 and BARS["nemotron3-super r64 M256"] == 1100
    for name in full:
        assert MoeCase.parse(name).name == name
    assert {case.regime for case in PRESETS["full"]()} == set(cases.REGIMES[:3])


@pytest.mark.skipif(not HEADER.exists(), reason="not a source checkout")
def test_models_and_bars_are_those_of_the_cpp_benchmark():
    text = HEADER.read_text(encoding="utf-8")
    models = re.findall(r'\{"([\w.-]+)", (\d+), (\d+), (\d+), (\d+), "(\w+)", (true|false), (true|false)\}', text)
    found = [Experts(m[0], *map(int, m[1:5]), m[5], m[6] == "true", m[7] == "true") for m in models]
    assert found == list(MODELS.values())
    bars = re.findall(r'\{"([\w.-]+ r\d+ M\d+)", ([\d.]+)\}', text)
    assert [(name, float(bar)) for name, bar in bars] == list(BARS.items())


@pytest.mark.skipif(not HEADER.exists(), reason="not a source checkout")
def test_constants_are_those_of_the_cpp_benchmark():
    text = "".join(
        (HEADER.parent / name).read_text(encoding="utf-8") for name in ("moe_cases.h", "moe_rotation.h", "rotation.h")
    )
    found = {
        name: float(value)
        for name, value in re.findall(r"inline constexpr (?:int32_t|int64_t|double) (k\w+) = ([\d.]+);", text)
    }
    twins = {
        "kMoeSlots": SLOTS,
        "kSegmentedRows": moe_cases.SEGMENTED_ROWS,
        "kSegments": moe_cases.SEGMENTS,
        "kYardstickTbps": moe_cases.FLOOR_RATE / 1e6,
        "kPoolL2s": moe_problem.POOL_SHARE,
        "kMaxRoutings": moe_problem.MAX_ROUTINGS,
        "kColdL2s": moe_problem.COLD,
        "kMemoryShare": moe_problem.MEMORY_SHARE,
    }
    assert {name: found.get(name) for name in twins} == twins


@pytest.mark.skipif(not HEADER.exists(), reason="not a source checkout")
def test_presets_are_those_of_the_cpp_benchmark():
    """Their loops in C++, as sets of models, ranks and rows."""
    text = HEADER.read_text(encoding="utf-8").split("moe_preset_cases(const std::string& preset)")[1]

    def numbers(what: str) -> list[list[int]]:
        return [
            [int(n) for n in row.split(",")] for row in re.findall(rf"for \(const \w+ {what} : {{([\d, ]+)}}\)", text)
        ]

    quick, full = numbers("rows")
    (ranks,) = numbers("rank")
    (model, rank) = re.search(r"cases.push_back\({moe_models\(\)\[(\d)\], (\d+), rows}\)", text).groups()
    models = list(MODELS.values())
    assert [MoeCase(models[int(model)], int(rank), rows) for rows in quick] == PRESETS["quick"]()
    assert "for (const Experts& model : moe_models())" in text
    assert [MoeCase(m, r, rows) for m in models for r in ranks for rows in full] == PRESETS["full"]()
    assert "for (const MoeBar& bar : moe_bars()) cases.push_back(parse_moe_case(bar.name))" in text
    assert [MoeCase.parse(name) for name in BARS] == PRESETS["issue"]()


def test_a_shape_is_read_back_as_the_same_experts():
    assert Experts.parse("moe:64x32,e8,k2,silu,gated") == Experts("moe:64x32,e8,k2,silu,gated", 64, 32, 8, 2)
    plain = Experts.parse("moe:64x32,e8,k2,relu2")
    assert (plain.gated, plain.act, plain.slices) == (False, "relu2", 1)
    assert Experts.parse("moe:1x1,e4,k4,swiglu_oai,gated,interleaved").interleaved
    assert [case.name for case in cases.select(PRESETS["issue"](), ["nemotron3 r16 M1", "35b M2048"])] == [
        "qwen35-35b r16 M2048", "qwen35-35b r64 M2048", "nemotron3-super r16 M1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "must look like"),
        ("qwen35-35b r16", "must look like"),
        ("qwen35-35b r16 M1 a8", "must look like"),
        ("qwen r16 M1", "or one of qwen35-35b"),
        ("moe:64x32,e8,k2,tanh r8 M1", "ACT of silu"),
        ("moe:64x32,e8,k9,silu r8 M1", "experts a token must be in"),
        ("moe:64x0,e8,k2,silu r8 M1", "experts' width must be in"),
        ("moe:64x32,e8,k2,swiglu_oai r8 M1", "must be gated"),
        ("qwen35-35b r0 M1", "rank must be in"),
        ("qwen35-35b r16 M0", "rows must be in"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        MoeCase.parse(text)


@pytest.mark.parametrize("text", ["qwen35-35b r16 M1", "qwen35-35b r16 M5", "nemotron3-super r16 M16"])
def test_every_token_goes_to_distinct_experts_and_adapters_move_on(text):
    case = MoeCase.parse(text)
    drawn = list(itertools.islice(draw_routings(case, pools=2), 20))
    for turn, routing in enumerate(drawn):
        assert routing.topk_ids.dtype == torch.int32 and routing.topk_weights.dtype == torch.float32
        assert all(len(set(row)) == case.model.top_k for row in routing.topk_ids.tolist())
        assert routing.topk_ids.min() >= 0 and routing.topk_ids.max() < case.model.experts
        assert routing.topk_weights.sum(1).sub(1).abs().max() < 1e-5
        assert routing.slots.tolist() == [(row + turn) % SLOTS for row in range(case.rows)]
        assert (routing.turn, routing.pool) == (turn, (turn % SLOTS + turn // SLOTS) % 2)
    again = list(itertools.islice(draw_routings(case, pools=2), 20))
    assert all(torch.equal(a.topk_ids, b.topk_ids) for a, b in zip(drawn, again, strict=True))


def test_one_token_meets_no_pair_twice_before_all_have_had_their_turn():
    case = MoeCase.parse("qwen35-35b r16 M1")
    for pools in (1, 3):
        drawn = itertools.islice(draw_routings(case, pools), pools * SLOTS * case.model.experts // case.model.top_k)
        pairs = [(r.pool, r.slots.item(), expert) for r in drawn for expert in r.topk_ids[0].tolist()]
        assert len(set(pairs)) == len(pairs) == pools * SLOTS * case.model.experts


def test_prefill_has_four_segments():
    case = CASES[3]
    assert case.requests() == [(512, 0), (513, 1), (512, 2), (513, 3)] and case.requests(6)[2] == (512, 0)
    assert next(draw_routings(case)).slots.unique().tolist() == [0, 1, 2, 3]
    assert MoeCase(case.model, 8, 2047).requests()[9] == (1, 1)


def test_pairs_are_cold_in_either_half_and_the_base_helps():
    problem = problem_of(CASES[0], l2_bytes=60_000)
    hits = [routing.hit(8) for routing in problem.routings]
    down = min(CASES[0].half_bytes)
    assert sum(h[0] for h in hits) * down >= 0.9 * 3 * 60_000, "the ops alone"
    assert len(problem.pools) * SLOTS * 8 * down >= 8 * 60_000 and problem.cold
    layers = hits[: len(problem.layers)]
    assert 2 <= len(layers) < len(hits)
    assert sum(h[0] * sum(CASES[0].half_bytes) + h[1] * CASES[0].model.base_bytes for h in layers) >= 3 * 60_000
    assert {routing.pool for routing in problem.routings} == set(range(len(problem.pools)))


def test_every_documented_case_fits_an_h100():
    for case in PRESETS["issue"]():
        pools = math.ceil(8 * 50 * 2**20 / (SLOTS * case.model.experts * min(case.half_bytes)))
        assert case.memory_bytes(pools) < 0.75 * 78e9, case.name


# --------------------------------------------------------------------------------------------------------- the layer


def slow_forward(problem, routing):
    """The layer with LoRA, pair by pair."""
    case, pool, model = problem.case, problem.pools[routing.pool], problem.case.model
    out = torch.zeros(case.rows, model.hidden, dtype=torch.float64)
    double = [t.double() for t in (pool.up_a, pool.up_b, pool.down_a, pool.down_b)]
    for token, j in itertools.product(range(case.rows), range(model.top_k)):
        slot, expert = routing.slots[token].item(), routing.topk_ids[token, j].item()
        up_a, up_b, down_a, down_b = (t[slot, expert] for t in double)
        x, width = problem.x[token].double(), model.inner
        y1 = problem.w13[expert].double() @ x
        for s in range(model.slices):
            v = up_a[s * case.rank : (s + 1) * case.rank] @ x
            at = slice(s, None, 2) if model.interleaved else slice(s * width, (s + 1) * width)
            y1[at] += up_b[s * width : (s + 1) * width] @ v
        h = activate(model.act, *split(model, y1[None]))[0]
        y2 = problem.w2[expert].double() @ h + down_b @ (down_a @ h)
        out[token] += routing.topk_weights[token, j].double() * y2
    return out


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_the_reference_is_the_layer_pair_by_pair(case):
    problem = problem_of(case)
    for routing, (_, whole) in zip((problem.layers[0], problem.layers[-1]), problem.references, strict=True):
        want = slow_forward(problem, routing)[problem.tokens]
        assert torch.allclose(whole, want, rtol=1e-9, atol=1e-9)


def test_activations_are_those_of_the_ops():
    gate, up = torch.randn(2, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6
    assert torch.allclose(activate("silu", gate, up), gate * gate.sigmoid() * up)
    assert torch.allclose(activate("relu2", None, up), up.clamp(min=0) ** 2)
    c = gate.clamp(max=7)
    assert torch.allclose(activate("swiglu_oai", gate, up), c * (1.702 * c).sigmoid() * (up.clamp(-7, 7) + 1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("seams", moe_peers.SEAMS)
def test_polylora_is_right_on_torchs_base(case, seams):
    problem = problem_of(case)
    assert problem.check_base() < 1.2e-2
    assert 0 < problem.check(MoePolylora(seams=seams).prepare(problem)) < 2e-2


OUTER = [MoeCase.parse(f"{case.name} outer") for case in CASES[:3]]


@pytest.mark.parametrize("case", OUTER, ids=lambda case: case.name)
@pytest.mark.parametrize("seams", (*moe_peers.SEAMS, *moe_peers.OUTER_SEAMS))
def test_experts_that_share_outer_halves(case, seams):
    problem = problem_of(case)
    assert problem.pools[0].up_a.size(1) == problem.pools[0].down_b.size(1) == 1
    assert 0 < problem.check(MoePolylora(seams=seams).prepare(problem)) < 2e-2


def test_shared_halves_count_once_an_adapter():
    case = MoeCase.parse("qwen35-35b r16 M1 outer")
    routing = next(iter(draw_routings(case)))
    a, b, down_a, down_b = (16 * 2 * n for n in (2 * 2048, 2 * 512, 512, 2048))
    assert routing.weight_bytes(case) == a + down_b + 8 * (b + down_a)
    assert case.pool_bytes == SLOTS * (a + down_b + 256 * (b + down_a))
    assert routing.weight_bytes(replace(case, outer=False)) == 8 * (a + b + down_a + down_b)


def test_x_once_a_token_is_for_experts_that_share_a(sglang):
    ours = MoePolylora(seams="tokens")
    with pytest.raises(moe_peers.Unserved, match="wants all experts to share A of gate and up") as error:
        ours.prepare(problem_of(CASES[0]))
    assert ours.declines(error.value)
    peer = MOE_PEERS["v2"](None)
    with pytest.raises(moe_peers.Unserved, match="v2 has no adapters here whose experts share A or B"):
        peer.prepare(problem_of(OUTER[0]))


@pytest.mark.parametrize("seams", moe_peers.SEAMS)
@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_polylora_is_right_on_a_base_that_weights_its_pairs(case, seams, sglang):
    problem = problem_of(case, base=sglang)
    assert isinstance(problem.base, TritonBase) and problem.base.weighted
    assert problem.check_base() < 1.5e-2
    assert 0 < problem.check(MoePolylora(seams=seams).prepare(problem)) < 2.5e-2


@pytest.mark.parametrize("how", ["nobody", "wrong slots", "no down", "NaN", "no weights"])
def test_a_wrong_polylora_is_found(how):
    class Broken(MoePolylora):
        def _ops(self, problem, layer, plan):
            ops = super()._ops(problem, layer, plan)
            if how == "nobody":
                slots, ids = torch.full_like(layer.routing.slots, -1), layer.routing.topk_ids
                args, plan_op = (SLOTS, problem.case.model.experts, None), torch.ops.polylora.moe_plan
                return replace(ops, fill=lambda: plan_op(plan, ids, slots, *args, layer.row_map))
            if how == "wrong slots":
                layer.routing.slots.copy_((layer.routing.slots + 1) % SLOTS)
            if how == "no down":
                return replace(ops, down=layer.reduce)
            if how == "NaN":
                return replace(ops, down=lambda y2: (ops.down(y2), layer.out[-1].fill_(math.nan)))
            if how == "no weights":
                layer.routing.topk_weights.fill_(1 / problem.case.model.top_k)
            return ops

    failures, records, tables, _ = run([Broken(), Scaled("peer")])
    if how in ("wrong slots", "no weights"):  # the peer meets the same routing, but the references were made before
        records = of(records, "polylora")
    assert len(failures) == 2 and failures[0].startswith("polylora on moe:64x32,e8,k2,silu,gated r8 M5 (moe): error")
    assert {r["status"] for r in of(records, "polylora")} == {"wrong"} and "us" not in of(records, "polylora")[0]
    assert "polylora FAILED" in tables


def test_one_token_of_many_without_its_delta_is_found():
    class OneToken(MoePolylora):
        def prepare(self, problem):
            calls, layers = super().prepare(problem), [problem.base.layer(routing) for routing in problem.layers]

            def call(layer, whole):
                base, out = layer.forward()[17].clone(), whole()
                out[17] = base
                return out

            return [lambda x=x, y=y: call(x, y) for x, y in zip(layers, calls, strict=True)]

    failures, _, _, _ = run([OneToken()], chosen=CASES[1:2])
    assert len(failures) == 1 and "must be at most 0.03" in failures[0]


# ----------------------------------------------------------------------------------------------------------- the run


def test_every_implementation_is_checked_and_timed():
    ours = [MoePolylora(), MoePolylora(seams="fused"), MoePolylora(seams="added")]
    failures, records, tables, said = run([*ours, Scaled("peer")], chosen=CASES)
    assert failures == [] and records[0]["kind"] == "run" and records[0]["base"] == "torch"
    for name in ("polylora", "polylora:fused", "polylora:added", "peer"):
        found = of(records, name)
        assert [r["case"] for r in found] == [case.name for case in CASES] and {r["status"] for r in found} == {"ok"}
        for r in found:
            assert r["base_us"] > 0 and r["low_us"] < r["us"] < r["high_us"] and 0 < r["error"] < moe.ERROR_BOUND
            assert r["ratio"] == pytest.approx(r["us"] / r["floor_us"])
            assert r["floor_us"] == pytest.approx(r["weights_mb"] / 3.0)
    assert {r["seams"] for r in of(records, "polylora:added")} == {"added"}
    assert all(r[f"{op}_us"] > 0 for r in of(records, "polylora") for op in moe.OPS)
    assert all(case.name in tables for case in CASES) and "best peer/ours" in tables and "gate_up alone" in tables
    assert "bar" not in tables.splitlines()[2] and "prefill" in tables
    assert said[0].startswith("1 of 4") and "s left" in said[-1]


def test_a_peer_that_computes_something_else_is_left_out_and_named():
    chosen = [Scaled("half", 0.5), Scaled("boom", fails=True), Scaled("good")]
    failures, records, tables, _ = run([MoePolylora(), *chosen])
    assert failures == [], "a peer's failure is not ours"
    assert {r["status"] for r in of(records, "half")} == {"wrong"} and {r["status"] for r in of(records, "boom")} == {
        "error"
    }
    assert all("us" not in r for r in of(records, "half") + of(records, "boom"))
    assert "half left out: moe:64x32,e8,k2,silu,gated r8 M5 (moe): error 0.5" in tables and "and 1 more" in tables
    assert "boom left out" in tables and "out of shared memory" in tables and "Required" not in tables
    assert {r["status"] for r in of(records, "good")} == {"ok"}


def test_what_adds_nothing_stays_out_of_the_means():
    failures, records, tables, _ = run([MoePolylora()], MadeUpTimer(added=-0.5))
    assert failures == [] and {(r["us"], r["ratio"]) for r in of(records)} == {(-0.5, None)}
    assert "-0.50" in tables and "geometric means" not in tables


def test_a_base_that_is_wrong_fails_the_run(monkeypatch):
    monkeypatch.setattr(TorchBase, "poison", lambda self: None)
    right = TorchBase.layer

    def late(self, routing):
        layer = right(self, routing)
        layer.reduce = lambda y2: self.out.fill_(1.0)
        return layer

    monkeypatch.setattr(TorchBase, "layer", late)
    failures, records, tables, _ = run([MoePolylora()])
    assert len(failures) == 2 and failures[0].startswith("the base on moe:64x32") and of(records) == []
    assert "the base FAILED" in tables


def test_a_case_that_does_not_fit_is_named_and_left_out():
    free = int(1.5 * CASES[0].memory_bytes(3))
    failures, records, tables, _ = run([MoePolylora()], MadeUpTimer(free=free), CASES[:2])
    assert failures == [] and f"left out: {CASES[1].name}: it does not fit" in tables
    assert [r["case"] for r in of(records)] == [CASES[0].name]


def test_fewer_pools_than_wanted_are_warm_and_the_record_says_so():
    case = CASES[0]
    free = int(case.memory_bytes(1) / 0.75) + 1000
    failures, records, tables, _ = run([MoePolylora()], MadeUpTimer(free=free), [case])
    assert failures == [] and not of(records)[0]["cold"] and of(records)[0]["pools"] == 1
    assert f"weights warm: {case.name}" in tables


def test_bars_stand_beside_the_cases_that_have_them(monkeypatch):
    monkeypatch.setitem(moe.BARS, CASES[0].name, 5.0)
    _, records, tables, _ = run([MoePolylora()])
    assert [r["bar_us"] for r in of(records)] == [5.0, None] and "|    bar |" in tables


def test_results_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    _, records, _, _ = run([MoePolylora(), Scaled("peer")])
    report.plot(records, tmp_path / "plot.svg")
    assert "added time over the weights" in (tmp_path / "plot.svg").read_text()


# ------------------------------------------------------------------------------------------------------------- peers


def fake_align(topk_ids, block, experts):
    return topk_ids, block, experts


def fake_gemm(x, w, bias, y, s0, s1, s2, weights, ids, *rest, **options):
    """``invoke_fused_moe_kernel`` in plain torch; checks that the call is the one that SGLang makes."""
    sorted_ids, block, experts, last, top_k, config = rest
    assert sorted_ids is ids and block == 16 and experts == w.size(0) and config["BLOCK_SIZE_M"] == 16
    assert options["compute_type"] == "bf16" and not options["use_fp8_w8a8"] and y.is_contiguous()
    of_pair = x.float()[torch.arange(ids.numel()) // top_k]
    found = torch.einsum("pk,pnk->pn", of_pair, w[ids.flatten().long()].float())
    y.copy_((found * weights.view(-1, 1) if last else found).view(y.shape))


def fake_act(y1, h, config, ids, expert_ids, tma, act):
    gate, up = y1.float().chunk(2, 1)
    h.copy_((gate * gate.sigmoid() * up).to(h.dtype))


@pytest.fixture
def sglang(monkeypatch):
    """``sglang_lora_ops`` as far as the base and the peers use it, in plain torch; returns its ``api``."""
    names = ("api", "_moe_align", "fused_moe_triton_kernels")
    modules = {name: ModuleType(f"sglang_lora_ops.{name}") for name in names}
    for name, module in {"": ModuleType("sglang_lora_ops"), **modules}.items():
        monkeypatch.setitem(sys.modules, "sglang_lora_ops" + (name and f".{name}"), module)
    importlib.import_module("torch._dynamo")  # looks for triton once: before the stand-in, which has none of it
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.language", SimpleNamespace(bfloat16="bf16"))
    modules["_moe_align"].moe_align_block_size = fake_align
    modules["fused_moe_triton_kernels"].__dict__.update(
        invoke_fused_moe_kernel=fake_gemm,
        act_and_mul_triton=fake_act,
        moe_sum_reduce_triton=lambda y2, out, scale: out.copy_(y2.float().sum(1) * scale),
    )

    def delta(rows, a, b, slots, ids, weights=None):
        """a ``[L, E, c * R, K]`` over rows ``[tokens or pairs, K]``: ``[tokens, k, c * N]``."""
        at, rank = (slots.long()[:, None].expand(ids.shape), ids.long()), b.size(3)
        of_pair = (
            rows.float()[:, None].expand(*ids.shape, -1) if len(rows) == len(ids) else rows.float().view(*ids.shape, -1)
        )
        v = torch.einsum("tjk,tjrk->tjr", of_pair, a[at].float())
        n = b.size(2) * rank // a.size(2)
        parts = [
            torch.einsum("tjr,tjnr->tjn", v[..., s * rank : (s + 1) * rank], b[at].float()[:, :, s * n : (s + 1) * n])
            for s in range(a.size(2) // rank)
        ]
        found = torch.cat(parts, 2)
        return found if weights is None else found * weights[..., None]

    class MoELegacy:
        def __init__(self, w13, w2, top_k, gated=True, activation="silu"):
            assert w13.size(1) == (2 if gated else 1) * w2.size(2)

        def configs(self, rows):
            return {"BLOCK_SIZE_M": 16}, {"BLOCK_SIZE_M": 16}

        def lora_info(self, batch, up_a, up_b, down_a, down_b, rank, virtual, shared_outer):
            assert batch["ranks"] == [rank] * SLOTS and batch["scales"] == [1.0] * SLOTS and not shared_outer
            return SimpleNamespace(up=(up_a, up_b), down=(down_a, down_b), slots=batch["slots"], virtual=virtual)

        def hooks(self, x, info, ids):
            return SimpleNamespace(
                after_gate_up=lambda x, y1, weights, ids: y1.add_(delta(x, *info.up, info.slots, ids)),
                after_down=lambda h, y2, weights, ids: y2.add_(delta(h, *info.down, info.slots, ids, weights)),
            )

    def batch(lengths, adapters, ranks, scales, device):
        return {
            "slots": torch.tensor(adapters).repeat_interleave(torch.tensor(lengths)), "ranks": ranks, "scales": scales
        }  # fmt: skip

    class MoEV2:
        def __init__(self, w13, w2, top_k, rank, gated, act):
            self.w13, self.w2, self.act = w13, w2, act
            self.model = SimpleNamespace(gated=gated, interleaved=False)

        def forward(self, x, ids, weights, up_a, up_b, down_a, down_b, slots, is_prefill, use_cuda_graph):
            assert is_prefill == (len(x) > 256) and not use_cuda_graph and weights.dtype == torch.float32
            at = ids.long()
            y1 = torch.einsum("tk,tjnk->tjn", x.float(), self.w13[at].float()) + delta(x, up_a, up_b, slots, ids)
            h = activate(self.act, *split(self.model, y1.flatten(0, 1))).view(*ids.shape, -1)
            y2 = torch.einsum("tjk,tjnk->tjn", h, self.w2[at].float()) + delta(
                h.flatten(0, 1), down_a, down_b, slots, ids
            )
            return (y2 * weights[..., None]).sum(1).to(x.dtype)

    modules["api"].__dict__.update(MoELegacy=MoELegacy, MoEV2=MoEV2, build_csgmv_batch=batch, delta=delta)
    return modules["api"]


def fake_vllm(delta):
    """``vllm_lora_ops.api`` in plain torch."""

    def w13(y, x, a, b, weights, route, meta, enabled, shrink, expand, weighted):
        assert not weighted and enabled.numel() == SLOTS + 1 and shrink is not expand
        assert all(t.is_contiguous() for t in [*a, *b]) and len({t.stride() for t in a}) == 1
        y.add_(torch.cat([delta(x, *ab, meta, route) for ab in zip(a, b, strict=True)], 2))

    def w2(y, h, a, b, weights, route, meta, enabled):
        y.add_(delta(h, a[0], b[0], meta, route, weights))

    return SimpleNamespace(
        clear_ptr_caches=lambda: None,
        make_meta=lambda slots, count, device: slots,
        moe_lora_configs=lambda rows, experts, inner, rank, kind: ({"BLOCK_SIZE_M": 64}, {}),
        moe_route=lambda ids, meta, experts, block, enabled, align: ids,
        _call=w13,
        fused_moe_lora_w2=w2,
    )


@pytest.mark.parametrize("case", [CASES[0], CASES[1], MoeCase.parse("moe:64x32,e8,k2,silu,gated r8 M300")], ids=str)
def test_peers_get_a_layer_as_their_engines_have_it(case, sglang):
    found = [MOE_PEERS["vllm"](fake_vllm(sglang.delta)), *(MOE_PEERS[n](sglang) for n in ("classic", "virtual", "v2"))]
    failures, records, tables, _ = run([MoePolylora(), *found], chosen=[case], base=sglang)
    assert failures == [] and records[0]["base"] == "triton"
    assert {r["implementation"]: r["status"] for r in of(records)} == dict.fromkeys(("polylora", *MOE_PEERS), "ok"), (
        tables
    )


def test_peers_decline_what_they_do_not_have(sglang):
    found = [MOE_PEERS["vllm"](fake_vllm(sglang.delta)), *(MOE_PEERS[n](sglang) for n in ("classic", "virtual", "v2"))]
    _, records, tables, _ = run(found, chosen=[CASES[2]], base=sglang)
    assert {r["status"] for r in of(records)} == {"unserved"} and "left out" not in tables
    _, records, _, _ = run(found, chosen=[CASES[0]])
    assert [r["status"] for r in of(records)] == ["unserved"] * 3 + ["ok"], "torch's base has other rows; v2 needs none"


# ------------------------------------------------------------------------------------------------------ command line


def command(*argv, capsys):
    code = cli.main(["bench", "moe", *map(str, argv)])
    return code, *capsys.readouterr()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_exit_code_is_3(capsys):
    code, out, err = command(capsys=capsys)
    assert (code, out) == (3, "") and "polylora bench moe: needs a GPU" in err and "bench plot" in err


@pytest.fixture
def made_up_gpu(monkeypatch):
    monkeypatch.setattr(command_module, "_why_no_gpu", lambda: "")
    monkeypatch.setattr(timing, "CudaTimer", MadeUpTimer)
    monkeypatch.delenv("POLYLORA_PATH", raising=False)
    for name in ("vllm_lora_ops", "vllm_lora_ops.api", "sglang_lora_ops", "sglang_lora_ops.api"):
        monkeypatch.setitem(sys.modules, name, None)


SMALL = ["--case", CASES[0].name, "--case", CASES[1].name]


def test_results_go_where_they_were_asked_for(made_up_gpu, tmp_path, capsys):
    saved = tmp_path / "r.jsonl"
    code, out, err = command(*SMALL, "--json", saved, "--filter", "M40", "--seams", "fused,added", capsys=capsys)
    assert code == 0 and "1 of 1: moe:64x48,e16,k5,relu2 r16 M40" in err and "without classic" in err
    records = report.load(saved)
    assert [r["kind"] for r in records] == ["run", "moe", "moe"] and records[0]["seams"] == ["fused", "added"]
    assert [r["implementation"] for r in records[1:]] == ["polylora:fused", "polylora:added"]
    code, out, _ = command(*SMALL, "--peers", "none", "--json", "-", "--paths", "auto,general", capsys=capsys)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["implementation"] for r in of(records)] == ["polylora", "polylora:general"] * 2
    assert {r["seams"] for r in of(records)} == {"beside"}


def test_a_run_that_polylora_fails_exits_with_1(made_up_gpu, monkeypatch, capsys):
    nothing = moe_peers._Ops(lambda: None, None, lambda y1: None, None, lambda y2: None)
    monkeypatch.setattr(MoePolylora, "_ops", lambda self, *_: nothing)
    code, out, err = command(*SMALL, "--peers", "none", capsys=capsys)
    assert code == 1 and f"failed: polylora on {CASES[0].name}" in err and "wrong" in out


def test_a_base_or_peers_asked_for_by_name_must_be_there(made_up_gpu, capsys):
    code, out, err = command(*SMALL, "--base", "triton", "--peers", "none", capsys=capsys)
    assert (code, out) == (2, "") and "--base must be one that can be imported" in err
    code, out, err = command(*SMALL, "--peers", "v2", capsys=capsys)
    assert (code, out) == (2, "") and "without v2" in err and "--peers-path" in err


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["--filter", "gpt2"], "--filter must leave a case"),
        (["--case", "llama8b.qkv r16 M1"], "--case: a model must be"),
        (["--peers", "csgmv"], "--peers must be none or of vllm, classic"),
        (["--peers-path", "no/such/folder"], "--peers-path must be a folder"),
        (["--json", "no/folder/x.jsonl"], "--json must be a file"),
        (["--plot", "x.pdf"], "--plot: the plot must be"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(argv, what, capsys):
    code, out, err = command(*argv, capsys=capsys)
    assert (code, out) == (2, "") and what in err


def test_seams_that_there_are_not_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "moe", "--seams", "between"])
    assert caught.value.code == 2 and "of beside, fused, added, tokens, got 'between'" in capsys.readouterr().err


def test_the_command_offers_the_presets_and_peers_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "moe", "--help"])
    out = capsys.readouterr().out
    assert f"{{{','.join(PRESETS)}}}" in out and all(name in out for name in MOE_PEERS)


def test_the_base_is_torchs_where_sglangs_cannot_be_imported(made_up_gpu):
    assert moe_peers.find_base("auto") is None and moe_peers.find_base("torch") is None


# --------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.cuda_only
@pytest.mark.parametrize("options", [[], ["--seams", "fused,added"]], ids=["beside", "the_others"])
def test_a_small_run_on_the_gpu(device, options, tmp_path, capsys):
    if not polylora.has_cuda_kernels():
        pytest.skip("this build has no CUDA kernels")
    chosen = ["moe:256x128,e16,k4,silu,gated r16 M3", "moe:256x128,e16,k4,relu2 r16 M300",
              "moe:256x128,e8,k2,swiglu_oai,gated,interleaved r8 M40"]  # fmt: skip
    argv = [word for name in chosen for word in ("--case", name)]
    argv += ["--peers", "none", "--base", "torch", "--json", tmp_path / "r.jsonl", *options]
    code, out, err = command(*argv, capsys=capsys)
    assert code == 0, err
    records = of(report.load(tmp_path / "r.jsonl"))
    assert len(records) == len(chosen) * (2 if options else 1)
    for r in records:
        assert r["status"] == "ok" and math.isfinite(r["us"]) and 0.3 < r["base_us"] < 1e4, r
        assert all(0.3 < r[f"{op}_us"] < 1e4 for op in moe.OPS), r
