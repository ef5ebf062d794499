"""The distributed example on two CPU processes: every plan learns the same and moves what
docs/scale.md says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import torchrun

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_distributed.py"
STEPS, BATCH, LENGTH, HIDDEN, LAYERS, RANK = 3, 8, 16, 64, 2, 4
M, FEED_FORWARD, KEYS, VOCABULARY = BATCH * LENGTH, 3 * HIDDEN, HIDDEN // 2, 512
# (out_features, in_features) of the projections of a layer
COLUMNS = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), *[(FEED_FORWARD, HIDDEN)] * 2]
ROWS = [(HIDDEN, HIDDEN), (HIDDEN, FEED_FORWARD)]
ADAPTERS = LAYERS * sum(RANK * (n + k) for n, k in COLUMNS + ROWS)
BLOCKS = LAYERS * (sum(n * k for n, k in COLUMNS + ROWS) + 2 * HIDDEN) + ADAPTERS
ROOT = 2 * VOCABULARY * HIDDEN + HIDDEN


def trained(plan: str, folder: Path, *more: str) -> dict[str, Any]:
    """What a run reports."""
    sizes = {"steps": STEPS, "batch-size": BATCH, "length": LENGTH, "hidden": HIDDEN}
    sizes |= {"layers": LAYERS, "rank": RANK}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    printed = torchrun(str(EXAMPLE), f"--plan={plan}", f"--out={folder}", *more, *options)
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    report: dict[str, Any] = json.loads(lines[-1])
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    return report


def moved(report: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = report["bytes_into_collectives_of_a_step"]
    return found


def test_plans_learn_alike_and_move_what_is_said(tmp_path: Path) -> None:
    ddp = trained("ddp", tmp_path / "ddp")
    assert moved(ddp)["all_reduce"] == 4 * ADAPTERS
    fsdp = trained("fsdp", tmp_path / "fsdp", f"--checkpoint={tmp_path / 'checkpoint'}")
    assert moved(fsdp) == {
        "all_gather": 4 * (2 * BLOCKS + ROOT) // 2,
        "reduce_scatter": 4 * ADAPTERS,
    }
    assert fsdp["parameters_here"] == (BLOCKS + ROOT) // 2
    # What shards wrote, tensor parallelism goes on with.
    tp = trained("tp", tmp_path / "tp", f"--checkpoint={tmp_path / 'checkpoint'}")
    base = 4 * M * HIDDEN * (len(ROWS) * LAYERS + len(COLUMNS) * LAYERS - 3)
    numbers = sum(min(M, k) for _, k in COLUMNS) + sum(min(M, n) for n, _ in ROWS)
    assert moved(tp) == {"all_reduce": base + 4 * RANK * LAYERS * numbers}
    assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=1e-4)
    assert tp["losses"][0] < fsdp["losses"][-1] < fsdp["losses"][0]
