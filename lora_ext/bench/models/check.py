"""Correctness before speed: logits and every gradient against the same model in fp64.

The fp64 model runs each adapter as it is defined, base(x) + scaling * B(A(mask * x / (1 - p))),
with the masks that the contender draws. A contender may err twice as much as that model does in the
contender's own dtypes, by the norm of each tensor, plus two roundings, since even the luckiest
model rounds its result.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ext.bench.models.bases import Base, Inputs
from lora_ext.bench.models.ways import Trained, Way, loss_of
from lora_ext.bench.problem import SCALING
from lora_ext.bench.rivals import FROZEN, KeepMask, torch_keep_mask

_SEED = 1234
_FACTOR = 2.0
_TOKENS = 128  # of the check: fp64 is slow
Tensors = dict[str, Tensor]


class PlainLora(nn.Module):
    """A layer with an adapter, as it is defined."""

    def __init__(
        self, base: nn.Module, A: Tensor, B: Tensor, p: float, mask: KeepMask, ones: torch.dtype
    ) -> None:
        super().__init__()
        self.base, self.p = base, p
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self._mask, self._ones = mask, ones

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        d = x.to(self.lora_A.dtype)
        if self.p:
            ones = torch.ones(x.shape, dtype=self._ones, device=x.device).flatten(0, -2)
            d = d * self._mask(ones, self.p).view(x.shape) / (1 - self.p)
        return (y + SCALING * F.linear(F.linear(d, self.lora_A), self.lora_B)).to(y.dtype)


class ModelChecker:
    """Checks the contenders of one case, and shares the references between them."""

    def __init__(self, base: Base) -> None:
        self._base = base
        sequences, length = base.case.shape
        length = min(length, _TOKENS)
        (self._inputs, *_) = base.inputs((min(sequences, max(_TOKENS // length, 1)), length))
        self._known: dict[tuple[KeepMask, torch.dtype], tuple[Tensors, Tensors]] = {}

    def check(self, way: Way, trained: Trained) -> tuple[list[str], dict[str, float]]:
        """What is wrong, if anything, and the largest errors over what is allowed, by kind."""
        if way.name == FROZEN:
            return [], {}  # transformers' own model
        found = self._results(trained.model, list(trained.adapters), self._inputs)
        bad = [name for name, value in found.items() if not value.isfinite().all()]
        if bad:
            return [f"{bad[0]} is not finite"], {}
        if way.keep_mask is None and self._base.case.dropout_p:
            return [], {}  # its mask cannot be told
        dtype = way.adapter_dtype(self._base.case)
        exact, plain = self._references(way.keep_mask or torch_keep_mask, dtype)
        faults, shares = [], dict[str, float]()
        for name, value in found.items():
            wanted = exact[name]
            error = _relative(value, wanted)
            bound = _FACTOR * _relative(plain[name], wanted) + 2 * torch.finfo(value.dtype).eps
            kind = name.split()[0]
            shares[kind] = max(shares.get(kind, 0.0), error / bound)
            if not error <= bound:
                faults.append(f"{name} errs by {error:.2g}, at most {bound:.2g} is expected")
        return faults, {kind: round(share, 3) for kind, share in shares.items()}

    def _references(self, mask: KeepMask, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
        """In fp64, and in the contender's dtypes."""
        if (mask, dtype) not in self._known:
            exact, adapters = self._plain(self._base.in_float64(), torch.float64, mask, dtype)
            x = self._inputs.x.detach().double().requires_grad_()
            wanted = self._results(exact, adapters, Inputs(x, self._inputs.labels))
            plain, adapters = self._plain(self._base.copy(), dtype, mask, dtype)
            self._known[mask, dtype] = wanted, self._results(plain, adapters, self._inputs)
        return self._known[mask, dtype]

    def _plain(
        self, model: nn.Module, dtype: torch.dtype, mask: KeepMask, own: torch.dtype
    ) -> tuple[nn.Module, list[Tensor]]:
        """The adapters' values are those that the contender has, of the dtype `own`."""
        adapters: list[Tensor] = []
        p = self._base.case.dropout_p
        for name, (A, B) in zip(self._base.targets, self._base.adapters(), strict=True):
            A, B = A.to(own).to(dtype), B.to(own).to(dtype)
            layer = PlainLora(model.get_submodule(name), A, B, p, mask, own)
            model.set_submodule(name, layer)
            adapters += [layer.lora_A, layer.lora_B]
        return model, adapters

    def _results(self, model: nn.Module, adapters: list[Tensor], inputs: Inputs) -> Tensors:
        torch.manual_seed(_SEED)
        logits = Trained(model, (), None).logits(inputs)
        grads = torch.autograd.grad(loss_of(logits, inputs), [inputs.x, *adapters])
        names = [f"{kind} of {t}" for t in self._base.targets for kind in ("dA", "dB")]
        results = {"logits": logits.detach(), "dx": grads[0]}
        return results | dict(zip(names, grads[1:], strict=True))


def _relative(value: Tensor, wanted: Tensor) -> float:
    error = cast(float, (value.double() - wanted).norm().item())
    size = cast(float, wanted.norm().item())
    return error / size if size else (0.0 if not error else math.inf)
