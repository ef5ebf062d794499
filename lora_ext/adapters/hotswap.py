"""Another adapter's values in the place of one that is there: the parameters stay what they are,
so that optimizers, graphs and compiled code keep them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._patterns import FILE_SECONDS, in_time, keys_for
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.grouped_convolutions import grouped_as_there
from lora_ext.adapters.checkpoint.keys import PREFIX, layers_in_file, own_tensors, possible_keys
from lora_ext.adapters.checkpoint.load import plan_of, read_config, typed_content
from lora_ext.adapters.checkpoint.reading import FileTensors, check_key_mapping
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.inject import adapted
from lora_ext.adapters.plan import adapter_settings
from lora_ext.arguments import check_known, refuse, warn
from lora_ext.errors import NotBuiltError
from lora_ext.io.adapter_file import TensorSpec
from lora_ext.io.adapter_folder import open_adapter
from lora_ext.io.hub import adapter_folder
from lora_ext.nn import LoraLayer, MergedLinear
from lora_ext.nn.adapter import part_name, variant_of
from lora_ext.nn.conv import LoraConv
from lora_ext.nn.linear import LinearBase
from lora_ext.nn.sharded import like, whole_shape
from lora_ext.nn.transaction import Transaction


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: Any = None,
    **options: Any,
) -> None:
    """Gives an adapter the values, the scaling and the dropout of another one's files. Where these
    have no tensors for a layer, its own become zero. Calls of the model in other threads see the
    former adapter or the new one; if anything fails, the former one stays whole.

    Args:
        model_name_or_path: a folder, or an id on the hub.
        torch_device: kept for PEFT's sake: values go to where the layer is.
        options: as for `LoraModel.load_adapter`.

    Raises:
        AdapterFileError: a file is missing, damaged, or has tensors that the adapter has not.
        ValueError: no such adapter, it is merged, or one of the two trains other rows of embeddings
            (trainable_token_indices), or is of a variant (DoRA) and the other is not.
        NotBuiltError: the files' tensors have another rank, or a larger one than
            `prepare_model_for_compiled_hotswap` made room for.
    """
    where = "hotswap_adapter"
    found, _ = adapted(model, where)
    check_known(where, "adapter_name", [adapter_name], found.peft_config)
    key_mapping = options.pop("key_mapping", None)
    check_key_mapping(where, key_mapping)
    folder = adapter_folder(where, model_name_or_path, options)
    names = sum(1 for _ in found.modules())

    def swap() -> None:
        with open_adapter(folder) as files:
            config = read_config(files)
            keys = possible_keys(found, plan_of(found, adapter_name))
            file = FileTensors(files, keys, key_mapping)
            _swap(found, adapter_name, config, file)

    with found.editing():
        for name, layer in found.adapter_layers():
            if adapter_name in layer.merged_adapters:
                raise ValueError(
                    f"{where}: adapter_name: '{adapter_name}' is merged in '{name}'; call "
                    "unmerge_adapter() first"
                )
        with typed_content(folder):
            in_time(FILE_SECONDS, names, swap)


def _swap(model: AdaptedModel, adapter_name: str, config: LoraConfig, file: FileTensors) -> None:
    targets = dict(own_tensors(model, adapter_name))
    unexpected = sorted(file.specs.keys() - targets.keys())
    if unexpected:
        more = ""
        if config.use_dora and not model.peft_config[adapter_name].use_dora:
            more = f": the files' adapter is DoRA's, '{adapter_name}' is not"
        raise ValueError(
            f"Hot swapping the adapter did not succeed{more}, unexpected keys found: "
            f"{', '.join(unexpected[:20])}; nothing is changed; use load_adapter() and "
            "set_adapter()"
        )
    own = model.peft_config[adapter_name].trainable_token_indices
    if (config.trainable_token_indices or None) != (own or None):
        raise ValueError(
            "hotswap_adapter: trainable_token_indices: the files' are not those of "
            f"'{adapter_name}', expected the same; use load_adapter() and set_adapter()"
        )
    layers = dict(layers_in_file(model, adapter_name))
    filled = [name for name, layer in layers.items() if _fills(file, name, layer, adapter_name)]
    for name, layer in layers.items():
        _check_layer(file, name, layer, adapter_name, config)
    expected = {}
    for key, spec in file.specs.items():
        shape = whole_shape(targets[key])
        swapped = layers.get(_weight_of(key).removeprefix(PREFIX))
        prepared = swapped is not None and adapter_name in swapped._scaling_tensors
        if isinstance(swapped, LoraConv) and key.endswith(".lora_A.weight"):
            if spec.shape[1:2] != shape[1:2]:  # as files have it, of all groups' channels
                shape = (shape[0], swapped.in_channels, *shape[2:])
        if not (_fits(key, spec.shape, shape) if prepared else spec.shape == shape):
            raise NotBuiltError(
                f"hotswap_adapter: {file.path}: {key}: got shape {list(spec.shape)}, expected "
                f"{list(shape)}"
                + (
                    ", the rank for which prepare_model_for_compiled_hotswap() made room"
                    if prepared
                    else ": another rank needs prepare_model_for_compiled_hotswap(target_rank=...) "
                    "before; or use load_adapter() and set_adapter()"
                )
            )
        expected[key] = TensorSpec(spec.shape, held_in=targets[key].dtype)
    tensors = file.with_plain_keys(file.read(expected))
    grouped_as_there(plan_of(model, adapter_name), tensors, file.path)
    transaction = Transaction()
    for key, target in targets.items():
        value = tensors.get(key)
        groups = _groups(layers.get(_weight_of(key).removeprefix(PREFIX)))
        value = torch.zeros_like(target) if value is None else _widened(value, target, groups)
        transaction.write(target, like(value, target))
    for name in filled:
        _rescale(layers[name], name, adapter_name, config, transaction)
    kept = copy.deepcopy(config)
    for field in ("inference_mode", "target_modules", "lora_bias"):  # the adapter's own
        setattr(kept, field, getattr(model.peft_config[adapter_name], field))
    drafts = {name: transaction.draft(layer) for name, layer in layers.items()}
    if any(adapter_name in layer._scaling_tensors for layer in layers.values()):
        kept = _as_padded(kept, drafts, adapter_name)
    transaction.put(model.peft_config, adapter_name, kept)
    with model.changing():
        transaction.commit()


def _rescale(
    layer: LoraLayer, name: str, adapter_name: str, config: LoraConfig, transaction: Transaction
) -> None:
    """Gives a layer the scaling, and the dropout, that the files' config says."""
    settings = layer.adapters[adapter_name]
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
        settings,
        lora_alpha=alpha,
        lora_dropout=new.lora_dropout,
        alora_invocation_tokens=tokens,
    )
    draft._set_scaling({adapter_name: scaling})


def _keys(name: str, layer: LoraLayer, adapter_name: str) -> list[str]:
    return [f"{PREFIX}{name}.{key}" for key in layer.peft_parameters(adapter_name)]


def _weight_of(key: str) -> str:
    return key.rpartition(".lora_")[0]


def _fills(file: FileTensors, name: str, layer: LoraLayer, adapter_name: str) -> bool:
    """Whether the files have tensors for a layer."""
    return not file.specs.keys().isdisjoint(_keys(name, layer, adapter_name))


def _check_layer(
    file: FileTensors,
    name: str,
    layer: LoraLayer,
    adapter_name: str,
    config: LoraConfig,
) -> None:
    """ValueError where a layer would not do what it does with the files' adapter loaded: parts of
    it are missing, and are no zeros, or its tensors have another rank than the config says."""
    settings = layer.adapters[adapter_name]
    new = adapter_settings(config, name, settings.autocast_adapter_dtype)
    if variant_of(new) != variant_of(settings):
        got, kept = variant_of(new) or "no variant", variant_of(settings) or "none"
        raise ValueError(
            f"hotswap_adapter: {file.path}: got an adapter with {got}, but '{adapter_name}' has "
            f"{kept}, expected the same; use load_adapter() and set_adapter()"
        )
    keys = _keys(name, layer, adapter_name)
    # All parts of one weight's adapter, or none; a bias of lora_B may be zero.
    filled = {_weight_of(key) for key in keys if key in file.specs}
    missing = [
        key
        for key in keys
        if key not in file.specs
        and (variant_of(settings) or _weight_of(key) in filled)
        and (new.lora_bias or not key.endswith(".lora_B.bias"))
    ]
    if missing or (filled and new.lora_bias > settings.lora_bias):
        raise ValueError(
            f"hotswap_adapter: {file.path}: got no {missing[0] if missing else 'bias of lora_B'}, "
            f"expected all of the adapter of '{name}'"
            + ("" if variant_of(settings) else ", or none, for which zeros stand")
            + "; the file is damaged, or use load_adapter() and set_adapter()"
        )
    key = f"{PREFIX}{name}.lora_A.weight"
    if key in file.specs and isinstance(layer, LinearBase | LoraConv):
        rank = file.specs[key].shape[0]
        if not isinstance(layer, MergedLinear) and rank != new.r:
            raise ValueError(
                f"hotswap_adapter: {file.path}: {key}: got rank {rank}, expected {new.r}, which "
                "the config says; check its r and rank_pattern"
            )


def _fits(key: str, shape: Sequence[int], room: Sequence[int]) -> bool:
    """Whether a part of an adapter has no more ranks than there is room for, and else its shape."""
    ranks = {"lora_A.weight": 0, "lora_B.weight": 1}.get(".".join(key.split(".")[-2:]))
    return len(shape) == len(room) and all(
        a <= b if i == ranks else a == b for i, (a, b) in enumerate(zip(shape, room, strict=True))
    )


def _widened(value: Tensor, target: Tensor, groups: int = 1) -> Tensor:
    """value where target has its first ranks, of each group of a convolution, zeros elsewhere."""
    if tuple(value.shape) == whole_shape(target):
        return value
    value = value.reshape(groups, -1, *value.shape[1:])
    wide = value.new_zeros(groups, target.shape[0] // groups, *target.shape[1:])
    wide[tuple(slice(size) for size in value.shape)] = value
    return wide.flatten(0, 1)


def _groups(layer: LoraLayer | None) -> int:
    return layer.groups if isinstance(layer, LoraConv) else 1


def _as_padded(
    config: LoraConfig, layers: Mapping[str, LoraLayer], adapter_name: str
) -> LoraConfig:
    """The config of an adapter as its layers hold it, with the ranks that are filled up."""
    settings = {name: layer.adapters[adapter_name] for name, layer in layers.items()}
    if not settings:
        return config
    first, keys = next(iter(settings.values())), keys_for(settings)
    return replace(
        config,
        r=first.r,
        lora_alpha=first.scaling * first.r,
        use_rslora=False,
        rank_pattern={keys[n]: one.r for n, one in settings.items() if one.r != first.r},
        alpha_pattern={
            keys[name]: one.scaling * one.r
            for name, one in settings.items()
            if one.scaling * one.r != first.scaling * first.r
        },
    )


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Makes room in all adapters of a model for those that `hotswap_adapter` puts there later, of
    other ranks and scalings, so that neither compiles anything again nor captures a CUDA graph:
    ranks are filled up with zeros, and scalings become tensors. Before the model is compiled, and
    before an optimizer has the parameters.

    Args:
        target_rank: the largest rank that is to come; None leaves ranks as they are.
        config: further configs whose rank becomes target_rank, as PEFT does it; those of the model
            follow by themselves.
        check_compiled: "error", "warn" or "ignore": what to do if the model is compiled already.

    Raises:
        ValueError: an adapter has a larger rank, is merged or of a variant (DoRA), or of a layer
            that is no linear layer and no convolution; the model is compiled, or has no adapters.
            Nothing is changed then.
    """
    where = "prepare_model_for_compiled_hotswap"
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(
            f"{where}: check_compiled: check_compiles should be one of 'error', 'warn', or "
            f"'ignore', got {check_compiled!r} instead."
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        text = f"Call {where} *before* compiling the model"
        if check_compiled == "error":
            raise ValueError(text)
        if check_compiled == "warn":
            warn(f"{text}: it will be compiled again")
    found, _ = adapted(model, where)
    rank = target_rank
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        refuse(where, "target_rank", rank, "a positive integer, or None")
    with found.editing():
        _make_rooms(found, rank, where)
    for other in config.values() if isinstance(config, Mapping) else [config]:
        if other is not None and rank is not None:
            other.r = rank
            other.rank_pattern = dict.fromkeys(other.rank_pattern or {}, rank)


def _make_rooms(found: AdaptedModel, rank: int | None, where: str) -> None:
    transaction = Transaction()
    drafts: dict[str, LoraLayer] = {}
    for name, layer in found.lora_layers():
        drafts[name] = draft = transaction.draft(layer)
        for adapter_name in layer.adapters:
            _make_room(draft, name, adapter_name, rank, where)
    if not drafts:
        raise ValueError(
            "No adapter layers found on the model, make sure call "
            f"`{where}` after loading the first adapter and before loading the second adapter."
        )
    for adapter_name, own in found.peft_config.items() if rank is not None else ():
        layers = {name: one for name, one in drafts.items() if adapter_name in one.adapters}
        transaction.put(found.peft_config, adapter_name, _as_padded(own, layers, adapter_name))
    with found.changing():
        transaction.commit()


def _make_room(
    draft: LoraLayer, name: str, adapter_name: str, rank: int | None, where: str
) -> None:
    settings = draft.adapters[adapter_name]
    what = f"{where}: '{name}': '{adapter_name}'"
    if adapter_name in draft.merged_adapters:
        raise ValueError(f"{what} is merged; call unmerge_adapter() first")
    if flag := variant_of(settings):
        raise ValueError(f"{what}: got {flag}=True, expected an adapter without a variant")
    if not draft.HAS_CAPACITY:
        raise ValueError(
            f"{what}: the layer is a {type(draft).__name__}, expected a linear layer or a "
            "convolution: others compile again for each scaling; leave it out with exclude_modules"
        )
    if adapter_name in draft._tied:
        raise ValueError(f"{what}: is the adapter of an embedding (ensure_weight_tying)")
    if settings.has_blocks:
        raise ValueError(f"{what}: its matrices are block-diagonal, which cannot be filled up")
    if rank is not None and settings.r > rank:
        raise ValueError(
            f"{what}: target_rank: got {rank}, expected at least {settings.r}, the adapter's rank"
        )
    scaling = draft._scaling[adapter_name]
    if rank is not None and settings.r != rank:
        wide = replace(settings, r=rank, lora_alpha=settings.scaling * rank, use_rslora=False)
        for part, shape in draft.part_shapes(wide).items():
            key = part_name(part, adapter_name)
            old: Any = draft._parameters[key]
            new = nn.Parameter(
                _widened(old.detach(), old.new_zeros(shape), _groups(draft)),
                requires_grad=old.requires_grad,
            )
            draft._parameters[key] = new
        draft.adapters[adapter_name] = wide
    base = draft._adapted_weight()
    exact = torch.float64 if base.dtype == torch.float64 else torch.float32
    draft._scaling_tensors[adapter_name] = torch.tensor(scaling, dtype=exact, device=base.device)
    draft._choose_running()
