"""PEFT's `lora.Embedding` on `lora_embedding`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.tuners.lora.variants import DoraEmbeddingVariant
from torch import Tensor, nn

from lora_ext.functional import column_scale, lora_embedding, weight_norm
from lora_ext.integrations.peft.fusible import (
    LeftToPeft,
    check_arguments,
    check_called_plainly,
    check_exportable,
    check_no_global_hooks,
    check_own_methods,
    check_pair,
    check_scaling,
    check_tensor,
    check_variant,
    check_x,
    magnitude_of,
)
from lora_ext.nn.adapter import LowRank, stacked
from lora_ext.nn.dora import scale_of
from lora_ext.nn.embedding import is_scaled_word_embedding
from lora_ext.paths import why_no_lora_embedding


def runs_base_alone(layer: Any) -> bool:
    """Whether a call is one of the base layer, in which nothing can be fused."""
    if layer.disable_adapters or layer.merged:
        return True
    return all(name not in layer.lora_embedding_A for name in layer.active_adapters)


def fused_forward(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`layer(x)` where adapters run.

    x [...] of row numbers → [..., embedding_dim].

    Raises:
        LeftToPeft: PEFT has to run the layer.
    """
    check_arguments(args, kwargs)
    if kwargs.get("adapter_names") is not None:
        raise LeftToPeft("adapter_names of an embedding")
    check_exportable()
    check_own_methods(layer, peft_layer.Embedding)
    check_no_global_hooks()
    check_x(x)
    if x.dtype not in (torch.int64, torch.int32):
        raise LeftToPeft(f"dtypes: x {x.dtype}")
    base, adapters = base_of(layer), adapters_of(layer)
    check_combination(adapters)
    weight = base.weight
    low_rank = stacked([one for one, _ in adapters]) if len(adapters) > 1 else adapters[0][0]
    magnitude = adapters[0][1]
    if magnitude is not None and low_rank.lora_A.dtype != weight.dtype:
        raise LeftToPeft("DoRA in another dtype than its embedding's")
    y = lora_embedding(
        x,
        weight,
        low_rank.lora_A,
        low_rank.lora_B,
        scaling=low_rank.scaling,
        padding_idx=base.padding_idx,
        scale_grad_by_freq=base.scale_grad_by_freq,
    )
    if magnitude is not None:
        A, B = low_rank.lora_A.detach(), low_rank.lora_B.detach()
        norm = weight_norm(weight.detach().t(), A, B, low_rank.scaling)
        y = column_scale(y, scale_of(magnitude, norm))
    scale = layer._get_embed_scale()
    return y if scale is None else y * scale.to(y.dtype)


def check_combination(adapters: Sequence[tuple[LowRank, Tensor | None]]) -> None:
    """LeftToPeft where DoRA scales what another adapter made."""
    if len(adapters) > 1 and any(magnitude is not None for _, magnitude in adapters):
        raise LeftToPeft("DoRA beside another adapter of an embedding")


def base_of(layer: Any) -> Any:
    """The base layer. LeftToPeft where it is no plain embedding."""
    base = layer._modules["base_layer"]
    forward = type(base).forward if is_scaled_word_embedding(base) else nn.Embedding.forward
    check_called_plainly(base, "base_layer", forward)
    check_tensor(base.weight, "the base's weight")
    if reason := why_no_lora_embedding(base.weight, base.max_norm, base.sparse):
        raise LeftToPeft(reason)
    if base.sparse:
        raise LeftToPeft("the gradient of lora_A is sparse")
    return base


def adapters_of(layer: Any) -> list[tuple[LowRank, Tensor | None]]:
    """The active adapters that the layer has, each with the magnitude of its DoRA, or None."""
    weight = layer._modules["base_layer"].weight
    adapters = []
    for name in layer.active_adapters:
        if name not in layer.lora_embedding_A:
            continue
        A, B, scaling = (
            layer.lora_embedding_A[name],
            layer.lora_embedding_B[name],
            layer.scaling[name],
        )
        check_tensor(A, "lora_embedding_A")
        check_tensor(B, "lora_embedding_B")
        if A.dtype != B.dtype:
            raise LeftToPeft(f"dtypes: A {A.dtype}, B {B.dtype}")
        check_pair(weight.dtype, A.dtype)
        check_scaling(scaling, name)
        if isinstance(scaling, Tensor):
            B, scaling = B * scaling, 1.0
        if layer.input_fns.get(name) is not None or layer.output_fns.get(name) is not None:
            raise LeftToPeft("the embedding is tensor parallel")
        magnitude = None
        if check_variant(layer, name, DoraEmbeddingVariant):
            part = layer.lora_magnitude_vector[name]
            magnitude = magnitude_of(part, DoraEmbeddingLayer.forward)
        adapters.append((LowRank(A, B, None, scaling, 0.0), magnitude))
    return adapters
