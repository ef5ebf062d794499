"""Checks that run in several processes at a time, one start for all of a file.

A file of tests defines functions `check_...()`, which every process calls, one after another, and

    if __name__ == "__main__":
        run_checks(globals())

and makes a test of each by `outcome`. A process says what became of each check in a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

SECONDS = 240  # for all checks of a file; a process waits half a minute for another


def names_of_checks(space: Mapping[str, Any]) -> list[str]:
    return [name for name in space if name.startswith("check_")]


@cache
def _outcomes(file: str, processes: int) -> dict[str, str]:
    """What became of each check: "" or the error, of whichever process had one."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        with output.open("wb") as log:
            running = [_started(file, folder, rank, processes, log) for rank in range(processes)]
            try:
                for process in running:
                    process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                pass
            finally:
                for process in running:
                    process.kill()
                    process.wait()
        said: dict[str, str] = {"output": output.read_text(errors="replace")[-3000:]}
        for rank in range(processes):
            path = Path(folder) / f"outcomes{rank}"
            for line in path.read_text().splitlines() if path.exists() else ():
                for name, error in json.loads(line).items():
                    said[name] = said.get(name, "") + (f"process {rank}: {error}" if error else "")
        return said


def _started(file: str, folder: str, rank: int, processes: int, log: Any) -> Any:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, file, folder, str(rank)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", **{k: str(v) for k, v in told.items()}},
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def assert_passed(file: str, check: str, processes: int = 2) -> None:
    """Fails with what a check said in any of the processes."""
    outcomes = _outcomes(file, processes)
    assert check in outcomes, f"did not run to its end:\n{outcomes['output']}"
    assert outcomes[check] == "", outcomes[check]


def run_checks(space: Mapping[str, Any]) -> None:
    """What a file does when it is run as a program, with a folder and the process's number."""
    import torch
    import torch.distributed as dist

    folder, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=30),
    )
    os.environ["LORA_EXT_TEST_FOLDER"] = folder
    with open(f"{folder}/outcomes{rank}", "w") as outcomes:
        for name in names_of_checks(space):
            torch.manual_seed(0)
            error = _error_of(space[name])
            outcomes.write(json.dumps({name: error}) + "\n")
            outcomes.flush()
            dist.barrier()
    dist.destroy_process_group()


def _error_of(check: Callable[[], object]) -> str:
    try:
        check()
    except KeyboardInterrupt:
        raise
    except BaseException:  # pytest's failures are no Exceptions
        return traceback.format_exc()
    return ""


# Gloo's threads outlive destroy_process_group while a DeviceMesh holds the group. One that lets go
# of a tensor while the interpreter ends is ended itself, in a destructor: pytorch/pytorch#190489.
ABORTED_AT_EXIT = "terminate called without an active exception"


def torchrun(*arguments: str, cwd: Path | None = None) -> str:
    """What two processes of a program print. Where they met the fault above, it runs once more."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = partial(subprocess.run, capture_output=True, text=True, timeout=180)
    done = run([*command, *arguments], cwd=cwd)
    if done.returncode and ABORTED_AT_EXIT in done.stderr:
        warnings.warn(f"{arguments[0]} is run once more: {done.stderr}", stacklevel=2)
        done = run([*command, *arguments], cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def shared_folder(name: str) -> Path:
    """One folder for all processes, of a check."""
    return Path(os.environ["LORA_EXT_TEST_FOLDER"]) / name
