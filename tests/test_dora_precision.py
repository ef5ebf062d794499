"""DoRA's float32 adapters beside a 16-bit base: their gradients keep float32's precision, as PEFT's
do, in layers of lora_ext and in PEFT's own, patched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from problems import rms
from torch import Tensor, nn

import lora_ext
import lora_ext.integrations.peft as fused

KINDS = {
    "linear": (lambda: nn.Linear(48, 56), lambda: torch.randn(70, 48)),
    "embedding": (lambda: nn.Embedding(40, 24), lambda: torch.randint(40, (90,))),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3), lambda: torch.randn(3, 6, 9, 9)),
}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    fused.unpatch()


def gradients(model: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of lora_A and lora_B of each adapter, whose names in ours and in PEFT's models differ."""
    model.zero_grad()
    model(x).backward(dy)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        part = next((part for part in ("_A", "_B") if part in name), None)
        if part and parameter.grad is not None:
            adapter = "other" if "other" in name else "default"
            found[adapter + part] = parameter.grad.double().flatten()
    return found


@pytest.mark.parametrize("adapters", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_float32_adapters(kind: str, dtype: torch.dtype, adapters: int) -> None:
    torch.manual_seed(0)
    make, input_of = KINDS[kind]
    base, x = make().to(dtype), input_of()
    x = x.to(dtype) if x.is_floating_point() else x
    options: dict[str, Any] = {"r": 4, "target_modules": ["0"], "use_dora": True}
    theirs: Any = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(base)), peft.LoraConfig(**options)
    )
    ours: Any = lora_ext.get_peft_model(
        nn.Sequential(copy.deepcopy(base)), lora_ext.LoraConfig(**options)
    )
    names = ["default", "other"][:adapters]
    if adapters == 2:
        theirs.add_adapter("other", peft.LoraConfig(**options))
        ours.add_adapter("other", lora_ext.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.2)
            elif "lora_" in name:
                parameter.normal_(std=0.1)
    for name in names:
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        lora_ext.set_peft_model_state_dict(ours, state, adapter_name=name)
    theirs.base_model.set_adapter(names)
    ours.base_model.set_adapter(names)

    dy = torch.randn_like(theirs(x))
    exact_x = x.double() if x.is_floating_point() else x
    exact = gradients(copy.deepcopy(theirs).double(), exact_x, dy.double())
    plain, our = gradients(theirs, x, dy), gradients(ours, x, dy)
    fused.patch()
    patched = gradients(theirs, x, dy)
    assert len(exact) == 2 * adapters
    for part in exact:
        of_theirs = rms(plain[part] - exact[part])
        assert of_theirs <= 2**-18 * rms(exact[part])  # of float32, and not of 16 bits
        for got in (our, patched):
            assert rms(got[part] - exact[part]) <= 2 * of_theirs
