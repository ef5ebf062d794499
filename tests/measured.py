"""The processor's time and the peak memory of one call, measured in a fork."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MAX_SECONDS, MAX_BYTES = 0.1, 64 << 20

# What `_yardstick` takes on the slowest processor that MAX_SECONDS was held on, an EPYC of 2021
# with nothing beside it. One that is slower, or busy, may take longer in proportion.
YARDSTICK_SECONDS = 0.01

# glibc's. It raises both to what the process freed before, up to 32 and 64 MiB, and then keeps as
# much: what a load adds would depend on the tests before it.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Outcome:
    error: str
    message: str
    seconds: float
    extra_bytes: int


def attempt(load: Callable[[], object], patience: int = 10) -> Outcome:
    """Runs `load` in a fork; the processor's time it took and the growth of its peak memory.

    Not the clock's: other processes may have the machine. A load that only waits is killed.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what is free but resident would not count when it is used
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork is without the threads of its parent's pools
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, 128 << 10)
        gc.freeze()  # else a collection walks all of torch, and a fork copies each page it walks
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout has its own
        signal.alarm(patience)
        yardstick = _yardstick()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        error, message = "", ""
        try:
            load()
        except BaseException as raised:
            error, message = type(raised).__name__, str(raised)
        seconds = time.process_time() - start
        seconds *= min(1.0, 2 * YARDSTICK_SECONDS / (yardstick + _yardstick()))
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        with os.fdopen(write_end, "w") as pipe:
            json.dump([error, message, seconds, extra], pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the load ended with status {status}: 14 is a hang, 11 a crash"
    return Outcome(*json.loads(text))


def _yardstick() -> float:
    """Seconds that Python takes for as much of anything."""
    start = time.process_time()
    sum(i * i for i in range(100_000))
    return time.process_time() - start


def refused(load: Callable[[], object]) -> str:
    """The message of a refusal as it has to be."""
    outcome = min((attempt(load) for _ in range(3)), key=lambda one: one.seconds)  # others' noise
    assert outcome.error == "AdapterFileError", outcome
    assert outcome.seconds < MAX_SECONDS, outcome
    assert outcome.extra_bytes < MAX_BYTES, outcome
    assert len(outcome.message) < 1000
    return outcome.message
