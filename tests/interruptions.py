"""Exceptions at chosen points of a call: lines of lora_ext, operators of torch, moments."""

from __future__ import annotations

import inspect
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_ext

PACKAGE = str(Path(lora_ext.__file__).parent)


class Interruption(BaseException):
    """What is raised."""


def _is_a_point(frame: FrameType, event: str) -> bool:
    """A line, or the end of a function. A yield tells of an end, too: raised there, an exception
    would pass by what is open in the generator, as none does that comes by itself."""
    yields = frame.f_code.co_flags & inspect.CO_GENERATOR
    return event == "line" or (event == "return" and not yields)


class AtLine:
    """Raises at the n-th line of lora_ext that runs; counts them (`seen`), also until the first
    `Transaction.commit` (`prepared`)."""

    def __init__(self, n: int | None = None) -> None:
        self.n, self.seen, self.prepared = n, 0, 0

    def __enter__(self) -> AtLine:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        # What a callback of the garbage collector raises is reported, and goes nowhere.
        own = frame.f_code.co_filename.startswith(PACKAGE)
        return self._line if own and frame.f_code.co_name != "_note_collection" else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if _is_a_point(frame, event):
            self.seen += 1
            if frame.f_code.co_name == "commit" and not self.prepared:
                self.prepared = self.seen
            if self.seen == self.n:
                sys.settrace(None)
                raise Interruption(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._line


class AtLines(AtLine):
    """Raises at each of these lines."""

    def __init__(self, *ns: int) -> None:
        super().__init__()
        self._ns, self.raised = set(ns), 0

    def __enter__(self) -> AtLines:
        super().__enter__()
        sys.setprofile(self._trace_again)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        super().__exit__()

    def _trace_again(self, frame: FrameType, event: str, _: Any) -> None:
        """Python unsets a trace function that raised."""
        if event == "call" and sys.gettrace() is None:
            frame.f_trace = self._call(frame, event, None)
            sys.settrace(self._call)

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if _is_a_point(frame, event):
            self.seen += 1
            if self.seen in self._ns:
                self.raised += 1
                raise Interruption(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._line


class AtOperator(TorchDispatchMode):
    """Raises instead of the n-th operator; counts them (`seen`)."""

    def __init__(self, n: int | None = None) -> None:
        super().__init__()
        self.n, self.seen = n, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen == self.n:
            raise Interruption(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def handler() -> Iterator[None]:
    """A signal handler that raises, as Python's for Ctrl-C."""

    def raises(*_: object) -> None:
        raise Interruption("signal")

    before = signal.signal(signal.SIGALRM, raises)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupted_after(seconds: float, call: Callable[[], object]) -> bool:
    """Calls; whether the signal came before its end."""
    grad = torch.is_grad_enabled()
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interruption:
        return True
    finally:  # torch's own contexts can be interrupted where they end
        signal.setitimer(signal.ITIMER_REAL, 0)
        torch._C._set_grad_enabled(grad)
    return False


def duration(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
