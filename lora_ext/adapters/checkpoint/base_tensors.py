"""Which of the base's own tensors PEFT's files hold beside an adapter, and under which keys.

A key is the module's name in the plain base, with `base_layer` for each layer that PEFT puts around
a module. It is the same before and after the adapters are put in, with or without torch.compile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_ext._patterns import compiled
from lora_ext.adapters.checkpoint.keys import depth, joined
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.names import named_modules, unwrapped
from lora_ext.nn import LoraLayer, MultiheadAttention
from lora_ext.nn.mergeable import base_of
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.token_wrappers import TrainableTokensWrapper

# The names of embeddings that PEFT saves with an adapter that targets them.
EMBEDDINGS = ("embed_tokens", "lm_head")


class Place(NamedTuple):
    """A module of the base."""

    key: str  # "" for the model itself
    module: nn.Module  # as it is in the model: the layer that adapts it, if one does
    owner: nn.Module  # that holds the base's parameters
    layer: LoraLayer | None  # that adapts it, or is to; an attention its out_proj, too

    def key_of(self, part: str) -> str:
        return joined(self.key, part)

    def own(self, part: str) -> nn.Parameter:
        """A parameter of the base."""
        tensor = self.owner._parameters[part]
        assert tensor is not None
        return tensor

    def unmerged(self, part: str) -> Tensor:
        """Its own values, also while the layer is merged."""
        if not isinstance(self.module, LoraLayer) or not self.module.merged:
            return base_of(self.own(part))  # a module of which rows are trained may be merged
        state = self.module.state_dict(keep_vars=True)
        tensor: Tensor = state[part if part in state else f"base_layer.{part}"]
        return tensor


BasePart = tuple[Place, str]  # a place, and the name of its parameter


def places(
    model: nn.Module,
    adapted: Mapping[int, LoraLayer],
    whole: Collection[int],
    *,
    aliases: bool = False,
) -> Iterator[Place]:
    """The modules of the base, but those that are saved whole.

    Args:
        adapted: the adapter's layers, by the ids of themselves or of what they are to replace.
        whole: ids of the modules that the adapter saves whole, or of their wrappers.
        aliases: also under the further names of a module that has several.
    """
    return _places(model, adapted, whole, None if aliases else set(), "")


def _places(
    module: nn.Module,
    adapted: Mapping[int, LoraLayer],
    whole: Collection[int],
    seen: set[int] | None,
    key: str,
) -> Iterator[Place]:
    module = unwrapped(module)
    if id(module) in whole:
        return
    if isinstance(module, ModulesToSave):
        module = unwrapped(module.original_module)
    if isinstance(module, TrainableTokensWrapper):
        yield from _places(
            module.original_module, adapted, whole, seen, joined(key, "token_adapter", "base_layer")
        )
        return
    if seen is not None:
        if id(module) in seen:
            return
        seen.add(id(module))
    layer = adapted.get(id(module))
    if layer is not None:
        key = joined(key, *["base_layer"] * depth(layer))
    owner = module
    if isinstance(module, LoraLayer):
        owner = module._modules.get("base_layer") or module
    yield Place(key, module, owner, layer)
    for name, child in owner._modules.items():
        if isinstance(layer, MultiheadAttention) and name == "out_proj":
            yield Place(joined(key, name, "base_layer"), layer.out_proj, layer.out_proj, layer)
        elif child is not None:
            yield from _places(child, adapted, whole, seen, joined(key, name))


def biases(found: Iterator[Place], choice: str) -> Iterator[BasePart]:
    """The biases that a config's `bias` saves."""
    for place in found if choice != "none" else ():
        has_one = place.owner._parameters.get("bias") is not None
        if has_one and (choice == "all" or place.layer is not None):
            yield place, "bias"


def embeddings(model: nn.Module, found: Iterator[Place]) -> Iterator[BasePart]:
    """The weights and biases of the base's input and output embeddings."""
    chosen = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(NotImplementedError):  # transformers' answer for a model without
            module = getattr(model, getter, lambda: None)()
            if isinstance(module, nn.Module):
                module = unwrapped(module)
                if isinstance(module, ModulesToSave | TrainableTokensWrapper):
                    module = unwrapped(module.original_module)
                chosen.add(id(module))
    for place in found if chosen else ():
        if id(place.module) in chosen:
            for part in ("weight", "bias"):
                if place.owner._parameters.get(part) is not None:
                    yield place, part


def targets_embeddings(model: nn.Module, config: LoraConfig, tied: Collection[str]) -> bool:
    """Whether target_modules names an embedding as PEFT asks for it, to save it; not for the sake
    of layers that have an embedding's adapter, which are named to tell PEFT that."""
    targets = config.target_modules
    if isinstance(targets, str):
        names = (name for name, _ in named_modules(model) if name not in tied)
        ends = (name for name in names if name.rpartition(".")[2] in EMBEDDINGS)
        expression = compiled("target_modules", targets)
        return any(expression.fullmatch(name) is not None for name in ends)
    return any(name in EMBEDDINGS and name not in tied for name in targets or ())


def was_resized(model: nn.Module, config: LoraConfig) -> bool:
    """Whether the vocabulary is another one than in the files that the model was loaded from; False
    where there are none."""
    own: Any = getattr(model, "config", None)
    now = _vocabulary(own)
    if now is None or not hasattr(type(own), "from_pretrained"):
        return False
    for source in (getattr(model, "name_or_path", None), config.base_model_name_or_path):
        if source:
            with suppress(OSError, ValueError):  # gone, or never on this machine
                before = _vocabulary(type(own).from_pretrained(source, local_files_only=True))
                return before is not None and before != now
    return False


def _vocabulary(config: Any) -> int | None:
    """The number of tokens in a config of transformers, which may be made of several."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None
