"""Seeded cases for test_peft_fuzz.py: a small model, and configs over all fields that PEFT and
lora_ext have in common."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Fields = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of model, and what configs can name in it."""

    build: Callable[[], tuple[nn.Module, dict[str, Tensor]]]
    targets: tuple[str, ...]
    saved: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    layers: int = 0  # how many, if they can be chosen by number
    layers_pattern: str = "layers"
    replicable: bool = False
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """What one seed says."""

    seed: int
    kind: str
    dtype: torch.dtype
    autocast_adapter_dtype: bool
    configs: dict[str, Fields]  # by the name of the adapter
    combination: tuple[str, list[float]] | None
    save_embedding_layers: bool | str
    fields: Fields = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", next(iter(self.configs.values())))

    def model(self) -> tuple[nn.Module, dict[str, Tensor]]:
        model, inputs = _built(self.kind)
        model = copy.deepcopy(model).to(self.dtype).eval()
        return model, {
            name: x.to(self.dtype) if x.is_floating_point() else x for name, x in inputs.items()
        }


class Calls(nn.Module):
    """Calls its children in turn."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 10), nn.Linear(10, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.down(torch.tanh(self.up(x))))
        return y


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 6, bias=False)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


class Words(nn.Module):
    """An embedding, a projection, and an output that may share the embedding's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed_tokens, self.proj = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 11, bias=not tied)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lm_head(torch.tanh(self.proj(self.embed_tokens(x))))
        return y


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.attn(x, x, x, need_weights=False)[0])
        return y


class Shares(nn.Module):
    """Two modules with one weight, and a module that may have two names."""

    def __init__(self, two_names: bool) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.again = self.one if two_names else nn.Linear(5, 5)
        self.three.weight = self.two.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.three(torch.tanh(self.two(self.again(torch.tanh(self.one(x))))))
        return y


class Stack(nn.Module):
    """Three experts, of which each row takes all."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        up, down = (3, 5, 7), (3, 7, 5)
        self.is_transposed = is_transposed
        self.up_proj = nn.Parameter(torch.randn(up if is_transposed else (3, 7, 5)) / 3)
        self.down_proj = nn.Parameter(torch.randn(down if is_transposed else (3, 5, 7)) / 3)
        self.mix = nn.Parameter(torch.randn(5, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.mT, down.mT
        return x @ self.mix.T + (torch.tanh(x @ up) @ down).sum(0)


class Stacks(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Stack(is_transposed) for _ in range(2))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


def _rows(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(*shape)}


def _convolutions(dimensions: int, groups: int) -> Callable[[], tuple[nn.Module, Any]]:
    conv: Any = getattr(nn, f"Conv{dimensions}d")

    def build() -> tuple[nn.Module, Any]:
        model = Calls(
            first=conv(4, 8, 3, padding=1),
            act=nn.Tanh(),
            second=conv(8, 4, 2, stride=2, groups=groups, bias=False),
            last=conv(4, 2, 1),
        )
        return model, _rows(2, 4, *[5] * dimensions)

    return build


def _of_transformers(family: str, head: str, **options: Any) -> Callable[[], Any]:
    def build() -> tuple[nn.Module, Any]:
        config = getattr(transformers, f"{family}Config")(
            vocab_size=37, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options
        )
        config._experts_implementation = "eager"  # the one that computes in float64
        model = getattr(transformers, f"{family}{head}")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        return model, {"input_ids": torch.randint(3, 37, (2, 5))}

    return build


_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_GROUPED_QUERIES = _SMALL | {"num_key_value_heads": 1, "head_dim": 8}
_LLAMA = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")

KINDS: dict[str, Kind] = {
    "blocks": Kind(
        lambda: (Blocks(), _rows(3, 5)),
        ("up", "down", "head", "enter", "layers.0.up", "layers.2.down"),
        saved=("head", "norm", "layers.1", "up"),
        parameters=("enter.weight", "up.weight", "layers.1.down.weight"),
        layers=3,
        replicable=True,
    ),
    "transposed": Kind(
        lambda: (
            Calls(c_fc=Conv1D(7, 5), act=nn.GELU(), c_proj=Conv1D(5, 7), head=nn.Linear(5, 3)),
            _rows(4, 5),
        ),
        ("c_fc", "c_proj", "head"),
        saved=("head", "c_proj"),
    ),
    "words": Kind(
        lambda: (Words(False), {"x": torch.randint(0, 11, (2, 4))}),
        ("embed_tokens", "proj", "lm_head"),
        saved=("lm_head", "embed_tokens", "proj"),
    ),
    "tied words": Kind(
        lambda: (Words(True), {"x": torch.randint(0, 11, (2, 4))}),
        ("embed_tokens", "proj", "lm_head"),
        saved=("lm_head", "embed_tokens"),
    ),
    "attention": Kind(lambda: (Attends(), _rows(2, 4, 6)), ("attn", "out"), saved=("out", "attn")),
    "shared": Kind(
        lambda: (Shares(False), _rows(3, 5)),
        ("one", "two", "three", "again"),
        saved=("two", "one"),
    ),
    "two names": Kind(
        lambda: (Shares(True), _rows(3, 5)),
        ("one", "two", "three", "again"),
    ),
    "stacks": Kind(
        lambda: (Stacks(False), _rows(4, 5)),
        ("head",),
        saved=("head",),
        parameters=("up_proj", "down_proj", "mix", "layers.1.up_proj", "head.weight"),
        layers=2,
    ),
    "transposed stacks": Kind(
        lambda: (Stacks(True), _rows(4, 5)),
        ("head",),
        parameters=("up_proj", "down_proj", "mix"),
        layers=2,
    ),
    "gpt2": Kind(
        _of_transformers("GPT2", "LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=16),
        ("c_attn", "c_proj", "c_fc", "wte", "lm_head"),
        saved=("ln_f", "lm_head"),
        layers=2,
        layers_pattern="h",
        tasks=("CAUSAL_LM", "FEATURE_EXTRACTION"),
    ),
    "llama": Kind(
        _of_transformers("Llama", "ForCausalLM", **_GROUPED_QUERIES),
        _LLAMA,
        saved=("lm_head", "embed_tokens", "norm"),
        parameters=("q_proj.weight",),
        layers=2,
        replicable=True,
        tasks=("CAUSAL_LM", "FEATURE_EXTRACTION"),
    ),
    "tied llama": Kind(
        _of_transformers("Llama", "ForCausalLM", tie_word_embeddings=True, **_GROUPED_QUERIES),
        _LLAMA,
        saved=("lm_head", "embed_tokens"),
        layers=2,
        tasks=("CAUSAL_LM", "FEATURE_EXTRACTION"),
    ),
    "bert": Kind(
        _of_transformers("Bert", "ForSequenceClassification", **_SMALL),
        ("query", "value", "dense", "word_embeddings", "attention.output.dense", "classifier"),
        saved=("classifier", "pooler"),
        layers=2,
        layers_pattern="layer",
        replicable=True,
        tasks=("SEQ_CLS", "TOKEN_CLS"),
    ),
    "mixtral": Kind(
        _of_transformers("Mixtral", "ForCausalLM", num_local_experts=3, **_GROUPED_QUERIES),
        ("q_proj", "v_proj", "w1", "w2", "w3", "gate", "lm_head"),
        saved=("lm_head", "norm"),
        parameters=("gate_up_proj", "down_proj", "gate.weight"),
        layers=2,
        tasks=("CAUSAL_LM", "FEATURE_EXTRACTION"),
    ),
}
for _dimensions in (1, 2, 3):
    for _groups in (1, 4):
        KINDS[f"conv{_dimensions}d, groups {_groups}"] = Kind(
            _convolutions(_dimensions, _groups),
            ("first", "second", "last"),
            saved=("last",),
        )


@functools.cache
def _built(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return KINDS[kind].build()


def case_of(seed: int) -> Case:
    """The case of a seed, the same always."""
    choose = random.Random(seed)
    kind = choose.choice(list(KINDS))
    names = ["default"] + (["other"] if choose.random() < 0.4 else [])
    first = _config(choose, KINDS[kind])
    configs = {"default": first}
    if "other" in names:
        second = _config(choose, KINDS[kind])
        if choose.random() < 0.6:  # the same layers, so that the two can be combined
            settings = ("r", "lora_alpha", "use_rslora", "lora_dropout")
            second = copy.deepcopy(first) | {k: second[k] for k in settings if k in second}
            second.pop("layer_replication", None)
        configs["other"] = second
    combination = None
    if "other" in names and choose.random() < 0.6:
        combination = (
            choose.choice(["linear", "cat", "svd", "ties", "magnitude_prune", "ties_svd"]),
            [choose.choice([0.5, 1.0, -0.7]), choose.choice([0.3, 1.0])],
        )
    dtype = choose.choice([torch.float32, torch.float32, torch.bfloat16])
    return Case(
        seed,
        kind,
        dtype,
        choose.random() < 0.7,
        configs,
        combination,
        choose.choice(["auto", "auto", "auto", True, False]),
    )


def _some(choose: random.Random, names: tuple[str, ...], most: int = 3) -> list[str]:
    return choose.sample(names, min(len(names), choose.randint(1, most)))


def _config(choose: random.Random, kind: Kind) -> Fields:
    def now_and_then(p: float) -> bool:
        return choose.random() < p

    fields: Fields = {
        "r": choose.choice([1, 2, 3, 4, 4, 8]),
        "lora_alpha": choose.choice([1, 2, 8, 16, 0.5, 7]),
        "init_lora_weights": choose.choice(
            [True, True, False, False, "gaussian", "orthogonal", "pissa", "olora", "pissa_niter_2"]
        ),
    }
    fields |= _targets(choose, kind)
    if now_and_then(0.2):
        fields["lora_dropout"] = choose.choice([0.1, 0.5])
    for flag, p in (
        ("use_rslora", 0.25),
        ("use_dora", 0.2),
        ("lora_bias", 0.15),
        ("fan_in_fan_out", 0.05),
        ("inference_mode", 0.05),
    ):
        if now_and_then(p):
            fields[flag] = True
    if now_and_then(0.25):
        fields["bias"] = choose.choice(["all", "lora_only"])
    for pattern, values in (("rank_pattern", [1, 2, 5, 6]), ("alpha_pattern", [1, 3, 5.5, 32])):
        if now_and_then(0.35):
            keys = [
                *kind.targets,
                *kind.parameters,
                r".*\.0\..*",
                r"^layers\.1\.(up|down)",
                ".*o.*",
            ]
            fields[pattern] = {key: choose.choice(values) for key in _some(choose, tuple(keys))}
    if now_and_then(0.25) and kind.saved:
        fields["modules_to_save"] = _some(choose, kind.saved, 2)
    if now_and_then(0.2) and kind.tasks:
        fields["task_type"] = choose.choice(kind.tasks)
    if now_and_then(0.15) and kind.replicable:
        fields["layer_replication"] = choose.choice([[[0, 2], [1, 2]], [[0, 1], [0, 2]]])
    return fields


def _targets(choose: random.Random, kind: Kind) -> Fields:
    fields: Fields = {}
    names = _some(choose, kind.targets)
    how = choose.random()
    if how < 0.1:
        fields["target_modules"] = "all-linear"
    elif how < 0.25:
        fields["target_modules"] = rf"(.*\.)?({'|'.join(names)})"
    else:
        fields["target_modules"] = names
    if choose.random() < 0.2:
        excluded = choose.choice(kind.targets)
        fields["exclude_modules"] = choose.choice([[excluded], rf".*0.*{excluded}"])
    if choose.random() < 0.15 and kind.layers:
        fields["layers_to_transform"] = choose.choice([0, [1], [0, 1]])
        if choose.random() < 0.5:
            fields["layers_pattern"] = choose.choice([kind.layers_pattern, [kind.layers_pattern]])
    if kind.parameters and choose.random() < (0.15 if len(kind.targets) > 1 else 0.7):
        fields["target_parameters"] = _some(choose, kind.parameters)
        if choose.random() < 0.5:
            fields["target_modules"] = []
    return fields
