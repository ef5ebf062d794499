"""What stays alive between forward and backward."""

from __future__ import annotations

import peft
import pytest
import torch
from problems import make_problem
from torch import Tensor, nn

import lora_ext

SHAPES = [(768, 768), (1024, 4096), (4096, 4096)]


def saved_tensors(function: object, parameters: list[Tensor]) -> list[Tensor]:
    """Distinct storages kept for backward, without the parameters'."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()  # type: ignore[operator]
    return list(kept.values())


def count_bytes(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def base_layer(K: int, N: int, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(K, N, bias=False, dtype=dtype)
    return linear.requires_grad_(False)


@pytest.mark.parametrize("r", [8, 16, 64])
@pytest.mark.parametrize("M", [1, 16, 512, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("K", "N"), SHAPES, ids=lambda size: str(size))
def test_at_most_half_of_peft(K: int, N: int, dtype: torch.dtype, M: int, r: int) -> None:
    if M == 2048 and K * N > 768 * 4096:
        M = 600  # the ratio does not depend on it, the run time does
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    base = base_layer(K, N, dtype)
    ours = lora_ext.nn.Linear.from_linear(base, r, lora_dropout=0.1, autocast_adapter_dtype=False)
    config = peft.LoraConfig(r=r, lora_dropout=0.1, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    our_bytes = count_bytes(saved_tensors(lambda: ours(x), list(ours.parameters())))
    their_bytes = count_bytes(saved_tensors(lambda: theirs(x), list(theirs.parameters())))
    assert our_bytes <= 0.51 * their_bytes


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("trained", "kept"),
    [
        (("x", "lora_A", "lora_B"), {"x", "h"}),
        (("lora_A",), {"x"}),
        (("x", "weight"), {"x"}),
        (("x", "lora_B"), {"h"}),
        (("x",), set()),
        (("x", "bias"), set()),
    ],
    ids=lambda value: "+".join(sorted(value)) or "nothing",
)
def test_only_what_backward_needs(
    trained: tuple[str, ...], kept: set[str], dropout_p: float
) -> None:
    p = make_problem((50,), 30, 20, 4, dropout_p=dropout_p)
    for name in ("x", "weight", "bias", "lora_A", "lora_B"):
        getattr(p, name).requires_grad_(name in trained)
    parameters = [p.weight, p.bias, p.lora_A, p.lora_B]
    shapes = {tuple(t.shape) for t in saved_tensors(p.fused, parameters)}
    expected = {{"x": (50, 30), "h": (50, 4)}[name] for name in kept}
    if dropout_p > 0:
        if "x" in kept:  # backward makes the dropped x again, and h from it
            expected.discard((50, 4))
        expected.add((2,))
    assert shapes == expected


def test_x_is_shared_not_copied() -> None:
    p = make_problem((50,), dropout_p=0.1)
    kept = saved_tensors(p.fused, [p.weight, p.lora_A, p.lora_B])
    assert [t.data_ptr() for t in kept] == [p.x.data_ptr(), p.rng_state.data_ptr()]
