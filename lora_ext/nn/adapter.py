"""One adapter of a layer: its name, its settings, and what a fused call gets of it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypedDict

import torch
from torch import Tensor

from lora_ext import functional
from lora_ext._scaling import is_for_any
from lora_ext.arguments import as_flag, as_number, check_names, describe, suggests_names
from lora_ext.nn.calibrated import check_lora_ga
from lora_ext.nn.init import check_init, is_mica

DEFAULT = "default"  # the adapter that a constructor makes
LOFTQ_BITS = (4, 8)
# What an adapter may be beyond a low-rank product: the flag that asks for it, and its name.
VARIANTS = {"use_dora": "DoRA"}
# What does not go together with them, and why.
EXCLUDED = {
    "use_dora": {
        "lora_bias": "DoRA scales a weight, and a bias of lora_B is none",
        "alora_invocation_tokens": "DoRA changes the whole weight, for all tokens",
        "ungrouped_lora_A": "DoRA divides by the norm of the weight plus the update, and an update "
        "that links channels of different groups is none of the weight; PEFT takes another norm",
    }
}
_FLAGS = ("use_rslora", "lora_bias", *VARIANTS, "autocast_adapter_dtype", "ungrouped_lora_A")


@suggests_names
@dataclass(frozen=True)
class AdapterSettings:
    """How an adapter is shaped, scaled, trained and initialised; names and defaults are PEFT's.

    Args:
        r: rank, at least 1.
        lora_alpha: `scaling` is `lora_alpha / r`. Like r it is 8 here, in `from_*` and in a
            LoraConfig, as in PEFT; a layer's constructor has loralib's 1 (and r = 0).
        lora_dropout: probability that an input element is dropped before lora_A, in training.
        use_rslora: `scaling` is `lora_alpha / sqrt(r)` (arXiv:2312.03732).
        lora_bias: whether lora_B has a bias, scaled like the product.
        init_lora_weights: True, False (for tests), "gaussian", "orthogonal", "pissa",
            "pissa_niter_N", "olora", "mica", "loftq", "eva", "corda" or "lora_ga"; see
            `lora_ext.nn.init`. PiSSA, OLoRA, CorDA and LoRA-GA take the initial product out of the
            base's weight, LoftQ quantizes that; MiCA trains lora_A alone.
        alora_invocation_tokens: of an activated LoRA: it runs under a plan alone (`lora_ext.batch`
            with `after`), which a LoraModel makes of these tokens; elsewhere it is the base.
        use_dora: DoRA: a trained magnitude for each output feature (see `lora_ext.nn.dora`).
        autocast_adapter_dtype: keep the adapter in float32 on a bfloat16 or float16 base.
        ungrouped_lora_A: of a convolution with groups: lora_A reads all input channels, as PEFT's
            does. It cannot be merged. Loading a file that PEFT trained sets it where it has to.
        blocks_of_lora_A, blocks_of_lora_B: of a linear layer: how many blocks lie on the diagonal
            of the matrix, which is zero elsewhere; the parameter has the blocks alone (BD-LoRA). Of
            one of the two; init_lora_weights is then True, False or "gaussian".
        loftq_bits, loftq_iter: of init_lora_weights="loftq": bits of the weight's values (4 or 8),
            and how often weight and adapter are found in turn.
        lora_ga_direction, lora_ga_scale, lora_ga_stable_gamma: of init_lora_weights="lora_ga": the
            fields of a `lora_ext.LoraGAConfig`.
        weights: (r, lora_alpha) of single weights of an `AnyLayer` that need others, by name.

    Raises:
        TypeError: a value of another kind, by name.
        ValueError: a value out of range, by name; lora_bias or ungrouped_lora_A with use_dora.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    use_dora: bool = False
    autocast_adapter_dtype: bool = True
    ungrouped_lora_A: bool = False
    alora_invocation_tokens: tuple[int, ...] | None = None
    blocks_of_lora_A: int = 1
    blocks_of_lora_B: int = 1
    loftq_bits: int = 4
    loftq_iter: int = 1
    lora_ga_direction: str = "ArB2r"
    lora_ga_scale: str = "stable"
    lora_ga_stable_gamma: float = 16
    weights: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.r, numbers.Integral) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(
                f"adapter: r: got {describe(self.r)}, expected an integer of at least 1"
            )
        lora_alpha = as_number(self.lora_alpha, "adapter", "lora_alpha", "a finite number")
        if not math.isfinite(lora_alpha):
            raise ValueError(f"adapter: lora_alpha: got {lora_alpha}, expected a finite number")
        probability = "a probability from 0 to 1"
        lora_dropout = as_number(self.lora_dropout, "adapter", "lora_dropout", probability)
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(f"adapter: lora_dropout: got {lora_dropout}, expected {probability}")
        try:
            check_init(self.init_lora_weights)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"adapter: {error}") from None
        values: dict[str, Any] = {
            "r": int(self.r),
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
        }
        for name in _FLAGS:
            values[name] = as_flag(getattr(self, name), "adapter", name)
        if self.alora_invocation_tokens is not None:
            values["alora_invocation_tokens"] = tuple(self.alora_invocation_tokens) or None
        for name, value in values.items():  # of Python, whatever they were
            object.__setattr__(self, name, value)
        if sum(getattr(self, flag) for flag in VARIANTS) > 1:
            raise ValueError(f"adapter: got several of {list(VARIANTS)}, expected one at most")
        for other, why in EXCLUDED.get(variant_of(self), {}).items():
            if getattr(self, other):
                value = getattr(self, other)
                raise ValueError(
                    f"adapter: {other}: got {describe(value)} with {variant_of(self)}=True, "
                    f"expected {'False' if value is True else 'None'}: {why}"
                )
        if variant_of(self) and is_mica(self.init_lora_weights):
            raise ValueError(
                f"adapter: init_lora_weights: got 'mica' with {variant_of(self)}=True, expected "
                "another kind: Invalid or unsupported variant combination"
            )
        self._check_blocks()
        count = self.loftq_iter
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(
                f"adapter: loftq_iter: got {describe(count)}, expected an integer of at least 1"
            )
        if self.loftq_bits not in LOFTQ_BITS or isinstance(self.loftq_bits, bool):
            raise ValueError(
                f"adapter: loftq_bits: got {describe(self.loftq_bits)}, expected one of "
                f"{LOFTQ_BITS}"
            )
        check_lora_ga(
            "adapter: lora_ga_",
            self.lora_ga_direction,
            self.lora_ga_scale,
            self.lora_ga_stable_gamma,
        )
        for name in self.weights:
            self.of(name)

    def _check_blocks(self) -> None:
        for name in ("blocks_of_lora_A", "blocks_of_lora_B"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(
                    f"adapter: {name}: got {describe(count)}, expected an integer of at least 1"
                )
        if not self.has_blocks:
            return
        if self.blocks_of_lora_A > 1 and self.blocks_of_lora_B > 1:
            raise ValueError("adapter: got blocks of lora_A and of lora_B, expected those of one")
        init = self.init_lora_weights
        if not isinstance(init, bool) and init != "gaussian":
            raise ValueError(
                f"adapter: init_lora_weights: got {init!r} with block-diagonal matrices, expected "
                "True, False or 'gaussian'"
            )
        if variant_of(self):
            raise ValueError(
                f"adapter: {variant_of(self)}: got True with block-diagonal matrices, expected "
                "False: Invalid or unsupported variant combination"
            )

    @property
    def has_blocks(self) -> bool:
        """Whether lora_A or lora_B is block-diagonal (BD-LoRA)."""
        return self.blocks_of_lora_A > 1 or self.blocks_of_lora_B > 1

    @property
    def is_plain(self) -> bool:
        """Whether its update is lora_B lora_A as they lie: no blocks, and no variant of LoRA."""
        return self.blocks_of_lora_A == 1 == self.blocks_of_lora_B and not variant_of(self)

    def of(self, weight: str) -> Self:
        """Those of one weight of the layer."""
        if weight not in self.weights:
            return self
        r, lora_alpha = self.weights[weight]
        return replace(self, r=r, lora_alpha=lora_alpha, weights={})

    @property
    def scaling(self) -> float:
        """Of the low-rank product."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class AdapterOptions(TypedDict, total=False):
    """The fields of AdapterSettings that `from_*` take as further arguments."""

    use_rslora: bool
    lora_bias: bool
    init_lora_weights: bool | str
    use_dora: bool
    autocast_adapter_dtype: bool
    ungrouped_lora_A: bool
    alora_invocation_tokens: tuple[int, ...] | None
    blocks_of_lora_A: int
    blocks_of_lora_B: int
    loftq_bits: int
    loftq_iter: int
    lora_ga_direction: str
    lora_ga_scale: str
    lora_ga_stable_gamma: float


def variant_of(settings: object) -> str:
    """The flag of AdapterSettings, or of a LoraConfig, that asks for a variant of LoRA (see
    VARIANTS); "" without one."""
    for flag in VARIANTS:  # no generator: plans ask for each adapter in each call
        if getattr(settings, flag):
            return flag
    return ""


def check_setting_names(where: str, names: Iterable[str]) -> None:
    """TypeError for what is no field of AdapterSettings, with the one that may be meant."""
    check_names(where, names, [one.name for one in fields(AdapterSettings)])


def part_name(part: str, adapter_name: str) -> str:
    """The attribute that holds a part of an adapter: "lora_A" of "default" is `lora_A`, as in
    loralib; of "french" it is `lora_A_french`."""
    return part if adapter_name == DEFAULT else f"{part}_{adapter_name}"


def check_adapter_name(
    adapter_name: str, taken: Container[str], where: str, argument: str = "adapter_name"
) -> None:
    """ValueError unless this can name a new adapter beside those that are there."""
    # It becomes part of parameters' names and, when saved, the name of a folder.
    if (
        not isinstance(adapter_name, str)
        or not adapter_name
        or any(character in adapter_name for character in "./\\\0")
    ):
        raise ValueError(
            f"{where}: {argument}: got {describe(adapter_name)}, expected a non-empty name without "
            "dots and slashes"
        )
    if adapter_name in taken:
        raise ValueError(
            f"{where}: {argument}: there is an adapter '{adapter_name}' already; "
            "choose another name or delete it first"
        )


class LowRank(functional.LowRank):
    """Adapters that one fused call runs, stacked along the rank."""

    def for_any(self) -> LowRank:
        """The same with a scaling that is a constant, for what takes no other; see
        `_scaling.is_for_any`."""
        constant = not isinstance(self.scaling, Tensor) and not is_for_any(self.scaling)
        return self if constant else stacked([self])


def stacked(adapters: Sequence[LowRank], factors: Sequence[Tensor] | None = None) -> LowRank:
    """Adapters, whose dropout if any is the same, as one of the sum of their ranks. `factors`
    [rows of lora_B] multiply the output features of each."""
    # The scalings go into lora_B, and with it into float32: there they cost no accuracy.
    compute = torch.promote_types(adapters[0].lora_A.dtype, torch.float32)

    def scaled(tensor: Tensor, i: int) -> Tensor:
        tensor = tensor.to(compute) * adapters[i].scaling
        if factors is not None:
            tensor = tensor * factors[i].view(-1, *[1] * (tensor.dim() - 1))
        return tensor

    biases = [
        scaled(one.lora_bias, i) for i, one in enumerate(adapters) if one.lora_bias is not None
    ]
    return LowRank(
        torch.cat([one.lora_A.to(compute) for one in adapters], 0),
        torch.cat([scaled(one.lora_B, i) for i, one in enumerate(adapters)], 1),
        torch.stack(biases).sum(0) if biases else None,
        1.0,
        adapters[0].dropout_p,
    )


class DefaultAdapter:
    """What a layer whose constructor made one adapter shows of it, under loralib's names."""

    adapters: dict[str, AdapterSettings]
    _scaling: dict[str, float]

    @property
    def _default(self) -> AdapterSettings | None:
        return self.adapters.get(DEFAULT)

    @property
    def r(self) -> int:
        """Rank of the adapter "default"; 0 without one."""
        return self._default.r if self._default else 0

    @property
    def lora_alpha(self) -> float:
        """Numerator of the scaling of the adapter "default"; 1 without one."""
        return self._default.lora_alpha if self._default else 1

    @property
    def lora_dropout(self) -> float:
        """Dropout probability of the adapter "default"; 0 without one."""
        return self._default.lora_dropout if self._default else 0.0

    @property
    def scaling(self) -> float:
        """What multiplies the product of the adapter "default" now; see `set_scale`."""
        return self._scaling.get(DEFAULT, 0.0)

    def adapters_repr(self) -> str:
        """What `extra_repr` adds to that of the base."""
        text = ""
        for name, settings in self.adapters.items():
            text += f", {'' if name == DEFAULT else name + ': '}r={settings.r}"
            text += f", lora_alpha={settings.lora_alpha}"
            if settings.lora_dropout > 0.0:
                text += f", lora_dropout={settings.lora_dropout}"
            for flag in ("use_rslora", *VARIANTS):
                if getattr(settings, flag):
                    text += f", {flag}=True"
        for flag in ("fan_in_fan_out", "merged"):
            if getattr(self, flag, False):
                text += f", {flag}=True"
        return text
