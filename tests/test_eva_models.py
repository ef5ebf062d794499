"""What EVA makes of a model, and what cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from calibration_models import (
    Net,
    llama,
    points,
    same_state,
    state_of,
    texts,
)
from test_eva import LLAMA, NET, PLAIN, QUIET, check_alike, configs, forward, models, theirs
from torch import Tensor, nn

import lora_ext
from lora_ext import EvaConfig, LoraConfig, get_eva_state_dict, initialize_lora_eva_weights


class Flat(nn.Module):
    """The input of `narrow` lies in a plane, that of `wide` in all directions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow, self.wide = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Any:
        plane = x * torch.tensor([1.2, 1.0] + [1e-3] * 14)
        return self.wide(x) + self.narrow(plane)


def test_rank_zero_takes_the_adapter_off() -> None:
    torch.manual_seed(0)
    data = [torch.randn(200, 16) for _ in range(4)]
    base = Flat()
    fields: dict[str, Any] = {"r": 1, "target_modules": ["narrow", "wide"]}
    for_peft, own = models(base, fields, tau=0.5)
    components = theirs.get_eva_state_dict(for_peft, data, forward_fn=forward, **PLAIN, **QUIET)
    check_alike(components, get_eva_state_dict(own, data, **PLAIN, **QUIET))
    theirs.initialize_lora_eva_weights(for_peft, eva_state_dict=components)
    initialize_lora_eva_weights(own, data, **PLAIN, **QUIET)
    for model in (for_peft, own):
        config = model.peft_config["default"]
        assert type(model.base_model.model.wide) is nn.Linear
        assert (set(config.target_modules), config.rank_pattern) == ({"narrow"}, {"narrow": 2})
    assert own.targeted_module_names == ["narrow"]
    assert torch.equal(own(data[0]), base(data[0]))
    own.add_adapter("two", LoraConfig(**fields))
    assert own.peft_config["two"].target_modules is not None


def test_rank_zero_beside_another_adapter() -> None:
    own = lora_ext.get_peft_model(Flat(), LoraConfig(r=1, target_modules=["wide"]), "other")
    own.add_adapter("default", configs({"r": 1, "target_modules": ["narrow", "wide"]})[1])
    own.set_adapter("default")
    shared = {"wide": torch.empty(0, 16), "narrow": torch.eye(16)[:2]}
    initialize_lora_eva_weights(own, eva_state_dict=shared)
    layer: Any = own.get_submodule("base_model.model.wide")
    assert list(layer.adapters) == ["other"] and layer.active_adapters == ()
    own.set_adapter("other")
    own.delete_adapter("default")


@pytest.mark.parametrize("more", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_variants_start_as_the_base(more: dict[str, Any]) -> None:
    base, data = Net(), points()
    own = lora_ext.get_peft_model(copy.deepcopy(base), configs(NET | more, tau=0.8)[1])
    initialize_lora_eva_weights(own, data, **PLAIN, **QUIET)
    torch.testing.assert_close(own(data[0]), base(data[0]))
    own(data[0]).sum().backward()
    trained = [n for n, p in own.named_parameters() if p.requires_grad]
    assert trained and all(own.get_parameter(n).grad is not None for n in trained)


def test_bfloat16_and_float64() -> None:
    data = texts()
    expected = get_eva_state_dict(
        lora_ext.get_peft_model(llama(), configs(LLAMA, tau=0.8)[1]), data, **QUIET
    )
    wide = lora_ext.get_peft_model(llama().double(), configs(LLAMA, tau=0.8)[1])
    check_alike(expected, get_eva_state_dict(wide, data, **QUIET))
    narrow = lora_ext.get_peft_model(llama().bfloat16(), configs(LLAMA, tau=0.8)[1])
    before = narrow(**data[0]).logits
    initialize_lora_eva_weights(narrow, data, **QUIET)
    kinds = {p.dtype for p in narrow.parameters() if p.requires_grad}
    assert kinds == {torch.float32} and torch.equal(narrow(**data[0]).logits, before)


def test_what_is_not_linear_starts_plainly() -> None:
    base = llama()
    fields = LLAMA | {"target_modules": ["q_proj", "embed_tokens"]}
    own = lora_ext.get_peft_model(base, configs(fields, tau=0.8)[1])
    with pytest.warns(UserWarning, match="init_lora_weights=True because.*embed_tokens"):
        initialize_lora_eva_weights(own, texts(), **QUIET)
    assert len(own.targeted_module_names) == 3


def test_names_that_are_ends_of_others_keep_their_ranks(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))

    own = lora_ext.get_peft_model(net(), configs({"r": 2, "target_modules": ["0", "1.0"]})[1])
    shared = {"0": torch.eye(6)[:3], "1.0": torch.eye(6)[:2]}
    initialize_lora_eva_weights(own, eva_state_dict=shared)
    own.save_pretrained(tmp_path)
    back = lora_ext.PeftModel.from_pretrained(net(), tmp_path)
    ranks = {n: len(p) for n, p in back.named_parameters() if n.endswith("lora_A")}
    assert sorted(ranks.values()) == [2, 3]
    peft.PeftModel.from_pretrained(net(), tmp_path)


def wrong_model() -> Any:
    return lora_ext.get_peft_model(Net(), LoraConfig(**NET))


def own_model(**fields: Any) -> Any:
    return lora_ext.get_peft_model(Net(), configs(NET | fields)[1])


NAN = [torch.full((40, 16), float("nan"))]
KIND_ONES = {"first": torch.ones(2, 16), "second": torch.ones(2, 20)}
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": (own_model, {"dataloader": []}, "dataloader is empty"),
    "NaN": (own_model, {"dataloader": NAN}, "input of 'base_model.model.first' holds NaN"),
    "unused": (
        lambda: own_model(target_modules=["first", "unused"]),
        {"dataloader": points()},
        "never reached .*unused",
    ),
    "few": (own_model, {"dataloader": points(rows=3)}, "no batch has 4 rows for"),
    "large": (lambda: own_model(r=12), {"dataloader": points()}, "K of at least 24"),
    "other init": (wrong_model, {"dataloader": points()}, "can only be used with"),
    "no data": (own_model, {}, "dataloader is required"),
    "no adapter": (own_model, {"dataloader": points(), "adapter_name": "x"}, "adapter_name"),
    "other shape": (own_model, {"eva_state_dict": {"first": torch.ones(2, 3)}}, r"\[rank, 16\]"),
    "not finite": (own_model, {"eva_state_dict": {"first": NAN[0][:2]}}, "holds NaN"),
    "other names": (own_model, {"eva_state_dict": {"third": torch.ones(2, 16)}}, "expected names"),
    "all zero": (
        own_model,
        {"eva_state_dict": {n: t[:0] for n, t in KIND_ONES.items()}},
        "all ranks are 0",
    ),
    "unknown function": (
        own_model,
        {"dataloader": points(), "prepare_layer_inputs_fn": {"x": None}},
        "not found in the model",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_leaves_the_model_as_it_was(what: str) -> None:
    make, arguments, text = WRONG[what]
    own = make()
    own.train()
    before = state_of(own)
    config = copy.deepcopy(own.peft_config)
    with pytest.raises(ValueError, match=text):
        initialize_lora_eva_weights(own, **PLAIN | QUIET | arguments)
    assert same_state(before, state_of(own)) and own.peft_config == config


def test_what_never_settles_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_ext.calibration import eva_pass

    monkeypatch.setattr(eva_pass, "_PASSES", 2)
    own = lora_ext.get_peft_model(Net(), configs(NET, tau=1.0)[1])
    with pytest.raises(ValueError, match="still change after 2 passes"):
        initialize_lora_eva_weights(own, points(), **PLAIN, **QUIET)


def test_merged_or_with_several_active_it_is_refused() -> None:
    own = own_model()
    own.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        initialize_lora_eva_weights(own, eva_state_dict=KIND_ONES)
    own.unmerge_adapter()
    own.add_adapter("two", LoraConfig(**NET))
    own.set_adapter(["default", "two"])
    with pytest.raises(ValueError, match="single active adapter"):
        initialize_lora_eva_weights(own, eva_state_dict=KIND_ONES)


def test_convolutions_are_refused_and_configs_checked() -> None:
    with pytest.raises(ValueError, match="it is for linear layers"):
        lora_ext.nn.Conv2d(4, 4, 1, r=2, init_lora_weights="eva")
    with pytest.raises(ValueError, match="`rho` must be >= 1"):
        EvaConfig(rho=0.5)
    with pytest.raises(ValueError, match="tau: got 2"):
        LoraConfig(init_lora_weights="eva", eva_config={"tau": 2})
    with pytest.warns(UserWarning, match="`eva_config` is not specified"):
        assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    with pytest.warns(UserWarning, match="will be ignored"):
        LoraConfig(eva_config=EvaConfig())


def test_names_that_match_each_other_keep_their_ranks(tmp_path: Path) -> None:
    """A key of rank_pattern is an expression for the end of a name, and '.' any character."""
    base = nn.Sequential()
    ranks = {"x.a_b": 5, "a.b": 2, "a_b": 3}
    for name in ranks:
        above, _, last = name.rpartition(".")
        if above:
            base.add_module(above, nn.Sequential())
        base.get_submodule(above).add_module(last, nn.Linear(12, 12))
    config = LoraConfig(r=1, target_modules=list(ranks), init_lora_weights="eva")
    model = lora_ext.get_lora_model(copy.deepcopy(base), config)
    initialize_lora_eva_weights(
        model, eva_state_dict={name: torch.randn(r, 12) for name, r in ranks.items()}
    )
    model.save_pretrained(tmp_path)
    read = lora_ext.LoraModel.from_pretrained(base, tmp_path)
    assert {n: one.adapters["default"].r for n, one in read.lora_layers()} == ranks
