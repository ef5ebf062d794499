"""The classifier of X-LoRA: hidden states to scalings, and scalings to gates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_ext.adapters.xlora.config import XLoraConfig


class XLoraClassifier(nn.Module):
    """An MLP over hidden states.

    Args:
        config: the model's; what `set_topk_lora` and others change there holds at once.
        n_classes: adapters.
        n_layers: layers that have adapters.

    Attributes:
        layers: with PEFT's names of parameters.
    """

    def __init__(
        self,
        config: XLoraConfig,
        n_classes: int,
        n_layers: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert config.hidden_size is not None
        self.config, self.n_classes, self.n_layers = config, n_classes, n_layers
        outputs = n_classes * (n_layers if config.layerwise_scalings else 1)
        features = config.hidden_size
        layers: list[nn.Module] = []
        for last in [*[False] * (config.xlora_depth - 1), True]:
            size = outputs if last else config.xlora_size
            layers.append(
                nn.Linear(features, size, bias=config.use_bias, device=device, dtype=dtype)
            )
            features = size
            if config.enable_relu_and_dropout and not last:
                layers.append(nn.ReLU())
                if config.xlora_dropout_p > 0.0:
                    layers.append(nn.Dropout(config.xlora_dropout_p))
        self.layers = nn.Sequential(*layers)

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """PEFT's names of the linear layers, and these."""
        for name, module in self.layers.named_children():
            if isinstance(module, nn.Linear):
                yield f"layers.{name}", module

    def forward(self, hidden: Tensor) -> Tensor:
        """[requests, tokens, hidden_size] → [requests, tokens, layers, adapters]; one layer stands
        for all without layerwise_scalings."""
        weight = next(self.parameters())
        logits = self.layers(hidden.to(weight.device, weight.dtype))
        scalings: Tensor = logits.unflatten(-1, (-1, self.n_classes))
        if self.config.enable_softmax:
            scalings = (scalings / self.config.softmax_temperature).softmax(-1)
        return scalings

    def gates(self, scalings: Tensor) -> tuple[Tensor, Tensor | None]:
        """What multiplies the updates, [layers, requests, tokens, k], and which adapters these are,
        in the same shape; None are all."""
        scalings, chosen = scalings.movedim(2, 0), None
        if self.config.top_k_lora is not None:
            scalings, chosen = scalings.topk(self.config.top_k_lora, dim=-1)
        if self.config.enable_softmax_topk:
            scalings = scalings.softmax(-1)
        return scalings * self.config.global_scaling_weight, chosen
