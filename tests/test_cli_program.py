"""`python -m lora_ext` as a process of its own: what it imports, and what `doctor` finds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from cli_runs import ROOT, program

import lora_ext
from lora_ext import _startup
from lora_ext.cli.facts import Facts
from lora_ext.cli.findings import NOTE, OK, PROBLEM, examine

PACKAGE = Path(lora_ext.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# What is imported by and with lora_ext, beside itself and torch: small modules.
WITH_LORA_EXT = {"safetensors"}
SLOW = {"rich", "regex", "numpy", "transformers", "peft", "click", "statistics", "decimal"}


def python(script: str, *flags: str, path: str = str(ROOT), cwd: str = "/") -> str:
    """What a script prints."""
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, *flags, "-c", script]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_nothing_slow() -> None:
    """Milliseconds depend on the machine; these are what would take them."""
    script = (
        "import sys, torch; before = set(sys.modules); import lora_ext; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - {'torch'}), "
        "sum(name.startswith('lora_ext') for name in sys.modules))"
    )
    *packages, count = python(script).split()
    assert set(packages) - set(sys.stdlib_module_names) == {"lora_ext", *WITH_LORA_EXT}
    assert not SLOW & set(packages) and int(count) <= 147


def test_what_is_of_quantized_bases_is_imported_when_one_is_met() -> None:
    script = """
import sys, torch, lora_ext
names = ("lora_ext.quant.", "lora_ext.nn.quant")
imported = lambda: [name for name in sys.modules if name.startswith(names)]
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
lora_ext.get_lora_model(model, lora_ext.LoraConfig(target_modules=["0"])).merge_and_unload()
lora_ext.prepare_model_for_kbit_training(model)
print(*imported(), end=" | ")
lora_ext.quant.quantize_(model)
adapted = lora_ext.get_lora_model(model, lora_ext.LoraConfig(target_modules=["0"]))
print(callable(lora_ext.quant.quantize), type(adapted.base_model[0]).__name__, len(imported()) > 10)
"""
    assert python(script).strip() == "lora_ext.quant.kinds | True QuantizedLinear True"


def test_help_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['lora-ext', 'inspect', '--help']; "
        "from lora_ext.cli import main; code = main(); "
        "print([n for n in ('torch', 'numpy', 'rich', 'safetensors') if n in sys.modules], code)"
    )
    assert python(script).splitlines()[-1] == "[] 0"
    found = program("--help", cwd=tmp_path)
    assert found.code == 0 and found.err == ""
    for name in ("info", "doctor", "inspect", "verify", "diff", "merge", "convert", "explain"):
        assert f"  {name} " in found.out
    assert program(cwd=tmp_path).code == program("nothing", cwd=tmp_path).code == 2


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["-m", "doctor"], ["python", "-m", "lora_ext", "doctor"], True),
        (["-m"], ["python", "-X", "importtime", "-Im", "lora_ext"], True),
        (["-m"], ["python", "-mlora_ext"], True),
        (["/usr/bin/lora-ext", "info"], ["python", "/usr/bin/lora-ext", "info"], True),
        (["-m"], ["python", "-m", "lora_ext.bench"], False),
        (["-m"], ["python", "-m", "pytest", "-m", "lora_ext"], False),
        (["-c"], ["python", "-c", "import lora_ext", "-m", "lora_ext"], False),
        (["train.py"], ["python", "train.py", "-m", "lora_ext"], False),
        ([""], ["python"], False),
    ],
)
def test_only_the_program_imports_late(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], orig_argv: list[str], expected: bool
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    monkeypatch.setattr(_startup, "_asked", False)
    assert _startup.is_program() is expected


def test_the_program_has_all_names_when_they_are_asked_for() -> None:
    script = (
        "import sys; sys.argv = ['lora-ext']; import lora_ext; assert 'torch' not in sys.modules; "
        "assert not hasattr(lora_ext, 'nothing'); assert 'torch' not in sys.modules; "
        "from lora_ext import nn, LoraConfig; import lora_ext.nn; "
        "assert nn is lora_ext.nn and lora_ext.LoraConfig is LoraConfig; "
        "print(all(hasattr(lora_ext, name) for name in lora_ext.__all__))"
    )
    assert python(script) == "True\n"


# ---- doctor: what is really there ---------------------------------------------------------------


def copy_without_extension(folder: Path) -> Path:
    """lora_ext's Python files; the folder to put on Python's path."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, folder / "lora_ext", ignore=ignored)
    return folder


def doctor(path: str, cwd: Path, flags: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    found = program("doctor", "--json", cwd=cwd, path=path, flags=flags)
    assert found.err == "", found
    data = json.loads(found.out)
    checks = {one["check"]: one for one in data["checks"]}
    problems = sum(one["status"] == PROBLEM for one in data["checks"])
    assert data["problems"] == problems and found.code == (1 if problems else 0)
    assert all(one["cure"] for one in data["checks"] if one["status"] == PROBLEM)
    return found.code, checks


def test_doctor_where_all_is_well(tmp_path: Path) -> None:
    _, checks = doctor(str(ROOT), tmp_path)
    assert checks["package"]["says"] == str(PACKAGE)
    for name in ("torch", "package", "extension", "compiler"):
        assert checks[name]["status"] == OK, checks


def test_doctor_where_the_source_folder_is_found_first(tmp_path: Path) -> None:
    source = copy_without_extension(tmp_path / "source")
    (source / "setup.py").touch()
    # Started in the source folder, which has no extension, with one installed.
    code, checks = doctor(str(ROOT), source)
    assert code == 1 and checks["package"]["status"] == PROBLEM
    assert f"is imported instead of {PACKAGE}" in checks["package"]["says"]
    assert "start Python in another folder" in checks["package"]["cure"]
    assert checks["torch"]["status"] == OK and "extension" not in checks
    # And with none installed: not built.
    code, checks = doctor(str(source), tmp_path)
    assert code == 1 and "without a compiled extension" in checks["package"]["says"]
    assert "pip install ." in checks["package"]["cure"]
    # Every other command says so in one sentence.
    found = program("info", cwd=tmp_path, path=str(source))
    assert found.code == 1 and len(found.err.splitlines()) == 1 and not found.out
    assert "without a compiled extension" in found.err and "lora-ext doctor" in found.err


@pytest.mark.parametrize("case", ["another ABI", "damaged", "crash"])
def test_doctor_with_an_extension_that_does_not_load(tmp_path: Path, case: str) -> None:
    copy = copy_without_extension(tmp_path / "copy")
    target = copy / "lora_ext" / f"_C{SUFFIX}"
    if case == "damaged":
        target.write_bytes((PACKAGE / f"_C{SUFFIX}").read_bytes()[:10_000])
    else:
        body = "*(volatile int*)0 = 1; return 0;" if case == "crash" else "return gone();"
        source = tmp_path / "gone.cpp"
        source.write_text(f'void* gone(); extern "C" void* PyInit__C() {{ {body} }}')
        command = ["c++", "-shared", "-fPIC", "-o", str(target), str(source)]
        subprocess.run(command, check=True)
    code, checks = doctor(str(copy), tmp_path)
    expected = {
        "another ABI": "compiled for another torch",
        "damaged": "its file is damaged",
        "crash": "Python was ended by signal 11",
    }[case]
    assert code == 1 and checks["package"]["status"] == OK
    assert expected in checks["extension"]["says"], checks
    assert "pip install --force-reinstall" in checks["extension"]["cure"]


def test_doctor_without_torch(tmp_path: Path) -> None:
    """A Python without its packages, but for click."""
    copy = copy_without_extension(tmp_path / "copy")
    (copy / "click").symlink_to(Path(click.__file__).parent)
    code, checks = doctor(str(copy), tmp_path, ("-S",))
    assert code == 1 and checks["torch"]["says"] == "is not installed"
    assert "install torch 2.11 or newer" in checks["torch"]["cure"]
    assert "safetensors" in checks["packages"]["cure"]
    shutil.rmtree(copy / "click", ignore_errors=True)
    (copy / "click").unlink(missing_ok=True)
    found = program("doctor", cwd=tmp_path, path=str(copy), flags=("-S",))
    assert found.code == 2 and found.err.splitlines() == [
        "lora-ext: click is not installed, which the command line needs: pip install click"
    ]


# ---- doctor: what facts mean --------------------------------------------------------------------

CUDA = {"version": "2.13.0+cu130", "cuda": "13.0", "available": True, "folder": "/torch"}
WELL = Facts(
    torch=CUDA,
    folder="/site-packages/lora_ext",
    build={"torch": "2.13.0+cu130", "cuda": "13.0", "cpu_capability": "avx2"},
    gpus=["NVIDIA H100"],
    nvcc="13.0",
    compiler=("c++ (g++)", "13.2.0"),
)
NO_CUDA_BUILD = {"torch": "2.13.0+cu130", "cuda": None, "cpu_capability": "avx2"}
CPU = CUDA | {"version": "2.13.0+cpu", "cuda": None, "available": False}
# What is not well, the check, its status, and words of what it says or of the cure.
RULES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "not Linux": ({"platform": "darwin"}, "system", PROBLEM, "Linux only"),
    "no torch": ({"torch": None}, "torch", PROBLEM, "is not installed"),
    "broken torch": ({"torch": None, "torch_error": "OSError: x"}, "torch", PROBLEM, "OSError: x"),
    "old torch": ({"torch": CUDA | {"version": "2.9.1"}}, "torch", PROBLEM, "2.9.1 is too old"),
    "no numpy": ({"uninstalled": ["numpy"]}, "packages", PROBLEM, "pip install numpy"),
    "no package": ({"folder": None, "build": None}, "package", PROBLEM, "finds no lora_ext"),
    "not built": ({"missing": "holds none", "build": None}, "package", PROBLEM, "pip install ."),
    "source folder": (
        {"missing": "x", "others": ["/good"], "build": None},
        "package",
        PROBLEM,
        "instead of /good",
    ),
    "two copies": ({"others": ["/other"]}, "package", NOTE, "/other is another copy"),
    "another release": (
        {
            "build": None,
            "import_error": "ImportError: lora_ext was built for torch 2.11.0, but torch 2.13.0",
        },
        "extension",
        PROBLEM,
        "another release of torch",
    ),
    "torch without CUDA": (
        {
            "build": None,
            "import_error": "libc10_cuda.so: cannot open shared object file: No such file",
        },
        "extension",
        PROBLEM,
        "a torch without CUDA is installed",
    ),
    "newer libstdc++": (
        {"build": None, "import_error": "version `GLIBCXX_3.4.32' not found"},
        "extension",
        PROBLEM,
        "newer system",
    ),
    "environment": (
        {"build": None, "import_error": "RuntimeError: LORA_EXT_CPU_CAPABILITY: got 'x'"},
        "extension",
        PROBLEM,
        "unset the variable",
    ),
    "anything else": (
        {"build": None, "import_error": "ImportError: oops"},
        "extension",
        PROBLEM,
        "does not import: oops",
    ),
    "no compiler, built": ({"compiler": None}, "compiler", NOTE, "only compiling needs one"),
    "no compiler": (
        {"compiler": None, "build": None, "missing": "x"},
        "compiler",
        PROBLEM,
        "no C++ compiler",
    ),
    "old compiler": (
        {"compiler": ("g++ (g++)", "9.4.0"), "build": None, "missing": "x"},
        "compiler",
        PROBLEM,
        "9.4.0 is too old",
    ),
    "no headers": ({"headers": False}, "headers", NOTE, "python3-dev"),
    "GPU, torch for CPUs": ({"torch": CPU}, "gpu", PROBLEM, "build without CUDA"),
    "old driver": (
        {"torch": CUDA | {"available": False}},
        "gpu",
        PROBLEM,
        "driver for CUDA 13.0",
    ),
    "no nvcc": ({"build": NO_CUDA_BUILD, "nvcc": ""}, "nvcc", PROBLEM, "CUDA toolkit 13.0"),
    "no nvcc, no GPU": (
        {"build": NO_CUDA_BUILD, "nvcc": "", "gpus": []},
        "nvcc",
        NOTE,
        "no CUDA kernels",
    ),
    "another CUDA": (
        {"build": NO_CUDA_BUILD, "nvcc": "12.4"},
        "nvcc",
        PROBLEM,
        "is CUDA 12.4, but torch was built for CUDA 13.0",
    ),
    "CPU build": ({"build": NO_CUDA_BUILD}, "nvcc", PROBLEM, "LORA_EXT_CUDA=1 pip install"),
}


def test_nothing_is_found_where_all_is_well() -> None:
    assert {one.status for one in examine(WELL)} == {OK}
    at_home = replace(WELL, torch=CPU, gpus=[], nvcc="", build=NO_CUDA_BUILD)
    assert {one.status for one in examine(at_home)} == {OK}


@pytest.mark.parametrize("case", RULES)
def test_rules_of_doctor(case: str) -> None:
    changes, check, status, words = RULES[case]
    found = [one for one in examine(replace(WELL, **changes)) if one.check == check]
    assert [one for one in found if one.status == status and words in one.says + one.cure], found
    assert all(one.cure for one in found if one.status == PROBLEM)


# ---- progress -----------------------------------------------------------------------------------


def test_progress_is_a_line_now_and_then_without_a_terminal() -> None:
    script = (
        "import sys, time; sys.argv = ['lora-ext']\n"
        "from lora_ext import _progress as progress; progress.EVERY = 0.05\n"
        "with progress.progress('Reading x', 10) as advance:\n"
        "    advance(5); time.sleep(0.3)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd="/", env=environment, capture_output=True, text=True
    )
    lines = result.stderr.splitlines()
    assert result.stdout == "" and result.returncode == 0 and 1 <= len(lines) <= 6, result
    assert all(line == "Reading x: 0 s, 50%" for line in lines)


def test_progress_is_a_bar_on_a_terminal() -> None:
    import pty

    script = (
        "import sys; sys.argv = ['lora-ext']\n"
        "from lora_ext._progress import progress\n"
        "with progress('Reading x', 10) as advance: advance(5)\n"
    )
    master, terminal = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, stderr=terminal, stdout=subprocess.PIPE
    )
    os.close(terminal)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert process.returncode == 0 and process.stdout == b"" and "Reading x" in shown
    assert "\x1b[" in shown  # redrawn in its place
