"""Any library's quantized weight, as a QuantizedWeight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from lora_ext.quant import bitsandbytes, gguf, torchao
from lora_ext.quant.checks import fail
from lora_ext.quant.kinds import has_quant_state, has_scb, is_nf4, is_torchao
from lora_ext.quant.weight import QuantizedWeight

KNOWN = (
    "a weight of bitsandbytes (Params4bit, Int8Params), of torchao (NF4Tensor, Int8Tensor, "
    "Int4Tensor) or of gguf's reader, or a module that has one"
)


def read_weight(source: Any, name: str = "weight") -> QuantizedWeight:
    """The quantized weight of a module, or one that is given itself.

    Args:
        source: bitsandbytes' Linear4bit, Linear8bitLt and embeddings, and their weights; modules
            with a torchao weight, and the weight; a tensor of `gguf.GGUFReader`.
        name: of the tensor, for messages.

    Returns:
        The matrix, on the same bytes where the layout allows it (see QuantizedWeight).

    Raises:
        ValueError: not quantized, malformed, or in a layout that is not read; says what to do.
    """
    module = source if isinstance(source, nn.Module) else None
    weight: Any = source if module is None else getattr(module, "weight", None)
    own = getattr(module, "quantized_weight", None)  # of a lora_ext.quant.Linear
    if isinstance(own, QuantizedWeight):
        return own
    # A Linear4bit that was pickled and copied has its state, but a weight without it.
    state = getattr(module, "quant_state", None)
    if has_quant_state(weight) or hasattr(state, "quant_type"):
        return bitsandbytes.read_4bit(weight, state, name)
    if has_scb(weight):
        scb = weight.SCB  # which the module's first forward moves into its state
        if scb is None:
            scb = getattr(getattr(module, "state", None), "SCB", None)
        return bitsandbytes.read_int8(weight, scb, name)
    if is_nf4(weight):
        return torchao.read_nf4(weight, name)
    if is_torchao(weight):
        return torchao.read_affine(weight, name)
    if module is None and isinstance(getattr(source, "data", None), np.ndarray):
        if hasattr(source, "tensor_type") and hasattr(source, "shape"):
            shape = tuple(int(size) for size in reversed(source.shape))
            return gguf.read_gguf(source.data, shape, source.tensor_type, source.name)
    fail(name, "source", source if weight is None else weight, KNOWN)


def read_state_dict(state: Mapping[str, Any], key: str) -> QuantizedWeight:
    """A weight that bitsandbytes saved.

    Args:
        state: a state dict, or the tensors of a file.
        key: the weight's, such as "model.layers.0.self_attn.q_proj.weight".

    Raises:
        ValueError: no such key, not quantized, or malformed.
    """
    if key not in state:
        fail(key, "key", "no such key", "one of the state dict's weights")
    types = [t for t in ("nf4", "fp4") if f"{key}.{bitsandbytes.STATE}{t}" in state]
    if len(types) > 1:
        fail(key, "quant_state", types, "one of them")
    if types:
        return bitsandbytes.read_4bit_state(state, key, types[0])
    if f"{key.removesuffix('weight')}SCB" in state:
        return bitsandbytes.read_int8_state(state, key)
    keys = f"{key}.{bitsandbytes.STATE}nf4 or ...fp4, or SCB, beside it"
    fail(key, "key", "no quantization state", keys)
