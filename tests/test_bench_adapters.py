"""`python -m lora_ext.bench --adapters`: every contender is right and in the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_ext.bench import adapters
from lora_ext.bench.cli import main

ARGUMENTS = ["--shapes", "48x32", "--tokens", "24,25", "--budget", "0.05", "--threads", "1"]


def test_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert main(["--adapters", "3,8", *ARGUMENTS, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["adapters"], row["tokens"], row["dtype"], row["mode"]) for row in rows] == [
        (count, 24, dtype, mode)
        for count in (3, 8)
        for dtype in ("fp32", "bf16")
        for mode in ("fwd", "fwd+bwd")
    ]  # 25 rows are no multiple of either
    for row in rows:
        assert row["ratio"].keys() >= {"lora_ext", "calls", "stack + bmm", "peft", "one adapter"}
        assert row["ratio"]["one adapter"] == 1.0
    assert "many adapters in one batch" in capsys.readouterr().out


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Small, and the table whole where there is no terminal."""
    file = tmp_path / "rows.json"
    assert main(["--adapters", "2", "--quick", "--threads", "1", "--json", str(file)]) == 0
    assert {(row["shape"], row["tokens"]) for row in json.loads(file.read_text())} == {
        ("256x256", 128)
    }
    out = capsys.readouterr().out
    assert "adapters" in out and "lora_ext" in out and "…" not in out


def test_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--adapters", "7", *ARGUMENTS])
    assert "the same number of rows" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--ranks=4", "--dropouts=0.1", "--rivals=naive", "--full"])
def test_what_means_nothing_here_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--adapters", "2", option])
    name = option.partition("=")[0]
    assert f"{name} has no meaning with --adapters" in capsys.readouterr().err


def test_a_wrong_contender_is_found_out() -> None:
    mixed = adapters.make_mixed((16, 12), 8, 4, torch.float32)
    found = adapters.ways(mixed)
    adapters.check(mixed, found)
    way, trained = found[adapters.OURS]
    found[adapters.OURS] = (lambda x: way(x) * 1.05, trained)
    with pytest.raises(AssertionError, match="lora_ext is wrong"):
        adapters.check(mixed, found)
