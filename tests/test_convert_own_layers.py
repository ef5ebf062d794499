"""`convert_to_lora` over our own layers, against what merging adds to the weight in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_ext
from lora_ext import BdLoraConfig, LoraConfig, LoraModel, convert_to_lora, get_lora_model

PREFIX = "base_model.model."
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


class Doubled(nn.Linear):
    """A base with a forward of its own, which is no product with the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Net(nn.Module):
    def __init__(self, kind: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = kind(12, 16), nn.Linear(16, 12)
        self.turned, self.head = Conv1D(8, 12), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.turned(self.second(self.first(x).tanh())))


ALL = ["first", "second", "turned"]
OPTIONS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA and patterns": {"use_rslora": True, "rank_pattern": {"first": 2}, "lora_alpha": 3},
    "DoRA": {"use_dora": True},
    "BD-LoRA": {
        "use_bdlora": BdLoraConfig(["first"], nblocks=2, match_strict=False),
        "target_modules": ["first", "second"],
    },
    "16 bits": {},
}


def filled(model: Any, std: float = 0.5) -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            nn.init.normal_(parameter, std=std)
        elif parameter.requires_grad:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return model.eval()


def adapted(kind: str = "LoRA", **more: Any) -> Any:
    fields: dict[str, Any] = {"r": 4, "target_modules": ALL} | OPTIONS[kind] | more
    base = Net().bfloat16() if kind == "16 bits" else Net()
    return filled(get_lora_model(base, LoraConfig(**fields)))


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


def shaped(**modules: nn.Module) -> nn.Module:
    return nn.ModuleDict(modules)


def with_nan(model: Any) -> Any:
    model.get_base_model().first.lora_B.data[0] = float("nan")
    return model


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "convolution": (
        lambda: get_lora_model(shaped(a=nn.Conv2d(3, 4, 3)), LoraConfig(target_modules=["a"])),
        TypeError,
        r"lora_ext\.nn\.conv\.Conv2d",
    ),
    "embedding": (
        lambda: get_lora_model(shaped(a=nn.Embedding(5, 4)), LoraConfig(target_modules=["a"])),
        TypeError,
        "Embedding",
    ),
    "aLoRA": (
        lambda: get_lora_model(
            Net(),
            LoraConfig(
                target_modules=["first"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"
            ),
        ),
        TypeError,
        r"nn\.linear\.Linear",
    ),
    "rows": (
        lambda: get_lora_model(
            shaped(a=nn.Linear(4, 4), e=nn.Embedding(5, 4)),
            LoraConfig(target_modules=["a"], trainable_token_indices={"e": [1]}),
        ),
        TypeError,
        "TrainableTokensLayer",
    ),
    "bias": (lambda: adapted(bias="lora_only"), ValueError, "bias: got 'lora_only'"),
    "lora_bias": (lambda: adapted(lora_bias=True), ValueError, "lora_bias: got True"),
    "rank": (adapted, ValueError, "rank: got 9, expected at most 8.*'turned'"),
    "nothing": (Net, TypeError, "Could not detect any layer"),
    "NaN": (lambda: with_nan(adapted()), ValueError, "has NaN or Inf"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_linear_update_is_refused(case: str, tmp_path: Path) -> None:
    make, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        lora_ext.save_as_lora(tmp_path / "new", make(), 9 if case == "rank" else 2)
    assert not (tmp_path / "new").exists()


def test_who_can_be_converted_says_so() -> None:
    model = adapted()
    assert model.supports_lora_conversion() and model.base_model.supports_lora_conversion("default")
    assert model.get_base_model().first.supports_lora_conversion()
    make, _, _ = REFUSED["rows"]
    assert not make().supports_lora_conversion()
    with pytest.raises(ValueError, match="adapter_name: got 'other'"):
        convert_to_lora(model, 2, "other")


@pytest.mark.filterwarnings("ignore:convert_to_lora")
def test_progress_and_compiled_decompositions() -> None:
    model = adapted()
    _, expected = convert_to_lora(model, 2)
    _, got = convert_to_lora(model, 2, progressbar=True, compile_kwargs={"backend": "eager"})
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
