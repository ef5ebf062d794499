"""Adding adapters to the base's parameters, and taking them out again bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from lora_ext._offloaded import check_values
from lora_ext.arguments import as_flag, former_names, names_of, warn
from lora_ext.errors import AlreadyMergedError, NotBuiltError, NotMergedError
from lora_ext.nn.adapter import LowRank, variant_of
from lora_ext.nn.holds_adapters import HoldsAdapters
from lora_ext.nn.sharded import is_sharded
from lora_ext.nn.sharded_merge import write_whole
from lora_ext.nn.transaction import Transaction, all_or_nothing, put_parameter


class MergeableLayer(HoldsAdapters):
    """The part of a `LoraLayer` that merges: a merged layer keeps the base's parameters, and has
    others in their places meanwhile."""

    merge_weights: bool
    weight: Any
    bias: Any
    # What stands before the names of the base's parameters, if they are a child's.
    BASE_PATH: ClassVar[str] = ""
    _enabled: bool
    # The base's parameters while merged, by name. Not registered: they are no part of a forward.
    _aside: dict[str, nn.Parameter]

    # What a kind of layer says of itself

    def parts(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter."""
        raise NotImplementedError

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
        """Adds these adapters to a draft's parameters, in place; ValueError for NaN or Inf."""
        raise NotImplementedError

    def _initialise(self, name: str, kind: bool | str) -> None:
        raise NotImplementedError

    def _check_not_computed(self, where: str) -> None:
        raise NotImplementedError

    # Merging

    @property
    def active_adapter(self) -> list[str]:
        """The active adapters, under the name that PEFT's layers have for them."""
        return list(self.active_adapters)

    @property
    def merged(self) -> bool:
        """Whether adapters are in the base's parameters."""
        return bool(self.merged_adapters)

    @all_or_nothing
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: str | Iterable[str] | None = None,
        *,
        requantize: bool = False,
    ) -> None:
        """Adds adapters (the active ones, if None) to the base's parameters: in float32 with one
        rounding, in float64 for float64. Nothing is written into those: until `unmerge()` the
        layer has parameters of its own in their places, also where other modules share them.
        Adapters that are merged already are merged again with the new ones, from the base's own
        values.

        Args:
            safe_merge: kept for PEFT's sake; NaN and Inf are always refused.
            requantize: over a base whose weight is quantized: quantize what is merged as that is,
                rounding it; else it stays dequantised. No other layer has anything to quantize.

        Raises:
            AlreadyMergedError: all of them are merged.
            ValueError: no such adapter, the adapters are disabled, or a merged value would be NaN
                or infinite. Nothing is changed then.
        """
        where = f"{type(self).__name__}.merge"
        if isinstance(safe_merge, Iterable):  # they came first once
            warn(f"{where}: adapters are adapter_names=... now", DeprecationWarning)
            safe_merge, adapter_names = False, safe_merge
        as_flag(safe_merge, where, "safe_merge")
        requantize = as_flag(requantize, where, "requantize")
        names = self.active_adapters
        if adapter_names is not None:
            names = tuple(names_of(adapter_names, where))
        self._check_names(names)
        if self.merged and set(names) <= set(self.merged_adapters):
            raise AlreadyMergedError(f"{where}: already merged; call unmerge() first")
        if not names:
            raise ValueError(f"{where}: there is no active adapter, expected at least one")
        if not self._enabled:
            raise ValueError(
                f"{where}: the adapters are disabled, expected enabled ones, or the layer would do "
                "what they do; call enable_adapters first"
            )
        self._merge(tuple(dict.fromkeys((*self.merged_adapters, *names))), requantize)

    def _check_mergeable(self, where: str, names: Sequence[str]) -> None:
        """ValueError for an adapter that no weight can hold."""

    @all_or_nothing
    @torch.no_grad()
    def _merge(self, names: tuple[str, ...], requantize: bool = False) -> None:
        """Makes exactly these adapters the merged ones."""
        where = f"{type(self).__name__}.merge"
        self._check_mergeable(where, names)
        self._check_not_computed(where)
        train = {name: attrgetter(name)(self).requires_grad for name in self._aside}
        self._put_back()
        parameters = self._merged_parameters(names)
        for name, parameter in parameters.items():
            if parameter.device.type == "meta":
                raise ValueError(
                    f"{where}: the layer's {name} is on 'meta', where it has no values, expected "
                    "it on a device; take off the hooks that offload it "
                    "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), or move "
                    "the model"
                )
        self._aside = self._put_own(parameters)
        for name in train.keys() & self._aside.keys():
            attrgetter(name)(self).requires_grad_(train[name])
        if any(is_sharded(parameter) for parameter in self.parameters()):
            own = {name: attrgetter(name)(self) for name in parameters}
            write_whole(self, own, lambda layer: layer._write_merged(names))
        else:
            self._write_merged(names)
        self.merged_adapters = names
        self._choose_running()

    @all_or_nothing
    def unmerge(self) -> None:
        """Gives the base's parameters their places again, which were never changed.

        Raises:
            NotMergedError: nothing is merged.
            ValueError: what is merged was resized, or is computed from other tensors since.
        """
        if not self.merged:
            raise NotMergedError(f"{type(self).__name__}.unmerge: not merged; call merge() first")
        self._put_back()
        self.merged_adapters = ()
        self._choose_running()

    @former_names("get_delta_weight", adapter_name="adapter")
    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging an adapter adds to the weight, in the shape of that, in float32 (float64
        for float64).

        Raises:
            ValueError: no such adapter, or one that does not add to the weight: DoRA scales it.
            NotBuiltError: the layer has several weights.
        """
        where = f"{type(self).__name__}.get_delta_weight"
        self._check_names([adapter], "adapter")
        own = self.adapter_parameters(adapter)
        check_values(self, own, where)
        if variant_of(self.adapters[adapter]):
            raise ValueError(f"{where}: '{adapter}' scales the weight, expected plain LoRA")
        weights = [name for name in self._merged_parameters((adapter,)) if name[-4:] != "bias"]
        if len(weights) != 1:
            raise NotBuiltError(f"{where}: is not built for a layer of several weights")
        draft = Transaction().draft(self)
        for name, parameter in self._merged_parameters((adapter,)).items():
            compute = torch.promote_types(parameter.dtype, torch.float32)
            zeros = torch.zeros_like(parameter, dtype=compute)
            if zeros.is_meta:  # the base's, where a hook offloads that
                zeros = torch.zeros_like(zeros, device=next(iter(own.values())).device)
            put_parameter(draft, name, nn.Parameter(zeros))
        draft._write_merged((adapter,))
        delta: Tensor = attrgetter(weights[0])(draft)
        return delta.detach()

    def _put_own(self, parameters: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        """Gives a draft copies of these parameters, which are returned, in their places."""
        base: dict[str, nn.Parameter] = {}
        for name, parameter in parameters.items():
            if not isinstance(parameter, nn.Parameter):
                raise ValueError(
                    f"{type(self).__name__}: its {name} is computed (pruning, weight_norm), "
                    "expected a plain parameter; make that permanent first"
                )
            own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            _BASES[own] = TensorWeakRef(parameter)
            put_parameter(self, name, own)
            base[name] = parameter
        return base

    def _initialise_from_base(self, adapter_name: str) -> None:
        """Initialises an adapter that is taken out of the base's parameters: out of copies, in a
        draft."""
        parameters = self._put_own(self._merged_parameters([adapter_name]))
        self._initialise(adapter_name, self.adapters[adapter_name].init_lora_weights)
        for name, parameter in parameters.items():
            self._transaction.write(parameter, attrgetter(name)(self).detach())
            put_parameter(self, name, parameter)

    def _put_back(self) -> None:
        """Gives a draft the base's parameters in their places; they train if those did that were
        there meanwhile."""
        where = f"{type(self).__name__}.unmerge"
        for name, base in self._aside.items():
            path, _, leaf = name.rpartition(".")
            if leaf not in self.get_submodule(path)._parameters:  # what computes it would go on
                raise ValueError(
                    f"{where}: its {name} is computed from other tensors (pruning, "
                    "parametrization, weight_norm) since it was merged, expected a plain "
                    "parameter; make that permanent first, or undo it"
                )
            merged = attrgetter(name)(self)
            if merged.shape != base.shape:
                raise ValueError(
                    f"{where}: its {name} got shape {list(merged.shape)} "
                    f"while merged, expected the base's {list(base.shape)}; unload() keeps what is "
                    "merged, or resize before adapters are put in"
                )
            self._transaction.require_grad(base, merged.requires_grad)
            put_parameter(self, name, base)
        self._aside = {}

    @all_or_nothing
    def _take_base(self, name: str, parameter: nn.Parameter) -> None:
        """Makes another parameter the base's; what is merged stays so."""
        if parameter is not self._aside[name]:
            merged = self.merged_adapters
            self.unmerge()
            put_parameter(self, name, parameter)
            self._merge(merged)

    @property
    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base's own parameters that `unmerge()` puts back, by name; none unless merged."""
        return dict(self._aside)

    def _check_merged(self) -> None:
        """RuntimeError where the base's own values stand in for the merged ones, as functional_call
        puts those of a `state_dict` there: the adapters, which do not run, would be lost."""
        for name, base in self._aside.items():
            own = self._parameters
            now: Any = own[name] if name in own else attrgetter(name)(self)
            if type(now) is nn.Parameter or torch.compiler.is_compiling():  # nearly always
                continue
            while torch._C._functorch.is_functorch_wrapped_tensor(now):
                now = torch._C._functorch.get_unwrapped(now)
            if torch._C._is_alias_of(now, base):  # type: ignore[attr-defined]
                raise RuntimeError(
                    f"{type(self).__name__}: adapters {list(self.merged_adapters)} are merged, but "
                    f"its {name} is the base's, as state_dict() has it, expected the merged one; "
                    "give functional_call dict(model.named_parameters()), or unmerge first"
                )

    def unmerged_weight(self) -> Tensor:
        """The base's own weight, also while merged."""
        weight: Tensor = self._aside.get(f"{self.BASE_PATH}weight", self.weight)
        return weight.detach()

    def train(self, mode: bool = True) -> Self:
        """With `merge_weights`, as in loralib: eval() merges, train() unmerges. Else train() warns
        of merged adapters, which get no gradients."""
        super().train(mode)
        self._follow_mode()
        merged = [part for name in self.merged_adapters for part in self.parts(name).values()]
        if mode and any(parameter.requires_grad for parameter in merged):
            warn(
                f"{type(self).__name__}.train: adapters {list(self.merged_adapters)} are merged, "
                "so training does not change them; unmerge first"
            )
        return self

    def _follow_mode(self) -> None:
        if self.merge_weights and self.active_adapters and self.merged == self.training:
            if self.training:
                self.unmerge()
            elif self._enabled:
                self.merge()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves or casts the layer also does so to the base's parameters while merged."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._aside:
            aside = nn.Module()
            aside._parameters = self._aside  # type: ignore[assignment]
            aside._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, base in self._aside.items():
            _BASES[attrgetter(name)(self)] = TensorWeakRef(base)

    # Merging a bias, for the kinds that have one

    def _weight_and_bias(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The base's weight, and its bias where one of these adapters has a lora_bias."""
        parameters: dict[str, Tensor] = {f"{self.BASE_PATH}weight": self.weight}
        if any(self.adapters[name].lora_bias for name in names):
            if self.bias is None:
                raise ValueError(
                    f"{type(self).__name__}.merge: lora_bias cannot be merged into a base without "
                    "bias; construct the base with bias=True"
                )
            parameters[f"{self.BASE_PATH}bias"] = self.bias
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
        for name, base in self._aside.items():
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
        merged = self.merged_adapters
        if merged:
            try:
                self.unmerge()
            except ValueError as error:
                error_msgs.append(f"{prefix}{error}")
                for name in self._aside:  # its children keep theirs, too
                    state_dict[prefix + name] = attrgetter(name)(self).detach()
                return
        own = [name for name in self._parameters if prefix + name in state_dict]
        try:
            check_values(self, own, f"{prefix.removesuffix('.')}: load_state_dict")
        except ValueError as error:
            error_msgs.append(str(error))
            return
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
            self.merge(adapter_names=merged)
        except ValueError as error:
            error_msgs.append(f"{prefix}merge after loading, now unmerged: {error}")
        else:
            parameters = self._merged_parameters(merged)  # not those above
            for name in below:
                state_dict[prefix + name] = parameters[name].detach().clone()


# The base's parameter that a merged one stands in for; kept alive by its layer alone.
_BASES: MutableMapping[Tensor, TensorWeakRef] = WeakTensorKeyDictionary()


def base_of(parameter: nn.Parameter) -> nn.Parameter:
    """The base's parameter that a merged one stands in for, or itself."""
    reference = _BASES.get(parameter)
    base = None if reference is None else reference()
    return base if isinstance(base, nn.Parameter) else parameter


def _share_the_base(
    module: nn.Module, name: str, parameter: nn.Parameter | None
) -> nn.Parameter | None:
    """What becomes a module's parameter instead of `parameter`, if anything. Who shares its weight
    with the base of a merged layer goes on with that if told to share the layer's
    (`head.weight = embedding.weight`, as in tie_weights of transformers); and a weight that is
    given to a merged layer is its base's."""
    if parameter is None or not _BASES:
        return None
    now, base = module._parameters.get(name), base_of(parameter)
    if now is parameter:
        return None
    if isinstance(module, MergeableLayer) and name in vars(module).get("_aside", ()):
        module._take_base(name, base)
        return module._parameters.get(name)
    return base if now is base else None


register_module_parameter_registration_hook(_share_the_base)  # type: ignore[arg-type]


def _shape(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None
