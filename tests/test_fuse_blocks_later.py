"""What becomes of fused blocks when the model around them changes: adapters that come later, PEFT's
layers, hooks, other forwards."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_ext
from lora_ext import LoraConfig

pytest.importorskip("transformers")
from test_fuse_blocks import base_of, check_same, model_of, step
from transformers.models.llama.modeling_llama import LlamaMLP


def kinds(model: nn.Module) -> list[str | None]:
    return [block.kind if block.fused else block.reason for block in lora_ext.fused_blocks(model)]


@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_that_come_later_are_in_the_blocks(recompute: bool) -> None:
    wanted, base = step(model_of()), base_of()
    lora_ext.fuse_blocks(base, recompute=recompute)
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
    config = LoraConfig(**options, target_modules="all-linear", init_lora_weights=False)
    model = lora_ext.get_lora_model(base, config).train()
    assert kinds(model) == ["one x", "mlp"]
    for key, value in model_of().state_dict().items():
        model.state_dict()[key].copy_(value)
    check_same(step(model), wanted)
    assert all(row.path != "composed" for row in lora_ext.explain(model))
    assert not any("forward" in m.__dict__ for m in model.merge_and_unload().modules())


def test_replaced_layers_are_in_the_blocks() -> None:
    base = base_of()
    lora_ext.fuse_blocks(base)
    lora_ext.replace_linear(base, ["q_proj", "down_proj"], r=4)
    assert type(base.get_submodule("model.layers.0.self_attn.q_proj")) is lora_ext.nn.Linear
    assert kinds(base) == ["one x", "mlp"]
    attention = base.get_submodule("model.layers.0.self_attn")
    attention.k_proj = nn.Linear(32, 16, bias=False)
    assert kinds(base) == ["k_proj is not the one that was fused", "mlp"]


def test_a_layer_that_was_replaced_runs_by_itself() -> None:
    """Who has it still gets what it makes, not what those that stand in the model do."""
    base, x = base_of(), torch.randn(3, 32)
    old = base.get_submodule("model.layers.0.self_attn.q_proj")
    wanted = old(x)
    lora_ext.fuse_blocks(base)
    lora_ext.replace_linear(base, ["q_proj"], r=4, init_lora_weights=False)
    torch.testing.assert_close(old(x), wanted)


PEFT = """
import peft, sys, lora_ext
from test_fuse_blocks import base_of
model = peft.get_peft_model(base_of(), peft.LoraConfig(r=4, target_modules="all-linear"))
assert "lora_ext.integrations.peft" not in sys.modules
for block in lora_ext.fuse_blocks(model):
    assert "is PEFT's, which patch() or accelerate(model) would run" in block.reason, block
from lora_ext.integrations.peft import patch
patch()
assert [block.kind for block in lora_ext.fused_blocks(model) if block.fused] == ["one x", "mlp"]
base = base_of()
lora_ext.fuse_blocks(base)
model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
attention, mlp = lora_ext.fused_blocks(model)
assert attention.reason == "q_proj is not the one that was fused" and mlp.fused
assert attention.name.endswith("self_attn")
assert all(block.fused for block in lora_ext.fuse_blocks(model))
"""


def test_pefts_layers_are_known_without_the_integration() -> None:
    pytest.importorskip("peft")
    command = [sys.executable, "-c", PEFT]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_hooks_of_accelerate_are_outside_of_the_block() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = model_of()
    wanted = step(model)
    lora_ext.fuse_blocks(model)
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    hooks.add_hook_to_module(mlp, hooks.ModelHook())
    assert kinds(model) == ["one x", "mlp"]
    check_same(step(model), wanted)
    lora_ext.unfuse_blocks(model)
    assert kinds(model) == []
    hooks.remove_hook_from_module(mlp)
    assert kinds(model) == []
    check_same(step(model), wanted)


def test_a_class_that_has_another_forward_since(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = model_of(), LlamaMLP.forward
    lora_ext.fuse_blocks(model)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: own(self, x) * 2)
    assert kinds(model) == ["one x", "its class has another forward since"]
    found = step(model)
    lora_ext.unfuse_blocks(model)
    check_same(found, step(model))
    assert lora_ext.fuse_blocks(model)[1].kind is None  # what it does now is no such MLP
    monkeypatch.undo()
    assert lora_ext.fuse_blocks(model)[1].fused
    assert kinds(copy.deepcopy(model)) == kinds(pickle.loads(pickle.dumps(model))) == kinds(model)


def test_what_is_said() -> None:
    model = model_of()
    lora_ext.fuse_blocks(model, recompute=True)
    attention, mlp = lora_ext.fused_blocks(model)
    assert mlp.recompute and not attention.recompute
    assert str(mlp).endswith(": one operator, which keeps its input alone")
    with torch.inference_mode():
        assert kinds(model) == ["so they do in inference mode", "mlp"]
    call: Any
    for call in (lora_ext.fuse_blocks, lora_ext.unfuse_blocks, lora_ext.fused_blocks):
        with pytest.raises(TypeError, match=f"{call.__name__}: model: got NoneType, expected"):
            call(None)
    with pytest.raises(TypeError, match="fuse_blocks: recompute: got 'yes', expected True or"):
        lora_ext.fuse_blocks(model, recompute="yes")  # type: ignore[arg-type]


def test_a_model_of_which_nothing_is_fused_is_told() -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    with pytest.warns(UserWarning, match="get_lora_model: fuse_blocks: no block of this model"):
        lora_ext.get_lora_model(nn.Sequential(nn.Linear(2, 2)), config, fuse_blocks=True)


class OtherName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(this, x: torch.Tensor) -> torch.Tensor:
        return this.one(x) - this.two(x)


def test_self_may_have_another_name() -> None:
    assert [block.kind for block in lora_ext.fuse_blocks(OtherName())] == ["one x"]
