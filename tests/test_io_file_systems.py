"""Saving where a call is missing, forbidden, or the folder is none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_ext.io import CONFIG_NAME, WEIGHTS_NAME, atomic, open_adapter, recover, save_adapter

PAIR = [CONFIG_NAME, WEIGHTS_NAME]
MISSING = {"ENOLCK": errno.ENOLCK, "ENOTSUP": errno.ENOTSUP, "EINVAL": errno.EINVAL}


def save(folder: Path, r: int) -> None:
    save_adapter(folder, {"r": r}, {"w": torch.full((3,), float(r))})


def saved(folder: Path) -> int:
    with open_adapter(folder) as files:
        return files.config["r"]  # type: ignore[no-any-return]


def fails(number: int) -> Any:
    def call(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("call", ["flock", "fsync"])
@pytest.mark.parametrize("name", MISSING)
def test_without_a_call(
    call: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = atomic.fcntl if call == "flock" else atomic.os
    monkeypatch.setattr(owner, call, fails(MISSING[name]))
    for r in (1, 2):
        save(tmp_path / "new" / "folder", r)
        assert saved(tmp_path / "new" / "folder") == r
    recover(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == PAIR


@pytest.mark.parametrize("call", ["flock", "fsync"])
def test_other_errors_are_raised(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    owner = atomic.fcntl if call == "flock" else atomic.os
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(owner, call, fails(errno.EIO))
        save(tmp_path, 2)
    assert saved(tmp_path) == 1


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_a_path_that_is_a_file(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is there and is no folder") as raised:
        save(tmp_path / "file" / below, 1)
    assert str(tmp_path / "file") in str(raised.value)
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=["EACCES", "EROFS"])
def test_a_folder_that_cannot_be_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    real = os.open

    def read_only(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *mode)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="nothing was changed") as got:
        patch.setattr(atomic.os, "open", read_only)
        save(tmp_path, 2)
    assert got.value.errno == number and got.value.filename == str(tmp_path)
    assert saved(tmp_path) == 1 and sorted(os.listdir(tmp_path)) == PAIR
