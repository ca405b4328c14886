"""The plugin's register(): when vLLM gets polylora's wrapper, and when it stays as it is."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import subprocess
import sys

import pytest
import vllm_source

vllm_source.require_vllm()

import polylora  # noqa: E402
import polylora_vllm  # noqa: E402
import vllm  # noqa: E402
import vllm.platforms  # noqa: E402
from vllm import plugins  # noqa: E402
from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper  # noqa: E402
from vllm.platforms.interface import Platform, PlatformEnum  # noqa: E402

CONFIG = {"max_lora_rank": 16, "max_loras": 2, "lora_dtype": "bfloat16"}
ADDRESS = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"


def cuda_platform() -> Platform:
    class Machine(Platform):
        _enum = PlatformEnum.CUDA

        @classmethod
        def get_punica_wrapper(cls) -> str:
            return ADDRESS

    return Machine()


@pytest.fixture
def machine(monkeypatch, caplog):
    """A supported vLLM on a CUDA platform and a polylora with CUDA kernels; LoRAConfig as it was, afterwards."""
    monkeypatch.delenv("POLYLORA_VLLM", raising=False)
    monkeypatch.setattr(vllm, "__version__", "0.26.0")
    monkeypatch.setattr(polylora, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(LoRAConfig, "compute_hash", LoRAConfig.compute_hash)
    caplog.set_level(logging.INFO, logger="vllm.polylora")
    platform = cuda_platform()
    monkeypatch.setattr(vllm.platforms, "_current_platform", platform)
    for cached in (polylora_vllm._loads, polylora_vllm._say):
        cached.cache_clear()
    yield platform
    for cached in (polylora_vllm._loads, polylora_vllm._say):
        cached.cache_clear()


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "vllm.polylora"]


def test_vllm_asks_for_our_wrapper(machine, caplog, monkeypatch):
    monkeypatch.setattr("vllm.lora.punica_wrapper.punica_selector.current_platform", machine)
    polylora_vllm.register()
    wrapper = get_punica_wrapper(64, 8, device="cpu", lora_config=LoRAConfig(**CONFIG))
    assert f"{type(wrapper).__module__}.{type(wrapper).__name__}" == polylora_vllm.WRAPPER
    assert said(caplog) == []


def test_vllm_calls_the_entry_point(machine, caplog, monkeypatch):
    """As vLLM does in every process: by its group, and once."""
    point = importlib.metadata.EntryPoint("polylora", "polylora_vllm:register", plugins.DEFAULT_PLUGINS_GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    plugins.load_general_plugins()
    assert machine.get_punica_wrapper() == polylora_vllm.WRAPPER and said(caplog) == []


@pytest.mark.parametrize("before, after", [("", "POLYLORA_"), ("A_,B_", "A_,B_,POLYLORA_"), ("POLYLORA_", "POLYLORA_")])
def test_ray_workers_get_the_variables(machine, monkeypatch, before, after):
    name = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    monkeypatch.setenv(name, before)
    for variable in [key for key in os.environ if key.startswith("POLYLORA_")]:
        monkeypatch.delenv(variable)
    polylora_vllm.register()
    assert os.environ[name] == before
    monkeypatch.setenv("POLYLORA_VLLM_BESIDE", "0")
    polylora_vllm.register()
    assert os.environ[name] == after
    copied = importlib.import_module("vllm.ray.ray_env").get_env_vars_to_copy()
    assert "POLYLORA_VLLM_BESIDE" in copied


def test_the_group_of_the_entry_point():
    """test_packaging.py says what the package declares in it."""
    assert plugins.DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"


def test_a_server_without_lora_does_not_load_the_package(machine, monkeypatch):
    """vLLM asks for a wrapper, and for the hash of the LoRA settings, where there is LoRA alone."""
    loaded = []
    monkeypatch.setattr(importlib, "import_module", lambda name: loaded.append(name) or polylora)
    polylora_vllm.register()
    assert not loaded
    LoRAConfig(**CONFIG).compute_hash()
    assert set(loaded) == {"polylora"}
    machine.get_punica_wrapper()
    assert set(loaded) == {"polylora", "polylora.vllm_plugin.wrapper"}


def test_compile_caches_do_not_mix(machine):
    before = LoRAConfig(**CONFIG).compute_hash()
    polylora_vllm.register()
    after = LoRAConfig(**CONFIG).compute_hash()
    assert after == f"{before}-polylora-{polylora.__version__}"
    polylora_vllm.register()
    assert LoRAConfig(**CONFIG).compute_hash() == after
    assert LoRAConfig(**{**CONFIG, "max_loras": 3}).compute_hash() != after


def left_alone(machine, caplog) -> list[str]:
    before = LoRAConfig(**CONFIG).compute_hash()
    polylora_vllm.register()
    polylora_vllm.register()
    assert machine.get_punica_wrapper() == ADDRESS
    assert LoRAConfig(**CONFIG).compute_hash() == before
    return said(caplog)


def test_switched_off(machine, caplog, monkeypatch):
    monkeypatch.setenv("POLYLORA_VLLM", "0")
    assert left_alone(machine, caplog) == []


@pytest.mark.parametrize("version", ["0.25.1", "0.27.0", "0.2.6", "0.260.0", "1.0", "dev"])
def test_unknown_version(machine, caplog, monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    assert left_alone(machine, caplog) == [
        f"polylora: vLLM {version} is not among the versions it knows (0.26, 0.33); vLLM's own LoRA kernels stay."
    ]


@pytest.mark.parametrize("version", ["0.26.0", "0.26.3+cu130", "0.33.0", "0.33.1.dev4"])
def test_known_version(machine, caplog, monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    polylora_vllm.register()
    assert machine.get_punica_wrapper() == polylora_vllm.WRAPPER and not said(caplog)


def test_other_platform(machine, caplog, monkeypatch):
    type(machine)._enum = PlatformEnum.ROCM
    assert left_alone(machine, caplog) == [
        "polylora: the platform is not CUDA (Machine); vLLM's own LoRA kernels stay."
    ]


def test_built_without_cuda(machine, caplog, monkeypatch):
    monkeypatch.setattr(polylora, "has_cuda_kernels", lambda: False)
    assert left_alone(machine, caplog) == [
        "polylora: its library was built without CUDA kernels; vLLM's own LoRA kernels stay."
    ]


def test_library_that_does_not_load(machine, caplog, monkeypatch):
    def refuse(name):
        raise ImportError("polylora: lib/libpolylora_ops.so is missing")

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert left_alone(machine, caplog) == [
        "polylora: it cannot be loaded (ImportError: polylora: lib/libpolylora_ops.so is missing); "
        "vLLM's own LoRA kernels stay."
    ]


def test_wrapper_that_does_not_load(machine, caplog, monkeypatch):
    """As a later patch of vLLM might bring about."""

    def refuse(name):
        if name == "polylora":
            return polylora
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    polylora_vllm.register()
    assert machine.get_punica_wrapper() == ADDRESS
    assert said(caplog) == [
        "polylora: it cannot be loaded (ImportError: no polylora.vllm_plugin.wrapper); vLLM's own LoRA kernels stay."
    ]


def test_nothing_is_raised_into_vllm(machine, caplog, monkeypatch):
    """vLLM does not catch what a plugin raises when it is called."""

    def fail():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(machine, "is_cuda", fail, raising=False)
    assert left_alone(machine, caplog) == [
        "polylora: this vLLM cannot be given its kernels (RuntimeError: no such thing); vLLM's own LoRA kernels stay."
    ]


def test_the_entry_point_loads_nothing():
    """vLLM swallows what goes wrong while it loads an entry point; so nothing may."""
    code = "import sys, polylora_vllm; assert not {'torch', 'polylora', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
