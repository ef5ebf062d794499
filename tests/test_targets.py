"""find_targets: the names that PEFT's LoRA adapts, on models of transformers and on odd ones."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from tiny_models import BUILDERS, LAYERS
from torch import nn

from lora_ext import LoraConfig, get_lora_model
from lora_ext.adapters.architectures import DEFAULT_TARGETS
from lora_ext.adapters.plan import make_plan
from lora_ext.adapters.targets import find_targets, matches, saved_modules
from lora_ext.nn.kinds import is_of_a_kind

Values = dict[str, Any]
Outcome = list[str] | type[Exception]


def peft_targets(model: nn.Module, values: Values) -> Outcome:
    """What PEFT adapts; it changes the model. Its errors are ValueErrors of several classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = peft.get_peft_model(model, peft.LoraConfig(**values))
        except ValueError:
            return ValueError
    names: list[str] = adapted.targeted_module_names
    return names


def our_targets(model: nn.Module, values: Values) -> Outcome:
    try:
        return find_targets(model, LoraConfig(**values))
    except ValueError as error:
        assert str(error).startswith("LoraConfig: ")
        return ValueError


def ends(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Last parts of the names of the modules of these kinds that are in numbered layers."""
    found = (
        n for n, m in model.named_modules() if isinstance(m, kinds) and re.search(r"\.\d+\.", n)
    )
    return sorted({name.rpartition(".")[2] for name in found})


def inner(model: nn.Module) -> list[str]:
    """Last parts that only modules with weights to adapt have."""
    kinds = (nn.Linear, nn.Conv2d, transformers.pytorch_utils.Conv1D)
    others = {n.rpartition(".")[2] for n, m in model.named_modules() if not is_of_a_kind(m)}
    return [end for end in ends(model, *kinds) if end not in others]


def whole(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_modules() if n.rpartition(".")[2] in inner(model)]


def stack(model: nn.Module) -> str:
    """What comes before the number of the layers."""
    found = (re.match(r".*?\.([^.]*)\.\d+\.", name) for name in whole(model))
    return next(match[1] for match in found if match)


CASES: dict[str, Callable[[nn.Module], Values]] = {
    "default": lambda model: {},
    "default of one layer": lambda model: {"layers_to_transform": 1},
    "default, excluded": lambda model: {"exclude_modules": r".*\.0\..*"},
    "all-linear": lambda model: {"target_modules": "all-linear"},
    "all-linear in capitals": lambda model: {"target_modules": "All-Linear"},
    "all-linear but": lambda model: {
        "target_modules": "all-linear",
        "exclude_modules": inner(model)[:1],
    },
    "all-linear of a task": lambda model: {
        "target_modules": "all-linear",
        "task_type": "SEQ_CLS",
    },
    "one end": lambda model: {"target_modules": inner(model)[-1:]},
    "ends": lambda model: {"target_modules": inner(model)},
    "half an end": lambda model: {"target_modules": [inner(model)[0][1:]]},
    "whole names": lambda model: {"target_modules": whole(model)[1::2]},
    "many whole names": lambda model: {"target_modules": whole(model) + inner(model)},
    "two parts": lambda model: {
        "target_modules": sorted({".".join(n.split(".")[-2:]) for n in whole(model)})
    },
    "no names": lambda model: {"target_modules": []},
    "embeddings": lambda model: {
        "target_modules": sorted(
            {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
        )
        + inner(model)[:1]
    },
    "regex": lambda model: {"target_modules": rf".*\.[02]\..*({'|'.join(inner(model))})"},
    "regex of an end": lambda model: {"target_modules": inner(model)[0]},
    "containers": lambda model: {"target_modules": r".*\.0"},
    "everything": lambda model: {"target_modules": ".*"},
    "excluded ends": lambda model: {
        "target_modules": inner(model),
        "exclude_modules": inner(model)[1:],
    },
    "excluded names": lambda model: {
        "target_modules": inner(model),
        "exclude_modules": whole(model)[:2],
    },
    "all excluded": lambda model: {
        "target_modules": inner(model),
        "exclude_modules": inner(model),
    },
    "one layer": lambda model: {"target_modules": inner(model), "layers_to_transform": 1},
    "layers": lambda model: {
        "target_modules": inner(model),
        "layers_to_transform": [0, LAYERS - 1],
    },
    "no layers": lambda model: {"target_modules": inner(model), "layers_to_transform": []},
    "absent layer": lambda model: {"target_modules": inner(model), "layers_to_transform": 99},
    "layers but whole names": lambda model: {
        "target_modules": [*whole(model)[:1], *inner(model)],
        "layers_to_transform": [LAYERS - 1, 1],
    },
    "layers by pattern": lambda model: {
        "target_modules": inner(model),
        "layers_to_transform": [1],
        "layers_pattern": stack(model),
    },
    "layers by patterns": lambda model: {
        "target_modules": inner(model),
        "layers_to_transform": [0, 1],
        "layers_pattern": ["nowhere", stack(model)],
    },
    "layers by an empty pattern": lambda model: {
        "target_modules": inner(model),
        "layers_to_transform": [1],
        "layers_pattern": [],
    },
    "layers elsewhere": lambda model: {
        "target_modules": inner(model),
        "layers_to_transform": [1],
        "layers_pattern": "nowhere",
    },
    "saved": lambda model: {
        "target_modules": inner(model),
        "modules_to_save": [f"{stack(model)}.0", "lm_head"],
    },
    "saved but all-linear": lambda model: {
        "target_modules": "all-linear",
        "modules_to_save": whole(model)[:1],
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", BUILDERS)
def test_names_are_pefts(family: str, case: str) -> None:
    model, _ = BUILDERS[family]()
    values = CASES[case](model)
    before = dict(model.named_modules())
    ours = our_targets(model, values)
    assert dict(model.named_modules()) == before
    assert ours == peft_targets(model, values)


def test_cases_target_something() -> None:
    """Errors are equal too easily: only these cases may end in one."""
    wrong = {"default", "default of one layer", "default, excluded", "half an end", "no names"}
    wrong |= {"regex of an end", "containers", "everything", "all excluded", "absent layer"}
    wrong |= {"layers elsewhere"}
    for family, builder in BUILDERS.items():
        model, _ = builder()
        known = model.config.model_type in DEFAULT_TARGETS
        for case in CASES.keys() - (wrong - {"default"} if known else wrong):
            if (family, case) == ("resnet", "all-linear of a task"):
                continue  # its only linear layer is the head
            assert our_targets(model, CASES[case](model)) is not ValueError, (family, case)


@pytest.mark.parametrize("family", BUILDERS)
def test_models_run_forward_and_backward(family: str) -> None:
    model, inputs = BUILDERS[family]()
    model(**inputs).loss.backward()
    weights = [m.weight for n, m in model.named_modules() if n in set(whole(model))]
    assert weights and all(weight.grad is not None and weight.grad.any() for weight in weights)


def test_defaults_are_pefts() -> None:
    theirs = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {k: v if isinstance(v, str) else list(v) for k, v in DEFAULT_TARGETS.items()} == theirs


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


class Experts(nn.Module):
    """Layers with numbered modules in them, next to modules without a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": linear(), "experts": nn.ModuleList([block(), block(), block()])})
            for _ in range(3)
        )
        self.up = linear()
        self.head = block()


def block() -> nn.ModuleDict:
    return nn.ModuleDict({"up": linear(), "down": linear()})


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2)
        self.mlp = linear()


CUSTOM: dict[str, tuple[Callable[[], nn.Module], Values]] = {
    "first number counts": (Experts, {"target_modules": ["up", "down"], "layers_to_transform": 2}),
    "number of the pattern": (
        Experts,
        {"target_modules": ["up"], "layers_to_transform": [2], "layers_pattern": "experts"},
    ),
    "pattern in a pattern": (
        lambda: nn.Sequential(Stack(*(Stack(block(), block(), block()) for _ in range(2)))),
        {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "pattern is an expression": (
        Experts,
        {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "l.*s"},
    ),
    "first name has no number": (Experts, {"target_modules": ["up"]}),
    "saved is an expression": (
        Experts,
        {"target_modules": ["up", "down"], "modules_to_save": ["h..d", r"layers\.[02]"]},
    ),
    "saved needs whole parts": (Experts, {"target_modules": ["up"], "modules_to_save": ["layer"]}),
    "attention": (Attention, {"target_modules": ["attn", "mlp"]}),
    "sequence": (lambda: nn.Sequential(linear(), nn.ReLU(), linear()), {"target_modules": ["0"]}),
    "root": (linear, {"target_modules": ".*"}),
    "no default": (Experts, {}),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3)),
        {"target_modules": ["0", "1", "2"]},
    ),
}


@pytest.mark.parametrize(("build", "values"), CUSTOM.values(), ids=CUSTOM.keys())
def test_names_of_odd_models_are_pefts(build: Callable[[], nn.Module], values: Values) -> None:
    model = build()
    ours = our_targets(model, values)
    assert ours == peft_targets(model, values)


def test_all_linear_means_whole_names() -> None:
    """To PEFT '0' ends the name of the ReLU as well, which it then cannot adapt."""
    model = nn.Sequential(linear(), nn.Sequential(nn.ReLU()))
    assert our_targets(model, {"target_modules": "all-linear"}) == ["0"]


def test_output_projection_is_part_of_the_attention() -> None:
    """PEFT adapts it as a linear layer, which the attention never calls."""
    model = Attention()
    assert our_targets(model, {"target_modules": "all-linear"}) == ["mlp"]
    assert our_targets(model, {"target_modules": ["attn", "out_proj"]}) == ["attn"]
    with pytest.raises(ValueError, match=r"'attn\.out_proj' is part of .* name 'attn' itself"):
        find_targets(model, LoraConfig(target_modules=["out_proj"]))


def test_shared_module_has_its_first_name() -> None:
    model = nn.ModuleDict({"a": linear(), "c": linear()})
    model["b"] = model["a"]
    assert our_targets(model, {"target_modules": ["a", "b", "c"]}) == ["a", "c"]
    with pytest.raises(ValueError, match=r"'b' is the same module as 'a'; name that"):
        find_targets(model, LoraConfig(target_modules=["b"]))


class Adapter(nn.Module):
    """A layer that holds an adapter and its base, as one that was put in before."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.lora_A = linear(), nn.ModuleDict({"first": linear()})


class LinearAdapter(Adapter):
    """As its name says, one of a linear layer."""


def test_adapted_layers_are_targets_but_not_their_insides() -> None:
    model = nn.ModuleDict(
        {"a": LinearAdapter(), "b": Adapter(), "first": linear(), "base": Experts()}
    )

    def adaptable(module: nn.Module) -> bool:
        return isinstance(module, Adapter | nn.Linear)

    def targets(target_modules: str | list[str]) -> list[str]:
        config = LoraConfig(target_modules=target_modules)
        return find_targets(model, config, adaptable, adapted=(Adapter,))

    assert targets(["a", "b", "first"]) == ["a", "b", "first"]
    inside = [name for name in targets("all-linear") if not name.startswith("base.")]
    assert inside == ["a", "first"]
    assert targets(["up"])[0] == "base.layers.0.up"


def test_only_what_is_adaptable() -> None:
    model = nn.Sequential(linear(), nn.Embedding(4, 4))
    with pytest.raises(ValueError, match=r"'1' is a torch\.nn\.modules\.sparse\.Embedding, which"):
        find_targets(
            model, LoraConfig(target_modules=["0", "1"]), lambda m: isinstance(m, nn.Linear)
        )


def test_heads_of_tasks_are_saved() -> None:
    assert saved_modules(LoraConfig(task_type="CAUSAL_LM")) == []
    assert saved_modules(LoraConfig(task_type="SEQ_CLS")) == ["classifier", "score"]
    config = LoraConfig(task_type="QUESTION_ANS", modules_to_save=["pooler", "qa_outputs"])
    assert saved_modules(config) == ["pooler", "qa_outputs"]
    model, _ = BUILDERS["bert_classifier"]()
    names = find_targets(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    assert "bert.pooler.dense" in names and "classifier" not in names


def test_mamba_is_refused_what_its_kernels_do_not_call() -> None:
    config = transformers.MambaConfig(
        vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1
    )
    model = transformers.MambaForCausalLM(config)
    for target in ("out_proj", "conv1d"):
        with pytest.raises(ValueError, match=rf"mixer\.{target}' is not called by a Mamba"):
            find_targets(model, LoraConfig(target_modules=[target, "in_proj"]))
    values = {"target_modules": "all-linear", "exclude_modules": ["out_proj"]}
    assert our_targets(model, values) == peft_targets(model, values)


SIZES: Values = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
MAMBAS: Values = {"vocab_size": 16, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1}
CONVOLUTIONS: Values = {"conv_dim": [8], "conv_stride": [5], "conv_kernel": [10]}
NOT_CALLED: dict[str, tuple[str, Values]] = {  # with layers whose weight is read instead
    "MobileBertForMaskedLM": (
        "predictions.dense",
        SIZES
        | {"vocab_size": 16, "embedding_size": 4, "intermediate_size": 8}
        | {"intra_bottleneck_size": 4, "classifier_activation": False},
    ),
    "MambaForCausalLM": ("dt_proj", MAMBAS),
    "FalconMambaForCausalLM": ("dt_proj", MAMBAS),
    "JambaForCausalLM": (
        "dt_proj",
        SIZES
        | {"vocab_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "intermediate_size": 8}
        | {"use_mamba_kernels": False},
    ),
    "Wav2Vec2ForXVector": (
        "kernel",
        SIZES
        | CONVOLUTIONS
        | {"intermediate_size": 8, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
        | {"tdnn_dim": [8], "tdnn_kernel": [3], "tdnn_dilation": [1], "xvector_output_dim": 4},
    ),
}


@pytest.mark.parametrize("name", NOT_CALLED)
def test_layers_whose_weight_is_read_without_calling_them_are_named(name: str) -> None:
    idle, fields = NOT_CALLED[name]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**fields))
    config = LoraConfig(target_modules="all-linear", exclude_modules=["out_proj"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_lora_model(model.eval(), config)
    texts = [str(one.message) for one in caught if "without calling it" in str(one.message)]
    assert len(texts) == 1
    tokens = torch.arange(1, 7)[None]
    result = adapted(torch.randn(1, 200) if name.startswith("Wav2Vec2") else tokens)
    result.logits.square().sum().backward()
    without = [n for n, layer in adapted.lora_layers() if layer.lora_B.grad is None]
    assert without and all(n.endswith(idle) and repr(n) in texts[0] for n in without)
    assert texts[0].count(idle) == len(without)


MESSAGES: dict[str, tuple[Values, str]] = {
    "near miss": ({"target_modules": ["dwn"]}, r"\['dwn'\] matches no module; did you mean \['dow"),
    "far miss": ({"target_modules": ["query"]}, r"can be adapted end in \['down', 'up'\]"),
    "list as text": ({"target_modules": "down"}, r"did you mean \['down'\]\?"),
    "no such layer": (
        {"target_modules": ["down"], "layers_to_transform": 7, "layers_pattern": "layers"},
        r"layers_to_transform=7 with layers_pattern='layers' leaves none",
    ),
    "all excluded": (
        {"target_modules": ["down"], "exclude_modules": ["down"]},
        r"all of its 10 matches \('layers\.0\.experts\.0\.down', .* excluded",
    ),
    "all saved": (
        {"target_modules": ["down"], "modules_to_save": ["layers", "head"]},
        r"all of its 10 matches .* modules_to_save=\['layers', 'head'\]",
    ),
    "wrong kind": ({"target_modules": ["up", "layers"]}, r"'layers' is a torch\.nn\..*ModuleList"),
    "no default": ({}, r"got None, and there is no default .*model_type None"),
}


@pytest.mark.parametrize(("values", "message"), MESSAGES.values(), ids=MESSAGES.keys())
def test_message(values: Values, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^LoraConfig: target_modules: .*{message}"):
        find_targets(Experts(), LoraConfig(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exclude_modules": ["nowhere"]}, r"exclude_modules: \['nowhere'\] matches no module"),
        ({"rank_pattern": {"down": 4, "layers.0.up": 2}}, r"rank_pattern: \['down'\] match no"),
        ({"alpha_pattern": {"u": 4, "(x|up)": 2}}, r"alpha_pattern: \['u'\] match no"),
    ],
    ids=["exclude_modules", "rank_pattern", "alpha_pattern"],
)
def test_what_has_no_effect_is_said(values: Values, message: str) -> None:
    with pytest.warns(UserWarning, match=rf"^LoraConfig: {message}"):
        make_plan(Experts(), LoraConfig(target_modules=["up"], **values), True)


def test_what_has_effect_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plan(
            Experts(),
            LoraConfig(target_modules=["up"], exclude_modules=["down"], rank_pattern={"up": 2}),
            True,
        )


def test_matching() -> None:
    assert matches("a.b.c", ["b.c"]) and matches("a.b.c", {"a.b.c"}) and matches("a.b.c", r"a.*")
    assert not matches("a.b.c", ["b"]) and not matches("a.bc", ["c"]) and not matches("a.b.c", "c")
    assert not matches("a", None) and not matches("a", [])


def test_many_names_take_no_longer() -> None:
    """A file may list a hundred thousand names: each module is looked up, not compared to all."""

    class Count(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Count.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    names: list[str] = [Count(f"name{i}") for i in range(1000)]
    LoraConfig(target_modules=names)
    model, config = Experts(), LoraConfig(target_modules=[*names, "up"])
    Count.compared = 0
    assert len(find_targets(model, config)) == 14
    assert Count.compared < len(names)


def test_modules_to_save_are_those_whose_names_end_so() -> None:
    """As in PEFT; what is inside of one is saved with it."""
    net = nn.ModuleDict(
        {"norm": nn.LayerNorm(4), "layer_norm": nn.LayerNorm(4), "q": nn.Linear(4, 4)}
    )
    model = nn.ModuleDict({"one": net, "two": copy.deepcopy(net)})
    fields: Values = {"target_modules": ["q"], "modules_to_save": ["norm"]}
    plan = make_plan(model, LoraConfig(**fields), True)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields))
    wrappers = [n for n, m in theirs.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"]
    assert [f"base_model.model.{name}" for name in plan.saved] == wrappers

    fields = {"target_modules": ["one.q"], "modules_to_save": ["norm", "two"]}
    assert list(make_plan(model, LoraConfig(**fields), True).saved) == [
        "one.norm",
        "one.layer_norm",
        "two",
    ]
