"""Modules that are trained and saved whole, a copy for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_ext._offloaded import watch_gradients
from lora_ext.batching import BatchPlan, current_plan
from lora_ext.nn.adapter import check_adapter_name
from lora_ext.nn.adoption import BOUND_CALLS
from lora_ext.nn.transaction import Transaction

# What a plan may divide between copies, row by row.
_ROW_BY_ROW = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Copies(nn.ModuleDict):
    """The copies by adapter name, which may also be that of an attribute ("type", "items")."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):  # "training", say, also where a copy is called so
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)


class ModulesToSave(nn.Module):
    """A module and its copies: the active adapter's runs, the original where none is active.

    What an attribute, an index or a loop finds in it is the running module's, so that a list of
    modules can stand in it, too.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = Copies()
        self.active_adapter: str | None = None
        self.enabled = True
        self.training = original_module.training

    # Each change is one of `transaction`, or of its own if that is None.

    def add_adapter(self, adapter_name: str, transaction: Transaction | None = None) -> nn.Module:
        """Adds a copy of the original module, which is returned."""
        check_adapter_name(adapter_name, list(self.modules_to_save), "modules_to_save")
        added = copy.deepcopy(self.original_module)
        self._change(transaction, {**self.modules_to_save._modules, adapter_name: added})
        return added

    def delete_adapter(self, adapter_name: str, transaction: Transaction | None = None) -> None:
        """Forgets a copy."""
        others = {n: m for n, m in self.modules_to_save._modules.items() if n != adapter_name}
        active = None if self.active_adapter == adapter_name else self.active_adapter
        self._change(transaction, others, active_adapter=active)

    def rename_adapter(self, old: str, new: str, transaction: Transaction | None = None) -> None:
        """Gives a copy another name."""
        copies = {new if n == old else n: m for n, m in self.modules_to_save._modules.items()}
        active = new if self.active_adapter == old else self.active_adapter
        self._change(transaction, copies, active_adapter=active)

    def set_adapter(
        self,
        adapter_name: str | None,
        inference_mode: bool = False,
        transaction: Transaction | None = None,
    ) -> None:
        """Makes one copy run and train; None the original."""
        own = Transaction() if transaction is None else transaction
        for name, module in self.modules_to_save.items():
            for parameter in module.parameters():
                own.require_grad(parameter, name == adapter_name and not inference_mode)
        own.set(self, active_adapter=adapter_name)
        if transaction is None:
            own.commit()

    def _change(
        self,
        transaction: Transaction | None,
        copies: Mapping[str, nn.Module | None],
        **attributes: Any,
    ) -> None:
        own = Transaction() if transaction is None else transaction
        own.set(self.modules_to_save, _modules=copies)
        own.set(self, **attributes)
        if transaction is None:
            own.commit()

    @property
    def active_module(self) -> nn.Module:
        """The module that runs."""
        if self.enabled and self.active_adapter is not None:
            return self.modules_to_save[self.active_adapter]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = current_plan()
        if plan is not None and self.enabled and len(self.modules_to_save):
            return self._planned_forward(plan, *args, **kwargs)
        return self._call(self.active_module, *args, **kwargs)

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        y = module(*args, **kwargs)
        if (module._modules or hasattr(module, "_hf_hook")) and not torch.compiler.is_compiling():
            watch_gradients(module, y)
        return y

    def _planned_forward(self, plan: BatchPlan, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each request by the copy of its adapter, or by the original."""
        original = self.original_module
        where = f"modules_to_save ({type(original).__name__})"
        if not isinstance(original, _ROW_BY_ROW):
            raise TypeError(
                f"{where}: batch: got requests of several adapters, expected those of one. Mixed "
                "batching is only supported for the following modules: "
                f"{', '.join(kind.__name__ for kind in _ROW_BY_ROW)}."
            )
        names = list(self.modules_to_save)
        plan.note(names)
        # A plan of single rows counts all that the module treats one by one.
        by_row = plan.requests is None and isinstance(original, nn.Linear | nn.Embedding)
        leading = x.shape[: x.dim() - isinstance(original, nn.Linear) if by_row else 1]
        rows = plan.assign(leading, x.device, names, where, whole=True)
        flat = x.reshape(-1, *x.shape[len(leading) :])
        rest = torch.ones(len(flat), dtype=torch.bool, device=x.device)
        rest[rows.order.long()] = False
        parts: list[tuple[nn.Module, Tensor]] = [
            (self.modules_to_save[name], index.long()) for name, index, _ in rows.by_name()
        ]
        if rest.any() or not parts:
            parts.append((original, rest.nonzero().flatten()))
        y = torch.cat([self._call(module, flat[index], *args, **kwargs) for module, index in parts])
        y = y[torch.cat([index for _, index in parts]).argsort()]
        return y.reshape(*leading, *y.shape[1:])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save") or name in BOUND_CALLS:
                raise
            return getattr(self.active_module, name)  # such as an embedding's weight

    # Of containers; others say that they are none.

    def __getitem__(self, key: Any) -> Any:
        return cast(Any, self.active_module)[key]

    def __len__(self) -> int:
        return len(cast(Any, self.active_module))

    def __iter__(self) -> Iterator[Any]:
        return iter(cast(Any, self.active_module))

    def __contains__(self, key: object) -> bool:
        return key in cast(Any, self.active_module)

    def __bool__(self) -> bool:
        return bool(self.active_module)
