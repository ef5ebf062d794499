"""One call of the emulated CUDA kernels of lora_linear against the reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from emulated import GPUS, EmulatedKernels, Launch
from problems import (
    UNIT,
    exact_results,
    expected_sizes,
    kernel_bound,
    make_problem,
    plain_results,
    rms,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Options(NamedTuple):
    """What a call has besides its sizes and types."""

    bias: bool = True
    factor: bool = True  # the scaling is a tensor's, too
    h: bool = True  # kept for backward, which makes it again otherwise
    processors: int = 3

    def __str__(self) -> str:
        words = [name for name in ("bias", "factor", "h") if getattr(self, name)]
        return ",".join([*words, f"{self.processors}SM"])


# Of the calls with so many rows; of all others the default
OPTIONS = {
    1: Options(factor=False, processors=132),
    37: Options(bias=False, processors=1),
    130: Options(h=False),
    200: Options(h=False),
}


def check_instructions(launches: list[Launch], tma: list[bool]) -> None:
    """Which of the launches that copy and multiply do it by TMA and wgmma, and nothing else."""
    busy = [launch for launch in launches if any(launch)]
    for launch, wanted in zip(busy, tma, strict=True):
        assert (launch.tma_bytes > 0, launch.wgmma > 0) == (wanted, wanted)
        assert (launch.copied_bytes + launch.mma == 0) == wanted


def check(
    kernels: EmulatedKernels,
    size: tuple[int, int, int, int],
    types: str,
    dropout_p: float,
    schedule: tuple[str, int],
    family: str = "sm80",
    base: bool = True,
    transposed: bool = False,
    has: Options | None = None,
) -> None:
    """Forward and backward of one problem under one schedule; `base`: with the base product;
    `transposed`: the weight lies as [K, N]; `has`: other options than those of so many rows."""
    M, K, N, r = size
    dtype, adapter = (DTYPES[name] for name in (types.split("-") * 2)[:2])
    has = has or OPTIONS.get(M, Options())
    kernels.gpu(GPUS[family], has.processors)
    p = make_problem(
        (M,), K, N, r, dtype=dtype, adapter_dtype=adapter, dropout_p=dropout_p, bias=has.bias
    )
    if not base:
        p.weight.data.zero_()
    kernels.schedule(*schedule)
    factor = torch.tensor(4.0) if has.factor else None
    scaling = p.scaling if factor is None else p.scaling / 4
    options = {"scaling": scaling, "scaling_factor": factor}
    options |= {"dropout_p": dropout_p, "rng_state": p.rng_state}
    x, weight, bias, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    bias = bias if bias is None else bias.float()
    weight = weight.t().contiguous().t() if transposed else weight
    weight = weight if base else None
    kernels.take_launches()
    y, h = kernels.forward(x, weight, bias, A, B, **options)
    forward = kernels.take_launches()
    dx, dA, dB = kernels.backward(p.dy, x, h if has.h else None, weight, A, B, **options)
    backward = kernels.take_launches()
    # TMA reads x, dy and weight where all their rows begin at multiples of 16 bytes.
    tma = family == "sm90" and K % 8 == 0 and N % 8 == 0
    assert kernels.path == f"cuda fused {'sm_90a' if tma else 'sm_80'}"
    down = [tma] * -(-r // (128 if tma else 64))  # h; computed anew if it is not given
    if tma:  # over dy for dh and dB, one each beyond rank 64; over x for dA
        passes = [tma] * (-(-r // 128) * (2 if r > 64 else 1) + -(-r // 128))
    else:
        up_ranks = 32 if GPUS[family] == 86 and N > 64 else 64
        passes = [tma] * (-(-r // up_ranks) + -(-r // 64))
    # Of few rows without dropout all is one kernel's, whose threads read by themselves.
    read = M + r * (2 if adapter == torch.float32 else 1)
    most_rank, most_read = (128, 144) if tma else (64, 80 if N < 2048 else 96)
    few = base and M <= 64 and r <= most_rank and read <= most_read and dropout_p == 0
    few &= not transposed and K % 8 == 0
    check_instructions(forward, [False] if few else [*down, tma])
    check_instructions(backward, [*([] if has.h else down), *passes, tma])
    want, sizes, plain = exact_results(p), expected_sizes(p), plain_results(p)
    for name, got in (("y", y), ("x", dx), ("lora_A", dA), ("lora_B", dB)):
        bound = kernel_bound(p, got.dtype)
        error = rms(got.double() - want[name])
        assert error <= bound * sizes[name], name
        if base and got.dtype == x.dtype:
            # Of plain PyTorch on the CPU. The RMS of n roundings tells their size to 1 / sqrt(2 n),
            # four times of which both may be off.
            noise = 1 + 8 / (2 * got.numel()) ** 0.5
            assert error <= noise * rms(plain[name].double() - want[name]), name


def check_wanted(
    kernels: EmulatedKernels, size: tuple[int, int, int, int], types: str, family: str, base: bool
) -> None:
    """dx takes its mask from the pass that makes dA, and draws it where there is none: the same bit
    for bit, as dA is if no dx asks for the mask."""
    M, K, N, r = size
    kernels.gpu(GPUS[family], 3)
    dtype, adapter = (DTYPES[name] for name in (types.split("-") * 2)[:2])
    p = make_problem((M,), K, N, r, dtype=dtype, adapter_dtype=adapter, dropout_p=0.3)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    options = {"dropout_p": 0.3, "rng_state": p.rng_state}

    def run(wanted: str) -> tuple[torch.Tensor, ...]:
        kernels.schedule("random", 1)
        given = p.dy, x, None, weight if base else None, A, B
        return kernels.backward(*given, **options, wanted=wanted)

    names = ("dx", "dA", "dB")
    everything = run("dx dA dB")
    for wanted in ("dx", "dA", "dx dA", "dx dB"):
        for name, got, same in zip(names, run(wanted), everything, strict=True):
            assert torch.equal(got, same) == (name in wanted.split()), (wanted, name)


def check_up_grad(
    kernels: EmulatedKernels,
    size: tuple[int, int, int],
    types: str,
    schedule: tuple[str, int],
    family: str,
) -> None:
    """dh and dB of dy [M, N] together, and each alone."""
    M, N, r = size
    dtype, adapter = (DTYPES[name] for name in (types.split("-") * 2)[:2])
    kernels.gpu(GPUS[family])
    kernels.schedule(*schedule)
    generator = torch.Generator().manual_seed(M)
    dy, B, h = (torch.randn(*of, generator=generator) for of in ((M, N), (N, r), (M, r)))
    dy, B = dy.to(dtype), B.to(adapter)
    want = 0.5 * dy.double() @ B.double(), 0.5 * dy.double().t() @ h.double()
    kernels.take_launches()
    both = kernels.up_grad(dy, h, B, 0.5)
    if family == "sm90":  # dh and dB by themselves beyond rank 64
        check_instructions(kernels.take_launches(), [True] * (1 if r <= 64 else 2 * -(-r // 128)))
    else:
        ranks = 32 if GPUS[family] == 86 and N > 64 else 64
        check_instructions(kernels.take_launches(), [False] * -(-r // ranks))
    alone = kernels.up_grad(dy, None, B, 0.5)[0], kernels.up_grad(dy, h, B, 0.5, wants_dh=False)[1]
    for results in (both, alone):
        for got, exact, depth in zip(results, want, (N, M), strict=True):
            # Operands in float are two of 16 bits; what is stored in 16 bits is rounded once more.
            rounded = 2 * UNIT[got.dtype] if got.dtype != torch.float32 else 0.0
            bound = rounded + 3 * UNIT[dtype] ** 2 + UNIT[torch.float32] * depth**0.5
            assert rms(got.double() - exact) <= bound * rms(exact)
