"""LoRA on a linear layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lora_ext import batching
from lora_ext.arguments import as_flag, check_place, check_sizes, named_x, suggests_names
from lora_ext.functional import lora_linear, lora_linear_multi, lora_update, weight_norm
from lora_ext.nn import tensor_parallel
from lora_ext.nn.adapter import DEFAULT, AdapterOptions, AdapterSettings, LowRank
from lora_ext.nn.adoption import belongs_to_its_class
from lora_ext.nn.block_diagonal import check_blocks
from lora_ext.nn.installed_forward import (
    install_like,
    installed_style,
    is_in_block,
    without_forward,
)
from lora_ext.nn.kept_base import KeptBase
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.planned import (
    follows_plan,
    planned_linear,
    planned_linear_path,
    refuse_plan,
)
from lora_ext.nn.sharded import is_sharded
from lora_ext.paths import lora_linear_path
from lora_ext.quant.kinds import quantized_kind


class LinearBase(LoraLayer, nn.Linear):
    """What layers over a linear base share: either way of storing the weight."""

    weight: nn.Parameter
    fan_in_fan_out: bool
    _STATE: ClassVar[frozenset[str]] = LoraLayer._STATE | {"fan_in_fan_out"}
    HAS_CAPACITY: ClassVar[bool] = True
    _KEPT: ClassVar[Any]  # this class over a base that is called
    _QUANTIZED: ClassVar[Any]  # this class over a base whose weight is quantized

    def _init_base(
        self,
        in_features: int,
        out_features: int,
        fan_in_fan_out: bool,
        merge_weights: bool,
        **options: Any,
    ) -> None:
        where = type(self).__name__
        check_sizes(where, in_features=in_features, out_features=out_features)
        check_place(where, **options)
        options["bias"] = as_flag(options["bias"], where, "bias")
        fan_in_fan_out = as_flag(fan_in_fan_out, where, "fan_in_fan_out")
        nn.Linear.__init__(self, in_features, out_features, **options)
        if fan_in_fan_out:
            self.weight = nn.Parameter(self.weight.detach().t().contiguous())
        self.fan_in_fan_out = fan_in_fan_out
        self._init_adapters(nn.Linear, merge_weights)

    @classmethod
    def _from_linear(cls, linear: nn.Linear) -> Self:
        """A layer, without adapters, in the place of a linear one or over it."""
        if is_in_block(linear):
            linear = without_forward(linear)
        if quantized_kind(linear) is not None:
            import_module("lora_ext.nn.quantized")  # which sets _QUANTIZED; most models have none
            return cls._QUANTIZED._over_quantized(linear)  # type: ignore[no-any-return]
        twin = _full_name(type(linear)) in _TWINS
        if type(linear) is nn.Linear and installed_style(linear) is not None:
            self: Self = cls._adopt(without_forward(linear), nn.Linear)
            self.fan_in_fan_out = False
            install_like(linear, self)
            return self
        if isinstance(linear, nn.Linear) and not belongs_to_its_class(
            linear, type(linear) if twin else nn.Linear
        ):
            self = cls._KEPT._over(linear, nn.Linear, any_forward=True)
        else:
            self = cls._adopt(linear, nn.Linear, any_forward=twin)
        self.fan_in_fan_out = False
        return self

    @classmethod
    def _from_conv1d(cls, conv1d: nn.Module) -> Self:
        """The same for a Conv1D of transformers."""
        kind = transformers_conv1d(conv1d)
        if kind is None:
            raise TypeError(
                f"{cls.__name__}.from_conv1d: conv1d: got {type(conv1d).__qualname__}, expected "
                "a transformers.pytorch_utils.Conv1D"
            )
        if belongs_to_its_class(conv1d, kind):
            self: Self = cls._adopt(conv1d, kind)
        else:
            self = cls._KEPT._over(conv1d, kind, any_forward=True)
        self.in_features, self.out_features = self.weight.shape
        self.fan_in_fan_out = True
        return self

    def _plain_base(self) -> nn.Module:
        base = super()._plain_base()
        if transformers_conv1d(base):  # which calls them nx and nf
            del base.in_features, base.out_features
        elif self.fan_in_fan_out:
            base.weight = nn.Parameter(
                self.weight.detach().t().contiguous(), requires_grad=self.weight.requires_grad
            )
        return base

    def _planned_path(self) -> tuple[str, str]:
        return planned_linear_path(self)

    def supports_lora_conversion(self, adapter_name: str = DEFAULT) -> bool:
        """Whether `lora_ext.convert_to_lora` takes the adapter, as in PEFT: not one that its tokens
        activate."""
        self._check_names([adapter_name])
        return self.adapters[adapter_name].alora_invocation_tokens is None

    def _weight_matrix(self, prefix: str = "") -> Tensor:
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def _bias_vector(self) -> Tensor | None:
        """The base's bias, as the product takes it."""
        bias: Tensor | None = self.bias
        return bias

    def extra_repr(self) -> str:
        return super().extra_repr() + self.adapters_repr()


@suggests_names
class Linear(LinearBase):
    """`nn.Linear` plus low-rank updates: `y = x W^T + b + scaling * dropout(x) A^T B^T`.

    The terms are loralib's and PEFT's. `weight` [out_features, in_features] and `bias` are the
    base's, `lora_A` [r, in_features] and `lora_B` [out_features, r] those of the adapter that the
    constructor makes, "default"; `add_adapter` makes more. The constructor freezes nothing (see
    `mark_only_lora_as_trainable`).

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        r: rank; 0 is a plain linear layer, without an adapter.
        lora_alpha, lora_dropout: see `AdapterSettings`, as use_rslora, lora_bias,
            init_lora_weights, use_dora and autocast_adapter_dtype.
        fan_in_fan_out: `weight` is stored as [in_features, out_features] (GPT-2's Conv1D).
        merge_weights: eval() merges and train() unmerges, as loralib does.
        bias: whether the base has a bias.

    `merge()` makes `weight` another parameter, that of the base with the update in it; `unmerge()`
    puts the base's own back, into which nothing was written, whatever happened to the adapter
    between. Until then a merged layer holds both: out_features * in_features more elements in
    memory. `state_dict` holds the base weight also while merged. Layers that share one weight can
    be merged and unmerged in any order.

    Raises:
        ValueError: r, lora_alpha, lora_dropout or init_lora_weights out of range, by name.
    """

    weight: nn.Parameter
    _cuts_short: ClassVar[bool] = True  # it has none of _SHORT_CUT of its own
    HAS_ALORA: ClassVar[bool] = True
    HAS_BLOCKS: ClassVar[bool] = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = False,
        *,
        use_rslora: bool = False,
        bias: bool = True,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        autocast_adapter_dtype: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self._init_base(in_features, out_features, fan_in_fan_out, merge_weights, **options)
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
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        adapter_name: str = DEFAULT,
        **options: Unpack[AdapterOptions],
    ) -> Self:
        """The same layer with an adapter; shares `weight` and `bias` with `linear`.

        Keeps training mode, hooks, device, dtype and requires_grad. `options` are further fields
        of `AdapterSettings`. With r = 0 there is no adapter yet. An instance of a subclass, or one
        whose call is its own (compiled in place, a forward set on it), becomes the child
        `base_layer` of the result, which calls it and adds the update, as `explain` says.

        Raises:
            TypeError: linear is not an nn.Linear, or is quantized.
            ValueError: its weight or bias is computed (pruning, weight_norm), or a setting is out
                of range.
        """
        self = cls._from_linear(linear)
        return self._with_adapter(adapter_name, r, lora_alpha, lora_dropout, **options)

    @classmethod
    def from_conv1d(
        cls,
        conv1d: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        adapter_name: str = DEFAULT,
        **options: Unpack[AdapterOptions],
    ) -> Self:
        """As `from_linear`, for a Conv1D of transformers (GPT-2): a linear layer whose weight is
        stored as [in_features, out_features].

        Raises:
            TypeError: conv1d is not such a Conv1D.
        """
        self = cls._from_conv1d(conv1d)
        return self._with_adapter(adapter_name, r, lora_alpha, lora_dropout, **options)

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        if input is None or x is not None:
            input = named_x(type(self).__name__, x, input)
        x = input
        if batching.in_use and follows_plan(self):
            return self._planned_forward(x)
        parameters = self._parameters
        weight: Any = parameters.get("weight")
        if type(weight) is not Parameter and is_sharded(weight):
            return tensor_parallel.forward(self, x)
        if self._lora_variant is not None:
            return self._lora_variant.forward(self, x, self._running)
        if self._lora_alone is not None:  # nearly always: at one row every Python call shows
            part_A, part_B, part_bias, has_bias = self._lora_alone
            name = self._running[0]
            A: Any
            B: Any
            try:
                weight, bias = parameters["weight"], parameters["bias"]
                A, B = parameters[part_A], parameters[part_B]
                lora_bias = parameters[part_bias] if has_bias else parameters.get(part_bias)
            except KeyError:
                pass  # one of them is computed, or this is a replica
            else:
                return lora_linear(
                    x,
                    weight.t() if self.fan_in_fan_out else weight,
                    bias,
                    A,
                    B,
                    lora_bias,
                    scaling=self._scaling[name],
                    dropout_p=self.adapters[name].lora_dropout if self.training else 0.0,
                )
        return adapted_linear(x, self._weight_matrix(), self._bias_vector(), self.low_rank())

    def _planned_forward(self, x: Tensor) -> Tensor:
        weight = self._parameters.get("weight")
        if type(weight) is not Parameter and is_sharded(self._adapted_weight()):
            refuse_plan(self, "its weight is divided between processes")
        return planned_linear(self, x, self._weight_matrix(), self._bias_vector())

    def _update_of(self, x: Tensor, name: str) -> Tensor:
        dropout_p = self.adapters[name].lora_dropout if self.training else 0.0
        return lora_update(x, *self._stack([name], dropout_p))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._cuts_short = all(getattr(cls, name) is getattr(Linear, name) for name in _SHORT_CUT)

    def _choose_running(self) -> None:
        super()._choose_running()
        if not self._cuts_short:
            self._lora_alone = None

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        of_A, of_B = settings.blocks_of_lora_A, settings.blocks_of_lora_B
        where = type(self).__name__
        check_blocks(f"{where}: lora_A", of_A, self.in_features, settings.r)
        check_blocks(f"{where}: lora_B", of_B, settings.r, self.out_features)
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (settings.r, self.in_features // of_A),
            "lora_B": (self.out_features, settings.r // of_B),
        }
        if settings.lora_bias:
            shapes["lora_bias"] = (self.out_features,)
        return shapes | self._variant_shapes(settings)

    def _product_path(self, tokens: int) -> tuple[str, str]:
        first, *others = self.low_rank()
        weight: Any = self._weight_matrix()
        lora_A: Any = first.lora_A
        where = ""
        if is_sharded(weight):
            weight, where = weight.to_local(), f"; of this process's part {list(weight.shape)}"
            lora_A = torch.empty_like(lora_A.to_local()[:, :1]).expand(-1, weight.shape[1])
        path, reason = lora_linear_path(weight, lora_A, first.dropout_p, tokens)
        reason += where
        if any(self.adapters[name].has_blocks for name in self._running):
            reason += "; of block-diagonal matrices, which each call makes of their blocks"
        if others:
            reason += f"; {len(others)} more for other dropout probabilities, composed"
        return path, reason

    def _check_placeable(self, settings: AdapterSettings) -> None:
        tensor_parallel.check_placeable(self, settings)

    def _place(self, adapter_name: str) -> None:
        tensor_parallel.place_parts(self, adapter_name)

    def _weight_norm_shape(self) -> tuple[int, ...]:
        return (self.out_features,)

    def _weight_norm(self, adapter_name: str) -> Tensor:
        weight = self.unmerged_weight()
        weight = weight.t() if self.fan_in_fan_out else weight
        A, B, _, scaling, _ = self._stack([adapter_name])
        return weight_norm(weight, A.detach(), B.detach(), scaling)

    def _merged_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        return self._weight_and_bias(names)

    def _write_merged(self, names: Sequence[str]) -> None:
        factors, weight_scale = self._merge_factors(names)
        stack = self._stack(names, factors=factors)
        bias = self._merged_bias(stack)
        weight = self._weight_matrix()
        torch.ops.lora_ext.merge_(weight, stack.lora_A, stack.lora_B, stack.scaling, weight_scale)
        if bias is not None:
            self.bias.copy_(bias)


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[LowRank]
) -> Tensor:
    """`x W^T + b` plus the adapters' updates: the first fused, others (they have another dropout
    probability) added.

    x [..., in_features], weight [out_features, in_features] → [..., out_features].
    """
    if not adapters:
        return nn.functional.linear(x, weight, bias)
    first, *others = adapters
    y = lora_linear(
        x,
        weight,
        bias,
        first.lora_A,
        first.lora_B,
        first.lora_bias,
        scaling=first.scaling,
        dropout_p=first.dropout_p,
    )
    if not others:
        return y
    dtype = y.dtype  # under autocast another one than that of x
    for other in others:  # in the adapter's dtype, float32 by default: one rounding at the end
        y = y + lora_update(x, *other, dtype=other.lora_A.dtype)
    return y.to(dtype)


# In the places of a LowRank's parts.
_NO_ADAPTER = (None, None, None, 1.0, 0.0)


def adapted_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    adapters: Sequence[Sequence[LowRank]],
) -> list[Tensor]:
    """`adapted_linear` of each of several layers of one x, with the masks that calls one after
    another draw: one operator where no layer has adapters besides one that is fused."""
    counts = [len(own) for own in adapters]
    if max(counts) == 1 and sum(counts) > 1:
        A, B, lora_biases, scalings, dropout_p = zip(
            *(own[0] if own else _NO_ADAPTER for own in adapters), strict=True
        )
        return lora_linear_multi(
            x, weights, biases, A, B, lora_biases, scalings=scalings, dropout_p=dropout_p
        )
    layers = zip(weights, biases, adapters, strict=True)
    return [adapted_linear(x, weight, bias, own) for weight, bias, own in layers]


# What the short way of a forward stands for, unless a subclass has its own.
_SHORT_CUT = ("low_rank", "_stack", "_part", "_scale_of", "_weight_matrix")

# Subclasses of nn.Linear that write the same product in another way.
_TWINS = {"transformers.models.falcon.modeling_falcon.FalconLinear"}


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def transformers_conv1d(module: nn.Module) -> type[nn.Module] | None:
    """transformers' Conv1D, the transposed linear layer of GPT-2, if module is one; does not import
    transformers."""
    library = sys.modules.get("transformers.pytorch_utils")
    if library is None or not isinstance(module, library.Conv1D):
        return None
    kind: type[nn.Module] = library.Conv1D
    return kind


class _KeptLinearBase(KeptBase, LinearBase):
    """A linear layer over a base that is called."""

    @property
    def _kind(self) -> type[nn.Module]:
        twin = _full_name(self._base_class) in _TWINS
        plain = self._base_class if twin else nn.Linear
        return transformers_conv1d(self.base_layer) or plain


class KeptLinear(_KeptLinearBase, Linear):
    """`Linear` over a base that is its child `base_layer`; see `lora_ext.nn.kept_base`."""

    def _updates(self, x: Tensor) -> Iterator[Tensor]:
        return (lora_update(x, *low_rank) for low_rank in self.low_rank())


Linear._KEPT = KeptLinear
