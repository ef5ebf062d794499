"""What loading finds in a file: the keys, and tensors of the base beside the adapter's."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.base_tensors import BasePart, biases, embeddings, places
from lora_ext.adapters.checkpoint.keys import (
    PREFIX,
    TOKENS,
    around_planned,
    followers_in_file,
    name_in_file,
    spec_of,
)
from lora_ext.adapters.names import plain_name, unwrapped
from lora_ext.adapters.plan import Plan
from lora_ext.arguments import check_mapping, warn
from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_file import MAX_HEADER_BYTES, TensorSpec, header_limit
from lora_ext.io.adapter_folder import WEIGHTS_NAME, AdapterFolder
from lora_ext.io.files import short
from lora_ext.nn.adoption import adapter_device

Shapes = tuple[Sequence[int], Sequence[int]]


class FileTensors:
    """An open file's tensors, by keys without the levels of torch.compile.

    Args:
        keys: of what it may hold; a header longer than they justify is not read.
        key_mapping: see `load_adapter`.
    """

    def __init__(
        self,
        files: AdapterFolder,
        keys: Iterable[str],
        key_mapping: Mapping[str, str] | None = None,
    ) -> None:
        specs = files.header(max_header_bytes=max(MAX_HEADER_BYTES, header_limit(list(keys))))
        self._files = files
        self.path = files.path / WEIGHTS_NAME
        self._keys = {plain_name(key): key for key in specs}
        if key_mapping:
            now = mapped(self._keys, key_mapping, self.path)
            self._keys = {key: self._keys[plain] for key, plain in now.items()}
        self.specs = {plain: specs[key] for plain, key in self._keys.items()}

    def read(
        self, expected: Mapping[str, TensorSpec], left_out: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """As `AdapterFolder.tensors`: by the file's own keys, see `with_plain_keys`."""
        return self._files.tensors(
            {self._keys.get(key, key): spec for key, spec in expected.items()},
            {self._keys[key] for key in left_out},
        )

    def of_other_shapes(self, expected: Mapping[str, TensorSpec]) -> dict[str, Shapes]:
        """The keys that have another shape than expected: (here, expected)."""
        both = {
            key: (self.specs[key].shape, expected[key].shape)
            for key in expected & self.specs.keys()
        }
        return {key: shapes for key, shapes in both.items() if shapes[0] != shapes[1]}

    def with_plain_keys(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was read by keys without the levels of torch.compile, as the mapping has them."""
        plain = {key: one for one, key in self._keys.items()}
        return {plain[key]: tensor for key, tensor in tensors.items()}


def check_key_mapping(where: str, key_mapping: Any) -> None:
    """TypeError, ValueError for what is no mapping of regular expressions to replacements."""
    if key_mapping is None:
        return
    check_mapping(where, "key_mapping", key_mapping, str, "texts")
    for pattern, replacement in key_mapping.items():
        try:
            re.compile(pattern).sub(replacement, "")
        except re.error as error:
            raise ValueError(
                f"{where}: key_mapping: got {short(pattern)}: {short(replacement)}, expected a "
                f"regular expression and what takes its place ({error})"
            ) from None


def mapped(keys: Iterable[str], key_mapping: Mapping[str, str], path: Path) -> dict[str, str]:
    """Keys by what `key_mapping` makes of them: the first expression that is found in one counts.

    Raises:
        AdapterFileError: two become the same.
    """
    found: dict[str, str] = {}
    for key in keys:
        now, rest = key, key.removeprefix(PREFIX)
        for pattern, replacement in key_mapping.items():
            changed, count = re.subn(pattern, replacement, rest)
            if count:
                now = PREFIX + changed
                break
        if found.setdefault(now, key) != key:
            raise AdapterFileError(
                f"{path}: key_mapping makes {short(now)} of {short(found[now])} and {short(key)}, "
                "expected another key of each"
            )
    return found


def repeated(file: FileTensors, plan: Plan, expected: Mapping[str, TensorSpec]) -> dict[str, str]:
    """The keys under which PEFT writes something once more, with an embedding that it saves: a
    magnitude, or rows that it trains; and the keys that these have otherwise."""
    keys = {f"{key}.weight": key for key in expected if key.endswith(".lora_magnitude_vector")}
    keys |= followers_in_file(plan)
    return {again: key for again, key in keys.items() if again in file.specs}


def without_rows(file: FileTensors, expected: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Tables of no rows, which PEFT writes where trainable_token_indices is an empty list."""
    return {
        key: TensorSpec(tuple(spec.shape))
        for key, spec in file.specs.items()
        if key not in expected and key.endswith(f".{TOKENS}") and spec.shape[:1] == (0,)
    }


def check_repeated(
    file: FileTensors, again: Mapping[str, str], found: Mapping[str, Tensor]
) -> None:
    """AdapterFileError if the file says two things of what it has twice."""
    for key, own in again.items():
        if not torch.equal(found[key], found[own]):
            raise AdapterFileError(
                f"{file.path}: {short(key)}: differs from {short(own)}, which is the same here"
            )


class BaseTensors:
    """The base's tensors that a file is to hold (biases) or may hold (embeddings, what PEFT adds
    for modules to save).

    Args:
        any_shape: of which `leave_out` takes those that are not the base's.

    Attributes:
        targets: the parameters and buffers that get their values, by key.
    """

    def __init__(
        self, model: AdaptedModel, plan: Plan, file: FileTensors, any_shape: bool = False
    ) -> None:
        base = model.get_base_model()
        adapted = {place: planned.layer for place, planned in plan.layers.items()}
        whole = {
            id(module) for module in plan.saved.values()
        }  # the file's are those of their copies
        every = list(places(base, adapted, whole, aliases=True))
        needed = biases(places(base, adapted, whole), plan.config.bias)
        optional = [*biases(iter(every), plan.config.bias), *embeddings(base, iter(every))]
        self.targets = {PREFIX + place.key_of(part): place.own(part) for place, part in needed}
        for place, part in optional:
            if (key := PREFIX + place.key_of(part)) in file.specs:
                self.targets[key] = place.own(part)
        all_biases = biases(iter(every), "none" if plan.config.bias == "none" else "all")
        self._find_of_other_layers(file, [*all_biases, *embeddings(base, iter(every))])
        self._unused: dict[str, TensorSpec] = {}  # PEFT's second keys of what a copy holds
        around = around_planned(plan)
        for name, module in plan.saved.items():
            self._find_of_saved(file, f"{PREFIX}{name_in_file(name, around)}.", module)
        self._path = file.path
        for key, tensor in self.targets.items():
            _check_target(file, key, tensor, any_shape)
        if self.targets and any(layer.merged for _, layer in model.adapter_layers()):
            raise ValueError(
                "LoraModel.load_adapter: the file holds tensors of the base, which has merged "
                "adapters; call unmerge_adapter() first"
            )

    def _find_of_other_layers(self, file: FileTensors, found: Sequence[BasePart]) -> None:
        """What PEFT wrote as the base of a module which another adapter of its model adapted, or
        saved whole, or as a plain one under another name of the same module."""
        usual = [PREFIX + place.key_of(part) for place, part in found]
        by_name: dict[str, list[str]] = {}
        for key in file.specs.keys() - usual:
            by_name.setdefault(_without_levels(key), []).append(key)
        for own, (place, part) in zip(usual, found, strict=True):
            for key in (own, *by_name.get(_without_levels(own), ())):
                if key in file.specs and key not in self.targets:
                    if own not in file.specs:
                        self.targets.pop(own, None)
                    self.targets[key] = place.own(part)

    def _find_of_saved(self, file: FileTensors, prefix: str, module: nn.Module) -> None:
        """What PEFT writes of a module to save beside its copy: the original, and its own keys."""
        original = unwrapped(getattr(module, "original_module", module))
        state = {plain_name(k): t for k, t in original.state_dict(keep_vars=True).items()}
        for key in [key for key in file.specs if key.startswith(prefix)]:
            where, _, part = key.removeprefix(prefix).partition(".")
            if where == "original_module" and part in state:
                self.targets[key] = state[part]
            elif where == "modules_to_save":
                # Where its name stands elsewhere than usual, PEFT leaves the adapter's name in.
                found = state.get(part, state.get(part.partition(".")[2]))
                if found is not None:
                    self._unused[key] = spec_of(found)

    def expected(self) -> dict[str, TensorSpec]:
        """What the file holds of them."""
        return {key: spec_of(tensor) for key, tensor in self.targets.items()} | self._unused

    def leave_out(self, keys: Collection[str]) -> None:
        """Has the base's own values stay for these."""
        self.targets = {key: own for key, own in self.targets.items() if key not in keys}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """AdapterFileError if the file says two things of one tensor of the base."""
        first: dict[int, str] = {}
        for key, target in self.targets.items():
            other = first.setdefault(id(target), key)
            if not torch.equal(tensors[other], tensors[key]):
                raise AdapterFileError(
                    f"{self._path}: {short(key)}: differs from {short(other)}, which is the same "
                    "tensor in this model (tied embeddings?); untie them in the base first"
                )


def warn_of_shapes(where: str, shapes: Mapping[str, Shapes]) -> None:
    """Says which tensors of a file or state dict stay as the model has them."""
    if shapes:
        text = "; ".join(of_other_shape(key, *both) for key, both in shapes.items())
        warn(
            f"{where}: {text}: left as they are, and are being ignored because you passed "
            "`ignore_mismatched_sizes=True`"
        )


def of_other_shape(key: str, got: Sequence[int], expected: Sequence[int]) -> str:
    return f"size mismatch for {short(key)}: got {list(got)}, not {list(expected)}"


def check_loadable(model: AdaptedModel, plan: Plan) -> None:
    """ValueError where the model could not hold the values of an adapter: on "meta"."""
    for name, tensor in _beside_adapter(plan):
        if tensor.is_meta:
            raise ValueError(
                f"'{name}' of the base model is on the device meta, and the adapter would be too, "
                "without its values; load the base's weights first"
            )


def _without_levels(key: str) -> str:
    """A key without PEFT's levels around modules."""
    levels = ("base_layer", "original_module", "token_adapter")
    return ".".join(part for part in key.split(".") if part not in levels)


def _beside_adapter(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    for planned in plan.layers.values():
        for part, tensor in planned.layer.merged_parameters(()).items():
            if adapter_device(planned.layer, tensor) == tensor.device:  # else a hook fetches it
                yield f"{planned.name}.{part}", tensor
    for name, module in plan.saved.items():
        for part, tensor in module.state_dict().items():
            yield f"{name}.{part}", tensor
    for name, tokens in plan.tokens.items():
        yield f"{name}.weight", tokens.layer.weight


def _check_target(file: FileTensors, key: str, tensor: Tensor, any_shape: bool) -> None:
    if key not in file.specs:
        return  # said with the other missing keys
    if tensor.is_meta:
        raise AdapterFileError(
            f"{file.path}: {short(key)}: the base's is on the device meta, which holds no values; "
            "load the base's weights first"
        )
    shape, own = file.specs[key].shape, tuple(tensor.shape)
    if shape != own and shape[1:] == own[1:] and not any_shape:
        raise AdapterFileError(
            f"{file.path}: {short(key)}: got shape {list(shape)}, the base's is {list(own)}; if "
            f"its vocabulary grew, call resize_token_embeddings({shape[0]}) of the base first"
        )
