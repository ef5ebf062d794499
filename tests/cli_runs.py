"""Running `lora-ext`: in this process, or as the program."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_ext
from lora_ext.cli import main

ROOT = Path(lora_ext.__file__).parent.parent


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


def run(*arguments: object) -> Run:
    """In this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Run(code, out.getvalue(), err.getvalue())


def failed(*arguments: object, code: int = 1) -> str:
    """The one sentence of a command that fails: the same with --json, beside {"error": ...}."""
    plain = run(*arguments)
    assert plain.code == code and not plain.out, plain
    (sentence,) = plain.err.splitlines()
    assert sentence.startswith("lora-ext: ") and "Traceback" not in sentence
    assert f"lora-ext: {run(*arguments, '--json').json()['error']}" == sentence
    return sentence


def program(
    *arguments: object, cwd: Path, path: str | None = None, flags: tuple[str, ...] = ()
) -> Run:
    """`python -m lora_ext` in a folder, where Python looks into these of `path` first."""
    environment = os.environ | {"PYTHONPATH": path or str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, *flags, "-m", "lora_ext", *map(str, arguments)]
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    return Run(result.returncode, result.stdout, result.stderr)
