"""PEFT's adapter folder: adapter_config.json and adapter_model.safetensors, as a pair.

The configuration is a dict here; `lora_ext` gives it its meaning elsewhere.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ext.arguments import as_path, listed, refuse
from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_file import (
    MAX_HEADER_BYTES,
    PICKLE,
    PICKLE_SUFFIXES,
    TensorFile,
    TensorSpec,
    adapter_bytes,
    check_finite,
    read_adapter_tensors,
    read_header,
)
from lora_ext.io.atomic import open_files, save_folders
from lora_ext.io.files import StrPath, json_text, parse_json, read_all, typed_errors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# 20,000 names of modules, one by one.
MAX_CONFIG_BYTES = 1 << 20
# And some thousand patterns beside them. Python spends up to 250 bytes and a microsecond on each.
MAX_CONFIG_VALUES = 24_000


@dataclass(frozen=True)
class AdapterFolder:
    """One complete pair, as one save left it; later saves do not change it. From `open_adapter`.

    Attributes:
        path: the folder.
        config: what adapter_config.json holds.
    """

    path: Path
    config: dict[str, Any]
    _weights: io.FileIO

    def header(self, *, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, TensorSpec]:
        """See `read_header`."""
        return read_header(self._weights, max_header_bytes=max_header_bytes)

    def open_tensors(self, *, max_header_bytes: int = MAX_HEADER_BYTES) -> TensorFile:
        """The tensors one by one, without a model to compare with; valid in the `with` block of
        `open_adapter`."""
        return TensorFile(self._weights, max_header_bytes)

    def tensors(
        self, expected: Mapping[str, TensorSpec], left_out: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """See `read_adapter_tensors`."""
        return read_adapter_tensors(self._weights, expected, left_out)


@contextmanager
def open_adapter(folder: StrPath) -> Iterator[AdapterFolder]:
    """Opens an adapter's two files, as a pair, for the time of a `with` block.

    Raises:
        AdapterFileError: a file is missing, is no regular file inside the folder, or cannot be
            read; the configuration is no JSON object; there are only pickled weights.
    """
    folder = as_path(folder, "open_adapter")
    with ExitStack() as stack:
        with typed_errors(folder):
            try:
                files = open_files(folder, (CONFIG_NAME, WEIGHTS_NAME))
            except (FileNotFoundError, NotADirectoryError) as error:
                raise AdapterFileError(_what_is_missing(folder)) from error
            for file in files.values():
                stack.enter_context(file)
            config_file = files[CONFIG_NAME]
            config = _parse_config(config_file)
        yield AdapterFolder(folder, config, files[WEIGHTS_NAME])


def save_adapter(
    folder: StrPath,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    lock_timeout: float = 60.0,
) -> None:
    """Writes an adapter's two files as one unit, as PEFT writes them; see `lora_ext.io.atomic`.

    Args:
        config: written with sorted keys; sets become sorted lists.
        tensors: key, as in the file, to tensor on any device.
        lock_timeout: see `save_files`.

    Raises:
        AdapterFileError: NaN or Inf in a tensor.
        TypeError, ValueError: the configuration holds what JSON has not, or more than is read.
        TimeoutError, OSError: see `save_files`.
    """
    save_adapters([(folder, config, tensors)], lock_timeout=lock_timeout)


def save_adapters(
    saves: Iterable[tuple[StrPath, Mapping[str, Any], Mapping[str, Tensor]]],
    *,
    lock_timeout: float = 60.0,
) -> None:
    """`save_adapter` of several folders, configs and tensors; on an error none is changed."""
    files = ((folder, _files(folder, config, tensors)) for folder, config, tensors in saves)
    save_folders(files, lock_timeout=lock_timeout)


def _files(
    folder: StrPath, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, bytes]:
    if not isinstance(config, Mapping):
        refuse("save_adapter", "config", config, "a dict of the fields of adapter_config.json")
    return {CONFIG_NAME: _config_bytes(folder, config), WEIGHTS_NAME: adapter_bytes(tensors)}


def check_adapter_files(
    folder: StrPath, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Raises what `save_adapter` would raise of the contents, and writes nothing."""
    _config_bytes(folder, config)
    for key, tensor in tensors.items():
        check_finite(key, tensor)


def _config_bytes(folder: StrPath, config: Mapping[str, Any]) -> bytes:
    text = json_text(config).encode()
    if len(text) > MAX_CONFIG_BYTES or _values(text) > MAX_CONFIG_VALUES:
        raise ValueError(
            f"{folder}: the config has {len(text)} bytes with {_values(text)} values, more than "
            "would be read again; name modules by the last parts of their names"
        )
    return text


def read_config_file(path: StrPath) -> dict[str, Any]:
    """What an adapter_config.json holds.

    Raises:
        FileNotFoundError: there is no such regular file.
        AdapterFileError: it cannot be read, is too large, or holds no JSON object; the message
            starts with the path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, expected the {CONFIG_NAME} of an adapter; give the folder that "
            "one was saved to"
        )
    with typed_errors(path), io.FileIO(path) as file:
        return _parse_config(file)


def _parse_config(file: io.FileIO) -> dict[str, Any]:
    content = read_all(file, MAX_CONFIG_BYTES)
    if _values(content) > MAX_CONFIG_VALUES:
        raise AdapterFileError(
            f"{file.name}: has {_values(content)} values, expected at most {MAX_CONFIG_VALUES}; "
            "name modules by the last parts of their names"
        )
    return parse_json(content, str(file.name))


def _values(content: bytes) -> int:
    """How many there are at most."""
    return content.count(b",") + 1


def _what_is_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: is not a folder; give the local folder that holds {CONFIG_NAME}"
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).exists()]
    if WEIGHTS_NAME in missing:
        for path in sorted(folder.glob("adapter_model.*")):
            if path.suffix in PICKLE_SUFFIXES:
                return f"{path}: {PICKLE}"
    names = " and no ".join(missing or (CONFIG_NAME, WEIGHTS_NAME))
    # Adapters of other names than "default" are in folders of these names.
    inner = sorted(path.parent.name for path in islice(folder.glob(f"*/{CONFIG_NAME}"), 20))
    if inner:
        return f"{folder}: has no {names}; give one of the adapters in it, {listed(inner)}"
    parts = sorted(path.name for path in islice(folder.glob("adapter_model-*.safetensors"), 20))
    if parts:
        return f"{folder}: has no {names} but {listed(parts)}; adapters are one file: join these"
    return f"{folder}: has no {names}; give the folder an adapter was saved to"
