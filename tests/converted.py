"""What the tests of converted formats share: files, round trips, files that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from measured import refused
from safetensors.torch import load_file, save, save_file

from lora_ext import LoraModel
from lora_ext.io.convert import convert

Tensors = dict[str, torch.Tensor]
TOLERANCE = 1e-6  # of outputs in float32, against those of the source's formula in float64


def values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Trained values: of neither factor zero."""
    random = torch.Generator().manual_seed(seed)
    return (0.3 * torch.randn(*shape, generator=random)).to(dtype)


def write(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata=metadata or None)
    return path


def same(found: Tensors, expected: Mapping[str, torch.Tensor]) -> None:
    """The same keys, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        mine, theirs = (
            one.contiguous().reshape(-1).view(torch.uint8) for one in (found[key], tensor)
        )
        assert torch.equal(mine, theirs), key


def round_trip(
    folder: Path,
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    back: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """The file → PEFT → the file again, byte for byte; returns the folder of PEFT's."""
    path = write(folder / "source.safetensors", tensors)
    convert(path, folder / "peft", source=kind, **options)
    again = folder / "again.safetensors"
    convert(folder / "peft", again, target=kind, **(options if back is None else back))
    same(load_file(again), tensors)
    return folder / "peft"


def loaded(model: torch.nn.Module, folder: Path) -> LoraModel:
    """The model with the adapter in a folder, in eval mode."""
    return LoraModel.from_pretrained(model, folder).eval()


def loaded_by_peft(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The same, by PEFT."""
    import pytest

    peft = pytest.importorskip("peft")
    found: torch.nn.Module = peft.PeftModel.from_pretrained(model, folder).eval()
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the tolerance of the largest value."""
    expected = expected.detach()
    scale = max(1.0, float(expected.abs().max()))
    error = float((found.detach().double() - expected).abs().max())
    assert expected.dtype == torch.float64 and error <= TOLERANCE * scale, error / scale


def without(tensors: Tensors, *keys: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


def pack(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    """A file with this header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def containers(tensors: Tensors, key: str) -> dict[str, tuple[bytes, str]]:
    """Files that are no whole safetensors file, and what a refusal names: `key` where it is that
    tensor's fault."""
    good = save(tensors)
    length = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]

    def changed(**fields: Any) -> bytes:
        return pack(header | {key: {**header[key], **fields}}, data)

    begin, end = header[key]["data_offsets"]
    nan = {**tensors, key: torch.full_like(tensors[key], torch.nan)}
    inf = {**tensors, key: tensors[key].clone().index_fill(0, torch.tensor([0]), torch.inf)}
    return {
        "empty": (b"", ""),
        "7 bytes": (b"\1" * 7, ""),
        "cut in the header": (good[:40], ""),
        "length 2^63": (pack(header, data, 2**63), ""),
        "header is an array": (pack(b"[]", b""), ""),
        "header is open": (pack(b'{"a": ', b""), ""),
        "nothing but brackets": (pack(b'{"a": ' + b"[" * 100_000, b""), ""),
        "web page": (b"<!DOCTYPE html>", ""),
        "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid ", ""),
        "a zip": (b"PK\3\4" + bytes(60), ""),
        "a pickle": (b"\x80\x02}q\x00." + bytes(60), ""),
        "no tensor": (pack(b"{}", b""), ""),
        "a byte too many": (good + b"x", ""),
        "metadata of numbers": (pack({"__metadata__": {"a": 1}} | header, data), ""),
        "data cut": (pack(header, data[:-1]), ""),
        "no shape": (pack(header | {key: {"dtype": "F32"}}, data), key),
        "dtype unknown": (changed(dtype="F4"), key),
        "size negative": (changed(shape=[-1, 4]), key),
        "size 2^62": (changed(shape=[2**62, 2**62]), key),
        "more than the data": (changed(data_offsets=[begin, end + (1 << 40)]), key),
        "offsets reversed": (changed(data_offsets=[end, begin]), key),
        "shape of other bytes": (changed(shape=[1, 1]), key),
        "NaN": (save(nan), key),
        "Inf": (save(inf), key),
        "integers": (save({**tensors, key: tensors[key].int()}), key),
        "no elements": (save({**tensors, key: tensors[key][:0]}), key),
        "three dimensions": (save({**tensors, key: tensors[key][..., None]}), key),
        "a row less": (save({**tensors, key: tensors[key][:-1].clone()}), key),
        "is missing": (save(without(tensors, key)), ""),
    }


def refuses(folder: Path, kind: str, content: bytes, names: str, **options: Any) -> str:
    """The message of a file that is refused, fast, in little memory, by its name."""
    path = folder / "hostile.safetensors"
    path.write_bytes(content)
    said = refused(lambda: convert(path, folder / "out", source=kind, **options))
    assert str(path) in said and names in said, said
    assert not (folder / "out").exists()
    return said


def refuses_to_write(action: Callable[[], object], *names: str) -> None:
    import pytest

    from lora_ext.errors import AdapterFileError

    with pytest.raises(AdapterFileError) as caught:
        action()
    for name in names:
        assert name in str(caught.value), caught.value
