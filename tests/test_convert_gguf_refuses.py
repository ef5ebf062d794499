"""What llama.cpp's files cannot hold, and bases that they cannot be for: refused by name."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import gguf_problems as problems
import pytest
import torch
from gguf_problems import HIDDEN, PREFIX, VOCABULARY, adapter_of, llama_shapes
from measured import refused
from test_convert_gguf import GQA, layers, written
from test_convert_write import BAD, saved

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert import FORMATS, LoadedAdapter, Options, convert

# What cannot be written


def changed(**config: Any) -> LoadedAdapter:
    return adapter_of(llama_shapes(), **config)


def with_tensor(key: str, *shape: int) -> LoadedAdapter:
    adapter = adapter_of(llama_shapes())
    return LoadedAdapter(adapter.config, adapter.tensors | {key: torch.zeros(shape)})


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[LoadedAdapter, str]] = {
    "dora": (changed(use_dora=True), "use_dora"),
    "dora's tensor": (with_tensor(f"{Q}.lora_magnitude_vector", 32), "use_dora"),
    "lora_bias": (changed(lora_bias=True), "lora_bias"),
    "lora_bias's tensor": (with_tensor(f"{Q}.lora_B.bias", 32), "lora_bias"),
    "modules_to_save": (changed(modules_to_save=["lm_head"]), "modules_to_save"),
    "saved weight": (with_tensor(f"{PREFIX}lm_head.weight", 64, 32), "no-embeddings"),
    "tokens": (changed(trainable_token_indices=[3]), "trainable_token_indices"),
    "token's tensor": (
        with_tensor(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", 1, 32),
        "trainable_token_indices",
    ),
    "bias": (changed(bias="all"), "bias: got 'all'"),
    "layer_replication": (changed(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "bdlora": (changed(use_bdlora={"nblocks": 2}), "use_bdlora"),
    "pissa": (changed(init_lora_weights="pissa_niter_4"), "convert --initial"),
    "other kind": (changed(peft_type="LOHA"), "expected LORA"),
    "no module of llama": (with_tensor(f"{PREFIX}score.lora_A.weight", 4, 32), "score: has lora_A"),
    "another name": (
        adapter_of({"model.layers.0.self_attn.query": (HIDDEN, HIDDEN)}),
        r"query'.*has no weight for it",
    ),
    "a layer too many": (
        adapter_of({"model.layers.2.self_attn.q_proj": (HIDDEN, HIDDEN)}),
        r"layers\.2\.self_attn\.q_proj'",
    ),
    "rows of other heads": (
        adapter_of({"model.layers.0.self_attn.k_proj": (6, HIDDEN)}),
        "by the heads",
    ),
    "tied head": (adapter_of({"lm_head": (VOCABULARY, HIDDEN)}), "lm_head: .*are tied"),
    "tied embedding": (
        adapter_of({"model.embed_tokens": (VOCABULARY, HIDDEN)}),
        "embed_tokens: .*are tied",
    ),
    "convolution": (with_tensor(f"{Q}.lora_A.weight", 4, 32, 3, 3), "q_proj: lora_A is"),
    "NaN": (with_tensor(f"{Q}.lora_A.weight", 4, 32), "NaN"),
    "float64": (changed(dtype=torch.float64), "float64"),
    "alpha": (changed(lora_alpha="8"), "lora_alpha: got '8'"),
    "alpha below 0": (changed(lora_alpha=-3), "lora_alpha: got -3"),
    "no expression": (changed(alpha_pattern={"(q": 1}), "alpha_pattern: .*at position"),
    "slow expression": (
        changed(alpha_pattern={r"(m|o|d|e|l|\.|mo|de|el|.|..|...)+y": 1}),
        "takes longer",
    ),
    "tokens of aLoRA": (changed(alora_invocation_tokens=[-1]), "alora_invocation_tokens"),
    "nothing": (LoadedAdapter({"peft_type": "LORA"}, {}), "no tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold_is_refused_by_name(tmp_path: Path, name: str) -> None:
    adapter, message = REFUSED[name]
    if name == "NaN":
        adapter.tensors[f"{Q}.lora_A.weight"][0, 0] = math.nan
    fields = GQA | {"tie_word_embeddings": name.startswith("tied")}
    (tmp_path / "a.gguf").write_text("what was there")
    with pytest.raises(AdapterFileError, match=message):
        written(tmp_path, adapter, "llama", **fields)
    assert (tmp_path / "a.gguf").read_text() == "what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "base"]


@pytest.mark.parametrize("case", sorted(BAD.keys() - {"activated"}))
def test_damaged_adapters_are_refused(tmp_path: Path, case: str) -> None:
    """Fast and in little memory, as by the other formats; what is left out it can hold."""
    tensors, fields, _ = BAD[case]
    name = "model.layers.0.mlp.up_proj"
    tensors = {key.replace("unet.a", name): tensor for key, tensor in tensors.items()}
    folder, out = tmp_path / "adapter", tmp_path / "a.gguf"
    saved(folder, tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 4} | fields)
    base = problems.base_folder(tmp_path / "base", "llama")
    said = refused(lambda: convert(folder, out, target="gguf", base=base))
    assert (str(out) in said or str(folder) in said) and not out.exists()


def test_bases_are_refused_by_name(tmp_path: Path) -> None:
    adapter = adapter_of(llama_shapes())
    with pytest.raises(AdapterFileError, match=r"model_type is 'rwkv'.*known are bloom"):
        written(tmp_path, adapter, "rwkv")
    with pytest.raises(AdapterFileError, match="num_attention_heads is 'four'"):
        written(tmp_path, adapter, "llama", num_attention_heads="four")
    with pytest.raises(AdapterFileError, match=r"config.json.*cannot be read"):
        FORMATS["gguf"].write(tmp_path / "a.gguf", adapter, Options(base=tmp_path / "none"))
    with pytest.raises(ValueError, match="--base FOLDER"):
        FORMATS["gguf"].write(tmp_path / "a.gguf", adapter, Options())
    many = adapter_of(layers("transformer.h", {"attn.c_attn": (3 * HIDDEN, HIDDEN)}))
    with pytest.raises(AdapterFileError, match="multi_query is false"):
        written(tmp_path, many, "gpt_bigcode", multi_query=False)


def test_shapes_are_compared_with_the_bases_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = problems.base_folder(tmp_path / "base", "llama", **GQA)
    name = "model.layers.0.self_attn.o_proj"
    save_file({f"{name}.weight": torch.zeros(HIDDEN, 40)}, base / "model.safetensors")
    with pytest.raises(AdapterFileError, match=rf"{name}: .*\[32, 32\].* is \[32, 40\]"):
        FORMATS["gguf"].write(tmp_path / "a.gguf", adapter_of(llama_shapes()), Options(base=base))


def test_without_the_package_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        written(tmp_path, adapter_of(llama_shapes()), "llama", **GQA)


# Reading
