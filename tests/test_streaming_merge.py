"""Merging one tensor at a time: the same bits as in memory, and what is loaded whole instead."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import failed, run
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import tiny_models
import transformers
from cli_places import randomise

import lora_ext.adapters.streamed_merge as streamed
from lora_ext import LoraConfig, LoraModel
from lora_ext.errors import AdapterFileError
from lora_ext.io import save_adapter

INDEX = "model.safetensors.index.json"
SHARDS = 4


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        own, other = (one.reshape(-1).view(torch.uint8) for one in (found[key], tensor))
        assert torch.equal(own, other), key


# Bit for bit what is merged in memory


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora, ranks, alphas": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"o_proj": 3},
        "alpha_pattern": {"up_proj": 5},
    },
    "dora": {"target_modules": ["q_proj", "gate_proj"], "use_dora": True},
    "olmo-like layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "lora_bias": {"target_modules": ["k_proj"], "lora_bias": True},
    "alora": {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bits_as_in_memory(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    with_bias = name == "lora_bias"
    base, _ = tiny_models.llama(attention_bias=with_bias)
    base.to(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")  # type: ignore[operator]
    assert (tmp_path / "base" / INDEX).exists()
    lora = randomise(LoraModel(base, LoraConfig(r=4, lora_alpha=8, **CONFIGS[name])))
    lora.save_pretrained(tmp_path / "adapter")
    if name == "alora":  # which no weight can hold
        says = failed("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert "alora" in says.lower() and not (tmp_path / "out").exists()
        assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
        return
    data = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json").json()
    assert data["loaded"] is None and len(data["layers"]) == len(list(lora.lora_layers()))
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    assert_same_bits(contents(tmp_path / "out"), expected)
    changed = [k for k, t in contents(tmp_path / "base").items() if not torch.equal(t, expected[k])]
    assert len(changed) == len(data["layers"]) * (2 if with_bias else 1)
    # The same shards, and what else is in the folder.
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    former = json.loads((tmp_path / "base" / INDEX).read_text())
    assert index["weight_map"] == former["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "base"))
    # And by names alone.
    for path in ("config.json", "generation_config.json"):
        (tmp_path / "base" / path).unlink(missing_ok=True)
    data = run(
        "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "again", "--json"
    ).json()
    assert data["loaded"] is None
    assert_same_bits(contents(tmp_path / "again"), expected)


def gpt2() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.gpt2()[0], {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}


def mixtral() -> tuple[torch.nn.Module, dict[str, Any]]:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = transformers.MixtralConfig(
        **tiny_models.TEXT,
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
    )
    model = transformers.MixtralForCausalLM(config)
    return model, {"target_modules": [], "target_parameters": targets}


def bert() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.bert()[0], {"target_modules": ["query", "dense"]}


def tied_head() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.llama(tie_word_embeddings=True)[0], {"target_modules": ["q_proj", "lm_head"]}


def tied_elsewhere() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.llama(tie_word_embeddings=True)[0], {"target_modules": ["q_proj"]}


def saved() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.llama()[0], {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}


def tokens() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.llama()[0], {"target_modules": ["q_proj"], "trainable_token_indices": [3]}


def biases() -> tuple[torch.nn.Module, dict[str, Any]]:
    base = tiny_models.llama(attention_bias=True)[0]
    return base, {"target_modules": ["q_proj"], "bias": "lora_only"}


def pissa() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.llama()[0], {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}


def replicated() -> tuple[torch.nn.Module, dict[str, Any]]:
    ranges = [[0, 2], [1, 3]]
    return tiny_models.llama()[0], {"target_modules": ["q_proj"], "layer_replication": ranges}


# Which base and adapter, and why the model is loaded for it.
MODELS: dict[str, tuple[Callable[[], tuple[torch.nn.Module, dict[str, Any]]], str | None]] = {
    "gpt2": (gpt2, None),
    "bert": (bert, None),
    "tied elsewhere": (tied_elsewhere, None),
    "mixtral": (mixtral, "which no file has under this name"),
    "tied head": (tied_head, "lm_head|tied"),
    "modules_to_save": (saved, "modules_to_save"),
    "tokens": (tokens, "trainable_token_indices"),
    "bias": (biases, "bias of the adapter"),
    "pissa": (pissa, "init_lora_weights='pissa'"),
    "layer_replication": (replicated, "layer_replication"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_what_names_do_not_tell_is_loaded_and_says_why(tmp_path: Path, name: str) -> None:
    make, why = MODELS[name]
    torch.manual_seed(0)
    base, fields = make()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    lora = LoraModel(base, LoraConfig(r=2, lora_alpha=4, **fields))
    randomise(lora).save_pretrained(tmp_path / "adapter")
    data = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json").json()
    if why is None:
        assert data["loaded"] is None
    else:
        assert any(one in data["loaded"] for one in why.split("|")), data["loaded"]
    if name in ("pissa", "layer_replication"):  # compared elsewhere, by what the model computes
        return
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "expected")
    assert_same_bits(contents(tmp_path / "out"), contents(tmp_path / "expected"))


def test_files_in_another_dtype_than_the_models_are_loaded(tmp_path: Path) -> None:
    base, _ = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    randomise(LoraModel(base, LoraConfig(r=2, target_modules=["q_proj"]))).save_pretrained(
        tmp_path / "adapter"
    )
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, file, {"format": "pt"})
    data = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json").json()
    assert "another dtype" in data["loaded"]


def test_what_the_model_does_not_have_is_copied(tmp_path: Path) -> None:
    """As the buffers that older versions of transformers saved."""
    base, _ = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    lora = LoraModel(base, LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(lora).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "base" / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    save_file(load_file(file) | buffer, file, {"format": "pt"})
    data = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json").json()
    assert data["loaded"] is None
    expected = dict(lora.merge_and_unload().state_dict()) | buffer
    assert_same_bits(contents(tmp_path / "out"), expected)


def big_base(tmp_path: Path, size: int, r: int = 2) -> Path:
    """Two matrices in each shard, of which the adapter changes one and b of the third, too."""
    torch.manual_seed(0)
    base, weight_map = tmp_path / "base", {}
    base.mkdir()
    adapter = {}
    for i in range(SHARDS):
        name = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {f"layers.{i}.{one}.weight": torch.randn(size, size) for one in "ab"}
        save_file(tensors, base / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        for one in "ab" if i == 2 else "a":
            where = f"base_model.model.layers.{i}.{one}"
            adapter[f"{where}.lora_A.weight"] = torch.randn(r, size)
            adapter[f"{where}.lora_B.weight"] = torch.randn(size, r)
    (base / INDEX).write_text(json.dumps({"metadata": {"note": "x"}, "weight_map": weight_map}))
    (base / "tokenizer.model").write_bytes(b"a tokenizer")
    names = sorted({key.removeprefix("base_model.model.").partition(".lora")[0] for key in adapter})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 3, "target_modules": names}
    save_adapter(tmp_path / "adapter", config, adapter)
    return base


def test_nan_leaves_nothing(tmp_path: Path) -> None:
    base = big_base(tmp_path, 64)
    file = base / "model-00003-of-00004.safetensors"
    tensors = load_file(file)
    tensors["layers.2.b.weight"][3, 4] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    says = failed("merge", base, tmp_path / "adapter", tmp_path / "out")
    assert "layers.2.b" in says and "NaN" in says
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


# Four shards of a model


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    base = big_base(tmp_path, 8)
    shutil.copyfile(base / "model-00001-of-00004.safetensors", base / "copy.safetensors")
    assert "is in two of its files" in failed("merge", base, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(AdapterFileError):
        streamed.why_not_outlined(base)
