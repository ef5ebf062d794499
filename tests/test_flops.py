"""FlopCounterMode counts the same of an operator as of its twin in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lora_ext
from lora_ext import reference
from lora_ext.functional import dora_linear, draw_rng_state, lora_embedding, weight_norm

M, K, N, R = 6, 10, 14, 3
STATE = draw_rng_state(torch.empty(0))
X, W, BIAS, A, B, G = (torch.randn(s) for s in ((2, M, K), (N, K), (N,), (R, K), (N, R), (N,)))
TOKENS, TABLE, TABLE_A, TABLE_B = (
    torch.randint(0, 9, (2, M)), torch.randn(9, N), torch.randn(R, 9), torch.randn(N, R),
)  # fmt: skip


def plain_dora(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, g: Tensor) -> Tensor:
    d = nn.functional.dropout(x, 0.5)
    return nn.functional.linear(x, W, bias) + (g - 1) * (d @ W.t()) + d @ A.t() @ B.t()


ROWS = X[..., 0].numel()
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "lora_linear": (lora_ext.lora_linear, reference.lora_linear, (X, W, BIAS, A, B)),
    "lora_linear, dropout": (
        lambda *a: lora_ext.lora_linear(*a, dropout_p=0.5, rng_state=STATE),
        reference.lora_linear,
        (X, W, BIAS, A, B),
    ),
    "lora_linear_multi": (
        lambda x, W, bias, A, B: torch.cat(
            lora_ext.lora_linear_multi(x, [W, W], [bias, None], [A, None], [B, None]), -1
        ),
        lambda x, W, bias, A, B: torch.cat(
            [reference.lora_linear(x, W, bias, A, B), nn.functional.linear(x, W)], -1
        ),
        (X, W, BIAS, A, B),
    ),
    "lora_mlp": (
        lambda x, W, bias, A, B: lora_ext.lora_mlp(
            x, [W, W, W.mT], [bias, None, None], [A, None, A @ W.mT], [B, None, W.mT @ B]
        ),
        lambda x, W, bias, A, B: reference.lora_linear(
            nn.functional.silu(reference.lora_linear(x, W, bias, A, B))
            * nn.functional.linear(x, W),
            W.mT,
            torch.zeros(len(W.mT)),
            A @ W.mT,
            W.mT @ B,
        ),
        (X, W, BIAS, A, B),
    ),
    "lora_linear_grouped, a stack": (
        lambda x, W, bias, A, B: torch.ops.lora_ext.lora_linear_grouped(
            *(x, torch.stack([W, W, W]), torch.stack([bias, bias, bias]), [A], [B], []),
            *(torch.arange(ROWS - 4).int(), [ROWS - 4], None, [1.0], [0.0]),
            weight_rows=[3, 0, ROWS - 3],
            weight_slots=[0, 0, 1],
        ),
        lambda x, W, bias, A, B: torch.cat(
            [
                nn.functional.linear(x.flatten(0, -2)[:4], W, bias),
                reference.lora_linear(x.flatten(0, -2)[4:], W, bias, A, B),
            ]
        ),
        (X, W, BIAS, A, B),
    ),
    "dora_linear": (
        lambda *a: dora_linear(*a, dropout_p=0.5, rng_state=STATE),
        plain_dora,
        (X, W, BIAS, A, B, G),
    ),
    "lora_embedding": (
        lambda *a: lora_embedding(TOKENS, *a),
        lambda W, A, B: W[TOKENS] + A.t()[TOKENS] @ B.t(),
        (TABLE, TABLE_A, TABLE_B),
    ),
}


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_each_gradient(case: tuple) -> None:
    fused, plain, operands = case
    everything = set(range(len(operands)))
    choices = [{i} for i in everything] + [everything, everything - {1}, {0, 3, 4} & everything]
    for trained in choices:
        counts = []
        for f in (fused, plain):
            given = [t.clone().requires_grad_(i in trained) for i, t in enumerate(operands)]
            with FlopCounterMode(display=False) as forward:
                y = f(*given)
            with FlopCounterMode(display=False) as backward:
                y.sum().backward()
            counts.append((forward.get_total_flops(), backward.get_total_flops()))
        assert counts[0] == counts[1] and counts[0][0] > 0, trained


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_gradients(case: tuple, mode: Callable[[], torch.no_grad]) -> None:
    fused, plain, operands = case
    with mode():
        assert flops(lambda: fused(*operands)) == flops(lambda: plain(*operands)) > 0


def test_products_of_the_weight() -> None:
    expected = flops(lambda: B @ A)
    assert flops(lambda: weight_norm(W, A, B)) == expected
    assert flops(lambda: torch.ops.lora_ext.merge_(W.clone(), A, B)) == expected


def test_a_model_and_its_plain_twin() -> None:
    """The base and one product of low rank beside each linear layer; backward without that of the
    first layer's input."""
    net = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)).requires_grad_(False)
    x = torch.randn(M, K)

    def base() -> int:
        return flops(lambda: net(x.requires_grad_()).sum().backward())

    alone, low_rank = base(), 2 * M * R * (K + N)
    lora_ext.replace_linear(net, "all-linear", r=R)
    # h and h B; then dh, dB, dA and dh A: three times as many
    assert base() == alone + 2 * 3 * low_rank
