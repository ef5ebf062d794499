"""The CUDA kernels of lora_linear on CPU tensors: their source compiled for the host, against the
emulator in tests/simt."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock
from torch import Tensor

import lora_ext

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "simt" / "lora_linear.cpp"
TYPES = {
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.bfloat16, torch.float32): "bf16-fp32",
    (torch.float16, torch.float16): "fp16",
    (torch.float16, torch.float32): "fp16-fp32",
}
POINTERS = ("rng_state", "scaling_factor", "bias", "saved_h")
POINTERS += ("x", "weight", "lora_A", "lora_B", "dy")
LIE = ("x", "weight", "dy")  # whose rows may lie anyhow
RESULTS = ("y", "dx", "dA", "dB", "h")
MOST_LAUNCHES = 4096  # that take_launches tells of
COMPLETIONS = ("eager", "deferred", "random")
WISHES = tuple(lora_ext.build_info()["cuda_paths"])
# A GPU that runs the kernels of a family, of sm_80's one with the least shared memory.
GPUS = {"sm80": 86, "sm90": 90}


class Arguments(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("M", "N", "K", "ldx", "ldy", "ldw")]
        + [("r", ctypes.c_int), ("transposed", ctypes.c_int)]
        + [("scaling", ctypes.c_float), ("dropout", ctypes.c_int)]
        + [("threshold", ctypes.c_uint32), ("survivor", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in POINTERS + RESULTS]
    )


def compile_source(source: Path, target: Path, *options: str, csrc: Path = ROOT / "csrc") -> None:
    """Compiles C++ against the kernels and the emulator; skips the test without a compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    command = [
        compiler,
        "-std=c++20",
        "-fno-strict-aliasing",
        "-Wall",
        "-Wno-unknown-pragmas",
        *options,
    ]
    command += [f"-I{csrc}", f"-I{ROOT / 'tests' / 'simt' / 'include'}"]
    result = subprocess.run(
        [*command, str(source), "-o", str(target), "-pthread"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]


MARGIN = 16384  # elements: more than a tile, and what follows stays aligned


class Guarded:
    """A tensor between NaN (bytes: 255), so that reading or writing beside it shows; `as_it_lies`:
    with its rows as far apart, and as far from multiples of 16 bytes."""

    def __init__(
        self,
        values: Tensor,
        dtype: torch.dtype | None = None,
        as_it_lies: bool = False,
        margin: int = MARGIN,
    ) -> None:
        dtype = dtype or values.dtype
        fill = torch.nan if dtype.is_floating_point else 255
        strides, offset = torch.empty(values.shape, device="meta").stride(), 0
        if as_it_lies:
            strides, offset = values.stride(), values.storage_offset() % 8
        reach = sum(max(size - 1, 0) * s for size, s in zip(values.shape, strides, strict=True))
        self.first, self.end = margin + offset, margin + offset + reach + 1
        self.whole = torch.full((self.end + margin,), fill, dtype=dtype)
        self.tensor = self.whole.as_strided(values.shape, strides, self.first)
        if strides[:1] == (0,):  # one row that is all rows
            self.tensor[0].copy_(values[0])
        else:
            self.tensor.copy_(values)

    def check(self, name: str) -> None:
        for margin in (self.whole[: self.first], self.whole[self.end :]):
            intact = margin.isnan() if margin.is_floating_point() else margin == 255
            assert intact.all(), f"a kernel wrote outside of {name}"


class RecordedLaunch(NamedTuple):
    kernel: str  # "lora_ext::sm90::product_sm90_kernel<...>", as the source writes it
    grid: tuple[int, int, int]
    block: int  # threads
    cluster: int  # blocks; 1 where the launch names none
    shared_bytes: int
    dependent: bool  # may begin before the kernel launched last is over


class _Recorded(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("block", "cluster", "shared_bytes")),
        ("dependent", ctypes.c_int),
    )


class Launch(NamedTuple):
    copied_bytes: int  # that cp.async read
    mma: int  # mma.sync instructions of warps
    tma_bytes: int  # that TMA wrote to shared memory
    wgmma: int  # wgmma instructions of warpgroups
    tma_read_bytes: int  # that TMA read for those, once for all blocks of a cluster


@dataclass
class EmulatedKernels:
    library: ctypes.CDLL
    dry_paths: tuple[str, str] = ("", "")
    dry_reasons: tuple[str, str] = ("", "")

    @staticmethod
    def compile(folder: Path, *options: str, csrc: Path = ROOT / "csrc") -> Path:
        target = folder / "liblora_linear.so"
        compile_source(SOURCE, target, "-O1", "-fPIC", "-shared", *options, csrc=csrc)
        return target

    @classmethod
    def build(cls, folder: Path, *options: str) -> EmulatedKernels:
        return cls.load(cls.compile(folder, *options))

    @classmethod
    def load(cls, compiled: Path) -> EmulatedKernels:
        library = ctypes.CDLL(str(compiled))
        for name in ("last_error", "last_path", "last_reason"):
            getattr(library, name).restype = ctypes.c_char_p
        return cls(library)

    @classmethod
    def shared(cls, factory: pytest.TempPathFactory) -> EmulatedKernels:
        """Compiled once for all files of tests and processes of xdist; each has a copy, and with it
        a GPU, a schedule and launches of its own."""
        folder = factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent
        target = folder / "liblora_linear.so"
        with FileLock(folder / "emulated_kernels.lock"):
            if not target.exists():
                cls.compile(factory.mktemp("compiled")).rename(target)
        return cls.load(Path(shutil.copy(target, factory.mktemp("kernels"))))

    def schedule(self, completion: str, seed: int) -> None:
        self.library.set_schedule(COMPLETIONS.index(completion), ctypes.c_uint64(seed))

    def gpu(self, compute_capability: int, multiprocessors: int = 3) -> None:
        """Whose limits hold. Few multiprocessors make blocks of many tiles, many make many
        blocks."""
        self.library.set_gpu(compute_capability, multiprocessors)

    def wish(self, name: str) -> None:
        """What LORA_EXT_CUDA_PATH asks for: by default "fused", kernels for everything."""
        self.library.set_wish(WISHES.index(name))

    @property
    def path(self) -> str:
        """Of the last call, as `explain` tells it. Without kernels for the base product y and dx
        are the low-rank part; without any, NaN."""
        return str(self.library.last_path().decode())

    def dry_run(
        self,
        M: int,
        N: int,
        K: int,
        r: int,
        types: str,
        dropout_p: float,
        saved_h: bool = True,
        without: Iterable[str] = (),
    ) -> tuple[list[RecordedLaunch], list[RecordedLaunch]]:
        """What a forward and a backward call launch on the GPU; no kernel runs, and no operand is
        there. Raises RuntimeError if the GPU refuses a launch. `saved_h`: backward is given h;
        `without`: results that it is not asked for. `dry_paths` and `dry_reasons` then
        have the path of each, and why."""
        missing = [*without, *([] if saved_h else ["saved_h"])]
        one = operands_nowhere(M, N, K, r, dropout_p, missing)
        launches, paths, reasons = [], [], []
        for function in (self.library.lora_forward, self.library.lora_backward):
            launches.append(self._dry(function, types, ctypes.byref(one)))
            paths.append(self.path)
            reasons.append(str(self.library.last_reason().decode()))
        self.dry_paths, self.dry_reasons = (paths[0], paths[1]), (reasons[0], reasons[1])
        return launches[0], launches[1]

    def dry_run_multi(
        self,
        M: int,
        K: int,
        layers: list[tuple[int, int]],  # N, r
        types: str,
        dropout_p: float,
        backward: bool,
        without: Iterable[str] = (),
    ) -> list[RecordedLaunch]:
        """The same of layers of one x, forward or backward."""
        several = (Arguments * len(layers))(
            *(operands_nowhere(M, N, K, r, dropout_p if r else 0.0, without) for N, r in layers)
        )
        return self._dry(self.library.lora_multi, types, several, len(layers), backward)

    def alone(
        self,
        M: int,
        K: int,
        layers: list[tuple[int, int]],  # N, r
        types: str,
        dropout_p: float,
        backward: bool,
    ) -> list[str]:
        """Of each of these layers: why it has a call of its own; "" where it runs with others."""
        several = (Arguments * len(layers))(
            *(operands_nowhere(M, N, K, r, dropout_p if r else 0.0) for N, r in layers)
        )
        told = (ctypes.c_char_p * len(layers))()
        if self.library.lora_multi_alone(types.encode(), several, len(layers), backward, told):
            raise RuntimeError(self.library.last_error().decode())
        return [(why or b"").decode() for why in told]

    def dry_run_up_grad(
        self, M: int, N: int, r: int, types: str, without: Iterable[str] = ()
    ) -> list[RecordedLaunch]:
        """The same of an embedding's backward; `without` its dh ("h"), or "dB" and "saved_h"."""
        one = operands_nowhere(M, N, 8, r, 0.0, without)
        return self._dry(self.library.lora_up_grad, types, ctypes.byref(one))

    def _dry(self, function: ctypes._CFuncPtr, types: str, *arguments: Any) -> list[RecordedLaunch]:
        self.take_recorded()
        self.library.set_limits_only(True)
        try:
            if function(types.encode(), *arguments):
                raise RuntimeError(self.library.last_error().decode())
            return self.take_recorded()
        finally:
            self.library.set_limits_only(False)

    def take_recorded(self) -> list[RecordedLaunch]:
        """What each launch since the last call asked for."""
        launches = (_Recorded * MOST_LAUNCHES)()
        return [
            RecordedLaunch(
                one.kernel.decode(),
                tuple(one.grid),
                one.block,
                one.cluster,
                one.shared_bytes,
                bool(one.dependent),
            )
            for one in launches[: self.library.take_recorded(MOST_LAUNCHES, launches)]
        ]

    def self_check(self, family: str, M: int, N: int, K: int) -> str:
        """What the check of a family at its first use finds wrong; empty if nothing is."""
        self.library.self_check.restype = ctypes.c_char_p
        found: bytes = self.library.self_check(
            list(GPUS).index(family), *map(ctypes.c_int64, (M, N, K))
        )
        return found.decode()

    def take_launches(self) -> list[Launch]:
        """Of each launch since the last call; of the first MOST_LAUNCHES, if there were more."""
        counts = ((ctypes.c_int64 * len(Launch._fields)) * MOST_LAUNCHES)()
        known = self.library.take_launches(MOST_LAUNCHES, counts)
        return [Launch(*one) for one in counts[:known]]

    def forward(
        self,
        x: Tensor,  # [M, K]
        weight: Tensor | None,  # without it y is without the base product
        bias: Tensor | None,  # [N] float32
        lora_A: Tensor,
        lora_B: Tensor,
        *,
        scaling: float = 1.0,
        scaling_factor: Tensor | None = None,  # [] float32
        dropout_p: float = 0.0,
        rng_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(y, h); what no kernel writes stays NaN."""
        y = x.new_full((x.shape[0], lora_B.shape[0]), torch.nan)
        h = torch.full((x.shape[0], lora_A.shape[0]), torch.nan)
        self._call(
            self.library.lora_forward, x=x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B,
            scaling=scaling, scaling_factor=scaling_factor, dropout_p=dropout_p,
            rng_state=rng_state, y=y, h=h,
        )  # fmt: skip
        return y, h

    def backward(
        self,
        dy: Tensor,  # [M, N]
        x: Tensor,
        h: Tensor | None,
        weight: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        *,
        scaling: float = 1.0,
        scaling_factor: Tensor | None = None,  # [] float32
        dropout_p: float = 0.0,
        rng_state: Tensor | None = None,
        wanted: str = "dx dA dB",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dA, dB); what is not wanted stays NaN."""
        dx, dA, dB = (torch.full_like(t, torch.nan).contiguous() for t in (x, lora_A, lora_B))
        results = {"dx": dx, "dA": dA, "dB": dB}
        results |= {name: None for name in results if name not in wanted.split()}
        self._call(
            self.library.lora_backward, dy=dy, x=x, saved_h=h, weight=weight, lora_A=lora_A,
            lora_B=lora_B, scaling=scaling, scaling_factor=scaling_factor, dropout_p=dropout_p,
            rng_state=rng_state, **results,
        )  # fmt: skip
        return dx, dA, dB

    def up_grad(
        self, dy: Tensor, h: Tensor | None, lora_B: Tensor, scaling: float, wants_dh: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(dh, dB), dB if there is an h; what no kernel writes stays NaN."""
        dh = torch.full((len(dy), lora_B.shape[1]), torch.nan)
        dB = torch.full_like(lora_B, torch.nan)
        x = dy.new_zeros(len(dy), 8)  # whose sizes are read
        results = {"dB": None if h is None else dB, "h": dh if wants_dh else None}
        self._call(
            self.library.lora_up_grad, dy=dy, x=x, weight=None, saved_h=h, lora_B=lora_B,
            scaling=scaling, dropout_p=0.0, rng_state=None, **results,
        )  # fmt: skip
        return dh, dB

    def _call(
        self,
        function: ctypes._CFuncPtr,
        *,
        scaling: float,
        dropout_p: float,
        rng_state: Tensor | None,
        **tensors: Tensor | None,
    ) -> None:
        guarded, arguments = guarded_arguments(
            tensors, scaling=scaling, dropout_p=dropout_p, rng_state=rng_state
        )
        self.call(function, [guarded], ctypes.byref(arguments))
        take_results(guarded, tensors)

    def call(
        self, function: ctypes._CFuncPtr, guarded: list[dict[str, Guarded]], *arguments: Any
    ) -> None:
        """Of functions that take the types first."""
        adapter = next(one["lora_B"] for one in guarded if "lora_B" in one)
        types = TYPES[(guarded[0]["x"].tensor.dtype, adapter.tensor.dtype)].encode()
        if function(types, *arguments):
            raise RuntimeError(self.library.last_error().decode())
        for layer in guarded:
            for name, guard in layer.items():
                guard.check(name)


def operands_nowhere(
    M: int, N: int, K: int, r: int, dropout_p: float, without: Iterable[str] = ()
) -> Arguments:
    """Of a dry run: all at one place that nobody reads, but for those that are missing."""
    return Arguments(
        M=M, N=N, K=K, ldx=K, ldy=N, ldw=K, r=r, scaling=1, dropout=dropout_p > 0,
        **dict.fromkeys(POINTERS + RESULTS, 1 << 12) | dict.fromkeys(without),
    )  # fmt: skip


def take_results(guarded: dict[str, Guarded], tensors: dict[str, Tensor | None]) -> None:
    for name in RESULTS:
        if name in guarded:
            tensors[name].copy_(guarded[name].tensor)  # type: ignore[union-attr]


def guarded_arguments(
    tensors: dict[str, Tensor | None],
    *,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[dict[str, Guarded], Arguments]:
    """A call's tensors between NaN, and what the kernels are given of them."""
    weight = tensors["weight"]
    transposed = weight is not None and weight.stride(1) != 1 and weight.stride(0) == 1
    if weight is not None and transposed:
        tensors = tensors | {"weight": weight.t()}
    guarded = {
        name: Guarded(t, as_it_lies=name in LIE) for name, t in tensors.items() if t is not None
    }
    stride = {name: guard.tensor.stride(0) for name, guard in guarded.items() if name in LIE}
    M, K = guarded["x"].tensor.shape
    lora_B = tensors.get("lora_B")
    if lora_B is not None:
        N, r = lora_B.shape
    else:  # without adapter
        assert weight is not None
        N, r = len(weight), 0
    arguments = Arguments(
        M=M,
        N=N,
        K=K,
        ldx=stride["x"],
        ldy=stride.get("dy", N),
        ldw=stride.get("weight", K),
        r=r,
        transposed=transposed,
        scaling=scaling,
        dropout=dropout_p > 0,
        threshold=round((1 - dropout_p) * 65536),
        survivor=1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        rng_state=None if rng_state is None else rng_state.data_ptr(),
        **{name: guard.tensor.data_ptr() for name, guard in guarded.items()},
    )
    return guarded, arguments
