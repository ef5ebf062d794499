"""What a model of transformers says of its quantized layers: its config, by which its files are
loaded again, and the marks that `from_pretrained` leaves on it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from lora_ext.arguments import warn
from lora_ext.quant.kinds import has_scb, quantized_kind
from lora_ext.quant.linear import Linear

_MARKS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def is_of_transformers(model: object) -> bool:
    """Whether it is a PreTrainedModel."""
    library: Any = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is exactly transformers' Conv1D, GPT-2's linear layer with a weight [K, N]. Does
    not import transformers."""
    library: Any = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is library.Conv1D


def left_alone(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """Whether transformers' quantizers would leave a linear layer of the model alone, by its name
    and itself."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    fixed: set[str] = set()
    for module in model.modules():  # a part's may not be the whole's
        fixed.update(getattr(module, "_keep_in_fp32_modules", None) or ())

    def is_left_alone(name: str, module: nn.Module) -> bool:
        shared = id(module._parameters.get("weight")) in embeddings
        return module is head or shared or _skips(fixed, name)

    return is_left_alone


def tell_quantized(
    model: Any, quant_type: str, nested: bool, compute_dtype: torch.dtype | None
) -> None:
    """Has the config of a model of transformers, whose layers `quantize_` quantized, say so, as for
    bitsandbytes' layers: they save the same."""
    if not is_of_transformers(model):
        return
    layers = _quantized(model)
    if len({_bits(layer) for layer in layers.values()}) > 1:
        warn(
            "quantize_: some layers are of 4 bits and others of 8, which a config of transformers "
            "cannot say: from_pretrained cannot load what save_pretrained writes; keep "
            "state_dict(), and load it into a model that was quantized in the same way"
        )
        return
    skipped = _dense(model)
    fixed = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    lost = [name for name in layers if _skips([*skipped, *fixed], name)]
    if lost:
        warn(
            f"quantize_: transformers would not take '{lost[0]}' for quantized (by its rules for "
            "llm_int8_skip_modules and _keep_in_fp32_modules): from_pretrained cannot load what "
            "save_pretrained writes; keep state_dict(), or leave the layer out by exclude_modules"
        )
    four = quant_type != "int8"
    config = {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four}
    if four:
        dtype = compute_dtype or next(iter(layers.values())).quantized_weight.dtype
        config |= {
            "bnb_4bit_quant_type": quant_type,
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }
    model.config.quantization_config = config | {"llm_int8_skip_modules": skipped}


def tell_dense(model: Any) -> None:
    """The same after layers of bitsandbytes' kind became dense: which are, or that all are."""
    if not is_of_transformers(model):
        return
    config: Any = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else None
    if getattr(config, "quant_method", method) != "bitsandbytes":
        return  # others may have layers that are not known here
    if not _quantized(model):
        forget_quantization(model)
    elif isinstance(config, dict):
        skipped = _dense(model)
        model.config.quantization_config = config | {"llm_int8_skip_modules": skipped}
    else:
        config.llm_int8_skip_modules = _dense(model)


def forget_quantization(model: Any) -> None:
    """Takes the marks off a model none of whose layers is quantized any more."""
    if not is_of_transformers(model):
        return
    vars(model.config).pop("quantization_config", None)
    for mark in _MARKS:
        vars(model).pop(mark, None)
    if "is_quantized" in vars(model):
        model.is_quantized = False
    for module in model.modules():
        if "_is_quantized" in vars(getattr(module, "config", None) or nn.Module()):
            module.config._is_quantized = False


def _quantized(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if quantized_kind(m) is not None}


def _bits(layer: Any) -> int:
    int8 = isinstance(layer, Linear) and layer.quant_type == "int8"
    return 8 if int8 or has_scb(layer._parameters.get("weight")) else 4


def _dense(model: nn.Module) -> list[str]:
    """The names of what transformers would make quantized layers of."""
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or is_conv1d(module)) and quantized_kind(module) is None
    ]


def _skips(patterns: Collection[str], name: str) -> bool:
    """Whether transformers leaves a module of this name alone."""
    edge = r"(?:(?<=\.)|(?=\.|$))"
    return any(name.endswith(p) or re.match(f"(?:{p}){edge}", name) for p in patterns)
