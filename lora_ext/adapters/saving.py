"""The adapters of a model in files and on the hub, as methods."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lora_ext.adapters.activation import activate
from lora_ext.adapters.adapted_model import AdaptedModel, check_model
from lora_ext.adapters.adding import freeze_base
from lora_ext.adapters.checkpoint import load_adapter, save_pretrained
from lora_ext.adapters.checkpoint.model_card import write_model_card
from lora_ext.adapters.checkpoint.state_dict import LoadResult
from lora_ext.adapters.classes import class_for, class_of_kind
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.training import is_checkpointing, prepare_model_for_gradient_checkpointing
from lora_ext.arguments import as_flag, former_names, names_of, warn
from lora_ext.io.adapter_folder import CONFIG_NAME, read_config_file
from lora_ext.io.hub import adapter_folder, push_folder
from lora_ext.nn.adapter import DEFAULT, check_adapter_name
from lora_ext.nn.sharded import by_first_process
from lora_ext.nn.transaction import Transaction


class SavableModel(AdaptedModel):
    """Loading and saving: part of `LoraModel`."""

    # Whether `from_pretrained` returns the class of the config's task; others return their own.
    FOLLOWS_TASK: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.FOLLOWS_TASK = "FOLLOWS_TASK" in vars(cls)

    @classmethod
    @former_names("LoraModel.from_pretrained", folder="model_id")
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        ignore_mismatched_sizes: bool = False,
        **options: Any,
    ) -> Self:
        """`model` with an adapter from a folder, or the hub, that PEFT or `save_pretrained` wrote,
        active; frozen and in evaluation mode unless `is_trainable`.

        Args:
            model_id: the folder, or an id on the hub of Hugging Face (from its cache, when
                offline).
            config: instead of the folder's; it becomes the model's.
            ephemeral_gpu_offload, low_cpu_mem_usage, key_mapping, ignore_mismatched_sizes, options:
                see `load_adapter`.

        Raises:
            AdapterFileError: a file is missing, damaged, or does not fit the model, which is as it
                was then.
        """
        check_model(model)
        is_trainable = as_flag(is_trainable, "LoraModel.from_pretrained", "is_trainable")
        check_adapter_name(adapter_name, (), "LoraModel.from_pretrained")
        options |= {"ephemeral_gpu_offload": ephemeral_gpu_offload}
        as_flag(low_cpu_mem_usage, "LoraModel.from_pretrained", "low_cpu_mem_usage")
        kind = class_of_kind(_kind_of(model_id, options)) if cls.FOLLOWS_TASK else None
        if kind is not None:
            return kind.from_pretrained(  # type: ignore[no-any-return]
                model,
                model_id,
                adapter_name,
                is_trainable,
                config,
                autocast_adapter_dtype,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                **options,
            )
        folder = adapter_folder("LoraModel.from_pretrained", model_id, options)
        if key_mapping is None:  # of models of transformers that were written anew
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        self = cls.__new__(cls)
        AdaptedModel.__init__(self, model)
        with Transaction() as transaction:
            load_adapter(
                self,
                folder,
                adapter_name,
                is_trainable=is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
                config=config,
                key_mapping=key_mapping,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                transaction=transaction,
            )
            freeze_base(self, transaction)
            activate(self, [adapter_name], not is_trainable, transaction)
            transaction.commit()
        if is_checkpointing(model):
            prepare_model_for_gradient_checkpointing(model)
        if cls.FOLLOWS_TASK:
            self.__class__ = class_for(model, self.peft_config[adapter_name].task_type)
        return self if is_trainable else self.eval()

    @former_names("LoraModel.load_adapter", folder="model_id")
    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        ignore_mismatched_sizes: bool = False,
        **options: Any,
    ) -> LoadResult:
        """Adds an adapter from a folder, or gives one that is there the values of the folder; see
        `lora_ext.adapters.checkpoint.load_adapter`.

        Args:
            torch_device: kept for PEFT's sake: values go to where the layer is.
            ephemeral_gpu_offload: has no effect, which a warning says.
            low_cpu_mem_usage: changes nothing: nothing is allocated twice.
            key_mapping: as in PEFT, regular expressions for keys of the file, without
                "base_model.model.", and what they become.
            ignore_mismatched_sizes: as in PEFT, leaves tensors of other shapes than the model's out
                (a head for other labels, a grown vocabulary, layers of another rank), with a
                warning that names them, instead of refusing the file.
            options: of the hub: subfolder, revision, cache_dir, token, local_files_only, ...

        Returns:
            `missing_keys`: what was left out of the adapter's layers; `unexpected_keys`, empty. A
            file that lacks keys, or has others, is refused.
        """
        check_adapter_name(adapter_name, (), "LoraModel.load_adapter")
        options |= {"ephemeral_gpu_offload": ephemeral_gpu_offload}
        as_flag(low_cpu_mem_usage, "LoraModel.load_adapter", "low_cpu_mem_usage")
        folder = adapter_folder("LoraModel.load_adapter", model_id, options)
        with self.editing():
            left_out = load_adapter(
                self,
                folder,
                adapter_name,
                is_trainable=is_trainable,
                autocast_adapter_dtype=autocast_adapter_dtype,
                key_mapping=key_mapping,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
            )
        if not is_trainable:
            self.eval()
        return LoadResult([key for key in left_out if ".lora_" in key], [])

    @former_names(
        "LoraModel.save_pretrained", folder="save_directory", adapter_names="selected_adapters"
    )
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool | str | Sequence[str] = True,
        selected_adapters: str | Iterable[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        *,
        as_plain_lora: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Writes adapters in PEFT's format, with a model card; see
        `lora_ext.adapters.checkpoint.save_pretrained`.

        Args:
            safe_serialization: True; pickles are not written.
            selected_adapters: all, if None.
            is_main_process: False writes nothing.
            state_dict: values to save instead of the model's, by the names of its `state_dict()`.
        """
        where = "LoraModel.save_pretrained"
        if isinstance(safe_serialization, str | list | tuple):
            warn(f"{where}: adapters are selected_adapters=... now", DeprecationWarning)
            selected_adapters, safe_serialization = safe_serialization, True
        if not as_flag(safe_serialization, where, "safe_serialization"):
            raise ValueError(
                f"{where}: safe_serialization: got False, expected True: a pickle runs code when "
                "it is loaded, so none is written or read"
            )
        if not as_flag(is_main_process, where, "is_main_process"):
            return
        names = selected_adapters
        if names is not None:
            names = names_of(names, where, "selected_adapters")
        save_pretrained(
            self,
            save_directory,
            names,
            save_embedding_layers=save_embedding_layers,
            path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
            as_plain_lora=as_plain_lora,
            state_dict=state_dict,
        )
        card = partial(write_model_card, self, Path(save_directory))
        by_first_process(self, card, "save_pretrained")

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Writes README.md, with what the hub reads of it; the text of one that is there stays."""
        write_model_card(self, Path(output_dir))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """Uploads what `save_pretrained` writes (`options` are its) to the hub of Hugging Face; of
        the base, nothing.

        Args:
            max_shard_size: kept for PEFT's sake: an adapter is one file.
            tags: of the model card, beside its own.

        Raises:
            ImportError: huggingface_hub is not installed.
        """
        where = "LoraModel.push_to_hub"
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            if tags:
                write_model_card(self, Path(folder), names_of(tags, where, "tags"))
            return push_folder(
                folder,
                repo_id,
                commit_message=commit_message or "Upload model",
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


def _kind_of(model_id: Any, options: Mapping[str, Any]) -> object:
    """The peft_type that a folder's config says; None where that cannot be read here, which is said
    when the adapter is loaded."""
    try:
        folder = Path(model_id) / (options.get("subfolder") or "")
        return read_config_file(folder / CONFIG_NAME).get("peft_type")
    except (OSError, TypeError, ValueError):
        return None
