"""Weights that several modules share, and what becomes of that when one of them is merged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lora_ext.adapters.names import named_modules, unwrapped
from lora_ext.nn.mergeable import MergeableLayer
from lora_ext.nn.token_wrappers import TiedTokensLayer
from lora_ext.nn.transaction import Transaction

# Families of transformers in which tie_word_embeddings is also a factor of the outputs, or cannot
# be False: transformers 5 reads both weights from a file of theirs all the same.
_TIED_FOR_GOOD = {"t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano"}


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of all parameters that lie, in part at least, in memory that is also another
    parameter's or buffer's; the base's own of merged layers count, those of modules that follow an
    embedding (`TiedTokensLayer`) do not."""
    groups: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
    follow = {id(m.base_layer) for m in model.modules() if isinstance(m, TiedTokensLayer)}
    for module in model.modules():
        for tensor in _tensors(module) if id(module) not in follow else ():
            group, start, end = _extent(tensor)
            groups[group].append((start, end, id(tensor)))
    shared: set[int] = set()
    for extents in groups.values():
        reach, holder = -1, 0  # the largest end so far, and whose it is
        for start, end, tensor_id in sorted(extents):
            if start < reach:
                shared |= {holder, tensor_id}
            if end > reach:
                reach, holder = end, tensor_id
    return shared


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for registry in (module._parameters, module._buffers):
        for tensor in registry.values():
            if tensor is not None:
                yield tensor
    if isinstance(module, MergeableLayer):
        yield from module.base_parameters.values()


def _extent(tensor: Tensor) -> tuple[int, int, int]:
    """(storage, first byte, byte after the last); of tensors without memory of their own, as on
    "meta", their identity."""
    try:
        storage, start = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # subclasses that wrap others
        storage = start = 0
    if not start:
        return 0, id(tensor), id(tensor) + 1
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return storage, start, start + (last + 1) * tensor.itemsize


def tied_to_embedding(model: nn.Module) -> dict[str, str]:
    """The names of the modules with the weight of the model's input embedding, and its own name as
    the value of each; none without such modules, or where the model's config says that they are not
    to be tied. Copies of modules to save do not count."""
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return {}
    embedding: Any = None
    with suppress(AttributeError, NotImplementedError):  # transformers' answer for a model without
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(embedding, nn.Module):
        embedding = unwrapped(embedding)
    embedding = getattr(embedding, "original_module", embedding)
    weight = getattr(embedding, "_parameters", {}).get("weight")
    if weight is None:
        return {}
    holders = [
        (_plain(name), module)
        for name, module in named_modules(model)
        if module._parameters.get("weight") is weight
    ]
    source = next(name for name, module in holders if module is embedding)
    return {name: source for name, module in holders if module is not embedding}


def _plain(name: str) -> str:
    """A module's name without what adapters put around it."""
    for level in (".original_module", ".token_adapter.base_layer", ".base_layer"):
        name = name.removesuffix(level)
    return name


def untie_embeddings(model: nn.Module, transaction: Transaction) -> bool:
    """Makes the configs of a transformers model say so where weights that it ties, its embeddings,
    are no longer the same: else loading what it saves would tie them again. The others that the
    same entry ties get weights of their own: a file has a shared weight once, under one of its
    names, and loading would give the other names what they were to be tied to.

    Returns:
        Whether a config was changed.
    """
    changed = False
    for config, ties in _ties_by_config(model):
        if all(one is other for _, _, one, other in ties):
            continue
        for_good = getattr(config, "model_type", None) in _TIED_FOR_GOOD
        held = set() if for_good else {id(other) for *_, other in ties}
        for module, name, one, other in ties:
            if for_good and one is other:
                continue  # tied again when loaded
            if id(one) in held:
                owner, _, attribute = name.rpartition(".")
                own = nn.Parameter(one.detach().clone(), one.requires_grad)
                transaction.put(module.get_submodule(owner)._parameters, attribute, own)
            held.add(id(one))
        if not for_good:
            transaction.set_attribute(config, "tie_word_embeddings", False)
            changed = True
    transaction.commit()
    return changed


def _ties_by_config(model: nn.Module) -> list[tuple[Any, list[tuple[nn.Module, str, Any, Any]]]]:
    """The configs that tie something, with all that the modules of each tie: (module, and as
    `_ties`). A model and its body have one config, and ties of their own."""
    found: dict[int, tuple[Any, list[tuple[nn.Module, str, Any, Any]]]] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False) and not isinstance(config, Mapping):
            _, ties = found.setdefault(id(config), (config, []))
            ties.extend((module, *tie) for tie in _ties(module))
    return list(found.values())


def _ties(module: Any) -> list[tuple[str, Any, Any]]:
    """(name, parameter, the parameter that it is to be) of all that a transformers model ties."""
    if hasattr(module, "get_expanded_tied_weights_keys"):
        with suppress(AttributeError, ValueError):  # it has other modules than its class says
            names = module.get_expanded_tied_weights_keys(all_submodels=False)
            return [
                (target, _tensor(module, target), _tensor(module, source))
                for target, source in names.items()
            ]
        return []
    with suppress(AttributeError, NotImplementedError):  # before transformers 5
        weights = [module.get_output_embeddings().weight, module.get_input_embeddings().weight]
        return [("", *weights)] if weights[0] is not weights[1] else []
    return []


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), attribute)
    return tensor
