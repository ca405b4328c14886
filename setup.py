"""Builds polylora by driving CMake. Options through the environment:

POLYLORA_CUDA        ON, OFF or AUTO (default): compile the CUDA kernels when nvcc is found
POLYLORA_CUDA_ARCHS  CMake's list of architectures, e.g. "90a-real" (default: all this nvcc knows from 8.0 on)
POLYLORA_BENCH       1: build the C++ microbenchmarks too (docs/benchmarks.md)
POLYLORA_BUILD_DIR   CMake's build folder (default: build/<platform>-<python>)
MAX_JOBS             parallel compile jobs (default: the number of cores)
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """One CMake build makes every library of the package; setuptools only has to know that there is one."""

    def run(self) -> None:
        package = ROOT / "python" / "polylora" if self.inplace else Path(self.build_lib).resolve() / "polylora"
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = Path(os.environ.get("POLYLORA_BUILD_DIR", ROOT / "build" / (tag if self.inplace else f"wheel-{tag}")))
        # the environment's own cmake and ninja come first; an isolated build has its own on PATH
        path = os.environ["PATH"]
        if self.inplace:
            path = os.pathsep.join([sysconfig.get_path("scripts"), path])
        cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
        if cmake is None:
            raise SystemExit("polylora: building needs cmake >= 3.24: pip install cmake ninja")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            # said anew each time: an isolated build's tools are gone when the next one comes
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPOLYLORA_OUTPUT_DIR={package}",
            f"-DPOLYLORA_CUDA={os.environ.get('POLYLORA_CUDA', 'AUTO')}",
            f"-DPOLYLORA_TESTS={'ON' if self.inplace else 'OFF'}",
            f"-DPOLYLORA_BENCH={'ON' if os.environ.get('POLYLORA_BENCH') == '1' else 'OFF'}",
        ]
        if "POLYLORA_CUDA_ARCHS" in os.environ:
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['POLYLORA_CUDA_ARCHS']}")
        if ninja and not (build / "Makefile").exists():
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "polylora"
        return [str(p) for p in [*package.glob("_host*.so"), *package.glob("lib/*.so")]]


setup(
    packages=find_packages("python"),
    py_modules=["polylora_cli", "polylora_sglang", "polylora_vllm"],
    package_dir={"": "python"},
    package_data={"polylora.fixtures": ["*.json", "*.md", "*.txt", "*/*.json", "*/*.safetensors", "*/adapters/*/*"]},
    ext_modules=[Extension("polylora._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
