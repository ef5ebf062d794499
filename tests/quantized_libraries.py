"""bitsandbytes, torchao and gguf, which tests compare with. peft and transformers use the first two
wherever they find them, at a second in each process, so they lie in a folder of their own
(`make test` fills .venv/quantized), which is on sys.path while one of them is imported, no longer.

Who needs peft or transformers together with one of them runs in a process of its own, with
`environment()`: both remember what they found first.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("LORA_EXT_QUANTIZED", Path(sys.prefix, "quantized")))


def are_installed() -> bool:
    """Whether they are in the environment itself, or on PYTHONPATH."""
    return PathFinder.find_spec("bitsandbytes") is not None


def library(name: str) -> Any:
    """The module of this name of one of them; the test file is skipped where it is missing."""
    with _folder_on_path():
        try:
            return importlib.import_module(name)
        except ImportError as error:
            why = f"values are compared with {name}'s, which is not in {FOLDER} (make test): "
            pytest.skip(why + str(error), allow_module_level=True)


def environment() -> dict[str, str]:
    """That of a process that finds them, and the tests' own modules; skips where there are none."""
    if not are_installed() and PathFinder.find_spec("bitsandbytes", [str(FOLDER)]) is None:
        pytest.skip(f"bitsandbytes is not in {FOLDER} (make test)")
    paths = [str(FOLDER), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextlib.contextmanager
def _folder_on_path() -> Iterator[None]:
    sys.path.append(str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
