"""transformers' Trainer on a LoraModel, beside PEFT's model: losses, what a checkpoint holds,
resuming, gradient checkpointing, accumulation, bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import llama
from trained_models import STEPS, CountingUp, losses, models
from transformers import Trainer, TrainingArguments

import lora_ext

OVERHEAD = 64 * 1024  # of a checkpoint's weights over the adapter's bytes


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    options = {
        "per_device_train_batch_size": 4, "max_steps": STEPS, "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "report_to": [], "learning_rate": 1e-2, "seed": 1,
        "disable_tqdm": True,
    } | options  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **options)
    rows, held_out = CountingUp(), CountingUp(8, seed=2)
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=held_out)


def trained_losses(folder: Path, **options: Any) -> dict[str, list[float]]:
    found = {}
    for name, model in models().items():
        run = trainer(model, folder / name, **options)
        run.train()
        found[name] = losses(run)
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "reentrant gradient checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 3, "max_steps": 12},
    "label smoothing": {"label_smoothing_factor": 0.1, "max_steps": 12},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses_are_those_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    found = trained_losses(tmp_path, **options)
    assert len(found["peft"]) == options.get("max_steps", STEPS)
    assert found["peft"][0] - found["peft"][-1] > 0.05  # it learns
    torch.testing.assert_close(found["lora_ext"], found["peft"], rtol=0, atol=1e-5)


def test_bf16(tmp_path: Path) -> None:
    found = trained_losses(tmp_path, bf16=True, max_steps=20)
    assert found["peft"][0] - found["peft"][-1] > 0.02
    # One rounding of bf16 in logits of about 1, some tens of steps on.
    torch.testing.assert_close(found["lora_ext"], found["peft"], rtol=0, atol=2**-8)


def test_columns_and_eval_loss(tmp_path: Path) -> None:
    for name, model in models().items():
        run = trainer(model, tmp_path / name, max_steps=1)
        run._set_signature_columns_if_needed()
        assert {"input_ids", "labels", "attention_mask"} <= set(run._signature_columns)
        assert run.evaluate()["eval_loss"] > 0, name


def test_a_checkpoint_is_the_adapter_and_resuming_goes_on_as_if_nothing_had_been(
    tmp_path: Path,
) -> None:
    def made() -> Any:
        return models(lora_dropout=0.2)["lora_ext"]

    whole = trainer(made(), tmp_path / "whole", save_strategy="steps", save_steps=20)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-20"
    weights = [path for path in folder.iterdir() if "model" in path.name and path.suffix != ".json"]
    assert [path.name for path in weights] == ["adapter_model.safetensors"]
    tensors = load_file(weights[0])
    assert all(".lora_" in name for name in tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert weights[0].stat().st_size <= size + OVERHEAD
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    again = trainer(made(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(folder))
    assert losses(again)[-(STEPS - 20) :] == losses(whole)[20:]
    resumed = dict(again.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed[name]), name
    peft.PeftModel.from_pretrained(llama()[0], folder)  # PEFT's, too


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    for name, model in models().items():
        run = trainer(
            model, tmp_path / name, max_steps=6, save_strategy="steps", save_steps=2,
            eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
            metric_for_best_model="eval_loss", greater_is_better=True,  # the first
        )  # fmt: skip
        run.train()
        best = load_file(tmp_path / name / "checkpoint-2" / "adapter_model.safetensors")
        ends = (peft if name == "peft" else lora_ext).get_peft_model_state_dict(model)
        assert best.keys() == ends.keys() and len(best) > 10
        assert all(torch.equal(ends[key], value) for key, value in best.items()), name


def test_a_saved_model_is_the_adapter(tmp_path: Path) -> None:
    run = trainer(models()["lora_ext"], tmp_path / "run", max_steps=2)
    run.train()
    run.save_model(str(tmp_path / "end"))
    names = {path.name for path in (tmp_path / "end").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    model = lora_ext.LoraModel.from_pretrained(llama()[0], tmp_path / "end")
    want = run.model.eval()(**llama()[1]).logits
    torch.testing.assert_close(model(**llama()[1]).logits, want)
