"""Tensors of which each process holds a part: DTensors, as FSDP2 (`fully_shard`) and tensor
parallelism make of parameters. What is said here is true of both; torch moves all bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether this is a DTensor."""
    # Whoever has one has imported it; the import takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_shards(module: nn.Module) -> bool:
    """Whether any parameter of a model is a DTensor, or one while it is not computed with."""
    return any(is_sharded(p) for p in module.parameters()) or any(map(is_fsdp, module.modules()))


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all processes of its mesh, which all have to call this; any other
    tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(values: Tensor, target: Tensor) -> Tensor:
    """Values that every process has whole, in the form of `target`: this process's part of them if
    that is a DTensor. Moves nothing."""
    if not is_sharded(target):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh = target.device_mesh
    values = values.to(target.to_local().device, target.dtype)
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=target.placements)


def by_first_process(action: Callable[[], object], what: str) -> None:
    """Has process 0 do it, for all, which all have to call this and return when it is done.

    Raises:
        RuntimeError: it failed there; process 0 raises its own error.
    """
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
