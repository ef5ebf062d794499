"""Quantizing the linear layers of a model, in place."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection
from itertools import starmap
from operator import call
from typing import Any

import torch
from torch import nn

from lora_ext.quant.linear import QUANT_TYPES, Linear


def quantize_(
    model: nn.Module,
    quant_type: str = "nf4",
    *,
    block_size: int | None = None,
    nested: bool = False,
    compute_dtype: torch.dtype | None = None,
    target_modules: str | Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
) -> list[str]:
    """Puts a `lora_ext.quant.Linear` in the place of each nn.Linear of `model`, in place: codes are
    those of bitsandbytes. All are quantized before the first is replaced.

    Args:
        model: searched through; instances of subclasses of nn.Linear are left alone.
        quant_type, block_size, nested: see `quantize`.
        compute_dtype: of the products; that of the inputs if None.
        target_modules: which: names or last parts of names, or a regular expression for whole
            names; all if None but the output head, which `model.get_output_embeddings()` names.
        exclude_modules: the same, of those to leave alone.

    Returns:
        The names that were replaced, in the order of `model.named_modules()`.

    Raises:
        TypeError: model is no module, or itself an nn.Linear (see `Linear.from_linear`).
        ValueError: nothing matched, or a weight cannot be quantized; names the module.
    """
    if not isinstance(model, nn.Module) or type(model) is nn.Linear:
        raise TypeError(
            f"quantize_: model: got {type(model).__qualname__}, expected a module with linear "
            "layers in it; lora_ext.quant.Linear.from_linear makes a single one"
        )
    if quant_type not in QUANT_TYPES:
        raise ValueError(
            f"quantize_: quant_type: got {quant_type!r}, expected one of {QUANT_TYPES}"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)() if not target_modules else None
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {name: m for name, m in modules.items() if type(m) is nn.Linear and m is not head}
    chosen = {
        name: module
        for name, module in linears.items()
        if (target_modules is None or _means(target_modules, name))
        and not (exclude_modules is not None and _means(exclude_modules, name))
    }
    if not linears:
        raise ValueError(
            "quantize_: model: has no nn.Linear, expected some; layers of subclasses, and those "
            "that are quantized already, are left alone"
        )
    if not chosen:
        raise ValueError(
            f"quantize_: target_modules: {target_modules!r} matches no nn.Linear that "
            f"exclude_modules ({exclude_modules!r}) leaves, expected some of {list(linears)[:10]}"
        )
    made: dict[nn.Module, Linear] = {}
    for name, module in chosen.items():
        try:
            made.setdefault(
                module,
                Linear.from_linear(
                    module,
                    quant_type,
                    block_size=block_size,
                    nested=nested,
                    compute_dtype=compute_dtype,
                ),
            )
        except ValueError as error:
            error.args = (f"quantize_: '{name}': {error}; no layer of the model was changed",)
            raise
    steps: list[tuple[Any, ...]] = []
    for name, module in chosen.items():
        parent, _, child = name.rpartition(".")
        steps.append((dict.update, modules[parent]._modules, {child: made[module]}))
    for parent_module in modules.values():
        if values := _off_the_fast_path(parent_module, made):
            steps.append((dict.update, vars(parent_module), values))
    deque(starmap(call, steps), maxlen=0)  # at once: no signal comes between
    return list(chosen)


def _off_the_fast_path(module: nn.Module, made: Collection[nn.Module]) -> dict[str, object]:
    """PyTorch's fused inference path of a transformer reads the weights of its layers itself: what
    keeps a module off it."""
    if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
        return {}
    if not any(inner in made for inner in module.modules()):
        return {}
    is_layer = isinstance(module, nn.TransformerEncoderLayer)
    return {"activation_relu_or_gelu": 0} if is_layer else {"use_nested_tensor": False}


def _means(names: str | Collection[str], name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in names)
