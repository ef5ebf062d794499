"""The options of `python -m lora_ext.bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_ext.bench import grid
from lora_ext.bench.models.cases import MODELS, TARGETS
from lora_ext.bench.models.ways import WAYS
from lora_ext.bench.quantized import QUANT_TYPES
from lora_ext.bench.rivals import RIVALS

_DESCRIPTION = "Measure LoRA linear layers against the frozen nn.Linear under them."
_EPILOG = (
    "Exit status: 0 all is well; 1 a contender is wrong or fails, or lora_ext became slower than "
    "in OLD; 2 the command line or a file cannot be used."
)
_ONLY_MODELS = tuple(name for name in WAYS if name not in RIVALS)
_LLAMA = "llama-1b-shaped"
# What has no meaning with a mode.
_WITHOUT = {
    "adapters": ("full", "ranks", "dropouts", "rivals", "compare", "plots", "markdown", "model"),
    "quantized": ("adapters", "rivals", "plots", "markdown", "model"),
    "model": ("full", "shapes", "modes", "compare", "markdown"),
}


def _comma_separated(convert: Callable[[str], Any], form: str) -> Callable[[str], tuple[Any, ...]]:
    """Makes an argparse type for a list; form says what a valid item is."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(convert(item) for item in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: each must be {form}") from None

    return parse


def _one_of(*values: str) -> Callable[[str], tuple[Any, ...]]:
    return _comma_separated(lambda item: values[values.index(item)], f"one of {', '.join(values)}")


def _size(item: str) -> int:
    size = int(item)
    if not 1 <= size < 2**31:
        raise ValueError
    return size


def _shape(item: str) -> tuple[int, int]:
    in_features, out_features = item.split("x")
    return _size(in_features), _size(out_features)


def _probability(item: str) -> float:
    p = float(item)
    if not 0 <= p < 1:
        raise ValueError
    return p


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


# What argparse calls them.
_size.__name__, _seconds.__name__ = "positive integer", "positive number of seconds"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lora_ext.bench", None, _DESCRIPTION, _EPILOG)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few tiny cases, in seconds")
    size.add_argument("--full", action="store_true", help="every size and rank; takes long")

    sizes = _comma_separated(_size, "a positive integer")
    shapes = _comma_separated(_shape, "KxN, like 1024x4096")
    dropouts = _comma_separated(_probability, "at least 0 and less than 1")
    axes = parser.add_argument_group("what to measure (comma-separated lists)")
    axes.add_argument("--shapes", type=shapes, metavar="KxN", help="in_features x out_features")
    axes.add_argument("--tokens", type=sizes, metavar="M")
    axes.add_argument("--ranks", type=sizes, metavar="R")
    axes.add_argument("--dtypes", type=_one_of(*grid.DTYPES), help=", ".join(grid.DTYPES))
    axes.add_argument("--dropouts", type=dropouts, metavar="P")
    axes.add_argument("--modes", type=_one_of(*grid.MODES), help=", ".join(grid.MODES))
    axes.add_argument("--rivals", type=_one_of(*RIVALS, *_ONLY_MODELS), help=", ".join(RIVALS))
    axes.add_argument(
        "--adapters", type=sizes, metavar="N", help="instead: so many adapters in one batch"
    )
    axes.add_argument("--quantized", choices=QUANT_TYPES, help="instead: over a quantized base")

    models = parser.add_argument_group("whole models instead, a step of training each")
    models.add_argument("--model", choices=MODELS)
    models.add_argument(
        "--sizes",
        type=_shape,
        metavar="HxI",
        help=f"hidden x intermediate features instead of the model's; alone: of {_LLAMA}",
    )
    models.add_argument("--layers", type=_size, metavar="N", help="instead of the model's")
    models.add_argument(
        "--targets", type=_one_of(*TARGETS), help=f"{', '.join(TARGETS)}; default: both"
    )
    text = f"--rivals: {', '.join(WAYS)}; tokens, ranks, dtypes, dropouts as above"
    models.description = f"{text}; --budget is per case"

    how = parser.add_argument_group("how to measure")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how.add_argument("--threads", type=_size, help="CPU threads; default: torch's choice")
    how.add_argument("--budget", type=_seconds, metavar="SECONDS", help="per row; default: 2")
    how.add_argument(
        "--deadline", type=_seconds, metavar="SECONDS", help="begin no case after this time"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    output.add_argument("--plots", type=Path, metavar="DIR", help="write PNG plots")
    output.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write a table between markers in the file"
    )
    output.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar=("OLD", "NEW"),
        help="compare this run with OLD; with NEW, nothing is run and NEW's results are used",
    )
    return parser


def check_meaning(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with an error where options have no meaning together."""
    if options.sizes and not options.model:
        options.model = _LLAMA
    for mode, names in _WITHOUT.items():
        for name in names if getattr(options, mode) else ():
            if getattr(options, name):
                parser.error(f"--{name} has no meaning with --{mode}: see --help")
    if not options.model:
        for name in ("layers", "targets"):
            if getattr(options, name):
                parser.error(f"--{name} has a meaning with --model alone: see --help")
    known = WAYS if options.model else RIVALS
    for name in options.rivals or ():
        if name not in known:
            mode = "with" if options.model else "without"
            parser.error(f"--rivals: {name} takes no part {mode} --model; use {', '.join(known)}")
