"""The plugin's register(): when SGLang can be started with polylora's backend, and when it stays as it is."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import subprocess
import sys

import pytest
import sglang_source

sglang_source.require_sglang()

import polylora  # noqa: E402
import polylora_sglang  # noqa: E402
import sglang  # noqa: E402
from sglang.srt import plugins  # noqa: E402
from sglang.srt.lora.backend import lora_registry  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402


@pytest.fixture(autouse=True)
def fresh(monkeypatch, caplog):
    """A supported SGLang that does not know polylora."""
    monkeypatch.delenv("POLYLORA_SGLANG", raising=False)
    monkeypatch.setattr(sglang, "__version__", "0.5.23")
    monkeypatch.setattr(lora_registry, "LORA_SUPPORTED_BACKENDS", dict(lora_registry.LORA_SUPPORTED_BACKENDS))
    lora_registry.LORA_SUPPORTED_BACKENDS.pop("polylora", None)
    choices = choices_of_lora_backend()
    before = [choice for choice in choices if choice != "polylora"]
    choices[:] = before
    caplog.set_level(logging.INFO, logger="sglang.polylora")
    yield
    choices[:] = before


def choices_of_lora_backend() -> list[str]:
    (action,) = (a for a in parser()._actions if a.dest == "lora_backend")
    return action.choices


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass

    add_cli_args_from_dataclass(made, ServerArgs, fields=["model_path", "enable_lora", "lora_backend"])
    return made


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "sglang.polylora"]


def test_the_backend_can_be_chosen(caplog):
    polylora_sglang.register()
    polylora_sglang.register()
    args = parser().parse_args(["--model-path", "m", "--enable-lora", "--lora-backend", "polylora"])
    assert args.lora_backend == "polylora" and choices_of_lora_backend().count("polylora") == 1
    backend = lora_registry.get_backend_from_name("polylora")
    assert (backend.__name__, backend.name) == ("PolyloraLoRABackend", "polylora") and said(caplog) == []


def test_other_backends_stay():
    before = dict(lora_registry.LORA_SUPPORTED_BACKENDS)
    polylora_sglang.register()
    after = dict(lora_registry.LORA_SUPPORTED_BACKENDS)
    after.pop("polylora")
    assert after == before and parser().get_default("lora_backend") == "csgmv"


def test_sglang_calls_the_entry_point(monkeypatch):
    """As SGLang does in every process: by its group, and once."""
    point = importlib.metadata.EntryPoint("polylora", "polylora_sglang:register", plugins.GENERAL_PLUGINS_GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    plugins.load_plugins()
    assert "polylora" in lora_registry.LORA_SUPPORTED_BACKENDS


def test_the_group_of_the_entry_point():
    """test_packaging.py says what the package declares in it."""
    assert plugins.GENERAL_PLUGINS_GROUP == "sglang.srt.plugins"


def left_alone() -> None:
    polylora_sglang.register()
    with pytest.raises(ValueError, match="Invalid backend: polylora"):
        lora_registry.get_backend_from_name("polylora")
    with pytest.raises(SystemExit):
        parser().parse_args(["--model-path", "m", "--lora-backend", "polylora"])


def test_switched_off(monkeypatch, caplog):
    monkeypatch.setenv("POLYLORA_SGLANG", "0")
    left_alone()
    assert said(caplog) == []


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.5.2", "0.5.230", "0.6.0", "0.0.0.dev0"])
def test_unknown_version(monkeypatch, caplog, version):
    monkeypatch.setattr(sglang, "__version__", version)
    left_alone()
    assert said(caplog) == [
        f"polylora: SGLang {version} is not among the versions it knows (0.5.23); there is no --lora-backend polylora."
    ]


@pytest.mark.parametrize("version", ["0.5.23", "0.5.23.post1", "0.5.23+cu130"])
def test_known_version(monkeypatch, version):
    monkeypatch.setattr(sglang, "__version__", version)
    polylora_sglang.register()
    assert "polylora" in lora_registry.LORA_SUPPORTED_BACKENDS


def test_built_without_cuda(monkeypatch):
    """The backend that was asked for refuses to start: nothing takes its place."""
    monkeypatch.setattr(polylora, "has_cuda_kernels", lambda: False)
    polylora_sglang.register()
    with pytest.raises(RuntimeError, match="without CUDA kernels; choose another --lora-backend"):
        lora_registry.get_backend_from_name("polylora")(4, "cuda", None)


def test_the_entry_point_loads_nothing():
    """SGLang swallows what goes wrong while it loads an entry point; so nothing may."""
    code = "import sys, polylora_sglang; assert not {'torch', 'polylora', 'sglang'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
