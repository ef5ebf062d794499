"""LoRA-GA: gradients, factors and files as PEFT's, what they leave of a model, what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from calibration_models import (
    TARGETS,
    Net,
    gpt2,
    llama,
    loss,
    pefts,
    points,
    same_state,
    state_of,
    texts,
    training,
    twice,
)
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoraGAConfig, preprocess_loraga
from lora_ext.nn.calibrated import DIRECTIONS, SCALES, lora_ga_factors

theirs = pefts("tuners.lora.loraga")
LLAMA = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
NET = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"]}
QUIET = {"show_progress_bar": False}


def own_config(fields: dict[str, Any], **ga: Any) -> LoraConfig:
    return LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**ga), **fields)


def configs(fields: dict[str, Any], **ga: Any) -> tuple[peft.LoraConfig, LoraConfig]:
    config = peft.LoraGAConfig(**ga)
    return (
        peft.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=config, **fields),
        own_config(fields, **ga),
    )


def seeded(make: Any, *arguments: Any) -> Any:
    torch.manual_seed(5)
    return make(*arguments)


def gradients(model: nn.Module) -> dict[str, Any]:
    return {
        name: gradient
        for name, module in model.named_modules()
        if (gradient := vars(module).get("_peft_loraga_grad")) is not None
    }


def check_alike(for_peft: Any, own: Any) -> None:
    """The same numbers, of the same draws; products, whatever the signs."""
    expected = peft.get_peft_model_state_dict(for_peft)
    got = lora_ext.get_peft_model_state_dict(own)
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        unit = float(tensor.abs().max())
        assert float((got[key] - tensor).abs().max()) <= 1e-4 * unit, key
    for name, parameter in for_peft.named_parameters():
        if name.endswith("base_layer.weight"):
            weight = own.get_parameter(name.replace(".base_layer", ""))
            torch.testing.assert_close(weight, parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_language_model_as_peft(seed: int) -> None:
    base, data = llama(seed), texts(seed)
    one, other = twice(base)
    a, b = configs(LLAMA)
    theirs.preprocess_loraga(one, a, training(one, data))
    preprocess_loraga(other, b, training(other, data))
    assert gradients(one).keys() == gradients(other).keys()
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradients(other)[name], gradient, rtol=1e-4, atol=1e-6)
    for_peft, own = seeded(peft.get_peft_model, one, a), seeded(lora_ext.get_peft_model, other, b)
    check_alike(for_peft, own)
    assert not gradients(own)  # used up
    torch.testing.assert_close(own(**data[0]).logits, base(**data[0]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_directions_and_scales_as_peft(direction: str, scale: str) -> None:
    one, other = twice(Net())
    a, b = configs(NET, direction=direction, scale=scale, stable_gamma=8)
    theirs.preprocess_loraga(one, a, training(one, points()))
    preprocess_loraga(other, b, training(other, points()))
    for_peft, own = seeded(peft.get_peft_model, one, a), seeded(lora_ext.get_peft_model, other, b)
    check_alike(for_peft, own)
    x = points()[0]
    torch.testing.assert_close(own(x), Net()(x), rtol=1e-4, atol=1e-5)


def test_conv1d_as_peft() -> None:
    fields = {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    base, data = gpt2(), texts()
    one, other = twice(base)
    a, b = configs(fields)
    one.config.attn_pdrop = 0.0
    torch.manual_seed(0)
    theirs.preprocess_loraga(one, a, training(one, data))  # which trains, with dropout
    torch.manual_seed(0)
    preprocess_loraga(other, b, training(other, data))
    for_peft, own = seeded(peft.get_peft_model, one, a), seeded(lora_ext.get_peft_model, other, b)
    check_alike(for_peft, own)
    own.eval()
    torch.testing.assert_close(own(**data[0]).logits, base(**data[0]).logits, rtol=1e-4, atol=1e-5)


def test_factors_are_singular_vectors_of_the_gradient() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(14, 9, dtype=torch.double)
    U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
    A, B = lora_ga_factors(
        gradient, torch.randn(14, 9).double(), 2, 1.0,
        direction="ArB2r", scale="unit", stable_gamma=16, rows=14,
    )  # fmt: skip
    # The randomised SVD, with 8 of 9 vectors and 4 iterations, is exact to the ratio of singular
    # values to the ninth power.
    assert float(torch.linalg.svdvals(A @ Vh[:2].t()).min()) > 0.999
    assert float(torch.linalg.svdvals((B / B.norm(dim=0)).t() @ U[:, 2:4]).min()) > 0.999


def test_a_loader_is_as_a_step_that_runs_it() -> None:
    data = texts()
    one, other = twice(llama())
    config = own_config(LLAMA)
    preprocess_loraga(one, config, training(one, data))
    preprocess_loraga(other, config, dataloader=data, **QUIET)
    for name, gradient in gradients(one).items():
        assert torch.equal(gradient, gradients(other)[name])


def test_gradients_and_flags_of_a_model_stay_what_they_were() -> None:
    net = Net()
    net.second.bias.requires_grad_(False)
    loss(net, points()[0]).backward()
    before = state_of(net)
    preprocess_loraga(net, own_config(NET), dataloader=points(), forward_fn=loss, **QUIET)
    assert len(gradients(net)) == 2
    for module in net.modules():
        vars(module).pop("_peft_loraga_grad", None)
    assert same_state(before, state_of(net))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_start_as_the_base(dtype: torch.dtype) -> None:
    base, data = llama().to(dtype), texts()
    before = base(**data[0]).logits.detach().clone()
    config = own_config(LLAMA)
    preprocess_loraga(base, config, training(base, data))
    assert {g.dtype for g in gradients(base).values()} == {
        torch.promote_types(dtype, torch.float32)
    }
    own = lora_ext.get_peft_model(base, config)
    unit = max(torch.finfo(dtype).eps, 1e-7)
    got = own(**data[0]).logits.detach()
    assert float((got - before).abs().max()) <= 8 * unit * float(before.abs().max())


def test_files_go_both_ways(tmp_path: Path) -> None:
    base = Net()
    one, other = twice(base)
    a, b = configs(NET)
    theirs.preprocess_loraga(one, a, training(one, points()), str(tmp_path / "a" / "theirs.pt"))
    preprocess_loraga(other, b, None, tmp_path / "a" / "theirs.pt")
    third, fourth = twice(base)
    preprocess_loraga(third, b, training(third, points()), tmp_path / "b" / "ours.pt")
    theirs.preprocess_loraga(fourth, a, None, str(tmp_path / "b" / "ours.pt"))
    for name, gradient in gradients(one).items():
        assert torch.equal(gradient, gradients(other)[name])
        assert torch.equal(gradients(third)[name], gradients(fourth)[name])
    check_alike(seeded(peft.get_peft_model, fourth, a), seeded(lora_ext.get_peft_model, other, b))
