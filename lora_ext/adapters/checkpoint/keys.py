"""The keys of PEFT's files: `base_model.model.`, the module's name in the plain base, with
`base_layer` for each layer that PEFT puts around a module it is in, and PEFT's name of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.names import ends_in, named_modules, plain_name
from lora_ext.adapters.plan import Plan
from lora_ext.adapters.targets import saved_modules
from lora_ext.io.adapter_file import TensorSpec
from lora_ext.nn import AnyLayer, LoraLayer
from lora_ext.nn.trainable_tokens import DELTA

PREFIX = "base_model.model."
TOKENS = f"token_adapter.{DELTA}"


def layers_in_file(model: AdaptedModel, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """The adapter's layers, by their names in files."""
    mine = list(model.layers_with(adapter_name))
    around = around_others(mine)
    for name, layer in mine:
        yield name_in_file(name, around), layer


def saved_in_file(model: AdaptedModel, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the adapter's copies of modules to save, by their keys."""
    around = around_others(model.layers_with(adapter_name))
    own = {id(saved): name for name, saved in model.saved_modules()}
    # A module may have several names, of which the config need not mean the first.
    is_meant = ends_in(saved_modules(model.peft_config[adapter_name]))
    names: dict[int, list[str]] = {}
    for name, saved in named_modules(model.get_base_model(), remove_duplicate=False):
        if id(saved) in own and is_meant(name):
            names.setdefault(id(saved), []).append(name)
    for first, saved in model.saved_modules():
        if adapter_name in saved.modules_to_save:
            state = saved.modules_to_save[adapter_name].state_dict()
            for name in names.get(id(saved), [first]):
                for key, tensor in state.items():
                    yield f"{PREFIX}{name_in_file(name, around)}.{plain_name(key)}", tensor


def tokens_in_file(model: AdaptedModel, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The rows that the adapter trains, by their keys."""
    around = around_others(model.layers_with(adapter_name))
    for name, layer in model.token_layers():
        if adapter_name in layer.adapters:
            key = f"{PREFIX}{name_in_file(name, around)}.{TOKENS}"
            yield key, layer.trainable_tokens_delta[adapter_name]


def own_tensors(model: AdaptedModel, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """What an adapter holds itself, by PEFT's keys."""
    for name, layer in layers_in_file(model, adapter_name):
        for key, parameter in layer.peft_parameters(adapter_name).items():
            yield f"{PREFIX}{name}.{key}", parameter
    yield from saved_in_file(model, adapter_name)
    yield from tokens_in_file(model, adapter_name)


def expected(plan: Plan) -> Iterator[tuple[str, TensorSpec]]:
    """What a file of the planned adapter holds, by key: its parts, its copies of modules and
    the rows that it trains."""
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
    for name, tokens in plan.tokens.items():
        if tokens.source is None:
            key = f"{PREFIX}{name_in_file(name, around)}.{TOKENS}"
            yield key, TensorSpec(tokens.shape, held_in=tokens.dtype)


def followers_in_file(plan: Plan) -> dict[str, str]:
    """The keys under which PEFT writes rows of an embedding once more, for modules that share its
    weight and are saved with it; and the keys of the rows themselves."""
    around = around_planned(plan)
    keys = {n: f"{PREFIX}{name_in_file(n, around)}.{TOKENS}" for n in plan.tokens}
    tied = ((name, one.source) for name, one in plan.tokens.items())
    return {keys[name]: keys[source] for name, source in tied if source is not None}


def possible_keys(model: AdaptedModel, plan: Plan) -> Iterator[str]:
    """Keys as many and as long as a file for the model can have."""
    yield from (key for key, _ in expected(plan))
    for name, _ in model.get_base_model().named_parameters(remove_duplicate=False):
        yield f"{PREFIX}{name}.base_layer.original_module"


def spec_of(tensor: Tensor) -> TensorSpec:
    """What a file has to hold for it: exactly its dtype, if that is not floating-point."""
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if tensor.is_floating_point():
        return TensorSpec(shape, held_in=dtype)
    return TensorSpec(shape, frozenset({dtype}), dtype)


def around_others(layers: Iterable[tuple[str, LoraLayer]]) -> dict[str, LoraLayer]:
    """Those of an adapter's layers, by name, that may have further ones in them."""
    return {name: layer for name, layer in layers if isinstance(layer, AnyLayer)}


def around_planned(plan: Plan) -> dict[str, LoraLayer]:
    """The same of those that a plan gives an adapter."""
    return around_others((planned.name, planned.layer) for planned in plan.layers.values())


def name_in_file(name: str, around: Mapping[str, LoraLayer]) -> str:
    """The key of a module, with `base_layer` for what PEFT wraps around those that it is in."""
    if not around:
        return name
    parts = name.split(".")
    found = list(parts[:1])
    for i in range(1, len(parts)):
        layer = around.get(".".join(parts[:i]))
        found += ["base_layer"] * (0 if layer is None else depth(layer)) + [parts[i]]
    return ".".join(found)


def depth(layer: LoraLayer) -> int:
    """How often PEFT wraps: once, or once for each weight of a layer adapted by its weights."""
    return len(layer.WEIGHTS) if isinstance(layer, AnyLayer) else 1


def joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
