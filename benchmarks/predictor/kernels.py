"""Times of launches of csrc/kernels: of what they ask for, and of the counts of their code."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from predictor.cards import LATENCY, Card, Scenario
from predictor.launches import Call, RecordedLaunch
from predictor.sass import short_name

TILE_SM90 = 128  # rows of every tile of sm_90a, and columns of those of the low-rank passes
TILE_SM80 = 64  # the same of the low-rank passes of sm_80
ELEMENTS = 256  # of a block of the small kernels


# Columns of a result, the depths of its base's segments, and those of its low-rank ones.
Segments = tuple[int, list[int], list[int]]


@dataclass(frozen=True)
class Pass:
    """One launch: what it does, for how long, and what that is bound by."""

    what: str
    kernel: str
    blocks: int
    us: float
    bound: str


def region_cycles(counts: dict[str, int], warps: float) -> float:
    """Cycles in which a multiprocessor's four schedulers issue this code for so many warps. Units
    of 16 lanes take two cycles for a warp, a product of 64 bits twice that; the one unit for memory
    serves all four."""
    busiest = max(
        counts["instructions"],
        2 * counts["alu"],
        2 * counts["imad"] + 4 * counts["wide"],
        4 * counts["memory"],
    )
    return max(1.0, warps / 4) * busiest


def waits(parts: int) -> int:
    """How often a thread that adds so many parts waits for a read: nvcc unrolls that loop by 16,
    what is left by 8 and 4, and reads the rest one by one."""
    left = parts % 16
    return parts // 16 + left // 8 + left % 8 // 4 + left % 4


@dataclass
class Timer:
    """Walks the launches of one direction of a call in their order."""

    card: Card
    scenario: Scenario
    counts: dict[str, Any]  # of sass_counts.json: its kernels
    call: Call
    backward: bool
    base: bool = True  # the product has the base's segment
    low_rank: bool = True  # and those of the low-rank part
    parts_of_h: float = 0.0  # or of dh: what the last passes left to add
    parts_of_gradient: float = 0.0
    reduced: int = 0  # how many gradients were added of their parts

    def times(self, launches: Sequence[RecordedLaunch]) -> Iterator[Pass]:
        for launch in launches:
            name = short_name(launch.kernel)
            if name.startswith("lora_linear_"):
                what, us, bound = self._small(name, launch)
            elif name.startswith("few_rows_"):
                what, (us, bound) = "h, y", self._few_rows(name, launch)
            elif name.startswith(("product_", "products_")):
                what, (us, bound) = self._product(name, launch)
            else:
                what, (us, bound) = self._low_rank(name, launch)
            gap = self.card.dependent_gap if launch.dependent else self.card.gap
            blocks = math.prod(launch.grid)
            yield Pass(what, name, blocks, us + gap * self.scenario.gap, bound)

    # ---- Of all kernels --------------------------------------------------------------------------

    def _kernel(self, name: str) -> dict[str, Any]:
        counts = self.counts.get(name.replace("Fp16", "Bf16"))
        if counts is None:
            raise ValueError(
                f"no counts of {name}: predict.py --refresh-counts, where there is nvcc"
            )
        return counts

    def _l2(self) -> float:
        return self.card.l2 * self.scenario.l2

    def _slowest(self, cycles: dict[str, float], hbm_bytes: float) -> tuple[float, str]:
        """us, and of what: of cycles of the busiest multiprocessor, or of the memory."""
        times = {what: count / self.card.clock * 1e-3 for what, count in cycles.items()}
        times["HBM"] = hbm_bytes / (self.card.hbm * self.scenario.hbm) * 1e-6
        bound = max(times, key=lambda what: times[what])
        return times[bound] + LATENCY, bound

    def _resident(self, launch: RecordedLaunch, registers: int) -> int:
        """Blocks that a multiprocessor runs at once."""
        fit = self.card.shared // (launch.shared_bytes + 1024)
        fit = min(fit, self.card.threads // launch.block, 65536 // (registers * launch.block))
        return max(1, fit)

    # ---- Small kernels ---------------------------------------------------------------------------

    def _small(self, name: str, launch: RecordedLaunch) -> tuple[str, float, str]:
        elements = math.prod(launch.grid) * ELEMENTS
        if "pack" in name.lower():
            what, parts, moved = "pack", 1.0, elements * 8.0
        else:
            reduces = "reduce" in name.lower()
            parts = self.parts_of_gradient if reduces else self.parts_of_h
            what = f"add {parts:.0f} parts"
            moved = elements * (4 * parts + 6)
            self.reduced += reduces
        rate = self._l2() * self.card.multiprocessors * self.card.clock * 1e-3
        latency = LATENCY * (1 + waits(int(parts)))
        return what, max(latency, moved / rate * 1e-6), "L2"

    # ---- Forward of few rows ---------------------------------------------------------------------

    def _few_rows(self, name: str, launch: RecordedLaunch) -> tuple[float, str]:
        """Blocks read their rows of the weight once, and x and lora_A beside them: all columns, or
        the part of a block of a cluster."""
        call = self.call
        shape = re.search(r"FewRowsShape<(\d+), (\d+)", name)
        rows, splits = (int(size) for size in shape.groups())  # type: ignore[union-attr]
        groups, depths = (2, 4) if splits == 1 else (4, 2)
        width = 8 * splits * math.ceil(call.N * splits / launch.grid[0] / (8 * splits))
        tiles, rank_tiles = (math.ceil(size / 8 / groups) for size in (width, call.r))
        # Of a step of 64 columns
        of_A = (4 if call.fp32_adapters else 2) * call.r
        read = 64.0 * (2 * (width + call.M) + of_A)
        by_warps = 64.0 * (2 * (width + rows * groups) + of_A)
        # Counted is a step of as many columns and ranks as a warp may have.
        most = self._kernel(re.sub(r"float(?=, FewRows)", "Bf16", name))["step"]
        issued = {  # of four tiles of ranks; floats take more for each
            unit: most[unit] + (count - most[unit]) * rank_tiles // 4
            for unit, count in self._kernel(name)["step"].items()
        }
        products = 4 // depths * rows // 16 * (tiles + rank_tiles)
        issued["instructions"] -= most["tensor"] - products
        step = {
            "L2": read / self._l2(),
            "shared memory": (read + by_warps) / 128,
            "issue": region_cycles(issued, 8),
        }
        bound = max(step, key=lambda unit: step[unit])
        # Sums of all warps, written and read; those of other blocks as fast as from L2
        sums = 4.0 * depths * rows
        from_others = sums * width * (splits - 1) / splits
        own = sums * (2 * width + (1 + groups) * call.r) - from_others
        end = own / 128 + from_others / self._l2()
        steps = math.ceil(math.ceil(call.K / 64) / splits)
        rounds = math.ceil(launch.grid[0] / self.card.multiprocessors)
        cycles = {bound: rounds * (steps * step[bound] + end)}
        us, bound = self._slowest(cycles, 2.0 * call.K * call.N)
        # The first reads, and those after two barriers; those of a cluster take longer.
        return us + (2 if splits == 1 else 3) * LATENCY, bound

    # ---- The product -----------------------------------------------------------------------------

    def _depths(self) -> tuple[int, int, list[int]]:
        """Columns of the result, the base's depth, and those of the low-rank segments."""
        call = self.call
        columns, depth = (call.K, call.N) if self.backward else (call.N, call.K)
        terms = (2 if call.fp32_adapters else 1) if self.low_rank else 0
        return columns, depth if self.base else 0, [call.r] * terms

    def _product(self, name: str, launch: RecordedLaunch) -> tuple[str, tuple[float, str]]:
        what = "dx" if self.backward else "y"
        if "sm90" in name:
            return what, self._product_sm90(name, launch)
        return what, self._product_sm80(name, launch)

    def _masked(self) -> bool:
        """By bits, which the pass over x has left: all calls here want dA."""
        return self.backward and self.call.dropout_p > 0

    def _bits_bytes(self, columns: int) -> float:
        return self.call.M * columns / 8

    def _product_bytes(self, columns: int, depth: int) -> float:
        M, r = self.call.M, self.call.r
        bits = self._bits_bytes(columns) if self._masked() else 0.0
        return 2.0 * (M * depth + depth * columns + M * columns + r * (M + columns)) + bits

    def _product_sm90(self, name: str, launch: RecordedLaunch) -> tuple[float, str]:
        columns, depth, ranks = self._depths()
        moved = self._product_bytes(columns, depth)
        return self._products_sm90(name, launch, [(columns, [depth], ranks)], moved)

    def _products_sm90(
        self, name: str, launch: RecordedLaunch, products: list[Segments], moved: float
    ) -> tuple[float, str]:
        """Several beside each other: the busiest block has tiles of all of them."""
        counts, card, scenario = self._kernel(name), self.card, self.scenario
        width = int(re.search(r"ProductShape<(\d+)", name)[1])  # type: ignore[index]
        rows = math.ceil(math.ceil(self.call.M / TILE_SM90) / launch.cluster) * launch.cluster
        tensor = 2 * TILE_SM90 * width * 64 / card.flops_per_cycle
        # Rows that are not there are zeros of TMA's, which nobody reads. Blocks of a cluster lie
        # along M, and share what is read of B.
        read = min(TILE_SM90, self.call.M) + width / launch.cluster
        feed = read * 128 / self._l2()
        warps = launch.block / 32 - 4  # those of the warpgroups that multiply
        idle = scenario.tile_gap + scenario.stall * region_cycles(counts["end_of_tile"], warps)
        if self._masked():
            idle += scenario.tile_gap
            idle += scenario.stall * region_cycles(counts["bits"], warps)
        tiles, cycles = 0, 0.0
        for columns, depths, ranks in products:
            steps = sum(math.ceil(depth / 64) for depth in depths)
            # Of a low-rank segment as many products as its rank needs, bytes of as many columns.
            short = sum(
                max(tensor * math.ceil(r / 16) / 4, feed * min(1.0, r / 64) * math.ceil(r / 64))
                for r in ranks
            )
            own = rows * math.ceil(columns / width)
            tiles, cycles = tiles + own, cycles + own * (steps * max(tensor, feed) + short + idle)
        rounds = math.ceil(tiles / launch.grid[0])
        bound = "L2" if feed > tensor else "tensor"
        return self._slowest({bound: rounds * cycles / tiles}, moved)

    def _product_sm80(self, name: str, launch: RecordedLaunch) -> tuple[float, str]:
        counts, card, scenario = self._kernel(name), self.card, self.scenario
        shape = re.search(r"ProductShape<(\d+), (\d+), (\d+), (\d+)", name)
        rows, width, warp_rows, warp_columns = (int(size) for size in shape.groups())  # type: ignore[union-attr]
        columns, depth, ranks = self._depths()
        warps = launch.block // 32
        resident = self._resident(launch, counts["registers"])
        stage = (rows + width) * 128
        step = {
            "tensor": 2 * rows * width * 64 / card.flops_per_cycle,
            "issue": region_cycles(counts["step"], warps),
            # 128 bytes a cycle, written once and read by ldmatrix
            "shared memory": (warps * (warp_rows + warp_columns) * 128 + stage) / 128,
            "L2": (min(rows, self.call.M) + width) * 128 / self._l2(),
        }
        bound = max(step, key=lambda unit: step[unit])
        waiting = scenario.step_gap / resident  # another block's products fill it
        steps = math.ceil(depth / 64) + sum(math.ceil(r / 64) for r in ranks)
        end = scenario.tile_gap + scenario.stall * region_cycles(counts["end_of_tile"], warps)
        if self._masked():
            # Where the bits are needed they are asked for
            reading = LATENCY * 1e3 * card.clock
            end += reading + scenario.stall * region_cycles(counts["bits"], warps)
        cycles = steps * (step[bound] + waiting) + end / resident
        rounds = math.ceil(launch.grid[0] / card.multiprocessors)
        return self._slowest({bound: rounds * cycles}, self._product_bytes(columns, depth))

    # ---- The low-rank passes ---------------------------------------------------------------------

    def _low_rank(self, name: str, launch: RecordedLaunch) -> tuple[str, tuple[float, str]]:
        call = self.call
        if "sm90" in name:
            shape = re.search(r"LowRankShape<(\d+), (\w+), (\w+), \(Major\)(\d)", name)
            rank, P, Q, major = shape.groups()  # type: ignore[union-attr]
            down = P == "true" and major == "0"
            of_dy = not down and self.reduced == 0
            makes_h, makes_gradient = P == "true" and (down or of_dy), Q == "true"
        else:
            rank = re.search(r", (\d+)>", name)[1]  # type: ignore[index]
            down, of_dy = "_down_sm80" in name, "up_grad" in name
            makes_h, makes_gradient = down or of_dy, not down
        columns = call.N if of_dy else call.K
        dropped = call.dropout_p > 0 and not of_dy
        # h and dh are float: for dB and dA they are two 16-bit matrices, as a float adapter is.
        adapters = 2 if call.fp32_adapters else 1
        L_terms, R_terms = adapters * makes_h, 2 * makes_gradient
        # Blocks along the columns make parts of h or dh, those along the rows parts of gradients.
        of_h = launch.grid[1 if "_down_sm80" in name else 0] * (L_terms > 0)
        of_gradient = launch.grid[1] * (R_terms > 0)
        self.parts_of_h = of_h or self.parts_of_h
        self.parts_of_gradient = of_gradient or self.parts_of_gradient
        written = 4.0 * min(call.r, int(rank)) * (call.M * of_h + columns * of_gradient)
        if dropped and makes_gradient:
            written += self._bits_bytes(columns)
        names = ("dh", "dB") if of_dy else ("h", "dA")
        what = ", ".join(itertools.compress(names, (makes_h, makes_gradient)))
        sizes = (columns, int(rank), L_terms, R_terms, written)
        if "sm90" in name:
            return what, self._low_rank_sm90(name, launch, sizes, dropped)
        return what, self._low_rank_sm80(name, launch, sizes, dropped)

    def _low_rank_sm90(
        self,
        name: str,
        launch: RecordedLaunch,
        sizes: tuple[int, int, int, int, float],
        dropped: bool,
    ) -> tuple[float, str]:
        counts, card = self._kernel(name), self.card
        columns, rank, L_terms, R_terms, parts = sizes
        row_tiles = math.ceil(math.ceil(self.call.M / TILE_SM90) / launch.grid[1])
        column_tiles = math.ceil(math.ceil(columns / TILE_SM90) / launch.grid[0])
        blocks = launch.grid[0] * launch.grid[1]
        tiles = row_tiles * column_tiles * math.ceil(blocks / card.multiprocessors)
        of_X = min(TILE_SM90, self.call.M) * TILE_SM90 * 2
        of_L = L_terms * TILE_SM90 * rank * 2
        of_R = R_terms * TILE_SM90 * rank * 2 / column_tiles
        cycles = {"L2": tiles * (of_X + of_L + of_R) / self._l2() + parts / blocks / 64}
        warps = launch.block / 32 - 4
        step = region_cycles(counts["step"], warps)
        more_terms = max(0, L_terms - 1) + max(0, R_terms - 1)
        step += more_terms * region_cycles(counts["term"], warps)
        if dropped:
            step += self.scenario.stall * region_cycles(counts["dropout"], warps)
        cycles["issue"] = tiles * step
        return self._slowest(cycles, 2.0 * self.call.M * columns + parts)

    def _low_rank_sm80(
        self,
        name: str,
        launch: RecordedLaunch,
        sizes: tuple[int, int, int, int, float],
        dropped: bool,
    ) -> tuple[float, str]:
        counts, card = self._kernel(name), self.card
        columns, rank, L_terms, R_terms, parts = sizes
        blocks = launch.grid[0] * launch.grid[1]
        # Tiles of 64 x 64 of x or dy, but of 64 x 128 in down_grad
        width = 128 if "down_grad" in name else TILE_SM80
        tiles = math.ceil(self.call.M / TILE_SM80) * math.ceil(columns / width)
        per_block = math.ceil(tiles / blocks)
        resident = self._resident(launch, counts["registers"])
        rounds = math.ceil(blocks / card.multiprocessors)
        moved = min(TILE_SM80, self.call.M) * width * 2 + (L_terms + R_terms) * 64 * rank * 2
        step = region_cycles(counts["step"], launch.block / 32)
        if dropped:  # of 128 columns at once
            often = width / 128
            step += self.scenario.stall * often * region_cycles(counts["dropout"], 4)
        step += self.scenario.step_gap * 4 / resident
        cycles = {"L2": rounds * per_block * moved / self._l2(), "issue": rounds * per_block * step}
        return self._slowest(cycles, 2.0 * self.call.M * columns + parts)
