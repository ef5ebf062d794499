"""The kinds of modules that can have adapters, and the layer of each."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import nn

from lora_ext.nn.attention import MultiheadAttention
from lora_ext.nn.conv import Conv1d, Conv2d, Conv3d
from lora_ext.nn.embedding import Embedding, is_scaled_word_embedding
from lora_ext.nn.linear import Linear, transformers_conv1d
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.quant.kinds import quantized_kind

# A layer takes the place of a module of this class, and of a subclass that keeps its forward (of
# nn.Linear's, any).
_FACTORIES: dict[type[nn.Module], Callable[..., LoraLayer]] = {
    nn.Linear: Linear.from_linear,
    nn.Embedding: Embedding.from_embedding,
    nn.Conv1d: Conv1d.from_conv,
    nn.Conv2d: Conv2d.from_conv,
    nn.Conv3d: Conv3d.from_conv,
    nn.MultiheadAttention: MultiheadAttention.from_multihead_attention,
}
BASE_CLASSES = tuple(_FACTORIES)


def _factory(module: nn.Module) -> Callable[..., LoraLayer] | None:
    if transformers_conv1d(module):
        return Linear.from_conv1d
    if quantized_kind(module) is not None:
        return Linear.from_linear
    if is_scaled_word_embedding(module):
        return Embedding.from_embedding
    if "megatron" in sys.modules:  # imported by whoever has such a layer
        from lora_ext.nn.megatron import parallel_kind
        from lora_ext.nn.parallel_linear import ParallelLinear

        if parallel_kind(module) is not None:
            return ParallelLinear.from_parallel
    for kind, factory in _FACTORIES.items():
        if isinstance(module, kind) and (  # first: a scripted module's class has no forward
            kind is nn.Linear or type(module).forward is kind.forward
        ):
            return factory
    return None


def is_of_a_kind(module: nn.Module) -> bool:
    """Whether PEFT has a LoRA layer for modules of this class; one of a subclass with a forward of
    its own may still have none here."""
    return isinstance(module, BASE_CLASSES) or transformers_conv1d(module) is not None


def can_be_adapted(module: nn.Module) -> bool:
    """Whether the module has adapters, or can have them."""
    return isinstance(module, LoraLayer) or _factory(module) is not None


def layer_for(name: str, module: nn.Module) -> LoraLayer:
    """The layer, still without adapters, that stands in the place of `module` and shares its
    parameters; `module` itself if it is one. `name` is for messages.

    Raises:
        TypeError: no layer extends this class.
        ValueError: see the layers; of a quantized one it names the module.
    """
    if isinstance(module, LoraLayer):
        return module
    factory = _factory(module)
    if factory is None:
        kind = type(module)
        kinds = ", ".join(kind.__qualname__ for kind in _FACTORIES)
        raise TypeError(
            f"target_modules: '{name}' is a {kind.__module__}.{kind.__qualname__}, expected one of "
            f"{kinds} or transformers' Conv1D; name other modules, or exclude this one with "
            "exclude_modules"
        )
    try:
        return factory(module, r=0)
    except ValueError as error:
        if quantized_kind(module) is not None:
            error.args = (f"target_modules: '{name}': {error}",)
        raise
