"""LoraModel.add_weighted_adapter against PEFT, and against the formula where PEFT is wrong."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model

RANKS = {"one": 4, "two": 4, "three": 4}
WEIGHTS = [0.7, 1.5, -0.4]
# What DARE drops is random, and PEFT draws in another order: with density 1 it drops nothing here;
# tests/test_combining.py compares the drops.
TYPES: dict[str, dict[str, Any]] = {
    "svd": {},
    "linear": {},
    "cat": {},
    "ties": {"density": 0.6},
    "ties_svd": {"density": 0.6},
    "dare_linear": {"density": 1.0},
    "dare_linear_svd": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "dare_ties_svd": {"density": 1.0},
    "magnitude_prune": {"density": 0.6},
    "magnitude_prune_svd": {"density": 0.6},
}


def net_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))


def fields(r: int, **more: Any) -> dict[str, Any]:
    return {"r": r, "lora_alpha": 6, "target_modules": ["0", "2"]} | more


def models(**more: Any) -> tuple[LoraModel, Any]:
    """The same three adapters in ours and in PEFT's."""
    ours, theirs = None, None
    for name, r in RANKS.items():
        if ours is None:
            ours = get_lora_model(net_of(), LoraConfig(**fields(r, **more)), name)
            theirs = peft.get_peft_model(net_of(), peft.LoraConfig(**fields(r, **more)), name)
        else:
            ours.add_adapter(name, LoraConfig(**fields(r, **more)))
            theirs.add_adapter(name, peft.LoraConfig(**fields(r, **more)))
    generator = torch.Generator().manual_seed(2)
    for place, layer in ours.lora_layers():
        their_layer = theirs.base_model.model.get_submodule(place)
        for name in RANKS:
            for part, parameter in layer.parts(name).items():
                values = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(values)
                getattr(their_layer, part)[name].weight.data.copy_(values)
    return ours, theirs


def rows() -> Tensor:
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", TYPES)
def test_combinations_are_pefts(kind: str) -> None:
    ours, theirs = models()
    options = TYPES[kind]
    torch.manual_seed(5)
    ours.add_weighted_adapter(list(RANKS), WEIGHTS, "new", kind, **options)
    torch.manual_seed(5)
    theirs.base_model.add_weighted_adapter(list(RANKS), WEIGHTS, "new", kind, **options)
    assert ours.active_adapters == ["one"]
    ours.set_adapter("new")
    theirs.set_adapter("new")
    assert ours.peft_config["new"].r == theirs.peft_config["new"].r
    expected = theirs(rows())
    assert (ours(rows()) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_types_give_the_weighted_sum(kind: str, use_rslora: bool) -> None:
    ours, _ = models(use_rslora=use_rslora)
    ours.add_weighted_adapter(
        list(RANKS), WEIGHTS, "new", kind, svd_rank=12 if kind == "svd" else None
    )
    for _, layer in ours.lora_layers():
        expected = sum(
            w * layer.adapters[n].scaling * (p["lora_B"].double() @ p["lora_A"].double())
            for n, w in zip(RANKS, WEIGHTS, strict=True)
            for p in [layer.parts(n)]
        )
        new = layer.parts("new")
        actual = layer.get_scale("new") * (new["lora_B"].double() @ new["lora_A"].double())
        # 12 terms of float32 for each element, and an SVD's rounding of the largest of them
        assert (actual - expected).abs().max() <= 64 * 2**-24 * expected.abs().max()


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_a_saved_combination_loads_equal(kind: str, use_rslora: bool, tmp_path: Path) -> None:
    ours, _ = models(use_rslora=use_rslora)
    ours.add_weighted_adapter(list(RANKS), WEIGHTS, "new", kind)
    ours.set_adapter("new")
    y = ours(rows())
    ours.save_pretrained(tmp_path, "new")
    assert torch.equal(LoraModel.from_pretrained(net_of(), tmp_path / "new")(rows()), y)
    theirs = peft.PeftModel.from_pretrained(net_of(), str(tmp_path / "new"))
    assert (theirs(rows()) - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("kind", [name for name in TYPES if name.startswith("dare")])
def test_what_dare_drops_follows_the_generator(kind: str) -> None:
    results = []
    for seed in (1, 1, 2):
        model, _ = models()
        generator = torch.Generator().manual_seed(seed)
        model.add_weighted_adapter(
            list(RANKS), WEIGHTS, "new", kind, density=0.5, generator=generator
        )
        model.set_adapter("new")
        results.append(model(rows()))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_adapters_with_other_targets_and_patterns() -> None:
    model = get_lora_model(net_of(), LoraConfig(**fields(2, target_modules=["0"])), "one")
    model.add_adapter(
        "two", LoraConfig(**fields(3, target_modules=["0", "2"], rank_pattern={"2": 5}))
    )
    model.add_weighted_adapter(["one", "two"], [1.0, 2.0], "new", "cat")
    config = model.peft_config["new"]
    assert config.r == 7 and config.rank_pattern == {} and config.target_modules == ["0", "2"]
    assert [layer.adapters["new"].r for _, layer in model.lora_layers()] == [7, 7]


def test_modules_to_save_in_two_adapters_are_refused() -> None:
    model = get_lora_model(
        net_of(), LoraConfig(**fields(2, target_modules=["0"], modules_to_save=["2"]))
    )
    model.add_adapter("two", copy.deepcopy(model.peft_config["default"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default", "two"], [1, 1], "new")
    assert list(model.peft_config) == ["default", "two"]


WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "name taken": ((["one"], [1.0], "two"), "'two'"),
    "unknown": ((["four"], [1.0], "new"), "four"),
    "weights": ((["one", "two"], [1.0], "new"), "weights"),
    "type": ((["one", "two"], [1.0, 1.0], "new", "svdd"), "combination_type"),
    "too large": (
        (["one", "two"], [1.0, 1e300], "new"),
        r"weights: got \[1\.0, .*'0' would hold NaN",
    ),
    "no float": ((["one", "two"], [1, 10**5000], "new"), "weights: got an integer of 16610 bits"),
    "unused density": ((["one", "two"], [1, 1], "new", "linear", {"density": 5}), "density: got 5"),
    "density of one": ((["one"], [1], "new", "ties", {"density": 5}), "density: got 5"),
    "rank 0": ((["one", "two"], [1, 1], "new", "svd", {"svd_rank": 0}), "svd_rank: got 0"),
    "huge rank": ((["one", "two"], [1, 1], "new", "svd", {"svd_rank": 10**9}), "svd_rank: got 10"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments: tuple[Any, ...], message: str) -> None:
    model, _ = models()
    before = list(model.state_dict())
    *first, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*first, **options)
    assert list(model.state_dict()) == before


def test_wrong_kinds() -> None:
    model, _ = models()
    call = functools.partial(model.add_weighted_adapter, ["one", "two"], [1, 1], "new")
    with pytest.raises(TypeError, match=r"generator: got 3, expected None or a torch\.Generator"):
        call("dare_ties", density=0.5, generator=3)
    with pytest.raises(ValueError, match=r"svd_rank: got 2\.0, expected None or an integer"):
        call(svd_rank=2.0)
    call(svd_rank=np.int64(2))
    assert model.peft_config["new"].r == 2


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_belongs_to_a_changed_base_is_not_saved_as_plain(init: str, tmp_path: Path) -> None:
    model = get_lora_model(net_of(), LoraConfig(**fields(4, init_lora_weights=init)), "one")
    model.add_adapter("two", LoraConfig(**fields(4, init_lora_weights=False)))
    model.add_weighted_adapter(["two", "one"], [0.5, 1.0], "new", "cat")
    model.add_weighted_adapter(["new"], [2.0], "newer")  # of one that was combined
    model.rename_adapter("newer", "newest")
    model.delete_adapter("one")
    for name in ("new", "newest"):
        with pytest.raises(ValueError, match=f"'{name}': it was combined .*'{init}'.*nothing is w"):
            model.save_pretrained(tmp_path, ["two", name])
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, "two")


def test_embeddings_are_not_changed_by_such_an_initialisation(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(7, 4))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    model = get_lora_model(copy.deepcopy(net), config, "one")
    model.add_weighted_adapter(["one"], [0.5], "new")
    model.set_adapter("new")
    model.save_pretrained(tmp_path, "new")
    again = LoraModel.from_pretrained(net, tmp_path / "new")
    assert torch.equal(again(torch.arange(7)), model(torch.arange(7)))


def test_attention_embedding_and_convolution_are_combined_too() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2, batch_first=True),
            "words": nn.Embedding(11, 8),
            "convolve": nn.Conv1d(8, 6, 3, groups=2),
        }
    )
    config = LoraConfig(r=2, target_modules=list(net), init_lora_weights=False)
    model = get_lora_model(net, config, "one")
    model.add_adapter("two", LoraConfig(r=4, target_modules=list(net), init_lora_weights=False))
    model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "new", "cat")
    model.double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    tokens = torch.randint(0, 11, (2, 5))

    def outputs() -> list[Tensor]:
        # Linear in the adapters: the first projection alone, of the attention.
        layer = net["attention"]
        parts = [layer.parts(name) for name in layer.running_adapters]
        scales = [layer.get_scale(name) for name in layer.running_adapters]
        products = [s * p["lora_B"] @ p["lora_A"] for s, p in zip(scales, parts, strict=True)]
        return [torch.stack(products).sum(0), net["words"](tokens), net["convolve"](x.mT)]

    model.set_adapter("new")
    actual = outputs()
    for name, weight in (("one", 0.5), ("two", 2.0)):
        model.set_scale(name, weight)
    model.set_adapter(["one", "two"])
    for new, expected in zip(actual, outputs(), strict=True):
        # "cat" was computed in float32.
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-5)
