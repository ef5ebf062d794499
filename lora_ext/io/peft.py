"""Adapters of a model in PEFT's checkpoint format: `adapter_config.json` and
`adapter_model.safetensors`, with PEFT's keys."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_ext.adapters.combining import Adapter, alpha_factor, subtract_mutated_init
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.patterns import FILE_SECONDS, time_limit
from lora_ext.adapters.targets import matches, saved_modules
from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_file import FLOATS, TensorSpec
from lora_ext.io.adapter_folder import AdapterFolder, open_adapter, save_adapter
from lora_ext.io.files import typed_content
from lora_ext.io.grouped_convolutions import grouped_where_possible, planned_as_in
from lora_ext.io.plain_lora import plain_lora
from lora_ext.nn import LoraLayer
from lora_ext.nn.arguments import as_path, names_of
from lora_ext.nn.default_adapter import DEFAULT
from lora_ext.nn.lora_layer import check_adapter_name

if TYPE_CHECKING:
    from lora_ext.adapters.lora_model import LoraModel
    from lora_ext.adapters.plan import Plan

PREFIX = "base_model.model."
# The names of embeddings that PEFT saves with an adapter that targets them.
_EMBEDDINGS = ("embed_tokens", "lm_head")


def adapter_state_dict(
    model: LoraModel,
    adapter_name: str = DEFAULT,
    *,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter by PEFT's keys, in which its name does not occur. What belongs to the base is the
    base's own also while the model is merged.

    Args:
        save_embedding_layers: whether to add the base's input and output embeddings; "auto" adds
            those that the adapter targets.
    """
    config = model.peft_config[adapter_name]
    tensors: dict[str, Tensor] = {}
    for name, layer in model.lora_layers():
        if adapter_name in layer.adapters:
            for key, tensor in layer.peft_tensors(adapter_name).items():
                tensors[f"{PREFIX}{name}.{key}"] = tensor
    tensors.update(_saved_modules(model, adapter_name))
    adapted = {id(layer) for _, layer in model.lora_layers() if adapter_name in layer.adapters}
    bases = [
        *_biases(model.base_model, config.bias, adapted),
        *_embeddings(model.base_model, save_embedding_layers, adapted),
    ]
    for key, module, part in bases:
        tensors[key] = module.state_dict()[part]
    return tensors


def save_pretrained(
    model: LoraModel,
    folder: str | Path,
    adapter_names: str | list[str] | None = None,
    *,
    save_embedding_layers: bool | str = "auto",
    path_initial_model_for_weight_conversion: str | Path | None = None,
    as_plain_lora: bool = False,
) -> None:
    """Writes adapters so that PEFT loads them: "default" into `folder`, others into subfolders of
    their names. Each pair of files is replaced as one; see `lora_ext.io.save_adapter`.

    Args:
        adapter_names: all, if None.
        path_initial_model_for_weight_conversion: the folder of the adapter as it was right after an
            initialisation that changed the base's weights ("pissa", "olora"). What is written then
            is a plain adapter of twice the rank for the original weights.
        as_plain_lora: writes the adapters of `MergedLinear`, and of single projections of
            `MultiheadAttention`, which PEFT has no keys for, as plain ones of the whole layer, of r
            times the number of slices, that do the same; rank_pattern and alpha_pattern say so. To
            be loaded into a model with plain layers, here or in PEFT.

    Raises:
        ValueError: no such adapter, or it holds NaN or Inf; as_plain_lora with a conversion of the
            initialisation, or for an attention with kdim or vdim other than embed_dim.
        AdapterFileError: the initial adapter's files are damaged or do not fit.
    """
    folder = as_path(folder, "save_pretrained")
    if path_initial_model_for_weight_conversion is not None:
        path_initial_model_for_weight_conversion = as_path(
            path_initial_model_for_weight_conversion,
            "save_pretrained",
            "path_initial_model_for_weight_conversion",
        )
    names = list(model.peft_config)
    if adapter_names is not None:
        names = names_of(adapter_names, "save_pretrained")
    for name in names:
        if name not in model.peft_config:
            raise ValueError(
                f"save_pretrained: adapter_names: got {name!r}, "
                f"expected some of {list(model.peft_config)}"
            )
    if as_plain_lora and path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            "save_pretrained: as_plain_lora: got True with path_initial_model_for_weight_conversion"
            ", expected one of both: each changes all ranks"
        )
    for name in names:
        config = copy.deepcopy(model.peft_config[name])
        tensors = adapter_state_dict(model, name, save_embedding_layers=save_embedding_layers)
        if path_initial_model_for_weight_conversion is not None:
            initial = Path(path_initial_model_for_weight_conversion)
            tensors = _subtract_initial(model, name, tensors, initial)
            config = _of_twice_the_rank(config)
        if as_plain_lora:
            config, tensors = plain_lora(model, name, config, tensors, PREFIX)
        fields = config.to_file()
        name_or_path = getattr(model.base_model, "name_or_path", None)
        if name_or_path and fields.get("base_model_name_or_path") is None:
            fields["base_model_name_or_path"] = name_or_path
        save_adapter(Path(folder) if name == DEFAULT else Path(folder) / name, fields, tensors)


def load_adapter(
    model: LoraModel,
    folder: str | Path,
    adapter_name: str,
    *,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
) -> None:
    """Adds an adapter from a folder that PEFT or `save_pretrained` wrote. Config and header are
    checked against the model before anything of the adapter's size is allocated, and nothing is
    changed if they do not fit.

    Args:
        is_trainable: whether it trains when it is active.

    Raises:
        AdapterFileError: a file is missing, damaged, or does not fit the model; names the file and
            the key.
        ValueError: the name is taken, or the model is merged and the file holds biases of the base.
    """
    check_adapter_name(adapter_name, model.peft_config, "LoraModel.load_adapter")
    with open_adapter(folder) as files, ExitStack() as stack:
        stack.enter_context(typed_content(files.path))
        stack.enter_context(time_limit(FILE_SECONDS, sum(1 for _ in model.modules())))
        config = read_config(files)
        config.inference_mode = not is_trainable
        stack.enter_context(model.replicated(config))
        plan = model.plan(config, autocast_adapter_dtype)
        plan = planned_as_in(files, _tied_as_in_the_file(plan, config, files), PREFIX)
        bases = _optional_bases(model, config, plan, files)
        expected = dict(_expected(plan))
        for key, (module, part) in bases.items():
            tensor = module.state_dict()[part]
            expected[key] = TensorSpec(tuple(tensor.shape), held_in=tensor.dtype)
        tensors = files.tensors(expected)
        plan = grouped_where_possible(plan, tensors, PREFIX)
        model.add_planned(adapter_name, config, plan)
    with torch.no_grad():
        for key, tensor in _own_tensors(model, adapter_name):
            tensor.copy_(tensors[key])
        for key, (module, part) in bases.items():
            module._parameters[part].copy_(tensors[key])  # type: ignore[union-attr]


def _own_tensors(model: LoraModel, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """What an adapter holds itself, by PEFT's keys."""
    for name, layer in model.lora_layers():
        if adapter_name in layer.adapters:
            for key, parameter in layer.peft_parameters(adapter_name).items():
                yield f"{PREFIX}{name}.{key}", parameter
    yield from _saved_modules(model, adapter_name)


def _saved_modules(model: LoraModel, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    for name, saved in model.saved_modules():
        if adapter_name in saved.modules_to_save:
            for key, tensor in saved.modules_to_save[adapter_name].state_dict().items():
                yield f"{PREFIX}{name}.{key}", tensor


def read_config(files: AdapterFolder) -> LoraConfig:
    """The config of an open adapter; AdapterFileError names the file."""
    try:
        return LoraConfig.from_dict(files.config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise AdapterFileError(f"{files.path / 'adapter_config.json'}: {error}") from error


def _tied_as_in_the_file(plan: Plan, config: LoraConfig, files: AdapterFolder) -> Plan:
    """The plan without tied copies that the file does not have: PEFT ties those of a head or an
    embedding only where it knows the name that modules_to_save gives it."""
    if not plan.tied:
        return plan
    header, named = files.header(), saved_modules(config)
    absent = {
        name
        for name in plan.tied
        if f"{PREFIX}{name}.weight" not in header and not matches(name, named)
    }
    return plan._replace(
        saved={name: module for name, module in plan.saved.items() if name not in absent},
        tied={name: source for name, source in plan.tied.items() if name not in absent},
    )


def _expected(plan: Plan) -> Iterator[tuple[str, TensorSpec]]:
    for planned in plan.layers.values():
        held_in = planned.layer.adapter_dtype(planned.settings)
        for key, shape in planned.layer.peft_shapes(planned.settings).items():
            yield f"{PREFIX}{planned.name}.{key}", TensorSpec(shape, held_in=held_in)
    for name, module in plan.saved.items():
        original = getattr(module, "original_module", module)
        for key, tensor in original.state_dict().items():
            shape = tuple(tensor.shape)
            dtypes = FLOATS if tensor.is_floating_point() else frozenset({tensor.dtype})
            yield f"{PREFIX}{name}.{key}", TensorSpec(shape, dtypes, tensor.dtype)


def _optional_bases(
    model: LoraModel, config: LoraConfig, plan: Plan, files: AdapterFolder
) -> dict[str, tuple[nn.Module, str]]:
    """The base's tensors that the file is to hold (biases) or may hold (embeddings), by key."""
    adapted = {place for place in plan.layers}
    found = {
        key: (module, part) for key, module, part in _biases(model.base_model, config.bias, adapted)
    }
    header = files.header()
    whole = {id(module) for module in plan.saved.values()}  # the file's are those of their copies
    for key, module, part in _embeddings(model.base_model, True, adapted):
        if key in header and id(module) not in whole:
            found[key] = (module, part)
    if found and any(layer.merged for _, layer in model.lora_layers()):
        raise ValueError(
            "LoraModel.load_adapter: the file holds tensors of the base, which has merged "
            "adapters; call unmerge_adapter() first"
        )
    return found


def _biases(model: nn.Module, bias: str, adapted: set[int]) -> Iterator[tuple[str, nn.Module, str]]:
    """(key, module, parameter) of the base biases that a config's `bias` saves."""
    if bias == "none":
        return
    for name, module in model.named_modules():
        if module._parameters.get("bias") is None or "modules_to_save" in name:
            continue
        if id(module) in adapted:
            yield f"{PREFIX}{name}.base_layer.bias", module, "bias"
        elif bias == "all":
            yield f"{PREFIX}{name}.bias", module, "bias"


def _embeddings(
    model: nn.Module, choice: bool | str, adapted: set[int]
) -> Iterator[tuple[str, nn.Module, str]]:
    """(key, module, parameter) of the base's embeddings that are saved with an adapter."""
    if choice is False:
        return
    chosen = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(NotImplementedError):  # transformers' answer for a model without
            chosen.add(id(getattr(model, getter, lambda: None)()))
    for name, module in model.named_modules():
        if id(module) not in chosen or module._parameters.get("weight") is None:
            continue
        targeted = isinstance(module, LoraLayer) and id(module) in adapted
        if choice == "auto" and not (targeted and name.rpartition(".")[2] in _EMBEDDINGS):
            continue
        yield f"{PREFIX}{name}{'.base_layer' if targeted else ''}.weight", module, "weight"


def _subtract_initial(
    model: LoraModel, adapter_name: str, tensors: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """The tensors with each adapter replaced by what it does beyond its initial state."""
    known = adapter_state_dict(model, adapter_name, save_embedding_layers=True)
    with open_adapter(folder) as files:
        present = files.header().keys() & known.keys()
        shapes = {k: tuple(v.shape) for k, v in known.items() if k in present or k in tensors}
        initial = files.tensors({key: TensorSpec(shape) for key, shape in shapes.items()})
    result = dict(tensors)
    for name, layer in model.lora_layers():
        if adapter_name not in layer.adapters:
            continue
        scaling = layer.adapters[adapter_name].scaling
        for prefix in layer.PREFIXES:
            if f"{prefix}lora_A" not in layer.parts(adapter_name):
                continue
            A, B = (
                f"{PREFIX}{name}.{layer.PEFT_NAMES[prefix + part]}" for part in ("lora_A", "lora_B")
            )
            if A not in initial or B not in initial:
                raise AdapterFileError(f"{folder}: has no {A if A not in initial else B}")
            pairs = [
                Adapter(values[A].to(tensors[A]), values[B].to(tensors[B]), scaling)
                for values in (tensors, initial)
            ]
            both = subtract_mutated_init(*pairs)
            result[A], result[B] = both.lora_A, both.lora_B
    return result


def _of_twice_the_rank(config: LoraConfig) -> LoraConfig:
    factor = alpha_factor(config.use_rslora)
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {name: 2 * r for name, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {
        name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()
    }
    return config
