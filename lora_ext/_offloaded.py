"""Layers whose own parameters a hook of accelerate offloads: between calls those are on "meta", and
every call makes new ones of the values that the hook has.

Such a layer computes what it should. What it cannot do is to train, since the gradients are those
of parameters that are gone after the call, or to be merged, since the hook took the weight from
`state_dict()`, which has the base's own. Both would go wrong without a word, so they are refused.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

TAKE_OFF = (
    "take the hooks off first (accelerate.hooks.remove_hook_from_module(model, recurse=True))"
)


def _get_hook(layer: nn.Module) -> Any:
    try:
        return layer.__dict__["_hf_hook"]
    except KeyError:
        raise AttributeError("_hf_hook") from None


def _set_hook(layer: nn.Module, hook: Any) -> None:
    layer.__dict__["_hf_hook"] = hook
    _stop_watching(layer)
    if offloads(hook):
        layer.register_forward_pre_hook(_refuse_merged)
        layer.register_forward_hook(_refuse_lost_gradients)


def _del_hook(layer: nn.Module) -> None:
    del layer.__dict__["_hf_hook"]
    _stop_watching(layer)


# accelerate gives a module its hook, and takes it, by this attribute. Nothing is asked in the calls
# of layers that have none.
hook_of_accelerate = property(_get_hook, _set_hook, _del_hook)


def offloads(hook: Any) -> bool:
    """Whether a hook of accelerate, or one of several in it, keeps parameters elsewhere."""
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


def check_values(module: nn.Module, names: Any, where: str) -> None:
    """ValueError if one of a module's parameters of these names is offloaded by a hook."""
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.is_meta and offloads(vars(module).get("_hf_hook")):
            raise ValueError(
                f"{where}: {name} is offloaded by a hook, which has its values, expected them in "
                f"the layer; {TAKE_OFF}"
            )


def watch_gradients(module: nn.Module, y: Any) -> None:
    """Has backward refused where a trained parameter of `module`, which made y, is offloaded."""
    if not torch.is_grad_enabled():
        return
    lost = [name for name, p in module.named_parameters() if p.requires_grad and p.is_meta]
    result = next((t for t in (y if isinstance(y, tuple) else (y,)) if _has_gradient(t)), None)
    if lost and result is not None:
        what = f"{type(module).__name__}: {lost[0]}"
        result.register_hook(lambda gradient: _refuse_backward(what))


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _refuse_backward(what: str) -> NoReturn:
    raise ValueError(
        f"{what} is to be trained, but a hook offloads it (accelerate's cpu_offload, disk_offload, "
        "dispatch_model), and its gradient would be lost after the call; offload the base first "
        "and adapt it then, or switch its requires_grad off"
    )


def _refuse_merged(layer: Any, args: Any) -> None:
    if getattr(layer, "merged_adapters", ()):  # loralib's state_dict() has the merged weight
        raise ValueError(
            f"{type(layer).__name__}: adapters {list(layer.merged_adapters)} were merged when a "
            "hook began to offload the layer, and what it fetches is the base's own weight; call "
            "unmerge() (unmerge_adapter() of a model), or merge_and_unload() before offloading"
        )


def _refuse_lost_gradients(layer: nn.Module, args: Any, y: Any) -> None:
    watch_gradients(layer, y)


def _stop_watching(layer: nn.Module) -> None:
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key in [
            key for key, hook in hooks.items() if hook in (_refuse_merged, _refuse_lost_gradients)
        ]:
            del hooks[key]
