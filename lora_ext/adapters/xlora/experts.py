"""The adapters that X-LoRA mixes: where they are, and which can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.xlora.config import XLoraConfig
from lora_ext.arguments import short
from lora_ext.io.hub import adapter_folder
from lora_ext.nn import AnyLayer, LoraLayer, ParamLayer

# Fields of an adapter that ask for what has no gate of its own for each token, and why.
_REFUSED = {
    "use_dora": "DoRA has no strength: its update depends on the whole weight",
    "alora_invocation_tokens": "its place in a request is not the classifier's choice",
    "modules_to_save": "each adapter has a copy of a module, and copies are not mixed",
    "trainable_token_indices": "each adapter has rows of its own, and rows are not mixed",
    "target_parameters": "experts, and other parameters, do not mix several adapters of a token",
    "layer_replication": "there is one base for all adapters",
}


def expert_folders(
    adapters: Mapping[str, Any], options: Mapping[str, Any], where: str = "XLoraModel"
) -> dict[str, Path]:
    """Their folders, by name.

    Raises:
        ValueError: there are none.
        Others as `adapter_folder`.
    """
    if not adapters:
        raise ValueError(
            f"{where}: adapters: got none, expected names and folders of those to mix: "
            "XLoraConfig(adapters={'math': 'folder', 'code': 'other'})"
        )
    return {name: adapter_folder(where, place, options) for name, place in adapters.items()}


def check_config(name: str, config: LoraConfig) -> None:
    """ValueError for an adapter that cannot be mixed, by name."""
    for field, why in _REFUSED.items():
        value = getattr(config, field)
        if value:
            raise ValueError(
                f"XLoraModel: adapters: '{name}': {field}: got {short(value)}, expected an "
                f"adapter without: {why}; train it as plain LoRA"
            )
    if config.bias != "none":
        raise ValueError(
            f"XLoraModel: adapters: '{name}': bias: got {config.bias!r}, expected 'none': the "
            "biases are the base's, of which there is one set; train it without, or with lora_bias"
        )


def check_layers(layers: Mapping[str, LoraLayer]) -> None:
    """ValueError for a layer that does not mix adapters row by row, by name."""
    for name, layer in layers.items():
        if isinstance(layer, AnyLayer | ParamLayer):
            raise ValueError(
                f"XLoraModel: '{name}': got a layer ({type(layer).__name__}) that does not "
                "mix several adapters of a token, expected linear layers, embeddings and "
                "convolutions; leave it out of the adapters"
            )


def hidden_size(config: XLoraConfig, model: nn.Module) -> int:
    """Of the base's hidden states.

    Raises:
        ValueError: the config does not say it, and the model neither; or they say two things.
    """
    own: Any = getattr(model, "config", None)
    text = own.get_text_config() if hasattr(own, "get_text_config") else own
    # OPT's last states may be of another size than its layers'.
    sizes = [getattr(text, name, None) for name in ("hidden_size", "word_embed_proj_dim")]
    known = [size for size in sizes if isinstance(size, int)]
    if config.hidden_size is not None:
        if known and config.hidden_size not in known:
            raise ValueError(
                f"XLoraConfig: hidden_size: got {config.hidden_size}, expected {known[0]}, as the "
                "base's config says"
            )
        return config.hidden_size
    if not known:
        raise ValueError(
            "XLoraConfig: hidden_size: got None, expected the size of the base's hidden states: "
            "its config does not say it"
        )
    return known[-1]
