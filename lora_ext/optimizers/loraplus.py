"""LoRA+ (arXiv:2402.12354): a higher learning rate for lora_B than for lora_A."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lora_ext.arguments import as_rate, check_module
from lora_ext.nn import Embedding, LoraLayer

# Of bitsandbytes: their states of embeddings are to be in 32 bits.
_EIGHT_BITS = frozenset({"Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"})


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer of what trains in a model, in PEFT's four groups: lora_A and others, adapters of
    embeddings, lora_B and vectors, and biases and norms, which have no weight decay.

    Args:
        lr: of the first group.
        loraplus_lr_ratio: how many times that the last two have; at least 1 is meant.
        kwargs: loraplus_weight_decay (0.0) and loraplus_lr_embedding (1e-6); all others are
            `optimizer_cls`'s.

    Raises:
        TypeError: model is no module, or a rate is no number.
        ValueError: a rate, a decay or the ratio is below 0, NaN or infinite, or the ratio 0.
    """
    where = "create_loraplus_optimizer"
    check_module(where, "model", model)
    lr = as_rate(lr, where, "lr")
    lr_of_B = lr * as_rate(loraplus_lr_ratio, where, "loraplus_lr_ratio", above_0=True)
    decay, lr_of_embeddings = (
        as_rate(kwargs.pop(name, default), where, name)
        for name, default in (("loraplus_weight_decay", 0.0), ("loraplus_lr_embedding", 1e-6))
    )
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B, no decay": []}
    for owner, name, parameter in _trained(model):
        if isinstance(owner, Embedding):
            kind = "embedding"
        elif "lora_B" not in name and parameter.dim() != 1:
            kind = "A"
        elif "bias" in name or isinstance(owner, nn.LayerNorm):
            kind = "B, no decay"
        else:
            kind = "B"
        groups[kind].append(parameter)
    rates = {"A": lr, "embedding": lr_of_embeddings, "B": lr_of_B, "B, no decay": lr_of_B}
    optimizer: Any = optimizer_cls
    made: Optimizer = optimizer(
        [
            {
                "params": parameters,
                "weight_decay": 0.0 if kind == "B, no decay" else decay,
                "lr": rates[kind],
            }
            for kind, parameters in groups.items()
        ],
        lr=lr,
        **kwargs,
    )
    if optimizer_cls.__name__ in _EIGHT_BITS:
        import bitsandbytes  # it is of that

        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return made


def _trained(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """What trains, once each, with the module that holds it: of an adapter its layer."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # The base's own weight of an adapted embedding is no adapter.
            is_adapter = not isinstance(module, LoraLayer) or "lora_" in name
            yield module if is_adapter else nn.Module(), f"{path}.{name}", parameter
