"""The CUDA kernels of lora_linear, emulated on the host, against the reference in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from emulated import COMPLETIONS, TYPES, EmulatedKernels
from problems import NAMES, Problem, gradients, make_problem, rms
from torch import Tensor

UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-24}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES = [
    (1, 64, 72, 1),
    (37, 72, 136, 8),
    (200, 136, 64, 16),
    (37, 257, 512, 17),
    (200, 512, 257, 64),
    (65, 72, 40, 100),
]


def exact_results(p: Problem) -> dict[str, Tensor]:
    operands = p.exact_operands()
    y = p.plain(*operands)
    names = [name for name, tensor in zip(NAMES, operands, strict=True) if tensor is not None]
    grads = gradients(y, operands, p.dy.double())
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def expected_sizes(p: Problem) -> dict[str, float]:
    """RMS of each result if the signs of its terms were random: the same sums of squares."""
    squares = copy.copy(p)
    for name in (*NAMES, "dy"):
        tensor = getattr(p, name)
        if tensor is not None:
            setattr(squares, name, tensor.detach().double().square().requires_grad_(name != "dy"))
    squares.scaling = p.scaling**2
    return {name: t.mean().sqrt().item() for name, t in exact_results(squares).items()}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    return EmulatedKernels.build(tmp_path_factory.mktemp("kernels"))


def check(
    kernels: EmulatedKernels,
    size: tuple[int, int, int, int],
    types: tuple[str, str],
    dropout_p: float,
    schedule: tuple[str, int],
) -> None:
    """Forward and backward of one problem under one schedule."""
    M, K, N, r = size
    base, adapter = (DTYPES[name] for name in types)
    p = make_problem(
        (M,), K, N, r, dtype=base, adapter_dtype=adapter, dropout_p=dropout_p, bias=M != 37
    )
    kernels.schedule(*schedule)
    options = {"scaling": p.scaling, "dropout_p": dropout_p, "rng_state": p.rng_state}
    x, weight, bias, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    y, h = kernels.forward(x, weight, bias, A, B, **options)
    dx, dA, dB = kernels.backward(p.dy, x, h if M % 2 else None, weight, A, B, **options)
    want, sizes = exact_results(p), expected_sizes(p)
    for name, got in (("y", y), ("x", dx), ("lora_A", dA), ("lora_B", dB)):
        # h and dh are rounded for the base product's sums, and the result once. The gradient of a
        # float adapter is not, but its three factors are 16 bits and a remainder of as many; those
        # of fp16 are denormal here, multiples of 2^-24.
        roundings = 2 * UNIT[x.dtype] if got.dtype == x.dtype else 3 * UNIT[x.dtype] ** 2
        if (x.dtype, got.dtype) == (torch.float16, torch.float32):
            roundings += 2.0**-25 * (1 / rms(A) + 1 / rms(B))
        bound = roundings + UNIT[torch.float32] * max(M, N, K) ** 0.5
        assert rms(got.double() - want[name]) <= bound * sizes[name], name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("types", TYPES.values())
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_values_and_gradients(
    kernels: EmulatedKernels, size: tuple[int, int, int, int], types: str, dropout_p: float
) -> None:
    base, adapter = (types.split("-") * 2)[:2]
    schedules = list(itertools.product(COMPLETIONS, range(4)))
    schedule = schedules[(size[0] + size[3]) % len(schedules)]
    check(kernels, size, (base, adapter), dropout_p, schedule)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_schedule(
    kernels: EmulatedKernels, completion: str, seed: int, dropout_p: float
) -> None:
    for size in ((200, 264, 136, 24), (65, 131, 70, 17)):  # aligned and not
        check(kernels, size, ("bf16", "bf16"), dropout_p, (completion, seed))
