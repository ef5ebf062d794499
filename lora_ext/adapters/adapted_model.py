"""A model and the adapters in it: what they are. What can be done with them is functions of the
other modules here, and methods of `LoraModel`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lora_ext._offloaded import check_values
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.names import named_modules
from lora_ext.adapters.planning import called_outside, makes_plan, plan_of_call
from lora_ext.adapters.requests import Requests
from lora_ext.adapters.tuner import Tuner
from lora_ext.arguments import check_known, check_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.adoption import BOUND_CALLS
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.token_wrappers import TrainableTokensWrapper
from lora_ext.nn.trainable_tokens import TrainableTokensLayer

PREFIX = "base_model."


class AdaptedModel(nn.Module):
    """A base model and the layers and modules to save that were put into it. Calls and attributes
    go through to the base.

    Attributes:
        base_model: what holds the model: `base_model.model` is the model itself, with the layers in
            it, as `get_base_model()` is.
        peft_config: the configs, by the adapters' names.
        active_adapters: the names of the adapters that run.
        targeted_module_names, targeted_parameter_names: what the adapters are on.
    """

    # Here and not only of instances: a class that is also PEFT's has properties of these names.
    base_model: Tuner
    peft_config: dict[str, LoraConfig] = {}  # noqa: RUF012 - of no instance
    active_adapters: list[str] = []  # noqa: RUF012
    prefix = "lora_"  # of the names of adapters' parameters
    peft_type = "LORA"
    # What transformers' Trainer asks for before it trains over a quantized base.
    _hf_peft_config_loaded = True
    training: bool

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_model = Tuner(model, self)
        self.peft_config = {}
        self.active_adapters = []
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        # What this model put there: layers and modules to save. The base may have others, which
        # stay as they are: of a LoraModel inside it, or put there by hand.
        self._own: frozenset[nn.Module] = frozenset()
        self._requests = Requests()
        self._strengths: dict[str, float] = {}  # what `set_adapters` gave its adapters
        self.training = model.training
        self.register_load_state_dict_pre_hook(_with_present_keys)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle of before has no requests and no strengths."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_requests", Requests())
        self.__dict__.setdefault("_strengths", {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the model in it.

        Args:
            adapter_names: as in PEFT, of the adapter that each input has, "__base__" for none; in
                training, too. See `lora_ext.batch`, within which a call may also be; it is not
                followed where names are given here.
            adapter_scales: beside them, by how much the update of each is multiplied: a list of
                numbers, or a floating tensor, which may require grad.
        """
        if torch.compiler.is_compiling():
            if makes_plan(self, kwargs):  # a graph would be of these names, numbers and tokens
                outside: Any = torch.compiler.disable(called_outside, recursive=False)  # type: ignore[no-untyped-call]
                return outside(self, args, kwargs)
            return self._planned(args, kwargs)  # a lock is no part of a graph
        me = self._requests.enter()
        try:
            return self._planned(args, kwargs)
        finally:
            self._requests.leave(me)

    def _planned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = plan_of_call(self, args, kwargs)
        if plan is None:
            return self.base_model.model(*args, **kwargs)
        with plan:
            return self.base_model.model(*args, **kwargs)

    def request(self) -> AbstractContextManager[None]:
        """Within this context no other thread changes which adapters run, or swaps them: for
        several calls that belong together, and for compiled models, whose calls do not see to it
        themselves. A change waits for the end of all requests.

        Calls of other threads are not of the request: they wait for a change that waits for it, so
        that a request that waits for them never ends. They belong to it in a copy of its context:
        `pool.submit(contextvars.copy_context().run, model, x)`, or `asyncio.to_thread(model, x)`.
        """
        return self._requests.request()

    def changing(self) -> AbstractContextManager[None]:
        """Within this context no other thread calls the model: what is changed in it is changed at
        once for all of them."""
        return self._requests.changing()

    def editing(self) -> AbstractContextManager[None]:
        """Within this context no other thread changes the model, which calls may run meanwhile:
        what is prepared in it is of the model as it stays until then."""
        return self._requests.editing()

    def _with_given(self, kwargs: dict[str, Any], **named: Any) -> Any:
        """A call with those of the named arguments that are not None."""
        given = {name: value for name, value in named.items() if value is not None}
        return AdaptedModel.forward(self, **given, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of a model of transformers, with the `generation_config` that this one was given, and
        `adapter_names` and `adapter_scales` as in a forward."""
        base: Any = self.get_base_model()
        own = vars(self).get("generation_config")
        if own is not None:
            base.generation_config = own
        with self.request(), plan_of_call(self, args, kwargs, generates=True) or nullcontext():
            return base.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base_model" or name in BOUND_CALLS:
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """The model itself, with the adapters in it; `unload()` takes them out."""
        return self.base_model.model

    def lora_layers(self) -> Iterator[tuple[str, LoraLayer]]:
        """The layers in which this model has adapters, by their names in the base model."""
        for name, module in named_modules(self.get_base_model()):
            if isinstance(module, LoraLayer) and module in self._own:
                yield name, module

    def token_modules(self) -> Iterator[tuple[str, TrainableTokensWrapper]]:
        """The modules of whose weight this model trains rows, by their names in the base model."""
        for name, module in named_modules(self.get_base_model()):
            if isinstance(module, TrainableTokensWrapper) and module.token_adapter in self._own:
                yield name, module

    def token_layers(self) -> Iterator[tuple[str, TrainableTokensLayer]]:
        """The layers of these that have rows, by the same names: not those that follow another."""
        for name, module in self.token_modules():
            if isinstance(module.token_adapter, TrainableTokensLayer):
                yield name, module.token_adapter

    def adapter_layers(self) -> Iterator[tuple[str, LoraLayer | TrainableTokensLayer]]:
        """All layers that have adapters, merge and are switched on and off."""
        yield from self.lora_layers()
        yield from self.token_layers()

    def saved_modules(self) -> Iterator[tuple[str, ModulesToSave]]:
        """The modules of which this model has copies, by their names in the base model."""
        for name, module in named_modules(self.get_base_model()):
            if isinstance(module, ModulesToSave) and module in self._own:
                yield name, module

    def layers_with(self, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
        """Those of `lora_layers()` that have this adapter."""
        for name, layer in self.lora_layers():
            if adapter_name in layer.adapters:
                yield name, layer

    def check_not_offloaded(self, adapter_name: str, where: str) -> None:
        """ValueError where a hook of accelerate offloads parts of an adapter."""
        for name, layer in self.layers_with(adapter_name):
            check_values(layer, layer.adapter_parameters(adapter_name), f"{where}: '{name}'")
        for name, saved in self.saved_modules():
            if adapter_name in saved.modules_to_save:
                for module in saved.modules_to_save[adapter_name].modules():
                    check_values(module, module._parameters, f"{where}: '{name}'")

    @property
    def active_adapter(self) -> str:
        """The first active adapter.

        Raises:
            ValueError: none is.
        """
        if not self.active_adapters:
            raise ValueError(
                f"LoraModel.active_adapter: no adapter is active, expected one of "
                f"{list(self.peft_config)}; call set_adapter(), or see active_adapters"
            )
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of `active_adapter`."""
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names that the configs save whole; None without."""
        names = {n for config in self.peft_config.values() for n in config.modules_to_save or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> Any:
        """The base's dtype, if it says one."""
        return getattr(self.get_base_model(), "dtype", None)

    def _check_names(self, names: Iterable[str], argument: str = "adapter_name") -> None:
        check_known("LoraModel", argument, names, self.peft_config)


def check_model(model: nn.Module) -> None:
    """TypeError unless adapters can be put into it."""
    check_module("LoraModel", "model", model)
    if isinstance(model, AdaptedModel):
        raise TypeError(
            "LoraModel: model: got a LoraModel; call its add_adapter() for another adapter"
        )
    for name, module in model.named_modules():
        if any(kind.__module__.startswith("peft.tuners.") for kind in type(module).__mro__):
            raise TypeError(
                f"LoraModel: model: got one with PEFT's layers ('{name}'), expected one without: "
                "they would be frozen and adapted once more; take PEFT's adapters out with "
                "unload(), and load them from their folder with LoraModel.from_pretrained"
            )


def _with_present_keys(
    model: AdaptedModel, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Gives the entries of a state dict from before `base_model` was PEFT's their present keys."""
    start = f"{prefix}{PREFIX}"
    former = [key for key in state_dict if key.startswith(start)]
    present: Mapping[str, Any] = model.state_dict(prefix=prefix, keep_vars=True)
    for key in former:
        now = f"{start}model.{key.removeprefix(start)}"
        if key not in present and now in present:
            state_dict[now] = state_dict.pop(key)
