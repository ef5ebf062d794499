"""Quantizing a matrix, to bitsandbytes' codes."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_ext.quant.bitsandbytes import BLOCK_SIZES, read_int8
from lora_ext.quant.checks import FLOATS, check_shape, fail, need_tensor
from lora_ext.quant.codebooks import dynamic, four_bit
from lora_ext.quant.weight import PANEL, NestedScales, QuantizedWeight

NESTED_BLOCK = 256
TINY = 1e-38  # bitsandbytes divides by no less
GRID = 65535


def quantize(
    weight: Tensor,
    quant_type: str,
    block_size: int | None = None,
    nested: bool = False,
    name: str = "weight",
) -> QuantizedWeight:
    """A matrix in 4 or 8 bits: codes and scales are those of bitsandbytes on the CPU, to the bit.

    Args:
        weight: [N, K] in fp32, fp16 or bf16. (bitsandbytes' Linear8bitLt rounds to fp16 first.)
        quant_type: "nf4", "fp4", or "int8" with one scale for each row.
        block_size: values that share a scale, in the order of the rows; by default 64. Not for
            int8.
        nested: whether the scales are quantized too, in 8 bits. Not for int8.
        name: of the tensor, for messages.

    Raises:
        ValueError: an argument that is none of these, or NaN or Inf in the weight.
    """
    if quant_type not in ("nf4", "fp4", "int8"):
        fail(name, "quant_type", quant_type, "'nf4', 'fp4' or 'int8'")
    plain = need_tensor(name, "weight", weight, FLOATS)
    shape = check_shape(name, tuple(plain.shape))
    if quant_type == "int8":
        if block_size is not None or nested:
            field = "nested" if nested else "block_size"
            fail(name, field, nested or block_size, "none: int8 has one fp32 scale for each row")
        return _int8(plain, shape, name)
    size = 64 if block_size is None else block_size
    if size not in BLOCK_SIZES:
        fail(name, "block_size", size, f"one of {list(BLOCK_SIZES)}")
    codebook = four_bit(quant_type, plain.device)
    codes, absmax = _four_bit(plain.reshape(-1), codebook, size)
    _check_finite(absmax, name)
    return QuantizedWeight(
        shape=shape,
        codes=codes,
        packing="high_first",
        scales=nested_scales(absmax) if nested else absmax,
        block_size=size,
        dtype=plain.dtype,
        codebook=codebook,
        name=name,
    )


def _check_finite(absmax: Tensor, name: str) -> None:
    """By the blocks' maxima, which NaN and Inf reach; a block with one would be all NaN."""
    if not torch.isfinite(absmax).all():
        fail(name, "values", "NaN or Inf", "finite ones")


def _int8(weight: Tensor, shape: tuple[int, int], name: str) -> QuantizedWeight:
    N, K = shape
    absmax = torch.empty(N, device=weight.device)
    codes = torch.empty(N, K, dtype=torch.int8, device=weight.device)
    step = max(1, PANEL // K)
    for i in range(0, N, step):
        rows = weight[i : i + step].float()
        top = absmax[i : i + step] = rows.abs().amax(dim=1)
        # A row of zeros is 0 / 0, of which bitsandbytes takes the integer part.
        rows = (rows * (127.0 / top.unsqueeze(1))).round_().masked_fill_((top == 0)[:, None], 0)
        codes[i : i + step] = rows.to(torch.int8)
    _check_finite(absmax, name)
    return read_int8(codes, absmax, name)


def _four_bit(flat: Tensor, codebook: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Packed codes and the blocks' absolute maxima. bitsandbytes multiplies whole blocks by the
    reciprocal and divides the last one, where it is shorter."""
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // size), device=flat.device)
    order = torch.argsort(codebook, stable=True)
    middles = (codebook[order[:-1]] + codebook[order[1:]]) / 2
    order = order.to(torch.uint8)

    def put(scaled: Tensor, first: int) -> None:
        if scaled.numel() % 2:
            scaled = torch.cat([scaled, scaled.new_zeros(1)])
        found = order[torch.bucketize(scaled.clamp_(-1, 1), middles)]
        codes[first // 2 : (first + scaled.numel()) // 2] = (found[::2] << 4) | found[1::2]

    whole = flat.numel() - flat.numel() % size
    step = max(1, PANEL // size) * size
    for first in range(0, whole, step):
        blocks = flat[first : min(first + step, whole)].float().view(-1, size)
        top = absmax[first // size : first // size + len(blocks)] = blocks.abs().amax(dim=1)
        put((blocks * (1.0 / top.clamp(min=TINY)).unsqueeze(1)).view(-1), first)
    if whole < flat.numel():
        rest = flat[whole:].float()
        absmax[-1] = rest.abs().max().clamp(min=TINY)
        put(rest / absmax[-1], whole)
    return codes, absmax


def nested_scales(absmax: Tensor) -> NestedScales:
    """Scales less their mean, as 8 bits. bitsandbytes looks up the nearest entry for each of 65536
    points of [-1, 1] and takes that of the point nearest to a number."""
    offset = absmax.mean()
    rest = absmax - offset
    table = dynamic(absmax.device)
    points = -1 + torch.arange(0, 2 * GRID + 2, 2, device=absmax.device).float() / GRID
    nearest = torch.bucketize(points, (table[:-1] + table[1:]) * 0.5).to(torch.uint8)
    tops = torch.stack([block.abs().max() for block in torch.split(rest, NESTED_BLOCK)])
    scaled = rest * (1 / tops).repeat_interleave(NESTED_BLOCK)[: len(rest)]
    # Code 0 where a block is all zeros, whose quotients are NaN.
    index = (scaled.clamp(-1, 1) + 1) * (0.5 * GRID) + 0.5
    codes = nearest[index.nan_to_num(0).int()]
    return NestedScales(codes, table, tops, NESTED_BLOCK, offset.item())
