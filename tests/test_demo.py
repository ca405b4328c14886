"""``polylora demo``: its numbers, its text, its verdict."""

from __future__ import annotations

import json

import pytest
import torch
from polylora import cli, demo
from polylora.fixtures import adapter_names


@pytest.mark.parametrize("key", demo.MODELS)
def test_demo_runs_and_passes(key, device, tmp_path, capsys):
    target = tmp_path / "numbers.json"
    code = cli.main(["demo", "--model", key, "--device", device, "--tokens", "12", "--json", str(target)])
    printed = capsys.readouterr()
    assert code == 0, printed.out
    result = json.loads(target.read_text())
    name = demo.MODELS[key]
    one = result["models"][name]
    assert list(one["adapters"]) == adapter_names(name)
    assert list(one["samples"]) == ["(base)", *adapter_names(name)]
    assert len(set(one["samples"].values())) == len(one["samples"]), "rows of one batch write different texts"
    for row in one["adapters"].values():
        assert row["share"] > 0.12 and row["divergence"] < 1e-7 and row["difference"] < 1e-2
        assert row["same_greedy_tokens"] == 12
        assert row["share"] == pytest.approx(row["peft_share"], rel=1e-3)
    assert all(value > 0 for value in one["speed"].values() if isinstance(value, float))
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[-1].startswith("PASS")
    for adapter in adapter_names(name):
        assert any(line.split()[:1] == [adapter] for line in lines)
    assert name in printed.err and "PEFT with" in printed.err, "progress goes to stderr"
    assert torch.get_num_threads() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_float32_the_greedy_texts_must_be_those_of_peft(dtype):
    one = {"tokens": 7, "adapters": {"a": numbers(), "b": numbers(same_greedy_tokens=6)}}
    found = demo._failures("m", one, demo.BOUNDS[getattr(torch, dtype)])
    assert found == (["m, b: greedy tokens equal to PEFT's must be all 7, got 6"] if dtype == "float32" else [])


def numbers(**changes):
    row = {
        "rank": [4, 8], "rslora": True, "targets": "3 linears", "sites": 9, "divergence": 1e-12, "difference": 1e-5,
        "share": 0.4, "peft_share": 0.4, "same_greedy_tokens": 7, "peft_alone_tokens_per_s": 10.0,
    }  # fmt: skip
    return {**row, **changes}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, None),
        ({"divergence": 1.0}, "mean 0.5*dlogp^2 must be at most"),
        ({"divergence": float("nan")}, "mean 0.5*dlogp^2 must be at most"),
        ({"difference": 0.5}, "max |dlogp| must be at most"),
        ({"share": 0.1}, "share of the delta must be at least"),
        ({"share": float("nan")}, "share of the delta must be at least"),
        ({"same_greedy_tokens": 3}, "greedy tokens equal to PEFT's must be all 7, got 3"),
    ],
)
def test_a_missed_bound_fails_the_command(changes, what, monkeypatch, capsys):
    one = {
        "prompt": "p", "rows": 2, "tokens": 7, "samples": {"(base)": "text \x00\u20ac\n", "a": "x" * 300},
        "adapters": {"a": numbers(**changes)},
        "speed": dict.fromkeys(("all_here", "all_peft_one_by_one", "linears_here", "linears_peft_adapter_names"), 1.0)
        | {"linears": ["a"]},
    }  # fmt: skip
    monkeypatch.setattr(demo._Demo, "__init__", lambda self, *_: None)
    monkeypatch.setattr(demo._Demo, "run", lambda self: one)
    code = cli.main(["demo", "--model", "qwen", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    if what is None:
        assert code == 0 and lines[-1].startswith("PASS")
    else:
        assert code == 1
        assert "FAIL" in lines[-2] and what in lines[-1] and "tiny-qwen3_5-moe, a" in lines[-1]


def test_missing_fixtures_are_a_refusal(monkeypatch, capsys):
    monkeypatch.setattr("polylora.fixtures.adapter_names", lambda model: [])
    assert cli.main(["demo", "--model", "qwen", "--device", "cpu"]) == 2
    assert "tiny-qwen3_5-moe is missing" in capsys.readouterr().err


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError):
        demo.run(["no such model"])
    assert torch.get_num_threads() == before
