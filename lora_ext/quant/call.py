"""One call with a quantized matrix: it is dequantised once, and backward keeps its codes.

Between forward and backward no N x K is in memory: what autograd saves of the dequantised matrix is
the `QuantizedWeight`, which is dequantised again where backward asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lora_ext.quant.operator import dequantize
from lora_ext.quant.weight import QuantizedWeight


class Dequantizable(Protocol):
    """What a call needs of a matrix: `QuantizedWeight` is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    def dtype(self) -> torch.dtype:
        """That of `dequantize()`."""

    @property
    def device(self) -> torch.device:
        """Where the codes are."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [N, K]."""

    def versions(self) -> tuple[int, ...]:
        """How often each of its tensors was changed in place."""

    def owner(self) -> object:
        """What has to live as long as it is used."""


def compute_dtype(own: torch.dtype | None, x: Tensor) -> torch.dtype:
    """The dtype of a product: autocast's, the layer's own (bitsandbytes' compute_dtype), or that of
    x."""
    if _is_autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return own or x.dtype


def cast_by(fn: Callable[[Tensor], Tensor]) -> torch.dtype | None:
    """The dtype to which that which a module's `_apply` is called with casts; None if to none."""
    found = {fn(torch.empty(0, dtype=dtype)).dtype for dtype in (torch.float32, torch.float16)}
    return found.pop() if len(found) == 1 else None


def in_dtype_of(x: Tensor, y: Tensor) -> Tensor:
    """The product in the dtype of x, or of autocast, where it is on."""
    return y if _is_autocast(x) else y.to(x.dtype)


def _is_autocast(x: Tensor) -> bool:
    device = x.device.type
    if (
        x.dtype is torch.float64 or device == "meta"
    ):  # of which torch does not know whether it is on
        return False
    return torch.is_autocast_enabled(device)


class _Kept(NamedTuple):
    """What autograd has of a dequantised matrix, or of a view of it."""

    matrix: Dequantizable
    dtype: torch.dtype
    versions: tuple[int, ...]
    owner: object
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def values(self) -> Tensor:
        _check_versions(self.matrix, self.versions)
        whole = values(self.matrix, self.dtype)
        return whole.as_strided(self.size, self.stride, self.offset)


def _check_versions(matrix: Dequantizable, versions: tuple[int, ...]) -> None:
    if matrix.versions() != versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an "
            f"inplace operation: codes or scales of {matrix!r} changed since the forward, "
            "expected them as they were"
        )


def check_in_backward(y: Tensor, matrix: QuantizedWeight) -> None:
    """Has backward of an operator's result look whether the tensor subclass whose codes it keeps
    was changed in place: autograd looks at the codes, which do not count that."""
    if matrix.whole is None or not y.requires_grad or _is_transformed():
        return
    versions = matrix.versions()
    y.register_hook(lambda dy: _check_versions(matrix, versions))  # type: ignore[no-untyped-call]


class _Call(NamedTuple):
    matrix: Dequantizable
    values: Tensor


_call: ContextVar[_Call | None] = ContextVar("lora_ext quantized call", default=None)


def values(matrix: Dequantizable, dtype: torch.dtype) -> Tensor:
    """The matrix in any floating-point dtype: float64 values are those of float32."""
    if isinstance(matrix, QuantizedWeight):
        return dequantize(matrix, dtype)
    if dtype is torch.float64:
        return matrix.dequantize(torch.float32).double()
    return matrix.dequantize(dtype)


def values_now(matrix: Dequantizable, dtype: torch.dtype) -> Tensor:
    """Those of the call that runs, if it is one with this matrix; else in this dtype, anew."""
    call = _call.get()
    return call.values if call is not None and call.matrix is matrix else values(matrix, dtype)


def is_called() -> bool:
    """Whether a call runs, with whichever matrix."""
    return _call.get() is not None


def dtype_now(matrix: Dequantizable) -> torch.dtype | None:
    """That of the call that runs, if it is one with this matrix."""
    call = _call.get()
    return call.values.dtype if call is not None and call.matrix is matrix else None


@contextmanager
def standing_for(matrix: Dequantizable, given: Tensor) -> Iterator[Tensor]:
    """Has `given` be what `values_now` of a matrix returns."""
    token = _call.set(_Call(matrix, given))
    try:
        yield given
    finally:
        _call.reset(token)


@contextmanager
def dequantized(matrix: Dequantizable, dtype: torch.dtype) -> Iterator[Tensor]:
    """A call with a matrix: its values [N, K], for which autograd keeps the matrix itself."""
    with torch.no_grad():
        found = values(matrix, dtype)
    with standing_for(matrix, found):
        if found.is_meta or not torch.is_grad_enabled() or _is_transformed():
            yield found
        else:
            with _keeping(matrix, found):
                yield found


def _is_transformed() -> bool:
    """Whether torch.func differentiates, which takes no hooks on saved tensors: it keeps N x K."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _keeping(matrix: Dequantizable, found: Tensor) -> saved_tensors_hooks:
    """Of hooks the innermost alone is asked: what is not the matrix goes to those around, such as
    those of torch.utils.checkpoint."""
    place, dtype, device = found.untyped_storage().data_ptr(), found.dtype, found.device
    versions, owner = matrix.versions(), matrix.owner()
    outer: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack_outer, unpack_outer = outer or (_with_version, _of_version)

    def pack(tensor: Tensor) -> Any:
        if type(tensor) is Tensor and tensor.dtype is dtype and tensor.device == device:
            if tensor.untyped_storage().data_ptr() == place:
                view = tensor.size(), tensor.stride(), tensor.storage_offset()
                return _Kept(matrix, dtype, versions, owner, *view)
        return pack_outer(tensor)

    return saved_tensors_hooks(pack, _unpacking(unpack_outer))


def _unpacking(unpack_outer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def unpack(kept: Any) -> Any:
        return kept.values() if type(kept) is _Kept else unpack_outer(kept)

    return unpack


def _with_version(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _of_version(kept: tuple[Tensor, int]) -> Tensor:
    """What was kept; autograd itself does not look where there are hooks."""
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a {list(tensor.shape)} tensor that a layer over a quantized base keeps is "
            f"at version {tensor._version}; expected version {version} instead"
        )
    return tensor
