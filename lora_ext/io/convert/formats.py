"""What a format of adapters is, what every one is read into, and what a caller says of a file that
the file does not say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_ext.arguments import as_number, check_mapping, refuse


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in PEFT's terms, which every format is read into and written from.

    Attributes:
        config: the fields of adapter_config.json.
        tensors: by PEFT's keys.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A module of the base, as far as it is known.

    Attributes:
        kind: "linear", "embedding", "conv" or "attention"; None is not known.
        shape: of its weight, as the module stores it.
        groups: of a convolution.
        transposed: whether its weight is [in, out], as that of transformers' Conv1D.
    """

    kind: str | None = None
    shape: tuple[int, ...] | None = None
    groups: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class Options:
    """What a format's file leaves open, and the caller knows. Each format says what it asks for.

    Attributes:
        alpha: lora_alpha of all modules, where a file holds none.
        modules: those of the base, by name; some of them, unless `whole`.
        whole: whether `modules` are all of the base's, so that another name is a mistake.
        slices: which parts of a fused projection's rows have an adapter (loralib's `enable_lora`),
            by a module's name or its last parts: True or False for parts of one size, or
            (rows, True or False) for each.
        ids: the field that a number in a file's names stands for, by that number or by "PREFIX.ID".
        component: of a pipeline, such as "unet": it alone, without this prefix.
        base: folder of the model that the adapter is for; its config.json is read, and the headers
            of its safetensors.
    """

    alpha: float | None = None
    modules: Mapping[str, Layer] = field(default_factory=dict)
    slices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    component: str | None = None
    base: Path | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None:
            alpha = as_number(self.alpha, "Options", "alpha")
            if not math.isfinite(alpha) or alpha <= 0:
                raise ValueError(f"Options: alpha: got {alpha}, expected a number above 0")
        check_mapping("Options", "modules", self.modules, Layer, "Layers")
        check_mapping("Options", "slices", self.slices, list | tuple, "lists of True and False")
        check_mapping("Options", "ids", self.ids, str, "texts")
        if self.component is not None and not isinstance(self.component, str):
            refuse("Options", "component", self.component, "a name")


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """The modules of a base, for `Options.modules`."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        if isinstance(module, nn.MultiheadAttention):
            found[name] = Layer("attention")
        elif isinstance(module, nn.Embedding):
            found[name] = Layer("embedding", shape)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[name] = Layer("conv", shape, module.groups)
        elif shape is not None and len(shape) == 2:
            # transformers' Conv1D, the transposed linear layer of GPT-2; it may not be imported
            transposed = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
            found[name] = Layer("linear", shape, transposed=transposed)
    return found


@dataclass(frozen=True)
class Format:
    """How a format is told, read and written.

    Attributes:
        about: for --help.
        asks: which of the options a file of it may need; others that are given would go unused.
        recognises: whether what is at a path is of this format; reads no tensor.
        bytes_of: how large the tensors at a path are; reads none of them.
        read: what is at a path.
        write: to a folder, or to the file of a format that is one file.
    """

    about: str
    asks: frozenset[str]
    recognises: Callable[[Path], bool]
    bytes_of: Callable[[Path], int]
    read: Callable[[Path, Options], LoadedAdapter]
    write: Callable[[Path, LoadedAdapter, Options], None]
