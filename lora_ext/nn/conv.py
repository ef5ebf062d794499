"""LoRA on convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from lora_ext import batching
from lora_ext.arguments import check_kinds, check_place, check_sizes, named_x, suggests_names
from lora_ext.functional import weight_norm
from lora_ext.nn.adapter import DEFAULT, AdapterOptions, AdapterSettings, LowRank, variant_of
from lora_ext.nn.adoption import belongs_to_its_class
from lora_ext.nn.kept_base import KeptBase
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.planned import follows_plan, planned_updates, refuse_places, refuse_plan


@suggests_names
class LoraConv(LoraLayer, _ConvNd):
    """A convolution plus low-rank updates: what Conv1d, Conv2d and Conv3d do alike.

    `y = conv(x, weight) + bias + scaling * conv1x1(conv(dropout(x), lora_A), lora_B)`

    `lora_A` [r, in_channels / groups, *kernel_size] convolves as the base does (stride, padding,
    padding_mode, dilation, groups), `lora_B` [out_channels, r / groups, 1, ...] combines channels
    within a group. PEFT's `lora_A` is [r, in_channels, *kernel_size], without groups: ours is saved
    so, with zeros between the groups, and one that PEFT trained runs so (`ungrouped_lora_A` of its
    settings), but cannot be merged. `add_adapter` makes further adapters. The constructor freezes
    nothing (see `mark_only_lora_as_trainable`).

    Args:
        in_channels, out_channels, kernel_size: of the base.
        r: rank, a multiple of `groups`; 0 is a plain convolution, without an adapter.
        lora_alpha, lora_dropout, use_rslora, lora_bias, init_lora_weights, use_dora,
            autocast_adapter_dtype: see `AdapterSettings`.
        merge_weights: eval() merges and train() unmerges, as loralib does.
        base_options: further arguments of the torch.nn class: stride, padding, dilation, groups,
            bias, padding_mode, device, dtype.

    `merge()` and `unmerge()` are as for `lora_ext.nn.Linear`.

    Raises:
        ValueError: r is no multiple of groups, or a setting is out of range, by name.
    """

    HAS_CAPACITY: ClassVar[bool] = True
    weight: nn.Parameter
    bias: nn.Parameter | None
    PATH: ClassVar[tuple[str, str]] = (
        "aten convolution",
        "lora_A convolves as the base does, and lora_B's result is added to y",
    )
    _KIND: ClassVar[type[_ConvNd]]
    _CONVOLVE: ClassVar[Callable[..., Tensor]]
    _KEPT: ClassVar[Any]  # this class over a base that is called

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        *,
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        autocast_adapter_dtype: bool = True,
        **base_options: Any,
    ) -> None:
        kind: Any = self._KIND
        where = type(self).__name__
        check_sizes(where, in_channels=in_channels, out_channels=out_channels)
        sizes = kernel_size if isinstance(kernel_size, list | tuple) else (kernel_size,)
        for size in sizes:
            check_sizes(where, kernel_size=size)
        check_place(where, **base_options)
        kind.__init__(self, in_channels, out_channels, kernel_size, **base_options)
        self._init_adapters(kind, merge_weights)
        self._with_adapter(
            DEFAULT,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora=use_rslora,
            lora_bias=lora_bias,
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        adapter_name: str = DEFAULT,
        **options: Unpack[AdapterOptions],
    ) -> Self:
        """The same layer with an adapter; shares `weight` and `bias` with `conv`.

        Keeps training mode, hooks, device, dtype and requires_grad. `options` are further fields
        of `AdapterSettings`. With r = 0 there is no adapter yet.

        Raises:
            TypeError: conv is not of the torch.nn class, or computes something else.
            ValueError: its weight or bias is computed (pruning, weight_norm), r is no multiple of
                its groups, or a setting is out of range.
        """
        kind: Any = cls._KIND
        if isinstance(conv, kind) and type(conv)._conv_forward is not kind._conv_forward:
            raise TypeError(
                f"{cls.__name__}: base: got {type(conv).__qualname__}, expected a torch.nn."
                f"{kind.__name__} that keeps its _conv_forward"
            )
        if isinstance(conv, kind) and not belongs_to_its_class(conv, kind):
            self: Self = cls._KEPT._over(conv, kind)
        else:
            self = cls._adopt(conv, kind)
        return self._with_adapter(adapter_name, r, lora_alpha, lora_dropout, **options)

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        """x [batch, in_channels, ...] or [in_channels, ...] → the same with out_channels."""
        if input is None or x is not None:
            input = named_x(type(self).__name__, x, input)
        x = input
        try:
            if batching.in_use and follows_plan(self):
                return self._planned_forward(x)
            if self._lora_variant is not None:
                return self._lora_variant.forward(self, x, self._running)
            stacks = self.low_rank()
            y = self._convolve(x, self.weight, self._bias_with(stacks))
            for stack in stacks:
                # y is fresh, and a convolution keeps its inputs for backward, not its result. In
                # vmap the update may have a batch that y lacks.
                update = self._update(x, stack)
                transformed = torch._C._are_functorch_transforms_active()
                y = (y + update).to(y.dtype) if transformed else y.add_(update)
            return y
        except (AttributeError, TypeError, RuntimeError):
            self._check_input(x)
            raise

    def _check_input(self, x: Tensor) -> None:
        """Names what is wrong with an input that could not be convolved."""
        where, dimensions = type(self).__name__, len(self.kernel_size)
        check_kinds(where, x=x)
        if x.dim() not in (dimensions + 1, dimensions + 2) or x.shape[-1 - dimensions] != (
            self.in_channels
        ):
            sizes = ", ".join(
                ["length"] if dimensions == 1 else ["depth", "height", "width"][-dimensions:]
            )
            raise ValueError(
                f"{where}: x: got shape {list(x.shape)}, expected [batch, {self.in_channels}, "
                f"{sizes}], or that without batch"
            )
        if x.dtype != self.weight.dtype:
            raise TypeError(
                f"{where}: x: got dtype {x.dtype}, expected {self.weight.dtype}, the weight's; "
                "convert with .to()"
            )

    def _planned_forward(self, x: Tensor) -> Tensor:
        if x.dim() != len(self.kernel_size) + 2:
            refuse_plan(self, f"an input of shape {list(x.shape)} has no batch of requests")
        refuse_places(self)
        return planned_updates(
            self, self._convolve(x, self.weight, self.bias), x, 1, self._update_of
        )

    def _update_of(self, x: Tensor, name: str) -> Tensor:
        stack = self._stack([name], self.adapters[name].lora_dropout if self.training else 0.0)
        update = self._update(x, stack)
        if stack.lora_bias is None:
            return update
        bias = stack.lora_bias * stack.scaling
        return update + bias.view(-1, *[1] * len(self.kernel_size))

    def _update(self, x: Tensor, stack: LowRank) -> Tensor:
        """scaling * conv1x1(conv(dropout(x), lora_A), lora_B), in the adapters' dtype."""
        stack = stack.for_any()
        d = F.dropout(x.to(stack.lora_A.dtype), stack.dropout_p)
        convolve = self._convolve_ungrouped if self._is_ungrouped(stack.lora_A) else self._convolve
        hidden = convolve(d, stack.lora_A, None)
        scaled = stack.lora_B if stack.scaling == 1.0 else stack.lora_B * stack.scaling
        return type(self)._CONVOLVE(hidden, scaled, groups=self.groups)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With the base's stride, padding, dilation and groups."""
        return self._conv_forward(x, weight, bias)

    def _convolve_ungrouped(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With the base's stride, padding and dilation."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        return type(self)._CONVOLVE(x, weight, bias, self.stride, padding, self.dilation)

    def _bias_with(self, stacks: Sequence[LowRank]) -> Tensor | None:
        """bias + scaling * lora_bias, rounded once, so that the base's convolution adds both."""
        total: Tensor | None = self.bias
        for stack in stacks:
            if stack.lora_bias is not None:
                added = stack.lora_bias * stack.scaling
                total = added if total is None else total + added
        return total if total is None else total.to(self.weight.dtype)

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        if settings.r % self.groups != 0:
            raise ValueError(
                f"{type(self).__name__}: r: got {settings.r} with groups {self.groups}, expected a "
                "multiple of groups; choose another r, or leave this layer without an adapter"
            )
        ones = (1,) * len(self.kernel_size)
        channels = self.in_channels // (1 if settings.ungrouped_lora_A else self.groups)
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (settings.r, channels, *self.kernel_size),
            "lora_B": (self.out_channels, settings.r // self.groups, *ones),
        }
        if settings.lora_bias:
            shapes["lora_bias"] = (self.out_channels,)
        return shapes | self._variant_shapes(settings)

    def _weight_norm_shape(self) -> tuple[int, ...]:
        return (1, self.out_channels, *[1] * len(self.kernel_size))

    # The two forms of lora_A

    def _is_ungrouped(self, lora_A: Tensor) -> bool:  # never with one group
        return lora_A.shape[1] != self.in_channels // self.groups

    def ungrouped(self, lora_A: Tensor) -> Tensor:
        """[r, in_channels / groups, *kernel_size] → [r, in_channels, *kernel_size], for the same
        outputs without groups: zero where an input channel is of another group."""
        groups = torch.arange(self.groups, device=lora_A.device)
        parts = lora_A.reshape(self.groups, -1, *lora_A.shape[1:])
        full = lora_A.new_zeros(*parts.shape[:2], self.groups, *parts.shape[2:])
        full[groups, :, groups] = parts
        return full.flatten(2, 3).flatten(0, 1)

    def grouped(self, lora_A: Tensor) -> Tensor | None:
        """The inverse; None if lora_A is not zero between the groups."""
        groups = torch.arange(self.groups, device=lora_A.device)
        channels = self.in_channels // self.groups
        blocks = lora_A.reshape(self.groups, -1, self.groups, channels, *self.kernel_size)
        own = blocks[groups, :, groups].flatten(0, 1)
        return own if _count_nonzero(own) == _count_nonzero(lora_A) else None

    def _alike(self, lora_A: list[Tensor]) -> list[Tensor]:
        if not any(self._is_ungrouped(one) for one in lora_A):
            return lora_A
        return [one if self._is_ungrouped(one) else self.ungrouped(one) for one in lora_A]

    def peft_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        tensors, key = super().peft_tensors(adapter_name), self.PEFT_NAMES["lora_A"]
        # PEFT's DoRA divides by another norm: with groups it must not load ours.
        own = self.groups == 1 or variant_of(self.adapters[adapter_name])
        if not own and not self._is_ungrouped(tensors[key]):
            tensors[key] = self.ungrouped(tensors[key])
        return tensors

    def _weight_norm(self, adapter_name: str) -> Tensor:
        stack = self._stack([adapter_name])
        groups = self._by_group(self.unmerged_weight(), stack)
        norms = [
            weight_norm(weight.detach(), A.detach(), B.detach(), stack.scaling)
            for weight, A, B in groups
        ]
        return torch.cat(norms).view(self._weight_norm_shape())

    def _by_group(self, weight: Tensor, stack: LowRank) -> list[tuple[Tensor, Tensor, Tensor]]:
        """weight, lora_A and lora_B of each group, its output channels by its input channels and
        kernel; those of a contiguous weight are views."""
        parts = [
            part.contiguous().view(part.shape[0], -1).chunk(self.groups)
            for part in (weight, stack.lora_A, stack.lora_B)
        ]
        return list(zip(*parts, strict=True))

    def _stack(
        self,
        names: Sequence[str],
        dropout_p: float = 0.0,
        prefix: str = "",
        factors: Mapping[str, Tensor] | None = None,
    ) -> LowRank:
        stack = super()._stack(names, dropout_p, prefix, factors)
        if len(names) == 1 or self.groups == 1:
            return stack
        # Each group's channels of all adapters must be neighbours.
        ranks = [self.adapters[name].r for name in names]
        channels = torch.arange(sum(ranks), device=stack.lora_A.device).split(ranks)  # type: ignore[no-untyped-call]
        order = torch.cat([part.view(self.groups, -1) for part in channels], 1).flatten()
        return stack._replace(lora_A=stack.lora_A[order])

    in_features = property(attrgetter("in_channels"), doc="PEFT's name of in_channels.")
    out_features = property(attrgetter("out_channels"), doc="PEFT's name of out_channels.")

    def _weight_matrix(self, prefix: str = "") -> Tensor:
        return self.weight.flatten(1)

    def _merged_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        return self._weight_and_bias(names)

    def _write_merged(self, names: Sequence[str]) -> None:
        for name in names:
            if self._is_ungrouped(self._part("lora_A", name)):
                raise ValueError(
                    f"{type(self).__name__}.merge: adapter_names: '{name}' cannot be merged: its "
                    f"lora_A, trained by PEFT, reads all {self.in_channels} input channels for "
                    f"every output, and the weight has {self.in_channels // self.groups} of them "
                    f"for each of its {self.groups} groups; run it unmerged"
                )
        factors, weight_scale = self._merge_factors(names)
        stack = self._stack(names, factors=factors)
        bias = self._merged_bias(stack)
        # One product per group.
        weight = self.weight.contiguous()  # of another memory format: a copy
        scales = [None] * self.groups if weight_scale is None else weight_scale.chunk(self.groups)
        for group, scale in zip(self._by_group(weight, stack), scales, strict=True):
            torch.ops.lora_ext.merge_(*group, stack.scaling, scale)
        if weight is not self.weight:
            self.weight.copy_(weight)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return text + self.adapters_repr()


def _count_nonzero(tensor: Tensor) -> int:
    return int((tensor.float() if tensor.itemsize == 1 else tensor).count_nonzero())  # float8


class Conv1d(LoraConv, nn.Conv1d):
    """`nn.Conv1d` plus low-rank updates; x [batch, in_channels, length], or without batch.

    Arguments, terms, merging and errors are those of `lora_ext.nn.conv.LoraConv`.
    """

    _KIND = nn.Conv1d
    _CONVOLVE = staticmethod(F.conv1d)


class Conv2d(LoraConv, nn.Conv2d):
    """`nn.Conv2d` plus low-rank updates; x [batch, in_channels, height, width], or without batch.

    Arguments, terms, merging and errors are those of `lora_ext.nn.conv.LoraConv`.
    """

    _KIND = nn.Conv2d
    _CONVOLVE = staticmethod(F.conv2d)


class Conv3d(LoraConv, nn.Conv3d):
    """`nn.Conv3d` plus low-rank updates:
    x [batch, in_channels, depth, height, width], or without batch.

    Arguments, terms, merging and errors are those of `lora_ext.nn.conv.LoraConv`.
    """

    _KIND = nn.Conv3d
    _CONVOLVE = staticmethod(F.conv3d)


class KeptConv(KeptBase, LoraConv):
    """A convolution over a base that is its child `base_layer`; see `lora_ext.nn.kept_base`."""

    @property
    def _kind(self) -> type[nn.Module]:
        return self._KIND

    def _dimensions_of_rows(self, x: Tensor) -> int:
        if x.dim() != len(self.kernel_size) + 2:
            refuse_plan(self, f"an input of shape {list(x.shape)} has no batch of requests")
        refuse_places(self)
        return 1

    def _updates(self, x: Tensor) -> Iterator[Tensor]:
        for stack in self.low_rank():
            update = self._update(x, stack)
            if stack.lora_bias is not None:
                shape = (-1, *[1] * len(self.kernel_size))
                update = update + (stack.lora_bias * stack.scaling).view(shape)
            yield update.to(self.weight.dtype)


class KeptConv1d(KeptConv, Conv1d):
    """`Conv1d` over a base that is its child `base_layer`."""


class KeptConv2d(KeptConv, Conv2d):
    """`Conv2d` over a base that is its child `base_layer`."""


class KeptConv3d(KeptConv, Conv3d):
    """`Conv3d` over a base that is its child `base_layer`."""


Conv1d._KEPT, Conv2d._KEPT, Conv3d._KEPT = KeptConv1d, KeptConv2d, KeptConv3d
