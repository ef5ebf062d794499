"""What is remembered of checks on a GPU: csrc/cuda/trust_file.h, without one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from emulated import compile_source


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("trust") / "trust_file"
    compile_source(Path(__file__).parent / "trust_file.cpp", target, "-O1", "-Wextra")
    return target


def run(program: Path, *arguments: object) -> int:
    return subprocess.run([program, *map(str, arguments)], timeout=60).returncode


def test_what_is_added_is_there(program: Path, tmp_path: Path) -> None:
    place = tmp_path / "new" / "trusted.txt"
    assert run(program, "has", place, "a fact") == 1
    assert run(program, "add", place, "a fact") == 0
    assert run(program, "has", place, "a fact") == 0 and run(program, "has", place, "a") == 1


def test_a_torn_last_line_does_not_swallow_the_next(program: Path, tmp_path: Path) -> None:
    place = tmp_path / "trusted.txt"
    place.write_text("sm_80, a GPU whose disk was fu")
    assert run(program, "add", place, "a fact") == 0
    assert run(program, "has", place, "a fact") == 0


def test_no_line_is_lost_at_the_limit(program: Path, tmp_path: Path) -> None:
    """Of processes that add to a full file at the same time; what was in it stays readable."""
    for i in range(40):
        place = tmp_path / f"trusted-{i}.txt"
        place.write_text("x" * 70000 + "\nan old fact\n")
        assert run(program, "race", place) == 0, i
        assert run(program, "has", place, "an old fact") == 0
        assert place.stat().st_size < 1000
