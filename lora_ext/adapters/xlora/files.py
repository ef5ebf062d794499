"""X-LoRA's files: PEFT's layout, and that of the published package `xlora`. In both the adapters
are in folders of their own, in `adapters/NAME` where they were saved with the classifier."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lora_ext.adapters.checkpoint.model_card import write_model_card
from lora_ext.adapters.checkpoint.save import files_of
from lora_ext.adapters.checkpoint.values import values_of
from lora_ext.adapters.names import unwrapped
from lora_ext.adapters.xlora.classifier import XLoraClassifier
from lora_ext.adapters.xlora.config import XLoraConfig
from lora_ext.adapters.xlora.experts import expert_folders
from lora_ext.arguments import as_path, short, warn
from lora_ext.errors import AdapterFileError, NotBuiltError
from lora_ext.io.adapter_file import (
    TensorSpec,
    adapter_bytes,
    check_finite,
    open_tensors,
    read_adapter_tensors,
    read_header,
)
from lora_ext.io.adapter_folder import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    check_adapter_files,
    read_config_file,
)
from lora_ext.io.atomic import open_files, save_folders
from lora_ext.io.files import inside, json_text, parse_json, read_all, typed_errors
from lora_ext.io.hub import adapter_folder, downloaded, is_hub_id, options_of
from lora_ext.nn.sharded import by_first_process, whole

XLORA_CONFIG, XLORA_WEIGHTS = "xlora_config.json", "xlora_classifier.safetensors"
LAYOUTS = {"peft": (CONFIG_NAME, WEIGHTS_NAME), "xlora": (XLORA_CONFIG, XLORA_WEIGHTS)}
_PEFT_PREFIX = "base_model.internal_xlora_classifier."
# The package's fields under other names, and those that a file of it has.
_RENAMED = {"base_model_id": "base_model_name_or_path"}
_OF_THE_PACKAGE = (
    *("hidden_size", "enable_softmax", "enable_softmax_topk", "layerwise_scalings"),
    *("xlora_depth", "xlora_size", "enable_relu_and_dropout", "use_bias", "xlora_dropout_p"),
    *("use_trainable_adapters", "softmax_temperature", "top_k_lora", "scaling_pass_value"),
    "global_scaling_weight",
)
_ONE_FOR_ALL = (
    "one scaling for all tokens of a request, which is not built: here each token has its own. "
    "Where the classifier was trained by a version of the package that has one for each token "
    "(since February 2024), which reads this field no more, remove it from the file"
)


class XLoraFiles:
    """The two files of a classifier, open as a pair; a context manager.

    Args:
        folder: with files of one of the layouts; PEFT's, if it has both.

    Attributes:
        config: what the one says.
        layout: "peft" or "xlora".

    Raises:
        AdapterFileError: a file is missing or damaged, or the config asks for something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layout = _layout_of(folder)
        config_name, self._weights_name = LAYOUTS[self.layout]
        path = folder / config_name
        with ExitStack() as stack, typed_errors(folder):
            try:
                files = open_files(folder, LAYOUTS[self.layout])
            except (FileNotFoundError, NotADirectoryError) as error:
                raise AdapterFileError(
                    f"{folder}: has no {' and '.join(LAYOUTS[self.layout])}; give the folder of an "
                    "X-LoRA model"
                ) from error
            for file in files.values():
                stack.enter_context(file)
            values = parse_json(read_all(files[config_name], MAX_CONFIG_BYTES), str(path))
            self.names: list[str] | None = None
            if self.layout == "xlora":
                values = self._of_the_package(values, path)
            elif values.get("peft_type") != "XLORA":
                raise AdapterFileError(
                    f"{path}: peft_type: got {short(values.get('peft_type'))}, expected 'XLORA'; "
                    "a LoraModel reads adapters"
                )
            self.config = XLoraConfig.from_values(values, path)
            self._weights: io.FileIO = files[self._weights_name]
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _of_the_package(self, values: dict[str, Any], path: Path) -> dict[str, Any]:
        for name, off in (("use_mean_pool", (None, False)), ("stop_token_id", (None,))):
            if values.pop(name, None) not in off:
                raise NotBuiltError(f"{path}: {name}: got a value, expected none: {_ONE_FOR_ALL}")
        values.pop("device", None)
        adapters = values.pop("adapters", None)
        if isinstance(adapters, Mapping):
            adapters = list(adapters)
        if adapters is not None and (
            not isinstance(adapters, list) or not all(isinstance(name, str) for name in adapters)
        ):
            raise AdapterFileError(f"{path}: adapters: got {short(adapters)}, expected names")
        self.names = adapters
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
        if adapters is not None:
            values["adapters"] = {name: f"adapters/{name}" for name in adapters}
        return values

    def experts(
        self,
        config: XLoraConfig,
        adapters: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> dict[str, Path]:
        """Names and folders of the adapters, in the order of the classifier's results.

        Args:
            adapters: those that the caller gives; in the classifier's order where names are its.
        """
        said = self._said(config)
        if adapters is not None:
            folders = expert_folders(adapters, options, "XLoraModel.from_pretrained")
            if said and len(said) != len(folders):
                raise ValueError(
                    f"XLoraModel.from_pretrained: adapters: got {list(folders)}, expected "
                    f"{len(said)}: the classifier is for {list(said)}"
                )
            return {n: folders[n] for n in said} if said.keys() == folders.keys() else folders
        if not said:
            raise AdapterFileError(
                f"{self.folder}: does not name its adapters; say them in the order in which the "
                "classifier was trained: from_pretrained(..., adapters={'name': 'folder', ...})"
            )
        found: dict[str, Path] = {}
        for name, place in said.items():
            if place is None or not place.is_dir():
                raise AdapterFileError(
                    f"{self.folder}: the adapter '{name}' is not in adapters/{name}"
                    + ("" if place is None else f", nor is {short(str(place))} a folder here")
                    + "; say where it is: from_pretrained(..., adapters={'name': 'folder', ...})"
                )
            found[name] = place
        if config.use_trainable_adapters and any(
            not place.is_relative_to(inside(self.folder, "adapters")) for place in found.values()
        ):
            warn(
                f"{self.folder}: use_trainable_adapters: the adapters were trained with the "
                f"classifier, but are not in adapters/: those in {short(list(found.values()))} may "
                "be as they were before; say where the trained ones are by adapters={...}"
            )
        return found

    def _said(self, config: XLoraConfig) -> dict[str, Path | None]:
        """The adapters that the config names, and where they are. PEFT runs adapters under numbers
        alone: those beside a classifier have the names of their folders."""
        names = [
            Path(path).name if Path(path).parent.name == "adapters" else name
            for name, path in config.adapters.items()
        ]
        if len(set(names)) < len(names):
            names = list(config.adapters)
        said: dict[str, Path | None] = {}
        for name, path in zip(names, config.adapters.values(), strict=True):
            said[name] = self._inside(name)
            if said[name] is None and self.layout == "peft":
                said[name] = as_path(path, "XLoraModel.from_pretrained", "adapters")
        return said

    def _inside(self, name: str) -> Path | None:
        # PEFT's subfolders of an adapter's name hold parts of other tensors.
        places = [f"adapters/{name}", *([name] if self.layout == "xlora" else [])]
        for place in places:
            path = inside(self.folder, place)
            if (path / CONFIG_NAME).is_file():
                return path
        return None

    @torch.no_grad()
    def fill(self, classifier: XLoraClassifier) -> None:
        """Gives a classifier the file's values.

        Raises:
            AdapterFileError: the file is damaged, or is of other numbers of adapters or layers, or
                of another config.
        """
        keys = dict(_keys(classifier, self.layout))
        expected = {
            f"{keys[name]}.{part}": TensorSpec(tuple(tensor.shape), held_in=tensor.dtype)
            for name, linear in classifier.linears()
            for part, tensor in linear.named_parameters()
        }
        self._check_numbers(classifier, list(keys.values())[-1])
        found = self._lost_by_peft(expected)
        rest = {key: spec for key, spec in expected.items() if key not in found}
        found |= read_adapter_tensors(self._weights, rest)
        for name, linear in classifier.linears():
            for part, tensor in linear.named_parameters():
                tensor.copy_(found[f"{keys[name]}.{part}"])

    def _lost_by_peft(self, expected: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        """PEFT 0.21 names adapters by number and takes a classifier's `layers.0.weight` for a
        tensor of the adapter "0": it is not in the classifier's file, but in that adapter's folder,
        as `layers.weight`."""
        header = read_header(self._weights)
        found: dict[str, Tensor] = {}
        for key, spec in expected.items():
            number = key.removeprefix(_PEFT_PREFIX + "layers.").partition(".")[0]
            path = inside(self.folder, f"{number}/{WEIGHTS_NAME}")
            if self.layout != "peft" or key in header or not path.is_file():
                continue
            with open_tensors(path) as file:
                other = key.replace(f"layers.{number}.", "layers.")
                if file.specs.get(other) is None or file.specs[other].shape != spec.shape:
                    continue  # said with the other keys
                found[key] = file.tensor(other)
                check_finite(f"{path}: {other}", found[key])
        return found

    def _check_numbers(self, classifier: XLoraClassifier, last: str) -> None:
        header = read_header(self._weights)
        key = f"{last}.weight"
        if key not in header or not header[key].shape:
            return  # said with the other keys
        outputs, per_layer = header[key].shape[0], classifier.n_classes
        layerwise = classifier.config.layerwise_scalings
        expected = per_layer * (classifier.n_layers if layerwise else 1)
        if outputs != expected:
            layers = f" x {classifier.n_layers} layers that have them" if layerwise else ""
            raise AdapterFileError(
                f"{self.folder / self._weights_name}: {key}: got {outputs} results, expected "
                f"{expected}: {per_layer} adapters{layers} (layerwise_scalings={layerwise}); give "
                "the adapters that the classifier was trained with"
            )


def _layout_of(folder: Path) -> str:
    for layout, (config_name, _) in LAYOUTS.items():
        if (folder / config_name).is_file():
            return layout
    raise AdapterFileError(
        f"{folder}: has no {CONFIG_NAME} and no {XLORA_CONFIG}; give the folder of an X-LoRA model"
    )


def _keys(classifier: XLoraClassifier, layout: str) -> Iterator[tuple[str, str]]:
    """The classifier's names of linear layers, and those of a layout."""
    names = [name for name, _ in classifier.linears()]
    # The package counts ReLU and Dropout, which it has whatever the probability.
    step = 3 if classifier.config.enable_relu_and_dropout else 1
    for place, name in enumerate(names):
        if layout == "peft":
            yield name, _PEFT_PREFIX + name
        else:
            yield name, "last" if name == names[-1] else f"inner.{place * step}"


def has_classifier(folder: Path) -> bool:
    """Whether a folder's files are those of an X-LoRA model."""
    if (folder / XLORA_CONFIG).is_file():
        return True
    config = folder / CONFIG_NAME
    return config.is_file() and read_config_file(config).get("peft_type") == "XLORA"


def local_folder(
    where: str, model_id: Any, options: Mapping[str, Any], *, with_experts: bool = False
) -> Path:
    """The folder of a classifier's files, from the hub if there is none of that name."""
    path = as_path(model_id, where, "model_id")
    if path.is_dir() or not is_hub_id(str(model_id)):
        return adapter_folder(where, model_id, options)
    options = options_of(where, options)
    try:
        found = downloaded(str(model_id), LAYOUTS["peft"], options)
    except AdapterFileError:
        found = downloaded(str(model_id), LAYOUTS["xlora"], options)
    folder = found[0].parent
    if with_experts:
        with XLoraFiles(folder) as files:
            names = list(files._said(files.config))
        for name in names:
            for file in (CONFIG_NAME, WEIGHTS_NAME):
                downloaded(str(model_id), [f"adapters/{name}/{file}"], options)
    return folder


def save_xlora(
    model: Any,
    folder: Path,
    layout: str,
    save_embedding_layers: bool | str,
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    """See `XLoraModel.save_pretrained`."""
    if layout not in LAYOUTS:
        raise ValueError(
            f"XLoraModel.save_pretrained: layout: got {short(layout)}, expected one of "
            f"{list(LAYOUTS)}"
        )
    config: XLoraConfig = model.xlora_config
    config.validate()
    places = {name: folder / "adapters" / name for name in model.peft_config}
    fields = _peft_fields(model, places) if layout == "peft" else _package_fields(model)
    classifier = model.internal_xlora_classifier
    tensors: dict[str, Tensor] = {}
    given = state_dict or {}
    for name, key in _keys(classifier, layout):
        for part, tensor in classifier.get_submodule(name).named_parameters():
            own = given.get(f"internal_xlora_classifier.{name}.{part}", tensor)
            tensors[f"{key}.{part}"] = whole(own.detach())
    with values_of(model, state_dict):
        experts = [
            files_of(
                model,
                name,
                place,
                save_embedding_layers=save_embedding_layers,
                initial=None,
                as_plain_lora=False,
            )
            for name, place in places.items()
        ]
    ready = [(folder, LAYOUTS[layout], fields, tensors)]
    ready += [(place, LAYOUTS["peft"], values, parts) for place, values, parts in experts]
    for place, _, values, parts in ready:  # before a folder is made
        check_adapter_files(place, values, parts)
    files = (
        (place, {names[0]: json_text(values).encode(), names[1]: adapter_bytes(parts)})
        for place, names, values, parts in ready
    )

    def save() -> None:
        save_folders(files)
        write_model_card(model, folder)

    by_first_process(model, save, "save_pretrained")


def _peft_fields(model: Any, places: Mapping[str, Path]) -> dict[str, Any]:
    config: XLoraConfig = model.xlora_config
    fields = config.to_file() | {"inference_mode": True}
    # PEFT gives adapters numbers for names, and runs those whose name in the config is that.
    fields["adapters"] = {
        str(number): str(place.absolute()) for number, place in enumerate(places.values())
    }
    base = unwrapped(model.get_base_model())
    if getattr(base, "name_or_path", None) and fields.get("base_model_name_or_path") is None:
        fields["base_model_name_or_path"] = base.name_or_path
    if fields["task_type"] is None and fields.get("auto_mapping") is None:
        fields["auto_mapping"] = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    return fields


def _package_fields(model: Any) -> dict[str, Any]:
    values = model.xlora_config.to_dict()
    name = values["base_model_name_or_path"] or getattr(model.get_base_model(), "name_or_path", "")
    return {
        **{field: values[field] for field in _OF_THE_PACKAGE},
        "base_model_id": name,
        "adapters": list(model.peft_config),
    }
