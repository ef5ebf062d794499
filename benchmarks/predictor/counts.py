"""The counts that predictions are made of: kept in sass_counts.json, for machines without nvcc."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from predictor import sass

FILE = Path(__file__).resolve().parents[1] / "sass_counts.json"


def load() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def refresh() -> dict[str, Any]:
    """Counts again, with nvcc and nvdisasm, and keeps the result."""
    counts = sass.count_all()
    FILE.write_text(json.dumps(counts, indent=1) + "\n")
    return counts


def origin(counts: dict[str, Any]) -> str:
    """Of which sources they are, and whether those are the ones that are here."""
    same = counts["sources"] == sass.sources_hash()
    text = f"instructions counted in the code of nvcc {counts['nvcc']} for sources "
    text += counts["sources"]
    if same:
        return f"{text}, as they are"
    return f"{text}, OTHER THAN THESE: predict.py --refresh-counts, where there is nvcc"
