"""What the fields of a LoraConfig may hold. Nothing here depends on a model."""

from __future__ import annotations

import enum
import json
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Any

from lora_ext._not_built import FIELDS, field_text
from lora_ext._patterns import MAX_PATTERN_CHARACTERS, SlowPatternError, compiled, is_plain, size
from lora_ext.adapters.runtime_config import check_runtime
from lora_ext.arguments import short
from lora_ext.errors import NotBuiltError
from lora_ext.nn.adapter import EXCLUDED, VARIANTS
from lora_ext.nn.init import check_init, is_loftq, is_mica

ATOMS = frozenset({str, int, float, bool, NoneType})
ALL_LINEAR = "all-linear"

# Far above any use (a rank beyond min(in_features, out_features) adds nothing) and far below what
# would make an allocation fail.
MAX_RANK = 1 << 16
# The scale is applied in float32.
MAX_ALPHA = 3.4028234663852886e38
# Of layer_replication together: each is a copy, though of no weights, before a file's are compared.
MAX_LAYERS = 1024

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


@dataclass(frozen=True)
class _Check:
    """A TypeError unless the value has one of `types`; a ValueError unless it is accepted."""

    types: tuple[type, ...]
    accepts: Callable[[Any], bool]
    expected: str


def _is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_number(value, int) and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    return _is_number(value, int, float) and abs(value) <= MAX_ALPHA  # False for NaN


def _is_index(value: Any) -> bool:
    return _is_number(value, int) and value >= 0


def _are_texts(values: Any) -> bool:
    return isinstance(values, str | NoneType) or (
        all(issubclass(kind, str) for kind in set(map(type, values)))
        and max(map(len, values), default=0) <= MAX_PATTERN_CHARACTERS
    )


def _are_layer_ranges(ranges: Any) -> bool:
    return (
        all(
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(_is_index(end) for end in pair)
            and pair[0] < pair[1]
            for pair in ranges or ()
        )
        and sum(end - start for start, end in ranges or ()) <= MAX_LAYERS
    )


def _are_tokens(given: Any) -> bool:
    lists = given if isinstance(given, dict) else {"": given or (0,)}
    return all(
        isinstance(name, str)
        and isinstance(indices, list | tuple)
        and bool(indices)
        and all(map(_is_index, indices))
        and len(set(indices)) == len(indices)
        for name, indices in lists.items()
    )


def _pattern(is_setting: Callable[[Any], bool], what: str) -> _Check:
    def accepts(pattern: Any) -> bool:
        # There may be ten thousands of names, with few values.
        return pattern is None or (
            set(map(type, pattern)) <= {str} and all(map(is_setting, _distinct(pattern.values())))
        )

    return _Check((dict, NoneType), accepts, f"None or a dict from names to {what}")


def _distinct(values: Iterable[Any]) -> Iterable[Any]:
    """By type, too: True is 1."""
    try:
        return [value for _, value in {(type(value), value) for value in values}]
    except TypeError:  # a list, say, which no setting is
        return values


_RANK = f"an integer from 1 to {MAX_RANK}"
_ALPHA = "a finite number in the range of float32"
_A_LIST = f"a list of strings of at most {MAX_PATTERN_CHARACTERS} characters"
_FLAG = _Check((bool,), lambda _: True, "True or False")
_TEXT = _Check((str, NoneType), lambda _: True, "None or a string")
_NAMES = _Check(
    (str, list, tuple, set, frozenset, NoneType),
    _are_texts,
    f"None, a regular expression, or {_A_LIST}",
)
_CHECKS = {
    "task_type": _Check(
        (str, NoneType), lambda v: v is None or v in TASK_TYPES, f"None or one of {TASK_TYPES}"
    ),
    "auto_mapping": _Check((dict, NoneType), lambda _: True, "None or a dict"),
    "peft_version": _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "inference_mode": _FLAG,
    "r": _Check((int,), _is_rank, _RANK),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "lora_alpha": _Check((int, float), _is_alpha, _ALPHA),
    "lora_dropout": _Check((int, float), lambda p: 0 <= p <= 1, "a probability from 0 to 1"),
    "fan_in_fan_out": _FLAG,
    "bias": _Check(
        (str,),
        lambda v: v in ("none", "all", "lora_only"),
        "one of 'none', 'all' and 'lora_only'",
    ),
    "use_rslora": _FLAG,
    "modules_to_save": _Check(
        (list, tuple, set, frozenset, NoneType), _are_texts, f"None or {_A_LIST}"
    ),
    "layers_to_transform": _Check(
        (int, list, tuple, NoneType),
        lambda v: v is None or all(map(_is_index, [v] if isinstance(v, int) else v)),
        "None, a layer's number from 0, or a list of them",
    ),
    "layers_pattern": _Check(
        (str, list, tuple, NoneType), _are_texts, f"None, a string, or {_A_LIST}"
    ),
    "rank_pattern": _pattern(_is_rank, f"ranks, {_RANK} each"),
    "alpha_pattern": _pattern(_is_alpha, f"alphas, {_ALPHA} each"),
    "alora_invocation_tokens": _Check(
        (list, tuple, NoneType),
        lambda v: all(map(_is_index, v or ())),
        "None or a list of tokens, integers from 0",
    ),
    "megatron_core": _TEXT,
    **dict.fromkeys(VARIANTS, _FLAG),
    "qalora_group_size": _Check((int,), lambda v: v >= 1, "an integer of at least 1"),
    "layer_replication": _Check(
        (list, tuple, NoneType),
        _are_layer_ranges,
        f"None or a list of [start, end] with 0 <= start < end, of at most {MAX_LAYERS} layers",
    ),
    "lora_bias": _FLAG,
    "ensure_weight_tying": _FLAG,
    "trainable_token_indices": _Check(
        (list, tuple, dict, NoneType),
        _are_tokens,
        "None, a list of numbers of tokens from 0, each once, or a dict of such by names of layers",
    ),
    "target_parameters": _Check(
        (list, tuple, set, frozenset, NoneType), _are_texts, f"None or {_A_LIST}"
    ),
}


def plain_value(value: Any) -> Any:
    """The same of Python's own types, as far as there is such; what is of them stays itself."""
    if type(value) in ATOMS:
        return value
    if isinstance(value, enum.Enum):
        return plain_value(value.value)
    if isinstance(value, str):
        return str(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return plain_value(value.tolist())
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        if type(value) is dict and set(map(type, value.values())) <= ATOMS:
            return value
        return {plain_value(key): plain_value(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        if type(value) in (list, tuple, set, frozenset) and set(map(type, value)) <= ATOMS:
            return value
        return (list if isinstance(value, list | tuple) else set)(map(plain_value, value))
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes | bytearray | memoryview):
        return list(map(plain_value, value))
    return value


def in_json(value: Any) -> Any:
    """Of a dataclass, or a dict, what JSON can hold; anything else itself. For Megatron's configs:
    they have functions and dtypes, too."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name, None) for one in fields(value)}
    if not isinstance(value, Mapping):
        return value
    return {name: one for name, one in value.items() if _is_json(one)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def check_fields(values: Mapping[str, Any]) -> None:
    """Checks every field of a config, then what they may not be together.

    Raises:
        TypeError, ValueError: a field has the wrong type or value.
        NotBuiltError: another `peft_type`. Fields that ask for what is not built are kept; see
            `check_built`.
    """
    peft_type = values["peft_type"]
    if peft_type != "LORA":
        other = "XLoraConfig is for 'XLORA'" if peft_type == "XLORA" else "nothing else is built"
        raise NotBuiltError(_message("peft_type", peft_type, f"'LORA': {other}"))
    try:
        check_init(values["init_lora_weights"])
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"LoraConfig: {error}") from None
    for field in FIELDS:  # of what is not built; kept
        value, kind = values.get(field), {"use_qalora": bool, "enable_lora": list}.get(field, dict)
        if not is_off(value) and not isinstance(value, kind):
            expected = "None, a config, or a dict of its fields" if kind is dict else kind.__name__
            raise TypeError(_message(field, value, expected))
    for field, check in _CHECKS.items():
        value = values[field]
        mistaken = isinstance(value, bool) and bool not in check.types
        if mistaken or not isinstance(value, check.types):
            raise TypeError(_message(field, value, check.expected))
        if not check.accepts(value):
            raise ValueError(_message(field, value, check.expected))
    if not isinstance(values["megatron_config"], dict | NoneType):
        expected = "None, a TransformerConfig, or a dict of its fields"
        raise TypeError(_message("megatron_config", values["megatron_config"], expected))
    if not is_off(values["runtime_config"]):
        check_runtime(values["runtime_config"])
    _check_patterns(values)
    _check_combinations(values)


def check_built(values: Mapping[str, Any]) -> None:
    """NotBuiltError for a config, as a mapping of its fields, that no model can follow here: a file
    of it is read, kept and written back."""
    for field in FIELDS:
        if not is_off(values.get(field)):
            got = short(values[field])
            raise NotBuiltError(f"LoraConfig: {field}: got {got}: {field_text(field)}")
    core = values.get("megatron_core")
    if not is_off(values.get("megatron_config")) and not str(core).startswith("megatron."):
        raise ValueError(_message("megatron_core", core, "a module of Megatron's, 'megatron....'"))


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing: None, False or empty."""
    empty = isinstance(value, (Mapping, list, tuple, set, frozenset, str)) and not value
    return value is None or value is False or empty


_EXPRESSIONS = ("target_modules", "exclude_modules")  # as strings, also if they are plain names


def _patterns(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in _EXPRESSIONS:
        if isinstance(values[field], str) and values[field].lower() != ALL_LINEAR:
            yield field, values[field]
    for field in ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"):
        patterns = values[field] or ()
        patterns = [patterns] if isinstance(patterns, str) else patterns
        # Most are words, and there may be many.
        yield from [(field, pattern) for pattern in patterns if not pattern.isalnum()]


def _check_patterns(values: Mapping[str, Any]) -> None:
    expressions: list[tuple[str, str]] = []
    characters = 0
    for field, text in _patterns(values):
        plain = is_plain(text)
        if plain and field not in _EXPRESSIONS:
            continue
        if not plain:
            expressions.append((field, text))
        characters += size(text)
        if characters > MAX_PATTERN_CHARACTERS:
            expected = (
                f"regular expressions of together at most {MAX_PATTERN_CHARACTERS} characters, "
                "each counted as often as its counts repeat it"
            )
            raise ValueError(_message(field, text, expected))
    for field, text in expressions:
        try:
            compiled(field, text)
        except SlowPatternError:
            raise
        except Exception as error:  # regex.error, and others for what is too deep or too large
            raise ValueError(_message(field, text, f"a regular expression ({error})")) from None


def _check_combinations(values: Mapping[str, Any]) -> None:
    if isinstance(values["target_modules"], str):
        for field in ("layers_to_transform", "layers_pattern"):
            if values[field] is not None:
                expected = "None, since target_modules is a string; give a list of names there"
                raise ValueError(_message(field, values[field], expected))
    if values["layers_pattern"] and values["layers_to_transform"] is None:
        expected = "None, since layers_to_transform is None; say there which layers are meant"
        raise ValueError(_message("layers_pattern", values["layers_pattern"], expected))
    if values["lora_bias"] and not isinstance(values["init_lora_weights"], bool):
        init = values["init_lora_weights"]
        raise ValueError(_message("lora_bias", True, f"False with init_lora_weights={init!r}"))
    if is_loftq(values["init_lora_weights"]) and not values["loftq_config"]:
        raise ValueError(
            _message(
                "loftq_config",
                values["loftq_config"],
                "a LoftQConfig: `loftq_config` must be specified when `init_lora_weights` is "
                "'loftq'",
            )
        )
    for flag in VARIANTS:
        if values[flag] and is_mica(values["init_lora_weights"]):
            raise ValueError(_message(flag, True, "False with init_lora_weights='mica'"))
    for flag, excluded in EXCLUDED.items():
        for field in excluded:
            if values[flag] and field in _CHECKS and values[field]:
                expected = "False" if values[field] is True else "None"
                raise ValueError(_message(field, values[field], f"{expected} with {flag}=True"))
    for flag in VARIANTS:
        if values[flag] and not is_off(values["megatron_config"]):
            raise ValueError(_message(flag, True, "False with megatron_config"))
        if values[flag] and values["use_bdlora"]:
            raise ValueError(
                _message(
                    "use_bdlora",
                    values["use_bdlora"],
                    f"None with {flag}=True: Invalid or unsupported variant combination",
                )
            )
    if values["target_parameters"]:
        refused = ("lora_dropout", "fan_in_fan_out", "lora_bias", "alora_invocation_tokens")
        for field in (*refused, "use_bdlora", *VARIANTS):
            if values[field]:
                expected = "none with target_parameters: the update is one of the parameter"
                raise ValueError(_message(field, values[field], expected))


def _message(field: str, value: Any, expected: str) -> str:
    return f"LoraConfig: {field}: got {short(value)}, expected {expected}"
