"""Merging with all of the base in memory: what `lora-ext merge` does where names of tensors do not
tell all."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lora_ext._progress import progress
from lora_ext.cli.base_files import copy_others, open_all, weights_in
from lora_ext.cli.models import INDEX, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_ext.adapters import LoraModel


def merge_model(base: Path, adapter: Path, out: Path) -> list[str]:
    """A model of transformers."""
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
        copy_others(base, folder)
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


def merge_tensors(base: Path, adapter: Path, out: Path) -> list[str]:
    """By names alone; the files keep their names and what is in which."""
    from safetensors.torch import save_file

    from lora_ext.adapters import LoraModel
    from lora_ext.cli.adapters import check_memory, shapes_of
    from lora_ext.cli.by_name import model_of
    from lora_ext.io import new_folder

    shapes, _ = shapes_of(adapter)
    with ExitStack() as stack:
        files = open_all(stack, weights_in(base))
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
    layers = _merge(lora)
    state = lora.get_base_model().state_dict()
    with new_folder(out) as folder, progress(f"Writing {out}"):
        for name, keys in places.items():
            target = WEIGHTS if len(places) == 1 else name
            whole = {key: state[key].contiguous() for key in keys}
            save_file(whole, folder / target, {"format": "pt"})
        if base.is_dir():
            copy_others(base, folder)
            if len(places) > 1 and (base / INDEX).is_file():
                shutil.copyfile(base / INDEX, folder / INDEX)
    return layers
