"""The first minutes on a GPU: what is right and how fast it is, most important first.

`make gpu-first` runs it; nothing is installed and nothing fetched. Every step has a limit and a log
of its own (timed_steps.py), the whole ends after --seconds. The raw kernels come first, from
programs that `make gpu-prebuilt` built before, while the extension is compiled in the background;
then its tests on three paths, layers beside cuBLAS's, hardware counters and the sanitizers.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from machine import (
    DEFAULT,
    PREBUILT,
    ROOT,
    capability,
    cublas,
    facts,
    runs_on,
    sources_hash,
    tool,
    why_no_gpu,
    why_not_prebuilt,
)
from timed_steps import FAILED, KILLED, LEFT_OUT, RIGHT, Step, Steps

LARGE = "4096x4096,4096x1024,4096x14336,14336x4096"
EVERY = f"{LARGE},4096x6144,8192x8192,8192x28672,28672x8192"
TESTED_PATHS = ("fused", "hybrid", "composed")
MEASURED_PATHS = ("fused", "hybrid")
# What runs the same kernels as a pass of bench_kernels, by the first word of the names.
SAME_KERNELS = {
    "product": ("product", "fused"),
    "down": ("down", "fused", "hybrid"),
    "up_grad": ("up_grad", "fused", "hybrid"),
    "down_grad": ("down_grad", "fused", "hybrid"),
}
CUDA_IS_LOST = 3  # exit status of bench_kernels
RESERVE = 6.0  # seconds of the total, for killing what hangs and writing


VERSIONS = """
import json, importlib.metadata as m, torch
names = "torch triton nvidia-cublas transformers peft pytest pytest-xdist cmake ninja".split()
found = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
print(json.dumps({n: found.get(n) for n in names} | {"cuda": torch.version.cuda,
    "device": torch.cuda.get_device_name(), "torch_git": torch.version.git_version}))
"""


class Planned:
    """Stands for Steps in a dry run: nothing is run or written, and everything goes well."""

    results: Sequence[dict[str, Any]] = ()

    def __init__(self, folder: Path):
        self.folder = folder

    def status(self, name: str) -> str:
        return "" if "of wrong" in name else RIGHT


class First:
    """All steps, in their order. `stand_in`: something small takes the place of each command, for
    tests; limits and order are the same."""

    def __init__(self, steps: Steps | Planned, stand_in: bool, families: Sequence[str]):
        self.steps, self.stand_in, self.families = steps, stand_in, families
        self.make = [
            tool("make"),
            "--no-print-directory",
            "-C",
            str(ROOT),
            f"PYTHON={sys.executable}",
        ]
        self.path = {"PYTHONPATH": str(ROOT)}
        self.benches: dict[str, list[str]] = {}  # the steps of bench_kernels, by family

    def build(self) -> Step:
        return self._step("build", ["nice", "-n", "19", *self.make, "gpu-build"], 330)

    def versions(self) -> Step:
        return self._step("versions", [sys.executable, "-c", VERSIONS], 90)

    def before_the_build(self) -> Iterator[Step]:
        yield self._step("nvidia-smi", [tool("nvidia-smi"), "-q"], 10)
        yield self._step("nvcc", [tool("nvcc"), "--version"], 5)
        yield self._step(
            "programs", [*self.make, "gpu-prebuilt", *architectures()], 150,
            left_out=lambda: "" if why_not_prebuilt() else "they were built before",
        )  # fmt: skip
        for family in self.families:
            yield self._step(f"kernels {family}", [PREBUILT / "kernels_on_gpu", family], 45)
            for name in ("memcheck", "racecheck"):
                yield self._sanitizer(name, family, 30, only_if_wrong=True)
        yield from self._bench_kernels()

    def _bench_kernels(self) -> Iterator[Step]:
        ours = self.families[0]
        for name in ("passes right", "other passes right"):
            if name != "passes right" and not self._hang(ours):
                break
            yield self._bench(
                name, 45, shapes=LARGE, families=ours, ranks="16,128", dropouts="0.1",
                adapters="bf16,fp32", rounds="0",
            )  # fmt: skip
        for rank in ("16", "64", "128"):  # in processes of their own, as all groups: one may die
            yield self._bench(f"times r{rank}", 35, shapes=EVERY, families=ours, ranks=rank)
        yield self._bench("times dropout", 30, shapes=LARGE, families=ours, dropouts="0.1")
        yield self._bench("times fp32", 30, shapes=LARGE, families=ours, adapters="fp32")
        yield self._bench(
            "times few rows", 40, shapes="4096x4096,4096x1024,4096x14336", families=ours,
            tokens="1,16,128,512,2048", seconds="0.3",
        )  # fmt: skip
        if ours != "sm80":
            yield self._bench("times sm80", 20, shapes="4096x4096,4096x14336", families="sm80")

    def after_the_build(self) -> Iterator[Step]:
        tests = sorted(
            str(path)
            for path in (ROOT / "tests").glob("test_*.py")
            if "each_device" in (text := path.read_text()) or "mark.cuda" in text
        )
        pytest = [sys.executable, "-m", "pytest", *tests, "-m", "cuda", "-n", "12", "-q"]
        pytest += ["--timeout", "50", "--maxfail", "40", "--tb", "short", "-p", "no:cacheprovider"]
        for name in TESTED_PATHS:
            yield self._after_build(f"tests {name}", pytest, 75, LORA_EXT_CUDA_PATH=name)
        bench = [sys.executable, "-m", "lora_ext.bench", "--device", "cuda", "--dtypes", "bf16"]
        bench += ["--tokens", "8192", "--shapes", "4096x4096,4096x14336,4096x1024"]
        bench += ["--ranks", "16", "--dropouts", "0,0.1", "--budget", "0.5", "--deadline", "30"]
        for name in MEASURED_PATHS:
            result = self.steps.folder / f"layers-{name}.json"
            rivals = "frozen,peft,addmm,lora_ext,lora_ext_fp32"
            if name != MEASURED_PATHS[0]:
                rivals = "frozen,lora_ext,lora_ext_fp32"
            yield self._after_build(
                f"layers {name}", [*bench, "--rivals", rivals, "--json", str(result)], 50,
                LORA_EXT_CUDA_PATH=name,
            )  # fmt: skip

    def counters(self) -> Step:
        # The clocks are the machine's: nothing here sets them.
        counters = [tool("ncu"), "--clock-control", "none", "--set", "full", "-k"]
        counters += ["regex:product_sm|low_rank", "-c", "7", PREBUILT / "bench_kernels"]
        counters += ["--families", self.families[0], "--shapes", "4096x4096", "--rounds", "0"]
        counters += ["--passes", "product,down,up_grad"]
        if without := self._hang(self.families[0]):
            counters += ["--without", ",".join(without)]
        return self._step("counters", counters, 60)

    def at_last(self) -> Iterator[Step]:
        for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
            for family in self.families:
                yield self._sanitizer(name, family, 90, only_if_wrong=False)
        checks = [sys.executable, str(ROOT / "tests" / "cuda_check.py")]
        yield self._after_build("imported", checks, 60)

    # ---- One step ------------------------------------------------------------------------------

    def _step(self, name: str, command: Sequence[Any], seconds: float, **more: Any) -> Step:
        words = list(map(str, command))
        if self.stand_in:
            line = json.dumps({"pass": name, "command": " ".join(words)})
            words = [sys.executable, "-c", f"print({line!r})"]
        return Step(name, words, seconds, **more)

    def _bench(self, name: str, limit: float, **options: str) -> Step:
        command: list[Any] = [PREBUILT / "bench_kernels"]
        if library := cublas():
            command += ["--cublas", library]
        command += [word for key, value in options.items() for word in (f"--{key}", value)]
        self.benches.setdefault(options["families"], []).append(name)
        if without := self._hang(options["families"]):
            command += ["--without", ",".join(without)]
        # Its other half, cublasLt, lies beside it.
        folder = {"LD_LIBRARY_PATH": str(Path(library).parent)} if library else {}
        return self._step(name, command, limit, rows=True, environment=folder)

    def _hang(self, family: str) -> list[str]:
        """Passes that an earlier step hung in, or ended CUDA with, and what runs their kernels."""
        found: set[str] = set()
        for result in self.steps.results:
            hung = result["status"] == KILLED or result["exit_status"] == CUDA_IS_LOST
            if result["name"] in self.benches.get(family, ()) and hung:
                log = (self.steps.folder / result["log"]).read_text(errors="replace")
                last = log.rpartition("  check ")[2].splitlines()
                if len(last) == 1:  # it was the last that the program said
                    word = last[0].split()[0]
                    found |= set(SAME_KERNELS.get(word, (word,)))
        return sorted(found)

    def _sanitizer(self, name: str, family: str, seconds: float, only_if_wrong: bool) -> Step:
        program = [PREBUILT / "kernels_on_gpu", family, "small"]
        command = [tool("compute-sanitizer"), "--tool", name, "--error-exitcode", "1", *program]
        wrong = f"{name} of wrong {family}" if only_if_wrong else f"{name} {family}"

        def left_out() -> str:
            kernels = self.steps.status(f"kernels {family}")
            if only_if_wrong:
                return "" if kernels in (FAILED, KILLED) else "the kernels are right"
            done = self.steps.status(f"{name} of wrong {family}")
            return "it ran before" if done in (RIGHT, FAILED) else ""

        return self._step(wrong, command, seconds, left_out=left_out)

    def _after_build(
        self, name: str, command: Sequence[Any], seconds: float, **environment: str
    ) -> Step:
        def left_out() -> str:
            built = self.steps.status("build") == RIGHT
            return "" if built else "the extension was not built"

        more = self.path | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"} | environment
        return self._step(name, command, seconds, environment=more, left_out=left_out)


CASE = ("family", "M", "K", "N", "r", "p", "adapters")


def describe(row: dict[str, Any]) -> str:
    return " ".join(f"{key}={row[key]}" if len(key) == 1 else str(row[key]) for key in CASE)


def digest(rows: Sequence[dict[str, Any]]) -> str:
    """What is wrong; then a line for each case, of ratios to cuBLAS's product."""
    lines = []
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row.get("ok") is False:
            lines.append(f"WRONG {describe(row)} {row['pass']}: {row.get('wrong')}")
        if "us" in row:
            cases.setdefault(describe(row), {})[row["pass"]] = row

    def numbers(passes: dict[str, dict[str, Any]], field: str, form: str, *names: str) -> str:
        found = [passes.get(name, {}).get(field) for name in names]
        return " / ".join("-" if number is None else format(number, form) for number in found)

    for case, passes in cases.items():
        lines.append(
            f"{case}: cublas {numbers(passes, 'us', '.1f', 'cublas y', 'cublas dx')} us; product "
            + numbers(passes, "over_cublas", ".3f", "product y alone", "product dx alone")
            + "".join(
                f"; {name} "
                + numbers(
                    passes, "over_cublas", ".3f", f"{name} forward", f"{name} forward+backward"
                )
                for name in MEASURED_PATHS
            )
            + "; TB/s of copy, down, up_grad, down_grad "
            + numbers(passes, "tb_per_s", ".2f", "copy x", "down", "up_grad", "down_grad")
        )
    return "\n".join(lines)


def architectures() -> list[str]:
    """What `make gpu-prebuilt` is to be told where its default has no code for the GPU here."""
    found = capability()
    return [] if not found or runs_on(DEFAULT, found) else [f"GPU_ARCHITECTURES={found}-real"]


def show_all(first: First) -> None:
    """Each step with its limit and its command, in the order in which they begin."""

    def show(step: Step, told: str) -> None:
        print(f"{step.name} ({told}): {' '.join(shlex.join(step.command).split())}")

    for step in (first.build(), first.versions()):
        show(step, f"in the background, {step.seconds:g} s")
    last = [first.counters(), *first.at_last()]
    for step in [*first.before_the_build(), *first.after_the_build(), *last]:
        without = step.left_out()
        told = f"{step.seconds:g} s" + (f"; left out where {without}" if without else "")
        show(step, told)


def run_all(first: First) -> None:
    steps = first.steps
    assert isinstance(steps, Steps)
    background = [steps.start(first.build()), steps.start(first.versions())]
    try:
        for step in first.before_the_build():
            steps.run(step)
        last = [first.counters(), *first.at_last()]
        if background[0].running():
            steps.run(last.pop(0))
        while background:
            steps.finish(background.pop())
        for step in [*first.after_the_build(), *last]:
            steps.run(step)
    finally:
        for started in background:
            started.kill()


def seconds(text: str) -> float:
    value = float(text)
    if not RESERVE < value < 1e6:
        raise argparse.ArgumentTypeError(
            f"got {text}, expected more than {RESERVE:g}: with less no step begins"
        )
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tests/gpu/first.py", description=__doc__)
    parser.add_argument("--seconds", type=seconds, default=560.0, help="for everything (560)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu-first")
    parser.add_argument(
        "--copy-to", type=Path,
        default=os.environ.get("GPU_FIRST_OUT") or os.environ.get("OUT") or None,
        help="a folder that gets summary.json, rows.jsonl and logs.tar.gz too ($GPU_FIRST_OUT, "
        "else $OUT); what an earlier run left there is moved into earlier-1, and so on",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="shows steps, limits, commands; writes nothing"
    )
    parser.add_argument(
        "--hash", action="store_true", help="of the programs' sources; runs nothing"
    )
    options = parser.parse_args(argv)
    if options.hash:
        print(sources_hash())
        return 0
    if options.dry_run:
        show_all(First(Planned(options.folder), False, ("sm90", "sm80")))
        return 0
    if reason := why_no_gpu():
        print(f"make gpu-first: {reason}; --dry-run shows the steps", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are killed first
    known = facts()
    steps = Steps(options.folder, options.seconds - RESERVE, options.copy_to, known)
    newest = known["capability"] == 90
    run_all(First(steps, False, ("sm90", "sm80") if newest else ("sm80",)))
    print(digest(steps.rows))
    bad = [r["name"] for r in steps.results if r["status"] in (FAILED, KILLED)]
    left_out = [r["name"] for r in steps.results if r["status"] == LEFT_OUT]
    print(f"{steps.passed():.0f} s; failed or killed: {', '.join(bad) or 'none'}; left out: "
          f"{', '.join(left_out) or 'none'}; results: {steps.folder}")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
