"""add_weighted_adapter's mathematics: PEFT's results on PEFT's models where those are right, in
float64; elsewhere the formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_ext.adapters.combine.request import COMBINATION_TYPES, SVD, plan_combination
from lora_ext.adapters.combine.tensors import Adapter, alpha_factor, combine, subtract_mutated_init

EPS = torch.finfo(torch.float64).eps
WEIGHTS = [(0.7, 0.3, 1.2), (1.0, -0.6, 0.5), (-0.4, 0.0, -1.3)]
PRUNING = [name for name in COMBINATION_TYPES if name not in ("cat", "linear", "svd")]
each_type = pytest.mark.parametrize("kind", COMBINATION_TYPES)
each_weights = pytest.mark.parametrize("weights", WEIGHTS, ids=str)


@pytest.fixture(autouse=True)
def float64_by_default() -> Iterator[None]:
    """PEFT keeps the weights in the default dtype, which would be its only rounding to float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Layers(nn.Module):
    """Every layer type that add_weighted_adapter of PEFT can do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 12)
        self.wide = nn.Linear(6, 30)
        self.conv = nn.Conv2d(3, 10, 3)
        self.pointwise = nn.Conv2d(14, 9, 1)
        self.embedding = nn.Embedding(25, 11)


NAMES = ["linear", "wide", "conv", "pointwise", "embedding"]


def peft_model(
    ranks: dict[str, int], targets: dict[str, list[str]] | None = None, **config: Any
) -> Any:
    torch.manual_seed(0)
    model: Any = None
    for number, (name, r) in enumerate(ranks.items()):
        names = (targets or {}).get(name, NAMES)
        options = {"r": r, "lora_alpha": 3 + 2 * number, "target_modules": names, **config}
        if model is None:
            model = peft.get_peft_model(Layers(), peft.LoraConfig(**options), name)
        else:
            model.add_adapter(name, peft.LoraConfig(**options))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter)
    return model


def peft_layer(model: Any, name: str) -> dict[str, Adapter]:
    layer = getattr(model.base_model.model, name)
    if name == "embedding":
        factors = layer.lora_embedding_A, layer.lora_embedding_B
        return {n: Adapter(factors[0][n], factors[1][n], layer.scaling[n]) for n in factors[0]}
    return {
        n: Adapter(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n])
        for n in layer.lora_A
    }


def delta(adapter: Adapter) -> Tensor:
    """scaling * B A as [N, K]; K is in * kernel of a convolution."""
    A, B = adapter.lora_A.detach().double(), adapter.lora_B.detach().double()
    return adapter.scaling * B.flatten(1) @ A.flatten(1)


def weighted_sum(layer: dict[str, Adapter], weights: dict[str, float]) -> Tensor:
    return torch.stack([weights[name] * delta(adapter) for name, adapter in layer.items()]).sum(0)


def seed_after_injection(model: Any) -> None:
    """The new adapter's initialisation draws before "dare" does."""
    inject = model.base_model.inject_adapter

    def seeded(*arguments: Any, **options: Any) -> None:
        inject(*arguments, **options)
        torch.manual_seed(1)

    model.base_model.inject_adapter = seeded


def compare_with_peft(
    model: Any, kind: str, weights: dict[str, float], layers: list[str], **options: Any
) -> None:
    inputs = {name: peft_layer(model, name) for name in layers}
    ranks = {name: model.peft_config[name].r for name in weights}
    plan = plan_combination(ranks, list(weights), list(weights.values()), kind, **options)
    seed_after_injection(model)
    model.add_weighted_adapter(list(weights), list(weights.values()), "new", kind, **options)
    assert plan.rank == model.peft_config["new"].r
    torch.manual_seed(1)
    for name in layers:
        ours, theirs = combine(plan, inputs[name]), peft_layer(model, name)["new"]
        assert ours.lora_A.shape == theirs.lora_A.shape
        assert ours.lora_B.shape == theirs.lora_B.shape
        if kind in SVD and "svd_clamp" not in options:
            # Singular vectors have any sign. A truncation errs by the rounding over the relative
            # gap that it cuts at: room for gaps of 1e-3.
            got, expected = delta(ours), delta(theirs)
            scale = torch.linalg.matrix_norm(expected, 2).item()
            tolerance = 1e4 * EPS * sum(expected.shape) * scale
        else:
            got = torch.cat([ours.lora_A.flatten(), ours.lora_B.flatten()])
            expected = torch.cat([theirs.lora_A.flatten(), theirs.lora_B.flatten()])
            tolerance = 1e4 * EPS if kind in SVD else 16 * EPS * expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def three(weights: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip("xyz", weights, strict=True))


@each_weights
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_sums_are_those_of_peft(kind: str, weights: tuple[float, float, float]) -> None:
    ranks = {"x": 4, "y": 4, "z": 4} if kind == "linear" else {"x": 2, "y": 4, "z": 3}
    compare_with_peft(peft_model(ranks), kind, three(weights), NAMES)


@each_weights
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize(
    ("kind", "majority_sign_method"),
    [(kind, "total") for kind in PRUNING]
    + [(kind, "frequency") for kind in PRUNING if "ties" in kind],
)
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
def test_pruning_is_that_of_peft(
    kind: str, density: float, majority_sign_method: str, weights: tuple[float, float, float]
) -> None:
    # With "dare" PEFT draws for the transposed product of an embedding.
    layers = NAMES[:-1] if kind.startswith("dare") and kind in SVD else NAMES
    compare_with_peft(
        peft_model({"x": 4, "y": 4, "z": 4}, dict.fromkeys("xyz", layers)),
        kind,
        three(weights),
        layers,
        density=density,
        majority_sign_method=majority_sign_method,
    )


@pytest.mark.parametrize("svd_rank", [1, 3, 6])
@pytest.mark.parametrize("kind", SVD)
def test_svd_rank(kind: str, svd_rank: int) -> None:
    options = {} if kind == "svd" else {"density": 0.6}
    layers = ["linear", "conv"]
    model = peft_model({"x": 4, "y": 2, "z": 3}, dict.fromkeys("xyz", layers))
    compare_with_peft(model, kind, three(WEIGHTS[1]), layers, svd_rank=svd_rank, **options)


@pytest.mark.parametrize("svd_clamp", [0.8, 0.99, 1.0])
@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_svd_clamp(kind: str, svd_clamp: float) -> None:
    options = {"svd_clamp": svd_clamp, "svd_full_matrices": False}
    model = peft_model({"x": 4, "y": 2, "z": 3})
    inputs = {name: peft_layer(model, name) for name in NAMES}
    plan = plan_combination(
        {"x": 4, "y": 2, "z": 3}, "xyz", WEIGHTS[1], kind, svd_clamp=svd_clamp, density=0.5
    )
    model.add_weighted_adapter(list("xyz"), WEIGHTS[1], "new", kind, density=0.5, **options)
    for name in NAMES:
        ours, theirs = combine(plan, inputs[name]), peft_layer(model, name)["new"]
        bound = 1e4 * EPS * theirs.lora_B.abs().max().item()
        torch.testing.assert_close(delta(ours), delta(theirs), rtol=0, atol=bound)


def test_adapter_of_other_layers_counts_as_zero() -> None:
    for kind in ("cat", "svd", "linear", "ties", "ties_svd"):
        targets = {"x": ["linear", "wide"], "y": ["wide", "conv"], "z": ["linear"]}
        model = peft_model({"x": 3, "y": 3, "z": 3}, targets)
        compare_with_peft(model, kind, three(WEIGHTS[1]), ["linear", "wide", "conv"], density=0.5)


@pytest.mark.parametrize("kind", ["svd", "ties", "cat"])
@pytest.mark.parametrize("weight", [0.3, -2.0])
def test_one_adapter_is_scaled(kind: str, weight: float) -> None:
    compare_with_peft(peft_model({"x": 3}), kind, {"x": weight}, NAMES)


def random_layer(
    ranks: tuple[int, ...] = (4, 4, 4), N: int = 12, K: int = 20, dtype: torch.dtype = torch.float64
) -> dict[str, Adapter]:
    torch.manual_seed(2)
    return {
        name: Adapter(
            torch.randn(r, K).to(dtype),
            torch.randn(N, r).to(dtype),
            0.5 + r,
            torch.randn(N).to(dtype),
        )
        for name, r in zip("xyzw", ranks, strict=False)
    }


def plan_of(kind: str, layer: dict[str, Adapter], **options: Any) -> Any:
    ranks = {name: len(adapter.lora_A) for name, adapter in layer.items()}
    weights = (1.0, -0.6, 0.5, 2.0)[: len(layer)]
    return plan_combination(ranks, list(layer), weights, kind, **{"density": 0.5, **options})


@each_type
def test_new_scaling_does_not_matter(kind: str) -> None:
    """With rsLoRA the new adapter's scaling is √r; PEFT then adds √r times too much."""
    layer = random_layer()
    plan = plan_of(kind, layer)
    torch.manual_seed(0)
    plain = combine(plan, layer)
    torch.manual_seed(0)
    scaled = combine(plan, layer, math.sqrt(plan.rank))
    assert scaled.scaling == math.sqrt(plan.rank)
    bound = 1e3 * EPS * delta(plain).abs().max().item()
    torch.testing.assert_close(delta(scaled), delta(plain), rtol=0, atol=bound)
    assert plain.lora_bias is not None and scaled.lora_bias is not None
    torch.testing.assert_close(scaled.scaling * scaled.lora_bias, plain.lora_bias)


@each_weights
def test_cat_and_svd_of_full_rank_are_the_weighted_sum(weights: tuple[float, float, float]) -> None:
    layer = random_layer((2, 5, 3))
    ranks = {"x": 2, "y": 5, "z": 3}
    exact = weighted_sum(layer, three(weights))
    for kind, options in (("cat", {}), ("svd", {"svd_rank": 10}), ("svd", {"svd_rank": 15})):
        plan = plan_combination(ranks, "xyz", weights, kind, **options)
        new = combine(plan, layer, 2.5)
        assert len(new.lora_A) == plan.rank
        bound = 1e3 * EPS * exact.abs().max().item()
        torch.testing.assert_close(delta(new), exact, rtol=0, atol=bound)
        assert new.lora_bias is not None
        biases = [
            w * layer[name].scaling * layer[name].lora_bias for name, w in three(weights).items()
        ]
        torch.testing.assert_close(2.5 * new.lora_bias, torch.stack(biases).sum(0))


def test_svd_is_the_best_approximation() -> None:
    layer = random_layer((4, 4, 4), 30, 17)
    exact = weighted_sum(layer, three(WEIGHTS[1]))
    singular = torch.linalg.svdvals(exact)
    for rank in (1, 4, 9):
        rest = torch.linalg.svdvals(
            exact - delta(combine(plan_of("svd", layer, svd_rank=rank), layer))
        )
        torch.testing.assert_close(rest[0], singular[rank])


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_grouped_convolution(kind: str) -> None:
    """The new adapter's rank is shared out to the groups as the old ones' are."""
    torch.manual_seed(0)
    groups, x = 2, torch.randn(3, 6, 8, 8)

    def output(adapter: Adapter) -> Tensor:
        h = nn.functional.conv2d(x, adapter.lora_A)
        return adapter.scaling * nn.functional.conv2d(h, adapter.lora_B, groups=groups)

    layer = {
        name: Adapter(torch.randn(r, 6, 3, 3), torch.randn(8, r // groups, 1, 1), scaling)
        for name, r, scaling in (("x", 4, 0.5), ("y", 2, 2.0))
    }
    plan = plan_combination({"x": 4, "y": 2}, "xy", [1.0, -0.7], kind, svd_rank=6)
    new = combine(plan, layer, 1.5)
    assert new.lora_A.shape == (6, 6, 3, 3) and new.lora_B.shape == (8, 3, 1, 1)
    expected = output(layer["x"]) - 0.7 * output(layer["y"])
    bound = 1e3 * EPS * expected.abs().max().item()
    torch.testing.assert_close(output(new), expected, rtol=0, atol=bound)


def in_float64(layer: dict[str, Adapter]) -> dict[str, Adapter]:
    return {
        name: Adapter(a.lora_A.double(), a.lora_B.double(), a.scaling) for name, a in layer.items()
    }


# Not "dare": torch draws other numbers in float64.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["cat", "linear", "ties", "magnitude_prune"])
def test_lower_precision_only_rounds_the_result(kind: str, dtype: torch.dtype) -> None:
    layer = random_layer(dtype=dtype)
    plan = plan_of(kind, layer)
    got, expected = combine(plan, layer), combine(plan, in_float64(layer))
    # Factors of an element are a coefficient or its root; then come n additions and a division.
    coefficients = [
        abs(w) * layer[name].scaling for name, w in zip(plan.adapters, plan.weights, strict=True)
    ]
    for name in ("lora_A", "lora_B"):
        ours, truth = getattr(got, name), getattr(expected, name)
        largest = max(getattr(a, name).abs().max().item() for a in layer.values())
        terms = sum(max(1.0, c) for c in coefficients) * largest
        error = (len(layer) + 4) * torch.finfo(torch.float32).eps * terms
        assert ours.dtype == dtype
        allowed = error + torch.finfo(dtype).eps / 2 * (truth.abs() + error)
        assert ((ours.double() - truth).abs() <= allowed).all()


def test_svd_from_factors_is_as_precise_as_that_of_the_product() -> None:
    layer = random_layer((8, 8, 8), 96, 160, torch.float32)
    plan = plan_of("svd", layer)
    exact = delta(combine(plan, in_float64(layer)))
    weights = dict(zip(plan.adapters, plan.weights, strict=True))
    products = [weights[name] * a.scaling * a.lora_B @ a.lora_A for name, a in layer.items()]
    U, S, Vh = torch.linalg.svd(torch.stack(products).sum(0))
    plain = (U[:, :8] * S[:8]) @ Vh[:8]
    error, yardstick = delta(combine(plan, layer)) - exact, plain.double() - exact
    assert torch.linalg.norm(error) <= 2 * torch.linalg.norm(yardstick)


@pytest.mark.parametrize("kind", [name for name in COMBINATION_TYPES if name.startswith("dare")])
def test_generator_governs_dare(kind: str) -> None:
    layer = random_layer()
    plan = plan_of(kind, layer)

    def drawn(seed: int) -> Tensor:
        return delta(combine(plan, layer, generator=torch.Generator().manual_seed(seed)))

    state = torch.get_rng_state()
    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_inputs_are_left_alone() -> None:
    layer = random_layer()
    before = {name: (a.lora_A.clone(), a.lora_B.clone()) for name, a in layer.items()}
    for kind in COMBINATION_TYPES:
        new = combine(plan_of(kind, layer), layer)
        assert not new.lora_A.requires_grad
    for name, (A, B) in before.items():
        assert torch.equal(layer[name].lora_A, A) and torch.equal(layer[name].lora_B, B)


RANKS = {"task": 4, "style": 4, "small": 2}
WRONG_PLANS: list[tuple[str, dict[str, Any]]] = [
    ("adapters: got 'tusk', expected one of", {"adapters": ["tusk", "style"]}),
    ("did you mean 'task'", {"adapters": ["tusk", "style"]}),
    ("adapters: got no names", {"adapters": [], "weights": []}),
    ("weights: got 1 for 2 adapters", {"weights": [1.0]}),
    ("weights: got (1.0, nan), expected finite", {"weights": [1.0, math.nan]}),
    ("combination_type: got 'sdv'", {"combination_type": "sdv"}),
    ("did you mean 'svd'", {"combination_type": "sdv"}),
    ("equal ranks", {"adapters": ["task", "small"], "combination_type": "linear"}),
    ("equal ranks", {"adapters": ["task", "small"], "combination_type": "ties", "density": 0.5}),
    ("svd_rank: got 0", {"svd_rank": 0}),
    ("svd_rank: got 2.5", {"svd_rank": 2.5}),
    ("svd_rank: got True", {"svd_rank": True}),
    ("svd_clamp: got 0.4", {"svd_clamp": 0.4}),
    ("svd_clamp: got 1.5", {"svd_clamp": 1.5}),
    ("svd_driver: got 'gesdd'", {"svd_driver": "gesdd"}),
    ("density: got None", {"combination_type": "ties"}),
    ("density: got -0.1", {"combination_type": "ties", "density": -0.1}),
    ("density: got 1.1", {"combination_type": "magnitude_prune_svd", "density": 1.1}),
    ("density: got nan", {"combination_type": "ties_svd", "density": math.nan}),
    (
        "density: got 0.0, expected a share above 0",
        {"combination_type": "dare_ties", "density": 0.0},
    ),
    ("majority_sign_method: got 'mean'", {"majority_sign_method": "mean"}),
]


@pytest.mark.parametrize(("message", "change"), WRONG_PLANS, ids=[m for m, _ in WRONG_PLANS])
def test_wrong_requests(message: str, change: dict[str, Any]) -> None:
    request = {"adapters": ["task", "style"], "weights": [1.0, 2.0], **change}
    with pytest.raises(ValueError, match="add_weighted_adapter: ") as error:
        plan_combination(RANKS, **request)
    assert message in str(error.value)


def adapter(A: tuple[int, ...], B: tuple[int, ...], value: float = 1.0) -> Adapter:
    return Adapter(torch.full(A, value), torch.full(B, value), 1.0)


WRONG_LAYERS: list[tuple[str, str, dict[str, Adapter], float]] = [
    ("none in this layer", "cat", {"other": adapter((4, 5), (3, 4))}, 1.0),
    ("NaN or Inf in 'x'", "cat", {"x": adapter((4, 5), (3, 4), math.nan)}, 1.0),
    ("scaling: got 0.0", "cat", {"x": adapter((4, 5), (3, 4))}, 0.0),
    (
        "shapes that differ in the rank only",
        "cat",
        {"x": adapter((4, 5), (3, 4)), "y": adapter((4, 6), (3, 4))},
        1.0,
    ),
    (
        "(4, 5), (3, 2) for 'y'",
        "cat",
        {"x": adapter((4, 5), (3, 4)), "y": adapter((4, 5), (3, 2))},
        1.0,
    ),
    (
        "ranks [4, 2] in one layer",
        "linear",
        {"x": adapter((4, 5), (3, 4)), "y": adapter((2, 5), (3, 2))},
        1.0,
    ),
    ("ranks: got at most 4", "linear", {"x": adapter((5, 5), (3, 5))}, 1.0),
    (
        "svd_rank: got 3, expected a multiple of the convolution's 2 groups",
        "svd",
        {"x": adapter((4, 5, 1), (6, 2, 1)), "y": adapter((4, 5, 1), (6, 2, 1))},
        1.0,
    ),
]


@pytest.mark.parametrize(
    ("message", "kind", "layer", "scaling"), WRONG_LAYERS, ids=[m for m, *_ in WRONG_LAYERS]
)
def test_wrong_layers(message: str, kind: str, layer: dict[str, Adapter], scaling: float) -> None:
    svd_rank = 3 if kind == "svd" else None
    plan = plan_combination({"x": 4, "y": 4}, "xy", [1.0, 1.0], kind, svd_rank=svd_rank)
    with pytest.raises(ValueError, match="add_weighted_adapter: ") as error:
        combine(plan, layer, scaling)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
def test_subtract_mutated_init(kind: str, use_rslora: bool) -> None:
    base = Layers().linear
    weight = base.weight.detach().clone()
    torch.set_default_dtype(torch.float32)  # PEFT's pissa has no float64
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=use_rslora,
        target_modules=["linear"],
        init_lora_weights=kind,
    )
    model = peft.get_peft_model(Layers().float(), config)
    layer = model.base_model.model.linear
    original = peft_layer(model, "linear")["default"]
    residual = layer.base_layer.weight.detach().clone().double()
    initial = Adapter(original.lora_A.clone(), original.lora_B.clone(), original.scaling)
    weight = residual + delta(initial)
    for parameter in (original.lora_A, original.lora_B):
        parameter.data += torch.randn_like(parameter)
    trained = Adapter(original.lora_A.detach(), original.lora_B.detach(), original.scaling)

    new = subtract_mutated_init(trained, initial)
    assert len(new.lora_A) == 6 and new.lora_A.dtype == torch.float32
    alpha, rank = 5 * alpha_factor(use_rslora), 6
    assert new.scaling == pytest.approx(alpha / (math.sqrt(rank) if use_rslora else rank))
    bound = 100 * EPS * weight.abs().max().item() + 100 * EPS * delta(trained).abs().max().item()
    trained_weight = residual + delta(trained)
    torch.testing.assert_close(weight + delta(new), trained_weight, rtol=0, atol=bound)

    # PEFT makes the same tensors.
    names = {"lora_A": trained.lora_A, "lora_B": trained.lora_B}
    state = {f"base_model.model.linear.{name}.weight": tensor for name, tensor in names.items()}
    layer.lora_A["default"].weight.data = initial.lora_A
    layer.lora_B["default"].weight.data = initial.lora_B
    theirs = model.base_model.subtract_mutated_init(state, "default", {})
    assert torch.equal(new.lora_A, theirs["base_model.model.linear.lora_A.weight"])
    assert torch.equal(new.lora_B, theirs["base_model.model.linear.lora_B.weight"])


def test_subtract_mutated_init_refuses_other_adapters() -> None:
    trained = adapter((4, 5), (3, 4))
    with pytest.raises(ValueError, match=r"lora_A: got shape \(2, 5\) initially"):
        subtract_mutated_init(trained, adapter((2, 5), (3, 2)))
    with pytest.raises(ValueError, match=r"scaling: got 2\.0 initially, expected 1\.0"):
        subtract_mutated_init(trained, Adapter(trained.lora_A, trained.lora_B, 2.0))
