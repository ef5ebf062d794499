"""PEFT's `AutoPeftModel`s: the base that an adapter's config names, with the adapter."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lora_ext.adapters.classes import also_pefts, class_of_kind
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.lora_model import LoraModel
from lora_ext.adapters.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from lora_ext.adapters.xlora.config import XLoraConfig
from lora_ext.arguments import as_path, names_of
from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_folder import CONFIG_NAME, read_config_file
from lora_ext.io.hub import OPTIONS, adapter_folder, downloaded, is_hub_id

TOKENIZER = "tokenizer_config.json"
# Packages that a file may name to be imported: PEFT's list.
ALLOWED = ("diffusers", "lerobot", "megatron-core", "transformers")
# What only the adapter's loading takes, and what the base's does, too; all else is the base's.
_OF_THE_ADAPTER = {"subfolder", "autocast_adapter_dtype", "ephemeral_gpu_offload", "adapters"}
_OF_BOTH = {"key_mapping", "ignore_mismatched_sizes", *OPTIONS} - _OF_THE_ADAPTER


class AutoPeftModel:
    """For adapters whose config names no task: its `auto_mapping` says the base's class."""

    TASK: ClassVar[str | None] = None
    BASE: ClassVar[str | None] = None  # transformers' class that finds the base's
    MODEL: ClassVar[type[LoraModel]] = LoraModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name}: is not made itself; call {name}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | XLoraConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> LoraModel:
        """The base that an adapter's config names (`base_model_name_or_path`, `revision`), from its
        folder or the hub, with the adapter. Where the adapter's folder has a tokenizer of more
        tokens than the base has embeddings, these are resized first, as PEFT does it.

        Args:
            pretrained_model_name_or_path: the adapter's folder, or its id on the hub.
            adapter_name, is_trainable, config: as of `LoraModel.from_pretrained`.
            revision: of the adapter on the hub.
            import_allowlist: the packages that `auto_mapping` may name, as it says what to import;
                None: those that PEFT allows (transformers, diffusers, lerobot, megatron-core).
            kwargs: of the base's `from_pretrained` (dtype, device_map, quantization_config, ...),
                of the hub, and of `LoraModel.from_pretrained`; each goes where it is known.

        Raises:
            ValueError: the config names no base, another task than this class is for, no class that
                can be loaded, or a package that is not allowed. Nothing is loaded then.
            AdapterFileError: see `LoraModel.from_pretrained`.
            ImportError: transformers is not installed.
        """
        where = f"{cls.__name__}.from_pretrained"
        name = as_path(pretrained_model_name_or_path, where, "pretrained_model_name_or_path")
        of_adapter = {k: v for k, v in kwargs.items() if k in _OF_THE_ADAPTER | _OF_BOTH}
        of_base = {k: v for k, v in kwargs.items() if k not in _OF_THE_ADAPTER}
        allowed = (
            ALLOWED
            if import_allowlist is None
            else names_of(import_allowlist, where, "import_allowlist")
        )
        hub = {k: v for k, v in of_adapter.items() if k in OPTIONS} | {"revision": revision}
        hub.pop("ignore_mismatched_sizes", None)
        folder = adapter_folder(where, pretrained_model_name_or_path, hub)
        kind = class_of_kind(read_config_file(folder / CONFIG_NAME).get("peft_type"))
        said = (LoraConfig if kind is None else XLoraConfig).from_pretrained(folder)
        base_class = cls._base_class(where, said, allowed)
        base_name = said.base_model_name_or_path
        if not base_name:
            raise ValueError(
                f"{where}: {folder / CONFIG_NAME}: base_model_name_or_path: got {base_name!r}, "
                "expected the base's folder or id; load the base yourself, then "
                "PeftModel.from_pretrained(base, folder)"
            )
        base = base_class.from_pretrained(base_name, revision=said.revision, **of_base)
        tokenizer = _tokenizer_place(name, hub)
        if tokenizer is not None and hasattr(base, "get_input_embeddings"):
            _resize(base, tokenizer, revision, kwargs)
        made: Any = kind or cls.MODEL
        model: Any = made.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name,
            is_trainable,
            config,
            **of_adapter | {"revision": revision},
        )
        return also_pefts(model)  # type: ignore[no-any-return]

    @classmethod
    def _base_class(cls, where: str, said: LoraConfig | XLoraConfig, allowed: Sequence[str]) -> Any:
        """The class whose `from_pretrained` makes the base."""
        task, mapping = said.task_type, said.auto_mapping
        if task is not None and task != cls.TASK:
            known = {kind.TASK: kind.__name__ for kind in AutoPeftModel.__subclasses__()}
            other = known.get(task)
            raise ValueError(
                f"{where}: task_type: got {task!r} in the adapter's config, expected "
                f"{cls.TASK!r}" + (f"; use {other}" if other else "")
            )
        if task is not None:
            return getattr(importlib.import_module("transformers"), str(cls.BASE))
        if mapping is None:
            raise ValueError(
                f"{where}: task_type and auto_mapping: got neither in the adapter's config, so "
                "that the base's class is not known; load the base yourself, then "
                "PeftModel.from_pretrained(base, folder)"
            )
        library, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if not isinstance(library, str) or not isinstance(name, str):
            raise ValueError(
                f"{where}: auto_mapping: got {str(mapping)[:200]}, expected texts in "
                "parent_library and base_model_class"
            )
        if not any(f"{library}.".startswith(f"{one}.") for one in allowed):
            raise ValueError(
                f"{where}: auto_mapping: wants to import '{library[:200]}', which is not in the "
                f"import allowlist {list(allowed)}; if it is safe, say import_allowlist=[...]"
            )
        found = getattr(importlib.import_module(library), name, None)
        if not (isinstance(found, type) and hasattr(found, "from_pretrained")):
            raise ValueError(
                f"{where}: auto_mapping: '{library[:200]}' has no class '{name[:200]}' with "
                "from_pretrained"
            )
        return found


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For `task_type="CAUSAL_LM"`, and for adapters without a task."""

    TASK, BASE, MODEL = "CAUSAL_LM", "AutoModelForCausalLM", PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For `task_type="SEQ_2_SEQ_LM"`, and for adapters without a task."""

    TASK, BASE, MODEL = "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For `task_type="SEQ_CLS"`, and for adapters without a task."""

    TASK, BASE = "SEQ_CLS", "AutoModelForSequenceClassification"
    MODEL = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For `task_type="TOKEN_CLS"`, and for adapters without a task."""

    TASK, BASE = "TOKEN_CLS", "AutoModelForTokenClassification"
    MODEL = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For `task_type="QUESTION_ANS"`, and for adapters without a task."""

    TASK, BASE = "QUESTION_ANS", "AutoModelForQuestionAnswering"
    MODEL = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For `task_type="FEATURE_EXTRACTION"`, and for adapters without a task."""

    TASK, BASE, MODEL = "FEATURE_EXTRACTION", "AutoModel", PeftModelForFeatureExtraction


def _tokenizer_place(name: Path, hub: Mapping[str, Any]) -> str | None:
    """The folder, or the id, of the adapter's tokenizer; None if there is none."""
    if name.is_dir() or not is_hub_id(str(name)):
        return str(name) if (name / TOKENIZER).is_file() else None
    options = {key: value for key, value in hub.items() if key != "subfolder"}
    try:
        (found,) = downloaded(str(name), (TOKENIZER,), options)
    except AdapterFileError:
        return None
    # Of a cache alone nobody can tell which files the repository has not.
    return str(found.parent if options.get("local_files_only") else name)


def _resize(base: nn.Module, place: str, revision: str | None, kwargs: Mapping[str, Any]) -> None:
    """Gives the base an embedding for each token of the adapter's tokenizer."""
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(
        place,
        revision=revision,
        cache_dir=kwargs.get("cache_dir"),
        token=kwargs.get("token", kwargs.get("use_auth_token")),
        trust_remote_code=kwargs.get("trust_remote_code", False),
    )
    model: Any = base
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
