"""Single rows of an embedding that are trained, of each adapter its own: PEFT's
`trainable_token_indices`. Names of modules and parameters are PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_ext import batching
from lora_ext.arguments import as_flag, check_known, former_names, names_of
from lora_ext.batching import current_plan
from lora_ext.nn.adapter import check_adapter_name
from lora_ext.nn.adoption import computed_tensors
from lora_ext.nn.mergeable import MergeableLayer
from lora_ext.nn.planned import follows_plan, refuse_plan
from lora_ext.nn.sharded import refuse_fsdp
from lora_ext.nn.token_rows import TokenRows, reason_to_copy, run
from lora_ext.nn.transaction import all_or_nothing, shallow

DELTA = "trainable_tokens_delta"


class TokenTables(nn.Module):
    """The trained rows [n, K], by the adapters' names, which may also be those of attributes."""

    def __getitem__(self, adapter_name: str) -> nn.Parameter:
        found = self._parameters.get(adapter_name)
        if found is None:
            found = vars(self)[adapter_name]  # of a replica (nn.DataParallel)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __contains__(self, adapter_name: object) -> bool:
        return adapter_name in self._parameters

    def __bool__(self) -> bool:
        return True

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {list(table.shape)}" for name, table in self.items())

    def keys(self) -> Iterable[str]:
        return self._parameters.keys()

    def items(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self._parameters.items()  # type: ignore[return-value]


class TrainableTokensLayer(MergeableLayer):
    """An embedding, or a head with the shape of one, some rows of whose weight are an adapter's.

    The rows take the place of the base's (nothing is added), start as they are, and are all that an
    adapter trains. Several adapters may be active if none has a row of another.

    Attributes:
        base_layer: the module itself.
        trainable_tokens_delta: the rows, by the adapters' names.
        adapters: the numbers of the rows, by the same.
        tied: the layers of modules with the same weight, which do what this one does.
    """

    BASE_PATH: ClassVar[str] = "base_layer."
    DRAFTED: ClassVar[tuple[str, ...]] = (
        *("adapters", "active_adapters", "merged_adapters", "_aside", "tied"),
        *("_enabled", "_running", "_rows"),
    )
    adapters: dict[str, tuple[int, ...]]  # type: ignore[assignment]
    base_layer: nn.Module
    trainable_tokens_delta: TokenTables
    tied: tuple[Any, ...]  # of TiedTokensLayer
    tied_adapter: None = None
    _running: tuple[str, ...]
    _rows: TokenRows | None  # of the adapters that run

    def __init__(self, base_layer: nn.Module) -> None:
        """
        Raises:
            TypeError: the base is no embedding or linear layer, or one with adapters, or its weight
                is no plain parameter.
        """
        super().__init__()
        weight = base_layer._parameters.get("weight")
        is_plain = type(weight) is nn.Parameter and weight.is_floating_point()
        if not isinstance(base_layer, nn.Embedding | nn.Linear) or not is_plain:
            kind = type(base_layer)
            what = f", its weight a {type(weight).__qualname__}" if weight is not None else ""
            raise TypeError(
                f"trainable_token_indices: got a {kind.__module__}.{kind.__qualname__}{what}, "
                "expected an nn.Embedding or an nn.Linear without adapters, quantization or "
                "division between processes; trainable_token_indices cannot be applied to modules "
                f"of type {kind}"
            )
        self.base_layer = base_layer
        self.trainable_tokens_delta = TokenTables()
        self.training = base_layer.training
        self.adapters, self._aside = {}, {}
        self.active_adapters = self.merged_adapters = self.tied = self._running = ()
        self.merge_weights, self._enabled, self._rows = False, True, None

    @property
    def weight(self) -> Any:
        """The base's, with what is merged."""
        return self.base_layer.weight

    def get_base_layer(self) -> nn.Module:
        """The module itself, with what is merged."""
        return self.base_layer

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """The numbers of the rows, by the adapters' names."""
        return {name: list(indices) for name, indices in self.adapters.items()}

    @property
    def trainable_tokens_original(self) -> dict[str, Tensor]:
        """The base's own values of the rows, by the adapters' names."""
        weight = self.unmerged_weight()
        return {name: weight[list(indices)] for name, indices in self.adapters.items()}

    # Adapters

    @all_or_nothing
    def add_adapter(
        self, adapter_name: str, indices: Sequence[int], autocast_adapter_dtype: bool = True
    ) -> None:
        """Adds an adapter with these rows, which is not active yet.

        Raises:
            ValueError: the name is taken, or there is no such row.
        """
        check_adapter_name(adapter_name, self.adapters, type(self).__name__)
        refuse_fsdp(self, f"{type(self).__name__}.add_adapter", "add it, then call fully_shard")
        weight = self.unmerged_weight()
        wrong = [index for index in indices if index >= weight.shape[0]]
        if wrong:
            raise ValueError(
                f"trainable_token_indices: got {wrong[0]}, expected at most {weight.shape[0] - 1}: "
                f"the weight has {weight.shape[0]} rows; resize the embedding first"
            )
        values = weight[list(indices)].to(self.adapter_dtype(autocast_adapter_dtype))
        table = nn.Parameter(values, requires_grad=False)
        self._set_tables({**self.trainable_tokens_delta._parameters, adapter_name: table})
        self.adapters[adapter_name] = tuple(indices)
        self._choose_running()

    def adapter_dtype(self, autocast_adapter_dtype: bool) -> torch.dtype:
        """That of an adapter's rows."""
        dtype: torch.dtype = self.weight.dtype
        narrow = dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if narrow and autocast_adapter_dtype else dtype

    def _forget(self, adapter_name: str) -> None:
        tables = self.trainable_tokens_delta._parameters
        self._set_tables({name: one for name, one in tables.items() if name != adapter_name})
        del self.adapters[adapter_name]

    @all_or_nothing
    def rename_adapter(self, old: str, new: str) -> None:
        """Gives an adapter another name; its rows stay."""
        self._check_names([old], "old")
        where = f"{type(self).__name__}.rename_adapter"
        check_adapter_name(new, self.adapters, where, "new")
        refuse_fsdp(self, where, "rename it, then call fully_shard")

        def now(name: str) -> str:
            return new if name == old else name

        tables = self.trainable_tokens_delta._parameters
        self._set_tables({now(name): table for name, table in tables.items()})
        self.adapters = {now(name): indices for name, indices in self.adapters.items()}
        self.active_adapters = tuple(map(now, self.active_adapters))
        self.merged_adapters = tuple(map(now, self.merged_adapters))
        self._choose_running()

    def _set_tables(self, tables: Mapping[str, nn.Parameter | None]) -> None:
        """Of a draft."""
        changed = shallow(self.trainable_tokens_delta)
        changed._parameters.clear()
        changed._parameters.update(tables)
        self._modules[DELTA] = changed

    @all_or_nothing
    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Makes exactly these adapters active, and trainable unless `inference_mode`; all others
        are frozen. Unmerges what is merged.

        Raises:
            ValueError: two of them have the same row.
        """
        names = tuple(names_of(adapter_names, f"{type(self).__name__}.set_adapter"))
        self._check_names(names)
        self._check_disjoint(names, "set_adapter")
        if self.merged:
            self.unmerge()
        self._activate(names, inference_mode)

    def _activate(self, names: Sequence[str], inference_mode: bool) -> None:
        self.active_adapters = tuple(dict.fromkeys(names))
        for name, table in self.trainable_tokens_delta.items():
            self._transaction.require_grad(table, name in names and not inference_mode)
        self._choose_running()

    @all_or_nothing
    def enable_adapters(self, enabled: bool) -> None:
        """Whether the active adapters run; disabling also unmerges."""
        self._enabled = as_flag(enabled, f"{type(self).__name__}.enable_adapters", "enabled")
        if not enabled and self.merged:
            self.unmerge()
        self._choose_running()

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are switched off."""
        return not self._enabled

    @property
    def running_adapters(self) -> tuple[str, ...]:
        """The adapters whose rows a forward takes now."""
        return self._running

    def parts(self, adapter_name: str) -> dict[str, nn.Parameter]:
        return {DELTA: self.trainable_tokens_delta[adapter_name]}

    def adapter_parameters(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by their names in this layer."""
        self._check_names([adapter_name])
        return {f"{DELTA}.{adapter_name}": self.trainable_tokens_delta[adapter_name]}

    def frozen_parameters(self, adapter_name: str) -> frozenset[str]:
        """Those of them that never train: none."""
        return frozenset()

    def _choose_running(self) -> None:
        runs = self._enabled and not self.merged_adapters
        self._running = self.active_adapters if runs else ()
        indices = [index for name in self._running for index in self.adapters[name]]
        self._rows = TokenRows.of(indices, self.weight.device) if indices else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._choose_running()  # the weight may be on another device
        return self

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's, where these rows are its weight's."""
        return self.run(self.base_layer, *args, **kwargs)

    def run(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        """The same of any module with this weight."""
        if batching.in_use and follows_plan(self):
            return self._planned_run(base, *args, **kwargs)
        rows = self._rows
        if rows is not None:
            device = base.weight.device  # a replica's (nn.DataParallel) is another
            if rows.rows.device != device:
                rows = TokenRows.of(list(rows.places), device)
            return run(base, rows, self._table(), *args, **kwargs)
        if self.merged_adapters:
            self._check_merged()
        return base(*args, **kwargs)

    def _planned_run(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        """Under a plan of `lora_ext.batch`: the base once, then what has an adapter with its
        rows."""
        plan = current_plan()
        if plan is None or kwargs or len(args) != 1:
            refuse_plan(self, "the module was called with more than its input")
        x: Tensor = args[0]
        plan.note(self.adapters)
        leading = x.shape if isinstance(base, nn.Embedding) else x.shape[:-1]
        assigned = plan.assign(leading, x.device, self.adapters, type(self).__name__, whole=True)
        y: Tensor = base(x)
        flat_x = x.reshape(leading.numel(), *x.shape[len(leading) :])
        flat_y = y.reshape(leading.numel(), y.shape[-1])
        for name, index, factor in assigned.by_name():
            if factor is not None:
                refuse_plan(self, "rows of a weight have no strength (scale)")
            rows = TokenRows.of(self.adapters[name], x.device)
            table = self.trainable_tokens_delta[name]
            made = run(base, rows, table, flat_x.index_select(0, index))
            flat_y = flat_y.index_copy(0, index.long(), made.to(flat_y.dtype))
        return flat_y.view_as(y)

    def _table(self) -> Tensor:
        tables: list[Tensor] = [self.trainable_tokens_delta[name] for name in self._running]
        return tables[0] if len(tables) == 1 else torch.cat(tables)

    def running_weight(self) -> Tensor:
        """The weight with the rows of the adapters that run: a copy, or the base's own."""
        weight: Tensor = self.weight
        return weight if self._rows is None else self._rows.written_into(weight, self._table())

    def _lora_explain(self, tokens: int) -> tuple[str, str]:
        return self.explain_of(self.base_layer)

    def explain_of(self, base: nn.Module) -> tuple[str, str]:
        """(path, reason) of a module with this weight, for `explain`."""
        kind = next(k for k in (nn.Embedding, nn.Linear) if isinstance(base, k))
        plain = f"torch.nn.{kind.__name__}"
        if batching.in_use and follows_plan(self):
            return "composed", "the base once, then what has an adapter once more, with its rows"
        if self._rows is None:
            if self.merged:
                return plain, "merged: the trained rows are in the weight"
            return plain, "no trained row runs: disabled or not active"
        n = len(self._rows.places)
        if reason := reason_to_copy(base):
            return "composed", f"{reason}: it is called with a copy of the weight, {n} rows trained"
        what = "rows" if kind is nn.Embedding else "columns of the result"
        return "composed", f"{n} trained {what} in the place of the base's; no copy of the weight"

    # Merging

    def _merged_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {"base_layer.weight": self.weight}

    def _write_merged(self, names: Sequence[str]) -> None:
        for name in names:
            table = self.trainable_tokens_delta[name].detach().to(self.weight.dtype)
            if not torch.isfinite(table).all():
                raise ValueError(
                    f"{type(self).__name__}.merge: the merged weight would hold NaN or Inf, of "
                    f"'{name}'; nothing changed"
                )
            rows = torch.tensor(self.adapters[name], device=self.weight.device)
            self.weight.detach().index_copy_(0, rows, table)

    @all_or_nothing
    def _merge(self, names: tuple[str, ...], requantize: bool = False) -> None:
        self._check_disjoint(names, "merge")
        super()._merge(names)
        self._hand_on()

    def _put_back(self) -> None:
        super()._put_back()
        self._hand_on()

    def _hand_on(self) -> None:
        """Gives the modules with this weight what a draft has for it now."""
        for layer in self.tied:
            own = layer.base_layer._parameters
            self._transaction.put(own, "weight", self.weight)

    @former_names("get_delta_weight", adapter_name="adapter")
    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter's rows are more than the base's, in the shape of the weight and in
        float32 (float64 for float64)."""
        self._check_names([adapter], "adapter")
        weight = self.unmerged_weight()
        compute = torch.promote_types(weight.dtype, torch.float32)
        delta = torch.zeros_like(weight, dtype=compute)
        rows = torch.tensor(self.adapters[adapter], device=weight.device)
        table = self.trainable_tokens_delta[adapter].to(compute)
        return delta.index_copy_(0, rows, table - weight[rows].to(compute))

    # Checks

    def _check_names(self, names: Iterable[str], argument: str = "adapter_name") -> None:
        check_known(type(self).__name__, argument, names, self.adapters)

    def _check_disjoint(self, names: Sequence[str], where: str) -> None:
        """ValueError where two adapters have the same row."""
        owners: dict[int, str] = {}
        for name in dict.fromkeys(names):
            for index in self.adapters[name]:
                if index in owners:
                    raise ValueError(
                        f"{type(self).__name__}.{where}: '{owners[index]}' and '{name}' both have "
                        f"token {index}, expected adapters without a token of another. Only one "
                        "adapter can be set at a time then: Token indices of adapter "
                        f"{name} are already defined and would result in undefined merging behavior"
                    )
                owners[index] = name

    def _check_not_computed(self, where: str) -> None:
        if "weight" in computed_tensors(self.base_layer):
            raise ValueError(
                f"{where}: the base's weight is computed from other tensors (pruning, "
                "parametrization, weight_norm), expected a plain parameter; make that permanent "
                "first"
            )
