"""`lora-ext diff`: in what two adapters, models or safetensors files differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_ext._progress import progress
from lora_ext.cli.answers import Answer, counted, one_line, table, telling
from lora_ext.cli.errors import WrongUse

if TYPE_CHECKING:
    from lora_ext.io import TensorFile

_PATH = click.Path(exists=True, path_type=Path)


@dataclass(frozen=True)
class Source:
    """
    Attributes:
        config: None of a file, and of a folder of tensors alone.
        files: which open file has the tensor of a key.
    """

    config: dict[str, Any] | None
    files: dict[str, TensorFile]


def _number(_: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no number that differences are compared with")
    return value


@click.command(short_help="Compare two adapters, models or safetensors files.")
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    callback=_number,
    help="Take tensors for the same, whatever their dtypes, up to this difference |A-B|/|A|.",
)
@telling
def diff(a: Path, b: Path, tolerance: float | None) -> Answer:
    """Compare A and B: two adapter folders, two folders of models in safetensors, or two
    safetensors files. Tells which tensors and fields of the config differ, and by how much; configs
    where both have one.

    Exit code 1 if something differs.

    JSON: a, b, same, equal (how many tensors), only_a and only_b (keys), different (a list of key,
    shape_a, shape_b, dtype_a, dtype_b, max_abs and relative; null where the shapes differ), config
    (a list of field, a, b).
    """
    with _open(a) as one, _open(b) as other:
        shared = [key for key in one.files if key in other.files]
        total = sum(one.files[key].bytes_of(key) for key in shared)
        different = []
        with progress(f"Comparing {a} and {b}", total) as advance:
            for key in shared:
                found = _compare(one.files[key], other.files[key], key, tolerance)
                different += [] if found is None else [found]
                advance(one.files[key].bytes_of(key))
        data: dict[str, Any] = {
            "a": str(a),
            "b": str(b),
            "same": True,
            "equal": len(shared) - len(different),
            "only_a": [key for key in one.files if key not in other.files],
            "only_b": [key for key in other.files if key not in one.files],
            "different": different,
            "config": list(_config_differences(one.config, other.config)),
        }
    data["same"] = not any(data[key] for key in ("only_a", "only_b", "different", "config"))
    return Answer(data, _text(data), ok=data["same"])


@contextmanager
def _open(path: Path) -> Iterator[Source]:
    from lora_ext.cli.adapters import HEADER, adapters_in
    from lora_ext.cli.base_files import HEADER as MODEL_HEADER
    from lora_ext.io import CONFIG_NAME, WEIGHTS_NAME, open_adapter, open_tensors
    from lora_ext.io.files import open_inside, parse_json, read_all, typed_errors

    with ExitStack() as stack:
        config: dict[str, Any] | None = None
        if any((path / name).exists() for name in (CONFIG_NAME, WEIGHTS_NAME)):
            files = stack.enter_context(open_adapter(path))
            config, opened = files.config, [files.open_tensors(max_header_bytes=HEADER)]
        else:
            paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            if not paths:
                raise WrongUse(
                    f"{path}: has no safetensors files, expected an adapter or a model"
                    f"{adapters_in(path)}"
                )
            opened = [
                stack.enter_context(open_tensors(one, max_header_bytes=MODEL_HEADER))
                for one in paths
            ]
            if path.is_dir() and (path / "config.json").exists():
                with typed_errors(path / "config.json"):
                    file = stack.enter_context(open_inside(path, "config.json"))
                    config = parse_json(read_all(file, 1 << 20), str(file.name))
        yield Source(config, {key: one for one in opened for key in one.specs})


def _compare(
    a: TensorFile, b: TensorFile, key: str, tolerance: float | None
) -> dict[str, Any] | None:
    """The difference of a tensor; None where there is none."""
    import torch

    from lora_ext.cli.adapters import as_double, dtype_of

    shapes, dtypes = (a.specs[key].shape, b.specs[key].shape), (dtype_of(a, key), dtype_of(b, key))
    largest: float | None = None
    relative: float | None = None
    if shapes[0] == shapes[1]:
        squares, of_a, largest = 0.0, 0.0, 0.0
        for x, y in zip(a.blocks(key), b.blocks(key), strict=True):
            x, y = as_double(x), as_double(y)
            same = (x == y) | (torch.isnan(x) & torch.isnan(y))  # also infinities, and NaN
            gap = torch.where(same, 0.0, x - y)
            squares += float(gap.square().sum())
            of_a += float(x.square().nan_to_num(0.0, 0.0, 0.0).sum())
            largest = max(largest, float(gap.abs().nan_to_num(math.inf).max()))
        relative = math.sqrt(squares / of_a) if of_a else (math.inf if squares else 0.0)
        if tolerance is not None and relative <= tolerance:
            return None
        if tolerance is None and largest == 0.0 and dtypes[0] == dtypes[1]:
            return None
    return {
        "key": key,
        "shape_a": shapes[0], "shape_b": shapes[1],
        "dtype_a": dtypes[0], "dtype_b": dtypes[1],
        "max_abs": largest,
        "relative": relative,
    }  # fmt: skip


def _config_differences(
    a: dict[str, Any] | None, b: dict[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """A field that is not there is the same as one that is off. Beside what has no config nothing
    is compared."""
    if a is None or b is None:
        return
    for field in sorted(a.keys() | b.keys()):
        one, other = a.get(field), b.get(field)
        if _comparable(one) != _comparable(other):
            yield {"field": field, "a": one, "b": other}


def _comparable(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(map(repr, value)) or None
    return None if value is False or value == {} else value


def _text(data: dict[str, Any]) -> str:
    if data["same"]:
        return f"no difference in {counted(data['equal'], 'tensor')}"
    lines = [f"config   {one['field']}: {one['a']!r} -> {one['b']!r}" for one in data["config"]]
    for side, key in (("A", "only_a"), ("B", "only_b")):
        lines += [one_line(f"only {side}   {name}") for name in data[key]]
    rows = [
        (
            one["key"].removeprefix("base_model.model."),
            _pair(one, "shape"),
            _pair(one, "dtype"),
            _gap(one),
        )
        for one in data["different"]
    ]
    if rows:
        lines += [*[""] * bool(lines), table(rows, ("tensor", "shape", "dtype", "difference")), ""]
    differ = f"{counted(len(rows), 'tensor')} {'differs' if len(rows) == 1 else 'differ'}"
    lines.append(f"{differ}, {data['equal']} {'is' if data['equal'] == 1 else 'are'} the same")
    return "\n".join(lines)


def _pair(one: dict[str, Any], what: str) -> str:
    a, b = one[f"{what}_a"], one[f"{what}_b"]
    if what == "shape":
        a, b = ("x".join(map(str, shape)) for shape in (a, b))
    return str(a) if a == b else f"{a} -> {b}"


def _gap(one: dict[str, Any]) -> str:
    if one["relative"] is None:
        return "-"
    return f"at most {one['max_abs']:.3g}, relative {one['relative']:.3g}"
