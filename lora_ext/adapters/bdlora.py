"""PEFT's config of BD-LoRA: which layers have a block-diagonal lora_A, and which lora_B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Self

from lora_ext.arguments import short, suggests_names

_FIELD = "LoraConfig: use_bdlora"


@suggests_names
@dataclass
class BdLoraConfig:
    """Block-diagonal LoRA; names and defaults are PEFT's.

    Args:
        target_modules_bd_a: parts of names of the layers whose lora_A has blocks: those that a
            server divides by rows (out_proj, down_proj).
        target_modules_bd_b: of those whose lora_B has: those divided by columns (q_proj, up_proj).
        nblocks: how many blocks; best as many as the server has GPUs.
        match_strict: whether every adapted layer has to be one of these.

    Raises:
        TypeError, ValueError: a field has the wrong type or value, or a layer is named twice.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        for name in ("target_modules_bd_a", "target_modules_bd_b"):
            given = getattr(self, name)
            if given is not None and not (
                isinstance(given, list | tuple) and all(isinstance(one, str) for one in given)
            ):
                raise TypeError(f"{_FIELD}: {name}: got {short(given)}, expected a list of strings")
        blocks, strict = self.nblocks, self.match_strict
        if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
            raise ValueError(
                f"{_FIELD}: nblocks: got {short(blocks)}, expected an integer of at least 1"
            )
        if not isinstance(strict, bool):
            raise TypeError(f"{_FIELD}: match_strict: got {short(strict)}, expected True or False")
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(
                f"{_FIELD}: got {sorted(both)} in both lists, expected each in one: Found "
                "overlapping modules in target_modules_bd lists"
            )

    @classmethod
    def of(cls, value: Any) -> Self | None:
        """A config from what people have: one of these, PEFT's, a dict; None of what is empty."""
        if value is None or isinstance(value, cls):
            return value
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{_FIELD}: got {short(value)}, expected None, a BdLoraConfig, or a dict of its "
                "fields"
            )
        known = [one.name for one in fields(cls)]
        if unknown := sorted(str(name) for name in value if name not in known):
            raise TypeError(f"{_FIELD}: got {short(unknown)}, expected some of {known}")
        return cls(**value) if value else None

    def blocks_of(self, name: str) -> tuple[int, int]:
        """How many blocks lora_A and lora_B of the layer `name` have; 1 is a plain matrix.

        Raises:
            ValueError: both lists mean it, or neither does and `match_strict`.
        """
        in_a, in_b = (
            any(part in name for part in parts or ())
            for parts in (self.target_modules_bd_a, self.target_modules_bd_b)
        )
        if in_a and in_b:
            raise ValueError(
                f"{_FIELD}: '{name}' matches both A and B block-diagonal patterns, expected one"
            )
        if self.match_strict and not (in_a or in_b):
            raise ValueError(
                f"{_FIELD}: '{name}' matches neither A nor B block-diagonal patterns; name it in "
                "one of the lists, or set match_strict=False"
            )
        return self.nblocks if in_a else 1, self.nblocks if in_b else 1
