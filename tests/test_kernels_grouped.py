"""The CUDA kernels of lora_linear_grouped, emulated on the host: against float64, mixed batches
against isolated ones bit for bit, and what is launched and copied."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from emulated import COMPLETIONS, EmulatedKernels
from emulated_gates import check_gated, make_gated
from emulated_grouped import (
    GRADIENTS,
    GroupedKernels,
    Problem,
    Results,
    Slot,
    check,
    make_problem,
    others_replaced,
)

import lora_ext

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> GroupedKernels:
    built = GroupedKernels.build(tmp_path_factory.mktemp("kernels"))
    assert isinstance(built, GroupedKernels)
    return built


def launched(kernels: GroupedKernels) -> list[str]:
    """The kernels since the last call, by their names."""
    names = [re.search(r"(\w+)_kernel\b", one.kernel) for one in kernels.take_recorded()]
    return [name[1] for name in names if name is not None]


def vary(kernels: GroupedKernels, seed: int) -> None:
    """The GPU, the order of its threads."""
    kernels.gpu((80, 86, 90)[seed % 3], (3, 132)[seed % 2])
    kernels.schedule(COMPLETIONS[seed // 3 % 3], seed % 4)


@pytest.mark.parametrize("seed", range(150))
def test_values_and_gradients(kernels: GroupedKernels, seed: int) -> None:
    vary(kernels, seed)
    check(kernels, make_problem(seed))
    assert kernels.path == "cuda hybrid sm_80"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_every_schedule(kernels: GroupedKernels, completion: str, seed: int) -> None:
    kernels.gpu(86, 3)
    kernels.schedule(completion, seed)
    check(kernels, make_problem(1000, sizes=(210, 520, 136), ranks=[8, 40, 3, 72]))


@pytest.mark.parametrize("gpu", [(86, 1), (80, 108), (90, 132)], ids=str)
def test_the_gpu_changes_nothing(kernels: GroupedKernels, gpu: tuple[int, int]) -> None:
    """Neither multiprocessors nor shared memory: the same bits."""
    kernels.schedule("eager", 0)
    problem = make_problem(1001, sizes=(300, 520, 264), ranks=[16, 100, 3, 0, 40])
    kernels.gpu(80, 3)
    want = results(kernels, problem)
    kernels.gpu(*gpu)
    found = results(kernels, problem)
    assert want.keys() == found.keys()
    assert all(torch.equal(want[name], found[name]) for name in want)


def results(kernels: GroupedKernels, problem: Problem) -> Results:
    made = kernels.forward(problem)
    return made | kernels.backward(problem, made.get("h"))


@pytest.mark.parametrize("seed", range(30))
def test_other_rows_change_no_bit(kernels: GroupedKernels, seed: int) -> None:
    kernels.gpu(86, 3)
    kernels.schedule("random", seed)
    problem = make_problem(2000 + seed)
    mixed = results(kernels, problem)
    for s in range(len(problem.slots)):
        rows = problem.rows(s)
        if len(rows) == 0:
            continue
        isolated = others_replaced(problem, s, seed)
        alone = results(kernels, isolated)
        for name in ("y", "dx"):
            assert torch.equal(mixed[name][rows], alone[name][rows]), (s, name)
        if "dfactor" in mixed:
            begin = sum(len(problem.rows(i)) for i in range(s))
            first = len(isolated.rows(0))
            own, other = (
                r["dfactor"][i : i + len(rows)] for r, i in ((mixed, begin), (alone, first))
            )
            assert torch.equal(own, other), s
        for name in GRADIENTS:
            if f"{name}.{s}" in mixed:
                assert torch.equal(mixed[f"{name}.{s}"], alone[f"{name}.1"]), (s, name)


@pytest.mark.parametrize("seed", range(90))
def test_rows_with_several_slots(kernels: GroupedKernels, seed: int) -> None:
    vary(kernels, seed)
    check_gated(kernels, make_gated(seed))
    assert kernels.path == "cuda hybrid sm_80"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_every_schedule_of_several_slots(
    kernels: GroupedKernels, completion: str, seed: int
) -> None:
    """In tiles that are whole, and such that are not."""
    kernels.gpu(86, 3)
    kernels.schedule(completion, seed)
    problem = make_problem(1003, sizes=(210, 264, 136), ranks=[8, 40, 3, 72])
    ids = torch.stack([torch.arange(210) % 5 - 1, torch.arange(210) // 3 % 4], 1)
    ids[ids[:, 0] == ids[:, 1], 0] = -1
    check_gated(kernels, replace(problem, ids=ids, factor=None))


@pytest.mark.parametrize("seed", range(10))
def test_other_slots_of_a_row_change_no_bit(kernels: GroupedKernels, seed: int) -> None:
    """Of a slot's gradients, nor of those of its gates: of other ranks, dropout and dtypes."""
    kernels.gpu(86, 3)
    kernels.schedule("random", seed)
    problem = make_gated(3000 + seed)
    mixed = results(kernels, problem)
    other = make_problem(
        seed, sizes=(*problem.x.shape, problem.dy.shape[1]), dtype=problem.x.dtype,
        ranks=[1 + 11 * s for s in range(len(problem.slots))],
    )  # fmt: skip
    begin = 0
    for s, slot in enumerate(problem.slots):
        slots = [*other.slots[:s], slot, *other.slots[s + 1 :]]
        found = results(kernels, replace(problem, slots=slots))
        for name in GRADIENTS:
            if f"{name}.{s}" in mixed:
                assert torch.equal(mixed[f"{name}.{s}"], found[f"{name}.{s}"]), (s, name)
        end = begin + len(problem.rows(s))
        if "dfactor" in mixed:
            assert torch.equal(mixed["dfactor"][begin:end], found["dfactor"][begin:end]), s
        begin = end


@pytest.mark.parametrize("slots", [2, 64])
def test_rounds_are_launches_of_what_adds_alone(kernels: GroupedKernels, slots: int) -> None:
    """Of rows that all have all slots: of y and dx one for each."""

    def passes() -> list[str]:
        return [name for name in launched(kernels) if name != "write_table"]

    kernels.gpu(86, 3)
    kernels.schedule("random", 5)
    M, K, N = 70, 72, 136
    problem = make_problem(13, sizes=(M, K, N), ranks=[8] * slots, dtype=BF16)
    plain = [
        replace(s, lora_A=s.lora_A.to(BF16), lora_B=s.lora_B.to(BF16), lora_bias=None)
        for s in problem.slots
    ]
    ids, factor = torch.arange(slots).expand(M, -1), torch.rand(M, slots)
    problem = replace(problem, slots=plain, ids=ids, factor=factor, keeps_h=True)
    (check_gated if slots < 10 else check)(kernels, problem)
    launched(kernels)
    made = kernels.forward(problem)
    adds = ["grouped_add_sm80"] * slots
    assert passes() == ["grouped_down_sm80", "grouped_finish", *adds]
    kernels.backward(problem, made["h"])
    names = ["finish", "up_grad_sm80", "finish", "down_grad_sm80"]
    assert passes() == [f"grouped_{name}" for name in names] + adds + ["grouped_reduce"]


def test_more_than_1023_slots(kernels: GroupedKernels) -> None:
    """One row each."""
    kernels.gpu(86, 3)
    kernels.schedule("eager", 0)
    slots = 1100
    ids = torch.randperm(slots + 40) - 40
    problem = make_problem(
        5, sizes=(slots + 40, 16, 8), ids=ids.clamp_min(-1), ranks=[1 + s % 9 for s in range(slots)]
    )
    launched(kernels)
    check(kernels, problem)
    assert len([name for name in launched(kernels) if name != "write_table"]) <= 12


def test_a_long_slot_among_short_ones(kernels: GroupedKernels) -> None:
    """Of several parts of dA and dB beside those of one."""
    kernels.gpu(86, 3)
    kernels.schedule("random", 1)
    ids = torch.full((2300,), 1)
    ids[::7], ids[5::31], ids[-1] = 0, -1, 2
    check(kernels, make_problem(6, sizes=(2300, 72, 64), ids=ids, ranks=[8, 24, 16]))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
def test_rows_further_apart(kernels: GroupedKernels, dtype: torch.dtype) -> None:
    kernels.gpu(90, 3)
    problem = make_problem(7, sizes=(70, 72, 136), dtype=dtype)

    def wider(matrix: torch.Tensor) -> torch.Tensor:
        return torch.cat([matrix, torch.full_like(matrix, torch.nan)], 1)[:, : matrix.shape[1]]

    check(kernels, replace(problem, x=wider(problem.x), dy=wider(problem.dy)))


@pytest.mark.parametrize("wants", [*itertools.product([False, True], repeat=3)], ids=str)
def test_some_gradients(kernels: GroupedKernels, wants: tuple[bool, ...]) -> None:
    """What is not wanted is not written; what is wanted is the same bit for bit."""
    kernels.gpu(86, 3)
    kernels.schedule("random", 2)
    problem = make_problem(1002, sizes=(140, 136, 72), ranks=[8, 17, 3, 70])
    everything = results(kernels, problem)
    names = ("dA", "dB", "dlora_bias")
    slots = [
        replace(
            slot, wants=tuple(n for n, want in zip(names, wants, strict=True) if want ^ (s == 1))
        )
        for s, slot in enumerate(problem.slots)
    ]
    for wants_x in (False, True):
        found = results(kernels, replace(problem, slots=slots, wants_x=wants_x))
        assert ("dx" in found) == wants_x
        for name, value in found.items():
            assert torch.equal(value, everything[name]), name


def test_masks_are_those_of_lora_linear(kernels: GroupedKernels) -> None:
    """Of the row in the call, whatever its place among those of its adapter."""
    M, K, r = 90, 264, 8
    state = torch.tensor([77, 12])
    ids = torch.arange(M) % 3 - 1
    A = torch.zeros(r, K)
    slots = [Slot(A.to(BF16), torch.eye(r, dtype=BF16), None, 1.0, p) for p in (0.3, 0.7)]
    ones = torch.ones(M, K, dtype=BF16)
    dy = torch.ones(M, r, dtype=BF16)
    problem = Problem(
        ones, dy, torch.zeros_like(dy), torch.zeros_like(ones), slots, ids, None, state
    )
    kernels.gpu(86, 3)
    masks = [lora_ext.dropout_mask(state, M, K, p) for p in (0.3, 0.7)]
    for first in range(0, K, r):  # h: lora_A picks columns
        A = torch.zeros(r, K)
        A[:, first : first + r] = torch.eye(r)
        of_columns = replace(problem, slots=[replace(s, lora_A=A.to(BF16)) for s in slots])
        y = kernels.forward(of_columns)["y"]
        for s, mask in enumerate(masks):
            rows = problem.rows(s)
            assert torch.equal(y[rows] != 0, mask[rows, first : first + r])
    ones_of_A = [replace(s, lora_A=torch.ones(r, K, dtype=BF16)) for s in slots]
    found = kernels.backward(replace(problem, slots=ones_of_A), torch.zeros(60 * r))
    for s, mask in enumerate(masks):
        rows = problem.rows(s)
        assert torch.equal(found["dx"][rows] != 0, mask[rows])
        # dh is the same for all rows, so dA counts what is kept of each column
        kept = mask[rows].sum(0) / mask[rows].sum()
        counted = found[f"dA.{s}"][0].float() / found[f"dA.{s}"][0].float().sum()
        torch.testing.assert_close(counted, kept.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("slots", [1, 3, 40])
def test_what_is_launched_and_read(kernels: GroupedKernels, slots: int) -> None:
    """One launch of each pass, whatever the slots; x, dy and the results go once."""
    kernels.gpu(86, 3)
    kernels.schedule("eager", 0)
    M, K, N, r = 160, 72, 136, 8
    ids = torch.arange(M) % slots
    problem = make_problem(8, sizes=(M, K, N), ids=ids, ranks=[r] * slots, dtype=BF16)
    plain = [
        replace(s, lora_A=s.lora_A.to(BF16), lora_B=s.lora_B.to(BF16), lora_bias=None)
        for s in problem.slots
    ]
    problem = replace(problem, slots=plain, factor=None, keeps_h=True)
    launched(kernels), kernels.take_launches()
    made = kernels.forward(problem)
    names = ["write_table", "grouped_down_sm80", "grouped_finish", "grouped_add_sm80"]
    assert launched(kernels) == names
    _, down, _, add = (one.copied_bytes for one in kernels.take_launches())
    tiles = sum(-(-len(problem.rows(s)) // 64) for s in range(slots))
    adapter = tiles * K * r * 2
    assert down == problem.x.nbytes + adapter
    operand = M * 16 * 2  # h, of whole steps
    blocks = -(-N // 128) if tiles <= 3 else 1
    assert add == problem.dy.nbytes + tiles * N * r * 2 + blocks * operand
    kernels.backward(problem, made["h"])
    names = ["finish", "up_grad_sm80", "finish", "down_grad_sm80", "add_sm80"]
    assert launched(kernels) == ["write_table"] + [f"grouped_{name}" for name in names] + (
        ["grouped_reduce"] if len(problem.rows(0)) > 64 else []
    )
    _, _, up_grad, _, down_grad, _ = [one.copied_bytes for one in kernels.take_launches()][:6]
    h = -(-N // 256) * M * r * 2 * 2
    assert up_grad == problem.dy.nbytes + tiles * N * r * 2 + h
    assert down_grad == problem.x.nbytes + M * r * 2 * 2


@pytest.mark.parametrize(("slots", "most"), [(2, 1), (300, 6)])
def test_the_table_goes_in_arguments_of_kernels(
    kernels: GroupedKernels, slots: int, most: int
) -> None:
    """So nothing is copied, and a graph that is replayed has it: one launch for 32 kB of it."""
    kernels.gpu(86, 3)
    kernels.schedule("random", 3)
    ids = torch.arange(310) % slots
    problem = make_problem(12, sizes=(310, 72, 136), ids=ids, ranks=[8] * slots)
    launched(kernels)
    check(kernels, problem)
    writes = launched(kernels).count("write_table")
    assert 2 <= writes <= 2 * most  # of forward and of backward


def test_nothing_is_launched_without_rows(kernels: GroupedKernels) -> None:
    problem = make_problem(9, sizes=(20, 64, 72), ids=torch.full((20,), -1), ranks=[8, 3])
    launched(kernels)
    check(kernels, problem)
    assert set(launched(kernels)) <= {"write_table", "grouped_reduce"}  # gradients of zero


@pytest.mark.parametrize(
    ("sizes", "rank", "capability", "reason"),
    [
        ((20, 64, 65), 8, 80, "no multiple of 16 bytes"),
        ((20, 66, 64), 8, 90, "no multiple of 16 bytes"),
        ((20, 64, 64), 257, 80, "ranks 1 to 256"),
        ((20, 64, 64), 8, 75, "from sm_80 on"),
    ],
)
def test_what_is_left_to_composed_products(
    kernels: GroupedKernels, sizes: tuple[int, int, int], rank: int, capability: int, reason: str
) -> None:
    kernels.gpu(capability, 3)
    problem = make_problem(10, sizes=sizes, ranks=[4, rank])
    launched(kernels)
    y = kernels.forward(problem)["y"]
    assert kernels.path == "cuda cublas" and reason in kernels.reason
    assert not launched(kernels) and torch.equal(y, problem.base_y)


def test_a_base_of_fp16_is_left_to_composed_products(kernels: GroupedKernels) -> None:
    """Unless the kernels are asked for: they round h and dh to fp16 as they are."""
    kernels.gpu(90, 3)
    problem = make_problem(10, sizes=(20, 64, 64), ranks=[4, 8], dtype=torch.float16)
    kernels.asks_in_fp16 = False
    try:
        kernels.forward(problem)
    finally:
        kernels.asks_in_fp16 = True
    assert kernels.path == "cuda cublas" and "fp16 without a scale" in kernels.reason


def test_every_launch_is_within_the_limits(kernels: GroupedKernels) -> None:
    """Of shared memory, for every width of ranks and adapters in float or not; no kernel runs."""
    EmulatedKernels.schedule(kernels, "eager", 0)
    for capability, multiprocessors in itertools.product((80, 86, 90), (1, 132)):
        kernels.gpu(capability, multiprocessors)
        for ranks in ([1], [17], [64, 3], [256, 8]):
            problem = make_problem(11, sizes=(70, 520, 2056), ranks=ranks)
            kernels.library.set_limits_only(True)
            try:
                results(kernels, problem)
            finally:
                kernels.library.set_limits_only(False)
                launched(kernels)
