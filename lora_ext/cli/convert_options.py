"""What the command line says of a file that its format leaves open."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ext.cli.errors import WrongUse
from lora_ext.cli.models import CONFIG, outline

if TYPE_CHECKING:
    from lora_ext.io.convert import Layer, Options

_MOST_NAMES = 16 << 20  # bytes of a text file of names


def options_of(
    alpha: float | None,
    base: Path | None,
    slices: Iterable[str],
    ids: Iterable[str],
    component: str | None,
    by_modules: bool = True,
) -> Options:
    """The options of a conversion; WrongUse for what is none.

    Args:
        by_modules: whether a format asks for the base's modules.
    """
    from lora_ext.io.convert import Options

    try:
        return Options(
            alpha=alpha,
            modules={} if base is None or not by_modules else _layers_of(base),
            slices={name: _slices(said) for name, said in _named("--slices", slices)},
            ids=dict(_named("--id", ids)),
            component=component,
            base=base,
            whole=base is not None and by_modules,
        )
    except (TypeError, ValueError) as error:
        raise WrongUse(str(error).replace("Options: alpha", "--alpha")) from error


def _named(option: str, said: Iterable[str]) -> Iterable[tuple[str, str]]:
    for text in said:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise WrongUse(f"{option}: got {text!r:.80}, expected NAME=VALUE")
        yield name, value


def _slices(said: str) -> tuple[Any, ...]:
    """`1,0,1`, or `4096:1,1024:0,1024:1` with the rows of each."""
    found: list[Any] = []
    for part in said.split(","):
        rows, colon, flag = part.rpartition(":")
        if flag not in ("0", "1") or (colon and not rows.isdecimal()):
            raise WrongUse(
                f"--slices: got {said!r:.80}, expected NAME=1,0,1, or with the rows of each slice "
                "NAME=4096:1,1024:0,1024:1"
            )
        found.append((int(rows), flag == "1") if colon else flag == "1")
    return tuple(found)


def _layers_of(base: Path) -> dict[str, Layer]:
    """The base's modules: of a folder of transformers, of safetensors, or names in a text file."""
    from lora_ext.io.convert import layers_of
    from lora_ext.io.files import parse_json

    if base.is_dir():
        config = base / CONFIG
        if config.is_file() and "model_type" in parse_json(config.read_bytes(), str(config)):
            return layers_of(outline(base))
        # A model of diffusers, or a pipeline with a folder for each.
        found = _in_files(base, "")
        for folder in sorted(one for one in base.iterdir() if one.is_dir()):
            found |= _in_files(folder, f"{folder.name}.")
        if not found:
            raise WrongUse(f"{base}: has neither a {CONFIG} of transformers nor .safetensors")
        return found
    if base.suffix == ".safetensors":
        return _in_file(base, "")
    if base.stat().st_size > _MOST_NAMES:
        raise WrongUse(f"{base}: is too long for a list of names, expected one in each line")
    return _names(base)


def _names(path: Path) -> dict[str, Layer]:
    from lora_ext.io.convert import Layer

    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {line: Layer() for line in lines if line}


def _in_files(folder: Path, start: str) -> dict[str, Layer]:
    found: dict[str, Layer] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= _in_file(path, start)
    return found


def _in_file(path: Path, start: str) -> dict[str, Layer]:
    """Modules with a weight, as far as its shape tells."""
    from lora_ext.io import read_header
    from lora_ext.io.convert import Layer

    found = {}
    for key, spec in read_header(path, max_header_bytes=64 << 20).items():
        name = key.removesuffix(".weight")
        if name != key and len(spec.shape) >= 2:
            kind = "conv" if len(spec.shape) > 2 else None
            found[start + name] = Layer(kind, spec.shape)
    return found
