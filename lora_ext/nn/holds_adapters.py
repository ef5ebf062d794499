"""What every layer with adapters does with single ones: lets them train or not, forgets them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lora_ext.arguments import as_flag, names_of, warn
from lora_ext.nn.adapter import DEFAULT, AdapterSettings
from lora_ext.nn.sharded import refuse_fsdp
from lora_ext.nn.transaction import Transaction, all_or_nothing


class HoldsAdapters(nn.Module):
    """The part of a layer that holds named adapters."""

    adapters: dict[str, AdapterSettings]
    active_adapters: tuple[str, ...]
    merged_adapters: tuple[str, ...]
    _transaction: Transaction  # of a draft

    # What a kind of layer says of itself

    def adapter_parameters(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by attribute name."""
        raise NotImplementedError

    def supports_lora_conversion(self, adapter_name: str = DEFAULT) -> bool:
        """Whether `lora_ext.convert_to_lora` takes the adapter: linear layers', as in PEFT."""
        return False

    def frozen_parameters(self, adapter_name: str) -> frozenset[str]:
        """Those of them that never train."""
        raise NotImplementedError

    def _activate(self, names: Sequence[str], inference_mode: bool) -> None:
        """Makes exactly these adapters of a draft active; what is merged stays so."""
        raise NotImplementedError

    def _forget(self, adapter_name: str) -> None:
        """Takes an adapter out of a draft that no longer runs it."""
        raise NotImplementedError

    def _check_names(self, names: Iterable[str], argument: str = "adapter_name") -> None:
        raise NotImplementedError

    def _choose_running(self) -> None:
        raise NotImplementedError

    # Of one adapter, or some

    @all_or_nothing
    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter. If no active one is left of it, the first of the others by name
        becomes active, as in PEFT, with a warning; it trains if the forgotten one did.

        Raises:
            ValueError: there is none of that name, or it is merged.
        """
        self._check_names([adapter_name])
        was_active = adapter_name in self.active_adapters
        trained = any(p.requires_grad for p in self.adapter_parameters(adapter_name).values())
        self._delete_adapter(adapter_name)
        if was_active and not self.active_adapters and self.adapters:
            following = min(self.adapters)
            warn(deleted_text(type(self).__name__, adapter_name, following))
            self._activate([following], not trained)

    def _delete_adapter(self, adapter_name: str) -> None:
        """The same, but that no other becomes active: a model chooses one for all layers."""
        where = f"{type(self).__name__}.delete_adapter"
        refuse_fsdp(self, where, "delete it, then call fully_shard, or switch it off (set_adapter)")
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"{where}: adapter_name: '{adapter_name}' is merged; call unmerge() first"
            )
        self._forget(adapter_name)
        self.active_adapters = tuple(n for n in self.active_adapters if n != adapter_name)
        self._choose_running()

    @all_or_nothing
    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Whether these adapters train; which ones run stays as it is."""
        where = f"{type(self).__name__}.set_requires_grad"
        names = names_of(adapter_names, where)
        self._check_names(names, "adapter_names")
        requires_grad = as_flag(requires_grad, where, "requires_grad")
        for name in names:
            frozen = self.frozen_parameters(name)
            for key, parameter in self.adapter_parameters(name).items():
                self._transaction.require_grad(parameter, requires_grad and key not in frozen)


def deleted_text(where: str, adapter_name: str, following: str) -> str:
    """The warning about what is active after a deletion."""
    return (
        f"{where}.delete_adapter: Adapter {adapter_name} was active which is now deleted. Setting "
        f"active adapter to {following}."
    )
