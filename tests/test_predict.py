"""benchmarks/predict.py: it asks the real launchers, knows every kernel, and says "predicted"."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import predict
import pytest
from predictor import blas, counts, groups, kernels, rows
from predictor.cards import CARDS, SCENARIOS, Card
from predictor.launches import Call, RecordedLaunch, record
from predictor.model import PATHS, calibration

from lora_ext.bench.grid import FWD, FWD_BWD, Case
from lora_ext.bench.results import OK, Quartiles, Report, Row, Timing

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for the launchers")

COUNTS = counts.load()
H200 = CARDS["h200"]


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
@pytest.mark.parametrize("fp32_adapters", [False, True], ids=["bf16", "fp32-adapters"])
def test_every_launch_is_known(card: Card, fp32_adapters: bool) -> None:
    """On every path, with and without dropout: its code is counted, and takes time."""
    sizes = itertools.product((1, 700, 8192), ((4096, 4096), (1024, 14336)), (8, 24, 64, 100, 256))
    for (M, (N, K), r), p in itertools.product(sizes, (0.0, 0.1)):
        call = Call(M, N, K, r, fp32_adapters, p)
        for path in PATHS:
            one = predict.predict(card, call, COUNTS, path)
            launches = [*one.passes[0], *one.passes[1]]
            assert all(0 < entry.us < 1e6 for entry in launches)
            assert bool(launches) == (path != "composed") == ("cublas" not in one.path)
            assert min(*one.layer, *one.frozen) > 0 and one.ratio > 1


def test_the_launches_are_the_launchers() -> None:
    """A forward of a layer on an H200: grids as launch_low_rank_sm90.h and launch_product_sm90.h
    choose them."""
    call = Call(8192, 4096, 4096, 16)
    one = predict.predict(H200, call, COUNTS)
    assert one.path == "cuda fused sm_90a"
    assert [(entry.what, entry.blocks) for entry in one.passes[0]] == [
        ("h", 128),
        ("y", 132),
    ]
    backward = record(call, 90, 132, "auto").backward
    assert [entry.blocks for entry in one.passes[1]] == [math.prod(b.grid) for b in backward]
    assert [entry.what for entry in one.passes[1]] == [
        "pack", "dh, dB", "dA", "add 16 parts", "dx",
    ]  # fmt: skip


def test_a_pass_takes_as_long_as_its_bytes() -> None:
    """h on an H200 is bound by reading x; then two blocks add their sums: by hand."""
    h = predict.predict(H200, Call(8192, 4096, 4096, 16), COUNTS).passes[0][0]
    moved = 8192 * 4096 * 2 + 8192 * 16 * (4 + 2)  # x; h in float and in bf16
    sums = 128 * 16 * 4
    added = 2 * sums / 128 + sums / 2 / 16 + 900  # own ones, half of another block's, barriers
    assert h.bound == "HBM"
    us = moved / (0.9 * 4.8e12) * 1e6 + added / 1400 + 0.7 + 1.2
    assert h.us == pytest.approx(us, rel=1e-6)


def test_what_parts_cost_and_what_clusters_save() -> None:
    """dA of 128 ranks: four parts, of blocks that share dh; of 16 ranks clusters add them."""
    wide = predict.predict(H200, Call(8192, 4096, 4096, 128), COUNTS).passes[1]
    dA = next(entry for entry in wide if entry.what == "dA")
    moved = 8192 * 4096 * 2 + 4 * 4096 * 128 * 4
    assert dA.bound == "HBM"
    assert dA.us == pytest.approx(moved / (0.9 * 4.8e12) * 1e6 + 0.7 + 1.2, rel=1e-6)
    assert "add 4 and 4 parts" in [entry.what for entry in wide]  # of dB and of dA, by one kernel
    narrow = predict.predict(H200, Call(8192, 4096, 4096, 16), COUNTS).passes[1]
    dA = next(entry for entry in narrow if entry.what == "dA")
    moved, sums = 8192 * 4096 * 2 + 4096 * 16 * 2, 128 * 16 * 4
    added = 2 * sums / 128 + sums * 3 / 4 / 13 + 900
    us = moved / (0.9 * 4.8e12) * 1e6 + added / 1400 + 0.7 + 1.2
    assert dA.us == pytest.approx(us, rel=1e-6)


def test_what_dora_adds() -> None:
    """Forward reads z and writes y; the norm is bound by the ranks' instructions: by hand."""
    call, how = Call(8192, 4096, 4096, 64), SCENARIOS["central"]
    ours, aten = (one(H200, how, call) for one in (rows.by_kernels, rows.by_aten))
    assert ours.scale == pytest.approx(4 * 8192 * 4096 / (0.9 * 4.8e12) * 1e6 + 0.7 + 2.0, rel=1e-6)
    warps = 4096 // 32 * 4096 // 256 * 8
    instructions = rows.TILE_INSTRUCTIONS + 2 * rows.CHUNK_INSTRUCTIONS
    cycles = warps * (instructions + rows.RANK_INSTRUCTIONS[False] * 64) / 4 / 132
    assert ours.norm == pytest.approx(cycles / 1.4e3 + 0.7 + 2.0 + 0.7 + 1.2, rel=1e-6)
    assert ours.both < aten.both / 3


def test_layers_of_one_x() -> None:
    """q, k and v on an H200 read x once for h and once for dA, and have one product each way."""
    layers = [Call(8192, N, 4096, 16) for N in (4096, 1024, 1024)]
    one = groups.predict_group(H200, layers, COUNTS)
    names = [[entry.what.split(" ")[0] for entry in launches] for launches in one.passes]
    assert names[0] == ["pack", "h", "add", "y"]
    assert names[1] == ["pack", *["dh,"] * 3, "dA", "add", "add", "dx"]
    # 1,536 tiles of 64 steps of 1,024 cycles and of a low-rank one, and what is between them
    steps = 12 * (64 + 0.25) * 1024 / 1400
    assert steps < one.passes[0][-1].us < 1.05 * steps
    assert sum(one.together) + one.additions < sum(one.separate) + one.additions
    assert one.together[0] == sum(entry.us for entry in one.passes[0]) and not any(one.alone[0])

    dropped = [replace(layer, dropout_p=0.1) for layer in layers]
    two = groups.predict_group(H200, dropped, COUNTS)
    assert two.together[0] < two.separate[0]
    assert two.together[1] == pytest.approx(two.separate[1])
    assert all("a mask of its own" in why for why in two.alone[1]) and not two.passes[1]
    assert two.alone[0] == ["", "", ""]


@pytest.mark.parametrize(
    ("widths", "own"), [([4096] * 5, {4}), ([4096, 4096, 100], {2}), ([100, 4096], {0, 1})], ids=str
)
def test_a_group_is_predicted_as_the_backend_runs_it(widths: list[int], own: set[int]) -> None:
    """Four together and the fifth by a call, as a layer that is not aligned; and why."""
    layers = [Call(8192, N, 4096, 16) for N in widths]
    one = groups.predict_group(H200, layers, COUNTS)
    for i, reasons in enumerate(one.alone):
        assert {at for at, why in enumerate(reasons) if why} == own
        alone = sum(predict.predict(H200, layers[at], COUNTS).layer[i] for at in own)
        together = sum(entry.us for entry in one.passes[i])
        assert one.together[i] == pytest.approx(alone + together)
    if widths == [100, 4096]:
        assert "no multiple of 16 bytes" in one.alone[0][0]
        assert one.alone[0][1] == "no other layer can run together with it"


PRODUCT = "product_sm90_kernel<Bf16, ProductShape<256, 4>, (Major)0>"


def product_us(card: Card, call: Call, end_of_tile: int, cluster: int, low_rank: bool) -> float:
    """Of a launch of 132 blocks whose tiles end with so many instructions."""
    counted = {"instructions": end_of_tile, "alu": 0, "imad": 0, "wide": 0, "memory": 0}
    code = {PRODUCT: {"end_of_tile": counted}}
    launch = RecordedLaunch(
        f"void lora_ext::sm90::{PRODUCT}(T)", (132, 1, 1), 384, cluster, 196672, True
    )
    timer = kernels.Timer(card, SCENARIOS["central"], code, call, False, low_rank=low_rank)
    return next(timer.times([launch])).us


def test_a_product_takes_as_long_as_its_tiles() -> None:
    """y on an H200: eight of 1,024 tiles for the busiest block, by hand."""
    step = 48 * 1024 / 46.7  # L2 is slower than the tensor cores' 1,024 cycles
    end = 250 + 1.1 * 2 * 900
    cycles = 8 * (64 * step + step / 4 + end)
    us = product_us(H200, Call(8192, 4096, 4096, 16), 900, 1, True)
    assert us == pytest.approx(cycles / 1400 + 0.7 + 1.2, rel=1e-6)


@pytest.mark.parametrize(
    ("instructions", "cluster", "published"),
    [(985, 1, 777), (985, 2, 799), (250, 2, 808)],
    ids=["stores from registers", "multicast", "stores by TMA"],
)
def test_published_products(instructions: int, cluster: int, published: float) -> None:
    """fast.cu's README, H100 SXM, 8192 x 8192 x 8192: its kernels 6, 7 and 11."""
    us = product_us(CARDS["h100"], Call(8192, 8192, 8192, 1), instructions, cluster, False)
    assert 2 * 8192**3 / us * 1e-6 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_more_to_do_takes_longer(card: Card, path: str) -> None:
    base = Call(2048, 4096, 4096, 16)
    more = [
        Call(4096, 4096, 4096, 16),
        Call(2048, 8192, 4096, 16),
        Call(2048, 4096, 8192, 16),
        Call(2048, 4096, 4096, 256),
        Call(2048, 4096, 4096, 16, fp32_adapters=True),
    ]
    dropout = Call(2048, 4096, 4096, 16, dropout_p=0.1)

    def us(call: Call) -> float:
        return sum(predict.predict(card, call, COUNTS, path).layer)

    assert all(us(call) > us(base) for call in more)
    assert us(dropout) >= us(base)  # it may hide behind the memory


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_scenarios_are_in_order(card: Card) -> None:
    for M, r in itertools.product((512, 8192), (16, 128)):
        times = [
            sum(predict.predict(card, Call(M, 4096, 4096, r), COUNTS, "fused", name).layer)
            for name in SCENARIOS
        ]
        assert times == sorted(times)


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_cublas_has_its_rate(card: Card) -> None:
    central = SCENARIOS["central"]
    assert blas.sustained_clock(card, central) == pytest.approx(card.clock, rel=0.01)
    assert calibration(card, COUNTS, "central")["cublas"] == pytest.approx(card.cublas, rel=0.01)
    ours = [calibration(card, COUNTS, name)["ours"] for name in SCENARIOS]
    assert ours == sorted(ours, reverse=True) and 0.5 < ours[-1] < ours[0] < 1.05


@pytest.mark.parametrize(
    ("parts", "waits"), [(0, 0), (1, 1), (2, 2), (4, 1), (7, 4), (8, 1), (16, 1), (112, 7)]
)
def test_waits_for_parts(parts: int, waits: int) -> None:
    assert kernels.waits(parts) == waits


# ---- The program ---------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert predict.main(arguments) == 0
    return capsys.readouterr().out


ONE = ("--tokens", "512", "--ranks", "16", "--shapes", "4096x1024")


@pytest.mark.parametrize(
    "what",
    [[], ["--passes"], ["--paths"], ["--dora"], ["--group", "4096x4096,4096x1024"]],
    ids=lambda what: " ".join(what),
)
def test_all_it_prints_is_called_predicted(
    capsys: pytest.CaptureFixture[str], what: list[str]
) -> None:
    printed = run(capsys, *ONE, *what)
    assert "PREDICTED" in printed and "Predicted, not measured" in printed
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert all("predicted" in row for row in rows) and (rows or what == ["--paths"])
    data = json.loads(run(capsys, *ONE, *what, "--json"))
    assert data["kind"] == "predicted" and COUNTS["sources"] in data["counts"]
    assert data["rows"] and {row["kind"] for row in data["rows"]} == {"predicted"}


def test_paths_compares_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(run(capsys, "--paths", "--ranks", "16", "--json"))["rows"]
    assert {row["call"]["M"] for row in rows} == {1, 16, 128, 512, 2048, 8192}
    for row in rows:
        fastest = min(row[path] for path in (*PATHS, "auto"))
        assert row["default_over_fastest"] == pytest.approx(row["auto"] / fastest)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("options", [[], ["--fp32-adapters"], ["--dropout", "0.1"]], ids=str)
def test_no_default_is_slower_than_cublas(
    capsys: pytest.CaptureFixture[str], card: str, options: list[str]
) -> None:
    """By prediction, and by more than it calls a difference."""
    printed = run(capsys, "--paths", "--card", card, "--ranks", "16,128", "--json", *options)
    for row in json.loads(printed)["rows"]:
        assert row["auto"] <= (1 + predict.MARGIN) * row["composed"], row


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 1024)], ids=str)
def test_few_rows(card: Card, shape: tuple[int, int]) -> None:
    """A forward of up to 64 rows is one kernel's, never slower than cuBLAS's; at 4096 x 4096 it is
    at most 1.15 times the frozen layer."""
    (N, K), kernels = shape, set()
    for M, fp32, r in itertools.product((1, 17, 32, 64), (False, True), (8, 16, 32, 64)):
        call = Call(M, N, K, r, fp32)
        default, composed = (predict.predict(card, call, COUNTS, p) for p in ("auto", "composed"))
        assert default.layer[0] <= (1 + predict.MARGIN) * composed.layer[0], call
        if r == 16:
            assert shape != (4096, 4096) or fp32 or default.forward_ratio <= 1.15, call
            (launch,) = default.passes[0]
            kernels.add(launch.what)
    assert kernels == {"h, y"}


def test_few_rows_take_as_long_as_their_bytes() -> None:
    """On an RTX 4090 they are bound by reading the weight: by hand."""
    (launch,) = predict.predict(CARDS["4090"], Call(32, 4096, 4096, 16), COUNTS).passes[0]
    assert launch.bound == "HBM" and launch.blocks == 128
    assert launch.us == pytest.approx(2 * 4096**2 / (0.9 * 1.01e12) * 1e6 + 3 * 0.7 + 2.0, rel=1e-6)


def test_counts_of_other_sources_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts.sass, "sources_hash", lambda: COUNTS["sources"])
    assert ", as they are" in run(capsys, *ONE)
    monkeypatch.setattr(counts.sass, "sources_hash", lambda: "another")
    assert "OTHER THAN THESE" in run(capsys, *ONE)


def test_a_kernel_without_counts_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "load", lambda: COUNTS | {"kernels": {}})
    assert predict.main(ONE) == 2
    told = capsys.readouterr().err
    assert "no counts of low_rank_sm90_kernel<Bf16" in told and "--refresh-counts" in told


def made_up_report(path: Path, **changed: Any) -> Path:
    """Of a GPU that does not exist, with times that nobody measured."""

    def row(rival: str, mode: str, ratio: float, dtype: str = "bf16") -> Row:
        quartiles = Quartiles(ratio, ratio, ratio)
        case = Case(4096, 1024, 512, 16, dtype, 0.0)
        timing = Timing(Quartiles(1.0, 1.0, 1.0), quartiles, [1.0], 1)
        return Row(case, mode, rival, OK, timing=timing)

    environment = {
        "device": "NVIDIA H200, MADE UP", "threads": 1, "cpus": 1, "load_average": 0.0,
        "versions": {"python": "3"}, "commit": None, "dirty": None, "date": "2026-01-01",
        "command": "none",
    }  # fmt: skip
    rows = [row("frozen", FWD, 1.0), row("lora_ext", FWD, 2.5), row("lora_ext", FWD_BWD, 50.0)]
    rows += [
        row("lora_ext:fused", FWD, 3.5),
        row("peft", FWD, 2.0),
        row("lora_ext", FWD, 9, "fp32"),
    ]
    Report(environment, changed.get("rows", rows)).save(path)
    return path


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = made_up_report(tmp_path / "made_up.json")
    printed = run(capsys, "--compare", str(report))
    assert "NVIDIA H200, MADE UP" in printed and "PREDICTED for H200" in printed and "NO" in printed
    rows = json.loads(run(capsys, "--compare", str(report), "--json"))["rows"]
    assert [(row["rival"], row["mode"], row["measured"]) for row in rows] == [
        ("lora_ext", FWD, 2.5), ("lora_ext", FWD_BWD, 50.0), ("lora_ext:fused", FWD, 3.5),
    ]  # fmt: skip
    call = Call(512, 1024, 4096, 16)
    wanted = predict.predict(H200, call, COUNTS)
    fused = predict.predict(H200, call, COUNTS, "fused")
    assert [row["predicted"] for row in rows] == pytest.approx(
        [wanted.forward_ratio, wanted.ratio, fused.forward_ratio]
    )


@pytest.mark.parametrize("content", [None, "{}", "no json"], ids=["missing", "empty", "text"])
def test_what_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content)
    assert predict.main(["--compare", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_a_report_without_our_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["--compare", str(made_up_report(tmp_path / "none.json", rows=[]))]) == 2
    assert "no row of lora_ext" in capsys.readouterr().err


def test_a_report_of_another_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = str(made_up_report(tmp_path / "made_up.json"))
    assert predict.main(["--compare", report, "--card", "a100"]) == 2
    told = capsys.readouterr().err
    assert "measured on NVIDIA H200, MADE UP, which is not the card A100" in told and "h200" in told


def test_the_range_is_of_all_scenarios_and_the_reason_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Optimistic is worse than central where cuBLAS has more of it."""
    one = ("--tokens", "8192", "--ranks", "16", "--shapes", "4096x14336")
    (row,) = json.loads(run(capsys, *one, "--json"))["rows"]
    ratios = row["scenarios"].values()
    printed = run(capsys, *one)
    assert f"{min(ratios):.3f} - {max(ratios):.3f}" in printed
    assert min(ratios) <= row["ratio"] <= max(ratios)
    assert row["reason"].startswith("one pass over x") and "one pass over x" in printed


def test_a_base_of_fp16(capsys: pytest.CaptureFixture[str]) -> None:
    """Its h and dh are measured and packed by kernels of their own."""
    (row,) = json.loads(run(capsys, *ONE, "--fp16", "--json"))["rows"]
    (other,) = json.loads(run(capsys, *ONE, "--json"))["rows"]
    made = [entry["what"] for entry in row["passes"][1]]
    assert made.count("measure") == 2 and row["layer"][0] > other["layer"][0]


def test_what_is_switched_off_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ("--tokens", "511", "--ranks", "16", "--shapes", "4096x1024")
    monkeypatch.setenv("LORA_EXT_CUDA_OFF", "cluster, together")
    assert "LORA_EXT_CUDA_OFF=cluster, together changes" in run(capsys, *two)
    monkeypatch.setenv("LORA_EXT_CUDA_OFF", "clusters")
    predict.record.cache_clear() if hasattr(predict, "record") else record.cache_clear()
    assert predict.main(two) == 2 and "LORA_EXT_CUDA_OFF: got 'clusters'" in capsys.readouterr().err


WRONG = [["--tokens", "0"], ["--shapes", "7"], ["--card", "h800"], ["--dropout", "nan"]]
WRONG += [["--dropout", "1"], ["--dropout", "-1"], ["--tokens", "99999999999"]]
WRONG += [["--shapes", "3584-3584"], ["--dora", "--paths"], ["--passes", "--paths"]]


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        predict.main(wrong)
    assert stopped.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_refreshing_needs_nvcc(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = counts.FILE.read_bytes()
    monkeypatch.setattr(counts.sass.shutil, "which", lambda *_, **__: None)
    assert predict.main(["--refresh-counts", *ONE]) == 2
    assert "no nvcc" in capsys.readouterr().err and counts.FILE.read_bytes() == before
