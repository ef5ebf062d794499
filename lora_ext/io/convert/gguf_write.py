"""An adapter into llama.cpp's file; see gguf.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext.arguments import short
from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.formats import LoadedAdapter
from lora_ext.io.convert.gguf_experts import split_experts
from lora_ext.io.convert.gguf_file import write_gguf
from lora_ext.io.convert.gguf_keys import A_END, ALPHA, B_END, GENERAL, TEXTS, TOKENS, WEIGHT
from lora_ext.io.convert.gguf_names import EMBEDDING, Base
from lora_ext.io.convert.gguf_pairs import Pair, Scalings, pairs_of, with_one_alpha

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def write_adapter(path: Path, adapter: LoadedAdapter, base: Base) -> None:
    """
    Raises:
        AdapterFileError: the adapter has what such a file cannot hold, or does not fit the base;
            names the field, the module or the key.
        ImportError: the package gguf is not installed.
    """
    config = adapter.config
    scalings = Scalings(config)
    pairs, rest = split_experts(pairs_of(adapter), base, scalings)
    for module, pair in rest.items():
        name = base.tensor_of(module)
        scaling = scalings.of(scalings.name_of(module), pair.rank)
        base.check_weight(module, pair.A.shape[1], pair.B.shape[0], pair.embedding)
        if pair.embedding != (name == EMBEDDING):
            raise AdapterFileError(
                f"{module}: is {'an' if pair.embedding else 'no'} embedding in the adapter, and "
                f"{name!r} in llama.cpp"
            )
        if name in pairs:
            raise AdapterFileError(f"{module}: another module of the adapter is {name!r} too")
        order = base.order(module, pair.B.shape[0])
        B = pair.B if order is None else pair.B[order.to(pair.B.device)]
        pairs[name] = Pair(pair.A, B, scaling, pair.embedding)
    alpha, pairs = with_one_alpha(pairs)
    tensors: dict[str, Tensor] = {}
    for name in sorted(pairs, key=_by_layer):
        one = pairs[name]
        tensors[f"{name}{WEIGHT}{A_END}"] = one.A.T if one.embedding else one.A
        tensors[f"{name}{WEIGHT}{B_END}"] = one.B
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise AdapterFileError(
                f"{name}: is {tensor.dtype}, expected float32, float16 or bfloat16; convert it "
                "with --dtype"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{name}: has NaN or Inf; it is not saved")
    write_gguf(path, base.family.arch, _values(config, alpha), tensors)


def _values(config: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    values: dict[str, Any] = {**GENERAL, ALPHA: alpha}
    for field, key in TEXTS.items():
        if isinstance(config.get(field), str):
            values[key] = config[field]
    tokens = config.get("alora_invocation_tokens")
    if tokens:
        if not isinstance(tokens, list) or not all(
            type(token) is int and 0 <= token < 1 << 31 for token in tokens
        ):
            raise AdapterFileError(
                f"alora_invocation_tokens: got {short(tokens)}, expected numbers of tokens"
            )
        values[TOKENS] = tuple(tokens)
    return values


def _by_layer(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[1]), name) if parts[0] == "blk" else (-1, name)
