"""`convert_to_lora` over our own layers, against what merging adds to the weight in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from converted_layers import ALL, OPTIONS, PREFIX, Doubled, Net, X, adapted, filled
from torch import Tensor, nn

import lora_ext
from lora_ext import LoraConfig, LoraModel, convert_to_lora, get_lora_model


def added(model: Any, name: str) -> Tensor:
    """What merging adds to a weight [N, K], of the model in float64."""
    layer = model.double().get_base_model().get_submodule(name)
    before = layer.weight.detach().clone()
    layer.merge()
    delta = layer.weight.detach() - before
    layer.unmerge()
    return delta.t() if layer.fan_in_fan_out else delta


def delta_of(state: dict[str, Tensor], name: str, prefix: str = PREFIX) -> Tensor:
    A, B = (state[f"{prefix}{name}.lora_{part}.weight"].double() for part in "AB")
    return B @ A


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.filterwarnings("ignore:convert_to_lora")
def test_all_of_it_by_a_share_of_one(kind: str, tmp_path: Path) -> None:
    """Float32 sums of squares leave out what is below its eps of them: sqrt(eps) of the norm."""
    model = adapted(kind)
    config, state = convert_to_lora(model, 1.0)
    dtype = torch.float32  # of adapters, on a bfloat16 base too
    assert all(tensor.dtype is dtype for tensor in state.values())
    lora_ext.save_as_lora(tmp_path, model, 1.0)
    outputs = model(X.to(model.get_base_model().first.weight.dtype))
    again = LoraModel.from_pretrained(Net().bfloat16() if kind == "16 bits" else Net(), tmp_path)
    got = again(X.to(outputs.dtype))
    eps = torch.finfo(outputs.dtype).eps
    scale = float(outputs.abs().max())
    assert (got - outputs).abs().max() <= max(8 * eps, 1e-3) * max(scale, 1.0)
    for name in config.rank_pattern or {}:
        exact = added(model, name)
        error = (delta_of(state, name) - exact).norm() / exact.norm()
        assert error <= 2 * torch.finfo(dtype).eps ** 0.5, name


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "BD-LoRA"])
@pytest.mark.filterwarnings("ignore:convert_to_lora")
def test_a_smaller_rank_is_the_nearest_of_that_rank(kind: str) -> None:
    """Eckart and Young: what is left has the norm of the singular values that are left out."""
    model = adapted(kind)
    config, state = convert_to_lora(model, 2)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (2, 2, {})
    for name in config.target_modules:
        exact = added(model, name)
        S = torch.linalg.svdvals(exact)
        left = (exact - delta_of(state, name)).norm()
        assert abs(left - S[2:].norm()) <= 100 * torch.finfo(torch.float32).eps * S[0], name


@pytest.mark.filterwarnings("ignore:convert_to_lora")
def test_shares_are_kept_by_the_smallest_ranks() -> None:
    model = adapted()
    config, _ = convert_to_lora(model, 0.7)
    assert config.rank_pattern.keys() == set(ALL) and config.rank_pattern == config.alpha_pattern
    for name, r in config.rank_pattern.items():
        squares = torch.linalg.svdvals(added(model, name)).square()
        shares = squares.cumsum(0) / squares.sum()
        assert shares[r - 1] >= 0.7 > (shares[r - 2] if r > 1 else 0)


@pytest.mark.filterwarnings("ignore:convert_to_lora")
def test_a_larger_rank_than_it_has() -> None:
    """The further vectors are orthonormal ones, which can be trained; they add nothing."""
    model = adapted()
    _, state = convert_to_lora(model, 6)
    A = state[f"{PREFIX}first.lora_A.weight"]
    torch.testing.assert_close(A @ A.t(), torch.eye(6), rtol=0, atol=1e-5)
    exact = added(model, "first")
    torch.testing.assert_close(delta_of(state, "first"), exact, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:convert_to_lora")
def test_peft_makes_the_same_of_the_same_adapter(tmp_path: Path) -> None:
    from peft.tuners.lora.conversion import convert_to_lora as theirs

    model = adapted()
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(Net(), tmp_path)
    for rank in (3, 0.8):
        config, state = convert_to_lora(model, rank)
        expected_config, expected = theirs(other, rank)
        assert config.rank_pattern == expected_config.rank_pattern
        assert state.keys() == expected.keys()
        for name in ALL:
            want = delta_of(expected, name)
            assert (delta_of(state, name) - want).abs().max() <= 1e-5 * want.abs().max()


def test_slices_become_a_plain_adapter() -> None:
    torch.manual_seed(0)
    layer = lora_ext.nn.MergedLinear(12, 24, r=2, enable_lora=[True, False, True], lora_alpha=3)
    nn.init.normal_(layer.lora_B)  # type: ignore[arg-type]
    model = nn.Sequential(layer)
    config, state = convert_to_lora(model, 4)
    assert config.target_modules == ["0"] and config.r == config.lora_alpha == 4
    delta = layer.get_delta_weight("default").double()
    torch.testing.assert_close(delta_of(state, "0", ""), delta, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:convert_to_lora")
def test_layers_by_hand_injected_quantized_and_with_a_forward_of_their_own(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["first"])
    hand, injected = Net(), Net()
    lora_ext.replace_linear(hand, target_modules=["first"], r=3)
    lora_ext.mark_only_lora_as_trainable(hand)
    lora_ext.inject_adapter_in_model(config, injected)
    models = [hand, injected, get_lora_model(Net(Doubled), config)]
    quantized = nn.ModuleDict({"first": nn.Linear(64, 64)})
    lora_ext.quant.quantize_(quantized, "nf4")
    models.append(get_lora_model(quantized, config))
    for model, prefix in zip(models, ("", "", PREFIX, PREFIX), strict=True):
        filled(model)
        _, state = convert_to_lora(model, 3)
        parts = model.get_submodule("first" if not prefix else f"{PREFIX}first").parts("default")
        exact = parts["lora_B"].double() @ parts["lora_A"].double() * (8 / 3)
        torch.testing.assert_close(delta_of(state, "first", prefix), exact, rtol=0, atol=1e-4)
    lora_ext.save_as_lora(tmp_path, hand, 3)
    again = LoraModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(again(X), hand(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:convert_to_lora")
def test_one_of_several_adapters_with_what_is_saved_whole(tmp_path: Path) -> None:
    model = get_lora_model(Net(), LoraConfig(r=2, target_modules=["second"]))
    fields = {"target_modules": ["first"], "modules_to_save": ["head"], "task_type": "CAUSAL_LM"}
    model.add_adapter("other", LoraConfig(r=3, **fields))
    model.set_adapter("other")
    filled(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = model(X)
    model.merge_adapter(["other"])
    config, state = convert_to_lora(model, 3, "other")
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    assert set(state) == {f"{PREFIX}first.lora_{p}.weight" for p in "AB"} | {
        f"{PREFIX}head.{p}" for p in ("weight", "bias")
    }
    assert (config.task_type, config.modules_to_save) == ("CAUSAL_LM", ["head"])
    lora_ext.save_as_lora(tmp_path, model, 3, "other")
    again = LoraModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(again(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:convert_to_lora")
def test_progress_and_compiled_decompositions() -> None:
    model = adapted()
    _, expected = convert_to_lora(model, 2)
    _, got = convert_to_lora(model, 2, progressbar=True, compile_kwargs={"backend": "eager"})
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
