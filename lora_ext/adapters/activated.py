"""Activated LoRA (aLoRA, Greenewald et al., 2025, arXiv:2504.12397): an adapter that takes effect
from the last occurrence of its invocation tokens in an input on, so that what is before them, and
its KV cache, is the base's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_ext._batch_arguments import BASE
from lora_ext.arguments import listed, refuse, warn
from lora_ext.batching import BatchPlan, batch
from lora_ext.errors import NotBuiltError


def plan_of_activated(
    model: Any,
    names: Sequence[str | None] | None,
    offsets: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    generates: bool,
    scales: Any = None,
) -> BatchPlan | None:
    """The plan of a call whose adapters, or some of them, are activated; None where its tokens are
    not known: such adapters are the base then.

    Args:
        names: of each input; None are the active one.
        offsets: PEFT's alora_offsets: of each input how many of its last tokens have its adapter,
            None for none; looked for in the tokens if there are none.
        scales: strengths, one for each of names.

    Raises:
        NotBuiltError: several adapters are active; or the prompt is not read at once.
        ValueError, TypeError: offsets that do not fit.
    """
    if names is None and len(model.active_adapters) > 1:
        raise NotBuiltError(
            f"LoraModel: several adapters are active, {listed(model.active_adapters)}, one of them "
            "activated by tokens, which is not built; make one active, or pass adapter_names"
        )
    if kwargs.get("prefill_chunk_size") is not None:
        raise NotBuiltError(
            "LoraModel: prefill_chunk_size: got a value with an activated adapter, which is not "
            "built: parts of a prompt do not say where they begin; leave it out"
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if kwargs.get(name) is not None:
            raise NotBuiltError(
                f"LoraModel: {name}: got a value with an activated adapter, which is not built: "
                "guesses of several tokens do not say where they begin; leave it out"
            )
    tokens = _tokens(args, kwargs, generates)
    if offsets is None and tokens is None:
        when = "" if generates else " for this forward pass"
        warn(
            "LoraModel: Cannot calculate aLoRA offsets "
            + (
                "during generate as input_ids are not available"
                if generates
                else "when only inputs_embeds are provided"
            )
            + f". Disabling aLoRA{when}."
        )
    given = list(names) if names is not None else None
    if offsets is not None:
        _check_offsets(offsets, given, tokens)
    if given is None:
        count = len(offsets) if offsets is not None else None if tokens is None else len(tokens)
        if count is None:
            return None
        given = [model.active_adapters[0]] * count
    configs = [None if name in (None, BASE) else model.peft_config[name] for name in given]
    invocations = [() if one is None else one.alora_invocation_tokens or () for one in configs]
    after: list[int | None]
    if offsets is not None:
        after = _from_the_end(offsets, invocations)
    elif tokens is None:
        after = [None if one else 0 for one in invocations]
    else:
        if len(tokens) != len(given):
            raise ValueError(
                f"LoraModel: adapter_names: got {len(given)} names for {len(tokens)} inputs. "
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(given)} and {len(tokens)} respectively."
            )
        cpu = tokens.cpu()
        after = [
            _last(cpu[i], torch.tensor(one, device="cpu")) if one else 0
            for i, one in enumerate(invocations)
        ]
    rows = None if tokens is None else (len(tokens), tokens.shape[1])
    plan = batch(given, rows=rows, after=after, scale=scales, repeats=generates, zero_grads=True)
    plan.tokens_follow = generates
    return plan


def _check_offsets(offsets: Any, names: Sequence[str | None] | None, tokens: Tensor | None) -> None:
    """They are numbers, one for each name, or else input."""
    expected = "a list of numbers of tokens, or None, one for each input"
    if not isinstance(offsets, list | tuple):
        refuse("LoraModel", "alora_offsets", offsets, expected)
    for offset in offsets:
        if offset is not None and (not isinstance(offset, int) or offset < 0):
            refuse("LoraModel", "alora_offsets", offset, expected)
    count = len(names) if names is not None else None if tokens is None else len(tokens)
    if count is not None and len(offsets) != count:
        numbers = "number" if len(offsets) == 1 else "numbers"
        raise ValueError(
            f"LoraModel: alora_offsets: got {len(offsets)} {numbers} for {count} "
            f"{'inputs' if names is None else 'names'}, expected one for each: how many of its "
            "last tokens have the adapter, None for none"
        )


def _from_the_end(
    offsets: Sequence[int | None], invocations: Sequence[Sequence[int]]
) -> list[int | None]:
    pairs = zip(offsets, invocations, strict=True)
    return [0 if not tokens else -offset if offset else None for offset, tokens in pairs]


def _tokens(args: Sequence[Any], kwargs: dict[str, Any], generates: bool) -> Tensor | None:
    """[inputs, length]"""
    found = kwargs.get("input_ids", kwargs.get("inputs") if generates else None)
    if found is None and args and isinstance(args[0], Tensor):
        found = args[0]
    if not isinstance(found, Tensor) or found.is_floating_point():
        return None
    return found.unsqueeze(0) if found.dim() == 1 else found


def _last(tokens: Tensor, invocation: Tensor) -> int | None:
    """Where the last occurrence begins."""
    if len(tokens) < len(invocation):
        return None
    begins = (tokens.unfold(0, len(invocation), 1) == invocation).all(1).nonzero()
    return int(begins[-1]) if len(begins) else None
