"""Every launch of the kernels of lora_linear is one that the GPU takes: no more shared memory, no
more blocks and clusters than it has. Dry runs: the launchers work, no kernel runs."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from emulated import GPUS, TYPES, EmulatedKernels, operands_nowhere
from kernel_checks import check
from problems import make_problem

CARDS = (86, 90)  # with the least shared memory, and with launches of sm_90a
LAYERS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (72, 8200))  # N, K
GRADIENTS = ("dx", "dA", "dB")
FEWER = [
    [*missing] for count in range(1, 3) for missing in itertools.combinations(GRADIENTS, count)
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    return EmulatedKernels.shared(tmp_path_factory)


def test_however_many_rows_or_columns(kernels: EmulatedKernels) -> None:
    many = (1 << 31) - 1
    sizes = [(M, N, K) for M in (1, 4_194_241, 8_388_481, many) for N, K in ((64, 64), (65, 4096))]
    sizes += [(1, many // 8 * 8, 64), (1, 64, many // 8 * 8)]
    gpus = itertools.product((80, 86, 90, 100, 120), (1, 132))
    for gpu, (M, N, K), r in itertools.product(gpus, sizes, (8, 40, 256)):
        kernels.gpu(*gpu)
        kernels.dry_run(M, N, K, r, "bf16-fp32", 0.1)
        family = "sm_90a" if gpu[0] == 90 and N % 8 == 0 else "sm_80"
        assert kernels.path == f"cuda fused {family}"


@pytest.mark.parametrize("card", CARDS)
def test_of_every_rank(kernels: EmulatedKernels, card: int) -> None:
    """Whichever gradients are wanted, and whether h was kept."""
    kernels.gpu(card, 132)
    for r, (N, K), M in itertools.product(range(1, 257), LAYERS[:4], (200, 2048, 16384)):
        types = list(TYPES.values())[r % 4]
        kernels.dry_run(M, N, K, r, types, 0.1 * (r % 2), saved_h=r % 5 > 0)
        kernels.dry_run(M, N, K, r, types, 0.1 * (r % 2), without=FEWER[r % len(FEWER)])
    for r, without, M in itertools.product((1, 16, 40, 64, 65, 129, 192, 200, 256), FEWER, (8192,)):
        for types, p, (N, K) in itertools.product(("bf16", "bf16-fp32"), (0.0, 0.1), LAYERS):
            kernels.dry_run(M, N, K, r, types, p, without=without)


@pytest.mark.parametrize("card", CARDS)
def test_on_any_number_of_multiprocessors(kernels: EmulatedKernels, card: int) -> None:
    """As slices of a GPU have few of; with what the check at first use launches."""
    for multiprocessors in range(1, 201):
        kernels.gpu(card, multiprocessors)
        r = (16, 64, 130, 192)[multiprocessors % 4]
        for without in ([], *FEWER):
            kernels.dry_run(8192, *LAYERS[multiprocessors % 5], r, "bf16", 0.0, without=without)
        # csrc/kernels/self_check.h: dropout, then two layers of which dx alone is wanted
        for M, N, K in ((2056, 2056, 264), (2056, 264, 2056)):
            layers = [(N, 24), ((N // 2 + 7) // 8 * 8, 24)]
            kernels.dry_run(M, N, K, 24, "bf16", 0.5)
            if card == 90:  # on sm_80 layers with dropout run one by one
                kernels.dry_run_multi(M, K, layers, "bf16", 0.5, False)
            kernels.dry_run_multi(M, K, layers, "bf16", 0.0, True, without=["dA", "dB"])


@pytest.mark.parametrize("card", CARDS)
def test_of_layers_of_one_x(kernels: EmulatedKernels, card: int) -> None:
    widths = [4096, 1024, 1024, 14336]
    for count, r, M in itertools.product((2, 3, 4), range(1, 257, 17), (200, 8192)):
        kernels.gpu(card, 16 * count + r)
        layers = [(N, max(1, r - i)) for i, N in enumerate(widths[:count])]
        types = list(TYPES.values())[r % 4]
        kernels.dry_run_multi(M, 4096, layers, types, 0.0, False)
        for without in ([], *FEWER):
            kernels.dry_run_multi(M, 4096, layers, types, 0.0, True, without=without)


@pytest.mark.parametrize("card", CARDS)
def test_of_an_embedding(kernels: EmulatedKernels, card: int) -> None:
    ways: tuple[list[str], ...] = ([], ["saved_h", "dB"], ["h"])
    for r, M, N in itertools.product(range(1, 257, 5), (100, 8192), (768, 4096, 8192)):
        kernels.gpu(card, 132 - r % 100)
        for without in ways:
            kernels.dry_run_up_grad(M, N, r, list(TYPES.values())[r % 4], without)


@pytest.mark.parametrize("card", CARDS)
def test_ranks_beyond_256(kernels: EmulatedKernels, card: int) -> None:
    for r, types, p in itertools.product((257, 300, 512, 1000, 1024), TYPES.values(), (0.0, 0.1)):
        for N, K in LAYERS:
            kernels.gpu(card, 132)
            for without in ([], ["dB"], ["dx"]):
                kernels.dry_run(8192, N, K, r, types, p, without=without)


@pytest.mark.parametrize("r", [16, 136])
def test_wide_blocks_make_dx_and_dA_without_dB(kernels: EmulatedKernels, r: int) -> None:
    """Blocks have more tiles of columns than there would be room for the sums of dB."""
    kernels.gpu(90, 2)
    kernels.schedule("random", 1)
    p = make_problem((392,), 72, 1288, r, dtype=torch.bfloat16, bias=False)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    h = torch.zeros(392, r)
    everything = kernels.backward(p.dy, x, h, weight, A, B)
    fewer = kernels.backward(p.dy, x, None, weight, A, B, wanted="dx dA")
    # dh is a sum in another order: a last bit of it may differ.
    for got, same in zip(fewer[:2], everything[:2], strict=True):
        assert (got.double() - same.double()).norm() <= 2**-8 * same.double().norm()


@pytest.mark.parametrize("types", ["bf16", "bf16-fp32", "fp16-fp32"])
@pytest.mark.parametrize("r", [264, 300, 384, 512, 1000])
@pytest.mark.parametrize("family", GPUS)
def test_values_of_ranks_beyond_256(
    kernels: EmulatedKernels, family: str, r: int, types: str
) -> None:
    """By passes over x and dy for each group of the ranks, of which the last is narrow."""
    check(kernels, (130, 136, 72, r), types, 0.1, ("random", r), family)


@pytest.mark.parametrize("card", [80, 90])
def test_few_rows_are_told_where_their_kernel_runs(kernels: EmulatedKernels, card: int) -> None:
    """It reads lora_A 16 bytes at a time: of one that begins elsewhere nothing is told of it."""
    kernels.gpu(card, 132)
    kernels.wish("auto")
    try:
        for offset in (0, 2):
            one = operands_nowhere(8, 256, 256, 8, 0.0)
            one.lora_A += offset
            launches = kernels._dry(kernels.library.lora_forward, "bf16", ctypes.byref(one))
            told = kernels.library.last_reason().decode()
            runs = any("few_rows" in launch.kernel for launch in launches)
            assert runs == (offset == 0) == told.startswith("few rows")
    finally:
        kernels.wish("fused")
