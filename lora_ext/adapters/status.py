"""What adapters a model has, and in which state."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.nn.trainable import count_parameters

IRREGULAR = "irregular"  # layers, or parameters, differ


@dataclass(frozen=True)
class LayerStatus:
    """One layer; `requires_grad` is "irregular" where an adapter's parameters differ."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    scaling: dict[str, float]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class ModelStatus:
    """The whole model; a value is "irregular" where its layers differ."""

    base_model_type: str
    adapter_model_type: str
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str] = field(default_factory=dict)
    available_adapters: list[str] = field(default_factory=list)


def get_layer_status(model: AdaptedModel) -> list[LayerStatus]:
    """The state of each layer that has adapters."""
    rows = []
    for name, layer in model.lora_layers():
        parameters = {n: list(layer.adapter_parameters(n).values()) for n in layer.adapters}
        rows.append(
            LayerStatus(
                name=name,
                module_type=f"{type(layer).__module__.rpartition('.')[0]}.{type(layer).__name__}",
                enabled=not layer.disable_adapters,
                active_adapters=list(layer.active_adapters),
                merged_adapters=list(layer.merged_adapters),
                requires_grad={
                    n: _common([p.requires_grad for p in mine]) for n, mine in parameters.items()
                },
                available_adapters=sorted(layer.adapters),
                scaling={n: layer.get_scale(n) for n in layer.adapters},
                devices={n: sorted({str(p.device) for p in ps}) for n, ps in parameters.items()},
            )
        )
    return rows


def get_model_status(model: AdaptedModel) -> ModelStatus:
    """The state of the model; `get_layer_status` says where layers differ."""
    rows = get_layer_status(model)
    trainable, total = count_parameters(model)
    # A layer need not have all adapters: its lists are compared with those it could have.
    active = [row.active_adapters for row in rows]
    merged = [row.merged_adapters for row in rows]
    return ModelStatus(
        base_model_type=type(model.get_base_model()).__name__,
        adapter_model_type=type(model).__name__,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(rows),
        enabled=_common([row.enabled for row in rows]),
        active_adapters=_lists(rows, active, list(model.active_adapters)),
        merged_adapters=_lists(rows, merged, sorted({n for names in merged for n in names})),
        requires_grad={
            name: _common([row.requires_grad[name] for row in rows if name in row.requires_grad])
            for name in model.peft_config
        },
        available_adapters=sorted(model.peft_config),
    )


def _common(values: list[bool | str] | list[bool]) -> bool | str:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else IRREGULAR


def _lists(
    rows: list[LayerStatus], names: list[list[str]], all_names: list[str]
) -> list[str] | str:
    for row, mine in zip(rows, names, strict=True):
        if mine != [name for name in all_names if name in row.available_adapters]:
            return IRREGULAR
    return all_names
