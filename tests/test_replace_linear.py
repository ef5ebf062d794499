"""replace_linear: which layers are swapped, what survives the swap, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import lora_ext
from lora_ext.nn import Linear

Targets = str | Iterable[str]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.value(self.query(x)))
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 10, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


ATTENTION = [f"layers.{i}.{name}" for i in (0, 1) for name in ("query", "value")]
SELECTIONS: dict[str, tuple[Callable[[], Targets], Targets | None, list[str]]] = {
    "whole names": (lambda: ["layers.1.query", "head"], None, ["layers.1.query", "head"]),
    "last parts": (lambda: ["query"], None, ["layers.0.query", "layers.1.query"]),
    "several last parts": (lambda: ["1.query", "0.value"], None, [ATTENTION[1], ATTENTION[2]]),
    "generator": (lambda: (name for name in ("query", "value")), None, ATTENTION),
    "set": (lambda: {"query", "value"}, None, ATTENTION),
    "regex": (lambda: r".*\.1\.(query|value)", None, ATTENTION[2:]),
    "regex is for the whole name": (lambda: "head|query", None, ["head"]),
    "all-linear without head": (lambda: "all-linear", None, ATTENTION),
    "excluded names": (lambda: "all-linear", ["layers.0.query", "value"], ["layers.1.query"]),
    "excluded regex": (lambda: ["query", "value"], r"layers\.0\..*", ATTENTION[2:]),
    "excluded generator": (lambda: ["query"], (n for n in ["0.query"]), ["layers.1.query"]),
}


def swapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Linear)]


@pytest.mark.parametrize("case", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_selection(case: tuple[Callable[[], Targets], Targets | None, list[str]]) -> None:
    model, (targets, exclude, names) = Model(), case
    assert lora_ext.replace_linear(model, targets(), exclude_modules=exclude) == names
    assert swapped(model) == names


def tiny(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": 30}
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=kind == "tied llama")
    return transformers.LlamaForCausalLM(config)


Spec = str | list[str]
PEFT_CASES: list[tuple[str, Spec, Spec | None]] = [
    ("bert", ["query", "value"], None),
    ("bert", ["attention.self.key", "encoder.layer.1.output.dense"], None),
    ("bert", r".*\.layer\.\d\.attention\..*(query|dense)", None),
    ("bert", "all-linear", None),
    ("bert", "all-linear", ["classifier", "pooler.dense"]),
    ("llama", ["q_proj", "v_proj", "lm_head"], None),
    ("llama", r"model\.layers\.0\..*_proj", r".*\.mlp\..*"),
    ("llama", "all-linear", None),
    ("tied llama", "all-linear", ["o_proj"]),
]


@pytest.mark.parametrize(("kind", "targets", "exclude"), PEFT_CASES, ids=str)
def test_selection_is_pefts(kind: str, targets: Spec, exclude: Spec | None) -> None:
    peft = pytest.importorskip("peft")
    model = tiny(kind)
    config = peft.LoraConfig(target_modules=targets, exclude_modules=exclude)
    expected = peft.get_peft_model(copy.deepcopy(model), config).targeted_module_names
    assert lora_ext.replace_linear(model, targets, exclude_modules=exclude) == expected
    assert swapped(model) == expected


def test_nothing_but_the_layers_changes() -> None:
    torch.manual_seed(0)
    model, tokens = Model(), torch.arange(10)
    before, parameters = model(tokens), dict(model.named_parameters())
    lora_ext.replace_linear(model, "all-linear", 4, 8, 0.5, use_rslora=True)
    after = {k: v for k, v in model.named_parameters() if "lora_" not in k}
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in after)
    layer = model.get_submodule("layers.0.query")
    assert isinstance(layer, Linear)
    assert (layer.r, layer.scaling, layer.lora_dropout) == (4, 4, 0.5)
    torch.testing.assert_close(model(tokens), before)  # lora_B is zero


def test_training_mode_and_requires_grad_are_kept() -> None:
    model = Model().requires_grad_(False)
    model.layers[0].eval()
    lora_ext.replace_linear(model, ["query"])
    first, second = (model.get_submodule(f"layers.{i}.query") for i in (0, 1))
    assert not first.training and second.training
    assert not first.weight.requires_grad and first.lora_A.requires_grad


def test_a_module_under_several_names_stays_one() -> None:
    model = Model()
    model.layers[1] = model.layers[0]
    model.layers[0].value = model.layers[0].query
    again = [f"layers.{i}.{name}" for i in (0, 1) for name in ("query", "value")]
    assert lora_ext.replace_linear(model, ["query"]) == again
    assert len({id(model.get_submodule(name)) for name in again}) == 1
    assert swapped(model) == again[:1]


def test_tied_weights_stay_tied() -> None:
    model = Model()
    model.head.weight = model.embed.weight
    lora_ext.replace_linear(model, ["head"])
    assert isinstance(model.head, Linear) and model.head.weight is model.embed.weight


def test_hooks_are_kept_and_fire() -> None:
    model, calls = Model(), []
    query = model.get_submodule("layers.0.query")
    query.register_forward_pre_hook(lambda m, args: calls.append(("pre", type(m))))
    query.register_forward_hook(
        lambda m, args, kwargs, y: calls.append(("post", type(m))), with_kwargs=True
    )
    query.register_full_backward_hook(lambda m, dx, dy: calls.append(("backward", type(m))))
    removed = query.register_forward_hook(lambda m, args, y: calls.append(("removed", type(m))))
    lora_ext.replace_linear(model, ["query"])
    removed.remove()
    model(torch.arange(3)).sum().backward()
    assert calls == [(event, Linear) for event in ("pre", "post", "backward")]


def test_no_match_names_what_is_near() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"\['qeury'\] matches no module.*'query'"):
        lora_ext.replace_linear(model, ["qeury"])
    with pytest.raises(ValueError, match=r"'xyz' matches no module.*'head', 'query', 'value'"):
        lora_ext.replace_linear(model, "xyz")


# What is done to the model, whose layers.1.query is then a bad target, and what the error says.
REFUSED: dict[str, tuple[Callable[[Model], Any], str]] = {
    "Embedding": (
        lambda m: setattr(m.layers[1], "query", m.embed),
        r"is a torch\.nn\.modules\.sparse\.Embedding",
    ),
    "subclass": (
        lambda m: setattr(m.layers[1], "query", nn.MultiheadAttention(8, 2).out_proj),
        r"is a torch\.nn\.modules\.linear\.NonDynamicallyQuantizableLinear",
    ),
    "swapped": (lambda m: lora_ext.replace_linear(m, ["1.query"]), "is a .*Linear"),
    "weight_norm": (
        lambda m: weight_norm(m.layers[1].query),
        r"is a torch\.nn\.utils\.parametrize\.ParametrizedLinear",
    ),
    "pruned weight": (
        lambda m: prune.l1_unstructured(m.layers[1].query, "weight", amount=0.5),
        "computes its weight",
    ),
    "pruned bias": (
        lambda m: prune.l1_unstructured(m.layers[1].query, "bias", amount=0.5),
        "computes its bias",
    ),
}


@pytest.mark.parametrize(("prepare", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_the_first_swap(prepare: Callable[[Model], Any], message: str) -> None:
    model = Model()
    prepare(model)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"^replace_linear: .*'layers\.1\.query' {message}"):
        lora_ext.replace_linear(model, ["query"])
    after = dict(model.named_modules())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in after)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": -1}, "r: got -1, expected an integer of at least 1"),
        ({"r": 0}, "r: got 0, expected an integer of at least 1"),
        ({"rank": 4}, "rank: unknown, did you mean r?"),
    ],
    ids=["negative", "zero", "unknown"],
)
def test_bad_option_changes_nothing(options: dict[str, int], says: str) -> None:
    model = Model()
    with pytest.raises((ValueError, TypeError), match=re.escape(says)):
        lora_ext.replace_linear(model, ["query"], **options)
    assert not swapped(model)


@pytest.mark.parametrize("padded", [False, True], ids=["", "src_key_padding_mask"])
@pytest.mark.parametrize("stacked", [False, True], ids=["TransformerEncoderLayer", "Encoder"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_inference_calls_the_adapter(
    activation: str, stacked: bool, padded: bool
) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True)
    model = (nn.TransformerEncoder(block, 2) if stacked else block).eval()
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    with torch.no_grad():
        without = model(x, src_key_padding_mask=mask if padded else None)[~mask]
        lora_ext.replace_linear(model, ["linear1", "linear2"], 4, 8, init_lora_weights=False)
        y = model(x, src_key_padding_mask=mask if padded else None)
    assert (y[~mask] - without).norm() > 0.1 * without.norm()
    # The same weights in a plain model, layer by layer.
    merged = copy.deepcopy(model)
    for module in merged.modules():
        if isinstance(module, Linear):
            module.merge()
    slow = merged(x, src_key_padding_mask=mask if padded else None)  # with grad: no fast path
    torch.testing.assert_close(y[~mask], slow[~mask])
