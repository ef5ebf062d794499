"""LoftQ beside PEFT's, which wants a GPU: it computes on the CPU here."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import loftq_utils
from safetensors.torch import save_file
from test_layers_of_libraries import linear_4bit
from torch import Tensor, nn

import lora_ext

N, K, R = 64, 128, 8


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    original = torch.Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple("cpu" if str(one) == "cuda" else one for one in args)
        kwargs |= {"device": "cpu"} if str(kwargs.get("device")) == "cuda" else {}
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)


def weights(count: int) -> list[Tensor]:
    """Random ones, with rows of different sizes and a few large values."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        weight = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
        if i % 2:
            weight[torch.rand(N, K, generator=generator) < 0.01] *= 10
        found.append(weight)
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nor_in_16_bits(dtype: torch.dtype, bits: int) -> None:
    for iterations, weight in itertools.product((1, 2, 5), weights(10)):
        narrow = weight.to(dtype)
        linear = nn.Linear(K, N, bias=False, dtype=dtype)
        linear.weight.data.copy_(narrow)
        layer: Any = lora_ext.nn.Linear.from_linear(
            linear, R, R, init_lora_weights="loftq", loftq_bits=bits, loftq_iter=iterations
        )

        mine, theirs = (
            (Q.double() + B.double() @ A.double() - narrow.double()).norm().item()
            for Q, A, B in (
                (layer.weight, layer.lora_A, layer.lora_B),
                loftq_utils.loftq_init(narrow, bits, R, iterations),
            )
        )
        assert mine <= theirs * (1 + 1e-5)


@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_is_not_larger(bits: int, iterations: int) -> None:
    for weight in weights(10):
        Q, A, B = loftq_utils.loftq_init(weight, bits, R, iterations)
        theirs = (Q + B @ A - weight).norm().item()
        linear = nn.Linear(K, N, bias=False)
        linear.weight.data.copy_(weight)
        layer: Any = lora_ext.nn.Linear.from_linear(
            linear, R, R, init_lora_weights="loftq", loftq_bits=bits, loftq_iter=iterations
        )
        mine = (layer.weight + layer.lora_B @ layer.lora_A - weight).norm().item()
        assert mine <= theirs * (1 + 1e-5)  # which SVD's own rounding is below
        scaled: Any = lora_ext.nn.Linear.from_linear(
            nn.Linear(K, N, bias=False), R, 4 * R, init_lora_weights=False
        )
        scaled.weight.data.copy_(weight)
        scaled.delete_adapter("default")
        scaled.add_adapter(
            "a", r=R, lora_alpha=4 * R, init_lora_weights="loftq", loftq_bits=bits,
            loftq_iter=iterations,
        )  # fmt: skip
        A, B = (part.detach() for part in scaled.parts("a").values())
        assert (scaled.weight + 4 * B @ A - weight).norm().item() <= theirs * (1 + 1e-5)


def test_replacing_is_pefts(tmp_path: Path) -> None:
    def model() -> nn.Module:
        found = nn.Sequential(linear_4bit(), nn.ReLU())
        found.is_loaded_in_4bit = True  # type: ignore[assignment]
        return found

    generator = torch.Generator().manual_seed(1)
    original = torch.randn(N, K, generator=generator) * 0.05
    save_file({"0.weight": original}, tmp_path / "model.safetensors")
    fields: dict[str, Any] = {"r": R, "lora_alpha": R, "target_modules": ["0"]}
    theirs: Any = peft.get_peft_model(model(), peft.LoraConfig(**fields))
    peft.replace_lora_weights_loftq(theirs, str(tmp_path / "model.safetensors"))
    ours: Any = lora_ext.get_peft_model(model(), lora_ext.LoraConfig(**fields))
    lora_ext.replace_lora_weights_loftq(ours, tmp_path)
    one, two = theirs.base_model.model[0], ours.get_base_model()[0]
    expected = one.lora_B["default"].weight @ one.lora_A["default"].weight
    torch.testing.assert_close(two.lora_B @ two.lora_A, expected, rtol=0, atol=1e-4)
