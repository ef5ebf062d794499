"""The direction of imports: which package may know which, and no module itself in a circle."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lora_ext
from lora_ext._moved import MOVED, RENAMED
from lora_ext.nn.adapter import AdapterOptions, AdapterSettings

ROOT = Path(lora_ext.__file__).parent
# From below to above: each may import what stands before it.
PACKAGES = (
    *("_startup", "_missing", "_progress", "_patterns", "_extension", "_flops", "_offloaded"),
    *(
        "_not_built",
        "errors",
        "arguments",
        "_assignment",
        "_batch_arguments",
        "batching",
        "reference",
    ),
    *("_scaling", "_dropout", "_layer_lists", "quant"),
    *(
        "functional",
        "paths",
        "loralib",
        "nn",
        "io",
        "blocks",
        "adapters",
        "calibration",
        "conversion",
        "optimizers",
        "distributed",
        "integrations",
        "tuning",
    ),
    *("_moved", "", "bench", "cli", "__main__"),
)
FOR_IO = {"io", "errors", "arguments", "_patterns"}  # it is about files, not about modules
# What 0.1.0 had without promising it: functions of DoRA on private methods, limits that are others.
GONE = {
    *(f"lora_ext.nn.dora.{name}" for name in ("linear_forward", "conv_forward")),
    *(f"lora_ext.nn.dora.{name}" for name in ("scale_columns", "merge_factors")),
    *(f"lora_ext.io.adapter_folder.{name}" for name in ("MAX_DENSE_BYTES", "BYTES_PER_VALUE")),
    "lora_ext.nn.init.NOT_BUILT",  # all are
    *("lora_ext.io.peft.FILE_SECONDS", "lora_ext.io.peft.DEFAULT"),  # imported there
}


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
                if alias.name == "_C":  # compiled
                    continue
                inner = f"{node.module}.{alias.name}"
                if (inner if inner in known else node.module) in known:
                    yield inner if inner in known else str(node.module)


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


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
        or (package(name) == "io" and package(other) not in FOR_IO)
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


def test_all_names_of_0_1_0_resolve() -> None:
    names = json.loads(Path(__file__).with_name("names_of_0_1_0.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        lost = [
            f"{module}.{name}"
            for module, own in names.items()
            for name in own
            if not hasattr(importlib.import_module(module), name) and f"{module}.{name}" not in GONE
        ]
    assert len(names) > 60 and lost == []


def test_former_modules_are_attributes_of_their_packages() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        sys.modules.pop("lora_ext.io.peft", None)
        vars(lora_ext.io).pop("peft", None)
        assert callable(lora_ext.io.peft.save_pretrained)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_former_names_in_modules_resolve(old: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(old.rpartition(".")[0])
    path, _, name = RENAMED[old].rpartition(".")
    now = getattr(importlib.import_module(path), name)
    with pytest.warns(DeprecationWarning, match=RENAMED[old].replace(".", r"\.")):
        assert getattr(module, old.rpartition(".")[2]) is now
    assert not hasattr(module, "nothing_of_this_name")


def test_no_module_imports_a_former_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for name in modules():
            if not name.endswith("__main__"):
                importlib.import_module(name)


def test_page_of_public_names_is_what_all_says() -> None:
    page = ROOT.parent / "docs" / "api.md"
    if not page.exists():
        pytest.skip("docs/ is not here: an installed copy is tested")
    rows = [line.split("|")[1:3] for line in page.read_text().splitlines() if "| `lora" in line]
    said = {row[0].split("`")[1]: set(row[1].split("`")[1::2]) for row in rows}
    assert said == {
        name: set(module.__all__)
        for name in modules()
        if hasattr(module := importlib.import_module(name), "__all__")
        and name not in ("lora_ext.loralib.layers",)  # loralib's own list
    }


def test_options_of_constructors_are_fields_of_the_settings() -> None:
    named = {"r", "lora_alpha", "lora_dropout", "weights"}  # arguments of their own
    fields = {one.name for one in dataclasses.fields(AdapterSettings)}
    assert AdapterOptions.__annotations__.keys() == fields - named


def test_a_layer_that_0_1_0_pickled_loads_and_runs() -> None:
    """Its pickle names modules as they were, and says `_runs_dora` of what runs."""
    torch.manual_seed(0)
    layer = lora_ext.nn.Linear(6, 4, r=2, use_dora=True)
    torch.nn.init.normal_(layer.lora_B)  # type: ignore[arg-type]
    x = torch.randn(3, 6)
    expected = layer(x)
    state = {k: v for k, v in layer.__dict__.items() if k not in ("_lora_variant", "_lora_alone")}
    layer.__dict__.clear()
    layer.__dict__.update(state | {"_runs_dora": True})
    old = pickle.dumps(layer, protocol=0).replace(
        b"clora_ext.nn.adapter\n", b"clora_ext.nn.settings\n"
    )
    assert b"lora_ext.nn.settings" in old
    with pytest.warns(DeprecationWarning):
        sys.modules.pop("lora_ext.nn.settings", None)
        loaded = pickle.loads(old)
    assert torch.equal(loaded(x), expected)
    plain = loaded.get_base_layer()
    assert plain.__dict__.keys() == torch.nn.Linear(6, 4).__dict__.keys()
