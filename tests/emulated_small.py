"""The small CUDA kernels on CPU tensors, compiled for the host, in the emulator of tests/simt."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from emulated import SOURCE, TYPES, Guarded, compile_source
from torch import Tensor


@dataclass
class SmallKernels:
    """Those that are called by themselves: the state of dropout, its mask, merging."""

    library: ctypes.CDLL

    @classmethod
    def build(cls, folder: Path) -> SmallKernels:
        target = folder / "libsmall_kernels.so"
        compile_source(SOURCE.with_name("small_kernels.cpp"), target, "-O1", "-fPIC", "-shared")
        return cls(ctypes.CDLL(str(target)))

    def fill_rng_state(self, seed: int, offset: int, in_graph: int | None = None) -> Tensor:
        """`in_graph`: the kernel reads seed and offset from memory, and adds this."""
        state, words = torch.full((2,), -1), torch.tensor([seed, offset])
        address = words.data_ptr()
        self.library.fill_rng(
            in_graph is not None,
            ctypes.c_uint64(0 if in_graph is not None else seed),
            ctypes.c_uint64(0 if in_graph is not None else offset),
            ctypes.c_void_p(address),
            ctypes.c_void_p(address + 8),
            in_graph or 0,
            ctypes.c_void_p(state.data_ptr()),
        )
        return state

    def dropout_mask(
        self, rng_state: Tensor, first_row: int, rows: int, columns: int, dropout_p: float
    ) -> Tensor:
        keep = Guarded(torch.zeros(rows, columns), torch.uint8)
        self.library.dropout_mask(
            ctypes.c_void_p(rng_state.data_ptr()),
            round((1 - dropout_p) * 65536),
            *(ctypes.c_int64(size) for size in (first_row, rows, columns)),
            ctypes.c_void_p(keep.tensor.data_ptr()),
        )
        keep.check("the mask")
        return keep.tensor

    def merge(
        self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, write: bool = True
    ) -> tuple[Tensor, bool]:
        """The weight [N, K] afterwards, whose rows may lie apart, and whether it is finite."""
        (N, K), stride = weight.shape, weight.stride(0)
        memory = torch.full((N * stride,), torch.nan, dtype=weight.dtype)
        memory.as_strided((N, K), (stride, 1)).copy_(weight)
        guarded = Guarded(memory)
        finite = ctypes.c_int(1)
        types = "fp32" if weight.dtype == torch.float32 else TYPES[weight.dtype, lora_A.dtype]
        self.library.merge(
            types.encode(),
            ctypes.c_void_p(guarded.tensor.data_ptr()),
            *(ctypes.c_int64(size) for size in (N, K, stride)),
            ctypes.c_void_p(lora_A.data_ptr()),
            ctypes.c_void_p(lora_B.data_ptr()),
            len(lora_A),
            ctypes.c_float(scaling),
            write,
            ctypes.byref(finite),
        )
        guarded.check("the weight")
        between = torch.ones(N * stride, dtype=torch.bool)
        between.as_strided((N, K), (stride, 1)).fill_(False)
        assert guarded.tensor[between].isnan().all(), "merge wrote between the rows"
        return guarded.tensor.as_strided((N, K), (stride, 1)).clone(), bool(finite.value)
