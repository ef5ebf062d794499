"""What the readers share: opening a file that has to lie in a folder, and strict JSON."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NoReturn

from lora_ext.arguments import as_path, refuse
from lora_ext.errors import AdapterFileError

StrPath = str | os.PathLike[str]
MAX_DEPTH = 32  # of brackets in JSON


def inside(folder: StrPath, name: str) -> Path:
    """The path of `name` in `folder`, links resolved; it need not exist.

    Raises:
        AdapterFileError: the name is empty or absolute, has `..` in it, or is a link that leaves
            the folder, other than to the files of the same repository in the cache of the Hugging
            Face hub.
    """
    folder = as_path(folder, "inside")
    if not isinstance(name, str):
        refuse("inside", "name", name, "a text")
    pure = PurePath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise AdapterFileError(
            f"{folder}: got the name {name!r}, expected one inside this folder, without '..'"
        )
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(root) and path.parent not in _blobs(root):
        raise AdapterFileError(
            f"{Path(folder, name)}: is a link to {path}, outside its folder; "
            "put a copy of the file into the folder"
        )
    return path


def _blobs(folder: Path) -> list[Path]:
    """Where the Hugging Face cache keeps the files that it links from a folder: `blobs` beside the
    `snapshots` that the folder is in."""
    return [
        snapshots.parent / "blobs"
        for revision, snapshots in itertools.pairwise((folder, *folder.parents))
        if snapshots.name == "snapshots"
    ]


def open_inside(folder: StrPath, name: str) -> io.FileIO:
    """Opens the regular file `name` of `folder` for reading, without a buffer.

    Raises:
        FileNotFoundError: there is none.
        AdapterFileError: see `inside`; or it is no regular file (a pipe is not waited for).
    """
    # The folder may be changed by an enemy between the check and the open only as far as its last
    # component, and O_NOFOLLOW refuses a link that appears there.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(inside(folder, name), flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterFileError(f"{Path(folder, name)}: expected a regular file")
    file = io.FileIO(descriptor, "rb")
    file.name = str(Path(folder, name))
    return file


@contextmanager
def typed_errors(path: StrPath) -> Iterator[None]:
    """Turns the operating system's errors on `path` into `AdapterFileError`."""
    try:
        yield
    except OSError as error:
        raise AdapterFileError(
            f"{path}: cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error


@contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """Gives the operating system's errors on writing, such as on a full disk, the file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        code = errno.EIO if error.errno is None else error.errno  # numpy has none
        raise OSError(code, error.strerror or str(error), os.fspath(path)) from error


def read_all(file: io.FileIO, limit: int) -> bytes:
    """The whole file, refused unread when it is longer than `limit` bytes."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise AdapterFileError(f"{file.name}: has {size} bytes, expected at most {limit}")
    file.seek(0)
    return read_exactly(file, size)


def read_exactly(file: io.FileIO, size: int) -> bytes:
    """The next `size` bytes.

    Raises:
        AdapterFileError: the file ends before.
    """
    content = bytearray(size)
    read_into(file, memoryview(content))
    return bytes(content)


def read_into(file: io.FileIO, buffer: memoryview) -> None:
    """Fills the buffer with the next bytes; errors as `read_exactly`."""
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])
        if not count:
            raise AdapterFileError(
                f"{file.name}: ends {len(buffer) - filled} bytes too early; copy it again"
            )
        filled += count


def parse_json(content: bytes, what: str) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no key twice, no NaN or Infinity, few brackets, at most
    MAX_DEPTH levels.

    Python spends 100 bytes and more on an array or object that takes 2 in the file; real headers
    and configurations have one in 20 bytes.

    Raises:
        AdapterFileError: anything else; the message starts with `what`.
    """
    if content.count(b"{") + content.count(b"[") > 64 + len(content) // 20:
        raise AdapterFileError(f"{what} is nothing but brackets; the file is damaged")
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{what} is {type(value).__name__} in JSON, expected an object")
    if _is_deep(value):
        raise AdapterFileError(f"{what} is nested deeper than {MAX_DEPTH} levels")
    return value


def json_text(values: Mapping[str, Any]) -> str:
    """PEFT's layout: fields sorted, two spaces, sets as lists (sorted: PEFT's order is random).
    Within a field the order stays: the first key of a rank_pattern that matches counts.

    Raises:
        TypeError, ValueError: a value has no JSON form.
    """
    ordered = {name: values[name] for name in sorted(values)}
    return json.dumps(ordered, indent=2, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"config: got {type(value).__name__} {value!r}, expected what JSON can hold")


def _is_deep(value: dict[str, Any]) -> bool:
    """Deep values would overflow the stack of what copies or prints them later."""
    level: list[dict[str, Any] | list[Any]] = [value]
    for _ in range(MAX_DEPTH):
        children = (it.values() if isinstance(it, dict) else it for it in level)
        level = [it for group in children for it in group if isinstance(it, (dict, list))]
    return bool(level)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {short(key)} is there twice")
            seen.add(key)
    for key in result:
        key.encode()  # half a surrogate pair is no name
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def short(text: str) -> str:
    """Quoted for a message, cut where it is absurdly long."""
    return repr(text) if len(text) <= 200 else repr(text[:200]) + "..."
