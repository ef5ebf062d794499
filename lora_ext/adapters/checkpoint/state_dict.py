"""An adapter's tensors by PEFT's keys, without files: taken out of a model and given to one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.base_tensors import places
from lora_ext.adapters.checkpoint.keys import (
    PREFIX,
    layers_in_file,
    saved_in_file,
    tokens_in_file,
)
from lora_ext.adapters.checkpoint.reading import (
    Shapes,
    check_key_mapping,
    mapped,
    of_other_shape,
    warn_of_shapes,
)
from lora_ext.adapters.checkpoint.save import adapter_state_dict
from lora_ext.adapters.checkpoint.values import values_of
from lora_ext.adapters.inject import adapted, off_meta
from lora_ext.adapters.names import plain_name
from lora_ext.arguments import as_flag, check_known, check_mapping, short
from lora_ext.io.adapter_file import open_tensors
from lora_ext.io.adapter_folder import WEIGHTS_NAME
from lora_ext.io.hub import adapter_folder
from lora_ext.nn import Conv1d, Conv2d, Conv3d
from lora_ext.nn.adapter import DEFAULT
from lora_ext.nn.sharded import like, whole_shape
from lora_ext.nn.transaction import Transaction


class LoadResult(NamedTuple):
    """What a loaded state dict did not have, and what the model did not."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file by its keys, for `set_peft_model_state_dict`; nothing is
    compared with a model. Only safetensors files are read.

    Args:
        model_id: a folder, or an id on the hub.
        device: where the tensors are to be; as in PEFT the GPU if there is one, else the CPU.
        key_mapping, options: as of `LoraModel.load_adapter`.

    Raises:
        AdapterFileError: the file is missing or damaged.
    """
    where = "load_peft_weights"
    check_key_mapping(where, key_mapping)
    folder = adapter_folder(where, model_id, options)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with open_tensors(folder / WEIGHTS_NAME) as file:
        keys = mapped(file.specs, key_mapping or {}, folder / WEIGHTS_NAME)
        return {now: file.tensor(key).to(place) for now, key in keys.items()}


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = DEFAULT,
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """What an adapter's file holds, by its keys, in which the adapter's name does not occur.

    Args:
        model: a LoraModel, or a model that `inject_adapter_in_model` returned, whose keys have no
            "base_model.model." before them.
        state_dict: values to take instead of the model's, by the names of its `state_dict()`.
        unwrap_compiled: kept for PEFT's sake: names never have the levels of torch.compile.
        save_embedding_layers: as for `save_pretrained`.

    Raises:
        ValueError: no such adapter, or parts of it are not in this process.
    """
    found, plain = adapted(model, "get_peft_model_state_dict")
    check_known("get_peft_model_state_dict", "adapter_name", [adapter_name], found.peft_config)
    if state_dict is None and _is_sharded(model):
        state_dict = model.state_dict()  # of whole tensors, by names without its levels
    with values_of(found, state_dict):
        tensors = adapter_state_dict(
            found, adapter_name, save_embedding_layers=save_embedding_layers
        )
    return {key.removeprefix(PREFIX) if plain else key: value for key, value in tensors.items()}


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP1 is around it. By name: importing torch.distributed.fsdp takes long."""
    return any(kind.__name__ == "FullyShardedDataParallel" for kind in type(model).__mro__)


@torch.no_grad()
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = DEFAULT,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Gives an adapter that is there the values of a state dict, as
    `get_peft_model_state_dict` returns it.

    Args:
        model: as for `get_peft_model_state_dict`.
        ignore_mismatched_sizes: warns of tensors of other shapes, and leaves the adapter's as they
            are, instead of refusing them.
        low_cpu_mem_usage: the adapter is on "meta" (see `inject_adapter_in_model`), and gets
            tensors on the devices of its layers.

    Returns:
        `missing_keys`: what the adapter has and the state dict has not, or in another shape;
        `unexpected_keys`.

    Raises:
        ValueError: no such adapter, it is on "meta" without low_cpu_mem_usage, or a tensor has
            another shape. Nothing is changed then.
    """
    where = "set_peft_model_state_dict"
    found, plain = adapted(model, where)
    check_known(where, "adapter_name", [adapter_name], found.peft_config)
    check_mapping(where, "peft_model_state_dict", peft_model_state_dict, Tensor, "tensors")
    as_flag(low_cpu_mem_usage, where, "low_cpu_mem_usage")
    as_flag(ignore_mismatched_sizes, where, "ignore_mismatched_sizes")
    found.check_not_offloaded(adapter_name, where)
    given = {}
    for key, value in peft_model_state_dict.items():
        key = plain_name(key)
        given[key if key.startswith(PREFIX) else PREFIX + key] = value
    result = LoadResult([], [key for key in given if key not in _targets(found, adapter_name)])
    mismatched: dict[str, Shapes] = {}
    for key, (target, layer) in _targets(found, adapter_name).items():
        if key not in given:
            result.missing_keys.extend([key] if layer is not None else [])
        elif target.is_meta and not low_cpu_mem_usage:
            raise ValueError(
                f"{where}: {short(key)}: the adapter's is on the device meta, expected "
                "low_cpu_mem_usage=True then; nothing is changed"
            )
        else:
            given[key] = as_the_layer_has_it(layer, target, given[key])
            shape = whole_shape(target)
            if tuple(given[key].shape) != shape:
                mismatched[key] = given.pop(key).shape, shape
                result.missing_keys.extend([key] if layer is not None else [])
    if mismatched and not ignore_mismatched_sizes:
        text = "; ".join(of_other_shape(key, *shapes) for key, shapes in mismatched.items())
        raise ValueError(f"{where}: {text}; nothing is changed")
    warn_of_shapes(where, mismatched)
    off_meta(found, adapter_name)
    transaction = Transaction()
    for key, (target, _) in _targets(found, adapter_name).items():
        if key in given:
            transaction.write(target, like(given[key], target))
    transaction.commit()
    if plain:
        return LoadResult(*([key.removeprefix(PREFIX) for key in keys] for keys in result))
    return result


def _targets(model: AdaptedModel, adapter_name: str) -> dict[str, tuple[Tensor, nn.Module | None]]:
    """What an adapter's file may hold, and the layer or copy that it is of; None of the base."""
    base = model.get_base_model()
    adapted_ = {id(layer): layer for _, layer in model.layers_with(adapter_name)}
    whole = {id(m) for _, m in model.saved_modules() if adapter_name in m.modules_to_save}
    targets: dict[str, tuple[Tensor, nn.Module | None]] = {
        PREFIX + place.key_of(part): (tensor, None)
        for place in places(base, adapted_, whole, aliases=True)
        for part, tensor in {**place.owner._parameters, **place.owner._buffers}.items()
        if tensor is not None and "lora_" not in part
    }
    for name, layer in layers_in_file(model, adapter_name):
        for key, parameter in layer.peft_parameters(adapter_name).items():
            targets[f"{PREFIX}{name}.{key}"] = parameter, layer
    for held in (saved_in_file(model, adapter_name), tokens_in_file(model, adapter_name)):
        targets |= {key: (tensor, model) for key, tensor in held}
    return targets


def as_the_layer_has_it(layer: nn.Module | None, target: Tensor, value: Tensor) -> Tensor:
    """A file's tensor in the shape of the layer's parameter, if it can have that: lora_A of a
    convolution with groups (see `grouped_convolutions`)."""
    if value.shape != target.shape and isinstance(layer, Conv1d | Conv2d | Conv3d):
        grouped = layer.grouped(value) if layer.groups > 1 and value.dim() == target.dim() else None
        return value if grouped is None else grouped
    return value
