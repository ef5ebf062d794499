"""LoRA on parameters of a module, as PEFT's `target_parameters` defines it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self, Unpack, cast

import torch
from torch import Tensor, nn

from lora_ext import batching
from lora_ext.batching import current_plan
from lora_ext.nn.adapter import DEFAULT, AdapterOptions, AdapterSettings
from lora_ext.nn.any_layer import AnyLayer
from lora_ext.nn.experts import (
    Factors,
    expert_linear,
    experts_forward,
    mix,
    route,
    slots_of,
    why_not_experts,
)
from lora_ext.nn.planned import follows_plan, planned_names, refuse_plan


class ParamLayer(AnyLayer):
    """A layer of any class whose chosen parameters are `W + scaling * B A`, with the shapes of
    PEFT's ParamWrapper.

    transformers' experts run each on its own rows, with the adapter as `lora_linear`; of any other
    module the sum is formed in every call.

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

    # Experts

    def _why_formed(self) -> str | None:
        """Why W + scaling * B A is formed; None where experts run one by one."""
        if torch.compiler.is_compiling():
            return "compiled code cannot depend on how many rows an expert has"
        return why_not_experts(self, self.WEIGHTS)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's."""
        planned = batching.in_use and follows_plan(self)
        if not (planned or self._running) or self._why_formed() is not None:
            return super().forward(*args, **kwargs)
        if self.merged_adapters:
            self._check_merged()
        if planned:
            return self._planned_experts(*args, **kwargs)
        adapters = {name: self._factors(self._running, name) for name in self.WEIGHTS}
        return self._experts(adapters, *args, **kwargs)

    def _experts(
        self,
        adapters: dict[str, Factors],
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights, adapters)

    def _planned_experts(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        plan = current_plan()
        assert plan is not None
        where = type(self).__name__
        tokens = len(hidden_states)
        names = planned_names(self)
        if not names:  # all tokens are the base's, whatever is active
            return self._experts({}, hidden_states, top_k_index, top_k_weights)
        rows = plan.assign((tokens,), hidden_states.device, names, where)
        if rows.rounds:
            refuse_plan(self, "a token has one adapter in each expert, not several with gates")
        routed = route(top_k_index, cast(int, self.num_experts))
        slots = slots_of(routed, tokens, rows)

        def product(name: str, x: Tensor) -> Tensor:
            adapters = []
            if name in self.WEIGHTS:
                adapters = [self._factors([adapter], name) for adapter in rows.names]
            return expert_linear(self, name, x, routed.counts, slots, adapters)

        return mix(self, hidden_states, top_k_weights, routed, product)

    def _planned_path(self) -> tuple[str, str]:
        why = self._why_formed()
        if why is not None:
            return super()._planned_path()
        return "lora_linear_grouped", "for the rows of each expert: a slot is an adapter of one"

    def _product_path(self, tokens: int) -> tuple[str, str]:
        why = self._why_formed()
        if why is None:
            return "lora_linear", "for the rows of each expert, fused with its base product"
        path, reason = super()._product_path(tokens)
        return path, f"{reason}: {why}"

    # The stack

    def _is_transposed(self, name: str) -> bool:
        return getattr(self, name).dim() == 3 and bool(getattr(self, "is_transposed", False))

    def _matrices(self, name: str) -> Tensor:
        """The parameter as [E, out, in], a view."""
        weight: Tensor = getattr(self, name)
        if weight.dim() == 2:
            return weight.unsqueeze(0)
        return weight.mT if self._is_transposed(name) else weight

    def _factors(self, names: Sequence[str], weight_name: str) -> Factors:
        """Adapters as one of the sum of their ranks."""
        E = self._matrices(weight_name).shape[0]
        each = []
        for name in names:
            stack = self._stack([name], prefix=f"{weight_name}_").for_any()
            A = torch.unflatten(stack.lora_A, 0, (E, -1))
            # Copied matrix after matrix: in two dimensions PyTorch transposes in tiles.
            B = stack.lora_B.reshape(-1, E).t().contiguous()
            B = B.view(E, stack.lora_B.shape[0], A.shape[1])
            each.append(Factors(A, B, stack.scaling))
        if len(each) == 1:
            return each[0]
        # The scalings go into B, and with it into float32: there they cost no accuracy.
        compute = torch.promote_types(each[0].B.dtype, torch.float32)
        return Factors(
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
                torch.ops.lora_ext.merge_(matrix, A, B, factors.scaling)
