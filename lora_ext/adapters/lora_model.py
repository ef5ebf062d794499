"""A model with LoRA adapters in its layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lora_ext.adapters.activation import activate, check_held, switched_back
from lora_ext.adapters.adapted_model import AdaptedModel, check_model
from lora_ext.adapters.adding import add_planned, freeze_base, plan_for, replicate
from lora_ext.adapters.checkpoint import load_adapter, save_pretrained
from lora_ext.adapters.combine import add_weighted_adapter
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.merging import merge_layers, of_layer, unmerge_layers, untied_text
from lora_ext.adapters.names import unwrapped
from lora_ext.adapters.status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from lora_ext.adapters.swap import swap_modules
from lora_ext.adapters.ties import untie_embeddings
from lora_ext.arguments import as_flag, as_number, names_of, warn
from lora_ext.errors import NotMergedError
from lora_ext.nn.adapter import DEFAULT, check_adapter_name
from lora_ext.nn.trainable import count_parameters, print_trainable_parameters
from lora_ext.nn.transaction import AtTheEnd, Transaction


class LoraModel(AdaptedModel):
    """`model` with adapters in it, put there in place; calls and attributes go through to it.

    Args:
        model: changed in place: the target modules become layers of `lora_ext.nn` with the same
            parameters, which are frozen.
        config: what to adapt and how: a LoraConfig, one of PEFT's, or a dict of its fields.
        adapter_name: of the first adapter, which becomes active.
        autocast_adapter_dtype: keep adapters in float32 on a bfloat16 or float16 base.

    Raises:
        ValueError: nothing matches `config.target_modules`, a module that it names is of a kind
            without adapters, or a setting or the name is out of range. The model is as it was then.
        TypeError: an argument is of another kind, `model` has adapters already, or a target's
            weight is no plain floating-point parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str = DEFAULT,
        *,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        check_model(model)
        config = LoraConfig.of(config, "LoraModel")
        super().__init__(model)
        with Transaction() as transaction:
            self._add(adapter_name, config, autocast_adapter_dtype, transaction)
            freeze_base(self, transaction)
            activate(self, [adapter_name], config.inference_mode, transaction)
            transaction.commit()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        adapter_name: str = DEFAULT,
        *,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> Self:
        """`model` with an adapter from a folder that PEFT or `save_pretrained` wrote, active;
        frozen and in evaluation mode unless `is_trainable`.

        Raises:
            AdapterFileError: a file is missing, damaged, or does not fit the model, which is as it
                was then.
        """
        check_model(model)
        self = cls.__new__(cls)
        AdaptedModel.__init__(self, model)
        with Transaction() as transaction:
            load_adapter(
                self,
                folder,
                adapter_name,
                is_trainable=is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
                transaction=transaction,
            )
            freeze_base(self, transaction)
            activate(self, [adapter_name], not is_trainable, transaction)
            transaction.commit()
        return self if is_trainable else self.eval()

    def load_adapter(
        self,
        folder: str | Path,
        adapter_name: str,
        *,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter from a folder; see `lora_ext.adapters.checkpoint.load_adapter`."""
        load_adapter(
            self,
            folder,
            adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def save_pretrained(
        self,
        folder: str | Path,
        adapter_names: str | list[str] | None = None,
        *,
        save_embedding_layers: bool | str = "auto",
        path_initial_model_for_weight_conversion: str | Path | None = None,
        as_plain_lora: bool = False,
    ) -> None:
        """Writes adapters in PEFT's format; see `lora_ext.adapters.checkpoint.save_pretrained`."""
        save_pretrained(
            self,
            folder,
            adapter_names,
            save_embedding_layers=save_embedding_layers,
            path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
            as_plain_lora=as_plain_lora,
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As of a model of transformers, which has the method.

        Raises:
            TypeError: an embedding has adapters, or copies of modules to save: these would keep
                the old vocabulary, or be gone. The model is as it was.
        """
        resize = self.__getattr__("resize_token_embeddings")
        held = {id(m): name for ms in (self.lora_layers(), self.saved_modules()) for name, m in ms}
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            embedding = getattr(self.base_model, getter, lambda: None)()
            name = isinstance(embedding, nn.Module) and held.get(id(unwrapped(embedding)))
            if name:
                raise TypeError(
                    f"LoraModel.resize_token_embeddings: '{name}' has adapters or copies (modules_"
                    "to_save) of the old size, expected a base without; resize it before it gets "
                    "adapters, or exclude the embeddings"
                )
        return resize(*args, **kwargs)

    # Adapters

    def add_adapter(
        self, adapter_name: str, config: LoraConfig, *, autocast_adapter_dtype: bool = True
    ) -> None:
        """Adds an adapter; `set_adapter` makes it run. All or nothing: on an error the model is as
        it was.

        Raises: as the class.
        """
        config = LoraConfig.of(config, "LoraModel.add_adapter")
        with Transaction() as transaction:
            self._add(adapter_name, config, autocast_adapter_dtype, transaction)

    def _add(
        self,
        adapter_name: str,
        config: LoraConfig,
        autocast_adapter_dtype: bool,
        transaction: Transaction,
    ) -> None:
        check_adapter_name(adapter_name, self.peft_config, "LoraModel.add_adapter")
        replicate(self, config, transaction)
        plan = plan_for(self, config, autocast_adapter_dtype)
        add_planned(self, adapter_name, plan, transaction)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter in every layer. If no active one is left, the first of the others
        becomes active.

        Raises:
            ValueError: there is none of that name, or it is merged. Nothing is changed then.
        """
        self._check_names([adapter_name])
        for name, layer in self.lora_layers():
            if adapter_name in layer.merged_adapters:
                raise ValueError(
                    f"LoraModel.delete_adapter: adapter_name: '{adapter_name}' is merged in "
                    f"'{name}'; call unmerge_adapter() first"
                )
        active = [name for name in self.active_adapters if name != adapter_name]
        trained = False
        with Transaction() as transaction:
            for _, layer in self.lora_layers():
                if adapter_name in layer.adapters:
                    parameters = layer.adapter_parameters(adapter_name).values()
                    trained = trained or any(p.requires_grad for p in parameters)
                    transaction.draft(layer).delete_adapter(adapter_name)
            for _, module in self.saved_modules():
                if adapter_name in module.modules_to_save:
                    module.delete_adapter(adapter_name, transaction)
            others = {name: c for name, c in self.peft_config.items() if name != adapter_name}
            transaction.set(self, peft_config=others, active_adapters=tuple(active))
            transaction.commit()
            if not active:
                activate(self, list(others)[:1], not trained, transaction)
                transaction.commit()

    def rename_adapter(self, old: str, new: str) -> None:
        """Gives an adapter another name in every layer."""
        self._check_names([old], "old")
        check_adapter_name(new, self.peft_config, "LoraModel.rename_adapter", "new")
        transaction = Transaction()
        for _, layer in self.lora_layers():
            if old in layer.adapters:
                transaction.draft(layer).rename_adapter(old, new)
        for _, module in self.saved_modules():
            if old in module.modules_to_save:
                module.rename_adapter(old, new, transaction)
        transaction.set(
            self,
            peft_config={new if n == old else n: c for n, c in self.peft_config.items()},
            active_adapters=tuple(new if n == old else n for n in self.active_adapters),
        )
        transaction.commit()

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Makes exactly these adapters run, and train unless `inference_mode`; several add up.
        Layers that are merged are unmerged, with a warning. Biases of the base that configs name
        (`bias`) train with their adapters.

        Raises:
            ValueError: an unknown name, one that no layer has any more (after `unload()`), or
                several adapters of which more than one has copies of modules to save.
        """
        names = names_of(adapter_names, "LoraModel.set_adapter")
        self._check_names(names)
        check_held(self, "LoraModel.set_adapter", names)
        merged = any(layer.merged for _, layer in self.lora_layers())
        transaction = Transaction()
        activate(self, names, inference_mode, transaction)
        transaction.commit()
        if merged:
            warn(
                "LoraModel.set_adapter: the model was merged, and is no longer; call "
                "merge_adapter() to merge the adapters that are active now"
            )

    @property
    def active_adapter(self) -> str:
        """The first active adapter.

        Raises:
            ValueError: none is.
        """
        if not self.active_adapters:
            raise ValueError(
                f"LoraModel.active_adapter: no adapter is active, expected one of "
                f"{list(self.peft_config)}; call set_adapter(), or see active_adapters"
            )
        return self.active_adapters[0]

    def enable_adapters(self, enabled: bool = True) -> None:
        """Switches all adapters, and the copies of modules to save, on or off. Off is the base
        model exactly, but for biases of its own that were trained (the config's `bias`); merged
        layers are unmerged for it."""
        enabled = as_flag(enabled, "LoraModel.enable_adapters", "enabled")
        transaction = Transaction()
        for _, layer in self.lora_layers():
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

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Makes an adapter's scaling `scale` times that of its config, in every layer: 0 is the
        same as without it."""
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
        transaction.commit()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        *,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        generator: torch.Generator | None = None,
    ) -> None:
        """Adds an adapter that combines others; see `lora_ext.adapters.combine`."""
        add_weighted_adapter(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank=svd_rank,
            svd_clamp=svd_clamp,
            svd_driver=svd_driver,
            density=density,
            majority_sign_method=majority_sign_method,
            generator=generator,
        )

    # Merging

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Adds adapters (the active ones, if None) to the weights, in all layers or in none; see
        `lora_ext.nn.Linear`. `unmerge_adapter` gives back the base bit for bit.

        Layers whose weight is also another module's (tied embeddings, `layer_replication`) have one
        of their own meanwhile, which takes memory for each; a warning names them.
        """
        if adapter_names is not None:
            adapter_names = names_of(adapter_names, "LoraModel.merge_adapter")
            self._check_names(adapter_names)
        transaction = Transaction()
        layers = list(self.lora_layers())
        untied = merge_layers(self.base_model, layers, transaction, adapter_names)
        transaction.commit()
        if untied:
            warn(untied_text(untied, "until unmerge_adapter()"))

    def unmerge_adapter(self) -> None:
        """Gives the base's weights their places in all merged layers again.

        Raises:
            NotMergedError: no layer is merged.
        """
        transaction = Transaction()
        if not unmerge_layers(list(self.lora_layers()), transaction):
            raise NotMergedError("unmerge: no layer is merged; call merge_adapter() first")
        transaction.commit()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: str | Sequence[str] | None = None,
    ) -> nn.Module:
        """The base model with the adapters in its weights and plain layers.

        Layers whose weight was also another module's (tied embeddings, `layer_replication`) have
        one of their own then; a warning names them. If that unties the embeddings of a model of
        transformers, its config's `tie_word_embeddings` becomes False, but for the T5 family, which
        computes something else then.

        Args:
            progressbar: show one.
            safe_merge: kept for PEFT's sake; NaN and Inf are always refused, and on any error the
                model is as it was.
            adapter_names: the active ones, if None.
        """
        if adapter_names is not None:
            adapter_names = names_of(adapter_names, "LoraModel.merge_and_unload")
            self._check_names(adapter_names)
        with Transaction() as transaction:
            untied = merge_layers(
                self.base_model,
                list(self.lora_layers()),
                transaction,
                adapter_names,
                alone=True,
                progressbar=progressbar,
            )
            transaction.commit()
            texts = [untied_text(untied, "for good")] if untied else []
            texts += self._unload(transaction)
        if texts:
            warn("; ".join(texts))
        return self.base_model

    def unload(self) -> nn.Module:
        """The base model with plain layers: without the adapters, or with what is merged. Modules
        to save are the active adapter's. As for `merge_and_unload`, the config of a model of
        transformers says so, and a warning does, if its embeddings are no longer tied."""
        with Transaction() as transaction:
            texts = self._unload(transaction)
        for text in texts:
            warn(text)
        return self.base_model

    def _unload(self, transaction: Transaction) -> list[str]:
        """Makes layers and config plain; what to warn of, if anything."""
        plain: dict[int, nn.Module] = {}
        for _, layer in self.lora_layers():
            plain[id(layer)] = layer.get_base_layer()
        for _, module in self.saved_modules():
            plain[id(module)] = module.active_module
        swap_modules(self.base_model, plain, transaction)
        transaction.commit()
        if untie_embeddings(self.base_model, transaction):
            return ["the config's tie_word_embeddings is False now, as the weights differ"]
        return []

    # Reports

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints the number of trainable parameters, of all parameters, and the share."""
        print_trainable_parameters(self)

    def get_layer_status(self) -> list[LayerStatus]:
        """The state of each layer that has adapters."""
        return get_layer_status(self)

    def get_model_status(self) -> ModelStatus:
        """The state of the model, "irregular" where its layers differ."""
        return get_model_status(self)


def get_lora_model(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str = DEFAULT,
    *,
    autocast_adapter_dtype: bool = True,
) -> LoraModel:
    """Puts adapters into `model`, in place; see `LoraModel`. Also named `get_peft_model`."""
    return LoraModel(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


get_peft_model = get_lora_model
