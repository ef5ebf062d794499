"""What fuse_blocks takes for a block, and what it leaves alone; each beside its own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext

F = nn.functional


class Mlp(nn.Module):
    """In each of what follows with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.both, self.act, self.log = nn.Linear(4, 12), nn.SiLU(), []
        self.acts = nn.ModuleDict({"silu": nn.SiLU()})
        self.gate, self.scale = nn.Parameter(torch.ones(6)), 2.0


class NamesOfItsOwn(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        """And a text that is none of its statements."""
        return self.c(self.b(x) * F.gelu(self.a(x), approximate="tanh"))


class InSteps(Mlp):
    def forward(self, x: Tensor, *_: Any) -> Tensor:
        g: Tensor = self.a(x)
        product = torch.mul(self.act(g), self.b(x))
        return self.c(product)


class Halves(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        g, u = self.both(x).chunk(2, dim=-1)
        return self.c(u * self.act(g))


class HalvesTheOtherWay(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        u, g = self.both(x).chunk(2, dim=-1)
        return self.c(u * self.act(g))


class AnotherActivation(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.sigmoid(self.a(x)) * self.b(x))


class OfTheSameValuesFromZeroOn(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.sigmoid_(self.a(x)) * self.b(x))


class AnotherProduct(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x) * self.gate)


class Sum(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) + self.b(x))


class AnotherX(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x + 1))


class SomethingAfterIt(Mlp):
    def forward(self, x: Tensor, more: float = 0.0) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x)) + more


class ChangedInPlace(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        g = self.a(x)
        g.clamp_(max=0.1)
        return self.c(self.act(g) * self.b(x))


class ChangedInPlaceWithAName(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        g = self.a(x)
        _ = g.clamp_(max=0.1)
        return self.c(self.act(g) * self.b(x))


class InAContext(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            g = self.a(x)
        return self.c(self.act(g) * self.b(x))


class Decorated(Mlp):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x))


class WithABranch(Mlp):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            x = x * 2
        return self.c(self.act(self.a(x)) * self.b(x))


class WithABranchInside(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x if self.training else x * 2)) * self.b(x))


class ByAMethod(Mlp):
    def hidden(self, x: Tensor) -> Tensor:
        return self.a(x * 2 if isinstance(x, Tensor) else x)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.hidden(x)) * self.b(x))


class ThatCounts(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1)
        return self.c(self.act(self.a(x)) * self.b(x))


class ThatSets(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        self.scale = g = self.a(x)
        return self.c(self.act(g) * self.b(x))


class OfADictionary(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.acts["silu"](self.a(x)) * self.b(x))


class OfATensor(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.clamp(self.a(x), max=x.mean()) * self.b(x))


class OfRows(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.softmax(self.a(x), dim=1) * self.b(x))


@pytest.mark.parametrize("kind", Mlp.__subclasses__())
def test_what_is_an_mlp_and_what_is_not(kind: type[Mlp]) -> None:
    roles = {NamesOfItsOwn: ("a", "b", "c"), InSteps: ("a", "b", "c"), Halves: ("both", "c")}
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(3, 4, dtype=torch.float64) * 3
    plain = copy.deepcopy(model)
    blocks = lora_ext.fuse_blocks(model)
    mlps = [one.layers for one in blocks if one.kind == "mlp"]
    assert mlps == ([roles[kind]] if kind in roles else [])
    assert not model.log and model.scale == 2.0  # nothing was called
    for mode in (model.train, model.eval):
        plain.train(mode().training)
        found, wanted = model(x=x), plain(x)
        torch.testing.assert_close(found, wanted)
        assert found.requires_grad == wanted.requires_grad
        if not wanted.requires_grad:
            continue
        for one in (found, wanted):
            one.square().sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad)


class Clipped(nn.Module):
    def forward(self, e: Tensor) -> Tensor:
        return F.silu(e).detach()


OTHERS: dict[str, nn.Module] = {
    "in place": nn.ReLU6(inplace=True),
    "further away": nn.Hardtanh(0, 9),
    "of another's": Clipped(),
    "several": nn.Sequential(nn.SiLU(), nn.Dropout(0.5)),
    "of rows": nn.LayerNorm(6, elementwise_affine=False),
    "with a parameter": nn.PReLU(),
}


@pytest.mark.parametrize("act", OTHERS.values(), ids=OTHERS)
def test_other_activations_are_no_mlps(act: nn.Module) -> None:
    model = Halves()
    model.act = act
    assert [one.kind for one in lora_ext.fuse_blocks(model)] == [None]


def test_an_activation_that_changes_is_seen() -> None:
    model, x = Halves(), torch.randn(3, 4)
    model.act = nn.GELU()
    assert lora_ext.fuse_blocks(model)[0].fused
    assert lora_ext.fused_blocks(copy.deepcopy(model))[0].fused
    for change in (
        lambda: setattr(model.act, "approximate", "tanh"),
        lambda: setattr(model, "act", nn.ReLU()),
    ):
        change()
        (block,) = lora_ext.fused_blocks(model)
        assert block.reason == "act is another function than when it was fused"
        torch.testing.assert_close(model(x), Halves.forward(model, x))


def test_an_activation_that_is_another_far_away() -> None:
    activations = pytest.importorskip("transformers.activations")
    model = Halves()
    model.act = activations.ACT2FN["gelu_10"]
    assert [one.kind for one in lora_ext.fuse_blocks(model)] == [None]
    for name in ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"):
        model.act = activations.ACT2FN[name]
        assert lora_ext.fuse_blocks(model)[0].fused, name


class OneX(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6)
        self.only = False

    def also(self, x: Tensor) -> Tensor:
        return self.k(x)


class CalledTwice(OneX):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        k = self.k(x)
        again = self.also(x)
        again.mul_(2)
        return q + k + again + self.v(x)


class InAList(OneX):
    def forward(self, x: Tensor) -> Tensor:
        first, second = [self.k(x) for _ in range(2)]
        first.mul_(2)
        return self.q(x) + first + second + self.v(x)


class Early(OneX):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if self.only:
            return q
        k = self.k(x)
        return q + k + self.v(x)


class Wanted(OneX):
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach()
        q = self.q(x)
        x.requires_grad_()
        self.x = x
        return q + self.k(x) + self.v(x)


GROUPS = {
    CalledTwice: ("q", "k", "v"), InAList: ("q", "v"), Early: ("k", "v"), Wanted: ("q", "k", "v")
}  # fmt: skip


@pytest.mark.parametrize("kind", GROUPS)
def test_layers_of_one_x(kind: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(3, 4, dtype=torch.float64)
    plain = copy.deepcopy(model)
    blocks = lora_ext.fuse_blocks(model)
    assert [one.layers for one in blocks if one.kind == "one x"] == [GROUPS[kind]]  # type: ignore[index]
    for only in (False, True):
        model.only = plain.only = only
        found, wanted = model(x), plain(x)
        torch.testing.assert_close(found, wanted)
        found.sum().backward(), wanted.sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        if kind is Wanted:
            torch.testing.assert_close(model.x.grad, plain.x.grad)


def test_devices_that_know_no_autocast() -> None:
    for model in (Halves(), CalledTwice()):
        lora_ext.fuse_blocks(model)
        assert model.to("meta")(torch.empty(2, 4, device="meta")).shape[0] == 2
