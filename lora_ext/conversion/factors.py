"""What an adapter adds to the weight of a linear layer, as lora_A and lora_B of a rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_ext.conversion.found import WHERE
from lora_ext.nn.adapter import variant_of
from lora_ext.nn.dora import magnitude_scale
from lora_ext.nn.linear import LinearBase, transformers_conv1d

Svd = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return U, S, V


def factors(
    name: str, layer: Any, adapter_name: str, rank: int | float, svd: Svd
) -> tuple[Tensor, Tensor]:
    """lora_A [r, K] and lora_B [N, r] of one layer, in the adapter's dtype."""
    if isinstance(layer, LinearBase):
        left, right = _added(layer, adapter_name)
        dtype = layer._stack([adapter_name]).lora_A.dtype
    elif _is_exact(layer):
        return _factors_of_miss(layer, adapter_name)
    else:
        left, right = _delta_of_pefts(layer, adapter_name), None
        dtype = left.dtype
    sizes = (len(left), (left if right is None else right).shape[1])
    if isinstance(rank, int) and rank > min(sizes):
        raise ValueError(
            f"{WHERE}: rank: got {rank}, expected at most {min(sizes)}: The chosen rank {rank} is "
            f"larger than the weight shape {list(sizes)} of '{name}'"
        )
    exact = torch.promote_types(left.dtype, torch.float32)
    left, right = left.to(exact), None if right is None else right.to(exact)
    if right is not None and isinstance(rank, int) and rank > len(right):
        left, right = left @ right, None  # vectors beyond those of the product
    if not (left.isfinite().all() and (right is None or right.isfinite().all())):
        raise ValueError(f"{WHERE}: '{name}': its adapter '{adapter_name}' has NaN or Inf")
    U, S, V = svd(left) if right is None else _svd_of_product(left, right, svd)
    r = rank if isinstance(rank, int) else _smallest_rank(S, rank)
    return V[:r].to(dtype).contiguous(), (U[:, :r] * S[:r]).to(dtype).contiguous()


def _svd_of_product(left: Tensor, right: Tensor, svd: Svd) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors of left [N, r] times right [r, K], without the product."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.t())
    U, S, V = svd(r_left @ r_right.t())
    return q_left @ U, S, V @ q_right.t()


def _smallest_rank(S: Tensor, threshold: float) -> int:
    """Of how many singular values, from the largest on, the squares are that share of all."""
    sums = S.square().cumsum(0)
    return int(torch.searchsorted(sums, threshold * sums[-1])) + 1


def _added(layer: LinearBase, adapter_name: str) -> tuple[Tensor, Tensor | None]:
    """What an adapter adds to the weight [N, K]: two factors, or a matrix and None."""
    stack, plain = layer._stack([adapter_name]), layer.plain_parts(adapter_name)
    lora_A, lora_B = stack.lora_A, stack.lora_B
    if plain is not None:
        lora_A, lora_B = plain["lora_A"], plain["lora_B"]
    exact = torch.promote_types(lora_A.dtype, torch.float32)
    lora_A, lora_B = lora_A.to(exact), lora_B.to(exact) * stack.scaling
    if not variant_of(layer.adapters[adapter_name]):
        return lora_B, lora_A
    weight = layer.unmerged_weight().to(exact)
    weight = weight.t() if layer.fan_in_fan_out else weight
    g = magnitude_scale(layer, adapter_name).to(exact).unsqueeze(1)
    return (g - 1) * weight + g * (lora_B @ lora_A), None


def _delta_of_pefts(layer: Any, adapter_name: str) -> Tensor:
    """The same of one of PEFT's layers, in its dtype."""
    base = layer.get_base_layer()
    if hasattr(layer, "miss_fn"):  # its "bat", which is made of the weight
        delta: Tensor = layer.get_delta_weight(adapter_name, base.weight.detach().clone())
    else:
        delta = layer.get_delta_weight(adapter_name)
    return delta.t() if transformers_conv1d(base) else delta


def _is_exact(layer: Any) -> bool:
    return getattr(layer, "miss_fn", "bat") != "bat"


def _factors_of_miss(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """MiSS adds block [r, N] to sums of every r-th feature: that is of rank r as it is."""
    block = layer.miss_block[adapter_name].detach()
    r, (N, K) = len(block), (layer.out_features, layer.in_features)
    block = block.repeat(1, N // block.shape[1])  # "mini" has it once for several parts of the rows
    sums = torch.eye(r, dtype=block.dtype, device=block.device).repeat(1, math.ceil(K / r))
    return sums[:, :K].contiguous(), block.t().contiguous()
