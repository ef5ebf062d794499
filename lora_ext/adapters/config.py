"""LoraConfig: how a model is adapted. PEFT's fields, defaults and file."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, Self, TypeVar

from lora_ext.adapters.bdlora import BdLoraConfig
from lora_ext.adapters.config_checks import ATOMS, NOT_BUILT, check_fields, is_off, plain_value
from lora_ext.adapters.patterns import FILE_SECONDS, in_time, matching
from lora_ext.adapters.types import PeftType
from lora_ext.arguments import (
    as_path,
    did_you_mean,
    former_names,
    listed,
    refuse,
    short,
    suggests_names,
    warn,
)
from lora_ext.io.adapter_folder import CONFIG_NAME, read_config_file
from lora_ext.io.atomic import save_files
from lora_ext.io.files import json_text
from lora_ext.io.hub import downloaded, is_hub_id, options_of

Number = TypeVar("Number", int, float)
Names = str | list[str] | set[str] | None

# Not PEFT's, or not for the file.
_MAX_UNKNOWN = 1000  # fields of other versions in a file
_UNSAVED = ("runtime_config", "unknown_fields", "absent_fields", "combined")


class LayerSettings(NamedTuple):
    """Rank and alpha of one layer."""

    r: int
    lora_alpha: float


@suggests_names
@dataclass
class LoraConfig:
    """What to adapt and how, with the names, defaults and meanings of PEFT's LoraConfig.

    Everything is checked when the object is made, and again by `validate()` after changes. Numbers,
    texts and lists of other libraries (numpy, OmegaConf) become Python's. A field
    that asks for something that is not built is refused with its name; values that mean "off" pass.

    Args:
        task_type: a PEFT task ("CAUSAL_LM", ...) or None; decides which heads count as saved.
        peft_type: "LORA".
        auto_mapping, peft_version, base_model_name_or_path, revision: notes on the base model,
            kept as they are.
        inference_mode: whether the adapter is frozen when it is loaded; always true in a file.
        r: rank, from 1 to 65536.
        target_modules: a list of names or last parts of names, a regular expression for the whole
            name, "all-linear", or None: the usual ones of the model's architecture.
        exclude_modules: a list or regular expression of modules to leave alone.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability that an input element is dropped before lora_A, in training.
        fan_in_fan_out: weights are stored as [in_features, out_features].
        bias: which biases of the base train too: "none", "all" or "lora_only".
        use_rslora: the scale is lora_alpha / sqrt(r) (arXiv:2312.03732).
        modules_to_save: modules that are trained and saved whole; never adapted.
        init_lora_weights: True, False, "gaussian", "orthogonal", "olora", "mica", "pissa" or
            "pissa_niter_N" (N subspace iterations of a fast SVD).
        layers_to_transform: numbers of the layers to adapt, with a list of target_modules.
        layers_pattern: what comes before the number in a name; any name when empty.
        rank_pattern, alpha_pattern: r and lora_alpha of layers that need others, by name, last
            parts of a name, or regular expression for these; the first that matches counts.
        use_dora: weight-decomposed LoRA (arXiv:2402.09353).
        alora_invocation_tokens: of activated LoRA (arXiv:2504.12397): the adapter takes effect from
            the last occurrence of these tokens in an input on; inputs without them are the base's.
        layer_replication: [start, end) ranges of layers to stack into a deeper model.
        lora_bias: whether lora_B has a bias, scaled like the product.
        target_parameters: names, or last parts of names, of parameters that get adapters although
            no module of their own computes with them, such as the stacked weights of experts; see
            `lora_ext.nn.ParamLayer`.
        use_bdlora: a BdLoraConfig, or a dict of its fields: lora_A or lora_B of the layers that it
            names is block-diagonal (BD-LoRA).
        trainable_token_indices: numbers of rows that are trained with the adapter: of the model's
            input embedding, or a dict of such by names of layers.
        ensure_weight_tying: whether the copies of modules_to_save that are tied to the input
            embedding are tied as well; both are saved whole if one of them is named.
        megatron_core, qalora_group_size: kept, without effect while what they belong to is off.
        unknown_fields: what a file has beyond these fields; written back.
        combined: whether `add_weighted_adapter` made it.
        absent_fields: which of these fields a file does not have; left out again while they have
            their default.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
        NotBuiltError: a field asks for what is not built.
    """

    task_type: str | None = None
    peft_type: PeftType = PeftType.LORA
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] | None = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[list[int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: BdLoraConfig | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False
    unknown_fields: dict[str, Any] = field(default_factory=dict, repr=False)
    absent_fields: frozenset[str] = field(default_factory=frozenset, repr=False, compare=False)
    combined: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def of(cls, config: Any, where: str) -> LoraConfig:
        """A config from what people have: one of these, one of PEFT's, or a dict of its fields.
        `where` is for the message.

        Raises:
            TypeError: something else.
            ValueError, NotBuiltError: see the class.
        """
        if isinstance(config, LoraConfig):
            return config
        values = config
        if type(config).__module__.partition(".")[0] == "peft" and hasattr(config, "to_dict"):
            values = config.to_dict()
        if not isinstance(values, Mapping):
            refuse(
                where, "peft_config", config, "a LoraConfig, one of PEFT's, or a dict of its fields"
            )
        result = cls.from_dict(values)
        result.absent_fields = frozenset()  # it is no file that is to be written back as it was
        return result

    def validate(self) -> None:
        """Checks every field, as the constructor does; for objects that were changed since."""
        for one in fields(self):
            if one.name not in _UNSAVED:
                setattr(self, one.name, plain_value(getattr(self, one.name)))
        self.use_bdlora = BdLoraConfig.of(self.use_bdlora)
        if not isinstance(self.unknown_fields, Mapping):
            refuse("LoraConfig", "unknown_fields", self.unknown_fields, "a dict")
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        twice = sorted(own.keys() & self.unknown_fields.keys())
        if twice:
            raise ValueError(f"LoraConfig: unknown_fields: got {twice}, which are fields")
        check_fields(self.unknown_fields | own)
        self.peft_type = PeftType(self.peft_type)

    # Of PEFT's configs: which other kinds they are.
    is_prompt_learning = is_adaption_prompt = property(lambda self: False)

    def settings_for(self, name: str) -> LayerSettings:
        """Rank and alpha of the module of this dotted name."""
        return LayerSettings(
            _first_match("rank_pattern", self.rank_pattern, name, self.r),
            _first_match("alpha_pattern", self.alpha_pattern, name, self.lora_alpha),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        result = copy.copy(self)
        for one in fields(self):
            setattr(result, one.name, _copied(getattr(self, one.name)))
        return result

    def to_dict(self) -> dict[str, Any]:
        """All fields and values that belong into a file, as PEFT's `to_dict`; a deep copy."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _UNSAVED}
        own["use_bdlora"] = asdict(self.use_bdlora) if self.use_bdlora else None
        return _copied(own | self.unknown_fields)  # type: ignore[no-any-return]

    def to_file(self) -> dict[str, Any]:
        """What adapter_config.json is to hold: fields that the file this was read from did not
        have are left out, unless they changed."""
        values = self.to_dict()
        if self.absent_fields:
            default = LoraConfig().to_dict()
            for name in self.absent_fields & default.keys():
                if values[name] == default[name]:
                    del values[name]
        values["inference_mode"] = True
        return values

    def to_json(self) -> str:
        """The text of adapter_config.json.

        Raises:
            TypeError, ValueError: auto_mapping or unknown_fields hold what JSON cannot.
        """
        return json_text(self.to_file())

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        auto_mapping_dict: dict[str, Any] | None = None,
    ) -> None:
        """Writes adapter_config.json into the folder, which is made if there is none.

        Args:
            auto_mapping_dict: what the file's `auto_mapping` is to be.

        Raises:
            OSError: the folder or file cannot be written.
            TypeError, ValueError: see `to_json`; nothing is written then.
        """
        written = self
        if auto_mapping_dict is not None:
            written = copy.deepcopy(self)
            written.auto_mapping = auto_mapping_dict
        save_files(save_directory, {CONFIG_NAME: written.to_json().encode()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A config from the values of a file or of PEFT's `to_dict`. Nothing is shared with it.

        Warns of fields that this version does not know and that are not off; they are kept.

        Raises:
            TypeError, ValueError, NotBuiltError: see the class.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"LoraConfig.from_dict: values: got {type(values)}, expected a mapping")
        return in_time(FILE_SECONDS, 0, lambda: cls._from_values(_copied(dict(values))))

    @classmethod
    @former_names("LoraConfig.from_pretrained", folder_or_file="pretrained_model_name_or_path")
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **options: Any,
    ) -> Self:
        """A config from a folder's adapter_config.json, from the file itself, or from the hub.

        The file may come from anyone: it is read up to 1 MiB, as strict JSON, and nothing is
        allocated or executed for its values. Its regular expressions are compiled, and later
        matched, in bounded time.

        Args:
            subfolder: of the folder or the hub's repository.
            options: values of fields that the file does not have, and those of
                `huggingface_hub.hf_hub_download`.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError, NotBuiltError: see the class; the message starts with the path.
        """
        where = "LoraConfig.from_pretrained"
        path = as_path(pretrained_model_name_or_path, where, "pretrained_model_name_or_path")
        names = {one.name for one in fields(cls)} - set(_UNSAVED[1:])
        own = {name: options.pop(name) for name in options.keys() & names - {"revision"}}
        options = options_of(where, options | {"subfolder": subfolder})
        if not path.exists() and is_hub_id(str(path)):
            (path,) = downloaded(str(path), (CONFIG_NAME,), options)
        elif path.is_dir():
            path = path / (subfolder or "") / CONFIG_NAME
        values = read_config_file(path)
        if "peft_type" not in values:
            raise ValueError(f"{path}: LoraConfig: peft_type: is missing, expected 'LORA'")
        try:
            return in_time(FILE_SECONDS, 0, lambda: cls._from_values(own | values))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Self:
        known = {one.name for one in fields(cls)} - set(_UNSAVED[1:])
        unknown = {name: values.pop(name) for name in values.keys() - known}
        if len(unknown) > _MAX_UNKNOWN:
            raise ValueError(
                f"LoraConfig: got {len(unknown)} fields that this version does not know, expected "
                f"at most {_MAX_UNKNOWN}"
            )
        absent = frozenset(known - values.keys())
        config = cls(**values, unknown_fields=unknown, absent_fields=absent)
        for name, value in {**unknown, "auto_mapping": config.auto_mapping}.items():
            _check_savable(name, value)
        without_effect = sorted(
            str(name) for name in unknown if name not in NOT_BUILT and not is_off(unknown[name])
        )
        if without_effect:
            hints = "".join(did_you_mean(name, known) for name in without_effect[:20])
            warn(
                f"LoraConfig: {listed(without_effect)}: unknown to this version; kept, without "
                f"effect; {hints}".rstrip("; ")
            )
        return config


def _check_savable(name: str, value: Any) -> None:
    """ValueError for what could be kept, but not written back: a file may say 1e999."""
    try:
        json.dumps({name: value}, allow_nan=False, default=sorted)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"LoraConfig: {str(name)[:100]}: got {short(value)}, expected what JSON can "
            f"hold ({error})"
        ) from None


def _copied(value: Any) -> Any:
    """A deep copy; of ten thousands of names and numbers in a tenth of deepcopy's time."""
    if type(value) is dict:
        return {k: v if type(v) in ATOMS else _copied(v) for k, v in value.items()}
    if type(value) is list:
        return [v if type(v) in ATOMS else _copied(v) for v in value]
    return copy.deepcopy(value)


def _first_match(
    pattern_field: str, patterns: Mapping[str, Number] | None, name: str, default: Number
) -> Number:
    patterns = patterns or {}
    for pattern in matching(pattern_field, patterns, name):
        return patterns[pattern]
    # A name that is no expression for itself, as in PEFT.
    return patterns.get(name, default)


PeftConfig = LoraConfig  # the one kind that there is here
