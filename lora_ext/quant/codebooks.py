"""What codes stand for: fp32 tables, made anew for each weight: none is shared by accident."""

from __future__ import annotations

import torch
from torch import Tensor

# Quantiles of the normal distribution, from QLoRA (https://arxiv.org/abs/2305.14314), as
# bitsandbytes rounds them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Twelfths, by the three bits below the sign: one sign, two exponent bits, one of the mantissa.
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def four_bit(quant_type: str, device: torch.device | None = None) -> Tensor:
    """[16] of "nf4" or "fp4". Code 8 of fp4 is plus zero, as in bitsandbytes' table."""
    if quant_type == "nf4":
        return torch.tensor(NF4, device=device)
    magnitudes = torch.tensor(FP4_TWELFTHS, device=device) / 12
    return torch.cat([magnitudes, 0 - magnitudes])


def dynamic(device: torch.device | None = None) -> Tensor:
    """[256]: bitsandbytes' signed dynamic map for 8 bits, sorted.

    A decimal exponent from -6 to 0, and the more bits for the fraction the larger it is: 2^i means
    of neighbours on an even grid of [0.1, 1]; with both signs, and 0 and 1.
    """
    magnitudes = []
    for i in range(7):
        grid = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        magnitudes.append(10 ** (i - 6) * ((grid[:-1] + grid[1:]) / 2))
    positive = torch.cat(magnitudes)
    table = torch.cat([positive, -positive, torch.tensor([0.0, 1.0])])
    return table.sort().values.to(device)


def integers(begin: int, end: int, bits: int) -> Tensor:
    """[2**bits]: code i stands for begin + i, or in two's complement where begin is -end."""
    table = torch.arange(begin, end, dtype=torch.float32)
    assert len(table) == 2**bits
    return table


def twos_complement(bits: int) -> Tensor:
    """[2**bits]: 0, 1, ... then the negative numbers."""
    half = 2 ** (bits - 1)
    return torch.cat([torch.arange(half), torch.arange(-half, 0)]).float()
