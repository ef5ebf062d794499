"""README.md of an adapter's folder: what the hub of Hugging Face reads of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_ext._extension import __version__
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.io.atomic import save_files

CARD_NAME = "README.md"
_TEXT = f"\n# LoRA adapter\n\nMade with lora_ext {__version__}, in PEFT's format.\n"


def write_model_card(model: AdaptedModel, folder: Path, tags: Iterable[str] = ()) -> None:
    """Writes the card, or gives one that is there what the hub reads of this model, and these tags;
    the rest of it stays."""
    path = folder / CARD_NAME
    data = dict(_data(model))
    data["tags"] = sorted({*data["tags"], *tags})
    if path.is_file():
        blocks, text = _split(path.read_text(encoding="utf-8"))
    else:
        blocks, text = {}, _TEXT
    blocks |= {key: f"{key}: {json.dumps(value)}\n" for key, value in data.items()}
    card = f"---\n{''.join(blocks.values())}---\n{text}"
    save_files(folder, {CARD_NAME: card.encode()})


def _data(model: AdaptedModel) -> Iterator[tuple[str, Any]]:
    base = model.get_base_model()
    config: Any = getattr(base, "config", None)
    name = getattr(config, "_name_or_path", None)
    tags = {"lora", *(getattr(base, "model_tags", None) or ())}
    if type(base).__module__.startswith("transformers."):
        tags.add("transformers")
    if name:
        tags.add(f"base_model:adapter:{name}")
    if config is not None and name is not None:
        yield "base_model", name
    yield "library_name", "peft"
    if any(one.task_type == "CAUSAL_LM" for one in model.peft_config.values()):
        yield "pipeline_tag", "text-generation"
    yield "tags", sorted(tags)


def _split(card: str) -> tuple[dict[str, str], str]:
    """The entries between the two `---` of a card, as they are written, by key; and the text."""
    lines = card.splitlines(keepends=True)
    ends = [i for i, line in enumerate(lines) if line.rstrip() == "---"][:2]
    if len(ends) < 2 or ends[0] != 0:
        return {}, card
    blocks: dict[str, str] = {}
    key = ""
    for line in lines[1 : ends[1]]:
        if line[:1] not in " -#\t\r\n" and ":" in line:
            key = line.partition(":")[0].strip("\"' ")
        blocks[key] = blocks.get(key, "") + line
    return blocks, "".join(lines[ends[1] + 1 :])
