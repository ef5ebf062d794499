"""Models of transformers in miniature: made from their config classes, so that nothing is fetched.

Each builder returns a model with random weights, in evaluation mode, and inputs for which
`model(**inputs).loss` is a scalar that depends on all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Built = tuple[nn.Module, Inputs]

VOCABULARY = 97
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = 3


def _tokens(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (2, 7), generator=generator)


def _pixels(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def _build(model: type[nn.Module], config: Any, **inputs: Tensor) -> Built:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(config).eval(), inputs


def _causal(model: type[nn.Module], config: Any) -> Built:
    return _build(model, config, input_ids=_tokens(), labels=_tokens())


def _llama_like(name: str, **options: Any) -> Built:
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        **TEXT,
        **options,
    )
    return _causal(getattr(transformers, f"{name}ForCausalLM"), config)


def llama(**options: Any) -> Built:
    return _llama_like("Llama", **options)


def mistral() -> Built:
    return _llama_like("Mistral")


def stablelm() -> Built:
    return _llama_like("StableLm")


def falcon() -> Built:
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, **TEXT
    )
    return _causal(transformers.FalconForCausalLM, config)


def gpt2() -> Built:
    config = transformers.GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=16, **TEXT)
    return _causal(transformers.GPT2LMHeadModel, config)


def gpt_bigcode() -> Built:
    config = transformers.GPTBigCodeConfig(
        n_embd=32, n_layer=LAYERS, n_head=4, n_positions=16, **TEXT
    )
    return _causal(transformers.GPTBigCodeForCausalLM, config)


def mpt() -> Built:
    config = transformers.MptConfig(
        d_model=32, n_heads=4, n_layers=LAYERS, max_seq_len=16, expansion_ratio=2, **TEXT
    )
    return _causal(transformers.MptForCausalLM, config)


def bert() -> Built:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        **TEXT,
    )
    return _causal(transformers.BertForMaskedLM, config)


def bert_classifier() -> Built:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=3,
        **TEXT,
    )
    model = transformers.BertForSequenceClassification
    return _build(model, config, input_ids=_tokens(), labels=torch.tensor([0, 2]))


def t5() -> Built:
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=LAYERS,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    return _causal(transformers.T5ForConditionalGeneration, config)


def dinov2() -> Built:
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        num_labels=3,
    )
    model = transformers.Dinov2ForImageClassification
    return _build(model, config, pixel_values=_pixels(28), labels=torch.tensor([0, 2]))


def resnet() -> Built:
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[2, 2],
        layer_type="basic",
        num_labels=3,
    )
    model = transformers.ResNetForImageClassification
    return _build(model, config, pixel_values=_pixels(32), labels=torch.tensor([0, 2]))


def blip() -> Built:
    text = {
        "hidden_size": 32,
        "encoder_hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "sep_token_id": 2,
        **TEXT,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        # The default makes every image the same to the text.
        "initializer_range": 0.02,
    }
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    model = transformers.BlipForConditionalGeneration
    return _build(model, config, input_ids=_tokens(), pixel_values=_pixels(28), labels=_tokens())


BUILDERS: dict[str, Callable[[], Built]] = {
    builder.__name__: builder
    for builder in (
        llama,
        mistral,
        falcon,
        bert,
        bert_classifier,
        t5,
        dinov2,
        resnet,
        mpt,
        blip,
        gpt_bigcode,
        stablelm,
        gpt2,
    )
}
