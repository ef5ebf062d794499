"""The CUDA kernels of lora_linear_grouped on CPU tensors, run by the emulator in tests/simt, and
what they should make in float64."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from emulated import MARGIN, ROOT, EmulatedKernels, Guarded, compile_source
from problems import UNIT, rms
from torch import Tensor

import lora_ext

SOURCE = ROOT / "tests" / "simt" / "lora_linear_grouped.cpp"
ADAPTER = ("lora_A", "lora_B", "lora_bias")
GRADIENTS = ("dA", "dB", "dlora_bias")


class AdapterArguments(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in (*ADAPTER, *GRADIENTS)]
        + [("rows", ctypes.c_int64)]
        + [(name, ctypes.c_int) for name in ("in_float", "r")]
        + [("scaling", ctypes.c_float), ("dropout", ctypes.c_int)]
        + [("threshold", ctypes.c_uint32), ("survivor", ctypes.c_float)]
    )


class Arguments(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("M", "N", "K", "ldx", "ldy")]
        + [("adapters", ctypes.POINTER(AdapterArguments)), ("count", ctypes.c_int64)]
        + [("order", ctypes.c_void_p), ("rounds", ctypes.c_void_p), ("round_count", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("factor", "rng_state", "x", "dy")]
        + [(name, ctypes.c_void_p) for name in ("y", "dx", "h", "saved_h", "dfactor")]
        + [("asked", ctypes.c_int)]
    )


@dataclass(frozen=True)
class Slot:
    """An adapter of a call."""

    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    lora_bias: Tensor | None  # [N]
    scaling: float
    dropout_p: float
    wants: tuple[str, ...] = GRADIENTS

    @property
    def r(self) -> int:
        return len(self.lora_A)


@dataclass(frozen=True)
class Problem:
    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    base_y: Tensor  # [M, N]: what the update is added to
    base_dx: Tensor  # [M, K]
    slots: list[Slot]
    ids: Tensor  # [M]: the slot of each row; -1 is none. [M, k]: of rows that may have several
    factor: Tensor | None  # float32, in the shape of ids
    rng_state: Tensor
    wants_x: bool = True
    keeps_h: bool = True
    apart: int = 1  # the numbers of rounds, so that some between them are empty

    def has(self, slot: int) -> Tensor:
        """[M]: which rows."""
        return (self.ids == slot).view(len(self.x), -1).any(1)

    def rows(self, slot: int) -> Tensor:
        """By rounds: first those that have no slot before this one."""
        rows = self.has(slot).nonzero().flatten()
        return rows[self._before(slot, rows).argsort(stable=True)]

    def _before(self, slot: int, rows: Tensor) -> Tensor:
        ids = self.ids.view(len(self.x), -1)[rows]
        return ((ids >= 0) & (ids < slot)).sum(1)

    @property
    def rounds(self) -> Tensor:
        """[.., 3]: slot, round, rows; none where each row has one slot."""
        found = []
        for s in range(len(self.slots) if self.ids.dim() > 1 else 0):
            for number, count in enumerate(self._before(s, self.rows(s)).bincount().tolist()):
                if count:
                    found.append((s, number * self.apart, count))
        return torch.tensor(found, dtype=torch.int64).view(-1, 3)

    def factor_of(self, slot: int) -> Tensor | None:
        """Of its rows, in their order."""
        if self.factor is None:
            return None
        chosen = torch.where(self.ids == slot, self.factor, 0.0).view(len(self.x), -1)
        return chosen.sum(1)[self.rows(slot)]

    @property
    def order(self) -> Tensor:
        return torch.cat([self.rows(s) for s in range(len(self.slots))]).int()


Results = dict[str, Tensor]  # y, h, dx, dfactor; dA.3 and so on


@dataclass
class GroupedKernels(EmulatedKernels):
    reason: str = field(default="")
    asks_in_fp16: bool = field(default=True)  # for the kernels, which have it no other way

    @staticmethod
    def compile(folder: Path, *options: str, csrc: Path = ROOT / "csrc") -> Path:
        target = folder / "liblora_linear_grouped.so"
        compile_source(SOURCE, target, "-O1", "-fPIC", "-shared", *options, csrc=csrc)
        return target

    @classmethod
    def load(cls, compiled: Path) -> GroupedKernels:
        library = ctypes.CDLL(str(compiled))
        for name in ("last_error", "last_path", "last_reason"):
            getattr(library, name).restype = ctypes.c_char_p
        return cls(library)

    def run(self, problem: Problem, backward: bool, given: Results) -> Results:
        """What `given` has, as the kernels left it; h is given to backward as `saved_h`."""
        adapters = []
        margin = MARGIN if len(problem.slots) < 100 else 512
        guarded = {name: Guarded(t, margin=margin) for name, t in given.items()}
        for s, slot in enumerate(problem.slots):
            tensors = {name: getattr(slot, name) for name in ADAPTER}
            parts = {
                name: Guarded(tensor, margin=margin)
                for name, tensor in tensors.items()
                if tensor is not None
            }
            pointers = {name: part.tensor.data_ptr() for name, part in parts.items()}
            for name in GRADIENTS:
                if f"{name}.{s}" in guarded:
                    pointers[name] = guarded[f"{name}.{s}"].tensor.data_ptr()
            guarded |= {f"{name} of slot {s}": part for name, part in parts.items()}
            p = slot.dropout_p
            adapters.append(
                AdapterArguments(
                    rows=len(problem.rows(s)), in_float=slot.lora_A.dtype == torch.float32,
                    r=slot.r, scaling=slot.scaling, dropout=p > 0,
                    threshold=round((1 - p) * 65536), survivor=1 / (1 - p) if p < 1 else 0.0,
                    **pointers,
                )
            )  # fmt: skip
        operands = {"x": problem.x, "order": problem.order}
        rounds = problem.rounds
        if problem.factor is not None:
            factors = [problem.factor_of(s) for s in range(len(problem.slots))]
            operands["factor"] = torch.cat([f for f in factors if f is not None])
        if backward:
            operands["dy"] = problem.dy
        guarded |= {
            name: Guarded(t, as_it_lies=name in ("x", "dy")) for name, t in operands.items()
        }
        names = [name for name, _ in Arguments._fields_ if name in guarded]
        fp16 = problem.x.dtype == torch.float16
        arguments = Arguments(
            M=len(problem.x), N=problem.dy.shape[1], K=problem.x.shape[1],
            ldx=guarded["x"].tensor.stride(0), ldy=problem.dy.stride(0),
            adapters=(AdapterArguments * len(adapters))(*adapters), count=len(adapters),
            rounds=rounds.data_ptr(), round_count=len(rounds),
            rng_state=problem.rng_state.data_ptr(), asked=fp16 and self.asks_in_fp16,
            **{name: guarded[name].tensor.data_ptr() for name in names},
        )  # fmt: skip
        if self.library.grouped(fp16, backward, ctypes.byref(arguments)):
            raise RuntimeError(self.library.last_error().decode())
        self.reason = self.library.last_reason().decode()
        for name, guard in guarded.items():
            guard.check(name)
        return {name: guarded[name].tensor.clone() for name in given}

    def forward(self, problem: Problem) -> Results:  # type: ignore[override]
        size = sum(len(problem.rows(s)) * slot.r for s, slot in enumerate(problem.slots))
        given = {"y": problem.base_y}
        if problem.keeps_h:
            given["h"] = torch.full((size,), torch.nan)
        return self.run(problem, False, given)

    def backward(self, problem: Problem, h: Tensor | None) -> Results:  # type: ignore[override]
        given = {"dx": problem.base_dx} if problem.wants_x else {}
        if problem.factor is not None and h is not None:
            given["dfactor"] = torch.full((len(problem.order),), torch.nan)
        for s, slot in enumerate(problem.slots):
            like = {"dA": slot.lora_A, "dB": slot.lora_B, "dlora_bias": slot.lora_bias}
            for name in slot.wants:
                if (tensor := like[name]) is not None:
                    given[f"{name}.{s}"] = torch.full_like(tensor, torch.nan)
        if h is not None:
            given["saved_h"] = h
        found = self.run(problem, True, given)
        found.pop("saved_h", None)
        return found


def make_problem(
    seed: int, *, sizes: tuple[int, int, int] | None = None, ids: Tensor | None = None,
    ranks: list[int] | None = None, dtype: torch.dtype | None = None,
) -> Problem:  # fmt: skip
    """Of odd sizes, segments that cross tiles, empty slots, rows of the base, mixed everything."""
    choice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    M, K, N = sizes or (
        choice.choice([1, 3, 17, 64, 65, 130, 200]),
        choice.choice([8, 64, 72, 136, 264, 520]),
        choice.choice([8, 64, 72, 136, 264]),
    )
    dtype = dtype or choice.choice([torch.bfloat16, torch.float16])
    slots = len(ranks) if ranks else choice.randint(1, 7)
    if ranks is None:
        ranks = [choice.choice([1, 2, 3, 8, 8, 16, 17, 32, 40, 64]) for _ in range(slots)]
        if choice.random() < 0.15:
            ranks[0] = choice.choice([0, 65, 100, 256])

    def draw(*shape: int, of: torch.dtype = dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(of)

    if ids is None:
        kind = choice.choice(["each row", "segments", "one row each"])
        if kind == "each row":
            ids = torch.randint(-1, slots, (M,), generator=generator)
        elif kind == "segments":
            cuts = torch.sort(torch.randint(0, M + 1, (slots - 1,), generator=generator)).values
            owners = torch.randperm(slots, generator=generator) - choice.randint(0, 1)
            ids = owners[torch.bucketize(torch.arange(M), cuts, right=True)]
        else:
            ids = torch.full((M,), -1)
            places = torch.randperm(M, generator=generator)[:slots]
            ids[places] = torch.arange(len(places))
    made = []
    drops = choice.choice([(0.0,), (0.1,), (0.0, 0.1, 0.5, 0.9)])
    for r in ranks:
        of = torch.float32 if choice.random() < 0.4 else dtype
        made.append(
            Slot(
                draw(r, K, of=of, std=K**-0.5),
                draw(N, r, of=of, std=max(r, 1) ** -0.5),
                draw(N, of=of) if choice.random() < 0.25 or r == 0 else None,
                choice.choice([0.5, 1.0, 2.5]),
                choice.choice(drops),
            )
        )
    factor = draw(M, of=torch.float32) if choice.random() < 0.3 else None
    return Problem(
        draw(M, K), draw(M, N), draw(M, N), draw(M, K), made, ids, factor,
        torch.tensor([choice.randrange(2**31), choice.randrange(2**31)]),
        keeps_h=factor is not None or choice.random() < 0.7,
    )  # fmt: skip


@dataclass(frozen=True)
class Exact:
    value: Tensor
    size: Tensor  # of its terms: the root of the sum of their squares


def product(a: Tensor, b: Tensor) -> Exact:
    return Exact(a @ b, (a.square() @ b.square()).sqrt())


def exact_slot(problem: Problem, s: int) -> dict[str, Exact]:
    """Everything of one slot, its rows alone, in float64; of y and dx what it adds."""
    slot, rows = problem.slots[s], problem.rows(s)
    given = problem.x[rows], problem.dy[rows], slot.lora_A, slot.lora_B
    x, dy, A, B = (t.double() for t in given)
    if slot.dropout_p > 0:
        mask = lora_ext.dropout_mask(problem.rng_state, *problem.x.shape, slot.dropout_p)[rows]
        keep = mask / (1 - slot.dropout_p) if slot.dropout_p < 1 else mask * 0.0
    else:
        keep = torch.ones_like(x)
    factors = problem.factor_of(s)
    factor = torch.ones(len(rows), 1, dtype=torch.float64)
    if factors is not None:
        factor = factors[:, None].double()
    strength = slot.scaling * factor
    bias = torch.zeros(len(B)).double() if slot.lora_bias is None else slot.lora_bias.double()
    d = x * keep
    h, unscaled = product(d, A.t()), product(dy, B)
    update = product(strength * h.value, B.t())
    dh = strength * unscaled.value
    back = product(dh, A)
    # What is left of large terms errs as they do.
    h_size = torch.maximum(h.value.abs(), h.size)
    dh_size = strength.abs() * torch.maximum(unscaled.value.abs(), unscaled.size)
    sums = unscaled.value * h.value
    return {
        "y": Exact(update.value + strength * bias, update.size),
        "h": h,
        "dx": Exact(back.value * keep, back.size * keep),
        "dA": Exact(dh.t() @ d, product(dh_size.t(), d).size),
        "dB": Exact((strength * dy).t() @ h.value, product((strength * dy).t(), h_size).size),
        "dlora_bias": product((strength * dy).t(), torch.ones(len(rows), 1).double()),
        "dfactor": Exact(
            slot.scaling * (sums.sum(1) + dy @ bias),
            slot.scaling
            * (
                (unscaled.size * h.value).square().sum(1)
                + (unscaled.value * h.size).square().sum(1)
                + (dy.square() @ bias.square())
            ).sqrt(),
        ),
    }


def relative_error(problem: Problem, s: int, name: str) -> float:
    """Of what a slot makes, to the size of its terms: what roundings may leave, as kernel_bound of
    tests/problems.py counts them: h and dh once for the product; what is float is two of 16 bits,
    three times in a product. Sums are in float. Of few values errors are not seen as an average,
    which is off by 1 / sqrt(2 n)."""
    slot, base, f = problem.slots[s], UNIT[problem.x.dtype], UNIT[torch.float32]
    M, K, N = *problem.x.shape, problem.dy.shape[1]
    terms = f * max(M, K, N) ** 0.5 + 3 * base**2
    if problem.x.dtype == torch.float16:  # what a remainder is denormal in: multiples of 2^-24
        terms += 2.0**-25 * sum(1 / rms(t) for t in (slot.lora_A, slot.lora_B) if t.numel())
    if name in ("y", "dx"):
        terms += base
    return terms * (1 + 4 / (2 * max(len(problem.rows(s)) * slot.r, 1)) ** 0.5)


@dataclass(frozen=True)
class ExactSums:
    """y or dx: what all slots add to the base's, one after another."""

    value: Tensor
    error: Tensor  # of the updates, squared
    rounded: Tensor  # what was rounded to be stored, squared and added up

    def check(self, name: str, got: Tensor, rows: Tensor) -> None:
        """Of these rows; storing errs by at most half an ulp, twice the unit."""
        if got[rows].numel() == 0:
            return
        error = rms(got[rows].double() - self.value[rows])
        most = float(self.error[rows].mean().sqrt())
        most += 2 * UNIT[got.dtype] * float(self.rounded[rows].mean().sqrt())
        assert error <= most, f"{name}: error {error:.3g}, at most {most:.3g}"


def exact_sums(problem: Problem, name: str, exact: list[dict[str, Exact]]) -> ExactSums:
    value = (problem.base_y if name == "y" else problem.base_dx).double()
    error, rounded = torch.zeros_like(value), torch.zeros_like(value)
    for s, own in enumerate(exact):
        rows = problem.rows(s)
        value = value.index_add(0, rows, own[name].value)
        error[rows] += (relative_error(problem, s, name) * own[name].size).square()
        rounded[rows] += value[rows].square()
    return ExactSums(value, error, rounded)


def check(kernels: GroupedKernels, problem: Problem) -> tuple[Results, Results]:
    """Forward and backward against float64; rows of no slot as they were, bit for bit."""
    made = kernels.forward(problem)
    gradients = kernels.backward(problem, made.get("h"))
    exact = [exact_slot(problem, s) for s in range(len(problem.slots))]
    with_slot = problem.ids.view(len(problem.x), -1).amax(1) >= 0
    # Of each slot alone, or of all where rows have several.
    groups = [problem.rows(s) for s in range(len(exact))] if problem.ids.dim() == 1 else [with_slot]
    for name, base, results in (
        ("y", problem.base_y, made),
        ("dx", problem.base_dx, gradients),
    ):
        if name not in results:
            continue
        assert torch.equal(results[name][~with_slot], base[~with_slot])
        sums = exact_sums(problem, name, exact)
        for number, rows in enumerate(groups):
            sums.check(f"{name} of rows {number}", results[name], rows)
    begin = hidden = 0
    for s, slot in enumerate(problem.slots):
        rows = problem.rows(s)
        found = {}
        if "h" in made:
            size = len(rows) * slot.r
            found["h"] = made["h"][hidden : hidden + size].view(len(rows), slot.r)
            hidden += size
        if "dfactor" in gradients:
            found["dfactor"] = gradients["dfactor"][begin : begin + len(rows)]
        begin += len(rows)
        found |= {n: gradients[f"{n}.{s}"] for n in GRADIENTS if f"{n}.{s}" in gradients}
        for name, got in found.items():
            want = exact[s][name]
            if got.numel() == 0:
                continue
            if len(rows) == 0:
                assert (got == 0).all(), f"{name} of slot {s}, which has no rows"
                continue
            error = rms(got.double() - want.value.view(got.shape))
            most = relative_error(problem, s, name) * rms(want.size)
            most += 2 * UNIT[got.dtype] * rms(want.value)  # half an ulp of what is stored
            assert error <= most, f"{name} of slot {s}: error {error:.3g}, at most {most:.3g}"
    return made, gradients


def others_replaced(problem: Problem, s: int, seed: int) -> Problem:
    """The rows of slot s as they are, those of others anybody's, of other ranks and dropout."""
    other = make_problem(
        seed, sizes=(*problem.x.shape, problem.dy.shape[1]), ranks=[24, 3, 64],
        dtype=problem.x.dtype,
    )  # fmt: skip
    ids = torch.where(problem.ids == s, 1, torch.where(other.ids == 1, -1, other.ids))
    slots = [other.slots[0], problem.slots[s], other.slots[2]]
    return replace(problem, slots=slots, ids=ids)
