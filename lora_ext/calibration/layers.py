"""Which layers of a model an initialisation from data is for: linear ones that a config adapts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.names import named_modules
from lora_ext.adapters.targets import find_targets
from lora_ext.arguments import check_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.calibrated import LEFT_AT
from lora_ext.nn.kinds import can_be_adapted
from lora_ext.nn.linear import transformers_conv1d
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.token_wrappers import TrainableTokensWrapper
from lora_ext.quant.kinds import quantized_kind


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear or transformers' Conv1D, or an adapted one."""
    return isinstance(module, nn.Linear) or bool(transformers_conv1d(module))


def linear_targets(where: str, model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The linear layers that a config adapts, by name.

    Raises:
        TypeError, ValueError: the model is none, the config adapts nothing, or nothing linear.
    """
    check_module(where, "model", model)
    if isinstance(model, AdaptedModel):
        model = model.get_base_model()
    kinds = (LoraLayer, ModulesToSave, TrainableTokensWrapper)
    names = find_targets(model, config, can_be_adapted, kinds)
    modules = dict(named_modules(model, remove_duplicate=False))
    found = {name: modules[name] for name in names if is_linear(modules[name])}
    if not found:
        raise ValueError(
            f"{where}: lora_config: target_modules mean {names[:3]}, expected linear layers among "
            "them: No supported layers found: only nn.Linear and Conv1D layers start from data"
        )
    return found


def check_not_quantized(where: str, layers: dict[str, nn.Module]) -> None:
    """ValueError for a layer whose weight has no gradient and no values of its own."""
    for name, layer in layers.items():
        if quantized_kind(layer._modules.get("base_layer") or layer) is not None:
            raise ValueError(
                f"{where}: '{name}' is quantized, expected a weight in floating point: it does not "
                "support quantized models; calibrate and initialise first, then quantize"
            )


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as [N, K]."""
    if isinstance(layer, LoraLayer):
        return layer._weight_matrix()
    weight: Any = layer.weight
    return weight.t() if transformers_conv1d(layer) else weight  # type: ignore[no-any-return]


def leave(layers: dict[str, nn.Module], kind: str, values: dict[str, Any]) -> None:
    """Puts at each layer what an initialisation needs, where PEFT does."""
    for name, layer in layers.items():
        setattr(layer._modules.get("base_layer") or layer, LEFT_AT[kind], values[name])
