"""What a plan copies from the host to the device of the model: on the meta device, whose copies are
calls of the dispatcher as those to any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_ext

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """The calls that have elements of the host and make some of the device, or the reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, torch.Tensor)]
        places = {one.device.type for one in given if one.dim() and one.numel()}
        if isinstance(made, torch.Tensor) and made.numel() and places - {made.device.type}:
            self.seen.append(str(func))
        return made


def model_with(adapters: int, layers: int = 4) -> nn.Module:
    model = nn.Sequential()
    for i in range(layers):
        layer = lora_ext.nn.Linear(16, 16, device=META)
        for name in range(adapters):
            layer.add_adapter(str(name), r=2 + name, lora_dropout=0.1 * (i % 2))
        model.append(layer)
    return model.train()


STRENGTHS = {
    "names": {},
    "a scale": {"scale": torch.rand(6)},
    "gates": {"gates": torch.rand(6, 3)},
    "both": {"scale": torch.rand(6), "gates": torch.rand(6, 3)},
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("strengths", STRENGTHS)
def test_one_copy_of_rows_for_all_layers(strengths: str, inference: bool) -> None:
    """And one of each kind of strength that is given on the host; none in backward."""
    given = STRENGTHS[strengths]
    model = model_with(3)
    names = ["0", "1", "2"] if "gates" in given else ["0", None, "2", "1", "0", None]
    with torch.inference_mode(inference), lora_ext.batch(names, **given):
        x = torch.zeros(6, 5, 16, device=META, requires_grad=not inference)
        with Copies() as copies:
            y = model(x)
            if not inference:
                y.sum().backward()
    assert len(copies.seen) == 1 + len(given), copies.seen
    assert all("_to_copy" in call for call in copies.seen)


def test_strengths_of_the_device_are_not_copied() -> None:
    """They train, or a graph that is replayed has others."""
    scale = torch.rand(6, device=META, requires_grad=True)
    x = torch.zeros(6, 5, 16, device=META)
    with lora_ext.batch(["0", "1"] * 3, scale=scale), Copies() as copies:
        model_with(2)(x).sum().backward()
    assert len(copies.seen) == 1 and scale.grad is not None


def test_a_row_of_no_adapter_of_the_layer_is_not_copied() -> None:
    with lora_ext.batch([None] * 6), Copies() as copies:
        model_with(2)(torch.zeros(6, 5, 16, device=META))
    assert not copies.seen
