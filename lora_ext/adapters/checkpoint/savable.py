"""Whether what would be written of an adapter could be read again; said before anything is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.keys import TOKENS
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.plan import make_plan, tied_as_held
from lora_ext.adapters.tokens import tokens_of
from lora_ext.arguments import warn
from lora_ext.io.files import short
from lora_ext.nn.init import mutates_weight
from lora_ext.nn.sharded import whole_shape
from lora_ext.nn.tied import is_transposed

NOTHING = "nothing is written"


def check_adapter(model: AdaptedModel, adapter_name: str, config: LoraConfig) -> None:
    """ValueError unless the model holds the whole adapter, where its config says it is. A warning
    where another adapter's initialisation changed the weights that it belongs to."""
    where = f"save_pretrained: '{adapter_name}'"
    layers = {id(layer): name for name, layer in model.layers_with(adapter_name)}
    copies = {
        name: module.modules_to_save[adapter_name]
        for name, module in model.saved_modules()
        if adapter_name in module.modules_to_save
    }
    tokens = tokens_of(model, adapter_name)
    if not layers and not copies and not tokens:
        raise ValueError(
            f"{where}: no layer of the model has this adapter (any more): after unload() and "
            f"merge_and_unload() there is none to save, so {NOTHING}; save before"
        )
    for name, layer in model.layers_with(adapter_name):
        init = layer.adapters[adapter_name].init_lora_weights
        # (One whose config was changed to plain is PEFT's initial adapter of a conversion.)
        if config.combined and mutates_weight(init):
            raise ValueError(
                f"{where}: it was combined of adapters whose initialisation {init!r} changed the "
                f"weight of '{name}', which the files of a plain adapter cannot say; {NOTHING}: "
                "save those as plain ones (path_initial_model_for_weight_conversion), load them "
                "into the original base and combine them there, or save what merge_and_unload() "
                "returns"
            )
        parameters = layer.parts(adapter_name)
        check_tensors({f"{name}.{part}": tensor for part, tensor in parameters.items()}, where)
        shapes = layer.part_shapes(layer.adapters[adapter_name])
        transposed = is_transposed(layer, adapter_name)
        for part, tensor in parameters.items():
            if whole_shape(tensor)[:: -1 if transposed else 1] != shapes[part]:
                raise ValueError(
                    f"{where}: {name}.{part} has shape {list(tensor.shape)}, expected "
                    f"{list(shapes[part])}: the layer was resized, or its parameters are split "
                    "between processes (gather them first: deepspeed.zero.GatheredParameters, "
                    f"FullyShardedDataParallel.summon_full_params); {NOTHING}"
                )
    for name, copied in copies.items():
        state = copied.state_dict(keep_vars=True)
        check_tensors({f"{name}.{part}": tensor for part, tensor in state.items()}, where)
    for name, one in tokens.items():
        table = one.layer.trainable_tokens_delta[adapter_name]
        check_tensors({f"{name}.{TOKENS}": table}, where)
        if tuple(table.shape) != one.shape:
            raise ValueError(
                f"{where}: {name}.{TOKENS} has shape {list(table.shape)}, expected "
                f"{list(one.shape)}: it was replaced, or is split between processes; {NOTHING}"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = make_plan(model.get_base_model(), config, autocast_adapter_dtype=True)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{where}: its config could not be loaded into this model again: {error}; {NOTHING}"
        ) from error
    # Of a file without them: what is written has none either, and loads so.
    plan = tied_as_held(plan, set(layers.values()).__contains__, copies.__contains__)
    planned = {id(one.layer): one.name for one in plan.layers.values()}
    for lost in (planned.keys() - layers.keys(), layers.keys() - planned.keys()):
        names = sorted((planned | layers)[place] for place in lost)
        if names:
            raise ValueError(
                f"{where}: its config {'means' if lost <= planned.keys() else 'does not mean'} "
                f"'{names[0]}', which {'has it no longer' if lost <= planned.keys() else 'has it'} "
                f"(replaced since, as resize_token_embeddings does?); {NOTHING}"
            )
    for name, module in plan.saved.items():
        if adapter_name not in getattr(module, "modules_to_save", ()):
            raise ValueError(
                f"{where}: its config saves '{name}' whole, which has no copy for it (any more); "
                f"{NOTHING}"
            )
    for name, one in plan.tokens.items():
        if one.source is None and (name not in tokens or tokens[name].indices != one.indices):
            raise ValueError(
                f"{where}: its config trains rows {list(one.indices)[:8]} of '{name}', which "
                f"has not these (any more); {NOTHING}"
            )
    for name, layer in model.layers_with(adapter_name):
        changing = {n for n, s in layer.adapters.items() if mutates_weight(s.init_lora_weights)}
        if changing and adapter_name not in changing:
            warn(
                f"{where}: the initialisation of '{min(changing)}' changed the weight of '{name}', "
                "to which this adapter belongs, and its files do not say so: load "
                f"'{min(changing)}' before it, or the two are another function"
            )
            break


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """ValueError for tensors whose values are not, or not all, in this process."""
    for name, tensor in tensors.items():
        reason = _why_incomplete(tensor)
        if reason:
            raise ValueError(f"{where}: {short(name)} {reason}; {NOTHING}")


def _why_incomplete(tensor: Tensor) -> str:
    if tensor.is_meta:
        return (
            "is on the device meta, where there are no values; load or initialise it first, or "
            "take off the hooks that offload it "
            "(accelerate.hooks.remove_hook_from_module(model, recurse=True))"
        )
    whole = getattr(tensor, "ds_shape", None)
    if whole is not None and tuple(whole) != tuple(tensor.shape):
        return (
            f"has shape {list(tensor.shape)} here and {list(whole)} in all: DeepSpeed ZeRO-3 "
            "splits it; save in deepspeed.zero.GatheredParameters(list(model.parameters()))"
        )
    return ""
