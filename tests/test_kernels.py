"""The CUDA kernels of lora_linear, emulated on the host, against the reference in float64."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from emulated import COMPLETIONS, GPUS, TYPES, EmulatedKernels, Launch
from kernel_checks import Options, check, check_up_grad, check_wanted
from kernel_problems import (
    FEW_CASES,
    LIE,
    PAIRS,
    SCHEDULES,
    SIZES,
    Schedule,
    Size,
    padded,
    readable,
)  # fmt: skip
from problems import make_problem, rms

import lora_ext


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    return EmulatedKernels.shared(tmp_path_factory)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("types", TYPES.values())
@pytest.mark.parametrize(
    ("family", "size", "schedule"),
    [
        (family, size, schedule)
        for family in SIZES
        for size, schedule in zip(SIZES[family], itertools.cycle(SCHEDULES), strict=False)
    ],
    ids=readable,
)
def test_values_and_gradients(
    kernels: EmulatedKernels,
    family: str,
    size: Size,
    schedule: Schedule,
    types: str,
    dropout_p: float,
) -> None:
    check(kernels, size, types, dropout_p, schedule, family)


@pytest.mark.parametrize(
    ("family", "size", "types", "dropout_p", "schedule"),
    [
        (*pair, *others)
        for pair, *others in zip(
            PAIRS,
            itertools.cycle(TYPES.values()),
            itertools.cycle([0.0, 0.1, 0.1, 0.0, 0.1]),  # not in step with the types
            itertools.cycle(SCHEDULES),
            strict=False,
        )
    ],
    ids=readable,
)
def test_pairs_of_sizes(
    kernels: EmulatedKernels,
    family: str,
    size: Size,
    types: str,
    dropout_p: float,
    schedule: Schedule,
) -> None:
    check(kernels, size, types, dropout_p, schedule, family)


@pytest.mark.parametrize("dropout_p", [0.5, 0.9])
@pytest.mark.parametrize(
    "size", [(1, 72, 72, 1), (65, 131, 70, 17), (37, 136, 264, 80)], ids=readable
)
@pytest.mark.parametrize("family", SIZES)
def test_high_dropout(kernels: EmulatedKernels, family: str, size: Size, dropout_p: float) -> None:
    check(kernels, size, "bf16", dropout_p, ("random", 2), family)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("sm80", (200, 264, 136, 24)),
        ("sm80", (65, 131, 70, 17)),  # not aligned
        ("sm90", (130, 264, 264, 24)),
        ("sm90", (65, 136, 520, 80)),
    ],
    ids=readable,
)
def test_every_schedule(
    kernels: EmulatedKernels, family: str, size: Size, completion: str, seed: int, dropout_p: float
) -> None:
    check(kernels, size, "bf16", dropout_p, (completion, seed), family)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    "size", [(37, 72, 136, 8), (65, 131, 70, 17), (130, 264, 264, 80)], ids=readable
)
@pytest.mark.parametrize("family", SIZES)
def test_low_rank_part_alone(
    kernels: EmulatedKernels, family: str, size: Size, dropout_p: float
) -> None:
    """Without a weight: what a product by cuBLAS is added to."""
    check(kernels, size, "bf16", dropout_p, ("random", 1), family, base=False)


@pytest.mark.parametrize("base", [True, False], ids=["base", "low-rank"])
@pytest.mark.parametrize("types", ["bf16", "fp16-fp32"])
@pytest.mark.parametrize(
    "size", [(65, 131, 70, 17), (260, 328, 72, 16), (130, 264, 136, 200)], ids=readable
)
@pytest.mark.parametrize("family", SIZES)
def test_dropout_of_what_is_wanted(
    kernels: EmulatedKernels, family: str, size: Size, types: str, base: bool
) -> None:
    check_wanted(kernels, size, types, family, base)


@pytest.mark.parametrize("types", ["bf16", "fp16-fp32"])
@pytest.mark.parametrize(
    "size", [(37, 72, 136, 8), (65, 131, 70, 17), (130, 264, 264, 80)], ids=readable
)
@pytest.mark.parametrize("family", SIZES)
def test_transposed_weight(kernels: EmulatedKernels, family: str, size: Size, types: str) -> None:
    """As GPT-2's Conv1D keeps it: read as it lies, without a copy."""
    check(kernels, size, types, 0.1, ("random", 3), family, transposed=True)


@pytest.mark.parametrize("N", [64, 136])
@pytest.mark.parametrize("r", [33, 64, 100])
def test_ranks_of_a_pass_follow_the_shared_memory(kernels: EmulatedKernels, r: int, N: int) -> None:
    """99, 163 and 227 KiB: the same sums, in as many passes over dy as fit."""
    p = make_problem((70,), 72, N, r, dtype=torch.bfloat16)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    results, passes = [], []
    for capability in (86, 80, 100):
        kernels.gpu(capability)
        _, h = kernels.forward(x, weight, None, A, B)
        kernels.take_launches()
        results.append(kernels.backward(p.dy, x, h, weight, A, B))
        passes.append(len(kernels.take_launches()))
        assert kernels.path == "cuda fused sm_80"
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))
    more = -(-r // 32) - -(-r // 64) if N > 64 else 0
    assert passes == [passes[1] + more, passes[1], passes[1]]


@pytest.mark.parametrize(("lie", "family"), LIE.values(), ids=LIE.keys())
@pytest.mark.parametrize("which", ["x", "dy", "weight"])
def test_rows_that_lie_anyhow(
    kernels: EmulatedKernels, which: str, lie: Callable[[torch.Tensor], torch.Tensor], family: str
) -> None:
    """Read as they lie, by the kernels that can."""
    p = make_problem((37,), 72, 136, 8, dtype=torch.bfloat16)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    given = {"x": x, "dy": p.dy, "weight": weight}
    given[which] = lie(given[which])
    kernels.gpu(90)

    def run(
        x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor
    ) -> tuple[list[torch.Tensor], str]:
        y, h = kernels.forward(x, weight, None, A, B)
        return [y, h, *kernels.backward(dy, x, h, weight, A, B)], kernels.path

    want, path = run(**{name: matrix.contiguous() for name, matrix in given.items()})
    assert path == "cuda fused sm_90a"
    got, path = run(**given)
    assert path == f"cuda fused {family}"
    for a, b in zip(got, want, strict=True):
        if family == "sm_90a":
            assert torch.equal(a, b)
        else:  # sums in another order, then the same rounding, whose unit is 2^-8
            assert rms(a.double() - b.double()) <= 2**-8 * rms(b.double())


@pytest.mark.parametrize("which", ["x", "dy"])
def test_a_single_row_lies_anyhow(kernels: EmulatedKernels, which: str) -> None:
    """Its distance to the next row, which is not there, makes no difference."""
    p = make_problem((1,), 72, 136, 8, dtype=torch.bfloat16)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    kernels.gpu(90)
    results = []
    for lie in (lambda m: m, lambda m: padded(m, 3)):
        given = {"x": x, "dy": p.dy}
        given[which] = lie(given[which])
        kernels.take_launches()
        y, h = kernels.forward(given["x"], weight, None, A, B)
        (forward,) = kernels.take_launches()
        assert forward.copied_bytes > 0  # few rows are another kernel's
        results.append([y, h, *kernels.backward(given["dy"], given["x"], h, weight, A, B)])
        assert kernels.path == "cuda fused sm_90a"
        assert all(launch.copied_bytes == 0 for launch in kernels.take_launches())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


TOLD = [
    (capability, wish, M, K, N)
    for capability in (75, 80, 86, 90, 100, 120)
    for wish in ("auto", "hybrid", "composed")
    for M, K, N in ((66, 64, 72), (66, 66, 72), (66, 64, 65))
]
TOLD.append((90, "auto", 513, 64, 72))


@pytest.mark.parametrize(("capability", "wish", "M", "K", "N"), TOLD)
def test_what_is_told_is_launched(
    kernels: EmulatedKernels, capability: int, wish: str, M: int, K: int, N: int
) -> None:
    """The name of the path, and what its launches did."""
    p = make_problem((M,), K, N, 8, dtype=torch.bfloat16, bias=False)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    kernels.gpu(capability)
    kernels.wish(wish)
    try:
        kernels.take_launches()
        y, h = kernels.forward(x, weight, None, A, B)
        told, forward = kernels.path, kernels.take_launches()
        dx, _, _ = kernels.backward(p.dy, x, torch.zeros(M, 8), weight, A, B)
        assert kernels.path == told
    finally:
        kernels.wish("fused")
    launches = forward + kernels.take_launches()
    if told == "cuda cublas":
        assert launches == [] and y.isnan().all() and dx.isnan().all()
        return
    assert any(launch.wgmma for launch in launches) == told.endswith("sm_90a")
    assert any(launch.mma for launch in launches) == told.endswith("sm_80")
    # The low-rank part, and the base product only where it is the kernels'
    want = h.double() @ B.double().t()
    if "fused" in told:
        want += x.double() @ weight.double().t()
    assert rms(y.double() - want) <= 2**-7 * rms(want)


@pytest.mark.parametrize("wish", ["fused", "hybrid", "composed"])
@pytest.mark.parametrize(("capability", "family"), [(80, "sm80"), (90, "sm90")])
def test_what_is_recorded_is_what_runs(
    kernels: EmulatedKernels, capability: int, family: str, wish: str
) -> None:
    """A dry run tells the launches of a call, in their order, with kernels and grids."""
    M, K, N, r = 130, 72, 136, 8
    p = make_problem((M,), K, N, r, dtype=torch.bfloat16, bias=False)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    kernels.gpu(capability)
    kernels.wish(wish)
    try:
        dry = kernels.dry_run(M, N, K, r, "bf16", 0.0)
        kernels.take_launches()
        kernels.forward(x, weight, None, A, B)
        forward = kernels.take_recorded()
        kernels.backward(p.dy, x, torch.zeros(M, r), weight, A, B)
        assert dry == (forward, kernels.take_recorded())
        assert len(kernels.take_launches()) == sum(map(len, dry))
    finally:
        kernels.wish("fused")
    if wish == "composed":
        assert dry == ([], [])
        return
    names = [re.search(r"(\w+_kernel)<", launch.kernel)[1] for launch in forward]
    middle = "low_rank_down_sm80_kernel" if family == "sm80" else "low_rank_sm90_kernel"
    # On sm_90 the blocks that sum h are one, or a cluster.
    sums = ["lora_linear_finish_kernel"] if family == "sm80" else []
    assert names == [middle, *sums, f"product_{family}_kernel"]
    product = forward[-1]
    sizes = re.search(r"ProductShape<(\d+), (\d+)", product.kernel)
    assert sizes is not None
    rows, columns = (int(sizes[1]), int(sizes[2])) if family == "sm80" else (128, int(sizes[1]))
    tiles = -(-M // rows) * -(-N // columns)
    # A block for each tile on sm_80; on sm_90 one for each of two neighbouring multiprocessors.
    assert product.grid == (tiles if family == "sm80" else min(tiles, 2), 1, 1)
    wanted = (256, 1) if family == "sm80" else (384, 2)
    assert (product.block, product.cluster) == wanted and product.shared_bytes > 48 * 1024
    assert product.dependent == (family == "sm90")


@pytest.mark.parametrize(("family", "size", "schedule", "types"), FEW_CASES, ids=readable)
def test_few_rows_without_dropout(
    kernels: EmulatedKernels, family: str, size: Size, schedule: Schedule, types: str
) -> None:
    """One launch, the same to the bit whatever the number of multiprocessors, which chooses the
    columns of a block. The weight is read once, x and lora_A once for each cluster."""
    M, K, N, r = size
    has = Options(bias=M != 33, factor=M != 16, h=M != 64, processors=3)
    check(kernels, size, types, 0.0, schedule, family, has=has)
    base, adapter = next(dtypes for dtypes, name in TYPES.items() if name == types)
    p = make_problem((M,), K, N, r, dtype=base, adapter_dtype=adapter, bias=False)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    results = []
    for processors in (1, 8, 132):
        kernels.gpu(GPUS[family], processors)
        kernels.take_launches(), kernels.take_recorded()
        results.append(kernels.forward(x, weight, None, A, B))
        (recorded,), (launch,) = kernels.take_recorded(), kernels.take_launches()
        assert "few_rows_sm80_kernel" in recorded.kernel
        assert recorded.cluster == (4 if family == "sm90" else 1)
        clusters = recorded.grid[0] // recorded.cluster
        assert launch.copied_bytes == clusters * (x.nbytes + A.nbytes) + weight.nbytes
    for y, h in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(h, results[0][1])


@pytest.mark.parametrize(("M", "N", "K"), [(264, 264, 136), (264, 136, 264)])
@pytest.mark.parametrize("family", SIZES)
def test_self_check_finds_nothing_wrong(
    kernels: EmulatedKernels, family: str, M: int, N: int, K: int
) -> None:
    """Its expectations are the results of right kernels, to the bit."""
    kernels.gpu(GPUS[family])
    assert kernels.self_check(family, M, N, K) == ""


@pytest.mark.parametrize("family", SIZES)
def test_bias_is_added_before_the_only_rounding(kernels: EmulatedKernels, family: str) -> None:
    kernels.gpu(GPUS[family])
    M, N, K, r = 3, 136, 64, 8
    p = make_problem((M,), K, N, r, dtype=torch.bfloat16)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1))
    x = torch.zeros(M, K).bfloat16()
    x[:, 0] = 1
    weight, A, B = (t.detach() for t in (p.weight, p.lora_A, torch.zeros_like(p.lora_B)))
    y, _ = kernels.forward(x, weight, bias, A, B)
    assert torch.equal(y, (weight[:, 0].float() + bias).bfloat16().expand(M, N))


@pytest.mark.parametrize("r", [16, 24, 64])
def test_traffic_and_operations(kernels: EmulatedKernels, r: int) -> None:
    """x and dy are read once by the low-rank kernels; the base product reads each tile as often as
    its tiling says; h and B add ceil(r / 16) steps of k, and their own bytes."""
    M, K, N = 200, 272, 136
    p = make_problem((M,), K, N, r, dtype=torch.bfloat16, bias=False)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    rows, columns, x_columns = (-(-size // 64) for size in (M, N, K))  # tiles of 64
    steps, rank_steps = -(-K // 16), -(-r // 16)
    padded = 16 * rank_steps
    mma = 4 * 8  # of a tile of 64 x 64, for 16 of k

    kernels.gpu(80, 132)
    kernels.take_launches()
    _, h = kernels.forward(x, weight, None, A, B)
    down, finish, product = kernels.take_launches()
    assert down.copied_bytes == 2 * (M * K + rows * r * K)
    assert not any(finish)
    assert product.copied_bytes == 2 * (
        columns * M * K + rows * N * K + columns * M * padded + rows * N * r
    )
    assert product.mma == rows * columns * mma * (steps + rank_steps)

    kernels.backward(p.dy, x, h, weight, A, B)
    pack, up, finish, down, reduce, product = kernels.take_launches()
    h_and_rest, blocks = 2 * M * r, -(-K // 128)  # read by each block of columns
    assert up.copied_bytes == 2 * (M * N + rows * N * r + h_and_rest)
    assert down.copied_bytes == 2 * (M * K + blocks * h_and_rest)
    assert not any(map(any, (pack, finish, reduce)))
    assert product.copied_bytes == 2 * (
        x_columns * M * N + rows * N * K + x_columns * M * padded + rows * r * K
    )
    assert product.mma == rows * x_columns * mma * (-(-N // 16) + rank_steps)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("r", [16, 24, 64, 80])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(70, 72, 136), (200, 72, 272), (70, 512, 512)], ids=["64", "two", "256"]
)
def test_sm90_traffic_and_operations(
    kernels: EmulatedKernels, M: int, N: int, K: int, r: int, adapter_dtype: torch.dtype
) -> None:
    """TMA brings a tile of A and one of B for each 64 of k, and for each 64 of the rank; the rank
    costs ceil(r / 16) steps of wgmma. Float adapters are two matrices, one up to rank 32. What two
    rows of tiles share of B is read once where a cluster is worth it."""
    p = make_problem((M,), K, N, r, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, bias=False)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    kernels.gpu(90, 4)
    kernels.take_launches()
    kernels.take_recorded()
    _, h = kernels.forward(x, weight, None, A, B)
    product = kernels.take_launches()[-1]

    def steps(size: int, step: int) -> int:
        return -(-size // step)

    rank, matrices = 16 * steps(r, 16), 1  # of low-rank operands
    if adapter_dtype == torch.float32:
        rank, matrices = (2 * rank, 1) if r <= 32 else (rank, 2)
    rank_stages, rank_steps = matrices * steps(rank, 64), matrices * steps(rank, 16)

    def check(product: Launch, columns: int, depth: int) -> None:
        recorded = kernels.take_recorded()[-1]
        cluster, width = recorded.cluster, int(re.search(r"Shape<(\d+)", recorded.kernel)[1])
        assert cluster == (2 if M > 128 else 1)
        tiles = steps(M, 128) * steps(columns, width)
        stages = tiles * (steps(depth, 64) + rank_stages) * 2 * 64
        assert product.tma_bytes == stages * (128 + width)
        assert product.tma_read_bytes == stages * (128 + width // cluster)
        assert product.wgmma == tiles * 2 * (steps(depth, 16) + rank_steps)  # two warpgroups
        assert (product.copied_bytes, product.mma) == (0, 0)

    check(product, N, K)
    kernels.backward(p.dy, x, h, weight, A, B)
    check(kernels.take_launches()[-1], K, N)


@pytest.mark.parametrize(("r", "width"), [(8, 16), (24, 32), (64, 64), (80, 128)])
@pytest.mark.parametrize(("M", "N", "K"), [(200, 136, 272), (70, 1000, 520)])
def test_sm90_low_rank_traffic(
    kernels: EmulatedKernels, M: int, N: int, K: int, r: int, width: int
) -> None:
    """TMA brings each tile of x or dy once, with one of A or B; and h or dh, with what rounding
    them left, once for each block of columns. Beyond rank 64 dh and dB have passes of their own."""
    p = make_problem((M,), K, N, r, dtype=torch.bfloat16, bias=False)
    x, weight, _, A, B, _ = (t if t is None else t.detach() for t in p.operands)
    kernels.gpu(90, 4)
    kernels.take_launches()
    _, h = kernels.forward(x, weight, None, A, B)
    down, *_ = kernels.take_launches()
    kernels.backward(p.dy, x, h, weight, A, B)
    *up_grads, down_grad, _dx = (launch for launch in kernels.take_launches() if launch.wgmma)

    tile, operand = 2 * 128 * 128, 2 * 128 * width  # bytes
    rows, x_columns, dy_columns = (-(-size // 128) for size in (M, K, N))
    steps = 2 * 8  # of wgmma, for a tile and an operand: two warpgroups, 16 of 128 each
    assert down.tma_bytes == rows * x_columns * (tile + operand)
    assert down.wgmma == rows * x_columns * steps
    with_h = [(down_grad, x_columns, rows * x_columns * tile)]
    if r > 64:
        dh, dB = up_grads
        assert dh.tma_bytes == rows * dy_columns * (tile + operand)
        assert (dh.wgmma, dB.wgmma) == (rows * dy_columns * steps, 2 * rows * dy_columns * steps)
        with_h.append((dB, dy_columns, rows * dy_columns * tile))
    else:
        (up_grad,) = up_grads
        assert up_grad.wgmma == 3 * rows * dy_columns * steps
        with_h.append((up_grad, dy_columns, rows * dy_columns * (tile + operand)))
    for launch, columns, fixed in with_h:
        column_blocks, rest = divmod(launch.tma_bytes - fixed, rows * 2 * operand)
        assert rest == 0 and -(-columns // 4) <= column_blocks <= columns
    assert down_grad.wgmma == 2 * rows * x_columns * steps


@pytest.mark.parametrize("types", TYPES.values())
@pytest.mark.parametrize(("M", "N", "r"), [(1, 72, 1), (130, 264, 24), (200, 136, 64)])
@pytest.mark.parametrize("family", SIZES)
def test_up_grad_alone(
    kernels: EmulatedKernels, family: str, M: int, N: int, r: int, types: str
) -> None:
    check_up_grad(kernels, (M, N, r), types, ("random", M), family)


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
def test_masks_are_the_cpus(kernels: EmulatedKernels, dropout_p: float, family: str) -> None:
    """Read off results in which every kept element is nonzero, in each kernel that drops out."""
    kernels.gpu(GPUS[family])
    M, K, r = 64, 264, 64
    rng_state = torch.tensor([12345678901, 44])
    keep = lora_ext.dropout_mask(rng_state, M, K, dropout_p)
    options = {"dropout_p": dropout_p, "rng_state": rng_state}
    ones = torch.ones(M, K, dtype=torch.bfloat16)
    zero_weight, identity = torch.zeros(M, K).bfloat16(), torch.eye(M, r).bfloat16()

    for first in range(0, K - r, r):  # h: lora_A picks columns
        A = torch.zeros(r, K).bfloat16()
        A[:, first : first + r] = torch.eye(r)
        _, h = kernels.forward(ones, zero_weight, None, A, identity, **options)
        assert torch.equal(h != 0, keep[:, first : first + r])

    # dh is the identity, and so dA's rows and dx's are the masks'
    A = torch.ones(r, K).bfloat16()
    dx, dA, _ = kernels.backward(identity, ones, None, zero_weight, A, identity, **options)
    assert torch.equal(dA != 0, keep)
    assert torch.equal(dx != 0, keep)
