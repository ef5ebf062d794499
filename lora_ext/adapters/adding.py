"""Putting an adapter into a model: what is planned, and what is then done, by one transaction."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lora_ext._offloaded import check_values
from lora_ext.adapters.activation import is_enabled
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.merging import of_layer
from lora_ext.adapters.plan import Plan, make_plan, resolved
from lora_ext.adapters.replication import replicate_layers
from lora_ext.adapters.swap import swap_modules
from lora_ext.adapters.tokens import add_tokens
from lora_ext.arguments import short, warn
from lora_ext.nn import LoraLayer
from lora_ext.nn.calibrated import LEFT_AT
from lora_ext.nn.init import is_mica
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.tied import tie
from lora_ext.nn.trainable_tokens import TrainableTokensLayer
from lora_ext.nn.transaction import Transaction


def replicate(model: AdaptedModel, config: LoraConfig, transaction: Transaction) -> None:
    """Repeats the layers as `layer_replication` says.

    Raises:
        ValueError: there are adapters already, which sit in the layers as they are.
    """
    if config.layer_replication:
        if model.peft_config:
            raise ValueError(
                "LoraConfig: layer_replication: expected only in the config of a model's first "
                f"adapter, got {short(config.layer_replication)} with {list(model.peft_config)} "
                "there: layers are repeated once, for all adapters; if this one is of layers as "
                "they are now, set its layer_replication to None (in a file: null in "
                "adapter_config.json), else give it a model of its own"
            )
        replicate_layers(model.get_base_model(), config.layer_replication, transaction)


def plan_for(model: AdaptedModel, config: LoraConfig, autocast_adapter_dtype: bool = True) -> Plan:
    """What a config adapts here: nothing is changed, nothing of an adapter's size allocated.

    Raises: as the class; ValueError also for a second adapter with biases of the base.
    """
    biased = [name for name, other in model.peft_config.items() if other.bias != "none"]
    if config.bias != "none" and biased:
        raise ValueError(
            f"LoraConfig: bias: got {config.bias!r} beside '{biased[0]}' with "
            f"{model.peft_config[biased[0]].bias!r}, expected 'none': the biases are the "
            "base's, of which there is one set; give one adapter only biases, or use lora_bias"
        )
    plan = make_plan(model.get_base_model(), config, autocast_adapter_dtype)
    for name, layer, _ in plan.layers.values():
        if layer.adapters and layer not in model._own:
            raise ValueError(
                f"LoraConfig: target_modules: '{name}' has adapters that are not this model's "
                f"({list(layer.adapters)}), expected layers without; add this one by the "
                "add_adapter() of the LoraModel that has them, or leave the layer out with "
                "exclude_modules"
            )
    _refuse_offloaded(model.get_base_model(), plan, config)
    return plan


def _refuse_offloaded(base: nn.Module, plan: Plan, config: LoraConfig) -> None:
    """ValueError for parameters of the base that shall train and that a hook offloads."""
    for name, module in plan.saved.items():
        for part in module.modules():
            check_values(part, part._parameters, f"LoraConfig: modules_to_save: '{name}'")
    for name, tokens in plan.tokens.items():
        part = getattr(tokens.module, "original_module", tokens.module)
        check_values(part, ["weight"], f"LoraConfig: trainable_token_indices: '{name}'")
    if config.bias == "all":
        for module in base.modules():
            check_values(
                module, ["bias"], f"LoraConfig: bias: got 'all', but of a {type(module).__name__}"
            )
    elif config.bias == "lora_only":
        for name, layer, _ in plan.layers.values():
            own = getattr(layer, "base_layer", layer)
            check_values(own, ["bias"], f"LoraConfig: bias: got 'lora_only', but of '{name}'")


def add_planned(
    model: AdaptedModel,
    adapter_name: str,
    plan: Plan,
    transaction: Transaction,
    *,
    is_filled: bool = False,
) -> None:
    """Adds an adapter as `plan` says, which was made for this config and the present model.

    Args:
        is_filled: it gets the values of a file, so that none need be computed.
    """
    active = tuple(name for name in model.active_adapters if name in model.peft_config)
    enabled = is_enabled(model)
    replacements: dict[int, nn.Module] = {}
    own: set[nn.Module] = {planned.layer for planned in plan.layers.values()}
    for place, planned in plan.layers.items():
        layer = transaction.draft(planned.layer)
        try:
            if is_filled and is_mica(planned.settings.init_lora_weights):
                settings = replace(planned.settings, init_lora_weights=True)
                layer.add_adapter(adapter_name, **vars(settings))
                layer.adapters[adapter_name] = planned.settings
            else:
                layer.add_adapter(adapter_name, **vars(planned.settings))
        except (ValueError, TypeError) as error:
            raise of_layer(error, planned.name) from None
        mine = tuple(name for name in active if name in layer.adapters)
        if layer.active_adapters != mine:  # a layer's first adapter is active there
            layer.set_adapter(mine)
        if planned.layer not in model._own:
            layer.enable_adapters(enabled)
        if place != id(planned.layer):
            replacements[place] = planned.layer
    planned_layers = {planned.name: planned.layer for planned in plan.layers.values()}
    for head_name, source_name in plan.tied_layers.items():
        embedding = planned_layers[source_name]
        head = transaction.draft(planned_layers[head_name])
        tie(head, adapter_name, transaction.draft(embedding), embedding)
    copies: dict[int, nn.Module] = {}
    for module in {id(module): module for module in plan.saved.values()}.values():
        wrapper = module if isinstance(module, ModulesToSave) else ModulesToSave(module)
        own.add(wrapper)
        copies[id(module)] = wrapper.add_adapter(adapter_name, transaction)
        if wrapper is not module:
            wrapper.enabled = enabled
            replacements[id(module)] = wrapper
    for names in plan.tied.items():
        copy_, source = (copies[id(plan.saved[name])] for name in names)
        copy_.weight = source.weight
    wrappers, token_layers = add_tokens(adapter_name, plan.tokens, enabled, transaction)
    replacements |= wrappers
    own |= token_layers
    _use_up(model.get_base_model(), plan, transaction, is_filled)
    swap_modules(model.get_base_model(), replacements, transaction)
    transaction.set(
        model,
        _own=model._own | own,
        peft_config={**model.peft_config, adapter_name: resolved(model.get_base_model(), plan)},
        targeted_module_names=list(dict.fromkeys([*model.targeted_module_names, *plan.names])),
        targeted_parameter_names=list(
            dict.fromkeys([*model.targeted_parameter_names, *plan.parameters])
        ),
    )
    transaction.commit()


def _use_up(model: nn.Module, plan: Plan, transaction: Transaction, is_filled: bool) -> None:
    """Takes off what a calibration left for this initialisation; warns where there is nothing,
    and nothing is an initialisation, too."""
    kind = plan.config.init_lora_weights
    name = LEFT_AT.get(kind) if isinstance(kind, str) else None
    if name is None:
        return
    modules: list[nn.Module] = [one.layer for one in plan.layers.values()]
    modules += [module for module in model.modules() if id(module) in plan.layers]
    bases = [base for module in modules if (base := module._modules.get("base_layer")) is not None]
    found = {id(one): one for one in (*modules, *bases) if name in vars(one)}
    for one in found.values():
        transaction.remove(one, name)
    if not found and kind == "lora_ga":
        why = "no layer has a gradient, so that all start as by True; run preprocess_loraga before"
        if is_filled:
            why = (
                "its values belong to weights that LoRA-GA changed, which the base has to have; or "
                "run preprocess_loraga with the same cache_file before"
            )
        warn(f"LoraConfig: init_lora_weights: got 'lora_ga': {why}")


def freeze_base(model: AdaptedModel, transaction: Transaction) -> None:
    """Freezes all but the adapters that are not this model's."""
    others: list[nn.Parameter] = []
    for module in model.get_base_model().modules():
        if isinstance(module, LoraLayer | TrainableTokensLayer) and module not in model._own:
            for name in module.adapters:
                others += module.adapter_parameters(name).values()
        elif isinstance(module, ModulesToSave) and module not in model._own:
            others += module.modules_to_save.parameters()
    keep = {id(parameter) for parameter in others}
    for parameter in model.get_base_model().parameters():
        if id(parameter) not in keep:
            transaction.require_grad(parameter, False)
