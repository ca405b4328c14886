"""Fixtures of the op tests: device, dtype, kernel path; the trap marker; hypothesis without surprises in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Kernel variants that the environment variable POLYLORA_PATH forces, by device; None: whatever the op picks, which for
# few rows is "cluster". Where one does not serve a call, the tests let the op pick (cases.py).
# A run with POLYLORA_PATH set in its environment tests that variant alone.
PATHS: dict[str, list[str | None]] = {"cpu": [None], "cuda": [None, "wide", "mma", "general"]}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than 20 seconds")
    config.addinivalue_line("markers", "cuda_only: says something about a GPU alone")
    config.addinivalue_line("markers", "trap(*numbers): covers these known failures of other LoRA kernels")
    try:
        import torch
    except ImportError:
        return
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
    try:
        from hypothesis import settings
    except ImportError:
        return
    settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40, print_blob=True)
    settings.register_profile("search", deadline=None, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """device: any test that asks for it. dtype and path: the op tests. What a test parametrises itself is its own."""
    own = {name for mark in metafunc.definition.iter_markers("parametrize") for name in argument_names(mark)}
    wanted = {"device", "dtype", "path"} & set(metafunc.fixturenames) - own
    if not metafunc.module.__name__.split(".")[-1].startswith("test_ops_"):
        wanted &= {"device"}
    if not wanted:
        return
    import torch

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if metafunc.definition.get_closest_marker("cuda_only"):
        devices = ["cuda"]
    if "path" in wanted:
        forced = os.environ.get("POLYLORA_PATH")
        both = [(device, path) for device in devices for path in ([forced] if forced else PATHS[device])]
        names = [f"{device}-{path or 'auto'}" for device, path in both]
        metafunc.parametrize(("device", "path"), both, ids=names, indirect=["path"])
    elif "device" in wanted:
        metafunc.parametrize("device", devices)
    if "dtype" in wanted:
        metafunc.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])


def argument_names(mark: pytest.Mark) -> list[str]:
    names = mark.args[0] if mark.args else mark.kwargs["argnames"]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The kernel variant under test. Ops read POLYLORA_PATH at every call."""
    if request.param is not None:
        monkeypatch.setenv("POLYLORA_PATH", request.param)
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Ops as small as a test's only lose by being cut up, above all where other tests run beside them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batch_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reduction order for all batch sizes. Ops read POLYLORA_BATCH_INVARIANT at every call."""
    monkeypatch.setenv("POLYLORA_BATCH_INVARIANT", "1")
