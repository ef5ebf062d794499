"""Names of PEFT that are not built say so, by the errors that Python expects."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import peft.tuners.lora
import peft.utils
import peft.utils.hotswap
import pytest
import torch

import lora_ext
from lora_ext import LoraConfig
from lora_ext._not_built import _OTHER_KINDS, FIELDS, INSTEAD
from lora_ext.errors import NotBuiltError


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 4))


def own_names(module: Any) -> list[str]:
    """The public classes and functions that a module of PEFT's has of its own."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


# Where programs import what is for LoRA from. Of the rest of peft.utils nothing is for them.
NAMES = sorted(
    {
        *peft.__all__,
        *peft.tuners.lora.__all__,
        *own_names(peft.helpers),
        *own_names(peft.utils.hotswap),
        *("ModulesToSaveWrapper", "TrainableTokensWrapper", "AuxiliaryTrainingWrapper"),
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    }
)
# Layers over quantized bases.
QUANTIZED = {"GPTQLoraLinear", "Linear4bit", "Linear8bitLt"}
MISSING = [name for name in NAMES if not hasattr(lora_ext, name) and name not in QUANTIZED]


def test_some_are_there_and_some_are_not() -> None:
    assert {"get_peft_config", "load_peft_weights", "LoraConfig"} <= set(NAMES) - set(MISSING)
    assert {"KasaConfig", "create_arrow_model", "PeftMixedModel"} <= set(MISSING)


@pytest.mark.parametrize("name", MISSING)
def test_a_name_says_that_it_is_not_built(name: str) -> None:
    assert not hasattr(lora_ext, name)
    with pytest.raises(AttributeError, match=rf"has no attribute '{name}': {name}\b.* [a-z]") as of:
        getattr(lora_ext, name)
    with pytest.raises(ImportError, match=rf"^lora_ext: {name}\b") as imported:
        exec(f"from lora_ext import {name}")
    assert str(imported.value).removeprefix("lora_ext: ") in str(of.value)


@pytest.mark.parametrize("module", ["tuners", "utils", "helpers", "peft_model", "utils.hotswap"])
def test_a_module_of_pefts_says_where_its_names_are(module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="PEFT's names are in lora_ext itself"):
        exec(f"from lora_ext.{module} import anything")


def test_other_names_fail_as_in_any_module() -> None:
    with pytest.raises(AttributeError, match=r"^module 'lora_ext' has no attribute 'LoraConfg'$"):
        lora_ext.LoraConfg  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'LoraConfg' from 'lora_ext'"):
        exec("from lora_ext import LoraConfg")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'lora_ext\.nothing'"):
        exec("import lora_ext.nothing")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_says_what_there_is_instead(field: str) -> None:
    value: Any = {"use_qalora": True, "enable_lora": [True]}.get(field, {"a": 1})
    with pytest.raises(NotBuiltError) as error:
        lora_ext.get_lora_model(
            net(), LoraConfig.from_dict({field: value, "target_modules": ["0"]})
        )
    text = str(error.value)
    assert text.startswith(f"LoraConfig: {field}: got ")
    assert f"{FIELDS[field]} is not built" in text and INSTEAD[FIELDS[field]] in text
    assert "patch()" in text


def test_the_page_lists_exactly_what_is_not_built() -> None:
    page = Path(lora_ext.__file__).parents[1] / "docs" / "peft.md"
    if not page.exists():
        pytest.skip("docs/ is not here: an installed copy is tested")
    section = page.read_text().partition("\n## Not built\n")[2].partition("\n## ")[0]
    fields, names = section.split("|---|---|")[1:]
    said = {row.split("`")[1]: row for row in fields.splitlines() if row.startswith("| `")}
    assert said.keys() == FIELDS.keys()
    assert all(f"| {what} |" in said[field] for field, what in FIELDS.items())
    cells = [cell for row in names.splitlines() for cell in row.split("|")[1:2]]
    named = {name for cell in cells for name in cell.split("`")[1::2]}
    assert named == {name for name in MISSING if not _OTHER_KINDS.fullmatch(name)}


CONFIGS = {
    "arrow_config": peft.ArrowConfig(),
    "kasa_config": peft.KasaConfig(),
    "monteclora_config": peft.MontecloraConfig(),
    "velora_config": peft.VeloraConfig(),
}


@pytest.mark.parametrize("field", CONFIGS)
def test_a_config_of_pefts_is_kept_and_refused_too(field: str) -> None:
    config = LoraConfig(target_modules=["0"], **{field: CONFIGS[field]})
    assert getattr(config, field) == dataclasses.asdict(CONFIGS[field])
    with pytest.raises(NotBuiltError, match=f"{field}: got .* is not built"):
        lora_ext.get_lora_model(net(), config)


def test_every_field_of_pefts_is_one_here() -> None:
    theirs = set(inspect.signature(peft.LoraConfig).parameters)
    assert theirs <= set(inspect.signature(LoraConfig).parameters)
    assert FIELDS.keys() - theirs == {"enable_lora"}  # of PEFT 0.2
