"""Putting modules in the place of others, in a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from lora_ext.adapters.names import COMPILED, plain_name
from lora_ext.loralib.merging import MergingLayer
from lora_ext.nn import LoraLayer
from lora_ext.nn.installed_forward import in_block_of, is_in_block
from lora_ext.nn.transaction import Transaction


def swap_modules(
    model: nn.Module, replacements: Mapping[int, nn.Module], transaction: Transaction | None = None
) -> list[str]:
    """Puts `replacements[id(old)]` where `old` is, under every name that it has in `model`; with
    what else `transaction` holds, when that is committed.

    Returns:
        The names that were swapped, in the order of `model.named_modules()`.
    """
    own = Transaction() if transaction is None else transaction
    modules = dict(model.named_modules(remove_duplicate=False))
    swapped = [name for name, module in modules.items() if id(module) in replacements]
    for name in swapped:
        parent, _, child = name.rpartition(".")
        parent_module, new = modules[parent], replacements[id(modules[name])]
        if child == COMPILED:  # its wrapper calls what it was made of, until it is made anew
            own.set(parent_module, **vars(_made_anew(parent_module, new)))
        else:
            own.put(parent_module._modules, child, new)
            if is_in_block(modules[name]) and isinstance(new, nn.Linear | LoraLayer):
                vars(new)["forward"] = in_block_of(modules[name], new)  # nobody has the new one yet
        other = replacements.get(id(parent_module))  # which may have the child, too
        if other is not None and other._modules.get(child) is modules[name]:
            own.put(other._modules, child, new)
    _follow_fast_paths(model, replacements, own)
    if transaction is None:
        own.commit()
    return [plain_name(name) for name in swapped]


def plain_layer(layer: LoraLayer) -> nn.Module:
    """What stands for a layer when its adapters are taken out."""
    base = layer.get_base_layer()
    if type(base) is nn.Linear and hasattr(base, "source_cls"):
        from lora_ext.quant.merged import as_it_was  # only now: few need it

        return as_it_was(base)
    return base


def _made_anew(wrapper: nn.Module, module: nn.Module) -> nn.Module:
    """A wrapper of torch.compile like this one, of another module."""
    made = object.__new__(type(wrapper))
    state = wrapper.__getstate__()  # type: ignore[no-untyped-call]
    state["_modules"] = {**wrapper._modules, COMPILED: module}
    made.__setstate__(state)  # type: ignore[no-untyped-call]
    return made


# The former values of what makes modules leave their fused path. Copies of those stay off it.
_BEFORE: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _follow_fast_paths(
    model: nn.Module, replacements: Mapping[int, nn.Module], transaction: Transaction
) -> None:
    """Makes PyTorch's fused inference paths step aside where they would read a swapped layer's
    weight without calling the layer, and so leave out its adapter; gives them back where the last
    such layer leaves."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            name, off = "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder):
            name, off = "use_nested_tensor", False
        else:
            continue
        inside = list(module.modules())
        had, has = _adapts(inside), _adapts(replacements.get(id(m), m) for m in inside)
        if has and not had:
            _BEFORE[module] = getattr(module, name)
        if has or (had and module in _BEFORE):
            transaction.set(module, **{name: off if has else _BEFORE[module]})


def _adapts(modules: Iterable[nn.Module]) -> bool:
    return any(isinstance(module, LoraLayer | MergingLayer) for module in modules)
