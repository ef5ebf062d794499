"""Merging into a base's safetensors files, one tensor at a time: with memory for two tensors of it,
not for the base.

The adapter is loaded into an outline of the base, a model whose parameters have sizes and no
values. A layer of it gets the values of its parameters from the files when its turn comes, is
merged as in any model, and lets them go. All other tensors are copied in blocks. A shard that is
finished stays where it is when the process is killed, and the next call goes on after it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lora_ext._extension import build_info
from lora_ext.adapters.checkpoint.keys import own_tensors
from lora_ext.adapters.lora_model import LoraModel
from lora_ext.adapters.names import named_modules
from lora_ext.adapters.ties import shared_parameters
from lora_ext.io.adapter_file import TensorFile
from lora_ext.io.adapter_folder import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from lora_ext.io.files import StrPath
from lora_ext.io.tensor_writer import write_tensors
from lora_ext.io.whole_folder import finished_file, resumed_folder
from lora_ext.nn import LoraLayer
from lora_ext.nn.init import mutates_weight

BLOCK = 1 << 18  # elements that are copied at a time
MAX_HEADER_BYTES = 8 << 20  # of the adapter: tens of thousands of tensors
SMALL = 1 << 16  # elements; what is no larger is kept until its turn comes, as biases are


def why_not_outlined(adapter: StrPath) -> str | None:
    """What of an adapter needs the base's values, or says more than changes of weights by their
    names; None if there is nothing of that."""
    with open_adapter(adapter) as files:
        config, keys = files.config, files.header(max_header_bytes=MAX_HEADER_BYTES)
    for field in ("layer_replication", "modules_to_save", "trainable_token_indices"):
        if config.get(field):
            return f"{field} of the adapter"
    if config.get("bias", "none") != "none":
        return "bias of the adapter, the biases that it trained"
    kind = config.get("init_lora_weights")
    if isinstance(kind, str) and mutates_weight(kind):
        return f"init_lora_weights={kind!r}, which changes the base first"
    if beside := [key for key in keys if "lora_" not in key]:
        return f"'{beside[0]}', which the adapter has of the base"
    return None


def why_not_streamed(lora: LoraModel, files: Mapping[str, TensorFile]) -> str | None:
    """What the names of tensors do not tell, so that merging needs the whole model; None where they
    tell all.

    Args:
        lora: the adapter in the base's outline.
        files: those of the base, open.
    """
    base = lora.get_base_model()
    state = _plain_state(lora)
    in_files: dict[str, str] = {}
    for name, file in files.items():
        for key, spec in file.specs.items():
            if key in in_files:
                return f"'{key}', which is in two files"
            in_files[key] = name
            if key not in state:  # such as buffers that older versions saved
                continue
            (dtype,) = spec.dtypes
            if dtype != state[key].dtype or spec.shape != tuple(state[key].shape):
                return f"'{key}', which the model holds in another dtype or shape"
    shared = shared_parameters(base)
    missing = [key for key in state if key not in in_files and id(state[key]) not in shared]
    if missing:
        return f"'{missing[0]}', which no file has under this name"
    for key in changed_keys(lora):
        if key not in in_files or id(state[key]) in shared:
            return f"'{key}', which is tied to another tensor"
    return None


def changed_keys(lora: LoraModel) -> dict[str, tuple[str, LoraLayer, str]]:
    """What merging changes: the layer's name, it, and its parameter, by the key in files."""
    return {
        f"{name}.{part}": (name, layer, part)
        for name, layer in lora.lora_layers()
        for part in layer.merged_parameters()
    }


class Merged(NamedTuple):
    """What was merged.

    Attributes:
        layers: their names.
        kept: how many files a merge that was killed had finished.
    """

    layers: list[str]
    kept: int = 0


def merge_files(
    lora: LoraModel,
    files: Mapping[str, TensorFile],
    adapter: StrPath,
    out: StrPath,
    *,
    beside: Iterable[Path] = (),
    complete: Callable[[Path], object] = lambda _: None,
    advance: Callable[[int], object] = lambda _: None,
) -> Merged:
    """Writes the merged base into the new folder `out`, which appears when all of it is there.

    Args:
        lora: the adapter in the base's outline, of which `why_not_streamed` says nothing.
        files: those of the base, open, by the names that the merged ones get.
        adapter: its folder. If it and the base's files are the same, a killed call is continued.
        beside: other files of the base that the result is made of, such as its config.
        complete: puts other files into the folder, after the tensors.
        advance: is told how many bytes were written, or found written, since the last call.

    Raises:
        ValueError: a merged value would be NaN or infinite. Nothing is left then.
        FileExistsError, OSError: see `lora_ext.io.new_folder`.
    """
    merge, kept = _Merge(lora, files), 0
    with resumed_folder(out, _digest(files, Path(adapter), beside)) as folder:
        for name, file in files.items():
            if (folder / name).exists():
                advance(sum(map(file.bytes_of, file.specs)))
                kept += 1
                continue
            with finished_file(folder / name) as hidden:
                write_tensors(hidden, file.specs, merge.parts, advance)
        complete(folder)
    return Merged([name for name, _ in lora.lora_layers()], kept)


class _Merge:
    """The merged base's tensors, by their keys."""

    def __init__(self, lora: LoraModel, files: Mapping[str, TensorFile]) -> None:
        self._changed = changed_keys(lora)
        self._files = {key: file for file in files.values() for key in file.specs}
        self._small: dict[str, Tensor] = {}

    def parts(self, key: str) -> Iterator[Tensor]:
        """A tensor's elements, in parts."""
        if key in self._small:
            yield self._small.pop(key)
        elif key in self._changed:
            yield self._merged(key)
        else:
            yield from self._files[key].blocks(key, BLOCK)

    def _merged(self, key: str) -> Tensor:
        name, layer, _ = self._changed[key]
        own = layer.merged_parameters()
        outline = {part: parameter.data for part, parameter in own.items()}
        for part, parameter in own.items():
            parameter.data = self._files[f"{name}.{part}"].tensor(f"{name}.{part}")
        try:
            layer.merge()
        except ValueError as error:
            error.args = (f"layer '{name}': {error}",)
            raise
        result = {f"{name}.{part}": one.detach() for part, one in layer.merged_parameters().items()}
        layer.unmerge()
        for part, parameter in own.items():
            parameter.data = outline[part]  # which takes no memory: never written
        small = {one: t for one, t in result.items() if one != key and t.numel() <= SMALL}
        self._small.update(small)
        return result[key]


def _plain_state(lora: LoraModel) -> dict[str, Tensor]:
    """The base's parameters and persistent buffers under its own names."""
    base = lora.get_base_model()
    own = {id(tensor) for _, tensor in own_tensors(lora, "default")}
    found: dict[str, Tensor] = {}
    for place, module in named_modules(base, remove_duplicate=False):
        skipped = module._non_persistent_buffers_set
        tensors: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            if tensor is not None and name not in skipped and id(tensor) not in own:
                found[f"{place}.{name}" if place else name] = tensor
    return found


def _digest(files: Mapping[str, TensorFile], adapter: Path, beside: Iterable[Path]) -> str:
    """Of what is merged, and by which code: the adapter's bytes, and of the base's files, which are
    large, what tells that they have not been written since."""
    digest = hashlib.sha256(json.dumps(build_info(), sort_keys=True, default=str).encode())
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with (adapter / name).open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    for name, file in files.items():
        header = [[k, list(s.shape), *map(str, s.dtypes)] for k, s in file.specs.items()]
        digest.update(json.dumps([name, *_state(file.path), header]).encode())
    for path in sorted(beside):
        digest.update(json.dumps([path.name, *_state(path)]).encode())
    return digest.hexdigest()[:32]


def _state(path: StrPath) -> list[int]:
    state = os.stat(path)
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
