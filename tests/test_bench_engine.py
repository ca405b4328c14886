"""The engine benchmark on the CPU: everything but vLLM, which a made-up engine and a made-up package stand in for."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from polylora.adapters import load_adapter
from polylora.bench import report
from polylora.models import model_table
from polylora_cli import DONE, NO, NO_GPU

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("not a source checkout", allow_module_level=True)
pytest.importorskip("transformers")
sys.path.insert(0, str(BENCH))

import engine_models  # noqa: E402
import engine_report  # noqa: E402
import engine_side  # noqa: E402
import engine_vllm  # noqa: E402

SMALL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "vocab_size": 1000}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


VERSIONS = {"bench_versions": {"vllm": "made up", "device": "a card"}}
LAYERS = {"o_proj": {"calls": 2, "error": 0.01}}


class MadeUpEngine:
    """Prefills ``prefills`` requests a step, then decodes all; a step takes as long as its side says."""

    def __init__(
        self, side="vllm", prefills=4, wrappers=None, kernels=None, odd=None, at_once=10**9, only_alone=False, bias=0.0
    ):
        self.now, self.side, self.prefills, self.at_once = 0.0, side, prefills, at_once
        self.left, self.done, self.odd, self.only_alone, self.bias = [], {}, odd, only_alone, bias
        self.by_itself = False
        names = engine_side.WRAPPERS[side] if wrappers is None else wrappers
        self.wrappers = dict.fromkeys(names, 7)
        launched = {"base": (0, 0), "vllm": (0, 3), "polylora": (3, 0)}[side]
        self.kernels = kernels or {"all": 9, "polylora": launched[0], "vllm": launched[1]}

    def add(self, request):
        self.by_itself = not self.left
        self.left.append(request)
        self.done[request.name] = 0

    def step(self):
        new = [r for r in self.left if not self.done[r.name]][: self.prefills]
        old = [r for r in self.left if self.done[r.name]][: self.at_once]
        self.now += {"base": 0.010, "vllm": 0.015, "polylora": 0.012}[self.side] * (10 if new else 1)
        for request in new + old:
            self.done[request.name] += 1
        self.left = [r for r in self.left if self.done[r.name] < r.output]
        return [(r.name, [self._token(r)], [{self._token(r): -0.1 + self.bias, 3: -0.15}]) for r in new + old]

    def _token(self, request):
        if self.odd and self.done[request.name] == 5 and (not self.only_alone or self.by_itself):
            return self.odd
        return 20 + (request.adapter if request.adapter is not None else -1)

    def busy(self):
        return bool(self.left)

    def rpc(self, method):
        return {"bench_wrappers": self.wrappers, "bench_profile_stop": self.kernels,
                "bench_check_stop": LAYERS, **VERSIONS}.get(method, {})  # fmt: skip


def made_up(**sides):
    """``run`` of :func:`engine_vllm.main`, with the same measuring loop as the process of a side."""

    def run(spec, work):
        records, engine = [], MadeUpEngine(spec["side"], **sides.get(spec["side"], {}))
        for path in spec["adapters"]:
            assert (Path(path) / "adapter_model.safetensors").is_file()
        measure = engine_side.measure
        engine_side.measure = lambda e, batch: measure(e, batch, lambda: e.now)
        try:
            engine_side.run(spec, engine, records.append, lambda text: None)
        except engine_side.WrongKernels:
            return records, 1
        finally:
            engine_side.measure = measure
        return records, 0

    return run


# ------------------------------------------------------------------------------------------------------- measuring


def test_time_per_output_token_is_that_of_steps_in_which_all_decode():
    engine = MadeUpEngine("vllm", prefills=3)
    sample = engine_side.measure(engine, engine_side.requests(8, 16, 32, 4), lambda: engine.now)
    # three steps of prefill; 31 more tokens each, the last of the first three two steps before the last of all
    assert sample["ttft_last"] == pytest.approx(450)
    assert sample["ttft"] == pytest.approx((3 * 150 + 3 * 300 + 2 * 450) / 8)
    assert sample["tpot"] == pytest.approx(15) and sample["step"] == pytest.approx(15)
    assert sample["steps"] == 29 - engine_side.SETTLE - 1


@pytest.mark.parametrize("batch, prompt, tokens", [(1, 128, 8192), (8, 2048, 8192), (32, 2048, 8192), (128, 128, 512)])
def test_least_output_is_just_enough(batch, prompt, tokens):
    class Chunked(MadeUpEngine):
        """Prompts in steps of so many tokens, one of them for each request that decodes."""

        def __init__(self):
            super().__init__()
            self.left = {}

        def add(self, request):
            self.left[request.name] = [len(request.prompt), request.output]

        def busy(self):
            return bool(self.left)

        def step(self):
            self.now += 0.015
            room, outputs = tokens, []
            for name, left in list(self.left.items()):
                part = min(left[0], room) if left[0] else 1
                room -= part
                left[0] -= min(left[0], part)
                if part == 0 or left[0]:
                    continue
                left[1] -= 1
                outputs.append((name, [1], None))
                if left[1] == 0:
                    del self.left[name]
            return outputs

    least = engine_side.least_output(batch, prompt, tokens)
    for output in (least, least + 3):
        engine = Chunked()
        sample = engine_side.measure(engine, engine_side.requests(batch, prompt, output, 1), lambda e=engine: e.now)
        assert sample["steps"] >= engine_side.LEAST_STEPS - 1
    if batch > 1 and prompt > 128:
        engine = Chunked()
        with pytest.raises(RuntimeError, match="decoded together"):
            engine_side.measure(engine, engine_side.requests(batch, prompt, least - 2, 1), lambda: engine.now)


def test_one_token_has_no_decode_steps():
    engine = MadeUpEngine()
    sample = engine_side.measure(engine, engine_side.requests(2, 16, 1, 1), lambda: engine.now)
    assert sample["tpot"] is None and sample["ttft"] == pytest.approx(150)


def test_requests_that_never_decode_together_have_no_time():
    engine = MadeUpEngine(at_once=2)
    with pytest.raises(RuntimeError, match="8 requests decoded together for 0 steps"):
        engine_side.measure(engine, engine_side.requests(8, 16, 32, 4), lambda: engine.now)


def test_requests_take_adapters_in_turn():
    assert [r.adapter for r in engine_side.requests(5, 3, 2, 2)] == [0, 1, 0, 1, 0]
    assert [r.adapter for r in engine_side.requests(2, 3, 2, 0)] == [None, None]
    assert all(len(r.prompt) == 3 for r in engine_side.requests(2, 3, 2, 0))


def test_kernels_are_told_apart_by_name():
    found = {"void polylora::cuda::linear_cluster<16>(T)": 5, "_lora_shrink_kernel": 2, "_fused_moe_lora_kernel": 1,
             "nvjet_tst_64x8": 9, "cudaLaunchKernel": 50, "cuLaunchKernelEx": 3, "Memcpy HtoD": 4,
             "cutlass::Kernel": 1}  # fmt: skip
    assert engine_side.count_kernels(found) == {"all": 18, "polylora": 5, "vllm": 3}


@pytest.mark.parametrize(
    ("side", "adapters", "all_", "ours", "vllms", "good"),
    [
        ("base", 0, 9, 0, 0, True),
        ("base", 0, 9, 0, 1, False),
        ("vllm", 1, 9, 0, 3, True),
        ("vllm", 1, 9, 1, 3, False),
        ("vllm", 1, 9, 0, 0, False),
        ("polylora", 1, 9, 3, 1, True),
        ("polylora", 1, 9, 0, 3, False),
        ("polylora", 0, 9, 0, 0, True),
        ("polylora", 1, 0, 0, 0, True),
    ],
)
def test_the_kernels_must_be_the_sides(side, adapters, all_, ours, vllms, good):
    found = {"all": all_, "polylora": ours, "vllm": vllms}
    if good:
        engine_side.check_kernels(side, adapters, found)
    else:
        with pytest.raises(engine_side.WrongKernels):
            engine_side.check_kernels(side, adapters, found)


# ---------------------------------------------------------------------------------------------- models and adapters


def test_workers_answer_in_plain_types(monkeypatch):
    """vLLM cannot send others between its processes and then waits for good; ``torch.__version__`` is no plain str."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.26.0"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert {type(value) for value in engine_side.Worker().bench_versions().values()} == {str}


def test_adapters_of_mixed_ranks_can_be_loaded(small, tmp_path):
    from transformers import AutoConfig

    folders = engine_models.write_adapters(tmp_path / "adapters", small, [4, 8], 3)
    table = model_table(AutoConfig.from_pretrained(small), fused=True)
    loaded = [load_adapter(folder, table) for folder in folders]
    entries = [weights.sites["model.layers.1.self_attn.qkv_proj"] for weights in loaded]
    assert [entry.a[0].shape[0] for entry in entries] == [4, 8, 4]
    assert (folders[0] / "adapter_model.safetensors").samefile(folders[2] / "adapter_model.safetensors")
    scales = [entry.entries[0][0].scale for entry in entries]
    assert scales[0] != scales[2], "adapters that share a file must differ"


@pytest.mark.parametrize("preset", engine_models.PRESETS)
def test_presets_have_published_dims_and_adapters_for_them(preset, tmp_path):
    from transformers import AutoConfig

    model = engine_models.write_model(tmp_path / preset, preset, 4 if preset == "qwen35moe" else 1)
    table = model_table(AutoConfig.from_pretrained(model), fused=True)
    widths = {path.split(".layers.")[-1]: (site.k, site.width) for path, site in table.sites.items()}
    if preset == "llama8b":
        assert widths["0.self_attn.qkv_proj"] == (4096, 4096 + 1024 + 1024)
        assert widths["0.mlp.down_proj"] == (14336, 4096)
    else:
        assert widths["0.linear_attn.in_proj_qkvz"] == (2048, 2048 + 2048 + 4096 + 4096)
        assert widths["3.mlp.experts.gate_up_proj"] == (2048, 1024)
    (folder,) = engine_models.write_adapters(tmp_path / "adapters", model, [1], 1)
    wanted = {p for p in table.sites if p.split(".")[-1] not in ("lm_head", "embed_tokens", "in_proj_ba",
                                                                 "shared_expert_gate")}  # fmt: skip
    assert set(load_adapter(folder, table).sites) == wanted


def test_settings_keep_off_the_network_and_follow_the_model(small, tmp_path):
    spec = {"side": "base", "model": str(small), "weights": "dummy", "batches": [1, 8], "length": 300, "ranks": [8, 24],
            "adapters": ["x", "y"], "slots": 2, "compile": False, "engine": {"moe_backend": "triton"}}  # fmt: skip
    base = engine_side.settings(spec)
    assert base["skip_tokenizer_init"] and not base["enable_prefix_caching"] and "enable_lora" not in base
    assert base["moe_backend"] == "triton" and "gdn_prefill_backend" not in base
    lora = engine_side.settings(spec | {"side": "vllm"})
    assert lora["max_lora_rank"] == 32 and lora["max_loras"] == 2
    assert {k: v for k, v in lora.items() if "lora" not in k} == base
    model = engine_models.write_model(tmp_path / "q", "qwen35moe")
    assert engine_side.settings(spec | {"model": str(model)})["gdn_prefill_backend"] == "triton"


# ----------------------------------------------------------------------------------------------- reports, comparing


def test_a_time_is_a_median_with_its_spread():
    record = {"status": "ok", "samples": [{"tpot": value} for value in (3.0, 1.0, 2.0)]}
    assert engine_report.spread(record, "tpot") == (2.0, 1.0, 3.0)
    assert engine_report.spread(record | {"status": "error"}, "tpot") is None
    assert engine_report.spread({"status": "ok", "samples": [{"tpot": None}]}, "tpot") is None


def text(tokens, logprobs, adapter=None, prompt=(1,)):
    return {"adapter": adapter, "prompt": list(prompt), "tokens": tokens,
            "logprobs": [[list(pair) for pair in at.items()] for at in logprobs]}  # fmt: skip


def test_two_texts_agree_up_to_ties():
    base = text([7, 7], [{7: -0.1, 8: -3}, {7: -0.1, 8: -3}])
    mine = text([5, 6], [{5: -0.5, 9: -2}, {6: -0.70, 8: -0.72}], adapter=0)
    same = text([5, 6], [{5: -0.53, 9: -2}, {6: -0.71, 8: -0.72}], adapter=0)
    tied = text([5, 8], [{5: -0.5, 9: -2}, {8: -0.69, 6: -0.74}], adapter=0)
    other = text([5, 8], [{5: -0.5, 9: -2}, {8: -0.3, 6: -1.9}], adapter=0)
    drift = text([5, 6], [{5: -0.9, 9: -2}, {6: -0.7, 8: -0.72}], adapter=0)

    def against(theirs, ours=mine):
        return engine_report.compare({"0": base, "1": ours}, {"0": base, "1": theirs}, 0.1)

    assert (found := against(same))["equal"] == 2 and found["before"] == pytest.approx(0.03) and not found["apart"]
    assert (found := against(tied))["ties"] == 1 and found["at"] == pytest.approx(0.04) and not found["apart"]
    assert (found := against(other))["apart"] == ["1"] and found["at"] == pytest.approx(1.2)
    assert against(drift)["apart"] == ["1"], "equal tokens of other likelihoods do not agree"
    silent = base | {"adapter": 0}
    assert against(silent, silent)["silent"] == [0] and against(same)["silent"] == []


def test_layers_against_float32(capsys):
    def of(**errors):
        return {name: {"calls": 3, "error": error} for name, error in errors.items()}

    def failures(mine, theirs):
        return engine_report.write_layers(report.Sink(sys.stdout), {"polylora": mine, "vllm": theirs})

    fused = of(qkv_proj=0.01) | {"gate_up_proj+act": {"calls": 3, "error": 0.012}}
    assert failures(fused, of(qkv_proj=0.01, gate_up_proj=0.009)) == []
    out = capsys.readouterr().out
    assert "| qkv_proj         |      3 | 0.0100 |   0.0100 |" in out and "0.0090" in out
    assert failures(of(o_proj=0.03), of(o_proj=0.01)) == ["o_proj: an error of 0.0300, at most 0.0200 is allowed"]
    assert failures(of(o_proj=math.nan), of(o_proj=0.01)), "no number is no proof"
    assert failures(of(o_proj=0.01), of(o_proj=0.01, experts=0.01)) == ["experts: not seen with polylora"]


# --------------------------------------------------------------------------------------------------- the command


def arguments(small, *more):
    return ["--model", str(small), "--adapters", "1,2", "--batch", "1,4", "--prompt", "8,32", "--output", "24",
            "--repeat", "3", *more]  # fmt: skip


def test_a_run_side_by_side(small, tmp_path, capsys):
    files = tmp_path / "r.jsonl", tmp_path / "plot.svg"
    options = arguments(small, "--json", str(files[0]), "--plot", str(files[1]), "--work", str(tmp_path))
    assert engine_vllm.main(options, made_up()) == DONE
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert ["8", "4", "2", "10.00 (10.00..10.00)", "15.00 (15.00..15.00)", "12.00 (12.00..12.00)", "+50.0%",
            "+20.0%"] in rows  # fmt: skip
    assert ["32", "1", "1", "100.00 (100.00..100.00)", "150.00 (150.00..150.00)", "120.00 (120.00..120.00)", "+50.0%",
            "+20.0%"] in rows  # fmt: skip
    assert not [row for row in rows if row[1:3] == ["1", "2"]], "no more adapters than requests"
    records = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert records[0]["kind"] == "run" and records[0]["ranks"] == [16]
    assert {r["side"] for r in records if r["kind"] == "wrapper"} == set(engine_report.SIDES)
    assert files[1].read_text().count("<svg") == 1 and "a card" in files[1].read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")], "what it wrote is gone"


def test_a_side_with_other_kernels_fails(small, capsys):
    wrong = {"polylora": {"wrappers": engine_side.WRAPPERS["vllm"]}}
    assert engine_vllm.main(arguments(small), made_up(**wrong)) == NO
    assert "polylora: its process ended with exit code 1" in capsys.readouterr().err
    wrong = {"polylora": {"kernels": {"all": 9, "polylora": 0, "vllm": 4}}}
    assert engine_vllm.main(arguments(small), made_up(**wrong)) == NO


def test_a_batch_without_a_time_fails_and_the_others_are_there(small, capsys):
    assert engine_vllm.main(arguments(small), made_up(vllm={"at_once": 1})) == NO
    captured = capsys.readouterr()
    assert "failed: vllm: 4 requests decoded together" in captured.err and "+20.0%" in captured.out


def test_comparing(small, capsys):
    options = arguments(small, "--compare")
    assert engine_vllm.main(options, made_up()) == DONE
    out = capsys.readouterr().out
    assert "polylora: 4 greedy texts: 4 equal to vLLM's, 0 part at a tie, 0 apart" in out
    assert "vLLM, requests by themselves: 4 greedy texts: 4 equal" in out
    assert "| o_proj |      2 | 0.0100 |   0.0100 |" in out
    assert engine_vllm.main(options, made_up(polylora={"odd": 9})) == NO
    assert "requests beyond the tolerance: 0, 1, 2, 3" in capsys.readouterr().err
    # vLLM's own texts part as well where the batch is another
    noisy = {"odd": 8, "only_alone": True}
    assert engine_vllm.main(options, made_up(polylora={"odd": 9}, vllm=noisy)) == DONE
    capsys.readouterr()
    assert engine_vllm.main(options, made_up(polylora={"odd": 9, "bias": 0.3}, vllm=noisy)) == NO
    assert "first tokens differ by 0.2121, vLLM's from its own by 0.0000" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, adapters, slots",
    [([], 2, 2), (["--slots", "5"], 2, 5), (["--compare", "--adapters", "3", "--slots", "1"], 3, 1)],
    ids=["one each", "more", "adapters come and go"],
)
def test_slots(small, more, adapters, slots):
    specs = []

    def run(spec, work):
        specs.append(spec)
        return made_up()(spec, work)

    assert engine_vllm.main(arguments(small, *more), run) == DONE
    found = [engine_side.settings(s) for s in specs if s["side"] != "base"]
    assert len(found) == 2 and all(len(s["adapters"]) == adapters for s in specs)
    assert {(s["max_loras"], s["max_cpu_loras"]) for s in found} == {(slots, slots)}


@pytest.mark.parametrize(
    "wrong",
    [["--output", "2"], ["--engine", "x"], ["--sides", "tgi"], ["--ranks", "1024"], ["--model", "/nowhere"],
     ["--plot", "x.pdf"], ["--json", "/nowhere/x"], ["--batch", "0"], ["--compare", "--slots", "0"],
     ["--adapters", "1,8", "--slots", "7"], ["--adapters", "-3"], ["--adapters", "a"], ["--layers", "0"],
     ["--work", "/nowhere"], ["--batch", "32", "--prompt", "2048", "--output", "16"]],
)  # fmt: skip
def test_bad_usage(wrong):
    with pytest.raises(SystemExit) as stop:
        engine_vllm.main([*wrong], made_up())
    assert stop.value.code == 2


def test_without_a_gpu_or_vllm(small, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert engine_vllm.main(arguments(small)) == NO_GPU
    assert "needs a GPU" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- processes, a made-up vLLM

VLLM = """
import os, sys, types
from importlib.metadata import entry_points
__version__ = "made up"

class SamplingParams(types.SimpleNamespace): pass

class Wrapper: pass

class LLM:
    def __init__(self, enable_lora=False, worker_extension_cls="", **settings):
        module, name = worker_extension_cls.rsplit(".", 1)
        worker = getattr(__import__(module), name)
        self.llm_engine, self.worker = Engine(), type("W", (worker,), {})()
        plugins = {e.value for e in entry_points(group="vllm.general_plugins")}
        ours = "polylora_vllm:register" in plugins and os.environ["POLYLORA_VLLM"] == "1"
        self.ours, self.lora = ours, enable_lora
        where = ("polylora.vllm_plugin.wrapper.PolyloraPunicaWrapper" if ours else
                 "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU")
        wrapper = type(where.rpartition(".")[2], (), {"__module__": where.rpartition(".")[0]})()
        layer = types.SimpleNamespace(punica_wrapper=wrapper)
        self.worker.get_model = lambda: types.SimpleNamespace(
            modules=lambda: [layer] * 3 if enable_lora else [], named_parameters=lambda: [])
    def collective_rpc(self, method):
        if method in ("bench_profile_start", "bench_versions"): return [{}]
        if method == "bench_profile_stop":
            return [{"all": 9, "polylora": 5 * (self.lora and self.ours), "vllm": 5 * (self.lora and not self.ours)}]
        return [getattr(self.worker, method)()]

class Engine:
    def __init__(self): self.requests, self.loaded = [], []
    def add_lora(self, adapter): self.loaded.append(adapter)
    def add_request(self, name, prompt, params, lora_request=None):
        assert lora_request is None or lora_request in self.loaded
        self.requests.append([name, params.max_tokens])
    def has_unfinished_requests(self): return bool(self.requests)
    def step(self):
        completion = types.SimpleNamespace(token_ids=(3,), logprobs=None)
        outputs = [types.SimpleNamespace(request_id=r[0], outputs=[completion])
                   for r in self.requests]
        for r in self.requests: r[1] -= 1
        self.requests = [r for r in self.requests if r[1]]
        return outputs

for name, value in {"lora.request": {"LoRARequest": lambda *a: a},
                    "sampling_params": {"RequestOutputKind": types.SimpleNamespace(DELTA=1)}, "lora": {}}.items():
    sys.modules["vllm." + name] = module = types.ModuleType("vllm." + name)
    vars(module).update(value)
"""


def test_each_side_is_a_process_with_its_own_plugin(small, tmp_path, monkeypatch, capfd):
    """The processes for real: environment, entry point, settings, records, exit codes."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/vllm.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = tmp_path / "r.jsonl"
    status = engine_vllm.main(arguments(small, "--json", str(found), "--output", "40"))
    assert status == DONE, capfd.readouterr().err
    layers = {r["side"]: r["layers"] for r in map(json.loads, found.read_text().splitlines()) if r["kind"] == "wrapper"}
    assert {side: set(names) for side, names in layers.items()} == engine_side.WRAPPERS
    environment = engine_vllm.environment("polylora", tmp_path)
    assert environment["VLLM_PLUGINS"] == "other,polylora"
    assert environment["PYTHONPATH"].split(os.pathsep)[2:] == [str(tmp_path), str(tmp_path / "site")]
    assert engine_vllm.environment("vllm", tmp_path)["POLYLORA_VLLM"] == "0"
