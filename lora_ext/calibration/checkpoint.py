"""Files of calibration: where a pass is kept while it runs, and what it leaves for another time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FIELD = "lora_ext.calibration"  # of the file's metadata
_BETWEEN = "|"  # a layer's name and a part of its statistic


class Checkpoint:
    """A file with the statistics of a pass that is not done: all of them or those of before,
    whenever the process is killed.

    Args:
        what: of which pass it is; another's is refused.
    """

    def __init__(self, where: str, path: Path, what: Mapping[str, Any]) -> None:
        self._where, self._path = where, path
        self._what = json.loads(json.dumps(what))

    def write(self, counts: Mapping[str, int], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replaces the file by these states, by names of layers."""
        tensors = {
            f"{name}{_BETWEEN}{part}": tensor.detach().cpu().contiguous()
            for name, state in states.items()
            for part, tensor in state.items()
        }
        text = json.dumps({"what": self._what, "counts": dict(counts)})
        replace_file(self._path, lambda place: save_file(tensors, place, {_FIELD: text}))

    def read(self) -> tuple[dict[str, int], dict[str, dict[str, Tensor]]]:
        """The counts and states that the file has; none where there is no file.

        Raises:
            ValueError: it is damaged, or of another pass.
        """
        if not self._path.exists():
            return {}, {}
        try:
            with safe_open(self._path, "pt") as file:
                text = (file.metadata() or {}).get(_FIELD)
                kept = json.loads(text) if text else {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{self._where}: checkpoint_file: {self._path} cannot be read ({error}); delete it "
                "to begin anew"
            ) from None
        if kept.get("what") != self._what:
            raise ValueError(
                f"{self._where}: checkpoint_file: {self._path} is of another calibration (other "
                "layers, settings or method), expected one of this; delete it to begin anew"
            )
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(_BETWEEN)
            states.setdefault(name, {})[part] = tensor
        return kept["counts"], states

    def remove(self) -> None:
        """The pass is done."""
        self._path.unlink(missing_ok=True)


def replace_file(path: Path, write: Any) -> None:
    """Has a file written beside its place, and then takes that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def is_there(file: str | os.PathLike[str] | None) -> bool:
    """Whether a cache has been written."""
    return file is not None and Path(file).is_file() and Path(file).stat().st_size > 0


def save_cache(file: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Writes a cache: by torch.save, as PEFT does, or safetensors if that is how its name ends."""
    path = Path(file)
    held = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        replace_file(path, lambda place: save_file(held, place))
    else:
        replace_file(path, lambda place: torch.save(held, place))


def load_cache(where: str, file: str | os.PathLike[str], device: Any) -> dict[str, Tensor]:
    """The tensors of a cache that this or PEFT wrote; nothing in it is run.

    Raises:
        ValueError: it cannot be read, or holds other things than tensors.
    """
    try:
        if Path(file).suffix == ".safetensors":
            with safe_open(file, "pt", device=str(device)) as opened:
                found: Any = {key: opened.get_tensor(key) for key in opened.keys()}
        else:
            found = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # of pickle, zipfile, safetensors and torch
        text = str(error).partition("\n")[0][:200]
        raise ValueError(f"{where}: {file}: cannot be read ({text}); delete it") from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{where}: {file}: expected a dict of tensors; delete it")
    return found


def of_cache(where: str, file: Any, cache: Mapping[str, Tensor], key: str) -> Tensor:
    """One of its tensors; ValueError without it."""
    if key not in cache:
        raise ValueError(
            f"{where}: {file}: has no '{key}', expected a cache of this model and target_modules; "
            "delete it, or give another name"
        )
    return cache[key]
