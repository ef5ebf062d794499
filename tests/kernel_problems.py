"""Sizes, schedules and layouts for tests/test_kernels.py."""

from __future__ import annotations

import itertools
import os

import torch
from emulated import COMPLETIONS, TYPES
from kernel_checks import OPTIONS, Options

Size = tuple[int, int, int, int]
Schedule = tuple[str, int]

# M, K, N, r. Every size meets every type and dropout, so every value does; and every two values of
# a family meet in PAIRS.
SIZES = {
    "sm80": [
        (1, 64, 72, 1),
        (37, 72, 136, 8),
        (200, 136, 64, 16),
        (37, 257, 512, 17),
        (200, 512, 257, 64),
        (65, 72, 40, 100),
    ],
    "sm90": [
        (1, 64, 72, 1),
        (37, 72, 136, 8),
        (200, 136, 64, 16),
        (37, 512, 512, 17),
        (200, 512, 136, 64),
        (65, 72, 40, 256),
        (37, 257, 72, 17),  # left to sm_80
    ],
}
if os.environ.get("LORA_EXT_ALL_SIZES"):  # hours of one core, for a change of the kernels
    EVERY = (1, 37, 200), (64, 72, 136, 257, 512), (64, 72, 136, 257, 512), (1, 8, 16, 17, 64)
    SIZES = {family: list(itertools.product(*EVERY)) for family in SIZES}
VALUES = {"sm80": (64, 72, 136, 257, 512), "sm90": (64, 72, 136, 512)}
PAIRS = [
    (family, ((1, 37, 200)[(i + 2 * j) % 3], K, N, (1, 8, 16, 17, 64)[(i + j) % 5]))
    for family, values in VALUES.items()
    for (i, K), (j, N) in itertools.product(enumerate(values), repeat=2)
]

SCHEDULES = [(completion, seed) for seed in range(4) for completion in COMPLETIONS]

# Of few rows without dropout: every size meets two types.
FEW = [
    (1, 8, 8, 1), (16, 520, 40, 8), (17, 264, 264, 12), (31, 72, 136, 17), (32, 2056, 72, 24),
    (33, 1032, 520, 15), (63, 136, 264, 8), (64, 520, 200, 8),
]  # fmt: skip
FEW_SM90 = [(1, 72, 520, 71), (33, 264, 136, 40), (64, 328, 520, 40)]
FEW_CASES = [
    (family, size, schedule, list(TYPES.values())[(i + j) % 4])
    for family, sizes in (("sm80", FEW), ("sm90", FEW + FEW_SM90))
    for i, (size, schedule) in enumerate(zip(sizes, itertools.cycle(SCHEDULES), strict=False))
    for j in range(2)
]
FEW_CASES += [("sm90", (16, 136, 264, 128), SCHEDULES[1], "bf16")]


def readable(value: object) -> str | None:
    """Of sizes, with the options that their number of rows brings along; of a schedule."""
    if not isinstance(value, tuple):
        return None
    if value in SCHEDULES:
        return "-".join(map(str, value))
    return f"{'x'.join(map(str, value))}-{OPTIONS.get(value[0], Options())}"


def padded(matrix: torch.Tensor, columns: int = 0, offset: int = 0) -> torch.Tensor:
    """The same numbers, rows `columns` further apart, the first `offset` elements later."""
    wider = torch.full((matrix.shape[0], matrix.shape[1] + columns + offset), torch.nan)
    wider = wider.to(matrix.dtype)
    wider[:, offset : offset + matrix.shape[1]] = matrix
    return wider[:, offset : offset + matrix.shape[1]]


# How x, dy and the weight lie, and what reads them on sm_90
LIE = {
    "further apart": (lambda m: padded(m, 8), "sm_90a"),
    "odd distance": (lambda m: padded(m, 3), "sm_80"),
    "odd address": (lambda m: padded(m, 7, 1), "sm_80"),
    "the same row": (lambda m: m[:1].expand_as(m), "sm_80"),
}
