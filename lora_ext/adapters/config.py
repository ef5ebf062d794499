"""LoraConfig: how a model is adapted. PEFT's fields, defaults and file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, Self, TypeVar

from lora_ext._not_built import FIELDS
from lora_ext._patterns import matching
from lora_ext.adapters.bdlora import BdLoraConfig
from lora_ext.adapters.calibrated_configs import CordaConfig, EvaConfig, LoraGAConfig
from lora_ext.adapters.config_checks import check_fields, in_json, plain_value
from lora_ext.adapters.config_files import PEFT_VERSION, UNSAVED, ConfigFiles, copied
from lora_ext.adapters.loftq_config import LoftQConfig
from lora_ext.adapters.runtime_config import warn_of_no_effect
from lora_ext.adapters.types import PeftType
from lora_ext.arguments import refuse, suggests_names, warn
from lora_ext.nn.init import is_loftq

Number = TypeVar("Number", int, float)
Names = str | list[str] | set[str] | None


class LayerSettings(NamedTuple):
    """Rank and alpha of one layer."""

    r: int
    lora_alpha: float


@suggests_names
@dataclass
class LoraConfig(ConfigFiles):
    """What to adapt and how, with the names, defaults and meanings of PEFT's LoraConfig.

    Everything is checked when the object is made, and again by `validate()` after changes. Numbers,
    texts and lists of other libraries (numpy, OmegaConf) become Python's. A field that asks for
    something that is not built is kept, and refused with its name where a model is to follow it.

    Args:
        task_type: a PEFT task ("CAUSAL_LM", ...) or None; decides which heads count as saved.
        peft_type: "LORA".
        auto_mapping, peft_version, base_model_name_or_path, revision: notes on the base model,
            kept as they are; without a version it is that of PEFT whose fields these are.
        inference_mode: whether the adapter is frozen when it is made; true in what a model's
            `save_pretrained` writes.
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
        init_lora_weights: True, False, "gaussian", "orthogonal", "olora", "mica", "pissa",
            "pissa_niter_N" (N subspace iterations of a fast SVD), "loftq", or, from data, "eva",
            "corda" or "lora_ga".
        loftq_config: of "loftq", which needs it: a LoftQConfig, or a dict of its fields.
        eva_config, corda_config, lora_ga_config: of the three: an EvaConfig, CordaConfig or
            LoraGAConfig, or a dict of its fields.
        layers_to_transform: numbers of the layers to adapt, with a list of target_modules.
        layers_pattern: what comes before the number in a name; any name when empty.
        rank_pattern, alpha_pattern: r and lora_alpha of layers that need others, by name, last
            parts of a name, or regular expression for these; the first that matches counts.
        use_dora: weight-decomposed LoRA (arXiv:2402.09353).
        alora_invocation_tokens: of activated LoRA (arXiv:2504.12397): the adapter takes effect from
            the last occurrence of these tokens in an input on; inputs without them are the base's.
            An empty list is None, as in PEFT.
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
            embedding are tied as well, and all that share its weight have one adapter; naming one
            of them is naming all.
        megatron_config, megatron_core: kept, and what of them JSON can hold is saved; Megatron's
            layers, which have a config of their own, get adapters also without them.
        qalora_group_size: kept, without effect while what it belongs to is off.
        runtime_config: a LoraRuntimeConfig, or a dict of its field; of no file.
        unknown_fields: what a file has beyond these fields; written back.
        combined: whether `add_weighted_adapter` made it.
        absent_fields: which of these fields a file does not have; left out again while they have
            their default.

    Raises:
        TypeError, ValueError: a field has the wrong type or value; the message names it.
        NotBuiltError: another `peft_type`.
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
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
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
        if self.peft_version is None:
            self.peft_version = PEFT_VERSION
        self.validate()
        warn_of_no_effect(self.runtime_config)

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
            if one.name not in UNSAVED:
                setattr(self, one.name, plain_value(getattr(self, one.name)))
        self.use_bdlora = BdLoraConfig.of(self.use_bdlora)
        self.loftq_config = LoftQConfig.checked(self.loftq_config)
        if self.loftq_config and not is_loftq(self.init_lora_weights):
            self.loftq_config = {}
            warn(
                "LoraConfig: loftq_config: `loftq_config` specified but will be ignored when "
                "`init_lora_weights` is not 'loftq'."
            )
        self._check_calibrated()
        for name in FIELDS.keys() & vars(self).keys():
            value = getattr(self, name)
            if is_dataclass(value) and not isinstance(value, type):  # of PEFT's
                setattr(self, name, plain_value(asdict(value)))
        self.megatron_config = in_json(self.megatron_config)
        if not isinstance(self.unknown_fields, Mapping):
            refuse("LoraConfig", "unknown_fields", self.unknown_fields, "a dict")
        own = {one.name: getattr(self, one.name) for one in fields(self)}
        twice = sorted(own.keys() & self.unknown_fields.keys())
        if twice:
            raise ValueError(f"LoraConfig: unknown_fields: got {twice}, which are fields")
        check_fields(self.unknown_fields | own)
        self.peft_type = PeftType(self.peft_type)

    def _check_calibrated(self) -> None:
        """The configs of initialisations from data, as PEFT completes and warns of them."""
        self.eva_config = EvaConfig.of(self.eva_config)
        self.corda_config = CordaConfig.of(self.corda_config)
        self.lora_ga_config = LoraGAConfig.of(self.lora_ga_config)
        for kind, make, said in (("eva", EvaConfig, "EVA"), ("corda", CordaConfig, "CorDA")):
            name = make.FIELD
            given, asked = getattr(self, name) is not None, self.init_lora_weights == kind
            if asked and not given:
                setattr(self, name, make())
                warn(
                    f"LoraConfig: `init_lora_weights` is '{kind}' but `{name}` is not specified. "
                    f"Using default {said} config."
                )
            elif given and not asked:
                warn(
                    f"LoraConfig: {name}: `{name}` specified but will be ignored when "
                    f"`init_lora_weights` is not '{kind}'."
                )

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
            setattr(result, one.name, copied(getattr(self, one.name)))
        return result


def _first_match(
    pattern_field: str, patterns: Mapping[str, Number] | None, name: str, default: Number
) -> Number:
    patterns = patterns or {}
    for pattern in matching(pattern_field, patterns, name):
        return patterns[pattern]
    # A name that is no expression for itself, as in PEFT.
    return patterns.get(name, default)


PeftConfig = LoraConfig  # the one kind that there is here
