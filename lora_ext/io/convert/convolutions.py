"""loralib's update of a convolution's weight as a convolution's lora_A and lora_B, and back.

loralib multiplies two matrices, lora_B [rows, r k] and lora_A [r k, columns], and takes the
product's elements, in the order in which they lie, for those of the weight. So an output channel is
one or several rows of the product, or parts of rows where the convolution has groups. PEFT's
lora_A is [rank, in, k, ...], of which each output channel takes a combination. Both are exact:
elements are placed, none is computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sizes_fit(shape: tuple[int, ...], groups: int, A: tuple[int, int], B: tuple[int, int]) -> bool:
    """Whether two matrices are of an update of such a weight."""
    k = shape[-1]
    fit = A[0] == B[1] and A[0] % k == 0 and A[1] == shape[1] * groups * k
    return fit and all(size == k for size in shape[2:]) and B[0] * A[1] == math.prod(shape)


def from_product(
    A: Tensor,  # [r k, columns]
    B: Tensor,  # [rows, r k]
    shape: tuple[int, ...],  # [out, in / groups, k, ...]
    groups: int,
) -> tuple[Tensor, Tensor]:
    """lora_A [groups * kinds * r k, in, k, ...] and lora_B [out, kinds * r k, 1, ...]."""
    out, size, columns = shape[0], math.prod(shape[1:]), A.shape[1]
    ones = [1] * (len(shape) - 2)
    pieces = [_pieces(channel * size, size, columns) for channel in range(out)]
    kinds = sorted({piece[1:] for channel in pieces for piece in channel})
    place = {kind: at for at, kind in enumerate(kinds)}
    wide_A = A.new_zeros(len(kinds), A.shape[0], size)
    for (begin, column, length), at in place.items():
        wide_A[at, :, begin : begin + length] = A[:, column : column + length]
    wide_B = B.new_zeros(out, len(kinds), A.shape[0])
    for channel, own in enumerate(pieces):
        for row, *kind in own:
            wide_B[channel, place[kind[0], kind[1], kind[2]]] = B[row]
    one_group = wide_A.reshape(-1, *shape[1:])
    every = one_group.repeat(groups, *[1] * (len(shape) - 1))
    return full(every, groups), wide_B.reshape(out, -1, *ones)


def full(A: Tensor, groups: int) -> Tensor:
    """PEFT's lora_A [r, in, k, ...] of one with groups, [r, in / groups, k, ...]: zeros between."""
    if groups == 1:
        return A
    wide = A.new_zeros(groups, A.shape[0] // groups, groups, *A.shape[1:])
    for group, part in enumerate(A.chunk(groups)):
        wide[group, :, group] = part
    return wide.reshape(A.shape[0], -1, *A.shape[2:])


def grouped(A: Tensor, groups: int) -> Tensor | None:
    """The inverse; None where lora_A is not zero between the groups."""
    if groups == 1:
        return A
    if A.shape[0] % groups or A.shape[1] % groups:
        return None
    blocks = A.reshape(groups, A.shape[0] // groups, groups, -1, *A.shape[2:])
    own = torch.cat([blocks[group, :, group] for group in range(groups)])
    return own if torch.equal(full(own, groups), A) else None


def _pieces(begin: int, size: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Of one output channel: (row of the product, place in the channel, column, length)."""
    found, done = [], 0
    while done < size:
        row, column = divmod(begin + done, columns)
        length = min(columns - column, size - done)
        found.append((row, done, column, length))
        done += length
    return found


def as_product(A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor, int] | None:
    """loralib's lora_A, lora_B and r of PEFT's; None where the product cannot be written so.

    What `from_product` made comes back as it was. Any other without groups has loralib's form with
    the same r: each output channel takes its k rows of the product from the k parts of lora_A.
    """
    k, out = A.shape[-1], B.shape[0]
    own = grouped(A, groups)
    if own is None or any(size != k for size in A.shape[2:]):
        return None
    A = own
    if (narrow := _narrow(A, B, groups)) is not None:
        return *narrow, narrow[0].shape[0] // k
    if groups != 1:
        return None
    parts = k ** (A.dim() - 3)  # rows of the product for a channel: k of Conv2d
    r = A.shape[0] * max(1, parts // k)  # more for Conv3d
    rows = A.reshape(A.shape[0], parts, -1).transpose(0, 1).flatten(0, 1)  # [parts rank, columns]
    wide = B.new_zeros(out, parts, parts, A.shape[0])
    for part in range(parts):
        wide[:, part, part] = B.reshape(out, -1)
    wide = wide.reshape(out * parts, -1)
    if missing := r * k - rows.shape[0]:  # Conv1d: loralib's lora_A has k times as many rows
        rows = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
        wide = torch.cat([wide, wide.new_zeros(len(wide), missing)], 1)
    return rows, wide, r


def _narrow(A: Tensor, B: Tensor, groups: int) -> tuple[Tensor, Tensor] | None:
    """The product's factors of what `from_product` makes."""
    k, out, shape = A.shape[-1], B.shape[0], (B.shape[0], *A.shape[1:])
    size, inputs = math.prod(shape[1:]), A.shape[1] * groups
    columns = inputs * k
    if out * size % columns or A.shape[0] % groups:
        return None
    pieces = [_pieces(channel * size, size, columns) for channel in range(out)]
    kinds = sorted({piece[1:] for channel in pieces for piece in channel})
    rank, left = divmod(A.shape[0] // groups, len(kinds))
    if left or rank % k or not rank:
        return None
    wide_A = A.reshape(groups, len(kinds), rank, size)[0]
    wide_B = B.reshape(out, len(kinds), rank)
    narrow_A = A.new_zeros(rank, columns)
    for at, (begin, column, length) in enumerate(kinds):
        narrow_A[:, column : column + length] = wide_A[at, :, begin : begin + length]
    narrow_B = B.new_zeros(out * size // columns, rank)
    for channel, own in enumerate(pieces):
        for row, *kind in own:
            narrow_B[row] = wide_B[channel, kinds.index((kind[0], kind[1], kind[2]))]
    again = from_product(narrow_A, narrow_B, shape, groups)
    same = torch.equal(again[0], full(A, groups)) and torch.equal(again[1].reshape_as(B), B)
    return (narrow_A, narrow_B) if same else None
