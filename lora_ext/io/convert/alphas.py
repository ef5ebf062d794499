"""lora_alpha: of each module as PEFT's config says it, and of files that do not hold it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from lora_ext._patterns import (
    FILE_SECONDS,
    MAX_PATTERN_CHARACTERS,
    Budget,
    NameTable,
    SlowPatternError,
    compiled,
    is_plain,
    size,
)
from lora_ext.arguments import describe
from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.formats import Options
from lora_ext.io.files import short

_FIELD = "alpha_pattern"
_MOST_NAMES = 1 << 13  # for which a file gets more time
Result = TypeVar("Result")


class Alphas:
    """The lora_alpha of each module, as a config says it; one that counts as alpha / rank where
    use_rslora means another scaling."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._alpha = self._number("lora_alpha", config.get("lora_alpha", 8))
        patterns = config.get(_FIELD) or {}
        if not isinstance(patterns, dict):
            raise AdapterFileError(f"{where}: {_FIELD}: expected an object of numbers")
        self._patterns = {
            pattern: self._number(_FIELD, value) for pattern, value in patterns.items()
        }
        self._budget = Budget(FILE_SECONDS)  # for expressions, of all modules together
        self._table = NameTable(_FIELD, self._patterns)
        self._timed(self._check_expressions, min(len(self._patterns), _MOST_NAMES))
        self._rslora = bool(config.get("use_rslora"))

    def _number(self, field: str, value: Any) -> float:
        # Not larger: integers of JSON may be too large for a float.
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise AdapterFileError(
                f"{self._where}: {field}: got {describe(value)}, expected a number above 0"
            )
        return float(value)

    def _check_expressions(self) -> None:
        characters = 0
        for pattern in self._patterns:
            if is_plain(pattern):
                continue
            characters += size(pattern)
            if characters > MAX_PATTERN_CHARACTERS:
                raise AdapterFileError(
                    f"{self._where}: {_FIELD}: {short(pattern)}: expected names of modules, or "
                    f"expressions of together at most {MAX_PATTERN_CHARACTERS} characters, each "
                    "counted as often as its counts repeat it"
                )
            try:
                compiled(_FIELD, pattern)
            except SlowPatternError:
                raise
            except Exception as error:  # regex.error, and others for what is too deep
                raise AdapterFileError(
                    f"{self._where}: {_FIELD}: {short(pattern)}: {error}"
                ) from error

    def _timed(self, call: Callable[[], Result], names: int = 1) -> Result:
        try:
            return self._budget.run(names, call)
        except SlowPatternError:
            raise AdapterFileError(
                f"{self._where}: {_FIELD}: takes longer to match than there is time for; name "
                "modules instead of expressions"
            ) from None

    def of(self, name: str, rank: int) -> float:
        """That of one module."""
        # A name that is no expression for itself counts as well, as in PEFT.
        key = self._timed(lambda: next(self._table.matching(name), name))
        alpha = self._patterns.get(key, self._alpha)
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
