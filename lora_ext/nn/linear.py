"""LoRA on a linear layer."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_ext.errors import AlreadyMergedError, NotMergedError
from lora_ext.functional import lora_linear


class Linear(nn.Linear):
    """`nn.Linear` plus a low-rank update: `y = x W^T + b + scaling * dropout(x) A^T B^T`.

    The terms are loralib's and PEFT's. `weight` [out_features, in_features] and `bias` are the
    base's, `lora_A` [r, in_features] and `lora_B` [out_features, r] the adapter's; the constructor
    freezes nothing (see `mark_only_lora_as_trainable`).

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        r: rank; 0 is a plain linear layer.
        lora_alpha: `scaling` is `lora_alpha / r`.
        lora_dropout: probability that an input element is dropped before lora_A, in training.
        fan_in_fan_out: `weight` is stored as [in_features, out_features] (GPT-2's Conv1D).
        use_rslora: `scaling` is `lora_alpha / sqrt(r)` (arXiv:2312.03732).
        bias: whether the base has a bias.
        lora_bias: whether lora_B has a bias (`lora_bias` [out_features], scaled like the product).
        init_lora_weights: True: lora_A Kaiming-uniform, lora_B zero; "gaussian": lora_A normal with
            deviation 1/r, lora_B zero; False: both Kaiming-uniform, for tests.
        autocast_adapter_dtype: keep the adapter in float32 on a bfloat16 or float16 base.

    `merge()` writes the update into `weight` in place; `unmerge()` gives back the base weight bit
    for bit, whatever happened to the adapter between. For that a merged layer keeps a copy of its
    base weight until unmerged: out_features * in_features more elements in memory. `state_dict`
    holds the base weight also while merged. Layers that share one weight must be unmerged in the
    reverse order of merging.

    Raises:
        ValueError: r, lora_alpha, lora_dropout or init_lora_weights out of range, by name.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_bias: nn.Parameter | None
    _base_weight: Tensor | None
    _base_bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        *,
        use_rslora: bool = False,
        bias: bool = True,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if fan_in_fan_out:
            self.weight = nn.Parameter(self.weight.detach().t().contiguous())
        self._set_adapter(
            r,
            lora_alpha,
            lora_dropout,
            fan_in_fan_out,
            use_rslora=use_rslora,
            lora_bias=lora_bias,
            init_lora_weights=init_lora_weights,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        **options: Any,
    ) -> Self:
        """The same layer with an adapter; shares `weight` and `bias` with `linear`.

        Keeps training mode, device, dtype and requires_grad. `options` are the constructor's
        use_rslora, lora_bias, init_lora_weights and autocast_adapter_dtype.

        Raises:
            TypeError: linear is not exactly an nn.Linear.
            ValueError: its weight or bias is computed (pruning, weight_norm), or see the class.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"Linear.from_linear: linear: got {type(linear).__qualname__}, expected exactly "
                "torch.nn.Linear; a subclass may compute something else"
            )
        for name in ("weight", "bias"):
            if name not in linear._parameters:
                raise ValueError(
                    f"Linear.from_linear: linear: computes its {name} (pruning, weight_norm), "
                    "expected a plain parameter; make that permanent first"
                )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._set_adapter(r, lora_alpha, lora_dropout, False, **options)
        return self.train(linear.training)

    def _set_adapter(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        fan_in_fan_out: bool,
        *,
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        if not isinstance(r, int) or isinstance(r, bool) or r < 0:
            raise ValueError(f"Linear: r: got {r!r}, expected an integer of at least 0")
        if not math.isfinite(lora_alpha):
            raise ValueError(f"Linear: lora_alpha: got {lora_alpha}, expected a finite number")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(
                f"Linear: lora_dropout: got {lora_dropout}, expected a probability from 0 to 1"
            )
        if not isinstance(init_lora_weights, bool) and init_lora_weights != "gaussian":
            raise ValueError(
                f"Linear: init_lora_weights: got {init_lora_weights!r}, "
                "expected True, False or 'gaussian'"
            )
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.fan_in_fan_out = fan_in_fan_out
        self.init_lora_weights = init_lora_weights
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r) if r > 0 else 0.0
        # The base's values while merged. Buffers, so that .to() and .cuda() take them along.
        self.register_buffer("_base_weight", None, persistent=False)
        self.register_buffer("_base_bias", None, persistent=False)
        dtype = self.weight.dtype
        if autocast_adapter_dtype and dtype in (torch.bfloat16, torch.float16):
            dtype = torch.float32

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=self.weight.device, dtype=dtype))

        self.lora_A = parameter(r, self.in_features) if r > 0 else None
        self.lora_B = parameter(self.out_features, r) if r > 0 else None
        self.lora_bias = parameter(self.out_features) if r > 0 and lora_bias else None
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Initialises the adapter again, as `init_lora_weights` says."""
        if self.lora_A is None or self.lora_B is None:
            return
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        if self.lora_A is None or self.lora_B is None or self._base_weight is not None:
            return nn.functional.linear(x, weight, self.bias)
        return lora_linear(
            x,
            weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.lora_bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
        )

    @property
    def merged(self) -> bool:
        """Whether the adapter is in `weight`."""
        return self._base_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Adds `scaling * lora_B @ lora_A` to `weight` in place (and the scaled `lora_bias` to
        `bias`), in float32 with one rounding; float64 for float64.

        Raises:
            AlreadyMergedError: it is merged.
            ValueError: a merged value would be NaN or infinite, or there is a lora_bias but no
                bias. Nothing is changed then.
        """
        if self.merged:
            raise AlreadyMergedError("Linear.merge: already merged; call unmerge() first")
        if self.lora_A is None or self.lora_B is None:
            raise ValueError("Linear.merge: there is no adapter (r = 0), expected r of at least 1")
        bias = self._merged_bias()
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        base_weight = self.weight.detach().clone()
        torch.ops.lora_ext.merge_(weight, self.lora_A, self.lora_B, self.scaling)
        self._base_weight = base_weight
        if bias is not None and self.bias is not None:
            self._base_bias = self.bias.detach().clone()
            self.bias.copy_(bias)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives `weight` and `bias` back the bits they had before `merge()`.

        Raises:
            NotMergedError: it is not merged.
        """
        if self._base_weight is None:
            raise NotMergedError("Linear.unmerge: not merged; call merge() first")
        self.weight.copy_(self._base_weight)
        self._base_weight = None
        if self._base_bias is not None and self.bias is not None:
            self.bias.copy_(self._base_bias)
            self._base_bias = None

    def _merged_bias(self) -> Tensor | None:
        if self.lora_bias is None:
            return None
        if self.bias is None:
            raise ValueError(
                "Linear.merge: lora_bias cannot be merged into a base without bias; "
                "construct the base with bias=True"
            )
        compute = torch.promote_types(self.bias.dtype, torch.float32)
        merged = self.bias.to(compute) + self.lora_bias.to(compute) * self.scaling
        merged = merged.to(self.bias.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError("Linear.merge: the merged bias would hold NaN or Inf; nothing changed")
        return merged

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base_weight is not None:
            destination[f"{prefix}weight"] = self._base_weight
        if self._base_bias is not None:
            destination[f"{prefix}bias"] = self._base_bias

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
        """A merged layer stays merged, with what was loaded."""
        merged = self.merged
        if merged:
            self.unmerge()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if merged:
            try:
                self.merge()
            except ValueError as error:
                error_msgs.append(f"{prefix}merge after loading, now unmerged: {error}")

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"
        if self.lora_dropout > 0.0:
            text += f", lora_dropout={self.lora_dropout}"
        for flag in ("use_rslora", "fan_in_fan_out", "merged"):
            if getattr(self, flag):
                text += f", {flag}=True"
        return text
