"""PEFT's config of how a program runs, which no file has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_ext.arguments import short, suggests_names, warn

NAME = "ephemeral_gpu_offload"
# Of what PEFT moves to a GPU for it: the norms of DoRA, when an adapter is made.
NO_EFFECT = (
    "has no effect: what an initialisation or DoRA reads of a weight is computed where the weight "
    "is, and nothing is moved to a GPU for it"
)


@suggests_names
@dataclass
class LoraRuntimeConfig:
    """Names and defaults are PEFT's.

    Args:
        ephemeral_gpu_offload: accepted, and without effect here, which a warning says.
    """

    ephemeral_gpu_offload: bool = False


def check_runtime(value: Any) -> None:
    """TypeError unless it is one of these, of PEFT's, or a dict of its field."""
    known = value.keys() <= {NAME} if isinstance(value, Mapping) else hasattr(value, NAME)
    asked = value.get(NAME) if isinstance(value, Mapping) else getattr(value, NAME, None)
    if not known or not isinstance(asked, bool | None):
        raise TypeError(
            f"LoraConfig: runtime_config: got {short(value)}, expected None, a LoraRuntimeConfig, "
            f"or a dict with '{NAME}': True or False"
        )


def warn_of_no_effect(value: Any) -> None:
    """Says that what was asked for does nothing here."""
    asked = value.get(NAME) if isinstance(value, Mapping) else getattr(value, NAME, None)
    if asked:
        warn(f"LoraConfig: runtime_config.{NAME}: got True, which {NO_EFFECT}")
