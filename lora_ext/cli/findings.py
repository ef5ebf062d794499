"""What facts mean: the rules of `doctor`, each with what helps. They look at nothing themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lora_ext.cli.facts import Facts

OK, NOTE, PROBLEM = "ok", "note", "problem"
TORCH = (2, 11)  # the oldest; setup.py refuses others
COMPILERS = {"g++": 11, "clang": 14}  # the oldest with the parts of C++20 that csrc uses
AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir . (in lora_ext's source folder)"

# How the dynamic linker says it, what that means, and what helps.
_LOADER = (
    (
        r"undefined symbol",
        "it was compiled for another torch than the one that is installed (another ABI)",
        f"compile it again for this torch: {AGAIN}",
    ),
    (
        r"lib(torch_cuda|c10_cuda|cudart|cublas)\S*: cannot open shared object",
        "it was compiled for a CUDA build of torch, and a torch without CUDA is installed",
        f"install the CUDA build of torch again, or compile for this one: {AGAIN}",
    ),
    (
        r"GLIBC(XX)?_[\d.]+'? not found",
        "it was compiled on a newer system than this one",
        f"compile it on this machine: {AGAIN}",
    ),
    (
        r"invalid ELF|file too short|wrong ELF class|ELF load command|not a valid",
        "its file is damaged, or of another machine",
        f"compile it again: {AGAIN}",
    ),
    (
        r"LORA_EXT_[A-Z_]+: got",
        "an environment variable has a value that it does not know",
        "unset the variable, or give it one of the values that it expects",
    ),
    (
        r"ended by signal",
        "it ends the process that loads it: its file is damaged, or compiled for another torch",
        f"compile it again: {AGAIN}",
    ),
    (
        r"was built for torch",
        "it was compiled for another release of torch",
        f"compile it again for this torch: {AGAIN}",
    ),
)


@dataclass(frozen=True)
class Finding:
    """One check: what it found, and what helps."""

    check: str
    status: str
    says: str
    cure: str = ""


def examine(facts: Facts) -> list[Finding]:
    """All checks, in the order in which they are to be cured."""
    return [
        *_system(facts),
        *_torch(facts),
        *_dependencies(facts),
        *_package(facts),
        *_extension(facts),
        *_tools(facts),
        *_gpu(facts),
    ]


def _system(facts: Facts) -> Iterator[Finding]:
    if facts.platform != "linux":
        says = f"this is {facts.platform}; lora_ext runs on Linux only"
        yield Finding("system", PROBLEM, says, "use Linux, or WSL 2 on Windows")


def _torch(facts: Facts) -> Iterator[Finding]:
    wanted = "install torch 2.11 or newer, then lora_ext again, which is compiled for it"
    if facts.torch is None:
        says = f"does not import ({facts.torch_error})" if facts.torch_error else "is not installed"
        yield Finding("torch", PROBLEM, says, wanted)
        return
    version = facts.torch["version"]
    if _numbers(version)[:2] < TORCH:
        yield Finding("torch", PROBLEM, f"{version} is too old for lora_ext", wanted)
        return
    kind = f"for CUDA {facts.torch['cuda']}" if facts.torch["cuda"] else "without CUDA"
    yield Finding("torch", OK, f"{version}, {kind}")


def _dependencies(facts: Facts) -> Iterator[Finding]:
    if facts.uninstalled:
        names = " ".join(facts.uninstalled)
        says = f"not installed: {names.replace(' ', ', ')}"
        yield Finding("packages", PROBLEM, says, f"pip install {names}")


def _package(facts: Facts) -> Iterator[Finding]:
    if facts.folder is None:
        yield Finding(
            "package",
            PROBLEM,
            "Python finds no lora_ext from this folder",
            "pip install . in lora_ext's source folder, with this Python",
        )
    elif facts.missing and facts.others:
        yield Finding(
            "package",
            PROBLEM,
            f"{facts.folder} has no compiled extension, and is imported instead of "
            f"{facts.others[0]}, as Python looks there first",
            "start Python in another folder (and take the source folder out of PYTHONPATH), or "
            "compile in place: pip install -e .",
        )
    elif facts.missing:
        cure = "pip install . in lora_ext's source folder, with this Python"
        yield Finding("package", PROBLEM, facts.missing, cure)
    else:
        yield Finding("package", OK, facts.folder)
        for other in facts.others:
            says = f"{other} is another copy, which is not the one that is imported here"
            yield Finding("package", NOTE, says)


def _extension(facts: Facts) -> Iterator[Finding]:
    if facts.build is not None:
        build = facts.build
        kind = f"for CUDA {build['cuda']}" if build["cuda"] else "for CPUs"
        says = f"compiled {kind} and torch {build['torch']}; CPU kernels: {build['cpu_capability']}"
        yield Finding("extension", OK, says)
    elif facts.folder is not None and not facts.missing and _can_import_torch(facts):
        text = facts.import_error.removeprefix("ImportError: ")
        for pattern, meaning, cure in _LOADER:
            if re.search(pattern, text):
                yield Finding("extension", PROBLEM, f"{meaning} ({text})", cure)
                return
        yield Finding("extension", PROBLEM, f"does not import: {text}", AGAIN)


def _can_import_torch(facts: Facts) -> bool:
    return facts.torch is not None and not facts.uninstalled


def _tools(facts: Facts) -> Iterator[Finding]:
    """What compiling needs: a problem only where lora_ext has still to be compiled."""
    bad = NOTE if facts.build is not None else PROBLEM
    only = "; only compiling needs one" if bad == NOTE else ""
    if facts.compiler is None:
        cure = "install g++ 11 or newer, or set CXX"
        yield Finding("compiler", bad, f"there is no C++ compiler{only}", cure)
    else:
        command, version = facts.compiler
        oldest = COMPILERS["clang" if "clang" in command else "g++"]
        if version and _numbers(version)[0] < oldest:
            says = f"{command} {version} is too old for C++20{only}"
            yield Finding("compiler", bad, says, f"install version {oldest} or newer, or set CXX")
        else:
            yield Finding("compiler", OK, f"{command} {version}".rstrip())
    if not facts.headers:
        cure = "install python3-dev for this Python"
        yield Finding("headers", bad, f"Python.h is missing{only.replace('one', 'it')}", cure)


def _gpu(facts: Facts) -> Iterator[Finding]:
    """Whether a GPU that is there is used, and what stands in the way."""
    if facts.torch is None:
        return
    bad = PROBLEM if facts.gpus else NOTE  # without a GPU nobody misses its kernels
    wanted = facts.torch["cuda"]
    if facts.gpus and not wanted:
        says = f"{facts.gpus[0]} is not used, as this torch is a build without CUDA"
        cure = "install the CUDA build of torch (pytorch.org says how), then lora_ext again"
        yield Finding("gpu", PROBLEM, says, cure)
        return
    if not wanted:
        yield Finding("gpu", OK, "none here, and none that torch could use")
        return
    if facts.gpus and not facts.torch["available"]:
        says = f"torch finds no CUDA device, nvidia-smi finds {facts.gpus[0]}"
        cure = f"install a driver for CUDA {wanted}, and look at CUDA_VISIBLE_DEVICES"
        yield Finding("gpu", PROBLEM, says, cure)
    elif facts.gpus:
        yield Finding("gpu", OK, ", ".join(facts.gpus))
    else:
        yield Finding("gpu", OK, "none here")
    has_kernels = facts.build is not None and facts.build["cuda"]
    if has_kernels:
        return
    if not facts.nvcc:
        says = f"there is none, so lora_ext has no CUDA kernels although torch has CUDA {wanted}"
        cure = f"install the CUDA toolkit {wanted} (or set CUDA_HOME), then compile again: {AGAIN}"
        yield Finding("nvcc", bad, says, cure)
    elif _numbers(facts.nvcc)[0] != _numbers(wanted)[0]:
        says = f"is CUDA {facts.nvcc}, but torch was built for CUDA {wanted}"
        cure = f"set CUDA_HOME to a toolkit of CUDA {_numbers(wanted)[0]}, then compile: {AGAIN}"
        yield Finding("nvcc", bad, says, cure)
    elif facts.build is not None:
        says = f"CUDA {facts.nvcc} fits torch, but lora_ext was compiled without CUDA"
        yield Finding("nvcc", bad, says, f"compile again: LORA_EXT_CUDA=1 {AGAIN}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0]))
