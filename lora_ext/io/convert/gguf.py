"""llama.cpp's adapters: one GGUF file with a pair of matrices for each tensor of the base.

llama.cpp computes y = W x + s B (A x), s = alpha / r with r = B's columns; without an alpha, or
with 0, s = 1. One alpha serves the whole file: where the modules' scalings are not those of one,
0 is written, and each is multiplied into B. The matrices are PEFT's but for

- the order of B's rows, where llama.cpp keeps the base's rows in another (gguf_names.py),
- the input embedding, of which A is [vocabulary, r], to be read by rows,
- experts, a stack for each projection (gguf_experts.py).
"""

from __future__ import annotations

from pathlib import Path

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.formats import Format, LoadedAdapter, Options
from lora_ext.io.convert.gguf_file import MAGIC, open_gguf
from lora_ext.io.convert.gguf_names import Base
from lora_ext.io.convert.gguf_read import read_adapter
from lora_ext.io.convert.gguf_write import write_adapter


def _base(options: Options, path: Path) -> Base:
    if options.base is None:
        raise ValueError(
            f"{path}: GGUF has llama.cpp's names and order of rows, which only the base's "
            "config.json tells: give its folder, base=FOLDER (--base FOLDER)"
        )
    return Base.of(options.base)


def _read(path: Path, options: Options) -> LoadedAdapter:
    return read_adapter(path, _base(options, path))


def _write(path: Path, adapter: LoadedAdapter, options: Options) -> None:
    base = _base(options, path)
    try:
        write_adapter(path, adapter, base)
    except AdapterFileError as error:
        before = "" if str(error).startswith(str(path)) else f"{path}: "
        raise AdapterFileError(f"{before}{error}") from None


def _recognises(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def _bytes_of(path: Path) -> int:
    with open_gguf(path) as file:
        return sum(one.end - one.begin for one in file.tensors.values())


GGUF = Format(
    about="one file, llama.cpp's",
    asks=frozenset(),
    recognises=_recognises,
    bytes_of=_bytes_of,
    read=_read,
    write=_write,
)
