"""A model with a mixture of adapters for each token."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Self

from torch import Tensor, nn

from lora_ext.adapters.activation import activate
from lora_ext.adapters.adapted_model import AdaptedModel, check_model
from lora_ext.adapters.adding import freeze_base
from lora_ext.adapters.checkpoint import load_adapter
from lora_ext.adapters.checkpoint.state_dict import LoadResult
from lora_ext.adapters.classes import also_pefts, for_kind
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.training import is_checkpointing, prepare_model_for_gradient_checkpointing
from lora_ext.adapters.xlora.classifier import XLoraClassifier
from lora_ext.adapters.xlora.config import XLoraConfig, checked_top_k
from lora_ext.adapters.xlora.experts import check_config, check_layers, expert_folders, hidden_size
from lora_ext.adapters.xlora.files import XLoraFiles, has_classifier, local_folder, save_xlora
from lora_ext.adapters.xlora.plans import UniformPlan
from lora_ext.adapters.xlora.routing import RoutedForward, check_routed
from lora_ext.adapters.xlora.scalings import ScaledModel, ScalingsLog
from lora_ext.arguments import as_flag, check_known, names_of
from lora_ext.batching import following
from lora_ext.nn.adapter import DEFAULT, check_adapter_name
from lora_ext.nn.transaction import Transaction


@for_kind("XLORA")
class XLoraModel(ScaledModel):
    """`model` with the adapters of a config in it, put there in place, and a classifier that gives
    each token a mixture of them (X-LoRA). Only the classifier trains, unless the config has
    use_trainable_adapters.

    A call runs the base twice: first without adapters (or all at scaling_pass_value), without
    gradients, for its last hidden state, of which the classifier makes the scalings; then with the
    adapters, whose updates are multiplied by the scalings of their token and layer.

    Args:
        model: of transformers, or one that returns `hidden_states` as these do.
        peft_config: an XLoraConfig, one of PEFT's, or a dict of its fields.
        adapter_name: of the classifier; the adapters have their own names.
        autocast_adapter_dtype: keep adapters in float32 on a bfloat16 or float16 base.
        low_cpu_mem_usage: changes nothing: nothing is allocated twice.
        options: of the hub, for adapters that are there.

    Raises:
        ValueError, TypeError: a field is out of range, or adapters that cannot be mixed (DoRA,
            aLoRA, modules to save, ...), by name. The model is as it was then.
        AdapterFileError: an adapter's files are missing, damaged, or do not fit the model.
    """

    peft_type = "XLORA"

    def __init__(
        self,
        model: nn.Module,
        peft_config: XLoraConfig,
        adapter_name: str = DEFAULT,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **options: Any,
    ) -> None:
        check_model(model)
        as_flag(low_cpu_mem_usage, "XLoraModel", "low_cpu_mem_usage")
        config = XLoraConfig.of(peft_config, "XLoraModel")
        folders = expert_folders(config.adapters, options)
        with self._gone_after_errors(model), Transaction() as transaction:
            self._put_in(model, config, adapter_name, folders, autocast_adapter_dtype, transaction)

    @contextmanager
    def _gone_after_errors(self, model: nn.Module) -> Iterator[None]:
        """What a transaction does not take back is, too."""
        try:
            yield
        except BaseException:
            self._leave(model)
            raise

    def _put_in(
        self,
        model: nn.Module,
        config: XLoraConfig,
        adapter_name: str,
        folders: Mapping[str, Path],
        autocast_adapter_dtype: bool,
        transaction: Transaction,
        *,
        ignore_mismatched_sizes: bool = False,
    ) -> None:
        """Everything but the classifier's values."""
        check_adapter_name(adapter_name, (), "XLoraModel")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise TypeError(
                "XLoraModel: model: got an encoder with a decoder, expected one stack of layers: "
                "tokens of two kinds have no common hidden states"
            )
        size = hidden_size(config, model)
        for name, folder in folders.items():
            check_config(name, LoraConfig.from_pretrained(folder))
        AdaptedModel.__init__(self, model)
        for name, folder in folders.items():
            load_adapter(
                self,
                folder,
                name,
                is_trainable=config.use_trainable_adapters,
                autocast_adapter_dtype=autocast_adapter_dtype,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                transaction=transaction,
            )
        freeze_base(self, transaction)
        activate(self, list(folders), not config.use_trainable_adapters, transaction)
        transaction.commit()
        layers = dict(self.lora_layers())
        check_layers(layers)
        config.hidden_size = size
        config.top_k_lora = config.top_k_lora and checked_top_k(
            config.top_k_lora, config.adapters, "XLoraConfig"
        )
        self.xlora_config = config
        self.adapter_name = adapter_name
        self._places = {layer: place for place, layer in enumerate(layers.values())}
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        self.internal_xlora_classifier = XLoraClassifier(
            config,
            len(folders),
            len(layers),
            list(layers.values())[-1]._adapted_weight().device,
            parameters[0].dtype,
        ).requires_grad_(not config.inference_mode)
        self._scalings = ScalingsLog()
        self._route(model)
        if is_checkpointing(model):
            prepare_model_for_gradient_checkpointing(model)
        self.eval()

    def _route(self, model: nn.Module) -> None:
        """Has all calls of the base go through both passes."""
        self._hooks = [layer.register_forward_pre_hook(check_routed) for layer in self._places]
        self._had_forward = "forward" in vars(model)
        model.forward = RoutedForward(self, model.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the model in it."""
        _refuse_names(kwargs)
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of a model of transformers, with a KV cache for each of the two passes."""
        _refuse_names(kwargs)
        base: Any = self.get_base_model()
        own = vars(self).get("generation_config")
        if own is not None:
            base.generation_config = own
        return base.generate(*args, **kwargs)

    # Files

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        config: XLoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        ignore_mismatched_sizes: bool = False,
        **options: Any,
    ) -> Self:
        """`model` with a classifier and its adapters from a folder, or the hub, that
        `save_pretrained`, PEFT, or the published package `xlora` wrote; frozen unless
        `is_trainable`, and in evaluation mode.

        Args:
            config: instead of the folder's.
            adapters: names and folders of the adapters; None: those in the folder, else where its
                config says they are on this machine.
            key_mapping: not used: a classifier has keys of its own.
            ignore_mismatched_sizes: of the adapters' files, see `LoraModel.load_adapter`.

        Raises:
            AdapterFileError: a file is missing, damaged, or does not fit the model, which is as it
                was then.
        """
        check_model(model)
        where = "XLoraModel.from_pretrained"
        is_trainable = as_flag(is_trainable, where, "is_trainable")
        options |= {"ephemeral_gpu_offload": ephemeral_gpu_offload}
        as_flag(low_cpu_mem_usage, where, "low_cpu_mem_usage")
        folder = local_folder(where, model_id, options, with_experts=adapters is None)
        own = None if config is None else XLoraConfig.of(config, where)
        with XLoraFiles(folder) as files:
            chosen = files.config if own is None else own
            options.pop("subfolder", None)  # of the classifier
            places = files.experts(chosen, adapters, options)
            chosen.adapters = {name: str(place) for name, place in places.items()}
            chosen.inference_mode = not is_trainable
            self = cls.__new__(cls)
            with self._gone_after_errors(model), Transaction() as transaction:
                self._put_in(
                    model,
                    chosen,
                    adapter_name,
                    places,
                    autocast_adapter_dtype,
                    transaction,
                    ignore_mismatched_sizes=ignore_mismatched_sizes,
                )
                files.fill(self.internal_xlora_classifier)
        made: Self = also_pefts(self)
        return made

    def load_adapter(  # type: ignore[override]
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        **options: Any,
    ) -> LoadResult:
        """Gives one of the adapters the values of its folder; or, of a folder with a classifier,
        the classifier its, and the adapters where they train: as a Trainer goes on.

        Args:
            adapter_name: of one of the adapters; for a folder with a classifier, also this model's.
            is_trainable: whether the model stays in the mode that it is in; what trains stays so.
        """
        where = "XLoraModel.load_adapter"
        known = {self.adapter_name: None, **self.peft_config}
        check_known(where, "adapter_name", [adapter_name], list(known))
        folder = local_folder(where, model_id, options)
        if not has_classifier(folder):
            self._check_names([adapter_name])
            return super().load_adapter(folder, adapter_name, is_trainable)
        with XLoraFiles(folder) as files:
            if self.xlora_config.use_trainable_adapters:
                for name, place in files.experts(self.xlora_config, None, {}).items():
                    super().load_adapter(place, name, True)
            files.fill(self.internal_xlora_classifier)
        if not is_trainable:
            self.eval()
        return LoadResult([], [])

    def _explained_in(self) -> AbstractContextManager[None]:
        """What `explain` asks the layers in."""
        return following(UniformPlan(self.active_adapters, 1.0))

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: str | Iterable[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        *,
        layout: str = "peft",
        state_dict: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Writes the classifier, and each adapter into `adapters/NAME`, as one.

        Args:
            safe_serialization: True; pickles are not written.
            selected_adapters: kept for PEFT's sake; all are written, for the classifier knows all.
            layout: "peft": PEFT's files; "xlora": those of the published package.
            state_dict: values to save instead of the model's, by the names of its `state_dict()`.

        Raises:
            ValueError: the layout cannot say what the config has. Nothing is written then.
        """
        where = "XLoraModel.save_pretrained"
        if not as_flag(safe_serialization, where, "safe_serialization"):
            raise ValueError(
                f"{where}: safe_serialization: got False, expected True: a pickle runs code when "
                "it is loaded, so none is written or read"
            )
        if selected_adapters is not None:
            known = {*self.peft_config, self.adapter_name}
            unknown = [n for n in names_of(selected_adapters, where) if n not in known]
            if unknown:
                self._check_names(unknown, "selected_adapters")
        if as_flag(is_main_process, where, "is_main_process"):
            save_xlora(self, Path(save_directory), layout, save_embedding_layers, state_dict)

    # What would be another model

    def set_adapter(self, adapter_name: str | Iterable[str], inference_mode: bool = False) -> None:
        """Nothing changes: all adapters run, each with its scalings, and train or not as
        use_trainable_adapters says.

        Raises:
            ValueError: not all of them are named, nor the classifier.
        """
        names = names_of(adapter_name, "XLoraModel.set_adapter", "adapter_name")
        if names != [self.adapter_name] and set(names) != set(self.peft_config):
            raise ValueError(
                f"XLoraModel.set_adapter: adapter_name: got {names}, expected "
                f"'{self.adapter_name}' or all of {list(self.peft_config)}: X-LoRA mixes all; "
                "LoraModel runs single ones, disable_adapter() is the base"
            )
        as_flag(inference_mode, "XLoraModel.set_adapter", "inference_mode")

    def add_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the classifier is for the adapters that there are."""
        _refuse("add_adapter", "the classifier has a result for each adapter that there is")

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `add_adapter`."""
        _refuse("add_weighted_adapter", "the classifier has a result for each adapter there is")

    def delete_adapter(self, adapter_name: str) -> NoReturn:
        """Refused, as `add_adapter`."""
        _refuse("delete_adapter", "the classifier has a result for each adapter that there is")

    def rename_adapter(self, old: str, new: str) -> NoReturn:
        """Refused: names are the config's."""
        _refuse("rename_adapter", "names are those of the config")

    def merge_adapter(
        self,
        adapter_names: str | Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        requantize: bool = False,
    ) -> NoReturn:
        """Refused: each token has another mixture."""
        _refuse("merge_adapter", "each token has another mixture, and there is one weight")

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `merge_adapter`; `unload()` gives the base."""
        _refuse("merge_and_unload", "each token has another mixture, and there is one weight")

    def unload(self) -> nn.Module:
        """The base model with plain layers."""
        base = super().unload()
        self._leave(base)
        return base

    def _leave(self, model: nn.Module) -> None:
        """Takes forward and hooks off the base."""
        routed = vars(model).get("forward")
        if isinstance(routed, RoutedForward):
            del model.forward
            if self._had_forward:
                model.forward = routed.forward
        for hook in vars(self).get("_hooks", ()):
            hook.remove()


def _refuse(method: str, why: str) -> NoReturn:
    raise ValueError(
        f"XLoraModel.{method}: got a model with X-LoRA, expected a LoraModel: {why}; make another "
        "XLoraModel, or load the adapters into a LoraModel"
    )


def _refuse_names(kwargs: Mapping[str, Any]) -> None:
    for name in ("adapter_names", "adapter_scales", "alora_offsets"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"XLoraModel: {name}: got a value, expected None: X-LoRA chooses the adapters of "
                "each token; a LoraModel takes names"
            )
