"""setuptools' build backend, plus one thing: torch is a build requirement only where no torch is installed.

A static requirement would make pip download a second torch, of gigabytes, into its isolated build environment. Only
torch's headers and import libraries are needed, and those of an installed torch do (see find_torch.py).
"""

import sys
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403  (a backend is its hooks)
from setuptools.build_meta import get_requires_for_build_editable as _editable
from setuptools.build_meta import get_requires_for_build_wheel as _wheel

sys.path.insert(0, str(Path(__file__).parent))
from find_torch import find_torch


def _torch() -> list[str]:
    return [] if find_torch() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return [*_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings=None):
    return [*_editable(config_settings), *_torch()]
