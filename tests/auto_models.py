"""Small models of transformers and adapters of them in folders, for `AutoPeftModel`s."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

import lora_ext

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


def tokenizer(count: int) -> Any:
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, count)}}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")


def changed(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder
