"""lora_alpha: of each module as PEFT's config says it, and of files that do not hold it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import regex
from torch import Tensor

from lora_ext.arguments import describe
from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.formats import Options
from lora_ext.io.files import short

_PATTERN_SECONDS = 2.0


class Alphas:
    """The lora_alpha of each module, as a config says it; one that counts as alpha / rank where
    use_rslora means another scaling."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._alpha = self._number("lora_alpha", config.get("lora_alpha", 8))
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise AdapterFileError(f"{where}: alpha_pattern: expected an object of numbers")
        self._patterns = []
        self._deadline = time.monotonic() + _PATTERN_SECONDS
        for pattern, value in patterns.items():
            if "{" in pattern or len(pattern) > 1000:  # what costs time when it is compiled
                raise AdapterFileError(
                    f"{where}: alpha_pattern: {short(pattern)}: expected the name of a module, or "
                    "a short expression without counts"
                )
            try:
                compiled = regex.compile(rf"(.*\.)?({pattern})$")
            except regex.error as error:
                raise AdapterFileError(
                    f"{where}: alpha_pattern: {short(pattern)}: {error}"
                ) from error
            self._patterns.append((compiled, self._number("alpha_pattern", value)))
        self._rslora = bool(config.get("use_rslora"))

    def _number(self, field: str, value: Any) -> float:
        # Not larger: integers of JSON may be too large for a float.
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise AdapterFileError(
                f"{self._where}: {field}: got {describe(value)}, expected a number above 0"
            )
        return float(value)

    def of(self, name: str, rank: int) -> float:
        """That of one module."""
        alpha = self._alpha
        for pattern, value in self._patterns:
            left = self._deadline - time.monotonic()
            try:
                if left <= 0 or pattern.match(name, timeout=left):
                    alpha = value
                    break
            except TimeoutError:
                left = 0
            if left <= 0:
                raise AdapterFileError(
                    f"{self._where}: alpha_pattern: takes longer than {_PATTERN_SECONDS} s to "
                    "match; name modules instead of expressions"
                )
        return alpha * math.sqrt(rank) if self._rslora else alpha


def alpha_of(options: Options, metadata: Mapping[str, str], where: str) -> float:
    """That of a file whose format has no place for it."""
    if options.alpha is not None:
        return float(options.alpha)
    if "lora_alpha" in metadata:
        try:
            alpha = float(metadata["lora_alpha"])
        except ValueError:
            alpha = math.nan
        if math.isfinite(alpha) and alpha > 0:
            return alpha
        raise AdapterFileError(f"{where}: 'lora_alpha' in its metadata is no number above 0")
    raise AdapterFileError(
        f"{where}: this format does not hold lora_alpha; give the one that it was trained with "
        "(alpha=, --alpha)"
    )


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """In float32 where 16 bits would round the product."""
    product = (tensor.double() * factor).to(tensor.dtype)
    if tensor.itemsize < 4 and not bool((product.double() == tensor.double() * factor).all()):
        return (tensor.double() * factor).float()
    return product
