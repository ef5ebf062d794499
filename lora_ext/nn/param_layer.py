"""LoRA on parameters of a module, as PEFT's `target_parameters` defines it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple, Self, Unpack

import torch
from torch import Tensor, nn

from lora_ext.nn.adapter import DEFAULT, AdapterOptions, AdapterSettings
from lora_ext.nn.any_layer import AnyLayer


class _Factors(NamedTuple):
    """Of every matrix of a stack: A [E, r, in] and B [E, out, r]."""

    A: Tensor
    B: Tensor
    scaling: float


class ParamLayer(AnyLayer):
    """A layer of any class whose chosen parameters are `W + scaling * B A` in every call, with the
    shapes of PEFT's ParamWrapper.

    A parameter of two dimensions is one matrix [out, in]. One of three is a stack of E matrices,
    the weights of experts, and each has an update of rank r of its own: [E, out, in], or
    [E, in, out] where the module has a true attribute `is_transposed` (GPT-OSS). The adapter of
    parameter `w` is `w_lora_A` [E r, in], expert after expert, and `w_lora_B` [out, r E], in which
    column i E + e belongs to rank i of expert e. Made by `from_module`.
    """

    PATH: ClassVar[tuple[str, str]] = ("composed", "W + scaling * B A of each matrix in every call")

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        weights: Iterable[str],
        r: int = 8,
        lora_alpha: float = 8,
        *,
        adapter_name: str = DEFAULT,
        **options: Unpack[AdapterOptions],
    ) -> Self:
        """As `AnyLayer.from_module`, for parameters of two or three dimensions.

        Raises:
            ValueError: a parameter has more; init_lora_weights other than True, False and
                "gaussian" for a stack; or as there.
        """
        weights = [weights] if isinstance(weights, str) else list(weights)
        for name in weights:
            parameter = getattr(module, "_parameters", {}).get(name)
            if parameter is not None and parameter.dim() > 3:
                raise ValueError(
                    f"{cls.__name__}: weights: '{name}' has {parameter.dim()} dimensions, expected "
                    "2, or 3 for a stack of matrices"
                )
        return super().from_module(
            module, weights, r, lora_alpha, adapter_name=adapter_name, **options
        )

    # The stack

    def _is_transposed(self, name: str) -> bool:
        return getattr(self, name).dim() == 3 and bool(getattr(self, "is_transposed", False))

    def _matrices(self, name: str) -> Tensor:
        """The parameter as [E, out, in], a view."""
        weight: Tensor = getattr(self, name)
        if weight.dim() == 2:
            return weight.unsqueeze(0)
        return weight.mT if self._is_transposed(name) else weight

    def _factors(self, names: Sequence[str], weight_name: str) -> _Factors:
        """Adapters as one of the sum of their ranks."""
        E = self._matrices(weight_name).shape[0]
        each = []
        for name in names:
            stack = self._stack([name], prefix=f"{weight_name}_").for_any()
            A = torch.unflatten(stack.lora_A, 0, (E, -1))
            B = torch.unflatten(stack.lora_B, 1, (-1, E)).permute(2, 0, 1)
            each.append(_Factors(A, B, stack.scaling))
        if len(each) == 1:
            return each[0]
        # The scalings go into B, and with it into float32: there they cost no accuracy.
        compute = torch.promote_types(each[0].B.dtype, torch.float32)
        return _Factors(
            torch.cat([factors.A.to(compute) for factors in each], 1),
            torch.cat([factors.B.to(compute) * factors.scaling for factors in each], 2),
            1.0,
        )

    def _adapted(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)
        factors = self._factors(self._running, name)
        compute = torch.promote_types(weight.dtype, torch.float32)
        left, right = factors.B.to(compute), factors.A.to(compute)
        if self._is_transposed(name):  # the sum is laid out as the parameter is
            left, right = right.mT, left.mT
        stack = weight if weight.dim() == 3 else weight.unsqueeze(0)
        with torch.autocast(weight.device.type, enabled=False):
            total = torch.baddbmm(stack.to(compute), left, right, alpha=factors.scaling)
        return total.to(weight.dtype).view_as(weight)

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        shapes = super().part_shapes(settings)  # refuses lora_dropout and lora_bias
        for name in self.WEIGHTS:
            E, out_features, in_features = self._matrices(name).shape
            kind = settings.init_lora_weights
            if getattr(self, name).dim() == 3 and kind not in (True, False, "gaussian"):
                raise ValueError(
                    f"{type(self).__name__}: init_lora_weights: got {kind!r}, expected True, False "
                    f"or 'gaussian' for the stack of matrices '{name}'"
                )
            r = settings.of(name).r
            shapes[f"{name}_lora_A"] = (E * r, in_features)
            shapes[f"{name}_lora_B"] = (out_features, r * E)
        return shapes

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """As of other layers, under PEFT's name for the argument here, for a layer of one
        parameter."""
        return super().get_delta_weight(adapter_name)

    @torch.no_grad()
    def _initialise(self, name: str, kind: bool | str) -> None:
        super()._initialise(name, kind)
        if kind == "gaussian":
            for weight in self.WEIGHTS:  # deviation 1 / r, not 1 / (E r)
                self._part(f"{weight}_lora_A", name).mul_(self._matrices(weight).shape[0])

    def _write_merged(self, names: Sequence[str]) -> None:
        for name in self.WEIGHTS:
            factors = self._factors(names, name)
            for matrix, A, B in zip(self._matrices(name), factors.A, factors.B, strict=True):
                torch.ops.lora_ext.merge_(matrix, A, B.contiguous(), factors.scaling)
