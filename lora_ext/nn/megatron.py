"""What the layers over Megatron's parallel linear layers use of Megatron itself, which is imported
by whoever has such a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_KINDS = ("ColumnParallelLinear", "RowParallelLinear")
# What Megatron's optimizers, its data parallelism and its checkpoints read off a parameter.
_MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "allreduce")


def parallel_kind(module: nn.Module | type) -> type[nn.Module] | None:
    """Megatron's class of a parallel linear layer, itself or of one that derives from it."""
    classes = module.__mro__ if isinstance(module, type) else type(module).__mro__
    for kind in classes:
        if kind.__name__ in _KINDS and kind.__module__.partition(".")[0] == "megatron":
            return kind
    return None


def is_row_parallel(kind: type) -> bool:
    """Whether columns of the weight are divided; else its rows are."""
    return kind.__name__ == "RowParallelLinear"


class Processes:
    """The tensor parallel group of a layer, and Megatron's exchanges within it: each is one
    operator in forward, and its counterpart in backward."""

    def __init__(self, base: nn.Module) -> None:
        kind = parallel_kind(base)
        assert kind is not None
        self._core = kind.__module__.removesuffix(".tensor_parallel.layers")
        self._own_group = getattr(base, "tp_group", None)

    @property
    def group(self) -> Any:
        if self._own_group is not None:
            return self._own_group
        return import_module(f"{self._core}.parallel_state").get_tensor_model_parallel_group()

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    def _exchange(self, name: str, x: Tensor, **options: Any) -> Tensor:
        function: Callable[..., Tensor] = getattr(
            import_module(f"{self._core}.tensor_parallel.mappings"), name
        )
        if "group" in inspect.signature(function).parameters:
            options["group"] = self.group
        return function(x, **options)

    def shared(self, x: Tensor) -> Tensor:
        """x, which all have; its gradient is summed."""
        return self._exchange("copy_to_tensor_model_parallel_region", x)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of all x; each gets its gradient."""
        return self._exchange("reduce_from_tensor_model_parallel_region", x)

    def features(self, x: Tensor) -> Tensor:
        """This process's part of the last dimension."""
        return self._exchange("scatter_to_tensor_model_parallel_region", x)

    def all_features(self, x: Tensor) -> Tensor:
        """The parts of the last dimension, one after another."""
        return self._exchange("gather_from_tensor_model_parallel_region", x)

    def all_tokens(self, x: Tensor) -> Tensor:
        """The parts of the first dimension, one after another; their gradients are summed."""
        return self._exchange("gather_from_sequence_parallel_region", x)

    def summed_tokens(self, x: Tensor) -> Tensor:
        """This process's part of the first dimension of the sum of all x."""
        return self._exchange("reduce_scatter_to_sequence_parallel_region", x)

    @torch.no_grad()
    def of_first(self, x: Tensor) -> Tensor:
        """The x of the group's first process."""
        if x.is_meta or self.count == 1:
            return x
        sent = x.to(self._device(x)).contiguous()
        dist.broadcast(sent, dist.get_global_rank(self.group, 0), group=self.group)
        return sent.to(x.device)

    @torch.no_grad()
    def of_all(self, x: Tensor) -> list[Tensor]:
        """Every process's x."""
        sent = x.detach().to(self._device(x)).contiguous()
        found = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(found, sent, group=self.group)
        return [one.to(x.device) for one in found]

    def described(
        self,
        tensors: dict[str, Any],
        prefix: str,
        dims: dict[str, int],
        offsets: Any,
        metadata: Any,
    ) -> dict[str, Any]:
        """Tensors, of which those in `dims` are divided, as Megatron's checkpoints have them."""
        make = import_module(f"{self._core}.transformer.utils").make_sharded_tensors_for_checkpoint
        groups = {"tp_group": self.group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        known = inspect.signature(make).parameters
        options = {name: group for name, group in groups.items() if name in known}
        described: dict[str, Any] = make(tensors, prefix, dims, offsets, **options)
        return described

    def _device(self, x: Tensor) -> torch.device:
        """Where the group exchanges what is on the device of x."""
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda") if nccl and not x.is_cuda else x.device


def mark_divided(parameter: nn.Parameter, dim: int) -> None:
    """Tells Megatron that each process has a part of a parameter."""
    marks: Any = parameter
    marks.tensor_model_parallel, marks.partition_dim, marks.partition_stride = True, dim, 1


def copy_marks(source: Tensor, target: Tensor) -> None:
    """Tells Megatron of a parameter what it knows of another one."""
    for name in _MARKS:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
