"""What test_trainer.py and test_trl.py train: the same adapter in PEFT's model and in ours."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from tiny_models import VOCABULARY, llama

import lora_ext

STEPS = 50
FIELDS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


class CountingUp(torch.utils.data.Dataset):
    """Sequences of tokens that count up, which can be learnt."""

    def __init__(self, count: int = 40, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(0, VOCABULARY, (count, 1), generator=generator)
        self.tokens = (first + torch.arange(9)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.tokens[i]
        return {"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)}


def models(**fields: Any) -> dict[str, Any]:
    """PEFT's model and one of ours, with the same base and the same adapter."""
    base = llama()[0].train()
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**FIELDS | fields))
    ours: Any = lora_ext.get_peft_model(copy.deepcopy(base), lora_ext.LoraConfig(**FIELDS | fields))
    lora_ext.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return {"peft": theirs, "lora_ext": ours}


def losses(trained: Any) -> list[float]:
    return [row["loss"] for row in trained.state.log_history if "loss" in row]
