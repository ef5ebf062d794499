"""What an embedding, or a head, computes where some rows of its weight are others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext.nn.adoption import reason_to_call
from lora_ext.nn.embedding import is_scaled_word_embedding


class TokenRows(NamedTuple):
    """Which rows of a weight a table's are instead."""

    rows: Tensor  # [n] their numbers, in the table's order
    ordered: Tensor  # [n] the same in ascending order
    order: Tensor  # [n] the table's row of each of those
    places: dict[int, int]  # the table's row of each number

    @classmethod
    def of(cls, indices: Sequence[int], device: torch.device) -> TokenRows:
        order = sorted(range(len(indices)), key=indices.__getitem__)
        return cls(
            torch.tensor(indices, device=device),
            torch.tensor([indices[i] for i in order], device=device),
            torch.tensor(order, device=device),
            {index: row for row, index in enumerate(indices)},
        )

    def written_into(self, weight: Tensor, table: Tensor) -> Tensor:
        """A copy of the weight with these rows."""
        return weight.index_copy(0, self.rows, table.to(weight.dtype))


def reason_to_copy(base: nn.Module) -> str:
    """Why `run` copies the whole weight; "" if it need not."""
    kind: type[nn.Module] = nn.Linear
    if isinstance(base, nn.Embedding):
        kind = type(base) if is_scaled_word_embedding(base) else nn.Embedding
    return reason_to_call(base, kind)


def run(base: Any, rows: TokenRows, table: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The base's result as if `table` [n, K] were these rows of its weight [N, K].

    The weight is copied only for a base of which more is known than that it is a lookup or a
    product: else the base computes with its own, and what these rows would give takes the place of
    that. The gradient of the table is of its own size, not the weight's.
    """
    weight = base.weight
    table = table.to(weight.dtype)
    if kwargs or len(args) != 1 or reason_to_copy(base):
        changed = {"weight": rows.written_into(weight, table)}
        return torch.func.functional_call(base, changed, args, kwargs)
    if isinstance(base, nn.Embedding):
        return _looked_up(base, rows, table, args[0])
    y: Tensor = base(args[0])
    bias = None if base.bias is None else base.bias[rows.rows]
    columns = F.linear(args[0], table, bias).to(y.dtype)
    if not torch.compiler.is_compiling() and _is_transformed(columns):  # y may have fewer levels
        return y.index_copy(-1, rows.rows, columns)
    return y.index_copy_(-1, rows.rows, columns)  # y is nobody else's


def _is_transformed(tensor: Tensor) -> bool:
    """Whether it is one of torch.func's transforms."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _looked_up(base: Any, rows: TokenRows, table: Tensor, x: Tensor) -> Tensor:
    y: Tensor = base(x)
    x, last = x.to(rows.rows.dtype), len(table) - 1
    near = torch.searchsorted(rows.ordered, x).clamp_max(last)
    found, at = rows.ordered[near] == x, rows.order[near]
    padding = None if base.padding_idx is None else rows.places.get(base.padding_idx)
    if base.max_norm is not None:  # a constant for autograd, as in a lookup
        scaled = table.detach().clone()
        torch.embedding_renorm_(scaled, rows.order, base.max_norm, base.norm_type)
        table = table + (scaled - table.detach())
    if base.scale_grad_by_freq:  # which counts what is looked up: the others elsewhere
        table = torch.cat([table, table.new_zeros(1, table.shape[1])])
        at = torch.where(found, at, last + 1)
    own = F.embedding(at, table, padding, scale_grad_by_freq=base.scale_grad_by_freq)
    scale = getattr(base, "embed_scale", None) if is_scaled_word_embedding(base) else None
    if scale is not None:
        own = own * (scale.to(own.dtype) if isinstance(scale, Tensor) else scale)
    return torch.where(found.unsqueeze(-1), own, y)
