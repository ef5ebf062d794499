"""The CUDA kernels that walk rows, of DoRA and embeddings, on CPU tensors, as `emulated` has those
of lora_linear; and one call of each against its formula in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from emulated import COMPLETIONS, ROOT, TYPES, Guarded, compile_source
from problems import UNIT
from torch import Tensor

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
POINTER, INT = ctypes.c_void_p, ctypes.c_int64


class _WeightNorm(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("N", "K", "stride", "rank")),
        ("scaling", ctypes.c_float),
        ("by_column", ctypes.c_int),
        *((name, POINTER) for name in ("weight", "lora_A", "lora_B", "norms")),
    )


class _ColumnScale(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("M", "N", "z_stride", "dy_stride")),
        *((name, POINTER) for name in ("z", "dy", "scale", "bias", "y", "dz", "dscale", "dbias")),
    )


class _Embedding(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("M", "V", "D", "stride", "rank")),
        ("scaling", ctypes.c_float),
        *((name, POINTER) for name in ("tokens", "weight", "lora_A", "lora_B", "y")),
    )


ARGUMENTS = {
    "weight_norm": _WeightNorm,
    "column_scale": _ColumnScale,
    "lora_embedding": _Embedding,
}


@dataclass
class RowKernels:
    library: ctypes.CDLL
    guarded: bool = True  # operands are copied, between margins that no kernel may touch

    @staticmethod
    def compile(folder: Path, *options: str, csrc: Path = ROOT / "csrc") -> Path:
        target = folder / "librow_kernels.so"
        source = ROOT / "tests" / "simt" / "row_kernels.cpp"
        compile_source(source, target, "-O1", "-fPIC", "-shared", *options, csrc=csrc)
        return target

    @classmethod
    def load(cls, compiled: Path) -> RowKernels:
        library = ctypes.CDLL(str(compiled))
        library.last_error.restype = ctypes.c_char_p
        return cls(library)

    def schedule(self, completion: str, seed: int) -> None:
        self.library.set_schedule(COMPLETIONS.index(completion), ctypes.c_uint64(seed))

    def gpu(self, compute_capability: int, multiprocessors: int = 3) -> None:
        self.library.set_gpu(compute_capability, multiprocessors)

    def limits_only(self, value: bool) -> None:
        self.library.set_limits_only(value)

    def launch(self, function: str, types: str, **sizes: int) -> None:
        """Without operands: in a dry run (`limits_only`)."""
        self.check(function, types, ARGUMENTS[function](**sizes))

    def weight_norm(
        self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, by_column: bool
    ) -> Tensor:
        """Of the rows of weight + scaling * lora_B lora_A, or of the columns; rows of the weight
        may lie anyhow."""
        norms = torch.full((weight.shape[by_column],), torch.nan)
        self._call(
            "weight_norm",
            _name(weight, lora_A),
            _WeightNorm(
                N=len(weight), K=weight.shape[1], rank=len(lora_A), scaling=scaling,
                by_column=by_column,
            ),
            {"weight": "stride"},
            {"norms": norms},
            weight=weight, lora_A=lora_A, lora_B=lora_B,
        )  # fmt: skip
        return norms

    def column_scale(self, z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """z [M, N], whose rows may lie anyhow."""
        y = z.new_full(z.shape, torch.nan)
        self._call(
            "column_scale", NAMES[z.dtype], _ColumnScale(M=len(z), N=z.shape[1]),
            {"z": "z_stride"}, {"y": y}, z=z, scale=scale, bias=bias,
        )  # fmt: skip
        return y

    def column_scale_backward(
        self, dy: Tensor, z: Tensor | None, scale: Tensor, mask: tuple[bool, bool, bool]
    ) -> dict[str, Tensor]:
        """dz, dscale and dbias, as the mask says."""
        N = dy.shape[1]
        made = {
            "dz": dy.new_full(dy.shape, torch.nan),
            **{name: torch.full((N,), torch.nan) for name in ("dscale", "dbias")},
        }
        results = {name: t for (name, t), one in zip(made.items(), mask, strict=True) if one}
        self._call(
            "column_scale_backward", NAMES[dy.dtype], _ColumnScale(M=len(dy), N=N),
            {"z": "z_stride", "dy": "dy_stride"}, results, dy=dy, z=z, scale=scale,
        )  # fmt: skip
        return results

    def lora_embedding(
        self, tokens: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        """tokens [M], weight [V, D], whose rows may lie anyhow."""
        D = weight.shape[1]
        y = weight.new_full((len(tokens), D), torch.nan)
        self._call(
            "lora_embedding",
            _name(weight, lora_A),
            _Embedding(M=len(tokens), V=len(weight), D=D, rank=len(lora_A), scaling=scaling),
            {"weight": "stride"},
            {"y": y},
            tokens=tokens, weight=weight, lora_A=lora_A, lora_B=lora_B,
        )  # fmt: skip
        return y

    def _call(
        self,
        function: str,
        types: str,
        arguments: ctypes.Structure,
        strides: dict[str, str],  # of which tensors the rows may lie anyhow, and the stride's field
        results: dict[str, Tensor],  # written
        **tensors: Tensor | None,
    ) -> None:
        every = {name: t for name, t in (tensors | results).items() if t is not None}
        guards = {
            name: Guarded(t, as_it_lies=name in strides) if self.guarded else None
            for name, t in every.items()
        }
        for name, guard in guards.items():
            tensor = every[name] if guard is None else guard.tensor
            setattr(arguments, name, tensor.data_ptr())
            if name in strides:
                setattr(arguments, strides[name], tensor.stride(0))
        self.check(function, types, arguments)
        for name, guard in guards.items():
            if guard is None:
                continue
            guard.check(name)
            if name in results:
                results[name].copy_(guard.tensor)

    def check(self, function: str, types: str, arguments: ctypes.Structure) -> None:
        if getattr(self.library, function)(types.encode(), ctypes.byref(arguments)):
            raise RuntimeError(self.library.last_error().decode())


def _name(base: Tensor, adapter: Tensor) -> str:
    return NAMES[base.dtype] if base.dtype == torch.float32 else TYPES[base.dtype, adapter.dtype]


class Problem:
    """Operands of all of them: matrices of M rows and N columns, `between` elements apart, a third
    of which lies before the first."""

    scaling = 0.5

    def __init__(
        self, M: int, N: int, r: int, between: int, base: torch.dtype, adapter: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(M * N + r)

        def normal(rows: int, columns: int, dtype: torch.dtype, more: int = 0) -> Tensor:
            values = torch.randn(rows, columns + more, generator=generator).to(dtype)
            return values[:, more // 3 :][:, :columns]

        self.weight, self.z, self.dy = (normal(M, N, base, between) for _ in range(3))
        self.lora_A, self.lora_B = normal(r, N, adapter), normal(M, r, adapter)
        self.scale, self.bias = normal(2, N, torch.float32)
        # Of a table of M tokens, of N dimensions each
        self.tokens = torch.randint(M, (M + 3,), generator=generator)
        self.of_tokens, self.of_dimensions = normal(r, M, adapter), normal(N, r, adapter)


SUM = 1.01 * UNIT[torch.float32]  # of one addition, with room for what is of second order


def check_norms(kernels: RowKernels, p: Problem, by_column: bool) -> None:
    got = kernels.weight_norm(p.weight, p.lora_A, p.lora_B, p.scaling, by_column)
    A, B, r = p.lora_A.double(), p.scaling * p.lora_B.double(), len(p.lora_A)
    exact = p.weight.double() + B @ A
    of_elements = (r + 2) * SUM * (p.weight.double().abs() + B.abs() @ A.abs())
    if p.weight.dtype.itemsize < p.lora_A.dtype.itemsize:  # on tensor cores two of 16 bits
        of_elements += 3.03 * (2 * UNIT[torch.bfloat16]) ** 2 * (B.abs() @ A.abs())
    # Squares follow each other in a lane, a warp or block, and every eighth part.
    parts = len(exact) // 32 if by_column else exact.shape[1] // 256
    chain = 16 + 8 + 8 + (parts + 1) / 8
    norm = exact.norm(dim=0 if by_column else 1)
    limit = of_elements.norm(dim=0 if by_column else 1) + (chain / 2 + 1) * SUM * norm
    assert ((got.double() - norm).abs() <= limit).all()


def check_column_scale(kernels: RowKernels, p: Problem) -> None:
    """Forward with and without a bias, and backward."""
    rounding = 2 * UNIT[p.z.dtype]
    least = 2.0**-25 if p.z.dtype == torch.float16 else 0.0  # below its normal numbers
    for bias in (p.bias, None):
        product = p.z.double() * p.scale.double()
        exact = product if bias is None else product + bias.double()
        terms = product.abs() + (0.0 if bias is None else bias.double().abs())
        error = (kernels.column_scale(p.z, p.scale, bias).double() - exact).abs()
        assert (error <= rounding * exact.abs() + 2 * SUM * terms + least).all()
    got = kernels.column_scale_backward(p.dy, p.z, p.scale, (True, True, True))
    assert torch.equal(got["dz"], (p.dy.float() * p.scale).to(p.dy.dtype))
    M = len(p.dy)
    chain = min(M, 128) + 8 + 8 + M / 64 / 8 + 1
    for name, terms in (("dscale", p.dy.double() * p.z.double()), ("dbias", p.dy.double())):
        error = (got[name].double() - terms.sum(0)).abs()
        assert (error <= chain * SUM * terms.abs().sum(0)).all(), name


def check_embedding(kernels: RowKernels, p: Problem) -> None:
    y = kernels.lora_embedding(p.tokens, p.weight, p.of_tokens, p.of_dimensions, p.scaling)
    rows = p.weight.double()[p.tokens]
    h, B = p.scaling * p.of_tokens.double().t()[p.tokens], p.of_dimensions.double().t()
    exact, terms = rows + h @ B, rows.abs() + h.abs() @ B.abs()
    least = 2.0**-25 if y.dtype == torch.float16 else 0.0
    limit = 2 * UNIT[y.dtype] * exact.abs() + (len(B) + 2) * SUM * terms + least
    assert ((y.double() - exact).abs() <= limit).all()
