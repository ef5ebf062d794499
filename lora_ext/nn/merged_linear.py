"""LoRA on some of the projections that one linear layer computes together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn

from lora_ext import batching
from lora_ext.arguments import named_x, refuse, suggests_names
from lora_ext.functional import lora_update
from lora_ext.nn.adapter import DEFAULT, AdapterOptions, AdapterSettings, LowRank
from lora_ext.nn.linear import LinearBase, _KeptLinearBase, adapted_linear
from lora_ext.nn.planned import follows_plan, planned_linear, stacks

# How many zeros per row of a block-diagonal lora_B, on average, are cheaper than calls of their
# own: those read x again, add up their parts of dx, and copy y together. Measured forward and
# backward in float32 on 2 busy cores, 2048 x 768 -> 2304, over the time of the base: the outer two
# of three slices at r = 16 (21 zeros) 1.2 with one call, 1.5 with three; at r = 64 (85 zeros) 1.6
# and 1.9; all three at r = 128 (256 zeros) 2.5 and 2.6.
_FEW_ZEROS = 256


@suggests_names
class MergedLinear(LinearBase):
    """`nn.Linear` whose output is several slices, each with or without an adapter: the fused
    q, k, v projection of GPT-2, say.

    For the j-th enabled slice, W[slice] gets `scaling * lora_B[rows of j] lora_A[j r : (j + 1) r]`,
    with scaling = lora_alpha / r; the rows of other slices get exactly zero. `lora_A`
    [n_enabled * r, in_features] and `lora_B` [sum of the enabled sizes, r] are stored as loralib
    does. Freezing, merging and several adapters are as in `Linear`.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        r: rank of each enabled slice; 0 is a plain linear layer, without an adapter.
        lora_alpha, lora_dropout, use_rslora, init_lora_weights, autocast_adapter_dtype: see
            `AdapterSettings`.
        enable_lora: one bool per slice, in the order of the output.
        fan_in_fan_out: `weight` is stored as [in_features, out_features].
        merge_weights: eval() merges and train() unmerges, as loralib does.
        slice_sizes: rows of each slice, which may differ (grouped-query attention); None divides
            out_features equally.

    Raises:
        ValueError: an adapter without an enabled slice (also loralib's default `[False]` with
            r > 0), sizes that do not add up to out_features, or a setting out of range.
    """

    HAS_CAPACITY: ClassVar[bool] = False
    PATH: ClassVar[tuple[str, str]] = (
        "lora_linear",
        "one call with a block-diagonal lora_B, or one for each slice where that has many zeros",
    )

    _STATE: ClassVar[frozenset[str]] = LinearBase._STATE | {"enable_lora", "slice_sizes"}
    enable_lora: tuple[bool, ...]
    slice_sizes: tuple[int, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = False,
        *,
        slice_sizes: Sequence[int] | None = None,
        use_rslora: bool = False,
        bias: bool = True,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self._init_base(in_features, out_features, fan_in_fan_out, merge_weights, **options)
        self._init_slices(enable_lora, slice_sizes)
        self._with_adapter(
            DEFAULT,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        enable_lora: Sequence[bool],
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        slice_sizes: Sequence[int] | None = None,
        adapter_name: str = DEFAULT,
        **options: Unpack[AdapterOptions],
    ) -> Self:
        """The same layer with an adapter on the enabled slices; shares its parameters with
        `linear`. The other arguments and errors are those of `Linear.from_linear`."""
        self = cls._from_linear(linear)
        self._init_slices(enable_lora, slice_sizes)
        return self._with_adapter(adapter_name, r, lora_alpha, lora_dropout, **options)

    @classmethod
    def from_conv1d(
        cls,
        conv1d: nn.Module,
        enable_lora: Sequence[bool],
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        slice_sizes: Sequence[int] | None = None,
        adapter_name: str = DEFAULT,
        **options: Unpack[AdapterOptions],
    ) -> Self:
        """As `from_linear`, for a Conv1D of transformers."""
        self = cls._from_conv1d(conv1d)
        self._init_slices(enable_lora, slice_sizes)
        return self._with_adapter(adapter_name, r, lora_alpha, lora_dropout, **options)

    def _init_slices(self, enable_lora: Sequence[bool], slice_sizes: Sequence[int] | None) -> None:
        where = type(self).__name__
        if not isinstance(enable_lora, Sequence) or isinstance(enable_lora, str):
            refuse(where, "enable_lora", enable_lora, "a list of one bool for each slice")
        n = len(enable_lora)
        if n == 0:
            raise ValueError(f"{where}: enable_lora: got no slices, expected at least one bool")
        if slice_sizes is None:
            if self.out_features % n:
                raise ValueError(
                    f"{where}: enable_lora: {self.out_features} out_features do not divide into {n}"
                    " equal slices; give slice_sizes"
                )
            slice_sizes = [self.out_features // n] * n
        if len(slice_sizes) != n:
            raise ValueError(
                f"{where}: slice_sizes: got {len(slice_sizes)} sizes, expected {n}, as many as "
                "enable_lora has"
            )
        if min(slice_sizes) < 0 or sum(slice_sizes) != self.out_features:
            raise ValueError(
                f"{where}: slice_sizes: got {list(slice_sizes)}, expected sizes whose sum is "
                f"out_features, {self.out_features}"
            )
        self.enable_lora = tuple(bool(enabled) for enabled in enable_lora)
        self.slice_sizes = tuple(slice_sizes)

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        if not any(self.enable_lora):
            raise ValueError(
                f"{type(self).__name__}: enable_lora: got {list(self.enable_lora)}, expected at "
                "least one True for an adapter; r=0 makes a plain linear layer"
            )
        if settings.lora_bias:
            raise ValueError(
                f"{type(self).__name__}: lora_bias: got True, expected False; it is not supported "
                "for slices"
            )
        sizes = self._enabled_sizes()
        return {
            "lora_A": (len(sizes) * settings.r, self.in_features),
            "lora_B": (sum(sizes), settings.r),
        }

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        if input is None or x is not None:
            input = named_x(type(self).__name__, x, input)
        x = input
        if batching.in_use and follows_plan(self):
            wide = {
                name: stack._replace(lora_B=self._block_diagonal(stack))
                for name, stack in stacks(self)
            }
            return planned_linear(self, x, self._weight_matrix(), self._bias_vector(), wide)
        adapters, weight, whole_bias = self.low_rank(), self._weight_matrix(), self._bias_vector()
        sizes = self._enabled_sizes()
        zeros = len(sizes) - sum(sizes) / max(self.out_features, 1)
        if sum(adapter.lora_B.shape[1] for adapter in adapters) * zeros <= _FEW_ZEROS:
            blocks = [one._replace(lora_B=self._block_diagonal(one)) for one in adapters]
            return adapted_linear(x, weight, whole_bias, blocks)
        # Each slice then has its own dropout mask, as layers of their own would.
        slices = [list(self._slices(adapter)) for adapter in adapters]
        parts = []
        for j, rows in enumerate(self._row_slices()):
            bias = None if whole_bias is None else whole_bias[rows]
            own = [adapter[j] for adapter in slices]
            present = [adapter for adapter in own if adapter is not None]
            parts.append(adapted_linear(x, weight[rows], bias, present))
        return torch.cat(parts, -1)

    def _update_of(self, x: Tensor, name: str) -> Tensor:
        dropout_p = self.adapters[name].lora_dropout if self.training else 0.0
        stack = self._stack([name], dropout_p)
        return lora_update(x, *stack._replace(lora_B=self._block_diagonal(stack)))

    # Slices

    def _enabled_sizes(self) -> list[int]:
        return [o for o, enabled in zip(self.slice_sizes, self.enable_lora, strict=True) if enabled]

    def _row_slices(self) -> Iterator[slice]:
        stop = 0
        for size in self.slice_sizes:
            start, stop = stop, stop + size
            yield slice(start, stop)

    def _slices(self, adapter: LowRank) -> Iterator[LowRank | None]:
        """The adapter of each slice, None for those that are not enabled."""
        sizes = self._enabled_sizes()
        A, B = iter(adapter.lora_A.chunk(len(sizes))), iter(adapter.lora_B.split_with_sizes(sizes))
        for enabled in self.enable_lora:
            yield adapter._replace(lora_A=next(A), lora_B=next(B)) if enabled else None

    def _block_diagonal(self, adapter: LowRank) -> Tensor:
        """lora_B as [out_features, n_enabled * r], for all of lora_A at once."""
        none = adapter.lora_B.new_zeros(0)
        rows = zip(self.slice_sizes, self._slices(adapter), strict=True)
        blocks = [none.reshape(size, 0) if own is None else own.lora_B for size, own in rows]
        return torch.block_diag(*blocks)  # type: ignore[no-untyped-call, no-any-return]

    def _stack(
        self,
        names: Sequence[str],
        dropout_p: float = 0.0,
        prefix: str = "",
        factors: Mapping[str, Tensor] | None = None,
    ) -> LowRank:
        stack = super()._stack(names, dropout_p, prefix, factors)
        if len(names) == 1:
            return stack
        # From adapter after adapter to slice after slice.
        n = len(self._enabled_sizes())
        parts = stack.lora_A.split_with_sizes([n * self.adapters[name].r for name in names])
        A = torch.cat([torch.unflatten(part, 0, (n, -1)) for part in parts], 1).flatten(0, 1)
        return stack._replace(lora_A=A)

    def plain_parts(self, adapter_name: str) -> dict[str, Tensor] | None:
        """lora_A as it is and lora_B block-diagonal: the adapter of a `Linear` of rank n r."""
        stack = self._stack([adapter_name])
        return {
            "lora_A": stack.lora_A.detach(),
            "lora_B": self._block_diagonal(stack).detach(),
        }

    # Merging

    def _merged_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        return self._weight_and_bias(names)

    def _write_merged(self, names: Sequence[str]) -> None:
        weight, stack = self._weight_matrix(), self._stack(names)
        for rows, own in zip(self._row_slices(), self._slices(stack), strict=True):
            if own is not None:
                torch.ops.lora_ext.merge_(weight[rows], own.lora_A, own.lora_B, own.scaling)

    def extra_repr(self) -> str:
        sizes = "" if len(set(self.slice_sizes)) == 1 else f", slice_sizes={list(self.slice_sizes)}"
        return f"{super().extra_repr()}, enable_lora={list(self.enable_lora)}{sizes}"


class KeptMergedLinear(_KeptLinearBase, MergedLinear):
    """`MergedLinear` over a base that is its child; see `lora_ext.nn.kept_base`."""

    def _updates(self, x: Tensor) -> Iterator[Tensor]:
        for adapter in self.low_rank():
            yield lora_update(x, *adapter._replace(lora_B=self._block_diagonal(adapter)))


MergedLinear._KEPT = KeptMergedLinear
