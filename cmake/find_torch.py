"""Prints the folder of the torch package (>= 2.10) without importing it; exits 1 when there is none.

Not importing matters in an isolated build: there the interpreter's own site-packages are hidden from ``import``,
but a torch in them is the one the user will run with, and its headers are all a build needs.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

MINIMUM = (2, 10)


def find_torch() -> Path | None:
    """Folder of an installed torch >= 2.10, or None."""
    candidates = []
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        candidates.append(Path(spec.origin).parent)
    site = Path(sysconfig.get_paths()["purelib"])
    candidates.append(site / "torch")
    for pth in sorted(site.glob("*.pth")) if site.is_dir() else []:
        candidates += [Path(line.strip()) / "torch" for line in pth.read_text().splitlines() if line.startswith("/")]
    for folder in candidates:
        version = folder / "version.py"
        found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text()) if version.is_file() else None
        if found and tuple(map(int, found.groups())) >= MINIMUM:
            return folder
    return None


if __name__ == "__main__":
    torch_dir = find_torch()
    if torch_dir is None:
        sys.exit(1)
    print(torch_dir)
