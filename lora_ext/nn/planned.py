"""Layers under a plan of `lora_ext.batch`: rows of one input have adapters of their own.

A linear layer runs `lora_linear_grouped`. Other kinds are composed: the base once over everything,
then each adapter's update on its own rows; adapters of a variant (DoRA) run on their rows alone,
base and all. `explain`, asked within the plan, says which.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_ext._assignment import Assignment
from lora_ext.batching import BatchPlan, current_plan
from lora_ext.functional import lora_linear_grouped
from lora_ext.nn.adapter import LowRank, part_name, variant_of
from lora_ext.paths import lora_linear_grouped_path

Layer: TypeAlias = Any  # a LoraLayer, which imports this

Function = TypeVar("Function", bound=Callable[..., Any])


def _in_eager(function: Function) -> Function:
    """Compiled code calls it as it is: plans are looked up in each call."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # only then: it imports the compiler, for a second
            disabled: Any = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, called)


@_in_eager
def follows_plan(layer: Layer) -> bool:
    """Whether a forward of this layer follows a plan now.

    Raises:
        ValueError: it would, and has adapters in its weight.
    """
    if current_plan() is None or not layer.adapters or not layer._enabled:
        return False
    if layer.merged:
        raise ValueError(
            f"{type(layer).__name__}: batch: {list(layer.merged_adapters)} are merged into the "
            "weight, of all rows. Cannot pass `adapter_names` when there are merged adapters, "
            "please call `unmerge_adapter` first."
        )
    return True


def planned_names(layer: Layer) -> list[str]:
    """The adapters of the plan that this layer has, and that do something."""
    plan = _plan(layer)
    plan.note(layer.adapters)
    return [name for name in plan.names if layer._scaling.get(name, 0.0) != 0.0]


def _concerns(plan: BatchPlan, names: Collection[str]) -> bool:
    """Whether the rows of a plan have to be those of a layer that has these of its adapters: where
    it has none of them its rows, which may be others, as those of a pooler, are the base's."""
    return bool(names) or not plan.names


def _plan(layer: Layer) -> BatchPlan:
    plan = current_plan()
    assert plan is not None
    return plan.of(layer)


def dropout_p(layer: Layer, name: str) -> float:
    """Of an adapter now."""
    return layer.adapters[name].lora_dropout if layer.training else 0.0


def refuse_plan(layer: Layer, why: str) -> NoReturn:
    """A ValueError of a layer that cannot follow the plan."""
    raise ValueError(
        f"{type(layer).__name__}: batch: {list(layer.adapters)} cannot be adapters of single rows: "
        f"{why}; run batches of one adapter, or train others without this layer (exclude_modules, "
        "or target_parameters that do not name it)"
    )


def refuse_places(layer: Layer) -> None:
    """A ValueError of a layer whose row is a whole request, where adapters begin inside of it."""
    if _plan(layer).has_after and planned_names(layer):
        refuse_plan(layer, "a row is a whole request, in which no place can be told (after)")


def planned_linear_path(layer: Layer) -> tuple[str, str]:
    """(path, reason) of it, for `explain`."""
    names = planned_names(layer)
    ranks = [layer.adapters[name].r for name in names]
    path, how = lora_linear_grouped_path(layer._adapted_weight(), ranks)
    reason = f"the base product once, then {how}"
    if any(variant_of(layer.adapters[name]) for name in names):
        reason += "; DoRA's rows once more, base and all"
    return path, reason


@_in_eager
def planned_linear(
    layer: Layer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Mapping[str, LowRank] | None = None,
) -> Tensor:
    """A linear layer's forward under the plan; `adapters`, none of a variant, are what `stacks`
    gives if None.

    x [..., in_features], weight [out_features, in_features] → [..., out_features].
    """
    plan = _plan(layer)
    where = type(layer).__name__
    if adapters is None:
        plain = _plain_low_rank(layer, plan) if layer._cuts_short else None
        if plain is not None:
            plan.note(layer.adapters)
            if not _concerns(plan, plain):
                return torch.nn.functional.linear(x, weight, bias)
            return lora_linear_grouped(x, weight, bias, plain, plan, where=where)
        adapters = dict(stacks(layer))
    names = planned_names(layer)
    if not _concerns(plan, names):
        return torch.nn.functional.linear(x, weight, bias)
    y = lora_linear_grouped(x, weight, bias, adapters, plan, where=where)
    variants = [n for n in names if variant_of(layer.adapters[n])]
    if not variants:
        return y
    rows = plan.assign(x.shape[:-1], x.device, variants, where)
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return _with_variants(layer, flat_y, flat_x, rows).view_as(y)


class _Kept(NamedTuple):
    """A layer's low-rank products for a plan, and what they were made of."""

    adapters: dict[str, LowRank]
    training: bool
    scaling: dict[str, float]
    settings: tuple[object, ...]
    parameters: tuple[object, ...]

    def are_those_of(self, layer: Layer) -> bool:
        return (
            self.training == layer.training
            and self.scaling == layer._scaling
            and _same(self.settings, layer.adapters.values())
            and _same(self.parameters, layer._parameters.values())
        )


def _same(some: Collection[object], others: Collection[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


# Of each plan by layer: making them is a tenth of the time of sixteen adapters at a row each.
_KEPT: WeakKeyDictionary[BatchPlan, WeakKeyDictionary[Layer, _Kept]] = WeakKeyDictionary()


def _plain_low_rank(layer: Layer, plan: BatchPlan) -> dict[str, LowRank] | None:
    """What `stacks` gives, or None where an adapter of the plan is not two parameters that are
    multiplied: it is of a variant, tied, or computed, or this is a replica."""
    if layer._tied:
        return None
    of_layers = _KEPT.get(plan)
    if of_layers is None:
        of_layers = _KEPT[plan] = WeakKeyDictionary()
    kept = of_layers.get(layer)
    if kept is not None and kept.are_those_of(layer):
        return kept.adapters
    parameters: dict[str, Any] = layer._parameters
    found = {}
    for name in planned_names(layer):
        settings, suffix = layer.adapters[name], part_name("", name)
        A, B = (parameters.get(part + suffix) for part in ("lora_A", "lora_B"))
        bias = parameters.get("lora_bias" + suffix)
        if not settings.is_plain or A is None or B is None or (settings.lora_bias and bias is None):
            return None
        found[name] = LowRank(A, B, bias, layer._scaling[name], dropout_p(layer, name))
    of_layers[layer] = _Kept(
        found,
        layer.training,
        dict(layer._scaling),
        tuple(layer.adapters.values()),
        tuple(parameters.values()),
    )
    return found


def _with_variants(layer: Layer, y: Tensor, x: Tensor, rows: Assignment) -> Tensor:
    """y with the rows of these adapters, all of a variant of LoRA, made by it of x's rows."""
    for name, index, factor in rows.by_name():
        if factor is not None:
            refuse_plan(layer, f"'{name}' is of a variant of LoRA, which has no strength (scale)")
        variant = layer._first_variant([name])
        assert variant is not None
        made = variant.forward(layer, x.index_select(0, index), [name])
        y = y.index_copy(0, index.long(), made.to(y.dtype))
    return y


@_in_eager
def planned_updates(
    layer: Layer, y: Tensor, x: Tensor, dimensions: int, update_of: Callable[..., Tensor]
) -> Tensor:
    """y, the base's, with update_of(x, name) of each adapter on its own rows, which are counted
    over the first `dimensions` of x and y."""
    plan = _plan(layer)
    where, leading = type(layer).__name__, x.shape[:dimensions]
    names = planned_names(layer)
    if not _concerns(plan, names):
        return y
    plain = [name for name in names if not variant_of(layer.adapters[name])]
    rows = plan.assign(leading, x.device, plain, where)
    count = math.prod(leading)
    flat_x, flat_y = (t.reshape(count, *t.shape[dimensions:]) for t in (x, y))
    for name, index, factor in rows.by_name():
        update = update_of(flat_x.index_select(0, index), name)
        if factor is not None:
            update = update * factor.view(-1, *[1] * (update.dim() - 1)).to(update.dtype)
        flat_y = flat_y.index_add(0, index, update.to(flat_y.dtype))
    variants = plan.assign(leading, x.device, [n for n in names if n not in plain], where)
    return _with_variants(layer, flat_y, flat_x, variants).view_as(y)


def stacks(layer: Layer, prefix: str = "") -> Iterator[tuple[str, LowRank]]:
    """The low-rank products of the plan that this layer has, by name."""
    for name in planned_names(layer):
        if not variant_of(layer.adapters[name]):
            yield name, layer._stack([name], dropout_p(layer, name), prefix)
