"""A LoraModel for each task that PEFT has a class for, and which one a model gets.

They name the arguments of their calls, which a Trainer reads to choose columns of a data set, and
hand those that are given on to the model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_ext import blocks
from lora_ext.adapters.classes import also_pefts, class_for, for_task
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.lora_model import LoraModel
from lora_ext.adapters.xlora.config import XLoraConfig, is_xlora
from lora_ext.adapters.xlora.model import XLoraModel
from lora_ext.arguments import as_flag, former_names, warn
from lora_ext.errors import NotBuiltError
from lora_ext.nn.adapter import DEFAULT


class GeneratingModel(LoraModel):
    """For tasks whose models have `generate`."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The base's."""
        base: Any = self.get_base_model()
        return base.prepare_inputs_for_generation(*args, **kwargs)


class LabelledTokensModel(LoraModel):
    """For tasks whose models take tokens and labels."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        return self._with_given(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


@for_task("CAUSAL_LM")
class PeftModelForCausalLM(GeneratingModel, LabelledTokensModel):
    """For `task_type="CAUSAL_LM"`."""


@for_task("SEQ_2_SEQ_LM")
class PeftModelForSeq2SeqLM(GeneratingModel):
    """For `task_type="SEQ_2_SEQ_LM"`."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        decoder_inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        return self._with_given(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


@for_task("SEQ_CLS")
class PeftModelForSequenceClassification(LabelledTokensModel):
    """For `task_type="SEQ_CLS"`: the head is saved whole with each adapter."""


@for_task("TOKEN_CLS")
class PeftModelForTokenClassification(PeftModelForSequenceClassification):
    """For `task_type="TOKEN_CLS"`: the head is saved whole with each adapter."""


@for_task("QUESTION_ANS")
class PeftModelForQuestionAnswering(LoraModel):
    """For `task_type="QUESTION_ANS"`: the head is saved whole with each adapter."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        return self._with_given(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


@for_task("FEATURE_EXTRACTION")
class PeftModelForFeatureExtraction(LoraModel):
    """For `task_type="FEATURE_EXTRACTION"`."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        return self._with_given(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


def get_lora_model(
    model: nn.Module,
    peft_config: LoraConfig | XLoraConfig,
    adapter_name: str = DEFAULT,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    fuse_blocks: bool = False,
) -> LoraModel:
    """Puts adapters into `model`, in place; see `LoraModel`, and `XLoraModel` for an XLoraConfig.
    Also named `get_peft_model`.

    Args:
        revision: of the base model, for the config.
        fuse_blocks: run its blocks as one operator each; see `lora_ext.fuse_blocks`.

    Raises:
        NotBuiltError: `mixed`.
    """
    where = "get_lora_model"
    fuse = as_flag(fuse_blocks, where, "fuse_blocks")
    if as_flag(mixed, where, "mixed"):
        raise NotBuiltError(f"{where}: mixed: got True, which is not built: there is LoRA alone")
    if is_xlora(peft_config):
        mixed_model: Any = XLoraModel(
            model,
            XLoraConfig.of(peft_config, where),
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        _note_base(mixed_model.xlora_config, model, revision)
        if fuse:
            blocks.fuse_or_warn(mixed_model, where)
        return also_pefts(mixed_model)  # type: ignore[no-any-return]
    config = LoraConfig.of(peft_config, where)
    kind = class_for(model, config.task_type) if isinstance(model, nn.Module) else LoraModel
    made: LoraModel = kind(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    _note_base(made.peft_config[adapter_name], model, revision)
    if fuse:
        blocks.fuse_or_warn(made, where)
    return made


get_lora_model = former_names("get_lora_model", config="peft_config")(get_lora_model)
get_peft_model = get_lora_model


def _note_base(config: LoraConfig | XLoraConfig, model: nn.Module, revision: str | None) -> None:
    """Which base it is for, in the model's own config."""
    before, name = config.base_model_name_or_path, vars(model).get("name_or_path") or None
    if before is not None and before != name:
        warn(
            f"get_lora_model: the config's base_model_name_or_path was renamed from '{before}' to "
            f"'{name}'; make sure that it is the right base"
        )
    config.base_model_name_or_path = name
    if revision is not None:
        if config.revision not in (None, revision):
            warn(
                "get_lora_model: peft config has already set base model revision to "
                f"{config.revision}, overwriting with revision {revision}"
            )
        config.revision = revision
