"""`AutoPeftModel`s against PEFT's: base and adapter of one folder's name, logits bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

import lora_ext
from lora_ext.errors import AdapterFileError, NotBuiltError

TEXT = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**SMALL, "intermediate_size": 48, "max_position_embeddings": 16, **TEXT}
TOKENS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, **TEXT)
    return transformers.LlamaForCausalLM(config)


def bert(kind: str, labels: int = 3) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(transformers.BertConfig(**BERT, num_labels=labels))


def t5() -> nn.Module:
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**size, vocab_size=97, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


# Class, its task, a base of it and what is adapted there.
KINDS: dict[str, tuple[str | None, Callable[[], nn.Module], list[str]]] = {
    "AutoPeftModelForCausalLM": ("CAUSAL_LM", llama, ["q_proj", "v_proj"]),
    "AutoPeftModelForSeq2SeqLM": ("SEQ_2_SEQ_LM", t5, ["q", "v"]),
    "AutoPeftModelForSequenceClassification": (
        "SEQ_CLS",
        bert("BertForSequenceClassification"),
        ["query"],
    ),
    "AutoPeftModelForTokenClassification": (
        "TOKEN_CLS",
        bert("BertForTokenClassification"),
        ["query"],
    ),
    "AutoPeftModelForQuestionAnswering": (
        "QUESTION_ANS",
        bert("BertForQuestionAnswering", 2),
        ["query"],
    ),
    "AutoPeftModelForFeatureExtraction": ("FEATURE_EXTRACTION", bert("BertModel"), ["query"]),
    "AutoPeftModel": (None, llama, ["q_proj", "v_proj"]),
}


def saved(tmp: Path, name: str, lib: Any = lora_ext, **fields: Any) -> Path:
    """An adapter's folder, beside its base's."""
    task, make, targets = KINDS[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp / "base")
    base: Any = transformers
    wrote = json.loads((tmp / "base/config.json").read_text())["architectures"][0]
    model = getattr(base, wrote).from_pretrained(tmp / "base")
    config = lib.LoraConfig(task_type=task, target_modules=targets, r=4, **fields)
    adapted = lib.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp / "adapter")
    return tmp / "adapter"


def results(model: Any) -> list[torch.Tensor]:
    inputs = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS
    with torch.no_grad():
        found = model(**inputs)
    return [v for v in found.values() if isinstance(v, torch.Tensor)]


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


def tokenizer(count: int) -> Any:
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, count)}}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")


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


def changed(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


MAPPING = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another task": (
        "AutoPeftModelForSeq2SeqLM",
        {},
        "task_type: got 'CAUSAL_LM'.*use AutoPeftModelForCausalLM",
    ),
    "a task": ("AutoPeftModel", {}, "expected None; use AutoPeftModelForCausalLM"),
    "no class": ("AutoPeftModel", {"task_type": None}, "task_type and auto_mapping: got neither"),
    "no class for a task's": (
        "AutoPeftModelForCausalLM",
        {"task_type": None},
        "task_type and auto_mapping: got neither",
    ),
    "no base": (
        "AutoPeftModelForCausalLM",
        {"base_model_name_or_path": None},
        "base_model_name_or_path: got None",
    ),
    "another package": (
        "AutoPeftModel",
        {"task_type": None, "auto_mapping": MAPPING | {"parent_library": "transformersx"}},
        "import allowlist",
    ),
    "a function": (
        "AutoPeftModel",
        {"task_type": None, "auto_mapping": MAPPING | {"base_model_class": "set_seed"}},
        "has no class 'set_seed' with from_pretrained",
    ),
    "no texts": (
        "AutoPeftModel",
        {"task_type": None, "auto_mapping": {"base_model_class": ["a"]}},
        "auto_mapping: got .*expected texts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_names_no_base_is_refused(case: str, tmp_path: Path) -> None:
    name, fields, text = REFUSED[case]
    folder = changed(saved(tmp_path, "AutoPeftModelForCausalLM"), **fields)
    with pytest.raises(ValueError, match=text):
        getattr(lora_ext, name).from_pretrained(folder)
    if case != "no base" and case != "a function":
        with pytest.raises((ValueError, KeyError)):
            getattr(peft, name).from_pretrained(folder)


def test_packages_are_imported_only_where_they_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "AutoPeftModel")
    (tmp_path / "mine_to_import.py").write_text(
        "from transformers import LlamaForCausalLM as Mine\nclass Other: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Mine", "parent_library": "mine_to_import"}
    changed(folder, auto_mapping=mapping)
    load = lora_ext.AutoPeftModel.from_pretrained
    with pytest.raises(ValueError, match="mine_to_import"):
        load(folder)
    assert "mine_to_import" not in sys.modules
    model = load(folder, import_allowlist=["mine_to_import"])
    assert type(model.get_base_model()) is transformers.LlamaForCausalLM


def test_errors_of_the_adapter_come_before_the_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "AutoPeftModelForCausalLM")
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises((ValueError, FileNotFoundError, AdapterFileError), match="nowhere"):
        lora_ext.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(NotBuiltError, match="peft_type"):
        lora_ext.AutoPeftModelForCausalLM.from_pretrained(changed(folder, peft_type="LOHA"))
    load: Any = lora_ext.AutoPeftModel.from_pretrained
    with pytest.raises(TypeError, match="pretrained_model_name_or_path: got None"):
        load(None)
    with pytest.raises(TypeError, match="import_allowlist: got"):
        load(folder, import_allowlist=[1])
    with pytest.raises(OSError, match=r"call AutoPeftModelForCausalLM\.from_pretrained"):
        lora_ext.AutoPeftModelForCausalLM(folder)


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
