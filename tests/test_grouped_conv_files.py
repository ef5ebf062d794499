"""Adapters of grouped convolutions between PEFT, whose lora_A has no groups, and this package."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from measured import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.nn import AdapterSettings, Conv2d, Linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST_A = "base_model.model.0.lora_A.weight"
CHANNELS, RANK, NAMES = 6, 6, ["0", "2", "4"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora, bias": {"use_rslora": True, "lora_bias": True},
    "dropout": {"lora_dropout": 0.4},
}
each_net = pytest.mark.parametrize(
    "net", ["1d groups", "1d depthwise", "2d groups", "2d depthwise"]
)
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:.*tensor.* have invalid shape"),  # of the biases
]


def base(net: str) -> nn.Sequential:
    """Three grouped convolutions deep, frozen."""
    torch.manual_seed(0)
    kind: Any = nn.Conv1d if net.startswith("1d") else nn.Conv2d
    groups = 2 if net.endswith("groups") else CHANNELS
    return nn.Sequential(
        kind(CHANNELS, CHANNELS, 3, groups=groups, padding=1),
        nn.GELU(),
        kind(CHANNELS, 2 * CHANNELS, 2, groups=groups, stride=2),
        nn.GELU(),
        kind(2 * CHANNELS, CHANNELS, 1, groups=groups),
    ).requires_grad_(False)


def images(net: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, CHANNELS, *(9, 8)[: int(net[0])], requires_grad=True)


def by_peft(net: str, seed: int = 2, **setting: Any) -> Any:
    """A model of PEFT with lora_B ≠ 0 and lora_A ≠ 0 between the groups."""
    torch.manual_seed(seed)
    settings = {"r": RANK, "target_modules": NAMES, "init_lora_weights": False} | setting
    return peft.get_peft_model(base(net), peft.LoraConfig(**settings))


def by_us(net: str, seed: int = 2, **setting: Any) -> LoraModel:
    torch.manual_seed(seed)
    settings = {"r": RANK, "target_modules": NAMES, "init_lora_weights": False} | setting
    return get_lora_model(base(net), LoraConfig(**settings))


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape and expected.norm() > 0
    return ((actual - expected).norm() / expected.norm()).item()


def agree(ours: LoraModel, theirs: Any, net: str) -> None:
    """Outputs and gradients, in training; theirs of lora_A only within the groups, where ours has
    nothing else."""
    results = []
    for model in (ours, theirs):
        x = images(net)
        torch.manual_seed(3)  # of the dropout masks
        y = model.train()(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append((x, y))
    (x, y), (their_x, their_y) = results
    assert (y - their_y).abs().max() <= 1e-5
    assert relative(x.grad, their_x.grad) <= 1e-4
    for name, layer in ours.lora_layers():
        other = theirs.base_model.model.get_submodule(name)
        for key, parameter in layer.peft_parameters("default").items():
            part, attribute = key.split(".")
            gradient = getattr(other.get_submodule(f"{part}.default"), attribute).grad
            if gradient.shape != parameter.shape:
                rows = zip(gradient.chunk(layer.groups), range(layer.groups), strict=True)
                gradient = torch.cat([row.chunk(layer.groups, 1)[i] for row, i in rows])
            assert relative(parameter.grad, gradient) <= 1e-4, f"{name}.{key}"


@each_net
@each_setting
def test_peft_loads_ours(net: str, setting: dict[str, Any], tmp_path: Path) -> None:
    ours = by_us(net, **setting)
    ours.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)[FIRST_A].shape[:2] == (RANK, CHANNELS)
    assert ours.get_base_model()[0].lora_A.shape[1] == CHANNELS // ours.get_base_model()[0].groups
    theirs = peft.PeftModel.from_pretrained(base(net), tmp_path, is_trainable=True)
    agree(ours, theirs, net)


@each_net
@each_setting
def test_ours_come_back_bit_for_bit_and_merge(
    net: str, setting: dict[str, Any], tmp_path: Path
) -> None:
    ours = by_us(net, **setting)
    ours.save_pretrained(tmp_path / "first")
    again = LoraModel.from_pretrained(base(net), tmp_path / "first")
    state = ours.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    again.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("first", "second"))
    assert first == second
    x = images(net)
    y = again(x)
    again.merge_adapter()
    assert (again(x) - y).abs().max() <= 1e-5 and (base(net)(x) - y).abs().max() > 0.01


@each_net
@each_setting
def test_we_run_what_peft_trained(net: str, setting: dict[str, Any], tmp_path: Path) -> None:
    theirs = by_peft(net, **setting)
    theirs.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(base(net), tmp_path, is_trainable=True)
    assert ours.get_base_model()[0].lora_A.shape[:2] == (RANK, CHANNELS)
    agree(ours, theirs, net)
    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def test_several_adapters_and_scales(tmp_path: Path) -> None:
    """Two that PEFT trained and one of ours together are the sum of each alone."""
    net = "2d groups"
    model = by_us(net)
    for seed, name in enumerate(("second", "third"), start=4):
        by_peft(net, seed).save_pretrained(tmp_path / name)
        model.load_adapter(tmp_path / name, name)
    layer, x = model.get_base_model()[0], images(net)
    shapes = [layer.parts(name)["lora_A"].shape[1] for name in layer.adapters]
    assert shapes == [CHANNELS // 2, CHANNELS, CHANNELS]
    y = expected = base(net)[0](x)
    for name, scale in {"default": 1.0, "second": -0.5, "third": 2.0}.items():
        layer.set_adapter(name)
        alone = layer(x) - y
        assert alone.abs().max() > 0.01
        expected = expected + scale * alone
        layer.set_scale(name, scale)
    layer.set_adapter(["default", "second", "third"])
    assert (layer(x) - expected).abs().max() <= 1e-5
    trained = [x, *(p for name in layer.adapters for p in layer.parts(name).values())]
    dy = torch.randn_like(y)
    actual = torch.autograd.grad(layer(x), trained, dy)
    for gradient, wanted in zip(actual, torch.autograd.grad(expected, trained, dy), strict=True):
        assert relative(gradient, wanted) <= 1e-4
    layer.set_adapter([])
    layer.delete_adapter("second")
    layer.rename_adapter("third", "last")
    layer.set_adapter("last")
    assert relative(layer(x) - y, 2.0 * alone) <= 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"dilation": 2, "padding": 2},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": (1, 2), "padding_mode": "reflect", "stride": 2},
        {"padding": "same", "padding_mode": "circular"},
    ],
    ids=str,
)
def test_dilation_and_padding_modes(options: dict[str, Any]) -> None:
    """PEFT drops both in lora_A. Here it convolves as the base does, as with one group: `reads` has
    PEFT's lora_A as its weight."""
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64, **options)
    settings = {"r": 4, "ungrouped_lora_A": True, "init_lora_weights": False}
    layer = Conv2d.from_conv(plain, lora_alpha=2, **settings)
    reads = nn.Conv2d(4, 4, 3, bias=False, dtype=torch.float64, **options)
    reads.weight = layer.lora_A
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64)
    expected = plain(x) + 0.5 * F.conv2d(reads(x), layer.lora_B, groups=2)
    assert relative(layer(x), expected) <= 1e-14
    other = Conv2d.from_conv(plain, lora_alpha=2, **settings)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(copy.deepcopy(other)(x), layer(x))
    assert relative(layer(x[0]), expected[0]) <= 1e-14


def test_merging_refuses_and_changes_no_layer(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Conv1d(4, 4, 3, groups=2), nn.Linear(6, 2))

    config = peft.LoraConfig(r=4, target_modules=["0", "1", "2"], init_lora_weights=False)
    peft.get_peft_model(net(), config).save_pretrained(tmp_path)
    model = LoraModel.from_pretrained(net(), tmp_path)
    x = torch.randn(3, 4, 8)
    before, y = copy.deepcopy(model.state_dict()), model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"Conv1d\.merge: .*'default' cannot be merged"
        ) as info:
            merge()
        assert "reads all 4 input channels" in str(info.value) and "2 groups" in str(info.value)
        assert str(info.value).startswith("layer '1': Conv1d.merge: ")
        assert str(info.value).endswith("; no layer of the model was changed")
        assert not any(layer.merged for _, layer in model.lora_layers())
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
        assert torch.equal(model(x), y)


def test_combining(tmp_path: Path) -> None:
    net = "2d groups"
    by_peft(net, 4).save_pretrained(tmp_path / "a")
    by_peft(net, 5).save_pretrained(tmp_path / "b")
    model, x = LoraModel.from_pretrained(base(net), tmp_path / "a", "a"), images(net)
    model.load_adapter(tmp_path / "b", "b")
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "both", "cat")
    model.set_adapter(["a", "b"])
    for _, layer in model.lora_layers():
        layer.set_scale("a", 0.5)
        layer.set_scale("b", -2.0)
    expected = model(x)
    model.set_adapter("both")
    assert (model(x) - expected).abs().max() <= 1e-5
    model.add_adapter("ours", LoraConfig(r=RANK, target_modules=NAMES))
    with pytest.raises(ValueError, match="expected shapes that differ in the rank only"):
        model.add_weighted_adapter(["a", "ours"], [1.0, 1.0], "new", "cat")
    assert "new" not in model.peft_config and "new" not in model.get_base_model()[0].adapters


def test_what_training_added_is_saved_for_peft(tmp_path: Path) -> None:
    """With path_initial_model_for_weight_conversion: of twice the rank, and still to be merged."""
    net, x = "2d groups", images("2d groups")
    ours = by_us(net)
    before = base(net)[0](x)
    start = ours.get_base_model()[0](x) - before
    ours.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for parameter in ours.get_base_model()[0].parts("default").values():
            parameter.mul_(1.5)
    ours.save_pretrained(
        tmp_path / "added", path_initial_model_for_weight_conversion=tmp_path / "initial"
    )
    expected = before + (1.5**2 - 1) * start
    again = LoraModel.from_pretrained(base(net), tmp_path / "added")
    theirs = peft.PeftModel.from_pretrained(base(net), tmp_path / "added")
    for model in (again.get_base_model(), theirs.base_model.model):
        assert (model[0](x) - expected).abs().max() <= 1e-5
    again.merge_adapter()
    assert (again.get_base_model()[0](x) - expected).abs().max() <= 1e-5


# Files that do not fit


@pytest.mark.parametrize(
    "shape", [(6, 1, 3, 3), (6, 12, 3, 3), (6, 2, 3, 3), (4, 6, 3, 3), (6, 6, 3), (6, 6, 3, 1)]
)
def test_other_shapes_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    by_us("2d groups").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS) | {FIRST_A: torch.zeros(shape)}
    save_file(tensors, tmp_path / WEIGHTS)
    plain = base("2d groups")
    message = refused(lambda: LoraModel.from_pretrained(plain, tmp_path))
    assert str(tmp_path / WEIGHTS) in message and FIRST_A in message
    assert f"got shape {list(shape)}, expected [6, 6, 3, 3]" in message
    assert type(plain[0]) is nn.Conv2d


def test_huge_rank_is_refused_unread(tmp_path: Path) -> None:
    by_us("2d groups").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text()) | {"r": 60_000}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    plain = base("2d groups")
    assert FIRST_A in refused(lambda: LoraModel.from_pretrained(plain, tmp_path))


def test_own_shape_is_loaded_too(tmp_path: Path) -> None:
    ours = by_us("2d depthwise")
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS) | {FIRST_A: ours.get_base_model()[0].lora_A.detach()}
    save_file(tensors, tmp_path / WEIGHTS)
    again = LoraModel.from_pretrained(base("2d depthwise"), tmp_path)
    assert torch.equal(again.get_base_model()[0].lora_A, ours.get_base_model()[0].lora_A)


def test_dora_keeps_its_own_shape_and_pefts_is_refused(tmp_path: Path) -> None:
    """PEFT divides by the norm of another matrix than the weight it adds."""
    net, x = "2d groups", images("2d groups")
    ours = by_us(net, use_dora=True).eval()
    ours.save_pretrained(tmp_path / "ours")
    again = LoraModel.from_pretrained(base(net), tmp_path / "ours")
    assert torch.equal(again(x), ours(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(base(net), tmp_path / "ours")
    by_peft(net, use_dora=True).save_pretrained(tmp_path / "theirs")
    plain = base(net)
    message = refused(lambda: LoraModel.from_pretrained(plain, tmp_path / "theirs"))
    assert re.search(rf"theirs/{re.escape(WEIGHTS)}: '{re.escape(FIRST_A)}': .*use_dora", message)
    assert type(plain[0]) is nn.Conv2d


def test_setting_is_for_groups_without_dora() -> None:
    with pytest.raises(ValueError, match="ungrouped_lora_A: got True with use_dora=True"):
        AdapterSettings(ungrouped_lora_A=True, use_dora=True)
    for layer in (Linear(4, 4), Conv2d(4, 4, 3)):
        with pytest.raises(ValueError, match="ungrouped_lora_A: got True, expected False: only"):
            layer.add_adapter("new", ungrouped_lora_A=True)
        assert not layer.adapters
