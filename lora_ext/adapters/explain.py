"""Which code each layer of a model runs, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_ext._extension import _C
from lora_ext.nn import Embedding, Linear, LoraLayer


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
        if isinstance(module, LoraLayer)
    )


def _explain_layer(layer: LoraLayer, tokens: int) -> tuple[str, str]:
    if not layer.adapters:
        return _base_name(layer), "r = 0: there is no adapter"
    if layer.merged:
        return _base_name(layer), "merged: the adapter is in the weight"
    if isinstance(layer, Linear):
        path, reason = _explain_linear(layer, tokens)
        return path, reason + _dora_adds(layer)
    if isinstance(layer, Embedding):
        return _explain_embedding(layer)
    return (
        "aten convolution",
        "lora_A convolves as the base does, and lora_B's result is added to y",
    )


def _dora_adds(layer: LoraLayer) -> str:
    settings = [s for name, s in layer.adapters.items() if s.use_dora and name in layer._running]
    if not settings:
        return ""
    if layer.training and any(s.lora_dropout > 0.0 for s in settings):
        return "; DoRA with dropout needs a second base product, forward and backward"
    return "; DoRA scales y, and dy, in one more pass"


def _base_name(layer: LoraLayer) -> str:
    names = {"Linear": "linear", "Embedding": "embedding"}
    kind = type(layer).__name__
    return f"torch.nn.functional.{names.get(kind, kind.lower())}"


def _explain_linear(layer: Linear, tokens: int) -> tuple[str, str]:
    device = layer.weight.device.type
    if device != "cpu":
        return "none", f"this build has no kernels for {device}; move the layer to the CPU"
    assert layer.lora_A is not None
    return _C.explain_lora_linear(
        tokens,
        layer.out_features,
        layer.lora_A,
        layer.weight.dtype,
        layer.lora_dropout if layer.training else 0.0,
    )


def _explain_embedding(layer: Embedding) -> tuple[str, str]:
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
