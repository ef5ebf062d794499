"""What files hold of whole models: embeddings, biases, compiled and resized models, combined
adapters; and what is refused before anything is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_zoo import tokens, zoo
from language_models import FILE, PREFIX, keys
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# torch.compile


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lin = nn.Embedding(11, 4), nn.Linear(4, 4)
        self.deep = nn.ModuleDict({"lin": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep["lin"](torch.tanh(self.lin(self.words(x)))))


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def with_compiled_parts(model: nn.Module) -> nn.Module:
    model.head, model.deep["lin"] = compiled(model.head), compiled(model.deep["lin"])
    return model


def with_checkpointed_parts(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, nn.Linear))
    return model


WRAPPED = {"whole": compiled, "parts": with_compiled_parts, "checkpoint": with_checkpointed_parts}
FIELDS = {
    "r": 2,
    "target_modules": ["words", "lin", "deep.lin"],
    "modules_to_save": ["head"],
    "bias": "all",
    "init_lora_weights": False,
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_models_have_the_plain_names(how: str, tmp_path: Path) -> None:
    plain, model = (
        get_lora_model(b, LoraConfig(**FIELDS)) for b in (small(), WRAPPED[how](small()))
    )
    plain.save_pretrained(tmp_path / "plain")
    assert model.targeted_module_names == plain.targeted_module_names
    model.save_pretrained(tmp_path / "compiled")
    assert keys(tmp_path / "compiled") == keys(tmp_path / "plain")
    read = LoraModel.from_pretrained(WRAPPED[how](small()), tmp_path / "plain")
    with torch.no_grad():
        y = plain.eval()(tokens())
        torch.testing.assert_close(read(tokens()), y)
        assert not torch.allclose(small()(tokens()), y)
        read.save_pretrained(tmp_path / "again")
        again = LoraModel.from_pretrained(small(), tmp_path / "again")
        assert torch.equal(again(tokens()), y)
        torch.testing.assert_close(read.merge_and_unload()(tokens()), y)


@pytest.mark.parametrize("how", ["parts", "checkpoint"])
def test_a_wrapped_layer_runs_what_took_its_place(how: str) -> None:
    net = WRAPPED[how](small())
    with torch.no_grad():
        plain = net(tokens())
        model = get_lora_model(net, LoraConfig(**FIELDS))
        assert not torch.allclose(model.eval()(tokens()), plain)
        model.set_scale("default", 0.0)
        torch.testing.assert_close(model(tokens()), plain)
        torch.testing.assert_close(model.unload()(tokens()), plain)


def test_a_model_that_is_checkpointed_with_its_adapters_is_saved(tmp_path: Path) -> None:
    model = get_lora_model(small(), LoraConfig(**FIELDS))
    model.save_pretrained(tmp_path / "plain")
    with_checkpointed_parts(model).save_pretrained(tmp_path / "checkpoint")
    for file in FILE, "adapter_config.json":
        plain, checkpointed = (tmp_path / name / file for name in ("plain", "checkpoint"))
        assert plain.read_bytes() == checkpointed.read_bytes()
    model.merge_adapter()
    model.unmerge_adapter()
    assert type(model.unload().lin._checkpoint_wrapped_module) is nn.Linear


def test_a_file_with_the_names_of_a_compiled_model_is_read(tmp_path: Path) -> None:
    model = get_lora_model(
        small(), LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    old = {k.replace(PREFIX, f"{PREFIX}_orig_mod."): tensor for k, tensor in tensors.items()}
    save_file(old, tmp_path / FILE)
    read = LoraModel.from_pretrained(small(), tmp_path)
    with torch.no_grad():
        assert torch.equal(read(tokens()), model(tokens()))


# Names and configs


def test_names_that_are_ends_of_others(tmp_path: Path) -> None:
    """ "0" and "1.1" are linear; a list with "0" would also mean "1.0"."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        return nn.Sequential(nn.Linear(4, 4), inner)

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model, x = get_lora_model(net(), config), torch.randn(3, 4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(LoraModel.from_pretrained(net(), tmp_path)(x), model(x))


def test_order_of_patterns_is_kept(tmp_path: Path) -> None:
    fields = {
        "rank_pattern": {r"layers\.1\.lin": 4, "lin": 3},
        "alpha_pattern": {"lin": 40, "layers.0.lin": 5, "a": 1},
    }
    config = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False, **fields)
    model = get_lora_model(zoo(), config).eval()
    model.save_pretrained(tmp_path)
    read = LoraModel.from_pretrained(zoo(), tmp_path)
    with torch.no_grad():
        assert torch.equal(read(tokens()), model(tokens()))
    theirs = peft.PeftModel.from_pretrained(zoo(), tmp_path).eval()
    torch.testing.assert_close(theirs(tokens()), model(tokens()), rtol=1e-4, atol=1e-5)


def test_many_tensors(tmp_path: Path) -> None:
    """More than some 3,500, with usual names, fill a header of 512 KiB."""

    def net() -> nn.Module:
        names = [f"{name}_" + "projection_" * 20 for name in ("gate", "up", "down")]
        experts = ({name: nn.Linear(1, 1, bias=False) for name in names} for _ in range(270))
        return nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict(e) for e in experts)})

    model = get_lora_model(net(), LoraConfig(r=1, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    assert int.from_bytes((tmp_path / FILE).read_bytes()[:8], "little") > 512 << 10
    assert (tmp_path / "adapter_config.json").stat().st_size < 4096  # the names' ends
    assert len(list(LoraModel.from_pretrained(net(), tmp_path).lora_layers())) == 810


def test_config_that_would_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["lin"])
    model = get_lora_model(zoo(), config)
    model.peft_config["default"].auto_mapping = {"note": "x" * (1 << 20)}
    with pytest.raises(ValueError, match="more than would be read again"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_plain_adapter_beside_one_that_changed_the_base_is_saved_with_a_warning(
    tmp_path: Path,
) -> None:
    model = get_lora_model(zoo(), LoraConfig(target_modules=["lin"], init_lora_weights="olora"))
    model.add_adapter("plain", LoraConfig(target_modules=["lin"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="'plain': the initialisation of 'default' changed"):
        model.save_pretrained(tmp_path)
    read = LoraModel.from_pretrained(zoo(), tmp_path)
    read.load_adapter(tmp_path / "plain", "plain")
    for one in (model.eval(), read):
        one.set_adapter("plain")
    assert torch.equal(read(tokens()), model(tokens()))


COMBINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "other targets": ({"target_modules": ["words", "mix"]}, {"target_modules": ["lin"]}),
    "expression and list": ({"target_modules": r".*\.lin"}, {"target_modules": ["conv1", "attn"]}),
    "excluded": ({"exclude_modules": ["layers.1.lin"]}, {}),
    "excluded in both": ({"exclude_modules": ["layers.1.lin"]}, {"exclude_modules": "lin|.*0.lin"}),
    "layers": ({"layers_to_transform": [0]}, {"layers_to_transform": 1}),
    "layers, pattern": (
        {"layers_to_transform": [0], "layers_pattern": "layers"}, {"target_modules": ["head"]}
    ),
    "bias of B": ({"lora_bias": True}, {"target_modules": ["mix"]}),
    "ranks": ({"rank_pattern": {"layers.1.lin": 5}, "use_rslora": True}, {"r": 3}),
    "copies": ({"modules_to_save": ["head"]}, {}),
    "copies in the second": ({}, {"modules_to_save": ["head", "norm"]}),
    "dropout": ({"lora_dropout": 0.1}, {"target_modules": ["mix"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", COMBINED)
def test_combined_adapters(case: str, tmp_path: Path) -> None:
    fields = {"r": 2, "target_modules": ["lin", "free"], "init_lora_weights": False}
    one, two = (LoraConfig(**(fields | own)) for own in COMBINED[case])
    model = get_lora_model(zoo(), one, "one")
    model.add_adapter("two", two)
    model.add_weighted_adapter(["one", "two"], [1.0, -0.5], "new", "cat")
    model.set_adapter("new")
    model.save_pretrained(tmp_path, ["new"])
    read = LoraModel.from_pretrained(zoo(), tmp_path / "new", "new")
    with torch.no_grad():
        assert torch.equal(read(tokens()), model.eval()(tokens()))
    where = [name for name, layer in model.lora_layers() if "new" in layer.adapters]
    assert [name for name, _ in read.lora_layers()] == where
    if "lora_bias" not in COMBINED[case][0]:  # PEFT has none in the layers that lacked it
        theirs = peft.PeftModel.from_pretrained(zoo(), tmp_path / "new").eval()
        if "attn" not in str(COMBINED[case]):  # PEFT adds that of out_proj twice
            close = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(theirs(tokens()), model(tokens()), **close)


def test_what_no_config_describes_is_not_combined() -> None:
    fields = {"r": 2, "init_lora_weights": False}
    model = get_lora_model(zoo(), LoraConfig(target_modules=["lin"], lora_bias=True, **fields))
    model.add_adapter("two", LoraConfig(target_modules=["words"], **fields))
    with pytest.raises(ValueError, match="'words', which cannot have one"):
        model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "new", "cat")
    assert list(model.peft_config) == ["default", "two"]
    assert not any("new" in layer.adapters for _, layer in model.lora_layers())


def test_layers_inside_a_module_with_adapted_parameters(tmp_path: Path) -> None:
    fields = {"r": 2, "target_modules": ["gate"], "target_parameters": ["experts.up"]}
    theirs = peft.get_peft_model(zoo(), peft.LoraConfig(init_lora_weights=False, **fields)).eval()
    theirs.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(zoo(), tmp_path)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), rtol=1e-4, atol=1e-5)
    ours.add_adapter("two", LoraConfig(init_lora_weights=False, **fields))
    with torch.no_grad():
        assert not torch.allclose(ours(tokens()), zoo()(tokens()))
        torch.testing.assert_close(ours.unload()(tokens()), zoo()(tokens()))


# What is refused


def test_after_unload_nothing_is_written(tmp_path: Path) -> None:
    for out in (LoraModel.unload, LoraModel.merge_and_unload):
        model = get_lora_model(zoo(), LoraConfig(r=2, target_modules=["lin"]))
        model.save_pretrained(tmp_path)
        before = (tmp_path / FILE).read_bytes()
        out(model)
        with pytest.raises(ValueError, match="no layer of the model has this adapter"):
            model.save_pretrained(tmp_path)
        assert (tmp_path / FILE).read_bytes() == before


def replace_a_layer(model: LoraModel) -> None:
    model.get_base_model().lin = nn.Linear(8, 8)


def replace_a_copy(model: LoraModel) -> None:
    model.get_base_model().head = nn.Linear(8, 5)


def resize_in_place(model: LoraModel) -> None:
    words = model.get_base_model().words
    words.weight, words.num_embeddings = nn.Parameter(torch.zeros(13, 8)), 13


def split(part: str) -> Callable[[LoraModel], None]:
    """As DeepSpeed ZeRO-3 leaves parameters between calls."""

    def change(model: LoraModel) -> None:
        parameter = model.get_base_model().get_parameter(part)
        parameter.ds_id, parameter.ds_shape = 1, parameter.shape
        parameter.data = torch.empty(0)

    return change


def empty(model: LoraModel) -> None:
    model.get_base_model().lin.lora_A.data = torch.empty(0)


REFUSED: dict[str, tuple[Callable[[LoraModel], object], str]] = {
    "a layer was replaced": (replace_a_layer, "'lin', which has it no longer"),
    "a copy was replaced": (replace_a_copy, "'head' whole, which has no copy"),
    "the embedding grew": (resize_in_place, r"words.lora_A has shape \[2, 11\], expected \[2, 13"),
    "on meta": (lambda m: m.to("meta"), "on the device meta"),
    "ZeRO-3": (split("lin.lora_A"), "DeepSpeed ZeRO-3"),
    "ZeRO-3, a bias": (split("norm.bias"), "DeepSpeed ZeRO-3"),
    "ZeRO-3, a copy": (split("head.modules_to_save.default.weight"), "DeepSpeed ZeRO-3"),
    "empty": (empty, "split between processes"),
    "another config": (
        lambda m: m.peft_config["default"].target_modules.append("conv1"), "'conv1', which has it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_all_there_is_not_written(case: str, tmp_path: Path) -> None:
    change, says = REFUSED[case]
    net = zoo()
    net.norm = nn.LayerNorm(8)
    fields = {"target_modules": ["lin", "words"], "modules_to_save": ["head"], "bias": "all"}
    model = get_lora_model(net, LoraConfig(r=2, **fields))
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    change(model)
    with pytest.raises(ValueError, match=says):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["head"]}], ids=["layers", "copies"])
def test_a_base_on_meta_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    get_lora_model(zoo(), LoraConfig(r=2, target_modules=["lin"], **fields)).save_pretrained(
        tmp_path
    )
    base = zoo().to("meta")
    modules = [type(module) for module in base.modules()]
    with pytest.raises(AdapterFileError, match="on the device meta"):
        LoraModel.from_pretrained(base, tmp_path)
    assert [type(module) for module in base.modules()] == modules


def test_the_default_device_is_not_asked(tmp_path: Path) -> None:
    fields = FIELDS | {"target_parameters": ["experts.up"]}
    fields["target_modules"] = ["words", "lin", "mix", "attn", "conv1", "conv2", "conv3"]
    model = get_lora_model(zoo(), LoraConfig(**fields)).eval()
    base = zoo()
    torch.set_default_device("meta")
    try:
        model.save_pretrained(tmp_path)
        read = LoraModel.from_pretrained(base, tmp_path)
    finally:
        torch.set_default_device(None)
    with torch.no_grad():
        assert torch.equal(read(tokens()), model(tokens()))


def test_an_adapter_beside_modules_that_another_saves_whole(tmp_path: Path) -> None:
    """ "gate" means one inside `layers.0.experts` as well, of which the first has a copy."""
    fields = {"r": 2, "init_lora_weights": False}
    first = LoraConfig(target_modules=["lin"], modules_to_save=["layers.0.experts"], **fields)
    model = get_lora_model(zoo(), first).eval()
    model.add_adapter("two", LoraConfig(target_modules=["gate", "words"], **fields))
    model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "new", "cat")
    stacked = {"target_modules": ["mix"], "target_parameters": ["experts.up"]}
    model.add_adapter("three", LoraConfig(**stacked, **fields))
    for name in ("two", "new", "three"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path, [name])
        read = LoraModel.from_pretrained(zoo(), tmp_path / name)
        with torch.no_grad():
            assert torch.equal(read(tokens()), model(tokens()))


def test_names_read_off_a_compiled_model_are_plain(tmp_path: Path) -> None:
    net = compiled(small())
    targets = [name for name, _ in net.named_modules() if name.endswith("lin")]
    assert targets[0] == "_orig_mod.lin"
    fields = {"target_modules": targets, "modules_to_save": ["_orig_mod.head"]}
    model = get_lora_model(net, LoraConfig(r=2, init_lora_weights=False, **fields))
    model.save_pretrained(tmp_path)
    assert "_orig_mod" not in (tmp_path / "adapter_config.json").read_text()
    read = LoraModel.from_pretrained(small(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(read(tokens()), model(tokens()))
