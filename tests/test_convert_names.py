"""Modules whose names are expressions, or parts of others' names, keep their own rank and alpha."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from converted import Tensors, close, loaded, loaded_by_peft, round_trip, same, values, write
from safetensors.torch import load_file
from torch import nn

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert import LoadedAdapter, Options, convert
from lora_ext.io.convert.diffusers import DIFFUSERS

NAMES = [
    ["a.b", "a_b", "axb"],  # a dot stands for any character
    ["to_out.0", "to_out_0", "to_out10"],
    ["fc", "m.fc", "m.x.fc"],
    ["c++", "x.c++", "cc"],
    ["a*", "b(1)", "q[0]"],
    ["a{2}", "aa", "^x"],
    ["a|b", "a", "b("],
]


def model_with(names: list[str]) -> nn.Module:
    model = nn.Module()
    for seed, name in enumerate(names):
        *above, last = name.split(".")
        place = model
        for part in above:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]  # type: ignore[assignment]
        place.add_module(last, nn.Linear(6, 5, bias=False))
        with torch.no_grad():
            place._modules[last].weight.copy_(values(seed, 5, 6))  # type: ignore
    return model.eval()


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
def test_each_module_keeps_its_rank_and_alpha(names: list[str], tmp_path: Path) -> None:
    """In memory, through PEFT's folder in both libraries, and back."""
    model, file = model_with(names), Tensors()
    alpha = {name: float(seed + 2) for seed, name in enumerate(names)}
    for seed, name in enumerate(names):
        file[f"unet.{name}.lora_A.weight"] = values(seed, seed + 2, 6)
        file[f"unet.{name}.lora_B.weight"] = values(seed, 5, seed + 2)
    alphas = {f"unet.{name}.alpha": torch.tensor(own) for name, own in alpha.items()}
    write(tmp_path / "in.safetensors", file | alphas)
    options = {"component": "unet", "modules": model}
    convert(tmp_path / "in.safetensors", tmp_path / "peft", **options)
    x = values(9, 3, 6)
    for load in (loaded, loaded_by_peft):
        adapted = load(model_with(names), tmp_path / "peft")
        modules = dict(adapted.named_modules())
        for name in names:
            own = model.get_submodule(name).double()
            A, B = (file[f"unet.{name}.lora_{part}.weight"].double() for part in "AB")
            exact = own(x.double()) + alpha[name] / len(A) * (x.double() @ A.T @ B.T)
            close(modules[f"base_model.model.{name}"](x), exact)
    convert(tmp_path / "peft", tmp_path / "out.safetensors", target="diffusers", **options)
    again = convert(tmp_path / "out.safetensors", tmp_path / "again", **options)
    same(again.tensors, load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    if len({name.replace(".", "_") for name in names}) == len(names):  # kohya has alphas of its own
        kohya = {
            f"lora_unet_{name.replace('.', '_')}.{key}": tensor
            for name in names
            for key, tensor in {
                "lora_down.weight": file[f"unet.{name}.lora_A.weight"],
                "lora_up.weight": file[f"unet.{name}.lora_B.weight"],
                "alpha": torch.tensor(alpha[name]),
            }.items()
        }
        (tmp_path / "kohya").mkdir()
        round_trip(tmp_path / "kohya", "kohya", kohya, **options)


def test_many_modules_with_alphas_of_their_own(tmp_path: Path) -> None:
    """In time that grows as they do: minutes, where each was compared with each."""
    file = Tensors()
    for i in range(800):
        name = f"unet.blocks.{i // 40}.attentions.{i % 40}.to_q"
        file[f"{name}.lora_A.weight"] = values(i, 1, 2)
        file[f"{name}.lora_B.weight"] = values(i, 2, 1)
        file[f"{name}.alpha"] = torch.tensor(float(i + 1))
    path = write(tmp_path / "in.safetensors", file)
    start = time.process_time()
    first = convert(path, tmp_path / "peft", component="unet")
    convert(tmp_path / "peft", tmp_path / "o.safetensors", target="diffusers", component="unet")
    again = convert(tmp_path / "o.safetensors", tmp_path / "again", component="unet")
    assert time.process_time() - start < 10
    assert len(first.config["alpha_pattern"]) == 799 and again.config == first.config


def test_a_module_inside_of_a_processor_keeps_its_name(tmp_path: Path) -> None:
    """Older names had `processor` between; PEFT's have it where the model has."""
    name = "unet.attn.processor.to_k_ip.0"
    file = {f"{name}.lora_A.weight": values(1, 4, 6), f"{name}.lora_B.weight": values(2, 5, 4)}
    path = write(tmp_path / "in.safetensors", file)
    assert set(convert(path, tmp_path / "peft").tensors) == {f"base_model.model.{k}" for k in file}


@pytest.mark.parametrize("component", ["unet", None])
@pytest.mark.parametrize("key", ["h.bias", "a.base_layer.bias", "h.weight", "a.q_lora_A.weight"])
def test_diffusers_refuses_what_its_reader_would(
    key: str, component: str | None, tmp_path: Path
) -> None:
    start = "base_model.model."
    tensors = {
        f"{start}a.lora_A.weight": values(1, 4, 6),
        f"{start}a.lora_B.weight": values(2, 5, 4),
        start + key: values(3, 5),
    }
    adapter = LoadedAdapter({"peft_type": "LORA", "r": 4, "bias": "all"}, tensors)
    out = tmp_path / "out.safetensors"
    with pytest.raises(AdapterFileError, match=key.replace(".", r"\.")):
        DIFFUSERS.write(out, adapter, Options(component=component))
    assert not out.exists()
