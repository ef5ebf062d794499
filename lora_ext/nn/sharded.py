"""Tensors of which each process holds a part: DTensors, as FSDP2 (`fully_shard`) and tensor
parallelism make of parameters; and plain ones, of layers over Megatron's. What is said here is true
of all; torch moves all bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from lora_ext.nn.megatron import Processes


class Part(NamedTuple):
    """What a plain tensor is a part of: one that these processes have divided along a dimension."""

    processes: Processes
    dim: int


# No attributes of theirs: a group of processes is nothing that a pickle can have.
_PARTS: MutableMapping[Tensor, Part] = WeakTensorKeyDictionary()


def set_part(tensor: Tensor, part: Part) -> None:
    """Says that a plain tensor is this process's part of a whole one."""
    _PARTS[tensor] = part


def _part_of(tensor: Tensor) -> Part | None:
    return _PARTS.get(tensor) if _PARTS else None


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether this is a DTensor."""
    # Whoever has one has imported it; the import takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_shards(module: nn.Module) -> bool:
    """Whether any parameter of a model is a DTensor, or one while it is not computed with."""
    divided = any(is_sharded(p) or _part_of(p) is not None for p in module.parameters())
    return divided or any(map(is_fsdp, module.modules()))


def whole(tensor: Tensor) -> Tensor:
    """A DTensor, or a part, gathered from all its processes, which all have to call this; any other
    tensor itself."""
    if is_sharded(tensor):
        return tensor.full_tensor()
    part = _part_of(tensor)
    return tensor if part is None else torch.cat(part.processes.of_all(tensor), part.dim)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """That of `whole(tensor)`."""
    shape, part = list(tensor.shape), _part_of(tensor)
    if part is not None:
        shape[part.dim] *= part.processes.count
    return tuple(shape)


def like(values: Tensor, target: Tensor) -> Tensor:
    """Values that every process has whole, in the form of `target`: this process's part of them if
    that is a DTensor or a part. Moves nothing."""
    part = _part_of(target)
    if part is not None:
        return values.chunk(part.processes.count, part.dim)[part.processes.rank]
    if not is_sharded(target):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh = target.device_mesh
    values = values.to(target.to_local().device, target.dtype)
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=target.placements)


def by_first_process(model: nn.Module, action: Callable[[], object], what: str) -> None:
    """Does it. Where parts of the model are in several processes, which all have to call this,
    process 0 does it for all, and all return when it is done.

    Raises:
        RuntimeError: it failed there; process 0 raises its own error.
    """
    if not has_shards(model):
        action()
        return
    import torch.distributed as dist

    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as own:  # the others wait to be told
            error = own
    outcome: list[Any] = [None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[0] is not None:
        raise RuntimeError(f"{what}: failed in process 0, which does it for all: {outcome[0]}")


# FSDP2. It holds a module's parameters itself and puts them into the module: whole ones for a
# forward, its own part at rest. It looks at the module's again when that loads a state dict.


def is_fsdp(module: nn.Module) -> bool:
    """Whether parameters of this module, not of its children, are FSDP2's."""
    return any(map(_of_fsdp, _after_loading(module)))


def _after_loading(module: nn.Module) -> list[Any]:
    hooks = module.__dict__.get("_load_state_dict_post_hooks")  # a scripted module has none
    return list(hooks.values()) if hooks else []


def _of_fsdp(hook: object) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp._fully_shard")


def to_rest(module: nn.Module) -> None:
    """Makes the parameters of FSDP2 the parts they are between calls: after a forward of its root
    some stay whole."""
    for one in module.modules():
        if is_fsdp(one):
            one.state_dict()  # for which it does that


def tell_fsdp(module: nn.Module) -> None:
    """Makes FSDP2 take the parameters that a module has now for its own."""
    for one in module.modules():
        if is_fsdp(one):
            for hook in _after_loading(one):
                if _of_fsdp(hook):
                    hook(one, None)


def refuse_fsdp(module: nn.Module, where: str, todo: str) -> None:
    """ValueError for a module whose parameters FSDP2 holds: it would go on with those it has."""
    if any(is_fsdp(one) for one in module.modules()):
        raise ValueError(
            f"{where}: got a layer whose parameters FSDP2 (fully_shard) holds, expected one before "
            f"that: {todo}"
        )
