"""Linear layers over a base whose weight is quantized.

The base stays as it is, as the child `base_layer`: its tensors, their names below it and their
bytes. It is not called. One adapter of a `Linear`, or several with one dropout probability, which
are stacked, run by the operator on codes; else a call dequantises the weight, computes with it what
the layer over a plain base computes, and keeps the codes for backward. A bitsandbytes layer on a
CPU therefore never repacks its weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_ext import batching, functional
from lora_ext.arguments import former_names, refuse
from lora_ext.nn.adapter import AdapterSettings, LowRank, variant_of
from lora_ext.nn.init import is_loftq, mutates_weight
from lora_ext.nn.kept_base import KeptBase
from lora_ext.nn.linear import KeptLinear, Linear
from lora_ext.nn.merged_linear import KeptMergedLinear, MergedLinear
from lora_ext.nn.planned import follows_plan
from lora_ext.nn.transaction import all_or_nothing, put_parameter
from lora_ext.paths import lora_linear_quantized_path
from lora_ext.quant import linear as quant_linear
from lora_ext.quant.call import (
    Dequantizable,
    cast_by,
    check_in_backward,
    compute_dtype,
    dequantized,
    dtype_now,
    in_dtype_of,
    is_called,
    standing_for,
    values,
    values_now,
)
from lora_ext.quant.kinds import quantized_kind
from lora_ext.quant.merged import dense_layer, requantized_layer
from lora_ext.quant.modules import quantized_weight, resting_dtype
from lora_ext.quant.operator import lora_linear_quantized, traced
from lora_ext.quant.weight import QuantizedWeight

UNCOMPILED = "compiled code calls the layer uncompiled"
HOW = (
    "the weight is dequantised for each call, N x K once in forward and once in backward; "
    + UNCOMPILED
)


def lora_linear(
    x: Tensor, weight: Dequantizable, bias: Tensor | None, adapter: functional.LowRank
) -> Tensor:
    """`lora_ext.lora_linear` on a quantized weight, by the operator on its codes; of a matrix that
    a function dequantises, on what that gives, which backward asks for again."""
    lora_A, lora_B, lora_bias, scaling, dropout_p = _widened_adapter(adapter, x.dtype)
    if isinstance(weight, QuantizedWeight):
        y = lora_linear_quantized(
            x, weight, bias, lora_A, lora_B, lora_bias, scaling=scaling, dropout_p=dropout_p
        )
        check_in_backward(y, weight)
        return y
    with dequantized(weight, x.dtype) as found:
        return functional.lora_linear(
            x, found, bias, lora_A, lora_B, lora_bias, scaling=scaling, dropout_p=dropout_p
        )


def _widened(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A part of an adapter, as operators take it beside a weight of this dtype: a cast of a model
    may leave it narrower than its base computes. Exact."""
    return part.to(torch.promote_types(part.dtype, dtype))


def _widened_adapter(adapter: functional.LowRank, dtype: torch.dtype) -> functional.LowRank:
    lora_A, lora_B, lora_bias, scaling, dropout_p = adapter
    if lora_bias is None and lora_A.dtype is lora_B.dtype is dtype:  # nearly always
        return adapter
    lora_bias = lora_bias if lora_bias is None else _widened(lora_bias, dtype)
    parts = _widened(lora_A, dtype), _widened(lora_B, dtype), lora_bias
    return functional.LowRank(*parts, scaling, dropout_p)


class QuantizedBase(KeptBase):
    """What makes a linear layer one over a base whose weight is quantized."""

    _STATE: ClassVar[frozenset[str]] = KeptBase._STATE | {"_merged_base", "_cast_to"}
    DRAFTED: ClassVar[tuple[str, ...]] = (*KeptBase.DRAFTED, "_merged_base")
    # While merged: a layer with what is merged in its weight, dense or quantized. In a tuple: it is
    # no child.
    _merged_base: tuple[nn.Module, ...]
    # What the layer was cast to, if it was: codes tell of none, or of the dtype before.
    _cast_to: torch.dtype | None = None
    fan_in_fan_out: bool
    in_features: int
    out_features: int

    @classmethod
    def _over_quantized(cls, base: nn.Module) -> Self:
        """A layer, without adapters, over a base of a `quantized_kind`.

        Raises:
            TypeError: it has adapters.
            ValueError: its weight cannot be read.
        """
        if hasattr(base, "merged_adapters"):
            raise TypeError(
                f"{cls.__name__}: base: got {type(base).__qualname__}, expected a layer without "
                "adapters"
            )
        matrix = quantized_weight(base)
        self: Self = cls._around(base)
        self.fan_in_fan_out = False
        self.out_features, self.in_features = matrix.shape
        self._cast_to = getattr(base, "_cast_to", None)  # of one of ours
        return self

    def _init_adapters(self, base_class: type[nn.Module], merge_weights: bool = False) -> None:
        super()._init_adapters(base_class, merge_weights)
        self._merged_base = ()

    # The weight

    @property
    def _kind(self) -> type[nn.Module]:
        return quantized_kind(self._original[0]) or self._base_class

    @property
    def _quantized(self) -> Dequantizable:
        return quantized_weight(self._original[0])

    def _rests_in(self) -> torch.dtype:
        return resting_dtype(self._original[0], self._quantized, self._cast_to)

    def _weight_matrix(self, prefix: str = "") -> Tensor:
        """Of the call that runs; else dequantised here."""
        return values_now(self._quantized, self._rests_in())

    def unmerged_weight(self) -> Tensor:
        """The base's own weight, dequantised."""
        return self._weight_matrix()

    def _adapted_weight(self) -> Tensor:
        """Its shape, dtype and device, without values."""
        matrix = self._quantized
        empty = torch.empty((), dtype=self._rests_in(), device=matrix.device)
        return empty.expand(matrix.shape)

    def _bias_vector(self) -> Tensor | None:
        dtype, bias = dtype_now(self._quantized), self.base_layer._parameters.get("bias")
        return bias if bias is None or dtype is None else bias.to(dtype)

    def _part(self, part: str, name: str) -> Any:
        found = super()._part(part, name)
        if found is None or torch.compiler.is_compiling() or not is_called():
            return found
        dtype = dtype_now(self._quantized)
        return found if dtype is None else _widened(found, dtype)

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """x [..., in_features] → [..., out_features], in the dtype of x (of autocast, where it is
        on), computed in that of autocast, of the base (`compute_dtype`), or of x."""
        if torch.compiler.is_compiling():
            disabled: Any = torch.compiler.disable(self._forward)  # type: ignore[no-untyped-call]
            return disabled(*args, **kwargs)
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        named = [name for name in ("input", "x") if name in kwargs]
        if not args and len(kwargs) == 1 and named:
            args, kwargs = (kwargs[named[0]],), {}
        if len(args) != 1 or kwargs or self.reason_to_call:
            if self._merged_base:
                reason = self.reason_to_call or "the call has other arguments than x"
                raise RuntimeError(
                    f"{type(self).__name__}: adapters {list(self.merged_adapters)} are merged "
                    f"beside the base, which would have to be called: {reason}; call unmerge() "
                    "first"
                )
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        if not isinstance(x, Tensor):
            refuse(type(self).__name__, "input", x, "a tensor")
        if batching.in_use:
            follows_plan(self)  # refuses one while merged
        if self._merged_base:
            return self._with_merged(x, self._merged_base[0])
        dtype = compute_dtype(_own_dtype(self._original[0]), x)
        return in_dtype_of(x, self._product(x.to(dtype)))

    def _product(self, x: Tensor) -> Tensor:
        """Of x in the dtype that is computed in: what the layer over a plain base computes, with
        the weight dequantised for the call."""
        with dequantized(self._quantized, x.dtype):
            y: Tensor = super().forward(x)
        return y

    def _with_merged(self, x: Tensor, merged: Any) -> Tensor:
        dtype = compute_dtype(_own_dtype(self._original[0]), x)
        bias = None if merged.bias is None else merged.bias.to(dtype)
        if quantized_kind(merged) is None:
            y = nn.functional.linear(x.to(dtype), merged.weight.to(dtype), bias)
        else:
            with dequantized(quantized_weight(merged), dtype) as weight:
                y = nn.functional.linear(x.to(dtype), weight, bias)
        return in_dtype_of(x, y)

    def _lora_explain(self, tokens: int) -> tuple[str, str]:
        if self.reason_to_call:
            return super()._lora_explain(tokens)
        if self._merged_base:
            again = quantized_kind(self._merged_base[0]) is not None
            where = f"quantized anew; {HOW}" if again else "dequantised"
            return "torch.nn.functional.linear", f"merged: the adapter is in the weight, {where}"
        with self._without_values():
            path, reason = super()._lora_explain(tokens)
        planned = batching.in_use and follows_plan(self)
        if not planned and not self.running_adapters:
            path = "torch.nn.functional.linear"
        return path, f"{reason}; {HOW}"

    def _without_values(self) -> AbstractContextManager[Tensor]:
        return standing_for(self._quantized, self._adapted_weight())

    # Adapters

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        kind = settings.init_lora_weights
        if mutates_weight(kind):
            does, cure = "changes the base's weight", "expected another kind"
            if is_loftq(kind):
                does = "quantizes the base's weight itself"
                cure = "expected a base in floating point, to be quantized after that"
            raise ValueError(
                f"{type(self).__name__}: init_lora_weights: got {kind!r}, which {does}, {cure}: "
                f"that of a {self._base_class.__qualname__} is quantized already; "
                "replace_lora_weights_loftq makes up for the error of that"
            )
        return super().part_shapes(settings)

    # Merging

    def _merged_parameters(self, names: Any) -> dict[str, Tensor]:
        parameters = self.base_layer._parameters
        found: dict[str, Tensor] = {}
        for name in ("weight", "bias"):
            tensor = parameters.get(name)
            if tensor is not None and (name == "weight" or self._has_lora_bias(names)):
                found[f"{self.BASE_PATH}{name}"] = tensor
        if self._has_lora_bias(names) and f"{self.BASE_PATH}bias" not in found:
            raise ValueError(
                f"{type(self).__name__}.merge: lora_bias cannot be merged into a base without "
                "bias; construct the base with bias=True"
            )
        return found

    def _has_lora_bias(self, names: Any) -> bool:
        return any(self.adapters[name].lora_bias for name in names)

    @all_or_nothing
    @torch.no_grad()
    def _merge(self, names: tuple[str, ...], requantize: bool = False) -> None:
        where = f"{type(self).__name__}.merge"
        self._check_mergeable(where, names)
        self._check_not_computed(where)
        if self.reason_to_call:
            raise ValueError(
                f"{where}: {self.reason_to_call}, so it is called, and what is merged could not be "
                "in its weight, expected a base without; take them off first"
            )
        parameters = self._merged_parameters(names)  # refuses a lora_bias without a bias
        self._put_back()
        base, matrix = self._original[0], self._quantized
        own = {k: p for name in names for k, p in self.adapter_parameters(name).items()}
        exact = _exact(own.values())
        for key, parameter in own.items():
            self._parameters[key] = nn.Parameter(parameter.to(exact), requires_grad=False)
        path = f"{self.BASE_PATH}bias"
        bias = base._parameters.get("bias")
        with standing_for(matrix, values(matrix, exact)) as weight:
            if bias is not None and path in parameters:
                self._put_own({path: bias})
                self._write_merged(names)
                merged = self.base_layer._parameters["bias"]
                put_parameter(self, path, bias)
                bias = merged
            else:
                self._write_merged(names)
        self._parameters.update(own)
        if requantize:
            layer = requantized_layer(base, matrix, weight, bias)
        else:
            layer = dense_layer(base, matrix, weight, bias, self._cast_to)
        self._merged_base = (layer,)
        self.merged_adapters = names
        self._choose_running()

    def _is_merged_beside(self) -> bool:
        return False

    def _put_back(self) -> None:
        """The base never changed."""
        super()._put_back()
        self._merged_base = ()

    def get_base_layer(self) -> nn.Module:
        """The base itself. While merged a layer with what is merged in its weight: an nn.Linear, or
        one of the base's class if it was quantized anew (`requantize`)."""
        base = super().get_base_layer()
        return self._merged_base[0] if self._merged_base else base

    @former_names("get_delta_weight", adapter_name="adapter")
    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging an adapter adds to the dequantised weight, in float32 (float64 for
        float64)."""
        where = f"{type(self).__name__}.get_delta_weight"
        self._check_names([adapter], "adapter")
        if variant_of(self.adapters[adapter]):
            raise ValueError(f"{where}: '{adapter}' scales the weight, expected plain LoRA")
        matrix = self._quantized
        stack = self._stack([adapter])
        exact = _exact([stack.lora_A])
        delta = torch.zeros(matrix.shape, dtype=exact, device=matrix.device)
        lora_A, lora_B = stack.lora_A.to(exact), self._full_lora_B(stack).to(exact)
        torch.ops.lora_ext.merge_(delta, lora_A, lora_B, stack.scaling, None)
        return delta

    def _full_lora_B(self, stack: LowRank) -> Tensor:
        """lora_B [N, r of lora_A]."""
        return stack.lora_B

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What moves or casts the layer also does so to what is merged."""
        super()._apply(fn, recurse)
        self._cast_to = cast_by(fn) or self._cast_to
        for layer in self._merged_base:
            layer._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged:
            error_msgs.append(
                f"{prefix}{type(self).__name__}: {list(self.merged_adapters)} are merged into a "
                "quantized weight; call unmerge() (unmerge_adapter() of a model) before loading"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _own_dtype(base: nn.Module) -> torch.dtype | None:
    own = getattr(base, "compute_dtype", None)
    return own if isinstance(own, torch.dtype) else None


def _exact(parts: Iterable[Tensor]) -> torch.dtype:
    """In what adapters are merged: float32, or float64 if they are in that."""
    is_double = any(part.dtype is torch.float64 for part in parts)
    return torch.float64 if is_double else torch.float32


class QuantizedLinear(QuantizedBase, KeptLinear):
    """`Linear` over a base whose weight is quantized, which is its child `base_layer`."""

    def _only_adapter(self) -> functional.LowRank | None:
        """That of a call of `lora_linear`; None where something else runs."""
        planned = batching.in_use and follows_plan(self)
        adapters = [] if planned or self._lora_variant is not None else self.low_rank()
        return adapters[0] if len(adapters) == 1 else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """x [..., in_features] → [..., out_features], in the dtype of x (of autocast, where it is
        on), computed in that of autocast, of the base (`compute_dtype`), or of x. Compiled code
        calls the operator, of one adapter over a `lora_ext.quant.Linear`; else this, uncompiled."""
        if torch.compiler.is_compiling() and self._is_compiled():
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                return self._compiled(args[0])
        return super().forward(*args, **kwargs)

    def _is_compiled(self) -> bool:
        """Whether compiled code runs the operator; asked while it is compiled."""
        return (
            type(self._original[0]) is quant_linear.Linear
            and self._lora_variant is None
            and len(self._running) == 1
            and not self._merged_base
            and not batching.in_use
            and not self.reason_to_call
        )

    def _compiled(self, x: Tensor) -> Tensor:
        base: Any = self._original[0]
        dtype = compute_dtype(base.compute_dtype, x)
        bias = base.bias if base.bias is None else base.bias.to(dtype)
        adapter = _widened_adapter(self.low_rank()[0], dtype)
        return in_dtype_of(x, traced(x.to(dtype), base.traced_operands(), bias, *adapter))

    def _product(self, x: Tensor) -> Tensor:
        # Several are stacked in float32, which is not enough for an x in float64.
        several = len(self._running) > 1 and x.dtype is torch.float64
        adapter = None if several else self._only_adapter()
        if adapter is None:
            return super()._product(x)
        bias = self.base_layer._parameters.get("bias")
        return lora_linear(x, self._quantized, bias if bias is None else bias.to(x.dtype), adapter)

    def _lora_explain(self, tokens: int) -> tuple[str, str]:
        adapter = self._only_adapter()
        codes = isinstance(self._quantized, QuantizedWeight) and not self._merged_base
        if adapter is None or self.reason_to_call or not codes:
            return super()._lora_explain(tokens)
        path, reason = lora_linear_quantized_path(
            self._adapted_weight(), adapter.lora_A, adapter.dropout_p, tokens
        )
        return path, reason if self._is_compiled() else f"{reason}; {UNCOMPILED}"


class QuantizedMergedLinear(QuantizedBase, KeptMergedLinear):
    """`MergedLinear` over such a base."""

    def _full_lora_B(self, stack: LowRank) -> Tensor:
        return self._block_diagonal(stack)


# The layers do not know those over them: who makes one imports this module first.
Linear._QUANTIZED, MergedLinear._QUANTIZED = QuantizedLinear, QuantizedMergedLinear
