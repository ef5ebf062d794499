"""What all layers with adapters do alike: hold several adapters, choose those that run, merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_ext._offloaded import check_values, hook_of_accelerate
from lora_ext.arguments import as_flag, as_number, check_known, former_names, names_of
from lora_ext.nn.adapter import (
    DEFAULT,
    VARIANTS,
    AdapterSettings,
    DefaultAdapter,
    check_adapter_name,
    check_setting_names,
    part_name,
    variant_of,
)
from lora_ext.nn.adoption import adapter_device, offload_with
from lora_ext.nn.calibrated import FROM_DATA, left_at
from lora_ext.nn.init import check_init, initialise, is_mica, mutates_weight, reads_weight
from lora_ext.nn.running_layer import RunningLayer
from lora_ext.nn.sharded import is_sharded, refuse_fsdp, whole
from lora_ext.nn.tied import check_own, for_file, in_file_shape
from lora_ext.nn.transaction import all_or_nothing


class LoraLayer(DefaultAdapter, RunningLayer):
    """A layer of PyTorch that holds any number of named adapters beside its own parameters.

    A kind of layer derives from this and from the PyTorch class that it extends, and says how large
    the parts of an adapter are, how to run adapters, and how to merge them.
    """

    # Shared by every kind of layer; the settings hold the rest.
    PARTS: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_bias", "lora_magnitude_vector")
    # The parts' names in PEFT's checkpoints, below the layer's name.
    PEFT_NAMES: ClassVar[dict[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_bias": "lora_B.bias",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }
    # What stands before "lora_A", "lora_B" and "lora_bias" in PARTS: a kind of layer with several
    # products has one prefix for each.
    PREFIXES: ClassVar[tuple[str, ...]] = ("",)
    # Whether the initialisation "mica" is for it; `lora_ext.nn.variants` says of which it is.
    TAKES_MICA: ClassVar[bool] = False
    # Which initialisations from data are for it, if only as plain ones.
    TAKES_FROM_DATA: ClassVar[frozenset[str]] = frozenset()
    # What `_adopt` and the constructors add to the base's attributes.
    _STATE: ClassVar[frozenset[str]] = frozenset(
        "adapters active_adapters merged_adapters merge_weights "
        "_base_class _scaling _scaling_tensors _tied _enabled _running _lora_alone _lora_variant "
        "_aside".split()
    )
    # What changes with adapters: that of a draft becomes the layer's (see `transaction`).
    DRAFTED: ClassVar[tuple[str, ...]] = (
        *("_parameters", "adapters", "active_adapters", "merged_adapters", "_aside"),
        *("_scaling", "_scaling_tensors", "_tied", "_enabled", "_running"),
        *("_lora_alone", "_lora_variant"),
    )

    _hf_hook = hook_of_accelerate
    adapters: dict[str, AdapterSettings]
    active_adapters: tuple[str, ...]
    merged_adapters: tuple[str, ...]
    merge_weights: bool
    weight: Any  # of the base, which types it
    bias: Any
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_bias: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None

    # What a kind of layer says of itself

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        """The shape of each part that an adapter with these settings has. A kind that has variants
        asks them, by `_variant_shapes`."""
        raise NotImplementedError

    def _weight_matrix(self, prefix: str = "") -> Tensor:
        """The base's weight that the adapters of a prefix (see PREFIXES) change, as [N, K], the
        shape of lora_B times lora_A; a view."""
        raise NotImplementedError

    def _adapted_weight(self) -> Tensor:
        """One whose device and dtype an adapter takes after."""
        return next(iter(self._merged_parameters(()).values()))

    def _weight_norm(self, adapter_name: str) -> Tensor:
        """In `_weight_norm_shape()`: the norm of every row of the base's weight plus the adapter's
        scaled product, in float32 (float64 for float64)."""
        raise NotImplementedError

    def _weight_norm_shape(self) -> tuple[int, ...]:
        """Of one number for each output feature, as PEFT's files have it."""
        raise NotImplementedError

    # Construction

    def _init_adapters(self, base_class: type[nn.Module], merge_weights: bool = False) -> None:
        self.adapters = {}
        self.active_adapters = self.merged_adapters = ()
        self._aside = {}
        self.merge_weights = as_flag(merge_weights, type(self).__name__, "merge_weights")
        self._base_class = base_class
        self._scaling, self._scaling_tensors, self._tied = {}, {}, {}
        self._enabled = True
        self._running = ()
        self._lora_alone = self._lora_variant = None
        for part in self.PARTS:
            self.register_parameter(part, None)

    # Adapters

    @all_or_nothing
    def add_adapter(self, adapter_name: str, **settings: Any) -> None:
        """Adds an adapter; the first one becomes active.

        Args:
            settings: those of `AdapterSettings`.

        Raises:
            ValueError: the name is taken or cannot be one, a setting is out of range, or this kind
                of layer has no such variant.
        """
        check_adapter_name(adapter_name, self.adapters, type(self).__name__)
        check_setting_names(type(self).__name__, settings)
        chosen = AdapterSettings(**settings)
        refuse_fsdp(
            self,
            f"{type(self).__name__}.add_adapter",
            "add adapters first, then call fully_shard; LoraModel.load_adapter gives an adapter "
            "that is there the values of a file",
        )
        shapes = self.part_shapes(chosen)
        variant, flag = self._variant_of(chosen), variant_of(chosen)
        if flag and variant is None:
            raise ValueError(
                f"{type(self).__name__}.add_adapter: {flag}: got True, expected False: "
                f"this kind of layer has no {VARIANTS[flag]}"
            )
        if chosen.alora_invocation_tokens and not self.HAS_ALORA:
            raise ValueError(
                f"{type(self).__name__}.add_adapter: alora_invocation_tokens: got "
                f"{list(chosen.alora_invocation_tokens)}, expected None: only linear layers have "
                "activated adapters; leave this layer out with exclude_modules"
            )
        if chosen.has_blocks and not self.HAS_BLOCKS:
            raise ValueError(
                f"{type(self).__name__}.add_adapter: blocks_of_lora_A, blocks_of_lora_B: got "
                f"{chosen.blocks_of_lora_A} and {chosen.blocks_of_lora_B}, expected 1: only linear "
                "layers have block-diagonal matrices (BD-LoRA)"
            )
        if is_mica(chosen.init_lora_weights) and not self.TAKES_MICA:
            raise ValueError(
                f"{type(self).__name__}.add_adapter: init_lora_weights: got 'mica', expected "
                "another kind: MiCA is for linear layers and embeddings"
            )
        kind = chosen.init_lora_weights
        if kind in FROM_DATA and kind not in self.TAKES_FROM_DATA:
            raise ValueError(
                f"{type(self).__name__}.add_adapter: init_lora_weights: got {kind!r}, expected "
                "another kind: it is for linear layers; leave this layer out with exclude_modules"
            )
        if chosen.ungrouped_lora_A and getattr(self, "groups", 1) == 1:
            raise ValueError(
                f"{type(self).__name__}.add_adapter: ungrouped_lora_A: got True, expected False: "
                "only a convolution with groups has the choice"
            )
        base = self._adapted_weight()
        device, dtype = adapter_device(self, base), self.adapter_dtype(chosen)
        kind = self._kind_here(kind)
        needs_weight = reads_weight(kind) or (variant is not None and variant.READS_WEIGHT)
        if needs_weight and base.device.type == "meta" and device.type != "meta":
            asked = f"{flag}=True" if variant else f"init_lora_weights={chosen.init_lora_weights!r}"
            raise ValueError(
                f"{type(self).__name__}.add_adapter: got {asked}, which reads the layer's weight, "
                "but a hook offloads it; take the hooks off first "
                "(accelerate.hooks.remove_hook_from_module(model, recurse=True))"
            )
        if is_sharded(base):
            self._check_placeable(chosen)
        for part, shape in shapes.items():
            tensor = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(part_name(part, adapter_name), nn.Parameter(tensor))
        self.adapters[adapter_name] = chosen
        self._scaling[adapter_name] = chosen.scaling
        if mutates_weight(kind):
            self._initialise_from_base(adapter_name)
        else:
            self._initialise(adapter_name, kind)
        if is_sharded(base):
            self._place(adapter_name)
        for name in self.frozen_parameters(adapter_name):
            self._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
        offload_with(self, self.adapter_parameters(adapter_name))
        if len(self.adapters) == 1:
            self.active_adapters = (adapter_name,)
        elif adapter_name not in self.active_adapters:
            for parameter in self.adapter_parameters(adapter_name).values():
                parameter.requires_grad_(False)
        self._choose_running()

    def _check_placeable(self, settings: AdapterSettings) -> None:
        """ValueError where an adapter cannot be divided as the base's weight is, a DTensor."""
        raise ValueError(
            f"{type(self).__name__}.add_adapter: the layer's weight is a DTensor (tensor parallel),"
            " for which only lora_ext.nn.Linear has adapters; leave this layer out with "
            "exclude_modules"
        )

    def _place(self, adapter_name: str) -> None:
        """Divides an adapter between the processes as the base's weight is."""
        raise NotImplementedError

    def adapter_dtype(self, settings: AdapterSettings) -> torch.dtype:
        """That of an adapter with these settings."""
        dtype = self._adapted_weight().dtype
        narrow = dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if narrow and settings.autocast_adapter_dtype else dtype

    def _with_adapter(
        self, adapter_name: str, r: int, lora_alpha: float, lora_dropout: float, **settings: Any
    ) -> Self:
        """This layer with its first adapter; r = 0 is none."""
        if not isinstance(r, int) or r != 0:
            settings |= {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
            self.add_adapter(adapter_name, **settings)
        return self

    def _forget(self, adapter_name: str) -> None:
        self._check_not_computed(f"{type(self).__name__}.delete_adapter", adapter_name)
        for name in self.adapter_parameters(adapter_name):
            del self._parameters[name]
        if adapter_name == DEFAULT:
            for part in self.PARTS:
                self._parameters[part] = None
        del self.adapters[adapter_name], self._scaling[adapter_name]
        self._scaling_tensors.pop(adapter_name, None)
        self._tied.pop(adapter_name, None)

    @all_or_nothing
    def rename_adapter(self, old: str, new: str) -> None:
        """Gives an adapter another name; the parameters themselves stay."""
        self._check_names([old], "old")
        check_adapter_name(new, self.adapters, f"{type(self).__name__}.rename_adapter", "new")
        where = f"{type(self).__name__}.rename_adapter"
        self._check_not_computed(where, old)
        check_values(self, self.adapter_parameters(old), where)
        refuse_fsdp(self, where, "rename it, then call fully_shard")
        for part in self.PARTS:
            parameter = self._parameters.get(part_name(part, old))
            if parameter is not None:
                self._parameters[part_name(part, new)] = parameter
                del self._parameters[part_name(part, old)]
            if old == DEFAULT:
                self._parameters[part] = None
        for registry in (self.adapters, self._scaling, self._scaling_tensors, self._tied):
            renamed = {new if name == old else name: value for name, value in registry.items()}
            registry.clear()
            registry.update(renamed)  # type: ignore[arg-type]
        self.active_adapters = tuple(new if n == old else n for n in self.active_adapters)
        self.merged_adapters = tuple(new if n == old else n for n in self.merged_adapters)
        self._choose_running()

    @all_or_nothing
    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Makes exactly these adapters active, and trainable unless `inference_mode`; all others
        are frozen. Several active adapters add up. Unmerges what is merged."""
        names = tuple(names_of(adapter_names, f"{type(self).__name__}.set_adapter"))
        self._check_names(names)
        if self.merged:
            self.unmerge()
        self._activate(names, inference_mode)

    def _activate(self, names: Sequence[str], inference_mode: bool) -> None:
        self.active_adapters = tuple(dict.fromkeys(names))
        for name in self.adapters:
            for key in self.adapter_state_names(name):
                tensor = attrgetter(key)(self)
                if isinstance(tensor, nn.Parameter):
                    trains = name in names and not inference_mode
                    trains = trains and key not in self.frozen_parameters(name)
                    self._transaction.require_grad(tensor, trains)
        self._choose_running()

    @all_or_nothing
    def enable_adapters(self, enabled: bool) -> None:
        """Whether the active adapters run; disabling also unmerges, so that the base is exact."""
        enabled = as_flag(enabled, f"{type(self).__name__}.enable_adapters", "enabled")
        if not enabled and self.merged:
            self.unmerge()
        self._enabled = enabled
        self._choose_running()
        self._follow_mode()

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off."""
        return not self._enabled

    def parts(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter: lora_A, lora_B, lora_bias if it has one."""
        parameters = {p: self._parameters.get(part_name(p, adapter_name)) for p in self.PARTS}
        return {part: value for part, value in parameters.items() if value is not None}

    def adapter_parameters(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by attribute name. ValueError without one of the name."""
        self._check_names([adapter_name])
        parts = self.parts(adapter_name)
        return {part_name(part, adapter_name): value for part, value in parts.items()}

    def frozen_parameters(self, adapter_name: str) -> frozenset[str]:
        """The names of those of them that never train: lora_B of MiCA."""
        mica = is_mica(self.adapters[adapter_name].init_lora_weights)
        return frozenset({part_name("lora_B", adapter_name)} if mica else ())

    def trained_biases(self) -> list[nn.Parameter]:
        """The base's biases that train with an adapter whose config says "lora_only"."""
        bias = self._aside.get(f"{self.BASE_PATH}bias", getattr(self, "bias", None))
        return [bias] if isinstance(bias, nn.Parameter) else []

    def peft_parameters(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by their names in PEFT's checkpoints (views, if tied)."""
        parts = in_file_shape(self, adapter_name, self.parts(adapter_name))
        return {self.PEFT_NAMES[part]: value for part, value in parts.items()}

    def peft_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        """Their shapes for an adapter that is not there yet."""
        shapes = self.part_shapes(settings)
        return {key: shapes[part] for part, key in self.PEFT_NAMES.items() if part in shapes}

    def peft_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """What a checkpoint holds of one adapter: `peft_parameters`, in PEFT's shapes. What is
        divided between processes is gathered, for which all of them call this."""
        self._check_not_computed(f"{type(self).__name__}.peft_tensors", adapter_name)
        with torch.no_grad():
            tensors = self.peft_parameters(adapter_name).items()
            found = {key: whole(parameter).detach() for key, parameter in tensors}
            return for_file(self, adapter_name, found)

    def plain_parts(self, adapter_name: str) -> dict[str, Tensor] | None:
        """The parts of a plain adapter that does the same and that PEFT knows, of another rank;
        None where `parts` are those. ValueError where there is none."""
        return None

    def reset_lora_parameters(
        self, adapter_name: str = DEFAULT, init_lora_weights: bool | str | None = None
    ) -> None:
        """Initialises an adapter again, as its `init_lora_weights` says, or as the one given does;
        given False leaves it as it is, as in PEFT.

        Raises:
            ValueError: that kind takes the adapter out of the base's weight, which a second time
                would do twice.
        """
        if adapter_name not in self.adapters or init_lora_weights is False:
            return
        kind = self.adapters[adapter_name].init_lora_weights
        if init_lora_weights is not None:
            kind = check_init(init_lora_weights)
        if mutates_weight(kind):
            raise ValueError(
                f"{type(self).__name__}.reset_lora_parameters: init_lora_weights: got {kind!r}, "
                "which changes the base weight, expected another kind; add a new adapter instead"
            )
        self._check_not_computed(f"{type(self).__name__}.reset_lora_parameters", adapter_name)
        self._initialise(adapter_name, kind)

    def _initialise(self, name: str, kind: bool | str) -> None:
        check_own(self, name)
        if reads_weight(kind) and self.merged:
            raise ValueError(
                f"{type(self).__name__}: init_lora_weights: {kind!r} reads the base weight, which "
                "holds merged adapters; call unmerge() first"
            )
        for prefix in self.PREFIXES:
            A, B, bias = (
                self._part(prefix + part, name) for part in ("lora_A", "lora_B", "lora_bias")
            )
            if A is not None:
                weight = self._weight_matrix(prefix) if reads_weight(kind) else None
                scaling = self._settings(name, prefix).scaling
                settings = self.adapters[name]
                initialise(
                    kind,
                    A,
                    B,
                    weight,
                    scaling,
                    lora_bias=bias,
                    loftq_bits=settings.loftq_bits,
                    loftq_iter=settings.loftq_iter,
                    data=self._left_by_calibration(kind),
                    direction=settings.lora_ga_direction,
                    scale=settings.lora_ga_scale,
                    stable_gamma=settings.lora_ga_stable_gamma,
                    rows=self._adapted_weight().shape[0],
                )
        self._initialise_variant(name)

    def _kind_here(self, kind: bool | str) -> bool | str:
        """An initialisation as it is here: "lora_ga" is True where no gradient was left."""
        return True if kind == "lora_ga" and left_at(self, kind) is None else kind

    def _left_by_calibration(self, kind: bool | str) -> Any:
        """For an initialisation from data; a matrix is as `_weight_matrix()`, [N, K]."""
        left = left_at(self, kind)
        if isinstance(left, Tensor) and getattr(self, "fan_in_fan_out", False):
            return left.t()
        return left

    # Scales

    def get_scale(self, adapter_name: str = DEFAULT) -> float:
        """What multiplies the adapter's product now."""
        self._check_names([adapter_name])
        return self._scaling[adapter_name]

    @former_names("set_scale", adapter_name="adapter")
    def set_scale(self, adapter: str, scale: float) -> None:
        """Makes an adapter's scaling `scale` times that of its settings; 0 switches it off.

        Raises:
            ValueError: not a finite number, no such adapter, or it is merged.
        """
        self._check_names([adapter], "adapter")
        scale = as_number(scale, f"{type(self).__name__}.set_scale", "scale", "a finite number")
        self._set_scaling({adapter: scale * self.adapters[adapter].scaling})

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scaling of the active adapters."""
        scale = as_number(scale, f"{type(self).__name__}.scale_layer", "scale", "a finite number")
        self._set_scaling({n: scale * self._scaling[n] for n in self.active_adapters})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scaling of the active adapters; without `scale`, makes it that of their
        settings."""
        if scale is not None:
            scale = as_number(scale, f"{type(self).__name__}.unscale_layer", "scale")
        if scale is not None and (scale == 0 or not math.isfinite(scale)):
            raise ValueError(
                f"{type(self).__name__}.unscale_layer: scale: got {scale}, expected a finite "
                "number other than 0; use unscale_layer() to get back the scaling of the settings"
            )
        self._set_scaling(
            {
                n: self.adapters[n].scaling if scale is None else self._scaling[n] / scale
                for n in self.active_adapters
            }
        )

    @all_or_nothing
    def _set_scaling(self, scaling: dict[str, float]) -> None:
        for name, value in scaling.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{type(self).__name__}: scale: the scaling of '{name}' would be {value}, "
                    "expected a finite number"
                )
            if name in self.merged_adapters:
                raise ValueError(
                    f"{type(self).__name__}: scale: '{name}' is merged; call unmerge() first"
                )
        self._scaling.update(scaling)
        for name, value in scaling.items():
            if name in self._scaling_tensors:
                self._transaction.write(self._scaling_tensors[name], torch.tensor(value))
        self._choose_running()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Scalings that are tensors go where the parameters go, and keep their type."""
        super()._apply(fn, recurse)
        if self._scaling_tensors:
            device = self._adapted_weight().device
            self._scaling_tensors = {n: t.to(device) for n, t in self._scaling_tensors.items()}
        return self

    # Checks

    def _check_mergeable(self, where: str, names: Iterable[str]) -> None:
        activated = [name for name in names if self.adapters[name].alora_invocation_tokens]
        if activated:
            raise ValueError(
                f"{where}: adapter_names: '{activated[0]}' is activated by tokens "
                "(alora_invocation_tokens), expected others: a weight has no tokens before them. "
                "aLoRA does not support merging."
            )

    def _check_names(self, names: Iterable[str], argument: str = "adapter_name") -> None:
        check_known(type(self).__name__, argument, names, self.adapters)
