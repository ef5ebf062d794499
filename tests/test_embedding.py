"""Embeddings with adapters: the formula, PEFT, the base's options, merging, several adapters."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from problems import kept_for_backward
from torch import Tensor, nn

import lora_ext
from lora_ext import reference
from lora_ext.nn import Embedding, Linear
from lora_ext.nn.kinds import layer_for

VOCABULARY, WIDTH, RANK = 23, 20, 4
HALVES = [torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding_idx": {"padding_idx": 3},
    "negative padding_idx": {"padding_idx": -2},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "both": {"scale_grad_by_freq": True, "padding_idx": 0},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def layer_of(**options: Any) -> Embedding:
    torch.manual_seed(0)
    layer = Embedding(VOCABULARY, WIDTH, RANK, 3, init_lora_weights=False, **options)
    with torch.no_grad():
        for parameter in layer.adapter_parameters("default").values():
            parameter.normal_(std=RANK**-0.5)  # the update is about as large as the base
    return layer


def tokens(*shape: int) -> Tensor:
    """Repeated tokens, the padding among them."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, shape or (3, 17), generator=generator)


def table(layer: Embedding, *names: str) -> Tensor:
    """W + the sum of scaling * (B A)^T, differentiable."""
    total: Any = layer.weight
    for name in names or ("default",):
        A, B = layer.adapter_parameters(name).values()
        total = total + layer.get_scale(name) * (B @ A).t()
    return total


def formula(layer: Embedding, index: Tensor, *names: str) -> Tensor:
    """nn.Embedding's own lookup in that table."""
    options = (layer.padding_idx, None, 2.0, layer.scale_grad_by_freq)
    return nn.functional.embedding(index, table(layer, *names), *options)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@each_option
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4), (200,)], ids=str)
def test_forward_and_gradients_are_the_formulas(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    layer = layer_of(dtype=torch.float64, **options)
    index = tokens(*shape) if shape else torch.tensor(7)
    y, expected = layer(index), formula(layer, index)
    assert y.shape == (*index.shape, WIDTH) and relative(y, expected) <= 1e-14
    dy = torch.randn_like(y)
    wanted = [layer.weight, layer.lora_A]
    pairs = [torch.autograd.grad(out, wanted, dy) for out in (layer(index), expected)]
    for actual, truth in zip(*pairs, strict=True):
        assert (actual - truth).norm() <= 1e-13 * truth.norm()
    # dB: the padding row and the frequencies are the lookup's, not the product's, as in PEFT.
    plain = table(layer)[index]
    (actual,) = torch.autograd.grad(layer(index), layer.lora_B, dy)
    (truth,) = torch.autograd.grad(plain, layer.lora_B, dy)
    assert relative(actual, truth) <= 1e-13


@pytest.mark.parametrize("threads", [1, 3])
def test_result_does_not_depend_on_threads(threads: int) -> None:
    layer, index = layer_of(), tokens(400)
    dy = torch.randn(400, WIDTH)
    before = torch.get_num_threads()
    results = []
    for count in (2, threads):
        torch.set_num_threads(count)
        y = layer(index)
        results.append([y, *torch.autograd.grad(y, [layer.lora_A], dy)])
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_strided_operands() -> None:
    layer = layer_of(dtype=torch.float64)
    weight = torch.stack([layer.weight.detach()] * 2, -1)[..., 0]  # columns two apart
    A, B = layer.lora_A.detach().t().contiguous().t(), layer.lora_B.detach().t().contiguous().t()
    index = tokens(6, 8)[:, ::2]
    y = lora_ext.lora_embedding(index, weight, A, B, scaling=layer.scaling)
    assert torch.equal(y, layer(index))
    expected = reference.lora_embedding(index, weight, A, B, scaling=layer.scaling)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("shape", [(48, 1, 5), (49, 33, 17), (97, 1030, 1), (300, 64, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_panels_and_tiles(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Sizes around the kernels' panels of 48 tokens, tiles and chunks of 1024 columns."""
    count, width, r = shape
    torch.manual_seed(0)
    weight = torch.randn(11, width).to(dtype)
    A, B = torch.randn(r, 11).to(dtype), torch.randn(width, r).to(dtype)
    index, dy = torch.randint(0, 11, (count,)), torch.randn(count, width).to(dtype)
    fused, exact = (
        [t.to(to).requires_grad_() for t in (weight, A, B)] for to in (dtype, torch.float64)
    )
    y = lora_ext.lora_embedding(index, *fused, scaling=0.5)
    truth = reference.lora_embedding(index, *exact, scaling=0.5)
    # Errors of sums of n terms grow like n in the worst case; the rounding to dtype comes on top.
    compute = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    pairs = [(y, truth, r), *zip(
        torch.autograd.grad(y, fused, dy),
        torch.autograd.grad(truth, exact, dy.double()),
        (count, count + width, count),
        strict=True,
    )]  # fmt: skip
    for actual, expected, terms in pairs:
        bound = torch.finfo(dtype).eps + terms * compute
        assert relative(actual.double(), expected) <= bound


def test_composition_for_other_devices_computes_the_same() -> None:
    """Run here on CPU tensors: what a device without kernels dispatches to."""
    composed = torch._C.DispatchKey.CompositeExplicitAutograd
    operators = torch.ops.lora_ext
    forward, backward = operators.lora_embedding_fwd.default, operators.lora_embedding_bwd.default
    layer, index = layer_of(dtype=torch.float64), tokens()
    tables = [t.detach() for t in (layer.lora_A, layer.lora_B)]
    operands = (index, layer.weight.detach(), *tables, 0.75)
    torch.testing.assert_close(forward._op_dk(composed, *operands), forward(*operands))
    dy = torch.randn(*index.shape, WIDTH, dtype=torch.float64)
    for padding, by_frequency in ((-1, False), (3, False), (-1, True)):
        for mask in ([True, True], [True, False], [False, True]):
            operands = (dy, index, *tables, 0.75, padding, by_frequency, mask)
            pairs = zip(backward._op_dk(composed, *operands), backward(*operands), strict=True)
            for theirs, ours in pairs:
                torch.testing.assert_close(theirs, ours)


def test_nothing_of_the_size_of_the_tokens_is_kept_for_backward() -> None:
    layer, index = layer_of(), tokens()
    kept = kept_for_backward(lambda: layer(index))
    expected = {t.data_ptr() for t in (index, layer.lora_A, layer.lora_B)}
    assert len(kept) == 3 and {t.data_ptr() for t in kept} == expected


def test_explain() -> None:
    def path(**options: Any) -> str:
        return lora_ext.explain(nn.Sequential(layer_of(**options)))[0].path

    assert path().startswith("cpu fused")
    assert path(max_norm=1.0) == path(sparse=True) == path(device="meta") == "aten embedding"


@each_option
def test_gradcheck(options: dict[str, Any]) -> None:
    if options.get("scale_grad_by_freq") or "padding_idx" in options:
        # These change the gradient on purpose: then only that of lora_B is the derivative.
        layer, index = layer_of(dtype=torch.float64, **options), tokens(9)
        names = ["lora_B"]
    else:
        layer, index = layer_of(dtype=torch.float64), tokens(9)
        names = ["weight", "lora_A", "lora_B"]
    values = [getattr(layer, name) for name in names]

    def call(*parameters: Tensor) -> Tensor:
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, replaced, (index,))

    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("keep_fp32", [True, False], ids=["fp32 adapter", "same dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_dtype(dtype: torch.dtype, keep_fp32: bool, index_dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype, autocast_adapter_dtype=keep_fp32)
    exact, index = copy.deepcopy(layer).double(), tokens()
    y, truth = layer(index.to(index_dtype)), formula(exact, index)
    # The sum is rounded once where sums are kept in float32; its terms, rank of them, err by an
    # eps of float32 each. PyTorch composes 16-bit adapters with a few more roundings.
    sums = torch.finfo(torch.float32).eps * (RANK + 1)
    eps = torch.finfo(dtype).eps
    bound = eps / 2 + sums if layer.lora_A.dtype == torch.float32 else 2 * eps
    assert y.dtype == dtype and (y.double() - truth).abs().max() <= bound * truth.abs().max()
    dy = torch.randn_like(y)
    y.backward(dy)
    truth.backward(dy.double())
    for mine, other in zip(layer.parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None and mine.grad.dtype == mine.dtype
        limit = 4 * torch.finfo(dtype).eps
        assert relative(mine.grad.double(), other.grad) <= limit


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"max_norm": 1.5}], ids=str)
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
def test_net_agrees_with_peft(options: dict[str, Any], rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH, **options), nn.Linear(WIDTH, 9))
    net = nn.Sequential(net, nn.GELU(), nn.Linear(9, 5))
    ours = copy.deepcopy(net)
    embedding = Embedding.from_embedding(ours[0][0], RANK, 3, use_rslora=rslora)
    for parameter in embedding.adapter_parameters("default").values():
        nn.init.normal_(parameter)
    ours[0][0] = embedding
    ours[0][1] = Linear.from_linear(ours[0][1], RANK, 3, init_lora_weights=False, use_rslora=rslora)
    names = ["0.0", "0.1"]
    config = peft.LoraConfig(target_modules=names, r=RANK, lora_alpha=3, use_rslora=rslora)
    theirs = peft.get_peft_model(net, config).base_model.model
    pairs: list[tuple[Any, Any]] = []
    for key, parameter in embedding.peft_parameters("default").items():
        pairs.append((parameter, getattr(theirs[0][0], key)["default"]))
    for key in ("lora_A", "lora_B"):
        pairs.append((getattr(ours[0][1], key), getattr(theirs[0][1], key)["default"].weight))
    for mine, other in pairs:
        other.data.copy_(mine.data)
    y, their_y = ours(tokens()), theirs(tokens())
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    torch.autograd.backward([y, their_y], [dy, dy])
    for mine, other in pairs:
        assert other.grad.norm() > 0 and relative(mine.grad, other.grad) <= 1e-4
        torch.testing.assert_close(mine.data, other.data)  # max_norm acts in place
    ours[0][0].merge()
    if "max_norm" not in options:
        theirs[0][0].merge()
        torch.testing.assert_close(
            ours[0][0].weight, theirs[0][0].base_layer.weight, rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(ours(tokens()), their_y, rtol=1e-5, atol=1e-5)


@each_option
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_merged_is_unmerged_and_back(dtype: torch.dtype, options: dict[str, Any]) -> None:
    layer = layer_of(dtype=dtype, **options)
    weight, y, exact = layer.weight.clone(), layer(tokens()), table(copy.deepcopy(layer).double())
    layer.merge()
    compute = torch.promote_types(dtype, torch.float32)
    error = (RANK + 2) * torch.finfo(compute).eps * (1 + exact.abs().max())
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((layer.weight.double() - exact).abs() <= error + rounding).all()
    both = 2 * rounding.max() + 2 * error
    assert (layer(tokens()).double() - y.double()).abs().max() <= both
    assert torch.equal(layer.state_dict()["weight"], weight)
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer(tokens()), y)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_hundred_cycles_leave_every_bit(dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype)
    weight = layer.weight.clone()
    for _ in range(100):
        for parameter in layer.adapter_parameters("default").values():
            nn.init.normal_(parameter)
        layer.merge()
        assert not torch.equal(layer.weight, weight)
        layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_max_norm_renormalises_base_and_adapter_and_merges() -> None:
    layer = layer_of(dtype=torch.float64, max_norm=1.0)
    exact = copy.deepcopy(layer)
    y = layer(tokens())
    norms = layer.weight.detach()[tokens()].norm(dim=-1)
    assert norms.max() <= 1 + 1e-6 and layer.lora_A.detach()[:, tokens()].norm(dim=0).max() <= 1.001
    layer.load_state_dict(exact.state_dict())
    weight = layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(tokens()), y)
    torch.testing.assert_close(layer.get_base_layer()(tokens()), y)
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer.lora_A, exact.lora_A)


def test_one_layer_may_look_up_twice_before_backward() -> None:
    for options in ({}, {"max_norm": 1.0}):
        layer = layer_of(dtype=torch.float64, **options)
        (layer(tokens(5)).sum() * layer(tokens(6)).sum()).backward()
        assert layer.lora_A.grad is not None and layer.lora_B.grad is not None


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_several_adapters_add_up_and_merge(options: dict[str, Any]) -> None:
    layer = layer_of(dtype=torch.float64, **options)
    for name, settings in {"b": {"r": 2}, "c": {"r": 3, "use_rslora": True}}.items():
        layer.add_adapter(name, lora_alpha=2, init_lora_weights=False, **settings)
    names = ["c", "default", "b"]
    layer.set_adapter(names)
    index = tokens(40)
    y = layer(index)
    expected = formula(layer, index, *names)  # of what max_norm has left
    assert relative(y, expected) <= 1e-13
    wanted, dy = [layer.lora_A, layer.lora_B, layer.lora_A_c, layer.lora_B_b], torch.randn_like(y)
    pairs = [torch.autograd.grad(out, wanted, dy) for out in (y, expected)]
    for actual, truth in zip(*pairs, strict=True):
        assert relative(actual, truth) <= 1e-13
    weight = layer.weight.clone()
    layer.merge()
    assert relative(layer(index), expected) <= 1e-13
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    layer.set_scale("c", 0.0)
    layer.set_scale("b", -0.5)
    assert relative(layer(index), formula(layer, index, "default", "b")) <= 1e-13
    layer.enable_adapters(False)
    assert torch.equal(layer(index), layer.get_base_layer()(index))


def test_sparse_gradient_is_the_weights_only() -> None:
    layer, dense = (layer_of(dtype=torch.float64, sparse=sparse) for sparse in (True, False))
    for each in (layer, dense):
        each(tokens()).square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.is_sparse
    for mine, other in zip(layer.parameters(), dense.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad.to_dense(), other.grad)


def test_initial_adapter_is_pefts_and_loralibs() -> None:
    for init in (True, "gaussian"):
        layer = Embedding(50, 256, 8, init_lora_weights=init)
        assert layer.lora_A.count_nonzero() == 0
        # 2048 samples: mean and deviation within 4 sigma
        assert layer.lora_B.mean().abs() < 4 / 2048**0.5
        assert abs(layer.lora_B.std() - 1) < 4 / (2 * 2048) ** 0.5
        assert torch.equal(layer(tokens()), layer.get_base_layer()(tokens()))
    assert layer_of().lora_A.count_nonzero() > 0
    layer.lora_A.data.fill_(1.0)
    layer.reset_lora_parameters()
    assert layer.lora_A.count_nonzero() == 0


def test_rank_zero_and_positional_arguments() -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(VOCABULARY, WIDTH)
    torch.manual_seed(0)
    layer = Embedding(VOCABULARY, WIDTH)
    assert layer.r == 0 and torch.equal(layer(tokens()), plain(tokens()))
    layer = Embedding(VOCABULARY, WIDTH, 4, 8, True, padding_idx=1)
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.padding_idx) == (4, 8, 2, 1)
    assert layer.eval().merged and not layer.train().merged
    assert Embedding.from_pretrained(torch.eye(4)).weight.shape == (4, 4)


def test_from_embedding_shares_and_keeps() -> None:
    plain = nn.Embedding(VOCABULARY, WIDTH, padding_idx=2, dtype=torch.bfloat16).eval()
    plain.weight.requires_grad_(False)
    layer = layer_for("embedding", plain)
    assert type(layer) is Embedding and layer.weight is plain.weight and not layer.training
    layer.add_adapter("default", r=2, init_lora_weights=False)
    assert layer.lora_A.dtype == torch.float32 and layer.padding_idx == 2
    assert type(layer.get_base_layer()) is nn.Embedding
    assert torch.equal(layer.get_base_layer()(tokens()), plain(tokens()))


@pytest.mark.parametrize("family", ["gemma2.modeling_gemma2.Gemma2Text", "bart.modeling_bart.Bart"])
def test_scaled_word_embedding_agrees_with_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    module, _, prefix = family.rpartition(".")
    models = pytest.importorskip(f"transformers.models.{module}")
    torch.manual_seed(0)
    kind = getattr(models, f"{prefix}ScaledWordEmbedding")
    net = nn.Sequential(kind(VOCABULARY, WIDTH, 0, embed_scale=WIDTH**0.5))
    layer: Any = layer_for("0", copy.deepcopy(net[0]))
    assert torch.equal(layer(tokens()), net(tokens()))
    layer.add_adapter("default", r=RANK, lora_alpha=3, init_lora_weights=False)
    plain = layer.get_base_layer()
    assert type(plain) is kind and torch.equal(plain(tokens()), net(tokens()))
    theirs = peft.get_peft_model(
        net, peft.LoraConfig(target_modules=["0"], r=RANK, lora_alpha=3)
    ).base_model.model
    for key, parameter in layer.peft_parameters("default").items():
        getattr(theirs[0], key)["default"].data.copy_(parameter.data)
    y = layer(tokens())
    if prefix == "Bart":  # PEFT calls .to() on embed_scale, which is a number here
        expected = formula(layer, tokens()) * WIDTH**0.5
    else:
        expected = theirs(tokens())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(tokens()), expected, rtol=1e-5, atol=1e-5)


def test_another_forward_is_refused() -> None:
    class Offset(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input + 2)

    with pytest.raises(TypeError, match="keeps its forward"):
        Embedding.from_embedding(Offset(5, 3))
    with pytest.raises(TypeError, match="Offset"):
        layer_for("positions", Offset(5, 3))

    class Named(nn.Embedding):
        embed_scale = 3.0  # an attribute that its forward does not read

    plain = Named(VOCABULARY, WIDTH)
    assert torch.equal(Embedding.from_embedding(plain, r=0)(tokens()), plain(tokens()))


def test_settings_that_an_embedding_does_not_have() -> None:
    layer = Embedding(5, 3)
    with pytest.raises(ValueError, match="lora_bias: got True, expected False"):
        layer.add_adapter("default", lora_bias=True)
    assert not layer.adapters and set(layer.state_dict()) == {"weight"}
    with pytest.warns(UserWarning, match=r"lora_dropout: got 0\.5, which is kept but not applied"):
        layer.add_adapter("default", lora_dropout=0.5, init_lora_weights=False)
    index = torch.arange(5)
    assert layer.lora_dropout == 0.5 and torch.equal(layer.train()(index), layer.eval()(index))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Embedding(5, 3, 2)


def test_bad_tokens() -> None:
    layer = layer_of()
    with pytest.raises(IndexError, match="index out of range"):
        layer(torch.tensor([0, VOCABULARY]))
    with pytest.raises(IndexError, match="index out of range"):
        layer(torch.tensor([-1]))
    with pytest.raises(TypeError, match="got dtype float32, expected int64 or int32"):
        layer(torch.tensor([0.5]))
    assert layer(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, WIDTH)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_state_dict_round_trip(merged: bool) -> None:
    layer = layer_of(padding_idx=0)
    y = layer(tokens())
    if merged:
        layer.merge()
    state = copy.deepcopy(layer.state_dict())
    assert set(state) == {"weight", "lora_A", "lora_B"}
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(state)
    torch.testing.assert_close(other(tokens()), y)
    keys = {"lora_embedding_A": (RANK, VOCABULARY), "lora_embedding_B": (WIDTH, RANK)}
    assert layer.peft_shapes(layer.adapters["default"]) == keys
    assert {k: tuple(v.shape) for k, v in layer.peft_parameters("default").items()} == keys


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}], ids=str)
def test_nan_is_not_merged_and_every_bit_stays(part: str, options: dict[str, Any]) -> None:
    layer = layer_of(**options)
    with torch.no_grad():
        getattr(layer, part)[-1, -1] = float("inf")
    before = {name: value.clone() for name, value in layer.named_parameters()}
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    assert not layer.merged
    for name, value in layer.named_parameters():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name
