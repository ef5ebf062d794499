"""GGUF files made byte by byte, right and wrong, and adapters of tiny models."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext.io.convert import LoadedAdapter

PREFIX = "base_model.model."
HIDDEN, INNER, VOCABULARY, LAYERS, HEADS = 32, 48, 64, 2, 4
F32, F16, UINT32, FLOAT32, STRING, ARRAY = 0, 1, 4, 6, 8, 9
# Sizes under the names of all configs.
SIZES = {
    **{"num_hidden_layers": LAYERS, "n_layer": LAYERS, "hidden_size": HIDDEN, "n_embd": HIDDEN},
    **{"num_attention_heads": HEADS, "n_head": HEADS, "vocab_size": VOCABULARY},
}


def base_folder(folder: Path, model_type: str, **fields: Any) -> Path:
    """A base of which there is nothing but its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": model_type, **SIZES, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter_of(
    shapes: dict[str, tuple[int, int]],
    r: int = 4,
    dtype: torch.dtype = torch.float32,
    ranks: dict[str, int] | None = None,
    **config: Any,
) -> LoadedAdapter:
    """A random adapter of these modules, whose weights are [out, in]; one of a name that ends in
    "embed_tokens" is [vocabulary, out]."""
    generator = torch.Generator().manual_seed(len(shapes))

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    tensors = {}
    for name, (out, columns) in shapes.items():
        rank = (ranks or {}).get(name, r)
        if name.endswith("embed_tokens"):
            tensors[f"{PREFIX}{name}.lora_embedding_A"] = drawn(rank, out)
            tensors[f"{PREFIX}{name}.lora_embedding_B"] = drawn(columns, rank)
        else:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = drawn(rank, columns)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = drawn(out, rank)
    fields = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": sorted(shapes)}
    return LoadedAdapter(fields | config, tensors)


def llama_shapes(kv_heads: int = 2) -> dict[str, tuple[int, int]]:
    kv = HIDDEN // HEADS * kv_heads
    of_layer = {
        **{"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN)},
        **{"self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)},
        **{"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN)},
        **{"mlp.down_proj": (HIDDEN, INNER)},
    }
    return {
        f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in of_layer.items()
    }


def layers_of(before: str, of_layer: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{before}.{i}.{name}": one for i in range(LAYERS) for name, one in of_layer.items()}


# Files


def text(value: str | bytes) -> bytes:
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """Of a tensor; the shape as files have it."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


KEYS = {
    "general.architecture": key("general.architecture", STRING, text("llama")),
    "general.type": key("general.type", STRING, text("adapter")),
    "adapter.type": key("adapter.type", STRING, text("lora")),
    "adapter.lora.alpha": key("adapter.lora.alpha", FLOAT32, struct.pack("<f", 8.0)),
}
Q_A, Q_B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
A_BYTES = B_BYTES = HIDDEN * 4 * 4
INFOS = {
    Q_A: info(Q_A, (HIDDEN, 4), F32, 0),
    Q_B: info(Q_B, (4, HIDDEN), F32, A_BYTES),
}
DATA = bytes(A_BYTES + B_BYTES)


def packed(
    keys: dict[str, bytes] | None = None,
    infos: dict[str, bytes] | None = None,
    data: bytes = DATA,
    version: int = 3,
    count: int | None = None,
    count_keys: int | None = None,
) -> bytes:
    """A file; without arguments a good one, of one module of rank 4."""
    keys, infos = KEYS if keys is None else keys, INFOS if infos is None else infos
    counts = len(infos) if count is None else count, len(keys) if count_keys is None else count_keys
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    head += b"".join(keys.values()) + b"".join(infos.values())
    return head + bytes(-len(head) % 32) + data
