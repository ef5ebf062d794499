"""The benchmark's checks of its contenders, and its counts of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich")

from lora_ext.bench.cli import main
from lora_ext.bench.grid import FWD, FWD_BWD, Case
from lora_ext.bench.measure import Budget, saved_bytes
from lora_ext.bench.problem import SCALING, Problem, make_problem
from lora_ext.bench.results import FAILED, OK, WRONG
from lora_ext.bench.rivals import RIVALS, Contender, Rival, torch_keep_mask
from lora_ext.bench.runner import run_case

K, N, M, R = 32, 48, 5, 4
CPU = torch.device("cpu")
TINY = Case(in_features=K, out_features=N, tokens=M, rank=R, dtype="fp32", dropout_p=0.0)
BUDGET = Budget(seconds=0.01, min_rounds=3, max_rounds=3)


# Threads that wait for each other on a busy machine would make these tests slow.
pytestmark = pytest.mark.usefixtures("one_thread")


# Correctness before speed


class Planted(nn.Module):
    """A layer with replaceable forward terms, to plant faults in."""

    def __init__(self, problem: Problem, delta: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(problem.weight, requires_grad=False)
        self.lora_A = nn.Parameter(problem.lora_A.clone())
        self.lora_B = nn.Parameter(problem.lora_B.clone())
        self.delta = delta

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.delta(x, self.lora_A, self.lora_B)


def planted(delta: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rival:
    def build(problem: Problem) -> Contender:
        layer = Planted(problem, delta)
        return Contender(layer, (layer.lora_A, layer.lora_B))

    return Rival("planted", build, keep_mask=torch_keep_mask)


def lora(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return SCALING * (x @ lora_A.T) @ lora_B.T


def other_grad(tensor: Tensor, factor: float) -> Tensor:
    """Return the same values with a gradient that is off by a factor."""
    return tensor * factor + (tensor * (1 - factor)).detach()


def one_element_off(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    y = lora(x, lora_A, lora_B)
    return y + torch.zeros_like(y).index_put((torch.tensor(M - 1), torch.tensor(N - 1)), y[0, 0])


FAULTS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "no scaling": (lambda x, A, B: lora(x, A, B) / SCALING, "y"),
    "one element": (one_element_off, "y"),
    "nan": (lambda x, A, B: lora(x, A, B) * float("nan"), "y: not finite"),
    "shape": (lambda x, A, B: lora(x, A, B)[None], "y (no_grad): shape"),
    "dx without LoRA": (lambda x, A, B: lora(x.detach(), A, B), "dx"),
    "-dA": (lambda x, A, B: lora(x, other_grad(A, -1.0), B), "dA"),
    "half dB": (lambda x, A, B: lora(x, A, other_grad(B, 0.5)), "dB"),
    "dA off by 1 %": (lambda x, A, B: lora(x, other_grad(A, 1.01), B), "dA"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_contender_is_marked_and_not_timed(fault: str) -> None:
    delta, where = FAULTS[fault]
    (rows,) = run_case(TINY, [planted(delta)], [FWD_BWD], BUDGET, CPU)
    frozen, wrong = rows
    assert (frozen.status, wrong.status) == (OK, WRONG)
    assert wrong.timing is None
    assert wrong.note and wrong.note.startswith(where)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_right_contender_passes(dtype: str) -> None:
    (rows,) = run_case(replace(TINY, dtype=dtype), [planted(lora)], [FWD], BUDGET, CPU)
    assert [row.status for row in rows] == [OK, OK]
    assert rows[1].errors.keys() == {"y", "y (no_grad)", "dx", "dA", "dB"}


def test_ten_times_the_error_of_the_naive_layer_is_too_much() -> None:
    """Twice as much, and a floor, here less than three times the error, is allowed."""
    case = replace(TINY, dtype="bf16")
    (rows,) = run_case(case, [RIVALS["naive"]], [FWD], BUDGET, CPU)
    error = rows[1].errors["y"]["value"]
    off = planted(lambda x, A, B: lora(x, A, B) + 10 * error)
    (rows,) = run_case(case, [off], [FWD], BUDGET, CPU)
    assert rows[1].status == WRONG
    assert rows[1].note and rows[1].note.startswith("y")


def test_a_wrong_dropout_scale_is_found() -> None:
    case = replace(TINY, dropout_p=0.1)
    unscaled = planted(lambda x, A, B: lora(nn.functional.dropout(x, 0.1) * 0.9, A, B))
    right = planted(lambda x, A, B: lora(nn.functional.dropout(x, 0.1), A, B))
    for rival, status in ((unscaled, WRONG), (right, OK)):
        (rows,) = run_case(case, [rival], [FWD], BUDGET, CPU)
        assert rows[1].status == status


def test_a_contender_that_raises_does_not_end_the_run() -> None:
    def broken(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    (rows,) = run_case(TINY, [planted(broken), RIVALS["naive"]], [FWD], BUDGET, CPU)
    assert [row.status for row in rows] == [OK, FAILED, OK]
    assert rows[1].note == "RuntimeError: no such kernel"


def test_a_wrong_contender_sets_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RIVALS, "planted", planted(FAULTS["no scaling"][0]))
    options = ["--shapes", f"{K}x{N}", "--tokens", "3", "--dtypes", "fp32", "--dropouts", "0"]
    assert main(["--quick", "--device", "cpu", *options, "--rivals", "planted"]) == 1
    assert "WRONG planted" in capsys.readouterr().out


# Bytes saved for backward


@pytest.mark.parametrize(
    ("rival", "p", "expected"),
    [
        ("frozen", 0.0, 0),
        ("naive", 0.0, M * K + M * R),  # x and h
        ("addmm", 0.0, M * K + M * R),
        ("addmm", 0.1, 2 * M * K + M * R),  # dropped x, PyTorch's mask and h
    ],
)
def test_saved_bytes_of_known_layers(rival: str, p: float, expected: int) -> None:
    problem = make_problem(replace(TINY, dropout_p=p), CPU)
    contender = RIVALS[rival].build(problem)
    assert saved_bytes(contender, problem.batches[0]) == expected * torch.float32.itemsize


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_lora_ext_saves_x_h_and_the_rng_state(p: float) -> None:
    problem = make_problem(replace(TINY, dropout_p=p), CPU)
    contender = RIVALS["lora_ext"].build(problem)
    assert saved_bytes(contender, problem.batches[0]) <= (M * K + M * R) * 4 + 16
