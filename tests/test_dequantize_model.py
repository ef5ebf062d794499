"""`quantize_` and `dequantize_` of models of transformers: what their configs say, and what is
saved and loaded. With bitsandbytes: tests/quantized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_problems import K, N, inputs, plain_linear
from torch import Tensor, nn

import lora_ext
from lora_ext import LoraConfig, quant

pytest.importorskip("transformers")

import tiny_models
import transformers
from tiny_models import llama

TOKENS = llama()[1]["input_ids"]
pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(kind: str = "nf4", **options: Any) -> Any:
    model = llama()[0].eval()
    quant.quantize_(model, kind, **options)
    return model


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_config_says_what_is_quantized(kind: str, tmp_path: Path) -> None:
    model = quantized(kind, nested=kind == "nf4", exclude_modules=["up_proj"])
    config = model.config.quantization_config
    dense = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    assert config["llm_int8_skip_modules"] == [*dense, "lm_head"]
    assert config["load_in_8bit"] is (kind == "int8") is not config["load_in_4bit"]
    if kind != "int8":
        assert config["bnb_4bit_quant_type"] == kind
        assert config["bnb_4bit_use_double_quant"] is (kind == "nf4")
    read = transformers.BitsAndBytesConfig.from_dict(config)
    assert read.quantization_method() == ("llm_int8" if kind == "int8" else kind)
    model.save_pretrained(tmp_path)
    if not transformers.utils.is_bitsandbytes_available():  # tests/quantized loads it with it
        with pytest.raises(ImportError, match="requires bitsandbytes"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_part_is_merged_and_the_rest_dequantised(kind: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted: Any = lora_ext.get_lora_model(quantized(kind), config).eval()
    y = logits(adapted)
    with pytest.raises(ValueError, match=r"q_proj.base_layer' has adapters; call merge_and_un"):
        quant.dequantize_(adapted)
    merged = adapted.merge_and_unload()
    skipped = merged.config.quantization_config["llm_int8_skip_modules"]
    assert skipped == [*(f"model.layers.{i}.self_attn.q_proj" for i in range(3)), "lm_head"]
    names = quant.dequantize_(merged)
    assert len(names) == 18 and not hasattr(merged.config, "quantization_config")
    assert {type(merged.get_submodule(name)) for name in names} == {nn.Linear}
    torch.testing.assert_close(logits(merged), y, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(merged))
    assert quant.dequantize_(merged) == []


def test_when_nothing_is_left_the_config_says_so() -> None:
    fields: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model: Any = quantized()
    adapted: Any = lora_ext.get_lora_model(model, LoraConfig(**fields))
    again = copy.deepcopy(adapted).unload()
    assert again.config.quantization_config == model.config.quantization_config
    again = copy.deepcopy(adapted).merge_and_unload(requantize=True)
    assert again.config.quantization_config == model.config.quantization_config
    assert not hasattr(adapted.merge_and_unload().config, "quantization_config")
    assert model.half().dtype is torch.float16


def test_what_a_config_cannot_say() -> None:
    model = quantized(target_modules=["q_proj"])
    before = model.config.quantization_config
    with pytest.warns(UserWarning, match="some layers are of 4 bits and others of 8"):
        quant.quantize_(model, "int8", target_modules=["k_proj"])
    assert model.config.quantization_config == before


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_what_transformers_leaves_alone(kind: str) -> None:
    """T5 casts to the dtype of its wo, and ties the head."""
    model = tiny_models.t5()[0]
    inputs = {"input_ids": TOKENS, "labels": TOKENS}
    with torch.no_grad():
        names = quant.quantize_(model, kind)
        assert not [name for name in names if name.endswith(("wo", "lm_head"))]
        assert {"q", "k", "v", "o", "wi"} <= {name.rpartition(".")[2] for name in names}
        found = model(**inputs).logits
        assert quant.dequantize_(model) == names
        torch.testing.assert_close(found, model(**inputs).logits, rtol=0, atol=1e-5)
    if kind != "int8":
        with pytest.warns(UserWarning, match=r"would not take '.*wo' for quantized"):
            quant.quantize_(model, kind, target_modules=["wo"])
        with pytest.raises(TypeError, match=r"wo\.weight\): input: got .*uint8.*exclude_modules"):
            model(**inputs)
    part = tiny_models.t5()[0].encoder
    wrapped = nn.ModuleList([part])  # which has no such attribute itself
    assert not [name for name in quant.quantize_(wrapped, kind) if name.endswith("wo")]
    tied = nn.Sequential(nn.Embedding(N, K), nn.Linear(K, K), nn.Linear(K, N, bias=False))
    tied[2].weight = tied[0].weight
    assert quant.quantize_(tied, kind) == ["1"] and tied[2].weight is tied[0].weight


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gpt2_gets_its_own_layers_back(kind: str, tmp_path: Path) -> None:
    """Conv1D has the transposed weight, which would load silently where it is square."""
    model: Any = tiny_models.gpt2()[0].eval()
    model.save_pretrained(tmp_path / "original")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = quant.quantize_(model, kind)
    assert {name.rpartition(".")[2] for name in names} == {"c_attn", "c_proj", "c_fc"}
    assert model.config.quantization_config["llm_int8_skip_modules"] == ["lm_head"]
    config = LoraConfig(r=4, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    adapted: Any = lora_ext.get_lora_model(model, config).eval()
    lora_ext.replace_lora_weights_loftq(adapted, tmp_path / "original")
    y = logits(adapted)
    again = copy.deepcopy(adapted).merge_and_unload(requantize=True)
    assert quant.dequantize_(again) == names and type(again) is type(model)
    merged = adapted.merge_and_unload()
    rest = quant.dequantize_(merged)
    assert len(rest) == len(names) // 2
    for one in (again, merged):
        state = one.state_dict()
        assert state.keys() == before.keys()
        for name in names:  # near to what they were, and so not transposed
            now, then = state[f"{name}.weight"], before[f"{name}.weight"]
            assert now.shape == then.shape and (now - then).norm() < 0.15 * then.norm()
    torch.testing.assert_close(logits(merged), y, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))


def test_dequantizing() -> None:
    shared = plain_linear()
    model = nn.Sequential(shared, nn.Sequential(shared), nn.Linear(N, K, bias=False).bfloat16())
    quant.quantize_(model, "int8")
    values = [model[i].quantized_weight.dequantize() for i in (0, 2)]  # type: ignore[union-attr]
    x, bias = inputs(), shared.bias
    y = model[0](x)
    with pytest.raises(ValueError, match=r"dtype: got torch\.float64, expected None or one of"):
        quant.dequantize_(model, torch.float64)
    with pytest.raises(TypeError, match=r"got Linear, expected a module with quantized .*read_we"):
        quant.dequantize_(model[0])
    assert quant.dequantize_(copy.deepcopy(model), torch.float16) == ["0", "1.0", "2"]
    assert quant.dequantize_(model) == ["0", "1.0", "2"]
    assert model[0] is model[1][0] and model[0].bias is bias  # type: ignore[index]
    assert [model[i].weight.dtype for i in (0, 2)] == [torch.float32, torch.bfloat16]
    assert all(torch.equal(model[i].weight, w) for i, w in zip((0, 2), values, strict=True))
    assert torch.equal(model[0](x), y)
