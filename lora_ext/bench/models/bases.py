"""The frozen model under all contenders, its inputs, and the values of the adapters."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.bench.models.cases import ALL_LINEAR, ModelCase
from lora_ext.bench.problem import SCALING

_SEED = 0
_BATCHES = 3  # that the steps take in turn
_Q_V = ("q_proj", "v_proj", "query", "value")


@dataclass(frozen=True)
class Inputs:
    """Embedded tokens, and the token that is right at each place."""

    x: Tensor  # [sequences, tokens, hidden], a leaf that requires grad
    labels: Tensor  # [sequences, tokens]


@dataclass(frozen=True)
class Base:
    """A random model of transformers whose parameters are frozen, and what its adapters are."""

    case: ModelCase
    model: nn.Module
    targets: tuple[str, ...]  # names of the layers that have adapters
    device: torch.device

    @property
    def lora_alpha(self) -> float:
        return SCALING * self.case.rank

    def copy(self) -> nn.Module:
        """Modules of its own over the same parameters: all contenders read the same memory."""
        shared = {id(parameter): parameter for parameter in self.model.parameters()}
        return copy.deepcopy(self.model, shared).train()

    def in_float64(self) -> nn.Module:
        """With norms of torch's: those of transformers compute in float32 always."""
        model = copy.deepcopy(self.model).double().train()
        for name, norm in list(model.named_modules()):
            epsilon = getattr(norm, "variance_epsilon", None)
            if epsilon is not None:
                exact = nn.RMSNorm(norm.weight.shape, epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                model.set_submodule(name, exact)
        return model

    def adapters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """lora_A and lora_B of each target, the same in each call. lora_B is not zero, as it would
        be in the first step: the gradient of lora_A would be zero as well."""
        generator = torch.Generator(self.device).manual_seed(_SEED)
        r = self.case.rank
        for name in self.targets:
            N, K = self.model.get_submodule(name).weight.shape  # type: ignore[misc]
            A = torch.randn(r, K, generator=generator, device=self.device) * K**-0.5
            B = torch.randn(N, r, generator=generator, device=self.device) * r**-0.5
            yield A, B * 0.1

    def inputs(self, shape: tuple[int, int] | None = None) -> list[Inputs]:
        generator = torch.Generator(self.device).manual_seed(_SEED)
        shape = shape or self.case.shape
        model: Any = self.model

        def draw() -> Tensor:
            vocabulary = self.case.sizes.vocabulary
            return torch.randint(vocabulary, shape, generator=generator, device=self.device)

        with torch.no_grad():
            embedded = [model.get_input_embeddings()(draw()) for _ in range(_BATCHES)]
        # Random weights are small, and so would what they embed be: as after training, about 1
        return [Inputs((x / x.std()).requires_grad_(), draw()) for x in embedded]


def make_base(case: ModelCase, device: torch.device) -> Base:
    """Raise ModuleNotFoundError where transformers is not installed, and ValueError where there is
    no model of these sizes."""
    transformers: Any = importlib.import_module("transformers")
    sizes = case.sizes
    common = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": max(case.shape[1], 512),
        "pad_token_id": 0,
        "attn_implementation": "sdpa",
    }
    if sizes.family == "bert":
        # Without its own dropout: the adapters' alone is compared
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config, kind = transformers.BertConfig(**common, **none), transformers.BertForMaskedLM
    else:
        more = {"num_key_value_heads": sizes.kv_heads, "bos_token_id": 1, "eos_token_id": 2}
        config, kind = transformers.LlamaConfig(**common, **more), transformers.LlamaForCausalLM
    before = torch.get_rng_state()
    torch.manual_seed(_SEED)
    with torch.device(device):
        model: Any = kind(config).to(case.torch_dtype).requires_grad_(False).train()
    torch.set_rng_state(before)
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    chosen = linear if case.targets == ALL_LINEAR else [n for n in linear if n.endswith(_Q_V)]
    return Base(case, model, tuple(chosen), device)
