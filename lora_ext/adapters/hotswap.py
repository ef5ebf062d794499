"""Another adapter's values in the place of one that is there: the parameters stay what they are,
so that optimizers, graphs and compiled code keep them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from lora_ext._not_built import INSTEAD
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.keys import PREFIX, layers_in_file, own_tensors, possible_keys
from lora_ext.adapters.checkpoint.load import plan_of, read_config, typed_content
from lora_ext.adapters.checkpoint.reading import FileTensors
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.inject import adapted
from lora_ext.adapters.patterns import FILE_SECONDS, in_time
from lora_ext.adapters.plan import adapter_settings
from lora_ext.arguments import check_known
from lora_ext.errors import NotBuiltError
from lora_ext.io.adapter_file import TensorSpec
from lora_ext.io.adapter_folder import open_adapter
from lora_ext.io.hub import adapter_folder
from lora_ext.nn.adapter import DEFAULT
from lora_ext.nn.sharded import like
from lora_ext.nn.transaction import Transaction


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: Any = None,
    **options: Any,
) -> None:
    """Gives an adapter the values and the scaling of another one's files. Where these have no
    tensors for a layer, its own become zero.

    Args:
        model_name_or_path: a folder, or an id on the hub.
        torch_device: kept for PEFT's sake: values go to where the layer is.
        options: as for `LoraModel.load_adapter`.

    Raises:
        AdapterFileError: a file is missing, damaged, or has tensors that the adapter has not.
        ValueError: no such adapter, it is merged, or one of the two trains other rows of embeddings
            (trainable_token_indices).
        NotBuiltError: the files' tensors have another rank.
    """
    where = "hotswap_adapter"
    found, _ = adapted(model, where)
    check_known(where, "adapter_name", [adapter_name], found.peft_config)
    for name, layer in found.adapter_layers():
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"{where}: adapter_name: '{adapter_name}' is merged in '{name}'; call "
                "unmerge_adapter() first"
            )
    key_mapping = options.pop("key_mapping", None)
    folder = adapter_folder(where, model_name_or_path, options)
    names = sum(1 for _ in found.modules())

    def swap() -> None:
        with open_adapter(folder) as files:
            config = read_config(files)
            keys = possible_keys(found, plan_of(found, adapter_name))
            file = FileTensors(files, keys, key_mapping)
            _swap(found, adapter_name, config, file)

    with typed_content(folder):
        in_time(FILE_SECONDS, names, swap)


def _swap(model: AdaptedModel, adapter_name: str, config: LoraConfig, file: FileTensors) -> None:
    targets = dict(own_tensors(model, adapter_name))
    unexpected = sorted(file.specs.keys() - targets.keys())
    if unexpected:
        raise ValueError(
            "Hot swapping the adapter did not succeed, unexpected keys found: "
            f"{', '.join(unexpected[:20])}; nothing is changed"
        )
    own = model.peft_config[adapter_name].trainable_token_indices
    if (config.trainable_token_indices or None) != (own or None):
        raise ValueError(
            "hotswap_adapter: trainable_token_indices: the files' are not those of "
            f"'{adapter_name}', expected the same; use load_adapter() and set_adapter()"
        )
    expected = {}
    for key, spec in file.specs.items():
        shape = tuple(targets[key].shape)
        if spec.shape != shape:
            raise NotBuiltError(
                f"hotswap_adapter: {file.path}: {key}: got shape {list(spec.shape)}, expected "
                f"{list(shape)}: another rank is not built; use load_adapter() and set_adapter()"
            )
        expected[key] = TensorSpec(shape, held_in=targets[key].dtype)
    tensors = file.with_plain_keys(file.read(expected))
    transaction = Transaction()
    for key, target in targets.items():
        value = tensors.get(key)
        value = torch.zeros_like(target) if value is None else like(value, target)
        transaction.write(target, value)
    for name, layer in layers_in_file(model, adapter_name):
        settings = layer.adapters[adapter_name]
        if f"{PREFIX}{name}.lora_A.weight" in tensors or len(layer.PREFIXES) > 1:
            new = adapter_settings(config, name, settings.autocast_adapter_dtype)
            scaling = replace(new, init_lora_weights=True).scaling
            draft = transaction.draft(layer)
            alpha = scaling * (settings.r**0.5 if settings.use_rslora else settings.r)
            tokens = new.alora_invocation_tokens
            if tokens and not layer.HAS_ALORA:
                raise ValueError(
                    f"hotswap_adapter: alora_invocation_tokens: got {list(tokens)}, expected None: "
                    f"'{name}' is no linear layer, and only these have activated adapters"
                )
            draft.adapters[adapter_name] = replace(
                settings, lora_alpha=alpha, alora_invocation_tokens=tokens
            )
            draft._scaling[adapter_name] = scaling
            draft._choose_running()
    kept = copy.deepcopy(config)
    kept.inference_mode = model.peft_config[adapter_name].inference_mode
    kept.target_modules = model.peft_config[adapter_name].target_modules
    transaction.put(model.peft_config, adapter_name, kept)
    transaction.commit()


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> NoReturn:
    """Is not built.

    Raises:
        NotBuiltError: always.
    """
    raise NotBuiltError(
        "prepare_model_for_compiled_hotswap: padding ranks for a later hotswap is not built; give "
        "the adapters the same rank, and leave the call out"
    )


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = DEFAULT,
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> NoReturn:
    """Is not built.

    Raises:
        NotBuiltError: always.
    """
    what = "the initialisation LoftQ"
    raise NotBuiltError(f"replace_lora_weights_loftq: {what} is not built; {INSTEAD[what]}")
