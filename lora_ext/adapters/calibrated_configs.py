"""PEFT's configs of initialisations from data: EVA, CorDA and LoRA-GA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self

from lora_ext.arguments import short, suggests_names
from lora_ext.nn.calibrated import check_lora_ga

METHODS = ("ipm", "kpm")
# Fields of a LoraConfig of an adapter that starts plainly, whatever it was.
PLAIN: dict[str, Any] = {
    "init_lora_weights": True,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}


class _SubConfig:
    """What a field of a LoraConfig holds."""

    FIELD: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def of(cls, value: Any) -> Self | None:
        """A config from what people have: one of these, PEFT's, a dict; None of None and False.

        Raises:
            TypeError, ValueError: it is something else, or a field is out of range.
        """
        if value is None or value is False or isinstance(value, cls):
            return value or None
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        where = f"LoraConfig: {cls.FIELD}"
        if isinstance(value, list | tuple) and not value:
            return None
        if not isinstance(value, Mapping):
            expected = f"None, a {cls.__name__}, or a dict of its fields"
            raise TypeError(f"{where}: got {short(value)}, expected {expected}")
        known = [one.name for one in fields(cls)]
        if unknown := sorted(str(name) for name in value if name not in known):
            raise TypeError(f"{where}: got {short(unknown)}, expected some of {known}")
        return cls(**value) if value else None

    def _refuse(self, name: str, expected: str, kind: type[Exception] = ValueError) -> None:
        got = short(getattr(self, name))
        raise kind(f"LoraConfig: {self.FIELD}: {name}: got {got}, expected {expected}")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False", TypeError)

    def _check_number(self, name: str, low: float, high: float, peft: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            self._refuse(name, f"a number from {low} to {high:g}: {peft}")


@suggests_names
@dataclass
class EvaConfig(_SubConfig):
    """How "eva" initialises (arXiv:2410.07170); names and defaults are PEFT's.

    Args:
        rho: a layer's rank is at most this times its r; 1 keeps all ranks as they are.
        tau: how alike, as a cosine, a component and its predecessor have to be for no further
            batches to be needed.
        use_label_mask, label_mask_value: leave out tokens whose label has this value.
        whiten: divide components by the roots of their singular values.
        adjust_scaling_factors: change alphas with the ranks, so that scalings stay.
    """

    FIELD: ClassVar[str] = "eva_config"
    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        self._check_number("rho", 1.0, 1e9, "`rho` must be >= 1.0")
        self._check_number("tau", 0.0, 1.0, "`tau` must be between 0.0 and 1.0.")
        self._check_flags("use_label_mask", "whiten", "adjust_scaling_factors")
        if not isinstance(self.label_mask_value, int):
            self._refuse("label_mask_value", "an integer", TypeError)


@suggests_names
@dataclass
class CordaConfig(_SubConfig):
    """How "corda" initialises (arXiv:2406.05223); names and defaults are PEFT's.

    Args:
        cache_file: where the factors are kept, and taken from if it is there.
        covariance_file: where the covariances are, for other ranks; as large as the model.
        corda_method: "ipm" trains the directions that the data uses most, "kpm" those that it uses
            least, which keeps what the model knows of it.
        verbose: show a bar while weights are decomposed.
        use_float16_for_covariance: keep covariances in float16.
        prune_temporary_fields: kept for PEFT's sake: none are left.
    """

    FIELD: ClassVar[str] = "corda_config"
    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        for name in ("cache_file", "covariance_file"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
            elif not isinstance(value, str | None):
                self._refuse(name, "None or a path", TypeError)
        if self.corda_method not in METHODS:
            self._refuse("corda_method", f"one of {METHODS}: it should be 'ipm' or 'kpm'")
        self._check_flags("verbose", "use_float16_for_covariance", "prune_temporary_fields")


@suggests_names
@dataclass
class LoraGAConfig(_SubConfig):
    """How "lora_ga" initialises (arXiv:2407.05000); names and defaults are PEFT's.

    Args:
        direction: which of 2 r singular vectors of the gradient lora_A and lora_B get: "ArB2r" the
            first r and the next, "A2rBr" the other way, "ArBr" in turn, "random" the same r.
        scale: of lora_B: "stable" by the features and stable_gamma, "weight_svd" by the weight's
            largest singular value, "gd_scale" both by the adapter's scaling, "unit" as they are.
        stable_gamma: of "stable".
    """

    FIELD: ClassVar[str] = "lora_ga_config"
    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16

    def __post_init__(self) -> None:
        where = f"LoraConfig: {self.FIELD}: "
        check_lora_ga(where, self.direction, self.scale, self.stable_gamma)

    def settings(self) -> dict[str, Any]:
        """As fields of `AdapterSettings`."""
        return {f"lora_ga_{name}": value for name, value in asdict(self).items()}
