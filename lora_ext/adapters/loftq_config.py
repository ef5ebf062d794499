"""PEFT's config of LoftQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from lora_ext.arguments import short, suggests_names
from lora_ext.nn.adapter import LOFTQ_BITS

_FIELD = "LoraConfig: loftq_config"


@suggests_names
@dataclass
class LoftQConfig:
    """How "loftq" initialises; names and defaults are PEFT's.

    Args:
        loftq_bits: 4 (NF4) or 8 (rows of int8).
        loftq_iter: how often weight and adapter are found in turn.

    Raises:
        ValueError: a field is out of range.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.loftq_bits, bool) or self.loftq_bits not in LOFTQ_BITS:
            raise ValueError(
                f"{_FIELD}: loftq_bits: got {short(self.loftq_bits)}, expected one of {LOFTQ_BITS}"
                ": Only nf4 and int8 quantization is supported"
            )
        count = self.loftq_iter
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1000:
            raise ValueError(
                f"{_FIELD}: loftq_iter: got {short(count)}, expected 1 to 1000: Number of "
                "iterations must be greater than 0"
            )

    @classmethod
    def checked(cls, value: Any) -> dict[str, Any] | None:
        """The fields of one of these, of PEFT's, or of a dict; none of what is empty, None of None.

        Raises:
            TypeError, ValueError: it is none, or a field is out of range.
        """
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if value is None:
            return None
        if isinstance(value, Mapping) and not value:
            return {}
        known = [one.name for one in fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(known):
            raise TypeError(
                f"{_FIELD}: got {short(value)}, expected a LoftQConfig, or a dict of {known}"
            )
        return asdict(cls(**value))
