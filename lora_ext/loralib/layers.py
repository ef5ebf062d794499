"""loralib's layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from lora_ext.arguments import check_kinds, check_place, check_sizes, refuse, warn
from lora_ext.functional import lora_embedding, lora_linear, lora_update
from lora_ext.loralib.merging import (
    LoRALayer,
    MergingLayer,
    add_product,
    is_offloaded,
    no_dropout,
)
from lora_ext.paths import lora_embedding_path, lora_linear_path, why_no_lora_embedding

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "MergingLayer",
]


class _LinearBase(MergingLayer, nn.Linear):
    """What the two layers over a linear base do alike."""

    weight: nn.Parameter
    fan_in_fan_out: bool

    def _add_parameters(self, rows_A: int, rows_B: int) -> None:
        self.lora_A = nn.Parameter(self.weight.new_zeros((rows_A, self.in_features)))
        self.lora_B = nn.Parameter(self.weight.new_zeros((rows_B, self.r)))
        self.scaling = self.lora_alpha / self.r
        self.weight.requires_grad = False

    def _finish(self) -> None:
        self.reset_parameters()
        if self.fan_in_fan_out:
            self.weight.data = self.weight.data.t()

    def reset_parameters(self) -> None:
        """Initialises base and update; the update is zero: lora_A as nn.Linear's weight, lora_B
        zero."""
        with self._unmerged():
            nn.Linear.reset_parameters(self)
            if hasattr(self, "lora_A"):
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
                nn.init.zeros_(self.lora_B)

    def _turned(self, matrix: Tensor) -> Tensor:
        """From [out_features, in_features] to how the weight is stored, and back."""
        return matrix.t() if self.fan_in_fan_out else matrix

    def _run(self, x: Tensor, lora_B: Tensor | None) -> Tensor:
        """`x W^T + b` and the update, if any: lora_B [out_features, rows of lora_A]."""
        weight = self._turned(self.weight)
        if lora_B is None:
            return F.linear(x, weight, self.bias)
        dropout_p = self.dropout_p()
        if dropout_p is not None:
            call = x, weight, self.bias, self.lora_A, lora_B
            return lora_linear(*call, scaling=self.scaling, dropout_p=dropout_p)
        d = self.lora_dropout(x)
        update = lora_update(d, self.lora_A, lora_B, scaling=self.scaling)
        return F.linear(x, weight, self.bias) + update

    def dropout_p(self) -> float | None:
        """What the fused operator drops out; None if `lora_dropout` was replaced by something that
        it does not know."""
        drop = self.lora_dropout
        if type(drop) is nn.Dropout:
            return drop.p if drop.training else 0.0
        return 0.0 if drop is no_dropout or type(drop) is nn.Identity else None


class Linear(_LinearBase):
    """`nn.Linear` plus a low-rank update: `y = x W^T + b + scaling * dropout(x) A^T B^T`.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        r, lora_alpha, lora_dropout, merge_weights: see `LoRALayer`. With r > 0 the weight is
            frozen.
        fan_in_fan_out: the weight is stored as [in_features, out_features].
        kwargs: those of nn.Linear: bias, device, dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        check_sizes(type(self).__name__, in_features=in_features, out_features=out_features)
        check_place(type(self).__name__, **kwargs)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        if r > 0:
            self._add_parameters(r, out_features)
        self._finish()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        return self._run(x, self.lora_B if self.r > 0 and not self.merged else None)

    def _lora_path(self, tokens: int) -> tuple[str, str]:
        dropout_p = self.dropout_p()
        if dropout_p is None:
            return "composed", "lora_dropout was replaced, so the update is added in plain PyTorch"
        return lora_linear_path(self._turned(self.weight), self.lora_A, dropout_p, tokens)

    def _add(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        add_product(self._turned(weight), lora_A, lora_B, scaling)


class MergedLinear(_LinearBase):
    """`nn.Linear` whose output is several slices of one size, each with or without an update: the
    fused q, k, v projection of GPT-2, say.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        r, lora_alpha, lora_dropout, merge_weights: see `LoRALayer`; r is the rank of each slice's
            update.
        enable_lora: one bool for each slice. Without any True there is no update.
        fan_in_fan_out: the weight is stored as [in_features, out_features].
        kwargs: those of nn.Linear: bias, device, dtype.

    Raises:
        ValueError: out_features are not as many slices of one size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = [False],  # as loralib has it; it is copied
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        where = type(self).__name__
        check_sizes(where, in_features=in_features, out_features=out_features)
        check_place(where, **kwargs)
        if isinstance(enable_lora, str) or not hasattr(enable_lora, "__len__"):
            refuse(where, "enable_lora", enable_lora, "a list with one bool for each slice")
        n = len(enable_lora)
        if n == 0 or out_features % n:
            raise ValueError(
                f"MergedLinear: enable_lora: got {n} slices for {out_features} out_features, "
                "expected a number that divides them"
            )
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora = [bool(enabled) for enabled in enable_lora]
        self.fan_in_fan_out = fan_in_fan_out
        if r > 0 and any(self.enable_lora):
            enabled = torch.tensor(self.enable_lora, device=self.weight.device)
            self.lora_ind = enabled.repeat_interleave(out_features // n)
            rows = out_features // n * sum(self.enable_lora)
            self._add_parameters(r * sum(self.enable_lora), rows)
        self._finish()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        if self.merged or not hasattr(self, "lora_A"):
            return self._run(x, None)
        own = iter(self.lora_B.chunk(sum(self.enable_lora)))
        none = self.lora_B.new_zeros(self.out_features // len(self.enable_lora), 0)
        blocks = [next(own) if enabled else none for enabled in self.enable_lora]
        return self._run(x, torch.block_diag(*blocks))  # type: ignore[no-untyped-call]

    def _lora_path(self, tokens: int) -> tuple[str, str]:
        return "lora_linear", "one call with a block-diagonal lora_B"

    def zero_pad(self, x: Tensor) -> Tensor:
        """[rows of the enabled slices, ...] → [out_features, ...], zero elsewhere."""
        padded = x.new_zeros((self.out_features, *x.shape[1:]))
        padded[self.lora_ind] = x
        return padded

    def merge_AB(self) -> Tensor:
        """The update without its scaling, as the weight is stored."""
        n = sum(self.enable_lora)
        product = self.lora_B.view(n, -1, self.r) @ self.lora_A.view(n, self.r, -1)
        return self._turned(self.zero_pad(product.flatten(0, 1)))

    def _add(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        n = sum(self.enable_lora)
        rows = self._turned(weight).chunk(len(self.enable_lora))
        enabled = compress(rows, self.enable_lora)
        for own, A, B in zip(enabled, lora_A.chunk(n), lora_B.chunk(n), strict=True):
            add_product(own, A, B, scaling)


class Embedding(MergingLayer, nn.Embedding):
    """`nn.Embedding` plus a low-rank update: `y = W[i] + scaling * A[:, i]^T B^T`.

    Args:
        num_embeddings, embedding_dim: of the base.
        r, lora_alpha, merge_weights: see `LoRALayer`. With r > 0 the weight is frozen.
        kwargs: those of nn.Embedding. The lookup in lora_A follows padding_idx, max_norm, norm_type
            and scale_grad_by_freq too; its gradient is always dense.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        where = type(self).__name__
        check_sizes(where, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        check_place(where, **kwargs)
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        if r > 0:
            self.lora_A = nn.Parameter(self.weight.new_zeros((r, num_embeddings)))
            self.lora_B = nn.Parameter(self.weight.new_zeros((embedding_dim, r)))
            self.scaling = lora_alpha / r
            self.weight.requires_grad = False
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        elif r > 0:  # the weight is given, as by from_pretrained
            nn.init.normal_(self.lora_B)

    def reset_parameters(self) -> None:
        """Initialises base and update; the update is zero: lora_A zero, lora_B standard normal."""
        with self._unmerged():
            nn.Embedding.reset_parameters(self)
            if hasattr(self, "lora_A"):
                nn.init.zeros_(self.lora_A)
                nn.init.normal_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x [...], int64 or int32 → [..., embedding_dim]."""
        if self.r == 0 or self.merged:
            return self._look_up(x, self.weight, self.sparse)
        if not why_no_lora_embedding(self.weight, self.max_norm, self.sparse):
            return lora_embedding(
                x,
                self.weight,
                self.lora_A,
                self.lora_B,
                scaling=self.scaling,
                padding_idx=self.padding_idx,
                scale_grad_by_freq=self.scale_grad_by_freq,
            )
        hidden = self._look_up(x, self.lora_A.t(), sparse=False)
        return self._look_up(x, self.weight, self.sparse) + hidden @ self.lora_B.t() * self.scaling

    def _lora_path(self, tokens: int) -> tuple[str, str]:
        return lora_embedding_path(self.weight, self.max_norm, self.sparse)

    def _look_up(self, x: Tensor, table: Tensor, sparse: bool) -> Tensor:
        # Both summands of a merged row were renormalised already.
        max_norm = None if self._merge is not None else self.max_norm
        options = self.norm_type, self.scale_grad_by_freq, sparse
        return F.embedding(x, table, self.padding_idx, max_norm, *options)

    def _plain_weight(self, weight: Tensor) -> Tensor:
        return self._renormalised(weight.detach().clone())

    def _add(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        if self.max_norm is not None:
            lora_A = self._renormalised(lora_A.detach().t().contiguous()).t()
        add_product(weight.t(), lora_A, lora_B, scaling)

    def _renormalised(self, table: Tensor) -> Tensor:
        """As a lookup of every row leaves a table [num_embeddings, ...]."""
        if self.max_norm is None:
            return table
        every_row = torch.arange(len(table), device=table.device)
        return torch.embedding_renorm_(table, every_row, self.max_norm, self.norm_type)


class ConvLoRA(MergingLayer):
    """A convolution, `conv`, plus a low-rank update of its weight: its elements, in the order in
    which they lie, are those of `scaling * lora_B lora_A`.

    lora_A is [r * kernel_size, in_channels * kernel_size] and lora_B [out_channels // groups *
    kernel_size ** (d - 1), r * kernel_size] for d dimensions of the kernel.

    Args:
        conv_module: the class of the convolution, nn.Conv2d or nn.ConvTranspose2d, say.
        in_channels, out_channels, kernel_size: its first arguments; kernel_size is one int.
        r, lora_alpha, merge_weights: see `LoRALayer`. With r > 0 the weight is frozen.
        lora_dropout: kept as an attribute and not applied, with a warning: loralib does not apply
            it either.
        kwargs: further ones of conv_module.

    Raises:
        TypeError: conv_module is a module, not a class.
        ValueError: kernel_size is no int, or the weight is of another size.
    """

    _WEIGHT: ClassVar[str] = "conv.weight"
    conv: Any

    def __init__(
        self,
        conv_module: Callable[..., nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        a_class = "the class of a convolution, nn.Conv2d say, which is made here"
        if isinstance(conv_module, nn.Module) or not callable(conv_module):
            refuse(where, "conv_module", conv_module, a_class)
        check_sizes(where, in_channels=in_channels, out_channels=out_channels)
        check_place(where, **kwargs)
        self._check_settings(r, lora_alpha, lora_dropout)
        if not isinstance(kernel_size, int):
            raise ValueError(
                f"{where}: kernel_size: got {kernel_size!r}, expected one int; "
                "lora_ext.nn has convolutions with other kernels"
            )
        if r > 0 and lora_dropout > 0.0:
            warn(
                f"{where}: lora_dropout: got {lora_dropout}, which is not applied: the update is "
                "one of the weight, as in loralib; lora_ext.nn's convolutions apply it"
            )
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            if not hasattr(self.conv, "groups"):
                refuse(where, "conv_module", conv_module, a_class)
            weight = self.conv.weight
            rows = out_channels // self.conv.groups * kernel_size ** (weight.dim() - 3)
            columns = in_channels * kernel_size
            if rows * columns != weight.numel():
                raise ValueError(
                    f"{where}: conv_module: its weight is {list(weight.shape)}, expected "
                    f"{rows * columns} elements: in_channels * out_channels / groups of a kernel "
                    f"of size {kernel_size}"
                )
            self.lora_A = nn.Parameter(weight.new_zeros((r * kernel_size, columns)))
            self.lora_B = nn.Parameter(weight.new_zeros((rows, r * kernel_size)))
            self.scaling = lora_alpha / r
            weight.requires_grad = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises base and update; the update is zero: lora_A as nn.Linear's weight, lora_B
        zero."""
        with self._unmerged():
            self.conv.reset_parameters()
            if hasattr(self, "lora_A"):
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
                nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """x, and what else `conv` takes → what `conv` returns."""
        try:
            if self.r == 0 or self.merged:
                return self.conv(x, *args)  # type: ignore[no-any-return]
            weight = self._adapted_weight()
            transposed = isinstance(self.conv, _ConvTransposeNd)  # whose _conv_forward is empty
            if hasattr(self.conv, "_conv_forward") and not transposed:
                return self.conv._conv_forward(x, weight, self.conv.bias, *args)  # type: ignore[no-any-return]
            if self.conv._forward_pre_hooks or is_parametrized(self.conv, "weight"):
                raise RuntimeError(
                    f"{type(self).__name__}: conv: the weight of this {type(self.conv).__name__} "
                    "is computed in each call (weight_norm, pruning), expected a parameter; undo "
                    "that, or run it merged, in eval()"
                )
            return functional_call(self.conv, {"weight": weight}, (x, *args))  # type: ignore[no-any-return]
        except TypeError:
            check_kinds(type(self).__name__, x=x)
            raise

    def _lora_path(self, tokens: int) -> tuple[str, str]:
        return "composed", "each call adds the adapter to the weight and convolves once"

    def _adapted_weight(self) -> Tensor:
        weight: Tensor = self.conv.weight
        if is_offloaded(self.conv):
            raise RuntimeError(
                f"{type(self).__name__}: conv: its weight is offloaded by a hook, which fetches it "
                "for a call of conv alone, expected a parameter with values; merge before "
                "offloading, in eval(), or take the hooks off "
                "(accelerate.hooks.remove_hook_from_module(model, recurse=True))"
            )
        A, B = self.lora_A, self.lora_B
        with torch.autocast(weight.device.type, enabled=False):  # the convolution casts the sum
            matrix = weight.reshape(len(B), -1).to(B.dtype)
            total = torch.addmm(matrix, B, A, alpha=self.scaling)
        return total.view(weight.shape).to(weight.dtype)

    @property
    def _owner(self) -> Any:
        return self.conv

    def _add(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        flat = weight.contiguous()  # of another memory format: a copy
        add_product(flat.view(len(lora_B), -1), lora_A, lora_B, scaling)
        if not weight.is_contiguous():
            weight.copy_(flat)


class Conv1d(ConvLoRA):
    """`ConvLoRA` of nn.Conv1d: its arguments but the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """`ConvLoRA` of nn.Conv2d: its arguments but the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """`ConvLoRA` of nn.Conv3d: its arguments but the first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
