"""Adapter folders between PEFT and this package, and what is written and read besides."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError
from lora_ext.io import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    TensorSpec,
    adapter_bytes,
    open_adapter,
    read_adapter_tensors,
    read_header,
    save_adapter,
)

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.embed(tokens)))
        return self.head(self.conv(h.transpose(1, 2)).transpose(1, 2))


CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["up", "head"]},
    "embedding and conv": {"target_modules": ["embed", "conv"]},
    "rank pattern": {"target_modules": ["up", "head"], "rank_pattern": {"up": 3}},
    "dora": {"target_modules": ["up", "conv", "embed"], "use_dora": True},
    "bias": {"target_modules": ["up"], "bias": "all"},
    "lora bias": {"target_modules": ["up"], "lora_bias": True},
    "modules to save": {"target_modules": ["up"], "modules_to_save": ["head"]},
}


def base_model() -> Net:
    torch.manual_seed(0)
    return Net()


def peft_model(config: dict[str, Any]) -> peft.PeftModel:
    model = peft.get_peft_model(base_model(), peft.LoraConfig(r=4, lora_alpha=8, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_peft_reads_what_was_read_from_it(tmp_path: Path, family: str) -> None:
    """PEFT saves, we load and save, PEFT loads: the same weights file, the same outputs."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model = peft_model(CONFIGS[family])
    model.save_pretrained(str(theirs))
    expected = {
        key: TensorSpec(tuple(tensor.shape))
        for key, tensor in peft.get_peft_model_state_dict(model).items()
    }
    with open_adapter(theirs) as adapter:
        assert {k: s.shape for k, s in adapter.header().items()} == {
            k: s.shape for k, s in expected.items()
        }
        save_adapter(ours, adapter.config, adapter.tensors(expected))
    assert (ours / WEIGHTS_NAME).read_bytes() == (theirs / WEIGHTS_NAME).read_bytes()
    assert (ours / CONFIG_NAME).read_bytes() == (theirs / CONFIG_NAME).read_bytes()
    loaded = peft.PeftModel.from_pretrained(base_model(), str(ours)).eval()
    tokens = torch.arange(10).reshape(2, 5)
    model.requires_grad_(False)  # as the loaded one is; torch's choice of product depends on it
    assert torch.equal(loaded(tokens), model(tokens))
    assert not torch.equal(base_model()(tokens), model(tokens))


def test_peft_loader_reads_tensors_of_ours(tmp_path: Path) -> None:
    tensors = {"base_model.model.x.lora_A.weight": torch.randn(2, 3)}
    config = {"peft_type": "LORA", "r": 2, "target_modules": {"x", "a"}}
    save_adapter(tmp_path, config, tensors)
    (key,) = tensors
    loaded = peft.load_peft_weights(str(tmp_path), device="cpu")
    assert loaded.keys() == tensors.keys() and torch.equal(loaded[key], tensors[key])
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).target_modules == {"x", "a"}
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["target_modules"] == ["a", "x"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bit for bit, also a scalar, an empty tensor and one larger than the reader's steps."""
    shapes = {"w": (3, 5), "scalar": (), "empty": (0, 4), "large": (1 << 20, 3)}
    tensors = {key: torch.randn(shape).to(dtype) for key, shape in shapes.items()}
    save_adapter(tmp_path, {}, tensors)
    expected = {key: TensorSpec(shape) for key, shape in shapes.items()}
    read = read_adapter_tensors(tmp_path / WEIGHTS_NAME, expected)
    assert list(read) == list(expected)
    for key, tensor in tensors.items():
        assert read[key].dtype == dtype and read[key].shape == tensor.shape
        got, put = read[key].reshape(-1), tensor.reshape(-1)
        assert torch.equal(got.view(torch.uint8), put.view(torch.uint8))
    assert read_header(tmp_path / WEIGHTS_NAME)["w"] == TensorSpec((3, 5), frozenset({dtype}))


def test_nan_far_into_a_large_tensor(tmp_path: Path) -> None:
    tensor = torch.zeros((1 << 20) + 5)
    tensor[-1] = float("nan")
    (tmp_path / WEIGHTS_NAME).write_bytes(safetensors.torch.save({"w": tensor}))
    with pytest.raises(AdapterFileError, match="'w' has NaN or Inf"):
        read_adapter_tensors(tmp_path / WEIGHTS_NAME, {"w": TensorSpec(tuple(tensor.shape))})


def test_integers_where_they_are_expected(tmp_path: Path) -> None:
    """modules_to_save may hold a BatchNorm with its counter."""
    save_adapter(tmp_path, {}, {"n": torch.tensor(7)})
    spec = TensorSpec((), frozenset({torch.int64}))
    with open_adapter(tmp_path) as adapter:
        assert adapter.tensors({"n": spec})["n"].item() == 7
        with pytest.raises(AdapterFileError, match=r"'n': got dtype torch.int64, expected"):
            adapter.tensors({"n": TensorSpec(())})


def test_aliases_and_views_are_written_as_what_they_show() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": base,
        "same": base,
        "transposed": base.T,
        "row": base[1],
        "column": base[:, 2],
        "expanded": torch.ones(1).expand(5),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    read = safetensors.torch.load(adapter_bytes(tensors))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ruined_weights_do_not_replace_good_ones(tmp_path: Path, value: float) -> None:
    save_adapter(tmp_path, {"r": 1}, {"w": torch.zeros(2)})
    with pytest.raises(AdapterFileError, match="'w' has NaN or Inf; it is not saved"):
        save_adapter(tmp_path, {"r": 2}, {"w": torch.tensor([0.0, value])})
    with open_adapter(tmp_path) as adapter:
        assert adapter.config == {"r": 1}


@pytest.mark.parametrize(
    "value", [object(), float("nan"), {1, "a"}], ids=["object", "NaN", "set of two types"]
)
def test_config_that_json_cannot_hold(tmp_path: Path, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        save_adapter(tmp_path / "new", {"x": value}, {})
    assert not (tmp_path / "new").exists()


def test_unknown_fields_of_the_config_are_kept(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "of_tomorrow": {"ü": [1, 2.5, None, True]}}
    save_adapter(tmp_path, config, {})
    with open_adapter(tmp_path) as adapter:
        assert adapter.config == config


def overwrite(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


CHANGES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "removed": (lambda path: path.unlink(), None),
    "replaced": (lambda path: os.replace(path.with_name(CONFIG_NAME), path), None),
    "cut": (lambda path: os.truncate(path, 500), "'w'|too early|NaN or Inf"),
    "emptied": (lambda path: os.truncate(path, 0), "is no safetensors file"),
    "overwritten": (overwrite, "is no safetensors file"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_file_changes_after_it_was_opened(tmp_path: Path, change: str) -> None:
    """The opened file is read, or an error says what is wrong; nothing crashes."""
    save_adapter(tmp_path, {}, {"w": torch.ones(5000)})
    act, says = CHANGES[change]
    with open_adapter(tmp_path) as adapter:
        act(tmp_path / WEIGHTS_NAME)
        if says is None:
            assert bool((adapter.tensors({"w": TensorSpec((5000,))})["w"] == 1).all())
        else:
            with pytest.raises(AdapterFileError, match=says):
                adapter.tensors({"w": TensorSpec((5000,))})


def test_file_is_cut_between_header_and_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a mapped file would end the process with SIGBUS."""
    from lora_ext.io import adapter_file

    save_adapter(tmp_path, {}, {"w": torch.ones(5000)})
    path = tmp_path / WEIGHTS_NAME
    compare = adapter_file._compare

    def compare_then_cut(*arguments: Any) -> None:
        compare(*arguments)
        os.truncate(path, 4096)

    monkeypatch.setattr(adapter_file, "_compare", compare_then_cut)
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors: ends \d+ bytes too"):
        read_adapter_tensors(path, {"w": TensorSpec((5000,))})


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    save_adapter(tmp_path, {"r": 1}, {"w": torch.ones(2)})
    (tmp_path / WEIGHTS_NAME).rename(tmp_path / "blob")
    (tmp_path / WEIGHTS_NAME).symlink_to("blob")
    with open_adapter(tmp_path) as adapter:
        assert adapter.tensors({"w": TensorSpec((2,))})["w"].tolist() == [1, 1]


def test_errors_of_the_caller_stay_what_they_are(tmp_path: Path) -> None:
    save_adapter(tmp_path, {}, {})
    with pytest.raises(FileNotFoundError, match="mine"), open_adapter(tmp_path):
        raise FileNotFoundError("mine")


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter("a/b", {"r": 1}, {"w": torch.ones(2)})
    save_adapter(".", {"r": 2}, {"w": torch.ones(2)})
    for folder, r in (("a/b", 1), (Path("."), 2), ("", 2)):
        with open_adapter(folder) as adapter:
            assert adapter.config == {"r": r}
    assert list(read_adapter_tensors(WEIGHTS_NAME, {"w": TensorSpec((2,))})) == ["w"]
    assert list(read_header("a/b/" + WEIGHTS_NAME)) == ["w"]


def test_no_adapter_is_written_if_one_cannot_be(tmp_path: Path) -> None:
    model = get_lora_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("two", LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        model.get_base_model()[0].lora_B_two[0, 0] = torch.nan
    with pytest.raises(AdapterFileError, match="NaN"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_scale_that_the_files_do_not_hold_is_told(tmp_path: Path) -> None:
    model = get_lora_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=3, target_modules=["0"]))
    model.set_scale("default", 0.5)
    with pytest.warns(UserWarning, match=r"\['default'\]: set_scale .* files do not hold"):
        model.save_pretrained(tmp_path)
    model.get_base_model()[0].unscale_layer(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def test_a_path_with_a_null_character_is_refused_by_name() -> None:
    model = get_lora_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(
        ValueError, match=r"save_pretrained: save_directory: got 'a\\x00b', expected a path"
    ):
        model.save_pretrained("a\0b")
    with pytest.raises(
        ValueError, match=r"from_pretrained: model_id: got 'a\\x00b', expected a path"
    ):
        LoraModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), "a\0b")


def test_saving_no_adapter_is_refused(tmp_path: Path) -> None:
    model = get_lora_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(
        ValueError, match=r"selected_adapters: got \[\], with adapters \['default'\]"
    ):
        model.save_pretrained(tmp_path, selected_adapters=[])
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"selected_adapters: got None, with adapters \[\]"):
        model.save_pretrained(tmp_path)
