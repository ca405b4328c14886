"""Makes the virtual environment that `make` works in.

Usage: python tools/setup_env.py FOLDER

A torch >= 2.10 that the calling Python already has is used, not replaced: its site-packages become visible in the
environment, so that a tuned or CUDA-specific torch stays the one that runs. Without one, a pinned torch is installed.
Everything already there is kept; nothing outside FOLDER is changed.
"""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
sys.path.insert(0, str(ROOT / "cmake"))

from find_torch import find_torch  # noqa: E402


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):
        raise SystemExit("tools/setup_env.py needs Python >= 3.11, e.g. make PYTHON=python3.12 (the package: 3.10)")
    folder = Path(sys.argv[1]).resolve()
    python = folder / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        print(f"setting up {folder}")
        # one whose making was broken off has no pip: made anew. Nothing but an environment is ever cleared
        venv.create(folder, with_pip=True, clear=(folder / "pyvenv.cfg").exists())
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # The package is built in place and found through a path file. Path files are read in alphabetical order, and an
    # installed polylora may lie beside the parent's torch: this one comes first.
    (site / "00-polylora-in-place.pth").write_text(f"{ROOT / 'python'}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch_dir = find_torch()
    if torch_dir:
        print(f"using torch in {torch_dir}")
        (site / "parent-site-packages.pth").write_text(f"{torch_dir.parent}\n")
    elif not has_torch(python):
        print(f"installing {TORCH}")
        subprocess.run([*pip, TORCH], check=True)
    print("installing the tools of pyproject.toml's dev extra")
    subprocess.run([*pip, *requirements()], check=True)
    return 0


def has_torch(python: Path) -> bool:
    return subprocess.run([python, ROOT / "cmake" / "find_torch.py"], capture_output=True).returncode == 0


def requirements() -> list[str]:
    """What pyproject.toml asks of a developer's environment."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["engines"], *extras["dev"]]
    return [r for r in wanted if not r.startswith(("polylora", "torch"))]


if __name__ == "__main__":
    sys.exit(main())
