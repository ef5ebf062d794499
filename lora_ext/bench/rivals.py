"""The contenders: the same layer, written the ways that people write it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_ext
from lora_ext.bench.grid import FWD, Case
from lora_ext.bench.problem import SCALING, Batch, Problem

FROZEN = "frozen"  # the denominator of every ratio
OURS = "lora_ext"
OURS_QUANTIZED = f"{OURS}_quantized"  # see bench/quantized.py

# (ones [M, K] in the adapters' dtype, p) → the keep mask [M, K] that the layer would draw from the
# current state of torch's generator.
KeepMask = Callable[[Tensor, float], Tensor]


class Unavailable(Exception):
    """A rival's library is not installed."""


@dataclass(frozen=True)
class Contender:
    """A built layer behind the interface that checks and timings use."""

    layer: nn.Module  # x [M, K] → y [M, N]
    trained: tuple[Tensor, ...]  # (lora_A, lora_B), or none for the frozen layer

    def forward(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.layer(batch.x)
        return y

    def forward_backward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Returns dx, and dA and dB where there are adapters."""
        y = self.layer(batch.x)
        return torch.autograd.grad(y, (batch.x, *self.trained), batch.dy)

    def call(self, mode: str) -> Callable[[Batch], object]:
        return self.forward if mode == FWD else self.forward_backward


@dataclass(frozen=True)
class Rival:
    """A way to write the layer: how to build it, and what its checks need to know."""

    name: str
    build: Callable[[Problem], Contender]
    fp32_adapters: bool = False
    keep_mask: KeepMask | None = None  # None where the mask cannot be told from outside

    def skip_reason(self, case: Case) -> str | None:
        if self.fp32_adapters and case.dtype == "fp32":
            return f"identical to {self.name.removesuffix('_fp32')} in fp32"
        return None

    def adapter_dtype(self, case: Case) -> torch.dtype:
        return torch.float32 if self.fp32_adapters else case.torch_dtype


def _base_layer(problem: Problem) -> nn.Linear:
    """A frozen layer that shares the problem's weight: all contenders read the same memory."""
    N, K = problem.weight.shape
    layer = nn.Linear(K, N, bias=False, device="meta")
    layer.weight = nn.Parameter(problem.weight, requires_grad=False)
    return layer


def _load(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)


def _build_frozen(problem: Problem) -> Contender:
    return Contender(_base_layer(problem), ())


class NaiveLora(nn.Module):
    """LoRA as everyone writes it: dropout, two small GEMMs, scale, add."""

    def __init__(self, problem: Problem, adapter_dtype: torch.dtype) -> None:
        super().__init__()
        r, K = problem.lora_A.shape
        N = problem.lora_B.shape[0]
        place: dict[str, Any] = {"device": problem.weight.device, "dtype": adapter_dtype}
        self.base = _base_layer(problem)
        self.dropout = nn.Dropout(problem.case.dropout_p)
        self.lora_A = nn.Linear(K, r, bias=False, **place)
        self.lora_B = nn.Linear(r, N, bias=False, **place)
        _load(self.lora_A.weight, problem.lora_A)
        _load(self.lora_B.weight, problem.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        delta: Tensor = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return (y + SCALING * delta).to(y.dtype)


def build_naive(problem: Problem, adapter_dtype: torch.dtype | None = None) -> Contender:
    """Builds the naive layer; its errors are the yardstick of everybody's check."""
    layer = NaiveLora(problem, adapter_dtype or problem.case.torch_dtype)
    return Contender(layer, (layer.lora_A.weight, layer.lora_B.weight))


def _build_compile(problem: Problem) -> Contender:
    # Shapes are fixed within a row. Without the reset, the guards of earlier rows would pile up
    # to dynamo's limit, and the rows after it would silently run eagerly.
    torch.compiler.reset()
    naive = build_naive(problem)
    compiled: Any = torch.compile(naive.layer, dynamic=False)
    return Contender(compiled, naive.trained)


def _peft_builder(fp32_adapters: bool) -> Callable[[Problem], Contender]:
    def build(problem: Problem) -> Contender:
        try:
            peft = importlib.import_module("peft")
        except ModuleNotFoundError as error:
            raise Unavailable(f"{error.name} is not installed") from error
        return peft_layer(peft, _base_layer(problem), problem, fp32_adapters)

    return build


def peft_layer(
    peft: Any, base: nn.Module, problem: Problem, fp32_adapters: bool = False
) -> Contender:
    """PEFT's layer over this base."""
    config = peft.LoraConfig(
        r=problem.case.rank,
        lora_alpha=problem.lora_alpha,
        lora_dropout=problem.case.dropout_p,
        target_modules=["0"],
    )
    model = nn.Sequential(base)
    peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
    layer: Any = model[0]  # called without PeftModel's wrapper, which would only add cost
    trained = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    _load(trained[0], problem.lora_A)
    _load(trained[1], problem.lora_B)
    return Contender(layer, trained)


class _AddmmFunction(torch.autograd.Function):
    """Manual autograd in the style of Unsloth: the LoRA products add into the base's result."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, d: Tensor | None, weight: Tensor, lora_A: Tensor, lora_B: Tensor
    ) -> Tensor:
        ctx.has_dropout = d is not None
        d = x if d is None else d
        h = d @ lora_A.T  # [M, r]
        y = F.linear(x, weight)  # [M, N]
        y.addmm_(h, lora_B.T, alpha=SCALING)
        ctx.save_for_backward(d, h, weight, lora_A, lora_B)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        d, h, weight, lora_A, lora_B = ctx.saved_tensors
        dh = SCALING * (dy @ lora_B)  # [M, r]
        dB = SCALING * (dy.T @ h)  # [N, r]
        dA = dh.T @ d  # [r, K]
        dx = dy @ weight  # [M, K]
        if ctx.has_dropout:
            return dx, dh @ lora_A, None, dA, dB
        return dx.addmm_(dh, lora_A), None, None, dA, dB


class AddmmLora(nn.Module):
    """The layer around it; dropout stays with PyTorch, which keeps the dropped x and its mask."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.p = problem.case.dropout_p
        self.weight = nn.Parameter(problem.weight, requires_grad=False)
        self.lora_A = nn.Parameter(problem.lora_A.clone())
        self.lora_B = nn.Parameter(problem.lora_B.clone())

    def forward(self, x: Tensor) -> Tensor:
        d = F.dropout(x, self.p) if self.p else None
        lora_linear: Callable[..., Tensor] = _AddmmFunction.apply
        return lora_linear(x, d, self.weight, self.lora_A, self.lora_B)


def _build_addmm(problem: Problem) -> Contender:
    layer = AddmmLora(problem)
    return Contender(layer, (layer.lora_A, layer.lora_B))


def _lora_ext_builder(fp32_adapters: bool) -> Callable[[Problem], Contender]:
    return lambda problem: lora_ext_layer(_base_layer(problem), problem, fp32_adapters)


def lora_ext_layer(base: nn.Linear, problem: Problem, fp32_adapters: bool = False) -> Contender:
    """Ours over this base."""
    layer = lora_ext.nn.Linear.from_linear(
        base,
        r=problem.case.rank,
        lora_alpha=problem.lora_alpha,
        lora_dropout=problem.case.dropout_p,
        autocast_adapter_dtype=fp32_adapters,
    )
    lora_A, lora_B = layer.lora_A, layer.lora_B
    assert lora_A is not None and lora_B is not None  # as they are where r > 0
    _load(lora_A, problem.lora_A)
    _load(lora_B, problem.lora_B)
    return Contender(layer, (lora_A, lora_B))


def torch_keep_mask(ones: Tensor, p: float) -> Tensor:
    return F.dropout(ones, p) != 0


def lora_ext_keep_mask(ones: Tensor, p: float) -> Tensor:
    M, K = ones.shape
    return lora_ext.dropout_mask(lora_ext.draw_rng_state(ones), M, K, p)


_ALL = (
    Rival(FROZEN, _build_frozen),
    Rival("naive", build_naive, keep_mask=torch_keep_mask),
    Rival("peft", _peft_builder(False), keep_mask=torch_keep_mask),
    Rival("peft_fp32", _peft_builder(True), fp32_adapters=True, keep_mask=torch_keep_mask),
    Rival("compile", _build_compile),  # compiled dropout has random numbers of its own
    Rival("addmm", _build_addmm, keep_mask=torch_keep_mask),
    Rival("lora_ext", _lora_ext_builder(False), keep_mask=lora_ext_keep_mask),
    Rival(
        "lora_ext_fp32",
        _lora_ext_builder(True),
        fp32_adapters=True,
        keep_mask=lora_ext_keep_mask,
    ),
)
RIVALS = {rival.name: rival for rival in _ALL}
