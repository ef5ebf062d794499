"""Correctness before speed: every contender against fp64, element by element.

A contender may err twice as much as the naive layer with the same dtypes does, plus a floor that
covers the luck of the naive layer. The floor is derived, with u the unit roundoff:

- 2·u(storage)·max|ref|: a straightforward layer rounds twice, an intermediate (h or dh) and the
  result.
- 2·u(fp32)·√n·rms(ref): a sum of n random-sign terms, added one by one, has partial sums of size
  ~√k, each rounded with variance (u·√k)²/3; the error's deviation is then u·√(n/6)·rms(ref), and
  the largest of a few million such errors is about five deviations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_ext.bench.problem import Problem, reference_outputs
from lora_ext.bench.rivals import (
    FROZEN,
    Contender,
    KeepMask,
    Rival,
    build_naive,
    torch_keep_mask,
)

_NAIVE_FACTOR = 2.0
_SEED = 1234
_Y_NO_GRAD = "y (no_grad)"  # another path than y, and the one that fwd times


@dataclass(frozen=True)
class Error:
    """The largest absolute error of one tensor, and what is allowed."""

    value: float
    bound: float


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a contender, if anything, and the errors measured."""

    faults: tuple[str, ...] = ()
    errors: dict[str, Error] = field(default_factory=dict)


class Checker:
    """Checks the contenders of one problem, and shares the references between them."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._batch = problem.batches[0]
        self._references: list[tuple[Tensor | None, dict[str, Tensor]]] = []
        self._naive_errors: dict[torch.dtype, dict[str, float]] = {}

    def check(self, rival: Rival, contender: Contender) -> Verdict:
        """Compares outputs and gradients; only their form where the dropout mask is unknown."""
        if rival.name == FROZEN:
            return Verdict()  # torch's own nn.Linear
        outputs = self._outputs(contender)
        faults = tuple(self._malformed(outputs))
        if faults or (self._problem.case.dropout_p > 0 and rival.keep_mask is None):
            return Verdict(faults)
        errors = self._errors(rival, outputs)
        wrong = (
            f"{name}: error {error.value:.2g}, at most {error.bound:.2g} allowed"
            for name, error in errors.items()
            if not error.value <= error.bound
        )
        return Verdict(tuple(wrong), errors)

    def _outputs(self, contender: Contender) -> dict[str, Tensor]:
        """Runs both modes from the same RNG state, so that both draw the same mask."""
        torch.manual_seed(_SEED)
        y_no_grad = contender.forward(self._batch)
        if y_no_grad.shape != self._batch.dy.shape:
            return {_Y_NO_GRAD: y_no_grad}  # wrong already, and dy does not fit
        torch.manual_seed(_SEED)
        y = contender.layer(self._batch.x)
        grads = torch.autograd.grad(y, (self._batch.x, *contender.trained), self._batch.dy)
        outputs = {"y": y.detach(), _Y_NO_GRAD: y_no_grad}
        return outputs | dict(zip(("dx", "dA", "dB"), grads, strict=True))

    def _malformed(self, outputs: dict[str, Tensor]) -> Iterator[str]:
        like = {
            "y": self._batch.dy,
            _Y_NO_GRAD: self._batch.dy,
            "dx": self._batch.x,
            "dA": self._problem.lora_A,
            "dB": self._problem.lora_B,
        }
        for name, tensor in outputs.items():
            if tensor.shape != like[name].shape:
                yield f"{name}: shape {tuple(tensor.shape)}, expected {tuple(like[name].shape)}"
            elif not tensor.isfinite().all():
                yield f"{name}: not finite"

    def _errors(self, rival: Rival, outputs: dict[str, Tensor]) -> dict[str, Error]:
        adapter_dtype = rival.adapter_dtype(self._problem.case)
        expected = self._reference(rival.keep_mask, adapter_dtype)
        naive = self._naive(adapter_dtype)
        return {
            name: Error(
                _max_error(tensor, expected[name]),
                _NAIVE_FACTOR * naive[name] + self._floor(name, expected[name], tensor.dtype),
            )
            for name, tensor in outputs.items()
        }

    def _naive(self, adapter_dtype: torch.dtype) -> dict[str, float]:
        """Measures the errors of the naive layer with adapters of this dtype."""
        if adapter_dtype not in self._naive_errors:
            outputs = self._outputs(build_naive(self._problem, adapter_dtype))
            expected = self._reference(torch_keep_mask, adapter_dtype)
            self._naive_errors[adapter_dtype] = {
                name: _max_error(tensor, expected[name]) for name, tensor in outputs.items()
            }
        return self._naive_errors[adapter_dtype]

    def _reference(
        self, keep_mask: KeepMask | None, adapter_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Computes the fp64 outputs for the mask that a layer draws; equal masks share them."""
        mask = None
        p = self._problem.case.dropout_p
        if p > 0 and keep_mask is not None:
            torch.manual_seed(_SEED)
            mask = keep_mask(torch.ones_like(self._batch.x, dtype=adapter_dtype), p)
        for known, outputs in self._references:
            if mask is known or (mask is not None and known is not None and mask.equal(known)):
                return outputs
        outputs = reference_outputs(self._problem, self._batch, mask)
        outputs[_Y_NO_GRAD] = outputs["y"]
        self._references.append((mask, outputs))
        return outputs

    def _floor(self, name: str, expected: Tensor, dtype: torch.dtype) -> float:
        case = self._problem.case
        longest_sum = {
            "y": case.in_features,
            _Y_NO_GRAD: case.in_features,
            "dx": case.out_features,
            "dA": max(case.tokens, case.out_features),
            "dB": max(case.tokens, case.in_features),
        }[name]
        rms = expected.square().mean().sqrt().item()
        rounding = 2 * _unit_roundoff(dtype) * expected.abs().max().item()
        return rounding + 2 * _unit_roundoff(torch.float32) * math.sqrt(longest_sum) * rms


def _unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _max_error(tensor: Tensor, expected: Tensor) -> float:
    return (tensor.double() - expected).abs().max().item()
