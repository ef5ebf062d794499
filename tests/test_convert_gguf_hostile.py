"""Hostile GGUF files: a typed error that names file and tensor, fast and in little memory."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import gguf_problems as problems
import pytest
from gguf_problems import (
    A_BYTES,
    ARRAY,
    DATA,
    F16,
    F32,
    FLOAT32,
    HIDDEN,
    INFOS,
    KEYS,
    Q_A,
    Q_B,
    STRING,
    UINT32,
    info,
    key,
    packed,
    text,
)
from measured import refused
from quantized_libraries import library

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert import FORMATS, Options
from lora_ext.io.convert.gguf_names import Base
from lora_ext.io.convert.gguf_read import read_adapter

gguf = library("gguf")


def with_key(name: str, kind: int, value: bytes) -> bytes:
    return packed(KEYS | {name: key(name, kind, value)})


def with_info(name: str, *fields: object, data: bytes = DATA) -> bytes:
    return packed(infos=INFOS | {name: info(name, *fields)}, data=data)  # type: ignore[arg-type]


def array(kind: int, length: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + content


def pair(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> bytes:
    """A good file of another pair; shapes as files have them."""
    sizes = [4 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in (a, b)]
    sizes = [
        size * (shape[2] if len(shape) > 2 else 1)
        for size, shape in zip(sizes, (a, b), strict=True)
    ]
    second = -(-sizes[0] // 32) * 32
    infos = {
        f"{name}.lora_a": info(f"{name}.lora_a", a, F32, 0),
        f"{name}.lora_b": info(f"{name}.lora_b", b, F32, second),
    }
    return packed(infos=infos, data=bytes(second + sizes[1]))


GOOD = packed()
NAN = struct.pack("<f", float("nan"))
V = "blk.0.attn_v.weight"
# Content and what the message says of it.
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file"),
    "a web page": (b"<html>", "is no GGUF file"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "is no GGUF file"),
    "magic alone": (b"GGUF", "its version: ends after the file"),
    "version 1": (packed(version=1), "GGUF of version 1"),
    "version 4": (packed(version=4), "GGUF of version 4"),
    "version of 2**31": (packed(version=1 << 31), "version 2147483648"),
    "big endian": (packed(version=3 << 24), "byte order of big-endian"),
    "cut in the counts": (GOOD[:20], "ends after the file"),
    "cut in a key": (GOOD[:40], "ends after the file"),
    "cut in the table": (GOOD[: len(GOOD) - len(DATA) - 100], "ends after the file"),
    "cut in the data": (GOOD[:-8], f"'{Q_B}': its data ends at byte"),
    "without data": (packed(data=b""), f"'{Q_A}': its data ends at byte"),
    "bytes after the data": (packed(data=DATA + bytes(64)), "64 bytes after the last tensor"),
    "2**63 tensors": (packed(count=1 << 63), "has 9223372036854775808 tensors"),
    "10**6 tensors": (packed(count=10**6), "has 1000000 tensors, expected at most"),
    "one tensor too many": (packed(count=3), "the tensor '' is empty"),
    "2**63 keys": (packed(count_keys=1 << 63), "keys, expected at most"),
    "a key too many": (packed(count_keys=5), "a tensor's name has"),
    "an endless key": (
        packed(KEYS | {"x": struct.pack("<Q", 1 << 62)}),
        "a key: ends",
    ),
    "a key twice": (
        packed(KEYS | {"again": KEYS["general.type"]}),
        "'general.type' is empty or there twice",
    ),
    "an empty key": (packed(KEYS | {"": key("", STRING, text("x"))}), "'' is empty"),
    "a key that is no text": (packed(KEYS | {"x": text(b"\xff\xfe")}), "a key: is no text"),
    "a value that is no text": (with_key("x", STRING, text(b"\xff")), "'x': is no text"),
    "an unknown type": (with_key("x", 99, b""), "'x': its type is 99"),
    "an array of 2**60": (with_key("x", ARRAY, array(UINT32, 1 << 60)), "'x': ends after"),
    "an array of 2**64-1 texts": (
        with_key("x", ARRAY, array(STRING, (1 << 64) - 1)),
        "texts in 'x', expected at most",
    ),
    "60,000 empty texts": (
        with_key("x", ARRAY, array(STRING, 60_000, bytes(8 * 59_000))),
        "'x': ends|'x': is no text|a key|texts",
    ),
    "an array of arrays": (with_key("x", ARRAY, array(ARRAY, 1)), "is an array of type 9"),
    "an array of an unknown type": (with_key("x", ARRAY, array(77, 1)), "is an array of type 77"),
    "alignment 0": (with_key("general.alignment", UINT32, bytes(4)), "general.alignment' is '0'"),
    "alignment 48": (
        with_key("general.alignment", UINT32, struct.pack("<I", 48)),
        "general.alignment' is '48'",
    ),
    "alignment of 2**31": (
        with_key("general.alignment", UINT32, struct.pack("<I", 1 << 31)),
        "general.alignment' is",
    ),
    "alignment as text": (with_key("general.alignment", STRING, text("32")), "general.alignment"),
    "an empty name": (packed(infos={"": info("", (4,), F32, 0)}), "tensor '' is empty"),
    "a long name": (
        packed(infos={"x": info("x" * 64, (4,), F32, 0)}),
        "64 bytes, expected at most 63",
    ),
    "a name of 2**40": (packed(infos={"x": struct.pack("<Q", 1 << 40)}), "a tensor's name has"),
    "a name twice": (
        packed(infos=INFOS | {"again": INFOS[Q_A]}),
        f"'{Q_A}' is empty or there twice",
    ),
    "a name that is no text": (packed(infos={"x": info(b"\xff", (4,), F32, 0)}), "is no text"),
    "no dimension": (with_info(Q_B, (), F32, A_BYTES), f"'{Q_B}': has 0 dimensions"),
    "five dimensions": (with_info(Q_B, (1,) * 5, F32, A_BYTES), f"'{Q_B}': has 5 dimensions"),
    "2**31 dimensions": (
        packed(infos={Q_A: text(Q_A) + struct.pack("<I", 1 << 31)}),
        "2147483648 dimensions",
    ),
    "a size of 0": (with_info(Q_B, (4, 0), F32, A_BYTES), f"'{Q_B}': its shape is"),
    "a size of 2**63": (with_info(Q_B, (4, 1 << 63), F32, A_BYTES), f"'{Q_B}': its shape is"),
    "a product of 2**64": (with_info(Q_B, (1 << 32, 1 << 32), F32, A_BYTES), "its shape is"),
    "a product of 2**60": (with_info(Q_B, (1 << 30, 1 << 30), F32, A_BYTES), "its data ends"),
    "an unknown dtype": (with_info(Q_B, (4, HIDDEN), 255, A_BYTES), f"'{Q_B}': is of type 255"),
    "Q4_0": (with_info(Q_B, (4, HIDDEN), 2, A_BYTES), f"'{Q_B}': is of type 2, expected F32"),
    "float64": (with_info(Q_B, (4, HIDDEN), 28, A_BYTES), "is of type 28"),
    "Q8_0 in rows of 4": (with_info(Q_B, (4, HIDDEN), 8, A_BYTES), "rows of 4 in Q8_0"),
    "an offset of 1": (with_info(Q_B, (4, HIDDEN), F32, A_BYTES + 1), f"'{Q_B}': its data is at"),
    "an offset over another": (with_info(Q_B, (4, HIDDEN), F32, 0), "its data is at 0, expected"),
    "an offset after a gap": (
        with_info(Q_B, (4, HIDDEN), F32, A_BYTES + 32, data=DATA + bytes(32)),
        "its data is at",
    ),
    "an offset of 2**64-32": (with_info(Q_B, (4, HIDDEN), F32, (1 << 64) - 32), "its data is at"),
    "no architecture": (
        packed({k: v for k, v in KEYS.items() if k != "general.architecture"}),
        "general.architecture is None",
    ),
    "another architecture": (
        packed(KEYS | {"general.architecture": key("general.architecture", STRING, text("gpt2"))}),
        "general.architecture is 'gpt2', expected 'llama'",
    ),
    "a model": (
        packed(KEYS | {"general.type": key("general.type", STRING, text("model"))}),
        "no adapter but a model",
    ),
    "another kind of adapter": (
        packed(KEYS | {"adapter.type": key("adapter.type", STRING, text("control_vector"))}),
        "adapter.type is 'control_vector'",
    ),
    "an alpha of NaN": (
        packed(
            KEYS | {"a": key("adapter.lora.alpha", FLOAT32, NAN)} | {"adapter.lora.alpha": b""},
            count_keys=4,
        ),
        "adapter.lora.alpha is nan",
    ),
    "an alpha as text": (
        packed(KEYS | {"adapter.lora.alpha": key("adapter.lora.alpha", STRING, text("8"))}),
        "adapter.lora.alpha is '8'",
    ),
    "tokens as INT32": (
        with_key("adapter.alora.invocation_tokens", ARRAY, array(5, 1, bytes(4))),
        "type 5, expected UINT32",
    ),
    "a task that is a number": (
        with_key("adapter.lora.task_name", UINT32, bytes(4)),
        "adapter.lora.task_name is no text",
    ),
    "no tensors": (packed(infos={}, data=b""), "has no tensors of an adapter"),
    "one of a pair": (packed(infos={Q_A: INFOS[Q_A]}, data=DATA[:A_BYTES]), "has .lora_a alone"),
    "a weight": (
        packed(
            infos={"x": info("blk.0.attn_q.weight", (HIDDEN, 8), F32, 0)}, data=bytes(HIDDEN * 32)
        ),
        "does not end in .weight.lora_a",
    ),
    "a name of no tensor": (
        pair("blk.0.attn_z.weight", (HIDDEN, 4), (4, HIDDEN)),
        "'blk.0.attn_z' is no tensor",
    ),
    "a layer too many": (
        pair("blk.9.attn_q.weight", (HIDDEN, 4), (4, HIDDEN)),
        "'blk.9.attn_q' is no tensor",
    ),
    "ranks that differ": (
        pair(V, (HIDDEN, 4), (5, HIDDEN)),
        f"'{V}': .lora_a is [4, 32] and .lora_b [32, 5]",
    ),
    "one dimension": (pair(V, (HIDDEN,), (4, HIDDEN)), f"'{V}': .lora_a is [32]"),
    "three dimensions": (pair(V, (HIDDEN, 4, 2), (4, HIDDEN, 2)), f"'{V}': .lora_a is [2, 4, 32]"),
    "rows of no heads": (pair("blk.0.attn_q.weight", (HIDDEN, 4), (4, 30)), "by the heads"),
    "an embedding's ranks": (pair("token_embd.weight", (4, 64), (8, HIDDEN)), "[vocabulary, r]"),
    "NaN": (packed(data=bytes(A_BYTES) + NAN + DATA[A_BYTES + 4 :]), f"'{Q_B}' has NaN or Inf"),
    "infinity in halves": (
        packed(
            infos={
                Q_A: info(Q_A, (HIDDEN, 4), F16, 0),
                Q_B: info(Q_B, (4, HIDDEN), F16, A_BYTES // 2),
            },
            data=b"\0\x7c" + bytes(A_BYTES - 2),
        ),
        f"'{Q_A}' has NaN or Inf",
    ),
}


def place(tmp_path: Path, content: bytes) -> tuple[Path, Options]:
    base = problems.base_folder(tmp_path / "base", "llama", num_key_value_heads=2)
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    return path, Options(base=base)


def test_good_files_are_read(tmp_path: Path) -> None:
    path, options = place(tmp_path, GOOD)
    assert len(FORMATS["gguf"].read(path, options).tensors) == 2
    path.write_bytes(pair(V, (HIDDEN, 4), (4, 16)))
    assert len(FORMATS["gguf"].read(path, options).tensors) == 2


@pytest.mark.parametrize("name", FILES)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    content, says = FILES[name]
    path, options = place(tmp_path, content)
    assert FORMATS["gguf"].recognises(path) is (content[:4] == b"GGUF")
    message = refused(lambda: FORMATS["gguf"].read(path, options))
    assert str(path) in message
    assert any(one in message for one in says.split("|")), message


def test_a_header_longer_than_any_adapters_is_refused_unread(tmp_path: Path) -> None:
    path, options = place(tmp_path, packed(KEYS | {"x": key("x", STRING, text("y" * (9 << 20)))}))
    assert "an adapter's header is shorter" in refused(lambda: FORMATS["gguf"].read(path, options))


def test_a_terabyte_of_nothing_is_not_allocated(tmp_path: Path) -> None:
    path, options = place(tmp_path, with_info(Q_B, (1 << 20, 1 << 18), F32, A_BYTES))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 40) - A_BYTES)
    assert "'blk.0.attn_q.weight': .lora_a is" in refused(
        lambda: FORMATS["gguf"].read(path, options)
    )


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    path, options = place(tmp_path, GOOD)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "link.gguf").symlink_to(path)
    with pytest.raises(AdapterFileError, match="outside its folder"):
        FORMATS["gguf"].read(inner / "link.gguf", options)
    os.mkfifo(inner / "pipe.gguf")
    assert not FORMATS["gguf"].recognises(inner / "pipe.gguf")
    with pytest.raises(AdapterFileError, match="regular file"):
        FORMATS["gguf"].read(inner / "pipe.gguf", options)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"model_type": 3}', b'{"model_type": "llama", "num_hidden_layers": 1e9}'],
)
def test_damaged_configs_of_bases_are_refused(tmp_path: Path, content: bytes) -> None:
    path, options = place(tmp_path, GOOD)
    assert options.base is not None
    (options.base / "config.json").write_bytes(content)
    assert "config.json" in refused(lambda: FORMATS["gguf"].read(path, options))


def test_changed_bytes_are_read_or_refused(tmp_path: Path) -> None:
    """Whatever is changed in a file, it is read, or refused as an adapter's file is."""
    path, options = place(tmp_path, GOOD)
    assert options.base is not None
    base = Base.of(options.base)
    seed, read, head = random.Random(0), 0, len(GOOD) - len(DATA)
    values = (0, 1, 8, 9, 32, 127, 128, 255)
    for _ in range(3000):
        content = bytearray(GOOD)
        for _ in range(seed.choice((1, 1, 2, 8))):
            content[seed.randrange(head)] = seed.choice((*values, seed.randrange(256)))
        if seed.random() < 0.2:
            at = seed.randrange(head)
            content[at : at + seed.randrange(9)] = seed.randbytes(seed.randrange(9))
        path.write_bytes(content)
        try:
            read_adapter(path, base)
            read += 1
        except AdapterFileError as error:
            assert str(path) in str(error)
    assert 10 < read < 2000
