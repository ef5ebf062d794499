"""Mistakes planted in the CUDA kernels, one at a time: the emulated tests must notice each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from emulated import ROOT, compile_source

# The product's kernels and the low-rank passes of sm_90a are checked by programs of tests/simt:
# program → what is planted → (file, what stands there, what is put in its place)
PRODUCTS = {
    "test_product_sm80": {
        "no wait for the copies": (
            "product_sm80.h", "arch::cp_async_wait<Shape::kRing - 2>();", "",
        ),
        "a wait for one group too few": (
            "product_sm80.h", "cp_async_wait<Shape::kRing - 2>", "cp_async_wait<Shape::kRing - 1>",
        ),
        "no barrier after the wait": (
            "product_sm80.h", "__syncthreads();", "",
        ),
        "a slot filled while it is read": (
            "product_sm80.h",
            "P::load(stage(step + Shape::kRing - 1), params, loading, m, n, thread);",
            "P::load(stage(step), params, loading, m, n, thread);",
        ),
        "stores below the last row": (
            "product_sm80.h", "if (m >= params.M) continue;", "",
        ),
        "stores right of the last column": (
            "product_sm80.h", "if (n >= params.N) continue;", "",
        ),
        "a segment one step too long": (
            "product_sm80.h", "if (k >= params.segments[segment].a.columns)",
            "if (k > params.segments[segment].a.columns)",
        ),
        "a mask of the wrong rows": (
            "product_sm80.h", "params.threshold, m + warp_row,", "params.threshold, m,",
        ),
        "rows read beyond the matrix": (
            "tile_sm80.h", "bool inside = r < rows;", "bool inside = r <= rows;",
        ),
        "chunks not permuted for one operand": (
            "tile_sm80.h", "Tile::offset(row + lane % 16, column / 8 + lane / 16)",
            "(row + lane % 16) * Tile::kChunks * 16 + (column / 8 + lane / 16) * 16",
        ),
    },
    "test_product_sm90": {
        "sm90: no wait for a full slot": (
            "product_sm90.h", "arch::mbarrier_wait(ring.full(at.slot), at.parity);", "",
        ),
        "sm90: no wait for an empty slot": (
            "product_sm90.h", "arch::mbarrier_wait(ring.empty(at.slot), at.parity ^ 1);", "",
        ),
        "sm90: a wait for the turn before": (
            "product_sm90.h", "ring.empty(at.slot), at.parity ^ 1", "ring.empty(at.slot), at.parity",
        ),
        "sm90: turns that are not counted": (
            "product_sm90.h", "slot = 0, parity ^= 1;", "slot = 0;",
        ),
        "sm90: a slot that is not released": (
            "product_sm90.h", "arch::mbarrier_arrive(ring.empty(held));", "{}",
        ),
        "sm90: a slot released by too few warps": (
            "product_sm90.h", "Shape::kMultipliers * kWarpgroup / 32);", "1);",
        ),
        "sm90: a slot released while it is read": (
            "product_sm90.h", "release();\n          held = at.slot;",
            "held = at.slot;\n          release();",
        ),
        "sm90: no wait for the products of a slot": (
            "product_sm90.h", "arch::wgmma_wait<1>();", "",
        ),
        "sm90: no wait before the mask": (
            "product_sm90.h", "arch::wgmma_wait<0>();\n          arch::wgmma_fence_sums",
            "arch::wgmma_fence_sums",
        ),
        "sm90: no wait before the store": (
            "product_sm90.h", "arch::wgmma_wait<0>();\n      arch::wgmma_fence_sums",
            "arch::wgmma_fence_sums",
        ),
        "sm90: too few bytes expected": (
            "product_sm90.h", "mbarrier_arrive_expect_tx(full, Shape::kStageBytes)",
            "mbarrier_arrive_expect_tx(full, Shape::kStageBytes - 128)",
        ),
        "sm90: no fence after the barriers are made": (
            "product_sm90.h", "arch::fence_mbarrier_init();", "",
        ),
        "sm90: no barrier after the barriers are made": (
            "product_sm90.h", "__syncthreads();", "",
        ),
        "sm90: no fence before wgmma": (
            "product_sm90.h", "arch::wgmma_fence();", "",
        ),
        "sm90: sums that begin with those of the last tile": (
            "product_sm90.h", "bool accumulate = false;", "bool accumulate = index > blockIdx.x;",
        ),
        "sm90: a segment without its last columns": (
            "product_sm90.h", "k < depth; k += 16", "k + 16 < depth; k += 16",
        ),
        "sm90: a segment one stage too long": (
            "product_sm90.h", "k < params.depth[segment]; k", "k <= params.depth[segment]; k",
        ),
        "sm90: stores below the last row": (
            "product_sm90.h", "if (m < params.M && n < params.N)", "if (n < params.N)",
        ),
        "sm90: stores right of the last column": (
            "product_sm90.h", "if (m < params.M && n < params.N)", "if (m < params.M)",
        ),
        "sm90: both warpgroups multiply the same rows": (
            "product_sm90.h", "number * 64 * kRowBytes", "0 * kRowBytes",
        ),
        "sm90: a mask of the wrong columns": (
            "product_sm90.h", "column / kDropoutBlock + block", "block",
        ),
        "sm90: boxes of the weight at the wrong distance": (
            "product_sm90.h", "Shape::kK * kRowBytes,", "kRowBytes,",
        ),
        "sm90: tiles left out": (
            "product_sm90.h", "index / (kBand * columns) * kBand", "0",
        ),
        "sm90: no wait for the kernel before": (
            "product_sm90.h", "arch::wait_for_previous_kernel();", "",
        ),
    },
    "test_low_rank_sm90": {
        "low rank: no wait for a full slot": (
            "low_rank_sm90.h", "arch::mbarrier_wait(stages.full(at.slot), at.parity);", "",
        ),
        "low rank: no wait for an empty slot": (
            "low_rank_sm90.h", "arch::mbarrier_wait(stages.empty(at.slot), at.parity ^ 1);", "",
        ),
        "low rank: no wait for a full slot of R": (
            "low_rank_sm90.h", "arch::mbarrier_wait(Rs.full(at_R.slot), at_R.parity);", "",
        ),
        "low rank: no wait for an empty slot of R": (
            "low_rank_sm90.h", "arch::mbarrier_wait(Rs.empty(at_R.slot), at_R.parity ^ 1);", "",
        ),
        "low rank: turns that are not counted": (
            "low_rank_sm90.h", "slot = 0, parity ^= 1;", "slot = 0;",
        ),
        "low rank: a slot released while it is read": (
            "low_rank_sm90.h",
            "arch::wgmma_wait<0>();\n          release(empty);",
            "release(empty);\n          arch::wgmma_wait<0>();",
        ),
        "low rank: a slot that is not released": (
            "low_rank_sm90.h", "release(empty);", "",
        ),
        "low rank: a slot of R that is not released": (
            "low_rank_sm90.h", "release(Rs.empty(at_R.slot));", "",
        ),
        "low rank: a slot released by too few warps": (
            "low_rank_sm90.h", "stages.initialise(Shape::kMultipliers * kWarpgroup / 32);",
            "stages.initialise(1);",
        ),
        "low rank: no wait for the products": (
            "low_rank_sm90.h", "arch::wgmma_wait<0>();", "",
        ),
        "low rank: no fence before wgmma": (
            "low_rank_tile_sm90.h", "arch::wgmma_fence();", "",
        ),
        "low rank: too few bytes expected": (
            "low_rank_sm90.h", "static_cast<uint32_t>(bytes)", "static_cast<uint32_t>(bytes - 128)",
        ),
        "low rank: no fence after the barriers are made": (
            "low_rank_sm90.h", "arch::fence_mbarrier_init();", "",
        ),
        "low rank: no barrier after the barriers are made": (
            "low_rank_sm90.h", "__syncthreads();", "",
        ),
        "low rank: no fence after dropout": (
            "low_rank_sm90.h", "arch::fence_proxy_async();", "",
        ),
        "low rank: a fence after dropout by one thread": (
            "low_rank_sm90.h", "arch::fence_proxy_async();",
            "if (thread == 0) arch::fence_proxy_async();",
        ),
        "low rank: no barrier after dropout, of Q": (
            "low_rank_sm90.h", "arch::barrier_sync(1, Shape::kMultipliers * kWarpgroup);", "",
        ),
        "low rank: a mask of the wrong rows": (
            "low_rank_sm90.h", "int64_t{row_tile} * Shape::kRows + number * 64, column_tile",
            "number * 64, column_tile",
        ),
        "low rank: a mask of the wrong columns": (
            "low_rank_sm90.h", "+ number * 64, column_tile, thread", "+ number * 64, 0, thread",
        ),
        "low rank: a mask for the tile before": (
            "low_rank_sm90.h", "row_ends ? walk.first_column : tile + 1);", "tile);",
        ),
        "low rank: a mask for a tile beyond the last": (
            "low_rank_sm90.h", "params.dropout && !(row_ends && row_tile + 1 == walk.last_row);",
            "params.dropout;",
        ),
        "low rank: a mask that is not swizzled": (
            "low_rank_tile_sm90.h",
            "arch::swizzled(static_cast<uint32_t>(own_row * kRowBytes + chunk * 16), "
            "Swizzle::k128)",
            "static_cast<uint32_t>(own_row * kRowBytes + chunk * 16)",
        ),
        "low rank: the last columns left out": (
            "low_rank_sm90.h", "(size + step - 1) / step", "size / step",
        ),
        "low rank: one tile too many": (
            "low_rank_sm90.h", "return wanted < all ? wanted : all;", "return wanted;",
        ),
        "low rank: stores below the last row": (
            "low_rank_tile_sm90.h", "if (row + half * 8 >= rows) continue;", "",
        ),
        "low rank: stores right of the last column": (
            "low_rank_tile_sm90.h", "if (column < rank) *", "*",
        ),
        "low rank: stores right of the last column, one by one": (
            "low_rank_tile_sm90.h", "if (column + 1 < rank)", "",
        ),
        "low rank: P that begins with that of the last rows": (
            "low_rank_sm90.h", "multiply_p(p, stage, tile == walk.first_column);",
            "multiply_p(p, stage, row_tile == walk.first_row && tile == walk.first_column);",
        ),
        "low rank: Q that begins anew with each tile of rows": (
            "low_rank_sm90.h", "row_tile == walk.first_row);", "true);",
        ),
        "low rank: a remainder that is left out": (
            "low_rank_sm90.h", "term < params.R_terms; ++term) {\n        Tile",
            "term < 1; ++term) {\n        Tile",
        ),
        "low rank: both warpgroups multiply the same rows": (
            "low_rank_sm90.h", "Tile::multiply_p(p, stage + static_cast<uint32_t>(number *",
            "Tile::multiply_p(p, stage + static_cast<uint32_t>(0 *",
        ),
        "low rank: blocks that write the same part": (
            "low_rank_sm90.h", "int64_t{blockIdx.y} * params.Q_part", "0",
        ),
        "low rank: no wait for the kernel before": (
            "low_rank_sm90.h", "arch::wait_for_previous_kernel();", "",
        ),
        "low rank: a thread that does not wait for the kernel before": (
            "low_rank_sm90.h", "arch::wait_for_previous_kernel();",
            "if (thread >= kWarpgroup) arch::wait_for_previous_kernel();",
        ),
    },
}  # fmt: skip

# The others by forward and backward as a whole.
LAUNCHES = {
    "down: no wait for the copies": (
        "low_rank_down_sm80.h", "arch::cp_async_wait<Shape::kRing - 2>();", "",
    ),
    "down: splits that overlap": (
        "low_rank_down_sm80.h", "const int64_t first = steps * blockIdx.y / params.splits;",
        "const int64_t first = 0;",
    ),
    "up_grad: no barrier after the wait": (
        "low_rank_up_grad_sm80.h",
        "__syncthreads();  // the stage", "// the stage",
    ),
    "up_grad: h of the next rows over those that are read": (
        "low_rank_up_grad_sm80.h", "const int turn = step / column_tiles % 2;", "const int turn = 0;",
    ),
    "up_grad: no barrier before the sums are stored": (
        "low_rank_up_grad_sm80.h", "  if (params.dB) {\n    __syncthreads();", "  if (params.dB) {",
    ),
    "down_grad: no wait for the copies": (
        "low_rank_down_grad_sm80.h", "arch::cp_async_wait<0>();", "",
    ),
    "down_grad: a mask of the wrong columns": (
        "low_rank_down_grad_sm80.h", "params.threshold, m + k, blockIdx.x, warp * kSlots, lane",
        "params.threshold, m + k, blockIdx.x, 0, lane",
    ),
    "no wait for the kernel before": (
        "elementwise.h", "arch::wait_for_previous_kernel();", "",
    ),
    "a factor of the scaling that is not read": (
        "lora_linear_passes.h", "factor ? value * *factor : value", "value",
    ),
}  # fmt: skip

MISTAKES = LAUNCHES | {name: m for mistakes in PRODUCTS.values() for name, m in mistakes.items()}
NONE = "none"

# Small sizes that reach every part: several tiles and steps, several splits, tails.
SCRIPT = """
import itertools, sys
from pathlib import Path
import test_kernels
from emulated import COMPLETIONS, EmulatedKernels
options = ("-O1", "-DSM80_BF16_ONLY")
kernels = EmulatedKernels.build(Path(sys.argv[1]), *options, csrc=Path(sys.argv[2]))
print("compiled", flush=True)
for size, schedule in itertools.product([(37, 192, 200, 16), (364, 200, 72, 8)],
                                        itertools.product(COMPLETIONS, range(4))):
    test_kernels.check(kernels, size, "bf16", 0.1, schedule)
print("no mistake noticed")
"""

Result = subprocess.CompletedProcess[str]


def plant(mistake: str, folder: Path) -> Path:
    """A copy of csrc with the mistake."""
    csrc = folder / "csrc"
    for part in ("common", "cuda", "kernels"):
        shutil.copytree(ROOT / "csrc" / part, csrc / part)
    if mistake != NONE:
        name, right, wrong = MISTAKES[mistake]
        file = csrc / "kernels" / name
        text = file.read_text()
        assert text.count(right) >= 1, f"{name} no longer holds what this test replaces"
        file.write_text(text.replace(right, wrong))
    return csrc


def run_program(program: str, mistake: str, folder: Path) -> Result:
    csrc, target = plant(mistake, folder), folder / program
    source = ROOT / "tests" / "simt" / f"{program}.cpp"
    compile_source(source, target, "-O1", "-Wno-psabi", "-DBF16_ONLY", csrc=csrc)
    return subprocess.run([str(target), "-x"], capture_output=True, text=True, timeout=300)


def run_launches(mistake: str, folder: Path) -> Result:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(plant(mistake, folder))]
    return subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Future[Result]]:
    """What the tests that are to run need, two at a time."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    items = [item for item in request.session.items if item.path == request.path]
    pool = ThreadPoolExecutor(2)
    started = {}
    for item in items:
        driver, mistake = (item.callspec.params[name] for name in ("driver", "mistake"))  # type: ignore[attr-defined]
        folder = tmp_path_factory.mktemp("mistake")
        started[driver, mistake] = (
            pool.submit(run_launches, mistake, folder)
            if driver == "launches"
            else pool.submit(run_program, driver, mistake, folder)
        )
    pool.shutdown(wait=False)
    return started


WANTED = [("launches", mistake) for mistake in LAUNCHES]
WANTED += [(program, mistake) for program in PRODUCTS for mistake in PRODUCTS[program]]


@pytest.mark.parametrize(("driver", "mistake"), WANTED, ids=lambda value: value)
def test_planted_mistake_is_noticed(
    results: dict[tuple[str, str], Future[Result]], driver: str, mistake: str
) -> None:
    result = results[driver, mistake].result()
    if driver == "launches":
        # Noticed by a check or by the emulator, both exceptions; not by the compiler, and no crash.
        assert result.stdout.strip() == "compiled", result.stderr[-3000:]
        assert result.returncode == 1 and "Error" in result.stderr, result.stderr[-3000:]
    else:
        assert result.returncode == 1 and "FAILED" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("mistake", [NONE])
@pytest.mark.parametrize("driver", ["launches", *PRODUCTS])
def test_nothing_is_noticed_in_the_right_kernels(
    results: dict[tuple[str, str], Future[Result]], driver: str, mistake: str
) -> None:
    result = results[driver, mistake].result()
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    if driver == "launches":
        assert "no mistake noticed" in result.stdout
