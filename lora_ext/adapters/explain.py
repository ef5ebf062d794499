"""Which code each layer of a model runs, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lora_ext._extension import _C, build_info
from lora_ext.nn import Linear


@dataclass(frozen=True)
class LayerPath:
    """One layer: its name, the path it takes and the reason."""

    name: str
    path: str
    reason: str


class Explanation(list[LayerPath]):
    """Rows of `explain`, printed as a table."""

    def __str__(self) -> str:
        width = max((len(row.name) for row in self), default=0)
        path_width = max((len(row.path) for row in self), default=0)
        return "\n".join(
            f"{row.name:<{width}}  {row.path:<{path_width}}  {row.reason}" for row in self
        )


def explain(model: nn.Module, tokens: int = 2048) -> Explanation:
    """The path of every `lora_ext.nn` layer of `model` for inputs of `tokens` rows, as it would run
    now (device, dtype, training mode, merged or not)."""
    return Explanation(
        LayerPath(name, *_explain_layer(module, tokens))
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    )


def _explain_layer(layer: Linear, tokens: int) -> tuple[str, str]:
    if layer.lora_A is None:
        return "torch.nn.functional.linear", "r = 0: there is no adapter"
    if layer.merged:
        return "torch.nn.functional.linear", "merged: the adapter is in the weight"
    device, dtype = layer.weight.device, layer.weight.dtype
    if device.type == "cpu":
        dropout_p = layer.lora_dropout if layer.training else 0.0
        return _C.explain_lora_linear_cpu(
            tokens, layer.out_features, layer.lora_A, dtype, dropout_p
        )
    if device.type != "cuda":
        return "none", f"there are no kernels for {device.type}; move the layer to the CPU"
    if build_info()["cuda"] is None:
        return "none", (
            "this build has no kernels for cuda; move the layer to the CPU, or install lora_ext "
            "again where nvcc and a CUDA build of torch are"
        )
    major, minor = torch.cuda.get_device_capability(device)
    return _C.explain_lora_linear_cuda(
        layer.out_features, layer.in_features, layer.r, dtype, 10 * major + minor
    )
