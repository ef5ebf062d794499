"""Adapters of a model in PEFT's checkpoint format: `adapter_config.json` and
`adapter_model.safetensors`, with PEFT's keys."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_ext.adapters.adding import add_planned, plan_for, replicate
from lora_ext.adapters.combining import Adapter, alpha_factor, subtract_mutated_init
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.names import named_modules, plain_name
from lora_ext.adapters.patterns import FILE_SECONDS, in_time
from lora_ext.adapters.targets import matches, saved_modules
from lora_ext.arguments import as_flag, as_path, names_of, warn
from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_file import TensorSpec
from lora_ext.io.adapter_folder import (
    AdapterFolder,
    check_adapter_files,
    open_adapter,
    save_adapters,
)
from lora_ext.io.base_tensors import (
    around_others,
    around_planned,
    biases,
    embeddings,
    name_in_file,
    places,
    targets_embeddings,
    was_resized,
)
from lora_ext.io.files import short, typed_content
from lora_ext.io.grouped_convolutions import grouped_where_possible, planned_as_in
from lora_ext.io.plain_lora import plain_lora
from lora_ext.io.reading import BaseTensors, FileTensors, check_loadable, repeated, spec_of
from lora_ext.io.savable import check_adapter, check_tensors
from lora_ext.nn import LoraLayer
from lora_ext.nn.adapter import DEFAULT, check_adapter_name
from lora_ext.nn.transaction import Transaction

if TYPE_CHECKING:
    from lora_ext.adapters.lora_model import LoraModel
    from lora_ext.adapters.plan import Plan

PREFIX = "base_model.model."


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
            those that the adapter targets as "embed_tokens" or "lm_head", and both where the
            vocabulary is not that of the files that the model was loaded from, as PEFT does.
    """
    config = model.peft_config[adapter_name]
    tensors: dict[str, Tensor] = {}
    for name, layer in _layers(model, adapter_name):
        for key, tensor in layer.peft_tensors(adapter_name).items():
            tensors[f"{PREFIX}{name}.{key}"] = tensor
    tensors.update(_saved_modules(model, adapter_name))
    bases = dict(_base_tensors(model, adapter_name, config, save_embedding_layers))
    check_tensors(bases, f"save_pretrained: '{adapter_name}'")
    tensors.update({key: tensor.detach() for key, tensor in bases.items()})
    return tensors


def _base_tensors(
    model: LoraModel, adapter_name: str, config: LoraConfig, save_embedding_layers: bool | str
) -> Iterator[tuple[str, Tensor]]:
    base = model.base_model
    adapted = {id(la): la for _, la in model.lora_layers() if adapter_name in la.adapters}
    whole = {id(m) for _, m in model.saved_modules() if adapter_name in m.modules_to_save}
    found = list(places(base, adapted, whole))
    parts = list(biases(iter(found), config.bias))
    if save_embedding_layers is True:
        parts += embeddings(base, iter(found))
    elif save_embedding_layers == "auto" and was_resized(base, config):
        warn(
            "save_pretrained: the vocabulary is not that of the files the model was loaded from, "
            "so its embeddings are saved too; save_embedding_layers=False leaves them out"
        )
        parts += embeddings(base, iter(found))
    elif save_embedding_layers == "auto" and targets_embeddings(base, config):
        parts += [one for one in embeddings(base, iter(found)) if one[0].layer is not None]
    for place, part in parts:
        yield PREFIX + place.key_of(part), place.unmerged(part)


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
    their names. Each pair of files is replaced as one, see `lora_ext.io.save_adapter`; if one
    cannot be written, all stay as they were.

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
        ValueError: no such adapter, or the model does not hold all of it (after `unload()`, under
            ZeRO-3, on "meta", in layers that were replaced since), or its config does not fit the
            model, or it was combined of adapters whose initialisation changed the base;
            as_plain_lora with a conversion of the initialisation, or for an attention with kdim or
            vdim other than embed_dim. Nothing is written then.
        AdapterFileError: NaN or Inf; the initial adapter's files are damaged or do not fit.
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
    if not names:
        raise ValueError(
            f"save_pretrained: adapter_names: got {adapter_names}, with adapters "
            f"{list(model.peft_config)} in the model, expected at least one; nothing is written"
        )
    as_plain_lora = as_flag(as_plain_lora, "save_pretrained", "as_plain_lora")
    if as_plain_lora and path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            "save_pretrained: as_plain_lora: got True with path_initial_model_for_weight_conversion"
            ", expected one of both: each changes all ranks"
        )
    ready = []  # all of them, before the first is written
    for name in names:
        config = copy.deepcopy(model.peft_config[name])
        check_adapter(model, name, config)
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
        place = Path(folder) if name == DEFAULT else Path(folder) / name
        ready.append((place, fields, tensors))
    scaled = [name for name in names if _is_scaled(model, name)]
    if scaled:
        warn(
            f"save_pretrained: {scaled}: set_scale or scale_layer changed the scaling, which the "
            "files do not hold: loaded again, they run with that of their config"
        )
    for place, fields, tensors in ready[1:]:  # before a folder is made
        check_adapter_files(place, fields, tensors)
    save_adapters(ready)


def _is_scaled(model: LoraModel, adapter_name: str) -> bool:
    """Whether an adapter runs with another scaling than its config's."""
    return any(
        not math.isclose(layer.get_scale(adapter_name), layer.adapters[adapter_name].scaling)
        for _, layer in model.lora_layers()
        if adapter_name in layer.adapters
    )


def load_adapter(
    model: LoraModel,
    folder: str | Path,
    adapter_name: str,
    *,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    transaction: Transaction | None = None,
) -> None:
    """Adds an adapter from a folder that PEFT or `save_pretrained` wrote. Config and header are
    checked against the model before anything of the adapter's size is allocated, and nothing is
    changed if they do not fit.

    Args:
        is_trainable: whether it trains when it is active.
        transaction: of what else is to be done or undone with it.

    Raises:
        AdapterFileError: a file is missing, damaged, or does not fit the model; names the file and
            the key.
        ValueError: the name is taken, or the model is merged and the file holds biases of the base.
    """
    check_adapter_name(adapter_name, model.peft_config, "LoraModel.load_adapter")
    is_trainable = as_flag(is_trainable, "LoraModel.load_adapter", "is_trainable")
    own = Transaction() if transaction is None else transaction
    names = sum(1 for _ in model.modules())
    with open_adapter(folder) as files, own, typed_content(files.path):

        def load() -> None:
            config = read_config(files)
            config.inference_mode = not is_trainable
            replicate(model, config, own)
            plan = plan_for(model, config, autocast_adapter_dtype)
            _load_planned(model, adapter_name, plan, files, own)

        in_time(FILE_SECONDS, names, load)


def _load_planned(
    model: LoraModel, adapter_name: str, plan: Plan, files: AdapterFolder, own: Transaction
) -> None:
    check_loadable(model, plan)
    file = FileTensors(files, _possible_keys(model, plan))
    plan = planned_as_in(file, _tied_as_in_the_file(plan, plan.config, file), PREFIX)
    bases = BaseTensors(model, plan.config, plan, file, PREFIX)
    own_keys = dict(_expected(plan))
    tensors = file.read(own_keys | repeated(file, own_keys) | bases.expected())
    bases.check(tensors)
    plan = grouped_where_possible(plan, tensors, PREFIX)
    add_planned(model, adapter_name, plan, own)
    first: dict[tuple[int, torch.Size], str] = {}
    with torch.no_grad():
        for key, tensor in _own_tensors(model, adapter_name):
            other = first.setdefault((tensor.data_ptr(), tensor.shape), key)
            if other != key and not torch.equal(tensors[other], tensors[key]):
                raise AdapterFileError(
                    f"{file.path}: {short(key)}: differs from {short(other)}, which is the same "
                    "module in this model; give it modules of their own"
                )
            tensor.copy_(tensors[key])
    for key, tensor in bases.targets.items():
        own.write(tensor, tensors[key])
    own.commit()


def _possible_keys(model: LoraModel, plan: Plan) -> Iterator[str]:
    """Keys as many and as long as a file for the model can have."""
    yield from (key for key, _ in _expected(plan))
    for name, _ in model.base_model.named_parameters(remove_duplicate=False):
        yield f"{PREFIX}{name}.base_layer.original_module"


def _own_tensors(model: LoraModel, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """What an adapter holds itself, by PEFT's keys."""
    for name, layer in _layers(model, adapter_name):
        for key, parameter in layer.peft_parameters(adapter_name).items():
            yield f"{PREFIX}{name}.{key}", parameter
    yield from _saved_modules(model, adapter_name)


def _layers(model: LoraModel, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """The adapter's layers, by their names in files."""
    mine = [(name, layer) for name, layer in model.lora_layers() if adapter_name in layer.adapters]
    around = around_others(mine)
    for name, layer in mine:
        yield name_in_file(name, around), layer


def _saved_modules(model: LoraModel, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    around = around_others(
        (name, layer) for name, layer in model.lora_layers() if adapter_name in layer.adapters
    )
    own = {id(saved): name for name, saved in model.saved_modules()}
    # A module may have several names, of which the config need not mean the first.
    meant = tuple(saved_modules(model.peft_config[adapter_name]))
    names: dict[int, list[str]] = {}
    for name, saved in named_modules(model.base_model, remove_duplicate=False):
        if id(saved) in own and name.endswith(meant):
            names.setdefault(id(saved), []).append(name)
    for first, saved in model.saved_modules():
        if adapter_name in saved.modules_to_save:
            state = saved.modules_to_save[adapter_name].state_dict()
            for name in names.get(id(saved), [first]):
                for key, tensor in state.items():
                    yield f"{PREFIX}{name_in_file(name, around)}.{plain_name(key)}", tensor


def read_config(files: AdapterFolder) -> LoraConfig:
    """The config of an open adapter; AdapterFileError names the file."""
    try:
        return LoraConfig.from_dict(files.config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise AdapterFileError(f"{files.path / 'adapter_config.json'}: {error}") from error


def _tied_as_in_the_file(plan: Plan, config: LoraConfig, file: FileTensors) -> Plan:
    """The plan without tied copies that the file does not have: PEFT ties those of a head or an
    embedding only where it knows the name that modules_to_save gives it."""
    if not plan.tied:
        return plan
    named = saved_modules(config)
    absent = {
        name
        for name in plan.tied
        if f"{PREFIX}{name}.weight" not in file.specs and not matches(name, named)
    }
    return plan._replace(
        saved={name: module for name, module in plan.saved.items() if name not in absent},
        tied={name: source for name, source in plan.tied.items() if name not in absent},
    )


def _expected(plan: Plan) -> Iterator[tuple[str, TensorSpec]]:
    around = around_planned(plan)
    for planned in plan.layers.values():
        held_in = planned.layer.adapter_dtype(planned.settings)
        name = name_in_file(planned.name, around)
        for key, shape in planned.layer.peft_shapes(planned.settings).items():
            yield f"{PREFIX}{name}.{key}", TensorSpec(shape, held_in=held_in)
    for name, module in plan.saved.items():
        name = name_in_file(name, around)
        original = getattr(module, "original_module", module)
        for key, tensor in original.state_dict().items():
            yield f"{PREFIX}{name}.{plain_name(key)}", spec_of(tensor)


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
    for name, layer in _layers(model, adapter_name):
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
