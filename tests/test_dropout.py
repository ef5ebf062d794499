"""The dropout mask: where it comes from, what it is, and that it is the same everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from devices import each_device
from problems import make_problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lora_ext


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers (Salmon et al., SC'11)."""
    word = 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & word,
            first >> 32 ^ counter[3] ^ key[1],
            first & word,
        ]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return counter


def expected_keep(seed: int, offset: int, row: int, column: int, dropout_p: float) -> bool:
    """csrc/common/dropout.h once more, independently."""
    counter = [
        column // 128 * 16 + column % 16,
        row & 0xFFFFFFFF,
        row >> 32 | (offset >> 32) << 16,
        offset & 0xFFFFFFFF,
    ]
    words = philox(counter, [seed & 0xFFFFFFFF, seed >> 32])
    slot = column % 128 // 16
    return (words[slot // 2] >> (slot % 2 * 16) & 0xFFFF) < round((1 - dropout_p) * 65536)


def test_philox_known_answers() -> None:
    """The published test vectors of Random123, so that both implementations are the real Philox."""
    ones = [0xFFFFFFFF] * 4
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(ones, ones[:2]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (2**63 - 5, 0), (12345, 2**40 + 8)])
@pytest.mark.parametrize("columns", [1, 129, 300])
@each_device
def test_mask_is_philox_of_the_element(device: str, seed: int, offset: int, columns: int) -> None:
    rng_state = torch.tensor([seed, offset], device=device)
    mask = lora_ext.dropout_mask(rng_state, 5, columns, 0.3).cpu()
    for row in range(5):
        for column in range(columns):
            assert mask[row, column] == expected_keep(seed, offset, row, column, 0.3)


def test_keep_rate_within_four_sigma() -> None:
    for dropout_p in (0.05, 0.1, 0.5, 0.9):
        mask = lora_ext.dropout_mask(torch.tensor([2024, 0]), 2500, 4000, dropout_p)
        sigma = math.sqrt(dropout_p * (1 - dropout_p) / mask.numel())
        rate = mask.double().mean().item()
        assert abs(rate - (1 - dropout_p)) < 4 * sigma, dropout_p
        # Neighbours in a row, in a column and one counter apart are independent.
        pairs = [
            (mask[:, 1:], mask[:, :-1]),
            (mask[1:], mask[:-1]),
            (mask[:, 16:], mask[:, :-16]),
        ]
        for one, other in pairs:
            shifted = one & other
            both = shifted.double().mean().item()
            assert abs(both - (1 - dropout_p) ** 2) < 4 * math.sqrt(0.25 / shifted.numel())


@pytest.mark.parametrize("dropout_p", [0.0, 1.0])
def test_certain_probabilities(dropout_p: float) -> None:
    mask = lora_ext.dropout_mask(torch.tensor([1, 0]), 50, 200, dropout_p)
    assert mask.all() if dropout_p == 0 else not mask.any()
    p = make_problem((9,), dropout_p=dropout_p)
    y = lora_ext.lora_linear(
        *p.operands, dropout_p=dropout_p, rng_state=lora_ext.draw_rng_state(p.x)
    )
    base = torch.nn.functional.linear(p.x, p.weight, p.bias)
    assert torch.equal(y, base) == (dropout_p == 1.0)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), [p.x, p.lora_A]))


@each_device
def test_seed_governs_the_draw(device: str) -> None:
    x = torch.zeros(1, device=device)
    torch.manual_seed(5)
    first, second = lora_ext.draw_rng_state(x), lora_ext.draw_rng_state(x)
    torch.manual_seed(5)
    assert torch.equal(lora_ext.draw_rng_state(x), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (2,) and first.device == x.device


def layer_and_input(dtype: torch.dtype, device: str) -> tuple[lora_ext.nn.Linear, Tensor]:
    torch.manual_seed(0)
    place = {"dtype": dtype, "device": device}
    layer = lora_ext.nn.Linear(300, 200, r=8, lora_alpha=16, lora_dropout=0.3, **place)
    torch.nn.init.normal_(layer.lora_B)
    return layer, torch.randn(40, 300, requires_grad=True, **place)


def step(layer: lora_ext.nn.Linear, x: Tensor, how: str) -> list[Tensor]:
    torch.manual_seed(11)
    inner = torch.nn.Sequential(layer, torch.nn.Tanh(), torch.nn.Dropout(0.2))
    if how == "plain":
        y = inner(x)
    else:
        y = checkpoint(inner, x, use_reentrant=how == "reentrant")
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    y.sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["plain", "reentrant", "non-reentrant"])
@each_device
def test_same_seed_same_step_over_checkpointing(device: str, how: str, dtype: torch.dtype) -> None:
    layer, x = layer_and_input(dtype, device)
    for got, want in zip(step(layer, x, how), step(layer, x, "plain"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dropout_p", [0.5, 0.75])  # whose survivors' factor is a power of two
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [130, 136])
@each_device
def test_backward_uses_the_mask_of_forward(
    device: str, n: int, dtype: torch.dtype, dropout_p: float
) -> None:
    """With A and B the identity, y - base and dx - base are the mask itself."""
    eye = torch.eye(n, dtype=dtype, device=device)
    x = torch.ones(50, n, dtype=dtype, device=device, requires_grad=True)
    zero = torch.zeros_like(eye)
    state = lora_ext.draw_rng_state(x)
    mask = lora_ext.dropout_mask(state, 50, n, dropout_p)
    y = lora_ext.lora_linear(x, zero, None, eye, eye, dropout_p=dropout_p, rng_state=state)
    y.sum().backward()
    assert torch.equal(y, mask / (1 - dropout_p))
    assert torch.equal(x.grad, mask / (1 - dropout_p))
