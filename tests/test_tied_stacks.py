"""ensure_weight_tying where embeddings and the head share one weight, as in T5: they have one
adapter. PEFT gives each embedding another, and does not find them again in its own files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_tied_adapters import ALPHA, R, config_of, disturb
from tiny_models import BUILDERS
from torch import Tensor, nn

import lora_ext
from lora_ext import LoraModel, get_lora_model

NAMES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")


def t5() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)  # of adapters
    return BUILDERS["t5"]()


def error_of(got: Tensor, exact: Tensor) -> float:
    return (got - exact).abs().max().item()


def assert_same(got: Tensor, want: Tensor) -> None:
    """Within sixteen roundings of the largest: some sums of 32 after one another."""
    assert error_of(got, want) <= 16 * torch.finfo(torch.float32).eps * want.abs().max().item()


def adapted(*targets: str, **options: Any) -> LoraModel:
    model = get_lora_model(t5()[0], config_of(*targets, **options))
    disturb(model)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(**t5()[1]).logits
    return found


def layers(model: LoraModel) -> list[Any]:
    return [model.get_base_model().get_submodule(name) for name in NAMES]


@pytest.mark.parametrize("target", ["shared", "encoder.embed_tokens", "lm_head", "embed_tokens"])
def test_are_one_adapter_of_one_weight(target: str) -> None:
    base, inputs = t5()
    model = adapted(target)
    shared, *stacks, head = layers(model)
    assert all(one.lora_A is shared.lora_A and one.lora_B is shared.lora_B for one in stacks)
    assert head.lora_A is shared.lora_B and head.lora_B is shared.lora_A
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert [name.rpartition(".")[2] for name in trained] == ["lora_A", "lora_B"]

    A = shared.lora_A.detach().double().requires_grad_()
    B = shared.lora_B.detach().double().requires_grad_()
    W = base.shared.weight.detach().double() + ALPHA / R * (B @ A).t()
    plain = copy.deepcopy(base).double()
    result = torch.func.functional_call(
        plain, {f"{name}.weight": W for name in NAMES}, kwargs=inputs, tie_weights=False
    )
    want: Tensor = result.logits
    got = logits(model)
    assert_same(got.double(), want)
    weights = torch.randn(want.shape, dtype=torch.float64)
    (want * weights).sum().backward()
    (got * weights.float()).sum().backward()
    for own, exact in ((shared.lora_A.grad, A.grad), (shared.lora_B.grad, B.grad)):
        assert exact is not None
        assert_same(own.double(), exact)


def test_merging_keeps_the_tie() -> None:
    model = adapted("shared")
    want, before = logits(model), layers(model)[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.merge_adapter()
    merged = layers(model)[0].weight
    assert all(one.weight is merged for one in layers(model)) and merged is not before
    assert_same(logits(model), want)
    model.unmerge_adapter()
    assert all(one.weight is before for one in layers(model))
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize(
    "targets",
    [["shared"], ["q", "lm_head"], ["decoder.embed_tokens"], r".*\.(q|v)|shared"],
    ids=str,
)
def test_files_are_read_by_us_and_by_peft(targets: list[str] | str, tmp_path: Path) -> None:
    config = config_of("q")
    config.target_modules = targets
    ours = get_lora_model(t5()[0], config).eval()
    disturb(ours)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        back = peft.PeftModel.from_pretrained(t5()[0], str(tmp_path))
        again = LoraModel.from_pretrained(t5()[0], tmp_path)
    assert layers(again)[1].lora_A is layers(again)[0].lora_A
    assert torch.equal(logits(again), logits(ours))
    with torch.no_grad():
        exact = copy.deepcopy(ours).double()(**t5()[1]).logits
        plain = error_of(logits(copy.deepcopy(ours).merge_and_unload()), exact)
        assert max(error_of(logits(ours), exact), error_of(logits(back), exact)) <= 4 * plain


def test_of_pefts_files_the_embeddings_stay_apart(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": R, "lora_alpha": ALPHA, "ensure_weight_tying": True}
    config = peft.LoraConfig(target_modules=["q", "lm_head"], **fields)
    theirs = peft.get_peft_model(t5()[0], config).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "again"):
        with pytest.warns(UserWarning, match=r"'encoder.embed_tokens', .* adapters of their own"):
            ours = LoraModel.from_pretrained(t5()[0], folder)
        assert_same(logits(ours), logits(theirs))
        shared, encoder, _, head = layers(ours)
        assert encoder.lora_A is not shared.lora_A and head.lora_A is shared.lora_B
        ours.save_pretrained(tmp_path / "again")


def test_a_copy_has_its_own_and_plans_and_switches_work() -> None:
    model = adapted("lm_head")
    before = logits(model)
    twin = copy.deepcopy(model)
    shared, *stacks, head = layers(twin)
    assert all(one.lora_A is shared.lora_A is not layers(model)[0].lora_A for one in stacks)
    assert head.lora_A is shared.lora_B and torch.equal(logits(twin), before)
    with lora_ext.batch(["default"] * 2):
        assert_same(logits(model), before)
    model.add_adapter("more", config_of("shared"))
    model.set_adapter("more")
    assert layers(model)[2].lora_A_more.requires_grad and not layers(model)[2].lora_A.requires_grad
    model.delete_adapter("default")
    assert all("default" not in one.adapters for one in layers(model))
    state = lora_ext.get_peft_model_state_dict(twin)
    other = get_lora_model(t5()[0], config_of("lm_head")).eval()
    lora_ext.set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other), before)
