"""What nvcc makes of the CUDA kernels that walk rows: how wide they read and write, and what a rank
costs. Ceilings as in test_sass.py."""

from __future__ import annotations

from collections import Counter

import pytest
from predictor import sass
from predictor.flow import Flow

UNITS = ("column_scale", "lora_embedding", "weight_norm")


@pytest.fixture(scope="module", params=UNITS)
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[sass.Kernel]:
    try:
        nvcc = sass.version(sass.find_nvcc())
        source = sass.KERNELS / f"{request.param}.cu"
        found = sass.compile_source(source, "90a", tmp_path_factory.mktemp("cubins"))
    except sass.NoTool as error:
        pytest.skip(str(error))
    if not nvcc.startswith("13.0."):
        pytest.skip(f"the ceilings are of nvcc 13.0, and this is {nvcc}")
    return found


def opcodes(flow: Flow, blocks: frozenset[int] | None = None) -> Counter[str]:
    return Counter(
        one.opcode
        for at, block in enumerate(flow.blocks)
        if blocks is None or at in blocks
        for one in block.instructions
    )


def aligned(kernel: sass.Kernel) -> bool:
    return "true>" in kernel.name


def test_sixteen_bytes_at_a_time(kernels: list[sass.Kernel]) -> None:
    assert any(map(aligned, kernels)) and not all(map(aligned, kernels))
    for kernel in kernels:
        found = opcodes(kernel.flow)
        assert not any(name.startswith("LDG.E.U8") for name in found), kernel.name
        assert (found["LDG.E.128"] > 0) == aligned(kernel), kernel.name
        stores = "weight_norm" not in kernel.name
        assert (found["STG.E.128"] > 0) == (aligned(kernel) and stores), kernel.name
        if aligned(kernel) and "column_scale" in kernel.name:
            assert found["LDG.E.U16"] == found["LDG.E"] == found["STG.E.U16"] == 0, kernel.name


def test_two_blocks_a_multiprocessor(kernels: list[sass.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.registers <= 128 and kernel.spilled == kernel.stack == 0, kernel.name


def test_ranks(kernels: list[sass.Kernel]) -> None:
    """Two at a time, 32 products of a lane each: three reads of shared memory, of 16 bytes, and
    few instructions besides. On tensor cores 16 at a time: eight products of a warp, of a float
    adapter three times as many, and half as many reads."""
    for kernel in kernels:
        if "column_scale" in kernel.name:
            continue
        inner = [opcodes(kernel.flow, loop.blocks) for loop in kernel.flow.loops]
        if "weight_norm" in kernel.name and "<float" not in kernel.name:
            terms = 2 if ", float," in kernel.name else 1
            found = [
                {"HMMA": sum(n for name, n in one.items() if name.startswith("HMMA")), **one}
                for one in inner
            ]
            step = min((one for one in found if one["HMMA"]), key=lambda one: sum(one.values()))
            assert step["HMMA"] == (8 if terms == 1 else 24), kernel.name
            assert step["LDSM.16.MT88.4"] == 4 * terms and step["LDSM.16.M88.4"] == terms
            assert sum(step.values()) - step["HMMA"] <= (22 if terms == 1 else 43), kernel.name
            continue
        (ranks,) = [found for found in inner if found["FFMA"] == 64]
        assert ranks["LDS.128"] == 6 and ranks.total() <= 79, kernel.name
        # The factors come four at a time.
        fills = [found for found in inner if found["STS"] == 4 and found["FFMA"] == 0]
        assert fills and all(found.total() <= 100 for found in fills), kernel.name
