"""Building and installing: from isolation, and what is said where something is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools.dist import Distribution

import lora_ext

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora_ext_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tracked_sources() -> set[str]:
    """What setup.py compiles, from the source folder's root."""
    kept = {".h", ".cpp", ".cu", ".cmake"}
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in kept}
    return {"CMakeLists.txt", "setup.py", "pyproject.toml", *files}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in a copy, since setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    left_out = shutil.ignore_patterns(".*", "build*", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=left_out, symlinks=True)
    (folder / "source" / "lora_ext" / "_C.of-another-build.so").touch()
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_sdist_holds_what_is_compiled(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = tracked_sources() | {"LICENSE", "README.md", "lora_ext/py.typed", "lora_ext/_C.pyi"}
    cmake = (ROOT / "CMakeLists.txt").read_text()
    wanted |= set(re.findall(r"\b(?:csrc|tests)/[\w/]+\.(?:cpp|cu)\b", cmake))
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.network
@pytest.mark.skipif(
    "LORA_EXT_CUDA_CHECK" in os.environ, reason="make cuda-check installs from build isolation"
)
def test_sdist_installs_from_build_isolation(tmp_path: Path, sdist: Path) -> None:
    # Unoptimised: in 40 % of the time. `make setup` has compiled the same with its options.
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec $LORA_EXT_TEST_CXX "$@" -O0\n')
    compiler.chmod(0o755)
    environment = os.environ | {
        "CXX": str(compiler),
        "LORA_EXT_TEST_CXX": os.environ.get("CXX", "").strip() or "c++",
    }
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, sdist]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    output = result.stdout + result.stderr
    assert f"lora_ext: CPU build for torch {torch.__version__}" in output
    assert "Collecting torch" not in output
    (wheel,) = tmp_path.glob("*.whl")
    extension = f"lora_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {extension, "lora_ext/py.typed", "lora_ext/_C.pyi", "lora_ext/reference.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert [name for name in names if name.endswith(".dist-info/entry_points.txt")]

    # It tells nothing of the machine that built it, and finds torch wherever that is.
    binary = tmp_path / "installed" / extension
    built_in = (sys.prefix, str(ROOT), str(tmp_path), tempfile.gettempdir(), str(Path.home()))
    assert not [path for path in built_in if f"{path}/".encode() in binary.read_bytes()]
    headers = subprocess.run(["readelf", "-dS", binary], capture_output=True, text=True).stdout
    assert "NEEDED" in headers
    assert not [word for word in ("RPATH", "RUNPATH", ".symtab", ".debug") if word in headers]
    python = [sys.executable, "-c", "import lora_ext; print(lora_ext.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    found = subprocess.run(python, env=environment, cwd="/", capture_output=True, text=True)
    assert found.stdout.startswith(str(tmp_path / "installed")), found.stderr


@pytest.mark.network
def test_missing_torch_is_one_clear_sentence_before_anything_is_fetched(tmp_path: Path) -> None:
    """README: it never fetches another torch."""
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    command = [python, "-m", "pip", "install", "--no-cache-dir", str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=800)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "lora_ext: no usable torch" in output and "install torch 2.11 or newer" in output
    assert "Collecting torch" not in output and "nvidia" not in output


@pytest.mark.parametrize(
    ("platform", "find_torch", "message"),
    [
        ("linux", "import torch_that_is_not_there", "no usable torch for"),
        ("linux", 'print(\'{"version": "2.10.1"}\')', r"torch 2\.10\.1 is installed; .* 2\.11"),
        ("darwin", "", "this is darwin; lora_ext runs on Linux only"),
    ],
    ids=["no torch", "old torch", "not Linux"],
)
def test_metadata_are_refused_where_it_cannot_be_built(
    setup_py: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    find_torch: str,
    message: str,
) -> None:
    """Installers ask for them before they fetch what they name."""
    monkeypatch.setattr(setup_py, "FIND_TORCH", find_torch)
    monkeypatch.setattr(setup_py.sys, "platform", platform)
    with pytest.raises(SystemExit, match=message):
        setup_py.CheckedMetadata(Distribution()).run()


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


def test_a_compiler_that_is_not_there(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one does not help: CMake takes what CXX names."""
    monkeypatch.setenv("CXX", "nosuch -O1")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler: 'nosuch -O1' is not on PATH; .*CXX"):
        setup_py.check_tools()


def test_missing_headers(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"no Python headers: .*Python\.h is missing; install"):
        setup_py.check_tools()


@pytest.mark.parametrize("blank", ["", " "])
def test_blank_variables_are_unset_ones(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, blank: str
) -> None:
    for name in ("CXX", "LORA_EXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, blank)
    setup_py.check_tools()
    assert setup_py.cuda_settings(CPU_TORCH) == {}
    settings = setup_py.cuda_architectures("13.0")
    assert settings["CMAKE_CUDA_ARCHITECTURES"] == "80;90a-real"


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
    assert info["cpu_capability"] in ("default", "avx2", "avx512", "avx512_bf16", "amx_bf16")


@pytest.mark.parametrize(
    ("files", "platform", "message"),
    [
        ({"../setup.py"}, "linux", "is lora_ext's source folder, without a compiled extension"),
        ({"_C.cpython-39-arm-none.so"}, "linux", r"for another Python \(_C\.cpython-39-arm-none"),
        (set(), "linux", "holds no compiled extension; install lora_ext again"),
        (set(), "win32", "lora_ext runs on Linux only; this is win32"),
    ],
    ids=["checkout", "another Python", "half an installation", "not Linux"],
)
def test_import_without_an_extension(
    tmp_path: Path, files: set[str], platform: str, message: str
) -> None:
    package = tmp_path / "lora_ext"
    package.mkdir()
    for name in ("_missing.py", "_extension.py"):
        shutil.copy(ROOT / "lora_ext" / name, package)
    (package / "__init__.py").write_text("import lora_ext._extension")
    for name in files:
        (package / name).touch()
    # The extension of an editable installation, which is found for the copy too, is not its own.
    script = (
        f"import sys; sys.platform = {platform!r}; sys.path.insert(0, {str(tmp_path)!r}); "
        "import lora_ext"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    (last,) = result.stderr.splitlines()[-1:]
    assert re.search(f"^ImportError: .*{message}", last), result.stderr


def test_import_starts_no_cuda_and_needs_no_optional_package() -> None:
    script = (
        "import sys, lora_ext, torch; assert not torch.cuda.is_initialized(); "
        "print([m for m in ('peft', 'transformers', 'rich', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
