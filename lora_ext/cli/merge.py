"""`lora-ext merge`: a base and an adapter as one plain model."""

from __future__ import annotations

import json
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_ext._progress import progress
from lora_ext.cli.adapters import ADAPTER
from lora_ext.cli.answers import Answer, counted, size, telling
from lora_ext.cli.base_files import copy_others, open_all, others_in, weights_in
from lora_ext.cli.errors import WrongUse
from lora_ext.cli.models import INDEX, WEIGHTS

if TYPE_CHECKING:
    from lora_ext.adapters import LoraModel
    from lora_ext.adapters.streamed_merge import Merged
    from lora_ext.io import TensorFile


@click.command(short_help="Merge an adapter into a base model: a plain model in a new folder.")
@click.argument("base", type=click.Path(exists=True, path_type=Path))
@click.argument("adapter", type=ADAPTER)
@click.argument("out", type=click.Path(path_type=Path))
@telling
def merge(base: Path, adapter: Path, out: Path) -> Answer:
    """Merge the adapter in folder ADAPTER into BASE, into the new folder OUT.

    BASE is the folder of a model of transformers (its class is made, so transformers has to be
    installed), or safetensors without a config.json: one file, or a folder of them, whose tensors
    are taken by their names. A quantized BASE is refused. Every weight is computed in float32 and
    rounded once, to the dtype of the base. BASE and ADAPTER are not changed. OUT must be free; it
    appears when all of it is written, or not at all. Tokenizer and other files beside the weights
    are copied.

    One tensor at a time is in memory, and the same command again goes on after the last finished
    file of one that was killed. Where names of tensors do not tell all (tied weights that the
    adapter changes, modules_to_save, layer_replication, ...) the whole model is loaded, and the
    answer says why.

    \b
    Examples:
      lora-ext merge ./llama ./adapter ./llama-merged
      lora-ext merge base.safetensors ./adapter ./merged

    JSON: base, adapter, out, layers (names of what was merged), files, bytes, loaded (why the whole
    model was; null where it was not), kept (how many files a killed merge had finished).
    """
    from lora_ext.cli.models import is_model
    from lora_ext.cli.quantized import CURE, quantized_in
    from lora_ext.io.whole_folder import check_free

    try:
        check_free(out)
    except (FileExistsError, NotADirectoryError) as error:
        raise WrongUse(f"{error.filename}: {error.strerror}") from None
    if quantized := quantized_in(base):
        raise WrongUse(f"{base}: is quantized, which merging does not read: {quantized}; {CURE}")
    own = base.is_dir() and is_model(base)
    (layers, kept), why = (_of_model if own else _of_tensors)(base, adapter, out)
    files = sorted(path.name for path in out.iterdir())
    total = sum(path.stat().st_size for path in out.iterdir())
    data = {
        "base": str(base), "adapter": str(adapter), "out": str(out),
        "layers": layers, "files": files, "bytes": total, "loaded": why,
        "kept": kept,
    }  # fmt: skip
    parts = [f"{counted(len(layers), 'layer')} merged", counted(len(files), "file"), size(total)]
    parts += [f"the whole model was loaded for {why}"] if why else []
    parts += [f"{counted(kept, 'file')} of a merge that was killed"] if kept else []
    return Answer(data, f"{out}: {', '.join(parts)}")


def _of_model(base: Path, adapter: Path, out: Path) -> tuple[Merged, str | None]:
    """What was merged, and why the whole model was loaded for it."""
    from lora_ext.adapters import LoraModel
    from lora_ext.adapters.streamed_merge import Merged, why_not_outlined, why_not_streamed
    from lora_ext.cli import models
    from lora_ext.cli.adapters import task_of
    from lora_ext.cli.merge_loaded import merge_model

    task = task_of(adapter)  # a damaged adapter is refused before gigabytes are read
    why, paths = why_not_outlined(adapter), models.weight_files(base)
    if why is None and paths:
        with ExitStack() as stack:
            files = open_all(stack, paths)
            with progress(f"Fitting {adapter} into {base}"):
                lora = LoraModel.from_pretrained(models.outline(base, task), adapter)
                why = why_not_streamed(lora, files)
            if why is None:
                return _stream(lora, files, base, adapter, out), None
            del lora
    return Merged(merge_model(base, adapter, out)), why


def _of_tensors(base: Path, adapter: Path, out: Path) -> tuple[Merged, str | None]:
    """The same by names alone; the files keep their names and what is in which."""
    import torch

    from lora_ext.adapters import LoraModel
    from lora_ext.adapters.streamed_merge import Merged, why_not_outlined, why_not_streamed
    from lora_ext.cli.adapters import shapes_of
    from lora_ext.cli.by_name import check_layouts, model_of
    from lora_ext.cli.merge_loaded import merge_tensors

    shapes, config = shapes_of(adapter)
    for field in (
        *("fan_in_fan_out", "target_parameters", "layer_replication"),
        "trainable_token_indices",
    ):
        if config.get(field):
            raise ValueError(
                f"{adapter}: its {field} needs the model itself, not only its tensors; give the "
                "folder of the model, with its config.json"
            )
    with ExitStack() as stack:
        every = open_all(stack, weights_in(base)).values()
        specs = {key: spec.shape for file in every for key, spec in file.specs.items()}
    check_layouts(specs, shapes, str(base))
    if any("lora_embedding_" in key for key in shapes):
        warnings.warn(
            f"{base}: an embedding is merged by its name: where the model ties another weight to "
            "it, that one changes too; give the folder of the model, with its config.json, to keep "
            "them apart",
            stacklevel=2,
        )
    why = why_not_outlined(adapter)
    if why is None:
        with ExitStack() as stack:
            files = open_all(stack, weights_in(base))
            tensors = {
                key: torch.empty(spec.shape, dtype=next(iter(spec.dtypes)))  # never written
                for file in files.values()
                for key, spec in file.specs.items()
            }
            lora = LoraModel.from_pretrained(model_of(tensors, shapes, str(base)), adapter)
            why = why_not_streamed(lora, files)
            if why is None:
                named = {WEIGHTS: next(iter(files.values()))} if len(files) == 1 else files
                return _stream(lora, named, base, adapter, out), None
            del lora, tensors
    return Merged(merge_tensors(base, adapter, out)), why


def _stream(
    lora: LoraModel, files: dict[str, TensorFile], base: Path, adapter: Path, out: Path
) -> Merged:
    from lora_ext.adapters.streamed_merge import merge_files

    total = sum(file.bytes_of(key) for file in files.values() for key in file.specs)
    index = base / INDEX  # whose metadata is taken over
    beside = others_in(base) + ([index] if index.is_file() else [])

    def complete(folder: Path) -> None:
        if base.is_dir():
            copy_others(base, folder)
            if len(files) > 1 and index.is_file():
                _write_index(folder / INDEX, index, files, total)

    with progress(f"Writing {out}", total) as advance:
        return merge_files(
            lora, files, adapter, out, beside=beside, complete=complete, advance=advance
        )


def _write_index(path: Path, former: Path, files: dict[str, TensorFile], total: int) -> None:
    """Of the shards, with what else the former one says."""
    from lora_ext.io.whole_folder import finished_file

    try:
        metadata = json.loads(former.read_bytes()).get("metadata") or {}
    except (ValueError, AttributeError, RecursionError):
        metadata = {}
    places = {key: name for name, file in files.items() for key in file.specs}
    content = {
        "metadata": {**metadata, "total_size": total},
        "weight_map": dict(sorted(places.items())),
    }
    with finished_file(path) as hidden:
        hidden.write_text(json.dumps(content, indent=2) + "\n")
