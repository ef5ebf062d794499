"""Which bases and inputs are taken, under which names, and what is done to a layer over a base that
is the base's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
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
    return get_lora_model(nn.Sequential(linear), config).get_base_model()[0]


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


BASES: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(4, 4),
    "Conv1D": lambda: transformers.pytorch_utils.Conv1D(4, 4),
    "Embedding": lambda: nn.Embedding(4, 4),
    "Conv2d": lambda: nn.Conv2d(4, 4, 1),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
    "Halves": lambda: Halves(4, 4),
}


@pytest.mark.parametrize("name", BASES)
def test_unload_leaves_the_attributes_that_were_there(name: str) -> None:
    model = nn.Sequential(BASES[name]())
    before = dict(vars(model[0]))
    plain: Any = get_lora_model(model, LoraConfig(r=2, target_modules=["0"])).unload()
    assert vars(plain[0]).keys() == before.keys()
    assert {k: v for k, v in vars(plain[0]).items() if isinstance(v, bool | int | str | tuple)} == {
        k: v for k, v in before.items() if isinstance(v, bool | int | str | tuple)
    }


def test_the_base_of_a_merged_linear_has_the_attributes_of_a_linear() -> None:
    base = nn.Linear(4, 4)
    layer = lora.MergedLinear.from_linear(base, r=2, enable_lora=[True, False])
    assert vars(layer.get_base_layer()).keys() == vars(base).keys()


def test_an_encoder_gets_its_fast_path_back() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(block, 2).eval()
    encoder.layers[1].activation_relu_or_gelu = 0  # by hand

    def paths() -> list[Any]:
        blocks: Any = encoder.layers
        return [encoder.use_nested_tensor, *(block.activation_relu_or_gelu for block in blocks)]

    before, x = paths(), torch.randn(2, 3, 8)
    assert before == [True, 1, 0]
    config = LoraConfig(r=2, target_modules=["linear1"], init_lora_weights=False)
    with torch.no_grad():
        model = get_lora_model(encoder, config)
        inner = get_lora_model(encoder, LoraConfig(r=2, target_modules=["linear2"]))
        inner.unload()
        assert paths() == [False, 0, 0]  # the other's adapters are still there
        y = model(x)
        model.merge_and_unload()
        assert paths() == before
        torch.testing.assert_close(encoder(x), y, rtol=1e-5, atol=1e-5)


def test_a_scripted_module_is_refused() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="RecursiveScriptModule, which cannot be adapted"):
        get_lora_model(model, LoraConfig(r=2, target_modules=["0"]))
