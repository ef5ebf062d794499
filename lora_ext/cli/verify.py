"""`lora-ext verify`: whether an adapter is whole and sound, and fits a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_ext._progress import progress
from lora_ext.cli.adapters import ADAPTER
from lora_ext.cli.answers import Answer, counted, one_line, telling
from lora_ext.cli.errors import sentence

if TYPE_CHECKING:
    from lora_ext.adapters import LoraConfig
    from lora_ext.cli.adapters import TensorFacts

PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True)
class Problem:
    """What is wrong.

    Attributes:
        kind: "files", "config", "keys", "dtype", "shape", "rank", "values" or "model".
        where: the key or the module; "" for all of it.
    """

    kind: str
    where: str
    says: str


@click.command(short_help="Check an adapter: whole, sound, finite; and that it fits a model.")
@click.argument("folder", type=ADAPTER)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of transformers that the adapter has to fit. Its weights are not read.",
)
@telling
def verify(folder: Path, model: Path | None) -> Answer:
    """Check the adapter in FOLDER: the files are whole, the config is understood, keys, shapes and
    ranks are what the config says, no value is NaN or Inf. With --model also that it can be loaded
    into that model, and a note where neither of the two has the values of a layer.

    Exit code 1 if there is a problem.

    JSON: folder, model, ok, problems (a list of kind, where, says; kinds: files, config, keys,
    dtype, shape, rank, values, model), notes (a list of texts), tensors and bytes (counts).
    """
    from lora_ext.cli.adapters import HEADER, facts_of
    from lora_ext.errors import AdapterFileError
    from lora_ext.io import open_adapter

    problems, notes, facts, config = [], list[str](), list["TensorFacts"](), None
    mixture = False
    try:
        with open_adapter(folder) as files:
            mixture = files.config.get("peft_type") == "XLORA"
            config, found = _config(files.config)
            problems += found
            file = files.open_tensors(max_header_bytes=HEADER)
            total = sum(map(file.bytes_of, file.specs))
            with progress(f"Reading {folder}", total) as advance:
                facts = [facts_of(file, key, advance) for key in sorted(file.specs)]
    except AdapterFileError as error:
        problems.append(Problem("files", "", sentence(error)))
    problems += _values(facts)
    if (facts or not problems) and not mixture:
        problems += _contents(facts, config)
        notes += _notes(facts, config)
    by_names = False
    if model is not None and not problems:
        unfit, unsaved, by_names = _model(folder, model)
        problems += unfit
        notes += unsaved
    data = {
        "folder": str(folder),
        "model": None if model is None else str(model),
        "ok": not problems,
        "problems": [asdict(one) for one in problems],
        "notes": notes,
        "tensors": len(facts),
        "bytes": sum(one.bytes for one in facts),
    }
    fits = "" if model is None else f", and fits {model}{'' if by_names else ' by its config.json'}"
    return Answer(data, _text(folder, fits, problems, notes, len(facts)), ok=not problems)


def _text(folder: Path, fits: str, problems: list[Problem], notes: list[str], count: int) -> str:
    lines = [f"PROBLEM  {p.kind}: {p.where + ': ' if p.where else ''}{p.says}" for p in problems]
    lines = list(map(one_line, [*lines, *(f"note     {note}" for note in notes)]))
    well = f"{counted(count, 'tensor')}, all is well{fits}"
    lines.append(f"{folder}: {counted(len(problems), 'problem') if problems else well}")
    return "\n".join(lines)


def _config(values: dict[str, object]) -> tuple[LoraConfig | None, list[Problem]]:
    from lora_ext.adapters import LoraConfig
    from lora_ext.adapters.config_checks import check_built

    if "peft_type" not in values:
        return None, [Problem("config", "peft_type", "is missing, expected 'LORA'")]
    if values["peft_type"] == "XLORA":
        says = "is a classifier of X-LoRA; verify the adapters that it mixes, FOLDER/adapters/NAME"
        return None, [Problem("config", "peft_type", says)]
    try:
        config = LoraConfig.from_dict(values)
        check_built(values)
        return config, []
    except (TypeError, ValueError, NotImplementedError) as error:
        return None, [Problem("config", "", sentence(error))]


def _values(facts: list[TensorFacts]) -> Iterator[Problem]:
    for one in facts:
        if one.nan or one.inf:
            yield Problem("values", one.key, f"has {one.nan} NaN and {one.inf} Inf")


def _contents(facts: list[TensorFacts], config: LoraConfig | None) -> Iterator[Problem]:
    """What keys and shapes have to be, by themselves and by the config."""
    from lora_ext._patterns import FILE_SECONDS, in_time
    from lora_ext.adapters.checkpoint.keys import PREFIX
    from lora_ext.cli.by_name import adapted_modules, split_key
    from lora_ext.io.convert.parts import unlike_config

    shapes = {one.key: one.shape for one in facts}
    modules = adapted_modules(shapes)
    if not any("lora_" in key for key in shapes):
        yield Problem("keys", "", "no tensor is an adapter's (lora_A, lora_B)")
    for key in shapes:
        if not key.startswith(PREFIX):
            yield Problem("keys", key, f"does not begin with {PREFIX!r}, as PEFT's do")
    for one in facts:
        if split_key(one.key) is not None and "float" not in one.dtype:
            yield Problem("dtype", one.key, f"is {one.dtype}, expected floating-point numbers")
    for name, parts in modules.items():
        for pair in PAIRS:
            for have, lack in (pair, pair[::-1]):
                if have in parts and lack not in parts:
                    yield Problem("keys", name, f"has {have} and no {lack}")
    if config is not None:
        for name, says in unlike_config(vars(config), shapes):
            yield Problem("keys", name, says)
    found: list[Problem] = []
    # Patterns of a hostile config are matched in bounded time.
    try:
        in_time(FILE_SECONDS, len(modules), lambda: found.extend(_ranks(modules, shapes, config)))
    except ValueError as error:
        found.append(Problem("config", "", sentence(error)))
    yield from found


def _ranks(
    modules: dict[str, set[str]],
    shapes: dict[str, tuple[int, ...]],
    config: LoraConfig | None,
) -> Iterator[Problem]:
    from lora_ext.adapters.checkpoint.keys import PREFIX
    from lora_ext.adapters.targets import matches

    meant, others = set[tuple[Any, Any]](), dict[str, tuple[Any, Any]]()
    for name, parts in modules.items():
        ends = next((pair for pair in PAIRS if parts >= {*pair}), None)
        if ends is None:
            continue
        A, B = (shapes[f"{PREFIX}{name}.{end}"] for end in ends)
        if len(A) < 2 or len(B) < 2 or not B[1] or A[0] % B[1]:
            says = f"{ends[0]} is {list(A)} and {ends[1]} {list(B)}, which have no rank in common"
            yield Problem("shape", name, says)
            continue
        if config is None or config.target_parameters:
            continue  # stacks of experts have a multiple of the rank
        plain = ".".join(part for part in name.split(".") if part != "base_layer")
        wanted = config.settings_for(plain).r
        if B[1] != wanted:
            yield Problem("rank", name, f"is {B[1]} in the file, {wanted} in the config")
        targets = config.target_modules
        if targets is None or targets == "all-linear" or matches(plain, targets):
            meant |= {(A, B), (B[::-1], A[::-1])}
        else:
            others[name] = A, B
    for name, sizes in others.items():
        # What is tied to a target has its adapter, a head an embedding's transposed.
        if config is None or not config.ensure_weight_tying or sizes not in meant:
            yield Problem("keys", name, "is in the file, and not in the config's target_modules")


def _notes(facts: list[TensorFacts], config: LoraConfig | None) -> Iterator[str]:
    ups = [one for one in facts if one.key.endswith(("lora_B.weight", "lora_embedding_B"))]
    if ups and all(one.norm == 0.0 for one in ups):
        yield "every lora_B is zero: the adapter does nothing; it was never trained"
    shapes = {one.key: one.shape for one in facts}
    for key, A in shapes.items():
        B = shapes.get(key.replace("lora_A.weight", "lora_B.weight"), ())
        if (
            key.endswith("lora_A.weight")
            and len(B) > 1
            and A
            and B[1]
            and A[0] > B[1]
            and not A[0] % B[1]
        ):
            yield (
                f"{key}: has {A[0]} rows for rank {B[1]}: only a MergedLinear, or a stack of "
                "experts, has more than one for each"
            )
            break
    dtypes = sorted({one.dtype for one in facts})
    if len(dtypes) > 1:
        yield f"tensors have several dtypes: {', '.join(dtypes)}"
    if config is not None and config.base_model_name_or_path is None:
        yield "the config does not say for which base it is (base_model_name_or_path)"


def _model(folder: Path, model: Path) -> tuple[list[Problem], list[str], bool]:
    """Problems, notes, and whether the names in the model's files were looked at."""
    from lora_ext.adapters import LoraModel
    from lora_ext.cli import models
    from lora_ext.cli.adapters import task_of, without_initialisation
    from lora_ext.cli.quantized import quantized_in

    task = task_of(folder)
    with progress(f"Fitting {folder} into {model}"):
        base = models.outline(model, task)
        kind, every = type(base).__name__, [name for name, _ in base.named_parameters()]
        try:
            with without_initialisation(folder) as plain:
                lora = LoraModel.from_pretrained(base, plain)
            quantized = quantized_in(model)
            missing = None if quantized else models.names_missing(model, task)
        except ValueError as error:
            return [Problem("model", "", sentence(error))], [], False
    lost = models.not_in_adapter(missing or (), lora)
    notes = [models.say_missing(model, kind, lost, every, missing or ())] if lost else []
    if quantized:
        notes.append(f"{model}: is quantized, and only shapes were compared: {quantized}")
    return [], notes, missing is not None
