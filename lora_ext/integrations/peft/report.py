"""What runs the LoRA layers of a PEFT model, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import layer as peft_layer
from torch import nn

from lora_ext.arguments import check_module, check_sizes
from lora_ext.integrations.peft import embedding, layers, linear
from lora_ext.integrations.peft.fusible import (
    LeftToPeft,
    check_device,
    check_dtypes,
    check_no_global_hooks,
    check_own_methods,
    check_pair,
)
from lora_ext.paths import lora_embedding_path, lora_linear_path


@dataclass(frozen=True)
class LayerReport:
    """One LoRA layer of PEFT: its name in the model, PEFT's class, whether a call with x of its
    base's dtype runs fused, the path ("peft" if it does not), and the reason."""

    name: str
    kind: str
    fused: bool
    path: str
    reason: str


class Report(list[LayerReport]):
    """The rows of `report`, printed as a table with a line for each reason."""

    def __str__(self) -> str:
        if not self:
            return "no LoRA layer of PEFT is in this model; see peft.get_peft_model"
        width = max(len(row.name) for row in self)
        path = max(len(row.path) for row in self)
        lines = [f"{row.name:<{width}}  {row.path:<{path}}  {row.reason}" for row in self]
        fused = sum(row.fused for row in self)
        return "\n".join([*lines, f"{fused} of {len(self)} layers run fused"])


def report(model: nn.Module, tokens: int = 2048) -> Report:
    """For every LoRA layer of a PEFT model what a call of `tokens` rows runs as it is now (patched
    or not, active adapters, merged, device, dtypes, training mode), and why."""
    check_module("report", "model", model)
    check_sizes("report", tokens=tokens)
    rows = Report()
    for name, module in model.named_modules():
        if isinstance(module, peft_layer.LoraLayer):
            path, reason = _path(module, tokens)
            fused = path not in ("peft", "base")
            rows.append(LayerReport(name, type(module).__name__, fused, path, reason))
    return rows


def _path(layer: Any, tokens: int) -> tuple[str, str]:
    forward = type(layer).forward
    kinds = {layers.linear_forward: linear, layers.embedding_forward: embedding}
    peft_own = (layers.PEFT_LINEAR_FORWARD, layers.PEFT_EMBEDDING_FORWARD)
    if forward not in kinds and forward not in peft_own:
        return "peft", f"there is no fused call for a lora.{type(layer).__name__}"
    is_linear = forward in (layers.linear_forward, layers.PEFT_LINEAR_FORWARD)
    if (linear if is_linear else embedding).runs_base_alone(layer):
        return "base", "merged, disabled, or no active adapter is in this layer"
    try:
        path = _linear_path(layer, tokens) if is_linear else _embedding_path(layer)
    except LeftToPeft as reason:
        return "peft", str(reason)
    return path if forward in kinds else ("peft", "not patched: call patch() or accelerate(model)")


def _linear_path(layer: Any, tokens: int) -> tuple[str, str]:
    check_own_methods(layer, peft_layer.Linear)
    check_no_global_hooks()
    weight, _ = linear.base_tensors(layer)
    check_device(weight.device)
    adapters = linear.adapters_of(layer, layer.active_adapters)
    for one, magnitude in adapters:
        check_dtypes(weight.dtype, weight.dtype, one.lora_A.dtype, weight.device.type)
        if magnitude is not None:
            check_pair(weight.dtype, one.lora_A.dtype)
    first, magnitude = adapters[0]
    path, reason = lora_linear_path(weight, first.lora_A, first.dropout_p, tokens)
    if magnitude is not None:
        reason += "; DoRA scales y, and dy"
    if len(adapters) > 1:
        reason += f"; {len(adapters)} adapters, those without dropout in one call"
    return path, reason


def _embedding_path(layer: Any) -> tuple[str, str]:
    check_own_methods(layer, peft_layer.Embedding)
    check_no_global_hooks()
    base = embedding.base_of(layer)
    check_device(base.weight.device)
    embedding.check_combination(embedding.adapters_of(layer))
    return lora_embedding_path(base.weight, base.max_norm, base.sparse)
