"""Adapters with DoRA, or a bias of lora_B, on some modules only: PEFT's config says it for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runs import run
from converted import Tensors, refuses_to_write, values, write
from safetensors.torch import save_file

from lora_ext.io.convert import convert

KEY = "base_model.model"


def kohya(start: str, name: str, dora: bool) -> Tensors:
    stem = f"{start}_{name}"
    file = {
        f"{stem}.lora_down.weight": values(1, 2, 6),
        f"{stem}.lora_up.weight": values(2, 5, 2),
        f"{stem}.alpha": torch.tensor(1.0),
    }
    return {**file, f"{stem}.dora_scale": values(3, 5, 1).abs()} if dora else file


def test_kohya_with_dora_on_some(tmp_path: Path) -> None:
    file = {**kohya("lora_unet", "a_b", False), **kohya("lora_unet", "c", True)}
    path = write(tmp_path / "file.safetensors", file)
    refuses_to_write(
        lambda: convert(path, tmp_path / "out", modules=["a_b", "c"], component="unet"),
        "'a_b': has no lora_magnitude_vector", "dora_scale", "merge such an adapter",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_components_of_a_pipeline_are_apart(tmp_path: Path) -> None:
    """Of which one has DoRA, and diffusers' file a config for each."""
    file = {**kohya("lora_unet", "c", True), **kohya("lora_te", "c", False)}
    path = write(tmp_path / "file.safetensors", file)
    names = ["unet.c", "text_encoder.c"]
    refuses_to_write(lambda: convert(path, tmp_path / "out", modules=names), "--component")
    convert(path, tmp_path / "d", target="diffusers", modules=names)
    for component, dora in (("unet", True), ("text_encoder", False)):
        one = tmp_path / component
        assert convert(tmp_path / "d", one, component=component).config["use_dora"] is dora
        assert run("verify", one).code == 0


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
@pytest.mark.parametrize("asked", [True, False])
def test_folders_and_diffusers_files(field: str, asked: bool, tmp_path: Path) -> None:
    """Some modules without what the config asks for, or with what it does not."""
    part = "lora_magnitude_vector" if field == "use_dora" else "lora_B.bias"
    tensors = {
        f"{KEY}.{name}.lora_{what}.weight": values(1, *shape)
        for name in ("a", "c")
        for what, shape in (("A", (2, 6)), ("B", (5, 2)))
    }
    tensors[f"{KEY}.c.{part}"] = values(4, 5).abs()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["a", "c"], field: asked}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    says = f"a: has no {part}" if asked else f"c: has {part}, and the config does not say {field}"
    problems = run("verify", folder).out
    assert f"PROBLEM  keys: {says}" in problems
    says = says.replace("a:", "'a':").replace("c:", "'c':")
    for target in ("peft", "diffusers", "kohya"):
        out = tmp_path / ("out" if target == "peft" else "out.safetensors")
        chosen: dict[str, str] = {} if target == "peft" else {"component": "unet"}
        refuses_to_write(lambda: convert(folder, out, target=target, **chosen), says)  # noqa: B023
        assert not out.exists()
    keys = {key.removeprefix(f"{KEY}."): one for key, one in tensors.items()}
    path = write(tmp_path / "d.safetensors", keys, lora_adapter_metadata=json.dumps(config))
    refuses_to_write(lambda: convert(path, tmp_path / "out"), says)
    # Without a config in the file it is that some have one.
    path = write(tmp_path / "e.safetensors", keys)
    refuses_to_write(lambda: convert(path, tmp_path / "out"), f"'a': has no {part}")
    assert not (tmp_path / "out").exists()
