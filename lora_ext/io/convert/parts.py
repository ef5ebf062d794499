"""Parts of an adapter that its config asks for: of every module, or of none."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lora_ext.errors import AdapterFileError
from lora_ext.io.files import short

_KEY = re.compile(
    r"base_model\.model\.(?P<name>.+)\.(?P<part>lora_A\.weight|lora_embedding_A|lora_B\.bias"
    r"|lora_magnitude_vector)(?:\.weight)?"
)
_MAGNITUDE, _BIAS = "lora_magnitude_vector", "lora_B.bias"
_FIELDS = {_MAGNITUDE: "use_dora", _BIAS: "lora_bias"}


def unlike_config(config: Mapping[str, Any], keys: Collection[str]) -> Iterator[tuple[str, str]]:
    """Modules that lack a part that the config's fields ask for, or have one that these do not.

    Args:
        keys: PEFT's, of the adapter's file.

    Yields:
        The module's name, and what is wrong with it.
    """
    modules: dict[str, set[str]] = {}
    for match in filter(None, map(_KEY.fullmatch, keys)):
        modules.setdefault(match["name"], set()).add(match["part"])
    for name, parts in modules.items():
        if parts <= set(_FIELDS):
            continue  # has no pair: said otherwise
        for part, field in _FIELDS.items():
            # A bias of lora_B is none of an embedding's.
            asked = bool(config.get(field)) and not (part == _BIAS and "lora_A.weight" not in parts)
            if part in parts and not config.get(field):
                yield name, f"has {part}, and the config does not say {field}"
            elif asked and part not in parts:
                yield name, f"has no {part}, and the config says {field}"


def check_parts(config: Mapping[str, Any], keys: Collection[str], where: str) -> None:
    """AdapterFileError for the first of these modules."""
    for name, says in unlike_config(config, keys):
        raise AdapterFileError(
            f"{where}: {short(name)}: {says} (DoRA's magnitudes are kohya's dora_scale): PEFT has "
            "it of all modules or of none; merge such an adapter in the program that trained it, "
            "or, of a pipeline, convert one component (component=, --component)"
        )
