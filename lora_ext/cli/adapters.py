"""What several commands read of adapter folders."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_ext.cli.errors import WrongUse

if TYPE_CHECKING:
    from torch import Tensor

    from lora_ext.io import TensorFile

HEADER = 8 << 20  # bytes, tens of thousands of tensors; without a model to compare with
WEIGHTS = "adapter_model.safetensors"


class _Folder(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if Path(value).is_file():
            self.fail(
                f"{str(value)!r} is a file, expected the folder of an adapter; `lora-ext convert` "
                "makes one of other formats",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


ADAPTER = _Folder(exists=True, file_okay=False, path_type=Path)


@dataclass(frozen=True)
class TensorFacts:
    """What inspecting tells of a tensor.

    Attributes:
        norm: Frobenius; None with NaN or Inf.
        max_abs: None with NaN or Inf, and of an empty tensor.
        nan, inf: how many.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    norm: float | None
    max_abs: float | None
    nan: int
    inf: int


def shapes_of(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The shapes of an adapter's tensors by their keys, and its config as the file has it."""
    from lora_ext.io import open_adapter

    with open_adapter(folder) as files:
        specs = files.header(max_header_bytes=HEADER)
        return {key: spec.shape for key, spec in specs.items()}, files.config


def task_of(folder: Path) -> str | None:
    """The config's task_type."""
    task = shapes_of(folder)[1].get("task_type")
    return task if isinstance(task, str) else None


def adapters_in(folder: Path) -> str:
    """Which adapters a folder has in it, for a message: those of other names than "default"."""
    paths = sorted(islice(folder.glob("*/adapter_config.json"), 20)) if folder.is_dir() else []
    names = ", ".join(path.parent.name for path in paths)
    return f"; give one of the adapters in it, {names}" if names else ""


@contextmanager
def without_initialisation(folder: Path) -> Iterator[Path]:
    """The adapter, or a copy of it that loading does not initialise first from the base's weights
    (pissa, olora) or from data (corda): an outline has none."""
    from lora_ext.adapters.calibrated_configs import PLAIN
    from lora_ext.io import CONFIG_NAME, open_adapter, save_files
    from lora_ext.nn.init import mutates_weight

    with open_adapter(folder) as files, ExitStack() as stack:
        kind = files.config.get("init_lora_weights")
        if isinstance(kind, (bool, str)) and mutates_weight(kind):
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora_ext-")))
            shutil.copyfile(folder / WEIGHTS, copy / WEIGHTS)
            config = files.config | PLAIN
            save_files(copy, {CONFIG_NAME: json.dumps(config).encode()})
            folder = copy
        yield folder


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(file: TensorFile, key: str) -> str:
    (dtype,) = file.specs[key].dtypes
    return dtype_name(dtype)


def facts_of(file: TensorFile, key: str, advance: Callable[[int], None]) -> TensorFacts:
    """Reads a tensor in blocks."""
    import torch

    squares, largest, nan, inf = 0.0, 0.0, 0, 0
    for block in file.blocks(key):
        values = as_double(block)
        nan += int(torch.isnan(values).sum())
        inf += int(torch.isinf(values).sum())
        squares += float(values.square().sum())
        largest = max(largest, float(values.abs().max()))
        advance(block.nbytes)
    spec, finite = file.specs[key], not nan and not inf
    return TensorFacts(
        key=key,
        shape=spec.shape,
        dtype=dtype_of(file, key),
        bytes=file.bytes_of(key),
        norm=math.sqrt(squares) if finite else None,
        max_abs=largest if finite and 0 not in spec.shape else None,
        nan=nan,
        inf=inf,
    )


def as_double(block: Tensor) -> Tensor:
    """Values of any dtype; torch widens 8-bit floats to float only."""
    return (block.float() if block.itemsize == 1 else block).double()


def check_memory(needed: int, what: str) -> None:
    """WrongUse where so many bytes are more than the machine has free: it would kill a process."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return
    if needed > free:
        raise WrongUse(
            f"{what} needs {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"
        )
