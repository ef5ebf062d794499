"""Models and adapters that the tests of `lora-ext` run it on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import tiny_models

from lora_ext import LoraConfig, LoraModel

Model = TypeVar("Model", bound=torch.nn.Module)
A, B = "lora_A.weight", "lora_B.weight"
Q = "model.layers.0.self_attn.q_proj"
EPS32, EPS_BF16 = 2.0**-24, 2.0**-8  # units of rounding

CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "rslora, ranks": LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, target_modules=["up_proj", "o_proj"],
        rank_pattern={"o_proj": 3}, alpha_pattern={"up_proj": 5},
    ),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True),
    "embedding, lora_bias": LoraConfig(
        r=2, lora_alpha=8, target_modules=["embed_tokens", "k_proj"],
    ),
    "modules_to_save": LoraConfig(
        r=2, target_modules=["gate_proj"], modules_to_save=["lm_head", "norm"]
    ),
    "pissa": LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="pissa"),
}  # fmt: skip


def randomise(model: Model) -> Model:
    """Values as after training: of everything that trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """llama, llama16 (bfloat16) and gpt2 with adapters beside them. No command may change any
    of it."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    llama, _ = tiny_models.llama()
    llama.save_pretrained(folder / "llama")  # type: ignore[operator]
    (folder / "llama" / "tokenizer.model").write_bytes(b"a tokenizer")
    for name, config in CONFIGS.items():
        base, _ = tiny_models.llama()
        model = LoraModel(base, config)
        if name == "pissa":
            model.save_pretrained(folder / "pissa before")
        randomise(model).save_pretrained(folder / name)
    llama.bfloat16().save_pretrained(folder / "llama16")  # type: ignore[operator]
    gpt2, _ = tiny_models.gpt2()
    gpt2.save_pretrained(folder / "gpt2")  # type: ignore[operator]
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    randomise(LoraModel(gpt2, config)).save_pretrained(folder / "for gpt2")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def assert_close(found: torch.Tensor, expected: torch.Tensor, terms: int) -> None:
    """As sums of so many terms in float32 are, in six layers one after the other."""
    bound = 6 * terms * EPS32 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    return target


def with_value(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{Q}.{B}"][1, 2] = value

    return change


def of_another_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"base_model.model.{Q}.{A}"] = torch.ones(3, 32)
    tensors[f"base_model.model.{Q}.{B}"] = torch.ones(32, 3)
