"""Which rows of a layer's input EVA takes: PEFT's functions, by its names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_ext.arguments import refuse

_ALL_ROWS = (
    "or prepare_model_inputs_fn=None with prepare_layer_inputs_fn=None, which take all rows of a "
    "layer's input"
)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """The places [n, 2] of the tokens of a batch that count: those that attention_mask keeps and,
    with `use_label_mask`, whose label is not `label_mask_value`."""
    if not isinstance(model_input, Mapping):
        refuse(
            "get_eva_state_dict",
            "dataloader",
            model_input,
            "batches that are dictionaries, or prepare_model_inputs_fn=None: inputs must be a "
            "dictionary",
        )
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    mask, eva = mask.bool(), peft_config.eva_config
    labels = model_input.get("labels") if eva.use_label_mask else None
    if labels is not None and labels.shape != mask.shape:
        raise ValueError(
            f"get_eva_state_dict: dataloader: got labels of shape {list(labels.shape)} beside "
            f"tokens {list(mask.shape)}, expected one for each token; give "
            f"EvaConfig(use_label_mask=False), {_ALL_ROWS}"
        )
    if labels is not None:
        mask = mask & (labels != eva.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Any, layer_name: str
) -> Tensor:
    """The rows of a layer's input at these places."""
    x = _first(layer_input, layer_name)
    try:
        return x[model_input.T.unbind()]
    except IndexError as error:
        raise ValueError(
            f"get_eva_state_dict: '{layer_name}' has an input of shape {list(x.shape)}, which has "
            "not the places of the batch's tokens, as in a decoder with a length of its own; give "
            f"a prepare_layer_inputs_fn for it, {_ALL_ROWS}"
        ) from error


def all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """All rows of a layer's input, whatever the batch is."""
    x = _first(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def _first(layer_input: Any, layer_name: str) -> Tensor:
    x = layer_input[0] if isinstance(layer_input, tuple | list) and layer_input else layer_input
    if not isinstance(x, Tensor):
        refuse(
            "get_eva_state_dict",
            layer_name,
            x,
            "a call with a tensor; unsupported input type for prepare_layer_inputs_fn, please "
            "provide a custom prepare_layer_inputs_fn",
        )
    return x


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, in their order, if there are several."""
    if not dist.is_available() or not dist.is_initialized():
        return x
    counts = [
        torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    most = max(int(count) for count in counts)
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def digest(x: Tensor) -> bytes:
    """The same for equal tensors, of whichever layers."""
    content = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr((x.dtype, tuple(x.shape))).encode() + content).digest()
