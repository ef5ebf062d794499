"""Adding an adapter from a folder in PEFT's checkpoint format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.adding import add_planned, plan_for, replicate
from lora_ext.adapters.checkpoint.grouped_convolutions import grouped_where_possible, planned_as_in
from lora_ext.adapters.checkpoint.keys import PREFIX, expected, own_tensors, possible_keys
from lora_ext.adapters.checkpoint.present import give_present, is_present, plan_for_present
from lora_ext.adapters.checkpoint.reading import (
    BaseTensors,
    FileTensors,
    check_loadable,
    repeated,
    with_plain_keys,
)
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.patterns import FILE_SECONDS, in_time
from lora_ext.adapters.plan import Plan
from lora_ext.adapters.targets import matches, saved_modules
from lora_ext.arguments import as_flag, as_path
from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_folder import CONFIG_NAME, AdapterFolder, open_adapter
from lora_ext.io.files import short
from lora_ext.nn.adapter import check_adapter_name
from lora_ext.nn.sharded import is_sharded, like
from lora_ext.nn.transaction import Transaction


def load_adapter(
    model: AdaptedModel,
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

    Where parameters are DTensors every process reads the file, of which each keeps its part. In a
    model of FSDP2, which cannot get new parameters, the adapter has to be there before
    `fully_shard`, with a config like the file's, and gets its values.

    Args:
        is_trainable: whether it trains when it is active.
        transaction: of what else is to be done or undone with it.

    Raises:
        AdapterFileError: a file is missing, damaged, or does not fit the model; names the file and
            the key.
        ValueError: the name is taken, or the model is merged and the file holds biases of the base.
    """
    into_present = is_present(model, adapter_name)
    if not into_present:
        check_adapter_name(adapter_name, model.peft_config, "LoraModel.load_adapter")
    is_trainable = as_flag(is_trainable, "LoraModel.load_adapter", "is_trainable")
    path = as_path(folder, "load_adapter")
    own = Transaction() if transaction is None else transaction
    names = sum(1 for _ in model.modules())

    def load() -> None:
        with open_adapter(path) as files:
            config = read_config(files)
            config.inference_mode = not is_trainable
            if into_present:
                plan = plan_for_present(model, config, autocast_adapter_dtype)
            else:
                replicate(model, config, own)
                plan = plan_for(model, config, autocast_adapter_dtype)
            check_loadable(model, plan)
            file = FileTensors(files, possible_keys(model, plan))
            plan = planned_as_in(file, _tied_as_in_the_file(plan, file))
            bases = BaseTensors(model, plan, file)
            own_keys = dict(expected(plan))
            found = file.read(own_keys | repeated(file, own_keys) | bases.expected())
        tensors = with_plain_keys(found)
        bases.check(tensors)
        plan = grouped_where_possible(plan, tensors)
        if into_present:
            give_present(model, adapter_name, plan, tensors, own)
        else:
            add_planned(model, adapter_name, plan, own)
            _fill(model, adapter_name, tensors, file.path)
        for key, tensor in bases.targets.items():
            own.write(tensor, like(tensors[key], tensor))
        own.commit()

    with own, typed_content(path):
        in_time(FILE_SECONDS, names, load)


@torch.no_grad()
def _fill(
    model: AdaptedModel, adapter_name: str, tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Gives an adapter the values that a file has for it."""
    first: dict[tuple[int, torch.Size], str] = {}
    for key, tensor in own_tensors(model, adapter_name):
        local = tensor.to_local() if is_sharded(tensor) else tensor
        other = first.setdefault((local.data_ptr(), tensor.shape), key)
        if other != key and not torch.equal(tensors[other], tensors[key]):
            raise AdapterFileError(
                f"{path}: {short(key)}: differs from {short(other)}, which is the same "
                "module in this model; give it modules of their own"
            )
        tensor.copy_(like(tensors[key], tensor))


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
        return LoraConfig.from_dict(files.config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise AdapterFileError(f"{files.path / CONFIG_NAME}: {error}") from error


def _tied_as_in_the_file(plan: Plan, file: FileTensors) -> Plan:
    """The plan without tied copies that the file does not have: PEFT ties those of a head or an
    embedding only where it knows the name that modules_to_save gives it."""
    if not plan.tied:
        return plan
    named = saved_modules(plan.config)
    absent = {
        name
        for name in plan.tied
        if f"{PREFIX}{name}.weight" not in file.specs and not matches(name, named)
    }
    return plan._replace(
        saved={name: module for name, module in plan.saved.items() if name not in absent},
        tied={name: source for name, source in plan.tied.items() if name not in absent},
    )
