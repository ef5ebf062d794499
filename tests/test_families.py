"""Adapters in models of transformers, randomly initialised: the same as PEFT's on each family."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import BUILDERS
from torch import Tensor, nn

from lora_ext import LoraModel
from lora_ext.adapters.checkpoint import adapter_state_dict

# Families without default targets; of the others PEFT's and ours are the same.
TARGETS: dict[str, Any] = {
    "dinov2": ["query", "value", "dense", "projection"],
    "resnet": ["convolution"],
    "blip": ["query", "value", "qkv", "dense"],
    "stablelm": ["q_proj", "v_proj"],
    "mpt": ["Wqkv", "out_proj"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True},
}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, logits or last output), with gradients left in the parameters."""
    output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), (output[1] if len(output) > 1 else output[0]).detach()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", BUILDERS)
def test_family(family: str, variant: str, tmp_path: Path) -> None:
    fields = {"r": 4, "target_modules": TARGETS.get(family)} | VARIANTS[variant]
    if family == "resnet" and variant == "all-linear":
        fields["target_modules"] = r".*convolution|classifier\.1"  # its head is its linear layer
    base, inputs = BUILDERS[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        theirs.save_pretrained(tmp_path)
        ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert ours.targeted_module_names == theirs.targeted_module_names

    theirs.eval()
    ours.eval()
    expected_loss, expected = loss_and_gradients(theirs, inputs)
    loss, actual = loss_and_gradients(ours, inputs)
    assert (loss - expected_loss).abs() <= 1e-5 * expected_loss.abs()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()

    places = {p.data_ptr(): p for p in ours.parameters()}
    gradients = {
        key: places[tensor.data_ptr()].grad for key, tensor in adapter_state_dict(ours).items()
    }
    largest = max(gradient.abs().max() for gradient in gradients.values() if gradient is not None)
    count = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            difference = gradients[name.replace(".default", "")] - parameter.grad
            # Some gradients are differences of large sums: relative to the largest of the model.
            assert difference.abs().max() <= 1e-4 * max(parameter.grad.abs().max(), 1e-2 * largest)
            count += 1
    assert count > 0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BLIP's decoder is tied to its embedding
        merged = ours.merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(m) for m in base.modules()]
    assert (merged(**inputs).loss - expected_loss).abs() <= 1e-5 * expected_loss.abs()
