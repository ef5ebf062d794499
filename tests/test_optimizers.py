"""LoRA+ and LoRA-FA: PEFT's groups, steps as PEFT's, and what backward keeps with lora_A frozen."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from torch import Tensor, nn

import lora_ext
from lora_ext import LoraConfig
from lora_ext.optimizers import (
    LoraFAOptimizer,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
)

FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 12)
        self.norm = nn.LayerNorm(12)
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(self.norm(self.embedding(x)))))
        return self.head(y)  # type: ignore[no-any-return]


def models(**changes: Any) -> tuple[Any, Any]:
    net = Net()
    fields = FIELDS | changes
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**fields))
    torch.manual_seed(1)
    return theirs, lora_ext.get_peft_model(net, LoraConfig(**fields))


def plain(name: str) -> str:
    """A name of PEFT's as ours."""
    name = name.replace(".lora_embedding_", ".lora_").replace("lora_B.default.bias", "lora_bias")
    name = name.replace(".base_layer.", ".").replace(".default.weight", "")
    return name.removesuffix(".default").replace(
        "modules_to_save.default.", "modules_to_save.default."
    )


def groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[set[str], Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        ({plain(names[id(p)]) for p in group["params"]}, (group["lr"], group["weight_decay"]))
        for group in optimizer.param_groups
    ]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": ["embedding", "first"]},
    "saved": {"modules_to_save": ["head", "norm"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("case", CASES)
def test_loraplus_groups_are_pefts(case: str) -> None:
    theirs, ours = models(**CASES[case])
    arguments: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 4.0, "eps": 1e-7}
    arguments |= {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-5}
    adam = torch.optim.AdamW
    expected = peft.optimizers.create_loraplus_optimizer(theirs, adam, **arguments)
    found = create_loraplus_optimizer(ours, adam, **arguments)
    assert groups(ours, found) == groups(theirs, expected)
    trained = sum(p.requires_grad for p in ours.parameters())
    assert sum(len(group["params"]) for group in found.param_groups) == trained
    assert found.param_groups[0]["eps"] == 1e-7


def test_loraplus_without_adapters_and_mistakes() -> None:
    found = create_loraplus_optimizer(Net(), torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2)
    assert [len(group["params"]) for group in found.param_groups] == [4, 0, 0, 5]
    rates: dict[str, Any] = {"lr": 1.0, "loraplus_lr_ratio": 2.0}
    for name, value in (
        ("lr", -1), ("lr", math.nan), ("loraplus_lr_ratio", 0), ("loraplus_lr_ratio", -3),
        ("loraplus_lr_ratio", math.nan), ("loraplus_weight_decay", -1.0),
        ("loraplus_lr_embedding", math.inf),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"create_loraplus_optimizer: {name}: got"):
            create_loraplus_optimizer(Net(), torch.optim.SGD, **{**rates, name: value})
    with pytest.raises(TypeError, match="loraplus_lr_ratio: got 'x'"):
        create_loraplus_optimizer(Net(), torch.optim.SGD, lr=1.0, loraplus_lr_ratio="x")  # type: ignore


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randint(0, 30, (4, 6), generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"rank_pattern": {"second": 2}}], ids=str
)
def test_lorafa_steps_are_pefts(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    theirs, ours = models(**changes)
    expected = peft.optimizers.create_lorafa_optimizer(theirs, 4, 8, 1e-2, weight_decay=0.1)
    found = create_lorafa_optimizer(ours, 4, 8, 1e-2, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(before[plain(name)], parameter)
    train(theirs, expected)
    train(ours, found)
    now = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(now[plain(name)], parameter, rtol=1e-3, atol=1e-5)
        if "lora_A" in name:
            assert torch.equal(now[plain(name)], before[plain(name)])
            assert not now[plain(name)].requires_grad
        if "lora_B" in name:
            assert now[plain(name)].any()


def test_lorafa_trains_what_is_beside_matrices() -> None:
    """In PEFT a bias, or a magnitude, of the adapter is taken for half of a pair."""
    for changes in ({"lora_bias": True}, {"use_dora": True}, {"bias": "all"}):
        _, ours = models(**changes)
        optimizer = create_lorafa_optimizer(ours, 4, 8, 1e-2)
        before = {n: p.detach().clone() for n, p in ours.named_parameters() if p.requires_grad}
        train(ours, optimizer)
        now = dict(ours.named_parameters())
        assert len(before) > 2
        assert all(not torch.equal(now[name], tensor) for name, tensor in before.items())


def test_lorafa_state_is_saved_and_goes_on() -> None:
    _, one = models()
    other = copy.deepcopy(one)
    first, second = (create_lorafa_optimizer(m, 4, 8, 1e-2) for m in (one, other))
    train(one, first, 2)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((one, first), (other, second)):
        train(model, optimizer, 2)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_keeps_h_instead_of_x(dropout: float) -> None:
    net = nn.Sequential(nn.Linear(64, 48))
    ours = lora_ext.get_peft_model(net, LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout))
    x = torch.randn(128, 64)

    def kept() -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def pack(tensor: Tensor) -> Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours(x).sum().backward()
        return shapes

    assert (128, 64) in kept()
    create_lorafa_optimizer(ours, 4, 8, 1e-3)
    ours.zero_grad()
    shapes = kept()
    assert (128, 64) not in shapes and (128, 4) in shapes
    layer: Any = ours.get_submodule("base_model.model.0")
    assert layer.lora_A.grad is None
    if not dropout:
        expected = layer.scaling * torch.ones(128, 48).t() @ (x @ layer.lora_A.detach().t())
        torch.testing.assert_close(layer.lora_B.grad, expected, rtol=1e-4, atol=1e-4)


def test_lorafa_on_embeddings_and_convolutions() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 8)
            self.conv = nn.Conv1d(8, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.embedding(x).transpose(1, 2))  # type: ignore[no-any-return]

    fields: dict[str, Any] = {"r": 2, "target_modules": ["embedding", "conv"]}
    ours = lora_ext.get_peft_model(Other(), LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_A" in name:
                parameter.normal_()
    before = {n: p.detach().clone() for n, p in ours.named_parameters() if "lora_" in n}
    train(ours, create_lorafa_optimizer(ours, 2, 8, 1e-2))
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, before[name]) == ("lora_A" in name)


def test_what_cannot_be_is_refused() -> None:
    _, ours = models()
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
    with pytest.raises(ValueError, match="was passed to create_lorafa_optimizer"):
        create_lorafa_optimizer(ours, 4, 8, 1e-3, use_rslora=True)
    with pytest.warns(FutureWarning, match="deprecated"):
        create_lorafa_optimizer(copy.deepcopy(ours), 4, 8, 1e-3, use_rslora=False)
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lr": 1e-3}
    for name, value in ("lr", -1), ("lr", math.nan), ("weight_decay", -1), ("r", 0):
        with pytest.raises(ValueError, match=f"create_lorafa_optimizer: {name}: got"):
            create_lorafa_optimizer(ours, **{**given, name: value})
    with pytest.raises(TypeError, match="create_lorafa_optimizer: r: got 'a'"):
        create_lorafa_optimizer(ours, **{**given, "r": "a"})
    ours.set_scale("default", 0.0)
    with pytest.raises(ValueError, match="has the scaling 0"):
        create_lorafa_optimizer(ours, 4, 8, 1e-3)
    assert all(p.requires_grad for n, p in ours.named_parameters() if "lora_" in n)
    with pytest.raises(TypeError, match="without adapters"):
        create_lorafa_optimizer(Net(), 4, 8, 1e-3)
    grouped = lora_ext.get_peft_model(
        nn.Sequential(nn.Conv1d(8, 8, 1, groups=2)), LoraConfig(r=2, target_modules=["0"])
    )
    with pytest.raises(ValueError, match="no step for stacks, blocks, slices and groups"):
        create_lorafa_optimizer(grouped, 2, 8, 1e-3)
    one = [{"params": [nn.Parameter(torch.ones(1))], "names": ["a"], "scaling_factors": [None]}]
    for wrong in (
        {"lr": -1.0}, {"lr": math.nan}, {"weight_decay": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"LoraFAOptimizer: {next(iter(wrong))}: got"):
            LoraFAOptimizer(one, **wrong)  # type: ignore[arg-type]


def test_the_step_is_the_formula() -> None:
    """After one step the first moment is (1 - beta1) g (A Aᵀ)⁻¹ / s²."""
    _, ours = models()
    optimizer = create_lorafa_optimizer(ours, 4, 8, 1e-3)
    layer: Any = ours.get_submodule("base_model.model.first")
    layer.lora_B.grad = torch.randn_like(layer.lora_B)
    optimizer.step()
    A = layer.lora_A.detach().double()
    step = layer.lora_B.grad.double() @ torch.linalg.inv(A @ A.t()) / layer.scaling**2
    got = optimizer.state[layer.lora_B]["exp_avg"].double() / 0.1
    # float32, times the condition of A Aᵀ.
    allowed = 2**-20 * float(torch.linalg.cond(A @ A.t())) * float(step.abs().max())
    assert float((got - step).abs().max()) <= allowed
    assert math.isclose(float(layer.lora_B.detach().abs().max()), 1e-3, rel_tol=1e-2)
