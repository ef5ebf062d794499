"""What a base model needs to be trained by its adapters alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.arguments import as_flag, check_module
from lora_ext.quant.kinds import is_own, quantized_kind

# Methods of quantization whose 16-bit parameters stay as they are.
_KEEPS_16_BITS = frozenset({"gptq", "aqlm", "eetq", "hqq", "torchao"})


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a model of transformers was told to use gradient checkpointing; newer versions have
    another name for it, and warn of the former one."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(next((getattr(model, name) for name in names if hasattr(model, name)), False))


def prepare_model_for_gradient_checkpointing(model: nn.Module) -> nn.Module:
    """Makes the output of the input embedding of a model of transformers require gradients, as
    checkpoints that are recomputed with `use_reentrant=True` need where all else is frozen.

    Returns:
        `model` itself.
    """
    check_module("prepare_model_for_gradient_checkpointing", "model", model)
    found: Any = model
    if hasattr(found, "enable_input_require_grads"):
        found.enable_input_require_grads()
    elif hasattr(found, "get_input_embeddings"):
        found.get_input_embeddings().register_forward_hook(_require_grad)
    return model


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freezes a base model before it gets adapters, makes its float16 and bfloat16 parameters
    float32 (but for gptq, aqlm, eetq, hqq and torchao, and never a quantized weight), and switches
    gradient checkpointing on where the model is quantized, by transformers or `quantize_`.

    Args:
        gradient_checkpointing_kwargs: of `gradient_checkpointing_enable` of transformers.
        auto_clear_cache: gives the GPU the memory back that making parameters float32 freed.

    Returns:
        `model` itself.
    """
    where = "prepare_model_for_kbit_training"
    check_module(where, "model", model)
    found: Any = model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    method = str(getattr(found, "quantization_method", None) or "").rpartition(".")[2].lower()
    few_bits = any(getattr(found, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    quantized = [module for module in model.modules() if quantized_kind(module) is not None]
    codes = {id(module._parameters.get("weight")) for module in quantized}
    few_bits |= any(map(is_own, quantized))
    if method not in _KEEPS_16_BITS:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                # Others that hold packed values are of an embedding.
                if id(parameter) not in codes and type(parameter).__name__ != "Params4bit":
                    parameter.data = parameter.data.to(torch.float32)
        if as_flag(auto_clear_cache, where, "auto_clear_cache") and torch.cuda.is_available():
            torch.cuda.empty_cache()
    wanted = as_flag(use_gradient_checkpointing, where, "use_gradient_checkpointing")
    if wanted and (few_bits or method in _KEEPS_16_BITS):
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant", True):
            prepare_model_for_gradient_checkpointing(model)
        if hasattr(found, "gradient_checkpointing_enable"):
            found.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model
