"""Tiny GPT-2, GPT-NeoX and Falcon, whose q, k and v are one weight, as models of transformers and
as GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from bases import HEADS, HIDDEN, KV_HEADS, LAYERS, VOCABULARY, drawn
from torch import Tensor, nn

HEAD = HIDDEN // HEADS
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
_NAMES = {
    "gpt2": {
        **{"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"},
        **{"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        **{"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"},
    },
    "gpt_neox": {
        **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
        **{"attention.query_key_value": "attn_qkv", "attention.dense": "attn_output"},
        **{"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"},
        **{"embed_in": "token_embd", "final_layer_norm": "output_norm"},
        **{"lm_head": "output", "embed_out": "output"},
    },
    "falcon": {
        **{"ln_mlp": "attn_norm", "ln_attn": "attn_norm_2"},
        **{"self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output"},
        **{"mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"},
        **{"word_embeddings": "token_embd", "ln_f": "output_norm"},
    },
}


def gpt2() -> nn.Module:
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": HIDDEN, "n_positions": 64}
    return drawn(transformers.GPT2LMHeadModel(transformers.GPT2Config(**_TOKENS, **sizes)))


def gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        **_TOKENS,
        **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": HIDDEN},
        **{"intermediate_size": 4 * HIDDEN, "max_position_embeddings": 64},
        hidden_act="gelu_new",
    )
    return drawn(transformers.GPTNeoXForCausalLM(config))


def falcon() -> nn.Module:
    """Of 40B's kind: groups of queries with a key and a value each."""
    config = transformers.FalconConfig(
        **_TOKENS,
        **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": HIDDEN},
        **{"num_kv_heads": KV_HEADS, "new_decoder_architecture": True},
        activation="gelu_new",
    )
    return drawn(transformers.FalconForCausalLM(config))


def write(gguf: Any, model: nn.Module, path: Path) -> None:
    config: Any = model.config
    kind = config.model_type
    writer = gguf.GGUFWriter(path, {"gpt_neox": "gptneox"}.get(kind, kind))
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(4 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS if kind == "falcon" else HEADS)
    eps = "layer_norm_eps" if kind == "gpt_neox" else "layer_norm_epsilon"
    writer.add_layer_norm_eps(getattr(config, eps))
    if kind == "gpt_neox":
        share = config.rope_parameters["partial_rotary_factor"]
        writer.add_rope_dimension_count(int(share * HEAD))
        writer.add_parallel_residual(config.use_parallel_residual)
    if kind != "gpt2":
        writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_tokenizer_model("none")
    state = model.state_dict()
    tied = state["lm_head.weight"].data_ptr() == model.get_input_embeddings().weight.data_ptr()  # type: ignore[operator]
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if tied and module == "lm_head":
            continue
        place = module.split(".")
        if "h" in place or "layers" in place:
            at = place.index("h" if "h" in place else "layers")
            own = f"blk.{place[at + 1]}.{_NAMES[kind]['.'.join(place[at + 2 :])]}"
        else:
            own = _NAMES[kind][place[-1]]
        if "query_key_value" in module:
            tensor = _queries_keys_values(tensor, KV_HEADS if kind == "falcon" else HEADS)
        if kind == "gpt2" and ".c_" in module and part == "weight":
            tensor = tensor.T
        writer.add_tensor(f"{own}.{part}", tensor.float().contiguous().numpy())
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()


def _queries_keys_values(tensor: Tensor, groups: int) -> Tensor:
    each, parts = HEADS // groups, tensor.split(HEAD)
    size = each + 2
    queries = [parts[g * size + i] for g in range(groups) for i in range(each)]
    keys = [parts[g * size + each] for g in range(groups)]
    values = [parts[g * size + each + 1] for g in range(groups)]
    return torch.cat([*queries, *keys, *values])
