"""`make gpu-first` as far as it goes without a GPU: limits, order, what is written when."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "gpu" / "first.py"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    return importlib.import_module("timed_steps")


@pytest.fixture
def first(timed: ModuleType) -> ModuleType:
    return importlib.import_module("first")


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended, and nobody asked how


# Starts one child in its group and one in a session of its own, and tells all three.
HANGS = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
children = [subprocess.Popen(sleep, start_new_session=own).pid for own in (False, True)]
print(*children, os.getpid(), flush=True)
time.sleep(60)
"""


def pids_in(log: Path) -> list[int]:
    words = log.read_text().splitlines()[-1].split() if log.exists() else []
    return [int(word) for word in words if word.isdigit()]


def test_what_hangs_is_killed_with_its_children(timed: ModuleType, tmp_path: Path) -> None:
    steps = timed.Steps(tmp_path / "run", 30, None)
    assert steps.run(timed.Step("hangs", python(HANGS), 1.5)) == "killed"
    assert steps.run(timed.Step("next", python("pass"), 10)) == "right"
    pids = pids_in(tmp_path / "run" / "logs" / "00-hangs.log")
    assert len(pids) == 3 and not any(map(alive, pids))


def test_a_child_that_takes_no_sigterm_is_killed(timed: ModuleType, tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    steps = timed.Steps(tmp_path / "run", 30, None)
    begun = time.monotonic()
    assert steps.run(timed.Step("stubborn", python(stubborn), 1.0)) == "killed"
    assert time.monotonic() - begun < 10


DEATHS = {
    "exit status": (python("print('so it is'); raise SystemExit(3)"), 3, "so it is"),
    "signal": (python("import os; os.abort()"), -signal.SIGABRT, ""),
    "missing": (["no-such-program"], None, "no-such-program cannot be started"),
}


@pytest.mark.parametrize(("command", "code", "why"), DEATHS.values(), ids=DEATHS.keys())
def test_what_dies_does_not_stop_the_others(
    timed: ModuleType, tmp_path: Path, command: list[str], code: int | None, why: str
) -> None:
    steps = timed.Steps(tmp_path / "run", 30, None)
    assert steps.run(timed.Step("dies", command, 10)) == "failed"
    assert steps.run(timed.Step("next", python("pass"), 10)) == "right"
    died, after = summary(tmp_path / "run")["steps"]
    assert died["exit_status"] == code and why in died["why"]
    assert (after["name"], after["status"]) == ("next", "right")


def test_the_summary_is_written_after_every_step(timed: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = timed.Steps(folder, 30, None, facts={"cpus": 2})
    assert summary(folder)["facts"] == {"cpus": 2}
    steps.run(timed.Step("one", python("pass"), 10))
    found = f"import json; s = json.load(open({str(folder / 'summary.json')!r}))"
    look = f"{found}; assert [x['name'] for x in s['steps']] == ['one'], s"
    assert steps.run(timed.Step("two", python(look), 10)) == "right"
    assert [step["name"] for step in summary(folder)["steps"]] == ["one", "two"]
    assert steps.status("two") == "right" and steps.status("three") == ""


def test_the_whole_ends_in_time(timed: ModuleType, tmp_path: Path) -> None:
    begun = time.monotonic()
    steps = timed.Steps(tmp_path / "run", 2.0, None)
    sleep = python("import time; time.sleep(60)")
    assert [steps.run(timed.Step(name, sleep, 60)) for name in "abc"] == [
        *("left out" for _ in "abc")
    ]  # none of them would have the five seconds that a long step begins with
    assert steps.run(timed.Step("short", sleep, 1.0)) == "killed"
    background = steps.start(timed.Step("background", sleep, 60))
    assert background.running() and steps.finish(background) == "killed"
    assert time.monotonic() - begun < 2.0 + 2 * timed.KILL_SECONDS
    assert summary(tmp_path / "run")["steps"][0]["why"] == "no time is left"


def test_rows_of_a_step_that_is_killed_are_kept(timed: ModuleType, tmp_path: Path) -> None:
    text = 'import time\nprint(\'{"pass": 1}\\n{"pass": 2}\\n{"pa\', end=\'\', flush=True)\n'
    steps = timed.Steps(tmp_path / "run", 30, None)
    steps.run(timed.Step("rows", python(text + "time.sleep(60)"), 1.5, rows=True))
    steps.run(timed.Step("more", python("print('{\"pass\": 3}')"), 10, rows=True))
    lines = (tmp_path / "run" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["pass"] for line in lines] == [1, 2, 3]


def test_three_files_are_copied_after_every_step(timed: ModuleType, tmp_path: Path) -> None:
    there = tmp_path / "there"
    steps = timed.Steps(tmp_path / "run", 30, there)
    for count in (1, 2):
        steps.run(timed.Step(f"step {count}", python("print('said')"), 10))
        assert sorted(os.listdir(there)) == ["logs.tar.gz", "rows.jsonl", "summary.json"]
        assert len(summary(there)["steps"]) == count
    with tarfile.open(there / "logs.tar.gz") as archive:
        names = archive.getnames()
    assert {"run/logs/00-step-1.log", "run/logs/01-step-2.log"} <= set(names)


def test_a_run_that_is_ended_kills_what_runs(tmp_path: Path) -> None:
    text = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(PROGRAM.parent)!r})
from timed_steps import Step, Steps
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
steps = Steps(Path({str(tmp_path / "run")!r}), 60, None)
steps.run(Step("hangs", [sys.executable, "-c", {HANGS!r}], 50))
"""
    log = tmp_path / "run" / "logs" / "00-hangs.log"
    deadline = time.monotonic() + 20
    with subprocess.Popen(python(text)) as process:
        while len(pids := pids_in(log)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert len(pids) == 3 and not any(map(alive, pids))


# ---- What is run, in which order -------------------------------------------------------------


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def test_the_most_important_comes_first(first: ModuleType, tmp_path: Path) -> None:
    steps = list(run_dry(first, tmp_path / "run").values())
    names = [step["name"] for step in steps]
    wanted = ["kernels sm90", "kernels sm80", "passes right", "times r16", "times few rows"]
    wanted += ["build", "tests fused", "tests hybrid", "tests composed"]
    wanted += ["layers fused", "layers hybrid", "memcheck sm90", "racecheck sm80"]
    assert "counters" in names  # before the build if that takes longer
    assert [name for name in names if name in wanted] == wanted
    left_out = {step["name"] for step in steps if step["status"] == "left out"}
    assert all("of wrong" in name or name == "programs" for name in left_out)
    assert {step["status"] for step in steps} == {"right", "left out"}
    rows = (tmp_path / "run" / "rows.jsonl").read_text().splitlines()
    assert all("bench_kernels" in json.loads(row)["command"] for row in rows) and len(rows) >= 6


def test_a_run_of_little_time_is_cut(first: ModuleType, tmp_path: Path) -> None:
    steps = run_dry(first, tmp_path / "run", 0.0)
    assert {step["why"] for name, step in steps.items() if name.startswith("times")} == {
        "no time is left"
    }


def test_a_dry_run_shows_the_steps_and_writes_nothing(tmp_path: Path) -> None:
    """What a real run has left stays as it is, wherever."""
    folder, out = tmp_path / "run", tmp_path / "out"
    for place in (folder, out):
        place.mkdir()
        (place / "summary.json").write_text("of a real run")
    result = program("--dry-run", "--folder", str(folder), OUT=str(out), GPU_FIRST_OUT=str(out))
    assert result.returncode == 0, result.stderr
    for place in (folder, out):
        assert [file.read_text() for file in place.iterdir()] == ["of a real run"]
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]
    lines = result.stdout.splitlines()
    assert lines[0].startswith("build (in the background, 330 s): nice -n 19")
    assert any(line.startswith("kernels sm90 (45 s): ") for line in lines)
    assert all(": " in line and " s" in line for line in lines) and len(lines) > 25


def test_results_of_an_earlier_run_are_moved_aside(timed: ModuleType, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    for number in range(3):
        timed.Steps(folder, 30, out, facts={"run": number})
    assert [summary(tmp_path / name)["facts"]["run"] for name in ("run-1", "run-2", "run")] == [
        0, 1, 2,
    ]  # fmt: skip
    kept = [summary(out / name)["facts"]["run"] for name in ("earlier-1", "earlier-2", ".")]
    assert kept == [0, 1, 2]


@pytest.mark.parametrize("wrong", ["0", "-5", "nan", "soon"])
def test_no_time_is_refused(wrong: str) -> None:
    result = program(f"--seconds={wrong}", "--dry-run")
    assert result.returncode == 2 and "--seconds" in result.stderr


def test_which_folder_gets_the_results(
    first: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Path | None] = []

    class Stop(Exception):
        pass

    def steps(folder: Path, seconds: float, copy_to: Path | None, facts: Any) -> None:
        seen.append(copy_to)
        raise Stop

    monkeypatch.setattr(first, "why_no_gpu", lambda: "")
    monkeypatch.setattr(first, "Steps", steps)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for one, other in (("", ""), ("", "b"), ("a", ""), ("a", "b")):
        monkeypatch.setenv("GPU_FIRST_OUT", one)
        monkeypatch.setenv("OUT", other)
        with pytest.raises(Stop):
            first.main(["--folder", str(tmp_path / "run")])
    assert seen == [None, Path("b"), Path("a"), Path("a")]


@pytest.fixture
def broken(first: ModuleType, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of steps that fail in a dry run."""
    names: set[str] = set()
    real = first.First._step

    def step(self: Any, name: str, command: Any, seconds: float, **more: Any) -> Any:
        made = real(self, name, command, seconds, **more)
        return first.Step(name, ["false"], seconds, **more) if name in names else made

    monkeypatch.setattr(first.First, "_step", step)
    return names


def run_dry(first: ModuleType, folder: Path, seconds: float = 60) -> dict[str, dict[str, Any]]:
    """With something small in the place of each command."""
    steps = first.Steps(folder, seconds, None)
    first.run_all(first.First(steps, True, ("sm90", "sm80")))
    return {step["name"]: step for step in steps.results}


def test_wrong_kernels_are_looked_into_at_once(
    first: ModuleType, broken: set[str], tmp_path: Path
) -> None:
    broken.add("kernels sm90")
    steps = run_dry(first, tmp_path / "run")
    names = list(steps)
    at = names.index("kernels sm90")
    assert names[at + 1 : at + 3] == ["memcheck of wrong sm90", "racecheck of wrong sm90"]
    assert [steps[name]["status"] for name in names[at : at + 3]] == ["failed", "right", "right"]
    assert steps["memcheck of wrong sm80"]["status"] == "left out"
    assert steps["memcheck sm90"]["why"] == "it ran before"
    assert steps["memcheck sm80"]["status"] == steps["tests fused"]["status"] == "right"


def test_without_the_extension_the_rest_goes_on(
    first: ModuleType, broken: set[str], tmp_path: Path
) -> None:
    broken.add("build")
    steps = run_dry(first, tmp_path / "run")
    assert steps["tests fused"]["why"] == steps["layers hybrid"]["why"]
    assert steps["tests fused"]["why"] == "the extension was not built"
    assert steps["times r16"]["status"] == steps["counters"]["status"] == "right"


# Hangs in a pass unless that is left out.
HANGING_BENCH = """#!/bin/sh
case "$*" in *--without*) echo '{"pass": "rest"}'; exit 0;; esac
echo "  check cublas y" >&2
echo "  check up_grad" >&2
sleep 60
"""


def test_a_pass_that_hangs_is_left_out_of_what_follows(
    first: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bench_kernels").write_text(HANGING_BENCH)
    (tmp_path / "bench_kernels").chmod(0o755)
    monkeypatch.setattr(first, "PREBUILT", tmp_path)
    monkeypatch.setattr(first, "cublas", lambda: "/somewhere/libcublas.so.13")
    real = first.First._step

    def step(self: Any, name: str, command: Any, seconds: float, **more: Any) -> Any:
        return real(self, name, command, min(seconds, 1.0), **more)

    monkeypatch.setattr(first.First, "_step", step)
    steps = first.Steps(tmp_path / "run", 60, None)
    commands = []
    for step_ in first.First(steps, False, ("sm90", "sm80"))._bench_kernels():
        commands.append(list(step_.command))
        steps.run(step_)
    statuses = {step["name"]: step["status"] for step in steps.results}
    assert statuses.pop("passes right") == statuses.pop("times sm80") == "killed"
    assert len(statuses) >= 6 and set(statuses.values()) == {"right"}
    assert next(iter(statuses)) == "other passes right"
    assert "--without" not in commands[0] + commands[-1]  # of the other family nothing is known
    assert all(command[-1] == "fused,hybrid,up_grad" for command in commands[1:-1])


def test_programs_of_other_sources_are_built_again(
    first: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = importlib.import_module("machine")
    monkeypatch.setattr(machine, "PREBUILT", tmp_path)
    assert machine.why_not_prebuilt() == "there are none"
    for program in machine.PROGRAMS:
        (tmp_path / program).write_text("#!/bin/sh\n")
    assert machine.why_not_prebuilt() == "they are of other sources"
    answer = subprocess.run(
        [sys.executable, str(PROGRAM), "--hash"], capture_output=True, text=True, check=True
    )
    (tmp_path / "sources").write_text(answer.stdout)  # as `make gpu-prebuilt` does
    assert machine.why_not_prebuilt() == "they cannot be run here: Permission denied"
    (tmp_path / "bench_kernels").chmod(0o755)
    monkeypatch.setattr(machine, "capability", lambda: 90)
    assert "nobody knows which GPUs" in machine.why_not_prebuilt()
    (tmp_path / "architectures").write_text("75-real\n")
    assert machine.why_not_prebuilt() == "they are for 75-real, and the GPU is sm_90"
    (tmp_path / "architectures").write_text("80-real;90a-real\n")
    assert machine.why_not_prebuilt() == ""


def test_gpus_that_run_the_programs(first: ModuleType) -> None:
    machine = importlib.import_module("machine")
    every = (80, 86, 89, 90, 100, 120)
    for targets, gpus in (
        ("80-real;90a-real", {80, 86, 89, 90}), ("80", {*every}), ("90a", {90}), ("75-real", set()),
        ("86-real", {86, 89}), ("100f-real", {100}), ("", set()),
    ):  # fmt: skip
        assert {gpu for gpu in every if machine.runs_on(targets, gpu)} == gpus, targets


def test_without_a_gpu_one_sentence_says_so(first: ModuleType) -> None:
    if not first.why_no_gpu():
        pytest.skip("there is a GPU here")
    result = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("make gpu-first: ") and len(result.stderr.splitlines()) == 1


def test_wrong_rows_are_told_first(first: ModuleType) -> None:
    row = dict(family="sm90", M=1, K=2, N=3, r=4, p=0.1, adapters="bf16", ok=True)
    rows = [
        row | {"pass": "cublas y", "us": 8.04},
        row | {"pass": "fused forward+backward", "us": 10.0, "over_cublas": 1.25},
        row | {"pass": "down", "us": 1.0, "tb_per_s": 3.456},
        row | {"pass": "product y", "ok": False, "wrong": "y: 3 not finite"},
    ]
    wrong, case = first.digest(rows).splitlines()
    assert wrong == "WRONG sm90 M=1 K=2 N=3 r=4 p=0.1 bf16 product y: y: 3 not finite"
    assert case == (
        "sm90 M=1 K=2 N=3 r=4 p=0.1 bf16: cublas 8.0 / - us; product - / -; fused - / 1.250; "
        "hybrid - / -; TB/s of copy, down, up_grad, down_grad - / 3.46 / - / -"
    )
