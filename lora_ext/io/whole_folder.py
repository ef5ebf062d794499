"""A folder that is there whole or not at all: for what is too large to be held in memory as the
files of `save_files` are.

The files are written into a hidden folder beside the place, synced, and the folder is renamed into
the place, which is one step. A killed writer leaves the hidden folder, which the next one of the
same place removes: it can tell, as the lock that a writer has on its hidden folder ends with its
process. One of the same work (`resumed_folder`) continues with the files that are finished in it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_ext.arguments import as_path
from lora_ext.io.files import StrPath

SUFFIX = ".lora_ext-new-"


@contextmanager
def new_folder(place: StrPath) -> Iterator[Path]:
    """A folder to write files into, which becomes `place` when the `with` block ends, and is
    removed if an exception ends it.

    Raises:
        FileExistsError: `place` is there and is no empty folder; also when it appears meanwhile.
        NotADirectoryError: a part of its path is a file.
        OSError: it cannot be written.
    """
    place = _free_place(place, "new_folder")
    _remove_left_behind(place)
    folder = Path(tempfile.mkdtemp(prefix=f".{place.name}{SUFFIX}", dir=place.parent))
    descriptor = -1
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
        _appear(folder, place)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def resumed_folder(place: StrPath, work: str) -> Iterator[Path]:
    """As `new_folder`, but what a writer of the same work has left is kept: files under names that
    do not begin with a dot are finished (`finished_file`). It stays when the process is killed, and
    is removed if an exception ends the block.

    Args:
        work: what is written, and from what, as hexadecimal digits: a digest of all that says so.

    Raises:
        FileExistsError: `place` is there, as for `new_folder`; or another process is at this work.
    """
    place = _free_place(place, "resumed_folder")
    folder = place.parent / f".{place.name}{SUFFIX}{work}"
    _remove_left_behind(place, but=folder)
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            text = "is another user's, whose files are not taken for one's own; delete it"
            raise PermissionError(errno.EACCES, text, str(folder))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                text = "is being written by another process; wait for it"
                raise FileExistsError(errno.EEXIST, text, str(place)) from error
        for path in folder.glob(".*"):  # was being written
            path.unlink()
        try:
            yield folder
            _appear(folder, place)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


@contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write a file under, which gets its own when the block ends:
    with all of it on the disk."""
    hidden = path.with_name(f".{path.name}")
    yield hidden
    _sync(hidden)
    os.replace(hidden, path)
    _sync(path.parent)


def _free_place(place: StrPath, where: str) -> Path:
    place = Path(os.path.abspath(as_path(place, where, "place")))
    check_free(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _appear(folder: Path, place: Path) -> None:
    # The usual modes: what mkdtemp makes, and safetensors writes, is for its owner alone.
    usual = ~_umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & usual)
        _sync(path)
    try:
        os.rename(folder, place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise _taken(place) from error
    _sync(place.parent)


def check_free(place: StrPath) -> None:
    """FileExistsError if there is something, NotADirectoryError if it would be inside of a file:
    before long work is begun for it."""
    place = Path(place)
    if place.is_symlink() or (place.exists() and not (place.is_dir() and not any(place.iterdir()))):
        raise _taken(place)
    above = next(one for one in Path(os.path.abspath(place)).parents if os.path.lexists(one))
    if not above.is_dir():
        text = "is there and is no folder, expected one, or a name that is free"
        raise NotADirectoryError(errno.ENOTDIR, text, str(above))


def _taken(place: Path) -> FileExistsError:
    text = "is there already, expected a name that is free, or an empty folder"
    return FileExistsError(errno.EEXIST, text, str(place))


def _remove_left_behind(place: Path, but: Path | None = None) -> None:
    for folder in place.parent.iterdir():
        if folder == but or not folder.name.startswith(f".{place.name}{SUFFIX}"):
            continue
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _umask() -> int:
    """Linux tells it without changing it."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system that cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
