"""`lora-ext inspect`: what an adapter folder holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_ext._progress import progress
from lora_ext.cli.adapters import ADAPTER
from lora_ext.cli.answers import Answer, size, table, telling

if TYPE_CHECKING:
    from lora_ext.cli.adapters import TensorFacts

_SHOWN = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules")
_IF_SET = (
    *(
        "use_rslora",
        "use_dora",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "trainable_token_indices",
    ),
    *("target_parameters", "layers_to_transform", "layer_replication", "fan_in_fan_out"),
    *("exclude_modules", "task_type", "base_model_name_or_path"),
)


@click.command(short_help="Tell what an adapter folder holds: config, ranks, norms, NaN, sizes.")
@click.argument("folder", type=ADAPTER)
@telling
def inspect(folder: Path) -> Answer:
    """Tell what the adapter in FOLDER holds: its config, and shape, dtype, norm, largest value, NaN
    and Inf of each tensor.

    It judges nothing (`lora-ext verify` does), and runs on files of any origin: they are checked
    before they are read, and never held in memory whole.

    JSON: folder, config (as the file has it), tensors (a list of key, shape, dtype, bytes, norm,
    max_abs, nan, inf; norm and max_abs are null with NaN or Inf), parameters, bytes, dtypes and
    ranks (each a count by name), non_finite (keys with NaN or Inf).
    """
    from lora_ext.cli.adapters import HEADER, facts_of
    from lora_ext.io import open_adapter

    with open_adapter(folder) as files:
        file, config = files.open_tensors(max_header_bytes=HEADER), files.config
        total = sum(map(file.bytes_of, file.specs))
        with progress(f"Reading {folder}", total) as advance:
            facts = [facts_of(file, key, advance) for key in sorted(file.specs)]
    data = {"folder": str(folder), "config": config, **summary(facts)}
    return Answer(data, _text(folder, data, facts))


def summary(facts: list[TensorFacts]) -> dict[str, Any]:
    """What --json says of the tensors."""
    dtypes: Counter[str] = Counter()
    for one in facts:
        dtypes[one.dtype] += 1
    return {
        "tensors": [asdict(one) for one in facts],
        "parameters": sum(_elements(one) for one in facts),
        "bytes": sum(one.bytes for one in facts),
        "dtypes": dict(dtypes),
        "ranks": _ranks(facts),
        "non_finite": [one.key for one in facts if one.nan or one.inf],
    }


def _elements(one: TensorFacts) -> int:
    count = 1
    for length in one.shape:
        count *= length
    return count


def _ranks(facts: list[TensorFacts]) -> dict[str, int]:
    """How many modules have a rank: that of their lora_A."""
    ranks: Counter[str] = Counter()
    for one in facts:
        if one.key.endswith(("lora_A.weight", "lora_embedding_A")) and one.shape:
            ranks[str(one.shape[0])] += 1
    return dict(sorted(ranks.items(), key=lambda item: int(item[0])))


def _text(folder: Path, data: dict[str, Any], facts: list[TensorFacts]) -> str:
    config = data["config"]
    names = [name for name in _SHOWN if name in config]
    names += [name for name in _IF_SET if config.get(name)]
    if config.get("init_lora_weights", True) is not True:
        names.append("init_lora_weights")
    rows = [(name, _value(config[name])) for name in names]
    dtypes = ", ".join(f"{count} {name}" for name, count in data["dtypes"].items())
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in data["ranks"].items())
    rows += [
        ("parameters", f"{data['parameters']:,} in {len(facts)} tensors ({dtypes or 'none'})"),
        ("size", size(data["bytes"])),
        ("ranks", ranks or "none"),
        ("NaN or Inf", f"in {len(data['non_finite'])} tensors" if data["non_finite"] else "none"),
    ]
    heads = ("tensor", "shape", "dtype", "norm", "max", "")
    tensors = [
        (
            one.key.removeprefix("base_model.model."),
            "x".join(map(str, one.shape)),
            one.dtype,
            "-" if one.norm is None else f"{one.norm:.4g}",
            "-" if one.max_abs is None else f"{one.max_abs:.4g}",
            f"{one.nan} NaN, {one.inf} Inf" if one.nan or one.inf else "",
        )
        for one in facts
    ]
    return f"{folder}\n\n{table(rows)}\n\n{table(tensors, heads)}"


def _value(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 300 else f"{text[:300]}... ({len(text)} characters)"
