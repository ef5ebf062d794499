"""Calls of a model in several threads, and changes of its adapters between them: a call sees the
adapters before a change or after it in all layers, never some of both."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import get_ident
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


class Request:
    """Several calls of one model that belong together, and the ones around them, of others."""

    def __init__(self, requests: Requests, outer: Request | None) -> None:
        self.requests, self.outer, self.runs = requests, outer, True


# Of the thread, and of what runs in a copy of its context: `copy_context().run`, asyncio.to_thread.
_REQUEST: ContextVar[Request | None] = ContextVar("lora_ext.request", default=None)


class Requests:
    """The calls of one model that run now. A change waits until those of other threads have ended,
    and those that begin then wait for it. A thread does not wait for itself: it may call in a
    change."""

    def __init__(self) -> None:
        self._running: list[int] = []  # the thread of each
        self._changer: int | None = None  # the thread that changes something, or waits to
        self._changes = 0  # one in another
        self._waiting = 0  # calls, for a change to end: they come before the next change
        self._edits = threading.RLock()  # one change is prepared, on drafts, at a time
        self._condition = threading.Condition()

    # list.append and list.remove are one step of the interpreter each, so that without a change
    # there is nothing to wait for, and no lock: a call counts itself first and looks for a change
    # then, a change the other way round.

    def enter(self) -> int:
        """A call begins. What it returns `leave` takes at its end."""
        me = get_ident()
        self._running.append(me)
        if self._changer is not None:
            self._wait(me)
        return me

    def leave(self, me: int) -> None:
        """The end of a call that has entered."""
        self._running.remove(me)
        if self._changer is not None:
            with self._condition:
                self._condition.notify_all()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Within this context calls belong together, those of its copies in other threads too."""
        outer = _REQUEST.get()
        mine = Request(self, outer)
        me = self.enter()
        try:
            _REQUEST.set(mine)
            yield
        finally:
            _REQUEST.set(outer)
            mine.runs = False  # first: a call that saw it run has counted itself before
            self.leave(me)

    def _in_request(self) -> bool:
        """Whether the caller's context is of a request that runs, in whatever thread: a change
        waits for that, and so must not be waited for."""
        one = _REQUEST.get()
        while one is not None and not (one.requests is self and one.runs):
            one = one.outer
        return one is not None

    def _wait(self, me: int) -> None:
        """For the end of another thread's change, unless this call is in one that runs."""
        with self._condition:
            if self._changer == me or self._running.count(me) > 1 or self._in_request():
                return
            self._running.remove(me)
            self._waiting += 1
            self._condition.notify_all()
            try:
                while self._changer is not None:
                    self._condition.wait()
            finally:
                self._running.append(me)
                self._waiting -= 1
                self._condition.notify_all()

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Within this context no other thread prepares or makes a change: of two drafts of one
        layer the second would undo the first. Calls go on. In a call it waits for nobody."""
        if get_ident() in self._running:
            yield
            return
        with self._edits:
            yield

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within this context no other thread calls or changes. In a call it waits for nobody:
        two calls that change something would wait for each other."""
        me = get_ident()
        if me in self._running and self._changer != me:
            yield
            return
        with self.editing():
            with self._condition:
                while self._changer != me and (self._changer is not None or self._waiting):
                    self._condition.wait()
                self._changer = me
                self._changes += 1
                try:
                    while any(thread != me for thread in self._running.copy()):
                        self._condition.wait()
                except BaseException:
                    self._changed()
                    raise
            try:
                yield
            finally:
                with self._condition:
                    self._changed()

    def _changed(self) -> None:
        self._changes -= 1
        if not self._changes:
            self._changer = None
        self._condition.notify_all()

    def __deepcopy__(self, memo: Any) -> Requests:
        return Requests()

    def __reduce__(self) -> Any:
        return Requests, ()


def edits(method: Method) -> Method:
    """Makes a method of a model run while no other thread changes it; calls go on."""
    return _within("editing", method)


def changes(method: Method) -> Method:
    """Makes a method of a model run while no other thread calls or changes it."""
    return _within("changing", method)


def _within(context: str, method: Method) -> Method:
    @functools.wraps(method)
    def alone(model: Any, *args: Any, **kwargs: Any) -> Any:
        with getattr(model, context)():
            return method(model, *args, **kwargs)

    return cast(Method, alone)
