"""A compiled LoraModel called with names, strengths and places: the same graphs for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import lora_ext

X = torch.randint(3, tiny_models.VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(5))
NAMES = [["a", "b", None], ["b", "a", "c"], ["c", None, "c"], ["a", "a", "a"], [None, "c", "b"]]


def model_of(**options: Any) -> Any:
    """Of the adapters "a", which has these options, "b" and "c"."""
    torch.manual_seed(0)
    base, _ = tiny_models.llama()

    def config(r: int, **options: Any) -> lora_ext.LoraConfig:
        return lora_ext.LoraConfig(
            r=r,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            **options,
        )

    model = lora_ext.get_lora_model(base, config(4, **options), "a")
    model.add_adapter("b", config(2))
    model.add_adapter("c", config(3))
    return model.eval()


def calls(kind: str) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    for i, names in enumerate(NAMES):
        if kind == "tokens":
            tokens = X.clone()
            tokens[i % 3, i % 4 : i % 4 + 2] = torch.tensor([1, 2])
            yield tokens, {}
        elif kind == "offsets":
            yield X, {"adapter_names": ["a"] * 3, "alora_offsets": [i, None, 4 - i]}
        elif kind == "scales":
            yield X, {"adapter_names": names, "adapter_scales": [0.5 * i, 1.0, 2.0 + i]}
        else:
            yield X, {"adapter_names": names}


@pytest.mark.parametrize("kind", ["names", "scales", "offsets", "tokens"])
def test_other_values_compile_nothing(kind: str) -> None:
    """As by `with lora_ext.batch(...)` around it, and the results are those of eager calls."""
    torch._dynamo.reset()
    activated = {"alora_invocation_tokens": [1, 2]} if kind in ("offsets", "tokens") else {}
    model = model_of(**activated)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    counts = []
    with torch.no_grad():
        for tokens, arguments in calls(kind):
            got = compiled(input_ids=tokens, use_cache=False, **arguments).logits
            wanted = model(input_ids=tokens, use_cache=False, **arguments).logits
            torch.testing.assert_close(got, wanted)
            counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


def test_gradients_and_errors_are_those_of_eager_calls() -> None:
    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, backend="aot_eager")
    model.set_adapter(["a", "b", "c"])
    found = []
    for call in (model, compiled):
        model.zero_grad()
        scales = torch.tensor([0.5, 2.0, 1.0], requires_grad=True)
        names = ["a", "b", "a"]
        y = call(input_ids=X, use_cache=False, adapter_names=names, adapter_scales=scales)
        y.logits.square().mean().backward()
        trained = [p.grad for p in model.parameters() if p.grad is not None]
        assert scales.grad is not None and trained
        found.append([scales.grad, *trained])
    torch.testing.assert_close(found[1], found[0])
    with pytest.raises(ValueError, match="adapter_names: got \\['nobody'\\]"):
        compiled(input_ids=X, use_cache=False, adapter_names=["nobody"] * 3)
    assert lora_ext.batching.current_plan() is None
    assert not model._requests._running


def test_without_names_it_is_one_graph() -> None:
    torch._dynamo.reset()
    model = model_of(alora_invocation_tokens=[1, 2])
    model.set_adapter("b")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(input_ids=X, use_cache=False, adapter_names=None).logits
    torch.testing.assert_close(got, model(input_ids=X, use_cache=False).logits)
