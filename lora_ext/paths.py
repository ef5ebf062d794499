"""Which code a call of an operator runs, and why: a path and a reason, for `explain`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lora_ext._extension import _C, build_info

Path = tuple[str, str]


def lora_linear_path(weight: Tensor, lora_A: Tensor, dropout_p: float, tokens: int) -> Path:
    """That of `lora_linear` with a weight [N, K] on so many rows of x."""
    device, dtype = weight.device, weight.dtype
    if device.type == "cpu":
        return _C.explain_lora_linear_cpu(tokens, len(weight), lora_A, dtype, dropout_p)
    if device.type != "cuda":
        return "none", f"there are no kernels for {device.type}; move the layer to the CPU"
    if build_info()["cuda"] is None:
        return "none", (
            "this build has no kernels for cuda; move the layer to the CPU, or install lora_ext "
            "again where nvcc and a CUDA build of torch are"
        )
    major, minor = torch.cuda.get_device_capability(device)
    call = _C.CudaCall(
        backward=False,
        device=device.index or 0,
        tokens=tokens,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        r=len(lora_A),
        base=dtype,
        adapter=lora_A.dtype,
        dropout=dropout_p > 0.0,
        weight=weight if type(weight) in (nn.Parameter, Tensor) else None,
    )
    return _C.explain_lora_linear_cuda(call, 10 * major + minor)


def lora_linear_quantized_path(
    weight: Tensor, lora_A: Tensor, dropout_p: float, tokens: int
) -> Path:
    """The same with a quantized weight, of which this one has shape and device, and the dtype of
    x."""
    if weight.device.type == "cpu":
        return _C.explain_lora_linear_cpu(
            tokens, len(weight), lora_A, weight.dtype, dropout_p, quantized=True
        )
    path, reason = lora_linear_path(weight, lora_A, dropout_p, tokens)
    who = "one kernel" if weight.device.type == "cuda" else "ATen"
    return path, f"{reason}; the base is dequantized whole by {who}, in forward and in backward"


def lora_linear_grouped_path(weight: Tensor, ranks: Iterable[int]) -> Path:
    """That of `lora_linear_grouped` with a weight [N, K] and such ranks, as far as sizes tell."""
    name = "lora_linear_grouped"
    if weight.device.type == "cpu":
        return name, "vector kernels over the rows of each adapter"
    composed = "composed products, one adapter after another"
    if weight.device.type != "cuda" or build_info()["cuda"] is None:
        return name, f"{composed}: this build has no kernels for {weight.device.type}"
    major, minor = torch.cuda.get_device_capability(weight.device)
    call = _C.CudaCall(
        backward=False,
        device=weight.device.index or 0,
        tokens=1,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        r=max([1, *ranks]),
        base=weight.dtype,
        adapter=weight.dtype,
        dropout=False,
    )
    path, reason = _C.explain_lora_linear_grouped_cuda(call, 10 * major + minor)
    return f"{name}, {path}", reason if path != "cuda cublas" else f"{composed}: {reason}"


def why_no_lora_embedding(weight: Tensor, max_norm: float | None, sparse: bool) -> str:
    """Why `lora_embedding` does not do what an embedding's options ask for; "" if it does."""
    if max_norm is not None:
        return "max_norm changes the tables before each lookup"
    return "the gradient of weight is sparse" if sparse and weight.requires_grad else ""


def lora_embedding_path(weight: Tensor, max_norm: float | None, sparse: bool) -> Path:
    """That of an embedding with adapters."""
    if reason := why_no_lora_embedding(weight, max_norm, sparse):
        return "aten embedding", reason
    device = weight.device.type
    if device == "cuda" and build_info()["cuda"] is not None:
        return _C.explain_rows_cuda(weight.dtype)
    if device != "cpu":
        return "aten embedding", f"there is no fused kernel for {device}: two lookups, one product"
    # The kernels on bf16 dot products are lora_linear's alone.
    capability = str(_C.build_info()["cpu_capability"]).removesuffix("_bf16")
    return f"cpu fused {capability}", "one pass over the result; lora_A is gathered in cache"


def dora_linear_path(weight: Tensor, dropout_p: float, tokens: int) -> Path:
    """That of `dora_linear`: "" where it makes a second base product."""
    if weight.device.type != "cpu":
        return "", ""
    if weight.requires_grad:
        return "", "the weight requires grad"
    skips, reason = _C.explain_dora_linear_cpu(tokens, weight.dtype, dropout_p)
    return ("dora_linear" if skips else ""), reason
