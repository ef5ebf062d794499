"""`lora-ext merge`: a base and an adapter as one plain model."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_ext._progress import progress
from lora_ext.cli.answers import Answer, counted, size, telling
from lora_ext.cli.errors import WrongUse
from lora_ext.cli.models import INDEX, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_ext.adapters import LoraModel

MODEL_HEADER = 32 << 20  # bytes; hundreds of thousands of tensors
# Weights in any format, which the merged model has instead.
_WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .gguf .onnx .pkl .pickle".split()
)


@click.command(short_help="Merge an adapter into a base model: a plain model in a new folder.")
@click.argument("base", type=click.Path(exists=True, path_type=Path))
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
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

    \b
    Examples:
      lora-ext merge ./llama ./adapter ./llama-merged
      lora-ext merge base.safetensors ./adapter ./merged

    JSON: base, adapter, out, layers (names of what was merged), files, bytes.
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
    run = _merge_model if base.is_dir() and is_model(base) else _merge_tensors
    layers = run(base, adapter, out)
    files = sorted(path.name for path in out.iterdir())
    total = sum(path.stat().st_size for path in out.iterdir())
    data = {
        "base": str(base), "adapter": str(adapter), "out": str(out),
        "layers": layers, "files": files, "bytes": total,
    }  # fmt: skip
    parts = (f"{counted(len(layers), 'layer')} merged", counted(len(files), "file"), size(total))
    return Answer(data, f"{out}: {', '.join(parts)}")


def _merge_model(base: Path, adapter: Path, out: Path) -> list[str]:
    from lora_ext.adapters import LoraModel
    from lora_ext.cli import models
    from lora_ext.cli.adapters import check_memory, task_of
    from lora_ext.io import new_folder

    task = task_of(adapter)  # a damaged adapter is refused before gigabytes are read
    check_memory(sum(one.stat().st_size for one in base.glob("*.safetensors")), f"loading {base}")
    with progress(f"Loading {base}"):
        model, missing = models.load(base, task)
    kind, every = type(model).__name__, [name for name, _ in model.named_parameters()]
    with progress(f"Loading {adapter}"):
        lora = LoraModel.from_pretrained(model, adapter)
    lost = models.not_in_adapter(missing, lora)
    if lost:
        raise ValueError(models.say_missing(base, kind, lost, every, missing))
    repeated = any(config.layer_replication for config in lora.peft_config.values())
    layers = _merge(lora)
    if repeated:
        _own_weights(lora.get_base_model())
    with new_folder(out) as folder, progress(f"Writing {out}"):
        lora.get_base_model().save_pretrained(folder)  # type: ignore[operator]
        _copy_others(base, folder)
    return layers


def _merge(lora: LoraModel) -> list[str]:
    layers = [name for name, _ in lora.adapter_layers()]
    with progress(f"Merging {len(layers)} layers"):
        lora.merge_and_unload()
    return layers


def _own_weights(model: nn.Module) -> None:
    """Gives repeated layers (`layer_replication`) weights of their own: in a plain model nothing
    says that they share any, and save_pretrained refuses it. What the model ties stays tied."""
    from torch import nn

    tied = getattr(model, "all_tied_weights_keys", {})
    seen: set[int] = set()
    for place, module in model.named_modules():
        for name, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            if id(tensor) in seen and ".".join(filter(None, (place, name))) not in tied:
                own = tensor.detach().clone()
                if isinstance(tensor, nn.Parameter):
                    own = nn.Parameter(own, tensor.requires_grad)
                setattr(module, name, own)
            seen.add(id(tensor))


def _merge_tensors(base: Path, adapter: Path, out: Path) -> list[str]:
    """By names alone; the files keep their names and what is in which."""
    from safetensors.torch import save_file

    from lora_ext.adapters import LoraModel
    from lora_ext.cli.adapters import check_memory, shapes_of
    from lora_ext.cli.by_name import model_of
    from lora_ext.io import new_folder

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
    with _tensors(base) as files:
        tensors: dict[str, Tensor] = {}
        places = {name: list(file.specs) for name, file in files.items()}
        total = sum(file.bytes_of(key) for file in files.values() for key in file.specs)
        check_memory(2 * total, f"merging {base}")  # as it was, and merged
        with progress(f"Reading {base}", total) as advance:
            for file in files.values():
                for key in file.specs:
                    if key in tensors:
                        raise ValueError(f"{base}: '{key}' is in two of its files")
                    tensors[key] = file.tensor(key)
                    advance(file.bytes_of(key))
    model = model_of(tensors, shapes, str(base))
    tensors.clear()
    lora = LoraModel.from_pretrained(model, adapter)
    if any("lora_embedding_" in key for key in shapes):
        warnings.warn(
            f"{base}: an embedding is merged by its name: where the model ties another weight to "
            "it, that one changes too; give the folder of the model, with its config.json, to keep "
            "them apart",
            stacklevel=2,
        )
    layers = _merge(lora)
    state = lora.get_base_model().state_dict()
    with new_folder(out) as folder, progress(f"Writing {out}"):
        for name, keys in places.items():
            target = WEIGHTS if len(places) == 1 else name
            whole = {key: state[key].contiguous() for key in keys}
            save_file(whole, folder / target, {"format": "pt"})
        if base.is_dir():
            _copy_others(base, folder)
            if len(places) > 1 and (base / INDEX).is_file():
                shutil.copyfile(base / INDEX, folder / INDEX)
    return layers


@contextmanager
def _tensors(base: Path) -> Iterator[Mapping[str, Any]]:
    """The open safetensors files of a base, by their names."""
    from lora_ext.io import open_tensors

    paths = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    if not paths:
        raise WrongUse(f"{base}: has neither a config.json nor safetensors files")
    with ExitStack() as stack:
        yield {
            path.name: stack.enter_context(open_tensors(path, max_header_bytes=MODEL_HEADER))
            for path in paths
        }


def _copy_others(base: Path, folder: Path) -> None:
    """Tokenizer and the like: what is beside the weights and was not written anew."""
    for path in base.iterdir():
        is_weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not path.name.startswith("."):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
