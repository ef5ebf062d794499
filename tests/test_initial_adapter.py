"""path_initial_model_for_weight_conversion and `lora-ext convert --initial`: what is certainly not
the adapter that the trained one started as is refused; whatever can be it is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cli_runs import failed, run
from torch import nn

import lora_ext
from lora_ext import get_lora_model

KINDS = ("pissa", "pissa_niter_4", "olora")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG = "adapter_config.json"


def base_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 24)).to(dtype)


def config_of(kind: Any = "pissa", lib: Any = lora_ext, **fields: Any) -> Any:
    values = {"r": 4, "target_modules": ["0", "1"], "lora_alpha": 12} | fields
    return lib.LoraConfig(init_lora_weights=kind, **values)


def trained(model: Any, seed: int = 1) -> Any:
    """As after a few steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.1 * noise).to(parameter.dtype)
    return model


def as_peft_says(folder: Path) -> None:
    """PEFT's documentation: the initial adapter's init_lora_weights is to be True."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"init_lora_weights": True}))


def refused(model: Any, initial: Path, tmp_path: Path) -> str:
    """By `save_pretrained` and by `lora-ext convert`, with nothing written."""
    out, adapter = tmp_path / "out", tmp_path / "refused"
    with pytest.raises(ValueError) as caught:
        model.save_pretrained(out, path_initial_model_for_weight_conversion=initial)
    model.save_pretrained(adapter)
    said = failed("convert", adapter, out, "--initial", initial)
    assert not out.exists() and "before the first step" in said
    assert said.removeprefix("lora-ext: ") == str(caught.value)
    return said


@pytest.mark.parametrize("marked", [False, True], ids=["init named", "init True"])
@pytest.mark.parametrize("kind", KINDS)
def test_another_adapter_is_refused(kind: str, marked: bool, tmp_path: Path) -> None:
    model = get_lora_model(base_of(), config_of(kind))
    initial, later, plain = (tmp_path / name for name in ("initial", "later", "plain"))
    model.save_pretrained(initial)
    trained(model).save_pretrained(later)
    trained(get_lora_model(base_of(), config_of(True))).save_pretrained(plain)
    if marked:
        as_peft_says(initial)
        as_peft_says(later)
    assert "has the very values" in refused(model, later, tmp_path)  # the trained folder twice
    assert "is not as" in refused(trained(model, 2), later, tmp_path)  # a checkpoint on the way
    assert "is not as" in refused(model, plain, tmp_path)
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=initial)


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ({"kind": "pissa"}, {"kind": "olora"}),
        ({"kind": "pissa"}, {"kind": "pissa_niter_4"}),
        ({"kind": "olora"}, {"kind": "gaussian"}),
        ({"kind": "olora"}, {"kind": False}),
        ({"lora_alpha": 12}, {"lora_alpha": 6}),
        ({"use_rslora": True}, {"use_rslora": False}),
        ({"r": 4}, {"r": 8}),
    ],
    ids=str,
)
def test_configs_that_contradict_each_other(
    mine: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    get_lora_model(base_of(), config_of(**other)).save_pretrained(tmp_path / "initial")
    model = trained(get_lora_model(base_of(), config_of(**mine)))
    (field,) = mine
    said = refused(model, tmp_path / "initial", tmp_path)
    field = "init_lora_weights" if field == "kind" else field
    assert f"its {field} is '{next(iter(other.values()))}' and that of the trained" in said


@pytest.mark.parametrize("lora", [1, 24], ids="r={}".format)
@pytest.mark.parametrize(
    ("of_base", "file"),
    [("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp32"), ("fp16", "bf16")],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lib", [lora_ext, peft], ids=["lora_ext", "peft"])
def test_what_it_was_trained_from_is_taken(
    lib: Any, kind: str, of_base: str, file: str, lora: int, tmp_path: Path
) -> None:
    """Of all ranks and dtypes, also where values were rounded on their way into the file."""
    folder = tmp_path / "initial"
    base = base_of(DTYPES[of_base])
    with torch.no_grad():  # singular values over six decades
        base[0].weight.mul_(torch.logspace(-6, 0, 80)[:, None].to(base[0].weight))
    model = lib.get_peft_model(base, config_of(kind, lib, r=lora))
    model.save_pretrained(str(folder))
    as_peft_says(folder)
    assert run("convert", folder, tmp_path / "file", "--dtype", str(DTYPES[file])[6:]).code == 0
    adapter = tmp_path / "adapter"
    model.peft_config["default"].init_lora_weights = kind
    trained(model).save_pretrained(str(adapter))
    result = run("convert", adapter, tmp_path / "out", "--initial", tmp_path / "file")
    assert result.code == 0, result.err


def test_of_an_embedding(tmp_path: Path) -> None:
    """Which these initialisations leave alone: its lora_A starts as zeros."""
    model = get_lora_model(nn.Sequential(nn.Embedding(9, 8)), config_of(target_modules=["0"]))
    model.save_pretrained(tmp_path / "initial")
    trained(model).save_pretrained(tmp_path / "later")
    option = {"path_initial_model_for_weight_conversion": tmp_path / "initial"}
    model.save_pretrained(tmp_path / "out", **option)
    assert "zeros" in refused(trained(model, 2), tmp_path / "later", tmp_path / "more")


def test_the_model_knows_what_its_config_no_longer_says(tmp_path: Path) -> None:
    """Users of PEFT leave init_lora_weights=True in it, after saving the initial adapter so."""
    model = get_lora_model(base_of(), config_of("olora"))
    trained(get_lora_model(base_of(), config_of(True))).save_pretrained(tmp_path / "plain")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    trained(model)
    for name, fits in (("plain", False), ("initial", True)):
        option = {"path_initial_model_for_weight_conversion": tmp_path / name}
        if fits:
            model.save_pretrained(tmp_path / "out", **option)
        else:
            with pytest.raises(ValueError, match="is not as 'olora' starts"):
                model.save_pretrained(tmp_path / "out", **option)
            assert not (tmp_path / "out").exists()
