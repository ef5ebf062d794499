"""Taking the place of a module: what a layer has of it, and what only that module can have."""

from __future__ import annotations

from collections import ChainMap
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from lora_ext.arguments import warn
from lora_ext.nn.adapter import DEFAULT, part_name
from lora_ext.nn.installed_forward import install_like
from lora_ext.nn.mergeable import MergeableLayer
from lora_ext.nn.sharded import is_sharded, refuse_fsdp

# Attributes of an instance that are bound to it: the compiled call of `Module.compile()`, and what
# accelerate's hooks put around its forward. Another module with them would run that instance.
BOUND_CALLS = frozenset({"_compiled_call_impl", "forward", "_old_forward", "_hf_hook"})

_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def check_base(
    base: nn.Module, kind: type[nn.Module], where: str, *, any_forward: bool = False
) -> None:
    """
    Raises:
        TypeError: base has adapters, is no `kind`, does not compute what a `kind` does (unless
            `any_forward`), is the out_proj of an attention, or has parameters that are quantized,
            or such that only a call of its own can compute with them (sparse ones, float8).
        ValueError: base computes a parameter (pruning, weight_norm).
    """
    where = f"{where}: base"
    fits = isinstance(base, kind) and (any_forward or type(base).forward is kind.forward)
    if hasattr(base, "merged_adapters") or not fits:
        got = (
            f"the class {base.__qualname__}" if isinstance(base, type) else type(base).__qualname__
        )
        raise TypeError(
            f"{where}: got {got}, expected a {kind.__module__}."
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
            not (type(parameter) is nn.Parameter or is_sharded(parameter))
            or not parameter.is_floating_point()
        ):
            todo = (
                "call the model once first"
                if is_lazy(parameter)
                else "quantized weights that are not known here need quant.register_dequantizer"
            )
            raise TypeError(
                f"{where}: its {name} is a {type(parameter).__qualname__} of "
                f"{parameter.dtype}, expected a plain floating-point parameter; {todo}"
            )
        if parameter is not None and not reason_to_call(base, kind):
            _check_computable(f"{where}: its {name}", parameter)


def _check_computable(what: str, parameter: nn.Parameter) -> None:
    """TypeError for a parameter with which the fused operators do not compute."""
    if parameter.is_nested or parameter.layout is not torch.strided:
        layout = "nested" if parameter.is_nested else str(parameter.layout).removeprefix("torch.")
        raise TypeError(
            f"{what} is a {layout} tensor, expected a dense one; make the layer another weight "
            "first"
        )
    if parameter.dtype not in _DTYPES:
        raise TypeError(
            f"{what} is of {parameter.dtype}, expected float64, float32, bfloat16 or float16; "
            "convert it first (base.to(torch.bfloat16))"
        )


def without_bound_calls(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that another one may share."""
    return {name: value for name, value in module.__dict__.items() if name not in BOUND_CALLS}


def reason_to_call(base: nn.Module, kind: type[nn.Module]) -> str:
    """Why a base has to be called itself, instead of what a `kind` computes; "" if it need not."""
    if type(base).forward is not kind.forward:
        return f"{type(base).__qualname__} has a forward of its own"
    if type(base).__call__ is not kind.__call__:
        return f"{type(base).__qualname__} has a __call__ of its own"
    if _has_other_forward(base):
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


def _has_other_forward(module: nn.Module) -> bool:
    """Whether a forward is set on the instance, other than that of its class, which accelerate's
    hooks leave behind."""
    forward = module.__dict__.get("forward")
    own = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not (own and getattr(forward, "__self__", None) is module)


def changes_its_call(base: nn.Module) -> bool:
    """Whether something around a base's forward may change what goes in or comes out: hooks, or a
    forward set on the instance, other than to move tensors (accelerate's AlignDevicesHook)."""
    if base._forward_hooks or base._forward_pre_hooks:
        return True
    return _has_other_forward(base) and not all(
        any(kind.__name__ == "AlignDevicesHook" for kind in type(hook).__mro__)
        for hook in _hooks(base)
    )


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


# What pruning and the former weight_norm append to the name of a parameter that they replace.
_SOURCES = ("_orig", "_mask", "_g", "_v")


class AdoptingLayer(MergeableLayer):
    """The part of a `LoraLayer` that has all that its base is."""

    PARTS: ClassVar[tuple[str, ...]]
    _STATE: ClassVar[frozenset[str]]
    _base_class: type[nn.Module]

    def _init_adapters(self, base_class: type[nn.Module], merge_weights: bool = False) -> None:
        raise NotImplementedError

    @classmethod
    def _adopt(cls, base: nn.Module, kind: type[nn.Module], *, any_forward: bool = False) -> Self:
        """A layer of this class with all that `base` is: its parameters, attributes, hooks and
        mode, shared with it. `any_forward`: `base` need not compute what a `kind` does.

        Raises: see `adoption.check_base`; ValueError for a forward replaced on the instance.
        """
        check_base(base, kind, cls.__name__, any_forward=any_forward)
        if "forward" in base.__dict__:
            raise ValueError(
                f"{cls.__name__}: base: its forward is replaced on the instance (as accelerate's "
                "hooks do), expected the class's own; take the hook off first and put it on again "
                "after"
            )
        if base._compiled_call_impl is not None:
            warn(
                f"{cls.__name__}: base: was compiled in place, the layer with adapters is not; "
                "call compile() of the layer, or of the model around it"
            )
        self: Self = cls.__new__(cls)
        self.__dict__.update(without_bound_calls(base))
        for registry in ("_parameters", "_buffers", "_modules"):  # what is added is not the base's
            self.__dict__[registry] = dict(base.__dict__[registry])
        self._init_adapters(type(base))
        return self

    def get_base_layer(self) -> nn.Module:
        """A layer of the class that this one extends, without adapters, sharing its parameters:
        with what is merged, if anything is. What was made of this layer's own call, by `compile()`
        or a forward set on the instance, is not the base's.

        Raises:
            ValueError: a parameter is computed from others (pruning, parametrization), or is
                offloaded by a hook.
        """
        where = f"{type(self).__name__}.get_base_layer"
        self._check_not_computed(where)
        refuse_fsdp(self, where, "take the adapters out, then call fully_shard")
        for name, parameter in self._parameters.items():
            if parameter is not None and is_offloaded(self, parameter):
                raise ValueError(
                    f"{where}: the layer's {name} is offloaded by a hook, expected the hooks taken "
                    "off (accelerate.hooks.remove_hook_from_module(model, recurse=True))"
                )
        base = self._plain_base()
        install_like(self, base)
        move_hook(self, base)
        return base

    def _plain_base(self) -> nn.Module:
        """`get_base_layer`, within a call: any tensors, and without hooks' forwards."""
        base = self._base_class.__new__(self._base_class)
        attributes = without_bound_calls(self)
        base.__dict__.update({k: v for k, v in attributes.items() if k not in self._STATE})
        lora = {part_name(part, name) for part in self.PARTS for name in (DEFAULT, *self.adapters)}
        kept = {name: tensor for name, tensor in self._parameters.items() if name not in lora}
        base.__dict__["_parameters"] = kept
        for registry in ("_buffers", "_modules"):
            base.__dict__[registry] = dict(self.__dict__[registry])
        for name in self._computed():  # what the class of a parametrized layer computes
            base.__dict__.setdefault(name, getattr(self, name))
        return base

    def _computed(self) -> list[str]:
        """The tensors that are computed from others."""
        return computed_tensors(self)

    def _check_not_computed(self, where: str, adapter_name: str | None = None) -> None:
        """ValueError if any tensor, or one of an adapter, is computed from others."""
        computed = self._computed()
        if adapter_name is not None:
            own = {part_name(part, adapter_name) for part in self.PARTS}
            computed = [name for name in computed if name in own]
        if computed:
            raise ValueError(
                f"{where}: the layer's {computed[0]} is computed from other tensors (pruning, "
                "parametrization, weight_norm), expected a plain parameter; make that permanent "
                "first (torch.nn.utils.prune.remove, parametrize.remove_parametrizations, "
                "remove_weight_norm)"
            )

    def adapter_state_names(self, adapter_name: str) -> list[str]:
        """The names in `state_dict()` of what makes an adapter: its parameters, or what they are
        computed from (pruning, parametrization, weight_norm)."""
        names = list(self.adapter_parameters(adapter_name))
        own = {part_name(part, adapter_name) for part in self.PARTS}
        for computed in [name for name in self._computed() if name in own]:
            sources = (f"parametrizations.{computed}.", *(f"{computed}{s}" for s in _SOURCES))
            names += [name for name in self._tensor_names() if name.startswith(sources)]
        return names

    def _tensor_names(self) -> list[str]:
        return [name for name, _ in (*self.named_parameters(), *self.named_buffers())]
