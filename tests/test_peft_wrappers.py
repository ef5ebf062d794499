"""Former names of arguments beside PEFT's, and what a model's wrapper does."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap
import peft_programs
import pytest
import torch
from peft_programs import PREFIX, TOKENS, Net, adapter, config_of
from tiny_models import BUILDERS
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model

folder = peft_programs.folder  # a fixture


# Former names


FORMER: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "get_lora_model": (
        lambda m, _: get_lora_model(Net(), config=config_of(lora_ext)),
        "config is peft_config",
    ),
    "add_adapter": (
        lambda m, _: m.add_adapter("b", config=config_of(lora_ext)),
        "config is peft_config",
    ),
    "load_adapter": (lambda m, f: m.load_adapter(folder=f, adapter_name="b"), "folder is model_id"),
    "from_pretrained": (
        lambda m, f: LoraModel.from_pretrained(Net(), folder=f),
        "folder is model_id",
    ),
    "save_pretrained": (
        lambda m, f: m.save_pretrained(folder=f / "new", adapter_names="default"),
        "is (save_directory|selected_adapters)",
    ),
    "save_pretrained, by position": (
        lambda m, f: m.save_pretrained(f / "new", ["default"]),
        "selected_adapters=",
    ),
    "LoraConfig.from_pretrained": (
        lambda m, f: LoraConfig.from_pretrained(folder_or_file=f),
        "pretrained_model_name_or_path",
    ),
}


@pytest.mark.parametrize("name", FORMER)
def test_former_names_of_arguments_are_taken_with_a_warning(name: str, folder: Path) -> None:
    model = adapter(lora_ext, folder)
    call, text = FORMER[name]
    with pytest.warns(DeprecationWarning, match=text) as caught:
        call(model, folder)
    assert caught[0].filename == __file__


def test_an_argument_under_both_names_is_refused() -> None:
    config: Any = config_of(lora_ext)
    with pytest.raises(TypeError, match="got peft_config and config, its former name"):
        get_lora_model(Net(), peft_config=config, config=config)


def test_a_state_dict_with_the_former_keys_loads() -> None:
    model = get_lora_model(Net(), config_of(lora_ext))
    former = {k.replace(PREFIX, "base_model."): t + 1 for k, t in model.state_dict().items()}
    assert not any(key.startswith(PREFIX) for key in former)
    model.load_state_dict(former)
    now = model.state_dict()
    assert all(torch.equal(now[k.replace("base_model.", PREFIX)], t) for k, t in former.items())
    base, _ = BUILDERS["llama"]()  # a model with a child `model`
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    former = {"base_model." + k.removeprefix(PREFIX): t for k, t in model.state_dict().items()}
    assert "base_model.model.embed_tokens.weight" in former
    model.load_state_dict(former)


def test_base_model_still_stands_for_the_model() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_lora_model(net, LoraConfig(r=2, target_modules=["0"]))
    assert model.base_model[0] is net[0] and len(model.base_model) == 2
    assert list(model.base_model) == list(net) and model.base_model
    replaced = nn.Linear(4, 4)
    setattr(model.base_model, "1", replaced)
    assert net[1] is replaced and model.base_model.active_adapter == "default"
    model.base_model.training = False
    assert net.training


# What the wrappers do


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_models_of_transformers_are_pefts_models_too(task: str | None, copied: Any) -> None:
    base, inputs = BUILDERS["llama"]()
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
    expected = peft.PeftModelForCausalLM if task else peft.PeftModel
    assert isinstance(model, expected) and isinstance(model, LoraModel)
    assert type(model).__name__ == ("PeftModelForCausalLM" if task else "LoraModel")
    again = copied(model)
    assert type(again) is type(model)
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)
    assert again.base_model.peft_config is again.peft_config is not model.peft_config
    again.set_scale("default", 3.0)
    assert model.get_layer_status()[0].scaling["default"] == 1.0 * 8 / 2
    # No method of PEFT's class runs that this package has of its own.
    for name in ("forward", "save_pretrained", "load_adapter", "merge_adapter", "peft_config"):
        owner = next(kind for kind in type(model).__mro__ if name in vars(kind))
        assert owner.__module__.startswith(("lora_ext.", "torch.")) or name == "merge_adapter"


@pytest.mark.parametrize(
    ("builder", "task", "kind"),
    [
        ("t5", "SEQ_2_SEQ_LM", "PeftModelForSeq2SeqLM"),
        ("bert_classifier", "SEQ_CLS", "PeftModelForSequenceClassification"),
        ("bert", "FEATURE_EXTRACTION", "PeftModelForFeatureExtraction"),
        ("llama", "CAUSAL_LM", "PeftModelForCausalLM"),
    ],
)
def test_the_class_is_that_of_the_task(builder: str, task: str, kind: str, tmp_path: Path) -> None:
    base, inputs = BUILDERS[builder]()
    targets = ["q", "query", "q_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, target_modules=targets, task_type=task, init_lora_weights=False)
        model = get_lora_model(base, config).eval()
        assert type(model).__name__ == kind and isinstance(model, getattr(lora_ext, kind))
        model.save_pretrained(tmp_path)
        again = LoraModel.from_pretrained(BUILDERS[builder]()[0], tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_a_model_without_input_ids_keeps_its_own_arguments() -> None:
    model = get_lora_model(Net(), config_of(lora_ext, task_type="CAUSAL_LM"))
    assert isinstance(model, LoraModel) and model(TOKENS).shape == (2, 5, 3)


def test_generate_follows_the_generation_config_of_the_wrapper() -> None:
    base, inputs = BUILDERS["llama"]()
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tokens = inputs["input_ids"]
    for new in (2, 5):
        changed = copy.deepcopy(model.generation_config)
        changed.max_new_tokens = changed.min_new_tokens = new
        model.generation_config = changed
        result = model.generate(input_ids=tokens, do_sample=False)
        assert result.shape[1] == tokens.shape[1] + new


@pytest.mark.parametrize("argument", ["adapter_names", "alora_offsets"])
def test_arguments_of_pefts_own_may_be_none(argument: str) -> None:
    base, inputs = BUILDERS["llama"]()
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert model(**inputs, **{argument: None}).loss is not None
