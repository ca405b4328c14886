"""The run of `polylora bench linear` on the CPU, with a clock that is made up: what is checked, what is left out, what
is said; and on a GPU for real."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from types import ModuleType, SimpleNamespace

import polylora
import pytest
import torch
from polylora import cli
from polylora.bench import cases, linear, peers, report, timing
from polylora.bench import command as command_module
from polylora.bench.problem import Problem, sets_that_fit, weight_sets
from polylora.bench.timing import Timing

CASES = [cases.Case.parse(text) for text in ("64->48+16 r8 M5 a3", "80->19 r3 M64 a2", "64->32+8+24 r16 M300 a3")]
EMBEDDINGS = [
    cases.Case.parse(text)
    for text in ("vocab:50->19 r3 M5 a2", "vocab:33->24.token_major r8 M64 a5", "vocab:40->16 r4 M300 a3")
]


pytestmark = pytest.mark.usefixtures("one_thread")


class MadeUpTimer:
    """Runs every call once and makes the times up."""

    device = torch.device("cpu")
    l2_bytes = 3000

    def __init__(self, free=10**9):
        self.count, self.free = 0, free

    def free_bytes(self):
        return self.free

    def scope(self):
        return contextlib.nullcontext()

    def wake(self):
        pass

    def synchronize(self):
        pass

    def timing(self):
        self.count += 1
        return Timing(float(self.count), self.count - 0.5, self.count + 0.5, 8, 21)

    def calls(self, calls):
        for call in calls:
            call()
        return self.timing()

    def calls_after(self, calls, change):
        change()
        return self.calls(calls)

    def added(self, base, calls):
        return self.calls(base), self.calls(calls)

    def beyond(self, base, calls):
        assert len(base) == len(calls)
        return self.calls(base), self.calls(calls)

    def host(self, call):
        return self.calls([call])


class Peer(peers.Implementation):
    """A peer that adds ``factor`` times the delta."""

    def __init__(self, name, factor=1.0, calls_fail=False):
        self.name, self.factor, self.calls_fail, self.closed = name, factor, calls_fail, 0

    def prepare(self, problem):
        def call(a, b):
            if self.calls_fail:
                raise RuntimeError("out of shared memory\nRequired: a lot")
            starts = problem.starts
            for slot, scale in enumerate(problem.scales):
                rows = problem.slot_of_row == slot
                for s, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
                    v = problem.x[rows].float() @ a[slot, s].float().T
                    delta = scale * (v @ b[slot, begin:end].float().T)
                    problem.y[rows, begin:end] += (self.factor * delta).to(problem.dtype)

        return [lambda a=a, b=b: call(a, b) for a, b in zip(problem.a, problem.b, strict=True)]

    def close(self):
        self.closed += 1


def run(implementations, timer=None, **options):
    """(failures, records, tables, progress)"""
    tables, lines, said = io.StringIO(), io.StringIO(), []
    sink = report.Sink(tables, lines)
    chosen = linear.Options(options.pop("cases", CASES), implementations, **options)
    failures = linear.run(chosen, timer or MadeUpTimer(), sink, said.append)
    records = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert records == sink.records
    return failures, records, tables.getvalue(), said


def of_kind(records, kind, implementation=None):
    return [r for r in records if r["kind"] == kind and implementation in (None, r.get("implementation"))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_implementation_is_checked_and_timed(dtype):
    failures, records, tables, said = run([peers.Polylora(), Peer("peer")], dtype=dtype)
    assert failures == [] and records[0]["kind"] == "run" and records[0]["dtype"] == str(dtype)[6:]
    for name in ("polylora", "peer"):
        found = of_kind(records, "linear", name)
        assert [r["case"] for r in found] == [case.name for case in CASES]
        for r, case in zip(found, CASES, strict=True):
            assert r["status"] == "ok" and 0 < r["error"] <= 5e-3
            assert r["ratio"] == pytest.approx(r["us"] / case.floor_us) and r["floor_us"] == case.floor_us
            assert r["sets"] == weight_sets(case, MadeUpTimer.l2_bytes) >= 2
            assert json.dumps(r, allow_nan=False)
    assert all(case.name in tables for case in CASES) and "best peer" in tables
    assert len(of_kind(records, "plan")) == len(CASES)
    assert any(text.startswith("1 of 3") for text in said) and any("s left" in text for text in said)


def test_a_peer_that_computes_something_else_is_left_out_and_named():
    bad = Peer("bad", factor=1.1)
    failures, records, tables, said = run([peers.Polylora(), bad, Peer("good")], chain=True)
    assert failures == [], "a peer's failure is not ours"
    for r in of_kind(records, "linear", "bad"):
        assert r["status"] == "wrong" and "us" not in r and r["error"] == pytest.approx(0.1, rel=0.1)
        assert "must be at most 0.02" in r["detail"]
    assert "bad left out: 64->48+16 r8 M5 a3 (linear): error 0.1" in tables and "and 2 more" in tables
    assert any("bad left out" in text for text in said)
    assert of_kind(records, "chain", "bad") == [], "it is not asked again"
    assert {r["status"] for r in of_kind(records, "linear", "good")} == {"ok"}
    assert "bad" not in report.ratios(records)["M <= 32"]
    assert bad.closed == len(CASES)


def test_a_peer_that_raises_is_left_out_and_named():
    failures, records, tables, _ = run([peers.Polylora(), Peer("boom", calls_fail=True)])
    assert failures == []
    assert {r["status"] for r in of_kind(records, "linear", "boom")} == {"error"}
    assert "boom left out" in tables and "out of shared memory" in tables and "Required" not in tables


def test_embeddings_stand_in_the_same_table_and_in_no_chain():
    chosen = [CASES[0], *EMBEDDINGS]
    failures, records, tables, _ = run([peers.Polylora()], cases=chosen, chain=True, idle=True)
    assert failures == []
    found = of_kind(records, "linear")
    assert [r["case"] for r in found] == [case.name for case in chosen] and {r["status"] for r in found} == {"ok"}
    assert [r["op"] for r in found] == ["linear", *["embedding"] * 3]
    assert [(r.get("vocab"), r.get("layout")) for r in found[1:]] == [(50, "rank"), (33, "token"), (40, "rank")]
    assert "vocab" not in found[0] and all(r["regime"] == "embedding" and r["k"] == 0 for r in found[1:])
    assert [r["case"] for r in of_kind(records, "chain")] == [CASES[0].name] * 2, "an embedding follows no GEMM"
    assert len(of_kind(records, "idle")) == len(chosen)
    assert list(report.ratios(records)["embedding"]["polylora"]) == [case.name for case in EMBEDDINGS]
    assert any(line.startswith("| embedding") for line in tables.splitlines())


@pytest.mark.parametrize("case", EMBEDDINGS, ids=lambda case: case.name)
def test_an_embedding_of_other_tokens_is_found(case):
    class Shifted(peers.Polylora):
        def _embedding(self, problem):
            right, problem.tokens = problem.tokens, [ids.roll(1) for ids in problem.tokens]
            calls = super()._embedding(problem)
            problem.tokens = right
            return calls

    failures, _, _, _ = run([Shifted()], cases=[case])
    assert len(failures) == 1 and "must be at most 0.02" in failures[0]


def add_rows(v, b, slots, y, scales=None):
    """y += scale * v B^T, every row with the B of its slot."""
    delta = torch.einsum("mr,mnr->mn", v.float(), b[slots].float())
    y += (delta if scales is None else delta * torch.tensor(scales)[slots, None]).to(y.dtype)


def fake_sglang(modules):
    """What the embedding's calls use of ``sglang_lora_ops``, in plain torch; layouts as its kernels want them."""

    def batch(lengths, adapters, ranks, scales, device, **options):
        slots = torch.tensor(adapters).repeat_interleave(torch.tensor(lengths))
        return SimpleNamespace(slots=slots, scales=scales, **options)

    def look_up(ids, a, slots, vocab):
        assert a.is_contiguous() and a.size(2) == vocab and ids.is_contiguous()
        return a[slots, :, ids]

    def by_requests(ids, a, info, vocab):
        assert info.phase == "prefill", "the kernel knows no permutation"
        return look_up(ids, a, info.slots, vocab)

    class V2Dense:
        def __init__(self, slots, device):
            pass

        def begin(self, lengths, adapters, ranks, scales, phase, graph_mode):
            info = batch(lengths, adapters, ranks, scales, None)

            def run_b(bridge, b, y, offsets, plan):
                assert plan == ("embedding", y.size(0)) and offsets == (0, y.size(1))
                add_rows(bridge[0], b, info.slots, y, scales)

            self.runner = SimpleNamespace(token_slots=info.slots, lora_ranks=torch.tensor(ranks), run_b=run_b)

        def plan(self, a, b, offsets, rows, kind):
            return kind, rows

    def tokens(ids, a, slots, ranks, vocab):
        assert ranks.tolist() == [a.size(1)] * a.size(0)
        return look_up(ids, a, slots, vocab)

    modules["api"].__dict__.update(
        build_csgmv_batch=batch,
        build_triton_batch=batch,
        make_offsets=lambda starts, device: (torch.tensor(starts),) * 2,
        csgmv_embedding_a=lambda ids, a, info, vocab: look_up(ids, a, info.slots, vocab),
        csgmv_expand=lambda v, b, info, on_device, on_host, base_output: add_rows(
            v, b, info.slots, base_output, info.scales
        ),
        tri_embedding_a=by_requests,
        V2Dense=V2Dense,
    )
    modules["sgemm_lora_b"].sgemm_lora_b_fwd = lambda v, b, info, y: add_rows(v, b, info.slots, y, info.scales)
    modules["embedding_lora_a"].embedding_lora_a_tokens_fwd = tokens
    modules["dense_v2.runner"].Bridge = lambda v: (v,)


@pytest.mark.parametrize("case", EMBEDDINGS, ids=lambda case: case.name)
def test_peers_get_an_embedding_in_their_own_layout(case, monkeypatch):
    modules = {name: ModuleType(f"sglang_lora_ops.{name}") for name in ("api", "sgemm_lora_b", "embedding_lora_a")}
    modules |= {name: ModuleType(f"sglang_lora_ops.{name}") for name in ("dense_v2", "dense_v2.runner")}
    for name, module in {"": ModuleType("sglang_lora_ops"), **modules}.items():
        monkeypatch.setitem(sys.modules, "sglang_lora_ops" + (name and f".{name}"), module)
    fake_sglang(modules)
    vllm = SimpleNamespace(
        make_meta=lambda slots, count, device: slots.long(),
        clear_ptr_caches=lambda: None,
        expand=lambda v, b, y, slots: add_rows(v[0], b[0], slots, y),
    )
    implementations = [peers.Vllm(vllm), *(peers.PEERS[name](modules["api"]) for name in ("csgmv", "triton", "v2"))]
    _, records, tables, _ = run([peers.Polylora(), *implementations], cases=[case])
    assert {r["implementation"]: r["status"] for r in of_kind(records, "linear")} == dict.fromkeys(
        ("polylora", *peers.PEERS), "ok"
    ), tables


@pytest.mark.parametrize("how", ["no call", "half the delta", "NaN", "wrong slot"])
def test_a_wrong_polylora_fails_the_run(how):
    class Broken(peers.Polylora):
        def prepare(self, problem):
            calls = super().prepare(problem)
            if how == "no call":
                return [lambda: None for _ in calls]
            if how == "NaN":
                return [lambda: problem.y.fill_(math.nan) for _ in calls]
            if how == "half the delta":
                return [lambda call=call: (call(), problem.y.add_(problem.y0).div_(2)) for call in calls]
            self.plan.fill((problem.slot_of_row + 1) % problem.case.adapters)
            return calls

    failures, records, tables, _ = run([Broken(), Peer("peer")])
    assert len(failures) == len(CASES) and failures[0].startswith("polylora on 64->48+16 r8 M5 a3 (linear): error")
    assert {r["status"] for r in of_kind(records, "linear", "polylora")} == {"wrong"}
    assert "polylora FAILED" in tables
    assert {r["status"] for r in of_kind(records, "linear", "peer")} == {"ok"}
    assert all(json.dumps(r, allow_nan=False) for r in records)


def test_an_error_in_a_later_weight_set_is_found():
    class LastSetWrong(peers.Polylora):
        def prepare(self, problem):
            calls = super().prepare(problem)
            return [*calls[:-1], calls[0]]

    failures, _, _, _ = run([LastSetWrong()])
    assert len(failures) == len(CASES)


def test_a_path_that_declines_a_case_is_no_failure():
    class Declining(peers.Polylora):
        def prepare(self, problem):
            raise RuntimeError("polylora::linear_: cudaErrorNotSupported")

    failures, records, tables, _ = run([peers.Polylora(), Declining("cluster")])
    assert failures == [] and {r["status"] for r in of_kind(records, "linear", "polylora:cluster")} == {"unserved"}
    assert "FAILED" not in tables
    failures, _, _, _ = run([Declining()])
    assert len(failures) == len(CASES), "where nothing is forced every case must be served"


def test_a_path_is_forced_while_it_is_measured_and_no_longer(monkeypatch):
    monkeypatch.setenv("POLYLORA_PATH", "mine")
    seen = []

    class Watching(peers.Polylora):
        def prepare(self, problem):
            calls = super().prepare(problem)
            return [lambda call=call: (seen.append(os.environ.get("POLYLORA_PATH")), call()) for call in calls]

    run([Watching(), Watching("general")], cases=CASES[:1])
    assert set(seen) == {None, "general"} and seen == sorted(seen, key=lambda s: s is not None)
    assert os.environ["POLYLORA_PATH"] == "mine"


def test_chain_idle_and_overhead_have_their_tables():
    failures, records, tables, _ = run([peers.Polylora(), Peer("peer")], chain=True, idle=True, overhead=True)
    assert failures == []
    for r in of_kind(records, "chain"):
        assert r["status"] == "ok" and r["base_us"] > 0 and r["low_us"] < r["us"] < r["high_us"]
    names = [r["implementation"] for r in of_kind(records, "chain")]
    assert names == ["polylora", "polylora:beside", "peer"] * len(CASES)
    assert [r["implementation"] for r in of_kind(records, "idle")] == ["polylora"] * len(CASES)
    names = {r["implementation"] for r in of_kind(records, "overhead")}
    assert names == {"polylora", "peer", "plan", "polylora, by keywords", "torch add_"}
    for title in ("chain of base GEMMs", "no row that has an adapter", "Host time"):
        assert title in tables


def test_beside_runs_the_gemm_and_adds_to_what_it_wrote():
    problem = Problem(CASES[0], torch.device("cpu"), torch.bfloat16, 2)
    for weight_set, call in enumerate(peers.PolyloraBeside().prepare(problem)):
        problem.y.zero_()
        call.around(lambda: problem.y.copy_(problem.y0))()
        assert problem.error(weight_set) <= 5e-3


def test_an_idle_call_that_touches_y_fails():
    class Touching(peers.Polylora):
        def prepare(self, problem):
            calls = super().prepare(problem)

            def touch(call):
                call()
                if self.plan.stats().active_rows == 0:
                    problem.y[0, 0] += 1

            return [lambda call=call: touch(call) for call in calls]

    failures, _, _, _ = run([Touching()], idle=True)
    assert len(failures) == len(CASES) and all("must keep their bits" in text for text in failures)


def test_a_lost_device_ends_the_run_with_a_sentence():
    class LostTimer(MadeUpTimer):
        def synchronize(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(linear.DeviceLost, match="boom on 64->48.16 r8 M5 a3 left the device unusable: CUDA error"):
        run([peers.Polylora(), Peer("boom", calls_fail=True)], LostTimer())


def test_a_case_too_large_for_the_memory_is_left_out():
    class Small(linear._Run):
        def _problem(self, case):
            if case == CASES[1]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super()._problem(case)

    tables = io.StringIO()
    sink = report.Sink(tables)
    failures = Small(linear.Options(CASES, [peers.Polylora()]), MadeUpTimer(), sink, lambda text: None).run()
    assert failures == [] and f"left out: {CASES[1].name}: it does not fit" in tables.getvalue()
    assert len(of_kind(sink.records, "linear")) == len(CASES) - 1


def test_weights_are_cold_and_aligned_and_differ_from_set_to_set():
    case = cases.Case.parse("24->9 r3 M5 a2")
    assert weight_sets(cases.Case.parse("llama8b.qkv r16 M1"), 50 * 2**20) * 0.59e6 >= 3 * 50 * 2**20 * 0.99
    assert weight_sets(cases.Case.parse("llama8b.qkv r16 M8192"), 50 * 2**20) == 2
    problem = Problem(case, torch.device("cpu"), torch.bfloat16, 3)
    assert problem.sets == 3 and problem.starts == [0, 9]
    for tensors in (problem.a, problem.b):
        assert len({t.data_ptr() for t in tensors}) == 3
        assert all((t.data_ptr() - tensors[0].data_ptr()) % 256 == 0 and t.is_contiguous() for t in tensors)
        assert not torch.equal(tensors[0], tensors[1])
    ids = Problem(EMBEDDINGS[0], torch.device("cpu"), torch.bfloat16, 3).tokens
    assert all((t.data_ptr() - ids[0].data_ptr()) % 256 == 0 and t.is_contiguous() for t in ids)
    assert not torch.equal(ids[0], ids[1])
    again = Problem(case, torch.device("cpu"), torch.bfloat16, 3)
    assert torch.equal(again.a[2], problem.a[2]) and torch.equal(again.x, problem.x)


def test_every_case_has_cold_weights_on_an_h100_and_none_outgrows_the_memory():
    l2, memory = 50 * 2**20, 78 * 10**9
    for case in cases.PRESETS["full"]():
        assert 2 <= weight_sets(case, l2) <= sets_that_fit(case, memory), case.name
    head = cases.Case.parse("qwen35moe.lm_head r16 M64 a64")  # 0.5 GB a set
    for free in (10**6, 10**9, 4 * 10**9, memory):
        assert sets_that_fit(head, free) == 1 or sets_that_fit(head, free) * head.set_bytes <= free / 2
    assert sets_that_fit(head, 0) == 1


def test_where_memory_ends_the_sets_are_fewer_and_the_record_says_so():
    case = cases.Case.parse("64->48+16 r8 M5 a3")
    failures, records, tables, _ = run([peers.Polylora()], MadeUpTimer(free=3 * case.set_bytes), cases=[case])
    (found,) = of_kind(records, "linear")
    assert failures == [] and (found["sets"], found["cold"], found["status"]) == (1, False, "ok")
    assert f"weights warm: {case.name}: memory for 1 of the 2 sets" in tables
    _, records, tables, _ = run([peers.Polylora()], cases=[case])
    assert of_kind(records, "linear")[0]["cold"] and "weights warm" not in tables


def test_peers_that_cannot_be_imported_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    package = tmp_path / "vllm_lora_ops"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "api.py").write_text("raise OSError('no such driver')\n")
    for name in ("vllm_lora_ops", "vllm_lora_ops.api", "sglang_lora_ops", "sglang_lora_ops.api"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found, missing = peers.find_peers(["vllm"], tmp_path)
    assert found == [] and "OSError: no such driver" in missing["vllm"]
    (package / "api.py").write_text("def clear_ptr_caches(): pass\n")
    found, missing = peers.find_peers(["vllm"], tmp_path)
    assert [peer.name for peer in found] == ["vllm"] and missing == {}


# ------------------------------------------------------------------------------------------------------ command line


def command(*argv, capsys):
    code = cli.main(["bench", *map(str, argv)])
    return code, *capsys.readouterr()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_exit_code_is_3(capsys):
    code, out, err = command("linear", capsys=capsys)
    assert (code, out) == (3, "")
    assert "needs a GPU" in err and "polylora info" in err and "bench plot" in err


@pytest.fixture
def made_up_gpu(monkeypatch):
    monkeypatch.setattr(command_module, "_why_no_gpu", lambda: "")
    monkeypatch.setattr(timing, "CudaTimer", MadeUpTimer)
    monkeypatch.delenv("POLYLORA_PATH", raising=False)


SMALL = ["--case", "64->48+16 r8 M5 a3", "--case", "80->19 r3 M64 a2", "--case", "32->8 r1 M1"]


def test_results_go_where_they_were_asked_for(made_up_gpu, tmp_path, capsys):
    saved = tmp_path / "r.jsonl"
    code, out, err = command("linear", *SMALL, "--peers", "none", "--json", saved, "--filter", "M64", capsys=capsys)
    assert code == 0 and "1 of 1: 80->19 r3 M64 a2" in err and "M5" not in out
    assert "| 80->19 r3 M64 a2 |" in out and "Time over the floor" in out
    assert [r["kind"] for r in report.load(saved)] == ["run", "linear", "plan"]
    assert report.load(saved)[0]["filter"] == ["M64"]
    code, out, err = command("linear", *SMALL, "--peers", "none", "--json", "-", "--dtype", "fp16", capsys=capsys)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and records[0]["dtype"] == "float16" and len(of_kind(records, "linear")) == 3


def test_a_run_that_polylora_fails_exits_with_1(made_up_gpu, monkeypatch, capsys):
    monkeypatch.setattr(peers.Polylora, "prepare", lambda self, problem: [lambda: None])
    code, out, err = command("linear", *SMALL, "--peers", "none", capsys=capsys)
    assert code == 1 and "failed: polylora on 64->48+16 r8 M5 a3" in err and "wrong" in out


def test_a_lost_device_exits_with_1(made_up_gpu, monkeypatch, capsys):
    def lost(*_):
        raise linear.DeviceLost("polylora on x left the device unusable")

    monkeypatch.setattr(linear, "run", lost)
    code, _, err = command("linear", *SMALL, "--peers", "none", capsys=capsys)
    assert code == 1 and "left the device unusable" in err


def test_peers_asked_for_by_name_must_be_there(made_up_gpu, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_peers", lambda names, folder, known: ([], {n: f"no {n} here" for n in names}))
    code, out, err = command("linear", *SMALL, "--peers", "v2", capsys=capsys)
    assert (code, out) == (2, "") and "without v2: no v2 here" in err and "--peers-path" in err
    code, out, err = command("linear", *SMALL, capsys=capsys)
    assert code == 0 and "without vllm: no vllm here" in err and "| polylora |" in out


def test_the_path_of_the_environment_is_the_one_measured(made_up_gpu, monkeypatch, capsys):
    monkeypatch.setenv("POLYLORA_PATH", "general")
    code, out, _ = command("linear", *SMALL, "--peers", "none", capsys=capsys)
    assert code == 0 and "polylora:general" in out
    code, out, _ = command("linear", *SMALL, "--peers", "none", "--paths", "auto,cluster", capsys=capsys)
    assert code == 0 and "| polylora |" in out and "polylora:cluster" in out and "polylora:general" not in out


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (["--filter", "gpt2"], "--filter must leave a case"),
        (["--case", "llama8b.qkv"], "--case: a case must look like"),
        (["--peers", "punica"], "--peers must be none or of vllm"),
        (["--peers-path", "no/such/folder"], "--peers-path must be a folder"),
        (["--json", "no/folder/x.jsonl"], "--json must be a file"),
        (["--plot", "x.pdf"], "--plot: the plot must be"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(argv, what, capsys):
    code, out, err = command("linear", *argv, capsys=capsys)
    assert (code, out) == (2, "") and what in err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["linear", "--preset", "all"],
        ["linear", "--dtype", "fp32"],
        ["linear", "--peers", "vllm,,v2"],
        ["linear", "--paths", "auto,auto"],
        ["linear", "--paths", "auto,fast"],
        ["plot", "x.jsonl"],
    ],
)
def test_wrong_arguments_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *argv])
    assert exit_.value.code == 2 and "usage: polylora bench" in capsys.readouterr().err


def test_the_command_offers_the_presets_and_peers_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "linear", "--help"])
    out = capsys.readouterr().out
    assert f"{{{','.join(cases.PRESETS)}}}" in out
    assert all(name in out for name in peers.PEERS)


def test_saved_results_are_drawn_without_a_gpu(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _, records, _, _ = run([peers.Polylora(), Peer("peer")])
    saved = tmp_path / "results.jsonl"
    saved.write_text("".join(json.dumps(r) + "\n" for r in records))
    code, out, err = command("plot", saved, "-o", tmp_path / "plot.svg", capsys=capsys)
    assert (code, out, err) == (0, "", "")
    text = (tmp_path / "plot.svg").read_text()
    assert text.startswith("<?xml") and "svg" in text


def test_results_that_cannot_be_drawn_are_refused(tmp_path, capsys):
    code, out, err = command("plot", tmp_path / "no.jsonl", "-o", tmp_path / "plot.svg", capsys=capsys)
    assert (code, out) == (2, "") and "no.jsonl: cannot be read" in err
    (tmp_path / "empty.jsonl").write_text("")
    code, out, err = command("plot", tmp_path / "empty.jsonl", "-o", tmp_path / "plot.svg", capsys=capsys)
    assert (code, out) == (2, "") and ("no case with a time" in err or "matplotlib" in err)


# --------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.cuda_only
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_small_run_on_the_gpu(device, dtype, tmp_path, capsys):
    if not polylora.has_cuda_kernels():
        pytest.skip("this build has no CUDA kernels")
    options = ["--case", "256->64+32 r8 M3", "--case", "256->64 r16 M300", "--paths", "auto,general"]
    options += ["--peers", "none", "--dtype", dtype, "--json", tmp_path / "r.jsonl", "--chain", "--idle", "--overhead"]
    code, out, err = command("linear", *options, capsys=capsys)
    assert code == 0, err
    records = report.load(tmp_path / "r.jsonl")
    for kind in ("linear", "chain", "idle"):
        for r in of_kind(records, kind, "polylora") + of_kind(records, kind, "polylora:general"):
            assert r["status"] == "ok" and math.isfinite(r["us"]), r
    assert 0.3 < of_kind(records, "linear", "polylora")[0]["us"] < 1000
    assert 0.3 < of_kind(records, "idle", "polylora")[0]["us"] < 1000
    assert "Time over the floor" in out
