"""lora_A of grouped convolutions in files: PEFT's has all input channels, without groups.

One that is zero between the groups is loaded as the layer's own, smaller lora_A, which can be
merged; `LoraLayer.peft_tensors` makes PEFT's of it again. Any other runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lora_ext.adapters.checkpoint.keys import PREFIX, around_planned, name_in_file
from lora_ext.adapters.checkpoint.reading import FileTensors
from lora_ext.adapters.plan import Plan, PlannedLayer
from lora_ext.errors import AdapterFileError
from lora_ext.nn import Conv1d, Conv2d, Conv3d
from lora_ext.nn.adapter import variant_of

Conv = Conv1d | Conv2d | Conv3d


def planned_as_in(file: FileTensors, plan: Plan) -> Plan:
    """The plan with PEFT's shape of lora_A, but where the file has the layer's own, which is
    what DoRA has in files.

    Raises:
        AdapterFileError: PEFT's shape with DoRA.
    """
    header, layers = file.specs, dict(plan.layers)
    for place, planned, layer in _grouped(plan):
        key = _key(plan, planned)
        found = header[key].shape if key in header else None
        own = planned.layer.peft_shapes(planned.settings)["lora_A.weight"]
        pefts = (own[0], layer.in_channels, *own[2:])
        if found == own or (variant_of(planned.settings) and found != pefts):
            continue
        try:
            settings = replace(planned.settings, ungrouped_lora_A=True)
        except ValueError as error:
            raise AdapterFileError(f"{file.path}: '{key}': {error}") from error
        layers[place] = planned._replace(settings=settings)
    return plan._replace(layers=layers)


def grouped_where_possible(plan: Plan, tensors: dict[str, Tensor]) -> Plan:
    """The plan with the layers' own lora_A wherever that can hold the file's, which takes the
    other's place in `tensors`."""
    layers = dict(plan.layers)
    for place, planned, layer in _grouped(plan):
        if not planned.settings.ungrouped_lora_A:
            continue
        key = _key(plan, planned)
        grouped = layer.grouped(tensors[key]) if key in tensors else None
        if grouped is not None:
            tensors[key] = grouped
        if grouped is not None or key not in tensors:  # not in the file in the layer's shape
            settings = replace(planned.settings, ungrouped_lora_A=False)
            layers[place] = planned._replace(settings=settings)
    return plan._replace(layers=layers)


def grouped_as_there(plan: Plan, tensors: dict[str, Tensor], path: Path) -> None:
    """Gives the file's lora_A the form that an adapter has which is there, as `plan` says.

    Raises:
        AdapterFileError: that form has no place for what the file has between the groups.
    """
    for _, planned, layer in _grouped(plan):
        key = _key(plan, planned)
        own = planned.layer.peft_shapes(planned.settings)["lora_A.weight"]
        if key not in tensors or tensors[key].shape[1] == own[1]:
            continue
        grouped = layer.grouped(tensors[key])
        if grouped is None:
            raise AdapterFileError(
                f"{path}: '{key}': links channels of different groups, expected zeros there, as "
                f"the adapter of '{planned.name}' has; load it under a new name"
            )
        tensors[key] = grouped


def _grouped(plan: Plan) -> Iterator[tuple[int, PlannedLayer, Conv]]:
    for place, planned in plan.layers.items():
        layer = planned.layer
        if isinstance(layer, Conv1d | Conv2d | Conv3d) and layer.groups > 1:
            yield place, planned, layer


def _key(plan: Plan, planned: PlannedLayer) -> str:
    return f"{PREFIX}{name_in_file(planned.name, around_planned(plan))}.lora_A.weight"
