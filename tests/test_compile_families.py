"""torch.compile of models of transformers with adapters: one graph each, which no switch that was
made before compiles again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from lora_ext import LoraConfig, get_lora_model

FAMILIES = ("llama", "falcon", "bert", "gpt2", "dinov2", "mpt")


def adapted(family: str) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = tiny_models.BUILDERS[family]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # of the base; those of adapters are drawn as in eager calls
    if family == "gpt2":
        model.loss_type = "ForCausalLM"  # without it transformers writes a warning: a graph break
    config = LoraConfig(target_modules="all-linear", r=2, lora_dropout=0.1, init_lora_weights=False)
    torch.manual_seed(0)
    model = get_lora_model(model, config)
    model.add_adapter("other", config)
    return model.train(), inputs


def losses(model: nn.Module, call: Callable[..., Any], inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    loss = call(**inputs).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "LAYERS", 2)  # each is traced anew in every graph
    model, inputs = adapted(family)
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, given: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        if graphs > 1:  # only counted
            return graph.forward
        traced: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(graph, given)
        return traced

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got, expected = losses(model, compiled, inputs), losses(model, model, inputs)
    assert graphs == 1 and len(got) == len(expected) > 1
    torch.testing.assert_close(got, expected)

    model.requires_grad_(False)  # inference: set_adapter as a server calls it
    model.eval()

    def switches(i: int) -> Iterator[None]:
        model.set_adapter("other", inference_mode=True)
        yield
        model.set_adapter("default", inference_mode=True)
        yield
        model.set_scale("default", 0.5 + 0.1 * i)
        yield
        model.train()
        yield
        model.eval()
        yield

    for i in range(2):
        for _ in switches(i):
            compiled(**inputs)
    before = graphs
    for i in range(2, 12):
        for step, _ in enumerate(switches(i)):
            torch.manual_seed(2)
            loss = compiled(**inputs).loss
            if i == 11:
                torch.manual_seed(2)
                torch.testing.assert_close(loss, model(**inputs).loss, msg=f"switch {step}")
    assert graphs == before
