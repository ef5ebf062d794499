"""The small models of the hub that PEFT's tests load, made anew with random weights from the
config classes of transformers, in the layout of the hub's cache. Nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.peft_suite.fetch import BUILD

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 64, "vocab_size": 32000, "num_key_value_heads": 4}
OPT = {
    **SMALL,
    "ffn_dim": 4,
    "vocab_size": 50265,
    "word_embed_proj_dim": 16,
    "max_position_embeddings": 128,
}
GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "vocab_size": 1024, "n_positions": 512}
BERT = {**SMALL, "intermediate_size": 37, "vocab_size": 1124}
ROBERTA = {**BERT, "vocab_size": 1500, "max_position_embeddings": 514}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 5,
    "num_heads": 4,
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "vocab_size": 50265,
    "max_position_embeddings": 100,
}
GEMMA3 = {**LLAMA, "num_key_value_heads": 2, "head_dim": 8}
MOE = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = {
    **LLAMA,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 8,
}
LLAMA4 = {**LLAMA, "num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 8}

# The name on the hub: the model's class, the config's class and its fields.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", OPT),
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        "OPTConfig",
        {**OPT, "num_hidden_layers": 12},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {**GPT2, "rotary_dim": 4},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 1024},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**LLAMA, "pad_token_id": 0},
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (
        "MistralForCausalLM",
        "MistralConfig",
        LLAMA,
    ),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**LLAMA, "head_dim": 8},
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GEMMA3,
    ),
    "hf-internal-testing/Mixtral-tiny": ("MixtralForCausalLM", "MixtralConfig", MOE),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        QWEN3_MOE,
    ),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN3_MOE),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**MOE, "head_dim": 8},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        LLAMA4,
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
    ),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", ROBERTA),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        ROBERTA,
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        "DebertaV2Config",
        BERT,
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]},
    ),
}


def make_hub() -> Path:
    """The folder that HF_HOME is to name, with all of MODELS in it."""
    home = BUILD / "hub"
    for name, (model, config, fields) in MODELS.items():
        cache = home / "hub" / f"models--{name.replace('/', '--')}"
        if (cache / "refs" / "main").exists():
            continue
        made = getattr(transformers, model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = made(getattr(transformers, config)(**fields))
        built.save_pretrained(cache / "snapshots" / "0")
        _tokenizer(fields.get("vocab_size", 100)).save_pretrained(cache / "snapshots" / "0")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / "main").write_text("0")
    return home


def _tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"<{i}>": i for i in range(min(vocabulary, 1000))} | {"<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<0>", eos_token="<2>"
    )
