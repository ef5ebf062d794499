"""LoraConfig against PEFT's: fields, defaults and files; every refusal by the field's name."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.other import get_pattern_key

import lora_ext
from lora_ext import LoraConfig
from lora_ext.errors import NotBuiltError

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rank 1": {"r": 1},
    "large rank": {"r": 4096, "lora_alpha": 1},
    "alpha float": {"lora_alpha": 12.5},
    "alpha 0": {"lora_alpha": 0},
    "alpha negative": {"lora_alpha": -4},
    "dropout": {"lora_dropout": 0.1},
    "dropout 1": {"lora_dropout": 1.0},
    "list": {"target_modules": ["v_proj", "q_proj"]},
    "one name": {"target_modules": ["q_proj"]},
    "no names": {"target_modules": []},
    "regex": {"target_modules": r".*\.layers\.(0|1)\..*(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude list": {"target_modules": "all-linear", "exclude_modules": ["lm_head", "fc"]},
    "exclude regex": {"target_modules": ["q"], "exclude_modules": r".*decoder.*"},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "rslora": {"use_rslora": True, "r": 64},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "not initialised": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_16"},
    "olora": {"init_lora_weights": "olora"},
    "one layer": {"target_modules": ["q"], "layers_to_transform": 3},
    "layers": {"target_modules": ["q"], "layers_to_transform": [0, 5]},
    "layers_pattern": {
        "target_modules": ["q"],
        "layers_to_transform": [1],
        "layers_pattern": ["layers", "h"],
    },
    "layers_pattern text": {
        "target_modules": ["q"],
        "layers_to_transform": [1],
        "layers_pattern": "blocks",
    },
    "rank_pattern": {"rank_pattern": {r"^model\.layers\.0\..*q_proj": 16, "v_proj": 4}},
    "alpha_pattern": {"alpha_pattern": {"layers.[0-3].q": 32, "k": 0.5}},
    "modules_to_save": {"modules_to_save": ["classifier", "score"]},
    "replication": {"layer_replication": [[0, 4], [2, 5]]},
    "task": {"task_type": "CAUSAL_LM", "base_model_name_or_path": "org/model", "revision": "main"},
    "mapping": {
        "auto_mapping": {"base_model_class": "Model", "parent_library": "a.b"},
        "inference_mode": True,
    },
    "unused fields": {"megatron_core": "other.core", "qalora_group_size": 32},
    "names beyond ASCII": {"target_modules": ["größe", "層"]},
}
CASES = pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS.keys())


def in_file(values: dict[str, Any]) -> dict[str, Any]:
    """As it stands in a file: sets as sorted lists; names are a set to PEFT, so in any order."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(values[field], list | set):
            values[field] = sorted(values[field])
    parsed: dict[str, Any] = json.loads(json.dumps(values))
    return parsed


def test_fields_and_defaults_are_pefts() -> None:
    ours = [field.name for field in dataclasses.fields(LoraConfig)]
    theirs = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    assert sorted(ours) == sorted([*theirs, "unknown_fields", "absent_fields", "combined"])
    assert ours[: len(theirs)] == theirs, "positional arguments mean the same"
    assert LoraConfig().to_dict() == peft.LoraConfig().to_dict()


@CASES
def test_constructor_equals_pefts(values: dict[str, Any]) -> None:
    ours, theirs = LoraConfig(**values), peft.LoraConfig(**values)
    assert in_file(ours.to_dict()) == in_file(theirs.to_dict())


@CASES
def test_file_from_peft_is_unchanged(values: dict[str, Any], tmp_path: Path) -> None:
    peft.LoraConfig(**values | {"inference_mode": True}).save_pretrained(str(tmp_path))
    written = (tmp_path / "adapter_config.json").read_text()
    ours = LoraConfig.from_pretrained(tmp_path)
    assert ours.to_json() == written
    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_text() == written


@CASES
def test_peft_reads_our_file(values: dict[str, Any], tmp_path: Path) -> None:
    LoraConfig(**values).save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(theirs, peft.LoraConfig)
    assert in_file(theirs.to_dict()) == in_file(peft.LoraConfig(**values).to_dict())


@CASES
def test_our_file_says_what_pefts_says(values: dict[str, Any], tmp_path: Path) -> None:
    """Of the config alone: `inference_mode` is its own, where a model's file says true."""
    said = []
    for lib in (peft, lora_ext):
        folder = tmp_path / lib.__name__
        lib.LoraConfig(**values).save_pretrained(folder, auto_mapping_dict={"a": "b"})
        said.append(json.loads((folder / "adapter_config.json").read_text()))
    assert in_file(said[0]) == in_file(said[1])
    assert said[1]["inference_mode"] is values.get("inference_mode", False)


def test_what_peft_makes_of_its_config_is_read() -> None:
    """Sets and enums, which a file has not."""
    theirs = peft.LoraConfig(
        target_modules=["q", "v"], task_type=peft.TaskType.CAUSAL_LM, exclude_modules=["head"]
    )
    ours = LoraConfig.from_dict(theirs.to_dict())
    assert ours.target_modules == {"q", "v"}
    assert json.loads(ours.to_json()) == in_file(theirs.to_dict())


def test_sets_are_written_sorted() -> None:
    names = {f"name{i:03}" for i in range(100)}
    assert json.loads(LoraConfig(target_modules=names).to_json())["target_modules"] == sorted(names)


def test_unknown_fields_are_kept_with_a_warning(tmp_path: Path) -> None:
    values = LoraConfig().to_dict() | {
        "use_tomorrow": {"depth": [1, None, {"a": 0.5}]},
        "off_tomorrow": False,
        "inference_mode": True,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True))
    with pytest.warns(UserWarning, match=r"\['use_tomorrow'\]: unknown to this version"):
        config = LoraConfig.from_pretrained(tmp_path)
    assert json.loads(config.to_json()) == values
    assert json.loads(dataclasses.replace(config, r=4).to_json()) == values | {"r": 4}


def test_file_of_an_old_version_gets_no_new_fields() -> None:
    old = {
        "base_model_name_or_path": "org/model",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LoraConfig.from_dict(old)
    assert json.loads(config.to_json()) == old
    config.use_rslora = True
    assert json.loads(config.to_json()) == old | {"use_rslora": True}


def test_runtime_config_has_no_effect_and_says_so() -> None:
    for given in (
        {"ephemeral_gpu_offload": True},
        peft.LoraRuntimeConfig(ephemeral_gpu_offload=True),
        lora_ext.LoraRuntimeConfig(ephemeral_gpu_offload=True),
    ):
        with pytest.warns(UserWarning, match="ephemeral_gpu_offload: got True, which has no eff"):
            LoraConfig(runtime_config=given)
    for wrong in ({"other": True}, {"ephemeral_gpu_offload": 2}, "yes"):
        with pytest.raises(TypeError, match="runtime_config: got"):
            LoraConfig(runtime_config=wrong)


def test_runtime_config_is_not_saved() -> None:
    config = LoraConfig(runtime_config={"ephemeral_gpu_offload": False})
    assert "runtime_config" not in config.to_dict()
    assert LoraConfig(runtime_config=peft.LoraRuntimeConfig()).to_dict() == config.to_dict()


def test_nothing_is_shared() -> None:
    values = LoraConfig(rank_pattern={"q": 4}).to_dict()
    config = LoraConfig.from_dict(values)
    values["rank_pattern"]["q"] = 5
    config.to_dict()["rank_pattern"]["q"] = 6
    assert config.rank_pattern == {"q": 4}


def test_saving_what_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    for mapping in ({"a": object()}, {"a": float("nan")}):
        config = LoraConfig(auto_mapping=mapping)
        with pytest.raises((TypeError, ValueError), match="JSON"):
            config.save_pretrained(tmp_path / "new")
    assert list(tmp_path.rglob("*")) == []


def test_settings_are_pefts() -> None:
    patterns = {
        "q_proj": 2,
        "v": 3,
        r"^model\.layers\.0\..*": 4,
        "layers.1.k_proj": 5,
        r"layers\.\d+\.o(_proj)?": 6,
        ".*proj": 7,
        "odd[0]": 9,
    }
    names = [f"model.layers.{i}.{x}_proj" for i in range(3) for x in "qkvo"]
    names += ["q_proj", "xq_proj", "v", "layersx1xk_proj", "odd[0]", "a.odd[0]", "other"]
    config = LoraConfig(r=8, lora_alpha=16, rank_pattern=patterns, alpha_pattern=patterns)
    for name in names:
        theirs = patterns.get(get_pattern_key(patterns.keys(), name))
        assert config.settings_for(name) == (theirs or 8, theirs or 16), name
    assert {config.settings_for(name).r for name in names} == {2, 3, 4, 5, 6, 7, 8, 9}
    assert LoraConfig(rank_pattern=None).settings_for("q") == (8, 8)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "r 0": ({"r": 0}, ValueError, r"r: got 0, expected an integer from 1 to 65536"),
    "r negative": ({"r": -1}, ValueError, r"r: got -1"),
    "r huge": ({"r": 10**8}, ValueError, r"r: got 100000000"),
    "r bool": ({"r": True}, TypeError, r"r: got True"),
    "r text": ({"r": "8"}, TypeError, r"r: got '8'"),
    "r float": ({"r": 8.0}, TypeError, r"r: got 8\.0"),
    "r none": ({"r": None}, TypeError, r"r: got None"),
    "alpha nan": ({"lora_alpha": float("nan")}, ValueError, r"lora_alpha: got nan"),
    "alpha inf": ({"lora_alpha": float("inf")}, ValueError, r"lora_alpha: got inf"),
    "alpha large": ({"lora_alpha": 1e300}, ValueError, r"lora_alpha: got 1e\+300"),
    "alpha integer": ({"lora_alpha": 10**5000}, ValueError, r"lora_alpha: got an integer of"),
    "alpha bool": ({"lora_alpha": False}, TypeError, r"lora_alpha: got False"),
    "dropout 1.5": ({"lora_dropout": 1.5}, ValueError, r"lora_dropout: got 1\.5"),
    "dropout nan": ({"lora_dropout": float("nan")}, ValueError, r"lora_dropout: got nan"),
    "bias": ({"bias": "some"}, ValueError, r"bias: got 'some'"),
    "bias none": ({"bias": None}, TypeError, r"bias: got None"),
    "flag 1": ({"use_rslora": 1}, TypeError, r"use_rslora: got 1"),
    "flag text": ({"fan_in_fan_out": "false"}, TypeError, r"fan_in_fan_out: got 'false'"),
    "dora none": ({"use_dora": None}, TypeError, r"use_dora: got None"),
    "targets dict": ({"target_modules": {"q": 1}}, TypeError, r"target_modules: got \{'q': 1\}"),
    "targets number": ({"target_modules": ["q", 1]}, ValueError, r"target_modules: got \['q', 1\]"),
    "targets regex": ({"target_modules": "q("}, ValueError, r"target_modules: got 'q\(', .*\(miss"),
    "targets long": ({"target_modules": ".*" * 10000}, ValueError, r"target_modules: .*at most"),
    "targets deep": ({"target_modules": "(" * 8000 + ")" * 8000}, ValueError, "target_modules: "),
    "exclude regex": ({"exclude_modules": "*"}, ValueError, r"exclude_modules: got '\*'"),
    "rank key": ({"rank_pattern": {"q(": 4}}, ValueError, r"rank_pattern: got 'q\('"),
    "rank flag": ({"rank_pattern": {"(?i)q": 4}}, ValueError, r"rank_pattern: got '\(\?i\)q'"),
    "rank value": ({"rank_pattern": {"q": 10**8}}, ValueError, r"rank_pattern: got \{'q': 100"),
    "rank bool": ({"rank_pattern": {"q": True}}, ValueError, r"rank_pattern: got"),
    "rank list": ({"rank_pattern": [4]}, TypeError, r"rank_pattern: got \[4\]"),
    "alpha value": ({"alpha_pattern": {"q": "4"}}, ValueError, r"alpha_pattern: got \{'q': '4'\}"),
    "alpha key": ({"alpha_pattern": {"[": 4}}, ValueError, r"alpha_pattern: got '\['"),
    "save text": ({"modules_to_save": "head"}, TypeError, r"modules_to_save: got 'head'"),
    "save number": ({"modules_to_save": [0]}, ValueError, r"modules_to_save: got \[0\]"),
    "save regex": ({"modules_to_save": ["a)"]}, ValueError, r"modules_to_save: got 'a\)'"),
    "init": ({"init_lora_weights": "zeros"}, ValueError, r"init_lora_weights: got 'zeros'"),
    "init none": ({"init_lora_weights": None}, TypeError, r"init_lora_weights: got None"),
    "init niter": ({"init_lora_weights": "pissa_niter_x"}, ValueError, "init_lora_weights: got"),
    "init many": ({"init_lora_weights": "pissa_niter_9999"}, ValueError, "init_lora_weights: got"),
    "layers text": ({"layers_to_transform": "0"}, TypeError, r"layers_to_transform: got '0'"),
    "layers negative": ({"layers_to_transform": [-1]}, ValueError, r"layers_to_transform: got"),
    "layers bool": ({"layers_to_transform": True}, TypeError, r"layers_to_transform: got True"),
    "layers alone": (
        {"layers_pattern": "h"},
        ValueError,
        r"layers_pattern: got 'h', expected None",
    ),
    "layers with regex": (
        {"target_modules": ".*q", "layers_to_transform": 0},
        ValueError,
        r"layers_to_transform: got 0, expected None, since target_modules is a string",
    ),
    "replication": ({"layer_replication": [[0]]}, ValueError, r"layer_replication: got \[\[0\]\]"),
    "replication empty": ({"layer_replication": [[2, 2]]}, ValueError, r"layer_replication: got"),
    "task": ({"task_type": "causal"}, ValueError, r"task_type: got 'causal'"),
    "name": ({"base_model_name_or_path": 7}, TypeError, r"base_model_name_or_path: got 7"),
    "mapping": ({"auto_mapping": []}, TypeError, r"auto_mapping: got \[\]"),
    "group": ({"qalora_group_size": 0}, ValueError, r"qalora_group_size: got 0"),
    "bias of dora": ({"lora_bias": True, "use_dora": True}, ValueError, r"lora_bias: got True"),
    "bias of pissa": (
        {"lora_bias": True, "init_lora_weights": "pissa"},
        ValueError,
        r"lora_bias: got True, expected False with init_lora_weights='pissa'",
    ),
    "own name": ({"unknown_fields": {"r": 3}}, ValueError, r"unknown_fields: got \['r'\]"),
}


@pytest.mark.parametrize(("values", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_value_is_refused(
    values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^LoraConfig: {message}") as caught:
        LoraConfig(**values)
    assert caught.type is error
    assert len(str(caught.value)) < 500


def test_changed_config_is_checked_again() -> None:
    config = LoraConfig()
    config.r = 0
    with pytest.raises(ValueError, match="r: got 0"):
        config.validate()


NOT_BUILT: dict[str, Any] = {
    "velora_config": {"num_groups": 64},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"a": 1},
    "use_qalora": True,
    "enable_lora": [True, False, True],
}


@pytest.mark.parametrize(("field", "value"), NOT_BUILT.items(), ids=NOT_BUILT.keys())
def test_what_is_not_built_is_kept_and_refused_where_it_is_used(
    field: str, value: Any, tmp_path: Path
) -> None:
    config = LoraConfig.from_dict({"peft_type": "LORA", field: value, "target_modules": ["0"]})
    config.save_pretrained(tmp_path)
    again = LoraConfig.from_pretrained(tmp_path)
    assert again.to_dict()[field] == config.to_dict()[field] == value
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(NotBuiltError, match=rf"^LoraConfig: {field}.*: got .* built"):
        lora_ext.get_lora_model(net, again)
    assert type(net[0]) is torch.nn.Linear
    if field != "use_qalora":
        with pytest.raises(TypeError, match=rf"{field}: got 'x', expected"):
            LoraConfig.from_dict({field: "x"})


@pytest.mark.parametrize("off", [None, False, [], {}], ids=repr)
def test_what_is_off_passes(off: Any) -> None:
    LoraConfig.from_dict(dict.fromkeys(NOT_BUILT, off))


def good(**changes: Any) -> dict[str, Any]:
    return LoraConfig().to_dict() | changes


HOSTILE: dict[str, tuple[str | bytes, type[Exception], str]] = {
    "empty": ("", ValueError, "not valid JSON"),
    "cut": (json.dumps(good())[:-5], ValueError, "not valid JSON"),
    "trailing": (json.dumps(good()) + "{}", ValueError, "not valid JSON"),
    "'utf-8' codec": (b'{"r": "\xff"}', ValueError, "in position 7"),
    "UTF-16": (json.dumps(good()).encode("utf-16"), ValueError, "'utf-8' codec"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(good()).encode(), ValueError, "not valid"),
    "zeros": (bytes(1000), ValueError, "not valid JSON"),
    "pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", ValueError, "'utf-8' codec"),
    "list": ("[]", ValueError, "is list in JSON, expected an object"),
    "number": ("8", ValueError, "is int in JSON, expected an object"),
    "null": ("null", ValueError, "is NoneType in JSON"),
    "too large": (b" " * (1 << 20) + b"{}", ValueError, "expected at most 1048576"),
    "deep list": ("[" * 500_000, ValueError, "nothing but brackets"),
    "deep object": ('{"a":' * 100_000, ValueError, "nothing but brackets"),
    "deep value": (
        json.dumps(good()).replace('"r": 8', '"x": ' + "[" * 99 + "]" * 99),
        ValueError,
        "nested deeper than 32",
    ),
    "duplicate key": ('{"peft_type": "LORA", "r": 8, "r": 9}', ValueError, "'r' is there twice"),
    "duplicate below": ('{"rank_pattern": {"q": 1, "q": 2}}', ValueError, "'q' is there twice"),
    "NaN": ('{"peft_type": "LORA", "lora_alpha": NaN}', ValueError, "NaN is no number of JSON"),
    "Infinity": ('{"x": -Infinity}', ValueError, "-Infinity is no number of JSON"),
    "1e999": ('{"peft_type": "LORA", "lora_alpha": 1e999}', ValueError, "lora_alpha: got inf"),
    "long integer": ('{"r": ' + "9" * 100_000 + "}", ValueError, "not valid JSON"),
    "integer": ('{"peft_type": "LORA", "r": ' + "9" * 4000 + "}", ValueError, "r: got an integer"),
    "no type": ("{}", ValueError, "peft_type: is missing"),
    "other type": (json.dumps(good(peft_type="IA3")), NotBuiltError, "peft_type: got 'IA3'"),
    "type list": (json.dumps(good(peft_type=[])), NotBuiltError, r"peft_type: got \[\]"),
    "rank": (json.dumps(good(r=10**8)), ValueError, "r: got 100000000"),
    "rank text": (json.dumps(good(r="8")), TypeError, "r: got '8'"),
    "rank true": (json.dumps(good(r=True)), TypeError, "r: got True"),
    "ranks": (json.dumps(good(rank_pattern={"q": -1})), ValueError, "rank_pattern: got"),
    "many numbers": (
        json.dumps(good(target_modules=[0] * 23_000)),
        ValueError,
        "target_modules: got",
    ),
    "many keys": (
        json.dumps(good(rank_pattern={str(i): 0 for i in range(23_000)})),
        ValueError,
        "rank_pattern: got",
    ),
    "many tiny values": (
        json.dumps(good(rank_pattern={str(i): 1 for i in range(80_000)})),
        ValueError,
        "has 80[0-9]* values, expected at most 24000",
    ),
    "many names": (
        json.dumps(good(rank_pattern={f"layers.{i}": 1 for i in range(23_000)}, lora_bias=1)),
        TypeError,
        "lora_bias: got 1",
    ),
    "many regexes": (
        json.dumps(good(rank_pattern={f"{i}.*": 1 for i in range(23_000)})),
        ValueError,
        "rank_pattern: .*at most 8192",
    ),
    "regex repeat": (
        json.dumps(good(target_modules="a{99999999999}")),
        ValueError,
        "target_modules: got",
    ),
    "surrogate": ('{"peft_type": "LORA", "bias": "\\ud800"}', ValueError, r"bias: got '\\ud800'"),
    "private field": (json.dumps(good(absent_fields=["r"])), ValueError, "unknown_fields: got"),
    "what no file can hold": (
        json.dumps(good(kasa_config={"beta": math.inf})).replace("Infinity", "1e999"),
        ValueError,
        "kasa_config: got .*expected what JSON can hold",
    ),
}


@pytest.mark.parametrize(("content", "error", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file_is_refused(
    content: str | bytes, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)

    seconds = []
    for _ in range(3):
        start = time.process_time()
        with pytest.raises(error, match=message) as caught:
            LoraConfig.from_pretrained(path)
        seconds.append(time.process_time() - start)
    assert issubclass(caught.type, error)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < len(str(path)) + 500
    assert min(seconds) < 0.1

    tracemalloc.start()
    try:
        with pytest.raises(error):
            LoraConfig.from_pretrained(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file"):
        LoraConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: no such file"):
        LoraConfig.from_pretrained(tmp_path)
