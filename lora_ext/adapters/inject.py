"""Adapters in a model without a LoraModel around it, as PEFT's `inject_adapter_in_model` puts them
there: the model keeps its class and names, and its attribute `peft_config` says what it has."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_ext.adapters.activation import activate
from lora_ext.adapters.adapted_model import AdaptedModel, check_model
from lora_ext.adapters.adding import add_planned, freeze_base, plan_for, replicate
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.names import plain_name
from lora_ext.adapters.plan import only_on
from lora_ext.adapters.targets import find_targets, outside
from lora_ext.arguments import as_flag, check_mapping, check_module, short, warn
from lora_ext.nn import LoraLayer
from lora_ext.nn.adapter import DEFAULT, check_adapter_name
from lora_ext.nn.adoption import adapter_device
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.token_wrappers import TiedTokensLayer, TrainableTokensWrapper
from lora_ext.nn.trainable_tokens import TrainableTokensLayer
from lora_ext.nn.transaction import Transaction

Model = TypeVar("Model", bound=nn.Module)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: Model,
    adapter_name: str = DEFAULT,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Model:
    """Puts an adapter into `model`, in place, and makes it run; another one in the stead of those
    that are there and run, if it has some.

    Args:
        low_cpu_mem_usage: the adapter is on "meta"; `set_peft_model_state_dict` gives it values.
        state_dict: an adapter's, as `get_peft_model_state_dict` returns it. Its keys say which
            modules are adapted, whatever the config says, with a RuntimeWarning where that means
            others; its values are not used.

    Returns:
        `model` itself.

    Raises:
        TypeError, ValueError: as `LoraModel`; ValueError also for a `state_dict` without a key of a
            module of the model, or with target_parameters. The model is as it was then.
    """
    where = "inject_adapter_in_model"
    check_module(where, "model", model)
    config = LoraConfig.of(peft_config, where)
    if state_dict is not None:
        check_mapping(where, "state_dict", state_dict, Tensor, "tensors")
        config = _with_targets_of(state_dict, model, config)
    first = not isinstance(vars(model).get("peft_config"), dict)
    if first:
        check_model(model)
        found = AdaptedModel(model)
    else:
        found, _ = adapted(model, where)
    check_adapter_name(adapter_name, found.peft_config, where)
    with Transaction() as transaction:
        replicate(found, config, transaction)
        add_planned(found, adapter_name, plan_for(found, config), transaction)
        if first:
            freeze_base(found, transaction)
        activate(found, [adapter_name], config.inference_mode, transaction)
        transaction.commit()
        if as_flag(low_cpu_mem_usage, where, "low_cpu_mem_usage"):
            on_meta(found, adapter_name)
        vars(model)["peft_config"] = found.peft_config
    return model


def _with_targets_of(
    state_dict: Mapping[str, Tensor], model: nn.Module, config: LoraConfig
) -> LoraConfig:
    """The config with target_modules that mean those of a state dict."""
    where = "inject_adapter_in_model: state_dict"
    if config.target_parameters:
        raise ValueError(
            f"{where}: Trying to inject a PEFT adapter from a state_dict but the PEFT config uses "
            "`target_parameters`, which its keys do not tell from target_modules, expected none"
        )
    keys = (plain_name(key).removeprefix("base_model.model.") for key in state_dict)
    named = {key.rpartition(".lora_")[0] for key in keys}
    kinds = (LoraLayer, ModulesToSave, TrainableTokensWrapper)
    found = [name for name, _ in outside(model, kinds) if name in named]
    if not found:
        raise ValueError(
            f"{where}: got {len(state_dict)} keys ({short(next(iter(state_dict), ''))}, ...), "
            "expected some '<a module of the model>.lora_A.weight'"
        )
    meant: set[str] = set()
    with warnings.catch_warnings(), suppress(ValueError):  # it may mean nothing here
        warnings.simplefilter("ignore")
        meant = set(find_targets(model, config, adapted=kinds))
    more, less = sorted(set(found) - meant), sorted(meant - set(found))
    if more or less:
        less_text = f"The PEFT config contained these additional target modules: {less}. "
        more_text = f"The state_dict contained these additional target modules: {more}. "
        warn(
            f"{where}: While injecting the PEFT adapters, an inconsistency was discovered between "
            "the PEFT config and the provided state_dict. This is not necessarily an issue and can "
            f"be ignored if this was the intent. {less_text * bool(less)}{more_text * bool(more)}",
            RuntimeWarning,
        )
    return only_on(model, config, found)


def adapted(model: nn.Module, where: str) -> tuple[AdaptedModel, bool]:
    """The LoraModel itself, also in wrappers of DDP, FSDP and torch.compile; or what stands for one
    for a while, of a model with adapters injected, and True.

    Raises:
        TypeError: it is neither.
    """
    check_module(where, "model", model)
    for level in ("_orig_mod", "module", "_fsdp_wrapped_module", "_orig_mod"):
        model = model._modules.get(level) or model
    if isinstance(model, AdaptedModel):
        return model, False
    configs = vars(model).get("peft_config")
    if not isinstance(configs, dict):
        raise TypeError(
            f"{where}: model: got a {type(model).__qualname__} without adapters, expected a "
            "LoraModel, or a model that inject_adapter_in_model() returned"
        )
    found = AdaptedModel(model)
    found.peft_config = configs
    kinds = (LoraLayer, ModulesToSave, TrainableTokensLayer, TiedTokensLayer)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    found._own = frozenset(layers)
    running = [name for m in layers if isinstance(m, LoraLayer) for name in m.active_adapters]
    found.active_adapters = list(dict.fromkeys(running))
    return found, True


def on_meta(model: AdaptedModel, adapter_name: str) -> None:
    """Takes an adapter's values away: its parameters are on "meta" then."""
    _to(model, adapter_name, torch.device("meta"))


def off_meta(model: AdaptedModel, adapter_name: str) -> None:
    """Gives an adapter on "meta" tensors, without values, on the devices of its layers."""
    _to(model, adapter_name, None)


def _to(model: AdaptedModel, adapter_name: str, device: torch.device | None) -> None:
    made: dict[int, nn.Parameter] = {}  # layers may share them: ensure_weight_tying
    kept: list[nn.Parameter] = []  # so that no other gets the id of one
    for _, layer in model.layers_with(adapter_name):
        place = device or adapter_device(layer, layer._adapted_weight())
        for name, parameter in layer.adapter_parameters(adapter_name).items():
            if device is not None or parameter.is_meta:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=place)
                    made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                    kept.append(parameter)
                layer._parameters[name] = made[id(parameter)]
        layer._choose_running()
    for _, tokens in model.token_layers():
        if adapter_name in tokens.adapters:
            tables, place = tokens.trainable_tokens_delta, device or tokens.weight.device
            if device is not None or tables[adapter_name].is_meta:
                table = tables[adapter_name]
                empty = torch.empty_like(table, device=place)
                tables._parameters[adapter_name] = nn.Parameter(empty, table.requires_grad)
