"""What `AutoPeftModel`s refuse, before a base is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from auto_models import changed, saved

import lora_ext
from lora_ext.errors import AdapterFileError, NotBuiltError

MAPPING = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another task": (
        "AutoPeftModelForSeq2SeqLM",
        {},
        "task_type: got 'CAUSAL_LM'.*use AutoPeftModelForCausalLM",
    ),
    "a task": ("AutoPeftModel", {}, "expected None; use AutoPeftModelForCausalLM"),
    "no class": ("AutoPeftModel", {"task_type": None}, "task_type and auto_mapping: got neither"),
    "no class for a task's": (
        "AutoPeftModelForCausalLM",
        {"task_type": None},
        "task_type and auto_mapping: got neither",
    ),
    "no base": (
        "AutoPeftModelForCausalLM",
        {"base_model_name_or_path": None},
        "base_model_name_or_path: got None",
    ),
    "another package": (
        "AutoPeftModel",
        {"task_type": None, "auto_mapping": MAPPING | {"parent_library": "transformersx"}},
        "import allowlist",
    ),
    "a function": (
        "AutoPeftModel",
        {"task_type": None, "auto_mapping": MAPPING | {"base_model_class": "set_seed"}},
        "has no class 'set_seed' with from_pretrained",
    ),
    "no texts": (
        "AutoPeftModel",
        {"task_type": None, "auto_mapping": {"base_model_class": ["a"]}},
        "auto_mapping: got .*expected texts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_names_no_base_is_refused(case: str, tmp_path: Path) -> None:
    name, fields, text = REFUSED[case]
    folder = changed(saved(tmp_path, "AutoPeftModelForCausalLM"), **fields)
    with pytest.raises(ValueError, match=text):
        getattr(lora_ext, name).from_pretrained(folder)
    if case != "no base" and case != "a function":
        with pytest.raises((ValueError, KeyError)):
            getattr(peft, name).from_pretrained(folder)


def test_packages_are_imported_only_where_they_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "AutoPeftModel")
    (tmp_path / "mine_to_import.py").write_text(
        "from transformers import LlamaForCausalLM as Mine\nclass Other: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Mine", "parent_library": "mine_to_import"}
    changed(folder, auto_mapping=mapping)
    load = lora_ext.AutoPeftModel.from_pretrained
    with pytest.raises(ValueError, match="mine_to_import"):
        load(folder)
    assert "mine_to_import" not in sys.modules
    model = load(folder, import_allowlist=["mine_to_import"])
    assert type(model.get_base_model()) is transformers.LlamaForCausalLM


def test_errors_of_the_adapter_come_before_the_base_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "AutoPeftModelForCausalLM")
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises((ValueError, FileNotFoundError, AdapterFileError), match="nowhere"):
        lora_ext.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(NotBuiltError, match="peft_type"):
        lora_ext.AutoPeftModelForCausalLM.from_pretrained(changed(folder, peft_type="LOHA"))
    load: Any = lora_ext.AutoPeftModel.from_pretrained
    with pytest.raises(TypeError, match="pretrained_model_name_or_path: got None"):
        load(None)
    with pytest.raises(TypeError, match="import_allowlist: got"):
        load(folder, import_allowlist=[1])
    with pytest.raises(OSError, match=r"call AutoPeftModelForCausalLM\.from_pretrained"):
        lora_ext.AutoPeftModelForCausalLM(folder)
