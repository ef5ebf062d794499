"""What a step moves between processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """As a context: counts the bytes of tensors that this process gives to collectives, of
    DTensor, FSDP2, torch.distributed's functions, and DDP on the CPU. On a GPU it was not tried.

    A number of bytes is that of the tensor that goes in: an all-reduce of n bytes counts n,
    whatever the algorithm then sends (a ring of p processes: 2 n (p-1)/p).

    Attributes:
        bytes, calls: by the kind of collective: "all_reduce", "all_gather", "reduce_scatter",
            "broadcast", "scatter", "all_to_all".
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kind = _kind(func)
        if kind is not None:
            self.calls[kind] += 1
            self.bytes[kind] += _bytes_in(func, args)
        return func(*args, **(kwargs or {}))


_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "scatter", "all_to_all")


def _kind(func: Any) -> str | None:
    if func.namespace not in ("_c10d_functional", "c10d"):
        return None
    name = func._schema.name.partition("::")[2].lstrip("_").replace("allreduce", "all_reduce")
    name = name.replace("allgather", "all_gather").replace("alltoall", "all_to_all")
    return next((kind for kind in _KINDS if name.startswith(kind)), None)


def _bytes_in(func: Any, args: Sequence[Any]) -> int:
    """Of the tensors that go in: the first argument, or the second where that is the output."""
    names = [one.name for one in func._schema.arguments]
    first = args[1] if names[0].startswith("output") else args[0]
    tensors = [one for one in tree_leaves(first) if isinstance(one, Tensor)]
    return sum(one.numel() * one.element_size() for one in tensors)
