"""A LoraModel in transformers' Trainer: checkpoints that hold the adapter alone, training that goes
on from one as if it had never stopped, and a merged model that generates.

    pip install transformers accelerate
    python examples/trainer.py

Takes some ten seconds on two CPU cores and needs no network: the Llama is small and random, and
learns to count. TRL's trainers take a LoraModel in the same place.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor

import lora_ext

WORDS, LENGTH, STEPS = 50, 12, 120


def base_model() -> transformers.LlamaForCausalLM:
    """Always the same one, as a pretrained model would be."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def counting(count: int = 256) -> list[dict[str, Tensor]]:
    """Rows of numbers that count up."""
    start = torch.randint(WORDS, (count, 1), generator=torch.Generator().manual_seed(1))
    rows = (start + torch.arange(LENGTH)) % WORDS
    return [{"input_ids": row, "labels": row} for row in rows]


def adapted() -> lora_ext.LoraModel:
    config = lora_ext.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return lora_ext.get_lora_model(base_model(), config)


def train(folder: Path, resume_from: Path | None = None) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=16,
        learning_rate=1e-2, save_steps=STEPS // 2, logging_steps=STEPS // 4, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=adapted(), args=arguments, train_dataset=counting())
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    return trainer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole_way(Path(folder))


def whole_way(folder: Path) -> None:
    print(f"training for {STEPS} steps; the Trainer tells its losses")
    whole = train(folder / "whole")
    checkpoint = folder / "whole" / f"checkpoint-{STEPS // 2}"
    weights = checkpoint / "adapter_model.safetensors"
    print(
        f"its checkpoint after {STEPS // 2}:", *sorted(path.name for path in checkpoint.iterdir())
    )
    size = sum(p.numel() * p.element_size() for p in base_model().parameters())
    print(f"the adapter has {weights.stat().st_size:,} bytes, the model {size:,}")

    print("\nonce more, from that checkpoint")
    resumed = train(folder / "resumed", checkpoint)
    ends = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in ends)
    print("the end is the same, bit for bit:", same)

    whole.save_model(str(folder / "adapter"))
    loaded = lora_ext.LoraModel.from_pretrained(base_model(), folder / "adapter")
    merged = loaded.merge_and_unload()
    prompt = torch.tensor([[7, 8, 9]])
    written = merged.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    print(
        f"\nloaded and merged, the model goes on after {prompt[0].tolist()}:",
        written[0, 3:].tolist(),
    )


if __name__ == "__main__":
    main()
