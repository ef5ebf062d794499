"""Merging the adapters of many layers as one: all or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import TypeVar, cast

from torch import nn

from lora_ext.adapters.ties import shared_parameters
from lora_ext.arguments import warn
from lora_ext.nn import LoraLayer
from lora_ext.nn.trainable_tokens import TrainableTokensLayer
from lora_ext.nn.transaction import Transaction, put_parameter

Item = TypeVar("Item")
AdapterLayer = LoraLayer | TrainableTokensLayer


def merge_layers(
    model: nn.Module,
    layers: Sequence[tuple[str, AdapterLayer]],
    transaction: Transaction,
    adapter_names: Sequence[str] | None = None,
    *,
    alone: bool = False,
    requantize: bool = False,
    progressbar: bool = False,
) -> list[str]:
    """Merges adapters (the active ones, if None) in every one of these layers of `model` that has
    them, beside what is merged already, or instead of them (`alone`; disabled ones are merged then,
    too). The layers change when `transaction` is committed. `requantize`: see their `merge`.

    Returns:
        The names of the layers whose weight other modules share: theirs is their own then.

    Raises:
        ValueError: a merged value would be NaN or infinite, the adapters are disabled, or no layer
            has such adapters.
    """
    wanted = [(name, layer, _names(layer, adapter_names)) for name, layer in layers]
    wanted = [one for one in wanted if one[2]]
    chosen = [
        (name, layer, names)
        for name, layer, names in wanted
        if alone or not set(names) <= set(layer.merged_adapters)
    ]
    if not layers:
        raise ValueError(
            "merge: got a model without adapter layers (merge_and_unload() and unload() take them "
            "out), expected one with adapters; make another with get_lora_model()"
        )
    if wanted and not chosen:
        warn("merge: All adapters are already merged, nothing to do.")
        return []
    if not chosen:
        raise ValueError(
            "merge: no adapter is active, expected one; call set_adapter first, or give "
            "adapter_names"
            if adapter_names is None
            else f"merge: adapter_names: got {adapter_names}, expected adapters that a layer has"
        )
    if alone:
        unmerge_layers(layers, transaction)
    shared = shared_parameters(model)
    separated: list[str] = []
    apart: dict[int, str] = {}
    for name, layer, names in _tracked(chosen) if progressbar else chosen:
        try:
            draft: AdapterLayer = transaction.draft(layer)
            if alone:
                draft._merge(names, requantize)
            else:
                draft.merge(adapter_names=names, requantize=requantize)
        except (ValueError, RuntimeError) as error:
            if "NaN" in str(error):  # and in PEFT's words
                error.args = (
                    f"{error}; NaNs detected in the merged weights. The adapter "
                    f"{', '.join(names)} seems to be broken",
                )
            raise of_layer(error, name) from None
        if any(id(parameter) in shared for parameter in draft.base_parameters.values()):
            separated.append(name)
            apart[id(layer)] = name
    for name, layer, _ in chosen:
        if (source := _share_merged(layer, transaction)) is not None:
            together = {name, apart.get(id(source))}
            separated = [one for one in separated if one not in together]
    return separated


def _share_merged(layer: AdapterLayer, transaction: Transaction) -> LoraLayer | None:
    """Gives a layer the merged weight of the embedding whose adapters it has, if these are all that
    is merged in both, which is returned then: it is the same weight, unless a base or adapters of
    their own were assigned to one since (`load_state_dict(assign=True)`)."""
    draft: AdapterLayer = transaction.draft(layer)
    if not isinstance(draft, LoraLayer) or not draft.merged_adapters:
        return None
    if not all(name in draft._tied for name in draft.merged_adapters):
        return None
    ties = [draft._tied[name].embedding for name in draft.merged_adapters]
    sources = {id(one): one for one in ties}
    if len(sources) != 1:
        return None
    (source,) = sources.values()
    embedding = transaction.draft(source)
    if embedding.merged_adapters != draft.merged_adapters or _held(draft) != _held(embedding):
        return None
    for own, other in zip(draft.base_parameters, embedding.base_parameters, strict=False):
        put_parameter(draft, own, attrgetter(other)(embedding))  # none where a base is no product
        return cast(LoraLayer, source)
    return None


def _held(layer: LoraLayer) -> set[int]:
    """The ids of the base's parameters and those of the adapters that are merged into them."""
    adapters = (layer.parts(name).values() for name in layer.merged_adapters)
    return {id(one) for one in (*layer.base_parameters.values(), *chain(*adapters))}


Error = TypeVar("Error", bound=Exception)


def of_layer(error: Error, name: str) -> Error:
    """A layer's error, in the words of a model."""
    text = str(error).replace("unmerge()", "unmerge_adapter()")
    error.args = (f"layer '{name}': {text}; no layer of the model was changed",)
    return error


def unmerge_layers(layers: Sequence[tuple[str, AdapterLayer]], transaction: Transaction) -> bool:
    """Gives every merged one of these layers its base's parameters back when `transaction` is
    committed; returns whether one is merged."""
    merged = [layer for _, layer in layers if layer.merged]
    for layer in merged:
        transaction.draft(layer).unmerge()
    return bool(merged)


def _tracked(items: Sequence[Item]) -> Iterable[Item]:
    """The items, behind a progress bar."""
    from rich.progress import track  # 0.1 s, for those who ask for a bar

    return track(items, "Merging")


def _names(layer: AdapterLayer, adapter_names: Iterable[str] | None) -> tuple[str, ...]:
    names = layer.active_adapters if adapter_names is None else adapter_names
    return tuple(name for name in names if name in layer.adapters)


def untied_text(names: Sequence[str], how_long: str) -> str:
    """The warning about layers that share their weights with other modules no longer."""
    some = ", ".join(f"'{name}'" for name in names[:8])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        f"merge: {some}{more} shared a weight with another module, which stays as it is, and got "
        f"one of their own {how_long}: they are not tied, and take memory of their own"
    )
