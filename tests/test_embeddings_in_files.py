"""Embeddings and output heads in files: adapted, resized, tied, saved whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapter_zoo import zoo
from language_models import keys, llama, logits, phi
from torch import nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


TRUE = {"save_embedding_layers": True}
EMBEDDINGS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "input": (llama, {"target_modules": ["embed_tokens"]}, {}),
    "head": (llama, {"target_modules": ["q_proj", "lm_head"]}, {}),
    "both": (llama, {"target_modules": ["embed_tokens", "lm_head"]}, {}),
    "whole name": (llama, {"target_modules": ["model.embed_tokens"]}, {}),
    "expression": (llama, {"target_modules": ".*embed_tokens"}, {}),
    "tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}, {}),
    "asked for": (llama, {"target_modules": ["q_proj"]}, TRUE),
    "asked for, tied": (
        lambda: llama(tie_word_embeddings=True), {"target_modules": ["q_proj"]}, TRUE
    ),
    "saved whole": (
        llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, TRUE
    ),
    "one saved whole": (
        llama, {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, TRUE
    ),
    "head with bias": (phi, {"target_modules": ["lm_head"]}, {}),
    "head with bias, all": (phi, {"target_modules": ["lm_head"], "bias": "all"}, {}),
    "head with bias, asked for": (phi, {"target_modules": ["q_proj"]}, TRUE),
}  # fmt: skip


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embeddings_in_files(case: str, tmp_path: Path) -> None:
    build, fields, options = EMBEDDINGS[case]
    fields = {"r": 2, "init_lora_weights": False} | fields
    trained = "get_input_embeddings" if options or "head" not in case else "get_output_embeddings"
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        getattr(theirs, trained)().weight.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs", **options)
    read = LoraModel.from_pretrained(build(), tmp_path / "theirs")
    expected = logits(peft.PeftModel.from_pretrained(build(), tmp_path / "theirs").eval())
    torch.testing.assert_close(logits(read), expected, rtol=1e-4, atol=1e-5)

    ours = get_lora_model(build(), LoraConfig(**fields)).eval()
    with torch.no_grad():
        getattr(ours, trained)().weight.mul_(1.5)
    ours.save_pretrained(tmp_path / "ours", **options)
    again = LoraModel.from_pretrained(build(), tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    if case not in ("whole name",):  # PEFT does not know it there: the change of the base is lost
        assert torch.equal(logits(again), logits(ours))
    torch.testing.assert_close(logits(other), logits(again), rtol=1e-4, atol=1e-5)
    if not fields.get("modules_to_save"):
        assert keys(tmp_path / "theirs") <= keys(tmp_path / "ours")


def test_a_magnitude_that_peft_writes_twice(tmp_path: Path) -> None:
    """DoRA on an embedding of another name than PEFT's, which is saved as well."""

    def bert() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.BertConfig(vocab_size=64, intermediate_size=24, **sizes)
        return transformers.BertForMaskedLM(config).eval()

    config = peft.LoraConfig(
        r=2, target_modules=["word_embeddings"], use_dora=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(bert(), config).eval()
    theirs.save_pretrained(tmp_path, **TRUE)
    magnitude = "bert.embeddings.word_embeddings.lora_magnitude_vector"
    assert {magnitude, f"{magnitude}.weight"} <= keys(tmp_path)
    read = LoraModel.from_pretrained(bert(), tmp_path)
    torch.testing.assert_close(logits(read), logits(theirs), rtol=1e-4, atol=1e-5)


def test_two_values_for_a_tied_embedding_are_refused(tmp_path: Path) -> None:
    model = get_lora_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = llama(tie_word_embeddings=True)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"embed_tokens\.weight.*same tensor"):
        LoraModel.from_pretrained(base, tmp_path)
    assert all(torch.equal(before[key], tensor) for key, tensor in base.state_dict().items())


def test_resized_embeddings_are_saved(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")

    def base(size: int = 70) -> nn.Module:
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(size, mean_resizing=False)
        return model.eval()

    model = get_lora_model(base(), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[64:] = 0.5
    with pytest.warns(UserWarning, match="its embeddings are saved"):
        model.save_pretrained(tmp_path / "auto")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= keys(tmp_path / "auto")
    read = LoraModel.from_pretrained(base(), tmp_path / "auto")
    assert torch.equal(logits(read), logits(model))
    with pytest.raises(AdapterFileError, match=r"resize_token_embeddings\(70\)"):
        LoraModel.from_pretrained(base(64), tmp_path / "auto")
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert not any("weight" in key and "lora" not in key for key in keys(tmp_path / "without"))


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]},
     {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}],
    ids=["head", "input", "saved whole"],
)  # fmt: skip
def test_embeddings_with_adapters_are_not_resized(fields: dict[str, Any]) -> None:
    model = get_lora_model(llama(), LoraConfig(r=2, **fields))
    before = logits(model)
    with pytest.raises(TypeError, match=r"resize_token_embeddings: .* has adapters"):
        model.resize_token_embeddings(70)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("merged", [False, True])
def test_embeddings_that_transformers_resized_say_so(merged: bool) -> None:
    base = llama()
    fields = {"target_modules": ["embed_tokens"], "init_lora_weights": False}
    model = get_lora_model(base, LoraConfig(r=2, **fields))
    if merged:
        model.merge_adapter()
    base.resize_token_embeddings(70, mean_resizing=False)
    if not merged:
        with pytest.raises(ValueError, match=r"lora_A: got shape .*70"):
            logits(model)
        return
    want = logits(model)
    for call in (model.unmerge_adapter, lambda: model.set_adapter("default")):
        with pytest.raises(ValueError, match=r"Embedding.unmerge: its weight got shape \[70, 32\]"):
            call()
    assert torch.equal(logits(model), want)
    model.unload()
    assert torch.equal(logits(base), want)


def test_a_replaced_layer_says_that_its_adapters_are_gone() -> None:
    base = llama()
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with pytest.warns(UserWarning, match=r"lm_head: .*\['default'\] is replaced by a Linear"):
        base.resize_token_embeddings(70, mean_resizing=False)
    attention = base.model.layers[0].self_attn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention.q_proj = nn.Sequential(attention.q_proj)
        attention.q_proj = attention.q_proj[0]
        attention.q_proj = attention.q_proj.get_base_layer()
        model.unload()


def test_other_embeddings_are_resized() -> None:
    model = get_lora_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.resize_token_embeddings(70)
    assert logits(model).shape[-1] == 70
    with pytest.raises(AttributeError):
        get_lora_model(zoo(), LoraConfig(target_modules=["lin"])).resize_token_embeddings(7)
