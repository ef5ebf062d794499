"""The base's own tensors of a model with adapters, by the names of the plain base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.state_dict import LoadResult
from lora_ext.adapters.inject import adapted
from lora_ext.adapters.names import plain_name
from lora_ext.arguments import as_flag, check_mapping
from lora_ext.nn.trainable import adapter_names

_LEVELS = frozenset({"base_layer", "original_module", "token_adapter"})


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict()` as of the base without its adapters, also while they are merged.

    Raises:
        TypeError: the model is no LoraModel, nor one with adapters injected.
    """
    found, _ = adapted(model, "get_base_model_state_dict")
    state = found.get_base_model().state_dict()
    return {plain: state[key] for plain, key in _own_keys(found, state).items()}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Loads what `get_base_model_state_dict` returns, or a plain base's state dict, into the base
    of a model with adapters.

    Raises:
        RuntimeError: keys are missing or unknown and `strict`, or a tensor has another shape.
    """
    where = "set_base_model_state_dict"
    found, _ = adapted(model, where)
    check_mapping(where, "state_dict", state_dict, Tensor, "tensors")
    base = found.get_base_model()
    keys = _own_keys(found, base.state_dict())
    missing = [key for key in keys if key not in state_dict]
    unexpected = [key for key in state_dict if key not in keys]
    if as_flag(strict, where, "strict") and (missing or unexpected):
        raise RuntimeError(
            f"{where}: Missing key(s): {missing[:20]}; Unexpected key(s): {unexpected[:20]}"
        )
    given = {keys[key]: value for key, value in state_dict.items() if key in keys}
    base.load_state_dict(given, strict=False)
    return LoadResult(missing, unexpected)


def _own_keys(model: AdaptedModel, state: Mapping[str, Any]) -> dict[str, str]:
    """The keys of the base's tensors, by those that they have in the plain base."""
    others = adapter_names(model.get_base_model())
    own = [key for key in state if key not in others]
    return {".".join(p for p in plain_name(k).split(".") if p not in _LEVELS): k for k in own}
