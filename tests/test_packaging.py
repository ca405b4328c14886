"""The source distribution holds what a build needs, and nothing built; what is installed tells engines of its plugins;
a library of other sources is refused.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import EntryPoint, PathDistribution
from pathlib import Path, PurePosixPath

import pytest
import torch
from polylora._library import load_library

ROOT = Path(__file__).parents[1]
NEEDED = [
    ".clang-format",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "cmake/build_backend.py",
    "cmake/find_torch.py",
    "csrc/ops/ops.cpp",
    "examples/CMakeLists.txt",
    "examples/integration.cpp",
    "pyproject.toml",
    "python/polylora/fixtures/held_out.txt",
    "python/polylora/table.py",
    "python/polylora_cli.py",
    "setup.py",
    "tests/conftest.py",
    "tools/setup_env.py",
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources: setuptools leaves an egg-info beside them."""
    if not (ROOT / "MANIFEST.in").exists():
        pytest.skip("not a source checkout")
    tmp = tmp_path_factory.mktemp("sdist")
    # With what an in-place build leaves in the tree, but without caches, which other tests write meanwhile.
    left_out = shutil.ignore_patterns(".[!c]*", "__pycache__", "build", "dist", "*.egg-info", "*.safetensors")
    shutil.copytree(ROOT, tmp / "tree", ignore=left_out)
    (tmp / "tree/csrc/ops/stray.so").touch()
    for stray in ("__pycache__/stray.cpython-311.pyc", ".hypothesis/stray"):
        (tmp / "tree/tests" / stray).parent.mkdir()
        (tmp / "tree/tests" / stray).touch()
    return tmp / "tree"


@pytest.fixture(scope="module")
def sdist(tree) -> set[str]:
    """Names in the archive."""
    dist = tree.parent / "dist"
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=gztar", "--dist-dir", str(dist)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {str(PurePosixPath(*PurePosixPath(m.name).parts[1:])) for m in tar.getmembers() if m.isfile()}


def test_everything_a_build_needs_is_in_the_sdist(sdist):
    assert not [name for name in NEEDED if name not in sdist]
    listed = (ROOT / "csrc").rglob("*.h"), (ROOT / "csrc").rglob("*.c*"), (ROOT / "cmake").glob("*.cmake")
    assert not {str(path.relative_to(ROOT)) for paths in listed for path in paths} - sdist


def test_nothing_built_is_in_the_sdist(sdist):
    built = [n for n in sdist if n.endswith((".so", ".pyc", ".o")) or "stray" in n or n.startswith("build/")]
    assert not built


# ------------------------------------------------------------------------------------------------- plugins of engines

# of which the tests of each plugin say that the group is its engine's
PLUGINS = [("vllm", "vllm.general_plugins", "POLYLORA_VLLM"), ("sglang", "sglang.srt.plugins", "POLYLORA_SGLANG")]


@pytest.fixture(scope="module")
def installed(tree) -> PathDistribution:
    """The metadata that is installed."""
    (tree.parent / "info").mkdir()
    command = [sys.executable, "setup.py", "-q", "dist_info", "--output-dir", str(tree.parent / "info")]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (info,) = (tree.parent / "info").glob("*.dist-info")
    return PathDistribution(info)


def call(point: EntryPoint, engine: str, **environment: str) -> subprocess.CompletedProcess:
    """Loads and calls an entry point as an engine does, where neither the engine nor torch can be imported."""
    fields = (point.name, point.value, point.group)
    code = (
        f"import sys; sys.modules.update(torch=None, {engine}=None)\n"
        f"from importlib.metadata import EntryPoint; EntryPoint{fields}.load()()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("engine", "group", "switch"), PLUGINS)
def test_engines_find_the_plugin_where_the_package_is_installed(installed, engine, group, switch):
    (point,) = installed.entry_points.select(group=group)
    assert (point.name, point.value) == ("polylora", f"polylora_{engine}:register")
    result = call(point, engine, **{switch: "0"})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_vllms_plugin_raises_nothing(installed):
    """vLLM calls it in every process and does not catch what it raises."""
    (point,) = installed.entry_points.select(group="vllm.general_plugins")
    result = call(point, "vllm", POLYLORA_VLLM="1")
    assert result.returncode == 0 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("polylora: this vLLM cannot be given its kernels (ModuleNotFoundError: ")


@pytest.mark.parametrize("name", ["polylora", "polylora_meta"])
def test_a_library_built_from_other_sources_is_refused(name, monkeypatch):
    """As new Python over an older library finds it: an op is not there yet."""
    known = torch._C._jit_get_schemas_for_operator
    monkeypatch.setattr(
        torch._C, "_jit_get_schemas_for_operator", lambda op: [] if op == f"{name}::moe_act" else known(op)
    )
    with pytest.raises(ImportError, match=rf"other sources, it has no {name}::moe_act; .*make build"):
        load_library()
    monkeypatch.undo()
    load_library()
