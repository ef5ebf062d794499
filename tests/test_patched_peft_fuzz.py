"""PEFT as it is and PEFT patched, on the same seeded models: outputs and all gradients, with the
same dropout masks. `LORA_EXT_PATCHED_FUZZ=1000` runs as many cases, `..._FROM=5000` others.

The truth is the same model in float64. In norm, a tensor of the patched model may be three times as
wrong as the worst of PEFT's own at the same dtypes, or of what the truth becomes where each layer's
result is rounded to them, and by a few roundings more: small samples of equally large roundings
differ that much.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import pytest
import torch
from problems import UNIT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_ext.functional
import lora_ext.integrations.peft as fused

COUNT = int(os.environ.get("LORA_EXT_PATCHED_FUZZ", "500"))
FIRST = int(os.environ.get("LORA_EXT_PATCHED_FUZZ_FROM", "0"))
CHUNK = 50
# Three layers, each with two roundings of its result (base and low-rank part) and one of
# softsign's, in forward and in backward.
ROUNDINGS = 3 * 3 * 2
# Where both round as often, the logarithm of the ratio of their errors scatters around 0 with a
# deviation of about 0.4, and the median of 25 of them by 1.25 * 0.4 / 5 = 0.1: two of these.
MEDIAN = 1.22


class Net(nn.Module):
    """Layers in turn, the middle ones checkpointed if asked."""

    def __init__(self, *layers: nn.Module, checkpointed: bool) -> None:
        super().__init__()
        self.layers, self.checkpointed = nn.ModuleList(layers), checkpointed
        self.roundings = 0.0  # relative changes of every layer's result and its gradient

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointed and x.requires_grad:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
            if self.roundings:
                x = self.rounded(x)
                if x.requires_grad:
                    x.register_hook(self.rounded)
            x = nn.functional.softsign(x)  # tanh' = 1 - y * y would lose y's digits
        return x

    def rounded(self, x: Tensor) -> Tensor:
        # numpy's numbers: torch's generator is what masks are drawn from.
        noise = torch.from_numpy(np.random.default_rng(x.numel()).standard_normal(x.shape))
        return x * (1 + self.roundings * noise)


@dataclass(frozen=True)
class Case:
    """What one seed says."""

    seed: int
    kind: str  # of the layers: linear, conv1d, words
    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    dtype: torch.dtype
    fp32_adapters: bool
    autocast: torch.dtype | None
    configs: tuple[dict[str, Any], ...]
    active: tuple[int, ...]
    adapter_names: tuple[int, ...] | None  # -1 is the base
    state: str  # adapted, disabled, merged
    training: bool
    checkpointed: bool
    strided: bool


def case_of(seed: int) -> Case:
    rng = random.Random(seed)
    kind = rng.choice(["linear", "linear", "linear", "conv1d", "words"])
    dtype = rng.choice([torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16])
    autocast = None
    if dtype != torch.float64 and rng.random() < 0.25:
        autocast = rng.choice([torch.bfloat16, torch.float16])
    training = rng.random() < 0.7
    count = rng.choice([1, 1, 1, 2, 3])
    dora = rng.random() < 0.3
    configs = []
    for _ in range(count):
        r = rng.choice([1, 2, 3, 5, 8, 17])
        use_dora = dora and rng.random() < 0.7
        configs.append(
            {
                "r": r,
                "lora_alpha": rng.choice([1, 4, r, 2 * r]),
                "lora_dropout": rng.choice([0.0, 0.0, 0.1, 0.5]),
                "use_rslora": rng.random() < 0.3,
                "use_dora": use_dora,
                "lora_bias": kind != "words" and not use_dora and rng.random() < 0.25,
                "rank_pattern": {"layers.0": 4} if rng.random() < 0.2 else {},
                "fan_in_fan_out": kind == "conv1d",
                "target_modules": rng.choice([["0", "1", "2"], ["1"], ["0", "2"]]),
            }
        )
    rows = rng.choice([(7,), (1,), (2, 5), (3, 2, 4), (33,), (0,)])
    names = None
    if not training and rng.random() < 0.4 and rows[0] and not any(c["use_dora"] for c in configs):
        names = tuple(rng.randrange(-1, count) for _ in range(rows[0]))
    state = "adapted" if names else rng.choice(["adapted"] * 6 + ["disabled", "merged"])
    return Case(
        seed=seed,
        kind=kind,
        sizes=tuple(rng.choice([3, 8, 17, 24, 40]) for _ in range(4)),
        rows=rows,
        dtype=dtype,
        fp32_adapters=rng.random() < 0.5,
        autocast=autocast,
        configs=tuple(configs),
        active=tuple(rng.sample(range(count), rng.randint(1, count))),
        adapter_names=names,
        state=state,
        training=training,
        # PEFT forgets adapter_names before backward
        checkpointed=names is None and rng.random() < 0.3,
        strided=kind != "conv1d" and rng.random() < 0.3,  # whose forward wants rows
    )


def built(case: Case) -> tuple[Any, Tensor, Tensor]:
    """The PEFT model, its input, and what its output is multiplied with."""
    torch.manual_seed(case.seed)
    a, b, c, d = case.sizes
    x = torch.randn(*case.rows, a)
    if case.kind == "conv1d":
        layers: list[nn.Module] = [Conv1D(b, a), Conv1D(c, b), Conv1D(d, c)]
    else:
        layers = [
            nn.Linear(a, b),
            nn.Linear(b, c, bias=case.state == "merged" or case.seed % 2 == 0),
            nn.Linear(c, d),
        ]
    if case.kind == "words":
        layers[0] = nn.Embedding(11, b, padding_idx=2 if case.seed % 3 == 0 else None)
        x = torch.randint(0, 11, case.rows)
    else:
        x = x.to(case.dtype)
    if case.strided and x.dim() > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    net = Net(*layers, checkpointed=case.checkpointed).to(case.dtype)
    model: Any = None
    for i, fields in enumerate(case.configs):
        config = peft.LoraConfig(**copy.deepcopy(fields))
        if model is None:
            model = peft.get_peft_model(
                net, config, f"a{i}", autocast_adapter_dtype=case.fp32_adapters
            )
        else:
            model.add_adapter(f"a{i}", config, autocast_adapter_dtype=case.fp32_adapters)
    disturb(model)
    model.base_model.set_adapter([f"a{i}" for i in case.active])
    model.train(case.training)
    return model, x, torch.randn(*case.rows, d)


@torch.no_grad()
def disturb(model: Any) -> None:
    """Makes the low-rank part about as large as the base's. Far above it, its rounding in a 16-bit
    result would be the larger one, where PEFT rounds the base."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if "magnitude" in name:
            parameter.mul_(1 + 0.3 * noise.to(parameter.dtype))
        elif "lora_" in name:
            layer = model.get_submodule(name.split(".lora_")[0])
            scaling = next(s for a, s in layer.scaling.items() if f".{a}" in name)
            noise *= 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.copy_(noise / (max(scaling, 1) if "_B" in name else 1))


@contextlib.contextmanager
def fixed_masks() -> Iterator[None]:
    """torch's dropout with the masks of lora_ext, of the same draws from torch's generator."""
    torchs = nn.functional.dropout

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        return lora_ext.functional.dropout(x, lora_ext.draw_rng_state(x), p)

    nn.functional.dropout = dropout
    try:
        yield
    finally:
        nn.functional.dropout = torchs


def results(case: Case, model: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output and the gradients, by name, in float64."""
    if x.is_floating_point():
        x = x.detach().requires_grad_()
    autocast = contextlib.nullcontext()
    if case.autocast is not None and dy.dtype != torch.float64:
        autocast = torch.autocast("cpu", case.autocast)
    kwargs = {}
    if case.adapter_names is not None:
        kwargs["adapter_names"] = ["__base__" if i < 0 else f"a{i}" for i in case.adapter_names]
    model.zero_grad()
    torch.manual_seed(case.seed + 1)
    disabled = model.disable_adapter() if case.state == "disabled" else contextlib.nullcontext()
    with fixed_masks(), disabled:  # backward too, which runs checkpointed layers again
        with autocast:
            y = model(x, **kwargs)
        if y.requires_grad:
            (y.double() * dy.double()).sum().backward()
    found = {"y": y}
    if x.grad is not None:
        found["x"] = x.grad
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found


def compare(case: Case) -> tuple[Counter[str], float | None]:
    """Raises AssertionError. Returns how the patched calls ran, and how many times as wrong as PEFT
    the worst tensor is, where PEFT's is not exact itself."""
    model, x, dy = built(case)
    if case.state == "merged":
        model.merge_adapter()
    exact = copy.deepcopy(model).double()
    x64 = x.double() if x.is_floating_point() else x
    truth = results(case, exact, x64, dy.double())
    eager = results(case, model, x, dy)
    eager = {name: tensor.clone() for name, tensor in eager.items()}
    before = fused.calls.copy()
    fused.patch()
    try:
        patched = results(case, model, x, dy)
    finally:
        fused.unpatch()
    assert eager.keys() == patched.keys(), sorted(eager.keys() ^ patched.keys())
    unit = max(UNIT[case.autocast or case.dtype], UNIT[case.dtype])
    # In float64 the truth itself is rounded, in sums of up to some hundred terms.
    roundings = 1000 if case.dtype == torch.float64 else ROUNDINGS
    # What the net makes of a rounding, it makes in all of its gradients.
    net = exact.get_base_model()
    of_peft = max(relative_error(eager[name], want) for name, want in truth.items())
    yardstick = of_peft
    for net.roundings in (unit, -unit, 2 * unit):
        disturbed = results(case, exact, x64, dy.double())
        errors = [relative_error(disturbed[name], want) for name, want in truth.items()]
        yardstick = max(yardstick, *errors)
    allowed = 3 * yardstick + roundings * unit
    for name, want in truth.items():
        got, plain = patched[name], eager[name]
        assert (got.dtype, got.shape) == (plain.dtype, plain.shape), name
        error = relative_error(got, want)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    worst = max(relative_error(patched[name], want) for name, want in truth.items())
    return fused.calls - before, worst / of_peft if of_peft else None


def relative_error(got: Tensor, want: Tensor) -> float:
    norm = want.norm().item()
    error = (got.double() - want).norm().item()
    return error / norm if norm else error


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, CHUNK))
def test_patched_is_peft(first: int) -> None:
    differences, ran, times_peft = {}, Counter[str](), []
    for seed in range(first, min(first + CHUNK, FIRST + COUNT)):
        case = case_of(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                calls, times = compare(case)
            ran += calls
            times_peft += [] if times in (None, 1.0) else [times]  # 1.0: the same calls
        except Exception as error:
            differences[seed] = f"{error!r}\n    {case}"
    assert not differences, "\n".join(f"{seed}: {text}" for seed, text in differences.items())
    with_adapters = sum(ran.values()) - ran[fused.BASE_ALONE]
    assert ran[fused.FUSED] > 0.8 * with_adapters, ran
    # Single cases scatter; a rounding more than PEFT's would move all of them.
    assert len(times_peft) < 10 or statistics.median(times_peft) < MEDIAN, times_peft
