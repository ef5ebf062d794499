"""Prints requirements of pyproject.toml: python tools/extra.py NAME ..., those of extras, with what
the package itself needs if NAME is "dependencies"."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(project: dict[str, object], names: list[str]) -> Iterator[str]:
    """Of these extras, and of those of the package itself that they name."""
    extras = {"dependencies": project["dependencies"], **project["optional-dependencies"]}  # type: ignore[dict-item]
    for name in names:
        for one in extras[name]:  # type: ignore[attr-defined]
            own = re.fullmatch(rf"{project['name']}\[(.*)\]", one)
            yield from requirements(project, own[1].split(",")) if own else [one]


if __name__ == "__main__":
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    print(*requirements(project, sys.argv[1:]), sep="\n")
