"""Which code each layer of a model runs, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_ext._extension import _C
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
    device = layer.weight.device.type
    if device != "cpu":
        return "none", f"this build has no kernels for {device}; move the layer to the CPU"
    return _C.explain_lora_linear(
        tokens,
        layer.out_features,
        layer.lora_A,
        layer.weight.dtype,
        layer.lora_dropout if layer.training else 0.0,
    )
