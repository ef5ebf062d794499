"""The commands of `lora-ext` that tell, on real models and adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cli_places
import pytest
import torch
from cli_places import (
    CONFIGS,
    A,
    B,
    Q,
    edited,
    of_another_rank,
    with_value,
)
from cli_runs import failed, run
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import tiny_models

import lora_ext
from lora_ext import LoraModel
from lora_ext.cli.program import program

place = cli_places.place  # a fixture


# ---- help, info, bench --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in program.commands if name != "bench"])
def test_help_says_what_a_command_does_and_answers(name: str) -> None:
    found = run(name, "--help")
    assert found.code == 0 and found.err == ""
    assert "JSON:" in found.out and "--json" in found.out and f"lora-ext {name}" in found.out


def test_every_key_of_json_is_in_the_help(place: Path, tmp_path: Path) -> None:
    calls = {
        "info": (),
        "inspect": (place / "plain",),
        "verify": (place / "plain",),
        "diff": (place / "plain", place / "dora"),
        "merge": (place / "llama", place / "plain", tmp_path / "merged"),
        "convert": (place / "plain", tmp_path / "converted"),
        "explain": (place / "llama",),
    }
    for name, arguments in calls.items():
        said = run(name, "--help").out.replace(",", " ").split("JSON:")[1].split()
        said = [word.strip("().;:") for word in said]
        assert not run(name, *arguments, "--json").json().keys() - set(said), name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("nothing", "No such command 'nothing'"),
        ("-x", "No such option"),
        ("inspect", "Missing argument 'FOLDER'"),
        ("inspect /nowhere", "'/nowhere' does not exist"),
        ("verify /nowhere", "'/nowhere' does not exist"),
        ("verify . --model /nowhere", "'/nowhere' does not exist"),
        ("diff /nowhere .", "'/nowhere' does not exist"),
        ("merge a", "'a' does not exist"),
        ("convert /nowhere out", "'/nowhere' does not exist"),
        ("convert . out --dtype int4", "'int4' is not one of"),
        ("convert . out --initial /nowhere", "'/nowhere' does not exist"),
        ("explain /nowhere", "'/nowhere' does not exist"),
        ("explain . --tokens many", "'many' is not a valid integer"),
        ("info --all", "No such option"),
        ("doctor here", "unexpected extra argument"),
    ],
)
def test_wrong_use(arguments: str, says: str) -> None:
    """One sentence, with --json beside the object that docs/cli.md promises."""
    said = failed(*arguments.split(), code=2)
    assert says in said and "--help` says what it takes" in said


def test_what_only_looks_like_json(tmp_path: Path) -> None:
    """A folder of that name, and the benchmark's own option."""
    assert not run("inspect", "--", "--json").out
    assert not run("bench", "--quick", "--full", "--json", tmp_path / "results").out
    assert run("--version").code == 0 and run().code == 2 and "Usage: " in run().err + run().out


def test_info() -> None:
    data = run("info", "--json").json()
    assert data["versions"]["lora_ext"] == lora_ext.__version__
    assert data["versions"]["torch"] == torch.__version__
    assert data["cpu"]["capability"] == lora_ext.build_info()["cpu_capability"]
    assert len(data["gpus"]) == torch.cuda.device_count() and len(data["runs"]) >= 1
    assert lora_ext.__version__ in run("info").out


def test_bench_is_passed_on() -> None:
    assert run("bench", "--help").out.startswith("usage: python -m lora_ext.bench")
    assert run("bench", "--quick", "--full").code == 2


def test_traceback_is_shown_where_it_is_asked_for(place: Path, tmp_path: Path) -> None:
    arguments = ("merge", place / "llama", place / "for gpt2", tmp_path / "out")
    failed(*arguments)
    with pytest.raises(ValueError, match="c_attn"):
        run("--traceback", *arguments)


# ---- inspect and verify -------------------------------------------------------------------------


def test_inspect(place: Path) -> None:
    data = run("inspect", place / "plain", "--json").json()
    tensors = load_file(place / "plain" / "adapter_model.safetensors")
    assert {one["key"] for one in data["tensors"]} == tensors.keys()
    for one in data["tensors"]:
        exact = tensors[one["key"]].double()
        assert one["shape"] == list(exact.shape) and one["bytes"] == tensors[one["key"]].nbytes
        assert one["norm"] == pytest.approx(float(exact.norm()), rel=1e-12)
        assert one["max_abs"] == float(exact.abs().max())
    assert data["ranks"] == {"4": 6} and data["dtypes"] == {"float32": 12}
    assert data["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert data["config"]["target_modules"] == ["q_proj", "v_proj"]
    assert f"{Q}.{A}" in run("inspect", place / "plain").out


def test_inspect_reads_tensors_larger_than_a_block(place: Path, tmp_path: Path) -> None:
    big = torch.randn(1025, 1024)
    big[-1, -1] = float("inf")

    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors["big"] = big

    folder = edited(place / "plain", tmp_path / "big", put)
    data = run("inspect", folder, "--json").json()
    (found,) = (one for one in data["tensors"] if one["key"] == "big")
    assert (found["nan"], found["inf"], found["norm"], found["max_abs"]) == (0, 1, None, None)
    assert data["non_finite"] == ["big"]
    assert "0 NaN, 1 Inf" in run("inspect", folder).out


@pytest.mark.parametrize("name", CONFIGS)
def test_verify_and_fit(place: Path, name: str) -> None:
    found = run("verify", place / name, "--model", place / "llama", "--json")
    data = found.json()
    assert found.code == 0 and data["ok"] and data["problems"] == [], found
    assert "all is well, and fits" in run("verify", place / name, "--model", place / "llama").out


def without_a_half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"base_model.model.{Q}.{A}"]


def with_a_magnitude(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"base_model.model.{Q}.lora_magnitude_vector"] = torch.ones(32)


def without_a_common_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"base_model.model.{Q}.{A}"] = torch.ones(3, 32)


def of_another_module(tensors: dict[str, torch.Tensor]) -> None:
    for part in (A, B):
        tensors[f"base_model.model.other.{part}"] = tensors[f"base_model.model.{Q}.{part}"].clone()


def without_the_prefix(tensors: dict[str, torch.Tensor]) -> None:
    tensors["stray"] = torch.ones(2)


PROBLEMS = {
    "NaN": (with_value(float("nan")), "values", "1 NaN and 0 Inf"),
    "Inf": (with_value(-float("inf")), "values", "0 NaN and 1 Inf"),
    "a half": (without_a_half, "keys", "has lora_B.weight and no lora_A.weight"),
    "DoRA that the config does not say": (
        with_a_magnitude, "keys", "has lora_magnitude_vector, and the config does not say"
    ),
    "rank": (of_another_rank, "rank", "is 3 in the file, 4 in the config"),
    "shape": (without_a_common_rank, "shape", "have no rank in common"),
    "module": (of_another_module, "keys", "not in the config's target_modules"),
    "prefix": (without_the_prefix, "keys", "does not begin with 'base_model.model.'"),
    "nothing": (dict.clear, "keys", "no tensor is an adapter's"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_verify_finds(place: Path, tmp_path: Path, case: str) -> None:
    change, kind, says = PROBLEMS[case]
    folder = edited(place / "plain", tmp_path / "bad", change)
    found = run("verify", folder, "--json")
    problems = found.json()["problems"]
    assert found.code == 1 and not found.json()["ok"]
    assert [one for one in problems if one["kind"] == kind and says in one["says"]], problems
    plain = run("verify", folder)
    assert plain.code == 1 and says in plain.out and "PROBLEM" in plain.out


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("r", -1, "r: got -1"),
        ("use_qalora", True, "use_qalora"),
        ("peft_type", "LOHA", "peft_type"),
        ("target_modules", "(", "target_modules"),
        ("target_modules", "(x+x+)+y" * 20, ""),
    ],
)
def test_verify_refuses_configs(
    place: Path, tmp_path: Path, field: str, value: object, says: str
) -> None:
    shutil.copytree(place / "plain", tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    found = run("verify", tmp_path / "bad", "--json")
    assert found.code == 1
    assert any(says in one["says"] for one in found.json()["problems"])


def test_verify_sends_a_mixture_to_its_adapters(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "plain", tmp_path / "mix")
    file = tmp_path / "mix" / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "XLORA"}))
    tensors = {"base_model.internal_xlora_classifier.layers.0.weight": torch.ones(2, 4)}
    save_file(tensors, tmp_path / "mix" / "adapter_model.safetensors")
    problems = run("verify", tmp_path / "mix", "--json").json()["problems"]
    assert len(problems) == 1 and "FOLDER/adapters/NAME" in problems[0]["says"]


def test_verify_says_what_does_not_fit(place: Path, tmp_path: Path) -> None:
    for name, model, says in (("for gpt2", "llama", "c_attn"), ("plain", "gpt2", "q_proj")):
        found = run("verify", place / name, "--model", place / model)
        assert found.code == 1 and "PROBLEM  model" in found.out and says in found.out
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in failed(
        "verify", place / "plain", "--model", tmp_path / "empty", code=2
    )


def test_verify_notes_an_untrained_adapter(place: Path, tmp_path: Path) -> None:
    LoraModel(tiny_models.llama()[0], CONFIGS["plain"]).save_pretrained(tmp_path / "new")
    found = run("verify", tmp_path / "new", "--json")
    assert found.code == 0 and any("never trained" in note for note in found.json()["notes"])
