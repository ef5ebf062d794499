"""The files of a base: which they are, open, and those beside them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ext.cli.errors import WrongUse

if TYPE_CHECKING:
    from lora_ext.io import TensorFile

HEADER = 32 << 20  # bytes; hundreds of thousands of tensors
# Weights in any format, which the merged model has instead.
_WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .onnx .pkl .pickle".split()
)


def weights_in(base: Path) -> list[Path]:
    """The safetensors of a base that is no model's folder."""
    paths = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    if not paths:
        raise WrongUse(f"{base}: has neither a config.json nor safetensors files")
    return paths


def open_all(stack: ExitStack, paths: Sequence[Path]) -> dict[str, TensorFile]:
    """By their names."""
    from lora_ext.io import open_tensors

    opened = (stack.enter_context(open_tensors(path, max_header_bytes=HEADER)) for path in paths)
    return {path.name: file for path, file in zip(paths, opened, strict=True)}


def others_in(base: Path) -> list[Path]:
    """Tokenizer and the like: what is beside the weights and is not written anew."""
    if not base.is_dir():
        return []
    return [
        path
        for path in sorted(base.iterdir())
        if path.is_file()
        and path.suffix not in _WEIGHT_SUFFIXES
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
    ]


def copy_others(base: Path, folder: Path) -> None:
    """Those that are not in the folder yet."""
    from lora_ext.io.whole_folder import finished_file

    for path in others_in(base):
        if not (folder / path.name).exists():
            with finished_file(folder / path.name) as hidden:
                shutil.copyfile(path, hidden)
