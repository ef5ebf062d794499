"""Adding adapters to the base's parameters, and taking them out again bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from lora_ext.errors import AlreadyMergedError, NotMergedError
from lora_ext.nn.arguments import names_of
from lora_ext.nn.settings import AdapterSettings

if TYPE_CHECKING:
    from lora_ext.nn.lora_layer import LowRank


class MergeableLayer(nn.Module):
    """The part of a `LoraLayer` that merges: a merged layer keeps a copy of what it changed, or, of
    what other modules share, the shared parameter itself, and has one of its own meanwhile."""

    adapters: dict[str, AdapterSettings]
    active_adapters: tuple[str, ...]
    merged_adapters: tuple[str, ...]
    merge_weights: bool
    bias: Any
    # Parameters shared with other modules that are replaced while merged, by name. Not registered:
    # they are the other modules' to report.
    _aside: dict[str, nn.Parameter]

    # What a kind of layer says of itself

    def merged_parameters(self, adapter_names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The parameters of the base that merging these adapters (all, if None) would change, by
        name ("out_proj.weight" for that of a child)."""
        return self._merged_parameters(
            tuple(self.adapters) if adapter_names is None else adapter_names
        )

    def _merged_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The parameters that merging these adapters changes, by attribute name ("out_proj.weight"
        for that of a child)."""
        raise NotImplementedError

    def _write_merged(self, names: Sequence[str]) -> None:
        """Adds these adapters to the base's parameters, in place; ValueError for NaN or Inf."""
        raise NotImplementedError

    def _choose_running(self) -> None:
        raise NotImplementedError

    def _check_names(self, names: Iterable[str], argument: str = "adapter_name") -> None:
        raise NotImplementedError

    # Merging

    @property
    def merged(self) -> bool:
        """Whether adapters are in the base's parameters."""
        return bool(self.merged_adapters)

    @torch.no_grad()
    def merge(
        self, adapter_names: Iterable[str] | None = None, *, separate: Collection[str] = ()
    ) -> None:
        """Adds adapters (the active ones, if None) to the base's parameters in place: in float32
        with one rounding, in float64 for float64. A copy of those parameters is kept until
        `unmerge()`. Adapters that are merged already are merged again with the new ones, from the
        base's own values.

        Args:
            separate: names of `merged_parameters` that are not changed in place, since other
                modules share them: until `unmerge()` this layer has a parameter of its own instead.

        Raises:
            AlreadyMergedError: all of them are merged.
            ValueError: no such adapter, or a merged value would be NaN or infinite. Nothing is
                changed then.
        """
        where = f"{type(self).__name__}.merge"
        names = self.active_adapters
        if adapter_names is not None:
            names = tuple(names_of(adapter_names, where))
        self._check_names(names)
        if self.merged and set(names) <= set(self.merged_adapters):
            raise AlreadyMergedError(f"{where}: already merged; call unmerge() first")
        if not names:
            raise ValueError(f"{where}: there is no active adapter, expected at least one")
        before = self.merged_adapters
        together = tuple(dict.fromkeys((*before, *names)))
        parameters = self._merged_parameters(together)
        copies = self._base_copies()
        replaced = {
            name: parameter
            for name, parameter in parameters.items()
            if name in separate and name not in copies and isinstance(parameter, nn.Parameter)
        }
        now = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                if name in replaced:
                    self._put(name, nn.Parameter(now[name], parameter.requires_grad))
                elif name in copies:
                    parameter.copy_(copies[name])
            self._write_merged(together)
        except BaseException:
            for name, parameter in parameters.items():
                if name in replaced:
                    self._put(name, replaced[name])
                else:
                    parameter.copy_(now[name])
            raise
        self._aside |= replaced
        for name, values in now.items():
            if name not in replaced and name not in copies:
                self.register_buffer(base_name(name), values, persistent=False)
        self.merged_adapters = together
        self._choose_running()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the base's parameters the bits they had before `merge()`, and those that are shared
        their places.

        Raises:
            NotMergedError: nothing is merged.
        """
        if not self.merged:
            raise NotMergedError(f"{type(self).__name__}.unmerge: not merged; call merge() first")
        parameters = self._merged_parameters(self.merged_adapters)
        for name, base in self._base_copies().items():
            if name in self._aside:
                self._put(name, self._aside.pop(name))
            else:
                parameters[name].copy_(base)
                del self._buffers[base_name(name)]
        self.merged_adapters = ()
        self._choose_running()

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        """Sets a parameter, of a child for a dotted name."""
        owner, _, attribute = name.rpartition(".")
        setattr(self.get_submodule(owner), attribute, parameter)

    @property
    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of other modules that have their places here again after `unmerge()`."""
        return dict(self._aside)

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
        kept = {name: self._aside.get(name, self._buffers.get(base_name(name))) for name in names}
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    def train(self, mode: bool = True) -> Self:
        """With `merge_weights`, as in loralib: eval() merges, train() unmerges."""
        super().train(mode)
        if self.merge_weights and self.active_adapters and self.merged == mode:
            self.unmerge() if mode else self.merge()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves or casts the layer also does so to shared parameters that it has replaced."""
        self._parameters.update({base_name(name): p for name, p in self._aside.items()})
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]
        finally:
            for name in self._aside:
                moved = self._parameters.pop(base_name(name))
                assert moved is not None
                self._aside[name] = moved

    # Merging a bias, for the kinds that have one

    def _weight_and_bias(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The base's weight, and its bias where one of these adapters has a lora_bias."""
        weight = self._parameters["weight"]
        assert weight is not None
        parameters: dict[str, Tensor] = {"weight": weight}
        if any(self.adapters[name].lora_bias for name in names):
            if self.bias is None:
                raise ValueError(
                    f"{type(self).__name__}.merge: lora_bias cannot be merged into a base without "
                    "bias; construct the base with bias=True"
                )
            parameters["bias"] = self.bias
        return parameters

    def _merged_bias(self, stack: LowRank) -> Tensor | None:
        """What the bias becomes, rounded once; None if it stays.

        Raises:
            ValueError: it would hold NaN or infinity.
        """
        if stack.lora_bias is None:
            return None
        bias: Tensor = self.bias
        compute = torch.promote_types(bias.dtype, torch.float32)
        merged = (bias.to(compute) + stack.lora_bias.to(compute) * stack.scaling).to(bias.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(
                f"{type(self).__name__}.merge: the merged bias would hold NaN or Inf; nothing "
                "changed"
            )
        return merged

    # Saving and loading: always the base's own values

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        keep_vars = args[2] if len(args) > 2 else kwargs.get("keep_vars", False)
        for name, base in self._base_copies().items():
            state[prefix + name] = base if keep_vars else base.detach()
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
        merged, separate = self.merged_adapters, tuple(self._aside)
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
            self.merge(merged, separate=separate)
        except ValueError as error:
            error_msgs.append(f"{prefix}merge after loading, now unmerged: {error}")
        else:
            parameters = self._merged_parameters(merged)  # not those above, where they are shared
            for name in below:
                state_dict[prefix + name] = parameters[name].detach().clone()


def base_name(parameter_name: str) -> str:
    """The buffer that keeps a parameter's own values while it is merged."""
    return f"_base_{parameter_name.replace('.', '__')}"  # a buffer's name has no dots


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None
