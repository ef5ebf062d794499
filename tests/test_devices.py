"""On every device: ranks, scaling tensors, compiled calls, a whole model, what explain tells."""

from __future__ import annotations

import copy

import pytest
import torch
from devices import cuda_path, each_device
from problems import make_problem, results, rms
from test_lora_linear import DTYPES, assert_as_exact, dtype_id
from torch import Tensor, nn

import lora_ext

HALVES = DTYPES[2:]  # what the CUDA kernels take


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", HALVES, ids=dtype_id)
@pytest.mark.parametrize(
    ("r", "lora_bias"),
    [
        *((r, "no lora_bias") for r in (2, 8, 16, 32, 64, 100, 128, 200, 256, 300)),
        *((r, "lora_bias") for r in (1, 7, 15, 17, 33, 63, 65)),
    ],
)
@each_device
def test_ranks(
    device: str, r: int, lora_bias: str, dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float
) -> None:
    assert_as_exact(
        make_problem(
            (130,), 264, 200, r, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=dropout_p,
            lora_bias=lora_bias == "lora_bias", device=device,
        )
    )  # fmt: skip


# Several tiles of every kernel in every direction, some with tails; M, K, N, r
TILES = [
    ((515, 1032, 776, 16), "no bias"),
    ((1030, 136, 2056, 24), "no bias"),
    ((300, 771, 1030, 16), "bias"),
    ((129, 2304, 129, 64), "bias"),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("size", "bias"), TILES, ids=[f"{'x'.join(map(str, size))}-{bias}" for size, bias in TILES]
)
@each_device
def test_many_tiles(
    device: str, size: tuple[int, int, int, int], bias: str, dropout_p: float
) -> None:
    M, K, N, r = size
    assert_as_exact(
        make_problem(
            (M,),
            K,
            N,
            r,
            dtype=torch.bfloat16,
            bias=bias == "bias",
            dropout_p=dropout_p,
            device=device,
        )
    )


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@each_device
def test_scaling_tensor(device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Half of the scaling is a tensor; what comes out is as exact as with a number."""
    p = make_problem(
        (37,), dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=0.1, lora_bias=True,
        device=device,
    )  # fmt: skip
    p.scaling = torch.tensor(p.scaling, dtype=torch.float64, device=device)  # type: ignore[assignment]
    assert_as_exact(p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_device
def test_compiled_is_eager_bit_for_bit(device: str, dtype: torch.dtype, dropout_p: float) -> None:
    torch._dynamo.reset()
    p = make_problem((37,), 72, 40, 8, dtype=dtype, device=device)

    def call(*operands: Tensor | None) -> Tensor:
        return lora_ext.lora_linear(*operands, scaling=2.0, dropout_p=dropout_p)

    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend="inductor")):
        torch.manual_seed(7)
        found.append(results(function(*p.operands), list(p.operands), p.dy))
    eager, compiled = found
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)


def config() -> lora_ext.LoraConfig:
    return lora_ext.LoraConfig(
        r=8, lora_alpha=16, target_modules=["0", "2", "4"], init_lora_weights=False
    )


def make_model(dtype: torch.dtype, device: str) -> lora_ext.LoraModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(72, 136), nn.Tanh(), nn.Linear(136, 136), nn.Tanh(), nn.Linear(136, 40)
    )
    return lora_ext.get_lora_model(net.to(device, dtype), config())  # adapters in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_device
def test_a_model_computes_learns_and_merges(device: str, dtype: torch.dtype) -> None:
    model = make_model(dtype, device)
    exact = copy.deepcopy(model).double()
    x = torch.randn(64, 72).to(device, dtype)
    target = torch.randn(64, 40).to(device, dtype)

    y, wanted = model(x), exact(x.double())
    y.square().mean().backward()
    wanted.square().mean().backward()
    # Two roundings a layer, of half an eps each, and sums in float32
    eps, sums = torch.finfo(dtype).eps, 3 * 2.0**-24 * 136**0.5
    assert rms(y.double() - wanted) <= (3 * eps + sums) * rms(wanted)
    for got, want in zip(model.parameters(), exact.parameters(), strict=True):
        if got.grad is not None:
            assert want.grad is not None
            # Forward and backward, and the derivative of tanh, which doubles an error of y
            assert rms(got.grad.double() - want.grad) <= 3 * (3 * eps + sums) * rms(want.grad)

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    unmerged = model(x)
    model.merge_adapter()
    assert rms(model(x).double() - unmerged.double()) <= 2 * (3 * eps + sums) * rms(unmerged)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_device
def test_explain_tells_what_runs(device: str, dtype: torch.dtype) -> None:
    layers = lora_ext.explain(make_model(dtype, device))
    assert len(layers) == 3
    if device == "cpu":
        assert all(layer.path.startswith("cpu ") for layer in layers)
        return
    assert layers[0].path == cuda_path(136, 72, 8, dtype)
    wish = lora_ext.build_info()["cuda_path"]
    if dtype == torch.float32 or wish == "composed":
        assert layers[0].path == "cuda cublas"
    elif wish == "fused":
        assert layers[0].path.startswith("cuda fused sm_")
    if wish != "auto" and dtype != torch.float32:
        assert f"LORA_EXT_CUDA_PATH={wish}" in layers[0].reason
