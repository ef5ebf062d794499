"""A model with LoRA adapters in its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lora_ext.adapters.activation import activate
from lora_ext.adapters.adapted_model import AdaptedModel, check_model
from lora_ext.adapters.adding import add_planned, freeze_base, plan_for, replicate
from lora_ext.adapters.classes import for_task
from lora_ext.adapters.combine import add_weighted_adapter
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.deleting import delete_adapter
from lora_ext.adapters.inject import on_meta
from lora_ext.adapters.mergeable_model import MergeableModel
from lora_ext.adapters.names import unwrapped
from lora_ext.adapters.requests import changes, edits
from lora_ext.adapters.saving import SavableModel
from lora_ext.adapters.status import LayerStatus, ModelStatus, get_layer_status, get_model_status
from lora_ext.adapters.switching import SwitchableModel
from lora_ext.adapters.training import is_checkpointing, prepare_model_for_gradient_checkpointing
from lora_ext.arguments import as_flag, former_names
from lora_ext.nn.adapter import DEFAULT, check_adapter_name
from lora_ext.nn.trainable import count_parameters, print_trainable_parameters
from lora_ext.nn.transaction import Transaction


@for_task(None)
class LoraModel(SwitchableModel, MergeableModel, SavableModel):
    """`model` with adapters in it, put there in place; calls and attributes go through to it.

    Args:
        model: changed in place: the target modules become layers of `lora_ext.nn` with the same
            parameters, which are frozen.
        peft_config: what to adapt and how: a LoraConfig, one of PEFT's, or a dict of its fields.
        adapter_name: of the first adapter, which becomes active.
        autocast_adapter_dtype: keep adapters in float32 on a bfloat16 or float16 base.
        low_cpu_mem_usage: the adapter is on "meta" until `set_peft_model_state_dict` gives it
            values.

    Raises:
        ValueError: nothing matches the config's target_modules, a module that it names is of a kind
            without adapters or has a quantized weight in a layout that is not read, or a setting
            or the name is out of range. The model is as it was then.
        TypeError: an argument is of another kind, `model` has adapters already, or a target's
            weight is no plain floating-point parameter.
    """

    FOLLOWS_TASK: ClassVar[bool] = True

    @former_names("LoraModel", config="peft_config")
    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = DEFAULT,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        check_model(model)
        config = LoraConfig.of(peft_config, "LoraModel")
        AdaptedModel.__init__(self, model)
        with Transaction() as transaction:
            self._add(adapter_name, config, autocast_adapter_dtype, transaction)
            freeze_base(self, transaction)
            activate(self, [adapter_name], config.inference_mode, transaction)
            transaction.commit()
            if as_flag(low_cpu_mem_usage, "LoraModel", "low_cpu_mem_usage"):
                on_meta(self, adapter_name)
        if is_checkpointing(model):
            prepare_model_for_gradient_checkpointing(model)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """See `lora_ext.prepare_model_for_gradient_checkpointing`."""
        return prepare_model_for_gradient_checkpointing(model)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As of a model of transformers, which has the method.

        Raises:
            TypeError: an embedding has adapters, or copies of modules to save: these would keep
                the old vocabulary, or be gone. The model is as it was.
        """
        resize = self.__getattr__("resize_token_embeddings")
        kinds = (self.lora_layers(), self.saved_modules(), self.token_modules())
        held = {id(m): name for modules in kinds for name, m in modules}
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            embedding = getattr(self.get_base_model(), getter, lambda: None)()
            name = isinstance(embedding, nn.Module) and held.get(id(unwrapped(embedding)))
            if name:
                raise TypeError(
                    f"LoraModel.resize_token_embeddings: '{name}' has adapters or copies (modules_"
                    "to_save) of the old size, expected a base without; resize it before it gets "
                    "adapters, or exclude the embeddings"
                )
        return resize(*args, **kwargs)

    # Adapters

    @edits
    @former_names("LoraModel.add_adapter", config="peft_config")
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter; `set_adapter` makes it run. All or nothing: on an error the model is as
        it was.

        Raises: as the class.
        """
        config = LoraConfig.of(peft_config, "LoraModel.add_adapter")
        with Transaction() as transaction:
            self._add(adapter_name, config, autocast_adapter_dtype, transaction)
            if as_flag(low_cpu_mem_usage, "LoraModel.add_adapter", "low_cpu_mem_usage"):
                on_meta(self, adapter_name)

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

    @changes
    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter in every layer; see `lora_ext.adapters.deleting`.

        Raises:
            ValueError: there is none of that name, or it is merged. Nothing is changed then.
        """
        delete_adapter(self, adapter_name)

    @changes
    def rename_adapter(self, old: str, new: str) -> None:
        """Gives an adapter another name in every layer."""
        self._check_names([old], "old")
        check_adapter_name(new, self.peft_config, "LoraModel.rename_adapter", "new")
        transaction = Transaction()
        for _, layer in self.adapter_layers():
            if old in layer.adapters:
                transaction.draft(layer).rename_adapter(old, new)
        for _, module in self.saved_modules():
            if old in module.modules_to_save:
                module.rename_adapter(old, new, transaction)
        transaction.set(
            self,
            peft_config={new if n == old else n: c for n, c in self.peft_config.items()},
            active_adapters=[new if n == old else n for n in self.active_adapters],
            _strengths={new if n == old else n: s for n, s in self._strengths.items()},
        )
        transaction.commit()

    @edits
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Adds an adapter that combines others; see `lora_ext.adapters.combine`.

        Args:
            svd_full_matrices: kept for PEFT's sake: the vectors that it computes more are not used.
        """
        as_flag(svd_full_matrices, "LoraModel.add_weighted_adapter", "svd_full_matrices")
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

    def supports_lora_conversion(self, adapter_name: str = DEFAULT) -> bool:
        """Whether `lora_ext.convert_to_lora` takes an adapter."""
        self._check_names([adapter_name])
        mine = [layer for _, layer in self.adapter_layers() if adapter_name in layer.adapters]
        return bool(mine) and all(layer.supports_lora_conversion(adapter_name) for layer in mine)

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


PeftModel = LoraModel
