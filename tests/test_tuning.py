"""autotune: what is measured, how it is chosen and kept. Measuring the paths needs a GPU; the rest
is here."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_ext
from lora_ext import tuning
from lora_ext.tuning import Call, TunedCall

CALL = Call(False, 2048, 1024, 768, 16, "bfloat16", "float32", True)
VERSIONS = {"device": "a GPU", "lora_ext": "0", "torch": "1", "cuda": "2"}


def tuned(call: Call, path: str = "hybrid") -> TunedCall:
    return TunedCall(call, path, {"fused": 2.0, "hybrid": 1.0, "composed": 1.5})


def test_the_fastest_is_chosen_and_fused_where_the_clock_sees_no_difference() -> None:
    def choice(fused: float, hybrid: float, composed: float) -> str:
        return tuning.choose(CALL, dict(fused=fused, hybrid=hybrid, composed=composed)).path

    assert choice(1.0, 2.0, 3.0) == "fused"
    assert choice(2.0, 1.0, 3.0) == "hybrid"
    assert choice(3.0, 2.0, 1.0) == "composed"
    assert choice(1.019, 1.0, 1.0) == "fused"
    assert choice(1.021, 1.019, 1.0) == "hybrid"


def test_medians_are_of_one_call() -> None:
    runs = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.02)}
    milliseconds = tuning.medians(runs, 3, torch.device("cpu"))
    # Sleep lasts at least as long as asked for.
    assert 1.0 <= milliseconds["short"] < milliseconds["long"]
    assert milliseconds["long"] >= 20.0


def test_calls_of_a_model() -> None:
    model = nn.Sequential(
        lora_ext.nn.Linear(8, 6, 4, lora_dropout=0.1, dtype=torch.bfloat16),
        nn.ReLU(),
        lora_ext.nn.Linear(6, 8, 2),
        lora_ext.nn.Linear(6, 8, 2),
        nn.Linear(8, 8),
        lora_ext.nn.Linear(8, 8, 0),
    )
    cpu = torch.device("cpu")
    large = Call(False, 64, 6, 8, 4, "bfloat16", "float32", True)
    small = Call(False, 64, 8, 6, 2, "float32", "float32", False)
    expected = [(cpu, large), (cpu, replace(large, backward=True))]
    expected += 2 * [(cpu, small), (cpu, replace(small, backward=True))]
    assert tuning.calls_of(model, [64]) == expected
    without_dropout = tuning.calls_of(model.eval(), [64, 128])[:2]
    assert without_dropout == [
        (cpu, replace(large, dropout=False)),
        (cpu, replace(large, dropout=False, backward=True)),
    ]


def test_a_model_without_a_gpu_is_refused() -> None:
    model = lora_ext.nn.Linear(8, 6, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"got no lora_ext\.nn\.Linear on a GPU"):
        lora_ext.autotune(model)
    with pytest.raises(ValueError, match="tokens, rounds"):
        lora_ext.autotune(model, tokens=[0])
    with pytest.raises(ValueError, match="tokens, rounds"):
        lora_ext.autotune(model, rounds=0)


def test_cache(tmp_path: Path) -> None:
    file = tuning.cache_file("NVIDIA H200 (x)", tmp_path / "made")
    assert file == tmp_path / "made" / "autotune-nvidia-h200-x.json"
    assert tuning.read_cache(file, VERSIONS) == {}
    known = {call: tuned(call) for call in (CALL, replace(CALL, backward=True))}
    tuning.write_cache(file, VERSIONS, known)
    assert tuning.read_cache(file, VERSIONS) == known
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    # Measured for something else
    for name in VERSIONS:
        assert tuning.read_cache(file, VERSIONS | {name: "another"}) == {}


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("LORA_EXT_CACHE", raising=False)
    assert tuning.cache_file("gpu") == Path("/xdg/lora_ext/autotune-gpu.json")
    monkeypatch.setenv("LORA_EXT_CACHE", "/mine")
    assert tuning.cache_file("gpu") == Path("/mine/autotune-gpu.json")


ROW = asdict(tuned(CALL))
BROKEN = {
    "no JSON": "{",
    "no object": "[]",
    "no versions": '{"calls": []}',
    "no calls": json.dumps({"versions": VERSIONS}),
    "another path": json.dumps({"versions": VERSIONS, "calls": [ROW | {"path": "quick"}]}),
    "a fact too few": json.dumps({"versions": VERSIONS, "calls": [ROW | {"call": {"tokens": 1}}]}),
    "no dtype": json.dumps(
        {"versions": VERSIONS, "calls": [ROW | {"call": ROW["call"] | {"base": "tensor"}}]}
    ),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_cache_is_measured_again(tmp_path: Path, content: str) -> None:
    file = tmp_path / "cache.json"
    file.write_text(content)
    with pytest.warns(UserWarning, match="is not used .* measuring again"):
        assert tuning.read_cache(file, VERSIONS) == {}


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.warns(UserWarning, match="is not written"):
        tuning.write_cache(in_the_way / "cache.json", VERSIONS, {CALL: tuned(CALL)})
