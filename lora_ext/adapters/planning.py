"""The plan of a call of a LoraModel: PEFT's `adapter_names` and `alora_offsets`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lora_ext._batch_arguments import BASE
from lora_ext.adapters.activated import plan_of_activated
from lora_ext.adapters.training import is_checkpointing
from lora_ext.arguments import check_known, refuse
from lora_ext.batching import BatchPlan, Checkpointing, batch, current_plan

Context = AbstractContextManager[Any]


def plan_of_call(
    model: Any, args: Sequence[Any], kwargs: dict[str, Any], generates: bool = False
) -> Context | None:
    """What a call of the model runs in, if anything: the plan that its arguments, from which PEFT's
    own are taken, ask for. The one around it, if there is one, is checked else.

    Raises:
        ValueError: a name that is not of the model's adapters.
        TypeError: adapter_names is no list.
    """
    names, offsets = kwargs.pop("adapter_names", None), kwargs.pop("alora_offsets", None)
    if names is not None:
        _check_names(model, names)
    plan: BatchPlan | None = None
    if _activates(model, names, offsets):
        plan = plan_of_activated(model, names, offsets, args, kwargs, generates)
    elif names is not None:
        plan = batch(names, rows=_rows_of(names, args, kwargs), repeats=generates)
    around = current_plan() if plan is None else plan
    if around is None:
        return None
    check_known("LoraModel", "batch: adapters", around.names, model.peft_config)
    around.note(around.names)
    if is_checkpointing(model.get_base_model()):
        carry_into_checkpoints(model.get_base_model())
    return plan


def _rows_of(
    names: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[int, int] | None:
    """(requests, tokens of each), for layers that get all tokens in one dimension (OPT's fc1)."""
    tokens = next((kwargs[n] for n in ("input_ids", "inputs_embeds") if n in kwargs), None)
    tokens = args[0] if tokens is None and args else tokens
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or len(tokens) != len(names):
        return None
    return len(tokens), tokens.shape[1]


def _check_names(model: Any, names: Any) -> None:
    if not isinstance(names, list | tuple):
        refuse("LoraModel", "adapter_names", names, "a list of names, one for each input")
    unknown = sorted({str(n) for n in names if n not in (None, BASE, *model.peft_config)})
    if unknown:
        raise ValueError(
            f"LoraModel: adapter_names: got {unknown}, expected some of {list(model.peft_config)}, "
            f"or '{BASE}'. Trying to infer with non-existing adapter(s): {', '.join(unknown)}"
        )


def _activates(model: Any, names: Iterable[str | None] | None, offsets: Any) -> bool:
    """Whether tokens activate an adapter of this call (aLoRA)."""
    activated = [n for n, config in model.peft_config.items() if config.alora_invocation_tokens]
    if not activated:
        return False
    if names is not None:
        return not set(activated).isdisjoint(names)
    if offsets is None and current_plan() is not None:
        return False  # which says it
    return model.has_active_enabled_adapter and not set(activated).isdisjoint(model.active_adapters)


def carry_into_checkpoints(model: nn.Module) -> None:
    """transformers' layers checkpoint by a function that they hold: what it runs again then follows
    the plan of its first run."""
    for module in model.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, Checkpointing):
            module._gradient_checkpointing_func = Checkpointing(checkpoint)  # type: ignore[assignment]
