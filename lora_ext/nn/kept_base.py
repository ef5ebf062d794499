"""Layers that keep their base as a child and call it, where they cannot take its place."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_ext import batching
from lora_ext.nn.adapter import AdapterSettings, variant_of
from lora_ext.nn.adoption import (
    BOUND_CALLS,
    changes_its_call,
    check_base,
    computed_tensors,
    is_offloaded,
    reason_to_call,
    without_bound_calls,
)
from lora_ext.nn.init import mutates_weight
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.mergeable import base_of
from lora_ext.nn.planned import follows_plan, planned_updates
from lora_ext.nn.running_layer import RunningLayer
from lora_ext.nn.sharded import refuse_fsdp


class ParameterOfBaseError(KeyError):
    """A parameter that is the base's was taken for one of the layer over it."""

    def __str__(self) -> str:
        return (
            f"{self.args[0]}: is a parameter of the layer's base_layer, not of the layer itself; "
            "call prune, weight_norm and the like with layer.base_layer"
        )


class OwnParameters(dict[str, Any]):
    """What a layer over a base has registered itself. prune and the former weight_norm and
    spectral_norm, which replace an entry, are told whose it is."""

    def __missing__(self, name: str) -> Any:
        raise ParameterOfBaseError(name)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise ParameterOfBaseError(name)
        super().__delitem__(name)

    def copy(self) -> Self:
        return type(self)(self)


class KeptBase(LoraLayer):
    """What makes a kind of layer one over a base that is its child `base_layer`, as in PEFT.

    For bases that another module could not stand for: of a subclass, with its `super()`, methods
    and properties; whose forward is replaced on the instance, as accelerate's hooks do; compiled in
    place. Attributes that the layer lacks are the base's. Where the base computes what its torch
    class does and nothing watches its calls, the layer runs as if it were the base, fused;
    otherwise it calls the base, with all arguments, and adds the adapters' updates to its result.
    """

    BASE_PATH: ClassVar[str] = "base_layer."
    _STATE: ClassVar[frozenset[str]] = LoraLayer._STATE | {"_is_product", "_original"}
    # Whether the base's result is x W^T + b, once that was tried; drafts share the list.
    _is_product: list[bool]
    # The base, also where `base_layer` is a draft's copy of it, of which a forward that is set on
    # the base does not know. In a list: it is no second child.
    _original: list[nn.Module]
    base_layer: nn.Module

    @classmethod
    def _over(cls, base: nn.Module, kind: type[nn.Module], *, any_forward: bool = False) -> Self:
        """A layer over `base`, which stays as it is; raises as `adoption.check_base`."""
        check_base(base, kind, cls.__name__, any_forward=any_forward)
        return cls._around(base)

    @classmethod
    def _around(cls, base: nn.Module) -> Self:
        """The same for a base that was checked."""
        self: Self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.__dict__["_parameters"] = OwnParameters()
        self.base_layer = base
        self.training = base.training
        self._is_product = []
        self._original = [base]
        self._init_adapters(type(base))
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            own = name == "base_layer" or name in BOUND_CALLS or name.startswith("__")
            if own or "_modules" not in self.__dict__:
                raise
            return getattr(self._modules["base_layer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """The base's parameters are the base's here, too (`head.weight = embedding.weight`)."""
        base = self.__dict__.get("_modules", {}).get("base_layer")
        if base is None or name not in base._parameters:
            super().__setattr__(name, value)
        elif f"{self.BASE_PATH}{name}" in self._aside:
            self._take_base(f"{self.BASE_PATH}{name}", base_of(value))
        else:
            setattr(base, name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As a module's, but for what prune would compute the base's parameter from."""
        computed = name.removesuffix("_orig")
        if computed != name and computed in self.base_layer._parameters:
            raise ParameterOfBaseError(computed)
        super().register_parameter(name, param)

    def get_base_layer(self) -> nn.Module:
        """The base itself, with what is merged, if anything is.

        Raises:
            ValueError: adapters are merged that cannot be in its weight.
        """
        where = f"{type(self).__name__}.get_base_layer"
        refuse_fsdp(self, where, "take the adapters out, then call fully_shard")
        if self._is_merged_beside():
            raise ValueError(
                f"{where}: {self._base_class.__qualname__} computes "
                f"something else than a product with its weight, so the weight cannot hold "
                f"{list(self.merged_adapters)}; keep the layer, or call unmerge() first"
            )
        return self.base_layer

    @property
    def reason_to_call(self) -> str:
        """Why a forward calls the base; "" if it runs fused."""
        return reason_to_call(self.base_layer, self._kind)

    @property
    def _kind(self) -> type[nn.Module]:
        """The torch class whose forward the layer can stand for."""
        raise NotImplementedError

    def _updates(self, x: Tensor) -> Iterable[Tensor]:
        """What the adapters that run add to the base's result."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's: its arguments, of which the first one, or the one that has the name of
        torch's, is x, and its result."""
        if len(args) == 1 and not kwargs and not self.reason_to_call:
            return super().forward(args[0])
        planned = batching.in_use and follows_plan(self)
        if self.merged_adapters:
            self._check_merged()
        y = self.base_layer(*args, **kwargs)
        x: Any = args[0] if args else self._x_by_name(kwargs)
        if (self._running or planned) and not isinstance(y, Tensor):
            raise TypeError(
                f"{type(self).__name__}: the base, a {self._base_class.__qualname__}, returned a "
                f"{type(y).__qualname__}, expected a tensor, to which an update can be added; "
                "leave this layer out with exclude_modules"
            )
        if planned:
            return planned_updates(self, y, x, self._dimensions_of_rows(x), self._update_of)
        if not self._running:
            return y
        total = y
        for update in self._updates(x):
            total = total + update
        return total.to(y.dtype)  # under autocast the update may be wider

    def _planned_path(self) -> tuple[str, str]:
        return RunningLayer._planned_path(self) if self.reason_to_call else super()._planned_path()

    def _dimensions_of_rows(self, x: Tensor) -> int:
        """How many of x's dimensions count what a plan may give adapters of its own."""
        return x.dim() - 1

    def _lora_path(self, tokens: int) -> tuple[str, str]:
        if not self.reason_to_call:
            return super()._lora_path(tokens)
        beside = "; merged beside the weight, of which the result is no product"
        reason = f"{self.reason_to_call}: it is called, and the update added to its result"
        return "composed", reason + (beside if self.merged else "")

    def _x_by_name(self, arguments: dict[str, Any]) -> Any:
        """x among the arguments of a call without positional ones: in what order is up to it."""
        names = [*_argument_names(self._kind)[:1], *_argument_names(type(self.base_layer))]
        return next((arguments[name] for name in names if name in arguments), None)

    def extra_repr(self) -> str:
        return self.adapters_repr().removeprefix(", ")

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        reason = self.reason_to_call
        if reason and (flag := variant_of(settings)):
            raise ValueError(
                f"{type(self).__name__}: {flag}: got True, expected False: {reason}, and the "
                "result of a call need not be a product with the weight"
            )
        if mutates_weight(settings.init_lora_weights) and (
            not self._is_product_of_weight() or is_offloaded(self.base_layer, self.weight)
        ):
            raise ValueError(
                f"{type(self).__name__}: init_lora_weights: got {settings.init_lora_weights!r}, "
                f"which changes the base's weight, expected another kind: {reason}"
            )
        return super().part_shapes(settings)

    def _adapted_weight(self) -> Tensor:
        weight: Tensor = self.weight
        return weight

    # Merging: only where the base adds x W^T

    def _merged_parameters(self, names: Any) -> dict[str, Tensor]:
        return super()._merged_parameters(names) if self._is_product_of_weight() else {}

    def _choose_running(self) -> None:
        super()._choose_running()
        if self._enabled and self._is_merged_beside():
            self._running = tuple(n for n in self.merged_adapters if self._scaling[n] != 0.0)

    def _is_merged_beside(self) -> bool:
        """Whether what is merged runs beside the base, whose weight cannot hold it."""
        return self.merged and not self._merged_parameters(self.merged_adapters)

    def _write_merged(self, names: Any) -> None:
        if self._is_product_of_weight():
            super()._write_merged(names)

    def _is_product_of_weight(self) -> bool:
        """Whether a change D of the weight changes the base's result by x D^T. A forward of its own
        need not do that: one that takes nothing but x is tried once, with random numbers. What is
        around the call is not known."""
        base, kind = self._original[0], self._kind
        if type(base).__call__ is not kind.__call__ or changes_its_call(base):
            return False
        if type(base).forward is kind.forward:
            return True
        if _takes_more_than_x(base):
            return False
        if not self._is_product and self.weight.device.type != "meta":
            is_product = _adds_product(
                self.base_layer, self._weight_matrix(), bool(getattr(self, "fan_in_fan_out", False))
            )
            self._is_product[:] = [is_product]
        return self._is_product == [True]

    def _computed(self) -> list[str]:
        return [*super()._computed(), *computed_tensors(self.base_layer)]


def _argument_names(kind: type[nn.Module]) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def _takes_more_than_x(base: nn.Module) -> bool:
    """Whether a forward names arguments that may change its result."""
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = list(inspect.signature(type(base).forward).parameters.values())[2:]
    return any(parameter.kind in named for parameter in parameters)


@torch.no_grad()
def _adds_product(base: nn.Module, weight: Tensor, transposed: bool) -> bool:
    """Whether base, with D added to its weight [N, K], which it may hold transposed, adds x D^T to
    its result."""
    twin = type(base).__new__(type(base))
    twin.__dict__.update(without_bound_calls(base))
    twin.__dict__["_parameters"] = {
        name: None if tensor is None else tensor.double()
        for name, tensor in base._parameters.items()
    }
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
    x = torch.randn(4, weight.shape[1], generator=generator, dtype=torch.float64).to(weight.device)
    results: list[Any] = []
    try:
        with torch.random.fork_rng():
            for changed in (weight.double(), weight.double() + D):
                twin.__dict__["_parameters"]["weight"] = changed.t() if transposed else changed
                torch.manual_seed(0)
                results.append(type(base).forward(twin, x))
        return torch.allclose(results[1] - results[0], x @ D.t(), rtol=1e-9, atol=1e-9)
    except MemoryError:
        raise
    except Exception:  # it wants other arguments, or other types
        return False
