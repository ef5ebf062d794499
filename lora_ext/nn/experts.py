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

# Of transformers' own ways those that compute what the module's forward does, in its dtype.
_SAME = (None, "eager", "grouped_mm", "batched_mm", "lora_ext")
_MARKS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts", "config")


class Factors(NamedTuple):
    """An adapter of a stack of matrices: A [E, r, in], B [E, out, r], contiguous."""

    A: Tensor
    B: Tensor
    scaling: float


class Routed(NamedTuple):
    """Entries of a routing, (token, expert) pairs, sorted by expert."""

    order: Tensor  # [S]: which of the tokens' k choices, token after token
    tokens: Tensor  # [S]
    experts: Tensor  # [S]
    sizes: Tensor  # of each expert: how many entries are its own
    counts: list[int]  # the same, on the host


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
    slots = slots_of_one(routed) if adapters else None

    def product(name: str, x: Tensor) -> Tensor:
        own = [adapters[name]] if adapters and name in adapters else []
        return expert_linear(module, name, x, routed.counts, slots, own)

    return mix(module, hidden_states, top_k_weights, routed, product)


def route(top_k_index: Tensor, experts: int) -> Routed:
    """Which tokens go to which expert."""
    flat = top_k_index.reshape(-1)
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    chosen, order = flat.sort(stable=True)
    sizes = torch.bincount(flat, minlength=experts + 1)[:experts]
    counts = sizes.tolist()
    S = sum(counts)
    order = order[:S]
    return Routed(order, order // max(top_k_index.shape[-1], 1), chosen[:S], sizes, counts)


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


class Slots(NamedTuple):
    """Which rows of each expert have which adapter, expert after expert, as `lora_linear_grouped`
    takes them: an expert and an adapter are a slot."""

    experts: list[int]  # of each slot
    adapters: list[int]  # of each slot, by their places
    counts: list[int]  # of each slot
    order: Tensor  # int32: the rows of the first slot, of the second, ..., counted in their expert
    factor: Tensor | None  # of each entry of order


def slots_of_one(routed: Routed) -> Slots:
    """All rows have the one adapter that there is."""
    used = [expert for expert, count in enumerate(routed.counts) if count]
    counts = [routed.counts[expert] for expert in used]
    return Slots(used, [0] * len(used), counts, rows_of(routed).int(), None)


def slots_of(routed: Routed, tokens: int, rows: Assignment) -> Slots:
    """Where `rows` says which token has which adapter."""
    device, n = routed.tokens.device, len(rows.counts)
    entries = rows.order.long()
    places = torch.arange(n, device=device).repeat_interleave(
        torch.tensor(rows.counts, dtype=torch.int64, device=device)
    )
    place = torch.full((tokens,), -1, device=device).index_copy(0, entries, places)
    place = place.index_select(0, routed.tokens)
    slot = routed.experts * n + place
    order = torch.where(place < 0, -1, slot).argsort(stable=True)
    order = order[int((place < 0).sum()) :]
    slots, counts = torch.unique_consecutive(slot.index_select(0, order), return_counts=True)
    factor = None
    if rows.factor is not None:
        factor = rows.factor.new_zeros(tokens).index_copy(0, entries, rows.factor)
        factor = factor.index_select(0, routed.tokens).index_select(0, order)
    # What has no row and is named all the same (zero_grads) has an empty slot of the first expert.
    empty = [place for place, count in enumerate(rows.counts) if not count]
    numbers = [*empty, *slots.tolist()]
    return Slots(
        [number // n for number in numbers],
        [number % n for number in numbers],
        [0] * len(empty) + counts.tolist(),
        rows_of(routed).index_select(0, order).int(),
        factor,
    )


def rows_of(routed: Routed) -> Tensor:
    """[S]: which row of its expert's an entry is."""
    begins = routed.sizes.cumsum(0) - routed.sizes
    rows = torch.arange(len(routed.order), device=routed.order.device)
    return rows - begins.index_select(0, routed.experts)


def expert_linear(
    module: Any,
    name: str,
    x: Tensor,
    counts: list[int],
    slots: Slots | None,
    adapters: Sequence[Factors],
) -> Tensor:
    """[S, in] → [S, out], each expert's rows one after another; the base alone without adapters."""
    stack = getattr(module, name)
    weight = stack.mT if module.is_transposed else stack
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)  # as transformers' experts take it
    if not adapters or slots is None or not slots.counts:
        return base_linear(x, weight, bias, counts)
    each = [(one.A.unbind(0), one.B.unbind(0)) for one in adapters]
    used = list(zip(slots.adapters, slots.experts, strict=True))
    of_experts = [0] * len(counts)
    for expert in slots.experts:
        of_experts[expert] += 1
    return torch.ops.lora_ext.lora_linear_grouped(  # type: ignore[no-any-return]
        x,
        weight,
        bias,
        [each[place][0][expert] for place, expert in used],
        [each[place][1][expert] for place, expert in used],
        [],
        slots.order,
        slots.counts,
        slots.factor,
        [adapters[place].scaling for place, _ in used],
        [0.0] * len(used),
        weight_rows=counts,
        weight_slots=of_experts,
    )


def base_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
    biases: Sequence[Tensor | None] = [None] * len(counts) if bias is None else bias.unbind(0)
    parts = [
        nn.functional.linear(rows, own, of_bias)
        for rows, own, of_bias in zip(torch.split(x, counts), weight.unbind(0), biases, strict=True)
        if len(rows)
    ]
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[1])
