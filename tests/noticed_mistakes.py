"""Runs the checks of a library that has mistakes to switch on (test_kernel_mistakes.py), once for
each, in a process of its own that is forked from this one, which has imported everything.

    python noticed_mistakes.py launches|grouped|rows LIBRARY FOLDER NUMBER...

Leaves in FOLDER what mistake NUMBER printed, NUMBER.out and NUMBER.err, and its exit code,
NUMBER.code; 0 has no mistake.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulated_multi
import grouped_mistakes
import kernel_checks
import row_kernel_mistakes
import torch
from emulated import COMPLETIONS, EmulatedKernels
from emulated_grouped import GroupedKernels
from emulated_rows import RowKernels

SECONDS = 300  # of one mistake


def notice_launches(kernels: EmulatedKernels) -> None:
    """Small sizes that reach every part: several tiles and steps, several splits, tails; all of
    it in one schedule before any of it in others."""
    kernels.gpu(86, 3)
    print("self check:", kernels.self_check("sm80", 264, 136, 264) or "right", flush=True)
    few = (37, 192, 200, 16), kernel_checks.Options(bias=False, processors=132)
    many = (364, 200, 72, 8), kernel_checks.Options(h=False, processors=1)
    first, *others = itertools.product(COMPLETIONS, range(4))
    for size, has in (few, many):
        kernel_checks.check(kernels, size, "bf16", 0.1, first, has=has)
    # Float adapters are rounded and what that leaves
    of_float = (37, 192, 200, 8)
    kernel_checks.check(kernels, of_float, "bf16-fp32", 0.1, first, has=few[1])
    kernel_checks.check_up_grad(kernels, (37, 72, 16), "bf16", first, "sm80")
    layers = [(72, 8), (40, 0), (136, 24)]
    emulated_multi.check(kernels, *emulated_multi.make_layers(69, 72, layers))
    for schedule in [first, *others[:3]]:
        kernel_checks.check(kernels, (9, 520, 40, 8), "bf16", 0.0, schedule)
    for schedule, (size, has) in itertools.product(others, (few, many)):
        kernel_checks.check(kernels, size, "bf16", 0.1, schedule, has=has)


LIBRARIES: dict[str, tuple[Callable[[Path], Any], Callable[[Any], None]]] = {
    "launches": (EmulatedKernels.load, notice_launches),
    "grouped": (GroupedKernels.load, grouped_mistakes.notice),
    "rows": (RowKernels.load, row_kernel_mistakes.notice),
}


def child(driver: str, kernels: Any, number: int, folder: Path) -> int:
    """In the new process: its exit code."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    signal.alarm(SECONDS)
    ctypes.c_int.in_dll(kernels.library, "planted_mistake").value = number
    try:
        LIBRARIES[driver][1](kernels)
    except Exception:
        traceback.print_exc()
        return 1
    print("no mistake noticed")
    return 0


def main(driver: str, library: str, folder: Path, numbers: list[int]) -> None:
    torch.set_num_threads(1)  # a fork has one
    kernels = LIBRARIES[driver][0](Path(library))
    for number in numbers:
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            code = child(driver, kernels, number, folder)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(process, 0)
        (folder / f"{number}.code").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), [int(text) for text in sys.argv[4:]])
