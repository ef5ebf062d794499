"""The same adapter in PEFT and here: outputs, all gradients, merged outputs, and checkpoints that
each loads from the other."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel

Build = Callable[[], tuple[nn.Module, Tensor]]


class Mlp(nn.Module):
    """Three linear layers deep, so that an error in one's dx shows in the next one's gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(12, 24), nn.Linear(24, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.gelu(self.mid(torch.nn.functional.gelu(self.up(x))))
        return self.head(torch.nn.functional.gelu(self.down(x)))


def mlp() -> tuple[nn.Module, Tensor]:
    return Mlp(), torch.randn(2, 5, 12)


class Conv1dMlp(nn.Module):
    """GPT-2's transposed linear layers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_attn, self.c_proj = Conv1D(18, 6), Conv1D(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(torch.tanh(self.c_attn(x)))


def conv1d_mlp() -> tuple[nn.Module, Tensor]:
    return Conv1dMlp(), torch.randn(4, 6)


class Words(nn.Module):
    """Tokens to vectors and back."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.last = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.mix(self.words(x))))


def words() -> tuple[nn.Module, Tensor]:
    return Words(), torch.randint(0, 11, (3, 5))


def convolutions(dimensions: int, **options: Any) -> Build:
    """Two convolutions and a linear layer over an input of so many dimensions."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
            self.first = kind(4, 8, 3, **options)
            self.second = kind(8, 6, 1)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(torch.tanh(self.first(x))).flatten(2).mean(2))

    def build() -> tuple[nn.Module, Tensor]:
        return Net(), torch.randn(2, 4, *(6,) * dimensions)

    return build


TARGETS = ["up", "mid", "down"]
LINEAR: dict[str, dict[str, Any]] = {
    "plain": {},
    "r 1": {"r": 1},
    "r 17": {"r": 17},
    "alpha 1": {"lora_alpha": 1},
    "alpha 3.5": {"lora_alpha": 3.5},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "lora_bias rslora": {"lora_bias": True, "use_rslora": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "one target": {"target_modules": ["mid"]},
    "regex": {"target_modules": "(up|down)"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["mid"]},
    "rank pattern": {"rank_pattern": {"mid": 5}},
    "alpha pattern": {"alpha_pattern": {"mid": 40, "up": 1}},
    "both patterns rslora": {
        "rank_pattern": {"up": 3}, "alpha_pattern": {"up": 9}, "use_rslora": True
    },
    "modules to save": {"modules_to_save": ["head"]},
    "modules to save, bias all": {"modules_to_save": ["head"], "bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "random": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "head": {"target_modules": ["head", "up"]},
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True, "r": 2},
    "dora bias all": {"use_dora": True, "bias": "all"},
    "dora patterns": {"use_dora": True, "rank_pattern": {"mid": 3}},
}  # fmt: skip
CASES: dict[str, tuple[Build, dict[str, Any]]] = {
    f"linear, {name}": (mlp, {"target_modules": TARGETS} | fields)
    for name, fields in LINEAR.items()
}
CASES |= {
    f"Conv1D, {name}": (
        conv1d_mlp, LINEAR[name] | {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    )
    for name in ("plain", "rslora", "lora_bias", "bias all", "gaussian", "pissa", "dora")
}  # fmt: skip
CASES |= {
    f"embedding, {name}": (words, {"target_modules": ["words", "mix"]} | fields)
    for name, fields in {
        "plain": {},
        "alone": {"target_modules": ["words"]},
        "rslora": {"use_rslora": True},
        "bias all": {"bias": "all"},
        "modules to save": {"modules_to_save": ["last"]},
        "dora": {"use_dora": True},
        "saved whole": {"target_modules": ["mix"], "modules_to_save": ["words"]},
    }.items()
}
CASES |= {
    f"convolution, {name}": (build, {"target_modules": ["first", "second"]} | fields)
    for name, (build, fields) in {
        "1d": (convolutions(1), {}),
        "1d stride": (convolutions(1, stride=2, padding=1), {"use_rslora": True}),
        "2d": (convolutions(2), {}),
        "2d padding": (convolutions(2, padding=1, bias=False), {}),
        "2d rslora": (convolutions(2), {"use_rslora": True}),
        "2d bias all": (convolutions(2), {"bias": "all"}),
        "2d lora_only": (convolutions(2), {"bias": "lora_only"}),
        "2d lora_bias": (convolutions(2), {"lora_bias": True}),
        "2d patterns": (
            convolutions(2),
            {"rank_pattern": {"first": 2}, "alpha_pattern": {"second": 3}},
        ),
        "2d modules to save": (convolutions(2), {"modules_to_save": ["head"]}),
        "2d dora": (convolutions(2), {"use_dora": True}),
        "1d dora": (convolutions(1, padding=1), {"use_dora": True, "use_rslora": True}),
        "2d with linear": (convolutions(2), {"target_modules": ["first", "head"]}),
        "2d gaussian": (convolutions(2), {"init_lora_weights": "gaussian"}),
        "3d": (convolutions(3), {"target_modules": ["first"]}),
        "3d stride": (convolutions(3, stride=2), {"target_modules": ["first"], "r": 2}),
    }.items()
}


def pair_of(case: str) -> tuple[nn.Module, peft.PeftModel, Tensor]:
    """A base, PEFT's adapted copy of it with adapters that are not zero, and an input."""
    build, fields = CASES[case]
    torch.manual_seed(0)
    base, x = build()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**({"r": 4} | fields)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter.dtype))
    return base, theirs, x


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, dx), with gradients left in the parameters."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return y.detach(), x.grad if x.grad is not None else torch.zeros(())


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape
    error, size = (actual - expected).abs().max(), expected.abs().max()
    assert error <= bound * size, f"relative error {error / size:.1e}"


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_peft_key(model: peft.PeftModel) -> dict[str, Tensor]:
    return {
        name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): (
            parameter.grad
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def our_gradients(model: LoraModel) -> dict[str, Tensor]:
    """Gradients by the keys of checkpoints."""
    places = {p.data_ptr(): p for p in model.parameters()}
    from lora_ext.adapters.checkpoint import adapter_state_dict

    return {
        key: places[tensor.data_ptr()].grad for key, tensor in adapter_state_dict(model).items()
    }


@pytest.mark.parametrize("case", CASES)
def test_same_adapter_in_both(case: str, tmp_path: Path) -> None:
    base, theirs, x = pair_of(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    trained = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "theirs", is_trainable=True
    )
    (y, dx), (their_y, their_dx) = gradients(ours, x), gradients(trained, x)
    close(y, their_y, 1e-5)
    close(dx, their_dx, 1e-4)
    expected, actual = by_peft_key(trained), our_gradients(ours)
    expected = {k.replace("modules_to_save.", ""): g for k, g in expected.items()}
    assert actual.keys() == {k.replace(".modules_to_save", "") for k in expected}
    for key, gradient in expected.items():
        close(actual[key], gradient, 1e-4)

    ours.save_pretrained(tmp_path / "ours")
    names = ("adapter_config.json", "adapter_model.safetensors")
    mine, yours = (load_file(tmp_path / who / names[1]) for who in ("ours", "theirs"))
    assert mine.keys() == yours.keys() and all(torch.equal(mine[k], yours[k]) for k in mine)
    mine, yours = (
        json.loads((tmp_path / who / names[0]).read_text()) for who in ("ours", "theirs")
    )
    for config in (mine, yours):
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
    assert mine == yours
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    close(again(x), their_y, 1e-6)

    merged = ours.merge_and_unload()
    assert {type(m) for m in merged.modules()} == {type(m) for m in base.modules()}
    close(merged(x), their_y, 1e-5)


def test_adapters_of_other_names_have_their_own_folders(tmp_path: Path) -> None:
    base, theirs, _ = pair_of("linear, plain")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LoraModel.from_pretrained(base, tmp_path / "theirs", "french")
    ours.load_adapter(tmp_path / "theirs", "default")
    ours.save_pretrained(tmp_path / "ours")
    expected = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    for folder in (tmp_path / "ours", tmp_path / "ours" / "french"):
        actual = load_file(folder / "adapter_model.safetensors")
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in actual)


def test_what_is_saved_while_merged_is_the_same(tmp_path: Path) -> None:
    base, theirs, _ = pair_of("linear, bias all")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LoraModel.from_pretrained(base, tmp_path / "theirs")
    ours.merge_adapter()
    ours.save_pretrained(tmp_path / "merged")
    actual, expected = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("merged", "theirs")
    )
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_initialisation_that_changed_the_base_becomes_plain_lora(
    kind: str, use_rslora: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base, x = mlp()
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=kind, use_rslora=use_rslora)
    model = LoraModel(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    y = model(x)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial"
    )
    close(LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")(x), y, 1e-5)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")
    close(theirs(x), y, 1e-5)
