"""TRL's SFTTrainer and DPOTrainer on a LoraModel, beside PEFT's model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import VOCABULARY, llama
from trained_models import losses, models

import lora_ext
import lora_ext.integrations.peft as fused

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    trl = pytest.importorskip("trl", reason="trl is not installed")

STEPS = 20
OVERHEAD = 64 * 1024  # of a checkpoint's weights over the adapter's bytes


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words w0, w1, ... for the tokens of the tiny models."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w3"
    )


def text(first: int, count: int, step: int = 1) -> str:
    return " ".join(f"w{3 + (first + step * i) % (VOCABULARY - 3)}" for i in range(count))


def sft(model: Any, folder: Path, tokenizer: Any, **options: Any) -> Any:
    rows = datasets.Dataset.from_dict({"text": [text(i * 7, 12) for i in range(40)]})
    arguments = trl.SFTConfig(output_dir=str(folder), **of_both(options))
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
    )


def dpo(model: Any, folder: Path, tokenizer: Any, **options: Any) -> Any:
    starts = range(0, 280, 7)
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [text(i, 4) for i in starts],
            "chosen": [" " + text(i + 4, 5) for i in starts],
            "rejected": [" " + text(i + 4, 5, step=3) for i in starts],
        }
    )
    arguments = trl.DPOConfig(output_dir=str(folder), **of_both(options))
    return trl.DPOTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
    )


def of_both(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 4, "max_steps": STEPS, "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "report_to": [], "learning_rate": 1e-2, "seed": 1, "bf16": False,
        "disable_tqdm": True, "gradient_checkpointing": False,
    } | options  # fmt: skip


TRAINERS = pytest.mark.parametrize("make", [sft, dpo], ids=["sft", "dpo"])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@TRAINERS
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_losses_are_those_of_peft(
    make: Any, checkpointing: bool, tokenizer: Any, tmp_path: Path
) -> None:
    found = {}
    for name, model in models().items():
        run = make(model, tmp_path / name, tokenizer, gradient_checkpointing=checkpointing)
        run.train()
        found[name] = losses(run)
    assert len(found["peft"]) == STEPS and found["peft"][0] - found["peft"][-1] > 0.02
    torch.testing.assert_close(found["lora_ext"], found["peft"], rtol=0, atol=1e-5)


@TRAINERS
def test_a_checkpoint_is_the_adapter_and_resumes(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10}
    whole = make(models()["lora_ext"], tmp_path / "whole", tokenizer, **saving)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-10"
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    assert all(".lora_" in name for name in tensors) and not (folder / "model.safetensors").exists()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert weights.stat().st_size <= size + OVERHEAD
    again = make(models()["lora_ext"], tmp_path / "again", tokenizer)
    again.train(resume_from_checkpoint=str(folder))
    assert losses(again)[-10:] == losses(whole)[-10:]
    resumed = dict(again.model.named_parameters())
    assert all(torch.equal(p, resumed[name]) for name, p in whole.model.named_parameters())


def test_the_reference_of_dpo_is_the_base(tokenizer: Any, tmp_path: Path) -> None:
    """Without a model of its own for it, TRL switches the adapters off."""
    model = models()["lora_ext"]
    run = dpo(model, tmp_path, tokenizer, max_steps=5)
    run.train()
    rows = llama()[1]
    with model.disable_adapter():
        base = model(**rows).logits
    torch.testing.assert_close(base, llama()[0](**rows).logits)
    assert not torch.equal(base, model(**rows).logits)


def test_a_head_with_an_adapter_is_refused_as_peft_is(tokenizer: Any, tmp_path: Path) -> None:
    """SFTTrainer multiplies by the head's weight itself: the adapter would not run."""
    for name, model in models(target_modules=["q_proj", "lm_head"]).items():
        with pytest.raises(ValueError, match="adapter"):
            sft(model, tmp_path / name, tokenizer, max_steps=1).train()


def test_a_config_of_lora_ext_as_pefts(tokenizer: Any, tmp_path: Path) -> None:
    config = lora_ext.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    rows = datasets.Dataset.from_dict({"text": [text(i, 12) for i in range(8)]})
    run = trl.SFTTrainer(
        model=llama()[0],
        args=trl.SFTConfig(output_dir=str(tmp_path), **of_both({"max_steps": 2})),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=fused.peft_config(config),
    )
    fused.accelerate(run.model)
    run.train()
    assert all(row.fused for row in fused.report(run.model))
