"""DoRA on convolutions and embeddings, against PEFT's and against the formula."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext.nn import Conv1d, Conv2d, Conv3d, Embedding

R, ALPHA = 4, 6
PLAIN: dict[str, Any] = {
    "1d": lambda **o: nn.Conv1d(4, 6, 3, **o),
    "2d": lambda **o: nn.Conv2d(4, 6, (3, 2), **o),
    "3d": lambda **o: nn.Conv3d(4, 6, (1, 3, 2), **o),
}
KIND: dict[str, Any] = {"1d": Conv1d, "2d": Conv2d, "3d": Conv3d}
CONVOLVE: dict[str, Any] = {"1d": F.conv1d, "2d": F.conv2d, "3d": F.conv3d}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False, "padding": 1},
    "stride, dilation": {"stride": 2, "dilation": 2, "padding": 2},
}


def randomise(layer: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("lora_magnitude"):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif name.startswith("lora_"):
                parameter.normal_(std=0.5)


def adapted(base: nn.Module, kind: str, **options: Any) -> Any:
    settings = {"r": R, "lora_alpha": ALPHA, "use_dora": True, **options}
    if kind == "embedding":
        layer = Embedding.from_embedding(base, **settings)
    else:
        layer = KIND[kind].from_conv(base, **settings)
    randomise(layer)
    return layer


def inputs(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if kind == "embedding":
        return torch.randint(0, 23, (3, 17), generator=generator)
    sizes = (9, 8, 7)[: int(kind[0])]
    return torch.randn(2, 4, *sizes, generator=generator).to(dtype).requires_grad_()


def base_of(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Embedding(23, 20, **options) if kind == "embedding" else PLAIN[kind](**options)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def trained(layer: Any, x: Tensor) -> list[Tensor]:
    return [p for p in (x, *layer.parameters()) if p.is_floating_point() and p.requires_grad]


# Against PEFT, whose lora_A does not dilate, and which has no groups for DoRA


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [*KIND, "embedding"])
def test_like_peft(kind: str, options: dict[str, Any]) -> None:
    options = {key: value for key, value in options.items() if key != "dilation"}
    if kind == "embedding":
        options = {"padding_idx": 3} if options else {}
    base = base_of(kind, **options)
    config = peft.LoraConfig(target_modules=["0"], r=R, lora_alpha=ALPHA, use_dora=True)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    layer = adapted(base, kind)
    peft_layer = theirs.base_model.model[0]
    state = {
        f"base_model.model.0.{key}": value.detach().clone()
        for key, value in layer.peft_parameters("default").items()
    }
    shapes = {k: v.shape for k, v in peft.get_peft_model_state_dict(theirs).items()}
    assert {k: v.shape for k, v in state.items()} == shapes
    peft.set_peft_model_state_dict(theirs, state)
    x, theirs_x = (inputs(kind, torch.float32) for _ in range(2))
    y, expected = layer(x), theirs(theirs_x)
    assert relative(y, expected) <= 1e-5
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    if kind == "embedding":
        A, B = peft_layer.lora_embedding_A.default.grad, peft_layer.lora_embedding_B.default.grad
    else:
        assert relative(x.grad, theirs_x.grad) <= 1e-4
        A, B = peft_layer.lora_A.default.weight.grad, peft_layer.lora_B.default.weight.grad
    assert relative(layer.lora_A.grad, A) <= 1e-4 and relative(layer.lora_B.grad, B) <= 1e-4
    magnitude = peft_layer.lora_magnitude_vector.default.weight.grad
    assert relative(layer.lora_magnitude_vector.grad, magnitude) <= 1e-4
    layer.merge()
    assert relative(layer(x), theirs.merge_and_unload()(theirs_x)) <= 1e-5


# Against the formula


def convolve(layer: Any, kind: str, x: Tensor, weight: Tensor) -> Tensor:
    if layer.padding_mode == "zeros":
        return CONVOLVE[kind](
            x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    return CONVOLVE[kind](padded, weight, None, layer.stride, 0, layer.dilation, layer.groups)


def delta(layer: Any) -> Tensor:
    """scaling * B A, group by group."""
    pairs = zip(
        layer.lora_A.flatten(1).chunk(layer.groups),
        layer.lora_B.flatten(1).chunk(layer.groups),
        strict=True,
    )
    return layer.get_scale() * torch.cat([B @ A for A, B in pairs]).view_as(layer.weight)


def conv_formula(layer: Any, kind: str, x: Tensor, dropped: Tensor) -> Tensor:
    direction = layer.weight + delta(layer)
    g = layer.lora_magnitude_vector.flatten() / direction.flatten(1).norm(dim=1).detach()
    g, channels = g.view(-1, *[1] * (x.dim() - 2)), (-1, *[1] * (x.dim() - 2))
    y = convolve(layer, kind, x, layer.weight)
    y = y + (g - 1) * convolve(layer, kind, dropped, layer.weight)
    y = y + g * convolve(layer, kind, dropped, delta(layer))
    return y if layer.bias is None else y + layer.bias.view(channels)


CONV_CASES: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "groups": {"groups": 2, "padding": 1},
    "reflect": {"padding": (1, 1, 1), "padding_mode": "circular"},
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("options", CONV_CASES.values(), ids=CONV_CASES)
@pytest.mark.parametrize("kind", KIND)
def test_conv_formula(kind: str, options: dict[str, Any], dropout_p: float) -> None:
    if "padding_mode" in options:
        options = options | {"padding": options["padding"][: int(kind[0])]}
    layer = adapted(base_of(kind, **options).double(), kind, lora_dropout=dropout_p)
    x = inputs(kind)
    torch.manual_seed(5)
    dropped = F.dropout(x, dropout_p)
    torch.manual_seed(5)
    y, expected = layer(x), conv_formula(layer, kind, x, dropped)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(y, trained(layer, x), dy)
    right = torch.autograd.grad(expected, trained(layer, x), dy)
    for gradient, other in zip(actual, right, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)
    layer.eval()
    before = layer(x)
    torch.testing.assert_close(before, conv_formula(layer, kind, x, x))
    layer.merge()
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_embedding_formula(options: dict[str, Any], sparse: bool) -> None:
    base = base_of("embedding", **options).double()
    layer = adapted(base, "embedding")
    layer.weight.requires_grad_(not sparse)
    layer.sparse = sparse
    index = inputs("embedding")
    direction = layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A).t()
    g = layer.lora_magnitude_vector / direction.norm(dim=0).detach()
    # lora_A is looked up as the base is, which matters to gradients.
    hidden = F.embedding(index, layer.lora_A.t(), **options)
    base_rows = F.embedding(index, layer.weight, **options)
    expected = g * (base_rows + layer.scaling * hidden @ layer.lora_B.t())
    y = layer(index)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    wanted = trained(layer, index)
    for gradient, right in zip(
        torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True
    ):
        torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-12)
    layer.merge()
    torch.testing.assert_close(layer(index), y)


@pytest.mark.parametrize("kind", [*KIND, "embedding"])
def test_begins_as_the_base(kind: str) -> None:
    base = base_of(kind)
    make = Embedding.from_embedding if kind == "embedding" else KIND[kind].from_conv
    layer = make(base, R, ALPHA, use_dora=True)
    x = inputs(kind, torch.float32)
    torch.testing.assert_close(layer(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*KIND, "embedding"])
def test_merging(kind: str, dtype: torch.dtype) -> None:
    layer = adapted(base_of(kind).to(dtype), kind)
    layer.add_adapter("plain", r=2, init_lora_weights=False)
    layer.add_adapter("other", r=2, use_dora=True, init_lora_weights=False)
    layer.set_adapter(["plain", "default", "other"])
    x, weight = inputs(kind, dtype), layer.weight.clone()
    exact = copy.deepcopy(layer).double()
    y = exact(x if kind == "embedding" else x.double())
    for _ in range(100):
        layer.merge()
        assert not torch.equal(layer.weight, weight)
        layer.unmerge()
        assert torch.equal(layer.weight, weight)
    exact.merge()
    layer.merge()
    eps = torch.finfo(dtype).eps
    error = (layer.weight.double() - exact.weight).abs()
    assert (error <= eps / 2 * exact.weight.abs() + 1e-6 * exact.weight.abs().max()).all()
    torch.testing.assert_close(exact(x if kind == "embedding" else x.double()), y)
    layer.unmerge()
    with torch.no_grad():
        layer.lora_magnitude_vector.view(-1)[1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("kind", [*KIND, "embedding"])
def test_half_precision(kind: str) -> None:
    layer = adapted(base_of(kind).bfloat16(), kind)
    x = inputs(kind, torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    truth = exact(x if kind == "embedding" else x.double())
    y = layer(x)
    assert y.dtype == torch.bfloat16
    # z and y are rounded once each, and g * z is no larger than y beside the bias.
    bound = 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (y.double() - truth).abs().max() <= bound


def test_embedding_with_max_norm_has_no_dora() -> None:
    layer = Embedding(5, 4, max_norm=1.0)
    with pytest.raises(ValueError, match="use_dora: got True with max_norm"):
        layer.add_adapter("default", use_dora=True)
    assert not layer.adapters and layer.lora_A is None
