"""Conversions that cannot be what was meant: what is said, and that nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import failed, run
from converted import Tensors, values, write
from torch import nn

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert import Layer, convert

R = 2
LORALIB: Tensors = {"h.0.fc.lora_A": values(1, R, 6), "h.0.fc.lora_B": values(2, 4, R)}
LORATORCH: Tensors = {key.replace("lora_", "w_lora_"): one for key, one in LORALIB.items()}
CANDLE: Tensors = {f"h.0.{what}0.weight": values(3, *shape)
                   for what, shape in (("a", (R, 6)), ("b", (4, R)))}  # fmt: skip
KOHYA: Tensors = {
    "lora_te_h_0_fc.lora_down.weight": values(1, R, 6),
    "lora_te_h_0_fc.lora_up.weight": values(2, 4, R),
}
DIFFUSERS: Tensors = {
    f"h.0.fc.lora_{what}.weight": values(1, *shape)
    for what, shape in (("A", (R, 6)), ("B", (4, R)))
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.h = nn.ModuleList([nn.Module()])
        self.transformer.h[0].fc = nn.Linear(6, 4)


# A file, options, and what the sentence has to say.
SAID: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "a base of other names, loralib": (
        LORALIB, {"alpha": 1, "modules": Model()}, r"'h\.0\.fc'.*but 'transformer\.h\.0\.fc'"),
    "a base of other names, loratorch": (
        LORATORCH, {"alpha": 1, "modules": Model()}, r"'h\.0\.fc'.*but 'transformer\.h\.0\.fc'"),
    "a base of other names, candle": (
        CANDLE, {"alpha": 1, "modules": ["h.0.fc"], "ids": {"0": "fx"}}, r"'h\.0\.fx'.*check ids"),
    "kohya by one model": (
        KOHYA, {"modules": Model().transformer}, "--component text_encoder"),
    "kohya, another component": (
        KOHYA, {"modules": ["h.0.fc"], "component": "unet"}, "but of text_encoder"),
    "diffusers without components": (
        DIFFUSERS, {"component": "unet"}, r"leave component= \(--component\) out"),
    "the wrong source": (LORATORCH, {"source": "loralib", "alpha": 1}, "looks like loratorch"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_does_not_fit(case: str, tmp_path: Path) -> None:
    file, options, says = SAID[case]
    path = write(tmp_path / "file.safetensors", file)
    with pytest.raises(AdapterFileError, match=says):
        convert(path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_some_of_the_modules_are_no_whole_base(tmp_path: Path) -> None:
    path = write(tmp_path / "file.safetensors", LORALIB)
    convert(path, tmp_path / "out", alpha=1, modules={"other": Layer("conv", (4, 2, 1))})


def test_what_is_not_there_and_what_is_misspelt(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: is not there"):
        convert(tmp_path / "nothing", tmp_path / "out")
    path = write(tmp_path / "file.safetensors", LORALIB)
    with pytest.raises(TypeError, match="convert: taget: unknown, did you mean target"):
        convert(path, tmp_path / "out", taget="peft")
    with pytest.raises(AdapterFileError, match="slices: 'cf' is neither"):
        convert(path, tmp_path / "out", alpha=1, slices={"cf": [True]})
    assert not (tmp_path / "out").exists()


def test_kohya_of_a_conv1d_comes_back(tmp_path: Path) -> None:
    """Whose weight is [in, out], as in GPT-2."""
    path, base = write(tmp_path / "file.safetensors", KOHYA), {"h.0.fc": Layer("linear", (6, 4))}
    found = convert(path, tmp_path / "out", modules=base, component="text_encoder")
    assert found.tensors["base_model.model.h.0.fc.lora_B.weight"].shape == (4, R)
    base = {"h.0.fc": Layer("linear", (6, 5))}
    with pytest.raises(AdapterFileError, match=r"no update of \[6, 5\]"):
        convert(path, tmp_path / "other", modules=base, component="text_encoder")


UNUSED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "alpha": (KOHYA, {"alpha": 2, "modules": ["text_encoder.h.0.fc"]}, "alpha: is for loralib"),
    "slices": (CANDLE, {"alpha": 2, "slices": {"fc": [True]}}, "slices: is for loralib, loratorch"),
    "ids": (LORALIB, {"alpha": 2, "ids": {"0": "fc"}}, "ids: is for candle"),
    "component": (LORALIB, {"alpha": 2, "component": "unet"}, "component: is for diffusers, kohya"),
}


@pytest.mark.parametrize("case", UNUSED)
def test_an_option_that_would_go_unused(case: str, tmp_path: Path) -> None:
    file, options, says = UNUSED[case]
    path = write(tmp_path / "file.safetensors", file)
    with pytest.raises(ValueError, match=says):
        convert(path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = write(tmp_path / "file.safetensors", LORALIB)
    convert(path, tmp_path / "adapter", alpha=4)
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
@pytest.mark.parametrize("target", ["loralib", "loratorch", "candle", "kohya"])
def test_a_base_that_was_changed(target: str, kind: str, adapter: Path) -> None:
    """What the file would do on the original base is something else, and it does not say so."""
    config = adapter / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"init_lora_weights": kind}
    config.write_text(json.dumps(fields))
    out = adapter.with_name("new.safetensors")
    chosen = {"component": "unet"} if target == "kohya" else {}
    with pytest.raises(AdapterFileError, match=f"init_lora_weights: got '{kind}'.*--initial"):
        convert(adapter, out, target=target, **chosen)
    assert not out.exists()


@pytest.mark.parametrize("name", ["new.safetensors", "new.gguf"])
def test_a_files_name_without_its_format(name: str, adapter: Path) -> None:
    out = adapter.with_name(name)
    with pytest.raises(ValueError, match=re.escape(f"{out}: is the name of a file")):
        convert(adapter, out)
    assert "--to" in failed("convert", adapter, out)
    assert not out.exists()


COMMANDS: dict[str, Callable[[Path], tuple[tuple[object, ...], str]]] = {
    "an option unused": lambda one: (("convert", one, "OUT", "--alpha", 3), "alpha: is for"),
    "one file of a folder": lambda one: (
        ("convert", one / "adapter_model.safetensors", "OUT"), "give its folder"),
    "another format, inspect": lambda one: (
        ("inspect", one.with_name("file.safetensors")), "`lora-ext convert` makes"),
    "another format, merge": lambda one: (
        ("merge", one, one.with_name("file.safetensors"), "OUT"), "`lora-ext convert` makes"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_that_cannot_be_used(case: str, adapter: Path) -> None:
    arguments, says = COMMANDS[case](adapter)
    assert says in failed(*arguments, code=2)
    assert not Path("OUT").exists()


def test_one_component_is_said(tmp_path: Path) -> None:
    path, names = write(tmp_path / "file.safetensors", KOHYA), tmp_path / "names.txt"
    names.write_text("h.0.fc\n")
    options = ("--base", names, "--component", "text_encoder")
    assert "its text_encoder; 2 tensors" in run("convert", path, tmp_path / "out", *options).out


def test_gguf_without_its_package(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gguf" else find(name, *rest),
    )
    out = adapter.with_name("a.gguf")
    said = failed("convert", adapter, out, "--to", "gguf", "--base", adapter, code=2)
    assert "pip install gguf" in said and not out.exists()


def test_a_base_by_the_command(adapter: Path, tmp_path: Path) -> None:
    shutil.rmtree(adapter)
    names = tmp_path / "names.txt"
    names.write_text("transformer.h.0.fc\n")
    path = tmp_path / "file.safetensors"
    said = failed("convert", path, adapter, "--alpha", 4, "--base", names)
    assert "but 'transformer.h.0.fc'" in said and not adapter.exists()
    names.write_text("h.0.fc\n")
    assert run("convert", path, adapter, "--alpha", 4, "--base", names).code == 0
