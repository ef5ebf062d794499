"""Tiny llama and mixtral, as models of transformers and as the GGUF files of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCABULARY, EXPERTS = 64, 96, 4, 2, 2, 48, 4
_TEXT = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY}
_SIZES = {
    **{"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS},
    "max_position_embeddings": 64,
}
_NAMES = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"},
    **{"post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate"},
    **{"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp"},
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(**_TEXT, **_SIZES, tie_word_embeddings=tied)
    return drawn(transformers.LlamaForCausalLM(config))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **_TEXT, **_SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None
    )
    return drawn(transformers.MixtralForCausalLM(config))


def drawn(model: nn.Module) -> nn.Module:
    """With weights large enough for attention and routing to depend on the tokens."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(values * scale + (parameter.dim() == 1))
    return model.eval()


def write(gguf: Any, model: nn.Module, path: Path) -> None:
    """The model's file, in float32 and without a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    config: Any = model.config
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "mixtral":
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("none")
    for name, tensor in model.state_dict().items():
        for own, value in _tensors(name, tensor, config.tie_word_embeddings):
            writer.add_tensor(f"{own}.weight", value.contiguous().numpy())
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()


def _tensors(name: str, tensor: Tensor, tied: bool) -> list[tuple[str, Tensor]]:
    module = name.removesuffix(".weight")
    if module in _OUTSIDE:
        return [] if tied and module == "lm_head" else [(_OUTSIDE[module], tensor)]
    _, _, i, part = module.split(".", 3)
    if part == "mlp.experts.gate_up_proj":
        gate, up = tensor.chunk(2, 1)
        return [(f"blk.{i}.ffn_gate_exps", gate), (f"blk.{i}.ffn_up_exps", up)]
    if part == "mlp.experts.down_proj":
        return [(f"blk.{i}.ffn_down_exps", tensor)]
    heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
    if heads:
        tensor = neighbours(tensor, heads)
    return [(f"blk.{i}.{_NAMES[part]}", tensor)]


def neighbours(tensor: Tensor, heads: int) -> Tensor:
    """The rows of q and k as llama.cpp turns them: the two of a pair after each other."""
    half = len(tensor) // heads // 2
    rows = [
        head * 2 * half + side * half + i
        for head in range(heads)
        for i in range(half)
        for side in range(2)
    ]
    return tensor[rows]
