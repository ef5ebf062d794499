"""LoraModel: adapters in a whole model, several of them, merging, taking them out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.nn import Linear


class Net(nn.Module):
    """Three linear layers, one of them registered twice, and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, dtype=dtype), nn.Linear(8, 8, dtype=dtype)
        self.again, self.head = self.second, nn.Linear(8, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(torch.tanh(self.second(torch.tanh(self.first(x))))))


def net_of(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(dtype)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def config_of(**fields: Any) -> LoraConfig:
    settings = {"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False}
    return LoraConfig(**(settings | fields))


def model_of(**fields: Any) -> LoraModel:
    return get_lora_model(net_of(), config_of(**fields))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in now)


def test_layers_are_swapped_in_place_and_share_parameters() -> None:
    net = net_of()
    before, plain = dict(net.named_parameters()), net(rows())
    model = get_lora_model(net, config_of(init_lora_weights=True))
    assert isinstance(model, LoraModel) and model.get_base_model() is net
    assert model.targeted_module_names == ["first", "second"]
    assert isinstance(net.first, Linear) and net.again is net.second
    assert all(dict(net.named_parameters())[name] is p for name, p in before.items())
    assert torch.equal(model(rows()), plain)
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trains == {f"{n}.lora_{part}" for n in ("first", "second") for part in "AB"}


def test_attributes_and_mode_go_through() -> None:
    net = net_of().eval()
    net.config = "anything"  # type: ignore[assignment]
    model = get_lora_model(net, config_of())
    assert model.config == "anything" and not model.training and model.head is net.head
    with pytest.raises(AttributeError):
        _ = model.nothing


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_train_as_the_config_says(bias: str) -> None:
    net = model_of(bias=bias).get_base_model()
    trains = {n for n, p in net.named_parameters() if p.requires_grad and n.endswith("bias")}
    wanted = {"none": set(), "all": {"first", "second", "head"}, "lora_only": {"first", "second"}}
    assert trains == {f"{name}.bias" for name in wanted[bias]}


def test_rank_and_alpha_patterns() -> None:
    net = model_of(rank_pattern={"second": 4}, alpha_pattern={"first": 20}).get_base_model()
    assert (net.first.r, net.first.scaling) == (2, 10) and (net.second.r, net.second.scaling) == (
        4,
        2,
    )


def test_several_adapters() -> None:
    model, x = model_of(), rows()
    default = model(x)
    model.add_adapter("other", config_of(r=3, target_modules=["first", "head"]))
    assert torch.equal(model(x), default) and model.active_adapters == ["default"]
    model.set_adapter("other")
    other = model(x)
    net = model.get_base_model()
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trains == {f"{n}.lora_{part}_other" for n in ("first", "head") for part in "AB"}
    with model.disable_adapter():
        assert torch.equal(model(x), net_of()(x))
    assert torch.equal(model(x), other)
    model.set_scale("other", 0)
    assert torch.equal(model(x), net_of()(x))
    model.set_scale("other", 1)
    model.set_adapter(["default", "other"])
    assert not torch.equal(model(x), default) and not torch.equal(model(x), other)
    model.rename_adapter("other", "third")
    model.delete_adapter("default")
    assert model.active_adapters == ["third"] and torch.equal(model(x), other)
    assert list(model.peft_config) == ["third"]


@pytest.mark.parametrize("how", ["for longer", "in a context"])
def test_what_is_added_while_adapters_are_off_is_off(how: str) -> None:
    model, x = model_of(target_modules=["first"]), rows()
    plain = net_of()(x)
    others = config_of(target_modules=["second"], modules_to_save=["head"])

    def add() -> None:
        model.add_adapter("others", others)
        with torch.no_grad():
            model.head.modules_to_save["others"].weight.mul_(2.0)
        model.set_adapter(["default", "others"])
        assert torch.equal(model(x), plain) and model.get_model_status().enabled is False

    if how == "for longer":
        model.disable_adapters()
        add()
        model.enable_adapters()
    else:
        with model.disable_adapter():
            add()
    assert model.get_model_status().enabled is True and model.head.enabled
    both = model(x)
    model.set_adapter("default")
    assert not torch.equal(both, model(x)) and not torch.equal(both, plain)


def test_modules_to_save_are_copies_that_train() -> None:
    net = net_of()
    head = net.head
    model = get_lora_model(net, config_of(modules_to_save=["head"]))
    trained = net.head.modules_to_save["default"]
    assert trained.weight is not head.weight and torch.equal(trained.weight, head.weight)
    assert trained.weight.requires_grad and not head.weight.requires_grad
    with torch.no_grad():
        trained.weight.mul_(2.0)
    x = rows()
    on = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), net_of()(x))
    model.add_adapter("other", config_of(modules_to_save=["head"]))
    assert torch.equal(net.head.modules_to_save["other"].weight, head.weight)
    with pytest.raises(ValueError, match="modules_to_save"):
        model.set_adapter(["default", "other"])
    assert torch.equal(model(x), on)
    assert model.unload().head is trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_and_unmerging_give_back_every_bit(dtype: torch.dtype) -> None:
    model = get_lora_model(net_of(dtype), config_of(bias="all"))
    before, x = weights(model), rows(dtype)
    parameters = [p.detach().clone() for p in model.get_base_model().parameters()]
    y = model(x)
    model.merge_adapter()
    assert same(model, before)  # a state dict is always the base's
    limit = 4 * torch.finfo(dtype).eps * y.abs().max()
    assert (model(x) - y).abs().max() <= limit
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.get_base_model().parameters(), parameters, strict=True)
    )
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_one_layer_that_cannot_be_merged_leaves_all_as_they_were() -> None:
    model = model_of(target_modules=["first", "second", "head"])
    with torch.no_grad():
        model.get_base_model().head.lora_B[0, 0] = torch.nan
    pointers = [p.detach().clone() for p in model.get_base_model().parameters()]
    with pytest.raises(ValueError, match="NaN") as raised:
        model.merge_adapter()
    assert "layer 'head'" in str(raised.value) and "no layer" in str(raised.value)
    now = list(model.get_base_model().parameters())
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(now, pointers, strict=True))
    assert not any(layer.merged for _, layer in model.lora_layers())


def test_merge_and_unload_gives_a_plain_model() -> None:
    model, x = model_of(), rows()
    y = model(x)
    net = model.merge_and_unload()
    assert type(net.first) is nn.Linear and net.again is net.second
    assert set(net.state_dict()) == set(net_of().state_dict())
    torch.testing.assert_close(net(x), y)


@pytest.mark.parametrize("call", ["set_adapter", "set_scale"])
def test_unloaded_adapters_are_not_set_silently(call: str) -> None:
    model = model_of()
    model.merge_and_unload()
    arguments = ["default"] if call == "set_adapter" else ["default", 2.0]
    with pytest.raises(ValueError, match=f"LoraModel.{call}: .*'default', which no layer"):
        getattr(model, call)(*arguments)


def test_unload_gives_the_base_back() -> None:
    net, x = net_of(), rows()
    plain, names = net(x), dict(net.named_parameters())
    model = get_lora_model(net, config_of())
    assert model.unload() is net and torch.equal(net(x), plain)
    assert {n: id(p) for n, p in net.named_parameters()} == {n: id(p) for n, p in names.items()}


def test_training_reduces_the_loss_and_moves_only_the_adapter() -> None:
    model, x = model_of(init_lora_weights=True), rows()
    frozen = {
        n: p.clone() for n, p in model.get_base_model().named_parameters() if not p.requires_grad
    }
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(40):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    now = dict(model.get_base_model().named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


def test_copies_are_independent() -> None:
    model, x = model_of(), rows()
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    other.merge_adapter()
    assert not model.get_base_model().first.merged


def test_adding_an_adapter_leaves_modes_and_merges_alone() -> None:
    model, x = model_of(), rows()
    model.set_adapter("default", inference_mode=True)
    model.merge_adapter()
    y = model(x)
    model.add_adapter("other", config_of(target_modules=["first", "head"]))
    model.add_weighted_adapter(["default", "other"], [1, 1], "both", "cat")
    assert torch.equal(model(x), y) and model.get_base_model().first.merged
    assert not any(p.requires_grad for p in model.parameters())
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert model.active_adapters == ["both"]
    assert not any(p.requires_grad for p in model.parameters())
    model.delete_adapter("other")
    model.delete_adapter("both")
    model.add_adapter("late", config_of())
    assert model.active_adapters == [] and torch.equal(model(x), net_of()(x))


@pytest.mark.parametrize("active", [["default"], ["default", "other"]], ids=["one", "several"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_what_is_active_after_a_deletion_trains_as_before(frozen: bool, active: list[str]) -> None:
    """The next adapter takes the place of the deleted one; one that was active stays as it was."""
    model = model_of()
    model.add_adapter("other", config_of(r=3, target_modules=["first", "head"]))
    model.set_adapter(active, inference_mode=frozen)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    net = model.get_base_model()
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    others = {f"{n}.lora_{part}_other" for n in ("first", "head") for part in "AB"}
    assert trains == (set() if frozen else others)


def test_a_name_is_no_path() -> None:
    for name in ("/tmp/x", "a/b", "..", "a\\b", ""):
        with pytest.raises(ValueError, match="adapter_name"):
            get_lora_model(net_of(), config_of(), name)


WRONG: dict[str, tuple[Callable[[LoraModel], Any], type[Exception], str]] = {
    "name taken": (lambda m: m.add_adapter("default", config_of()), ValueError, "'default'"),
    "no match": (
        lambda m: m.add_adapter("new", config_of(target_modules=["secnod"])),
        ValueError,
        "second",
    ),
    "modules to save": (
        lambda m: m.add_adapter("new", config_of(modules_to_save=["nothing"])),
        ValueError,
        "modules_to_save",
    ),
    "unknown, set": (lambda m: m.set_adapter("new"), ValueError, "got 'new'"),
    "unknown, delete": (lambda m: m.delete_adapter("new"), ValueError, "got 'new'"),
    "unknown, merge": (lambda m: m.merge_adapter(["new"]), ValueError, "got 'new'"),
    "unknown, scale": (lambda m: m.set_scale("new", 2), ValueError, "got 'new'"),
    "a LoraModel": (lambda m: get_lora_model(m, config_of()), TypeError, "add_adapter"),
    "no model": (lambda m: get_lora_model({}, config_of()), TypeError, "expected a Module"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_and_changes_nothing(
    call: Callable[[LoraModel], Any], error: type[Exception], message: str
) -> None:
    model = model_of()
    before, modules = weights(model), [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        call(model)
    assert same(model, before) and [type(module) for module in model.modules()] == modules
    assert list(model.peft_config) == ["default"]


def test_a_failure_in_the_middle_leaves_no_half_an_adapter() -> None:
    """ "first" has its adapter, and a changed weight, when the rank is too large for "second"."""
    model = model_of()
    before = weights(model)
    config = config_of(r=2, init_lora_weights="pissa", rank_pattern={"second": 999})
    with pytest.raises(ValueError, match="999"):
        model.add_adapter("new", config)
    assert same(model, before) and list(model.peft_config) == ["default"]


def test_set_adapter_says_that_it_unmerges() -> None:
    """As PEFT does."""
    model = get_lora_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"set_adapter: the model was merged.*merge_adapter\(\)"):
        model.set_adapter("default")
    assert not model.get_base_model()[0].merged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_adapter("default")


def test_errors_of_layers_name_the_layer_and_what_the_model_can_do() -> None:
    model = model_of()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"layer 'first': .*call unmerge_adapter\(\)"):
        model.set_scale("default", 2.0)


def test_without_an_active_adapter() -> None:
    model = model_of()
    model.set_adapter([])
    with pytest.raises(ValueError, match=r"active_adapter: .*expected one of \['default'\]"):
        _ = model.active_adapter
