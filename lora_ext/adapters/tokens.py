"""Which rows of which embeddings a LoraConfig trains (`trainable_token_indices`), and putting what
trains them into a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.names import ends_in, unwrapped
from lora_ext.adapters.ties import tied_to_embedding
from lora_ext.arguments import short, warn
from lora_ext.nn import LoraLayer
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.token_wrappers import TiedTokensLayer, TrainableTokensWrapper
from lora_ext.nn.trainable_tokens import TrainableTokensLayer
from lora_ext.nn.transaction import Transaction

_FIELD = "LoraConfig: trainable_token_indices"
# What has the tokens where a list does not say it, and the model neither.
_USUAL = "embed_tokens"


class PlannedTokens(NamedTuple):
    """A module, and the rows of its weight that an adapter is to train."""

    module: nn.Module  # as it is in the model: the wrapper, if another adapter trains some
    indices: tuple[int, ...]
    source: str | None  # the embedding whose rows they are, if the weight is that one's
    autocast_adapter_dtype: bool

    @property
    def layer(self) -> TrainableTokensLayer:
        """That which has the rows, or one that could."""
        adapter = getattr(self.module, "token_adapter", None)
        return (
            getattr(adapter, "tied_adapter", None) or adapter or TrainableTokensLayer(self.module)
        )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.indices), self.layer.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.adapter_dtype(self.autocast_adapter_dtype)


def plan_tokens(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    autocast_adapter_dtype: bool,
) -> dict[str, PlannedTokens]:
    """What the config's trainable_token_indices mean, by name.

    Args:
        modules: of the model, under all their names.

    Raises:
        ValueError: a name is no module's, there is no such row, or modules that share their weight
            are asked for different rows although ensure_weight_tying says that they go together.
        TypeError: a module is no embedding.
    """
    if not config.trainable_token_indices:
        return {}
    asked = _by_name(model, modules, config)
    found: dict[str, PlannedTokens] = {}
    seen: set[int] = set()
    for name, indices in asked.items():
        module = modules[name]
        if id(module) not in seen:  # else it is registered under another name as well
            seen.add(id(module))
            found[name] = PlannedTokens(module, indices, None, autocast_adapter_dtype)
    for name, source in _follows(model, config, asked).items():
        found[name] = found[source]._replace(module=modules[name], source=source)
    for name, one in found.items():
        _check(name, one, modules)
    return found


def _by_name(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """The rows of each module that the config names."""
    given: Any = config.trainable_token_indices
    if not isinstance(given, dict):
        given = {_embedding_name(model, modules): given}
    kinds = TrainableTokensWrapper, TrainableTokensLayer, TiedTokensLayer
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, kinds))
    found: dict[str, tuple[int, ...]] = {}
    for key, indices in given.items():
        is_named = ends_in([key])  # "emb": all "..._emb", as in PEFT
        mine = [name for name in modules if is_named(name) and not name.startswith(inside)]
        if not mine:
            raise ValueError(
                f"{_FIELD}: Target modules {{{key!r}}} not found in the base model. Please check "
                "the target modules and try again."
            )
        for name in mine:
            if found.setdefault(name, tuple(indices)) != tuple(indices):
                raise ValueError(f"{_FIELD}: several of its names mean '{name}', expected one")
    return found


def _embedding_name(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """Of the input embedding of a model of transformers."""
    with suppress(AttributeError, NotImplementedError):  # transformers' answer for one without
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        embedding = unwrapped(embedding)
        return next((name for name, module in modules.items() if module is embedding), _USUAL)
    return _USUAL


def _follows(
    model: nn.Module, config: LoraConfig, asked: dict[str, tuple[int, ...]]
) -> dict[str, str]:
    """The modules that share their weight with an embedding of these, by name: its name. Taken out
    of `asked`, where they were named as well. As in PEFT, where the model's config ties them and
    they are not asked for other rows."""
    config_of_model: Any = getattr(model, "config", None)
    if not getattr(config_of_model, "tie_word_embeddings", False):
        if config.ensure_weight_tying:
            warn(
                "LoraConfig: ensure_weight_tying=True but the model does not have tied weights "
                "(tie_word_embeddings=False): nothing follows trainable_token_indices"
            )
        return {}
    tied = {name: source for name, source in tied_to_embedding(model).items() if source in asked}
    others = {
        n: asked[n] for n, source in tied.items() if asked.get(n, asked[source]) != asked[source]
    }
    if others and config.ensure_weight_tying:
        source = next(iter(tied.values()))
        raise ValueError(
            f"{_FIELD}: Cannot ensure weight tying when different token indices are specified for "
            f"tied layers: got {short({source: asked[source], **others})}, expected the same, or "
            "ensure_weight_tying=False"
        )
    if others:
        return {}
    for name in tied:
        asked.pop(name, None)
    return tied


def _check(name: str, one: PlannedTokens, modules: Mapping[str, nn.Module]) -> None:
    module = one.module
    around = [modules.get(name[:at]) for at, letter in enumerate(name) if letter == "."]
    if any(isinstance(other, ModulesToSave) for other in (module, *around)):
        raise ValueError(f"{_FIELD}: '{name}' is in a module that another adapter saves whole")
    if isinstance(module, LoraLayer):
        raise TypeError(
            f"{_FIELD}: '{name}' is an adapter layer, expected a module without: "
            "trainable_token_indices cannot be applied to modules of type "
            f"{type(module)}; leave it out of target_modules"
        )
    if isinstance(module, TrainableTokensWrapper):
        present = isinstance(module.token_adapter, TiedTokensLayer)
        if present != (one.source is not None):
            raise ValueError(
                f"{_FIELD}: '{name}' {'has' if present else 'does not have'} the rows of the "
                "embedding that it shares its weight with, by another adapter, expected the same "
                "of this one"
            )
    rows = one.layer.weight.shape[0]
    wrong = [index for index in one.indices if index >= rows]
    if wrong:
        raise ValueError(
            f"{_FIELD}: got {wrong[0]} of '{name}', expected at most {rows - 1}: its weight has "
            f"{rows} rows; resize the embedding first"
        )


def check_apart(
    tokens: Mapping[str, PlannedTokens], targets: Collection[str], saved: Collection[str]
) -> None:
    """ValueError where a module of which rows are trained is also adapted, or saved whole."""
    for name in tokens:
        if name in targets:
            raise TypeError(
                f"{_FIELD}: '{name}' is one of target_modules, too: trainable_token_indices cannot "
                "be applied to modules of type LoraLayer; name it in one of the two"
            )
        whole = [one for one in saved if f"{name}.".startswith(f"{one}.")]
        if whole:
            raise ValueError(
                f"{_FIELD}: The embedding layer is already marked to be trained fully, either "
                f"specify `modules_to_save=[..., '{whole[0]}', ...]` or "
                f"`trainable_token_indices={{'{name}': ...}}` but not both."
            )


def add_tokens(
    adapter_name: str,
    tokens: Mapping[str, PlannedTokens],
    enabled: bool,
    transaction: Transaction,
) -> tuple[dict[int, nn.Module], set[nn.Module]]:
    """Adds an adapter's rows, when `transaction` is committed.

    Args:
        enabled: whether adapters run in layers that are new.

    Returns:
        What is to be put in the place of which module, by its id; and the layers.
    """
    replacements: dict[int, nn.Module] = {}
    layers: dict[str | None, TrainableTokensLayer] = {}
    for name, one in tokens.items():
        if one.source is None:
            layers[name] = layer = one.layer
            draft = transaction.draft(layer)
            draft.add_adapter(adapter_name, one.indices, one.autocast_adapter_dtype)
            if not isinstance(one.module, TrainableTokensWrapper):
                draft.enable_adapters(enabled)
                replacements[id(one.module)] = TrainableTokensWrapper(layer)
    own: set[nn.Module] = set(layers.values())
    for one in tokens.values():
        if one.source is not None and not isinstance(one.module, TrainableTokensWrapper):
            follower = TiedTokensLayer(one.module, layers[one.source])
            draft = transaction.draft(layers[one.source])
            draft.tied = (*draft.tied, follower)
            own.add(follower)
            replacements[id(one.module)] = TrainableTokensWrapper(follower)
    return replacements, own


def tokens_of(model: AdaptedModel, adapter_name: str) -> dict[str, PlannedTokens]:
    """The rows that an adapter which is there has, as planned."""
    found: dict[str, PlannedTokens] = {}
    sources = {id(layer): name for name, layer in model.token_layers()}
    for name, module in model.token_modules():
        adapter = module.token_adapter
        layer = adapter.tied_adapter or adapter
        assert isinstance(layer, TrainableTokensLayer)
        if adapter_name in layer.adapters:
            source = None if layer is adapter else sources[id(layer)]
            held_in = layer.trainable_tokens_delta[adapter_name].dtype
            wide = held_in == layer.adapter_dtype(True)
            found[name] = PlannedTokens(module, layer.adapters[adapter_name], source, wide)
    return found
