"""XLoraConfig: which adapters are mixed, and by what classifier. PEFT's fields and defaults."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from lora_ext.adapters.config_files import PEFT_VERSION
from lora_ext.adapters.types import PeftType
from lora_ext.arguments import as_flag, as_number, as_path, describe, refuse, suggests_names, warn
from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_folder import CONFIG_NAME, read_config_file
from lora_ext.io.atomic import save_files
from lora_ext.io.files import json_text
from lora_ext.nn.adapter import check_adapter_name

_FLAGS = (
    *("enable_softmax", "enable_softmax_topk", "layerwise_scalings", "use_trainable_adapters"),
    *("enable_relu_and_dropout", "use_bias", "inference_mode"),
)
_TEXTS = ("task_type", "peft_version", "base_model_name_or_path", "revision")
_SIZES = ("hidden_size", "xlora_depth", "xlora_size")
MAX_DEPTH, MAX_SIZE = 1000, 1 << 24  # a file may say any number
# Of the published package, beside those of PEFT: what has to be left out of PEFT's files.
_OF_THE_PACKAGE = ("enable_relu_and_dropout", "use_bias")
_UNSAVED = ("unknown_fields",)


@suggests_names
@dataclass
class XLoraConfig:
    """A mixture of adapters, with the names, defaults and meanings of PEFT's XLoraConfig.

    Args:
        task_type, peft_type, auto_mapping, peft_version, base_model_name_or_path, revision: as in
            `LoraConfig`.
        inference_mode: whether the classifier is frozen, too.
        hidden_size: of the base model's hidden states; None: as its config says.
        adapters: names of the adapters and where each is, a folder or an id on the hub.
        enable_softmax: the scalings of a token are a softmax of the classifier's results.
        enable_softmax_topk: a softmax over those that top_k_lora leaves, of each token by itself.
        softmax_temperature: what the results are divided by before enable_softmax.
        layerwise_scalings: whether each layer has scalings of its own.
        top_k_lora: how many adapters a token has, those of the largest scalings; None: all.
        xlora_depth: linear layers of the classifier.
        xlora_size: features between them.
        xlora_dropout_p: dropout between them, in training.
        use_trainable_adapters: whether the adapters train, too.
        scaling_pass_value: the scaling of all adapters in the pass that finds the hidden states.
        global_scaling_weight: multiplies all scalings.
        enable_relu_and_dropout, use_bias: of the published package's classifiers, where PEFT's have
            always both.
        unknown_fields: what a file has beyond these fields; written back.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
    """

    task_type: str | None = None
    peft_type: PeftType = PeftType.XLORA
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    hidden_size: int | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    enable_relu_and_dropout: bool = True
    use_bias: bool = True
    unknown_fields: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.peft_version is None:
            self.peft_version = PEFT_VERSION
        self.validate()

    # Of PEFT's configs: which other kinds they are.
    is_prompt_learning = is_adaption_prompt = property(lambda self: False)

    @classmethod
    def of(cls, config: Any, where: str) -> XLoraConfig:
        """A config from what people have: one of these, one of PEFT's, or a dict of its fields."""
        if isinstance(config, XLoraConfig):
            return config
        values = config.to_dict() if _is_pefts(config) else config
        if not isinstance(values, Mapping):
            refuse(
                where,
                "peft_config",
                config,
                "an XLoraConfig, one of PEFT's, or a dict of its fields",
            )
        return cls.from_dict(values)

    def validate(self) -> None:
        """Checks every field, as the constructor does; for objects that were changed since."""
        where = "XLoraConfig"
        if self.peft_type != "XLORA":
            raise ValueError(
                f"{where}: peft_type: got {describe(self.peft_type)}, expected 'XLORA'"
            )
        self.peft_type = PeftType.XLORA
        for name in _FLAGS:
            setattr(self, name, as_flag(getattr(self, name), where, name))
        for name in _TEXTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                refuse(where, name, value, "a text or None")
        for name in _SIZES:
            if name != "hidden_size" or self.hidden_size is not None:
                limit = MAX_DEPTH if name == "xlora_depth" else MAX_SIZE
                setattr(
                    self, name, _integer(getattr(self, name), name, f"from 1 to {limit}", limit)
                )
        if self.top_k_lora is not None:
            self.top_k_lora = checked_top_k(self.top_k_lora, self.adapters, where)
        for name in ("softmax_temperature", "scaling_pass_value", "global_scaling_weight"):
            setattr(self, name, finite(getattr(self, name), where, name))
        if self.softmax_temperature <= 0.0:
            raise ValueError(
                f"{where}: softmax_temperature: got {self.softmax_temperature}, expected more than "
                "0; a small number lets one adapter win"
            )
        self.xlora_dropout_p = finite(self.xlora_dropout_p, where, "xlora_dropout_p")
        if not 0.0 <= self.xlora_dropout_p < 1.0:
            raise ValueError(
                f"{where}: xlora_dropout_p: got {self.xlora_dropout_p}, expected 0 to less than 1"
            )
        self._check_adapters()
        if self.enable_softmax_topk and self.top_k_lora is None:
            warn("XLoraConfig: `enable_softmax_topk` enabled `top_k_lora` is not set")
        if self.enable_softmax_topk and self.enable_softmax:
            warn(
                "XLoraConfig: `enable_softmax_topk` and `enable_softmax` are both enabled. This "
                "will result in worse performance."
            )

    def _check_adapters(self) -> None:
        where = "XLoraConfig"
        if self.adapters is None:
            self.adapters = {}
        if not isinstance(self.adapters, Mapping):
            refuse(where, "adapters", self.adapters, "a dict of names to folders of adapters")
        for name, place in self.adapters.items():
            check_adapter_name(name, (), where, "adapters: a name")
            if not isinstance(place, str | os.PathLike):
                refuse(where, f"adapters[{name!r}]", place, "a folder, or an id on the hub")
        self.adapters = {name: os.fspath(place) for name, place in self.adapters.items()}

    def to_dict(self) -> dict[str, Any]:
        """All fields and values; a deep copy."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        return copy.deepcopy(
            {name: value for name, value in own.items() if name not in _UNSAVED}
            | self.unknown_fields
        )

    def to_file(self) -> dict[str, Any]:
        """What PEFT's adapter_config.json is to hold.

        Raises:
            ValueError: the classifier is one that PEFT's files cannot say.
        """
        values = self.to_dict()
        values["peft_type"] = str(self.peft_type.value)
        for name in _OF_THE_PACKAGE:
            if not values.pop(name) and (name != "enable_relu_and_dropout" or self.xlora_depth > 1):
                raise ValueError(
                    f"XLoraConfig: {name}: got False, expected True: PEFT's classifiers have no "
                    "such choice; save_pretrained(..., layout='xlora') writes it"
                )
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Writes adapter_config.json into the folder, as `LoraConfig.save_pretrained`."""
        values = self.to_file()
        if options.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = options["auto_mapping_dict"]
        save_files(save_directory, {CONFIG_NAME: json_text(values).encode()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A config from the values of a file or of PEFT's `to_dict`. Nothing is shared with it;
        fields that this version does not know are kept, with a warning unless they are off."""
        if not isinstance(values, Mapping):
            refuse("XLoraConfig.from_dict", "values", values, "a mapping")
        own = {one.name for one in fields(cls)} - set(_UNSAVED)
        given = copy.deepcopy(dict(values))
        given.pop("runtime_config", None)
        unknown = {name: given.pop(name) for name in given.keys() - own}
        if len(unknown) > 1000:
            raise ValueError(
                f"XLoraConfig: got {len(unknown)} unknown fields, expected at most 1000"
            )
        said = sorted(str(name)[:100] for name, value in unknown.items() if value)
        if said:
            warn(f"XLoraConfig: {said[:20]}: unknown to this version; kept, without effect")
        make: Any = cls
        return make(**given, unknown_fields=unknown)  # type: ignore[no-any-return]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **_: Any
    ) -> Self:
        """A config from a folder's adapter_config.json, or from the file itself; checked as
        `LoraConfig.from_pretrained` does."""
        path = as_path(pretrained_model_name_or_path, "XLoraConfig.from_pretrained")
        path = path / CONFIG_NAME if path.is_dir() else path
        values = read_config_file(path)
        if "peft_type" not in values:
            raise ValueError(f"{path}: XLoraConfig: peft_type: is missing, expected 'XLORA'")
        return cls.from_values(values, path)

    @classmethod
    def from_values(cls, values: dict[str, Any], path: Path) -> Self:
        """As `from_dict`, of a file, which errors name."""
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError, RecursionError) as error:
            raise AdapterFileError(f"{path}: {error}") from None


def is_xlora(config: Any) -> bool:
    """Whether a config, or a dict of its fields, is X-LoRA's, ours or PEFT's."""
    if isinstance(config, Mapping):
        return config.get("peft_type") == "XLORA"
    return isinstance(config, XLoraConfig) or (_is_pefts(config) and config.peft_type == "XLORA")


def _is_pefts(config: Any) -> bool:
    return type(config).__module__.partition(".")[0] == "peft" and hasattr(config, "to_dict")


def finite(value: Any, where: str, name: str) -> float:
    number = as_number(value, where, name, "a finite number")
    if not math.isfinite(number):
        raise ValueError(f"{where}: {name}: got {number}, expected a finite number")
    return number


def _integer(value: Any, name: str, expected: str, limit: int) -> int:
    number = as_number(value, "XLoraConfig", name, f"an integer {expected}")
    if number != int(number) or not 1 <= number <= limit:
        raise ValueError(f"XLoraConfig: {name}: got {number}, expected an integer {expected}")
    return int(number)


def checked_top_k(value: Any, adapters: Any, where: str) -> int:
    """How many adapters a token has.

    Raises:
        ValueError: none, or more than there are.
    """
    count = len(adapters) if adapters else None
    expected = "an integer of at least 1" if count is None else f"1 to {count}, as many as adapters"
    number = as_number(value, where, "top_k_lora", f"{expected}, or None for all")
    if number != int(number) or number < 1 or (count is not None and number > count):
        raise ValueError(f"{where}: top_k_lora: got {number}, expected {expected}, or None for all")
    return int(number)
