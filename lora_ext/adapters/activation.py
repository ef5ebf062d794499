"""Which adapters of a model run and train, and which parameters of the base with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from torch import nn

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.nn import LoraLayer
from lora_ext.nn.transaction import Transaction


def activate(
    model: AdaptedModel,
    names: Sequence[str],
    inference_mode: bool,
    transaction: Transaction,
    *,
    keep_merged: bool = False,
) -> None:
    """`LoraModel.set_adapter`, when `transaction` is committed; what is merged stays so with
    `keep_merged`."""
    for where, module in model.saved_modules():
        mine = [name for name in names if name in module.modules_to_save]
        if len(mine) > 1:
            raise ValueError(
                f"LoraModel.set_adapter: adapter_names: {mine} have a copy of '{where}' each "
                "(modules_to_save), expected at most one of them: Only one adapter can be set at a "
                "time for ModulesToSaveWrapper"
            )
        module.set_adapter(mine[0] if mine else None, inference_mode, transaction)
    for _, layer in model.adapter_layers():
        mine = [name for name in names if name in layer.adapters]
        draft = transaction.draft(layer)
        if keep_merged:
            draft._activate(mine, inference_mode)
        else:
            draft.set_adapter(mine, inference_mode)
    active = [] if inference_mode else names
    wanted = {id(bias) for name in active for bias in base_biases(model, name)}
    for bias in [bias for name in model.peft_config for bias in base_biases(model, name)]:
        transaction.require_grad(bias, id(bias) in wanted)
    transaction.set(model, active_adapters=list(dict.fromkeys(names)))


def end_strengths(model: AdaptedModel, transaction: Transaction) -> None:
    """Gives the adapters of the last `set_adapters` their own scaling again, when `transaction` is
    committed: strengths belong to that set. Scalings that something else has changed since stay."""
    for adapter_name, strength in model._strengths.items():
        for _, layer in model.layers_with(adapter_name):
            own = layer.adapters[adapter_name].scaling
            if math.isclose(layer.get_scale(adapter_name), strength * own):
                transaction.draft(layer).set_scale(adapter_name, 1.0)
    transaction.set(model, _strengths={})


def is_enabled(model: AdaptedModel) -> bool:
    """Whether adapters that are put into further layers run there: unless all are switched off."""
    layers = [not layer.disable_adapters for _, layer in model.adapter_layers()]
    states = layers + [module.enabled for _, module in model.saved_modules()]
    return any(states) or not states


def switched_back(model: AdaptedModel) -> Callable[[], None]:
    """What switches everything on or off as it is now; what is added meanwhile, with the others."""
    before = is_enabled(model)
    states: dict[nn.Module, bool] = {
        la: not la.disable_adapters for _, la in model.adapter_layers()
    }
    states |= {module: module.enabled for _, module in model.saved_modules()}

    def restore() -> None:
        transaction = Transaction()
        for _, layer in model.adapter_layers():
            transaction.draft(layer).enable_adapters(states.get(layer, before))
        for _, module in model.saved_modules():
            transaction.set(module, enabled=states.get(module, before))
        transaction.commit()

    return restore


def check_held(model: AdaptedModel, where: str, names: Sequence[str]) -> None:
    """ValueError unless each adapter is in a layer or has a copy of a module to save."""
    missing = set(names)
    layers = (layer.adapters.keys() for _, layer in model.adapter_layers())
    copies = (module.modules_to_save.keys() for _, module in model.saved_modules())
    for held in chain(layers, copies):
        missing.difference_update(held)
        if not missing:
            return
    if missing:
        raise ValueError(
            f"{where}: adapter_name: got '{min(missing)}', which no layer of the model has any "
            "more (after unload() or merge_and_unload()); make a new LoraModel of it"
        )


def base_biases(model: AdaptedModel, adapter_name: str) -> Iterator[nn.Parameter]:
    """The base's biases that train with an adapter."""
    choice = model.peft_config[adapter_name].bias
    if choice == "none":
        return
    whole = {id(part) for _, module in model.saved_modules() for part in module.modules()}
    for module in model.get_base_model().modules():
        if id(module) in whole:
            continue
        if isinstance(module, LoraLayer) and (choice == "all" or adapter_name in module.adapters):
            yield from module.trained_biases()
        elif choice == "all" and (bias := module._parameters.get("bias")) is not None:
            yield bias
