"""What a layer takes over from the module it stands for, and what only that module can have."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# Attributes of an instance that are bound to it: the compiled call of `Module.compile()`, and what
# accelerate's hooks put around its forward. Another module with them would run that instance.
BOUND_CALLS = frozenset({"_compiled_call_impl", "forward", "_old_forward", "_hf_hook"})


def check_base(
    base: nn.Module, kind: type[nn.Module], where: str, *, any_forward: bool = False
) -> None:
    """
    Raises:
        TypeError: base has adapters, is no `kind`, does not compute what a `kind` does (unless
            `any_forward`), is the out_proj of an attention, or has parameters that are quantized.
        ValueError: base computes a parameter (pruning, weight_norm).
    """
    where = f"{where}: base"
    keeps_forward = any_forward or type(base).forward is kind.forward
    if hasattr(base, "merged_adapters") or not isinstance(base, kind) or not keeps_forward:
        raise TypeError(
            f"{where}: got {type(base).__qualname__}, expected a {kind.__module__}."
            f"{kind.__qualname__} that keeps its forward"
        )
    if isinstance(base, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{where}: MultiheadAttention reads the weight of its out_proj without calling it, "
            "so an adapter there would do nothing; adapt the MultiheadAttention itself"
        )
    for name in ("weight", "bias"):
        if isinstance(getattr(base, name, None), Tensor) and name not in base._parameters:
            raise ValueError(
                f"{where}: computes its {name} (pruning, weight_norm), expected a plain "
                "parameter; make that permanent first"
            )
    for name, parameter in base._parameters.items():
        if parameter is not None and (
            type(parameter) is not nn.Parameter or not parameter.is_floating_point()
        ):
            raise TypeError(
                f"{where}: its {name} is a {type(parameter).__qualname__} of "
                f"{parameter.dtype}, expected a plain floating-point parameter; quantized "
                "layers are not supported"
            )


def without_bound_calls(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that another one may share."""
    return {name: value for name, value in module.__dict__.items() if name not in BOUND_CALLS}


def reason_to_call(base: nn.Module, kind: type[nn.Module]) -> str:
    """Why a base has to be called itself, instead of what a `kind` computes; "" if it need not."""
    if type(base).forward is not kind.forward:
        return f"{type(base).__qualname__} has a forward of its own"
    if "forward" in base.__dict__:
        return "the base's forward is replaced on the instance"
    if base._compiled_call_impl is not None:
        return "the base is compiled in place"
    if (
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
    ):
        return "the base has hooks"
    return ""


def belongs_to_its_class(base: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a base is a plain `kind`: nothing of its class, its call or its state dict is its
    own, so that another module with its attributes does the same."""
    bound_hooks = base._load_state_dict_pre_hooks or base._state_dict_pre_hooks  # hold the module
    return type(base) is kind and not BOUND_CALLS & base.__dict__.keys() and not bound_hooks


def computed_tensors(module: nn.Module) -> list[str]:
    """The tensors that a module computes from parameters of other names: parametrized ones, and
    those that torch.nn.utils.prune and the former weight_norm set before a call."""
    parametrized = module._modules.get("parametrizations")
    found = [] if parametrized is None else [name for name, _ in parametrized.named_children()]
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor) and {f"{name}_orig", f"{name}_v"} & module._parameters.keys():
            found.append(name)
    return found


def is_offloaded(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a hook keeps the values of a module's parameter elsewhere between calls."""
    return parameter.device.type == "meta" and "forward" in module.__dict__


def adapter_device(owner: nn.Module, weight: Tensor) -> torch.device:
    """Where an adapter of `owner`'s weight belongs: beside it, or, if a hook fetches it for a call
    only, where the hook computes."""
    base = owner._modules.get("base_layer") or owner
    if is_offloaded(base, weight):
        for hook in _hooks(base):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return weight.device


def offload_with(owner: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Tells the hooks that offload a module's parameters of further ones."""
    for hook in _hooks(owner):
        if getattr(hook, "offload", False):
            values = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
            hook.weights_map = ChainMap(values, hook.weights_map)
            hook.original_devices |= {name: p.device for name, p in parameters.items()}


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Those of accelerate."""
    hook: Any = module.__dict__.get("_hf_hook")
    return tuple(getattr(hook, "hooks", (hook,)))


def move_hook(source: nn.Module, target: nn.Module) -> None:
    """Gives a module accelerate's hook of another one."""
    hook = source.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module  # there is a hook, so there is accelerate

        add_hook_to_module(target, hook)
