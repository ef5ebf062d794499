"""Types of the compiled extension (csrc/bindings.cpp)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor: ...
def lora_linear_quantized(
    x: Tensor,
    weight: Sequence[Tensor],
    layout: Sequence[int],
    numbers: Sequence[float],
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor: ...
def lora_linear_multi(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    lora_biases: Sequence[Tensor | None] | None,
    scalings: Sequence[float | Tensor],
    dropout_p: Sequence[float],
    rng_states: Sequence[Tensor | None] | None,
) -> list[Tensor]: ...
def lora_linear_grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    lora_biases: Sequence[Tensor],
    order: Tensor,
    counts: Sequence[int],
    factor: Tensor | None,
    scalings: Sequence[float],
    dropout_p: Sequence[float],
    rng_state: Tensor | None,
    rounds: Sequence[int],
) -> Tensor: ...

# lora_linear_fwd and lora_linear_bwd out of ATen's products, for tests
def composed_fwd(*arguments: Any) -> tuple[Tensor, Tensor]: ...
def composed_bwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def explain_dora_linear_cpu(
    tokens: int, dtype: torch.dtype, dropout_p: float
) -> tuple[bool, str]: ...
def explain_lora_linear_cpu(
    tokens: int,
    out_features: int,
    lora_A: Tensor,
    dtype: torch.dtype,
    dropout_p: float,
    quantized: bool = False,
) -> tuple[str, str]: ...

# Only in a build with CUDA
class CudaCall:
    def __init__(
        self,
        *,
        backward: bool,
        device: int,
        tokens: int,
        out_features: int,
        in_features: int,
        r: int,
        base: torch.dtype,
        adapter: torch.dtype,
        dropout: bool,
        weight: Tensor | None = None,
    ) -> None: ...

def explain_lora_linear_cuda(call: CudaCall, compute_capability: int) -> tuple[str, str]: ...
def explain_lora_linear_grouped_cuda(
    call: CudaCall, compute_capability: int
) -> tuple[str, str]: ...
def explain_rows_cuda(base: torch.dtype) -> tuple[str, str]: ...
def has_cuda_kernels(call: CudaCall, compute_capability: int) -> bool: ...
def set_tuned_cuda_path(call: CudaCall, path: str | None) -> None: ...
def build_info() -> dict[str, Any]: ...
