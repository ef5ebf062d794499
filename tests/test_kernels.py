"""The CUDA kernels of lora_linear, emulated on the host, against the reference in float64."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from emulated import COMPLETIONS, TYPES, EmulatedKernels
from problems import NAMES, gradients, make_problem, rms

UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-24}
SIZES = [
    (1, 64, 72, 1),
    (37, 72, 136, 8),
    (200, 136, 64, 16),
    (37, 257, 512, 17),
    (200, 512, 257, 64),
    (65, 72, 40, 100),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    return EmulatedKernels.build(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_values_and_gradients(
    kernels: EmulatedKernels,
    size: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    dropout_p: float,
) -> None:
    M, K, N, r = size
    p = make_problem(
        (M,), K, N, r, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=dropout_p, bias=M != 37
    )
    options = {"scaling": p.scaling, "dropout_p": dropout_p, "rng_state": p.rng_state}
    schedules = itertools.cycle(itertools.product(COMPLETIONS, range(4)))
    kernels.schedule(*next(itertools.islice(schedules, (M + r) % 12, None)))
    x, weight, bias, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    y, h = kernels.forward(x, weight, bias, A, B, **options)
    dx, dA, dB = kernels.backward(p.dy, x, h if M % 2 else None, weight, A, B, **options)

    exact = p.exact_operands()
    exact_y = p.plain(*exact)
    want = dict(zip([n for n, t in zip(NAMES, exact, strict=True) if t is not None],
                    gradients(exact_y, exact, p.dy.double()), strict=True))  # fmt: skip
    for name, got, expected in (
        ("y", y, exact_y),
        ("dx", dx, want["x"]),
        ("dA", dA, want["lora_A"]),
        ("dB", dB, want["lora_B"]),
    ):
        # h and dh are rounded for the base product's sums, and the result once. The gradient of a
        # float adapter is not rounded, but its three factors are 16 bits and a remainder of as many;
        # those of fp16 are denormal here, multiples of 2^-24.
        terms = max(M, N, K)
        roundings = 2 * UNIT[x.dtype] if got.dtype == x.dtype else 3 * UNIT[x.dtype] ** 2
        if (x.dtype, got.dtype) == (torch.float16, torch.float32):
            roundings += 2.0**-25 * (1 / rms(A) + 1 / rms(B))
        bound = roundings + UNIT[torch.float32] * terms**0.5
        assert rms(got.double() - expected) <= bound * rms(expected), name
