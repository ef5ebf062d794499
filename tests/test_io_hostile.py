"""Hostile adapter files: a typed error that names file and key, fast and in little memory."""

from __future__ import annotations

import json
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from measured import MAX_BYTES, MAX_SECONDS, attempt, refused

from lora_ext.errors import AdapterFileError
from lora_ext.io import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    TensorSpec,
    inside,
    open_adapter,
    read_adapter_tensors,
    read_header,
)

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
EXPECTED = {A: TensorSpec((4, 8)), B: TensorSpec((6, 4))}
A_BYTES, B_BYTES = 4 * 8 * 4, 6 * 4 * 4
DATA = bytes(A_BYTES + B_BYTES)
CONFIG = b'{"peft_type": "LORA", "r": 4}'
ENTRIES: dict[str, Any] = {
    A: {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, A_BYTES]},
    B: {"dtype": "F32", "shape": [6, 4], "data_offsets": [A_BYTES, A_BYTES + B_BYTES]},
}


def pack(header: dict[str, Any] | bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    """A file with this header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def change(key: str = B, **fields: Any) -> bytes:
    """The good file with other fields for one tensor; None removes one."""
    entry = {k: v for k, v in (ENTRIES[key] | fields).items() if v is not None}
    return pack(ENTRIES | {key: entry})


def rank(r: int) -> dict[str, Any]:
    """A header that is right for rank r."""
    a, b = r * 8 * 4, 6 * r * 4
    return {
        A: {"dtype": "F32", "shape": [r, 8], "data_offsets": [0, a]},
        B: {"dtype": "F32", "shape": [6, r], "data_offsets": [a, a + b]},
    }


def with_values(dtype: torch.dtype, index: int, value: float) -> bytes:
    tensors = {A: torch.zeros(4, 8, dtype=dtype), B: torch.zeros(6, 4, dtype=dtype)}
    tensors[B].view(-1)[index] = value
    return safetensors.torch.save(tensors)


def test_measurement_sees_time_memory_and_hangs() -> None:
    eaten = attempt(lambda: bytes(b"x" * (80 << 20)))
    assert eaten.extra_bytes > MAX_BYTES and eaten.error == ""
    assert attempt(lambda: sum(range(20_000_000))).seconds > MAX_SECONDS
    with pytest.raises(AssertionError, match="14 is a hang"):
        attempt(lambda: time.sleep(60), patience=1)


def test_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(pack(ENTRIES))
    tensors = read_adapter_tensors(path, EXPECTED)
    assert {k: v.shape for k, v in tensors.items()} == {A: (4, 8), B: (6, 4)}
    assert read_header(path) == {
        key: TensorSpec(spec.shape, frozenset({torch.float32})) for key, spec in EXPECTED.items()
    }


# Contents: what the file holds, the key that the message names if any, and what else it says.
NOT_WHOLE, JSON, SIZES = "is no safetensors file", "is not valid JSON", "its shape is no list"
RANGE, FIELDS, DAMAGED = "no range in", "expected dtype, shape and data_offsets", "damaged"
NO_DTYPE, TWICE, UNFIT = "expected one of F64", "is there twice", "bytes for shape"
JSON_A = json.dumps(ENTRIES[A])
CONTENTS: dict[str, tuple[bytes, str | None, str]] = {
    # the container
    "empty": (b"", None, NOT_WHOLE),
    "7 bytes": (b"\1" * 7, None, NOT_WHOLE),
    "only a length": (bytes(8), None, NOT_WHOLE),
    "length 0": (pack(ENTRIES, length=0), None, "its header is not valid JSON"),
    "length 1": (pack(ENTRIES, length=1), None, JSON),
    "length one short": (pack(ENTRIES, length=len(json.dumps(ENTRIES)) - 1), None, JSON),
    "length past the end": (pack(ENTRIES, length=10_000), None, NOT_WHOLE),
    "length 2^63": (pack(ENTRIES, length=2**63), None, NOT_WHOLE),
    "length 2^64-1": (pack(ENTRIES, length=2**64 - 1), None, NOT_WHOLE),
    "big-endian length": (len(b"{}").to_bytes(8, "big") + b"{}", None, NOT_WHOLE),
    "header cut": (pack(ENTRIES)[:60], None, NOT_WHOLE),
    "data cut by one byte": (pack(ENTRIES)[:-1], B, RANGE),
    "no data": (pack(ENTRIES, data=b""), A, RANGE),
    "one byte too many": (pack(ENTRIES) + b"x", None, "1 bytes after the last tensor"),
    "text": (b"hello world, this is a text file", None, NOT_WHOLE),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", None, "is a web page"),
    "index of shards": (b'{\n  "metadata": {}, "weight_map": {}}', None, "give the folder"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid ", None, "git lfs pull"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(100), None, "is a GGUF file"),
    "zip": (b"PK\3\4" + bytes(100), None, "is a pickle"),
    "bytes 0xff": (b"\xff" * 1000, None, NOT_WHOLE),
    # the header as JSON
    "array": (pack(b"[]"), None, NOT_WHOLE),
    "leading space": (pack(b" {}"), None, NOT_WHOLE),
    "byte-order mark": (pack(b"\xef\xbb\xbf{}"), None, NOT_WHOLE),
    "unclosed": (pack(b'{"a": '), None, JSON),
    "two objects": (pack(b"{}{}"), None, JSON),
    "comma at the end": (pack(b'{"a": 1,}'), None, JSON),
    "single quotes": (pack(b"{'a': 1}"), None, JSON),
    "not utf-8": (pack(b'{"\xff": 1}'), None, JSON),
    "utf-16": (pack("{}".encode("utf-16-le")), None, JSON),
    "nul bytes": (pack(b"{}\0\0\0\0\0\0"), None, JSON),
    "half a surrogate": (pack(b'{"\\ud800": 1}'), None, JSON),
    "deep arrays": (pack(b'{"a": ' + b"[" * 200_000), None, "but brackets"),
    "deep objects": (pack(b'{"a":' * 40_000), None, "but brackets"),
    "integer of 5000 digits": (pack(b'{"a": ' + b"9" * 5000 + b"}"), None, JSON),
    "NaN as a size": (pack(b'{"a": {"shape": [NaN]}}'), None, JSON),
    "key twice": (pack(f'{{"{A}": {JSON_A}, "{A}": {JSON_A}}}'.encode()), A, TWICE),
    "field twice": (pack(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "dtype", TWICE),
    "metadata twice": (pack(b'{"__metadata__": {}, "__metadata__": {}}'), None, TWICE),
    "metadata is a list": (pack({"__metadata__": []} | ENTRIES), "__metadata__", "strings only"),
    "metadata nested": (pack({"__metadata__": {"a": {}}}), "__metadata__", "strings only"),
    "deep and long": (pack(b'{"a": ' + b"[" * 5000 + b" " * 200_000), None, JSON),
    "small arrays": (pack(b'{"a": [' + b"[]," * 80_000 + b"1]}"), None, "but brackets"),
    "small strings": (pack(b'{"a": [' + b'"ab",' * 50_000 + b"1]}"), "a", FIELDS),
    "metadata of small objects": (
        pack(b'{"__metadata__":{' + b",".join(b'"%x":{}' % i for i in range(25_000)) + b"}}"),
        None,
        "but brackets",
    ),
    "header longer than the model's": (
        pack({f"{i:050}": ENTRIES[A] for i in range(3_000)}),
        None,
        "expected at most",
    ),
    # one tensor's fields
    "entry is a list": (pack(ENTRIES | {B: []}), B, FIELDS),
    "entry is null": (pack(ENTRIES | {B: None}), B, FIELDS),
    "no dtype": (change(dtype=None), B, FIELDS),
    "no shape": (change(shape=None), B, FIELDS),
    "no offsets": (change(data_offsets=None), B, FIELDS),
    "extra field": (change(path="../../etc/passwd"), B, FIELDS),
    "dtype is a number": (change(dtype=32), B, NO_DTYPE),
    "dtype is a list": (change(dtype=["F32"]), B, NO_DTYPE),
    "dtype unknown": (change(dtype="F4"), B, NO_DTYPE),
    "dtype in lower case": (change(dtype="f32"), B, NO_DTYPE),
    "dtype absurdly long": (change(dtype="F" * 100_000), B, NO_DTYPE),
    "shape is a number": (change(shape=24), B, SIZES),
    "shape is text": (change(shape="64"), B, SIZES),
    "shape is an object": (change(shape={"0": 6}), B, SIZES),
    "size negative": (change(shape=[-6, -4]), B, SIZES),
    "size a float": (change(shape=[6.0, 4]), B, SIZES),
    "size 1e999": (pack(json.dumps(ENTRIES).replace("[6, 4]", "[1e999]").encode()), B, SIZES),
    "size a bool": (change(shape=[True, 24]), B, SIZES),
    "size 2^63": (change(shape=[2**63, 4]), B, SIZES),
    "size 2^1000": (change(shape=[2**1000]), B, SIZES),
    "product wraps to 0": (change(shape=[2**32, 2**32]), B, UNFIT),
    "product wraps to the right size": (change(shape=[2**62 + 6, 4]), B, UNFIT),
    "9 dimensions": (change(shape=[6, 4, *[1] * 7]), B, SIZES),
    "50,000 dimensions": (change(shape=[1] * 50_000), B, SIZES),
    "one offset": (change(data_offsets=[A_BYTES]), B, RANGE),
    "three offsets": (change(data_offsets=[A_BYTES, A_BYTES + B_BYTES, 0]), B, RANGE),
    "offsets reversed": (change(data_offsets=[A_BYTES + B_BYTES, A_BYTES]), B, RANGE),
    "offset negative": (change(data_offsets=[-B_BYTES, 0]), B, RANGE),
    "offset a float": (change(data_offsets=[0.0, 96.0]), B, RANGE),
    "offset a bool": (change(data_offsets=[False, True]), B, RANGE),
    "offset past the end": (change(data_offsets=[A_BYTES + 4, A_BYTES + B_BYTES + 4]), B, RANGE),
    "offset 2^64": (change(data_offsets=[A_BYTES, 2**64]), B, RANGE),
    "fewer bytes than the shape": (change(data_offsets=[A_BYTES, A_BYTES + 92]), B, UNFIT),
    "more bytes than the shape": (change(shape=[6, 3]), B, UNFIT),
    # where the tensors lie
    "overlap": (change(data_offsets=[A_BYTES - 4, A_BYTES + B_BYTES - 4]), B, "overlaps"),
    "same bytes twice": (change(data_offsets=[0, B_BYTES]), A, "overlaps"),
    "gap before": (pack(ENTRIES | {A: ENTRIES[A] | {"data_offsets": [4, A_BYTES + 4]}}), A, "gap"),
    "gap between": (
        pack(
            ENTRIES | {B: ENTRIES[B] | {"data_offsets": [A_BYTES + 8, A_BYTES + B_BYTES + 8]}},
            data=DATA + bytes(8),
        ),
        B,
        "gap",
    ),
    "hidden bytes at the end": (pack(ENTRIES, DATA + b"x" * 999), None, "999 bytes after"),
    # another adapter than the model's
    "no tensors": (pack({}, b""), A, "missing key"),
    "key missing": (pack({A: ENTRIES[A]}, bytes(A_BYTES)), B, "missing key"),
    "key unknown": (
        pack({**ENTRIES, "x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        "x",
        "unknown key",
    ),
    "keys without prefix": (
        pack({key.removeprefix("base_model.model."): e for key, e in ENTRIES.items()}),
        "q.lora_A.weight",
        "unknown key",
    ),
    "key is empty": (pack({A: ENTRIES[A], "": ENTRIES[B]}), "''", "unknown key"),
    "key is a path": (pack({A: ENTRIES[A], "../../x": ENTRIES[B]}), "../../x", "unknown key"),
    "key absurdly long": (pack({A: ENTRIES[A], "k" * 100_000: ENTRIES[B]}), "kkk", "unknown key"),
    "key with line breaks": (pack({A: ENTRIES[A], "\n\r\0": ENTRIES[B]}), r"\n\r", "unknown key"),
    "rank 0": (pack(rank(0), b""), A, "got shape [0, 8], expected [4, 8]"),
    "rank 5": (pack(rank(5), bytes(280)), A, "got shape [5, 8], expected [4, 8]"),
    "transposed": (change(A, shape=[8, 4]), A, "got shape [8, 4], expected [4, 8]"),
    "one dimension more": (change(A, shape=[1, 4, 8]), A, "got shape [1, 4, 8]"),
    "flat": (change(A, shape=[32]), A, "got shape [32]"),
    "integers": (change(A, dtype="I32"), A, "got dtype torch.int32"),
    # values
    "NaN first": (with_values(torch.float32, 0, float("nan")), B, "has NaN or Inf"),
    "NaN last": (with_values(torch.float32, 23, float("nan")), B, "has NaN or Inf"),
    "Inf": (with_values(torch.float32, 5, float("inf")), B, "has NaN or Inf"),
    "-Inf": (with_values(torch.float32, 5, -float("inf")), B, "has NaN or Inf"),
    "NaN in fp64": (with_values(torch.float64, 7, float("nan")), B, "has NaN or Inf"),
    "NaN in bf16": (with_values(torch.bfloat16, 7, float("nan")), B, "has NaN or Inf"),
    "Inf in fp16": (with_values(torch.float16, 7, float("inf")), B, "has NaN or Inf"),
    "NaN in e4m3": (with_values(torch.float8_e4m3fn, 7, float("nan")), B, "has NaN or Inf"),
    "Inf in e5m2": (with_values(torch.float8_e5m2, 7, float("inf")), B, "has NaN or Inf"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_hostile_content(tmp_path: Path, case: str) -> None:
    content, key, says = CONTENTS[case]
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(content)
    message = refused(lambda: read_adapter_tensors(path, EXPECTED))
    assert str(path) in message and says in message
    assert key is None or key in message


def sparse(path: Path, start: bytes, size: int) -> None:
    """A file of `size` bytes that takes no room on the disk."""
    path.write_bytes(start)
    os.truncate(path, size)


SPARSE: dict[str, tuple[bytes, int, str]] = {
    "a terabyte of nothing": (b"", 1 << 40, NOT_WHOLE),
    "header of a terabyte": (pack(b"{", b"", (1 << 40) - 8), 1 << 40, "expected at most"),
    "header of 90 MB": (pack(b"{", b"", 90_000_000), 1 << 30, "expected at most"),
    "right header, a terabyte of data": (pack(ENTRIES), 1 << 40, "after the last tensor"),
    "rank 2^28": (
        pack(rank(2**28), b""),
        len(pack(rank(2**28), b"")) + 2**28 * 56,
        "got shape [268435456, 8], expected [4, 8]",
    ),
}


@pytest.mark.parametrize("case", SPARSE)
def test_huge_file(tmp_path: Path, case: str) -> None:
    start, size, says = SPARSE[case]
    path = tmp_path / WEIGHTS_NAME
    sparse(path, start, size)
    message = refused(lambda: read_adapter_tensors(path, EXPECTED))
    assert str(path) in message and says in message


@pytest.mark.parametrize(
    "filling",
    [b"{},                 ", b"[],                 ", b"0.1,", b'"ab",', b"300,"],
    ids=repr,
)
def test_longest_header_without_a_model(tmp_path: Path, filling: bytes) -> None:
    """`read_header` has no model to bound the header by; its own bound holds the memory too."""
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(pack(b'{"a": [' + filling * ((512 << 10) // len(filling) - 4) + b"0]}"))
    message = refused(lambda: read_header(path))
    assert str(path) in message and "'a'" in message
    path.write_bytes(pack(b'{"a": [' + filling * (1 << 20) + b"0]}"))
    assert "expected at most" in refused(lambda: read_header(path))


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(pack(ENTRIES))
    (folder / WEIGHTS_NAME).symlink_to(outside)


def link_up(folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes(pack(ENTRIES))
    (folder / WEIGHTS_NAME).symlink_to("../outside.safetensors")


def link_chain(folder: Path) -> None:
    link_out(folder)
    (folder / WEIGHTS_NAME).rename(folder / "inner")
    (folder / WEIGHTS_NAME).symlink_to("inner")


def pickled_only(folder: Path) -> None:
    torch.save({A: torch.zeros(4, 8)}, folder / "adapter_model.bin")


def config(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / CONFIG_NAME).write_bytes(content)
        (folder / WEIGHTS_NAME).write_bytes(pack(ENTRIES))

    return write


Folder = tuple[Callable[[Path], object], str, str]
FOLDERS: dict[str, Folder] = {
    "no weights": (lambda f: None, WEIGHTS_NAME, "has no"),
    "only pickled weights": (pickled_only, "adapter_model.bin", "is a pickle"),
    "link to outside": (link_out, WEIGHTS_NAME, "outside its folder"),
    "link with ..": (link_up, WEIGHTS_NAME, "outside its folder"),
    "link by a link": (link_chain, WEIGHTS_NAME, "outside its folder"),
    "link to /dev/zero": (
        lambda f: (f / WEIGHTS_NAME).symlink_to("/dev/zero"),
        WEIGHTS_NAME,
        "outside its folder",
    ),
    "link to itself": (lambda f: (f / WEIGHTS_NAME).symlink_to(WEIGHTS_NAME), "", "cannot be read"),
    "link to nothing": (lambda f: (f / WEIGHTS_NAME).symlink_to("gone"), WEIGHTS_NAME, "has no"),
    "pipe": (lambda f: os.mkfifo(f / WEIGHTS_NAME), WEIGHTS_NAME, "expected a regular file"),
    "folder": (lambda f: (f / WEIGHTS_NAME).mkdir(), WEIGHTS_NAME, "expected a regular file"),
    "config empty": (config(b""), CONFIG_NAME, JSON),
    "config a list": (config(b"[1]"), CONFIG_NAME, "expected an object"),
    "config cut": (config(CONFIG[:-1]), CONFIG_NAME, JSON),
    "config key twice": (config(b'{"r": 4, "r": 1000000}'), "'r'", TWICE),
    "config NaN": (config(b'{"lora_alpha": NaN}'), CONFIG_NAME, "NaN is no number"),
    "config binary": (config(bytes(range(256))), CONFIG_NAME, JSON),
    "config deep": (config(b"[" * 500_000), CONFIG_NAME, "but brackets"),
    "config pickled": (config(pickle.dumps({"r": 4})), CONFIG_NAME, JSON),
    "config a terabyte": (lambda f: sparse(f / CONFIG_NAME, b"{", 1 << 40), CONFIG_NAME, ""),
    "config a pipe": (
        lambda f: ((f / CONFIG_NAME).unlink(), os.mkfifo(f / CONFIG_NAME)),
        CONFIG_NAME,
        "expected a regular file",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_hostile_folder(tmp_path: Path, case: str) -> None:
    make, name, says = FOLDERS[case]
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG_NAME).write_bytes(CONFIG)
    if case == "config a terabyte":
        (folder / WEIGHTS_NAME).write_bytes(pack(ENTRIES))
    make(folder)

    def load() -> None:
        with open_adapter(folder) as adapter:
            adapter.tensors(EXPECTED)

    message = refused(load)
    assert str(folder) in message and name in message and says in message
    path = folder / WEIGHTS_NAME
    if not case.startswith("config") and case not in ("no weights", "only pickled weights"):
        assert WEIGHTS_NAME in refused(lambda: read_adapter_tensors(path, EXPECTED))


def test_there_are_60() -> None:
    assert len(CONTENTS) + len(SPARSE) + len(FOLDERS) >= 60


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def torch_zip(payload: Payload, path: Path) -> None:
    torch.save({A: payload}, path)


def torch_legacy(payload: Payload, path: Path) -> None:
    torch.save({A: payload}, path, _use_new_zipfile_serialization=False)


def plain(protocol: int) -> Callable[[Payload, Path], None]:
    return lambda payload, path: path.write_bytes(pickle.dumps(payload, protocol)) and None


PAYLOADS: dict[str, Callable[[Payload, Path], None]] = {
    "torch.save": torch_zip,
    "torch.save of old": torch_legacy,
    "protocol 0": plain(0),
    "protocol 2": plain(2),
    "protocol 5": plain(5),
}


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "adapter_model.bin", "adapter_model.pt"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_pickled_code_is_not_run(tmp_path: Path, payload: str, name: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / name
    PAYLOADS[payload](Payload(marker), path)
    (tmp_path / CONFIG_NAME).write_bytes(CONFIG)

    def load() -> None:
        with open_adapter(tmp_path) as adapter:
            adapter.tensors(EXPECTED)

    for way in (lambda: read_adapter_tensors(path, EXPECTED), lambda: read_header(path), load):
        message = refused(way)
        assert str(path) in message
        # Text is not to be told from any other file that is none of ours.
        assert "is a pickle" in message or (payload == "protocol 0" and name == WEIGHTS_NAME)
    assert not marker.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False) if "torch" in payload else pickle.load(file)
    assert marker.exists()  # so the payload was able to


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc/passwd", "", "a\0b"])
def test_names_that_leave_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterFileError, match="expected one inside this folder"):
        inside(tmp_path, name)
    assert inside(tmp_path, "a/b") == tmp_path.resolve() / "a" / "b"


def test_missing_folder() -> None:
    with (
        pytest.raises(AdapterFileError, match="/nowhere: is not a folder"),
        open_adapter("/nowhere"),
    ):
        pass


def test_changed_bytes_are_refused_or_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    """5,000 random changes of a good file: a typed error, or the same tensors as the library's."""
    chance = random.Random(8)
    good = with_values(torch.float32, 3, 2.0)
    path = tmp_path / WEIGHTS_NAME
    read = 0
    for _ in range(5000):
        content = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(len(content) if chance.random() < 0.2 else 260)
            match chance.randrange(3):
                case 0:
                    content[place] = chance.choice(b'0123456789{}[]",:FIB \0\xff')
                case 1:
                    del content[place]
                case 2:
                    content.insert(place, chance.choice(b'0123456789{}[]",:'))
        path.unlink(missing_ok=True)  # ext4 syncs a file that is cut to be written again
        path.write_bytes(content)
        try:
            tensors = read_adapter_tensors(path, EXPECTED)
        except AdapterFileError as error:
            assert str(path) in str(error)
            continue
        read += 1
        library = safetensors.torch.load(bytes(content))
        assert all(torch.equal(library[key], tensor) for key, tensor in tensors.items())
    assert 0 < read < 5000
