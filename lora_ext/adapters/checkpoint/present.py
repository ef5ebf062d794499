"""Giving the values of a file to an adapter that a model of several processes has: FSDP2 takes no
new parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.keys import own_tensors
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.plan import Plan, make_plan
from lora_ext.nn.adapter import VARIANTS
from lora_ext.nn.sharded import has_shards, like, to_rest
from lora_ext.nn.transaction import Transaction

# Settings that the values of an adapter go with.
_OF_THE_VALUES = ("r", "scaling", "lora_bias", *VARIANTS, "ungrouped_lora_A", "weights")


def is_present(model: AdaptedModel, adapter_name: str) -> bool:
    """Whether loading an adapter of this name is giving one its values."""
    known = isinstance(adapter_name, str) and adapter_name in model.peft_config
    return known and has_shards(model)


def plan_for_present(model: AdaptedModel, config: LoraConfig, autocast: bool) -> Plan:
    """What a file's config means in a model that has its adapter."""
    to_rest(model)
    return make_plan(model.base_model, config, autocast)


def give_present(
    model: AdaptedModel,
    adapter_name: str,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    transaction: Transaction,
) -> None:
    """Gives an adapter a file's values, by key, when `transaction` is committed: each process its
    part. ValueError unless it is what the plan of the file would add, but for its values."""
    _check_alike(model, adapter_name, plan)
    for key, tensor in own_tensors(model, adapter_name):
        transaction.write(tensor, like(tensors[key], tensor))


def _check_alike(model: AdaptedModel, adapter_name: str, plan: Plan) -> None:
    """ValueError unless an adapter that is there is what a plan would add, but for its values."""
    present = {id(layer): name for name, layer in model.layers_with(adapter_name)}
    planned = {id(one.layer): one for one in plan.layers.values()}
    copies = {
        name for name, saved in model.saved_modules() if adapter_name in saved.modules_to_save
    }
    for place in present.keys() ^ planned.keys():
        name = present[place] if place in present else planned[place].name
        there = "the model" if place in present else "the file"
        raise ValueError(f"'{adapter_name}' has an adapter in '{name}' in {there} only")
    if copies != set(plan.saved):
        raise ValueError(
            f"modules_to_save: got {sorted(plan.saved)}, expected the model's {sorted(copies)}"
        )
    for one in planned.values():
        own = one.layer.adapters[adapter_name]
        for field in _OF_THE_VALUES:
            if getattr(own, field) != getattr(one.settings, field):
                raise ValueError(
                    f"'{one.name}': {field}: got {getattr(one.settings, field)}, expected that of "
                    f"the adapter '{adapter_name}' in the model, {getattr(own, field)}"
                )
