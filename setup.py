"""Builds lora_ext._C with CMake against the torch that is installed.

Environment variables: MAX_JOBS (parallel compile jobs), LORA_EXT_CUDA (auto: with CUDA where nvcc
and a CUDA build of torch are; 0: never; 1: or fail), TORCH_CUDA_ARCH_LIST (default 8.0+PTX;9.0a),
CMAKE_BUILD_TYPE (default Release), LORA_EXT_BUILD_DIR (a folder to keep between builds; only with
--no-build-isolation, since it remembers its ninja).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).parent.resolve()

# Run by a Python that ignores the build environment (-I), so that inside pip's build isolation it
# finds the user's torch.
FIND_TORCH = """
import json, torch
from torch.utils.cpp_extension import include_paths
from torch.utils.cpp_extension import TORCH_LIB_PATH
print(json.dumps({"version": torch.__version__, "include": include_paths(),
                  "lib": TORCH_LIB_PATH, "abi": int(torch.compiled_with_cxx11_abi()),
                  "cuda": torch.version.cuda}))
"""


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"lora_ext: {sentence}")


def setting(name: str, default: str) -> str:
    """Of an environment variable; templates of build systems leave those they do not use blank."""
    return os.environ.get(name, "").strip() or default


def check_system() -> None:
    if sys.platform != "linux":
        fail(f"this is {sys.platform}; lora_ext runs on Linux only.")


def find_torch() -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-I", "-c", FIND_TORCH], capture_output=True, text=True
    )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        fail(
            f"no usable torch for {sys.executable} ({reason}); "
            "install torch 2.11 or newer into this environment first, then lora_ext again. (If it "
            "is there, the builder made an environment of its own: use --no-build-isolation.)"
        )
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    major, minor = (int(part) for part in str(found["version"]).split(".")[:2])
    if (major, minor) < (2, 11):
        fail(f"torch {found['version']} is installed; lora_ext needs 2.11 or newer.")
    return found


def check_tools() -> None:
    # CMake takes no other compiler than CXX names, if it does.
    compiler = setting("CXX", "c++")
    known = [compiler.split()[0]] if setting("CXX", "") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, known)):
        fail(f"no C++ compiler: '{compiler}' is not on PATH; install g++ 11 or newer, or set CXX.")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        fail(f"no Python headers: {header} is missing; install python3-dev for this Python.")


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    found = Path(home) / "bin" / "nvcc" if home else shutil.which("nvcc")
    return Path(found).resolve() if found and Path(found).exists() else None


def cuda_architectures(nvcc_release: str) -> dict[str, str]:
    """TORCH_CUDA_ARCH_LIST ("7.5;8.0;9.0a+PTX") in CMake's terms ("80-real;90a"): for the kernels
    that use tensor cores, from sm_80 on; and for the small ones, which every GPU needs."""
    wanted = setting("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a").replace(" ", ";")
    names = []
    for name in filter(None, wanted.split(";")):
        number = name.removesuffix("+PTX").replace(".", "")
        if re.fullmatch(r"[0-9]{2,3}[af]?", number) is None:
            fail(f"TORCH_CUDA_ARCH_LIST has '{name}'; expected numbers such as 8.0 or 9.0a+PTX.")
        names.append(number if name.endswith("+PTX") else f"{number}-real")
    new = [name for name in names if int(re.match("[0-9]+", name)[0]) >= 80]  # type: ignore[index]
    # With its PTX, for GPUs that the list does not name.
    oldest = "70" if int(nvcc_release.partition(".")[0]) < 13 else "75"
    everywhere = [name for name in names if name.partition("-")[0] != oldest]
    return {
        # The host's code refers to them even if no GPU of the list runs them.
        "CMAKE_CUDA_ARCHITECTURES": ";".join(new or ["80-real"]),
        "LORA_EXT_ANY_GPU_ARCHITECTURES": ";".join([oldest, *everywhere]),
    }


def cuda_settings(torch: dict[str, Any]) -> dict[str, str]:
    """CMake's settings of a CUDA build; none for a CPU build."""
    wish = setting("LORA_EXT_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        fail(f"LORA_EXT_CUDA is '{wish}'; expected auto, 0 or 1.")
    nvcc = find_nvcc()
    missing = None
    if torch["cuda"] is None:
        missing = f"torch {torch['version']} is a build without CUDA"
    elif nvcc is None:
        missing = "there is no nvcc on PATH or in CUDA_HOME"
    if wish == "0" or (wish == "auto" and missing):
        return {}
    if missing:
        fail(f"LORA_EXT_CUDA=1, but {missing}; install what is missing, or use auto.")
    assert nvcc is not None
    answer = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    version = answer.partition("release ")[2].partition(",")[0]
    if version.partition(".")[0] != torch["cuda"].partition(".")[0]:
        fail(f"nvcc is CUDA {version}, but torch was built for {torch['cuda']}; set CUDA_HOME.")
    # Beside torch: headers that a toolkit may lack, and the runtime that torch itself loads.
    packages = sorted((Path(torch["lib"]).parents[1] / "nvidia").glob("cu[0-9]*"))
    include = [path for folder in packages if (path := folder / "include").is_dir()]
    folders = [*packages, nvcc.parents[1]]
    runtimes = [path for folder in folders for path in folder.glob("lib*/libcudart.so*")]
    if not runtimes:
        fail("libcudart is neither in the CUDA toolkit nor beside torch; set CUDA_HOME.")
    return {
        "LORA_EXT_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": str(nvcc),
        "CUDA_INCLUDE_DIRS": ";".join(map(str, include)),
        "CUDA_RUNTIME": str(runtimes[0]),
        "TORCH_CUDA_VERSION": torch["cuda"],
    } | cuda_architectures(version)


class CheckedMetadata(dist_info):
    """The metadata, if there is a torch to build for: installers ask for it before they fetch what
    it names, and would fetch gigabytes of another torch first."""

    def run(self) -> None:
        check_system()
        find_torch()
        super().run()


class CMakeBuild(build_ext):
    """build_ext that hands the one extension to CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        check_system()
        check_tools()
        torch = find_torch()
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        settings = {
            "CMAKE_BUILD_TYPE": setting("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(target.parent),
            "TORCH_INCLUDE_DIRS": ";".join(torch["include"]),
            "TORCH_LIBRARY_DIR": torch["lib"],
            "TORCH_CXX11_ABI": torch["abi"],
            "TORCH_VERSION": torch["version"],
            "LORA_EXT_VERSION": self.distribution.get_version(),
            "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "PYBIND11_INCLUDE_DIR": pybind11.get_include(),
            "EXTENSION_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        }
        cuda = cuda_settings(torch)
        settings |= cuda
        kind = f"CUDA {torch['cuda']}" if cuda else "CPU"
        print(
            f"lora_ext: {kind} build for torch {torch['version']}, Python {sys.version.split()[0]}"
        )
        for name, value in settings.items():
            print(f"  {name} = {value}", flush=True)

        # A fresh folder each time: a kept CMakeCache would name the ninja of a deleted build
        # environment.
        with contextlib.ExitStack() as stack:
            folder = setting("LORA_EXT_BUILD_DIR", "") or stack.enter_context(
                tempfile.TemporaryDirectory(prefix="lora_ext_build_")
            )
            configure = ["cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja"]
            configure += [f"-D{name}={value}" for name, value in settings.items()]
            build = ["cmake", "--build", folder]
            if jobs := setting("MAX_JOBS", ""):
                build += ["--parallel", jobs]
            environment = {k: v for k, v in os.environ.items() if k != "CXX" or v.strip()}
            for command in (configure, build):
                if subprocess.run(command, env=environment).returncode != 0:
                    fail(f"'{' '.join(command[:4])} ...' failed; its messages are above.")


if __name__ == "__main__":
    if int(setuptools.__version__.split(".")[0]) < 77:
        fail(f"setuptools {setuptools.__version__} is installed; 77 or newer is needed.")
    setup(
        ext_modules=[Extension("lora_ext._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "dist_info": CheckedMetadata},
    )
