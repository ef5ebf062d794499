"""Layers of one x on the emulated CUDA kernels: together, one by one, and in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from emulated import Arguments, EmulatedKernels, guarded_arguments, take_results
from problems import UNIT, rms
from torch import Tensor

import lora_ext

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    weight: Tensor  # [N, K], or a view of [K, N]
    bias: Tensor | None  # [N] float32
    lora_A: Tensor | None
    lora_B: Tensor | None
    dy: Tensor  # [M, N]
    scaling: float
    factor: Tensor | None = None  # [] float32, multiplies the scaling
    dropout_p: float = 0.0
    rng_state: Tensor | None = None
    wants: tuple[str, ...] = ("dA", "dB")

    @property
    def options(self) -> dict[str, object]:
        return {"scaling": self.scaling, "dropout_p": self.dropout_p, "rng_state": self.rng_state}

    @property
    def operands(self) -> dict[str, Tensor | None]:
        return {
            "weight": self.weight,
            "lora_A": self.lora_A,
            "lora_B": self.lora_B,
            "scaling_factor": self.factor,
        }


def make_layers(
    M: int,
    K: int,
    widths: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.bfloat16,
    transposed: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, list[Layer]]:
    """x [M, K], and layers of so many features and ranks; rank 0 has no adapter. Every second one
    has a bias, every third one a factor."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(of)

    layers = []
    for i, (N, r) in enumerate(widths):
        weight = normal(N, K, std=K**-0.5)
        dropped = dropout_p > 0 and r > 0
        layers.append(
            Layer(
                weight.t().contiguous().t() if transposed else weight,
                normal(N, of=torch.float32) if i % 2 == 0 else None,
                normal(r, K, std=K**-0.5, of=adapter_dtype) if r else None,
                normal(N, r, std=r**-0.5, of=adapter_dtype) if r else None,
                normal(M, N),
                scaling=0.5 + i,
                factor=torch.tensor(2.0) if i % 3 == 0 else None,
                dropout_p=dropout_p if dropped else 0.0,
                rng_state=torch.tensor([77 + i, 5]) if dropped else None,
            )
        )
    return normal(M, K), layers


def _empty(values: dict[str, Tensor | None]) -> Results:
    return {
        name: torch.full(t.shape, torch.nan, dtype=t.dtype)
        for name, t in values.items()
        if t is not None
    }


def _run(
    kernels: EmulatedKernels,
    layers: list[Layer],
    tensors: list[dict[str, Tensor | None]],
    backward: bool,
) -> None:
    prepared = [
        guarded_arguments(of, **layer.options)  # type: ignore[arg-type]
        for of, layer in zip(tensors, layers, strict=True)
    ]
    arguments = (Arguments * len(layers))(*(one for _, one in prepared))
    guarded = [one for one, _ in prepared]
    kernels.call(kernels.library.lora_multi, guarded, arguments, len(layers), backward)
    for one, of in zip(guarded, tensors, strict=True):
        take_results(one, of)


def forward_together(kernels: EmulatedKernels, x: Tensor, layers: list[Layer]) -> list[Results]:
    """y and h of each; what no kernel writes stays NaN."""
    results = []
    for layer in layers:
        h = None if layer.lora_A is None else torch.empty(len(x), len(layer.lora_A))
        results.append(_empty({"y": layer.dy, "h": h}))
    tensors = [
        {"x": x, "bias": layer.bias, **layer.operands, **made}
        for layer, made in zip(layers, results, strict=True)
    ]
    _run(kernels, layers, tensors, False)
    return results


def backward_together(
    kernels: EmulatedKernels,
    x: Tensor,
    layers: list[Layer],
    hs: list[Tensor | None],
    wants_x: bool = True,
) -> tuple[Tensor | None, list[Results]]:
    """dx of all; dA and dB of each."""
    results = [
        _empty(
            {
                "dA": layer.lora_A if "dA" in layer.wants else None,
                "dB": layer.lora_B if "dB" in layer.wants else None,
                "dx": x if wants_x else None,
            }
        )
        for layer in layers
    ]
    tensors = [
        {"x": x, "dy": layer.dy, "saved_h": h, **layer.operands, **made}
        for layer, made, h in zip(layers, results, hs, strict=True)
    ]
    _run(kernels, layers, tensors, True)
    dx = [made.pop("dx", None) for made in results]
    assert not wants_x or all(one.isnan().all() for one in dx[1:])  # type: ignore[union-attr]
    return dx[0], results


def alone(kernels: EmulatedKernels, x: Tensor, layer: Layer, h: Tensor) -> Results:
    """The same of a layer by itself."""
    options = layer.options | {"scaling_factor": layer.factor}
    adapter = layer.lora_A, layer.lora_B
    y, _ = kernels.forward(x, layer.weight, layer.bias, *adapter, **options)  # type: ignore[arg-type]
    _, dA, dB = kernels.backward(layer.dy, x, h, layer.weight, *adapter, **options)  # type: ignore[arg-type]
    return {"y": y, "dA": dA, "dB": dB}


def exact(x: Tensor, layers: list[Layer]) -> tuple[Tensor, list[Results], Tensor]:
    """dx, and y, h, dA, dB of each, in float64; and the size of dx's terms."""
    x, dx = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    size = torch.zeros_like(dx)
    results = []
    for layer in layers:
        weight, dy = layer.weight.double(), layer.dy.double()
        y = x @ weight.t() + (0 if layer.bias is None else layer.bias.double())
        dx += dy @ weight
        size += dy.square() @ weight.square()
        found = {"y": y}
        if layer.lora_A is not None and layer.lora_B is not None:
            A, B = layer.lora_A.double(), layer.lora_B.double()
            scaling = layer.scaling * (1.0 if layer.factor is None else layer.factor.item())
            d = x
            if layer.rng_state is not None:
                mask = lora_ext.dropout_mask(layer.rng_state, *x.shape, layer.dropout_p)
                d = x * mask / (1 - layer.dropout_p)
            dh = scaling * dy @ B
            found["y"] = y + scaling * (d @ A.t()) @ B.t()
            found |= {"h": d @ A.t(), "dA": dh.t() @ d, "dB": scaling * dy.t() @ (d @ A.t())}
            dx += dh @ A
            size += dh.square() @ A.square()
        results.append(found)
    return dx, results, size.sqrt()


def bound(got: Tensor, base: torch.dtype, depth: int) -> float:
    """h and dh are rounded once for the product and the result once; what is stored in float has
    factors of 16 bits and a remainder of as many. Sums are in float."""
    roundings = 2 * UNIT[base] if got.dtype == base else 3 * UNIT[base] ** 2
    return roundings + UNIT[torch.float32] * depth**0.5


def check(
    kernels: EmulatedKernels,
    x: Tensor,
    layers: list[Layer],
    backward: bool = True,
    wants_x: bool = True,
) -> list[Results]:
    """Everything against float64; y, dA and dB bit for bit as of calls of their own."""
    dx_exact, wanted, dx_size = exact(x, layers)
    found = forward_together(kernels, x, layers)
    hs = [one.get("h") for one in found]
    if backward:
        dx, gradients = backward_together(kernels, x, layers, hs, wants_x)
        if dx is not None:
            depth = sum(len(layer.weight) for layer in layers)
            error = rms(dx.double() - dx_exact)
            assert error <= bound(dx, x.dtype, depth) * rms(dx_size), "dx"
        for one, made in zip(found, gradients, strict=True):
            one.update(made)
    depth = max(*x.shape, *(len(layer.weight) for layer in layers))
    for i, (layer, got, want) in enumerate(zip(layers, found, wanted, strict=True)):
        for name, value in got.items():
            assert rms(value.double() - want[name]) <= bound(value, x.dtype, depth) * rms(
                want[name]
            ), f"{name} of layer {i}"
        if layer.lora_A is None:
            continue
        own = alone(kernels, x, layer, got["h"])
        for name in own.keys() & got.keys():
            assert torch.equal(own[name], got[name]), f"{name} of layer {i}, alone"
    return found
