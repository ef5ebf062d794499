"""save_pretrained(as_plain_lora=True): what PEFT has no keys for, in files that PEFT loads."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import BUILDERS
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError
from lora_ext.nn import MergedLinear, MultiheadAttention

E = 8


class Block(nn.Module):
    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 20), nn.Linear(20, E)
        self.attention = nn.MultiheadAttention(E, 2, kdim=kdim, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(torch.tanh(self.qkv(x)))
        return x + self.attention(x, x, x)[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.qkv = nn.Linear(E, 20)  # its name is also the end of others

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.qkv(x)


def rows() -> Tensor:
    return torch.randn(3, 5, E, generator=torch.Generator().manual_seed(1)).double()


def net_of() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def with_slices(net: Net, projections: str) -> Net:
    """The first block's layers with adapters on slices; the second one's stay plain."""
    block: Any = net.layers[0]
    block.qkv = MergedLinear.from_linear(block.qkv, [True, False, True], 0, slice_sizes=[8, 4, 8])
    block.attention = MultiheadAttention.from_multihead_attention(
        block.attention, 0, enable_lora=projections
    )
    return net


def filled(model: LoraModel) -> LoraModel:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.qkv": 3, "qkv": 2}, "alpha_pattern": {"qkv": 5}},
    "the last name alone": {"rank_pattern": {"^qkv": 2}, "alpha_pattern": {"^qkv": 3}},
}


@pytest.mark.parametrize("projections", ["qv", "k", "qkvo", "o"])
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_outputs_are_the_same(fields: dict[str, Any], projections: str, tmp_path: Path) -> None:
    targets = ["qkv", "attention", "out"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, **fields)
    model = filled(get_lora_model(with_slices(net_of(), projections), config))
    x = rows()
    y = model(x)
    model.save_pretrained(tmp_path, as_plain_lora=True)
    assert model.peft_config["default"].rank_pattern == fields.get("rank_pattern", {})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = LoraModel.from_pretrained(net_of(), tmp_path)
    torch.testing.assert_close(ours(x), y)
    assert not torch.allclose(net_of()(x), y, atol=0.1)

    theirs = peft.PeftModel.from_pretrained(net_of(), str(tmp_path))
    # PEFT adds the update of out_proj twice: its lora_B gets half of ours.
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "out_proj.lora_B" in name:
                parameter.mul_(0.5)
    torch.testing.assert_close(theirs(x), y)


def test_a_rank_is_that_of_one_layer_alone(tmp_path: Path) -> None:
    """The name of one layer, read as a pattern, is another's, too; the ranks of both differ."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"qkv": nn.Linear(E, 20)})
        return nn.ModuleDict({"block": inner, "block_qkv": nn.Linear(E, 20)}).double()

    def outputs(model: Any) -> Tensor:
        return torch.cat([model.block.qkv(rows()), model.block_qkv(rows())])

    sliced: Any = net()
    sliced.block["qkv"] = MergedLinear.from_linear(
        sliced.block.qkv, [True, False, True], 0, slice_sizes=[8, 4, 8]
    )
    model = filled(get_lora_model(sliced, LoraConfig(r=4, target_modules=r".*qkv")))
    model.save_pretrained(tmp_path, as_plain_lora=True)
    ours = LoraModel.from_pretrained(net(), tmp_path)
    assert [layer.r for _, layer in ours.lora_layers()] == [8, 4]
    torch.testing.assert_close(outputs(ours), outputs(model))
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path))
    torch.testing.assert_close(outputs(theirs.base_model.model), outputs(model))


def test_merged_and_other_adapters(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["qkv"])
    model = filled(get_lora_model(with_slices(net_of(), "qv"), config))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["layers.0.qkv"]))
    model.set_adapter("other")
    filled(model)
    y = model(rows())
    model.merge_adapter()
    model.save_pretrained(tmp_path, as_plain_lora=True)
    model.save_pretrained(tmp_path / "own")
    theirs = peft.PeftModel.from_pretrained(net_of(), str(tmp_path / "other"))
    torch.testing.assert_close(theirs(rows()), y)
    again = LoraModel.from_pretrained(with_slices(net_of(), "qv"), tmp_path / "own" / "other")
    torch.testing.assert_close(again(rows()), y)
    with pytest.raises(AdapterFileError, match="shape"):
        LoraModel.from_pretrained(with_slices(net_of(), "qv"), tmp_path / "other")


def test_gpt2(tmp_path: Path) -> None:
    base, inputs = BUILDERS["gpt2"]()
    sliced: Any = copy.deepcopy(base)
    for block in sliced.transformer.h:
        block.attn.c_attn = MergedLinear.from_conv1d(block.attn.c_attn, [True, False, True], 0)
    fields = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = filled(get_lora_model(sliced, LoraConfig(r=2, **fields)))
    model.save_pretrained(tmp_path, as_plain_lora=True)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    expected = model(**inputs).logits
    torch.testing.assert_close(theirs(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_is_plain_is_written_as_ever(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["qkv", "attention"], rank_pattern={"qkv": 3})
    model = filled(get_lora_model(net_of(), config))
    for name, plain in (("one", True), ("other", False)):
        model.save_pretrained(tmp_path / name, as_plain_lora=plain)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_what_peft_cannot_express_is_said(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["attention"])
    block = nn.Sequential()
    block.attention = nn.MultiheadAttention(E, 2, kdim=4)
    model = get_lora_model(block, config)
    with pytest.raises(ValueError, match=r"'attention': PEFT has no adapters.*kdim"):
        model.save_pretrained(tmp_path, as_plain_lora=True)
    with pytest.raises(ValueError, match="one of the two"):
        model.save_pretrained(
            tmp_path, as_plain_lora=True, path_initial_model_for_weight_conversion=tmp_path
        )
    assert not list(tmp_path.iterdir())
