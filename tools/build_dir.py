"""Prints CMake's build folder, as setup.py chooses it."""

import os
import sys
import sysconfig

default = f"build/{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
print(os.environ.get("POLYLORA_BUILD_DIR", default))
