"""Training and saving only the adapters of a model. Names and meanings are loralib's and PEFT's."""

from __future__ import annotations

from torch import Tensor, nn

from lora_ext.arguments import check_module
from lora_ext.loralib.merging import MergingLayer
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.trainable_tokens import TokenTables
from lora_ext.quant.kinds import quantized_kind

_BIAS = ("none", "all", "lora_only")


def _adapter_names(model: nn.Module, bias: str, operation: str) -> set[str]:
    """Names of the adapters' tensors, of their copies of modules to save, and of the base biases
    that `bias` adds."""
    check_module(operation, "model", model)
    if not isinstance(bias, str) or bias not in _BIAS:
        raise ValueError(f"{operation}: bias: got {bias!r}, expected one of {_BIAS}")
    names: set[str] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        # FSDP1's wrappers leave their level out of the names of tensors.
        module_name = ".".join(p for p in module_name.split(".") if p != "_fsdp_wrapped_module")
        prefix = f"{module_name}." if module_name else ""
        adapted = isinstance(module, LoraLayer)
        if isinstance(module, LoraLayer):
            for adapter in module.adapters:
                names |= {prefix + name for name in module.adapter_state_names(adapter)}
        elif isinstance(module, MergingLayer):  # of lora_ext.loralib
            adapted = True
            names |= {prefix + name for name in module._parameters if name.startswith("lora_")}
        elif isinstance(module, TokenTables):
            names |= {prefix + name for name in module}
        elif isinstance(module, ModulesToSave):
            copies = module.modules_to_save.state_dict(prefix=f"{prefix}modules_to_save.")
            names |= copies.keys()
        own = f"{module.BASE_PATH}bias" if isinstance(module, LoraLayer) else "bias"
        has_bias = isinstance(getattr(module, "bias", None), nn.Parameter)
        if has_bias and (bias == "all" or (bias == "lora_only" and adapted)):
            names.add(f"{prefix}{own}")
    return names


def adapter_names(model: nn.Module) -> set[str]:
    """The names in a model's state dict of its adapters and of their copies of modules to save."""
    return _adapter_names(model, "none", "adapter_names")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Sets requires_grad on the adapters, with their copies of modules to save, and clears it on
    everything else, and on what an adapter's initialisation keeps as it is ("mica").

    Args:
        bias: which base biases train too: "none", "all" (of every module), or "lora_only" (of the
            layers that have an adapter).

    Raises:
        ValueError: bias is something else.
    """
    trainable = _adapter_names(model, bias, "mark_only_lora_as_trainable")
    chosen = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in trainable
    }
    for module in model.modules():
        if isinstance(module, LoraLayer):
            frozen = [n for name in module.adapters for n in module.frozen_parameters(name)]
            chosen -= {id(module._parameters.get(name)) for name in frozen}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The part of `model.state_dict()` that is adapters and their copies of modules to save; `bias`
    as for `mark_only_lora_as_trainable`. Load it with `load_state_dict(..., strict=False)`. Of a
    model of FSDP2 it holds DTensors, as the model's own does."""
    names = _adapter_names(model, bias, "lora_state_dict")
    # FSDP1's wrappers are levels in the names of modules, not in those of the state dict.
    names |= {name.replace("_fsdp_wrapped_module.", "") for name in names}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of a model, each counted once; a quantized weight as the values
    that it stands for."""
    check_module("print_trainable_parameters", "model", model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = {id(p): p.numel() for p in model.parameters()}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and quantized_kind(module) is not None:
            sizes[id(weight)] = int(module.out_features) * int(module.in_features)  # type: ignore
    return trainable, sum(sizes.values())


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints the number of trainable parameters, of all parameters, and the share in percent."""
    trainable, total = count_parameters(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
