"""PEFT's adapters: adapter_config.json and adapter_model.safetensors in a folder."""

from __future__ import annotations

from pathlib import Path

from lora_ext.io.adapter_folder import open_adapter, save_adapter
from lora_ext.io.convert.formats import Format, LoadedAdapter, Options
from lora_ext.io.convert.parts import check_parts

HEADER = 8 << 20  # bytes, tens of thousands of tensors; there is no model to compare with
# Of an adapter of PEFT's, also those that are not read.
_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def _read(folder: Path, options: Options) -> LoadedAdapter:
    with open_adapter(folder) as files:
        header = files.header(max_header_bytes=HEADER)
        check_parts(files.config, header, str(folder))
        return LoadedAdapter(files.config, files.tensors(header))


def is_of_folder(path: Path) -> bool:
    """Whether it is one of the files of such a folder."""
    return path.is_file() and path.name in _FILES


def _bytes_of(folder: Path) -> int:
    with open_adapter(folder) as files:
        file = files.open_tensors(max_header_bytes=HEADER)
        return sum(map(file.bytes_of, file.specs))


def _write(folder: Path, adapter: LoadedAdapter, options: Options) -> None:
    if folder.suffix in (".safetensors", ".gguf") and not folder.is_dir():
        raise ValueError(
            f"{folder}: is the name of a file, and peft is a folder; say which format the file is "
            "to have (target=, --to)"
        )
    check_parts(adapter.config, adapter.tensors, str(folder))
    save_adapter(folder, adapter.config, adapter.tensors)


PEFT = Format(
    about="adapter_config.json and adapter_model.safetensors",
    asks=frozenset(),
    # Also one of the two, or with pickled weights: reading says what is wrong then, and nothing of
    # it is replaced unasked.
    recognises=lambda path: any((path / name).exists() for name in _FILES),
    bytes_of=_bytes_of,
    read=_read,
    write=_write,
)
