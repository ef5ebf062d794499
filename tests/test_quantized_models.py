"""Models whose linear layers `quantize_` quantized, under all that a LoraModel does. Those of
bitsandbytes and torchao are in tests/quantized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_problems import assert_as_exact, randomise
from tiny_models import llama
from torch import Tensor, nn

import lora_ext
from lora_ext import LoraConfig, quant
from lora_ext.nn.quantized import QuantizedLinear

TOKENS = llama()[1]["input_ids"]
pytestmark = pytest.mark.usefixtures("one_thread")
FIELDS: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def base(kind: str = "nf4") -> Any:
    model = llama()[0]
    names = quant.quantize_(model, kind, nested=kind != "int8")
    assert len(names) == 21 and "lm_head" not in names
    return model


def adapted(kind: str = "nf4", **fields: Any) -> Any:
    model: Any = lora_ext.get_peft_model(base(kind), LoraConfig(**FIELDS | fields))
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            randomise(layer)
    return model.eval()


def dequantised(model: Any, kind: str = "nf4") -> Any:
    """The same adapters over the dequantised base."""
    plain = llama()[0]
    for name, module in base(kind).named_modules():
        if isinstance(module, quant.Linear):
            plain.get_submodule(name).weight.data = module.quantized_weight.dequantize()
    twin: Any = lora_ext.get_peft_model(plain, model.peft_config["default"])
    for name in model.peft_config:
        if name != "default":
            twin.add_adapter(name, model.peft_config[name])
        state = lora_ext.get_peft_model_state_dict(model, adapter_name=name)
        lora_ext.set_peft_model_state_dict(twin, state, adapter_name=name)
    return twin.eval()


def logits(model: Any, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS, **options).logits
    return found


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_it_is_the_model_over_the_dequantised_base(kind: str) -> None:
    model = adapted(kind)
    model.add_adapter(
        "other", LoraConfig(**FIELDS | {"use_dora": True, "init_lora_weights": False})
    )
    twin = dequantised(model, kind)
    assert_as_exact(logits(model), logits(twin), logits(copy.deepcopy(twin).double()))
    names = ["other", "__base__"]
    assert torch.equal(logits(model, adapter_names=names), logits(twin, adapter_names=names))
    for one in (model, twin):
        one.set_adapter("other")
    assert torch.equal(logits(model), logits(twin))
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(logits(model), logits(twin))
    generated = [
        one.generate(
            input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=4,
            do_sample=False, adapter_names=names,
        )
        for one in (model, twin)
    ]  # fmt: skip
    assert torch.equal(*generated)


def test_adapters_are_saved_loaded_and_combined(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("two", LoraConfig(**FIELDS | {"init_lora_weights": False}))
    model.add_weighted_adapter(["default", "two"], [0.5, 0.25], "new", combination_type="cat")
    y = {}
    for name in ("default", "two", "new"):
        model.set_adapter(name)
        y[name] = logits(model)
    model.save_pretrained(tmp_path)
    again: Any = lora_ext.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(again), y["default"])
    again.load_adapter(tmp_path / "two", "two")
    again.set_adapter("two")
    assert torch.equal(logits(again), y["two"])
    again.load_adapter(tmp_path / "new", "new")
    again.delete_adapter("two")
    again.rename_adapter("new", "sum")
    again.set_adapter("sum")
    torch.testing.assert_close(logits(again), y["new"])
    lora_ext.hotswap_adapter(again, tmp_path / "two", "default")
    again.set_adapter("default")
    assert torch.equal(logits(again), y["two"])


@pytest.mark.parametrize("requantize", [False, True])
def test_the_base_before_and_after(requantize: bool) -> None:
    model = adapted()
    expected = base().state_dict()

    def is_the_base(state: dict[str, Tensor]) -> bool:
        return state.keys() == expected.keys() and all(
            torch.equal(state[name], expected[name]) for name in state
        )

    y = logits(model)
    model.merge_adapter(requantize=requantize)
    assert torch.allclose(logits(model), y, atol=1e-5) != requantize
    assert is_the_base(lora_ext.get_base_model_state_dict(model))
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    lora_ext.set_base_model_state_dict(model, expected)
    assert torch.equal(logits(model), y)
    assert is_the_base(copy.deepcopy(model).unload().state_dict())
    merged = model.merge_and_unload(requantize=requantize)
    kinds = {type(module) for module in merged.modules() if isinstance(module, nn.Linear)}
    assert kinds == ({quant.Linear, nn.Linear} if requantize else {nn.Linear})  # the head


def test_preparing_and_training() -> None:
    plain = base().to(torch.bfloat16)
    model = lora_ext.prepare_model_for_kbit_training(plain)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.warns(FutureWarning):
        assert model.is_gradient_checkpointing
    found: Any = lora_ext.get_peft_model(model, LoraConfig(**FIELDS)).train()
    trainable, every = found.get_nb_trainable_parameters()
    assert every == trainable + sum(p.numel() for p in llama()[0].parameters())
    optimizer = torch.optim.AdamW([p for p in found.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        loss = found(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1


def test_other_kinds_of_adapters() -> None:
    """aLoRA, BD-LoRA, repeated layers."""
    blocks = lora_ext.BdLoraConfig(["o_proj"], ["q_proj"], 2)
    for fields in (
        {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]},
        {"target_modules": ["q_proj", "o_proj"], "use_bdlora": blocks},
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]]},
    ):
        model = adapted(**fields)
        twin = dequantised(model)
        assert_as_exact(logits(model), logits(twin), logits(copy.deepcopy(twin).double()))


def test_what_is_refused() -> None:
    for field in ("modules_to_save", "target_parameters"):
        model, value = base(), ["down_proj.weight" if field[0] == "t" else "down_proj"]
        before = [type(module) for module in model.modules()]
        fields = {"target_modules": ["q_proj"] if field[0] == "m" else [], field: value}
        with pytest.raises(TypeError, match=r"(down_proj|weight).*(quantized|uint8)"):
            lora_ext.get_lora_model(model, LoraConfig(r=2, **fields))
        assert [type(module) for module in model.modules()] == before
