"""`lora-ext verify`, `diff` and `convert` on folders that PEFT wrote, whole and damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cli_runs import failed, run
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from cli_places import EPS_BF16, contents, randomise  # noqa: E402 - they need transformers, too

from lora_ext import LoraConfig, LoraModel  # noqa: E402

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 3},
        "alpha_pattern": {"up_proj": 32},
    },
    "rslora, all layers": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora of embeddings": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "rows of embeddings": {"trainable_token_indices": [1, 5]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "expression": {"target_modules": r".*layers\.1\..*(q|k)_proj"},
    "numbers of layers": {"layers_to_transform": [1]},
    "replication": {"layer_replication": [[0, 2], [1, 2]]},
    "alora": {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    config = transformers.LlamaConfig(**{**sizes, **fields})
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A llama, whole and in shards, and adapters of all kinds, which no command may change."""
    folder = tmp_path_factory.mktemp("peft")
    llama().save_pretrained(folder / "llama")
    llama().save_pretrained(folder / "shards", max_shard_size="8KB")
    for name, fields in KINDS.items():
        config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **fields})
        randomise(peft.get_peft_model(llama(), config)).save_pretrained(folder / name)
    several = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]), "first")
    several.add_adapter("second", peft.LoraConfig(target_modules=["v_proj"]))
    several.save_pretrained(folder / "several")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_verified_converted_and_compared(
    place: Path, tmp_path: Path, kind: str
) -> None:
    for options in ([], ["--model", place / "llama"], ["--model", place / "shards"]):
        found = run("verify", place / kind, "--json", *options)
        assert found.code == 0 and found.json()["ok"] and not found.json()["problems"]
    out, small = tmp_path / "out", tmp_path / "small"
    assert run("convert", place / kind, out).code == 0
    same = run("diff", place / kind, out, "--json")
    assert same.code == 0 and same.json()["same"]
    count = len(load_file(place / kind / WEIGHTS))
    assert same.json()["equal"] == run("verify", out, "--json").json()["tensors"] == count
    assert (out / WEIGHTS).read_bytes() == (place / kind / WEIGHTS).read_bytes()
    assert run("convert", place / kind, small, "--dtype", "bfloat16").code == 0
    other = run("diff", place / kind, small, "--json")
    assert other.code == 1 and len(other.json()["different"]) == count
    # Each value is rounded by at most so much of it, and norms by no more.
    assert run("diff", place / kind, small, "--tolerance", EPS_BF16).code == 0


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [("embeddings", 2), ("dora of embeddings", 1), ("embeddings saved", 0), ("bias all", 0)],
)
def test_embeddings_are_left_out(place: Path, tmp_path: Path, kind: str, left_out: int) -> None:
    """Those that PEFT saves beside an adapter of them, not those that the config asks to save."""
    found = run("convert", place / kind, tmp_path / "out", "--no-embeddings")
    assert f"{left_out} tensor{'' if left_out == 1 else 's'} of embeddings left out" in found.out
    difference = run("diff", place / kind, tmp_path / "out", "--json").json()
    assert len(difference["only_a"]) == left_out and not difference["different"]
    assert run("verify", tmp_path / "out", "--model", place / "llama").code == 0


def test_models_in_shards_are_the_same(place: Path) -> None:
    assert len(list((place / "shards").glob("*.safetensors"))) > 1
    assert run("diff", place / "llama", place / "shards").code == 0


def test_a_file_is_compared_with_a_folder_by_its_tensors(place: Path) -> None:
    found = run("diff", place / "plain", place / "plain" / WEIGHTS, "--json")
    assert found.code == 0 and found.json()["config"] == []
    assert run("diff", place / "plain", place / "modules_to_save" / WEIGHTS).code == 1


def test_an_adapter_of_biases_does_not_fit_a_model_without(place: Path, tmp_path: Path) -> None:
    llama(attention_bias=False).save_pretrained(tmp_path)
    found = run("verify", place / "bias all", "--model", tmp_path, "--json")
    assert found.code == 1
    (problem,) = found.json()["problems"]
    assert problem["kind"] == "model" and "bias" in problem["says"]


def shards_of_the_adapter(folder: Path) -> None:
    tensors = list(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    for number, part in enumerate((tensors[:2], tensors[2:]), 1):
        save_file(dict(part), folder / f"adapter_model-0000{number}-of-00002.safetensors")


def as_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


# What is done to a copy of the plain adapter, and what all three commands say of it.
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG};"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS};"),
    "shards": (shards_of_the_adapter, "adapters are one file: join these"),
    "pickle": (as_a_pickle, "is a pickle, which can run code"),
    "cut": (cut, "the file is damaged"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "is no safetensors file"),
    "empty config": (lambda f: (f / CONFIG).write_text(""), "is not valid JSON"),
    "half a config": (lambda f: (f / CONFIG).write_text('{"r": 8,'), "is not valid JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[1]"), "expected an object"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_said_by_each_command(place: Path, tmp_path: Path, case: str) -> None:
    change, says = DAMAGED[case]
    folder, out = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(place / "plain", folder)
    change(folder)
    found = run("verify", folder, "--json")
    assert found.code == 1 and not found.json()["ok"]
    (problem,) = found.json()["problems"]
    assert problem["kind"] == "files" and says in problem["says"]
    assert says in failed("diff", place / "plain", folder)
    assert says in failed("diff", folder, place / "plain")
    assert says in failed("convert", folder, out)
    assert not out.exists()


@pytest.mark.parametrize("case", ["no config", "no weights", "pickle", "half a config"])
def test_what_is_left_of_an_adapter_is_not_replaced_unasked(
    place: Path, tmp_path: Path, case: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(place / "plain", folder)
    DAMAGED[case][0](folder)
    before = contents(folder)
    said = failed("convert", place / "dora", folder, code=2)
    assert "has an adapter already; --overwrite replaces it" in said and contents(folder) == before
    assert run("convert", place / "dora", folder, "--overwrite").code == 0
    assert run("diff", place / "dora", folder).code == 0


def test_the_folder_of_several_adapters_names_them(place: Path, tmp_path: Path) -> None:
    folder, out = place / "several", tmp_path / "out"
    found = run("verify", folder, "--json")
    assert found.code == 1 and "['first', 'second']" in found.json()["problems"][0]["says"]
    for command in (("convert", folder, out), ("diff", folder, place / "plain")):
        assert "give one of the adapters in it, first, second" in failed(*command, code=2)
    assert run("verify", folder / "first").code == 0 and not out.exists()


WRONG = {
    "an empty folder, diff": ("diff", "EMPTY", "plain", "has no safetensors files"),
    "an empty folder, convert": ("convert", "EMPTY", "OUT", "is no adapter in a known format"),
    "a file, convert": ("convert", f"plain/{WEIGHTS}", "OUT", "give its folder"),
    "a file, verify": ("verify", f"plain/{WEIGHTS}", "is a file"),
    "no model": ("verify", "plain", "--model", "plain", "has no config.json"),
    "a model, convert": ("convert", "llama", "OUT", "is no adapter in a known format"),
    "the same": ("convert", "plain", "plain", "has an adapter already"),
    "no number": ("diff", "plain", "dora", "--tolerance", "nan", "'--tolerance': nan is no number"),
    "below zero": ("diff", "plain", "dora", "--tolerance", "-1", "-1.0 is not in the range"),
    "not pissa": ("convert", "plain", "OUT", "--initial", "dora", "expected pissa, olora, corda"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_uses_are_said_with_exit_code_2(place: Path, tmp_path: Path, case: str) -> None:
    *arguments, says = WRONG[case]
    (tmp_path / "EMPTY").mkdir()
    paths = {"EMPTY": tmp_path / "EMPTY", "OUT": tmp_path / "OUT"}
    known = [place / one if (place / one).exists() else one for one in arguments]
    assert says in failed(*(paths.get(str(one), one) for one in known), code=2)
    assert not (tmp_path / "OUT").exists()


def test_json_is_one_object_whatever_happens(place: Path, tmp_path: Path) -> None:
    for arguments in (
        ("verify", place / "plain"),
        ("verify", tmp_path),
        ("verify", tmp_path / "nothing"),
        ("diff", place / "plain", place / "dora"),
        ("diff", place / "plain", tmp_path),
        ("convert", place / "plain", tmp_path / "out"),
        ("convert", place / "plain", tmp_path / "out"),
    ):
        assert isinstance(json.loads(run(*arguments, "--json").out), dict)


def test_verify_takes_what_is_tied_to_a_target(tmp_path: Path) -> None:
    """With ensure_weight_tying the head's adapter is in the file, and not in target_modules."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "vocab_size": 30, "tie_word_embeddings": True}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    folder = tmp_path / "adapter"
    LoraModel(base, config).save_pretrained(folder)
    assert run("verify", folder, "--model", tmp_path / "base").code == 0
    file = folder / "adapter_config.json"
    file.write_text(
        file.read_text().replace('"ensure_weight_tying": true', '"ensure_weight_tying": false')
    )
    assert "lm_head: is in the file, and not in" in run("verify", folder).out
