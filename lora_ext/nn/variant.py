"""What an adapter may be beyond a low-rank product (DoRA today): one class for each kind of layer
that has it, in the manner of PEFT's LoraVariant. `lora_ext.nn.variants` says which has which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor

from lora_ext.nn.adapter import AdapterSettings

Layer = TypeVar("Layer")


class LoraVariant(Generic[Layer]):
    """A layer asks its variant when an adapter with its flag is added, initialised, run, merged or
    explained. It keeps nothing: what it needs are parts of the layer's adapters."""

    FLAG: ClassVar[str]  # of AdapterSettings and LoraConfig, which asks for it
    READS_WEIGHT: ClassVar[bool]  # whether the base's weight is needed to add an adapter

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def part_shapes(self, layer: Layer, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        """Of the parts beside those of a low-rank product; ValueError where there can be none."""
        raise NotImplementedError

    def initialise(self, layer: Layer, adapter_name: str) -> None:
        """Gives these parts their first values, after those of the low-rank product."""
        raise NotImplementedError

    def forward(self, layer: Layer, x: Tensor, names: Sequence[str]) -> Tensor:
        """What the layer makes of x with these adapters, of which one is of this variant; others
        may be plain."""
        raise NotImplementedError

    def merge_factors(
        self, layer: Layer, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What multiplies the output features of each adapter, and of the base's weight, when these
        adapters are merged one after another."""
        raise NotImplementedError

    def explain(self, layer: Layer, tokens: int) -> str:
        """What it adds to the cost of the layer's path, for `explain`."""
        raise NotImplementedError


AnyVariant = LoraVariant[Any]
