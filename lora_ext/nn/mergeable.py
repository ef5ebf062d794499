"""Adding adapters to the base's parameters, and taking them out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_ext.errors import AlreadyMergedError, NotMergedError
from lora_ext.nn.settings import AdapterSettings


class MergeableLayer(nn.Module):
    """The part of a `LoraLayer` that merges: a merged layer keeps a copy of what it changed."""

    adapters: dict[str, AdapterSettings]
    active_adapters: tuple[str, ...]
    merged_adapters: tuple[str, ...]
    merge_weights: bool

    # What a kind of layer says of itself

    def merged_parameters(self) -> dict[str, Tensor]:
        """The parameters of the base that merging the present adapters would change."""
        return self._merged_parameters(tuple(self.adapters))

    def _merged_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The parameters that merging these adapters changes, by attribute name ("out_proj.weight"
        for that of a child)."""
        raise NotImplementedError

    def _write_merged(self, names: Sequence[str]) -> None:
        """Adds these adapters to the base's parameters, in place; ValueError for NaN or Inf."""
        raise NotImplementedError

    def _choose_running(self) -> None:
        raise NotImplementedError

    def _check_names(self, names: Iterable[str]) -> None:
        raise NotImplementedError

    # Merging

    @property
    def merged(self) -> bool:
        """Whether adapters are in the base's parameters."""
        return bool(self.merged_adapters)

    @torch.no_grad()
    def merge(self, adapter_names: Iterable[str] | None = None) -> None:
        """Adds adapters (the active ones, if None) to the base's parameters in place: in float32
        with one rounding, in float64 for float64. A copy of those parameters is kept until
        `unmerge()`. Adapters that are merged already are merged again with the new ones, from the
        base's own values.

        Raises:
            AlreadyMergedError: all of them are merged.
            ValueError: no such adapter, or a merged value would be NaN or infinite. Nothing is
                changed then.
        """
        where = f"{type(self).__name__}.merge"
        if adapter_names is not None and isinstance(adapter_names, str):
            adapter_names = [adapter_names]
        names = self.active_adapters if adapter_names is None else tuple(adapter_names)
        self._check_names(names)
        if self.merged and set(names) <= set(self.merged_adapters):
            raise AlreadyMergedError(f"{where}: already merged; call unmerge() first")
        if not names:
            raise ValueError(f"{where}: there is no active adapter, expected at least one")
        before = self.merged_adapters
        together = tuple(dict.fromkeys((*before, *names)))
        parameters = self._merged_parameters(together)
        now = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        base = {**now, **self._base_copies()}
        try:
            for name, parameter in parameters.items():
                if before:
                    parameter.copy_(base[name])
            self._write_merged(together)
        except BaseException:
            for name, parameter in parameters.items():
                parameter.copy_(now[name])
            raise
        for name, tensor in base.items():
            self.register_buffer(base_name(name), tensor, persistent=False)
        self.merged_adapters = together
        self._choose_running()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the base's parameters the bits they had before `merge()`.

        Raises:
            NotMergedError: nothing is merged.
        """
        if not self.merged:
            raise NotMergedError(f"{type(self).__name__}.unmerge: not merged; call merge() first")
        parameters = self._merged_parameters(self.merged_adapters)
        for name, base in self._base_copies().items():
            parameters[name].copy_(base)
            del self._buffers[base_name(name)]
        self.merged_adapters = ()
        self._choose_running()

    def unmerged_weight(self) -> Tensor:
        """The base's own weight, also while merged."""
        weight = self._base_copies().get("weight", self._parameters["weight"])
        assert weight is not None
        return weight.detach()

    def _base_copies(self) -> dict[str, Tensor]:
        """The base's values while merged, by the parameter's name."""
        if not self.merged:
            return {}
        names = self._merged_parameters(self.merged_adapters)
        buffers = {name: self._buffers.get(base_name(name)) for name in names}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    def train(self, mode: bool = True) -> Self:
        """With `merge_weights`, as in loralib: eval() merges, train() unmerges."""
        super().train(mode)
        if self.merge_weights and self.active_adapters and self.merged == mode:
            self.unmerge() if mode else self.merge()
        return self

    # Saving and loading: always the base's own values

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for name, base in self._base_copies().items():
            state[prefix + name] = base
        return state

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
        """A merged layer stays merged, with what was loaded."""
        merged = self.merged_adapters
        if merged:
            self.unmerge()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not merged:
            return
        # Children are loaded after this: hand them the merged values of what is the base here.
        parameters = self._merged_parameters(merged)
        below = [
            name
            for name in parameters
            if "." in name and _shape(state_dict.get(prefix + name)) == parameters[name].shape
        ]
        try:
            with torch.no_grad():
                for name in below:
                    parameters[name].copy_(state_dict[prefix + name])
            self.merge(merged)
        except ValueError as error:
            error_msgs.append(f"{prefix}merge after loading, now unmerged: {error}")
        else:
            for name in below:
                state_dict[prefix + name] = parameters[name].detach().clone()


def base_name(parameter_name: str) -> str:
    """The buffer that keeps a parameter's own values while it is merged."""
    return f"_base_{parameter_name.replace('.', '__')}"  # a buffer's name has no dots


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None
