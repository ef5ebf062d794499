"""What the names and regular expressions of a LoraConfig mean, in bounded time: a config may come
from anyone, and an expression can take for ever on one name.

Names are looked up. Expressions are matched by `regex`, which agrees with `re` on what both take,
knows what a linear-time engine cannot (lookahead, backreferences: common in PEFT's configs), and
stops when it is told to.
"""

from __future__ import annotations

import gc
import itertools
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar, copy_context
from functools import cached_property, lru_cache
from typing import Any, NoReturn, TypeVar

# PEFT's. `%s` is the pattern from the config; it is not escaped there either, so a dot in a plain
# name stands for any character.
_AROUND = {
    "rank_pattern": r"(.*\.)?(%s)$",
    "alpha_pattern": r"(.*\.)?(%s)$",
    "modules_to_save": r"(^|.*\.)%s($|\..*)",
    "layers_pattern": r"(?:^|.*?\.)%s\.(?P<index>\d+)\.",
}

# Names and their parts, perhaps anchored or escaped: nothing in them can fail to compile.
_PLAIN = re.compile(r"(\^?)([\w.-]*(?:\\[.-][\w.-]*)*)(\$?)")
_FLAGS = re.compile(r"\(\?[aiLmsux]+\)")
_ANY = "\0"  # in a plain name, what stands for any character
_DOT = "\1"  # meanwhile, what stands for a dot itself

# Of the processor's time for all expressions of one config together: far more than those that
# people write take, and an end for the others. What a file says is to be refused within 0.1 s.
FILE_SECONDS, CODE_SECONDS = 0.03, 1.0
# Of all expressions of a config together, each counted as often as its counts repeat it: far more
# than those that people write; compiling them takes time and memory.
MAX_PATTERN_CHARACTERS = 8192
# Added for each module of the model; adapting one takes longer.
_SECONDS_PER_NAME = 50e-6
# So many times as long where a debugger, a profiler or a measurement of coverage looks on.
_TRACED = 30.0

Result = TypeVar("Result")


def _slowed() -> float:
    monitoring = getattr(sys, "monitoring", None)  # of Python 3.12, with six numbers for tools
    watched = monitoring is not None and any(map(monitoring.get_tool, range(6)))
    return _TRACED if watched or sys.gettrace() or sys.getprofile() else 1.0


class SlowPatternError(ValueError):
    """An expression that is not matched, or compiled, in the time that there is."""


class _Limit:
    """The time of this thread's processor that is left, and tables that were made meanwhile. As a
    context it does not charge garbage collections, which may be of all the memory of a program."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds
        self.tables: dict[tuple[str, int], tuple[object, NameTable]] = {}
        self._thread, self._since = threading.get_ident(), 0.0

    def __enter__(self) -> _Limit:
        gc.callbacks.append(self._note_collection)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._note_collection)

    def _note_collection(self, phase: str, _: object) -> None:
        if threading.get_ident() != self._thread:
            return
        if phase == "start":
            self._since = time.thread_time()
        elif self._since:
            self.left += time.thread_time() - self._since

    def spend(self, since: float, field: str, what: str) -> None:
        """Takes off the time since `since`; SlowPatternError where none is left."""
        self.left -= time.thread_time() - since
        if self.left <= 0.0:
            _refuse(field, what)


_limit: ContextVar[_Limit | None] = ContextVar("lora_ext_pattern_limit", default=None)


class Budget:
    """So much time for all expressions of several calls together, and a little more for each name
    they are told to match."""

    def __init__(self, seconds: float) -> None:
        self._limit = _Limit(seconds * _slowed())

    def run(self, names: int, call: Callable[[], Result]) -> Result:
        """What the call returns; in a call within another, what that one may take is what counts.

        Raises:
            SlowPatternError: no time is left; names the field.
        """
        if _limit.get() is not None:
            return call()
        self._limit.left += names * _SECONDS_PER_NAME * _slowed()

        def limited() -> Result:
            _limit.set(self._limit)
            with self._limit:
                return call()

        return copy_context().run(limited)  # whatever exception comes, the limit ends with it


def in_time(seconds: float, names: int, call: Callable[[], Result]) -> Result:
    """What the call returns. In it all expressions together may take so long, and a little for each
    of so many names; in a call within another, what that one may.

    Raises:
        SlowPatternError: they took longer; names the field.
    """
    return Budget(seconds).run(names, call)


def _refuse(field: str, what: str) -> NoReturn:
    raise SlowPatternError(
        f"LoraConfig: {field}: got {what}, which takes too long to match, expected fewer names, or "
        "expressions without repetitions inside repetitions"
    ) from None


def _quoted(pattern: str) -> str:
    return repr(pattern[:100]) + ("..." if pattern[100:] else "")


class Expression:
    """A compiled regular expression, matched within the limit that holds."""

    def __init__(self, field: str, pattern: str) -> None:
        import regex  # as late as possible: most configs have names only

        self._field, self._what = field, _quoted(pattern)
        text = _AROUND.get(field, "%s") % pattern
        with _present_limit() as limit:
            start = time.thread_time()
            if _FLAGS.search(text, 1):  # `regex` takes them anywhere, `re` and so PEFT do not
                raise ValueError("global flags not at the start of the expression")
            self._compiled = regex.compile(text)
            limit.spend(start, field, self._what)

    def match(self, name: str) -> Any:
        """The match from the start of the name, or None."""
        return self._run(self._compiled.match, name)

    def fullmatch(self, name: str) -> Any:
        """The match of the whole name, or None."""
        return self._run(self._compiled.fullmatch, name)

    def _run(self, method: Any, name: str) -> Any:
        with _present_limit() as limit:
            start = time.thread_time()
            try:
                return method(name, timeout=limit.left, concurrent=False)
            except TimeoutError:
                _refuse(self._field, self._what)
            finally:
                limit.spend(start, self._field, self._what)


def _present_limit() -> AbstractContextManager[_Limit]:
    """That of the call within which this is, or one of its own."""
    limit = _limit.get()
    return _Limit(CODE_SECONDS) if limit is None else nullcontext(limit)


@lru_cache(maxsize=4096)
def compiled(field: str, pattern: str) -> Expression:
    """The expression that is matched from the start of a module's name for `pattern` in `field`.

    Raises:
        SlowPatternError: compiling it takes longer than the limit that holds.
        ValueError, regex.error: it is none.
    """
    return Expression(field, pattern)


def is_plain(pattern: str) -> bool:
    """Whether the pattern is a name rather than an expression."""
    return pattern.isalnum() or _PLAIN.fullmatch(pattern) is not None


def size(pattern: str) -> int:
    """Its characters, as often as its counts ({100}) repeat them, and more for alternatives: what
    compiling it costs."""
    length = len(pattern) + 3 * pattern.count("|")
    if "{" not in pattern:
        return length
    times = 1
    # In verbose expressions a comment may stand inside a count.
    counts = [pattern] if "#" in pattern else re.findall(r"\{([^{}]*)\}", pattern)
    for count in counts:
        least, _, most = count.partition(",")
        whole = (least + most).strip().isdigit() or not most
        digits = re.sub(r"\D", "", least if whole else count)
        times = min(times * max(1, int(digits[:9] or 1)), 1 << 30)
    return length * times


def matching(field: str, patterns: Iterable[str], name: str) -> Iterator[str]:
    """Those of the patterns that match a module's name, in their order."""
    limit = _limit.get()
    if limit is None:
        return NameTable(field, patterns).matching(name)
    key = (field, id(patterns))
    if key not in limit.tables:  # which keeps the patterns, so that their id stays theirs
        limit.tables[key] = patterns, NameTable(field, patterns)
    return limit.tables[key][1].matching(name)


class NameTable:
    """Patterns of one field, of which plain names are looked up: a rank_pattern may have a key for
    each layer of a large model, and meets each of their names."""

    def __init__(self, field: str, patterns: Iterable[str]) -> None:
        self._field, self._patterns = field, tuple(dict.fromkeys(patterns))
        self._what = f"{len(self._patterns)} names"
        self._places = dict(zip(self._patterns, range(len(self._patterns)), strict=True))
        self._known_shapes: dict[int, Collection[tuple[int, ...]]] = {}

    @cached_property
    def _sorted(self) -> tuple[dict[str, list[int]], dict[int, list[str]], list[int]]:
        """Places of the other plain patterns by their text, with _ANY where any character is meant;
        those texts with one, by their length; places of the expressions."""
        plain: dict[str, list[int]] = {}
        wild: dict[int, list[str]] = {}
        expressions = []
        with _present_limit() as limit:
            start, characters = time.thread_time(), 0
            # Most are words, and there may be many: those are looked up in _places.
            for pattern in [text for text in self._patterns if not text.isalnum()]:
                place = self._places[pattern]
                characters += len(pattern)
                if characters >= 1 << 14:
                    now = time.thread_time()
                    limit.spend(start, self._field, self._what)
                    start, characters = now, 0
                found = _PLAIN.fullmatch(pattern)
                if found is None:
                    expressions.append(place)
                    continue
                text = found[2]
                if "\\" in text or "." in text:
                    escaped = text.replace("\\-", "-").replace("\\.", _DOT)
                    text = escaped.replace(".", _ANY).replace(_DOT, ".")
                if _ANY in text:
                    wild.setdefault(len(text), []).append(text)
                plain.setdefault(text, []).append(place)
        return plain, wild, expressions

    def _shapes(self, length: int) -> Collection[tuple[int, ...]]:
        """Where the plain patterns of this length have any character."""
        if length not in self._known_shapes:
            texts = self._sorted[1].get(length, ())
            self._known_shapes[length] = {
                tuple(at for at, character in enumerate(text) if character == _ANY)
                for text in texts
            }
        return self._known_shapes[length]

    def matching(self, name: str) -> Iterator[str]:
        """See the function of this name."""
        if not self._patterns:
            return
        if "\n" in name:  # before which $ matches as well
            found, places = set(), list(range(len(self._patterns)))
        else:
            found = set(self._look_up(name))
            places = sorted({*found, *self._sorted[2]})
        for place in places:
            pattern = self._patterns[place]
            if place in found or compiled(self._field, pattern).match(name):
                yield pattern

    def _look_up(self, name: str) -> Iterator[int]:
        """The places of the plain patterns that match."""
        with _present_limit() as limit:
            start_time = time.thread_time()
            plain, wild, _ = self._sorted
            starts = [0, *(at + 1 for at, character in enumerate(name) if character == ".")]
            ends = [len(name)]
            if self._field == "modules_to_save":  # or what is inside
                ends += [at for at, character in enumerate(name) if character == "."]
            for start, end in itertools.product(starts, ends):
                if start > end:
                    continue
                part = name[start:end]
                if part in self._places and part.isalnum():
                    yield self._places[part]
                for count, text in enumerate(_masked(part, self._shapes(len(part)))):
                    for place in plain.get(text, ()):
                        pattern = self._patterns[place]
                        whole = end == len(name) or pattern[-1:] != "$"
                        if whole and (start == 0 or pattern[:1] != "^"):
                            yield place
                    if count % 256 == 255:
                        now = time.thread_time()
                        limit.spend(start_time, self._field, self._what)
                        start_time = now
            if wild:  # else it is a few look-ups, as many as the model's own name has dots
                limit.spend(start_time, self._field, self._what)


def _masked(part: str, shapes: Iterable[tuple[int, ...]]) -> Iterator[str]:
    yield part
    for dots in shapes:
        characters = list(part)
        for at in dots:
            characters[at] = _ANY
        yield "".join(characters)


def keys_for(names: Collection[str]) -> dict[str, str]:
    """For each of these modules a key of rank_pattern that means it and no other of them. Keys are
    expressions for the ends of names: a name where that is one, else with ^ for the whole of it,
    else escaped."""
    keys = {name: f"^{re.escape(name)}" for name in names}
    plain = [name for name in names if is_plain(name)]

    def plainer() -> None:
        for start in ("^", ""):
            table = NameTable("rank_pattern", [start + name for name in plain])
            meant: dict[str, list[str]] = {}
            for name in names:
                for key in table.matching(name):
                    meant.setdefault(key, []).append(name)
            keys.update({n: start + n for n in plain if meant.get(start + n) == [n]})

    with suppress(SlowPatternError):  # as they are, they mean the same
        in_time(FILE_SECONDS, 2 * len(keys), plainer)
    return keys
