"""Runs commands one after another in a time that ends: each with a limit and a log of its own.

A step that hangs is killed with all its children; one that dies or is missing does not stop the
others. summary.json is rewritten after every step; rows.jsonl holds the JSON lines that they print.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RIGHT, FAILED, KILLED, LEFT_OUT = "right", "failed", "killed", "left out"
KILL_SECONDS = 2.0  # between asking a process to end and ending it


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    seconds: float  # its limit
    rows: bool = False  # its output is JSON lines
    environment: dict[str, str] = field(default_factory=dict)
    left_out: Callable[[], str] = lambda: ""  # why it is not wanted, asked when its turn comes


def with_descendants(pid: int) -> set[int]:
    """A process, what it started, and so on, whatever group that is in."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            after_name = stat.read_text(errors="replace").rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(after_name[1])
    found = new = {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found = found | new
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """With its group and its descendants: asked to end, then ended."""
    everyone: set[int] = set()  # those of the first round may have lost their parent in the second
    for number in (signal.SIGTERM, signal.SIGKILL):
        everyone |= with_descendants(process.pid)
        with contextlib.suppress(OSError):
            os.killpg(process.pid, number)
        for pid in everyone:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)


@dataclass
class Started:
    step: Step
    process: subprocess.Popen[bytes] | None
    why: str  # it was not started
    begun: float
    log: Path
    output: Path

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        if self.process is not None:
            kill(self.process)


class Steps:
    """A run of steps into a folder; the most important files of it into another one as well."""

    def __init__(self, folder: Path, seconds: float, copy_to: Path | None, facts: Any = None):
        self.begun, self.seconds = time.monotonic(), seconds
        self.folder, self.copy_to = folder, copy_to
        if folder.exists():
            folder.rename(next_free(folder))
        if copy_to is not None:
            move_aside(copy_to)
        (folder / "logs").mkdir(parents=True)
        self.rows: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.facts = facts
        self.write()

    def passed(self) -> float:
        return time.monotonic() - self.begun

    def left(self) -> float:
        return self.seconds - self.passed()

    def status(self, name: str) -> str:
        """Of a step that is over; "" else."""
        return next((str(r["status"]) for r in self.results if r["name"] == name), "")

    def start(self, step: Step) -> Started:
        number = len(list((self.folder / "logs").glob("*.log")))
        log = self.folder / "logs" / f"{number:02}-{step.name.replace(' ', '-')}.log"
        output = log.with_suffix(".jsonl") if step.rows else log
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment
        begun, process, why = time.monotonic(), None, ""
        with log.open("ab") as errors, output.open("ab") as results:
            errors.write(f"$ {' '.join(map(str, step.command))}\n".encode())
            errors.flush()
            try:
                process = subprocess.Popen(
                    [str(word) for word in step.command],
                    stdin=subprocess.DEVNULL, stdout=results, stderr=errors,
                    env=environment, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                why = f"{step.command[0]} cannot be started: {error.strerror}"
        return Started(step, process, why, begun, log, output)

    def finish(self, started: Started) -> str:
        """Waits for it as long as it may; its status."""
        step, process = started.step, started.process
        status, why, code = FAILED, started.why, None
        if process is not None:
            limit = min(step.seconds - (time.monotonic() - started.begun), self.left())
            try:
                code = process.wait(max(limit, 0.0))
                status = RIGHT if code == 0 else FAILED
                why = "" if code == 0 else last_line(started.log)
            except subprocess.TimeoutExpired:
                status, why = KILLED, last_line(started.log)
                kill(process)
            except BaseException:
                kill(process)
                raise
        took = time.monotonic() - started.begun
        if started.step.rows:
            self.rows += json_lines(started.output)
        self.record(step.name, status, why, code, took, started.log)
        return status

    def run(self, step: Step) -> str:
        reason = step.left_out()
        if not reason and self.left() < min(step.seconds, 5.0):
            reason = "no time is left"
        if reason:
            self.record(step.name, LEFT_OUT, reason, None, 0.0, None)
            return LEFT_OUT
        return self.finish(self.start(step))

    def record(
        self, name: str, status: str, why: str, code: int | None, took: float, log: Path | None
    ) -> None:
        self.results.append({
            "name": name, "status": status, "why": why, "exit_status": code,
            "seconds": round(took, 2), "ended_at": round(self.passed(), 2),
            "log": log and str(log.relative_to(self.folder)),
        })  # fmt: skip
        said = f": {why[:200]}" if why else ""
        print(f"{self.passed():6.1f} s  {name}: {status} after {took:.1f} s{said}", flush=True)
        self.write()

    def write(self) -> None:
        summary = {"seconds": self.seconds, "passed": round(self.passed(), 2), "facts": self.facts}
        summary |= {"steps": self.results, "rows": len(self.rows)}
        replace(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        replace(self.folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        if self.copy_to is None:
            return
        # Few files: logs and whatever else there is in one.
        with contextlib.suppress(OSError):  # a full disk there must not end this
            self.copy_to.mkdir(parents=True, exist_ok=True)
            for name in ("summary.json", "rows.jsonl"):
                replace(self.copy_to / name, (self.folder / name).read_text())
            packed = self.copy_to / "logs.tar.gz.new"
            with tarfile.open(packed, "w:gz", compresslevel=3) as archive:
                archive.add(self.folder, arcname=self.folder.name)
            packed.replace(self.copy_to / "logs.tar.gz")


COPIED = ("summary.json", "rows.jsonl", "logs.tar.gz")


def next_free(path: Path) -> Path:
    """results-1, or the first number that no earlier run has."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(place for place in numbered if not place.exists())


def move_aside(folder: Path) -> None:
    """What an earlier run has copied there, into a folder beside it: the folder itself may be one
    that cannot be renamed."""
    found = [folder / name for name in COPIED if (folder / name).exists()]
    if not found:
        return
    with contextlib.suppress(OSError):  # as in `write`
        place = next_free(folder / "earlier")
        place.mkdir()
        for file in found:
            file.rename(place / file.name)


def replace(path: Path, text: str) -> None:
    """At once: whoever reads it sees the old or the new text."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole."""

    def whole() -> Iterator[dict[str, Any]]:
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)

    return list(whole())


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if len(lines) > 1 else ""  # the first is the command
