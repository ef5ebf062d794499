"""Building and installing: from isolation, and what is said where something is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lora_ext

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora_ext_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_wheel(python: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), str(ROOT)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.network
@pytest.mark.skipif(
    "LORA_EXT_CUDA_CHECK" in os.environ, reason="make cuda-check installs from build isolation"
)
def test_wheel_from_build_isolation_uses_the_installed_torch(tmp_path: Path) -> None:
    result = build_wheel(sys.executable, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    output = result.stdout + result.stderr
    assert f"lora_ext: CPU build for torch {torch.__version__}" in output
    assert "Collecting torch" not in output
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"lora_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert {"lora_ext/py.typed", "lora_ext/_C.pyi", "lora_ext/reference.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]


@pytest.mark.network
def test_missing_torch_is_one_clear_sentence(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=True)
    result = build_wheel(str(tmp_path / "bare" / "bin" / "python"), tmp_path)
    assert result.returncode != 0
    assert "lora_ext: no usable torch" in result.stdout + result.stderr
    assert "install torch 2.11 or newer" in result.stdout + result.stderr


def test_old_torch_is_refused(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    old = 'import json; print(json.dumps({"version": "2.10.1+cpu"}))'
    monkeypatch.setattr(setup_py, "FIND_TORCH", old)
    with pytest.raises(SystemExit, match=r"torch 2\.10\.1\+cpu is installed; .* 2\.11 or newer"):
        setup_py.find_torch()


def test_missing_compiler(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler: 'c\+\+' is not on PATH; install"):
        setup_py.check_tools()


def test_missing_headers(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"no Python headers: .*Python\.h is missing; install"):
        setup_py.check_tools()


CPU_TORCH = {"version": "2.13.0+cpu", "lib": "/nowhere/torch/lib", "cuda": None}


def test_cuda_is_built_where_it_can_be(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("auto", "0"):
        monkeypatch.setenv("LORA_EXT_CUDA", value)
        assert setup_py.cuda_settings(CPU_TORCH) == {}
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("LORA_EXT_CUDA", "auto")
    assert setup_py.cuda_settings(CPU_TORCH | {"cuda": "13.0"}) == {}


@pytest.mark.parametrize(
    ("value", "cuda", "message"),
    [
        ("yes", None, "LORA_EXT_CUDA is 'yes'"),
        ("1", None, "a build without CUDA"),
        ("1", "13.0", "there is no nvcc"),
    ],
)
def test_cuda_is_refused_not_ignored(
    setup_py: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    cuda: str | None,
    message: str,
) -> None:
    monkeypatch.setenv("LORA_EXT_CUDA", value)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(SystemExit, match=message):
        setup_py.cuda_settings(CPU_TORCH | {"cuda": cuda})


# TORCH_CUDA_ARCH_LIST: targets of the kernels on tensor cores, of the small ones, with nvcc 13.0
ARCHITECTURES = {
    "the default": (None, "80;90a-real", "75;80;90a-real"),
    "PTX of the last": ("8.0;9.0a+PTX", "80-real;90a", "75;80-real;90a"),
    "blanks": ("8.0 9.0", "80-real;90-real", "75;80-real;90-real"),
    "before sm_80": ("7.5;8.0;9.0a", "80-real;90a-real", "75;80-real;90a-real"),
    "before sm_80 alone": ("7.5", "80-real", "75"),
    "after sm_90": ("10.0f;12.0", "100f-real;120-real", "75;100f-real;120-real"),
}


@pytest.mark.parametrize(
    ("wanted", "tensor_cores", "every_gpu"), ARCHITECTURES.values(), ids=ARCHITECTURES.keys()
)
def test_cuda_architectures(
    setup_py: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str | None,
    tensor_cores: str,
    every_gpu: str,
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    found = setup_py.cuda_architectures("13.0")
    assert list(found.values()) == [tensor_cores, every_gpu]
    # The oldest that nvcc 12 compiles for, V100's
    older = setup_py.cuda_architectures("12.8")["LORA_EXT_ANY_GPU_ARCHITECTURES"].split(";")
    assert older[0] == "70" and ("75-real" in older) == ("7.5" in (wanted or ""))
    for wrong in ("Hopper", "9.0b", "8"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wrong)
        with pytest.raises(SystemExit, match=wrong):
            setup_py.cuda_architectures("13.0")


def test_build_info() -> None:
    info = lora_ext.build_info()
    assert info["torch"] == torch.__version__
    assert info["version"] == lora_ext.__version__
    assert info["cuda"] in (None, torch.version.cuda)
    assert (info["cuda"] is None) == (info["cuda_path"] is None)
    assert info["cpu_capability"] in ("default", "avx2", "avx512", "avx512_bf16")


def test_import_starts_no_cuda_and_needs_no_optional_package() -> None:
    script = (
        "import sys, lora_ext, torch; assert not torch.cuda.is_initialized(); "
        "print([m for m in ('peft', 'transformers', 'rich', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
