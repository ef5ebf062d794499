"""`lora_ext.quant.quantize_`, and what its layers save and load."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from quantized_problems import (
    K,
    N,
    inputs,
    plain_linear,
)
from torch import nn

import lora_ext
from lora_ext import quant

pytestmark = pytest.mark.usefixtures("one_thread")


def test_quantizing_a_model() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    x = torch.randn(2, 5, 32)
    plain = copy.deepcopy(model).eval()
    names = quant.quantize_(model, "int8", exclude_modules=["1.linear2"])
    assert names == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1"]
    assert [type(model.get_submodule(name)) for name in names] == [quant.Linear] * 3
    with torch.no_grad():  # in which torch would run its own kernel on the weights
        y = model.eval()(x)
    torch.testing.assert_close(y, plain(x), rtol=0.1, atol=0.1)
    for name in names:
        weight = plain.get_submodule(name).weight
        plain.get_submodule(name).weight.data = quant.quantize(weight, "int8").dequantize()
    torch.testing.assert_close(y, plain(x))
    adapted = lora_ext.get_lora_model(model, lora_ext.LoraConfig(target_modules="all-linear"))
    total = sum(p.numel() for p in plain.parameters())
    trainable, every = adapted.get_nb_trainable_parameters()
    assert every == total + trainable


def test_quantizing_is_all_or_nothing() -> None:
    model = nn.Sequential(plain_linear(), nn.ReLU(), plain_linear(1, (8, N)))
    before = list(model)
    for arguments, message in (
        ({"quant_type": "nf5"}, "quant_type: got 'nf5'"),
        ({"target_modules": ["3"]}, "matches no nn.Linear"),
        ({"compute_dtype": "bfloat16"}, r"'0': .*compute_dtype: got 'bfloat16', expected None or"),
        ({"block_size": 48}, r"'0': .*block_size: got 48.*no layer of the model was changed"),
    ):
        with pytest.raises(ValueError, match=message):
            quant.quantize_(model, **arguments)  # type: ignore[arg-type]
        assert all(now is then for now, then in zip(model, before, strict=True))
    with pytest.raises(TypeError, match="from_linear makes a single one"):
        quant.quantize_(plain_linear())
    with pytest.raises(TypeError, match="is made by from_linear"):
        quant.Linear()
    with pytest.raises(ValueError, match=r"'0': .*not on the meta device; load the model first"):
        quant.quantize_(nn.Sequential(nn.Linear(8, 8, device="meta")))
    shared = nn.Sequential(model[0], nn.Linear(N, K), model[0])
    assert quant.quantize_(shared, target_modules=r"0|2") == ["0", "2"]
    assert shared[0] is shared[2] and type(shared[1]) is nn.Linear
    quant.quantize_(shared)
    with pytest.raises(ValueError, match=r"model: is quantized already \(2 layers\)"):
        quant.quantize_(shared)
    with pytest.raises(ValueError, match=r"model: has no nn\.Linear, expected some"):
        quant.quantize_(nn.Sequential(nn.ReLU()))
    tied = nn.Sequential(nn.Embedding(N, K), nn.Linear(K, N, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"all its nn\.Linear are left alone .*embedding"):
        quant.quantize_(tied)
    over = lora_ext.get_lora_model(
        nn.Sequential(plain_linear()), lora_ext.LoraConfig(target_modules=["0"])
    )
    with pytest.raises(ValueError, match=r"model: '.*0' has adapters, .*before it gets adapters"):
        quant.quantize_(over)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_weights_that_are_not_finite_are_named(kind: str, value: float) -> None:
    """Also in the last block, which is shorter."""
    for place in ((0, 3), (-1, -1)):
        model = nn.Sequential(plain_linear(), plain_linear())
        model[1].weight.data[place] = value  # type: ignore[operator, index]
        before = list(model)
        with pytest.raises(ValueError, match=r"'1': .*got NaN or Inf, expected finite"):
            quant.quantize_(model, kind)
        assert list(model) == before


def test_states_that_are_not_whole_are_refused() -> None:
    layer = quant.Linear.from_linear(plain_linear(), "nf4")
    x = inputs()
    y, state = layer(x), layer.state_dict()
    int8 = quant.Linear.from_linear(plain_linear(), "int8").state_dict()
    fp4 = quant.Linear.from_linear(plain_linear(), "fp4").state_dict()
    other = quant.Linear.from_linear(plain_linear(0, (N, K + 2)), "nf4").state_dict()
    cut = {name: tensor for name, tensor in state.items() if name != "weight.absmax"}
    for wrong, message in (
        (cut, "weight.absmax"),
        (int8, "quant_type: got 'int8', expected 'nf4'"),
        (fp4, "quant_type: got 'fp4', expected 'nf4'"),
        (other, "shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(wrong)
        assert torch.equal(layer(x), y)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight\.zeros"):
        layer.load_state_dict(state | {"weight.zeros": torch.zeros(1)})


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_layer_on_the_meta_device(quant_type: str) -> None:
    linear = quant.Linear.from_linear(plain_linear(), quant_type)
    layer: Any = lora_ext.nn.Linear.from_linear(linear, r=3)  # type: ignore[type-var]
    x, state = inputs(), copy.deepcopy(layer.state_dict())
    y = layer(x)
    layer.to("meta")
    assert layer(x.to("meta")).shape == y.shape
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(x), y)
    codes = layer.base_layer.weight.data_ptr()
    assert codes == state["base_layer.weight"].data_ptr()
    assert codes == layer.base_layer.quantized_weight.codes.data_ptr()


def test_copies_hold_their_codes_once() -> None:
    layer = quant.Linear.from_linear(plain_linear(), "nf4", nested=True)
    y = layer(inputs())
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied._matrix.codes.data_ptr() == copied.weight.data_ptr()
        assert copied.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(copied(inputs()), y)


def test_a_layer_of_a_matrix() -> None:
    matrix = quant.quantize(plain_linear().weight, "fp4", nested=True)
    made = quant.Linear.from_weight(matrix, "fp4")
    assert made.bias is None and torch.equal(made(X := inputs()), X @ matrix.dequantize().t())
    for wrong in ("nf4", "int8"):
        with pytest.raises(ValueError, match=rf"matrix: got .*expected one that quantize.*{wrong}"):
            quant.Linear.from_weight(matrix, wrong)
    with pytest.raises(ValueError, match="quant_type: got q4_0"):
        quant.Linear.from_weight(matrix, "q4_0")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_model_that_was_cast(quant_type: str, dtype: torch.dtype) -> None:
    """The dtype of its layers is that of what is around them, which is what is merged."""
    model = nn.Sequential(nn.Linear(K, N, bias=False), nn.Linear(N, 8, bias=False))
    quant.quantize_(model, quant_type, target_modules=["0"])
    config = lora_ext.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    adapted: Any = lora_ext.get_lora_model(model, config).eval()
    codes = model[0].base_layer.weight.clone()  # type: ignore[union-attr]
    adapted.to(dtype)
    x = inputs(dtype)
    y = adapted(x)
    dense = adapted.merge_and_unload()
    assert dense[0].weight.dtype is dtype
    torch.testing.assert_close(dense(x), y, rtol=0.05, atol=0.05)
    layer = quant.Linear.from_linear(plain_linear(), quant_type).to(dtype)
    assert layer.quantized_weight.dtype is dtype and layer.weight.dtype is codes.dtype


@pytest.mark.parametrize("options", [{}, {"nested": True}, {"quant_type": "int8"}])
def test_a_pickle_has_the_codes_once(options: dict[str, Any]) -> None:
    model = nn.Sequential(plain_linear(0, (256, 256)))
    quant.quantize_(model, **options)
    layer: Any = model[0]
    x = torch.randn(3, 256)
    for module in (layer, lora_ext.nn.Linear.from_linear(layer, r=1)):
        written = pickle.dumps(module)
        file = io.BytesIO()
        torch.save(module, file)
        limit = layer.weight.untyped_storage().nbytes() * 1.5 + 16384
        assert len(written) < limit and len(file.getvalue()) < limit
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for twin in (pickle.loads(written), loaded, copy.deepcopy(module)):
            base = getattr(twin, "base_layer", twin)
            assert base.quantized_weight.codes.data_ptr() == base.weight.data_ptr()
            assert torch.equal(twin(x), module(x)) and len(pickle.dumps(twin)) < limit
