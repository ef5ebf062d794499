"""Layers under a plan of `lora_ext.batch`: rows of one input have adapters of their own.

A linear layer runs `lora_linear_grouped`. Other kinds are composed: the base once over everything,
then each adapter's update on its own rows; adapters of a variant (DoRA) run on their rows alone,
base and all. `explain`, asked within the plan, says which.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from lora_ext._assignment import Assignment
from lora_ext.batching import BatchPlan, current_plan
from lora_ext.functional import lora_linear_grouped
from lora_ext.nn.adapter import LowRank, variant_of
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
    adapters: Mapping[str, LowRank],
) -> Tensor:
    """A linear layer's forward under the plan; adapters of a variant are not among `adapters`.

    x [..., in_features], weight [out_features, in_features] → [..., out_features].
    """
    plan = _plan(layer)
    where = type(layer).__name__
    y = lora_linear_grouped(x, weight, bias, adapters, plan, where=where)
    variants = [n for n in planned_names(layer) if variant_of(layer.adapters[n])]
    if not variants:
        return y
    rows = plan.assign(x.shape[:-1], x.device, variants, where)
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return _with_variants(layer, flat_y, flat_x, rows).view_as(y)


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
