"""KV caches for two passes. The scaling pass and the pass that follows it have other keys and
values, so each gets a cache of its own; hidden states of the scaling pass, and so scalings, depend
on a token and those before it alone, so that what is cached of earlier tokens stays right."""

from __future__ import annotations

import copy
import functools
from typing import Any


class _OfTwoPasses:
    """A cache of transformers that keeps that of the scaling pass beside its own."""

    _scaling_pass: Any

    def reorder_cache(self, *args: Any, **kwargs: Any) -> Any:
        return self._both("reorder_cache", *args, **kwargs)

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        return self._both("crop", *args, **kwargs)

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> Any:
        return self._both("batch_repeat_interleave", *args, **kwargs)

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> Any:
        return self._both("batch_select_indices", *args, **kwargs)

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        return self._both("reset", *args, **kwargs)

    def _both(self, method: str, *args: Any, **kwargs: Any) -> Any:
        getattr(self._scaling_pass, method)(*args, **kwargs)
        return getattr(super(), method)(*args, **kwargs)


@functools.cache
def _class_for(kind: type) -> type:
    return type(f"{kind.__name__}OfTwoPasses", (_OfTwoPasses, kind), {})


def scaling_cache(cache: Any, argument: str) -> Any:
    """The cache of the scaling pass that belongs to one of the model's, which is made at the first
    call that it is given to.

    Raises:
        ValueError: it holds tokens that the scaling pass has not seen, or is none of transformers'.
    """
    if isinstance(cache, _OfTwoPasses):
        return cache._scaling_pass
    if not hasattr(cache, "get_seq_length") or not hasattr(cache, "layers"):
        raise ValueError(
            f"XLoraModel: {argument}: got a {type(cache).__name__}, expected a Cache of "
            "transformers, or use_cache=False"
        )
    if _holds_tokens(cache):
        raise ValueError(
            f"XLoraModel: {argument}: got a {type(cache).__name__} with tokens in it that the "
            "scaling pass has not seen, expected an empty one, or one that a call of this model "
            "returned; call it with all tokens, or use_cache=False"
        )
    cache._scaling_pass = copy.deepcopy(cache)
    kind: Any = type(cache)
    cache.__class__ = _class_for(kind)
    return cache._scaling_pass


def _holds_tokens(cache: Any) -> bool:
    return any(
        bool(layer.get_seq_length())
        if hasattr(layer, "get_seq_length")
        else bool(getattr(layer, "has_previous_state", False))
        for layer in cache.layers
    )


def names_of_the_cache(parameters: frozenset[str]) -> tuple[str, ...]:
    """What a forward of transformers calls its cache, in this version and former ones."""
    return tuple(name for name in ("cache", "past_key_values") if name in parameters)
