"""The ``polylora`` command: exit codes, what goes where, what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polylora
import pytest
import torch
from polylora import cli
from polylora.fixtures import adapter_path, fixture_path

QWEN, NEMOTRON = "tiny-qwen3_5-moe", "tiny-nemotron-h"


def run(*argv, capsys):
    code = cli.main([str(a) for a in argv])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["serve"],
        ["demo", "--model", "gpt2"],
        ["demo", "--device", "tpu"],
        ["demo", "--tokens", "0"],
        ["demo", "--tokens", "many"],
        ["check", "somewhere"],
        ["info", "extra"],
    ],
)
def test_wrong_arguments_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "usage: polylora" in captured.err


def test_attach_says_what_it_takes():
    import inspect

    from polylora.engines import HfEngine

    options = list(inspect.signature(HfEngine).parameters.values())
    taken = list(inspect.signature(polylora.attach).parameters.values())
    assert [(p.name, p.kind, p.default) for p in taken] == [(p.name, p.kind, p.default) for p in options]
    assert "max_rank" in polylora.attach.__doc__


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"polylora {polylora.__version__}\n"


def python(*argv: str) -> subprocess.CompletedProcess:
    """A Python of its own, which finds the package where this one did."""
    source = str(Path(polylora.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.parametrize("argv", ["--help", "--version", "demo --help", "info --help", "check --help", "serve", ""])
def test_what_the_arguments_alone_answer_does_not_wait_for_torch(argv):
    program = f"""if True:
        import sys
        import polylora_cli
        try:
            polylora_cli.main({argv.split()})
        except SystemExit as done:
            print("code", done.code, "torch" in sys.modules, "polylora" in sys.modules)
    """
    done = python("-c", program)
    code = 0 if "--" in argv else 2
    assert done.stdout.splitlines()[-1:] == [f"code {code} False False"], done.stdout + done.stderr


def test_the_installed_command_is_the_one_that_does_not_wait():
    project = Path(polylora.__file__).parents[2] / "pyproject.toml"
    if not project.exists():
        pytest.skip("not a source checkout")
    text = project.read_text()
    assert 'polylora = "polylora_cli:main"' in text and f'version = "{polylora.__version__}"' in text


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("demo", "info", "check"))


def test_info(capsys):
    code, out, err = run("info", "--json", capsys=capsys)
    values = json.loads(out)
    assert (code, err) == (0, "")
    assert values["polylora"] == polylora.__version__
    assert values["cuda_kernels"] == polylora.has_cuda_kernels()
    assert {"plan", "moe_plan", "linear_", "shrink", "expand_", "embedding_", "moe_gate_up_act"} <= set(values["ops"])
    assert values["versions"]["torch"] == torch.__version__
    assert len(values["devices"]) == 1 + torch.cuda.device_count()
    assert {"llama", "nemotron_h", "qwen3_5_moe"} <= set(values["models"])
    code, out, err = run("info", capsys=capsys)
    assert (code, err) == (0, "") and "CUDA kernels" in out and torch.__version__ in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_demo_without_a_gpu_refuses_cuda(capsys):
    code, out, err = run("demo", "--device", "cuda", capsys=capsys)
    assert (code, out) == (2, "")
    assert "--device" in err and "got cuda" in err


def test_demo_refuses_a_report_it_could_not_write(tmp_path, capsys):
    code, out, err = run("demo", "--json", tmp_path / "no" / "folder.json", capsys=capsys)
    assert (code, out) == (2, "") and "--json" in err


def test_check_says_yes(capsys, tmp_path):
    # The config alone will do: no weights are read.
    (tmp_path / "config.json").write_bytes((fixture_path(NEMOTRON) / "config.json").read_bytes())
    code, out, err = run("check", adapter_path(NEMOTRON, "rot13"), "--model", tmp_path, "--json", capsys=capsys)
    assert (code, err) == (0, "")
    result = json.loads(out)
    sites = {site["path"]: site for site in result["sites"]}
    assert result["problems"] == [] and result["model_type"] == "nemotron_h"
    assert sites["model.embeddings"]["ranks"] == [26] and sites["model.embeddings"]["kind"] == "embedding"
    assert sites["lm_head"]["ranks"] == [24] and sites["lm_head"]["scales"] == [2.0]
    assert sites["model.layers.8.mixer.experts.down_proj"]["ranks"] == [5]
    assert sites["model.layers.1.mixer.experts.up_proj"]["scales"] == [4.0]  # alpha_pattern 12 over rank 3
    assert result["max_rank"] == 26 and result["parameters"] > 1000
    code, out, err = run("check", adapter_path(NEMOTRON, "snake"), "--model", tmp_path, capsys=capsys)
    assert (code, err) == (0, "")
    assert "can be served on nemotron_h: 4 sites" in out
    assert max(map(len, out.splitlines()[1:])) <= 120


def test_check_says_what_it_did_not_compare(capsys, tmp_path):
    """Base weights in an adapter must equal the model's; without the model's weights nobody knows."""
    model = fixture_path(NEMOTRON)
    code, out, err = run("check", adapter_path(NEMOTRON, "rot13"), "--model", model, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["base_weights_not_compared"] == [
        "base_model.model.lm_head.base_layer.weight", "base_model.model.model.embeddings.base_layer.weight",
    ]  # fmt: skip
    code, out, err = run("check", adapter_path(NEMOTRON, "rot13"), "--model", model, capsys=capsys)
    assert (code, err) == (0, "")
    assert "not compared" in out and "base_model.model.model.embeddings.base_layer.weight" in out
    code, out, err = run("check", adapter_path(NEMOTRON, "snake"), "--model", model, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["base_weights_not_compared"] == []
    code, out, err = run("check", adapter_path(NEMOTRON, "snake"), "--model", model, capsys=capsys)
    assert code == 0 and "not compared" not in out


def test_check_says_no_and_why(capsys):
    code, out, err = run("check", adapter_path(NEMOTRON, "snake"), "--model", fixture_path(QWEN), capsys=capsys)
    assert (code, out) == (1, "")
    assert "matches no site" in err and "mixer.q_proj" in err
    code, out, err = run(
        "check", adapter_path(NEMOTRON, "snake"), "--model", fixture_path(QWEN), "--json", capsys=capsys
    )
    assert code == 1 and any("mixer.q_proj" in text for text in json.loads(out)["problems"])


def test_check_asks_whether_it_is_another_models_adapter(capsys):
    code, _, err = run("check", adapter_path(NEMOTRON, "leet"), "--model", fixture_path(QWEN), capsys=capsys)
    last = err.splitlines()[-1]
    assert code == 1 and "modules that a qwen3_5_moe" in last and "adapter? Its own config says" in last
    code, _, err = run("check", adapter_path(NEMOTRON, "leet"), "--model", fixture_path(NEMOTRON), capsys=capsys)
    assert (code, err) == (0, "")


def test_check_refuses_what_it_cannot_read(capsys, tmp_path):
    good = adapter_path(NEMOTRON, "snake")
    for argv, what in (
        ((tmp_path, "--model", fixture_path(NEMOTRON)), "ADAPTER_DIR"),
        ((good, "--model", tmp_path), "--model"),
    ):
        code, out, err = run("check", *argv, capsys=capsys)
        assert (code, out) == (2, "") and what in err
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    code, out, err = run("check", good, "--model", tmp_path, capsys=capsys)
    assert (code, out) == (2, "") and "no_such_family" in err
    (tmp_path / "config.json").write_text("{")
    code, out, err = run("check", good, "--model", tmp_path, capsys=capsys)
    assert (code, out) == (2, "") and "--model" in err
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    code, out, err = run("check", good, "--model", tmp_path, capsys=capsys)
    assert (code, out) == (1, "") and "gpt2" in err


@pytest.mark.parametrize("module", ["polylora", "polylora.cli", "polylora_cli"])
def test_the_module_runs_as_a_program(module):
    done = python("-m", module, "info")
    assert done.returncode == 0, done.stderr
    assert "polylora" in done.stdout
