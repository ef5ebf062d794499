"""`python -m lora_ext.bench --model`: every contender is right and in the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from lora_ext.bench.__main__ import run
from lora_ext.bench.cli import main
from lora_ext.bench.measure import kept_bytes
from lora_ext.bench.models import memory
from lora_ext.bench.models.bases import Base, make_base
from lora_ext.bench.models.cases import ALL_LINEAR, MODELS, Q_V, ModelCase
from lora_ext.bench.models.check import ModelChecker
from lora_ext.bench.models.run import ModelReport
from lora_ext.bench.models.ways import WAYS, Trained
from lora_ext.bench.rivals import FROZEN, OURS, Unavailable

CPU = torch.device("cpu")
SMALL = ["--sizes", "64x96", "--layers", "1", "--ranks", "4", "--threads", "1", "--budget", "0.01"]
EAGER = [name for name in WAYS if name != "compile"]
pytestmark = pytest.mark.usefixtures("one_thread")


def base_of(model: str = "tiny", targets: str = ALL_LINEAR, **more: Any) -> Base:
    sizes = MODELS[model].resized((128, 96), 1)
    options = {"tokens": 24, "rank": 4, "dtype": "fp32", "dropout_p": 0.1, **more}
    return make_base(ModelCase(model, sizes, targets, **options), CPU)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", [ALL_LINEAR, Q_V])
@pytest.mark.parametrize("model", ["tiny", "bert"])
def test_contenders_are_right(model: str, targets: str, dtype: str) -> None:
    base = base_of(model, targets, dtype=dtype)
    checker = ModelChecker(base)
    for name in EAGER:
        if WAYS[name].skip_reason(base.case):
            assert (name, dtype) == ("peft_fp32", "fp32")
        elif (model, name) == ("bert", "lora_ext_recompute"):
            with pytest.raises(Unavailable, match="no MLP with a gate"):
                WAYS[name].build(base)
        else:
            faults, errors = checker.check(WAYS[name], WAYS[name].build(base))
            assert not faults
            assert errors.keys() == (set() if name == FROZEN else {"logits", "dx", "dA", "dB"})


def _without_dropout(trained: Trained) -> None:
    trained.model.eval()


def _another_value(trained: Trained) -> None:
    trained.adapters[-1].data.mul_(1.05)


def _another_order(trained: Trained) -> None:
    trained.adapters[0].data.copy_(trained.adapters[0].data.flip(0))


@pytest.mark.parametrize("fault", [_without_dropout, _another_value, _another_order])
@pytest.mark.parametrize("name", ["peft", "lora_ext_blocks"])
def test_a_wrong_contender_is_found_out(name: str, fault: Any) -> None:
    base = base_of()
    trained = WAYS[name].build(base)
    fault(trained)
    faults, _ = ModelChecker(base).check(WAYS[name], trained)
    assert faults


def test_a_contender_whose_mask_is_unknown_has_to_be_finite() -> None:
    base = base_of()
    trained = WAYS[OURS].build(base)
    assert ModelChecker(base).check(WAYS["compile"], trained) == ([], {})
    trained.adapters[0].data.fill_(float("nan"))
    faults, _ = ModelChecker(base).check(WAYS["compile"], trained)
    assert faults == ["logits is not finite"]


def test_blocks_keep_less() -> None:
    base = base_of()
    (inputs, *_) = base.inputs()

    def kept(name: str) -> int:
        trained = WAYS[name].build(base)
        return kept_bytes(lambda: trained.loss(inputs), trained.model.parameters())

    assert kept("lora_ext_recompute") < kept("lora_ext_blocks") < kept("lora_ext") < kept("peft")


def test_a_step_trains_the_adapters_alone() -> None:
    base = base_of()
    before = [parameter.clone() for parameter in base.model.parameters()]
    for name in EAGER[:2]:
        trained = WAYS[name].build(base)
        own = [parameter.clone() for parameter in trained.adapters]
        trained.step(base.inputs()[0])
        moved = [not torch.equal(a, b) for a, b in zip(own, trained.adapters, strict=True)]
        assert all(moved) and len(moved) == (0 if name == FROZEN else 2 * len(base.targets))
    assert all(map(torch.equal, before, base.model.parameters()))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_is_what_a_call_needs_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            torch.ones(16, 2**20)  # 64 MiB, each freed before the next

    peak = memory.peak_of(call, CPU)
    assert peak is not None and 63 << 20 < peak < 80 << 20


def test_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One case, as each contender's memory takes a process."""
    file = tmp_path / "run.json"
    case = ["--tokens", "48", "--dtypes", "bf16", "--dropouts", "0.1", "--targets", "qv"]
    files = ["--json", str(file), "--plots", str(tmp_path)]
    assert main([*SMALL, *case, *files, "--rivals", "lora_ext_blocks"]) == 0
    report = ModelReport.load(file)
    assert [row.way for row in report.rows] == [FROZEN, "lora_ext_blocks"]
    for row in report.rows:
        assert row.status == "ok" and row.timing is not None
        assert row.case.what == "1 x 64→96" and row.case.targets == Q_V
        assert row.kept_bytes and row.peak_bytes and row.tokens_per_s
        assert row.tokens_per_s == pytest.approx(48e6 / row.timing.time_us.median, rel=0.01)
    assert report.environment["versions"]["transformers"]
    assert json.loads(file.read_text())["kind"] == "models"
    assert (tmp_path / "models.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "kept / token" in out and "…" not in out


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Unavailable, match="peft is not installed"):
        WAYS["peft"].build(base_of())


def test_without_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(["--model", "tiny", *SMALL]) == 2
    assert "transformers is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny", "--modes", "fwd"], "--modes has no meaning with --model"),
        (["--model", "tiny", "--rivals", "naive"], "naive takes no part with --model"),
        (["--rivals", "lora_ext_blocks"], "lora_ext_blocks takes no part without --model"),
        (["--layers", "2"], "--layers has a meaning with --model alone"),
        (["--model", "tiny", "--adapters", "8"], "--model has no meaning with --adapters"),
    ],
)
def test_what_means_nothing_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
