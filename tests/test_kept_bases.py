"""Which bases and inputs are taken, under which names, and what is done to a layer over a base that
is the base's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import lora_ext.nn as lora
from lora_ext import LoraConfig, get_lora_model


class Scaled(nn.Linear):
    def forward(self, *, scale: float = 1.0, input: Tensor) -> Tensor:
        return super().forward(input) * scale


class Halves(nn.Linear):
    """Has a call of its own, and computes with whatever its weight is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5)


class Rows(nn.Embedding):
    """Is no other than an embedding."""


def kept(base: nn.Module | None = None) -> Any:
    linear = Halves(4, 4) if base is None else base
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return get_lora_model(nn.Sequential(linear), config).base_model[0]


DENSE = torch.randn(8, 8)
WEIGHTS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "COO": (DENSE.to_sparse, "sparse_coo"),
    "CSR": (DENSE.to_sparse_csr, "sparse_csr"),
    "mkldnn": (DENSE.to_mkldnn, "mkldnn"),
    "nested": (lambda: torch.nested.nested_tensor([DENSE[:3], DENSE[3:]]), "nested"),
    "float8": (lambda: DENSE.to(torch.float8_e4m3fn), "float8_e4m3fn, expected float64"),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors).*")
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding, Rows])
@pytest.mark.parametrize("name", WEIGHTS)
def test_bases_that_cannot_be_computed_with_are_refused(name: str, kind: type[nn.Module]) -> None:
    make, message = WEIGHTS[name]
    base = nn.Sequential(kind(8, 8))
    base[0].weight = nn.Parameter(make(), requires_grad=False)
    layer = base[0]
    with pytest.raises(TypeError, match=rf"its weight is .*{message}"):
        get_lora_model(base, LoraConfig(r=2, target_modules=["0"]))
    assert base[0] is layer


def test_a_base_that_is_called_has_any_weight() -> None:
    base, x = Halves(8, 8, bias=False), torch.randn(2, 8)
    base.weight = nn.Parameter(DENSE.to_sparse(), requires_grad=False)
    layer = kept(base)
    want = base(x) + layer.get_scale("default") * (x @ layer.lora_A.t() @ layer.lora_B.t())
    torch.testing.assert_close(layer(x), want)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_are_refused(layout: torch.layout) -> None:
    x = torch.nested.nested_tensor([DENSE[:3], DENSE[3:]], layout=layout)
    for layer in (lora.Linear(8, 8, r=2), lora.MergedLinear(8, 8, r=2, enable_lora=[True, False])):
        with pytest.raises(TypeError, match=r"x: got a nested tensor.*to_padded_tensor"):
            layer(x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear": (lambda: lora.Linear(8, 6, r=2), torch.randn(2, 8)),
    "MergedLinear": (
        lambda: lora.MergedLinear(8, 6, r=2, enable_lora=[True, False]),
        torch.randn(2, 8),
    ),
    "Conv1d": (lambda: lora.Conv1d(3, 6, 3, r=2), torch.randn(1, 3, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_input_and_x_are_names_of_one_argument(name: str) -> None:
    """As of torch.nn, whose layers these stand for, and as of PEFT's."""
    make, x = LAYERS[name]
    layer = make()
    assert torch.equal(layer(input=x), layer(x)) and torch.equal(layer(x=x), layer(x))
    for arguments, got in (({}, "neither of"), ({"x": x, "input": x}, "both")):
        with pytest.raises(TypeError, match=f"{name}: x: got {got} x and input"):
            layer(**arguments)


def test_the_input_is_found_by_its_name() -> None:
    base, x = Scaled(4, 4), torch.randn(2, 4)
    layer = kept(base)
    want = base(input=x, scale=3.0) + layer.get_scale("default") * (
        x @ layer.lora_A.t() @ layer.lora_B.t()
    )
    torch.testing.assert_close(layer(scale=3.0, input=x), want)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
@pytest.mark.parametrize(
    "change",
    [lambda m: prune.l1_unstructured(m, "weight", 0.5), weight_norm, spectral_norm],
    ids=["prune", "weight_norm", "spectral_norm"],
)
def test_what_computes_the_bases_weight_is_for_the_base(
    change: Callable[[nn.Module], Any], copied: bool
) -> None:
    layer = kept()
    layer.add_adapter("other", r=2)
    if copied:
        layer = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    x, before = torch.randn(2, 4), list(layer.state_dict())
    y = layer(x)
    with pytest.raises(KeyError, match=r"weight: is a parameter of the layer's base_layer"):
        change(layer)
    assert list(layer.state_dict()) == before and torch.equal(layer(x), y)
    change(layer.base_layer)
    assert layer(x).shape == y.shape


def test_a_layer_over_a_base_compiles_whole() -> None:
    layer, x = kept(), torch.randn(2, 4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
