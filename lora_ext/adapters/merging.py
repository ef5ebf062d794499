"""Merging the adapters of many layers as one: all or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import nn

from lora_ext.adapters.names import named_modules
from lora_ext.adapters.ties import shared_parameters
from lora_ext.errors import NotMergedError
from lora_ext.nn import LoraLayer

Item = TypeVar("Item")


def merge_layers(
    model: nn.Module, adapter_names: Sequence[str] | None = None, *, progressbar: bool = False
) -> list[str]:
    """Merges adapters (the active ones, if None) in every layer of `model` that has them. If one
    layer refuses, all are as they were, bit for bit. A layer whose weight is also another module's
    gets one of its own until it is unmerged.

    Returns:
        The names of the layers that got one.

    Raises:
        AlreadyMergedError: a layer has them merged.
        ValueError: a merged value would be NaN or infinite, no layer has such adapters, or a layer
            was merged by itself into a weight that others share.
    """
    wanted = [
        (name, layer, _names(layer, adapter_names))
        for name, layer in named_modules(model)
        if isinstance(layer, LoraLayer)
    ]
    chosen = [(name, layer, names) for name, layer, names in wanted if names]
    if not chosen:
        raise ValueError(
            f"merge: adapter_names: got {adapter_names}, expected adapters that a layer has"
        )
    shared = shared_parameters(model)
    _check_shared_as_they_were(wanted, shared)
    separated: list[str] = []
    done: list[tuple[LoraLayer, tuple[str, ...], tuple[str, ...]]] = []
    try:
        for name, layer, names in _tracked(chosen) if progressbar else chosen:
            before, apart = layer.merged_adapters, tuple(layer.shared_parameters)
            try:
                changed = layer.merged_parameters(names)
                separate = [part for part, p in changed.items() if id(p) in shared]
                layer.merge(names, separate=separate)
            except (ValueError, RuntimeError) as error:
                error.add_note(f"in layer '{name}'; no layer of the model was changed")
                raise
            done.append((layer, before, apart))
            if separate:
                separated.append(name)
    except BaseException:
        for layer, before, apart in reversed(done):
            layer.unmerge()
            if before:
                layer.merge(before, separate=apart)
        raise
    return separated


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


def _check_shared_as_they_were(
    layers: Iterable[tuple[str, LoraLayer, object]], shared: set[int]
) -> None:
    """What other layers share has to be the base's own: their updates start from it."""
    for name, layer, _ in layers:
        merged = layer.merged_parameters(layer.merged_adapters) if layer.merged else {}
        for part, parameter in merged.items():
            if id(parameter) in shared and part not in layer.shared_parameters:
                raise ValueError(
                    f"merge: '{name}' was merged by itself into a {part} that it shares with "
                    "another module; call its unmerge() first"
                )


def untied_text(names: Sequence[str], how_long: str) -> str:
    """The warning about layers that share their weights with other modules no longer."""
    some = ", ".join(f"'{name}'" for name in names[:8])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        f"merge: {some}{more} shared a weight with another module, which stays as it is, and got "
        f"one of their own {how_long}: they are not tied, and take memory of their own"
    )
