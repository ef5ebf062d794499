"""What `torch.utils.flop_counter.FlopCounterMode` counts of the operators: the products of the same
computation in plain PyTorch, also where a kernel makes one again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from lora_ext._extension import _C as _C  # which defines the operators

Shape = Sequence[int]  # the counter gives the shape of each tensor


def _low_rank(rows: int, lora_A: Shape, lora_B: Shape) -> int:
    """Of x A^T B^T: x [rows, K], A [r, K], B [N, r]."""
    (r, K), N = lora_A, lora_B[0]
    return 2 * rows * r * (K + N)


def _backward(
    dy: Shape, lora_A: Shape, lora_B: Shape, base: int, dx: bool, dA: bool, dB: bool
) -> int:
    """Of `base` products as large as the base's, and of the low-rank part's gradients."""
    rows, (r, K), N = prod(dy[:-1]), lora_A, lora_B[0]
    wide = (dx or dA) + dB  # dh = dy B, and dB = dy^T h
    narrow = dx + dA  # dh A, and dA = dh^T x
    return 2 * rows * (base * N * K + wide * N * r + narrow * r * K)


def _lora_linear(
    x: Shape,
    weight: Shape,
    bias: object,
    lora_A: Shape,
    lora_B: Shape,
    *_: object,
    **options: object,
) -> int:
    rows = prod(x[:-1])
    return 2 * rows * prod(weight) + _low_rank(rows, lora_A, lora_B)


def _lora_linear_bwd(
    dy: Shape, x: object, h: object, weight: object, lora_A: Shape, lora_B: Shape, *others: Any,
    **options: object,
) -> int:  # fmt: skip
    dx, dweight, _, dA, dB, _ = others[-1]
    return _backward(dy, lora_A, lora_B, dx + dweight, dx, dA, dB)


def _lora_linear_grouped(
    x: Shape,
    weight: Shape,
    bias: object,
    lora_A: Sequence[Shape],
    lora_B: Sequence[Shape],
    lora_bias: object,
    order: object,
    counts: Sequence[int],
    *_: object,
    **options: object,
) -> int:
    own = (_low_rank(rows, A, B) for rows, A, B in zip(counts, lora_A, lora_B, strict=True))
    return 2 * prod(x[:-1]) * prod(weight[-2:]) + sum(own)  # one matrix of a stack for each row


def _lora_linear_grouped_bwd(
    dy: Shape, x: object, h: object, weight: object, lora_A: Sequence[Shape],
    lora_B: Sequence[Shape], lora_bias: object, order: object, counts: Sequence[int], *others: Any,
    **options: object,
) -> int:  # fmt: skip
    (dx, dweight, *_), wanted = others[-2], others[-1]
    total = _backward(dy, (0, lora_A[0][1]), lora_B[0], dx + dweight, False, False, False)
    for rows, A, B, gradients in zip(counts, lora_A, lora_B, wanted, strict=True):
        dA, dB = bool(gradients & 1), bool(gradients & 2)
        total += _backward((rows, dy[-1]), A, B, 0, dx, dA, dB)
    return total


def _pairs(lora_A: Sequence[Shape], lora_B: Sequence[Shape], K: int) -> list[tuple[Shape, Shape]]:
    """Of each layer; of rank 0 where it has no adapter, which is a tensor [0]."""
    return [
        (A, B) if len(A) == 2 else ((0, K), (0, 0)) for A, B in zip(lora_A, lora_B, strict=True)
    ]


def _lora_linear_multi(
    x: Shape,
    weight: Sequence[Shape],
    bias: object,
    lora_A: Sequence[Shape],
    lora_B: Sequence[Shape],
    *_: object,
    **options: object,
) -> int:
    rows, pairs = prod(x[:-1]), _pairs(lora_A, lora_B, x[-1])
    return 2 * rows * sum(map(prod, weight)) + sum(_low_rank(rows, A, B) for A, B in pairs)


def _lora_linear_multi_bwd(
    dy: Sequence[Shape], x: Shape | None, h: object, weight: Sequence[Shape],
    lora_A: Sequence[Shape], lora_B: Sequence[Shape], *others: Any, **options: object,
) -> int:  # fmt: skip
    dx, wanted = _wanted(others)
    K = next((one[-1] for one in [*weight, *lora_A] if len(one) == 2), 0)
    total = 0
    for own, (A, _), gradients in zip(dy, _pairs(lora_A, lora_B, K), wanted, strict=True):
        dweight, dA, dB = (bool(gradients >> bit & 1) for bit in (1, 3, 4))
        total += _backward(own, A, (own[-1], A[0]), dx + dweight, dx, dA, dB)
    return total


def _lora_mlp(
    x: Shape,
    weight: Sequence[Shape],
    bias: object,
    lora_A: Sequence[Shape],
    lora_B: Sequence[Shape],
    *_: object,
    **options: object,
) -> int:
    entries = _lora_linear_multi(x, weight[:-1], bias, lora_A[:-1], lora_B[:-1])
    return entries + _lora_linear_multi(
        (*x[:-1], weight[-1][1]), weight[-1:], bias, *_last(lora_A, lora_B)
    )


def _lora_mlp_bwd(
    dy: Shape, x: Shape | None, made: Sequence[Shape], h: object, weight: Sequence[Shape],
    bias: object, lora_A: Sequence[Shape], lora_B: Sequence[Shape], *others: Any, **options: object,
) -> int:  # fmt: skip
    wants_x, wanted = _wanted(others)
    entries, rows = len(weight) - 1, dy[:-1]
    again = (
        0
        if made or x is None
        else _lora_linear_multi(x, weight[:-1], bias, lora_A[:-1], lora_B[:-1])
    )
    below = bool(wants_x or any(wanted[:entries]))
    total = again + _lora_linear_multi_bwd(
        [dy], (*rows, weight[-1][1]), h, weight[-1:], *_last(lora_A, lora_B), below, wanted[-1:]
    )
    if below:
        d_made = [(*rows, one[0]) for one in weight[:-1]]
        total += _lora_linear_multi_bwd(
            d_made, x, h, weight[:-1], lora_A[:-1], lora_B[:-1], wants_x, wanted[:-1]
        )
    return total


def _wanted(others: Sequence[Any]) -> tuple[bool, Sequence[int]]:
    """wants_x and wanted, which are the last arguments, or stand before dx_type."""
    end = len(others) if isinstance(others[-1], Sequence) else -1
    wants_x, wanted = others[:end][-2:]
    return wants_x, wanted


def _last(*lists: Sequence[Shape]) -> list[Sequence[Shape]]:
    return [one[-1:] for one in lists]


def _dora_linear(
    x: Shape,
    weight: Shape,
    bias: object,
    lora_A: Shape,
    lora_B: Shape,
    *_: object,
    **options: object,
) -> int:
    rows = prod(x[:-1])
    return 4 * rows * prod(weight) + _low_rank(rows, lora_A, lora_B)


def _dora_linear_bwd(
    dy: Shape, x: object, v: object, weight: object, lora_A: Shape, lora_B: Shape, *others: Any,
    **options: object,
) -> int:  # fmt: skip
    dx, _, dA, dB, _ = others[-1]
    return _backward(dy, lora_A, lora_B, 2 * dx, dx, dA, dB)


def _lora_embedding(
    indices: Shape, weight: Shape, lora_A: Shape, lora_B: Shape, *_: object, **options: object
) -> int:
    return 2 * prod(indices) * prod(lora_B)


def _lora_embedding_bwd(
    dy: Shape, indices: Shape, lora_A: Shape, lora_B: Shape, *others: Any, **options: object
) -> int:
    trained: Sequence[bool] = others[-1]
    return 2 * prod(indices) * prod(lora_B) * sum(trained)


def _update_of_weight(
    weight: Shape, lora_A: Shape, lora_B: Shape, *_: object, **options: object
) -> int:
    return 2 * prod(lora_B) * lora_A[1]


_FORMULAS: dict[Callable[..., int], tuple[str, ...]] = {
    _lora_linear: ("lora_linear", "lora_linear_fwd"),
    _lora_linear_bwd: ("lora_linear_bwd",),
    _lora_linear_grouped: ("lora_linear_grouped", "lora_linear_grouped_fwd"),
    _lora_linear_grouped_bwd: ("lora_linear_grouped_bwd",),
    _lora_linear_multi: ("lora_linear_multi", "lora_linear_multi_fwd"),
    _lora_linear_multi_bwd: ("lora_linear_multi_bwd",),
    _lora_mlp: ("lora_mlp", "lora_mlp_fwd"),
    _lora_mlp_bwd: ("lora_mlp_bwd",),
    _dora_linear: ("dora_linear", "dora_linear_fwd"),
    _dora_linear_bwd: ("dora_linear_bwd",),
    _lora_embedding: ("lora_embedding", "lora_embedding_fwd"),
    _lora_embedding_bwd: ("lora_embedding_bwd",),
    _update_of_weight: ("weight_norm", "merge_"),
}
for formula, names in _FORMULAS.items():
    operators = [getattr(torch.ops.lora_ext, name) for name in names]
    # Once, also where the package is imported again.
    register_flop_formula([one for one in operators if one not in flop_registry])(formula)
