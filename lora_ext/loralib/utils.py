"""Training and saving only what is called `lora_...`: loralib's rules, which go by names."""

from __future__ import annotations

from torch import Tensor, nn

from lora_ext.arguments import check_module
from lora_ext.loralib.merging import LoRALayer

_BIAS = ("none", "all", "lora_only")


def _check(model: nn.Module, bias: str, operation: str) -> None:
    check_module(operation, "model", model)
    if bias not in _BIAS:
        raise NotImplementedError(f"{operation}: bias: got {bias!r}, expected one of {_BIAS}")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freezes every parameter whose name is without `lora_`; what has it keeps its requires_grad.

    Args:
        bias: which others train too: "none"; "all", every parameter with "bias" in its name;
            "lora_only", the attribute `bias` of every `LoRALayer` (that of a convolution is its
            `conv`'s, and stays frozen).

    Raises:
        NotImplementedError: bias is something else. Nothing is changed then.
    """
    _check(model, bias, "mark_only_lora_as_trainable")
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad = bias == "all" and "bias" in name
        elif bias == "all" and "bias" in name:
            parameter.requires_grad = True
    if bias == "lora_only":
        for module in model.modules():
            own = getattr(module, "bias", None) if isinstance(module, LoRALayer) else None
            if isinstance(own, Tensor):
                own.requires_grad = True


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The entries of `model.state_dict()` with `lora_` in their names, and the biases that `bias`
    adds as in `mark_only_lora_as_trainable`. Load it with `load_state_dict(..., strict=False)`.

    Raises:
        NotImplementedError: bias is something else.
    """
    _check(model, bias, "lora_state_dict")
    state = model.state_dict()
    chosen: list[str] = []  # in loralib's order
    for name in state:
        if "lora_" in name:
            own_bias = [f"{name.partition('lora_')[0]}bias"] if bias == "lora_only" else []
            chosen += [name, *own_bias]
        elif bias == "all" and "bias" in name:
            chosen.append(name)
    return {name: state[name] for name in chosen if name in state}
