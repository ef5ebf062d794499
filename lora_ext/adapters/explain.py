"""Which code each layer of a model runs, and why."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_ext import blocks
from lora_ext.adapters.names import named_modules
from lora_ext.arguments import check_module, check_sizes
from lora_ext.loralib.merging import MergingLayer
from lora_ext.nn import LoraLayer
from lora_ext.nn.token_wrappers import TrainableTokensWrapper


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
    context: Any = getattr(model, "_explained_in", nullcontext)
    with context():
        _explain(model, tokens, rows)
    return rows


def _explain(model: nn.Module, tokens: int, rows: Explanation) -> None:
    together = dict[str, str]()
    for block in blocks.fused_blocks(model) if blocks.are_fused() else ():
        text = f"; in one operator: {', '.join(block.layers)} of {block.name or 'the model'}"
        if not block.fused:
            text = f"; not {text[2:]}, since {block.reason}"
        together |= {f"{block.name}.{layer}".lstrip("."): text for layer in block.layers}
    for name, module in named_modules(model):
        if isinstance(module, LoraLayer):
            path, reason = module._lora_explain(tokens)
            rows.append(LayerPath(name, path, reason + together.get(name, "")))
        elif isinstance(module, MergingLayer):
            rows.append(LayerPath(name, *module._lora_explain(tokens)))
        elif isinstance(module, TrainableTokensWrapper):
            rows.append(LayerPath(name, *module.token_adapter._lora_explain(tokens)))
