"""The contenders: the same model with the same adapters, the ways that it can be trained."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lora_ext
from lora_ext.bench.models.bases import Base, Inputs
from lora_ext.bench.models.cases import ModelCase
from lora_ext.bench.rivals import (
    FROZEN,
    OURS,
    KeepMask,
    Unavailable,
    lora_ext_keep_mask,
    torch_keep_mask,
)
from lora_ext.blocks import fuse_blocks

PEFT, PEFT_FP32, COMPILE = "peft", "peft_fp32", "compile"
BLOCKS, RECOMPUTE = f"{OURS}_blocks", f"{OURS}_recompute"


@dataclass(frozen=True)
class Trained:
    """A model behind the interface that checks and measurements use."""

    model: nn.Module
    adapters: tuple[nn.Parameter, ...]  # lora_A and lora_B of each target, in order
    optimizer: torch.optim.Optimizer | None

    @classmethod
    def of(cls, model: nn.Module, adapters: list[nn.Parameter]) -> Trained:
        # A rate at which many steps leave the adapters about what they were
        optimizer = torch.optim.AdamW(adapters, lr=1e-6) if adapters else None
        return cls(model, tuple(adapters), optimizer)

    def logits(self, inputs: Inputs) -> Tensor:
        model: Any = self.model
        more = {"use_cache": False} if model.config.model_type == "llama" else {}
        found: Tensor = model(inputs_embeds=inputs.x, **more).logits
        return found

    def loss(self, inputs: Inputs) -> Tensor:
        return loss_of(self.logits(inputs), inputs)

    def step(self, inputs: Inputs) -> None:
        self.loss(inputs).backward()  # type: ignore[no-untyped-call]
        inputs.x.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def loss_of(logits: Tensor, inputs: Inputs) -> Tensor:
    """In float32 where logits have 16 bits, as transformers does."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.flatten(0, 1).to(wide), inputs.labels.flatten())


@dataclass(frozen=True)
class Way:
    """How to build a contender, and what its checks need to know."""

    name: str
    build: Callable[[Base], Trained]
    fp32_adapters: bool = False
    keep_mask: KeepMask | None = None  # None where the mask cannot be told from outside

    def skip_reason(self, case: ModelCase) -> str | None:
        if self.fp32_adapters and case.dtype == "fp32":
            return f"identical to {self.name.removesuffix('_fp32')} in fp32"
        return None

    def adapter_dtype(self, case: ModelCase) -> torch.dtype:
        return torch.float32 if self.fp32_adapters else case.torch_dtype


def _build_frozen(base: Base) -> Trained:
    return Trained.of(base.copy(), [])


def _load(base: Base, found: list[tuple[nn.Parameter, nn.Parameter]]) -> list[nn.Parameter]:
    with torch.no_grad():
        for own, values in zip(found, base.adapters(), strict=True):
            for parameter, value in zip(own, values, strict=True):
                parameter.copy_(value)
    return [parameter for own in found for parameter in own]


def _peft_model(base: Base, fp32_adapters: bool) -> Trained:
    try:
        peft = importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    config = peft.LoraConfig(
        r=base.case.rank,
        lora_alpha=base.lora_alpha,
        lora_dropout=base.case.dropout_p,
        target_modules=list(base.targets),
    )
    model = peft.get_peft_model(base.copy(), config, autocast_adapter_dtype=fp32_adapters)
    layers = [model.get_submodule(f"base_model.model.{name}") for name in base.targets]
    found = [(one.lora_A["default"].weight, one.lora_B["default"].weight) for one in layers]
    return Trained.of(model, _load(base, found))


def _build_compile(base: Base) -> Trained:
    torch.compiler.reset()  # the guards of earlier cases
    eager = _peft_model(base, fp32_adapters=False)
    compiled: Any = torch.compile(eager.model, dynamic=False)
    return Trained(compiled, eager.adapters, eager.optimizer)


def _our_model(base: Base) -> Trained:
    config = lora_ext.LoraConfig(
        r=base.case.rank,
        lora_alpha=base.lora_alpha,
        lora_dropout=base.case.dropout_p,
        target_modules=list(base.targets),
    )
    model: Any = lora_ext.get_lora_model(base.copy(), config, autocast_adapter_dtype=False)
    layers = [model.get_submodule(f"base_model.model.{name}") for name in base.targets]
    return Trained.of(model, _load(base, [(one.lora_A, one.lora_B) for one in layers]))


def _fused(recompute: bool) -> Callable[[Base], Trained]:
    def build(base: Base) -> Trained:
        trained = _our_model(base)
        blocks = fuse_blocks(trained.model, recompute=recompute)
        if not any(block.fused for block in blocks):
            raise Unavailable("fuse_blocks finds no block in this model")
        if recompute and not any(block.fused and block.kind == "mlp" for block in blocks):
            raise Unavailable("there is no MLP with a gate, whose products could be made again")
        return trained

    return build


_ALL = (
    Way(FROZEN, _build_frozen),
    Way(PEFT, lambda base: _peft_model(base, False), keep_mask=torch_keep_mask),
    Way(
        PEFT_FP32,
        lambda base: _peft_model(base, True),
        fp32_adapters=True,
        keep_mask=torch_keep_mask,
    ),
    Way(COMPILE, _build_compile),  # compiled dropout has random numbers of its own
    Way(OURS, _our_model, keep_mask=lora_ext_keep_mask),
    Way(BLOCKS, _fused(recompute=False), keep_mask=lora_ext_keep_mask),
    Way(RECOMPUTE, _fused(recompute=True), keep_mask=lora_ext_keep_mask),
)
WAYS = {way.name: way for way in _ALL}
