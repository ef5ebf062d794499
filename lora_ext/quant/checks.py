"""ValueErrors of malformed states: which tensor, which field, what was got, what was expected."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from lora_ext.arguments import describe

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_VALUES = 2**62  # more than any memory holds; sums of sizes stay far from overflow


def fail(name: str, field: str, got: object, expected: str) -> NoReturn:
    """Refuses one field of one tensor."""
    words = got if isinstance(got, str) else describe(got)
    raise ValueError(f"{name}: {field}: got {words}, expected {expected}")


def is_integer(value: Any) -> bool:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_shape(name: str, shape: Any) -> tuple[int, int]:
    """(N, K), both at least 1."""
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        fail(name, "shape", shape, "two sizes, (N, K)")
    shape = [int(size) if isinstance(size, np.integer) else size for size in shape]  # of gguf
    if not all(is_integer(size) and size >= 1 for size in shape):
        fail(name, "shape", shape, "two sizes (N, K) of at least 1")
    if shape[0] * shape[1] > MAX_VALUES:
        fail(name, "shape", shape, f"at most {MAX_VALUES} values")
    return int(shape[0]), int(shape[1])


def check_count(name: str, field: str, value: Any) -> int:
    """A positive int."""
    if not is_integer(value) or not 1 <= value <= MAX_VALUES:
        fail(name, field, value, f"an int of at least 1 and at most {MAX_VALUES}")
    return int(value)


def check_tensor(
    name: str,
    field: str,
    value: Any,
    numel: int,
    dtypes: tuple[torch.dtype, ...],
    why: str = "",
) -> Tensor:
    """A flat, dense tensor of this size and of one of these dtypes."""
    named = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    expected = f"a contiguous {named} tensor of shape [{numel}]{why}"
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        fail(name, field, value, expected)
    if value.dtype not in dtypes or tuple(value.shape) != (numel,):
        fail(name, field, value, expected)
    if not value.is_contiguous():
        fail(name, field, f"strides {list(value.stride())}", expected)
    return value


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 of inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def check_dtype(name: str, field: str, value: Any) -> None:
    """One of those that values are computed in."""
    if value not in FLOATS:
        fail(name, field, value, "torch.float32, torch.float16 or torch.bfloat16")


def plain(name: str, field: str, value: Any) -> Tensor:
    """A dense tensor without its history and its class."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        fail(name, field, value, "a dense tensor")
    if value.is_meta:
        fail(
            name, field, "a tensor without data", "one not on the meta device; load the model first"
        )
    if hasattr(value, "full_tensor"):
        fail(name, field, "one process's part of a DTensor", "the whole: value.full_tensor()")
    return value.detach().as_subclass(Tensor)


def need_tensor(name: str, field: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """What a reader is about to flatten: plain, of one of these dtypes."""
    found = plain(name, field, value)
    if found.dtype not in dtypes:
        named = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        fail(name, field, value, f"a {named} tensor")
    return found


def need_finite(name: str, field: str, value: Tensor) -> Tensor:
    """Numbers that values are multiplied by."""
    if not torch.isfinite(value).all():
        fail(name, field, "NaN or Inf", "finite numbers; the weight, or its file, is damaged")
    return value


def need_numel(name: str, field: str, value: Tensor, numel: int, why: str) -> Tensor:
    """Flat, and so many values."""
    if value.numel() != numel:
        fail(name, field, value, f"{numel} values ({why})")
    return value.reshape(-1)
