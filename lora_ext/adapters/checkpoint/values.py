"""Values for a model's parameters that come from elsewhere, such as a gathered state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.checkpoint.keys import PREFIX
from lora_ext.adapters.names import plain_name
from lora_ext.arguments import check_mapping


@contextmanager
def values_of(model: AdaptedModel, state_dict: Mapping[str, Tensor] | None) -> Iterator[None]:
    """The model with the values of a state dict of it, for as long as the context lasts."""
    if state_dict is None:
        yield
        return
    check_mapping("state_dict", "state_dict", state_dict, Tensor, "tensors")
    values = {plain_name(name): value for name, value in state_dict.items()}
    before: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    try:
        for where, module in model.named_modules(remove_duplicate=False):
            for part, parameter in module._parameters.items():
                name = plain_name(f"{where}.{part}" if where else part)
                value = values.get(name, values.get(name.removeprefix(PREFIX)))
                if parameter is not None and value is not None:
                    before.append((module._parameters, part, parameter))
                    given = nn.Parameter(value.detach(), requires_grad=False)
                    module._parameters[part] = given
        yield
    finally:
        for registry, part, parameter in before:
            registry[part] = parameter
