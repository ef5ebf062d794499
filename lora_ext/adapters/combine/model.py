"""Making a new adapter of several that are there, in every layer of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_ext._offloaded import check_values
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.calibrated_configs import PLAIN
from lora_ext.adapters.combine.request import Combination, plan_combination
from lora_ext.adapters.combine.tensors import Adapter, combine
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.plan import only_on
from lora_ext.adapters.targets import saved_modules
from lora_ext.arguments import names_of, refuse, warn
from lora_ext.errors import NotBuiltError
from lora_ext.nn import Embedding, LoraLayer
from lora_ext.nn.adapter import VARIANTS, check_adapter_name, variant_of
from lora_ext.nn.init import mutates_weight
from lora_ext.nn.transaction import Transaction


def add_weighted_adapter(
    model: AdaptedModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> None:
    """Adds an adapter that combines others, in each layer that one of them adapts.

    Args:
        adapters, weights: names and their factors, any sign.
        adapter_name: the new one's; `set_adapter` makes it run.
        combination_type, options: see `lora_ext.adapters.combine.request.plan_combination`.
        generator: of the types with "dare".

    Raises:
        ValueError: an argument out of range, by name; adapters with copies of modules to save, with
            a magnitude (DoRA), or with biases of the base. Nothing is changed then.
    """
    check_adapter_name(adapter_name, model.peft_config, "LoraModel.add_weighted_adapter")
    adapters = names_of(adapters, "add_weighted_adapter", "adapters")
    ranks = {
        name: max(config.r, *(config.rank_pattern or {}).values(), 0)
        for name, config in model.peft_config.items()
    }
    combination = plan_combination(ranks, adapters, weights, combination_type, **options)
    _check_combinable(model, combination.adapters)
    if not isinstance(generator, torch.Generator | None):
        refuse("add_weighted_adapter", "generator", generator, "None or a torch.Generator")
    combined = [
        (name, layer, parts)
        for name, layer in model.lora_layers()
        if (parts := _combine_layer(name, layer, combination, generator))
    ]
    where = [name for name, _, _ in combined]
    config = _combined_config(model, combination.adapters, combination.rank, where)
    if config.lora_bias:
        for name, layer, parts in combined:
            _fill_up_biases(name, layer, parts)
    transaction = Transaction()
    for _, layer, parts in combined:
        present = layer.adapters[_members(layer, combination)[0]]
        settings = replace(
            present,
            r=combination.rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            use_rslora=False,
            lora_bias=config.lora_bias,
            init_lora_weights=True,
        )
        draft = transaction.draft(layer)
        draft.add_adapter(adapter_name, **vars(settings))  # not the layer's first: not active
        draft.adapters[adapter_name] = replace(
            settings, init_lora_weights=_init_of(layer, combination)
        )
        with torch.no_grad():
            for part, parameter in draft.parts(adapter_name).items():
                parameter.copy_(parts[part])
    config.combined = True
    transaction.set(model, peft_config={**model.peft_config, adapter_name: config})
    transaction.commit()
    whole = [p for p, m in model.saved_modules() if m.modules_to_save.keys() & set(adapters)]
    whole += [p for p, layer in model.token_layers() if layer.adapters.keys() & set(adapters)]
    if whole:
        warn(
            f"add_weighted_adapter: '{adapter_name}' has no copy of {whole}, which the adapters "
            "save whole or of which they train rows: the base's runs with it"
        )


def _combine_layer(
    where: str, layer: LoraLayer, combination: Combination, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """The parts of the layer's new adapter; none if no adapter of the layer takes part."""
    mine = _members(layer, combination)
    result: dict[str, Tensor] = {}
    for name in mine:
        if name in layer._tied:
            raise NotBuiltError(
                f"add_weighted_adapter: adapters: '{name}' of '{where}' is that of the embedding "
                "(ensure_weight_tying), expected adapters of the layers' own"
            )
        check_values(layer, layer.adapter_parameters(name), where)
    for prefix in layer.PREFIXES:
        adapters = {}
        for name in mine:
            parts = layer.parts(name)
            if f"{prefix}lora_A" in parts:
                bias = parts.get(f"{prefix}lora_bias")
                adapters[name] = Adapter(
                    parts[f"{prefix}lora_A"].detach(),
                    parts[f"{prefix}lora_B"].detach(),
                    layer.adapters[name].scaling,
                    None if bias is None else bias.detach(),
                )
        if adapters:
            try:
                new = combine(combination, adapters, 1.0, generator=generator)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of an infinite product
                raise _too_large(combination, where) from None
            result |= {f"{prefix}lora_A": new.lora_A, f"{prefix}lora_B": new.lora_B}
            if new.lora_bias is not None:
                result[f"{prefix}lora_bias"] = new.lora_bias
    if not all(bool(torch.isfinite(tensor).all()) for tensor in result.values()):
        raise _too_large(combination, where)
    return result


def _members(layer: LoraLayer, combination: Combination) -> list[str]:
    """Those of the adapters that the layer has."""
    return [name for name in dict.fromkeys(combination.adapters) if name in layer.adapters]


def _too_large(combination: Combination, where: str) -> ValueError:
    return ValueError(
        f"add_weighted_adapter: weights: got {list(combination.weights)}, with which the adapter "
        f"of '{where}' would hold NaN or Inf, expected smaller ones"
    )


def _init_of(layer: LoraLayer, combination: Combination) -> bool | str:
    """Notes in the new adapter's settings that it belongs to a weight that the initialisation of
    one of the others changed: it cannot be saved as a plain one."""
    kinds = [layer.adapters[name].init_lora_weights for name in _members(layer, combination)]
    changing = [] if isinstance(layer, Embedding) else filter(mutates_weight, kinds)
    return next(iter(changing), True)


def _check_combinable(model: AdaptedModel, names: Sequence[str]) -> None:
    where = "add_weighted_adapter: adapters"
    for place, module in model.saved_modules():
        mine = [name for name in dict.fromkeys(names) if name in module.modules_to_save]
        if len(mine) > 1:
            raise ValueError(
                f"{where}: {mine} have a copy of '{place}' each (modules_to_save), which cannot be "
                "combined; expected at most one of them"
            )
    for name in names:
        if flag := variant_of(model.peft_config[name]):
            raise ValueError(
                f"{where}: '{name}' uses {VARIANTS[flag]} ({flag}), which cannot be combined"
            )
        if model.peft_config[name].use_bdlora:
            raise ValueError(
                f"{where}: '{name}' has block-diagonal matrices (use_bdlora), which cannot be "
                "combined"
            )
        if model.peft_config[name].target_parameters:
            raise ValueError(f"{where}: '{name}' has target_parameters, which cannot be combined")
    if len({tuple(model.peft_config[n].alora_invocation_tokens or ()) for n in names}) > 1:
        raise ValueError(
            f"{where}: got {list(names)}, which different tokens activate (alora_invocation_tokens)"
            ", expected adapters of the same"
        )
    biased = [n for n in dict.fromkeys(names) if model.peft_config[n].bias != "none"]
    if biased:
        raise ValueError(
            f"{where}: '{biased[0]}' has biases of the base (bias="
            f"{model.peft_config[biased[0]].bias!r}), which a combined adapter would have to share "
            "with it, expected bias='none'"
        )


def _combined_config(
    model: AdaptedModel, names: Sequence[str], rank: int, where: Sequence[str]
) -> LoraConfig:
    """The first one's, but for what the new adapter has of the others or of its own: its layers,
    rank and scaling, biases, and no copies or rows of modules."""
    configs = [model.peft_config[name] for name in dict.fromkeys(names)]
    config = only_on(model.get_base_model(), configs[0], where)
    config.r, config.lora_alpha, config.use_rslora = rank, rank, False
    config.rank_pattern, config.alpha_pattern = {}, {}
    vars(config).update(PLAIN)
    config.modules_to_save = config.trainable_token_indices = None
    config.ensure_weight_tying = False
    if not all(one.task_type == config.task_type for one in configs) or saved_modules(config):
        config.task_type = None  # it would save the task's heads
    config.bias = next((one.bias for one in configs if one.bias != "none"), "none")
    config.lora_bias = any(one.lora_bias for one in configs)
    config.inference_mode = False
    return config


def _fill_up_biases(name: str, layer: LoraLayer, parts: dict[str, Tensor]) -> None:
    """Zeros where none of the layer's adapters has a lora_bias but the new one's config says so."""
    if "lora_bias" not in layer.PARTS or isinstance(layer, Embedding):
        raise ValueError(
            f"add_weighted_adapter: adapters: one has a lora_bias, and '{name}', which cannot have "
            "one, is another's: no config describes both; combine them without lora_bias"
        )
    if "lora_bias" not in parts:
        B = parts["lora_B"]
        parts["lora_bias"] = B.new_zeros(B.shape[0])
