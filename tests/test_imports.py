"""The direction of imports: which package may know which, and no module itself in a circle."""

from __future__ import annotations

import ast
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_ext
from lora_ext._moved import MOVED

ROOT = Path(lora_ext.__file__).parent
# From below to above: each may import what stands before it.
PACKAGES = (
    *("_missing", "_extension", "errors", "arguments", "reference", "functional", "paths"),
    *("loralib", "nn", "io", "adapters", "tuning", "_moved", "", "bench"),
)
# And io, which is about files, not about modules.
NOT_FOR_IO = {"functional", "paths", "loralib", "nn"}


def modules() -> dict[str, Path]:
    """The Python modules of the package, by dotted name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ["lora_ext", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports: anywhere in it, for types or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if (inner if inner in known else node.module) in known:
                    yield inner if inner in known else str(node.module)


def graph() -> dict[str, set[str]]:
    known = modules()
    return {
        name: set(imports(name, path, known)) - {name, "lora_ext"} for name, path in known.items()
    }


def package(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty without one."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := visit(name, []))), [])


def test_no_circle() -> None:
    edges = graph()
    assert len(edges) > 60 and sum(map(len, edges.values())) > 200
    assert circle(edges) == []


def test_a_circle_is_seen() -> None:
    edges = graph()
    edges["lora_ext.errors"].add("lora_ext.adapters.lora_model")
    edges["lora_ext.adapters.lora_model"].add("lora_ext.errors")
    assert "lora_ext.errors" in circle(edges)


def test_packages_know_only_those_below() -> None:
    wrong = [
        (name, other)
        for name, others in graph().items()
        for other in others
        if PACKAGES.index(package(other)) > PACKAGES.index(package(name))
        or (package(name) == "io" and package(other) in NOT_FOR_IO)
    ]
    assert wrong == []


@pytest.mark.parametrize("old", sorted(MOVED))
def test_former_names_of_modules_resolve(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=MOVED[old].replace(".", r"\.")):
        former = importlib.import_module(old)
    now = importlib.import_module(MOVED[old])
    public = [name for name in vars(now) if not name.startswith("_")]
    assert public and all(getattr(former, name) is getattr(now, name) for name in public)
    assert now.__spec__ is not None and now.__spec__.name == MOVED[old]


def test_no_module_imports_a_former_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for name in modules():
            if not name.endswith("__main__"):
                importlib.import_module(name)
