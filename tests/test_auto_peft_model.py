"""`AutoPeftModel`s against PEFT's: base and adapter by one folder's name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from auto_models import KINDS, changed, results, saved, tokenizer

import lora_ext


@pytest.mark.parametrize("name", KINDS)
def test_base_and_adapter_are_those_that_peft_loads(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, name)
    ours = getattr(lora_ext, name).from_pretrained(folder)
    theirs = getattr(peft, name).from_pretrained(folder)
    assert type(ours.get_base_model()) is type(theirs.get_base_model())
    kind = name.removeprefix("Auto")
    assert isinstance(ours, getattr(lora_ext, kind)) and isinstance(ours, getattr(peft, kind))
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    for got, expected in zip(results(ours), results(theirs), strict=True):
        torch.testing.assert_close(got, expected)
    assert not torch.equal(results(ours)[0], results(ours.unload())[0])


def test_what_peft_saved_and_arguments_reach_whom_they_are_for(tmp_path: Path) -> None:
    folder = saved(tmp_path, "AutoPeftModelForCausalLM", peft)
    model = lora_ext.AutoPeftModelForCausalLM.from_pretrained(
        str(folder),
        "mine",
        True,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        autocast_adapter_dtype=False,
    )
    assert list(model.peft_config) == ["mine"]
    base: Any = model.get_base_model()
    layer = base.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype is torch.bfloat16 and base.config._attn_implementation == "eager"
    parts = layer.parts("mine")
    assert parts["lora_A"].dtype is torch.bfloat16 and parts["lora_A"].requires_grad
    wider = lora_ext.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert wider.get_base_model().model.layers[0].self_attn.q_proj.lora_A.dtype is torch.float32


def test_an_adapter_in_a_subfolder(tmp_path: Path) -> None:
    folder = saved(tmp_path, "AutoPeftModelForCausalLM")
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    (tmp_path / "moved").rename(folder / "french")
    model = lora_ext.AutoPeftModelForCausalLM.from_pretrained(folder, subfolder="french")
    expected = lora_ext.AutoPeftModelForCausalLM.from_pretrained(folder / "french")
    assert torch.equal(results(model)[0], results(expected)[0])


@pytest.mark.parametrize(("tokens", "rows"), [(101, 101), (90, 97)], ids=["more", "fewer"])
def test_embeddings_are_resized_for_the_adapters_tokenizer(
    tokens: int, rows: int, tmp_path: Path
) -> None:
    folder = saved(tmp_path, "AutoPeftModelForCausalLM")
    tokenizer(tokens).save_pretrained(folder)
    for lib in (lora_ext, peft):
        model: Any = lib.AutoPeftModelForCausalLM.from_pretrained(folder)
        assert model.get_base_model().get_input_embeddings().weight.shape[0] == rows
        assert results(model)[0].shape[-1] == rows


def cached(folder: Path, cache: Path, name: str) -> None:
    """As the hub's client leaves a repository of its files."""
    place = cache / f"models--owner--{name}"
    shutil.copytree(folder, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")


@pytest.mark.parametrize("tokens", [0, 101])
def test_ids_of_the_hub_are_found_in_its_cache(tokens: int, tmp_path: Path) -> None:
    folder, cache = saved(tmp_path, "AutoPeftModelForCausalLM"), tmp_path / "cache"
    expected = lora_ext.AutoPeftModelForCausalLM.from_pretrained(folder)
    changed(folder, base_model_name_or_path="owner/base")
    if tokens:
        tokenizer(tokens).save_pretrained(folder)
    cached(folder, cache, "adapter")
    cached(tmp_path / "base", cache, "base")
    model = lora_ext.AutoPeftModelForCausalLM.from_pretrained(
        "owner/adapter", revision="main", cache_dir=str(cache), local_files_only=True
    )
    logits = results(model)[0]
    assert logits.shape[-1] == max(tokens, 97)
    torch.testing.assert_close(logits[..., :97], results(expected)[0])


def test_xlora_is_found_by_its_config(tmp_path: Path) -> None:
    folder = saved(tmp_path, "AutoPeftModelForCausalLM")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = lora_ext.XLoraConfig(
        task_type="CAUSAL_LM", adapters={"a": str(folder)}, hidden_size=32
    )
    model = lora_ext.get_lora_model(base, config)
    model.save_pretrained(tmp_path / "mixture")
    again = lora_ext.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mixture")
    assert isinstance(again, lora_ext.XLoraModel)
    assert torch.equal(results(again)[0], results(model)[0])


def test_transformers_is_imported_only_then(tmp_path: Path) -> None:
    folder = saved(tmp_path, "AutoPeftModelForCausalLM")
    script = (
        "import sys, lora_ext; before = 'transformers' in sys.modules; "
        f"model = lora_ext.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}); "
        "print(before, type(model).__name__)"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["False", "PeftModelForCausalLM"]
