"""When loralib's layers merge: in eval(), until train(), here exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from lora_ext._offloaded import hook_of_accelerate
from lora_ext.arguments import short

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def no_dropout(x: Tensor) -> Tensor:
    """`lora_dropout` of a layer without dropout: not a module, as in loralib, but one can pickle
    it."""
    return x


class LoRALayer:
    """What a layer of loralib is besides a layer of PyTorch, and what it is told by.

    Args:
        r: rank of the update; without one (0) the layer is a plain one.
        lora_alpha: the update is scaled by `lora_alpha / r`.
        lora_dropout: probability that an input element is dropped before lora_A.
        merge_weights: `eval()` merges and `train()` unmerges.

    Raises:
        TypeError: r is no integer, lora_alpha or lora_dropout no number.
        ValueError: lora_alpha is not finite, or lora_dropout no probability.
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        self._check_settings(r, lora_alpha, lora_dropout)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout: Callable[[Tensor], Tensor] = (
            nn.Dropout(p=lora_dropout) if lora_dropout > 0.0 else no_dropout
        )
        self.merged = False
        self.merge_weights = merge_weights

    @classmethod
    def _check_settings(cls, r: int, lora_alpha: float, lora_dropout: float) -> None:
        where = cls.__name__
        given: tuple[tuple[str, object, type, str], ...] = (
            ("r", r, Integral, "an integer"),
            ("lora_alpha", lora_alpha, Real, "a finite number"),
            ("lora_dropout", lora_dropout, Real, "a probability from 0 to 1"),
        )
        for name, value, kind, expected in given:
            if not isinstance(value, kind):
                raise TypeError(f"{where}: {name}: got {value!r}, expected {expected}")
        if not abs(lora_alpha) <= sys.float_info.max:  # nor is NaN
            raise ValueError(
                f"{where}: lora_alpha: got {short(lora_alpha)}, expected a finite number"
            )
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(
                f"{where}: lora_dropout: got {lora_dropout}, expected a probability from 0 to 1"
            )


@dataclass
class Merge:
    """What a merged layer remembers."""

    base: nn.Parameter  # the weight without the update: the same object comes back
    lora_A: Tensor  # what was added
    lora_B: Tensor
    scaling: float
    fingerprint: tuple[int, int]  # of the merged weight: whether somebody wrote into it

    def has(self, lora_A: Tensor, lora_B: Tensor) -> bool:
        """Whether that is what was added."""
        pairs = ((lora_A, self.lora_A), (lora_B, self.lora_B))
        known = all(a.device == b.device and not a.is_meta for a, b in pairs)
        return known and all(torch.equal(a, b) for a, b in pairs)


class MergingLayer(nn.Module, LoRALayer):
    """A layer that merges. While merged it has a weight of its own, and its base's is put aside:
    modules that share that one do not see the update, and it comes back as it was. What was
    written into the weight meanwhile stays: then the update is subtracted, as in loralib."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    _WEIGHT: ClassVar[str] = "weight"  # its name in the state dict
    _merge: Merge | None = None
    _hf_hook = hook_of_accelerate
    _loads = False

    # What a kind of layer says of itself

    def _add(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Adds the update to a tensor like the base's weight, in place."""
        raise NotImplementedError

    def _plain_weight(self, weight: Tensor) -> Tensor:
        """A new tensor: the weight to which the update is added."""
        return weight.detach().clone()

    @property
    def _owner(self) -> Any:
        """The module whose `weight` is adapted."""
        return self

    # Modes

    def _lora_explain(self, tokens: int) -> tuple[str, str]:
        """(path, reason), as `lora_ext.nn.LoraLayer.explain`."""
        if not hasattr(self, "lora_A"):
            return "composed", "there is no adapter"
        if self.merged:
            return "composed", "merged: the adapter is in the weight"
        return self._lora_path(tokens)

    def _lora_path(self, tokens: int) -> tuple[str, str]:
        """That of a forward that adds the adapter."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """With `merge_weights`: eval() merges, train() unmerges."""
        super().train(mode)
        if self.merge_weights and self.merged == mode:
            if mode:
                self._unmerge()
            else:
                self._merge_weight()
        return self

    @torch.no_grad()
    def _merge_weight(self) -> None:
        if not hasattr(self, "lora_A"):
            self.merged = True
            return
        base = self._owner._parameters.get("weight")
        # Computed in each call (weight_norm, pruning), or made in each call by a hook of accelerate
        # that offloads it: it cannot hold an update.
        if base is None or is_offloaded(self._owner):
            return
        self._put(base, self._merged_values(base))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _merged_values(self, base: Tensor) -> Tensor:
        values = self._plain_weight(base)
        self._add(values, self.lora_A.detach(), self.lora_B.detach(), self.scaling)
        return values

    @torch.inference_mode(False)
    @torch.no_grad()
    def _put(self, base: nn.Parameter, values: Tensor) -> None:
        """Makes `values` the weight, until `_unmerge()` gives back `base`."""
        parameters = self._owner._parameters
        weight: Any = nn.Parameter(values, base.requires_grad)
        weight._lora_base = base  # for a layer that is tied to this one now
        factors = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        merge = Merge(base, *factors, self.scaling, fingerprint(values))
        before = self._merge, parameters["weight"], self.merged
        try:
            self._merge, parameters["weight"], self.merged = merge, weight, True
        except BaseException:  # Ctrl-C between two of them
            self._merge, parameters["weight"], self.merged = before
            raise

    @torch.no_grad()
    def _unmerge(self) -> None:
        merge, parameters = self._merge, self._owner._parameters
        weight = parameters.get("weight")
        if hasattr(self, "lora_A") and weight is None:
            raise RuntimeError(
                f"{type(self).__name__}.train: weight: is computed in each call (weight_norm, "
                "pruning) since the layer was merged, expected a parameter; undo that first, or do "
                "it in train()"
            )
        if hasattr(self, "lora_A") and is_offloaded(self._owner):
            raise RuntimeError(
                f"{type(self).__name__}.train: weight: was offloaded by a hook since the layer was "
                "merged, expected a parameter with values; take the hooks off first "
                "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), or offload the "
                "model in train()"
            )
        if merge is None or weight is None:
            if weight is not None and hasattr(self, "lora_A"):  # merged by other hands
                self._add(weight.detach(), self.lora_A, self.lora_B, -self.scaling)
            self.merged = False
            return
        base = merge.base
        if fingerprint(weight) != merge.fingerprint:
            base.data = self._without_update(weight, merge.lora_A, merge.lora_B, merge.scaling)
        base.requires_grad_(weight.requires_grad)
        if weight.grad is not None:
            base.grad = weight.grad
        try:
            self._merge, parameters["weight"], self.merged = None, base, False
        except BaseException:
            self._merge, parameters["weight"], self.merged = merge, weight, True
            raise
        weight.data = base.data  # whoever still holds the merged one now holds the base

    def _without_update(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        values = weight.detach().clone()
        self._add(values, A, B, -scaling)
        return values

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """Changes of the base in here do not lose a merged layer's mode."""
        merged = self._merge is not None
        if merged:
            self._unmerge()
        try:
            yield
        finally:
            if merged:
                self._merge_weight()

    def __setattr__(self, name: str, value: Any) -> None:
        """A weight that is assigned while merged (as by tie_weights()) is the new base."""
        if name != "weight" or self._merge is None or self._loads or value is self.weight:
            super().__setattr__(name, value)
            return
        with self._unmerged():
            super().__setattr__(name, getattr(value, "_lora_base", value))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves or casts the layer does so to what is put aside."""
        merge = self._merge
        if merge is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]
        whole = fingerprint(self._owner.weight) == merge.fingerprint
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        aside = nn.Module()
        aside._parameters = {"base": merge.base}
        aside._apply(fn)  # type: ignore[no-untyped-call]
        merge.base = cast(nn.Parameter, aside._parameters["base"])
        merge.lora_A, merge.lora_B = fn(merge.lora_A), fn(merge.lora_B)
        if whole:
            merge.fingerprint = fingerprint(self._owner.weight)
        return self

    # Saving and loading: what is saved while merged says so, beside the tensors

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None and hasattr(self, "lora_A"):
            metadata["lora_merged"] = self.merged

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """What is loaded computes what it did where it was saved, whatever this layer's mode is. A
        weight of unknown origin is taken as loralib takes it: as merged if the layer is."""
        self._loads = True
        try:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        finally:
            self._loads = False
        weight = self._owner._parameters.get("weight")
        if weight is None or not hasattr(self, "lora_A"):
            return
        key, merge = prefix + self._WEIGHT, self._merge
        given = state_dict.get(key)
        if isinstance(given, Tensor) and given.shape == weight.shape:
            assigned = local_metadata.get("assign_to_params_buffers", False)
            given = given.detach() if assigned else torch.empty_like(weight).copy_(given)
        else:
            given = None
        factors = self.lora_A.detach(), self.lora_B.detach()
        saved_merged = local_metadata.get("lora_merged")
        has_update = all(f"{prefix}{part}" in state_dict for part in ("lora_A", "lora_B"))
        if merge is None:
            if given is not None and saved_merged and has_update and not self.merged:
                self._replace(state_dict, key, self._without_update(given, *factors, self.scaling))
            return
        known = merge.has(*factors)
        if given is None or saved_merged is False:
            if given is None and known:
                return
            base = merge.base if given is None else rewritten(merge.base, given.clone())
            values = self._merged_values(base)
        elif known and fingerprint(given) == merge.fingerprint:
            return
        else:
            plain = self._without_update(given, *factors, self.scaling)
            base, values = rewritten(merge.base, plain), given.clone()
        self._put(base, values)
        if given is not None:
            self._replace(state_dict, key, values)

    def _replace(self, state_dict: dict[str, Any], key: str, values: Tensor) -> None:
        """Makes values the loaded weight: that of a child is loaded after this."""
        if self._owner is self:
            self.weight.data = values
        else:
            state_dict[key] = values


def is_offloaded(owner: nn.Module) -> bool:
    """Whether a hook of accelerate has the values of a module's weight between calls."""
    weight = owner._parameters.get("weight")
    return weight is not None and weight.is_meta and "_hf_hook" in vars(owner)


def add_product(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """weight [N, K] += scaling * lora_B [N, r] @ lora_A [r, K], rounded once."""
    try:
        torch.ops.lora_ext.merge_(weight, lora_A, lora_B, scaling)
    except ValueError:  # NaN or Inf, which eval() is not the place to refuse
        weight += (lora_B @ lora_A * scaling).to(weight.dtype)


def rewritten(base: nn.Parameter, values: Tensor) -> nn.Parameter:
    """base with other values, as all who share it see; a new one if it has none yet (meta)."""
    if base.device != values.device:
        return nn.Parameter(values, base.requires_grad)
    base.data = values
    return base


def fingerprint(weight: Tensor) -> tuple[int, int]:
    """Of the bits of a weight: the same on every device, another one after any usual change."""
    if weight.is_meta:
        return 0, 0
    rows = weight.detach()
    rows = (rows if rows.is_contiguous() else rows.transpose(0, 1).contiguous()).flatten(1)
    # Sums of int64 are several times as fast as those that widen.
    whole = all(n * rows.itemsize % 8 == 0 for n in (rows.shape[1], rows.storage_offset()))
    rows = rows.view(torch.int64 if whole else _BITS[rows.itemsize])

    def place(sums: Tensor) -> int:
        return int((sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum())

    return place(rows.sum(0)), place(rows.sum(1))
