"""The source distribution holds what a build needs, and nothing built; a library of other sources is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
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
def sdist(tmp_path_factory) -> set[str]:
    """Names in the archive. Packed from a copy: setuptools leaves an egg-info beside the sources."""
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
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=gztar", "--dist-dir", str(tmp / "dist")]
    subprocess.run(command, cwd=tmp / "tree", check=True, capture_output=True)
    (archive,) = (tmp / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {str(PurePosixPath(*PurePosixPath(m.name).parts[1:])) for m in tar.getmembers() if m.isfile()}


def test_everything_a_build_needs_is_in_the_sdist(sdist):
    assert not [name for name in NEEDED if name not in sdist]
    listed = (ROOT / "csrc").rglob("*.h"), (ROOT / "csrc").rglob("*.c*"), (ROOT / "cmake").glob("*.cmake")
    assert not {str(path.relative_to(ROOT)) for paths in listed for path in paths} - sdist


def test_nothing_built_is_in_the_sdist(sdist):
    built = [n for n in sdist if n.endswith((".so", ".pyc", ".o")) or "stray" in n or n.startswith("build/")]
    assert not built


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
