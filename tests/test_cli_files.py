"""`lora-ext` on damaged and hostile folders: one sentence, in time and little memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import Run, failed, run
from measured import MAX_BYTES, attempt
from safetensors.torch import save_file
from test_io_hostile import CONFIG, CONTENTS, ENTRIES, FOLDERS, SPARSE, A, B, pack, rank

from lora_ext.io import CONFIG_NAME, WEIGHTS_NAME, new_folder, open_tensors

MAX_SECONDS = 2.0  # with the imports of a command
# What only a model, or the expectation that those tests have, tells to be wrong.
SOUND = {"transposed"}


def adapter(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / CONFIG_NAME).write_bytes(CONFIG)
    (folder / WEIGHTS_NAME).write_bytes(content)
    return folder


def check(found: Run, codes: tuple[int, ...]) -> None:
    assert found.code in codes and "Traceback" not in found.out + found.err
    if found.code == 1 and not found.out:
        (sentence,) = found.err.splitlines()
        assert sentence.startswith("lora-ext: ") and len(sentence) < 1000 and sentence.isprintable()


@pytest.mark.parametrize("case", CONTENTS)
def test_damaged_weights(tmp_path: Path, case: str) -> None:
    folder = adapter(tmp_path / "adapter", CONTENTS[case][0])
    found = run("verify", folder)
    check(found, (0,) if case in SOUND else (1,))
    assert all(line.isprintable() for line in found.out.splitlines())
    check(run("inspect", folder), (0, 1))
    check(run("diff", folder, folder), (0, 1))
    check(run("convert", folder, tmp_path / "out"), (0, 1))
    base = tmp_path / "base.safetensors"
    save_file({"q.weight": torch.ones(6, 8)}, base)
    check(run("merge", base, folder, tmp_path / "merged"), (1,))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("case", FOLDERS)
def test_damaged_folders(tmp_path: Path, case: str) -> None:
    make, name, says = FOLDERS[case]
    folder = adapter(tmp_path / "adapter", pack(ENTRIES))
    if not case.startswith("config"):
        (folder / WEIGHTS_NAME).unlink()
    make(folder)
    for command in (
        ("verify", folder),
        ("inspect", folder),
        ("diff", folder, folder),
        ("convert", folder, tmp_path / "out"),
    ):
        found = run(*command)
        text = found.out + found.err
        check(found, (1,))
        assert name in text and says in text, command
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", sorted(SPARSE.keys() - {"rank 2^28"}))
def test_huge_files(tmp_path: Path, case: str) -> None:
    start, size, _ = SPARSE[case]
    folder = adapter(tmp_path / "adapter", start)
    os.truncate(folder / WEIGHTS_NAME, size)
    for command in ("verify", "inspect"):
        bounded(lambda command=command: check(run(command, folder), (1,)))  # type: ignore[misc]


def bounded(call: Callable[[], None]) -> None:
    run("inspect", "/nowhere")  # what it imports is not its own
    outcome = min((attempt(call) for _ in range(2)), key=lambda one: one.seconds)
    assert outcome.error == "", outcome
    assert outcome.seconds < MAX_SECONDS and outcome.extra_bytes < MAX_BYTES, outcome


def test_large_tensors_are_read_in_blocks(tmp_path: Path) -> None:
    """300 MB, of which no more than some blocks are in memory; and a terabyte is not converted."""
    header = pack(rank(5_500_000), b"")
    folder = adapter(tmp_path / "adapter", header)
    os.truncate(folder / WEIGHTS_NAME, len(header) + 5_500_000 * 56)

    def call() -> None:
        found = run("inspect", folder, "--json").json()
        assert found["bytes"] == 5_500_000 * 56 and found["ranks"] == {"5500000": 1}

    outcome = attempt(call, patience=60)
    assert outcome.error == "" and outcome.extra_bytes < MAX_BYTES, outcome
    header = pack(rank(2**34), b"")
    (folder / WEIGHTS_NAME).write_bytes(header)
    os.truncate(folder / WEIGHTS_NAME, len(header) + 2**34 * 56)
    said = failed("convert", folder, tmp_path / "out", code=2)
    assert "GiB of memory" in said and not (tmp_path / "out").exists()


def test_longest_header(tmp_path: Path) -> None:
    """8 MiB of brackets without a tensor in them: refused in ten times their memory."""
    filling = b"{},                 "
    folder = adapter(
        tmp_path / "adapter", pack(b'{"a": [' + filling * ((8 << 20) // len(filling) - 4) + b"0]}")
    )
    outcome = attempt(lambda: check(run("verify", folder), (1,)))
    assert outcome.error == "" and outcome.seconds < MAX_SECONDS, outcome
    assert outcome.extra_bytes < 10 * (8 << 20), outcome
    (folder / WEIGHTS_NAME).write_bytes(pack(b'{"a": [' + filling * (1 << 20) + b"0]}"))
    assert "expected at most" in failed("inspect", folder)


def test_control_sequences_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", pack({"\x1b[2Jq\nok": ENTRIES[A], B: ENTRIES[B]}))
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 4, "bias": "\x1b[31m"}))
    for command in ("inspect", "verify"):
        found = run(command, folder)
        assert "?[2Jq?ok" in found.out and "\x1b" not in found.out + found.err


def test_tensor_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12.0).reshape(3, 4),
        "b": torch.zeros(0, 3, dtype=torch.bfloat16),
        "c": torch.tensor(7),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    with open_tensors(tmp_path / "t.safetensors") as file:
        assert file.specs.keys() == tensors.keys()
        for key, tensor in tensors.items():
            found = file.tensor(key)
            assert torch.equal(found, tensor) and found.dtype == tensor.dtype
            blocks = list(file.blocks(key, elements=5))
            assert all(0 < len(block) <= 5 for block in blocks)
            assert torch.equal(torch.cat([*blocks, tensor.new_empty(0)]), tensor.reshape(-1))
            assert file.bytes_of(key) == tensor.nbytes


def test_new_folder(tmp_path: Path) -> None:
    place = tmp_path / "above" / "folder"
    with new_folder(place) as folder:
        (folder / "file").write_text("x")
        (folder / "inner").mkdir()
        assert not place.exists()
    assert (place / "file").read_text() == "x" and (place / "inner").is_dir()
    umask = os.umask(0o022)
    os.umask(umask)
    assert place.stat().st_mode & 0o777 == 0o777 & ~umask
    assert (place / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(FileExistsError, match="is there already"), new_folder(place):
        pass
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").touch()
        # Another writer of the same place: the first that ends has it, the other leaves nothing.
        with pytest.raises(FileExistsError), new_folder(tmp_path / "empty") as other:
            assert folder.exists() and other != folder
            (tmp_path / "empty" / "of somebody").touch()
        (tmp_path / "empty" / "of somebody").unlink()
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["file"]
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "never") as folder:
        raise ZeroDivisionError
    inside = place / "file" / "inside" / "of a file"
    with pytest.raises(NotADirectoryError, match="is no folder") as caught, new_folder(inside):
        pass
    assert caught.value.filename == str(place / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["above", "empty"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("q.weight", "q"), "is a tensor and a module|is no name that a module can have"),
        (("q.weight", "a", "a.b"), "is a tensor and a module|is no name that a module can have"),
        (("q.weight", "a..b"), "is no name that a module can have"),
        (("q.weight", "forward.weight"), "is no name that a module can have"),
        (("r.weight",), "has no tensor 'q.weight'"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, tuple) else "",
)
def test_names_that_no_model_can_have(tmp_path: Path, names: tuple[str, ...], says: str) -> None:
    folder = adapter(tmp_path / "adapter", pack(ENTRIES))
    base = tmp_path / "base.safetensors"
    save_file({name: torch.ones(6, 8) for name in names}, base)
    assert re.search(says, failed("merge", base, folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_shapes_that_do_not_tell_a_layer(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", pack(ENTRIES))
    base = tmp_path / "base.safetensors"
    save_file({"q.weight": torch.ones(3, 6, 8)}, base)
    assert "one cannot tell" in failed("merge", base, folder, tmp_path / "out")
