"""PEFT's tests and what they import, from the package index, in build/peft_suite."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "peft_suite"
VERSION = "0.21.2"
SUITE = BUILD / "suite"  # the tests, a package for their relative imports
PACKAGES = BUILD / "packages"
# Imported by the tests, and by these in turn; what this Python has stays as it is.
REQUIREMENTS = (
    *("diffusers", "datasets", "pyarrow", "pandas", "scipy", "dill", "multiprocess", "xxhash"),
    *("python-dateutil", "six", "importlib_metadata", "zipp", "requests", "urllib3"),
    *("charset-normalizer", "idna", "certifi", "parameterized", "attrs"),
)
# The source distribution has none.
CONFTEST = '''
import pytest
from . import testing_utils


class Known(dict):
    """Every model is in the cache of the hub, or nowhere: nothing goes online."""

    def __contains__(self, model_id):
        return True

    def __missing__(self, model_id):
        return 1


testing_utils._HUB_MODEL_ACCESSES = Known()


def pytest_addoption(parser):
    parser.addoption("--regression", action="store_true", default=False)


def pytest_configure(config):
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: PEFT's")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "regression" in item.keywords and not config.getoption("--regression"):
            item.add_marker(pytest.mark.skip(reason="needs --regression"))
'''


class NotFetchedError(RuntimeError):
    """The package index cannot be reached, or has no such distribution."""


def fetch() -> None:
    """Makes SUITE and PACKAGES, unless they are there.

    Raises:
        NotFetchedError: the index does not give them.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    if not (PACKAGES / ".complete").exists():
        shutil.rmtree(PACKAGES, ignore_errors=True)
        _pip("install", "--no-deps", "--target", str(PACKAGES), *REQUIREMENTS)
        (PACKAGES / ".complete").touch()
    if not (SUITE / "conftest.py").exists():
        _pip(
            *("download", "--no-binary", ":all:", "--no-deps", "--no-build-isolation"),
            *("--dest", str(BUILD), f"peft=={VERSION}"),
        )
        shutil.rmtree(SUITE, ignore_errors=True)
        with tarfile.open(BUILD / f"peft-{VERSION}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
        (BUILD / f"peft-{VERSION}" / "tests").rename(SUITE)
        (SUITE / "__init__.py").touch()
        (SUITE / "pytest.ini").write_text("[pytest]\n")  # not the project's, nor PEFT's addopts
        (SUITE / "conftest.py").write_text(CONFTEST)


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise NotFetchedError(f"pip {arguments[0]}: {lines[-1]}")
