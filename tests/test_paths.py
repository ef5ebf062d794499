"""How the backends choose between kernels and BLAS: every branch of csrc/cpu/lora_linear_path.h and
csrc/cuda/lora_linear_path.h, whatever this machine is."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from emulated import WISHES, compile_source

CPU_FACTS = dict.fromkeys("MNKr")
CPU_FACTS |= dict.fromkeys(
    "dropout bf16 bf16_dot mixed fast_blas half faster_bf16 grouped".split(), ctypes.c_bool
)
CPU_FACTS |= dict.fromkeys(("compute_bytes", "threads"))
CUDA_FACTS = {"M": None, "N": None, "K": None, "r": None, "half": ctypes.c_bool}
CUDA_FACTS |= {"rows": ctypes.c_int, "compute_capability": ctypes.c_int, "built": ctypes.c_bool}
CUDA_FACTS |= {"sm90": ctypes.c_bool, "wish": ctypes.c_int, "fastest": ctypes.c_int}
CUDA_FACTS |= {name: ctypes.c_bool for name in ("dropout", "mixed", "transposed")}
CPU_KERNELS = ("blas", "vector", "bf16 dot")
ANY, ALIGNED, TMA = range(3)  # Rows of csrc/cuda/lora_linear_path.h


class ChosenPath(ctypes.Structure):
    _fields_ = (
        ("kernels", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("reason", ctypes.c_char_p),
        ("fwd_parts", ctypes.c_int64),
        ("bwd_parts", ctypes.c_int64),
        ("widens", ctypes.c_bool),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("paths") / "libpaths.so"
    compile_source(Path(__file__).parent / "paths.cpp", target, "-fPIC", "-shared", "-Wextra")
    loaded = ctypes.CDLL(str(target))
    for function, facts in ((loaded.cpu_path, CPU_FACTS), (loaded.cuda_path, CUDA_FACTS)):
        function.argtypes = [kind or ctypes.c_int64 for kind in facts.values()]
        function.restype = ChosenPath
    loaded.dropped_path.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_double] + [ctypes.c_bool] * 2
    loaded.dropped_path.restype = ChosenPath
    loaded.together.argtypes = [ctypes.c_int64] * 2
    loaded.together.restype = ctypes.c_bool
    loaded.is_built_for.restype = ctypes.c_bool
    loaded.rows_of_matrix.argtypes = [ctypes.c_int64] * 4
    loaded.rows_of_a_call.argtypes = [ctypes.c_int64] * 2
    loaded.chunk_of_rows.argtypes = [ctypes.c_int64] * 4
    loaded.chunk_of_rows.restype = ctypes.c_int64
    return loaded


# fp32, many rows; what a case does not name is as here.
CPU = dict(M=2048, N=1024, K=1024, r=16, dropout=False, bf16=False, bf16_dot=False)
CPU |= dict(mixed=False, fast_blas=True, half=False, faster_bf16=False, grouped=False)
CPU |= dict(compute_bytes=4, threads=8)
HALF = {"half": True}
BF16, DOT = HALF | {"bf16": True}, HALF | {"bf16": True, "bf16_dot": True}
MIXED, SLOW = HALF | {"mixed": True}, HALF | {"fast_blas": False}
VECTOR, DROPOUT = "vector", {"dropout": True}
WIDE, FLOATS = "blas of float32", "a large rank: low-rank products are float32's"
FEW, ONE_PASS, IN_CACHE = "few rows and a large adapter", "one pass over x", "dropout is made in"

# id: (facts, kernels, part of the reason). An adapter is large from (N + K) * r = 2^16 + 1 on,
# with dropout or beside dot products from 2^18 + 1 on.
CPU_CASES = {
    "mixed": (MIXED, VECTOR, "float32 adapters are read beside"),
    "slow blas": (SLOW, VECTOR, "BLAS is slow in this dtype"),
    "slow blas, few rows": (SLOW | {"M": 8, "r": 64}, VECTOR, "BLAS is slow"),
    "fp32": ({}, VECTOR, ONE_PASS),
    "fp32, few rows": ({"M": 64, "r": 33}, "blas", FEW),
    "fp32, more rows": ({"M": 65, "r": 33}, VECTOR, ONE_PASS),
    "fp32, few rows, small adapter": ({"M": 64, "r": 32}, VECTOR, ONE_PASS),
    "fp32, dropout": (DROPOUT, VECTOR, IN_CACHE),
    "fp32, dropout, few rows": (DROPOUT | {"M": 64, "r": 129}, "blas", FEW),
    "fp32, dropout, few rows, smaller adapter": (DROPOUT | {"M": 64, "r": 128}, VECTOR, IN_CACHE),
    "bf16, one row": (BF16 | {"M": 1}, "blas", "too few rows for dot products"),
    "bf16, dropout": (BF16 | DROPOUT, VECTOR, IN_CACHE),
    "bf16 dot": (DOT, "bf16 dot", "bf16 is multiplied as it is"),
    "bf16 dot, dropout": (DOT | DROPOUT, "bf16 dot", "bf16 is multiplied as it is"),
    "bf16 dot, 16 rows": (DOT | {"M": 16, "r": 128}, "bf16 dot", "bf16 is multiplied as it is"),
    "bf16 dot, 16 rows, large": (DOT | {"M": 16, "r": 129}, "blas", FEW),
    "bf16 dot, 16 rows, large, dropout": (
        DOT | DROPOUT | {"M": 16, "r": 129}, "bf16 dot", "bf16 is multiplied as it is"
    ),
    "bf16 dot, 15 rows": (DOT | {"M": 15, "r": 33}, "blas", FEW),
    "bf16 dot, 15 rows, small": (DOT | {"M": 15, "r": 32}, "blas", "too few rows"),
    "bf16 dot, 15 rows, dropout": (DOT | DROPOUT | {"M": 15}, VECTOR, IN_CACHE),
    "dot products without bf16": ({"bf16_dot": True}, VECTOR, ONE_PASS),
    "large rank": ({"r": 128}, "blas", "a large rank: low-rank products are BLAS's"),
    "large rank, dropout": (DROPOUT | {"r": 128}, "blas", "a large rank"),
    "rank 127": ({"r": 127}, VECTOR, ONE_PASS),
    "large rank, 65 rows": ({"r": 128, "M": 65}, "blas", "a large rank"),
    "large rank, few rows": ({"r": 128, "M": 64}, "blas", FEW),
    "large rank, few rows, dropout": (DROPOUT | {"r": 128, "M": 64}, VECTOR, IN_CACHE),
    "large rank of several": ({"r": 1024, "grouped": True}, VECTOR, ONE_PASS),
    "rank 64 of bf16": (DOT | {"r": 64}, "bf16 dot", "bf16 is multiplied as it is"),
    "large rank of bf16": (DOT | {"r": 65}, WIDE, FLOATS),
    "large rank of bf16, fast": (DOT | {"r": 65, "faster_bf16": True}, "blas", "are BLAS's"),
    "large rank of bf16, few rows": (DOT | {"r": 65, "M": 64}, "bf16 dot", "bf16 is multiplied"),
    "large rank of bf16 of several": (DOT | {"r": 65, "grouped": True}, "bf16 dot", "bf16 is"),
    "rank 255 of fp16": (HALF | {"r": 255}, VECTOR, ONE_PASS),
    "large rank of fp16": (HALF | {"r": 256, "faster_bf16": True}, WIDE, FLOATS),
    "rank 255, slow blas": (SLOW | {"r": 255}, VECTOR, "BLAS is slow in this dtype"),
    "large rank, slow blas": (SLOW | {"r": 256}, WIDE, FLOATS),
    "rank 255, mixed": (MIXED | {"r": 255}, VECTOR, "float32 adapters are read beside"),
    "large rank, mixed": (MIXED | {"r": 256, "M": 16, "faster_bf16": True}, WIDE, FLOATS),
    "large rank, mixed, few rows": (MIXED | {"r": 256, "M": 15}, VECTOR, "float32 adapters are"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "kernels", "reason"), CPU_CASES.values(), ids=CPU_CASES.keys()
)  # fmt: skip
def test_cpu_path(library: ctypes.CDLL, facts: dict[str, int], kernels: str, reason: str) -> None:
    path = library.cpu_path(*(CPU | facts).values())
    assert CPU_KERNELS[path.kernels] + path.widens * " of float32" == kernels
    assert reason in path.reason.decode()


# (facts, parts of the rows in forward and in backward)
CPU_PARTS = {
    "many rows": ({}, 8, 8),
    "one thread": ({"threads": 1, "M": 1024}, 1, 1),
    # No sum is over more than 1024 rows
    "one thread, more rows": ({"threads": 1, "M": 1025}, 1, 2),
    "no rows": ({"M": 0}, 1, 1),
    "1 row": ({"M": 1}, 1, 1),
    "31 rows": ({"M": 31}, 7, 1),
    "64 rows": ({"M": 64}, 8, 2),
    # Sums of 2^26 bytes for each part: four make 256 MiB
    "large sums": ({"N": 1 << 14, "K": 1 << 14, "r": 512}, 8, 4),
    "large sums in double": ({"N": 1 << 14, "K": 1 << 14, "r": 512, "compute_bytes": 8}, 8, 2),
    "sums beyond the limit": ({"N": 1 << 16, "K": 1 << 16, "r": 1024}, 8, 1),
    "rank 0": ({"r": 0}, 8, 8),
}


@pytest.mark.parametrize(("facts", "fwd", "bwd"), CPU_PARTS.values(), ids=CPU_PARTS.keys())
def test_cpu_parts(library: ctypes.CDLL, facts: dict[str, int], fwd: int, bwd: int) -> None:
    path = library.cpu_path(*(CPU | facts).values())
    assert (path.fwd_parts, path.bwd_parts) == (fwd, bwd)


def test_layers_of_one_x_run_together_up_to_a_sum_of_ranks_and_a_size(library: ctypes.CDLL) -> None:
    assert library.together(96, 3 << 18)
    assert not library.together(97, 3 << 18) and not library.together(96, (3 << 18) + 1)


# (rows, columns, dropout_p, bf16, fast BLAS), whether dora_linear multiplies the dropped elements
# alone, why
DROPPED_CASES = {
    "fp32": ((64, 9, 0.5, False, True), True, "one with the dropped elements alone"),
    "fp32, few rows": ((63, 9, 0.1, False, True), False, "few rows"),
    "fp32, most dropped": ((64, 9, 0.51, False, True), False, "dropped that BLAS is faster"),
    "bf16": ((64, 9, 0.25, True, True), True, "one with the dropped elements alone"),
    "bf16, many dropped": ((64, 9, 0.26, True, True), False, "dropped that BLAS is faster"),
    "slow blas": ((64, 9, 0.5, True, False), True, "one with the dropped elements alone"),
    "slow blas, most dropped": ((64, 9, 0.51, True, False), False, "would lose digits"),
    "no columns": ((64, 0, 0.1, False, True), False, "nothing to drop"),
    "a row of 2^31": ((64, 2**31, 0.1, False, True), False, "too long for lists"),
}


@pytest.mark.parametrize(
    ("facts", "skips", "reason"), DROPPED_CASES.values(), ids=DROPPED_CASES.keys()
)
def test_dropped_path(
    library: ctypes.CDLL, facts: tuple[int, int, float, bool, bool], skips: bool, reason: str
) -> None:
    path = library.dropped_path(*facts)
    assert bool(path.kernels) == skips
    assert reason in path.reason.decode()


@pytest.mark.parametrize("rows", [64, 200, 1024, 10**6])
@pytest.mark.parametrize("columns", [1, 128, 2**21, 2**21 + 256, 2**28 + 1, 2**31 - 129])
def test_chunks_of_rows_have_places_for_all_their_elements(
    library: ctypes.CDLL, rows: int, columns: int
) -> None:
    for parts, threads in ((1, 1), (1, 64), (1000, 2)):
        chunk = library.chunk_of_rows(rows, columns, parts, threads)
        padded = -(-columns // 128) * 128  # a list of every block is filled up
        assert 1 <= chunk <= 1024 and chunk * padded < 2**31
        assert chunk >= 128 or columns >= 2**24


CUDA = dict(M=2048, N=1024, K=1024, r=16, half=True, rows=TMA, compute_capability=80)
CUDA |= dict(built=True, sm90=True, wish="auto", fastest=None, dropout=True, mixed=False)
CUDA |= dict(transposed=False)
FUSED, HYBRID, CUBLAS = "cuda fused sm_80", "cuda hybrid sm_80", "cuda cublas"
FUSED_90, HYBRID_90 = "cuda fused sm_90a", "cuda hybrid sm_90a"
RANKS, EMPTY, LARGE = "the kernels take ranks 1 to 1024", "no empty matrices", "in 32 bits"
MEASURED, UNMEASURED, MMA = "that autotune measured", "is not measured yet", "mma.sync is slow"
UNALIGNED, SMALL = "rows that begin at no multiple of 16 bytes", "a small result"
KEEPS_UP, ONE_KERNEL = "predicted to be as fast", "one kernel makes h and y"
SM90, NOT_BUILT = {"compute_capability": 90}, {"compute_capability": 90, "sm90": False}

CUDA_CASES = {
    "sm_80": ({}, HYBRID, UNMEASURED),
    "sm_86": ({"compute_capability": 86}, HYBRID, UNMEASURED),
    "sm_89": ({"compute_capability": 89}, HYBRID, UNMEASURED),
    "sm_90": (SM90, FUSED_90, ONE_PASS),
    "sm_90, not built": (NOT_BUILT, HYBRID, MMA),
    "sm_100": ({"compute_capability": 100}, HYBRID, MMA),
    "sm_110": ({"compute_capability": 110}, HYBRID, MMA),
    "sm_120": ({"compute_capability": 120}, HYBRID, UNMEASURED),
    "sm_75": ({"compute_capability": 75}, CUBLAS, "need a GPU from sm_80 on"),
    "sm_70": ({"compute_capability": 70}, CUBLAS, "need a GPU from sm_80 on"),
    "no code for the GPU": ({"built": False}, CUBLAS, "no kernels for this GPU: add its number"),
    "no code for the GPU, wish": ({"built": False, "wish": "fused"}, CUBLAS, "no kernels for"),
    "fp32 or fp64": ({"half": False}, CUBLAS, "float32 and float64 products are cuBLAS's"),
    "rank 0": ({"r": 0}, CUBLAS, RANKS),
    "rank 256": (SM90 | {"r": 256}, FUSED_90, ONE_PASS),
    "rank 257": (SM90 | {"r": 257}, FUSED_90, ONE_PASS),
    "rank 257, no dropout": (SM90 | {"r": 257, "dropout": False}, CUBLAS, KEEPS_UP),
    "rank 257, floats": (SM90 | {"r": 257, "dropout": False, "mixed": True}, FUSED_90, ONE_PASS),
    "rank 257, floats of 64 rows": (SM90 | {"r": 257, "M": 64, "mixed": True}, CUBLAS, KEEPS_UP),
    "rank 512, 1024 rows": (SM90 | {"r": 512, "M": 1024}, HYBRID_90, SMALL),
    "rank 513, 1024 rows": (SM90 | {"r": 513, "M": 1024}, CUBLAS, KEEPS_UP),
    "rank 1024": (SM90 | {"r": 1024}, FUSED_90, ONE_PASS),
    "rank 1025": (SM90 | {"r": 1025}, CUBLAS, RANKS),
    "sm_80, rank 257": ({"r": 257}, CUBLAS, KEEPS_UP),
    "sm_80, rank 257, 1024 rows": ({"r": 257, "M": 1024}, CUBLAS, KEEPS_UP),
    "sm_80, rank 513": ({"r": 513}, CUBLAS, KEEPS_UP),
    "sm_80, rank 513, floats": ({"r": 513, "mixed": True}, CUBLAS, KEEPS_UP),
    "no outputs": ({"N": 0}, CUBLAS, EMPTY),
    "no inputs": ({"K": 0}, CUBLAS, EMPTY),
    "2^31 rows": (SM90 | {"M": 1 << 31}, CUBLAS, LARGE),
    "2^31 outputs": (SM90 | {"N": 1 << 31, "wish": "fused"}, CUBLAS, LARGE),
    "2^31 inputs": (SM90 | {"K": 1 << 31}, CUBLAS, LARGE),
    "few tiles": (SM90 | {"M": 1920}, HYBRID_90, SMALL),
    "more tiles": (SM90 | {"M": 1921}, FUSED_90, ONE_PASS),
    "few tiles of dx": (SM90 | {"N": 4096, "M": 1920}, HYBRID_90, SMALL),
    "few rows": (SM90 | {"M": 8, "r": 32, "dropout": False}, FUSED_90, ONE_KERNEL),
    "64 rows": (SM90 | {"M": 64, "r": 80, "dropout": False}, FUSED_90, ONE_KERNEL),
    "65 rows": (SM90 | {"M": 65, "dropout": False}, HYBRID_90, SMALL),
    "more to read": (SM90 | {"M": 64, "r": 81, "dropout": False}, CUBLAS, KEEPS_UP),
    "floats": (SM90 | {"M": 16, "r": 64, "dropout": False, "mixed": True}, FUSED_90, ONE_KERNEL),
    "wide floats": (SM90 | {"M": 16, "r": 65, "dropout": False, "mixed": True}, CUBLAS, KEEPS_UP),
    "wide floats of more rows": (
        SM90 | {"M": 512, "r": 128, "dropout": False, "mixed": True}, HYBRID_90, SMALL,
    ),
    "few rows, dropout": (SM90 | {"M": 8}, HYBRID_90, SMALL),
    "few rows, transposed": (
        SM90 | {"M": 8, "dropout": False, "transposed": True}, HYBRID_90, SMALL,
    ),
    "sm_80, 64 rows": ({"M": 64, "dropout": False}, FUSED, ONE_KERNEL),
    "sm_80, 64 rows, narrow": ({"M": 64, "r": 17, "dropout": False}, CUBLAS, KEEPS_UP),
    "sm_80, 64 rows, wide": ({"M": 64, "N": 2048, "r": 32, "dropout": False}, FUSED, ONE_KERNEL),
    "sm_80, 64 rows, more": ({"M": 64, "N": 2048, "r": 33, "dropout": False}, CUBLAS, KEEPS_UP),
    "sm_100, 16 rows": (
        {"M": 16, "dropout": False, "compute_capability": 100}, FUSED, ONE_KERNEL,
    ),
    "sm_100, more rows": (
        {"M": 17, "dropout": False, "compute_capability": 100}, CUBLAS, KEEPS_UP,
    ),
    "few rows, sm_80": ({"M": 1, "dropout": False, "mixed": True}, FUSED, ONE_KERNEL),
    "few rows, larger rank": (SM90 | {"M": 1, "r": 129, "dropout": False}, CUBLAS, KEEPS_UP),
    "few rows, wish hybrid": (SM90 | {"M": 1, "dropout": False, "wish": "hybrid"}, HYBRID_90, "="),
    "many tiles, larger rank": (SM90 | {"r": 33, "dropout": False}, FUSED_90, ONE_PASS),
    "sm_80, no dropout": ({"dropout": False}, CUBLAS, KEEPS_UP),
    "sm_80, no dropout, float": ({"dropout": False, "mixed": True}, HYBRID, UNMEASURED),
    "sm_80, few, float": ({"dropout": False, "mixed": True, "M": 512}, CUBLAS, KEEPS_UP),
    "sm_100, no dropout": ({"dropout": False, "compute_capability": 100}, CUBLAS, KEEPS_UP),
    "sm_80, 16 rows": ({"M": 16, "mixed": True}, CUBLAS, KEEPS_UP),
    "sm_80, 17 rows": ({"M": 17}, HYBRID, UNMEASURED),
    "sm_80, few rows, larger rank": ({"M": 512, "r": 65}, CUBLAS, KEEPS_UP),
    "sm_80, more rows, larger rank": ({"M": 513, "r": 65}, HYBRID, UNMEASURED),
    "sm_80, wish": ({"dropout": False, "wish": "hybrid"}, HYBRID, "LORA_EXT_CUDA_PATH=hybrid"),
    "few rows, wish fused": (SM90 | {"M": 1, "wish": "fused"}, FUSED_90, "PATH=fused"),
    "not aligned": ({"rows": ANY}, CUBLAS, UNALIGNED),
    "not aligned, sm_90": (SM90 | {"rows": ANY}, CUBLAS, UNALIGNED),
    "not aligned, few rows": (SM90 | {"rows": ANY, "M": 1}, CUBLAS, UNALIGNED),
    "not aligned, sm_100": ({"rows": ANY, "compute_capability": 100}, CUBLAS, UNALIGNED),
    "not aligned, wish fused": (SM90 | {"rows": ANY, "wish": "fused"}, FUSED, "PATH=fused"),
    "not aligned, wish hybrid": (SM90 | {"rows": ANY, "wish": "hybrid"}, HYBRID, "PATH=hybrid"),
    "not aligned, measured": (SM90 | {"rows": ANY, "fastest": "fused"}, FUSED, MEASURED),
    "rows that overlap": (SM90 | {"rows": ALIGNED}, HYBRID, MMA),
    "rows that overlap, wish fused": (SM90 | {"rows": ALIGNED, "wish": "fused"}, FUSED, "=fused"),
    "rows that overlap, sm_80": ({"rows": ALIGNED}, HYBRID, UNMEASURED),
    "wish composed": ({"wish": "composed"}, CUBLAS, "LORA_EXT_CUDA_PATH=composed"),
    "wish hybrid": ({"wish": "hybrid"}, HYBRID, "LORA_EXT_CUDA_PATH=hybrid"),
    "wish hybrid, sm_90": (SM90 | {"wish": "hybrid"}, HYBRID_90, "LORA_EXT_CUDA_PATH=hybrid"),
    "wish fused": ({"wish": "fused"}, FUSED, "LORA_EXT_CUDA_PATH=fused"),
    "wish fused, not built": (NOT_BUILT | {"wish": "fused"}, FUSED, "LORA_EXT_CUDA_PATH=fused"),
    "wish fused, sm_100": ({"wish": "fused", "compute_capability": 100}, FUSED, "PATH=fused"),
    "wish fused, fp32": ({"wish": "fused", "half": False}, CUBLAS, "float32 and float64"),
    "wish fused, sm_75": ({"wish": "fused", "compute_capability": 75}, CUBLAS, "from sm_80 on"),
    "wish hybrid, rank 1024": ({"wish": "hybrid", "r": 1024}, HYBRID, "PATH=hybrid"),
    "wish hybrid, rank 1025": ({"wish": "hybrid", "r": 1025}, CUBLAS, RANKS),
    "measured": ({"fastest": "composed"}, CUBLAS, MEASURED),
    "measured, sm_90": (SM90 | {"fastest": "hybrid"}, HYBRID_90, MEASURED),
    "measured, few rows": (SM90 | {"fastest": "fused", "M": 1}, FUSED_90, MEASURED),
    "measured, with a wish": ({"fastest": "hybrid", "wish": "composed"}, CUBLAS, "PATH=composed"),
    "measured, rank 0": ({"fastest": "fused", "r": 0}, CUBLAS, RANKS),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "name", "reason"), CUDA_CASES.values(), ids=CUDA_CASES.keys())
def test_cuda_path(
    library: ctypes.CDLL, facts: dict[str, int | str | None], name: str, reason: str
) -> None:
    values = CUDA | facts
    for key in ("wish", "fastest"):
        values[key] = -1 if values[key] is None else WISHES.index(str(values[key]))
    path = library.cuda_path(*values.values())
    assert path.name.decode() == name
    assert reason in path.reason.decode()


def test_few_rows_without_clusters(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told is what is launched then: blocks read all of x, as on sm_80."""
    for switched, r, reason in (
        ("", 80, ONE_KERNEL), ("cluster", 80, KEEPS_UP), ("cluster", 16, ONE_KERNEL),
    ):  # fmt: skip
        monkeypatch.setenv("LORA_EXT_CUDA_OFF", switched)
        facts = SM90 | {"M": 64, "r": r, "dropout": False}
        test_cuda_path(library, facts, FUSED_90 if reason == ONE_KERNEL else CUBLAS, reason)


class Candidate(ctypes.Structure):
    _fields_ = (("fits", ctypes.c_bool), ("path", ctypes.c_int), ("reason", ctypes.c_char_p))


@pytest.mark.parametrize(("facts", "name", "reason"), CUDA_CASES.values(), ids=CUDA_CASES.keys())
def test_the_first_candidate_that_fits_is_the_path(
    library: ctypes.CDLL, facts: dict[str, int | str | None], name: str, reason: str
) -> None:
    """All of them can be asked for, each with its reason."""
    values = CUDA | facts
    for key in ("wish", "fastest"):
        values[key] = -1 if values[key] is None else WISHES.index(str(values[key]))
    out = (Candidate * 16)()
    kinds = [kind or ctypes.c_int64 for kind in CUDA_FACTS.values()]
    arguments = [kind(value) for kind, value in zip(kinds, values.values(), strict=True)]
    candidates = out[: library.cuda_path_candidates(out, *arguments)]
    assert candidates[-1].fits and len({c.reason for c in candidates}) == len(candidates)
    told = library.cuda_path(*values.values()).reason
    if told in {c.reason for c in candidates}:  # the kernels can run the call
        winner = next(c for c in candidates if c.fits)
        assert winner.reason == told
        path = {"auto": "fused", "composed": "cublas"}.get(WISHES[winner.path], WISHES[winner.path])
        assert name.split()[1] == path
    else:
        assert name == CUBLAS


# Targets of a build: the GPUs that run it
BUILDS = {
    "80 90a-real": {80, 86, 87, 89, 90, 100, 103, 110, 120},
    "80-real 90a-real": {80, 86, 87, 89, 90},
    "80-real": {80, 86, 87, 89},
    "86-real": {86, 87, 89},
    "90a-real": {90},
    "90a": {90},
    "90": {90, 100, 103, 110, 120},
    "80-real 100f-real": {80, 86, 87, 89, 100, 103},
    "80-real 120-real": {80, 86, 87, 89, 120},
    "": set(),
}


@pytest.mark.parametrize(("targets", "gpus"), BUILDS.items(), ids=BUILDS.keys())
def test_gpus_that_run_a_build(library: ctypes.CDLL, targets: str, gpus: set[int]) -> None:
    every = (70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120)
    assert {gpu for gpu in every if library.is_built_for(targets.encode(), gpu)} == gpus


# (address, rows, stride, columns)
MATRICES = {
    "contiguous": ((4096, 64, 72, 72), TMA),
    "slice of columns": ((4096 + 16, 64, 80, 72), TMA),
    "odd address": ((4096 + 2, 64, 72, 72), ANY),
    "half of 16 bytes": ((4096 + 8, 64, 72, 72), ANY),
    "odd rows": ((4096, 64, 73, 73), ANY),
    "rows of 8 bytes more": ((4096, 64, 76, 72), ANY),
    "one row twice": ((4096, 64, 0, 72), ALIGNED),
    "rows that overlap": ((4096, 64, 64, 72), ALIGNED),
    "rows too far apart": ((4096, 64, 1 << 39, 72), ALIGNED),
    "one row": ((4096, 1, 73, 72), TMA),
    "one row, odd address": ((4098, 1, 72, 72), ANY),
    "no row": ((0, 0, 73, 72), TMA),
}


@pytest.mark.parametrize(("matrix", "rows"), MATRICES.values(), ids=MATRICES.keys())
def test_how_rows_lie(library: ctypes.CDLL, matrix: tuple[int, ...], rows: int) -> None:
    assert library.rows_of_matrix(*matrix) == rows


@pytest.mark.parametrize(
    ("N", "K", "rows"),
    [
        (72, 64, TMA),
        (50257, 768, ANY),
        (32001, 4096, ANY),
        (64, 12, ANY),
        (4, 64, ANY),
        (9, 9, ANY),
    ],
)
def test_how_rows_of_contiguous_matrices_lie(
    library: ctypes.CDLL, N: int, K: int, rows: int
) -> None:
    assert library.rows_of_a_call(N, K) == rows


def test_measured_paths_are_found_by_every_fact(library: ctypes.CDLL) -> None:
    def facts(**changed: int) -> ctypes.Array[ctypes.c_int64]:
        call = dict(backward=0, device=0, M=2048, N=1024, K=768, r=16, base=15, adapter=6, drop=0)
        call |= dict(rows=TMA)
        assert call.keys() >= changed.keys()
        return (ctypes.c_int64 * 10)(*(call | changed).values())

    fused, hybrid = WISHES.index("fused"), WISHES.index("hybrid")
    assert library.find_tuned(facts()) == -1
    library.set_tuned(facts(), hybrid)
    library.set_tuned(facts(backward=1), fused)
    assert library.find_tuned(facts()) == hybrid
    assert library.find_tuned(facts(backward=1)) == fused
    # Rows by their power of two
    assert library.find_tuned(facts(M=4095)) == hybrid
    others = dict(device=1, M=4096, N=1023, K=769, r=8, base=5, adapter=15, drop=1)
    others |= dict(rows=ANY)
    for name, value in others.items():
        assert library.find_tuned(facts(**{name: value})) == -1, name
    assert library.find_tuned(facts(M=2047)) == -1
    for rows in (0, 1):
        library.set_tuned(facts(M=rows), fused)
        assert library.find_tuned(facts(M=1 - rows)) == fused
    for call in (facts(), facts(backward=1), facts(M=1)):
        library.set_tuned(call, -1)
        assert library.find_tuned(call) == -1


MULTI = dict(adapted=1, kernels=2, sm90=1, transposed=0, mixed=0, dropout=0, backward=0)
MULTI |= dict(M=2048, r=16, makes_h=0, wants_nothing=0)
FROZEN, HYBRID, SM80 = {"adapted": 0, "r": 1}, {"kernels": 1}, {"sm90": 0}
BACKWARD = {"backward": 1}

# Layers of one x by how they differ from MULTI, and why each has a call of its own: a part of it.
MULTI_CASES = {
    "q, k and v": ([{}, {}, {}], ["", "", ""]),
    "one frozen": ([FROZEN, {}], ["", ""]),
    "all frozen": ([FROZEN, FROZEN], ["no layer has an adapter"] * 2),
    "one": ([{}], ["no other layer"]),
    "a hybrid one": ([{}, HYBRID, {}], ["", "its own reason", ""]),
    "one beside hybrid ones": ([HYBRID, {}], ["its own reason", "no other layer"]),
    "few rows": ([{"M": 16}] * 2, ["few rows"] * 2),
    "few rows of a wide float adapter": ([{"M": 16, "mixed": 1, "r": 80}] * 2, ["", ""]),
    "few rows of a frozen layer": ([{"M": 64, "r": 96}, {"M": 64} | FROZEN], ["no", "few rows"]),
    "few rows by columns": ([{"M": 16, "transposed": 1}] * 2, ["", ""]),
    "few rows in backward": ([{"M": 16} | BACKWARD] * 2, ["", ""]),
    "dropout": ([{"dropout": 1}, {}], ["", ""]),
    "dropout in backward": (
        [BACKWARD | {"dropout": 1}, BACKWARD, BACKWARD], ["a mask of its own", "", ""]
    ),
    "dropout on sm_80": ([SM80 | {"dropout": 1}] * 2, ["on sm_80 a product"] * 2),
    "families": ([{}, SM80, {}], ["", "another family", ""]),
    "weights": ([{}, {"transposed": 1}, {}], ["", "lies otherwise", ""]),
    "types": ([{}, {"mixed": 1}, FROZEN | {"mixed": 1}], ["", "another type", ""]),
    "five": ([{}] * 5, ["", "", "", "", "four layers"]),
    "h that is missing": ([BACKWARD | {"makes_h": 1}] + [BACKWARD] * 2, ["h was not", "", ""]),
    "nothing wanted": ([BACKWARD | {"wants_nothing": 1}] + [BACKWARD] * 2, ["no gradient", "", ""]),
}  # fmt: skip


def alone_reasons(library: ctypes.CDLL, layers: list[dict[str, int]]) -> list[str]:
    rows = [(ctypes.c_int64 * len(MULTI))(*(MULTI | of).values()) for of in layers]
    told = (ctypes.c_char_p * len(layers))()
    library.multi_choice(len(layers), (type(rows[0]) * len(rows))(*rows), told)
    return [(reason or b"").decode() for reason in told]


@pytest.mark.parametrize(("layers", "alone"), MULTI_CASES.values(), ids=MULTI_CASES.keys())
def test_layers_of_one_x(
    library: ctypes.CDLL, layers: list[dict[str, int]], alone: list[str]
) -> None:
    for reason, part in zip(alone_reasons(library, layers), alone, strict=True):
        assert (reason == "") == (part == "") and part in reason


def test_layers_of_one_x_can_be_kept_apart(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_EXT_CUDA_OFF", "together")
    assert alone_reasons(library, [{}, {}]) == ["LORA_EXT_CUDA_OFF=together"] * 2
