"""Quantizing the linear layers of a model, in place."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Mapping
from itertools import starmap
from operator import call
from typing import Any

import torch
from torch import nn

from lora_ext.quant.call import values
from lora_ext.quant.checks import FLOATS
from lora_ext.quant.in_transformers import (
    forget_quantization,
    is_conv1d,
    is_of_transformers,
    left_alone,
    tell_quantized,
)
from lora_ext.quant.kinds import has_scb, quantized_kind
from lora_ext.quant.linear import QUANT_TYPES, Linear
from lora_ext.quant.merged import as_it_was, dense_layer, turned
from lora_ext.quant.modules import quantized_weight


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
    """Puts a `lora_ext.quant.Linear` in the place of each nn.Linear, and of each Conv1D of
    transformers (GPT-2), of `model`, in place: codes are those of bitsandbytes. All are quantized
    before the first is replaced. The config of a model of transformers says so then
    (`quantization_config`), so that what `save_pretrained` writes is loaded as bitsandbytes'
    layers.

    Args:
        model: searched through; instances of subclasses of nn.Linear are left alone.
        quant_type, block_size, nested: see `quantize`.
        compute_dtype: of the products; that of the inputs if None.
        target_modules: which: names or last parts of names, or a regular expression for whole
            names; if None all but what transformers' quantizers leave alone: the output head
            (`model.get_output_embeddings()`), what shares an embedding's weight, and
            `_keep_in_fp32_modules` (T5's "wo", whose dtype its code asks for).
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
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {n: m for n, m in modules.items() if type(m) is nn.Linear or is_conv1d(m)}
    if target_modules is None:
        kept = left_alone(model)
        linears = {name: m for name, m in linears.items() if not kept(name, m)}
    chosen = {
        name: module
        for name, module in linears.items()
        if (target_modules is None or _means(target_modules, name))
        and not (exclude_modules is not None and _means(exclude_modules, name))
    }
    if not chosen:
        raise ValueError(
            f"quantize_: {_nothing(modules, linears, target_modules, exclude_modules)}"
        )
    made: dict[nn.Module, Linear] = {}
    for name, module in chosen.items():
        if module in made:
            continue
        try:
            made[module] = Linear.from_linear(
                turned(module) if is_conv1d(module) else module,
                quant_type,
                block_size=block_size,
                nested=nested,
                compute_dtype=compute_dtype,
                name=f"{name}.weight",
            )
            if is_conv1d(module):
                made[module].source_cls = type(module)
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
    tell_quantized(model, quant_type, nested, compute_dtype)
    return list(chosen)


@torch.no_grad()
def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Puts a plain, frozen nn.Linear (the Conv1D of transformers, where it was one) in the place of
    each layer with a quantized weight, of `quantize_` or of any library that is read, in place. A
    model of transformers is none that is quantized then: it can be cast and saved. All are
    dequantised before the first is replaced.

    Args:
        model: without adapters: merge_and_unload() or unload() takes them out.
        dtype: of the weights; that which was quantized if None. (LLM.int8() of bitsandbytes does
            not say which: that of the bias, or of a transformers config, or float32.)

    Returns:
        The names that were replaced, in the order of `model.named_modules()`; none are fine.

    Raises:
        TypeError: model is no module, or itself such a layer.
        ValueError: a layer has adapters or a hook of accelerate, or cannot be read.
    """
    if not isinstance(model, nn.Module) or quantized_kind(model) is not None:
        raise TypeError(
            f"dequantize_: model: got {type(model).__qualname__}, expected a module with quantized "
            "layers in it; lora_ext.quant.read_weight(layer).dequantize() gives a single weight"
        )
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dequantize_: dtype: got {dtype!r}, expected None or one of {FLOATS}")
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {name: m for name, m in modules.items() if quantized_kind(m) is not None}
    of_config = getattr(model.config, "dtype", None) if is_of_transformers(model) else None
    made: dict[nn.Module, nn.Module] = {}
    for name, module in chosen.items():
        parent, reason = modules[name.rpartition(".")[0]], None
        if hasattr(parent, "merged_adapters"):
            reason = "has adapters; call merge_and_unload() or unload() of the model that has them"
        elif hasattr(module, "_hf_hook"):
            reason = (
                "has a hook of accelerate; take the hooks off first "
                "(accelerate.hooks.remove_hook_from_module(model, recurse=True))"
            )
        if reason:
            raise ValueError(f"dequantize_: '{name}' {reason}; no layer of the model was changed")
        if module in made:
            continue
        matrix, bias = quantized_weight(module, f"{name}.weight"), module._parameters.get("bias")
        cast_to = getattr(module, "_cast_to", None)
        layer = dense_layer(module, matrix, values(matrix, matrix.dtype), bias, cast_to)
        unknown = bias is None and has_scb(module._parameters.get("weight"))
        wanted = dtype or (of_config if unknown else None)
        made[module] = as_it_was(layer if wanted is None else layer.to(wanted))
    steps = [
        (dict.update, modules[parent]._modules, {child: made[module]})
        for name, module in chosen.items()
        for parent, _, child in [name.rpartition(".")]
    ]
    deque(starmap(call, steps), maxlen=0)
    forget_quantization(model)
    return list(chosen)


def _nothing(
    modules: Mapping[str, nn.Module],
    linears: Collection[str],
    targets: object,
    excluded: object,
) -> str:
    """Why there is nothing to quantize, and what to do."""
    if linears:
        return (
            f"target_modules: {targets!r} matches no nn.Linear that exclude_modules "
            f"({excluded!r}) leaves, expected some of {list(linears)[:10]}"
        )
    adapted = next((n for n, m in modules.items() if hasattr(m, "merged_adapters")), None)
    if adapted is not None:
        return (
            f"model: '{adapted}' has adapters, and nothing else can be quantized; quantize the "
            "base before it gets adapters (unload() takes them out)"
        )
    count = sum(quantized_kind(module) is not None for module in {*modules.values()})
    if count:
        return f"model: is quantized already ({count} layers), and nothing else can be"
    if any(type(module) is nn.Linear for module in modules.values()):
        return (
            "model: all its nn.Linear are left alone unless target_modules names them: output "
            "heads, what shares an embedding's weight, and _keep_in_fp32_modules"
        )
    return "model: has no nn.Linear, expected some; layers of subclasses are left alone"


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
