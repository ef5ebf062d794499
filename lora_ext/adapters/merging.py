"""Merging the adapters of many layers as one: all or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import nn

from lora_ext.errors import NotMergedError
from lora_ext.nn import LoraLayer

Item = TypeVar("Item")


def merge_layers(
    model: nn.Module, adapter_names: Sequence[str] | None = None, *, progressbar: bool = False
) -> None:
    """Merges adapters (the active ones, if None) in every layer of `model` that has them. If one
    layer refuses, all are as they were, bit for bit.

    Raises:
        AlreadyMergedError: a layer has them merged.
        ValueError: a merged value would be NaN or infinite, no layer has such adapters, or a
            layer's weight is also another module's, which merging would change with it.
    """
    wanted = [
        (name, layer, _names(layer, adapter_names))
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    ]
    chosen = [(name, layer, names) for name, layer, names in wanted if names]
    if not chosen:
        raise ValueError(
            f"merge: adapter_names: got {adapter_names}, expected adapters that a layer has"
        )
    _check_not_shared(model, [(name, layer) for name, layer, _ in chosen])
    done: list[tuple[LoraLayer, tuple[str, ...]]] = []
    try:
        for name, layer, names in _tracked(chosen) if progressbar else chosen:
            before = layer.merged_adapters
            try:
                layer.merge(names)
            except (ValueError, RuntimeError) as error:
                error.add_note(f"in layer '{name}'; no layer of the model was changed")
                raise
            done.append((layer, before))
    except BaseException:
        for layer, before in reversed(done):
            layer.unmerge()
            if before:
                layer.merge(before)
        raise


def unmerge_layers(model: nn.Module) -> None:
    """Gives every merged layer of `model` back the bits of its base.

    Raises:
        NotMergedError: no layer is merged.
    """
    merged = [m for m in model.modules() if isinstance(m, LoraLayer) and m.merged]
    if not merged:
        raise NotMergedError("unmerge: no layer is merged; call merge_adapter() first")
    for layer in reversed(merged):
        layer.unmerge()


def _tracked(items: Sequence[Item]) -> Iterable[Item]:
    """The items, behind a progress bar."""
    from rich.progress import track  # 0.1 s, for those who ask for a bar

    return track(items, "Merging")


def _names(layer: LoraLayer, adapter_names: Iterable[str] | None) -> tuple[str, ...]:
    names = layer.active_adapters if adapter_names is None else adapter_names
    return tuple(name for name in names if name in layer.adapters)


def _check_not_shared(model: nn.Module, layers: Iterable[tuple[str, LoraLayer]]) -> None:
    uses = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for name, layer in layers:
        for parameter in layer.merged_parameters().values():
            if uses[id(parameter)] > 1:
                raise ValueError(
                    f"merge: '{name}' shares its weight with another module, which merging would "
                    "change as well; untie them, or leave the adapter unmerged"
                )
