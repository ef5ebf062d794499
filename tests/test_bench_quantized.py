"""`python -m lora_ext.bench --quantized`: every contender is right and in the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lora_ext.bench.cli import main
from lora_ext.bench.grid import Case
from lora_ext.bench.problem import make_problem
from lora_ext.bench.quantized import QUANTIZED_RIVALS
from lora_ext.quant import quantize

ARGUMENTS = ["--shapes", "64x96", "--ranks", "4", "--budget", "0.05", "--threads", "1"]


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_results(quant_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes, with which it is in tests/quantized."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    file = tmp_path / "rows.json"
    given = ["--quantized", quant_type, *ARGUMENTS, "--json", str(file)]
    assert main([*given, "--tokens=3,40", "--dropouts=0.1"]) == 0
    found = json.loads(file.read_text())
    assert found["environment"]["quantized"] == quant_type
    names = [rival.name for rival in QUANTIZED_RIVALS]
    assert names[1:3] == ["lora_ext", "lora_ext_quantized"]
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 2 * len(names)  # tokens, dtypes, modes
    status = {(row["rival"], row["status"]) for row in rows}
    assert status == {(n, "skipped" if n == "peft_bnb" else "ok") for n in names}


def test_the_weight_has_the_values_of_its_codes() -> None:
    case = Case(96, 64, 3, 4, "bf16", 0.0)
    problem = make_problem(case, torch.device("cpu"), "nf4")
    assert problem.quantized is not None
    assert torch.equal(problem.weight, problem.quantized.dequantize(torch.bfloat16))
    again = quantize(problem.weight, "nf4")  # as PEFT's contender does
    assert torch.equal(again.codes, problem.quantized.codes)
    assert make_problem(case, torch.device("cpu")).quantized is None


@pytest.mark.parametrize("option", ["--adapters=4", "--rivals=naive", "--markdown=x.md"])
def test_what_means_nothing_here_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--quantized", "nf4", option])
    name = option.partition("=")[0]
    assert f"{name} has no meaning with --quantized" in capsys.readouterr().err


def test_reports_over_other_bases_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = [*ARGUMENTS, "--tokens=3", "--dropouts=0", "--dtypes=fp32", "--modes=fwd"]
    files = {kind: str(tmp_path / f"{kind}.json") for kind in ("nf4", "int8", "plain")}
    options = {kind: ["--quantized", kind] if kind != "plain" else [] for kind in files}
    for kind, file in files.items():
        assert main([*options[kind], *grid, "--json", file]) == 0
    said = {"plain": "over plain weights", "nf4": "of --quantized nf4"}
    for old, new in (("nf4", "int8"), ("nf4", "plain"), ("plain", "nf4")):
        for given in ([files[old], files[new]], [files[old], *options[new], *grid]):
            with pytest.raises(SystemExit):
                main(["--compare", *given])
            error = " ".join(capsys.readouterr().err.split())
            assert f"{old}.json is {said[old]}, expected one " in error
    main(["--compare", files["nf4"], files["nf4"]])
    assert "Ratios to the frozen layer" in capsys.readouterr().out
