"""Times of launches of csrc/kernels: of what they ask for, and of the counts of their code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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


def passes_over_dy(r: int) -> list[tuple[str, ...]]:
    """What each makes on sm_90: dh and dB in one, of more than 64 ranks one each, in groups of
    128."""
    passes: list[tuple[str, ...]] = [("dh", "dB")] if r <= 64 else [("dh",), ("dB",)]
    return [one for one in passes for _ in range(math.ceil(r / 128))]


def made_by(
    names: Sequence[str], over_dy: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...] | None]:
    """What each launch of a direction makes of "h", "dh", "dB", "dA"; None if it is no low-rank
    pass. `over_dy`: what the passes over dy make on sm_90."""
    of_dy = [*over_dy]
    made: list[tuple[str, ...] | None] = []
    for name in names:
        if "_down_sm80" in name or re.search(r"LowRankShape<.*\(Major\)0", name):
            made.append(("h",))
        elif "up_grad_sm80" in name:
            made.append(("dh", "dB"))
        elif "low_rank_sm90" in name and of_dy:
            made.append(of_dy.pop(0))
        elif "low_rank_" in name:
            made.append(("dA",))
        else:
            made.append(("product",) if "product" in name else None)
    return made


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
    adapters: bool = False  # of fp16: what is measured next
    parts_of_h: int = 1  # or of dh: what the last passes left to add
    # dB and dA, which one kernel adds: parts, and elements of each
    left: dict[str, tuple[int, int]] = field(default_factory=dict)

    def times(self, launches: Sequence[RecordedLaunch]) -> Iterator[Pass]:
        names = [short_name(launch.kernel) for launch in launches]
        self.adapters = self.call.fp32_adapters  # then they are measured first
        made = self._made(names)
        for i, (launch, name) in enumerate(zip(launches, names, strict=True)):
            if name.startswith("lora_linear_"):
                what, us, bound = self._small(name, launch)
            elif name.startswith("few_rows_"):
                what, (us, bound) = "h, y", self._few_rows(name, launch)
            elif name.startswith(("product_", "products_")):
                what, (us, bound) = self._product(name, launch)
            else:
                finished = self._is_finished(names[i + 1 :])
                what, (us, bound) = self._low_rank(name, launch, made[i] or (), finished)
            gap = self.card.dependent_gap if launch.dependent else self.card.gap
            blocks = math.prod(launch.grid)
            yield Pass(what, name, blocks, us + gap * self.scenario.gap, bound)

    def _made(self, names: Sequence[str]) -> list[tuple[str, ...] | None]:
        return made_by(names, passes_over_dy(self.call.r))

    def _is_finished(self, following: Sequence[str]) -> bool:
        """Whether a kernel adds the parts of the h or dh that a launch before these made."""
        return bool(following) and "finish" in following[0]

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
        if "measure" in name:  # by 128 blocks for a matrix: adapters, or then h or dh
            size = self.call.r * (max(self.call.N, self.call.K) if self.adapters else self.call.M)
            moved, self.adapters = math.prod(launch.grid) / 128 * 4.0 * size, False
            what, most = "measure", math.ceil(size / 128 / ELEMENTS / 8)
        elif "pack" in name:
            what, most, moved = "pack", 1, elements * 8.0
        elif "reduce" in name:
            left = [*self.left.values()] or [(1, elements)]
            parts = [count for count, _ in left]
            what, most = f"add {' and '.join(map(str, parts))} parts", max(parts)
            moved = sum(size * (4.0 * count + 6) for count, size in left)
            self.left.clear()
        else:
            what, most = f"add {self.parts_of_h} parts", self.parts_of_h
            moved = elements * (4.0 * most + 6)
            self.parts_of_h = 1
        rate = self._l2() * self.card.multiprocessors * self.card.clock * 1e-3
        latency = LATENCY * (1 + (most if what == "measure" else waits(most)))
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

    def _low_rank(
        self, name: str, launch: RecordedLaunch, made: tuple[str, ...], finished: bool
    ) -> tuple[str, tuple[float, str]]:
        call = self.call
        sm90 = "sm90" in name
        pattern = r"LowRankShape<(\d+)" if sm90 else r", (\d+)>"
        rank = int(re.search(pattern, name)[1])  # type: ignore[index]
        makes_h, makes_gradient = bool({"h", "dh"} & {*made}), bool({"dA", "dB"} & {*made})
        of_dy = bool({"dh", "dB"} & {*made})
        columns = call.N if of_dy else call.K
        dropped = call.dropout_p > 0 and not of_dy
        # h and dh are float: for dB and dA they are two 16-bit matrices, as a float adapter is.
        adapters = 2 if call.fp32_adapters else 1
        L_terms, R_terms = adapters * makes_h, 2 * makes_gradient
        # A cluster that adds a gradient lies along the rows, which blockIdx.x counts then, as it
        # does for h on sm_80. One that adds h, or shares h or dh, lies along the columns.
        column_blocks, row_blocks = launch.grid[:2]
        adds_h = sm90 and makes_h and not finished
        along_rows = launch.cluster > 1 and not adds_h and launch.cluster == column_blocks
        if along_rows or "_down_sm80" in name:
            column_blocks, row_blocks = row_blocks, column_blocks
        alone = row_blocks == 1 and not (adds_h and launch.cluster > 1)
        adds_gradient = sm90 and makes_gradient and (along_rows or alone)
        # Blocks along the columns make parts of h or dh, those along the rows parts of gradients.
        own = min(call.r, rank)
        copies = 2 if call.fp32_adapters and call.r <= 32 else 1
        written = 0.0
        if adds_h:  # in float too, or with a remainder
            written += call.M * own * (4 + 2 * copies if "h" in made else 4 * copies)
        elif makes_h:
            self.parts_of_h = column_blocks
            written += 4.0 * call.M * own * column_blocks
        if adds_gradient:
            written += 2.0 * adapters * columns * own
        elif makes_gradient:
            most, before = self.left.get(made[-1], (0, 0))
            self.left[made[-1]] = max(most, row_blocks), before + columns * own
            written += 4.0 * columns * own * row_blocks
        if dropped and makes_gradient:
            written += self._bits_bytes(columns)
        sizes = (columns, rank, L_terms, R_terms, written)
        if sm90:
            blocks = (column_blocks, row_blocks)
            adders = (launch.cluster if adds_h else 0), (launch.cluster if along_rows else 1)
            adders = adders[0], adders[1] if adds_gradient else 0
            sharing = 1 if along_rows else launch.cluster
            timed = self._low_rank_sm90(name, launch, blocks, sizes, dropped, adders, sharing)
        else:
            timed = self._low_rank_sm80(name, launch, sizes, dropped)
        return ", ".join(made), timed

    def _low_rank_sm90(
        self,
        name: str,
        launch: RecordedLaunch,
        blocks: tuple[int, int],
        sizes: tuple[int, int, int, int, float],
        dropped: bool,
        adders: tuple[int, int],
        sharing: int,
    ) -> tuple[float, str]:
        """`adders`: blocks that add h and a gradient, 0 where kernels do that; `sharing`: blocks
        that read the second operand of a gradient together."""
        counts, card = self._kernel(name), self.card
        columns, rank, L_terms, R_terms, written = sizes
        column_tiles = math.ceil(math.ceil(columns / TILE_SM90) / blocks[0])
        row_tiles = math.ceil(math.ceil(self.call.M / TILE_SM90) / blocks[1])
        all_blocks = math.prod(blocks)
        at_once = card.multiprocessors if launch.cluster <= 2 else card.cluster_blocks
        tiles = row_tiles * column_tiles * math.ceil(all_blocks / at_once)
        of_X = min(TILE_SM90, self.call.M) * TILE_SM90 * 2
        of_L = L_terms * TILE_SM90 * rank * 2
        of_R = R_terms * TILE_SM90 * rank * 2 / column_tiles / sharing
        cycles = {"L2": tiles * (of_X + of_L + of_R) / self._l2() + written / all_blocks / 64}
        warps = launch.block / 32 - 4
        step = region_cycles(counts["step"], warps)
        more_terms = max(0, L_terms - 1) + max(0, R_terms - 1)
        step += more_terms * region_cycles(counts["term"], warps)
        if dropped:
            step += self.scenario.stall * region_cycles(counts["dropout"], warps)
        cycles["issue"] = tiles * step
        # Sums of h of each tile of rows, those of a gradient at the end. While the first ones are
        # added the ring fills; the last ones find nothing to hide behind.
        of_h = self._added(adders[0], rank)
        exposed = of_h + self._added(adders[1], rank * column_tiles)
        cycles = {unit: count + (row_tiles - 1) * of_h for unit, count in cycles.items()}
        us, bound = self._slowest(cycles, 2.0 * self.call.M * columns + written)
        return us + exposed / card.clock * 1e-3, bound

    def _added(self, adders: int, rank: int) -> float:
        """Cycles in which so many blocks add 128 rows of so many sums: each puts them into its
        shared memory, and reads its share of all blocks."""
        if adders == 0:
            return 0.0
        moved = TILE_SM90 * rank * 4
        cycles = 2 * moved / 128
        if adders > 1:
            rate = self.card.cluster_read[adders > 2] * self.scenario.cluster
            cycles += moved * (adders - 1) / adders / rate + self.card.cluster_wait
        return cycles

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
