"""Mixtures of experts whose weights are stacked into parameters, as transformers 5 keeps them: each
expert runs on its own rows, base and adapter in one product, and no weight is formed.

What a module has to be is what transformers' `use_experts_implementation` makes of one; a layer for
parameters (`ParamLayer`) asks here whether its base is such a module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._assignment import Assignment
from lora_ext.functional import lora_linear

# Of transformers' own ways those that compute what the module's forward does, in its dtype.
_SAME = (None, "eager", "grouped_mm", "batched_mm", "lora_ext")
_MARKS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts", "config")


class Factors(NamedTuple):
    """An adapter of a stack of matrices: A [E, r, in], B [E, out, r]."""

    A: Tensor
    B: Tensor
    scaling: float


class Routed(NamedTuple):
    """Entries of a routing, (token, expert) pairs, sorted by expert."""

    order: Tensor  # [S]: which of the tokens' k choices, token after token
    tokens: Tensor  # [S]
    counts: list[int]  # of each expert


def why_not_experts(module: nn.Module, weights: Sequence[str]) -> str | None:
    """Why these parameters of a module do not run as experts; None if they do."""
    if not all(hasattr(module, mark) for mark in _MARKS):
        return "the module is none of transformers' experts"
    used = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    others = [name for name in weights if name not in used]
    if others:
        return f"{others[0]!r} is no weight that transformers' experts are multiplied by"
    chosen = getattr(module.config, "_experts_implementation", None)
    if chosen not in _SAME:
        return f"experts_implementation={chosen!r} has a product of its own"
    kinds = {type(getattr(module, name)) for name in used}
    if not kinds <= {Tensor, nn.Parameter}:
        return "the weights are of a kind that experts cannot be taken out of one by one"
    return None


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: Mapping[str, Factors] | None = None,
) -> Tensor:
    """The sum over each token's experts of weight * down(act(gate_up(x))).

    Args:
        hidden_states: [tokens, in]
        top_k_index: [tokens, k]; what is no expert's number, as other processes' are, is left out.
        top_k_weights: [tokens, k]
        adapters: of the weights that have one, by their names.

    Returns:
        [tokens, out], in the dtype of hidden_states.
    """
    routed = route(top_k_index, module.num_experts)
    adapters = adapters or {}

    def product(name: str, x: Tensor) -> Tensor:
        return expert_linear(module, name, x, routed.counts, adapters.get(name))

    return mix(module, hidden_states, top_k_weights, routed, product)


def route(top_k_index: Tensor, experts: int) -> Routed:
    """Which tokens go to which expert."""
    flat = top_k_index.reshape(-1)
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts].tolist()
    order = order[: sum(counts)]
    return Routed(order, order // max(top_k_index.shape[-1], 1), counts)


def mix(
    module: Any, hidden_states: Tensor, top_k_weights: Tensor, routed: Routed, product: Any
) -> Tensor:
    """The layer around the two products: product(name, x) is that of rows sorted by expert."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    x = product(first, hidden_states.index_select(0, routed.tokens))
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = product("down_proj", x)
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1).index_select(0, routed.order).unsqueeze(-1)
    # Not added into place: such a sum would be one of the storage type, in any order on a GPU.
    each = x.new_zeros(top_k_weights.numel(), x.shape[-1]).index_copy(0, routed.order, x)
    total: Tensor = each.view(*top_k_weights.shape, x.shape[-1]).sum(1)
    return total.to(hidden_states.dtype)


def matrices(module: Any, name: str) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Every expert's weight [out, in] and bias."""
    stack = getattr(module, name)
    weights = (stack.mT if module.is_transposed else stack).unbind(0)
    biases: Sequence[Tensor | None] = [None] * len(weights)
    if module.has_bias:
        biases = getattr(module, f"{name}_bias").unbind(0)
    return weights, biases


def expert_linear(
    module: Any, name: str, x: Tensor, counts: list[int], adapter: Factors | None
) -> Tensor:
    """[S, in] → [S, out], each expert's rows one after another."""
    weights, biases = matrices(module, name)
    x = as_weight(x, weights[0])
    parts = []
    if adapter is not None:
        As, Bs = adapter.A.unbind(0), adapter.B.contiguous().unbind(0)
    for expert, rows in enumerate(torch.split(x, counts)):
        if not len(rows):
            continue
        weight, bias = weights[expert], biases[expert]
        if adapter is None:
            parts.append(nn.functional.linear(rows, weight, bias))
        else:
            parts.append(
                lora_linear(rows, weight, bias, As[expert], Bs[expert], scaling=adapter.scaling)
            )
    return torch.cat(parts) if parts else x.new_zeros(0, weights[0].shape[0])


class Slots(NamedTuple):
    """Which rows of one expert have which adapter, as `lora_linear_grouped` takes it."""

    used: list[int]  # the adapters, by their places
    order: Tensor  # int32: rows of the first of these, of the second, ...
    counts: list[int]
    factor: Tensor | None  # of each entry of order


def slots_of(routed: Routed, tokens: int, rows: Assignment) -> list[Slots]:
    """Of every expert, where `rows` says which token has which adapter."""
    device, n = routed.tokens.device, len(rows.counts)
    entries = rows.order.long()
    places = torch.arange(n, device=device).repeat_interleave(
        torch.tensor(rows.counts, device=device)
    )
    place = torch.full((tokens,), -1, device=device).index_copy(0, entries, places)
    factors = None
    if rows.factor is not None:
        factors = rows.factor.new_zeros(tokens).index_copy(0, entries, rows.factor)
        factors = factors.index_select(0, routed.tokens)
    found = []
    begin = 0
    for own in torch.split(place.index_select(0, routed.tokens), routed.counts):
        counts = torch.bincount(own + 1, minlength=n + 1).tolist()
        order = own.argsort(stable=True)[counts[0] :]
        used = [j for j in range(n) if counts[j + 1]]
        factor = None if factors is None else factors.index_select(0, begin + order)
        found.append(Slots(used, order.int(), [counts[j + 1] for j in used], factor))
        begin += len(own)
    return found


def planned_expert_linear(
    module: Any,
    name: str,
    x: Tensor,
    routed: Routed,
    slots: Sequence[Slots],
    adapters: Sequence[Factors],
) -> Tensor:
    """[S, in] → [S, out] as `expert_linear`, where tokens have adapters of their own: an expert and
    an adapter are a slot."""
    weights, biases = matrices(module, name)
    x = as_weight(x, weights[0])
    stacks = [(one.A.unbind(0), one.B.contiguous().unbind(0)) for one in adapters]
    parts = []
    for expert, rows in enumerate(torch.split(x, routed.counts)):
        weight, bias, own = weights[expert], biases[expert], slots[expert]
        if not len(rows):
            continue
        if not own.used:
            parts.append(nn.functional.linear(rows, weight, bias))
            continue
        parts.append(
            torch.ops.lora_ext.lora_linear_grouped(
                rows,
                weight,
                bias,
                [stacks[j][0][expert] for j in own.used],
                [stacks[j][1][expert] for j in own.used],
                [],
                own.order,
                own.counts,
                own.factor,
                [adapters[j].scaling for j in own.used],
                [0.0] * len(own.used),
            )
        )
    return torch.cat(parts) if parts else x.new_zeros(0, weights[0].shape[0])


def as_weight(x: Tensor, weight: Tensor) -> Tensor:
    """x in the dtype that its product has, as transformers' experts take it."""
    if torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)
