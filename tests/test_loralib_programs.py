"""Programs drawn at random do the same with loralib and with `lora_ext.loralib`: layers, modes,
training, both functions, copies and files; states are compared after each step."""

from __future__ import annotations

import copy
import random
from types import ModuleType
from typing import Any, NamedTuple

import loralib
import pytest
import torch
from torch import Tensor, nn

import lora_ext.loralib

LIBRARIES: tuple[Any, Any] = (loralib, lora_ext.loralib)
ATTRIBUTES = "r lora_alpha scaling merged merge_weights training fan_in_fan_out enable_lora".split()
STEPS = "forward forward backward eval train mark chosen save load copy reset".split()


class Layer(NamedTuple):
    kind: str
    sizes: tuple[int, ...]
    options: dict[str, Any]

    def make(self, library: ModuleType) -> nn.Module:
        return getattr(library, self.kind)(*self.sizes, **self.options)  # type: ignore[no-any-return]

    def input(self) -> Tensor:
        if self.kind == "Embedding":
            return torch.randint(0, 7, (3, 4))
        sizes = {"Conv1d": (2, 4, 6), "Conv2d": (2, 4, 6, 6), "Conv3d": (2, 4, 6, 6, 6)}
        return torch.randn(sizes.get(self.kind, (2, 3, 6)))


def draw(rng: random.Random) -> Layer:
    kind = rng.choice(["Linear", "MergedLinear", "Embedding", "Conv1d", "Conv2d", "Conv3d"])
    options: dict[str, Any] = {
        "r": rng.choice([0, 1, 2, 4]),
        "lora_alpha": rng.choice([0.5, 1, 8]),
        "merge_weights": rng.random() < 0.7,
    }
    if kind == "Embedding":
        return Layer(kind, (7, 5), options | {"padding_idx": rng.choice([None, 0, -1])})
    options["bias"] = rng.random() < 0.6
    if kind == "Conv2d":
        groups, mode = rng.choice([1, 2]), rng.choice(["zeros", "circular"])
        options |= {"groups": groups, "padding_mode": mode, "padding": 1}
        return Layer(kind, (4, 4, rng.choice([1, 3])), options)
    if kind.startswith("Conv"):  # loralib's run with kernels of size 1 only
        return Layer(kind, (4, 4, 1), options)
    options["fan_in_fan_out"] = rng.random() < 0.4
    if kind == "MergedLinear":
        options["enable_lora"] = [rng.random() < 0.6 for _ in range(rng.choice([1, 2, 3, 4]))]
        if not any(options["enable_lora"]):
            options["r"] = 0  # loralib's forward fails otherwise
    return Layer(kind, (6, 12), options)


def check_same(ours: nn.Module, theirs: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers", "named_modules"):
        pairs = [[name for name, _ in getattr(model, kind)()] for model in (ours, theirs)]
        assert pairs[0] == pairs[1]
    wanted = [p.requires_grad for p in theirs.parameters()]
    assert [p.requires_grad for p in ours.parameters()] == wanted
    check_equal(ours.state_dict(), theirs.state_dict())
    for one, other in zip(ours.modules(), theirs.modules(), strict=True):
        for name in ATTRIBUTES:
            assert getattr(one, name, None) == getattr(other, name, None), name
        adapted = isinstance(one, lora_ext.loralib.LoRALayer)
        assert adapted == isinstance(other, loralib.LoRALayer)


def check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-9, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("seed", range(40))
def test_programs(seed: int) -> None:
    rng = random.Random(seed)
    layers = [draw(rng) for _ in range(rng.choice([1, 2, 3]))]
    models = []
    for library in LIBRARIES:
        torch.manual_seed(seed)
        made = [layer.make(library) for layer in layers]
        models.append(nn.ModuleList([*made, nn.Linear(3, 3)]).double())
    theirs, ours = models
    check_same(ours, theirs)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        nn.init.normal_(other)
        one.data.copy_(other.data)
    saved: tuple[bool, dict[str, Tensor]] | None = None
    for _ in range(12):
        step = rng.choice(STEPS)
        bias = rng.choice(["none", "all", "lora_only"])
        if step in ("forward", "backward"):
            for layer, one, other in zip(layers, ours, theirs, strict=False):
                x = layer.input()
                x = x.double() if x.is_floating_point() else x
                got, expected = one(x), other(x)
                torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
                if step == "backward" and expected.requires_grad:
                    for y, model in ((got, one), (expected, other)):
                        model.zero_grad()
                        y.square().sum().backward()
                    for p, q in zip(one.parameters(), other.parameters(), strict=True):
                        assert (p.grad is None) == (q.grad is None)
                        if q.grad is not None:
                            torch.testing.assert_close(p.grad, q.grad, atol=1e-8, rtol=1e-8)
        elif step in ("eval", "train"):
            for model in models:
                model.train(step == "train")
        elif step == "mark":
            loralib.mark_only_lora_as_trainable(theirs, bias)
            lora_ext.loralib.mark_only_lora_as_trainable(ours, bias)
        elif step == "chosen":
            chosen = lora_ext.loralib.lora_state_dict(ours, bias)
            check_equal(chosen, loralib.lora_state_dict(theirs, bias))
        elif step == "save":
            saved = theirs.training, {k: v.clone() for k, v in theirs.state_dict().items()}
        elif step == "load" and saved and saved[0] == theirs.training:
            assert ours.load_state_dict(saved[1]) == theirs.load_state_dict(saved[1])
        elif step == "copy":
            theirs, ours = models = [copy.deepcopy(model) for model in (theirs, ours)]
        elif step == "reset" and theirs.training:
            for model in models:
                torch.manual_seed(seed)
                for module in model:
                    module.reset_parameters()  # type: ignore[operator]
        check_same(ours, theirs)
