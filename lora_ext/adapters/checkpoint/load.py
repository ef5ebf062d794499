"""Adding an adapter from a folder in PEFT's checkpoint format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_ext._patterns import FILE_SECONDS, in_time
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.adding import add_planned, plan_for, replicate
from lora_ext.adapters.checkpoint.grouped_convolutions import (
    grouped_as_there,
    grouped_where_possible,
    planned_as_in,
)
from lora_ext.adapters.checkpoint.keys import PREFIX, expected, own_tensors, possible_keys
from lora_ext.adapters.checkpoint.reading import (
    BaseTensors,
    FileTensors,
    check_key_mapping,
    check_loadable,
    check_repeated,
    repeated,
    warn_of_shapes,
    without_rows,
)
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.config_checks import check_built
from lora_ext.adapters.plan import Plan, PlannedLayer, tied_as_held
from lora_ext.adapters.tokens import tokens_of
from lora_ext.arguments import as_flag, as_path, warn
from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_folder import CONFIG_NAME, AdapterFolder, open_adapter
from lora_ext.io.files import short
from lora_ext.nn.adapter import check_adapter_name
from lora_ext.nn.init import is_loftq
from lora_ext.nn.sharded import is_sharded, like, to_rest
from lora_ext.nn.transaction import Transaction

# Fields of a config that the values of an adapter go with.
_OF_THE_VALUES = (
    *("lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "r", "rank_pattern"),
    *("alora_invocation_tokens", "use_bdlora"),
)


def load_adapter(
    model: AdaptedModel,
    folder: str | Path,
    adapter_name: str,
    *,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    config: LoraConfig | None = None,
    key_mapping: Mapping[str, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    transaction: Transaction | None = None,
) -> list[str]:
    """Adds an adapter from a folder that PEFT or `save_pretrained` wrote; one of that name that is
    there gets the folder's values, and stays otherwise as it is, as in PEFT. Config and header are
    checked against the model before anything of the adapter's size is allocated, and nothing is
    changed if they do not fit.

    Where parameters are DTensors every process reads the file, of which each keeps its part. In a
    model of FSDP2, which cannot get new parameters, the adapter has to be there before
    `fully_shard`, with a config like the file's, and gets its values.

    Args:
        is_trainable: whether it trains when it is active.
        config: instead of the folder's.
        key_mapping: regular expressions for parts of the file's keys, without "base_model.model.",
            and what each is replaced by, as in PEFT.
        ignore_mismatched_sizes: leaves tensors of other shapes than the model's out, with a warning
            that names them: what they were to fill is as a new adapter, or the base, has it.
        transaction: of what else is to be done or undone with it.

    Returns:
        The keys that were left out.

    Raises:
        AdapterFileError: a file is missing, damaged, or does not fit the model; names the file and
            the key.
        ValueError: the name cannot be one, or the model is merged and the file holds biases of the
            base.
    """
    check_adapter_name(adapter_name, (), "LoraModel.load_adapter")
    known = adapter_name in model.peft_config
    is_trainable = as_flag(is_trainable, "LoraModel.load_adapter", "is_trainable")
    any_shape = as_flag(
        ignore_mismatched_sizes, "LoraModel.load_adapter", "ignore_mismatched_sizes"
    )
    check_key_mapping("LoraModel.load_adapter", key_mapping)
    path = as_path(folder, "load_adapter")
    own = Transaction() if transaction is None else transaction
    names = sum(1 for _ in model.modules())

    def load() -> list[str]:
        with open_adapter(path) as files:
            if known:
                model.check_not_offloaded(adapter_name, "LoraModel.load_adapter")
                to_rest(model)
                plan = plan_of(model, adapter_name)
                _warn_of_other_settings(read_config(files), plan.config)
            else:
                chosen = read_config(files) if config is None else LoraConfig.of(config, "config")
                chosen.inference_mode = not is_trainable
                replicate(model, chosen, own)
                plan = _plain_over_codes(plan_for(model, chosen, autocast_adapter_dtype))
            check_loadable(model, plan)
            file = FileTensors(files, possible_keys(model, plan), key_mapping)
            there = plan
            plan = planned_as_in(file, plan if known else _tied_as_in(file, plan))
            bases = BaseTensors(model, plan, file, any_shape)
            own_keys = dict(expected(plan))
            again = repeated(file, plan, own_keys)
            twice = {key: own_keys[own] for key, own in again.items()}
            wanted = own_keys | twice | bases.expected() | without_rows(file, own_keys)
            others = file.of_other_shapes(wanted) if any_shape else {}
            warn_of_shapes("LoraModel.load_adapter", others)
            bases.leave_out(others)
            again = {key: own for key, own in again.items() if not others.keys() & {key, own}}
            found = file.read({k: s for k, s in wanted.items() if k not in others}, others)
        tensors = file.with_plain_keys(found)
        check_repeated(file, again, tensors)
        bases.check(tensors)
        if known:
            grouped_as_there(there, tensors, file.path)
        else:
            plan = _apart_where_told(grouped_where_possible(plan, tensors), tensors, file.path)
            add_planned(model, adapter_name, plan, own, is_filled=not others)
            if isinstance(config, LoraConfig):  # it is to be the model's, as in PEFT
                resolved = vars(model.peft_config[adapter_name])
                own.set(config, **{name: resolved[name] for name in vars(config)})
                own.put(model.peft_config, adapter_name, config)
        _fill(model, adapter_name, tensors, file.path, own if known else None)
        for key, tensor in bases.targets.items():
            own.write(tensor, like(tensors[key], tensor))
        # What calls of other threads read changes between them.
        with model.changing() if known or bases.targets else nullcontext():
            own.commit()
        return list(others)

    with own, typed_content(path):
        return in_time(FILE_SECONDS, names, load)


def _plain_over_codes(plan: Plan) -> Plan:
    """The plan without LoftQ's and LoRA-GA's initialisation of layers over a quantized base: that
    is made of what they left, so that a file's adapter has nothing left to change there."""
    if not is_loftq(kind := plan.config.init_lora_weights) and kind != "lora_ga":
        return plan
    from lora_ext.nn.quantized import QuantizedBase  # only now: few need it

    layers = {
        place: one._replace(settings=replace(one.settings, init_lora_weights=True))
        if isinstance(one.layer, QuantizedBase)
        else one
        for place, one in plan.layers.items()
    }
    return plan._replace(layers=layers)


def plan_of(model: AdaptedModel, adapter_name: str) -> Plan:
    """What an adapter that is there has, as the plan of it."""
    layers = {
        id(layer): PlannedLayer(name, layer, layer.adapters[adapter_name])
        for name, layer in model.layers_with(adapter_name)
    }
    saved = {n: m for n, m in model.saved_modules() if adapter_name in m.modules_to_save}
    tokens = tokens_of(model, adapter_name)
    return Plan(model.peft_config[adapter_name], [], [], layers, dict(saved), {}, tokens)


def _warn_of_other_settings(file: LoraConfig, config: LoraConfig) -> None:
    """An adapter that is there keeps its config, as in PEFT; a file's values may want another.
    ValueError if they are those of other tokens' rows."""
    rows, own = file.trainable_token_indices, config.trainable_token_indices
    if rows and own and type(rows) is type(own) and rows != own:
        raise ValueError(
            f"LoraModel.load_adapter: trainable_token_indices: the file says {str(rows)[:200]}, "
            f"but the adapter is there already and has {str(own)[:200]}, in this order; "
            "delete_adapter() first to load it anew"
        )
    for field in _OF_THE_VALUES:
        got, kept = getattr(file, field), getattr(config, field)
        if got != kept:
            warn(
                f"LoraModel.load_adapter: {field}: the file says {str(got)[:200]}, but the "
                f"adapter is there already and keeps {str(kept)[:200]}; delete_adapter() first to "
                "load it anew"
            )


@torch.no_grad()
def _fill(
    model: AdaptedModel,
    adapter_name: str,
    tensors: Mapping[str, Tensor],
    path: Path,
    transaction: Transaction | None,
) -> None:
    """Gives an adapter the values that a file has for it; by a transaction, if it had others."""
    first: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
    for key, tensor in own_tensors(model, adapter_name):
        if key not in tensors:  # left out
            continue
        local = tensor.to_local() if is_sharded(tensor) else tensor
        place = local.data_ptr(), tensor.numel()
        other, stride = first.setdefault(place, (key, tensor.stride()))
        same = tensors[key] if stride == tensor.stride() else tensors[key].t()  # an embedding's
        if other != key and not torch.equal(tensors[other], same):
            raise AdapterFileError(
                f"{path}: {short(key)}: differs from {short(other)}, which is the same "
                "module in this model; give it modules of their own"
            )
        if transaction is None:
            tensor.copy_(like(tensors[key], tensor))
        else:
            transaction.write(tensor, like(tensors[key], tensor))


@contextmanager
def typed_content(path: Path) -> Iterator[None]:
    """Turns errors of what a file asks for into `AdapterFileError`."""
    try:
        yield
    except AdapterFileError:
        raise
    except (
        *(TypeError, ValueError, NotImplementedError, LookupError, AttributeError),
        *(ArithmeticError, RecursionError),
    ) as error:
        raise AdapterFileError(f"{path}: does not fit the model: {error}") from error


def read_config(files: AdapterFolder) -> LoraConfig:
    """The config of an open adapter; AdapterFileError names the file."""
    try:
        config = LoraConfig.from_dict(files.config)
        check_built(files.config)
        return config
    except (TypeError, ValueError, NotImplementedError) as error:
        raise AdapterFileError(f"{files.path / CONFIG_NAME}: {error}") from error


def _apart_where_told(plan: Plan, tensors: Mapping[str, Tensor], path: Path) -> Plan:
    """The plan without ties of embeddings to which the file gives different adapters: PEFT ties
    linear layers alone."""
    planned = {one.name: one.layer for one in plan.layers.values()}

    def has_its_own(name: str, source: str) -> bool:
        names = planned[name].PEFT_NAMES
        if names != planned[source].PEFT_NAMES:
            return False  # refused when it is filled
        keys = [[f"{PREFIX}{one}.{part}" for part in names.values()] for one in (name, source)]
        return any(
            not torch.equal(tensors[own], tensors[other])
            for own, other in zip(*keys, strict=True)
            if own in tensors and other in tensors
        )

    apart = [name for name, source in plan.tied_layers.items() if has_its_own(name, source)]
    if apart:
        warn(
            f"LoraModel.load_adapter: {path} has ensure_weight_tying, but adapters of {apart} that "
            f"are not that of '{plan.tied_layers[apart[0]]}', whose weight they share, as PEFT "
            "trains them: they stay adapters of their own"
        )
    tied = {name: source for name, source in plan.tied_layers.items() if name not in apart}
    return plan._replace(tied_layers=tied)


def _tied_as_in(file: FileTensors, plan: Plan) -> Plan:
    """The plan without the tied adapters and copies that the file does not have: PEFT ties those of
    a head or an embedding only where it knows the name that the config gives it."""
    heads = {key.rpartition(".lora_")[0] for key in file.specs if ".lora_" in key}
    return tied_as_held(
        plan,
        lambda name: f"{PREFIX}{name}" in heads,
        lambda name: f"{PREFIX}{name}.weight" in file.specs,
    )
