"""Which adapters of a model run, train, and how strongly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from lora_ext.adapters.activation import activate, check_held, end_strengths, switched_back
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.merging import of_layer
from lora_ext.adapters.requests import changes
from lora_ext.arguments import as_flag, as_number, former_names, names_of, refuse, warn
from lora_ext.nn.transaction import AtTheEnd, Transaction


class SwitchableModel(AdaptedModel):
    """Choosing, switching off and scaling adapters: part of `LoraModel`."""

    @changes
    @former_names("LoraModel.set_adapter", adapter_names="adapter_name")
    def set_adapter(self, adapter_name: str | Iterable[str], inference_mode: bool = False) -> None:
        """Makes exactly these adapters run, and train unless `inference_mode`; several add up. The
        strengths of the last `set_adapters` end with it; those of `set_scale` stay. Layers that
        are merged are unmerged, with a warning. Biases of the base that configs name (`bias`) train
        with their adapters.

        Raises:
            ValueError: an unknown name, one that no layer has any more (after `unload()`), or
                several adapters of which more than one has copies of modules to save.
        """
        names = names_of(adapter_name, "LoraModel.set_adapter", "adapter_name")
        self._check_names(names)
        check_held(self, "LoraModel.set_adapter", names)
        merged = any(layer.merged for _, layer in self.adapter_layers())
        transaction = Transaction()
        activate(self, names, inference_mode, transaction)
        end_strengths(self, transaction)
        transaction.commit()
        if merged:
            warn(
                "LoraModel.set_adapter: the model was merged, and is no longer; call "
                "merge_adapter() to merge the adapters that are active now"
            )

    @changes
    def enable_adapters(self, enabled: bool = True) -> None:
        """Switches all adapters, and the copies of modules to save, on or off. Off is the base
        model exactly, but for biases of its own that were trained (the config's `bias`); merged
        layers are unmerged for it."""
        enabled = as_flag(enabled, "LoraModel.enable_adapters", "enabled")
        transaction = Transaction()
        for _, layer in self.adapter_layers():
            transaction.draft(layer).enable_adapters(enabled)
        for _, module in self.saved_modules():
            transaction.set(module, enabled=enabled)
        transaction.commit()

    def disable_adapters(self) -> None:
        """`enable_adapters(False)`."""
        self.enable_adapters(False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model is its base."""
        restore = switched_back(self)
        # Ctrl-C may come in restore() itself, and a second one in what makes up for that.
        again = AtTheEnd(restore, only_of_an_error=True)
        with again, again, AtTheEnd(restore):
            self.enable_adapters(False)
            yield

    @changes
    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Makes an adapter's scaling `scale` times that of its config, in every layer, whether it
        runs or not, until this or `set_adapters` with its name is called again: 0 is the same as
        without it."""
        self._check_names([adapter_name])
        check_held(self, "LoraModel.set_scale", [adapter_name])
        scale = as_number(scale, "LoraModel.set_scale", "scale", "a finite number")
        transaction = Transaction()
        for name, layer in self.lora_layers():
            if adapter_name in layer.adapters:
                try:
                    transaction.draft(layer).set_scale(adapter_name, scale)
                except ValueError as error:
                    raise of_layer(error, name) from None
        strengths = {n: s for n, s in self._strengths.items() if n != adapter_name}
        transaction.set(self, _strengths=strengths)
        transaction.commit()

    @changes
    def set_adapters(
        self,
        adapter_names: str | Iterable[str],
        adapter_weights: float | Iterable[float] | None = None,
    ) -> None:
        """Makes exactly these adapters run, at these strengths, in one step: as diffusers' method
        of this name, and llama.cpp's of the whole set. An empty list is the base. They train where
        any adapter did. Strengths belong to the set: what leaves it, here or by `set_adapter`, has
        the scaling of its config again, also where `adapter_names` of a call name it.

        Args:
            adapter_weights: times the scaling of each one's config; one number for all; None is 1.

        Raises:
            ValueError: an unknown name, numbers that are not finite or not as many as names.
                Nothing is changed then.
        """
        where = "LoraModel.set_adapters"
        if isinstance(adapter_names, Mapping):  # whose numbers would not be followed
            expected = "a name or a list of names, and their numbers as adapter_weights"
            refuse(where, "adapter_names", adapter_names, expected)
        names = names_of(adapter_names, where, "adapter_names")
        self._check_names(names, "adapter_names")
        weights = [1.0 if adapter_weights is None else adapter_weights] * len(names)
        if isinstance(adapter_weights, Iterable):
            weights = list(adapter_weights)
        if len(weights) != len(names):
            raise ValueError(
                f"{where}: adapter_weights: got {len(weights)} numbers for {len(names)} adapters, "
                "expected one for each"
            )
        scales = [as_number(w, where, "adapter_weights", "finite numbers") for w in weights]
        check_held(self, where, names)
        transaction = Transaction()
        trains = any(
            parameter.requires_grad
            for _, layer in self.lora_layers()
            for name in layer.adapters
            for parameter in layer.adapter_parameters(name).values()
        )
        activate(self, names, not trains, transaction)
        end_strengths(self, transaction)
        for adapter_name, scale in zip(names, scales, strict=True):
            for name, layer in self.layers_with(adapter_name):
                try:
                    transaction.draft(layer).set_scale(adapter_name, scale)
                except ValueError as error:
                    raise of_layer(error, name) from None
        transaction.set(self, _strengths=dict(zip(names, scales, strict=True)))
        transaction.commit()

    @changes
    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Whether these adapters, and their copies of modules to save, train; which ones run stays
        as it is.

        Raises:
            ValueError: an unknown name. Nothing is changed then.
        """
        where = "LoraModel.set_requires_grad"
        names = names_of(adapter_names, where)
        self._check_names(names, "adapter_names")
        requires_grad = as_flag(requires_grad, where, "requires_grad")
        transaction = Transaction()
        for _, layer in self.adapter_layers():
            mine = [name for name in names if name in layer.adapters]
            transaction.draft(layer).set_requires_grad(mine, requires_grad)
        for _, module in self.saved_modules():
            for name in names:
                if name in module.modules_to_save:
                    for parameter in module.modules_to_save[name].parameters():
                        transaction.require_grad(parameter, requires_grad)
        transaction.commit()

    # PEFT's names

    def enable_adapter_layers(self) -> None:
        """`enable_adapters(True)`."""
        self.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """`enable_adapters(False)`."""
        self.enable_adapters(False)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter runs."""
        return bool(self.active_adapters) and any(
            not layer.disable_adapters for _, layer in self.adapter_layers()
        )
