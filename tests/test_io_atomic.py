"""Saving an adapter's two files as one unit: killed, interrupted, out of space, or all at once."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_ext.errors import AdapterFileError
from lora_ext.io import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    TensorSpec,
    atomic,
    open_adapter,
    recover,
    save_adapter,
)
from lora_ext.io.adapter_folder import save_adapters
from lora_ext.io.atomic import JOURNAL

ELEMENTS = 30_000  # below what torch gives to threads, which a fork has not
EXPECTED = {"a": TensorSpec((ELEMENTS,)), "b": TensorSpec((3, 5))}
PAIR = [CONFIG_NAME, WEIGHTS_NAME]


def pair(version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Pair number `version`: each of the two files tells which it is."""
    value = float(version)
    tensors = {"a": torch.full((ELEMENTS,), value), "b": torch.full((3, 5), value)}
    return {"version": version, "peft_type": "LORA"}, tensors


def save(folder: Path, version: int) -> None:
    save_adapter(folder, *pair(version))


def load(folder: Path) -> int:
    """The version in the folder; fails on a mixed or incomplete pair."""
    with open_adapter(folder) as adapter:
        tensors = adapter.tensors(EXPECTED)
        version = adapter.config["version"]
    assert all(bool((tensor == version).all()) for tensor in tensors.values())
    return int(version)


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def in_child(body: Callable[[], None]) -> int:
    """Runs `body` in a fork, so that torch need not be imported again; returns the fork's id."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(0)
    return child


def test_200_kills_at_random_moments(tmp_path: Path) -> None:
    """After every kill: one complete pair, and never an older one than was acknowledged."""
    chance = random.Random(4)
    save(tmp_path, 0)
    start = time.perf_counter()
    save(tmp_path, 0)
    duration = time.perf_counter() - start
    left_behind = newer = 0
    version = 0
    for _ in range(200):
        read_end, write_end = os.pipe()

        def save_forever(last: int = version, acknowledge: int = write_end) -> None:
            os.write(acknowledge, last.to_bytes(8, "little"))  # it is about to begin
            for number in range(last + 1, last + 10_000):
                save(tmp_path, number)
                os.write(acknowledge, number.to_bytes(8, "little"))

        child = in_child(save_forever)
        os.read(read_end, 8)
        time.sleep(chance.uniform(0, 4 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            acknowledged = max([version, *(n for (n,) in _int64s(pipe.read()))])
        left_behind += listing(tmp_path) != PAIR
        loaded = load(tmp_path)
        assert loaded in (acknowledged, acknowledged + 1)
        newer += loaded > acknowledged
        version = loaded
    print(f"{version} saves, {left_behind} of 200 kills inside one, {newer} after its commit")
    assert version > 0 and left_behind > 20  # or the kills missed what they are for
    save(tmp_path, version + 1)
    assert load(tmp_path) == version + 1 and listing(tmp_path) == PAIR


def _int64s(content: bytes) -> Iterator[tuple[int]]:
    for i in range(0, len(content), 8):
        yield (int.from_bytes(content[i : i + 8], "little"),)


@contextmanager
def at_step(number: int, act: Callable[[], None], *, after: bool = False) -> Iterator[list[str]]:
    """Calls `act` before (or after) step `number` of those that write; yields all steps."""
    steps: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[0] & os.O_CREAT:
                return real(target, *args, **kwargs)
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
            steps.append(f"{name} {os.path.basename(path)}")
            mine = len(steps) - 1 == number
            if mine and not after:
                act()
            result = real(target, *args, **kwargs)
            if mine and after:
                act()
            return result

        return call

    names = ("open", "write", "fsync", "replace", "unlink")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, watched(name, getattr(os, name)))
        yield steps


def nothing() -> None:
    pass


def steps_of_a_save(folder: Path) -> list[str]:
    save(folder, 1)
    with at_step(-1, nothing) as steps:
        save(folder, 2)
    return steps


def test_steps_of_a_save(tmp_path: Path) -> None:
    """Content is synced before its commit, the commit before a rename, that before cleaning."""
    folder = tmp_path.name
    new = [atomic._staged(name) for name in (CONFIG_NAME, WEIGHTS_NAME, atomic.JOURNAL)]
    written = [f"{step} {name}" for name in new for step in ("open", "write", "fsync")]
    assert steps_of_a_save(tmp_path) == [
        f"open {atomic.LOCK}",
        *written,
        f"fsync {folder}",
        f"replace {new[2]}",
        f"fsync {folder}",
        f"replace {new[0]}",
        f"replace {new[1]}",
        f"fsync {folder}",
        f"unlink {atomic.JOURNAL}",
        f"fsync {folder}",
        f"unlink {atomic.LOCK}",
    ]


COMMIT = 12  # the index of the folder's sync after the journal's rename
STEPS = 19


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("step", range(STEPS))
def test_error_at_every_step(tmp_path: Path, step: int, code: int) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    save(tmp_path, 1)
    try:
        with at_step(step, fail) as steps:
            save(tmp_path, 2)
    except OSError as error:
        assert error.errno == code
        notes = getattr(error, "__notes__", [])
        if step <= COMMIT:
            assert load(tmp_path) == 1 and listing(tmp_path) == PAIR and not notes
        else:
            assert load(tmp_path) == 2 and "recover" in notes[0]
            recover(tmp_path)
            assert load(tmp_path) == 2 and listing(tmp_path) == PAIR
    else:
        assert steps[step] == f"unlink {atomic.LOCK}"  # harmless: the lock is free
        assert load(tmp_path) == 2
    save(tmp_path, 3)
    assert load(tmp_path) == 3 and listing(tmp_path) == PAIR


def test_two_folders_are_saved_or_neither(tmp_path: Path) -> None:
    """An error at every step: before the second commit both hold the old pair, later the new."""
    folders = [tmp_path / "one", tmp_path / "one" / "two"]

    def save_both(version: int) -> None:
        save_adapters((folder, *pair(version)) for folder in folders)

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    save_both(0)
    with at_step(-1, nothing) as steps:
        save_both(1)
    commits = [i for i, step in enumerate(steps) if step == f"replace {atomic._staged(JOURNAL)}"]
    assert len(commits) == 2 and commits[1] < steps.index(f"replace {atomic._staged(PAIR[0])}")
    for step in range(len(steps)):
        save_both(1)
        with at_step(step, fail) as seen, suppress(OSError):
            save_both(2)
        assert len(seen) > step
        versions = [load(folder) for folder in folders]
        assert versions == ([1, 1] if step <= commits[1] + 1 else [2, 2]), steps[step]
        for folder in folders:
            recover(folder)
        assert [load(folder) for folder in folders] == versions
        assert listing(folders[0]) == [*PAIR, "two"] and listing(folders[1]) == PAIR


@pytest.mark.parametrize("first", range(7))  # 4 new files, 3 writes
def test_disk_that_stays_full(tmp_path: Path, first: int) -> None:
    """Every write and new file fails from a step on; removing still works, as on a full disk."""
    save(tmp_path, 1)
    count = 0

    def full(real: Callable[..., Any], creates: bool) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if not creates or args[0] & os.O_CREAT:
                count += 1
                if count > first:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(target, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", full(os.open, True))
        patch.setattr(os, "write", full(os.write, False))
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2)
    assert load(tmp_path) == 1
    assert listing(tmp_path) == PAIR


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(STEPS))
def test_kill_at_every_step(tmp_path: Path, step: int, after: bool) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die() -> None:
        with at_step(step, kill, after=after):
            save(tmp_path, 2)

    save(tmp_path, 1)
    _, status = os.waitpid(in_child(save_and_die), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    committed = step > COMMIT - 1 or (step == COMMIT - 1 and after)  # the journal has its name
    assert load(tmp_path) == (2 if committed else 1)
    recover(tmp_path)
    assert load(tmp_path) == (2 if committed else 1)
    assert listing(tmp_path) == PAIR


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(COMMIT + 1, COMMIT + 5))
def test_kill_while_a_failed_commit_is_undone(tmp_path: Path, step: int, after: bool) -> None:
    """The journal goes before the files that it names."""

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die() -> None:
        with at_step(COMMIT, fail), at_step(step, kill, after=after):
            save(tmp_path, 2)

    save(tmp_path, 1)
    _, status = os.waitpid(in_child(save_and_die), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    loaded = load(tmp_path)
    assert loaded in (1, 2)
    recover(tmp_path)
    assert load(tmp_path) == loaded and listing(tmp_path) == PAIR


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1000]))
    save(tmp_path, 7)
    assert load(tmp_path) == 7


def test_first_save_that_fails_leaves_an_empty_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deep"

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with at_step(6, fail), pytest.raises(OSError, match="No space"):
        save(folder, 1)
    assert listing(folder) == []
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json and no adapter_model"):
        load(folder)
    save(folder, 2)
    assert load(folder) == 2


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_is_that_of_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        save(tmp_path, 1)
        os.chmod(tmp_path / CONFIG_NAME, 0o400)
        save(tmp_path, 2)
    finally:
        os.umask(old)
    modes = [os.stat(tmp_path / name).st_mode & 0o777 for name in PAIR]
    assert modes == [0o666 & ~umask] * 2


def test_other_files_stay(tmp_path: Path) -> None:
    for name in ("README.md", "tokenizer.json", ".hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / "other_adapter").mkdir()
    save(tmp_path, 1)
    kept = ["README.md", "other_adapter", "tokenizer.json", ".hidden"]
    assert listing(tmp_path) == sorted(kept + PAIR)
    assert (tmp_path / "README.md").read_text() == "README.md"


def test_link_is_replaced_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / WEIGHTS_NAME).symlink_to(target)
    save(folder, 1)
    assert load(folder) == 1 and target.read_text() == "precious"


def test_opened_pair_outlives_later_saves(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with open_adapter(tmp_path) as adapter:
        save(tmp_path, 2)
        assert adapter.config["version"] == 1
        assert bool((adapter.tensors(EXPECTED)["a"] == 1).all())
    assert load(tmp_path) == 2


def test_readers_beside_savers(tmp_path: Path) -> None:
    """Two processes save for two seconds, this one loads: never a mixed pair."""
    save(tmp_path, 0)

    def save_until(first: int) -> None:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            save(tmp_path, first)
            first += 1

    children = [in_child(lambda first=first: save_until(first)) for first in (1, 1_000_000)]
    seen: set[int] = set()
    loads = 0
    end = time.monotonic() + 2
    while time.monotonic() < end:
        seen.add(load(tmp_path))
        loads += 1
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    print(f"{loads} loads saw {len(seen)} pairs")
    assert len(seen) > 10
    assert listing(tmp_path) == PAIR


def test_threads_of_one_process_take_turns(tmp_path: Path) -> None:
    threads = [threading.Thread(target=save, args=(tmp_path, n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load(tmp_path) in range(8) and listing(tmp_path) == PAIR


def test_second_saver_gives_up_with_a_clear_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with atomic._locked(tmp_path, 1.0):
        with pytest.raises(TimeoutError, match=r"another process has been saving here for 0\.1 s"):
            save_adapter(tmp_path, {}, {}, lock_timeout=0.1)
        assert load(tmp_path) == 1  # loading needs no lock
    save(tmp_path, 2)
    assert load(tmp_path) == 2


def test_lock_whose_file_was_removed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a holder that ends between open and lock; a third saver would make a new file."""
    real, calls = atomic.fcntl.flock, 0

    def flock(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / atomic.LOCK).unlink()
        real(descriptor, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    with atomic._locked(tmp_path, 1.0):
        assert (tmp_path / atomic.LOCK).exists() and calls == 2


def kill_before_last_rename(folder: Path) -> None:
    """Leaves a committed save whose weights do not have their name yet."""

    def save_and_die() -> None:
        with at_step(COMMIT + 2, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            save(folder, 2)

    os.waitpid(in_child(save_and_die), 0)
    assert listing(folder) != PAIR


@pytest.mark.parametrize(
    "change",
    [lambda text: json.dumps({"version": 3}), lambda text: text.replace("2", "3")],
    ids=["longer or shorter", "same size"],
)
def test_folder_changed_by_another_program_after_a_kill(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    """What PEFT writes then is not mixed with the interrupted save's weights."""
    save(tmp_path, 1)
    kill_before_last_rename(tmp_path)
    content = (tmp_path / CONFIG_NAME).read_text()
    (tmp_path / CONFIG_NAME).write_text(change(content))
    with pytest.raises(
        AdapterFileError, match=r"adapter_config\.json: is not what the interrupted"
    ):
        load(tmp_path)
    save(tmp_path, 4)
    assert load(tmp_path) == 4 and listing(tmp_path) == PAIR


@pytest.mark.parametrize(
    "journal",
    [
        b"",
        b"[]",
        b'{"version": 2, "files": {}}',
        b'{"version": 1, "files": {"../../x": {"size": 1, "sha256": ""}}}',
        b'{"version": 1, "files": {"adapter_config.json": {"size": 1}}}',
        b'{"version": 1, "files": [1]}',
        b"[" * 100_000,
        b" " * 2_000_000,
    ],
    ids=["empty", "list", "version", "escape", "no digest", "no object", "deep", "long"],
)
def test_hostile_journal(tmp_path: Path, journal: bytes) -> None:
    save(tmp_path, 1)
    (tmp_path / atomic.JOURNAL).write_bytes(journal)
    with pytest.raises(AdapterFileError, match=r"\.lora_ext-save\.json"):
        load(tmp_path)
    save(tmp_path, 2)
    assert load(tmp_path) == 2 and listing(tmp_path) == PAIR


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc/x", "a\0b", atomic.JOURNAL])
def test_names_of_files_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterFileError, match="expected a file name without"):
        atomic.save_files(tmp_path, {name: b""})
    assert listing(tmp_path) == []


def test_recover_of_whole_folder_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = [(tmp_path / name).stat() for name in PAIR]
    recover(tmp_path)
    assert [(tmp_path / name).stat() for name in PAIR] == before
    assert listing(tmp_path) == PAIR
