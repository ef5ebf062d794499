"""What `lora-ext` says of a base whose files lack weights, or are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_runs import failed, run
from safetensors.torch import load_file, save_file

from lora_ext import LoraConfig, LoraModel, quant

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A body without a pooler, as on the hub, in one file and in several; adapters for classifying
    that save the pooler and do not."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    body = transformers.BertModel(config, add_pooling_layer=False)
    body.save_pretrained(folder / "body")
    body.save_pretrained(folder / "shards", max_shard_size="4KB")
    for name, saved in (("without", None), ("with", ["pooler"])):
        kind = transformers.BertForSequenceClassification
        adapter = LoraConfig(
            r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=saved
        )
        LoraModel(kind.from_pretrained(folder / "body"), adapter).save_pretrained(folder / name)
    yield folder


def test_weights_that_neither_base_nor_adapter_has(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = failed("merge", place / "body", place / "without", out)
    assert "no values for 'bert.pooler.dense.bias' (2 such in all), and neither has the" in said
    assert "modules_to_save=['pooler']" in said and not out.exists()
    found = run("verify", place / "without", "--model", place / "body", "--json")
    assert found.code == 0 and [note for note in found.json()["notes"] if note in said]
    assert run("merge", place / "body", place / "with", out).code == 0
    found = run("verify", place / "with", "--model", place / "body", "--json")
    assert not any("pooler" in note for note in found.json()["notes"])


def test_verify_claims_no_more_than_it_looked_at(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "body", tmp_path / "body")
    (tmp_path / "body" / "model.safetensors").unlink()
    for adapter in ("with", "without"):
        found = run("verify", place / adapter, "--model", tmp_path / "body")
        assert found.code == 0 and found.out.endswith("/body by its config.json\n")
        assert "pooler" not in found.out


def cut(pattern: str) -> Callable[[Path], Path]:
    def change(folder: Path) -> Path:
        (path,) = folder.glob(pattern)
        path.write_bytes(path.read_bytes()[:-9])
        return path

    return change


def lose(folder: Path) -> Path:
    (path,) = folder.glob(f"{SECOND}*")
    path.unlink()
    return path


def garble(folder: Path) -> Path:
    (folder / INDEX).write_text('{"weight_map": [')
    return folder / INDEX


def point_outside(folder: Path) -> str:
    """At a file that is there, and whole."""
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    shutil.copy(folder / index["weight_map"][name], folder.with_name("x.safetensors"))
    index["weight_map"][name] = "../x.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    return "got the name '../x.safetensors', expected one inside this folder"


def forget_a_weight(folder: Path) -> str:
    index = json.loads((folder / INDEX).read_text())
    lost = next(name for name in index["weight_map"] if "attention.self.key.weight" in name)
    file = folder / index["weight_map"].pop(lost)
    (folder / INDEX).write_text(json.dumps(index))
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    return f"'bert.{lost}' (1 such in all); the model's files are incomplete"


def of_another_size(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 20}))
    return "has shape [24] in its files and [20] by its config.json"


def quantized(kind: str) -> Callable[[Path], str]:
    """As `quantize_` and bitsandbytes save the layers."""

    def change(folder: Path) -> str:
        tensors = load_file(folder / "model.safetensors")
        name = "encoder.layer.0.attention.self.query"
        linear = torch.nn.Linear(16, 16)
        linear.weight.data = tensors.pop(f"{name}.weight")
        state = quant.Linear.from_linear(linear, kind).state_dict()
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return f"'{name}.SCB' is of LLM.int8()" if kind == "int8" else f"'{name}.weight."

    return change


def renamed(end: str, dtype: torch.dtype = torch.int32) -> Callable[[Path], str]:
    """A tensor in the format of another library."""

    def change(folder: Path) -> str:
        tensors = load_file(folder / "model.safetensors")
        name = "encoder.layer.0.attention.self.query"
        tensors[f"{name}.{end}"] = tensors.pop(f"{name}.weight").to(dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return f"'{name}.{end}' is "

    return change


def config_alone(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return "its config.json has a quantization_config of mxfp4"


@pytest.mark.parametrize(
    "change",
    [
        quantized("int8"), quantized("nf4"), renamed("qweight"), renamed("weight_packed"),
        renamed("weight", torch.int8), renamed("weight", torch.float8_e4m3fn), config_alone,
    ],
    ids=["int8", "nf4", "GPTQ", "compressed-tensors", "integers", "float8", "config"],
)  # fmt: skip
def test_a_quantized_base_is_not_read_as_numbers(
    change: Callable[[Path], str], place: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(place / "body", base)
    why = change(base)
    bases = [base] if change is config_alone else [base, base / "model.safetensors"]
    for one in bases:
        said = failed("merge", one, place / "with", out, code=2)
        assert f"{one}: is quantized" in said and why in said and "which was quantized" in said
        assert not out.exists()
    said = failed("explain", base, "--adapter", place / "with", code=2)
    assert why in said and "print(lora_ext.explain(model))" in said
    found = run("verify", place / "with", "--model", base, "--json")
    (note,) = (one for one in found.json()["notes"] if "is quantized" in one)
    assert found.code == 0 and why in note and "only shapes were compared" in note


@pytest.mark.parametrize(
    ("source", "change", "verified"),
    [
        ("body", cut("model.safetensors"), 1),
        ("shards", cut(f"{SECOND}*"), 1),
        ("shards", lose, 1),
        ("shards", garble, 1),
        ("shards", point_outside, 1),
        ("shards", forget_a_weight, 0),
        ("body", of_another_size, 0),
    ],
    ids=["cut", "cut shard", "lost shard", "index", "outside", "lost weight", "another size"],
)
def test_damaged_files_are_named(
    source: str,
    change: Callable[[Path], Path | str],
    verified: int,
    place: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(place / source, tmp_path / "base")
    named = str(change(tmp_path / "base"))
    said = failed("merge", tmp_path / "base", place / "with", tmp_path / "out")
    assert named in said and str(tmp_path / "base") in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    found = run("verify", place / "with", "--model", tmp_path / "base")
    assert found.code == verified
    if verified or change is forget_a_weight:
        assert named in found.out


def test_a_folder_of_diffusers_is_not_transformers(place: Path, tmp_path: Path) -> None:
    base = tmp_path / "unet"
    base.mkdir()
    (base / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    save_file({"x.weight": torch.ones(2, 2)}, base / "diffusion_pytorch_model.safetensors")
    said = failed("merge", base, place / "with", tmp_path / "out", code=2)
    assert "no model_type" in said and "diffusion_pytorch_model.safetensors" in said
    assert not (tmp_path / "out").exists()
