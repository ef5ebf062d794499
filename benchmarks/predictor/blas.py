"""cuBLAS's products, and what is composed of them: modelled, since neither their code nor a GPU is
here. One rule for all shapes, whose constants the published figures give."""

from __future__ import annotations

import math
from collections.abc import Iterator

from predictor.cards import LATENCY, Card, Scenario
from predictor.launches import Call

# Tiles that it has for 16-bit products, and in how many parts it cuts K.
TILES = ((128, 256), (256, 128), (128, 128), (64, 256), (128, 64), (64, 128), (64, 64))
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
STEP = 64  # of K
# Cycles of a tile of 128 x 256 in which its tensor cores are idle: with it cuBLAS is level with
# fast.cu's kernel 7, which stores from registers as product_sm90.h does.
END_OF_TILE = 2200.0
MULTICAST = 0.75  # of a tile's bytes come from L2 where two blocks share an operand (sm_90)
# Kernels of ATen that are no products
MASK_INSTRUCTIONS = 190.0  # of dropout_mask_kernel, an element: Philox, and a division of 64 bits
FLOAT_FLOPS = 256  # of a multiprocessor in a cycle, without tensor cores


def tile_cycles(
    card: Card, rows: int, columns: int, steps: float, scenario: Scenario, read: int
) -> float:
    """`read`: rows and columns of a tile that are there to be read."""
    tensor = 2 * rows * columns * STEP / card.flops_per_cycle
    shared = MULTICAST if card.capability == 90 else 1.0
    feed = read * STEP * 2 * shared / (card.l2 * scenario.l2)
    end = max(400.0, END_OF_TILE * rows * columns / (128 * 256))
    return steps * max(tensor, feed) + end


def sustained_clock(card: Card, scenario: Scenario) -> float:
    """GHz at which this model's product of 8192 x 8192 x 8192 takes what was published."""
    tiles = math.ceil(8192 / 128) * math.ceil(8192 / 256)
    per_block = math.ceil(tiles / card.multiprocessors)
    cycles = per_block * tile_cycles(card, 128, 256, 8192 / STEP, scenario, 384)
    return cycles * card.cublas / (2 * 8192**3) * 1e3


def product_us(
    card: Card, scenario: Scenario, M: int, N: int, K: int, onto: bool = False, out_bytes: int = 2
) -> float:
    """Of out [M, N] = a [M, K] b [K, N]; `onto`: added to what is there."""
    best = math.inf
    for rows, columns in TILES:
        tiles = math.ceil(M / rows) * math.ceil(N / columns)
        for split in SPLITS:
            steps = math.ceil(K / STEP / split)
            if split > 1 and steps < 2:
                continue
            read = min(rows, M) + min(columns, N)
            cycles = tile_cycles(card, rows, columns, steps, scenario, read)
            if onto or split > 1:  # read again, and the parts written
                extra = rows * columns * (2 * onto + 8 * (split > 1))
                cycles += extra / (card.l2 * scenario.l2)
            rounds = math.ceil(tiles * split / card.multiprocessors)
            us = rounds * cycles / card.clock * 1e-3
            us += (split > 1) * card.gap * scenario.gap / 2  # a kernel that adds the parts
            best = min(best, us)
    if scenario.flat:
        best = min(best, 2 * M * N * K / card.cublas * 1e-6)
    moved = 2 * (M * K + K * N) + M * N * (out_bytes + 2 * onto)
    narrow = min(M, N, K) <= 128
    rate = card.hbm * (scenario.skinny if narrow else scenario.hbm)
    return max(best, moved / rate * 1e-6) + LATENCY + card.gap * scenario.gap


def elementwise_us(card: Card, scenario: Scenario, moved: float, cycles: float = 0.0) -> float:
    """`cycles`: of all multiprocessors together."""
    computed = cycles / card.multiprocessors / card.clock * 1e-3
    memory = moved / (card.hbm * scenario.hbm) * 1e-6
    return max(memory, computed) + LATENCY + card.gap * scenario.gap


def _float_product_us(card: Card, scenario: Scenario, M: int, N: int, K: int) -> float:
    """In float32, which runs without tensor cores unless TF32 is allowed."""
    rate = card.multiprocessors * FLOAT_FLOPS * card.clock * 0.6
    computed = 2 * M * N * K / rate * 1e-3
    memory = 4 * (M * K + K * N + M * N) / (card.hbm * scenario.skinny) * 1e-6
    return max(computed, memory) + LATENCY + card.gap * scenario.gap


def frozen_us(card: Card, scenario: Scenario, call: Call) -> tuple[float, float]:
    """Of the layer without adapters: its forward, its dx."""
    return (
        product_us(card, scenario, call.M, call.N, call.K),
        product_us(card, scenario, call.M, call.K, call.N),
    )


def _blocks(call: Call) -> Iterator[int]:
    """Rows of the blocks that lora_linear_blas.cpp reads x in."""
    most = max(1, 2**22 // call.K) if call.dropout_p > 0 else call.M
    for first in range(0, call.M, most):
        yield min(most, call.M - first)


def composed_us(card: Card, scenario: Scenario, call: Call) -> tuple[float, float]:
    """csrc/ops/lora_linear_blas.cpp and the base product: forward, backward."""
    M, N, K, r, dropout = call.M, call.N, call.K, call.r, call.dropout_p > 0

    def low_rank(rows: int, columns: int, depth: int) -> float:
        if call.fp32_adapters:
            return _float_product_us(card, scenario, rows, columns, depth)
        return product_us(card, scenario, rows, columns, depth)

    def moving(elements: int, bytes_each: float) -> float:
        return elementwise_us(card, scenario, elements * bytes_each)

    def mask(rows: int) -> float:
        warps = rows * K / 32
        return elementwise_us(card, scenario, rows * K, warps * MASK_INSTRUCTIONS / 4)

    def kept(rows: int) -> float:
        """x of a block as the low-rank products read it."""
        us = mask(rows) + moving(rows * K, 5) if dropout else 0.0
        return us + (moving(rows * K, 6) if call.fp32_adapters else 0.0)

    down = sum(kept(rows) + low_rank(rows, r, K) for rows in _blocks(call))
    forward = down + (0.0 if dropout else moving(M * r, 6))  # h is kept
    forward += low_rank(M, N, r) + (moving(M * N, 6) if call.fp32_adapters else 0.0)
    forward += product_us(card, scenario, M, N, K, onto=True)

    backward = moving(M * N, 6) if call.fp32_adapters else 0.0  # dy
    backward += down if dropout else moving(M * r, 6)  # h
    backward += low_rank(N, r, M) + low_rank(M, r, N)
    for rows in _blocks(call):
        backward += kept(rows) + low_rank(r, K, rows) + low_rank(rows, K, r)
        backward += moving(rows * K, 6) if call.fp32_adapters else 0.0
        backward += moving(rows * K, 5) + moving(r * K, 8) if dropout else 0.0
    return forward, backward + product_us(card, scenario, M, K, N, onto=True)
