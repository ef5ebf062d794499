"""EVA: components and ranks as PEFT's, what becomes of a model, and what cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from calibration_models import (
    TARGETS,
    Net,
    gpt2,
    llama,
    pefts,
    points,
    texts,
    twice,
)
from torch import Tensor, nn

import lora_ext
import lora_ext.calibration.eva_inputs as eva_inputs
from lora_ext import EvaConfig, LoraConfig, get_eva_state_dict, initialize_lora_eva_weights

theirs = pefts("tuners.lora.eva")
LLAMA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
NET = {"r": 2, "lora_alpha": 4, "target_modules": ["first", "second"]}
# Rows of a tensor, not of a dictionary.
PLAIN: dict[str, Any] = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
QUIET = {"show_progress_bar": False}


def configs(fields: dict[str, Any], **eva: Any) -> tuple[peft.LoraConfig, LoraConfig]:
    return (
        peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(**eva), **fields),
        LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(**eva), **fields),
    )


def models(base: nn.Module, fields: dict[str, Any], **eva: Any) -> tuple[Any, Any]:
    one, other = twice(base)
    theirs, ours = configs(fields, **eva)
    return peft.get_peft_model(one, theirs), lora_ext.get_peft_model(other, ours)


def check_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert {name: len(t) for name, t in one.items()} == {n: len(t) for n, t in other.items()}
    one, other = ({n: t.double() for n, t in d.items()} for d in (one, other))
    for name, components in one.items():
        if len(components):
            alike = torch.linalg.svdvals(components @ other[name].t())
            assert float(alike.min()) >= 0.999, name
            cosines = torch.cosine_similarity(components, other[name])
            assert float(cosines.min()) >= 0.999, name


def forward(model: nn.Module, batch: Tensor) -> Any:
    return model(batch)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_language_model_as_peft_and_dicts_go_both_ways(seed: int, tmp_path: Path) -> None:
    base, data = llama(seed), texts(seed)
    for_peft, own = models(base, LLAMA, tau=0.9)
    expected = theirs.get_eva_state_dict(for_peft, data, **QUIET)
    got = get_eva_state_dict(own, data, **QUIET)
    check_alike(expected, got)
    assert len({len(t) for t in got.values()}) > 1  # ranks were shared out anew
    theirs.initialize_lora_eva_weights(for_peft, eva_state_dict=dict(got))
    initialize_lora_eva_weights(own, eva_state_dict=dict(expected))
    a, b = for_peft.peft_config["default"], own.peft_config["default"]
    assert (a.rank_pattern, a.alpha_pattern) == (b.rank_pattern, b.alpha_pattern)
    assert set(a.target_modules) == set(b.target_modules)
    assert torch.equal(own(**data[0]).logits, base(**data[0]).logits)  # lora_B is zero
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    own.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(back(**data[0]).logits, own(**data[0]).logits)
    back.save_pretrained(tmp_path / "theirs")
    again = lora_ext.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.equal(again(**data[0]).logits, own(**data[0]).logits)


@pytest.mark.parametrize("fields", [{"rank_pattern": {"k_proj": 6}}, {"r": 2}], ids=str)
@pytest.mark.parametrize("eva", [{"rho": 1.0}, {"rho": 3.0}, {"use_label_mask": False}], ids=str)
def test_other_settings_as_peft(fields: dict[str, Any], eva: dict[str, Any]) -> None:
    data = texts(3)
    for_peft, own = models(llama(3), LLAMA | fields, tau=0.8, **eva)
    theirs.initialize_lora_eva_weights(for_peft, data, **QUIET)
    initialize_lora_eva_weights(own, data, **QUIET)
    a, b = for_peft.peft_config["default"], own.peft_config["default"]
    assert (a.rank_pattern, a.alpha_pattern) == (b.rank_pattern, b.alpha_pattern)
    expected = peft.get_peft_model_state_dict(for_peft)
    got = lora_ext.get_peft_model_state_dict(own)
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-3, atol=1e-3)


def test_a_model_without_adapters_and_conv1d() -> None:
    one, other = twice(gpt2())
    a, b = configs({"r": 2, "target_modules": ["c_attn", "c_fc"]}, tau=0.8)
    data = texts(1)
    check_alike(
        theirs.get_eva_state_dict(one, data, a, **QUIET),
        found := get_eva_state_dict(other, data, b, **QUIET),
    )
    own = lora_ext.get_peft_model(other, b)
    initialize_lora_eva_weights(own, eva_state_dict=found)  # names without "base_model.model."
    layer = own.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    assert torch.equal(layer.lora_A, found["transformer.h.0.attn.c_attn"])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("whiten", [False, True])
def test_rows_of_tensors_and_whitening(seed: int, whiten: bool) -> None:
    for_peft, own = models(Net(seed), NET, tau=0.9, whiten=whiten)
    data = points(seed)
    expected = theirs.get_eva_state_dict(for_peft, data, forward_fn=forward, **PLAIN, **QUIET)
    got = get_eva_state_dict(own, data, **PLAIN, **QUIET)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor.float(), rtol=1e-3, atol=1e-3)


def test_layers_of_one_input_are_whitened_once() -> None:
    """PEFT divides the memory that they share once for each of them."""
    own = lora_ext.get_peft_model(llama(), configs(LLAMA, tau=0.8, whiten=True)[1])
    plain = lora_ext.get_peft_model(llama(), configs(LLAMA, tau=0.8)[1])
    white = get_eva_state_dict(own, texts(), **QUIET)
    for name, components in get_eva_state_dict(plain, texts(), **QUIET).items():
        lengths = white[name].norm(dim=1)
        torch.testing.assert_close(components * lengths[:, None], white[name])


def test_labels_and_layers_of_other_lengths_are_said() -> None:
    """Labels of sequences, and a decoder that has fewer places than the tokens."""
    tokens = torch.zeros(4, 6, dtype=torch.long)
    batch = {"input_ids": tokens, "labels": torch.zeros(4)}
    find = eva_inputs.prepare_model_inputs_fn_language_modeling
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(), **NET)
    with pytest.raises(ValueError, match=r"labels of shape \[4\].*use_label_mask=False"):
        find(batch, config)
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(use_label_mask=False), **NET)
    places = find(batch, config)
    assert len(places) == tokens.numel()
    rows = eva_inputs.prepare_layer_inputs_fn_language_modeling
    assert rows(torch.zeros(4, 6, 3), places, "first").shape == (24, 3)
    with pytest.raises(ValueError, match=r"'decoder.0'.*\[4, 5, 3\].*which take all rows"):
        rows(torch.zeros(4, 5, 3), places, "decoder.0")


def test_a_first_batch_without_rows_tells_no_layers_apart() -> None:
    """Inputs without rows are all alike, which says nothing of the layers."""
    data = texts(2)
    masked = {**data[0], "attention_mask": torch.zeros_like(data[0]["attention_mask"])}
    own = lora_ext.get_peft_model(llama(), configs(LLAMA, tau=0.8)[1])
    expected = get_eva_state_dict(own, data, **QUIET)
    got = get_eva_state_dict(own, [masked, *data], **QUIET)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
