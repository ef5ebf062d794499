"""Which code each layer of a model runs, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_ext._extension import _C, build_info
from lora_ext.adapters.names import named_modules
from lora_ext.arguments import check_module, check_sizes
from lora_ext.loralib import layers as loralib
from lora_ext.nn import Embedding, Linear, LoraLayer
from lora_ext.nn.adapter import LowRank
from lora_ext.nn.kept_base import KeptBase


@dataclass(frozen=True)
class LayerPath:
    """One layer: its name, the path it takes and the reason."""

    name: str
    path: str
    reason: str


class Explanation(list[LayerPath]):
    """Rows of `explain`, printed as a table."""

    def __str__(self) -> str:
        if not self:
            return (
                "no layer of lora_ext is in this model, so no adapter runs; see get_lora_model and "
                "replace_linear"
            )
        width = max((len(row.name) for row in self), default=0)
        path_width = max((len(row.path) for row in self), default=0)
        return "\n".join(
            f"{row.name:<{width}}  {row.path:<{path_width}}  {row.reason}" for row in self
        )


def explain(model: nn.Module, tokens: int = 2048) -> Explanation:
    """The path of every layer of `lora_ext.nn` or `lora_ext.loralib` of `model` for inputs of
    `tokens` rows, as it would run now (device, dtype, training mode, merged or not)."""
    check_module("explain", "model", model)
    check_sizes("explain", tokens=tokens)
    rows = Explanation()
    for name, module in named_modules(model):
        if isinstance(module, LoraLayer):
            rows.append(LayerPath(name, *_explain_layer(module, tokens)))
        elif isinstance(module, loralib.MergingLayer):
            rows.append(LayerPath(name, *_explain_loralib(module, tokens)))
    return rows


def _explain_layer(layer: LoraLayer, tokens: int) -> tuple[str, str]:
    kind = layer._base_class.__name__
    functional = {"Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"}
    base = f"torch.nn.functional.{kind.lower()}" if kind in functional else f"torch.nn.{kind}"
    if not layer.adapters:
        return base, "there is no adapter"
    if layer.merged and not layer.running_adapters:
        return base, "merged: the adapter is in the weight"
    if not layer.running_adapters:
        return base, "no adapter runs: disabled, not active, or of scale 0"
    if isinstance(layer, KeptBase) and layer.reason_to_call:
        beside = "; merged beside the weight, of which the result is no product"
        reason = f"{layer.reason_to_call}: it is called, and the update added to its result"
        return "composed", reason + (beside if layer.merged else "")
    if isinstance(layer, Linear):
        path, reason = _explain_linear(layer, tokens)
        return path, reason + _dora_adds(layer, tokens)
    if isinstance(layer, Embedding):
        path, reason = _explain_embedding(layer)
        return path, reason + _dora_adds(layer, tokens)
    path, reason = layer.PATH
    return path, reason + _dora_adds(layer, tokens)


def _explain_loralib(layer: loralib.MergingLayer, tokens: int) -> tuple[str, str]:
    if not hasattr(layer, "lora_A"):
        return "composed", "there is no adapter"
    if layer.merged:
        return "composed", "merged: the adapter is in the weight"
    if isinstance(layer, loralib.ConvLoRA):
        return "composed", "each call adds the adapter to the weight and convolves once"
    if isinstance(layer, loralib.Embedding):
        return _explain_embedding(layer)
    if isinstance(layer, loralib.MergedLinear):
        return "lora_linear", "one call with a block-diagonal lora_B"
    assert isinstance(layer, loralib.Linear)
    dropout_p = layer.dropout_p()
    if dropout_p is None:
        return "composed", "lora_dropout was replaced, so the update is added in plain PyTorch"
    adapter = LowRank(layer.lora_A, layer.lora_B, None, layer.scaling, dropout_p)
    return _explain_call(layer, layer._turned(layer.weight), adapter, tokens)


def _dora_adds(layer: LoraLayer, tokens: int) -> str:
    names = [name for name in layer._running if layer.adapters[name].use_dora]
    if not names:
        return ""
    dropped = [n for n in names if layer.training and layer.adapters[n].lora_dropout > 0.0]
    if not dropped or isinstance(layer, Embedding):  # which drops nothing
        return "; DoRA scales y, and dy, in one more pass"
    dense = "; DoRA with dropout needs a second base product, forward and backward"
    if not isinstance(layer, Linear) or layer.weight.device.type != "cpu":
        return dense
    if layer.weight.requires_grad:
        return f"{dense}: the weight requires grad"
    if dropped != [layer._running[0]]:
        return f"{dense}: another adapter runs before it"
    skips, reason = _C.explain_dora_linear_cpu(
        tokens, layer.weight.dtype, layer.adapters[dropped[0]].lora_dropout
    )
    return f"; DoRA with dropout: {reason}" if skips else f"{dense}: {reason}"


def _explain_linear(layer: Linear, tokens: int) -> tuple[str, str]:
    first, *others = layer.low_rank()
    path, reason = _explain_call(layer, layer._weight_matrix(), first, tokens)
    if others:
        reason += f"; {len(others)} more for other dropout probabilities, composed"
    return path, reason


def _explain_call(
    layer: nn.Linear, weight: Tensor, adapter: LowRank, tokens: int
) -> tuple[str, str]:
    device, dtype = layer.weight.device, layer.weight.dtype
    if device.type == "cpu":
        return _C.explain_lora_linear_cpu(
            tokens, layer.out_features, adapter.lora_A, dtype, adapter.dropout_p
        )
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
        out_features=layer.out_features,
        in_features=layer.in_features,
        r=len(adapter.lora_A),
        base=dtype,
        adapter=adapter.lora_A.dtype,
        dropout=adapter.dropout_p > 0.0,
        weight=weight if type(weight) in (nn.Parameter, Tensor) else None,
    )
    return _C.explain_lora_linear_cuda(call, 10 * major + minor)


def _explain_embedding(layer: nn.Embedding) -> tuple[str, str]:
    if layer.max_norm is not None:
        return "aten embedding", "max_norm changes the tables before each lookup"
    if layer.sparse and layer.weight.requires_grad:
        return "aten embedding", "the gradient of weight is sparse"
    device = layer.weight.device.type
    if device != "cpu":
        return "aten embedding", f"there is no fused kernel for {device}: two lookups, one product"
    # The kernels on bf16 dot products are lora_linear's alone.
    capability = str(_C.build_info()["cpu_capability"]).removesuffix("_bf16")
    return f"cpu fused {capability}", "one pass over the result; lora_A is gathered in cache"
