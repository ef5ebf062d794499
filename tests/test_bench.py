"""The benchmark itself: its rows, its files, its comparisons and its exit status."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from lora_ext.bench import load
from lora_ext.bench.__main__ import run
from lora_ext.bench.cli import main
from lora_ext.bench.grid import FWD, FWD_BWD, MODES, Case
from lora_ext.bench.measure import Budget
from lora_ext.bench.report import BEGIN, END, standing
from lora_ext.bench.results import OK, SKIPPED, WRONG, Quartiles, Report, Row, Timing
from lora_ext.bench.rivals import RIVALS

K, N, M, R = 32, 48, 5, 4
CPU = torch.device("cpu")
TINY = Case(in_features=K, out_features=N, tokens=M, rank=R, dtype="fp32", dropout_p=0.0)
BUDGET = Budget(seconds=0.01, min_rounds=3, max_rounds=3)
ENVIRONMENT = {
    "device": "a machine",
    "threads": 1,
    "cpus": 1,
    "load_average": 0.0,
    "versions": {"python": "3"},
    "commit": None,
    "dirty": None,
    "date": "2026-01-01",
    "command": "python -m lora_ext.bench",
}


# Threads that wait for each other on a busy machine would make these tests slow.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a small grid with all outputs; returns the folder with them."""
    folder = tmp_path_factory.mktemp("bench")
    sizes = ["--shapes", f"{K}x{N}", "--tokens", str(M), "--ranks", str(R)]
    files = ["--json", str(folder / "run.json"), "--markdown", str(folder / "run.md")]
    assert main(["--quick", "--device", "cpu", "--budget", "0.01", *sizes, *files]) == 0
    return folder


# The results of a run


def test_json_says_where_the_numbers_come_from(quick_run: Path) -> None:
    data = json.loads((quick_run / "run.json").read_text(encoding="utf-8"))
    assert data["schema"] == 1
    environment = data["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["device"] and environment["date"]
    assert environment["threads"] == 1
    assert environment["command"].startswith("python -m lora_ext.bench --quick")
    facts = {"commit", "dirty", "lora_ext_build", "load_average", "other_load"}
    assert facts <= environment.keys()


def test_every_row_is_timed_or_says_why_not(quick_run: Path) -> None:
    rows = Report.load(quick_run / "run.json").rows
    cases = {row.case for row in rows}
    assert {(case.dtype, case.dropout_p) for case in cases} == {
        (dtype, p) for dtype in ("fp32", "bf16") for p in (0.0, 0.1)
    }
    assert len(rows) == len(cases) * len(MODES) * (len(RIVALS) - 1)  # all but compile
    for row in rows:
        assert row.status in (OK, SKIPPED), row
        if row.status == SKIPPED:
            assert row.timing is None and row.note
            continue
        assert row.timing and len(row.timing.samples_us) >= 3
        times = row.timing.time_us
        assert 0 < times.q1 <= times.median <= times.q3
        assert (row.saved_bytes is not None) == (row.mode == FWD_BWD)


def test_ratios_are_paired_with_the_frozen_layer(quick_run: Path) -> None:
    rows = Report.load(quick_run / "run.json").rows
    frozen = {(row.case, row.mode): row.timing for row in rows if row.rival == "frozen"}
    for row in rows:
        if row.timing is None:
            continue
        base = frozen[row.case, row.mode]
        assert base is not None
        pairs = zip(row.timing.samples_us, base.samples_us, strict=True)
        expected = Quartiles.of([own / other for own, other in pairs])
        assert row.timing.ratio.median == pytest.approx(expected.median, rel=1e-2)


def test_json_survives_a_round_trip(quick_run: Path, tmp_path: Path) -> None:
    report = Report.load(quick_run / "run.json")
    report.save(tmp_path / "copy.json")
    assert Report.load(tmp_path / "copy.json") == report


# Comparison of reports


def write_report(path: Path, ratio: float, spread: float = 0.01, status: str = OK) -> str:
    """Write a report of one row, with quartiles at ratio ± spread."""
    quartiles = Quartiles(ratio - spread, ratio, ratio + spread)
    timing = Timing(quartiles, quartiles, [ratio], 1) if status == OK else None
    row = Row(TINY, FWD, "lora_ext", status, None, timing)
    frozen_quartiles = Quartiles(1.0, 1.0, 1.0)
    frozen_timing = Timing(frozen_quartiles, frozen_quartiles, [1.0], 1)
    frozen = Row(TINY, FWD, "frozen", OK, None, frozen_timing)
    Report(ENVIRONMENT, [frozen, row]).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("new", "expected", "word"),
    [
        ({"ratio": 1.20}, 1, "REGRESSION"),
        ({"ratio": 1.14}, 0, "same"),  # outside the spread, but within 5 %
        ({"ratio": 1.30, "spread": 0.25}, 0, "not distinguishable"),  # within the spread
        ({"ratio": 1.10, "spread": 0.25}, 0, "not distinguishable"),  # it may be anything
        ({"ratio": 1.10}, 0, "same"),
        ({"ratio": 41 * 1.10, "spread": 44.1}, 0, "not distinguishable"),
        ({"ratio": 1.00}, 0, "improvement"),
        ({"ratio": 1.10, "status": WRONG}, 1, "REGRESSION"),
    ],
    ids=[
        "regression",
        "small",
        "noise",
        "noise around the same",
        "equal",
        "41-fold in noise",
        "improvement",
        "wrong",
    ],
)
def test_compare(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    new: dict[str, Any],
    expected: int,
    word: str,
) -> None:
    old_path = write_report(tmp_path / "old.json", 1.10)
    new_path = write_report(tmp_path / "new.json", **new)
    assert main(["--compare", old_path, new_path]) == expected
    assert word in capsys.readouterr().out


def with_environment(path: str, **changes: Any) -> str:
    report = Report.load(Path(path))
    Report({**report.environment, **changes}, report.rows).save(Path(path))
    return path


@pytest.mark.parametrize("which", ["old", "new"])
def test_times_of_a_busy_machine_are_no_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    files = {
        name: write_report(tmp_path / name, r) for name, r in {"old": 1.0, "new": 41.0}.items()
    }
    assert main(["--compare", files["old"], files["new"]]) == 1
    with_environment(files[which], other_load=0.9)
    assert main(["--compare", files["old"], files["new"]]) == 0
    assert "1 of 1 are not distinguishable" in capsys.readouterr().out
    wrong = with_environment(write_report(tmp_path / "wrong", 1.0, status=WRONG), other_load=0.9)
    assert main(["--compare", files["old"], wrong]) == 1


def test_compare_says_where_both_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"threads": 2, "cpus": 4, "versions": {"python": "3", "torch": "2.99"}}
    old = with_environment(write_report(tmp_path / "old.json", 1.0), device="a toaster")
    new = with_environment(write_report(tmp_path / "new.json", 1.0), **changes, other_load=3.25)
    main(["--compare", old, new])
    text = " ".join(capsys.readouterr().out.split())
    assert "old: a toaster, CPU threads: 1, load 0 before of 1 CPUs; python 3" in text
    assert "others used 3.25 of 4 CPUs (BUSY); python 3, torch 2.99" in text
    assert "Different devices: a toaster and a machine" in text
    assert "Different threads: 1 and 2" in text


@pytest.mark.parametrize(
    ("measured", "busy"),
    [
        ({"other_load": 0.9}, False),
        ({"other_load": 1.1}, True),
        ({"other_load": 0.0, "load_average": 7.0}, False),  # it ended before the run
        ({"other_load": 0.0, "load_average": 9.0}, True),
        ({"load_average": 1.9}, False),
        ({"load_average": 2.1}, True),
    ],
    ids=str,
)
def test_every_output_says_how_busy_the_machine_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: dict[str, float], busy: bool
) -> None:
    file = with_environment(write_report(tmp_path / "run.json", 1.0), cpus=4, **measured)
    markdown = tmp_path / "run.md"
    assert main(["--compare", file, file, "--markdown", str(markdown)]) == 0
    table = markdown.read_text(encoding="utf-8")
    words = f"load {measured.get('load_average', 0):g} before"
    if "other_load" in measured:
        words += f", others used {measured['other_load']:g}"
    words += " of 4 CPUs"
    for text in (table, " ".join(capsys.readouterr().out.split())):
        assert words in text and "a machine" in text
        assert ("these times say little" in text) == busy == ("BUSY" in text)
    pytest.importorskip("matplotlib")
    from lora_ext.bench import plots

    text, color = plots.caption(Report.load(Path(file)))
    assert words in text and ("BUSY" in text) == busy == (color == "red")


def test_others_are_counted_without_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_all_own = iter([(100.0, 5000.0, 10.0), (102.0, 5003.5, 11.5)])
    monkeypatch.setattr(load, "_seconds", lambda: next(clock_all_own))
    assert load.OtherLoad().cpus() == 1.0  # in 2 s the CPUs were busy 3.5 s, 1.5 s of them here
    monkeypatch.undo()
    here = load.OtherLoad()
    time.sleep(0.05)
    assert (others := here.cpus()) is not None and others >= 0.0


def test_compare_with_a_new_run(quick_run: Path) -> None:
    """Times of such a small run are noise, so either verdict will do."""
    sizes = ["--shapes", f"{K}x{N}", "--tokens", str(M), "--ranks", str(R), "--dtypes", "fp32"]
    options = ["--quick", "--device", "cpu", *sizes, "--rivals", "lora_ext"]
    assert main([*options, "--compare", str(quick_run / "run.json")]) in (0, 1)


def test_compare_without_common_rows(tmp_path: Path, quick_run: Path) -> None:
    other = write_report(tmp_path / "other.json", 1.0)
    report = Report.load(Path(other))
    rows = [replace(row, case=replace(TINY, tokens=M + 1)) for row in report.rows]
    Report(ENVIRONMENT, rows).save(Path(other))
    with pytest.raises(SystemExit, match="2"):
        main(["--compare", other, str(quick_run / "run.json")])


# Plots, tables, command line


def test_plots(quick_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = str(quick_run / "run.json")
    assert main(["--compare", run, run, "--plots", str(tmp_path)]) == 0
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"ratio_over_rank", "ratio_over_shape", "saved_bytes"}
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_markdown_replaces_only_what_is_between_the_markers(quick_run: Path) -> None:
    assert (quick_run / "run.md").read_text(encoding="utf-8").startswith(BEGIN)
    readme = quick_run / "README.md"
    readme.write_text(f"# Title\n{BEGIN}\nold\n{END}\nrest\n", encoding="utf-8")
    run = str(quick_run / "run.json")
    assert main(["--compare", run, run, "--markdown", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n{BEGIN}\n") and text.endswith(f"{END}\nrest\n")
    assert "\nold\n" not in text and "| K→N |" in text and "geomean" in text


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_matplotlib(arguments: object) -> int:
        raise ModuleNotFoundError(name="matplotlib")

    monkeypatch.setattr("lora_ext.bench.cli.main", without_matplotlib)
    assert run() == 2
    assert "matplotlib is not installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--shapes", "12"],
        ["--tokens", "0"],
        ["--dropouts", "1"],
        ["--rivals", "nobody"],
        ["--quick", "--full"],
        ["--compare", "missing.json"],
        ["--compare", "a", "b", "c"],
        ["--markdown", __file__],
        ["--markdown", "/nowhere/table.md"],
        ["--json", "/tmp"],
        ["--budget", "nan"],
        ["--budget", "-1"],
        ["--threads", "999999999999"],
        ["--deadline", "0"],
    ],
    ids=" ".join,
)
def test_unusable_command_lines_exit_with_2(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", "--device", "cuda", "--json", str(file)])
    assert "error: --device cuda: torch " in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize("missing", ["device", "cpus", "load_average", "versions"])
def test_a_report_without_an_environment_is_no_report(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "run.json"
    environment = {name: value for name, value in ENVIRONMENT.items() if name != missing}
    Report(environment, []).save(path)
    with pytest.raises(ValueError, match=f"run.json is not a .*: its environment has no {missing}"):
        Report.load(path)


DAMAGE: dict[str, tuple[list[Any], Any, str]] = {
    "nan": (["rows", 0, "timing", "ratio", "median"], float("nan"), "expected finite quartiles"),
    "zero": (["rows", 0, "timing", "ratio", "q1"], 0, "expected finite quartiles above 0"),
    "string": (["rows", 0, "timing", "ratio", "q3"], "x", r"ratio\.q3: got 'x', expected float"),
    "case": (["rows", 0, "case", "tokens"], [1], r"case\.tokens: got \[1\], expected int"),
    "load": (["environment", "load_average"], None, "load_average: got None, expected float"),
    "environment": (["environment"], list(ENVIRONMENT), r"environment: got \['device.*, expected"),
    "versions": (["environment", "versions"], None, "versions: got None, expected dict"),
}


@pytest.mark.parametrize(("place", "value", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_report_with_other_values_is_no_report(
    quick_run: Path, tmp_path: Path, place: list[Any], value: Any, message: str
) -> None:
    data = json.loads((quick_run / "run.json").read_text())
    target = data
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"run.json is not a .*{message}"):
        Report.load(path)


def test_a_report_nested_too_deep_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"run\.json is not a benchmark report"):
        Report.load(path)


def test_a_full_disk_exits_with_2(quick_run: Path) -> None:
    file = str(quick_run / "run.json")
    with pytest.raises(SystemExit, match="2"):
        main(["--compare", file, file, "--json", "/dev/full"])


def test_the_report_says_in_how_many_rows_lora_ext_is_the_fastest() -> None:
    def row(tokens: int, rival: str, ratio: float) -> Row:
        quartiles = Quartiles(ratio, ratio, ratio)
        timing = Timing(quartiles, quartiles, [ratio], 1)
        return Row(replace(TINY, tokens=tokens), FWD, rival, OK, timing=timing)

    times = {1: (1.0, 1.1), 2: (1.2, 1.2), 3: (1.01, 1.0), 4: (1.05, 1.0), 5: (1.12, 1.0)}
    rows = []
    for tokens, (ours, naive) in times.items():
        rows += [row(tokens, "frozen", 0.5), row(tokens, "naive", naive), row(tokens, "peft", 2.0)]
        rows += [row(tokens, "lora_ext", ours), row(tokens, "lora_ext_fp32", 0.9)]
    assert standing(rows) == (
        "By the medians lora_ext is the fastest in 2 of 5, up to 2% behind the best rival in 1, "
        "5.0% to 12.0% in 2"
    )
    assert standing([row(1, "frozen", 1.0), row(1, "lora_ext", 1.0)]) is None
