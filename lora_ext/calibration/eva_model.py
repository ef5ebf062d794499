"""EVA's components put into a model: new ranks, and layers without an adapter where that is 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_ext._patterns import keys_for
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.calibrated_configs import EvaConfig
from lora_ext.adapters.config import LayerSettings, LoraConfig
from lora_ext.adapters.names import exact_targets
from lora_ext.adapters.plan import MANY_NAMES
from lora_ext.adapters.swap import plain_layer, swap_modules
from lora_ext.arguments import listed, warn
from lora_ext.nn import Linear, LoraLayer
from lora_ext.nn.adapter import AdapterSettings, part_name
from lora_ext.nn.sharded import is_sharded
from lora_ext.nn.transaction import Transaction

_WHERE = "initialize_lora_eva_weights"


@torch.no_grad()
def put_components(
    model: AdaptedModel, adapter_name: str, components: Mapping[str, Tensor]
) -> LoraConfig:
    """Gives each layer's adapter these lora_A, and a lora_B of zeros, of their rank; the config
    that says so, which becomes the model's. Layers that have none start as by True.

    Args:
        components: [rank, K], by names in the base model.

    Raises:
        ValueError: a layer is merged, or its components do not fit. The model is as it was then.
    """
    config = model.peft_config[adapter_name]
    eva = config.eva_config or EvaConfig()
    layers = dict(model.layers_with(adapter_name))
    _check(layers, components)
    plain: dict[int, nn.Module] = {}
    settings: dict[str, AdapterSettings] = {}
    missing = [name for name in layers if name not in components]
    with Transaction() as transaction:
        for name, layer in layers.items():
            values = components.get(name)
            r, alpha = config.settings_for(name)
            rank = r if values is None else len(values)
            if rank == 0:
                if len(layer.adapters) == 1:
                    plain[id(layer)] = plain_layer(layer)
                else:
                    transaction.draft(layer)._delete_adapter(adapter_name)
                continue
            if rank != r and eva.adjust_scaling_factors:
                alpha *= rank / r
            now = layer.adapters[adapter_name]
            settings[name] = replace(now, r=rank, lora_alpha=alpha) if values is not None else now
            _start(layer, adapter_name, settings[name], values, transaction)
        base = model.get_base_model()
        swap_modules(base, plain, transaction)
        changed = _config_of(base, config, settings, model.targeted_parameter_names)
        names = [n for n in model.targeted_module_names if n in settings or n not in layers]
        transaction.set(
            model,
            _own=frozenset(one for one in model._own if id(one) not in plain),
            peft_config={**model.peft_config, adapter_name: changed},
            targeted_module_names=names,
        )
        transaction.commit()
    if missing:
        warn(
            f"{_WHERE}: the following layers were initialized with init_lora_weights=True because "
            f"they were not found in the eva state_dict: {listed(missing)}; EVA is for linear "
            "layers"
        )
    return changed


def _check(layers: Mapping[str, LoraLayer], components: Mapping[str, Tensor]) -> None:
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{_WHERE}: '{name}' is merged; call unmerge_adapter() first")
        if is_sharded(layer._adapted_weight()):
            raise ValueError(
                f"{_WHERE}: the weight of '{name}' is a DTensor, expected one that is whole: "
                "initialise first, then divide or shard the model"
            )
        values = components.get(name)
        if values is None:
            continue
        K = layer._weight_matrix().shape[1] if isinstance(layer, Linear) else None
        if values.dim() != 2 or values.shape[1] != K:
            raise ValueError(
                f"{_WHERE}: eva_state_dict: '{name}': got shape {tuple(values.shape)}, expected "
                f"[rank, {K}]: it is of another model"
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{_WHERE}: eva_state_dict: '{name}': holds NaN or Inf")
    if not layers.keys() & components.keys():
        raise ValueError(
            f"{_WHERE}: eva_state_dict: got {list(components)[:3]}, expected names of layers with "
            f"the adapter, {list(layers)[:3]}"
        )
    if all(name in components and len(components[name]) == 0 for name in layers):
        raise ValueError(f"{_WHERE}: eva_state_dict: all ranks are 0, expected some above")
    if unknown := sorted(components.keys() - layers.keys()):
        warn(f"{_WHERE}: eva_state_dict: {listed(unknown)} are no layers with the adapter; ignored")


def _start(
    layer: LoraLayer,
    adapter_name: str,
    settings: AdapterSettings,
    values: Tensor | None,
    transaction: Transaction,
) -> None:
    """Makes an adapter anew, by a draft; what runs and trains stays as it is."""
    trained = {n: p.requires_grad for n, p in layer.adapter_parameters(adapter_name).items()}
    draft = transaction.draft(layer)
    active = draft.active_adapters
    draft._forget(adapter_name)
    draft.add_adapter(adapter_name, **vars(settings))
    if values is not None:
        lora_A = draft._parameters[part_name("lora_A", adapter_name)]
        assert lora_A is not None
        lora_A.copy_(values)
    for name, parameter in draft.adapter_parameters(adapter_name).items():
        parameter.requires_grad_(trained[name])  # of its own: nobody else has it yet
    draft.active_adapters = active
    draft._choose_running()


def _config_of(
    base: nn.Module,
    config: LoraConfig,
    settings: Mapping[str, AdapterSettings],
    parameters: list[str],
) -> LoraConfig:
    """The config with the names, ranks and alphas that the layers have now."""
    names = list(settings)
    wanted = {name: LayerSettings(one.r, one.lora_alpha) for name, one in settings.items()}
    wanted |= {name: config.settings_for(name) for name in parameters}
    keys = keys_for(wanted)
    ranks = {keys[name]: r for name, (r, _) in wanted.items() if r != config.r}
    alphas = {keys[name]: a for name, (_, a) in wanted.items() if a != config.lora_alpha}
    changed = replace(
        config,
        target_modules=exact_targets(base, names, shortest=len(names) >= MANY_NAMES),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    changed.absent_fields, changed.combined = config.absent_fields, config.combined
    return changed
