"""A call of a model with X-LoRA: the scaling pass, the classifier, and the pass with its gates."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.adapters.planning import carry_into_checkpoints
from lora_ext.adapters.training import is_checkpointing
from lora_ext.adapters.xlora.caches import names_of_the_cache, scaling_cache
from lora_ext.adapters.xlora.plans import RoutedPlan, UniformPlan
from lora_ext.arguments import describe
from lora_ext.batching import current_plan, following


class RoutedForward:
    """Stands in the place of a base model's forward, so that all its calls are X-LoRA's: also those
    of `generate`. Nothing of a call is kept here: calls of other threads do not meet.

    Args:
        model: the XLoraModel.
        forward: the base's own.
    """

    def __init__(self, model: Any, forward: Callable[..., Any]) -> None:
        self.model, self.forward = model, forward
        self.__wrapped__ = forward  # whose signature this has

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of the forward's arguments."""
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        found = inspect.signature(self.forward).parameters.values()
        return tuple(one.name for one in found if one.kind not in kinds)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if not model.has_active_enabled_adapter:
            return self.forward(*args, **kwargs)
        if current_plan() is not None:
            raise ValueError(
                "XLoraModel: batch: got a plan around the call (lora_ext.batch), expected none: "
                "X-LoRA chooses the adapters of each token; call it outside of the `with`"
            )
        named = dict(zip(self.parameters, args, strict=False))
        if len(named) == len(args) and kwargs.keys().isdisjoint(named):
            kwargs, args = named | kwargs, ()
        cached = self._cached(kwargs)
        hidden = self._scaling_pass(args, kwargs, cached)
        scalings = model.internal_xlora_classifier(hidden)
        model._note_scalings(scalings)
        gates, chosen = model.internal_xlora_classifier.gates(scalings)
        plan = RoutedPlan(
            model.active_adapters,
            gates,
            chosen,
            model._places,
            _present(kwargs.get("attention_mask"), hidden),
            _kept(kwargs.get("logits_to_keep")),
        )
        if is_checkpointing(model.get_base_model()):
            carry_into_checkpoints(model.get_base_model())
        with following(plan):
            return self.forward(*args, **kwargs)

    def _scaling_pass(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], cached: Mapping[str, Any]
    ) -> Tensor:
        """The last hidden state, [requests, tokens, hidden_size], with all adapters at
        scaling_pass_value."""
        given = {k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")}
        given |= {"output_hidden_states": True, "return_dict": True, **cached}
        if "logits_to_keep" in self.parameters:  # they are not used
            given["logits_to_keep"] = 1
        config = self.model.xlora_config
        value = config.scaling_pass_value * config.global_scaling_weight
        with torch.no_grad(), following(UniformPlan(self.model.active_adapters, value)):
            result = self.forward(*args, **given)
        states = getattr(result, "hidden_states", None)
        if not isinstance(states, tuple | list) or not isinstance(states[-1], Tensor):
            raise TypeError(
                "XLoraModel: hidden_states: got "
                f"{describe(states)} of {type(self.model.get_base_model()).__name__}'s result, "
                "expected hidden states of all layers for output_hidden_states=True, as models of "
                "transformers return them"
            )
        size = self.model.xlora_config.hidden_size
        if states[-1].dim() != 3 or states[-1].shape[-1] != size:
            raise ValueError(
                f"XLoraModel: hidden_states: got shape {list(states[-1].shape)}, expected "
                f"[requests, tokens, {size}]: hidden_size of the config"
            )
        return states[-1]

    def _cached(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The cache of the scaling pass, beside that of the call, which gets one where it would
        make one."""
        names = names_of_the_cache(frozenset(self.parameters))
        if not names:
            return {}
        given = [name for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
        base: Any = self.model.get_base_model()
        if not given and self._makes_a_cache(base, kwargs):
            from transformers import DynamicCache

            kwargs[names[0]] = DynamicCache(config=base.config)
            given = [names[0]]
        if given:
            return {given[0]: scaling_cache(kwargs[given[0]], given[0])}
        return {"use_cache": False} if "use_cache" in self.parameters else {}

    def _makes_a_cache(self, base: Any, kwargs: Mapping[str, Any]) -> bool:
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = getattr(getattr(base, "config", None), "use_cache", False)
        caches = getattr(base, "_supports_default_dynamic_cache", lambda: False)
        generates = getattr(base, "can_generate", lambda: False)
        return bool(wanted) and not base.training and bool(generates()) and bool(caches())


def check_routed(layer: nn.Module, _: Any) -> None:
    """A hook before a layer's forward. Without a plan all adapters would run with all their
    strength: where a model's parts are called by themselves, or once more by a checkpoint.

    Raises:
        ValueError: there is no plan.
    """
    if current_plan() is None and not layer.disable_adapters:
        raise ValueError(
            f"{type(layer).__name__}: X-LoRA: got a call outside of a call of the whole model, "
            "which knows the scalings; call the model itself. In a model that calls "
            "torch.utils.checkpoint.checkpoint, call lora_ext.batching.Checkpointing(checkpoint) "
            "in its place: what runs again in backward follows the scalings then"
        )


def _present(mask: Any, hidden: Tensor) -> Tensor | None:
    """Which of the tokens are no padding; a cache's mask has earlier ones before them."""
    requests, tokens = hidden.shape[:2]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < tokens:
        return None
    if mask.shape[0] != requests:
        return None
    return mask[:, mask.shape[1] - tokens :]


def _kept(logits_to_keep: Any) -> slice | Tensor | None:
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    return slice(-logits_to_keep, None) if logits_to_keep else None
