"""What nvcc makes of the CUDA kernels: instructions that are counted in its machine code.

Each ceiling is what nvcc 13.0 makes today, so that no change makes it more without a word. Who
makes it less lowers the ceiling.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from predictor import sass
from predictor.flow import Flow


@dataclass
class Compiled:
    """Counts of the kernels of each unit, which is compiled once."""

    folder: Path
    units: dict[str, dict[str, Any]]

    def __getitem__(self, unit: str) -> dict[str, Any]:
        if unit not in self.units:
            try:
                kernels = sass.compile_unit(unit, self.folder)
            except sass.NoTool as error:
                pytest.skip(str(error))
            self.units[unit] = {kernel.name: sass.count(kernel) for kernel in kernels}
        return self.units[unit]

    def of(self, unit: str, pattern: str) -> dict[str, Any]:
        """Those whose names match; there are some. Skips the test under another nvcc."""
        kernels = self[unit]
        nvcc = sass.version(sass.find_nvcc())
        if not nvcc.startswith("13.0."):
            pytest.skip(f"the ceilings are of nvcc 13.0, and this is {nvcc}")
        found = {name: one for name, one in kernels.items() if re.search(pattern, name)}
        assert found, f"no kernel of {unit} is {pattern}: {list(kernels)}"
        return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("cubins"), {})


@pytest.mark.parametrize(
    "unit",
    [
        "product_sm90",
        "low_rank_sm90",
        "product_sm80",
        "low_rank_sm80",
        "lora_linear_run",
        "lora_linear_grouped_run",
    ],
)
def test_no_local_memory_and_no_spills(compiled: Compiled, unit: str) -> None:
    for name, one in compiled[unit].items():
        assert (one["spilled_bytes"], one["stack_bytes"], one["local_memory"]) == (0, 0, 0), name


# Of a warp, after the products of a tile: sums to 16 bits, to shared memory, and on from there.
# Of several products a tile also finds its own; of one it begins to read decisions of the next.
@pytest.mark.parametrize(
    ("kernel", "width", "ceiling"),
    [
        ("product", 256, 222), ("product", 128, 130), ("product", 64, 86),
        ("products", 256, 238), ("products", 128, 138), ("products", 64, 89),
    ],
)  # fmt: skip
def test_end_of_a_tile_sm90(compiled: Compiled, kernel: str, width: int, ceiling: int) -> None:
    found = compiled.of("product_sm90", rf"^{kernel}_sm90_kernel<Bf16, ProductShape<{width}\b")
    for name, one in found.items():
        assert 0 < one["end_of_tile"]["instructions"] <= ceiling, name


def test_step_sm90(compiled: Compiled) -> None:
    """Four wgmma for 64 columns, and what finds them. They take 1,024 cycles, in which each of the
    two warps of a scheduler could start several hundred."""
    for name, one in compiled.of("product_sm90", "ProductShape<256").items():
        assert one["step"]["tensor"] == 4 and one["step"]["instructions"] <= 105, name


def test_step_sm80(compiled: Compiled) -> None:
    """64 mma.sync of a warp, their operands, and the copies of the next stage, 8 for each thread.
    The products take 1,024 cycles of an A100, in which a scheduler starts all of it for two warps.
    """
    for name, one in compiled.of("product_sm80", "ProductShape<128, 128").items():
        assert one["step"]["tensor"] == 64 and one["step"]["instructions"] <= 213, name


# Of the most columns and ranks that a warp may have: half as many are there in most calls.
@pytest.mark.parametrize(
    ("shape", "tensor", "ceiling"),
    [("64, 1", 32, 143), ("32, 1", 16, 129), ("16, 1", 8, 116), ("64, 4", 80, 284)],
)
def test_step_of_few_rows(compiled: Compiled, shape: str, tensor: int, ceiling: int) -> None:
    """The copies of a later step, 4 to 12 for each thread, are more than what multiplies."""
    pattern = rf"few_rows_sm80_kernel<Bf16, Bf16, FewRowsShape<{shape}>"
    for name, one in compiled.of("lora_linear_run", pattern).items():
        assert one["step"]["tensor"] == tensor and one["step"]["instructions"] <= ceiling, name


# Of a tile of 128 x 128 of x or dy: 16 products, or 8 of h and 8 of each term of dA, and how they
# are found.
@pytest.mark.parametrize(
    ("makes", "tensor", "ceiling"),
    [("true, false", 8, 129), ("false, true", 8, 133), ("true, true", 16, 216)],
)
def test_step_of_low_rank_sm90(compiled: Compiled, makes: str, tensor: int, ceiling: int) -> None:
    for name, one in compiled.of("low_rank_sm90", rf"LowRankShape<\d+, {makes}").items():
        assert one["step"]["tensor"] == tensor and one["step"]["instructions"] <= ceiling, name


# Of a warp: decisions about a tile of 64 or 128 rows and 128 columns of x, for h and for dA, whose
# are left to dx; and about a tile of dx, where nobody has left them.
DROPPING = r"LowRankShape<\d+, (true, false, .Major.0|false, true)"
DROPOUT = [
    ("low_rank_sm90", r"LowRankShape<\d+, true, false, .Major.0", 507),
    ("low_rank_sm90", r"LowRankShape<\d+, false, true", 545),
    ("low_rank_sm80", "down_grad", 618),
    ("product_sm90", "^product_sm90_kernel<Bf16, ProductShape<256", 999),
    ("product_sm90", "^product_sm90_kernel<Bf16, ProductShape<128", 518),
    ("product_sm90", "^product_sm90_kernel<Bf16, ProductShape<64", 563),
    ("product_sm80", "ProductShape<128, 128", 1563),
]


@pytest.mark.parametrize(("unit", "pattern", "ceiling"), DROPOUT)
def test_dropout(compiled: Compiled, unit: str, pattern: str, ceiling: int) -> None:
    for name, one in compiled.of(unit, pattern).items():
        assert 0 < one["dropout"]["instructions"] <= ceiling, name


# Of a warp and a tile of dx, by decisions that the pass for dA has left.
BITS = [
    ("product_sm90", "^product_sm90_kernel<Bf16, ProductShape<256", 180),
    ("product_sm90", "^product_sm90_kernel<Bf16, ProductShape<128", 92),
    ("product_sm90", "^product_sm90_kernel<Bf16, ProductShape<64", 52),
    ("product_sm80", "ProductShape<128, 128", 137),
]


@pytest.mark.parametrize(("unit", "pattern", "ceiling"), BITS)
def test_dropout_by_bits(compiled: Compiled, unit: str, pattern: str, ceiling: int) -> None:
    for name, one in compiled.of(unit, pattern).items():
        assert 0 < one["bits"]["instructions"] <= ceiling, name


@pytest.mark.parametrize(
    ("unit", "pattern"),
    [("low_rank_sm90", DROPPING), ("product_sm90", ""), ("product_sm80", "")],
)
def test_philox_adds_no_zeros(compiled: Compiled, unit: str, pattern: str) -> None:
    """nvcc 13.0 adds zero to the upper half of a product of two 64-bit factors."""
    for name, one in compiled.of(unit, pattern).items():
        dropout = one.get("dropout")  # which several products do not have
        assert name.startswith("products_") if dropout is None else dropout["zero_adds"] == 0, name


# ---- That the counts can be wrong is seen --------------------------------------------------------


def test_local_memory_shows(tmp_path: Path) -> None:
    source = tmp_path / "local.cu"
    source.write_text(
        "__global__ void local_kernel(float* out, const int* places) {\n"
        "  float values[64];\n"
        "  for (int i = 0; i < 64; ++i) values[places[i] % 64] = out[i];\n"
        "  out[threadIdx.x] = values[places[threadIdx.x] % 64];\n"
        "}\n"
    )
    try:
        (kernel,) = sass.compile_source(source, "80", tmp_path)
    except sass.NoTool as error:
        pytest.skip(str(error))
    counted = sass.count(kernel)
    assert kernel.name == "local_kernel" and counted["stack_bytes"] == 256
    assert counted["local_memory"] > 0 and "step" not in counted and "dropout" not in counted


def code(*lines: str) -> Flow:
    """As nvdisasm prints it; a line that ends with a colon is a label."""
    printed = [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    ]
    return Flow("\n".join(printed))


PRODUCT = (
    "MOV R1, RZ",
    ".L_x_0:",  # tiles
    "IADD3 R2, R2, 0x1, RZ",
    ".L_x_1:",  # steps
    "ISETP.GE.AND P0, PT, R2, R3, PT",
    "@P0 BRA `(.L_x_2)",
    "LDG.E R8, desc[UR4][R6.64]",  # of what is not aligned
    "IADD3 R8, R8, R8, R8",
    "BRA `(.L_x_3)",
    ".L_x_2:",
    "LDGSTS.E.BYPASS.128 [R8], desc[UR4][R6.64]",
    ".L_x_3:",
    "HMMA.16816.F32.BF16 R4, R8, R10, R4",
    "HMMA.16816.F32.BF16 R4, R8, R10, R4",
    "@P1 BRA `(.L_x_1)",
    "@P2 BRA `(.L_x_4)",
    "UMOV UR9, URZ",  # dropout
    "IMAD.WIDE.U32 R4, R4, -0x2daee0ad, RZ",
    "VIADD R5, R5, UR9",
    "UMOV UR9, UR3",
    "VIADD R5, R5, UR9",
    ".L_x_4:",
    "F2FP.BF16.F32.PACK_AB R4, R5, R4",
    "STG.E desc[UR4][R6.64], R4",
    "@P3 BRA `(.L_x_0)",
    "EXIT",
    ".L_x_5:",
    "BRA `(.L_x_5)",
)


def test_loops_and_paths() -> None:
    counted = sass.count(sass.Kernel("product", code(*PRODUCT), 40, 0, 0))
    step = ["ISETP", "BRA", "LDGSTS", "HMMA", "HMMA", "BRA"]
    assert counted["step"]["instructions"] == len(step) and counted["step"]["tensor"] == 2
    # With the branch around dropout, and without what is in it
    end = ["BRA", "F2FP", "STG", "BRA", "EXIT"]
    assert counted["end_of_tile"]["instructions"] == len(end)
    assert counted["dropout"]["instructions"] == 5 and counted["dropout"]["wide"] == 1
    assert counted["dropout"]["zero_adds"] == 1  # that of UR3 is none
    flow = code(*PRODUCT)
    assert sorted(len(loop.blocks) for loop in flow.loops) == [4, 8]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("HMMA.16816.F32.BF16 R4, R8, R10, R4", "IMAD R4, R8, R10, R4"), "step"),
        (("STG.E desc[UR4][R6.64], R4", "SHFL.BFLY PT, R4, R4, 0x1, 0x1f"), "end_of_tile"),
        (("-0x2daee0ad", "0x9e3779b9"), "dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_there_is_not_counted(change: tuple[str, str], what: str) -> None:
    before = sass.count(sass.Kernel("product", code(*PRODUCT), 40, 0, 0))
    lines = [line.replace(*change) for line in PRODUCT]
    after = sass.count(sass.Kernel("product", code(*lines), 40, 0, 0))
    assert before[what] != after.get(what)


@pytest.mark.parametrize(
    ("find", "package"),
    [(sass.find_nvcc, "nvidia-cuda-nvcc"), (sass.find_nvdisasm, "nvidia-cuda-nvdisasm")],
)
def test_a_missing_tool_is_told(
    find: Callable[[], str], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    monkeypatch.setattr("importlib.metadata.files", lambda _: None)
    with pytest.raises(sass.NoTool, match=f"pip install {package}"):
        find()
