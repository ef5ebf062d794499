"""What adapters a model has, and in which state; fields and their meanings are PEFT's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_ext.adapters.inject import adapted
from lora_ext.arguments import check_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.token_wrappers import TiedTokensLayer
from lora_ext.nn.trainable import count_parameters
from lora_ext.nn.trainable_tokens import TrainableTokensLayer

IRREGULAR = "irregular"  # layers, or parameters, differ
SAVED_WHOLE = "ModulesToSaveWrapper"


@dataclass(frozen=True)
class LayerStatus:
    """One layer, or one module that is saved whole; `requires_grad` is "irregular" where an
    adapter's parameters differ."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None
    scaling: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelStatus:
    """The whole model; a value is "irregular" where its layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """The state of each layer with adapters and of each module that is saved whole.

    Args:
        model: a LoraModel, in whose names the model's is "model."; or any with such layers in it.

    Raises:
        ValueError: there is none.
    """
    check_module("get_layer_status", "model", model)
    own: frozenset[nn.Module] | None = getattr(model, "_own", None)
    rows = []
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.") if own is not None else name
        if own is not None and module not in own:
            continue
        if isinstance(module, LoraLayer):
            rows.append(_of_layer(name, module))
        elif isinstance(module, ModulesToSave):
            rows.append(_of_saved(name, module))
        elif isinstance(module, TrainableTokensLayer | TiedTokensLayer):
            rows.append(_of_tokens(name, module))
    if not rows:
        raise ValueError(
            "get_layer_status: model: No adapter layers found in the model; expected a LoraModel "
            "before unload(), or one with adapters injected"
        )
    return rows


def _of_layer(name: str, layer: LoraLayer) -> LayerStatus:
    parameters = {n: list(layer.adapter_parameters(n).values()) for n in layer.adapters}
    return LayerStatus(
        name=name,
        module_type=f"lora.{type(layer).__name__.removeprefix('Kept').removeprefix('Quantized')}",
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={n: _common(p.requires_grad for p in ps) for n, ps in parameters.items()},
        available_adapters=sorted(layer.adapters),
        devices={n: _devices(ps) for n, ps in parameters.items()},
        scaling={n: layer.get_scale(n) for n in layer.adapters},
    )


def _of_saved(name: str, module: ModulesToSave) -> LayerStatus:
    copies = {n: list(copied.parameters()) for n, copied in module.modules_to_save.items()}
    return LayerStatus(
        name=name,
        module_type=SAVED_WHOLE,
        enabled=module.enabled,
        active_adapters=[] if module.active_adapter is None else [module.active_adapter],
        merged_adapters=[],
        requires_grad={n: _common(p.requires_grad for p in ps) for n, ps in copies.items()},
        available_adapters=sorted(copies),
        devices={n: _devices(ps) for n, ps in copies.items()},
    )


def _of_tokens(name: str, layer: TrainableTokensLayer | TiedTokensLayer) -> LayerStatus:
    tables = dict(layer.trainable_tokens_delta.items())
    return LayerStatus(
        name=name,
        module_type="TrainableTokensLayer",
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={n: table.requires_grad for n, table in tables.items()},
        available_adapters=sorted(tables),
        devices={n: _devices([table]) for n, table in tables.items()},
    )


def _devices(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({tensor.device.type for tensor in tensors})


def get_model_status(model: nn.Module) -> ModelStatus:
    """The state of the model; `get_layer_status` says where layers differ.

    Raises:
        ValueError: there is no layer with adapters.
    """
    rows = get_layer_status(model)
    trainable, total = count_parameters(model)
    known = hasattr(model, "peft_config")
    found = adapted(model, "get_model_status")[0] if known else None
    available = sorted({name for row in rows for name in row.available_adapters})
    # A layer need not have all adapters: its lists are compared with those it could have.
    active = list(dict.fromkeys(name for row in rows for name in row.active_adapters))
    if found is not None:
        active = [name for name in found.active_adapters if name in available] or active
    merged = sorted({name for row in rows for name in row.merged_adapters})
    mergeable = [row for row in rows if row.module_type != SAVED_WHOLE]
    return ModelStatus(
        base_model_type=type(model if found is None else found.get_base_model()).__name__,
        adapter_model_type="None" if found is None else type(found).__name__,
        peft_types={}
        if found is None
        else {n: str(c.peft_type.value) for n, c in found.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(rows),
        enabled=_common(row.enabled for row in rows),
        active_adapters=_lists(rows, [row.active_adapters for row in rows], active),
        merged_adapters=_lists(mergeable, [row.merged_adapters for row in mergeable], merged),
        requires_grad={
            name: _common(row.requires_grad[name] for row in rows if name in row.requires_grad)
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({one for row in rows for one in row.devices.get(name, ())})
            for name in available
        },
    )


def _common(values: Iterable[bool | str]) -> bool | str:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else IRREGULAR


def _lists(
    rows: Sequence[LayerStatus], names: Sequence[list[str]], all_names: list[str]
) -> list[str] | str:
    for row, mine in zip(rows, names, strict=True):
        if mine != [name for name in all_names if name in row.available_adapters]:
            return IRREGULAR
    return all_names
