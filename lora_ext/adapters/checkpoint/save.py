"""Writing the adapters of a model in PEFT's checkpoint format: `adapter_config.json` and
`adapter_model.safetensors`, with PEFT's keys."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.base_tensors import (
    biases,
    embeddings,
    places,
    targets_embeddings,
    was_resized,
)
from lora_ext.adapters.checkpoint.initial import of_twice_the_rank, without_initial
from lora_ext.adapters.checkpoint.keys import (
    PREFIX,
    layers_in_file,
    saved_in_file,
    tokens_in_file,
)
from lora_ext.adapters.checkpoint.plain_lora import plain_lora
from lora_ext.adapters.checkpoint.savable import check_adapter, check_tensors
from lora_ext.adapters.checkpoint.values import values_of
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.config_files import PEFT_VERSION
from lora_ext.adapters.names import unwrapped
from lora_ext.arguments import as_flag, as_path, former_names, names_of, warn
from lora_ext.io.adapter_folder import check_adapter_files, save_adapters
from lora_ext.nn.adapter import DEFAULT
from lora_ext.nn.sharded import by_first_process, whole
from lora_ext.nn.tied import is_tied


def adapter_state_dict(
    model: AdaptedModel,
    adapter_name: str = DEFAULT,
    *,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter by PEFT's keys, in which its name does not occur. What belongs to the base is the
    base's own also while the model is merged. DTensors (FSDP2, tensor parallel) are gathered: all
    processes have to call this, and each gets all.

    Args:
        save_embedding_layers: whether to add the base's input and output embeddings; "auto" adds
            those that the adapter targets as "embed_tokens" or "lm_head" (none with
            trainable_token_indices), and both where the vocabulary is not that of the files that
            the model was loaded from, as PEFT does.
    """
    config = model.peft_config[adapter_name]
    tensors: dict[str, Tensor] = {}
    for name, layer in layers_in_file(model, adapter_name):
        for key, tensor in layer.peft_tensors(adapter_name).items():
            tensors[f"{PREFIX}{name}.{key}"] = tensor
    for held in (saved_in_file(model, adapter_name), tokens_in_file(model, adapter_name)):
        tensors.update({key: whole(tensor.detach()) for key, tensor in held})
    bases = dict(base_tensors(model, adapter_name, config, save_embedding_layers))
    check_tensors(bases, f"save_pretrained: '{adapter_name}'")
    tensors.update({key: whole(tensor.detach()) for key, tensor in bases.items()})
    return tensors


def base_tensors(
    model: AdaptedModel, adapter_name: str, config: LoraConfig, save_embedding_layers: bool | str
) -> Iterator[tuple[str, Tensor]]:
    """Those of the base that are saved with an adapter, by their keys."""
    base = model.get_base_model()
    adapted = {id(layer): layer for _, layer in model.layers_with(adapter_name)}
    tied = [n for n, layer in model.layers_with(adapter_name) if is_tied(layer, adapter_name)]
    whole = {id(m) for _, m in model.saved_modules() if adapter_name in m.modules_to_save}
    found = list(places(base, adapted, whole))
    parts = list(biases(iter(found), config.bias))
    if save_embedding_layers is True:
        parts += embeddings(base, iter(found))
    elif save_embedding_layers == "auto" and was_resized(base, config):
        warn(
            "save_pretrained: the vocabulary is not that of the files the model was loaded from, "
            "so its embeddings are saved too; save_embedding_layers=False leaves them out"
        )
        parts += embeddings(base, iter(found))
    elif save_embedding_layers == "auto" and (
        targets_embeddings(base, config, tied) and not config.trainable_token_indices
    ):
        parts += [one for one in embeddings(base, iter(found)) if one[0].layer is not None]
    for place, part in parts:
        yield PREFIX + place.key_of(part), place.unmerged(part)


@former_names("save_pretrained", folder="save_directory", adapter_names="selected_adapters")
def save_pretrained(
    model: AdaptedModel,
    save_directory: str | os.PathLike[str],
    selected_adapters: str | list[str] | None = None,
    *,
    save_embedding_layers: bool | str = "auto",
    path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
    as_plain_lora: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes adapters so that PEFT loads them: "default" into `save_directory`, others into
    subfolders of their names. Each pair of files is replaced as one, see
    `lora_ext.io.save_adapter`; if one cannot be written, all stay as they were.

    Of a model whose parameters are DTensors (FSDP2, tensor parallel) all processes call this: it
    gathers what process 0 then writes, and returns, or fails, in all of them when that is done.

    Args:
        selected_adapters: all, if None.
        path_initial_model_for_weight_conversion: the folder of the adapter as it was right after an
            initialisation that changed the base's weights ("pissa", "olora"), saved before the
            first step. What is written then is a plain adapter of twice the rank for the original
            weights. A folder that is certainly another one is refused.
        as_plain_lora: writes the adapters of `MergedLinear`, and of single projections of
            `MultiheadAttention`, which PEFT has no keys for, as plain ones of the whole layer, of r
            times the number of slices, that do the same; rank_pattern and alpha_pattern say so. To
            be loaded into a model with plain layers, here or in PEFT.
        state_dict: values to save instead of the model's, by the names of its `state_dict()`; what
            it does not have is the model's.

    Raises:
        ValueError: no such adapter, or the model does not hold all of it (after `unload()`, under
            ZeRO-3, on "meta", in layers that were replaced since), or its config does not fit the
            model, or it was combined of adapters whose initialisation changed the base;
            as_plain_lora with a conversion of the initialisation, or for an attention with kdim or
            vdim other than embed_dim; the initial adapter is not the one that this was trained
            from. Nothing is written then.
        AdapterFileError: NaN or Inf; the initial adapter's files are damaged or do not fit.
    """
    folder = as_path(save_directory, "save_pretrained", "save_directory")
    initial = None
    if path_initial_model_for_weight_conversion is not None:
        initial = as_path(
            path_initial_model_for_weight_conversion,
            "save_pretrained",
            "path_initial_model_for_weight_conversion",
        )
    names = list(model.peft_config)
    if selected_adapters is not None:
        names = names_of(selected_adapters, "save_pretrained", "selected_adapters")
    for name in names:
        if name not in model.peft_config:
            raise ValueError(
                f"save_pretrained: selected_adapters: got {name!r}, "
                f"expected some of {list(model.peft_config)}"
            )
    if not names:
        raise ValueError(
            f"save_pretrained: selected_adapters: got {selected_adapters}, with adapters "
            f"{list(model.peft_config)} in the model, expected at least one; nothing is written"
        )
    as_plain_lora = as_flag(as_plain_lora, "save_pretrained", "as_plain_lora")
    if as_plain_lora and initial is not None:
        raise ValueError(
            "save_pretrained: as_plain_lora: got True with path_initial_model_for_weight_conversion"
            ", expected at most one of the two: each changes all ranks"
        )
    with values_of(model, state_dict):
        ready = [  # all of them, before the first is written
            files_of(
                model,
                name,
                Path(folder) if name == DEFAULT else Path(folder) / name,
                save_embedding_layers=save_embedding_layers,
                initial=initial,
                as_plain_lora=as_plain_lora,
            )
            for name in names
        ]
    scaled = [name for name in names if _is_scaled(model, name)]
    if scaled:
        warn(
            f"save_pretrained: {scaled}: set_scale or scale_layer changed the scaling, which the "
            "files do not hold: loaded again, they run with that of their config"
        )
    for place, fields, tensors in ready[1:]:  # before a folder is made
        check_adapter_files(place, fields, tensors)
    by_first_process(model, lambda: save_adapters(ready), "save_pretrained")


def files_of(
    model: AdaptedModel,
    name: str,
    place: Path,
    *,
    save_embedding_layers: bool | str,
    initial: Path | None,
    as_plain_lora: bool,
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """What is written of one adapter: where, its config's fields and its tensors."""
    config = copy.deepcopy(model.peft_config[name])
    check_adapter(model, name, config)
    tensors = adapter_state_dict(model, name, save_embedding_layers=save_embedding_layers)
    if initial is not None:
        known = adapter_state_dict(model, name, save_embedding_layers=True)
        tensors = without_initial(model, name, config, tensors, known, initial)
        config = of_twice_the_rank(config)
    if as_plain_lora:
        config, tensors = plain_lora(model, name, config, tensors)
    fields = config.to_file() | {"inference_mode": True}
    base = model.get_base_model()
    name_or_path = getattr(base, "name_or_path", None)
    if name_or_path and fields.get("base_model_name_or_path") is None:
        fields["base_model_name_or_path"] = name_or_path
    if config.task_type is None and fields.get("auto_mapping") is None:
        # By this PEFT's AutoPeftModel finds the base's class.
        kind = type(unwrapped(base))
        names = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        fields["auto_mapping"] = names
    if fields.get("peft_version") is None:
        fields["peft_version"] = PEFT_VERSION
    return place, fields, tensors


def _is_scaled(model: AdaptedModel, adapter_name: str) -> bool:
    """Whether an adapter runs with another scaling than its config's."""
    return any(
        not math.isclose(layer.get_scale(adapter_name), layer.adapters[adapter_name].scaling)
        for _, layer in model.layers_with(adapter_name)
    )
