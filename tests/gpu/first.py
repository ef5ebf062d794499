"""The first minutes on a GPU: what is right and how fast it is, most important first.

`make gpu-first` runs it; nothing is installed and nothing fetched. Every step has a limit and a log
of its own (timed_steps.py), the whole ends after --seconds. The raw kernels come first, from
programs that `make gpu-prebuilt` built before, while the extension is compiled in the background;
then its tests on three paths, rows of the goals' table, hardware counters and the sanitizers.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from timed_steps import FAILED, KILLED, LEFT_OUT, RIGHT, Step, Steps

ROOT = Path(__file__).resolve().parents[2]
PREBUILT = ROOT / "build" / "gpu-prebuilt"
PROGRAMS = ("kernels_on_gpu", "bench_kernels")
LARGE = "4096x4096,4096x1024,4096x14336,14336x4096"
GOALS = f"{LARGE},4096x6144,8192x8192,8192x28672,28672x8192"
TESTED_PATHS = ("fused", "hybrid", "composed")
MEASURED_PATHS = ("fused", "hybrid")
RESERVE = 6.0  # seconds of the total, for killing what hangs and writing


def why_no_gpu() -> str:
    """One sentence, or "". Asks the driver, which is quicker than torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver here (no libcuda.so.1)"
    count = ctypes.c_int()
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error or count.value == 0:
        return f"the NVIDIA driver finds no GPU here (error {error}, {count.value} devices)"
    return ""


def capability() -> int:
    """90 for sm_90, of the first GPU; 0 without one."""
    if why_no_gpu():
        return 0
    driver, numbers = ctypes.CDLL("libcuda.so.1"), []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        numbers.append(value.value)
    return 10 * numbers[0] + numbers[1]


def sources_hash() -> str:
    """Of all that the programs are built from, so that none is run for other sources."""
    folders = ("csrc/kernels", "csrc/common", "csrc/cuda", "tests/gpu", "benchmarks/kernels")
    kept = {".h", ".cu", ".cmake", ".txt"}
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kept]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def why_not_prebuilt() -> str:
    """Why the programs have to be built here; "" if those that are there can be run."""
    if not all((PREBUILT / program).exists() for program in PROGRAMS):
        return "there are none"
    made_of = PREBUILT / "sources"
    if not made_of.exists() or made_of.read_text().strip() != sources_hash():
        return "they are of other sources"
    try:
        answer = subprocess.run([PREBUILT / "bench_kernels", "--help"], capture_output=True)
    except OSError as error:
        return f"they cannot be run here: {error.strerror}"
    return "" if answer.returncode == 0 else f"they cannot be run here: {answer.stderr!r}"


@cache
def cublas() -> str:
    """The library that torch multiplies with, without importing torch; "" for the loader's."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(path) for path in (spec.submodule_search_locations or [])] if spec else []
    folders.append(Path("/usr/local/cuda"))
    found = [path for folder in folders for path in sorted(folder.rglob("libcublas.so.1[0-9]"))]
    return str(found[0].resolve()) if found else ""


def tool(name: str) -> str:
    """On PATH, or where the CUDA toolkit has it."""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(places)) or name


def facts() -> dict[str, Any]:
    return {
        "capability": capability(),
        "cublas": cublas(),
        "sources": sources_hash(),
        "prebuilt": why_not_prebuilt() or "used",
        "cpus": os.cpu_count(),
        "python": sys.version.split()[0],
    }


VERSIONS = """
import json, importlib.metadata as m, torch
names = "torch triton nvidia-cublas transformers peft pytest pytest-xdist cmake ninja".split()
found = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
print(json.dumps({n: found.get(n) for n in names} | {"cuda": torch.version.cuda,
    "device": torch.cuda.get_device_name(), "torch_git": torch.version.git_version}))
"""


class First:
    """All steps, in their order."""

    def __init__(self, steps: Steps, dry: bool, families: Sequence[str]):
        self.steps, self.dry, self.families = steps, dry, families
        self.make = [tool("make"), "-C", str(ROOT), f"PYTHON={sys.executable}"]
        self.path = {"PYTHONPATH": str(ROOT)}

    def build(self) -> Step:
        return self._step("build", ["nice", "-n", "19", *self.make, "gpu-build"], 330)

    def versions(self) -> Step:
        return self._step("versions", [sys.executable, "-c", VERSIONS], 90)

    def before_the_build(self) -> Iterator[Step]:
        yield self._step("nvidia-smi", [tool("nvidia-smi"), "-q"], 10)
        yield self._step("nvcc", [tool("nvcc"), "--version"], 5)
        yield self._step(
            "programs", [*self.make, "gpu-prebuilt"], 150,
            left_out=lambda: "" if why_not_prebuilt() else "they were built before",
        )  # fmt: skip
        for family in self.families:
            yield self._step(f"kernels {family}", [PREBUILT / "kernels_on_gpu", family], 45)
            for name in ("memcheck", "racecheck"):
                yield self._sanitizer(name, family, 45, only_if_wrong=True)
        yield from self._bench_kernels()

    def _bench_kernels(self) -> Iterator[Step]:
        ours = self.families[0]
        yield self._bench(
            "passes right", 60, shapes=LARGE, families=ours, ranks="16,128", dropouts="0.1",
            adapters="bf16,fp32", rounds="0",
        )  # fmt: skip
        for rank in ("16", "64", "128"):  # in processes of their own, as all groups: one may die
            yield self._bench(f"times r{rank}", 35, shapes=GOALS, families=ours, ranks=rank)
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
        pytest += ["--timeout", "50", "--maxfail", "40", "-p", "no:cacheprovider"]
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
        return self._step("counters", [*counters, "--passes", "product,down,up_grad"], 60)

    def at_last(self) -> Iterator[Step]:
        for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
            for family in self.families:
                yield self._sanitizer(name, family, 90, only_if_wrong=False)
        checks = [sys.executable, str(ROOT / "tests" / "cuda_check.py")]
        yield self._after_build("imported", checks, 60)

    # ---- One step ------------------------------------------------------------------------------

    def _step(self, name: str, command: Sequence[Any], seconds: float, **more: Any) -> Step:
        """In a dry run something small stands for the command; limits and order are the same."""
        words = list(map(str, command))
        if self.dry:
            line = json.dumps({"pass": name, "command": " ".join(words)})
            words = [sys.executable, "-c", f"print({line!r})"]
        return Step(name, words, seconds, **more)

    def _bench(self, name: str, limit: float, **options: str) -> Step:
        command: list[Any] = [PREBUILT / "bench_kernels"]
        if library := cublas():
            command += ["--cublas", library]
        command += [word for key, value in options.items() for word in (f"--{key}", value)]
        # Its other half, cublasLt, lies beside it.
        folder = {"LD_LIBRARY_PATH": str(Path(library).parent)} if library else {}
        return self._step(name, command, limit, rows=True, environment=folder)

    def _sanitizer(self, name: str, family: str, seconds: float, only_if_wrong: bool) -> Step:
        program = [PREBUILT / "kernels_on_gpu", family, "small"]
        command = [tool("compute-sanitizer"), "--tool", name, "--error-exitcode", "1", *program]
        wrong = f"{name} of wrong {family}" if only_if_wrong else f"{name} {family}"

        def left_out() -> str:
            kernels = self.steps.status(f"kernels {family}")
            if only_if_wrong:
                return "" if kernels in (FAILED, KILLED) else "the kernels are right"
            done = self.steps.status(f"{name} of wrong {family}")
            return "it ran before" if done in (RIGHT, FAILED, KILLED) else ""

        return self._step(wrong, command, seconds, left_out=left_out)

    def _after_build(
        self, name: str, command: Sequence[Any], seconds: float, **environment: str
    ) -> Step:
        def left_out() -> str:
            built = self.steps.status("build") == RIGHT
            return "" if built else "the extension was not built"

        more = self.path | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"} | environment
        return self._step(name, command, seconds, environment=more, left_out=left_out)


def digest(rows: Sequence[dict[str, Any]]) -> str:
    """The rows that decide, one line each: what is wrong, whole calls, the product alone."""
    lines = [f"WRONG {describe(row)}: {row.get('wrong')}" for row in rows if row.get("ok") is False]
    for row in rows:
        if "us" not in row or not row["pass"].endswith(("forward+backward", "forward", "alone")):
            continue
        lines.append(
            f"{describe(row)}: {row['us']:.1f} us, {row.get('over_cublas') or 0:.3f}x cuBLAS"
        )
    return "\n".join(lines)


def describe(row: dict[str, Any]) -> str:
    keys = ("family", "M", "K", "N", "r", "p", "adapters", "pass")
    return " ".join(f"{key}={row[key]}" if len(key) == 1 else str(row[key]) for key in keys)


def run_all(first: First) -> None:
    steps = first.steps
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tests/gpu/first.py", description=__doc__)
    parser.add_argument("--seconds", type=float, default=560.0, help="for everything (560)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu-first")
    parser.add_argument(
        "--copy-to", type=Path, default=os.environ.get("OUT") or None,
        help="a folder that gets summary.json, rows.jsonl and logs.tar.gz too ($OUT)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="each step tells its command instead"
    )
    parser.add_argument(
        "--hash", action="store_true", help="of the programs' sources; runs nothing"
    )
    options = parser.parse_args(argv)
    if options.hash:
        print(sources_hash())
        return 0
    if not options.dry_run and (reason := why_no_gpu()):
        print(f"make gpu-first: {reason}; --dry-run shows the steps", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are killed first
    known = facts()
    steps = Steps(options.folder, options.seconds - RESERVE, options.copy_to, known)
    newest = known["capability"] == 90 or options.dry_run
    run_all(First(steps, options.dry_run, ("sm90", "sm80") if newest else ("sm80",)))
    if not options.dry_run:
        print(digest(steps.rows))
    bad = [r["name"] for r in steps.results if r["status"] in (FAILED, KILLED)]
    left_out = [r["name"] for r in steps.results if r["status"] == LEFT_OUT]
    print(f"{steps.passed():.0f} s; failed or killed: {', '.join(bad) or 'none'}; left out: "
          f"{', '.join(left_out) or 'none'}; results: {steps.folder}")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
