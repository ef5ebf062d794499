"""What DoRA adds to a layer: the passes that walk rows, by the kernels and by ATen's operators.
They wait for memory, so bytes are counted; of weight_norm also what a rank costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from predictor import blas
from predictor.cards import Card, Scenario
from predictor.launches import Call

# Of a warp of weight_norm_kernel, for its 16 x 64 elements of a tile: once, for each 32 ranks, and
# for each rank of adapters in bf16 or in fp32; counted in the code of nvcc 13.0 for sm_90a.
TILE_INSTRUCTIONS = 345
CHUNK_INSTRUCTIONS = 240
RANK_INSTRUCTIONS = {False: 10, True: 19}
SCHEDULERS = 4  # of a multiprocessor: an instruction of a warp each, in a cycle


@dataclass(frozen=True)
class Rows:
    """us, without dropout."""

    norm: float  # weight_norm, once in each forward
    scale: float  # column_scale
    scale_backward: float  # dz, and the gradient of the magnitude

    @property
    def both(self) -> float:
        return self.norm + self.scale + self.scale_backward


def by_kernels(card: Card, how: Scenario, call: Call) -> Rows:
    M, N, K, r = call.M, call.N, call.K, call.r
    warps = math.ceil(N / 32) * math.ceil(K / 256) * 8
    instructions = TILE_INSTRUCTIONS + CHUNK_INSTRUCTIONS * math.ceil(r / 32)
    instructions += RANK_INSTRUCTIONS[call.fp32_adapters] * r
    cycles = warps * instructions / SCHEDULERS
    adapters = (4 if call.fp32_adapters else 2) * r * (N + K)
    added = card.dependent_gap * how.gap + blas.LATENCY  # sum_parts, of what is in L2
    return Rows(
        norm=blas.elementwise_us(card, how, 2.0 * N * K + adapters, cycles) + added,
        scale=blas.elementwise_us(card, how, 4.0 * M * N),
        scale_backward=blas.elementwise_us(card, how, 6.0 * M * N) + added,
    )


def by_aten(card: Card, how: Scenario, call: Call) -> Rows:
    """The composed forms of csrc/ops/{weight_norm,column_scale}.cpp, operator by operator: bytes of
    an element that each reads and writes."""
    M, N, K, r = call.M, call.N, call.K, call.r

    def passes(elements: float, *bytes_each: int) -> float:
        return sum(blas.elementwise_us(card, how, elements * each) for each in bytes_each)

    product = 2.0 * N * K * r / (blas.FLOAT_FLOPS * card.multiprocessors * card.clock * 1e3)
    sum_of = max(product, passes(N * K, 8))  # addmm, in float32
    return Rows(
        norm=passes(N * K, 6, 4) + sum_of,  # to float32, the norm
        scale=passes(M * N, 6, 8, 6),  # to float32, times scale, back
        # dy to float32, times scale, back; z to float32, times dy, its sum
        scale_backward=passes(M * N, 6, 8, 6, 6, 12, 4),
    )
