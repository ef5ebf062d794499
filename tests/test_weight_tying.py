"""ensure_weight_tying: copies of modules to save that are tied like their originals, as PEFT's."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from tiny_models import BUILDERS
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.io import WEIGHTS_NAME

# (family, the embedding's name, targets)
FAMILIES = [("gpt2", "transformer.wte", "c_attn"), ("mpt", "transformer.wte", "Wqkv")]
each_family = pytest.mark.parametrize(("family", "embedding", "targets"), FAMILIES)
each_choice = pytest.mark.parametrize("named", [["lm_head"], ["wte"], ["wte", "lm_head"]], ids=str)


def fields_of(targets: str, named: list[str]) -> dict[str, Any]:
    return {
        "r": 2,
        "target_modules": [targets],
        "modules_to_save": named,
        "ensure_weight_tying": True,
    }


def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def copies(model: LoraModel, embedding: str) -> tuple[Any, Any]:
    names = (f"{name}.modules_to_save.default" for name in (embedding, "lm_head"))
    one, other = (model.get_base_model().get_submodule(name) for name in names)
    return one, other


def near(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs() <= 1e-5 * expected.abs())


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_tied_module_by_itself_is_warned_of(field: str) -> None:
    base, _ = BUILDERS["gpt2"]()
    with pytest.warns(UserWarning, match=r"\['lm_head'\] will have another each"):
        get_lora_model(base, LoraConfig(**{"target_modules": ["c_attn"], field: ["lm_head"]}))


@pytest.mark.parametrize("named", [["lm_head"], ["wte"]], ids=str)
def test_nothing_is_tied_where_the_models_config_says_so(named: list[str]) -> None:
    base, _ = BUILDERS["gpt2"]()
    base.config.tie_word_embeddings = False
    with pytest.warns(UserWarning, match="no tied modules were found in the model"):
        model = get_lora_model(base, LoraConfig(**fields_of("c_attn", named)))
    assert len(list(model.saved_modules())) == 1


@each_choice
@each_family
def test_files_go_both_ways(
    family: str, embedding: str, targets: str, named: list[str], tmp_path: Path
) -> None:
    base, inputs = BUILDERS[family]()
    fields, losses = fields_of(targets, named), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(fields)))
        ours = get_lora_model(copy.deepcopy(base), LoraConfig(**fields))
        for model, folder in ((theirs, tmp_path / "theirs"), (ours, tmp_path / "ours")):
            disturb(model)
            model.save_pretrained(folder)
            losses.append(model.eval()(**inputs).loss)
        read = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
        read.save_pretrained(tmp_path / "again")
        again = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert near(read(**inputs).loss, losses[0]) and near(back(**inputs).loss, losses[1])
    assert torch.equal(again(**inputs).loss, read(**inputs).loss)
    known = "lm_head" in named  # of the two, PEFT knows this name, and ties only then
    for model in [read, ours] if known else [ours]:
        one, other = copies(model, embedding)
        assert one.weight is other.weight and type(one) is not type(other)

    shapes = []
    for who in ("theirs", "ours"):
        tensors = safetensors.torch.load_file(tmp_path / who / WEIGHTS_NAME)
        shapes.append({key: tensor.shape for key, tensor in tensors.items()})
    key = "base_model.model.lm_head.weight"
    assert key in shapes[1] and (known or shapes[1].pop(key)) and shapes[0] == shapes[1]
    config = LoraConfig.from_pretrained(tmp_path / "ours")
    expected = peft.LoraConfig.from_pretrained(str(tmp_path / "theirs"))
    assert {*(config.modules_to_save or ()), embedding} == {*expected.modules_to_save, embedding}
    assert "lm_head" not in config.modules_to_save


def test_the_copies_train_and_stay_as_one() -> None:
    base, inputs = BUILDERS["gpt2"]()
    model = get_lora_model(base, LoraConfig(**fields_of("c_attn", ["lm_head"])))
    one, other = copies(model, "transformer.wte")
    assert one.weight is other.weight is not base.lm_head.original_module.weight
    assert base.lm_head.original_module.weight is base.transformer.wte.original_module.weight
    loss = model(**inputs).loss
    loss.backward()

    loose = get_lora_model(
        BUILDERS["gpt2"]()[0],
        LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte", "lm_head"]),
    )
    loose(**inputs).loss.backward()
    parts = [part.weight.grad for part in copies(loose, "transformer.wte")]
    torch.testing.assert_close(one.weight.grad, parts[0] + parts[1])

    model.to(torch.float64)
    twin = copy.deepcopy(model)
    for holder in (model, twin):
        one, other = copies(holder, "transformer.wte")
        assert one.weight is other.weight and one.weight.dtype == torch.float64
    with torch.no_grad():
        one.weight.add_(torch.randn_like(one.weight))  # the twin's
    loss = twin(**inputs).loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = twin.merge_and_unload()
    assert plain.lm_head.weight is plain.transformer.wte.weight is one.weight
    assert plain.config.tie_word_embeddings and near(plain(**inputs).loss, loss)


def test_a_second_adapter_has_a_pair_of_its_own() -> None:
    base, _ = BUILDERS["gpt2"]()
    config = LoraConfig(**fields_of("c_attn", ["lm_head"]))
    model = get_lora_model(base, config)
    model.add_adapter("other", config)
    pairs = [
        (base.transformer.wte.modules_to_save[name], base.lm_head.modules_to_save[name])
        for name in ("default", "other")
    ]
    assert all(one.weight is other.weight for one, other in pairs)
    assert pairs[0][0].weight is not pairs[1][0].weight


def test_a_bias_of_the_tied_module_stays() -> None:
    base, inputs = BUILDERS["bert"]()  # PEFT's copy of such a head has no bias
    name = "cls.predictions.decoder"
    loss = base(**inputs).loss
    fields = fields_of("query", [name])
    model = get_lora_model(base, LoraConfig(**fields))
    assert base.get_submodule(f"{name}.modules_to_save.default").bias is not None
    assert near(model(**inputs).loss, loss)


def test_what_is_not_tied_is_said() -> None:
    for family, named in (("mistral", ["lm_head"]), ("gpt2", ["ln_f"])):
        base, _ = BUILDERS[family]()
        with pytest.warns(UserWarning, match="ensure_weight_tying"):
            get_lora_model(
                base, LoraConfig(**fields_of("c_attn" if family == "gpt2" else "q_proj", named))
            )


def test_loading_a_copy_of_the_embedding_leaves_the_base_alone(tmp_path: Path) -> None:
    base, _ = BUILDERS["gpt2"]()
    fields = fields_of("c_attn", ["wte"]) | {"ensure_weight_tying": False}
    model = get_lora_model(copy.deepcopy(base), LoraConfig(**fields))
    disturb(model)
    model.save_pretrained(tmp_path)
    weight = base.lm_head.weight.detach().clone()
    read = LoraModel.from_pretrained(base, tmp_path)
    assert torch.equal(base.lm_head.weight, weight)
    original = base.transformer.wte.original_module.weight
    assert original is base.lm_head.weight
    assert torch.equal(base.transformer.wte.weight, model.get_base_model().transformer.wte.weight)
    with read.disable_adapter():
        assert torch.equal(base.transformer.wte.weight, weight)
