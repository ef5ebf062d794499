"""lora_ext.nn.MultiheadAttention against PyTorch's with W + delta W in place of W."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from attention_problems import (
    CALLS,
    FORMS,
    HEADS,
    RANK,
    E,
    L,
    N,
    S,
    each_base,
    each_form,
    expected,
    inputs,
    layer_of,
    mask,
)
from torch import Tensor, nn
from torch.nn.utils import prune

import lora_ext
from lora_ext.nn import LoraLayer, MultiheadAttention, attention
from lora_ext.nn.kinds import layer_for
from lora_ext.nn.linear import adapted_linear


def assert_same(layer: MultiheadAttention, args: tuple[Tensor, ...], call: dict[str, Any]) -> None:
    """Results and all gradients."""
    ours, theirs = layer(*args, **call), expected(layer, *args, **call)
    parameters = list(layer.parameters())
    leaves = [*dict.fromkeys(args), *parameters]
    gradients = []
    for result in (ours, theirs):
        given = [tensor for tensor in result if tensor is not None]
        generator = torch.Generator().manual_seed(3)
        dys = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in given]
        gradients.append(torch.autograd.grad(given, leaves, dys, materialize_grads=True))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@each_base
def test_cross_attention_is_torchs(options: dict[str, Any], call: dict[str, Any]) -> None:
    assert_same(layer_of(**options), inputs(options), call)


@each_form
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("source", ["self", "key is value", "cross"])
def test_each_form_is_torchs(form: tuple[str, ...] | None, need_weights: bool, source: str) -> None:
    layer, (query, key, value) = layer_of(form, batch_first=True), inputs({"batch_first": True})
    x = {"self": (query,) * 3, "key is value": (query, key, key), "cross": (query, key, value)}
    assert_same(layer, x[source], {"need_weights": need_weights})


@each_form
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
def test_without_a_batch(form: tuple[str, ...] | None, batch_first: bool) -> None:
    layer, args = layer_of(form, batch_first=batch_first), inputs({}, unbatched=True)
    assert layer(*args)[0].shape == (L, E)
    assert_same(layer, args, {})
    assert_same(layer, args, {"key_padding_mask": mask(S), "average_attn_weights": False})
    assert_same(layer, args, {"attn_mask": mask(HEADS, L, S), "need_weights": False})


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=["plain", "bias_kv"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "not padded"])
def test_the_causal_hint_changes_nothing(
    options: dict[str, Any], need_weights: bool, padded: bool
) -> None:
    layer, (x, _, _) = layer_of(**options), inputs({})
    call: dict[str, Any] = {
        "attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1),
        "need_weights": need_weights,
        "key_padding_mask": mask(N, L) if padded else None,
    }
    hinted = layer(x, x, x, is_causal=True, **call)[0]
    torch.testing.assert_close(hinted, layer(x, x, x, **call)[0], rtol=1e-12, atol=1e-12)
    if not options:  # with bias_kv, PyTorch's hint hides the keys that it appends
        assert_same(layer, (x, x, x), {**call, "is_causal": True})


@each_base
def test_zero_adapters_are_the_base(options: dict[str, Any]) -> None:
    layer, args = layer_of(**options), inputs(options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    base = layer.get_base_layer()
    for mine, other in zip(layer(*args), base(*args), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13)
    for off in (lambda: layer.enable_adapters(False), lambda: layer.delete_adapter("default")):
        off()
        assert torch.equal(layer(*args)[0], base(*args)[0])


def test_q_and_v_leave_k_exactly_the_base() -> None:
    layer, (x, _, _) = layer_of(("q", "v"), torch.float32), inputs({})
    x = x.float()
    for i, (projected, bias) in enumerate(
        zip(layer._project_inputs(x, x, x), layer.in_proj_bias.chunk(3), strict=True)
    ):
        base = nn.functional.linear(x, layer.in_proj_weight.chunk(3)[i], bias)
        assert torch.equal(projected, base) == (i == 1)
    before = [layer.in_proj_weight.detach().clone(), layer.out_proj.weight.detach().clone()]
    layer.merge()
    pairs = zip(layer.in_proj_weight.chunk(3), before[0].chunk(3), strict=True)
    same = [torch.equal(a, b) for a, b in pairs]
    assert same == [False, True, False] and torch.equal(layer.out_proj.weight, before[1])


@each_form
def test_training_eval_and_merged_give_the_same(form: tuple[str, ...] | None) -> None:
    layer, (x, _, _) = layer_of(form, batch_first=True), inputs({"batch_first": True})
    training = layer(x, x, x)[0]
    assert layer.eval() is layer
    with torch.no_grad():
        assert torch.equal(layer(x, x, x)[0], training)
        layer.merge()
        torch.testing.assert_close(layer(x, x, x)[0], training, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [FORMS["peft"], FORMS["qv"]], ids=["peft", "qv"])
def test_a_transformer_layer_does_not_pass_it_by(form: tuple[str, ...] | None) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(E, HEADS, 16, 0.0, batch_first=True, dtype=torch.float64)
    block.self_attn = layer_of(form, batch_first=True)
    x = inputs({"batch_first": True})[0].detach()
    training = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block.eval()(x), training, rtol=1e-12, atol=1e-12)
        encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        padding = mask(N, L)
        inference = encoder.eval()(x, src_key_padding_mask=padding)
    training = encoder.train()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(inference, training, rtol=1e-12, atol=1e-12)


def test_nested_tensors_are_refused() -> None:
    x = torch.nested.as_nested_tensor([torch.randn(L, E), torch.randn(S, E)])
    layer = layer_of(dtype=torch.float32, batch_first=True).eval()
    with torch.no_grad(), pytest.raises(TypeError, match="enable_nested_tensor=False"):
        layer(x, x, x)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_dropout_of_the_weights_is_torchs(need_weights: bool) -> None:
    layer, args = layer_of(dropout=0.4), inputs({})
    torch.manual_seed(5)
    y = layer(*args, need_weights=need_weights)[0]
    torch.manual_seed(5)
    truth = expected(layer, *args, need_weights=need_weights)[0]
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(layer.eval()(*args)[0], y)


@each_form
def test_lora_dropout_drops_in_training_only(form: tuple[str, ...] | None) -> None:
    layer, args = layer_of(form, lora_dropout=1.0), inputs({})
    base = layer.get_base_layer()(*args)[0]
    torch.testing.assert_close(layer(*args)[0], base, rtol=1e-12, atol=1e-12)
    layer.eval()
    torch.testing.assert_close(layer(*args)[0], expected(layer, *args)[0], rtol=1e-12, atol=1e-12)


@each_form
@pytest.mark.parametrize("same", ["qkv", "kv", "qk", "qv"])
def test_projections_of_one_input_are_those_of_separate_calls(
    form: tuple[str, ...] | None, same: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same masks and results, also where an input comes again after another."""
    layer = layer_of(form, torch.float32, lora_dropout=0.4)
    x, other = torch.randn(L, N, E, requires_grad=True), torch.randn(L, N, E)
    args = [x if projection in same else other for projection in "qkv"]

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        y = layer(*args)[0]
        trained = [p for name, p in layer.named_parameters() if "lora" in name]
        dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
        grads = torch.autograd.grad(y, [x, *trained], dy)
        return [y.detach(), *grads, torch.rand(2)]

    together = run()

    def one_by_one(x: Tensor, weights: Any, biases: Any, adapters: Any) -> list[Tensor]:
        layers = zip(weights, biases, adapters, strict=True)
        return [adapted_linear(x, weight, bias, own) for weight, bias, own in layers]

    monkeypatch.setattr(attention, "adapted_linears", one_by_one)
    for found, wanted in zip(together, run(), strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(together[-1], run()[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_pytorch(dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype, autocast_adapter_dtype=False)
    exact = copy.deepcopy(layer).double()
    args = [x.detach().to(dtype) for x in inputs({})]
    truth = expected(exact, *(x.double() for x in args))[0]
    plain = expected(layer, *args)[0]
    rounding = torch.finfo(dtype).eps * truth.abs().max()
    yardstick = (plain.double() - truth).abs().max()
    y = layer(*args)[0]
    assert y.dtype == dtype
    assert (y.double() - truth).abs().max() <= 2 * yardstick + rounding


@each_form
def test_several_adapters_add_up(form: tuple[str, ...] | None) -> None:
    layer, args = layer_of(form), inputs({})
    layer.add_adapter("other", r=3, lora_alpha=5, use_rslora=True, init_lora_weights=False)
    layer.set_adapter(["default", "other"])
    assert_same(layer, args, {})
    y = layer(*args)[0]
    layer.merge()
    torch.testing.assert_close(layer(*args)[0], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"kdim": 7, "vdim": 9}], ids=["packed", "separate"])
def test_a_hundred_merges_leave_every_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    layer = layer_of(None if not options else FORMS["qkvo"], dtype, **options)
    before = copy.deepcopy(layer.get_base_layer().state_dict())
    for _ in range(100):
        layer.reset_lora_parameters()
        layer.merge()
        merged = layer.get_base_layer().state_dict()
        assert not torch.equal(merged["out_proj.weight"], before["out_proj.weight"])
        state = layer.state_dict()
        assert all(torch.equal(state[name], value) for name, value in before.items())
        layer.unmerge()
        after = layer.get_base_layer().state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_nan_in_the_last_projection_leaves_all() -> None:
    layer = layer_of()
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer.o_lora_B[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge()
    base = layer.get_base_layer().state_dict()
    assert not layer.merged and all(torch.equal(base[name], before[name]) for name in base)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@each_form
def test_state_dict_round_trip(form: tuple[str, ...] | None, merged: bool, assign: bool) -> None:
    model, other = (nn.ModuleDict({"attn": layer_of(form)}) for _ in range(2))
    layer, loaded, args = model["attn"], other["attn"], inputs({})
    assert isinstance(layer, LoraLayer) and isinstance(loaded, LoraLayer)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    if merged:
        layer.merge()
        loaded.merge()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other.load_state_dict({n: v.clone() for n, v in state.items()}, assign=assign)
    assert loaded.merged == merged and torch.equal(loaded(*args)[0], layer(*args)[0])
    if merged:
        layer.unmerge()
        loaded.unmerge()
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value) and torch.equal(state[name], value)


def test_loading_nan_into_a_merged_layer_unmerges_it() -> None:
    layer, state = layer_of(), layer_of().state_dict()
    layer.merge()
    state["out_proj.weight"] = torch.full((E, E), torch.nan)
    with pytest.raises(RuntimeError, match="now unmerged"):
        layer.load_state_dict(state)
    assert not layer.merged and layer.out_proj.weight.isnan().all()
    assert torch.equal(layer.in_proj_weight, state["in_proj_weight"])


def test_adapters_are_renamed_and_deleted() -> None:
    layer, args = layer_of(FORMS["qv"]), inputs({})
    y = layer(*args)[0]
    layer.rename_adapter("default", "english")
    assert {"q_lora_A_english", "v_lora_B_english"} <= set(layer.state_dict())
    assert torch.equal(layer(*args)[0], y)
    layer.delete_adapter("english")
    assert set(layer.state_dict()) == set(layer.get_base_layer().state_dict())


def test_a_config_reaches_it() -> None:
    base = nn.MultiheadAttention(E, HEADS, dtype=torch.float64)
    layer, args = layer_for("attn", base), inputs({})
    assert isinstance(layer, MultiheadAttention) and torch.equal(layer(*args)[0], base(*args)[0])
    settings = {"r": RANK, "lora_alpha": 3, "init_lora_weights": False}
    layer.add_adapter("default", **settings)
    shapes = {name: tuple(p.shape) for name, p in layer.peft_parameters("default").items()}
    assert shapes == layer.peft_shapes(layer.adapters["default"])
    assert_same(layer, args, {})


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_the_same(way: str) -> None:
    layer, args = layer_of(FORMS["qv"]), inputs({})
    other = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert torch.equal(other(*args)[0], layer(*args)[0])
    layer.merge()
    other = copy.deepcopy(layer)
    other.unmerge()
    assert layer.merged and not torch.equal(layer.in_proj_weight, other.in_proj_weight)


def test_positional_arguments_are_loratorchs() -> None:
    layer = MultiheadAttention(E, HEADS, ["q", "v"], 4, 8, dropout=0.5, bias=False)
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.dropout) == (4, 8, 2, 0.5)
    lora = {name: tuple(p.shape) for name, p in layer.adapter_parameters("default").items()}
    matrices = {"lora_A": (4, E), "lora_B": (E, 4)}
    assert lora == {f"{p}_{part}": shape for p in "qv" for part, shape in matrices.items()}
    plain = MultiheadAttention(E, HEADS)
    assert plain.r == 0 and set(plain.state_dict()) == set(
        nn.MultiheadAttention(E, HEADS).state_dict()
    )


def test_from_multihead_attention_shares_and_keeps() -> None:
    base = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64).eval()
    base.in_proj_weight.requires_grad_(False)
    layer = MultiheadAttention.from_multihead_attention(base, RANK, 3, 0.5)
    assert layer.in_proj_weight is base.in_proj_weight and layer.out_proj is base.out_proj
    assert not layer.training and layer.batch_first and layer.lora_dropout == 0.5
    assert set(layer.adapter_parameters("default")) == {"lora_A", "lora_B", "o_lora_A", "o_lora_B"}
    assert base._qkv_same_embed_dim and type(layer.get_base_layer()) is nn.MultiheadAttention
    other = nn.MultiheadAttention(E, HEADS, kdim=7)
    assert MultiheadAttention.from_multihead_attention(other).enable_lora == ("q", "k", "v", "o")


def test_pefts_checkpoint_and_numbers() -> None:
    """PEFT applies the update of out_proj twice: its lora_B gets half of ours."""
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(E, HEADS, dtype=torch.float64)})
    layer = MultiheadAttention.from_multihead_attention(
        copy.deepcopy(model["attn"]), RANK, 3, init_lora_weights=False
    )
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["attn"], r=RANK, lora_alpha=3)
    )
    ours = layer.peft_parameters("default")
    state = peft.get_peft_model_state_dict(theirs)
    prefix = "base_model.model.attn."
    assert {name.removeprefix(prefix): value.shape for name, value in state.items()} == {
        name: value.shape for name, value in ours.items()
    }
    halved = "base_layer.out_proj.lora_B.weight"
    peft.set_peft_model_state_dict(
        theirs, {prefix + n: p.detach() * (0.5 if n == halved else 1) for n, p in ours.items()}
    )
    args = [x.detach() for x in inputs({})]
    y = theirs.base_model.model["attn"](*args)[0]
    torch.testing.assert_close(layer(*args)[0], y, rtol=1e-12, atol=1e-12)


def test_count_of_trainable_parameters() -> None:
    """Two towers of 12 layers of width 768; see also tests/test_model.py."""
    stack = nn.ModuleList(MultiheadAttention(768, 12, r=16, device="meta") for _ in range(24))
    lora_ext.mark_only_lora_as_trainable(stack)
    assert sum(p.numel() for p in stack.parameters() if p.requires_grad) == 2_359_296


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "projection": ({"form": ("q", "x")}, ValueError, "enable_lora: got \\('q', 'x'\\)"),
    "no projection": ({"form": ()}, ValueError, "got no projection"),
    "one lora_A of two inputs": ({"form": None, "kdim": 7}, ValueError, "enable_lora: got None"),
}


@pytest.mark.parametrize(("options", "kind", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_construction(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        layer_of(**options)


X = torch.zeros(L, N, E, dtype=torch.float64)
BAD_CALLS: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], type[Exception], str]] = {
    "dimensions": ((X[0, 0], X, X), {}, ValueError, "query, key, value: got shapes"),
    "batches": ((X[:, :1], X, X), {}, ValueError, "the same batch"),
    "lengths": ((X, X, X[:2]), {}, ValueError, "key and value of the same length"),
    "size": ((X[..., :5], X, X), {}, ValueError, "x"),
    "attn_mask": ((X, X, X), {"attn_mask": mask(L, S)}, ValueError, "attn_mask: got shape"),
    "padding": ((X, X, X), {"key_padding_mask": mask(N, S)}, ValueError, "key_padding_mask: got"),
    "mask dtype": ((X, X, X), {"attn_mask": torch.ones(L, L).int()}, TypeError, "torch.int32"),
    "hint alone": ((X, X, X), {"is_causal": True}, ValueError, "is_causal"),
}


@pytest.mark.parametrize(
    ("args", "call", "kind", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys()
)
def test_wrong_calls(
    args: tuple[Tensor, ...], call: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        layer_of()(*args, **call)


def test_computed_weights_and_lora_bias_are_refused() -> None:
    base = nn.MultiheadAttention(E, HEADS)
    prune.identity(base, "in_proj_weight")
    with pytest.raises(ValueError, match="computes its in_proj_weight"):
        MultiheadAttention.from_multihead_attention(base)
    with pytest.raises(TypeError, match="expected a torch"):
        MultiheadAttention.from_multihead_attention(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lora_bias"):
        layer_of().add_adapter("other", lora_bias=True)


@pytest.mark.parametrize("form", [FORMS["peft"], FORMS["qv"]], ids=["peft", "qv"])
def test_compiles_into_one_graph(form: tuple[str, ...] | None) -> None:
    layer, args = layer_of(form), inputs({})
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args)[0], layer(*args)[0])
