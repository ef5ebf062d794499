"""Where a patched layer of PEFT's has to do what PEFT does, and nothing more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import peft
import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

import lora_ext.integrations.peft as fused


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    fused.unpatch()
    fused.calls.clear()
    yield
    fused.unpatch()


def model_of(base: nn.Module, **options: object) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)  # type: ignore[arg-type]
    return peft.get_peft_model(nn.Sequential(base), config)


def assert_as_peft(call: Callable[[], Tensor]) -> None:
    """Bit for bit, since PEFT runs it."""
    expected = call()
    fused.patch()
    assert torch.equal(call(), expected)


def test_disabled_adapters_are_the_base_for_a_mixed_batch_too() -> None:
    model = model_of(nn.Linear(6, 4)).eval()
    model.base_model.disable_adapter_layers()
    x = torch.randn(3, 6)
    assert_as_peft(lambda: model(x, adapter_names=["default"] * 3))
    assert fused.calls == {fused.BASE_ALONE: 1}


@pytest.mark.parametrize("order", [["default", "dora"], ["dora", "default"]], ids="+".join)
def test_dora_whose_dropout_is_switched_off_in_training(order: list[str]) -> None:
    """PEFT's DoRA then scales a product of x alone, without the adapters before it."""
    model = model_of(nn.Linear(6, 4), lora_dropout=0.1)
    config = peft.LoraConfig(
        r=2, target_modules=["0"], init_lora_weights=False, use_dora=True, lora_dropout=0.1
    )
    model.add_adapter("dora", config)
    model.base_model.set_adapter(order)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        model.base_model.model[0].lora_magnitude_vector["dora"].weight.mul_(1.5)
    x = torch.randn(3, 6)
    expected = model.train()(x)
    fused.patch()
    torch.testing.assert_close(model(x), expected)


def test_dora_drops_as_its_layer_trains() -> None:
    model = model_of(nn.Linear(6, 4), use_dora=True, lora_dropout=0.9).eval()
    model.base_model.model[0].lora_dropout.train()
    x = torch.randn(3, 6)
    expected = model(x)
    fused.patch()
    torch.testing.assert_close(model(x), expected)


class Clamping(peft_layer.Linear):
    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        cast: Tensor = super()._cast_input_dtype(x.clamp(-1, 1), dtype)
        return cast


class Doubling(peft_layer.Embedding):
    def _embed(self, x: Tensor, weight: Tensor, **options: object) -> Tensor:
        embedded: Tensor = super()._embed(x, weight, **options)
        return embedded * 2


@pytest.mark.parametrize(
    ("base", "kind", "x"),
    [
        (nn.Linear(3, 3), Clamping, torch.full((2, 3), 5.0)),
        (nn.Embedding(4, 3), Doubling, torch.arange(3)),
    ],
    ids=["Linear", "Embedding"],
)
def test_methods_of_a_subclass_are_called(base: nn.Module, kind: type, x: Tensor) -> None:
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    config._register_custom_module({type(base): kind})
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    assert_as_peft(lambda: model(x))
    (row,) = fused.report(model)
    assert not row.fused and "is overridden" in row.reason


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("base", [nn.Linear(3, 3), nn.Embedding(5, 3)], ids=["linear", "embedding"])
def test_complex_numbers_are_left_to_peft(base: nn.Module) -> None:
    model = model_of(copy.deepcopy(base).to(torch.complex64))
    numbers = torch.arange(2) if isinstance(base, nn.Embedding) else torch.randn(2, 3) * (1 + 1j)
    with torch.no_grad():  # which PyTorch's embedding needs for them
        assert_as_peft(lambda: model(numbers))
    assert not fused.report(model)[0].fused


def test_meta_tensors() -> None:
    fused.patch()
    model = model_of(nn.Linear(3, 4)).to("meta")
    assert model(torch.empty(2, 3, device="meta")).shape == (2, 4)
    assert fused.report(model)[0].fused


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_pair_of_dtypes_runs_under_autocast(
    base: torch.dtype, adapter: torch.dtype, use_dora: bool
) -> None:
    model = model_of(nn.Linear(3, 3).to(base), use_dora=use_dora)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = parameter.data.to(adapter)
    x = torch.randn(2, 3).to(base)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        fused.patch()
        torch.testing.assert_close(model(x), expected, rtol=2**-6, atol=2**-6)


def test_mixed_batch_in_compiled_and_exported_code() -> None:
    """How many rows an adapter has is data there: PEFT runs it."""
    model = model_of(nn.Linear(3, 3)).eval()
    x, names = torch.ones(2, 3), ["default", "__base__"]
    expected = model(x, adapter_names=names)
    fused.patch()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.model(x, adapter_names=names)
            return y

    layer = torch.compile(model.base_model.model[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(layer(x, adapter_names=names), expected)
    exported = torch.export.export(Named(), (x,))
    torch.testing.assert_close(exported.module()(x), expected)


def test_mixed_batch_without_rows_has_a_gradient() -> None:
    fused.patch()
    layer = model_of(nn.Linear(3, 3)).base_model.model[0]
    y = layer(torch.ones(2, 0, 3), adapter_names=["default", "__base__"])
    assert y.requires_grad
    y.sum().backward()


def test_onnx_export_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no operators but PyTorch's."""
    model = model_of(nn.Linear(3, 3)).eval()
    fused.patch()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model(torch.ones(2, 3))
    assert fused.calls == {"torch.onnx exports": 1}


@pytest.mark.parametrize("first", ["patched", "unpatched"])
def test_patching_reaches_models_that_are_compiled_later(first: str) -> None:
    """The compiler knows modules by their classes: what it made before is not used again."""
    graphs: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(any("lora_ext" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    base, x = nn.Linear(8, 8), torch.randn(4, 8)
    for patched in (first == "patched", first != "patched"):
        (fused.patch if patched else fused.unpatch)()
        torch.compile(model_of(copy.deepcopy(base)), backend=backend)(x)
    assert graphs == [first == "patched", first != "patched"]
