"""Times of a layer by each path, over those of the frozen layer. All of it is predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from predictor import blas
from predictor.cards import SCENARIOS, Card
from predictor.kernels import Pass, Timer
from predictor.launches import Call, record

PATHS = ("fused", "hybrid", "composed")


@dataclass(frozen=True)
class Prediction:
    """Of one call on one card by one path, in one scenario."""

    call: Call
    asked: str  # what LORA_EXT_CUDA_PATH asks for
    path: str  # as `explain` tells it
    reason: str  # for it, the same
    scenario: str
    frozen: tuple[float, float]  # us: forward, dx
    flat: tuple[float, float]  # the same if cuBLAS kept its best rate in every shape
    layer: tuple[float, float]  # us: forward, backward
    passes: tuple[list[Pass], list[Pass]]  # of the kernels; cuBLAS's are not in it

    @property
    def forward_ratio(self) -> float:
        return self.layer[0] / self.frozen[0]

    @property
    def ratio(self) -> float:
        """Forward and backward, over forward and dx."""
        return sum(self.layer) / sum(self.frozen)

    @property
    def flat_ratios(self) -> tuple[float, float]:
        """Forward; forward and backward."""
        return self.layer[0] / self.flat[0], sum(self.layer) / sum(self.flat)


def predict(
    card: Card, call: Call, counts: dict[str, Any], asked: str = "auto", scenario: str = "central"
) -> Prediction:
    """`asked`: one of PATHS, or "auto" for the path that lora_linear_path.h chooses."""
    how = SCENARIOS[scenario]
    recorded = record(call, card.capability, card.multiprocessors, asked)
    frozen = blas.frozen_us(card, how, call)
    flat = blas.frozen_us(card, replace(how, flat=True), call)
    composed = blas.composed_us(card, how, call)
    columns, depths = (call.N, call.K), (call.K, call.N)
    passes: list[list[Pass]] = []
    times: list[float] = []
    for i, launches in enumerate((recorded.forward, recorded.backward)):
        path = recorded.paths[i]
        fused = "fused" in path
        timer = Timer(card, how, counts["kernels"], call, backward=i == 1, base=fused)
        passes.append(list(timer.times(launches)))
        times.append(composed[i] if "cublas" in path else sum(one.us for one in passes[i]))
        if "hybrid" in path:
            times[i] += blas.product_us(card, how, call.M, columns[i], depths[i], onto=True)
    layer = (times[0], times[1])
    return Prediction(
        call,
        asked,
        recorded.path,
        recorded.reason,
        scenario,
        frozen,
        flat,
        layer,
        (passes[0], passes[1]),
    )


def calibration(card: Card, counts: dict[str, Any], scenario: str) -> dict[str, float]:
    """At 8192 x 8192 x 8192, where there are published figures: the model's own cuBLAS, in TFLOP/s,
    and the rate of our product, without a low-rank part, over it."""
    how, size = SCENARIOS[scenario], 8192
    call = Call(size, size, size, 1)
    launch = record(call, card.capability, card.multiprocessors, "fused").forward[-1]
    timer = Timer(card, how, counts["kernels"], call, backward=False, base=True, low_rank=False)
    ours = next(timer.times([launch])).us
    cublas = blas.product_us(card, how, size, size, size)
    return {"cublas": 2 * size**3 / cublas * 1e-6, "ours": cublas / ours}
