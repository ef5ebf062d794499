"""Initialisations: PEFT's values for PEFT's seeds; mutating ones leave the output what it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_ext
from lora_ext.errors import NotBuiltError
from lora_ext.nn import init

PLAIN = [True, False, "gaussian", "orthogonal"]
MUTATING = ["pissa", "pissa_niter_4", "olora"]
# [N, K, r]
SIZES = [(24, 40, 6), (40, 24, 6), (16, 16, 16), (5, 7, 2), (1, 9, 1)]
# base, adapter
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]
each_mutating = pytest.mark.parametrize("kind", MUTATING)
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
each_dtype = pytest.mark.parametrize(
    "dtypes", DTYPES, ids=lambda pair: "-".join(str(dtype).removeprefix("torch.") for dtype in pair)
)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.Conv1d(8, 4, 5), nn.Conv3d(4, 6, 1))


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 3), nn.Linear(3, 40))


def peft_layers(model: nn.Module, kind: bool | str, seed: int = 3, **config: Any) -> list[Any]:
    """PEFT's layers with adapters of rank 4, added right after seeding."""
    names = [name for name, _ in model.named_children()]
    config = {"r": 4, "lora_alpha": 6, "target_modules": names, **config}
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft.LoraConfig(init_lora_weights=kind, **config), model)
    return list(model.children())


def empty_adapter(layer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    empty = [torch.full_like(tensor, math.nan) for tensor in (A.weight, B.weight)]
    return *empty, None if B.bias is None else torch.full_like(B.bias, math.nan)


@pytest.mark.parametrize(
    ("kind", "lora_bias"),
    [*[(kind, False) for kind in PLAIN], (True, True), (False, True)],  # as far as PEFT goes
    ids=str,
)
@pytest.mark.parametrize("make", [linears, convolutions])
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_draws_are_those_of_peft(make: Any, kind: bool | str, lora_bias: bool) -> None:
    if make is convolutions and kind == "orthogonal":
        with pytest.raises(ValueError):
            peft_layers(make(), kind)
        return
    layers = peft_layers(make(), kind, lora_bias=lora_bias)
    torch.manual_seed(3)
    for layer in layers:
        lora_A, lora_B, bias = empty_adapter(layer)
        init.initialise(kind, lora_A, lora_B, scaling=1.5, lora_bias=bias)
        assert torch.equal(lora_A, layer.lora_A["default"].weight)
        assert torch.equal(lora_B, layer.lora_B["default"].weight)
        assert (bias is not None) == lora_bias
        if bias is not None:
            assert torch.equal(bias, layer.lora_B["default"].bias)


@pytest.mark.parametrize("kind", [True, False, "gaussian", "pissa"], ids=str)
def test_embedding_is_initialised_as_in_peft(kind: bool | str) -> None:
    model = nn.Sequential(nn.Embedding(30, 12), nn.Embedding(7, 5))
    weights = [layer.weight.detach().clone() for layer in model]
    layers = peft_layers(model, kind)
    torch.manual_seed(3)
    for layer, weight in zip(layers, weights, strict=True):
        expected_A, expected_B = (
            layer.lora_embedding_A["default"],
            layer.lora_embedding_B["default"],
        )
        lora_A, lora_B = torch.empty_like(expected_A), torch.empty_like(expected_B)
        init.initialise_embedding(kind, lora_A, lora_B)
        assert torch.equal(lora_A, expected_A) and torch.equal(lora_B, expected_B)
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("kind", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_only_rounds(dtype: torch.dtype, kind: bool | str) -> None:
    drawn = [torch.empty(4, 9), torch.empty(6, 4)]
    rounded = [tensor.to(dtype) for tensor in drawn]
    for tensors in (drawn, rounded):
        torch.manual_seed(5)
        init.initialise(kind, *tensors)
    assert all(torch.equal(a.to(dtype), b) for a, b in zip(drawn, rounded, strict=True))


def test_seed_decides() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        lora_A = torch.empty(4, 9)
        init.initialise(True, lora_A, torch.empty(6, 4))
        return lora_A

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_orthogonal_adds_nothing() -> None:
    lora_A, lora_B = torch.empty(8, 50), torch.empty(30, 8)
    init.initialise("orthogonal", lora_A, lora_B)
    assert lora_A.abs().min() > 0 and lora_B.abs().min() > 0
    bound = 8 * 8 * torch.finfo(torch.float32).eps * (lora_B.abs() @ lora_A.abs())
    assert ((lora_B @ lora_A).abs() <= bound).all()


@each_mutating
def test_mutating_kinds_are_those_of_peft(kind: str) -> None:
    model = linears()
    weights = [layer.weight.detach().clone() for layer in model]
    layers = peft_layers(model, kind, r=2, lora_alpha=3)
    torch.manual_seed(3)
    eps = torch.finfo(torch.float32).eps
    for layer, weight in zip(layers, weights, strict=True):
        lora_A, lora_B, _ = empty_adapter(layer)
        init.initialise(kind, lora_A, lora_B, weight, 1.5)
        expected = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # The same factorisation; what follows are a root and a product.
        torch.testing.assert_close((lora_A, lora_B), expected, rtol=4 * eps, atol=0)
        terms = weight.abs() + 1.5 * lora_B.abs() @ lora_A.abs()
        assert ((weight - layer.base_layer.weight).abs() <= 8 * eps * terms).all()


@each_dtype
@each_size
@each_mutating
@pytest.mark.parametrize("transposed", [False, True], ids=["", "fan_in_fan_out"])
def test_output_stays(
    kind: str,
    size: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    transposed: bool,
) -> None:
    N, K, r = size
    torch.manual_seed(0)
    base, adapter = dtypes
    stored = nn.Parameter(torch.randn((K, N) if transposed else (N, K)).to(base))
    weight = stored.t() if transposed else stored
    before = weight.detach().clone()
    lora_A, lora_B = torch.empty(r, K, dtype=adapter), torch.empty(N, r, dtype=adapter)
    init.initialise(kind, lora_A, lora_B, weight, 2.0)

    # Element by element: weight - scaling B A, of what is stored, rounded once.
    exact = before.double() - 2.0 * lora_B.double() @ lora_A.double()
    terms = before.double().abs() + 2.0 * lora_B.double().abs() @ lora_A.double().abs()
    compute = torch.float64 if base == torch.float64 else torch.float32
    error = (r + 3) * torch.finfo(compute).eps * terms
    info = torch.finfo(base)
    error += info.eps / 2 * (exact.abs() + error) + info.smallest_normal * info.eps
    assert ((weight.double() - exact).abs() <= error).all()
    # So the output is the base's within that error, and the roundings of a product of K terms.
    x = torch.randn(3, K).to(base)
    y = lora_ext.lora_linear(x, weight, None, lora_A, lora_B, scaling=2.0).double()
    expected = x.double() @ before.double().t()
    products = x.double().abs() @ terms.t()
    steps = (K + r + 3) * torch.finfo(compute).eps + 4 * info.eps
    assert ((y - expected).abs() <= x.double().abs() @ error.t() + steps * products).all()
    assert not torch.equal(weight, before)


def test_pissa_takes_the_leading_part() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 30, dtype=torch.float64)
    singular = torch.linalg.svdvals(weight)
    lora_A = torch.empty(5, 30, dtype=torch.float64)
    lora_B = torch.empty(20, 5, dtype=torch.float64)
    init.initialise("pissa", lora_A, lora_B, weight, 0.5)
    tolerance = 100 * torch.finfo(torch.float64).eps * singular[0].item()
    rest = torch.linalg.svdvals(weight)
    torch.testing.assert_close(rest[:15], singular[5:], rtol=0, atol=tolerance)
    for gram in (lora_A @ lora_A.t(), lora_B.t() @ lora_B):  # both sides carry half
        torch.testing.assert_close(gram, torch.diag(singular[:5] / 0.5), rtol=0, atol=tolerance)


def test_olora_is_a_qr_factorisation() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 30)
    lora_A, lora_B = torch.empty(5, 30), torch.empty(20, 5)
    init.initialise("olora", lora_A, lora_B, weight, 0.5)
    assert torch.equal(lora_A, lora_A.triu())
    tolerance = 20 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(lora_B.t() @ lora_B, torch.eye(5), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [True, "gaussian", "orthogonal", *MUTATING], ids=str)
def test_lora_bias_does_not_spoil_the_output(kind: bool | str) -> None:
    lora_bias = torch.full((5,), math.nan)
    init.initialise(
        kind, torch.empty(2, 7), torch.empty(5, 2), torch.randn(5, 7), lora_bias=lora_bias
    )
    assert torch.equal(lora_bias, torch.zeros(5))


@pytest.mark.parametrize("kind", PLAIN, ids=str)
def test_meta_adapters_are_left_alone(kind: bool | str) -> None:
    state = torch.get_rng_state()
    init.initialise(kind, torch.empty(4, 9, device="meta"), torch.empty(6, 4, device="meta"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [*PLAIN, *MUTATING, "pissa_niter_0"], ids=str)
def test_kinds(kind: bool | str) -> None:
    assert init.check_init(kind) == kind
    if isinstance(kind, str):
        assert init.check_init(kind.upper()) == kind
    assert init.mutates_weight(kind) == (kind in MUTATING or kind == "pissa_niter_0")
    peft.LoraConfig(init_lora_weights=kind)


UNKNOWN = [
    ("gausian", "did you mean 'gaussian'"),
    ("pisa", "did you mean 'pissa'"),
    ("pissa_niter_", "did you mean 'pissa_niter_<iterations>'"),
    ("pissa_niter_-1", "pissa_niter_<iterations>"),
    ("", "expected True, False or one of"),
    (None, "got None"),
    (1, "got 1"),
    ("EVA", "did you mean 'eva'"),
]


@pytest.mark.parametrize(("kind", "message"), UNKNOWN, ids=[str(kind) for kind, _ in UNKNOWN])
def test_other_kinds_are_refused_by_name(kind: Any, message: str) -> None:
    kinds = (ValueError, TypeError, NotBuiltError)
    with pytest.raises(kinds, match="init_lora_weights") as error:
        init.check_init(kind)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "kind",
    ["OLoRA", "Gaussian", "Orthogonal", "pissa", "PISSA", "pissa_niter_2", "PISSA_niter_1000"],
)
def test_configs_layers_and_peft_take_the_same_names(kind: str) -> None:
    base, config = nn.Linear(9, 6), {"r": 2, "lora_alpha": 2}

    def model() -> Any:
        named = lora_ext.LoraConfig(target_modules=["0"], init_lora_weights=kind, **config)
        net = nn.Sequential(copy.deepcopy(base))
        return lora_ext.get_lora_model(net, named).get_base_model()[0]

    def layer() -> Any:
        return lora_ext.nn.Linear.from_linear(copy.deepcopy(base), init_lora_weights=kind, **config)

    # PEFT knows OLoRA and Gaussian in any case.
    pefts = kind if kind in ("OLoRA", "Gaussian") else kind.lower()
    (theirs,) = peft_layers(nn.Sequential(copy.deepcopy(base)), pefts, **config)
    expected = [theirs.weight, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    for make in (model, layer):
        torch.manual_seed(3)
        ours = make()
        for got, want in zip((ours.weight, ours.lora_A, ours.lora_B), expected, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["pissa_niter_1001", "pissa_niter_-1", "pisa", "", "EVA", 1, None])
def test_configs_and_layers_refuse_the_same_names(kind: Any) -> None:
    said = []
    for make in (
        lambda: lora_ext.LoraConfig(r=2, target_modules=["0"], init_lora_weights=kind),
        lambda: lora_ext.nn.Linear(9, 6, 2, init_lora_weights=kind),
    ):
        with pytest.raises((ValueError, TypeError, NotBuiltError)) as error:
            make()
        said.append((type(error.value), str(error.value).partition(": ")[2]))
    assert said[0] == said[1]


WEIGHT = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
NOT_FINITE = WEIGHT.clone().index_fill_(0, torch.tensor(2), math.inf)
WRONG: list[tuple[str, str, dict[str, Any]]] = [
    ("orthogonal", "got 3, expected an even rank", {"r": 3}),
    ("pissa", "expected at most 6; give this layer a smaller rank", {"r": 7}),
    ("olora", "expected at most 6", {"r": 8}),
    ("pissa", "expected a finite number above 0", {"scaling": 0.0}),
    ("pissa_niter_2", "expected a finite number above 0", {"scaling": -1.0}),
    ("olora", "expected a finite number above 0", {"scaling": math.nan}),
    ("pissa", "holds NaN or Inf", {"weight": NOT_FINITE}),
    ("olora", "holds NaN or Inf", {"weight": NOT_FINITE}),
    ("pissa", "weight: got None", {"weight": None}),
    ("pissa", "weight: got meta", {"weight": WEIGHT.to("meta")}),
    ("olora", "expected [r, K], [N, r] and [N, K]", {"weight": WEIGHT.t()}),
    ("olora", "expected [r, K], [N, r] and [N, K]", {"weight": WEIGHT[..., None]}),
    ("olora", "dtype", {"dtype": torch.float64}),
]


@pytest.mark.parametrize(
    ("kind", "message", "change"), WRONG, ids=[f"{k}-{c}" for k, _, c in WRONG]
)
def test_wrong_input_changes_nothing(kind: str, message: str, change: dict[str, Any]) -> None:
    options = {"r": 4, "scaling": 1.0, "weight": WEIGHT, "dtype": torch.float32, **change}
    weight, r, dtype = options["weight"], options["r"], options["dtype"]
    weight = weight.clone() if weight is not None else None
    tensors = [torch.full((r, 9), 2.0, dtype=dtype), torch.full((6, r), 3.0, dtype=dtype)]
    before = None if weight is None else weight.clone()
    with pytest.raises((ValueError, TypeError)) as error:
        init.initialise(kind, *tensors, weight, options["scaling"])
    assert message in str(error.value)
    assert (tensors[0] == 2).all() and (tensors[1] == 3).all()
    if weight is not None and not weight.is_meta:
        assert before is not None and torch.equal(weight, before)
