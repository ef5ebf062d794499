"""The same LoRA model three times: with lora_ext, in naive PyTorch, and with PEFT.

`build_variants` gives all of them the same base, the same initial adapter and the same head, so
that whatever differs afterwards (loss, time, memory) is the doing of the implementation.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from pretrained import EncoderClassifier
from torch import Tensor, nn

import lora_ext

# Name of an adapted linear -> its (lora_A [r, K], lora_B [N, r])
Adapters = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LoraSettings:
    """What the three implementations have in common, in PEFT's words."""

    target_modules: tuple[str, ...]
    r: int
    lora_alpha: float
    lora_dropout: float


class NaiveLoraLinear(nn.Module):
    """LoRA as it is usually written by hand, with frozen `base`."""

    def __init__(self, base: nn.Linear, settings: LoraSettings) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, settings.r, bias=False)
        self.lora_B = nn.Linear(settings.r, base.out_features, bias=False)
        self.dropout = nn.Dropout(settings.lora_dropout)
        self.scaling = settings.lora_alpha / settings.r

    def forward(self, x: Tensor) -> Tensor:
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        y = self.base(x)
        return y + (self.scaling * update).to(y.dtype)


def add_lora_ext(encoder: nn.Module, settings: LoraSettings) -> Adapters:
    names = lora_ext.replace_linear(
        encoder,
        target_modules=list(settings.target_modules),
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
    )
    lora_ext.mark_only_lora_as_trainable(encoder)
    modules = [encoder.get_submodule(name) for name in names]
    return {n: (m.lora_A, m.lora_B) for n, m in zip(names, modules, strict=True)}


def add_naive(encoder: nn.Module, settings: LoraSettings) -> Adapters:
    encoder.requires_grad_(False)
    adapters: Adapters = {}
    for name in target_names(encoder, settings.target_modules):
        layer = NaiveLoraLinear(encoder.get_submodule(name), settings)
        encoder.set_submodule(name, layer)
        adapters[name] = (layer.lora_A.weight, layer.lora_B.weight)
    return adapters


def add_peft(encoder: nn.Module, settings: LoraSettings) -> Adapters:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        target_modules=list(settings.target_modules),
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
    )
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(encoder, config)  # in place; the PeftModel around it is not needed here
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in encoder.named_modules()
        if isinstance(layer, LoraLayer)
    }


# In the order of the tables; "naive" is what the others are compared with.
IMPLEMENTATIONS: dict[str, Callable[[nn.Module, LoraSettings], Adapters]] = {
    "lora_ext": add_lora_ext,
    "naive": add_naive,
    "peft": add_peft,
}


@dataclass
class Variant:
    """One implementation in training, with what was measured on the way."""

    name: str
    model: EncoderClassifier
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def step(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """One training step; returns the loss before the update."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(**inputs), labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def build_variants(
    base: nn.Module, n_classes: int, settings: LoraSettings, *, lr: float, steps: int, seed: int
) -> list[Variant]:
    """All implementations on copies of `base`, with equal initial weights. The learning rate falls
    from `lr` to zero over `steps`."""
    torch.manual_seed(seed)
    head = EncoderClassifier(base, n_classes).head
    initial_A = initial_lora_A(base, settings)
    variants = []
    for name, add_adapters in IMPLEMENTATIONS.items():
        model = EncoderClassifier(copy.deepcopy(base), n_classes)
        adapters = add_adapters(model.encoder, settings)
        if adapters.keys() != initial_A.keys():
            raise RuntimeError(f"{name} adapts other modules: {adapters.keys() ^ initial_A}")
        with torch.no_grad():
            for module, (lora_A, lora_B) in adapters.items():
                lora_A.copy_(initial_A[module])
                lora_B.zero_()
        model.head.load_state_dict(head.state_dict())
        model.to(next(base.parameters()).device).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        variants.append(Variant(name, model, optimizer, schedule))
    return variants


def initial_lora_A(base: nn.Module, settings: LoraSettings) -> dict[str, Tensor]:
    """One seeded initial lora_A [r, K] per target, distributed as PEFT and lora_ext do it."""
    initial: dict[str, Tensor] = {}
    for name in target_names(base, settings.target_modules):
        lora_A = torch.empty(settings.r, base.get_submodule(name).in_features)
        initial[name] = nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    return initial


def target_names(model: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Linears whose name is a target, or ends in one after a dot: PEFT's rule for lists."""
    suffixes = tuple(f".{target}" for target in target_modules)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f".{name}".endswith(suffixes)
    ]


def rotated(variants: list[Variant], step: int) -> Iterator[Variant]:
    """The variants, starting with another one at every step, so that none has a best place."""
    start = step % len(variants)
    yield from variants[start:] + variants[:start]


def saved_for_backward_bytes(variant: Variant, inputs: dict[str, Tensor], labels: Tensor) -> int:
    """Memory that one forward pass keeps alive for the backward pass.

    Counted are whole storages, each once: a saved view keeps all of its storage alive, and a
    tensor saved by several operators costs nothing extra. Parameters are there anyway.
    """
    owned = {p.untyped_storage().data_ptr() for p in variant.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(variant.model(**inputs), labels)
    # The backward pass keeps the graph alive up to here, so no address was counted for two
    # tensors. It also makes this call a warm-up: timed steps do not pay for first-use caches.
    loss.backward()
    variant.optimizer.zero_grad(set_to_none=True)
    return sum(saved.values())
