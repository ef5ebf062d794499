"""The contenders over a quantized base: `python -m lora_ext.bench --quantized nf4`. The weight of
their problems has the values of its codes, so that all are checked against the same float64."""

from __future__ import annotations

import importlib

import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext import quant
from lora_ext.bench.problem import SCALING, Problem
from lora_ext.bench.rivals import (
    FROZEN,
    OURS,
    OURS_QUANTIZED,
    RIVALS,
    Contender,
    Rival,
    Unavailable,
    lora_ext_keep_mask,
    lora_ext_layer,
    peft_layer,
    torch_keep_mask,
)
from lora_ext.quant import QuantizedWeight
from lora_ext.quant.operator import dequantize

QUANT_TYPES = ("nf4", "int8")


def _matrix(problem: Problem) -> QuantizedWeight:
    assert problem.quantized is not None
    return problem.quantized


def _build_ours(problem: Problem) -> Contender:
    quant_type = "nf4" if _matrix(problem).bits == 4 else "int8"
    return lora_ext_layer(quant.Linear.from_weight(_matrix(problem), quant_type), problem)


class DequantizedLora(nn.Module):
    """The matrix written down in each call, by the kernel that `lora_ext` has for it; then LoRA as
    everyone writes it. It is kept for backward, as autograd does."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.matrix = _matrix(problem)
        self.dropout = nn.Dropout(problem.case.dropout_p)
        self.lora_A = nn.Parameter(problem.lora_A.clone())
        self.lora_B = nn.Parameter(problem.lora_B.clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = dequantize(self.matrix, x.dtype)
        delta = F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)
        return F.linear(x, weight) + SCALING * delta


def _build_dequantized(problem: Problem) -> Contender:
    layer = DequantizedLora(problem)
    return Contender(layer, (layer.lora_A, layer.lora_B))


def _build_peft(problem: Problem) -> Contender:
    """PEFT over bitsandbytes' layer. LLM.int8() rounds x as well: its results are others."""
    try:
        peft, bnb = map(importlib.import_module, ("peft", "bitsandbytes"))
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    if _matrix(problem).bits != 4:
        raise Unavailable("bitsandbytes' LLM.int8() also quantizes x: another computation")
    N, K = problem.weight.shape
    base = bnb.nn.Linear4bit(
        K, N, bias=False, quant_type="nf4", compute_dtype=problem.case.torch_dtype,
        compress_statistics=False,
    )  # fmt: skip
    base.weight = bnb.nn.Params4bit(
        problem.weight.clone(), quant_type="nf4", compress_statistics=False, module=base
    )
    return peft_layer(peft, base.to(problem.weight.device), problem)


# Beside the frozen layer and ours over the unquantized base.
QUANTIZED_RIVALS = (
    RIVALS[FROZEN],
    RIVALS[OURS],
    Rival(OURS_QUANTIZED, _build_ours, keep_mask=lora_ext_keep_mask),
    Rival("dequantize", _build_dequantized, keep_mask=torch_keep_mask),
    Rival("peft_bnb", _build_peft, keep_mask=torch_keep_mask),
)
