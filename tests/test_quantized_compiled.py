"""Layers over quantized bases under torch.compile and torch.export: where one adapter runs by the
operator there is one graph, forward and backward; else the layer is called uncompiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from quantized_problems import BASES, K, inputs, plain_linear, randomise, results
from torch import nn
from torch._dynamo.testing import CompileCounter

import lora_ext
import lora_ext.nn as lora
from lora_ext import quant

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"lora_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("base", [name for name in BASES if name != "foreign"])
def test_compiled_as_one_graph(base: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer: Any = randomise(lora.Linear.from_linear(BASES[base](), r=3, **options))  # type: ignore
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = inputs(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mine, theirs = results(compiled, x), results(layer, x)
            # Dropout's state is drawn when the code runs: of the same generator, so the same.
            assert mine[0].dtype is theirs[0].dtype
            assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))
    assert torch._dynamo.explain(layer)(x).graph_break_count == 0  # type: ignore[no-untyped-call]


def test_what_changes_under_compiled_code() -> None:
    torch._dynamo.reset()
    layer: Any = randomise(lora.Linear.from_linear(BASES["nf4 nested"](), r=3))  # type: ignore
    compiled: Any = torch.compile(nn.Sequential(layer, nn.ReLU()), backend="eager")
    x, calls = inputs(), []

    def agrees() -> bool:
        """But for roundings: a number that has changed is a tensor from then on."""
        return torch.allclose(compiled(x), layer(x).relu(), rtol=0, atol=2e-6)

    assert agrees() and "uncompiled" not in layer._lora_explain(7)[1]
    state = quant.Linear.from_linear(plain_linear(1), "nf4", block_size=32, nested=True)
    layer.base_layer.load_state_dict(state.state_dict())
    assert agrees()
    layer.base_layer.weight.data = layer.base_layer.weight.data.flip(0)
    assert agrees()
    layer.set_scale("default", 0.5)
    assert agrees()
    with lora_ext.batch(adapters=["default", None]):
        assert agrees()
    assert agrees()
    layer.add_adapter("other", r=2, use_dora=True)
    layer.set_adapter("other")
    assert agrees() and "uncompiled" in layer._lora_explain(7)[1]
    layer.set_adapter("default")
    layer.merge()
    assert agrees()
    layer.unmerge()
    layer.double()
    x = x.double()
    assert agrees()
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch._dynamo.reset()  # which looks at hooks when it compiles
    assert agrees() and len(calls) == 2


def test_models_compiled_whole_by_layers_and_exported() -> None:
    model = nn.Sequential(*[plain_linear(seed, (K, K)) for seed in range(10)])
    quant.quantize_(model, "nf4")
    names = [str(i) for i in range(10)]
    config = lora_ext.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    adapted: Any = lora_ext.get_lora_model(model, config)
    x = inputs()
    y = adapted(x)
    for parts in ([adapted], list(adapted.base_model)):
        torch._dynamo.reset()
        counter = CompileCounter()
        found = x
        for part in parts:
            found = torch.compile(part, backend=counter, fullgraph=True)(found)
        assert torch.equal(found, y) and counter.frame_count == 1
    exported = torch.export.export(adapted.base_model, (x,))
    assert torch.equal(exported.module()(x), y)


@pytest.mark.parametrize("base", ["foreign", "nf4"])
def test_what_is_not_compiled(base: str) -> None:
    torch._dynamo.reset()
    options = {"use_dora": True} if base == "nf4" else {}
    layer: Any = randomise(lora.Linear.from_linear(BASES[base](), r=3, **options))  # type: ignore
    compiled: Any = torch.compile(nn.Sequential(layer, nn.ReLU()), backend="eager")
    x = inputs()
    assert torch.equal(compiled(x), layer(x).relu())
    assert layer._lora_explain(7)[1].endswith("compiled code calls the layer uncompiled")
