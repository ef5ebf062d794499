"""DoRA layers against PEFT's and against the formula."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import peft
import pytest
import torch
from problems import rms
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_ext
from lora_ext import reference, replace_linear
from lora_ext.nn import Linear

IN, OUT, R = 24, 20, 4


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(
    dtype: torch.dtype = torch.float64, lora_dropout: float = 0.0, **options: bool
) -> Linear:
    """B is not zero, and the magnitude is not the norm."""
    torch.manual_seed(0)
    layer = Linear(
        IN, OUT, R, 2 * R, lora_dropout, use_dora=True, init_lora_weights=False, dtype=dtype,
        **options,
    )  # fmt: skip
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(torch.rand(OUT) + 0.5)
    return layer


def formula(layer: Linear, x: Tensor, mask: Tensor | None = None) -> Tensor:
    weight = layer.weight.t() if layer.fan_in_fan_out else layer.weight
    return reference.dora_linear(
        x,
        weight,
        layer.bias,
        layer.lora_A,
        layer.lora_B,
        layer.lora_magnitude_vector,
        scaling=layer.scaling,
        dropout_p=layer.lora_dropout,
        mask=mask,
    )


def gradients(layer: Linear, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *layer.parameters()], seeded(*y.shape, seed=3).to(y)))


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# Against PEFT

MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "linear": lambda: nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 32), nn.GELU(),
                                    nn.Linear(32, 16)),
    "no bias": lambda: nn.Sequential(nn.Linear(24, 40, bias=False), nn.Tanh(),
                                     nn.Linear(40, 16, bias=False)),
    "fan_in_fan_out": lambda: nn.Sequential(Conv1D(40, 24), nn.GELU(), Conv1D(16, 40)),
}  # fmt: skip


def pair_with_peft(
    kind: str, use_rslora: bool, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module, list[tuple[Linear, nn.Module]]]:
    torch.manual_seed(0)
    base = MODELS[kind]().to(dtype)
    names = [n for n, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    config = peft.LoraConfig(
        target_modules=names, r=R, lora_alpha=6, use_dora=True, use_rslora=use_rslora,
        init_lora_weights=False, fan_in_fan_out=kind == "fan_in_fan_out",
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours, pairs = copy.deepcopy(base), []
    for name in names:
        module = ours.get_submodule(name)
        make = Linear.from_conv1d if isinstance(module, Conv1D) else Linear.from_linear
        layer = make(module, R, 6, use_dora=True, use_rslora=use_rslora)
        ours[int(name)] = layer
        pairs.append((layer, theirs.base_model.model.get_submodule(name)))
        state = peft.get_peft_model_state_dict(theirs)
        with torch.no_grad():
            for key, parameter in layer.peft_parameters("default").items():
                parameter.copy_(state[f"base_model.model.{name}.{key}"])
    return ours, theirs, pairs


@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("kind", MODELS)
def test_like_peft(kind: str, use_rslora: bool) -> None:
    ours, theirs, pairs = pair_with_peft(kind, use_rslora)
    for layer, peft_layer in pairs:  # PEFT begins with the norm; so does a layer reset to it
        norm, magnitude = layer._weight_norm("default"), layer.lora_magnitude_vector
        torch.testing.assert_close(norm, peft_layer.lora_magnitude_vector.default.weight.detach())
        with torch.no_grad():
            magnitude.mul_(torch.rand_like(magnitude) + 0.5)
            peft_layer.lora_magnitude_vector.default.weight.copy_(magnitude)
    x = seeded(5, 7, 24, dtype=torch.float32)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = ours(inputs[0]), theirs(inputs[1])
    assert relative(y, expected) <= 1e-5
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-4
    for layer, peft_layer in pairs:
        gradients = {
            "lora_A": peft_layer.lora_A.default.weight.grad,
            "lora_B": peft_layer.lora_B.default.weight.grad,
            "lora_magnitude_vector": peft_layer.lora_magnitude_vector.default.weight.grad,
        }
        for name, gradient in gradients.items():
            assert relative(getattr(layer, name).grad, gradient) <= 1e-4, name
    for layer, _ in pairs:
        layer.merge()
    merged = theirs.merge_and_unload()
    assert relative(ours(x), merged(x)) <= 1e-5


def test_several_adapters_in_their_order_like_peft() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT)).double()
    options = {"r": R, "init_lora_weights": False, "target_modules": ["0"]}
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(lora_alpha=3, **options), "plain"
    )
    layer = Linear.from_linear(base[0], R, 3, adapter_name="plain")
    for name, alpha in (("scaled", 2), ("again", 5)):
        theirs.add_adapter(name, peft.LoraConfig(lora_alpha=alpha, use_dora=True, **options))
        layer.add_adapter(name, r=R, lora_alpha=alpha, use_dora=True)
    peft_layer = theirs.base_model.model[0]
    for name in layer.adapters:
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        with torch.no_grad():
            for key, parameter in layer.peft_parameters(name).items():
                value = state[f"base_model.model.0.{key}"]
                if key == "lora_magnitude_vector":
                    value *= torch.rand_like(value) + 0.5  # PEFT's own
                parameter.copy_(value)
    x = seeded(3, IN)
    for names in (["scaled", "plain"], ["plain", "again", "scaled"], ["again", "scaled"]):
        layer.set_adapter(names)
        theirs.base_model.set_adapter(names)
        assert tuple(peft_layer.active_adapters) == layer.active_adapters
        torch.testing.assert_close(layer(x), theirs(x), rtol=1e-12, atol=1e-12)
        layer.merge()
        peft_layer.merge()
        torch.testing.assert_close(layer.weight, peft_layer.weight, rtol=1e-12, atol=1e-12)
        layer.unmerge()
        peft_layer.unmerge()


# Against the formula


@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["", "fan_in_fan_out"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
def test_formula_in_float64(dropout_p: float, bias: bool, fan_in_fan_out: bool) -> None:
    layer = layer_of(lora_dropout=dropout_p, bias=bias, fan_in_fan_out=fan_in_fan_out)
    x, mask = seeded(3, 5, IN).requires_grad_(), None
    if dropout_p > 0:
        torch.manual_seed(7)
        mask = lora_ext.dropout_mask(lora_ext.draw_rng_state(x), 15, IN, dropout_p)
    torch.manual_seed(7)
    y, expected = layer(x), formula(layer, x, mask)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for actual, right in zip(gradients(layer, x, y), gradients(layer, x, expected), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.eval()(x), formula(layer, x), rtol=1e-12, atol=1e-12)


def test_numerical_gradients() -> None:
    layer, x = layer_of(), seeded(3, IN).requires_grad_()
    # The norm is a constant, so lora_A and lora_B have another derivative than the function.
    for wanted in (x, layer.lora_magnitude_vector, layer.bias):
        call = lambda t: layer(x)  # noqa: E731
        assert torch.autograd.gradcheck(call, wanted)
        assert torch.autograd.gradgradcheck(call, wanted)


def composed(layer: Linear, x: Tensor) -> Tensor:
    """PEFT's own steps, rounded after each as PyTorch does."""
    A, B, magnitude = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    result = nn.functional.linear(x, layer.weight, layer.bias)
    delta = layer.scaling * (B @ A).to(x.dtype)
    norm = torch.linalg.norm(layer.weight + delta, dim=1).to(x.dtype).detach()
    g = (magnitude / norm).view(1, -1)
    low_rank = (x.to(A.dtype) @ A.t()) @ B.t()
    update = (g - 1) * (result - layer.bias) + g * low_rank * layer.scaling
    return (result + update).to(x.dtype)


@pytest.mark.parametrize("adapters_in_float", [True, False], ids=["fp32 adapters", "16-bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_further_from_exact_than_plain_pytorch(
    dtype: torch.dtype, adapters_in_float: bool
) -> None:
    torch.manual_seed(0)
    layer = Linear(96, 80, 8, 16, use_dora=True, init_lora_weights=False, dtype=dtype,
                   autocast_adapter_dtype=adapters_in_float)  # fmt: skip
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(torch.rand(80) + 0.5)
    exact = copy.deepcopy(layer).double()
    x = seeded(300, 96, dtype=dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    truth = formula(exact, exact_x)
    right, results = [truth, *gradients(exact, exact_x, truth)], []
    for y in (layer(x), composed(layer, x)):
        parts = [y, *gradients(layer, x, y)]
        results.append([rms(a - b) for a, b in zip(parts, right, strict=True)])
    names = ["y", "dx", *dict(layer.named_parameters())]
    # Here base and update are rounded together, there the base alone: that error is larger as their
    # sum is. Two samples of the same rounding differ by a percent.
    base = exact_x @ exact.weight.t()
    both = base + exact.scaling * exact_x @ exact.lora_A.t() @ exact.lora_B.t()
    bound = 1.02 * max(1.0, rms(both) / rms(base))
    direction = exact.weight + exact.scaling * exact.lora_B @ exact.lora_A
    norm = torch.linalg.vector_norm(direction, dim=1)
    # The gradient of the magnitude reads z = x W'^T, rounded once, by at most eps / 2 of it.
    # PyTorch keeps the update apart, in float32 beside float32 adapters.
    terms = seeded(300, 80, seed=3).to(dtype).double() * (exact_x @ direction.t()) / norm
    magnitude_bound = torch.finfo(dtype).eps / 2 * terms.pow(2).sum(0).mean().sqrt().item()
    for name, ours, plain in zip(names, *results, strict=True):
        limit = magnitude_bound if name == "lora_magnitude_vector" else bound * plain
        assert ours <= limit, name


# The magnitude


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", [True, "gaussian", False], ids=str)
def test_begins_as_the_norm(dtype: torch.dtype, init: bool | str) -> None:
    layer = Linear(IN, OUT, R, use_dora=True, init_lora_weights=init, dtype=dtype)
    compute = torch.promote_types(dtype, torch.float32)
    assert layer.lora_magnitude_vector.shape == (OUT,)
    assert layer.lora_magnitude_vector.dtype == compute
    exact = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    norm = torch.linalg.vector_norm(exact, dim=1)
    torch.testing.assert_close(
        layer.lora_magnitude_vector.double(), norm, rtol=IN * torch.finfo(compute).eps, atol=0
    )
    x = seeded(3, IN, dtype=dtype)
    if init is not False:  # a new adapter changes nothing
        base = nn.functional.linear(x, layer.weight, layer.bias)
        # Rounded before and after the bias.
        limit = 2 * torch.finfo(dtype).eps * base.abs().max()
        torch.testing.assert_close(layer(x), base, rtol=0, atol=float(limit))


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.randn(OUT, IN)
    weight[3] = 0
    base = nn.Linear(IN, OUT)
    base.weight.data.copy_(weight)
    layer = Linear.from_linear(base, R, use_dora=True)
    x = seeded(2, IN, dtype=torch.float32)
    y = layer(x)
    assert torch.equal(y[:, 3], base.bias[3].expand(2))
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_norm_follows_weight_and_scale() -> None:
    layer, x = layer_of(), seeded(3, IN)
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(3).add_(0.1)
    torch.testing.assert_close(layer(x), formula(layer, x))
    layer.weight.data = torch.randn_like(layer.weight)
    torch.testing.assert_close(layer(x), formula(layer, x))
    layer.load_state_dict(layer_of().state_dict())
    torch.testing.assert_close(layer(x), formula(layer, x))
    layer.set_scale("default", 0.3)
    torch.testing.assert_close(layer(x), formula(layer, x))
    layer.set_scale("default", 0.0)  # off, magnitude and all
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_frozen_parts_get_no_gradient() -> None:
    layer, x = layer_of(), seeded(3, IN)
    lora_ext.mark_only_lora_as_trainable(layer)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B", "lora_magnitude_vector"
    }  # fmt: skip
    layer.lora_magnitude_vector.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.lora_magnitude_vector.grad is None and layer.weight.grad is None
    expected = torch.autograd.grad(formula(layer, x).sum(), layer.lora_A)[0]
    torch.testing.assert_close(layer.lora_A.grad, expected)


# Merging


@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["", "fan_in_fan_out"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merged_is_one_rounding_of_the_formula(dtype: torch.dtype, fan_in_fan_out: bool) -> None:
    layer = layer_of(dtype, fan_in_fan_out=fan_in_fan_out)
    x, y = seeded(6, IN, dtype=dtype), None
    exact = copy.deepcopy(layer).double()
    y = layer.eval()(x)
    weight = exact.weight.t() if fan_in_fan_out else exact.weight
    direction = weight + exact.scaling * exact.lora_B @ exact.lora_A
    norm = torch.linalg.vector_norm(direction, dim=1)
    truth = (exact.lora_magnitude_vector / norm).unsqueeze(1) * direction
    truth = truth.t() if fan_in_fan_out else truth
    bias = layer.bias.clone()
    layer.merge()
    eps, compute_eps = torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 1e-14
    error = (layer.weight.double() - truth).abs()
    assert (error <= eps / 2 * truth.abs() + compute_eps * truth.abs().max()).all()
    assert torch.equal(layer.bias, bias)
    merged = formula(exact, x.double())
    # K products of x with weights that were rounded once, and the rounding of y.
    bound = eps * (x.double().abs() @ truth.abs().t() if not fan_in_fan_out else
                   x.double().abs() @ truth.abs()) + eps * merged.abs() + compute_eps  # fmt: skip
    assert ((layer(x).double() - merged).abs() <= bound).all()
    assert ((y.double() - merged).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hundred_cycles_with_a_new_adapter_each(dtype: torch.dtype) -> None:
    layer = layer_of(dtype)
    weight = layer.weight.clone()
    for seed in range(100):
        with torch.no_grad():
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                parameter = getattr(layer, part)
                parameter.copy_(seeded(*parameter.shape, seed=seed))
        layer.merge()
        assert not torch.equal(layer.weight, weight)
        layer.unmerge()
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_merge_refuses_what_is_not_finite(part: str) -> None:
    layer = layer_of(torch.float32)
    weight = layer.weight.clone()
    with torch.no_grad():
        getattr(layer, part).view(-1)[1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.weight, weight)


def test_merging_with_a_plain_adapter_that_has_a_bias() -> None:
    layer, x = layer_of(), seeded(3, IN)
    layer.add_adapter("biased", r=2, lora_bias=True, init_lora_weights=False)
    nn.init.normal_(layer.lora_bias_biased)
    for names in (["default", "biased"], ["biased", "default"]):
        layer.set_adapter(names)
        y = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), y)
        layer.unmerge()


def test_an_adapter_added_while_merged_measures_the_base() -> None:
    layer = layer_of()
    layer.merge()
    layer.add_adapter("other", r=2, use_dora=True)
    layer.unmerge()
    norm = torch.linalg.vector_norm(layer.weight, dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector_other, norm)


# Around the layer


def test_state_dict_copies_and_names() -> None:
    layer, x = layer_of(), seeded(3, IN)
    assert "lora_magnitude_vector" in layer.state_dict() and "use_dora=True" in repr(layer)
    assert set(lora_ext.lora_state_dict(layer)) == {"lora_A", "lora_B", "lora_magnitude_vector"}
    other = Linear(IN, OUT, R, 2 * R, use_dora=True, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), layer(x))
    y = layer(x)
    layer.rename_adapter("default", "french")
    assert layer.lora_magnitude_vector is None and torch.equal(layer(x), y)
    assert layer.lora_magnitude_vector_french.shape == (OUT,)
    layer.delete_adapter("french")
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_replace_linear_takes_the_option() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, 3))
    replace_linear(model, ["0", "2"], r=2, use_dora=True)
    assert model[0].lora_magnitude_vector.shape == (OUT,) and model[2].adapters["default"].use_dora
    assert "one more pass" in str(lora_ext.explain(model))
    assert model(seeded(2, IN, dtype=torch.float32)).shape == (2, 3)


def test_under_autocast_and_compile() -> None:
    layer, x = layer_of(torch.float32), seeded(6, IN, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative(y.float(), formula(layer, x)) <= 4 * torch.finfo(torch.bfloat16).eps
    y.sum().backward()
    assert torch.isfinite(layer.lora_magnitude_vector.grad).all()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    for actual, right in zip(gradients(layer, x, y), gradients(layer, x, expected), strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_activation_checkpointing_draws_the_same_mask(training: bool) -> None:
    layer = layer_of(lora_dropout=0.4).train(training)
    x, results = seeded(5, IN).requires_grad_(), []
    for checkpoint in (False, True):
        torch.manual_seed(5)
        if checkpoint:
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        else:
            y = layer(x)
        results.append([y, *gradients(layer, x, y)])
    for actual, right in zip(*results, strict=True):
        assert torch.equal(actual, right)
