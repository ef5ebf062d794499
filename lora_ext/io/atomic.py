"""A set of files in a folder, saved and opened as one unit.

PEFT reads an adapter from two files with fixed names, and no file system renames two files in one
step. So a save is a transaction with a journal that exists only while it runs:

1. every file is written under a hidden name beside its place, and synced;
2. a journal with the size and SHA-256 of each is written, synced and renamed into place; once the
   folder is synced the new files are what the folder holds (the commit);
3. each file is renamed to its name, the folder is synced, the journal is removed.

What is guaranteed between processes of one POSIX machine, on a local file system (a network file
system's caches may show another machine something else):

- `open_files` sees the files of one save, all old or all new, whatever moment a saver is killed at,
  also while savers run, also after a loss of power where the disk keeps what it has synced. It
  writes nothing and waits for nobody. With a journal there it opens a file under its hidden name
  if it still has it, and compares size and digest.
- `save_files` that returns: the new files are durable. One that raises: before the commit, the
  old files are untouched and nothing is left behind (if the disk does not even remove files, the
  next save does; until then `open_files` sees one complete set); after it (an I/O error while
  renaming or syncing; the error has a note that says so), the new files are what `open_files` sees.
- The next `save_files`, or `recover`, finishes or removes what a killed save has left.
- Savers exclude each other with a lock file, which is removed after the save.

Where the file system has no flock (some network and FUSE mounts), savers of one folder do not
exclude each other: give each a folder of its own. Where it cannot sync a folder or a file, a loss
of power may undo a save, or leave its journal beside older files, which loaders then refuse by
name. The rest holds there, too.

Not guaranteed: a program that opens the files by their names, as PEFT does, can meet one new and
one old file between the renames of step 3, or after a kill just there, until the next save or
`recover`. A program that writes the files without this module is not excluded.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_ext.arguments import as_number, as_path, check_mapping, names_of
from lora_ext.errors import AdapterFileError
from lora_ext.io.files import StrPath, naming, open_inside, parse_json, read_all

JOURNAL = ".lora_ext-save.json"
LOCK = ".lora_ext-save.lock"
STAGED_SUFFIX = ".lora_ext-new"
JOURNAL_LIMIT = 1 << 20  # bytes
ATTEMPTS = 1000  # each failed one needs a whole save in between

# What a file system answers that has no such call.
NOT_THERE = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})

Journal = dict[str, dict[str, Any]]  # name -> {"size": bytes, "sha256": hex digits}


def save_files(folder: StrPath, files: Mapping[str, bytes], *, lock_timeout: float = 60.0) -> None:
    """Writes `files` (name to content) into `folder` as one unit; see the module's guarantee.

    Other files of the folder stay as they are; the folder is made if there is none. Files get the
    mode 0666 & ~umask. A link under one of the names is replaced, not followed.

    Args:
        lock_timeout: seconds to wait for another saver of the same folder.

    Raises:
        AdapterFileError: a name that is not a plain one.
        TimeoutError: another process kept saving for `lock_timeout` seconds; nothing was changed.
        NotADirectoryError: the folder, or one above it, is a file.
        OSError: a full disk, a folder that cannot be written, or any other error of the system.
    """
    save_folders([(folder, files)], lock_timeout=lock_timeout)


def save_folders(
    saves: Iterable[tuple[StrPath, Mapping[str, bytes]]], *, lock_timeout: float = 60.0
) -> None:
    """`save_files` of several folders, of which none is changed if one cannot be written. Each is
    a unit by itself: a kill between their commits leaves some of them new and some old.

    Args:
        saves: folder and files, all different folders; taken one by one, as they are written.
    """
    lock_timeout = as_number(lock_timeout, "save_files", "lock_timeout", "seconds")
    written: list[tuple[Path, list[str]]] = []
    with ExitStack() as locks:
        try:
            for place, files in saves:
                folder = as_path(place, "save_files")
                _check_files(folder, files)
                _make_folder(folder)
                locks.enter_context(_locked(folder, lock_timeout))
                _finish_or_discard(folder)
                written.append((folder, list(files)))
                _stage(folder, files)
            for folder, _ in written:
                _commit(folder)
        except BaseException:
            # The files under their own names are untouched; what cannot be removed now is by the
            # next save.
            for folder, _ in written:
                with suppress(OSError):
                    _discard(folder)
            raise
        failed: OSError | None = None
        for folder, names in written:
            try:
                _move_into_place(folder, names)
            except OSError as error:
                error.add_note(
                    f"{folder}: the new files are saved and lora_ext loads them, but perhaps not "
                    "all have their names yet; the next save or lora_ext.io.recover(folder) "
                    "finishes it"
                )
                failed = failed or error
        if failed is not None:
            raise failed


def _check_files(folder: Path, files: Mapping[str, bytes]) -> None:
    check_mapping("save_files", "files", files, bytes | bytearray | memoryview, "bytes")
    for name in files:
        if not _is_plain(name):
            raise AdapterFileError(
                f"{folder}: got the name {name!r}, expected a file name without '/' or leading '.'"
            )


def recover(folder: StrPath, *, lock_timeout: float = 60.0) -> None:
    """Finishes or removes what a killed save has left, so that other programs see whole files too.

    Errors as `save_files`.
    """
    folder = as_path(folder, "recover")
    with _locked(folder, as_number(lock_timeout, "recover", "lock_timeout", "seconds")):
        _finish_or_discard(folder)


def open_files(folder: StrPath, names: Iterable[str]) -> dict[str, io.FileIO]:
    """Opens files of `folder` for reading, all of them as one save has left them.

    Returns:
        name to open file, to be closed by the caller; a later save does not change what they hold.

    Raises:
        FileNotFoundError: one of them is missing.
        AdapterFileError: one is no regular file inside the folder, or an interrupted save does not
            fit the files, because another program has changed them since.
    """
    folder, names = as_path(folder, "open_files"), tuple(names_of(names, "open_files", "names"))
    for _ in range(ATTEMPTS):
        with ExitStack() as stack:
            opened = _open_unchanged(stack, folder, names)
            if opened is not None:
                stack.pop_all()
                return opened
    raise AdapterFileError(
        f"{folder}: its files keep changing; load again when the savers have ended"
    )


def _open_unchanged(
    stack: ExitStack, folder: Path, names: tuple[str, ...]
) -> dict[str, io.FileIO] | None:
    """The files, or None if a saver came between.

    Why that is enough: a file that is open keeps its inode number from being given again. If the
    journal is the same before and after (or there is none), and then every name still leads to
    the file that was opened, the files were all in place at the moment of the second look.
    """
    journal_file = _open_or_none(folder, JOURNAL)
    journal: Journal = {}
    if journal_file is not None:
        stack.enter_context(journal_file)
        journal = _parse_journal(journal_file)
    opened: dict[str, io.FileIO] = {}
    staged: set[str] = set()
    for name in names:
        file = _open_or_none(folder, _staged(name)) if name in journal else None
        if file is not None:
            staged.add(name)
        else:
            file = _open_or_none(folder, name)
        if file is not None:
            opened[name] = stack.enter_context(file)
    if not _still_names(folder, JOURNAL, journal_file):
        return None
    if not all(_still_names(folder, n, opened.get(n)) for n in names if n not in staged):
        return None
    for name in names:
        if name not in opened:
            raise FileNotFoundError(f"{folder}: has no file {name!r}")
        if name in journal and not _matches(opened[name], journal[name]):
            raise AdapterFileError(
                f"{folder / name}: is not what the interrupted save recorded in {JOURNAL}; another "
                f"program has changed the folder since; save again, or delete {JOURNAL} to keep "
                "the files as they are"
            )
    return opened


def _still_names(folder: Path, name: str, file: io.FileIO | None) -> bool:
    """Whether folder/name is still the open file, or still missing for None."""
    try:
        now = os.stat(folder / name)
    except FileNotFoundError:
        return file is None
    return file is not None and os.path.samestat(now, os.fstat(file.fileno()))


def _open_or_none(folder: Path, name: str) -> io.FileIO | None:
    try:
        return open_inside(folder, name)
    except FileNotFoundError:
        return None


def _is_plain(name: str) -> bool:
    return name != "" and not name.startswith(".") and "/" not in name and "\0" not in name


def _staged(name: str) -> str:
    return f".{name}{STAGED_SUFFIX}"


def _stage(folder: Path, files: Mapping[str, bytes]) -> None:
    """Step 1 of the module's text, and the journal under its hidden name."""
    journal: Journal = {}
    for name, content in files.items():
        _write_new(folder / _staged(name), content)
        journal[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write_new(folder / _staged(JOURNAL), json.dumps({"version": 1, "files": journal}).encode())
    _sync_folder(folder)  # the journal must not survive a loss of power without what it names


def _commit(folder: Path) -> None:
    """Step 2."""
    os.replace(folder / _staged(JOURNAL), folder / JOURNAL)
    _sync_folder(folder)


def _move_into_place(folder: Path, names: Iterable[str]) -> None:
    """Step 3; may have been begun by another process."""
    for name in names:
        with suppress(FileNotFoundError):
            os.replace(folder / _staged(name), folder / name)
    _sync_folder(folder)
    os.unlink(folder / JOURNAL)
    _sync_folder(folder)


def _discard(folder: Path) -> None:
    """Removes what a save has left before its commit. Needs the lock."""
    # The journal first: once it is there, its files are the folder's.
    if (folder / JOURNAL).exists():
        os.unlink(folder / JOURNAL)
        _sync_folder(folder)
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith(STAGED_SUFFIX):
            os.unlink(folder / name)


def _finish_or_discard(folder: Path) -> None:
    """After a killed save: step 3 if it had committed, else away with its files. Needs the lock."""
    try:
        with ExitStack() as stack:
            journal_file = _open_or_none(folder, JOURNAL)
            journal: Journal = {}
            if journal_file is not None:
                journal = _parse_journal(stack.enter_context(journal_file))
            for name, recorded in journal.items():
                file = _open_or_none(folder, _staged(name)) or _open_or_none(folder, name)
                if file is None or not _matches(stack.enter_context(file), recorded):
                    journal = {}
                    break
    except AdapterFileError:
        journal = {}
    # A journal that does not fit was followed by another program's save: that one counts.
    if journal:
        _move_into_place(folder, journal)
    _discard(folder)


def _parse_journal(file: io.FileIO) -> Journal:
    """The journal's files, checked: it may come from whoever made the folder."""
    content = parse_json(read_all(file, JOURNAL_LIMIT), file.name)
    files: Any = content.get("files")
    well_formed = (
        content.get("version") == 1
        and isinstance(files, dict)
        and all(
            _is_plain(name) and isinstance(recorded, dict) and recorded.keys() == {"size", "sha256"}
            for name, recorded in files.items()
        )
    )
    if not well_formed:
        raise AdapterFileError(
            f"{file.name}: is not a journal of this version; delete it if the files are right"
        )
    result: Journal = files
    return result


def _matches(file: io.FileIO, recorded: dict[str, Any]) -> bool:
    if os.fstat(file.fileno()).st_size != recorded["size"]:
        return False
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return bool(digest == recorded["sha256"])


def _make_folder(folder: Path) -> None:
    """mkdir -p, durably."""
    if folder.is_dir():
        return
    if folder.exists() or folder.is_symlink():
        raise NotADirectoryError(
            errno.ENOTDIR,
            "is there and is no folder, expected one, or a name that is free",
            str(folder),
        )
    _make_folder(folder.parent)
    with suppress(FileExistsError):  # made by another saver meanwhile
        os.mkdir(folder)
    _sync_folder(folder.parent)


@contextmanager
def _locked(folder: Path, timeout: float) -> Iterator[None]:
    """Excludes other savers of the folder. A killed one's lock ends with its process."""
    path, deadline, held = folder / LOCK, time.monotonic() + timeout, False
    while True:
        with _open_lock(path, folder) as file:
            with suppress(BlockingIOError, FileNotFoundError):
                _lock(file.fileno())
                # The last holder may have removed the file that was opened here.
                held = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            if held:
                try:
                    yield
                finally:
                    with suppress(OSError):
                        os.unlink(path)
                return
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{folder}: another process has been saving here for {timeout:g} s; "
                "save when it has ended, or give each process its own folder"
            )
        time.sleep(0.002)


def _open_lock(path: Path, folder: Path) -> io.FileIO:
    """An object, which is closed with its last reference: a number that Ctrl-C leaves nobody with
    would keep the lock in this process."""
    try:
        return io.FileIO(path, "r+", opener=_open_or_make)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"{error.strerror}: nothing was changed; save into a folder you can write to"
            raise type(error)(error.errno, text, str(folder)) from error
        raise


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _lock(descriptor: int) -> None:
    """BlockingIOError if another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise


def _write_new(path: Path, content: bytes) -> None:
    """A new file, synced. The kernel applies the umask."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o666)
    try:
        with naming(path):
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)
