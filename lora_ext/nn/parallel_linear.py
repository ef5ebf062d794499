"""LoRA on Megatron's linear layers, whose weight is divided between processes (tensor parallelism).

    ColumnParallelLinear   W [N/p, K]   lora_A [r, K] everywhere   lora_B [N/p, r]
    RowParallelLinear      W [N, K/p]   lora_A [r, K/p]   lora_B [N, r] everywhere

Parameters are plain tensors, as Megatron's own are. Megatron's layer is called, with all that its
config asks for, and the update is added to its result. Of the update M r numbers, for M tokens, are
exchanged: h = dropout(x) lora_A^T in the forward of a row-parallel layer, dh in the backward of the
other. With that every process has the whole gradient of the matrix that all have. (With Megatron's
sequence parallelism, where tokens are divided outside of the pair of layers, that gradient is
summed: K r or N r numbers.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lora_ext import batching
from lora_ext.functional import draw_rng_state, dropout
from lora_ext.nn.adapter import DEFAULT, AdapterSettings, LowRank, part_name
from lora_ext.nn.init import reads_weight
from lora_ext.nn.kept_base import KeptBase
from lora_ext.nn.linear import Linear
from lora_ext.nn.megatron import (
    Processes,
    copy_marks,
    is_row_parallel,
    mark_divided,
    parallel_kind,
)
from lora_ext.nn.planned import follows_plan, planned_names, refuse_plan
from lora_ext.nn.sharded import Part, set_part


class ParallelLinear(KeptBase, Linear):
    """LoRA over one of Megatron's parallel linear layers, its child `base_layer`.

    Called with the same arguments, it returns the same: (y, bias), of which the bias is the
    caller's to add, or None. `in_features` and `out_features` are those of the undivided layer, as
    in PEFT; so are the tensors in files, for which all processes of the group save, and load,
    together.
    """

    HAS_ALORA: ClassVar[bool] = False
    HAS_CAPACITY: ClassVar[bool] = False
    HAS_BLOCKS: ClassVar[bool] = False
    TAKES_FROM_DATA: ClassVar[frozenset[str]] = frozenset()
    _CHECKED: ClassVar[WeakSet[nn.Module]] = WeakSet()
    _STATE: ClassVar[frozenset[str]] = KeptBase._STATE | {"fan_in_fan_out", "_row_parallel"}
    _row_parallel: bool

    @classmethod
    def from_parallel(cls, base: nn.Module, r: int = 8, **settings: Any) -> Self:
        """A layer over `base`, with an adapter, unless r is 0.

        Args:
            settings: adapter_name, lora_alpha and the other fields of `AdapterSettings`.

        Raises:
            TypeError: base is none of Megatron's, or has adapters.
            ValueError: it has no weight of its own, or is one of the experts of an MoE layer.
        """
        kind = parallel_kind(base)
        where = f"{cls.__name__}.from_parallel: base"
        if kind is None:
            raise TypeError(
                f"{where}: got {type(base).__qualname__}, expected a ColumnParallelLinear or "
                "RowParallelLinear of Megatron"
            )
        if getattr(base, "weight", None) is None:
            raise ValueError(
                f"{where}: its weight is given to each call (skip_weight_param_allocation), "
                "expected a layer with one of its own; leave it out with exclude_modules"
            )
        if getattr(base, "is_expert", False):
            raise ValueError(
                f"{where}: is of the experts of an MoE layer (is_expert), whose results others "
                "exchange, expected another layer; leave it out with exclude_modules"
            )
        self = cls._over(base, kind, any_forward=True)
        self.fan_in_fan_out = False
        self._row_parallel = is_row_parallel(kind)
        self.in_features, self.out_features = base.input_size, base.output_size  # type: ignore[assignment]
        name, alpha = settings.pop("adapter_name", DEFAULT), settings.pop("lora_alpha", 8)
        return self._with_adapter(name, r, alpha, settings.pop("lora_dropout", 0.0), **settings)

    @property
    def _kind(self) -> type[nn.Module]:
        kind = parallel_kind(self._base_class)
        assert kind is not None
        return kind

    @property
    def reason_to_call(self) -> str:
        return f"{self._kind.__name__} exchanges with other processes"

    @property
    def _processes(self) -> Processes:
        return Processes(self.base_layer)

    # Parts of adapters

    @property
    def _divided_part(self) -> tuple[str, int]:
        """The part of an adapter of which each process has a part, and the dimension of it."""
        return ("lora_A", 1) if self._row_parallel else ("lora_B", 0)

    def parts(self, adapter_name: str) -> dict[str, nn.Parameter]:
        found = super().parts(adapter_name)
        name, dim = self._divided_part
        if name in found:
            set_part(found[name], Part(self._processes, dim))
        return found

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        """Of the undivided layer."""
        where = type(self).__name__
        if settings.lora_bias:
            raise ValueError(
                f"{where}: lora_bias: got True, expected False: {where} does not support lora_bias"
            )
        if reads_weight(settings.init_lora_weights):
            raise ValueError(
                f"{where}: init_lora_weights: got {settings.init_lora_weights!r}, which reads the "
                "whole weight, of which each process has a part; expected True, False, 'gaussian' "
                "or 'orthogonal'"
            )
        return super().part_shapes(settings)

    def _initialise(self, name: str, kind: bool | str) -> None:
        """As the undivided layer, in the group's first process; each has its part of that."""
        processes, (divided, dim) = self._processes, self._divided_part
        own = super().parts(name)
        for part, shape in self.part_shapes(self.adapters[name]).items():
            whole = nn.Parameter(own[part].new_empty(shape))
            self._parameters[part_name(part, name)] = whole
        super()._initialise(name, kind)
        for part, parameter in own.items():
            key = part_name(part, name)
            values = processes.of_first(self._parameters[key].detach())  # type: ignore[union-attr]
            if part == divided:
                values = values.chunk(processes.count, dim)[processes.rank].contiguous()
            if parameter.shape != values.shape:  # it is new
                parameter = nn.Parameter(values, parameter.requires_grad)
            elif not values.is_meta:
                with torch.no_grad():
                    parameter.copy_(values)
            if part == divided:
                mark_divided(parameter, dim)
            self._parameters[key] = parameter

    # Calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's: its arguments, and (y, bias)."""
        running = self._running
        if batching.in_use and follows_plan(self):
            if planned_names(self):
                refuse_plan(self, "its weight is divided between processes")
            running = ()
        if self.merged_adapters:
            self._check_merged()
        y, bias = self.base_layer(*args, **kwargs)
        if not running:
            return y, bias
        x = args[0] if args else self._x_by_name(kwargs)
        base: Any = self.base_layer
        gather = not self._row_parallel and base.gather_output
        asked = args[2] if len(args) > 2 else kwargs.get("runtime_gather_output")
        total = y
        for low_rank in self.low_rank():
            update = self._update(x, low_rank, gather if asked is None else asked)
            total = total + update
        return total.to(y.dtype), bias

    def _update(self, x: Tensor, low_rank: LowRank, gather: bool) -> Tensor:
        """What adapters add to y, as the base divides that."""
        base: Any = self.base_layer
        processes = self._processes
        A, B, _, scaling, dropout_p = low_rank
        in_sequence = base.sequence_parallel  # each process has tokens of its own outside the pair
        if self._row_parallel and not base.input_is_parallel:
            x = processes.features(x)
        d = x
        if dropout_p > 0.0:
            state = self._rng_state(x, alike=not self._row_parallel and not in_sequence)
            d = dropout(x, state, dropout_p)
        d = d.to(A.dtype)
        if self._row_parallel:
            h = d @ A.t()
            if in_sequence:
                h, B = processes.summed_tokens(h), processes.shared(B)
            else:
                h = processes.summed(h)
            return h @ B.t() * scaling
        if in_sequence:
            h = processes.all_tokens(d @ processes.shared(A).t())
        else:
            h = processes.shared(d @ A.t())
        update = h @ B.t() * scaling
        return processes.all_features(update) if gather else update

    def _rng_state(self, x: Tensor, alike: bool) -> Tensor:
        """The state of this call's mask: of x that all have (`alike`) all drop the same elements,
        for which their generators have to be alike; else each has a mask of its own."""
        state, processes = draw_rng_state(x), self._processes
        if self not in self._CHECKED:
            states = processes.of_all(state)
            if not all(torch.equal(states[0], one) for one in states):
                raise ValueError(
                    f"{type(self).__name__}: processes of one tensor parallel group drew different "
                    "dropout states, expected the same: seed them alike (torch.manual_seed(n) in "
                    "all of them, as Megatron's model_parallel_cuda_manual_seed does) before the "
                    "first step"
                )
            self._CHECKED.add(self)
        if not alike:
            state = state.clone()
            state[0] += processes.rank * 0x9E3779B97F4A7C15 % 2**62
        return state

    def _planned_path(self) -> tuple[str, str]:
        return "none", "its weight is divided: a plan that names its adapters is refused"

    # Merging, in each process for itself

    def _put_own(self, parameters: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        base = super()._put_own(parameters)
        for name, parameter in base.items():
            copy_marks(parameter, self.get_parameter(name))
        return base

    # Megatron's distributed checkpoints

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The base's, below "base_layer.", and the adapters' parameters, as Megatron describes
        those of which a process has a part."""
        base: Any = self.base_layer
        state: dict[str, Any] = base.sharded_state_dict(
            f"{prefix}{self.BASE_PATH}", sharded_offsets, metadata
        )
        part, dim = self._divided_part
        own: dict[str, nn.Parameter] = {}
        dims: dict[str, int] = {}
        for adapter in self.adapters:
            own |= self.adapter_parameters(adapter)
            dims[part_name(part, adapter)] = dim
        return state | self._processes.described(own, prefix, dims, sharded_offsets, metadata)
