"""torch.autocast of every kind of layer: the dtype of its twin, which is PEFT's layer or has merged
weights, and no larger error; nested, disabled and compiled."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from problems import rms
from torch import Tensor, nn

from lora_ext import LoraModel
from lora_ext.nn import MergedLinear, MultiheadAttention

KINDS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "Linear": (lambda: nn.Linear(64, 48), (37, 64), {}),
    "Linear, lora_bias": (lambda: nn.Linear(64, 48), (37, 64), {"lora_bias": True}),
    "Linear, DoRA": (lambda: nn.Linear(64, 48), (37, 64), {"use_dora": True}),
    "Embedding": (lambda: nn.Embedding(64, 48), (37,), {}),
    "Embedding, DoRA": (lambda: nn.Embedding(64, 48), (37,), {"use_dora": True}),
    "Conv1d": (lambda: nn.Conv1d(16, 24, 3), (2, 16, 9), {}),
    "Conv2d": (lambda: nn.Conv2d(16, 24, 3), (2, 16, 7, 7), {}),
    "Conv2d, DoRA": (lambda: nn.Conv2d(16, 24, 3), (2, 16, 7, 7), {"use_dora": True}),
    "Conv3d": (lambda: nn.Conv3d(8, 12, 3), (2, 8, 4, 4, 4), {}),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMBINATIONS = list(itertools.product(DTYPES[1:], DTYPES))  # of autocast and of x


# DoRA rounds twice where PEFT may round once: the sum, and what it is multiplied to. Two roundings
# of the same size that do not depend on each other are sqrt(2) of one, in the mean square.
FACTOR = {kind: 2**0.5 if "DoRA" in kind else 1.0 for kind in KINDS}


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def made(kind: str, dtype: torch.dtype, folder: Path, **more: Any) -> tuple[Any, Any, Any, Tensor]:
    """Ours, PEFT's, and PEFT's in float64 with the same values; and x, float64 unless tokens."""
    make, shape, options = KINDS[kind]
    torch.manual_seed(0)
    base = nn.Sequential(make()).to(dtype)
    config = peft.LoraConfig(
        target_modules=["0"], r=8, lora_alpha=16, init_lora_weights=False, **options, **more
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(folder)
    ours = LoraModel.from_pretrained(base, folder)
    x = torch.randint(0, 64, shape) if "Embedding" in kind else torch.randn(shape).double()
    return ours, theirs, copy.deepcopy(theirs).double(), x


@torch.no_grad()
def compare(
    ours: nn.Module,
    twin: nn.Module,
    exact: nn.Module,
    x: Tensor,
    autocast: torch.dtype,
    factor: float,
    *,
    times: int = 1,
) -> None:
    """All are called with `times` times x."""
    in_float64 = x.double() if x.is_floating_point() else x
    expected = first(exact(*[in_float64] * times))
    with torch.autocast("cpu", dtype=autocast):
        got, other = first(ours(*[x] * times)), first(twin(*[x] * times))
    what = f"autocast {name(autocast)}, x {name(x.dtype)}"
    assert got.dtype == other.dtype, f"{what}: {got.dtype}, the twin's {other.dtype}"
    assert rms(got - expected) <= factor * rms(other - expected), what


def first(y: Any) -> Tensor:
    tensor: Tensor = y[0] if isinstance(y, tuple) else y
    return tensor


@pytest.mark.parametrize("weight_dtype", DTYPES[:2], ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_values_are_those_of_peft(
    kind: str, weight_dtype: torch.dtype, tmp_path: Path
) -> None:
    ours, theirs, exact, x = made(kind, weight_dtype, tmp_path)
    for autocast, x_dtype in COMBINATIONS:
        given = x.to(x_dtype) if x.is_floating_point() else x
        compare(ours, theirs, exact, given, autocast, FACTOR[kind])


@pytest.mark.parametrize("weight_dtype", DTYPES[:2], ids=name)
@pytest.mark.parametrize("kind", ["MultiheadAttention", "MergedLinear"])
def test_dtype_and_values_are_those_of_merged_weights(kind: str, weight_dtype: torch.dtype) -> None:
    """Of those that PEFT has not, or computes otherwise. A merged weight rounds its sum once; ours
    rounds the base's and the adapter's operands: twice, so sqrt(2) as above."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 8, "lora_alpha": 16, "init_lora_weights": False}
    layer: Any
    if kind == "MergedLinear":
        layer = MergedLinear(64, 48, enable_lora=[True, False, True], **options)
    else:
        layer = MultiheadAttention(64, 4, None, **options)
    layer.to(weight_dtype).eval()
    exact, twin = copy.deepcopy(layer).double(), copy.deepcopy(layer)
    twin.merge()
    x = torch.randn(9, 2, 64)
    for autocast, x_dtype in COMBINATIONS:
        times = 3 if kind == "MultiheadAttention" else 1
        compare(layer, twin, exact, x.to(x_dtype), autocast, 2**0.5, times=times)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Embedding" not in kind])
def test_dropout_and_gradients_keep_the_dtypes_of_peft(kind: str, tmp_path: Path) -> None:
    ours, theirs, _, x = made(kind, torch.float32, tmp_path, lora_dropout=0.3)
    for autocast, x_dtype in COMBINATIONS:
        dtypes = []
        for model in (ours, theirs):
            model.train()
            leaf = x.to(x_dtype).requires_grad_()
            trained = [p for n, p in model.named_parameters() if "lora_" in n]
            for p in trained:
                p.requires_grad_(True)
            with torch.autocast("cpu", dtype=autocast):
                y = model(leaf)
            grads = torch.autograd.grad(y.float().square().sum(), [leaf, *trained])
            assert all(grad.isfinite().all() for grad in grads)
            dtypes.append([y.dtype, *(grad.dtype for grad in grads)])
        assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_and_nested_and_compiled(kind: str, tmp_path: Path) -> None:
    model, _, _, x = made(kind, torch.float32, tmp_path)
    x = x.float() if x.is_floating_point() else x

    def within(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = model(x)
        return y

    with torch.no_grad():
        plain, half = model(x), within(model, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(model(x), plain)
            assert torch.equal(model(x), half)  # the outer one again
        with torch.autocast("cpu", dtype=torch.float16):
            assert torch.equal(within(model, x), half)  # the inner one counts
        torch._dynamo.reset()
        compiled = torch.compile(within, fullgraph=True, backend="aot_eager")(model, x)
        assert compiled.dtype == half.dtype and torch.equal(compiled, half)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            around = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        assert around.dtype == half.dtype and torch.equal(around, half)
