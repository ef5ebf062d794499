"""Layers whose adapters are those of an embedding with the same weight (ensure_weight_tying), the
parameters themselves. Of a linear layer lora_A is its lora_B and lora_B its lora_A, which are used
transposed; of another embedding they are the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext.nn.adapter import part_name

Layer = Any  # a LoraLayer, which imports this


class Tie(NamedTuple):
    """What a layer has in place of an adapter of its own."""

    embedding: Layer
    transposed: bool


def tie(draft: Layer, adapter_name: str, source: Layer, embedding: Layer) -> None:
    """Makes a draft's adapter that of an embedding, `source` being the draft of that."""
    transposed = draft.PEFT_NAMES != embedding.PEFT_NAMES
    draft._tied[adapter_name] = Tie(embedding, transposed)
    for part, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        shared = source._parameters[part_name(other if transposed else part, adapter_name)]
        draft._parameters[part_name(part, adapter_name)] = shared
    draft._choose_running()


def is_tied(layer: Layer, adapter_name: str) -> bool:
    """Whether the adapter is an embedding's."""
    return adapter_name in layer._tied


def is_transposed(layer: Layer, adapter_name: str) -> bool:
    """Whether the parameters of an adapter are used transposed."""
    return adapter_name in layer._tied and layer._tied[adapter_name].transposed


def check_own(layer: Layer, adapter_name: str) -> None:
    """ValueError for an adapter that is an embedding's, which is initialised there."""
    if adapter_name in layer._tied:
        raise ValueError(
            f"{type(layer).__name__}: '{adapter_name}' is the adapter of an embedding "
            "(ensure_weight_tying), expected one of the layer's own; initialise that of the "
            "embedding"
        )


def in_file_shape(layer: Layer, adapter_name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """Parameters in the shapes of the layer's own: of an embedding's, views."""
    if not is_transposed(layer, adapter_name):
        return parts
    return {part: parameter.detach().t() for part, parameter in parts.items()}


def for_file(layer: Layer, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file can hold them, which has no two of one memory."""
    if adapter_name not in layer._tied:
        return tensors
    dense = torch.contiguous_format
    return {key: tensor.clone(memory_format=dense) for key, tensor in tensors.items()}
