"""The plan of a call of a LoraModel: PEFT's `adapter_names` and `alora_offsets`, and the strengths
`adapter_scales`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._batch_arguments import BASE, strengths_of
from lora_ext.adapters.activated import plan_of_activated
from lora_ext.adapters.training import is_checkpointing
from lora_ext.arguments import check_known, refuse
from lora_ext.batching import BatchPlan, Checkpointing, batch, current_plan

Context = AbstractContextManager[Any]


OF_PLANS = ("adapter_names", "adapter_scales", "alora_offsets")


def makes_plan(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of the model makes a plan: what compiled code asks first."""
    return any(kwargs.get(n) is not None for n in OF_PLANS) or _activates(model, None, None)


def called_outside(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call that makes its plan outside of graphs, as `with lora_ext.batch(...)` around a compiled
    model does: what is compiled is the base, which asks for the plan as it runs."""
    enter: Any = torch.compiler.disable(_entered)  # type: ignore[no-untyped-call]
    with enter(model, args, kwargs):
        return model.base_model.model(*args, **kwargs)


def _entered(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExitStack:
    """What a call runs in. Its end is no part of a graph either."""
    with ExitStack() as stack:
        leave: Any = torch.compiler.disable(model._requests.leave)  # type: ignore[no-untyped-call]
        stack.callback(leave, model._requests.enter())
        plan = plan_of_call(model, args, kwargs)
        if plan is not None:
            plan.__enter__()
            stack.push(torch.compiler.disable(plan.__exit__))  # type: ignore[no-untyped-call]
        return stack.pop_all()


def plan_of_call(
    model: Any, args: Sequence[Any], kwargs: dict[str, Any], generates: bool = False
) -> Context | None:
    """What a call of the model runs in, if anything: the plan that its arguments, from which PEFT's
    own are taken, ask for. The one around it, if there is one, is checked else.

    Raises:
        ValueError: a name that is not of the model's adapters; fewer names than inputs; numbers
            that do not fit the names.
        TypeError: adapter_names is no list.
    """
    names, offsets = kwargs.pop("adapter_names", None), kwargs.pop("alora_offsets", None)
    scales = kwargs.pop("adapter_scales", None)
    if names is not None:
        _check_names(model, names)
        _check_count(names, args if generates else (), kwargs)
    if scales is not None:
        scales = _scales(scales, names)
    plan: BatchPlan | None = None
    if _activates(model, names, offsets):
        plan = plan_of_activated(model, names, offsets, args, kwargs, generates, scales)
    elif names is not None:
        rows = _rows_of(names, args, kwargs)
        plan = batch(names, rows=rows, scale=scales, repeats=generates)
    around = current_plan() if plan is None else plan
    if around is None:
        return None
    if plan is None:
        _check_begins(model, around)
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


def _check_count(names: Sequence[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """In `generate` layers cannot tell too few names from beams, which repeat each input. More are
    of num_return_sequences, as PEFT wants them."""
    given = [kwargs.get(n) for n in ("inputs", "input_ids", "inputs_embeds", "input_features")]
    inputs = next((one for one in (*args[:1], *given) if isinstance(one, Tensor)), None)
    if inputs is not None and inputs.dim() > 1 and len(names) < len(inputs):
        raise ValueError(
            f"LoraModel: adapter_names: got {len(names)} names for {len(inputs)} inputs, "
            f"expected one for each, None or '{BASE}' for the base. Length of `adapter_names` "
            f"should be the same as the number of inputs, but got {len(names)} and {len(inputs)} "
            "respectively."
        )


def _scales(scales: Any, names: Sequence[Any] | None) -> Any:
    if names is None:
        raise ValueError(
            "LoraModel: adapter_scales: got a value without adapter_names, expected both, of each "
            "input; for the active adapters there is set_adapters(names, adapter_weights)"
        )
    if not (isinstance(scales, list | tuple) or (isinstance(scales, Tensor) and scales.dim())):
        expected = "a list of numbers or a floating-point tensor, one for each of adapter_names"
        refuse("LoraModel", "adapter_scales", scales, expected)
    if len(scales) != len(names):
        raise ValueError(
            f"LoraModel: adapter_scales: got {len(scales)} numbers for {len(names)} names, "
            "expected one for each of adapter_names"
        )
    if not isinstance(scales, Tensor):
        return strengths_of(scales, "LoraModel", "adapter_scales")
    return scales


def _check_begins(model: Any, plan: BatchPlan) -> None:
    """A plan of one's own does not look for tokens: where it does not say itself where an adapter
    that they activate begins, it would run on all of them."""
    if plan.says_where:
        return
    for name in plan.names:
        if name in model.peft_config and model.peft_config[name].alora_invocation_tokens:
            raise ValueError(
                f"LoraModel: batch: adapters: got {name!r}, which tokens activate "
                "(alora_invocation_tokens), in a plan that does not look for them; give "
                "adapter_names= (and adapter_scales=) to the call instead, or say where it begins "
                "by lora_ext.batch(..., after=[...])"
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
