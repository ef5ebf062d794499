"""What the model knows of a GPU, and what it assumes."""

from __future__ import annotations

from dataclasses import dataclass

LATENCY = 0.7  # us of a read that waits, once for each kernel: assumed


@dataclass(frozen=True)
class Card:
    """Of each number: where it is from. "Assumed": nobody measured it for this project."""

    name: str
    capability: int  # 90 for sm_90
    multiprocessors: int  # NVIDIA's data sheet
    # 16-bit with float sums, of a multiprocessor in a cycle: the data sheet's dense rate over
    # multiprocessors and boost clock.
    flops_per_cycle: int
    clock: float  # GHz while large products run: from `cublas`, see blas.sustained_clock
    cublas: float  # TFLOP/s of cuBLAS, 8192 x 8192 x 8192, bf16
    cublas_source: str
    hbm: float  # TB/s, NVIDIA's data sheet
    # Bytes that L2 brings to one multiprocessor in a cycle while all of them read. sm_90: fast.cu's
    # kernel without multicast, which needs 43 to 48, is at 0.974 of cuBLAS; others assumed.
    l2: float
    shared: int  # bytes of shared memory of a multiprocessor, CUDA's programming guide
    threads: int  # of a multiprocessor, the same
    # Distributed shared memory, which sm_90 has: bytes that a multiprocessor reads from others in a
    # cycle, in clusters of two and of more; cycles in which the blocks of a cluster wait for each
    # other, twice, and for a first read; blocks that run at once in clusters of four or eight.
    cluster_read: tuple[float, float]
    cluster_wait: float
    cluster_blocks: int
    gap: float  # us from the end of a kernel to the work of the next: assumed
    dependent_gap: float  # us, where the next one was launched before: assumed


# Assumed, as all that is said of clusters: blocks read from each other at a third of L2's rate, and
# multiprocessors lie in groups of 16 or 18, of which clusters of four or eight fill 16.
_CLUSTER_READ = (16.0, 13.0)

CARDS = {
    "h100": Card(
        "H100 SXM", 90, 132, 4096, 1.55, 798, "fast.cu's README, H100 SXM, kernel 0",
        3.35, 46.7, 228 * 1024, 2048, _CLUSTER_READ, 900, 128, 2.0, 1.2,
    ),
    "h200": Card(
        "H200", 90, 132, 4096, 1.40, 720, "assumed: an H100's rate under a lasting load",
        4.8, 46.7, 228 * 1024, 2048, _CLUSTER_READ, 900, 128, 2.0, 1.2,
    ),
    "a100": Card(
        "A100 80GB SXM", 80, 108, 2048, 1.21, 265, "assumed: 0.85 of the data sheet's 312",
        2.04, 40.0, 164 * 1024, 2048, (0, 0), 0, 0, 2.5, 2.5,
    ),
    "4090": Card(
        "RTX 4090", 89, 128, 512, 2.37, 155, "assumed: 0.94 of the data sheet's 165",
        1.01, 16.0, 100 * 1024, 1536, (0, 0), 0, 0, 2.0, 2.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """How well a kernel does what it could: all assumed, but for what the calibration fixes."""

    name: str
    hbm: float  # of the data sheet's rate
    l2: float  # of the card's
    cluster: float  # of what the card's blocks read from each other
    stall: float  # cycles for each that an instruction of the end of a tile or of dropout takes
    tile_gap: float  # cycles without products between two tiles, beside those instructions
    step_gap: float  # sm_80: cycles of a step in which all warps wait for each other
    gap: float  # of the card's
    skinny: float  # cuBLAS's share of the memory's rate in products of few columns
    # Whether cuBLAS has the rate of its large product everywhere: a last round that leaves
    # multiprocessors idle, and tiles of short K, would cost it nothing.
    flat: bool


SCENARIOS = {
    "optimistic": Scenario("optimistic", 0.93, 1.05, 1.3, 1.0, 100, 60, 0.7, 0.75, False),
    "central": Scenario("central", 0.90, 1.0, 1.0, 1.1, 250, 150, 1.0, 0.8, False),
    "pessimistic": Scenario("pessimistic", 0.80, 0.95, 0.6, 1.4, 600, 300, 1.6, 0.85, True),
}
