"""A linear layer whose weight is divided between processes, as DTensors are by torch's tensor
parallelism: by rows of W [N, K] ("column-wise" in Megatron's and torch's words: each process makes
some columns of y) or by its columns ("row-wise").

    column-wise   W [N/p, K]   lora_A [r, K] everywhere   lora_B [N/p, r]   y [M, N/p]
    row-wise      W [N, K/p]   lora_A [r, K/p]   lora_B [N, r] everywhere   y [M, N], to be summed

Each process makes one fused call with what it has, and what has to be summed over processes is

  - column-wise dx, row-wise y: once, base and adapter together, as without an adapter. A row-wise
    y is a partial sum with the update in it, since B (A x) is linear in its parts along K.
  - column-wise dA, row-wise dB: each process has the part of its rows of lora_B, or columns of x.
    Either these are summed, K r or N r numbers, or what they are made of, dh or h, M r numbers:
    whichever is less. With more tokens than features it is dA and dB, which the fused backward
    makes; with fewer, dh or h is made once more, of few rows.

Communication is DTensor's own: `redistribute`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lora_ext.functional import draw_rng_state, dropout, lora_linear, lora_update
from lora_ext.nn.adapter import AdapterSettings, part_name, variant_of
from lora_ext.nn.init import reads_weight
from lora_ext.nn.sharded import is_sharded
from lora_ext.nn.transaction import shallow

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

STYLES = "lora_ext.distributed.ColwiseLora and RowwiseLora, or lora_plan(plan)"
# Of the dimension of W [N, K] that is divided: that of each part. None is whole everywhere.
_PART_DIMS: dict[int, dict[str, int | None]] = {
    0: {"lora_A": None, "lora_B": 0, "lora_bias": 0, "lora_magnitude_vector": 0},
    1: {"lora_A": 1, "lora_B": None, "lora_bias": None, "lora_magnitude_vector": None},
}


class Division(NamedTuple):
    """How a weight is divided."""

    mesh: DeviceMesh
    dim: int  # of W [N, K]: 0 is column-wise, 1 row-wise


def division(layer: Any) -> Division:
    """That of a layer's weight, a DTensor.

    Raises:
        ValueError: it is divided in another way.
    """
    weight = layer.weight
    places = weight.placements
    if weight.device_mesh.ndim == 1 and type(places[0]).__name__ == "Shard":
        dim = places[0].dim % 2
        return Division(weight.device_mesh, 1 - dim if layer.fan_in_fan_out else dim)
    raise ValueError(
        f"{type(layer).__name__}: its weight is a DTensor with placements {list(places)}, expected "
        "[Shard(0)] or [Shard(1)] on a mesh of one dimension (mesh['tp']) in a forward; a part "
        "that FSDP2 has becomes whole when the module that was given to fully_shard is called"
    )


# Placing adapters


def check_placeable(layer: Any, settings: AdapterSettings) -> None:
    """ValueError where an adapter cannot be added beside a weight that is divided already."""
    _, dim = division(layer)
    if "base_layer" in layer._modules:
        raise ValueError(
            f"{type(layer).__name__}.add_adapter: the base, a "
            f"{type(layer.base_layer).__qualname__}, has to be called itself and its weight is a "
            "DTensor (tensor parallel), expected a plain torch.nn.Linear; leave this layer out "
            "with exclude_modules"
        )
    if dim == 1 and settings.lora_bias and "forward" in vars(layer):
        raise ValueError(
            f"{type(layer).__name__}.add_adapter: lora_bias: got True, expected False: without "
            "gradients transformers' row-wise forward would add it once for each process"
        )
    if settings.has_blocks:
        raise ValueError(
            f"{type(layer).__name__}.add_adapter: got block-diagonal matrices (BD-LoRA), expected "
            "plain ones: they are not divided between processes"
        )
    flag = variant_of(settings)
    if flag or reads_weight(settings.init_lora_weights):
        asked = f"{flag}=True" if flag else f"init_lora_weights={settings.init_lora_weights!r}"
        raise ValueError(
            f"{type(layer).__name__}.add_adapter: got {asked}, which reads the whole weight, "
            f"expected a layer whose weight is no DTensor yet; add the adapter first and divide "
            f"both with {STYLES}"
        )


def place_parts(layer: Any, adapter_name: str) -> None:
    """Divides the parts of a draft's adapter as its weight is; the values are those of the first
    process of the mesh."""
    mesh, dim = division(layer)
    for part in layer.parts(adapter_name):
        name = part_name(part, adapter_name)
        values = layer._parameters[name]
        layer._parameters[name] = _divided(values, mesh, _PART_DIMS[dim][part])


def place_layer(layer: Any, mesh: DeviceMesh, dim: int, src_data_rank: int | None = 0) -> None:
    """Divides a layer with its adapters: `dim` of W [N, K], 0 is column-wise and 1 row-wise.

    Raises:
        ValueError: it is merged, or has DoRA that is to be divided row-wise.
    """
    where = f"{type(layer).__name__}: tensor parallel"
    if layer.merged:
        raise ValueError(f"{where}: it is merged, expected a layer that is not; call unmerge()")
    if blocks := [n for n, s in layer.adapters.items() if s.has_blocks]:
        raise ValueError(
            f"{where}: {blocks} have block-diagonal matrices (BD-LoRA), expected plain adapters"
        )
    if dim == 1 and (dora := [n for n, s in layer.adapters.items() if variant_of(s)]):
        raise ValueError(
            f"{where}: {dora} scale whole rows of the weight (DoRA), expected plain adapters to "
            "divide it row-wise; leave the layer out of the plan or of target_modules"
        )
    stored = 1 - dim if layer.fan_in_fan_out else dim
    dims: dict[str, int | None] = {"weight": stored, "bias": 0 if dim == 0 else None}
    for adapter in layer.adapters:
        dims |= {part_name(part, adapter): _PART_DIMS[dim][part] for part in layer.parts(adapter)}
    divided = {
        name: _divided(parameter, mesh, dims[name], src_data_rank)
        for name, parameter in layer._parameters.items()
        if parameter is not None and not is_sharded(parameter)
    }
    layer._parameters.update(divided)


def _divided(
    parameter: nn.Parameter, mesh: DeviceMesh, dim: int | None, src_data_rank: int | None = 0
) -> nn.Parameter:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placement: Placement = Replicate() if dim is None else Shard(dim)
    parts = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=src_data_rank)
    return nn.Parameter(parts, requires_grad=parameter.requires_grad)


# Calls


def forward(layer: Any, x: Any) -> Tensor:
    """x [..., K], a DTensor that is whole (column-wise) or divided along K (row-wise) → y [..., N],
    a DTensor divided along N, or partial sums.

    Raises:
        ValueError: the weight, or an adapter beside it, is placed otherwise.
        TypeError: x is no DTensor.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    where = type(layer).__name__
    if not is_sharded(x):
        raise TypeError(
            f"{where}: x: got a plain tensor, expected a DTensor beside a weight that is one; "
            f"divide layers by parallelize_module, whose hooks make it, with {STYLES}"
        )
    weight = layer._weight_matrix()
    if not layer._running:
        return nn.functional.linear(x, weight, layer.bias)
    mesh, dim = division(layer)
    if x.device_mesh != mesh:
        raise ValueError(f"{where}: x: got it on {x.device_mesh}, expected the weight's {mesh}")
    N, K = weight.shape
    last = x.ndim - 1
    M = math.prod(x.shape[:-1])
    # Whether those of lora_A, or lora_B, are summed: they are less than dh, or h.
    sums_gradient = layer._lora_variant is not None or M >= (N if dim else K)
    wanted = Shard(last) if dim else Replicate()
    if x.placements != (wanted,):
        x = x.redistribute(placements=[wanted])
    x_local = x.to_local() if dim else x.to_local(grad_placements=[Partial()])
    local = _local_layer(layer, mesh, dim, sums_gradient)
    if layer._lora_variant is not None:
        y = layer._lora_variant.forward(local, x_local, layer._running)
    else:
        y = _adapted(local, layer, x_local, mesh, dim, sums_gradient)
    if dim == 1:
        return DTensor.from_local(y, mesh, [Partial()], run_check=False)
    shape = torch.Size((*x.shape[:-1], N))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(x.ndim))
    return DTensor.from_local(y, mesh, [Shard(last)], run_check=False, shape=shape, stride=stride)


def _adapted(
    local: Any, layer: Any, x: Tensor, mesh: DeviceMesh, dim: int, sums_gradient: bool
) -> Tensor:
    """`lora_ext.nn.linear.adapted_linear` of this process's part of the layer."""
    y: Tensor | None = None
    for low_rank in local.low_rank():
        state = None
        if low_rank.dropout_p > 0.0:
            state = _rng_state(layer, x, mesh, dim)
        A, B, lora_bias, scaling, p = low_rank
        call = low_rank if sums_gradient else low_rank._replace(**_detached(dim, A, B))
        if y is None:
            y = lora_linear(
                x,
                local._weight_matrix(),
                local.bias,
                call.lora_A,
                call.lora_B,
                lora_bias,
                scaling=scaling,
                dropout_p=p,
                rng_state=state,
            )
        else:
            y = y + lora_update(x, call.lora_A, call.lora_B, lora_bias, scaling, p, state)
        if not sums_gradient:
            y = _with_hidden_gradient(y, A, B, x, state, scaling, p, mesh, dim)
    assert y is not None
    return y


def _detached(dim: int, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {"lora_B": B.detach()} if dim else {"lora_A": A.detach()}


def _local_layer(layer: Any, mesh: DeviceMesh, dim: int, sums_gradient: bool) -> Any:
    """A copy of the layer that holds plain tensors: this process's parts. Gradients of what all
    processes hold, and use a part of, are summed on their way back if `sums_gradient`."""
    from torch.distributed.tensor import Partial, Replicate

    local = shallow(layer)
    parameters: dict[str, Any] = local._parameters
    parameters["weight"] = _local(layer.weight)
    if layer.bias is not None:
        _check_part(layer, "bias", layer.bias, mesh, 0 if dim == 0 else None)
        parameters["bias"] = _bias(layer, "bias", dim)
    for adapter in layer._running:
        for part in layer.parts(adapter):
            name = part_name(part, adapter)
            parameter, part_dim = parameters[name], _PART_DIMS[dim][part]
            _check_part(layer, name, parameter, mesh, part_dim)
            if part == "lora_bias":
                parameters[name] = _bias(layer, name, dim)
            elif part_dim is None and parameter.requires_grad and sums_gradient:
                everywhere = parameter.redistribute(placements=[Replicate()])
                parameters[name] = everywhere.to_local(grad_placements=[Partial()])
            else:
                parameters[name] = _local(parameter)
    return local


def _local(parameter: DTensor) -> Tensor:
    """This process's part; of what is frozen without a node of autograd, which takes 70 us."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and parameter.requires_grad):
        return parameter.to_local()


def _bias(layer: Any, name: str, dim: int) -> Tensor:
    """This process's part of a bias: of partial sums the same share in each."""
    bias: DTensor = layer._parameters[name]
    local = _local(bias)
    return _share(local, bias.device_mesh.size()) if dim else local


def _check_part(
    layer: Any, name: str, parameter: Tensor, mesh: DeviceMesh, dim: int | None
) -> None:
    """ValueError unless a part of an adapter is placed as it has to be beside the weight."""
    from torch.distributed.tensor import Replicate, Shard

    wanted: Placement = Replicate() if dim is None else Shard(dim)
    got = "a plain tensor"
    if is_sharded(parameter):
        if parameter.device_mesh == mesh and parameter.placements == (wanted,):
            return
        got = f"placements {list(parameter.placements)}"
    raise ValueError(
        f"{type(layer).__name__}: {name}: got {got}, expected [{wanted}] beside a weight that is a "
        f"DTensor with {list(layer.weight.placements)}; torch's styles do not know adapters: "
        f"divide the layer with {STYLES}"
    )


# Dropout

_CHECKED: WeakSet[nn.Module] = WeakSet()


def _rng_state(layer: Any, x: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """The state of this call's mask. Column-wise all processes drop the same elements of x, which
    they all have: they have to draw the same state, from generators that were seeded alike, which
    is looked at in the first call of a layer. Row-wise each has columns of x of its own, and the
    mask is another one."""
    state = draw_rng_state(x)
    if layer not in _CHECKED:
        from torch.distributed.tensor import DTensor, Shard

        states = DTensor.from_local(state[None], mesh, [Shard(0)], run_check=False).full_tensor()
        if not (states == states[0]).all():
            raise ValueError(
                f"{type(layer).__name__}: processes of one tensor parallel group drew different "
                "dropout states, expected the same: seed them alike (torch.manual_seed(n) in all "
                "of them) before the first step"
            )
        _CHECKED.add(layer)
    if dim == 1:
        state = state.clone()
        state[0] += mesh.get_local_rank() * 0x9E3779B97F4A7C15 % 2**62
    return state


# Gradients that need a sum of something smaller than themselves


def _summed(partial: Tensor, mesh: DeviceMesh) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = DTensor.from_local(partial, mesh, [Partial()], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local()


class _FromHidden(torch.autograd.Function):
    """y itself, whose gradient dy also becomes that of the part that is everywhere, from sums over
    the processes of M r numbers, with d = dropout(x):

    column-wise: lora_A [r, K] gets dh^T d, dh [M, r] being the sum of scaling * dy [M, N/p] B
    row-wise: lora_B [N, r] gets dy^T h, h [M, r] being the sum of scaling * d [M, K/p] A^T
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        A: Tensor,
        B: Tensor,
        x: Tensor,
        state: Tensor | None,
        scaling: float,
        dropout_p: float,
        mesh: DeviceMesh,
        dim: int,
    ) -> Tensor:
        ctx.save_for_backward(A, B, x, state)
        ctx.scaling, ctx.dropout_p, ctx.mesh, ctx.dim = scaling, dropout_p, mesh, dim
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        A, B, x, state = ctx.saved_tensors
        dA = dB = None
        if ctx.needs_input_grad[2 if ctx.dim else 1]:
            rows = dy.reshape(-1, dy.shape[-1]).to(B.dtype)
            d = x if state is None else dropout(x, state, ctx.dropout_p)
            d = d.reshape(-1, d.shape[-1]).to(A.dtype)
            if ctx.dim == 0:
                dA = _summed(rows @ B * ctx.scaling, ctx.mesh).t() @ d
            else:
                dB = rows.t() @ _summed(d @ A.t() * ctx.scaling, ctx.mesh)
        return dy, dA, dB, None, None, None, None, None, None


class _Share(torch.autograd.Function):
    """One of `count` equal shares of a bias, which are summed; its gradient is the whole's, as
    every process has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, count: int) -> Tensor:
        return bias / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


_with_hidden_gradient: Callable[..., Tensor] = _FromHidden.apply
_share: Callable[[Tensor, int], Tensor] = _Share.apply
