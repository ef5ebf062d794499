"""Runs one long command of the Makefile and shows that it goes on.

    python tools/step.py "what it does, for how long" LOG command ...

What the command says goes into LOG; shown are the seconds so far and the newest count of it, such
as ninja's [12/60]: each second on a terminal, every ten seconds elsewhere. If it fails, the end of
LOG is shown and its exit code returned.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

LINES = 40  # of a log, after a failure


def newest_count(log: Path) -> str:
    counts = re.findall(r"\[\d+/\d+\]", log.read_text(encoding="utf-8", errors="replace"))
    return f" {counts[-1]}" if counts else ""


def main(what: str, log: Path, command: list[str], every: float = 10.0) -> int:
    live = sys.stdout.isatty()
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{what} (log: {log})", flush=True)
    began = told = time.monotonic()
    with log.open("wb") as file:
        running = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while True:
            try:
                code = running.wait(timeout=1.0)
                break
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                line = f"  {now - began:.0f} s{newest_count(log)}"
                if live:
                    print(f"\r{line}   ", end="", flush=True)
                elif now - told >= every:
                    print(line, flush=True)
                    told = now
            except KeyboardInterrupt:  # the command got it too
                running.wait()
                return 130
    if live:
        print("\r", end="")
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print(*lines[-LINES:], f"failed with exit code {code}", sep="\n", file=sys.stderr)
    else:
        print(f"  done after {time.monotonic() - began:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
