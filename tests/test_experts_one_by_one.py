"""Adapters of stacked experts, each expert on its own rows: against W + scaling * B A, formed, in
float64; what is never formed; tokens with adapters of their own; transformers' registry."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
import transformers
from problems import rms
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lora_ext
import lora_ext.integrations.experts
from lora_ext.nn import ParamLayer, experts

HIDDEN, INNER, EXPERTS = 24, 20, 5


def made(kind: type[nn.Module], config: Any) -> nn.Module:
    config._experts_implementation = "eager"
    module: nn.Module = kind(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS
    )
    return made(MixtralExperts, config)


def qwen() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS
    )
    return made(Qwen3MoeExperts, config)


def gpt_oss() -> nn.Module:  # transposed, with biases, gate and up interleaved
    config = transformers.GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS
    )
    return made(GptOssExperts, config)


def nemotron() -> nn.Module:  # without a gate
    config = transformers.NemotronHConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS
    )
    return made(NemotronHExperts, config)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "qwen": qwen,
    "gpt_oss": gpt_oss,
    "nemotron": nemotron,
}
FIRST = {"nemotron": "up_proj"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def adapted(family: str, ranks: dict[str, int], weights: list[str] | None = None) -> ParamLayer:
    names = weights or [FIRST.get(family, "gate_up_proj"), "down_proj"]
    layer = ParamLayer.from_module(MODULES[family](), names, r=0)
    for name, r in ranks.items():
        layer.add_adapter(name, r=r, lora_alpha=3.0, init_lora_weights=False)
    layer.set_adapter(list(ranks))
    return layer


def routing(tokens: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, EXPERTS, generator=generator).topk(k, -1).indices
    return chosen, torch.rand(tokens, k, generator=generator)


@contextmanager
def formed(layer: ParamLayer) -> Iterator[None]:
    """W + scaling * B A in every call, as of modules that are no experts."""
    layer._why_formed = lambda: "the test"  # type: ignore[method-assign]
    try:
        yield
    finally:
        del layer.__dict__["_why_formed"]


def results(layer: ParamLayer, x: Tensor, chosen: Tensor, weights: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    weights = weights.detach().clone().requires_grad_()
    y = layer(x, chosen, weights)
    parts = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    loss = (y.double() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    grads = torch.autograd.grad(loss, [x, weights, *parts.values()])
    return dict(zip(["x", "weights", *parts], grads, strict=True)) | {"y": y.detach()}


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("ranks", [{"a": 3}, {"a": 3, "b": 4}], ids=["one", "two"])
def test_in_float64_it_is_the_sum(family: str, ranks: dict[str, int]) -> None:
    """Also with an expert that no token goes to, and with numbers of other processes' experts."""
    layer = adapted(family, ranks).double()
    x = torch.randn(11, HIDDEN, dtype=torch.float64)
    for k in (1, 2, EXPERTS):
        chosen, weights = routing(len(x), k, seed=k)
        chosen[chosen == 2] = 1
        found = results(layer, x, chosen, weights.double())
        with formed(layer):
            wanted = results(layer, x, chosen, weights.double())
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_no_larger_than_those_of_the_sum(family: str, dtype: torch.dtype) -> None:
    squares: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(12):
        torch.manual_seed(seed)
        layer = adapted(family, {"a": 4}).to(dtype)
        exact = copy.deepcopy(layer).double()
        x = torch.randn(64, HIDDEN).to(dtype)
        chosen, weights = routing(len(x), 2, seed)
        found = results(layer, x, chosen, weights.to(dtype))
        wanted = results(exact, x.double(), chosen, weights.to(dtype).double())
        with formed(layer):
            plain = results(layer, x, chosen, weights.to(dtype))
        for name, value in wanted.items():
            mine, theirs = (rms(one[name].double() - value) ** 2 for one in (found, plain))
            squares.setdefault(name, []).append((mine, theirs, rms(value) ** 2))
    for name, draws in squares.items():
        mine, theirs, size = (sum(column) for column in zip(*draws, strict=True))
        # Rounding the sum to 16 bits is what is saved. In float32 two roundings come in its place,
        # of h and of the update to which the base's product is added. Beyond four standard
        # deviations of the errors of h, of 64 tokens, 2 experts, rank 4 and 12 draws, is no luck.
        more = 2 * 2.0**-48 * size if dtype == torch.float32 else 0.0
        luck = 1 + 4 / (64 * 2 * 4 * 12) ** 0.5
        assert mine <= (theirs + more) * luck**2, name


@pytest.mark.parametrize("family", MODULES)
def test_one_weight_alone(family: str) -> None:
    for name in (FIRST.get(family, "gate_up_proj"), "down_proj"):
        layer = adapted(family, {"a": 3}, [name]).double()
        x = torch.randn(9, HIDDEN, dtype=torch.float64)
        chosen, weights = routing(9, 2, seed=1)
        found = layer(x, chosen, weights.double())
        with formed(layer):
            torch.testing.assert_close(found, layer(x, chosen, weights.double()))


def test_tokens_without_experts_of_this_process() -> None:
    layer = adapted("mixtral", {"a": 3})
    x = torch.randn(6, HIDDEN)
    chosen, weights = routing(6, 2, seed=2)
    part = layer(x, torch.where(chosen < 3, chosen, EXPERTS), weights)
    rest = layer(x, torch.where(chosen >= 3, chosen, EXPERTS), weights)
    torch.testing.assert_close(part + rest, layer(x, chosen, weights))
    assert not layer(x, torch.full_like(chosen, EXPERTS), weights).any()
    assert layer(x[:0], chosen[:0], weights[:0]).shape == (0, HIDDEN)


class Largest(TorchDispatchMode):
    """The most elements that a result has, but for views of the layer's own parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.numel = 0
        self.own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(made):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self.own:
                self.numel = max(self.numel, one.numel())
        return made


@pytest.mark.parametrize("family", MODULES)
def test_no_weight_is_formed(family: str) -> None:
    layer = adapted(family, {"a": 2})
    x = torch.randn(3, HIDDEN, requires_grad=True)
    chosen, weights = routing(3, 2, seed=3)
    with Largest(layer) as ours:
        layer(x, chosen, weights).sum().backward()
    one_expert = INNER * HIDDEN
    assert ours.numel < one_expert
    with formed(layer), Largest(layer) as theirs:
        layer(x, chosen, weights).sum().backward()
    assert theirs.numel >= EXPERTS * one_expert


@pytest.mark.parametrize("family", MODULES)
def test_each_token_its_own_adapter(family: str) -> None:
    layer = adapted(family, {"a": 3, "b": 5})
    x = torch.randn(12, HIDDEN)
    chosen, weights = routing(12, 2, seed=4)
    ids = torch.tensor([0, 1, -1, 1, 0, 0, -1, 1, 1, 0, -1, 1])
    scale = torch.rand(12, requires_grad=True)
    with lora_ext.batch(["a", "b"], ids=ids, scale=scale):
        y = layer(x, chosen, weights)
        assert layer._lora_explain(12)[0] == "lora_linear_grouped"
    y.square().sum().backward()
    assert scale.grad is not None and bool((scale.grad[ids == -1] == 0).all())
    with lora_ext.batch(["a", "b"], ids=ids):
        y = layer(x, chosen, weights)
    for place, name in enumerate([*"ab", None]):
        layer.set_adapter([] if name is None else name)
        rows = ids == (place if name else -1)
        torch.testing.assert_close(y[rows], layer(x, chosen, weights)[rows])


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("planned", [False, True], ids=["one adapter", "planned"])
def test_a_product_is_one_call_of_all_experts(planned: bool) -> None:
    layer = adapted("mixtral", {"a": 3, "b": 5})
    layer.set_adapter("a")
    x = torch.randn(12, HIDDEN, requires_grad=True)
    chosen, weights = routing(12, 2, seed=7)
    ids = torch.arange(12) % 3 - 1 if planned else torch.zeros(12, dtype=torch.int64)
    with lora_ext.batch(["a", "b"], ids=ids) if planned else nullcontext(), Calls() as calls:
        y = layer(x, chosen, weights)
        forward, calls.names = calls.names, []
        y.sum().backward()
    products = [name for name in forward if name.startswith("lora_ext::")]
    assert products == ["lora_ext::lora_linear_grouped_fwd"] * 2
    backward = [name for name in calls.names if name.startswith("lora_ext::")]
    assert backward == ["lora_ext::lora_linear_grouped_bwd"] * 2
    assert "aten::cat" not in forward


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_experts_rows_are_lora_linear(family: str, dtype: torch.dtype) -> None:
    """Bit for bit, and so are its gradients."""
    layer = adapted(family, {"a": 3}).to(dtype)
    x = torch.randn(70, HIDDEN).to(dtype).requires_grad_()
    chosen = torch.tensor([0] * 40 + [1] * 28 + [3] + [4])[torch.randperm(70)].unsqueeze(1)
    routed = experts.route(chosen, EXPERTS)
    name = layer.WEIGHTS[0]
    factors = layer._factors(["a"], name)
    weights = layer._matrices(name).unbind(0)
    biases = getattr(layer, f"{name}_bias") if layer.has_bias else [None] * EXPERTS
    rows = x.index_select(0, routed.tokens)
    wanted = torch.cat(
        [
            lora_ext.lora_linear(
                *(own, weights[e], biases[e], factors.A[e], factors.B[e]), scaling=factors.scaling
            )
            for e, own in enumerate(rows.split(routed.counts))
            if len(own)
        ]
    )
    slots = experts.slots_of_one(routed)
    found = experts.expert_linear(layer, name, rows, routed.counts, slots, [factors])
    assert torch.equal(found, wanted)
    leaves = [x, *(p for n, p in layer.named_parameters() if n.startswith(f"{name}_lora"))]
    dy = torch.randn_like(found)
    grads = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for y in (found, wanted)]
    assert all(torch.equal(got, want) for got, want in zip(*grads, strict=True))


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_tokens_adapters_change_no_bit(family: str, dtype: torch.dtype) -> None:
    """And tokens without adapter are those of the frozen experts, run the same way."""
    layer = adapted(family, {"a": 3, "b": 5, "c": 2}).to(dtype)
    x = torch.randn(40, HIDDEN).to(dtype)
    chosen, weights = routing(40, 2, seed=8)
    weights = weights.to(dtype)
    ids = torch.randint(-1, 3, (40,))
    own = ids == 0
    layer.set_adapter("a")
    leaves = [p for p in layer.parameters() if p.requires_grad]
    each = []
    for others in (ids, torch.randint(-1, 3, (40,))):
        others = torch.where(own, 0, torch.where(others == 0, -1, others))
        with lora_ext.batch(["a", "b", "c"], ids=others):
            y = layer(x, chosen, weights)
        grads = torch.autograd.grad(y[own].square().sum(), leaves)
        each.append([y[own], *grads])
    assert all(torch.equal(got, want) for got, want in zip(*each, strict=True))
    with lora_ext.batch(["a", "b", "c"], ids=ids):
        y = layer(x, chosen, weights)
    frozen = experts.experts_forward(layer, x, chosen, weights)
    assert torch.equal(y[ids == -1], frozen[ids == -1])


NOTHING: dict[str, dict[str, Any]] = {
    "no names": {"adapters": [None, None]},
    "a name that the layer lacks": {"adapters": ["other", "other"]},
    "ids of none": {"adapters": ["a", "b"], "ids": torch.full((2, 4), -1)},
    "after the last": {"adapters": ["a", "b"], "rows": (2, 4), "after": [4, None]},
    "an empty segment": {"adapters": ["a", None], "lengths": [0, 8]},
}


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("plan", NOTHING.values(), ids=NOTHING.keys())
def test_tokens_of_no_adapter_alone_are_the_bases(plan: dict[str, Any], family: str) -> None:
    """Whatever is active; there is nothing then that has a gradient."""
    layer = adapted(family, {"a": 2, "b": 3})
    x, (chosen, weights) = torch.randn(8, HIDDEN), routing(8, 2, seed=2)
    with lora_ext.batch(["a", None], rows=(2, 4)):
        among_others = layer(x, chosen, weights)[4:]
    with suppress(ValueError), lora_ext.batch(**plan):  # no layer has "other", it says at the end
        alone = layer(x, chosen, weights)
    layer.set_adapter([])
    expected = layer(x, chosen, weights)
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone[4:], among_others)
    assert not alone.requires_grad


def test_zero_gradients_reach_experts() -> None:
    layer = adapted("mixtral", {"a": 2, "b": 3})
    x, (chosen, weights) = torch.randn(8, HIDDEN), routing(8, 2, seed=2)
    with lora_ext.batch(["a", "b"], rows=(2, 4), after=[0, 4], zero_grads=True):
        y = layer(x, chosen, weights)
    y.sum().backward()
    grads = [p.grad for p in layer.adapter_parameters("b").values()]
    assert all(grad is not None and not grad.any() for grad in grads)
    with lora_ext.batch(["a", "b"], rows=(2, 4), after=[0, 4]):
        assert torch.equal(layer(x, chosen, weights), y)


def test_several_adapters_of_a_token_are_refused() -> None:
    """Gates of one for each are strengths."""
    layer = adapted("mixtral", {"a": 3, "b": 5})
    chosen, weights = routing(4, 2, seed=5)
    x, gates = torch.randn(4, HIDDEN), torch.rand(4, 2)
    with (
        lora_ext.batch(["a", "b"], gates=gates),
        pytest.raises(ValueError, match="one adapter in each expert"),
    ):
        layer(x, chosen, weights)
    ids = torch.tensor([[0, -1], [-1, 1], [-1, -1], [1, -1]])
    with lora_ext.batch(["a", "b"], ids=ids, gates=gates):
        y = layer(x, chosen, weights)
    own = gates[torch.arange(4), torch.tensor([0, 1, 0, 0])]
    with lora_ext.batch(["a", "b"], ids=ids.amax(1), scale=own):
        torch.testing.assert_close(y, layer(x, chosen, weights))


def test_explain_says_which_way_and_why() -> None:
    layer = adapted("mixtral", {"a": 3})
    assert layer._lora_explain(8) == (
        "lora_linear",
        "for the rows of each expert, fused with its base product",
    )
    layer.config._experts_implementation = "sonicmoe"
    path, reason = layer._lora_explain(8)
    assert path == "composed" and "experts_implementation='sonicmoe'" in reason
    plain = ParamLayer.from_module(nn.Linear(4, 3), ["weight"])
    assert "none of transformers' experts" in plain._lora_explain(8)[1]


def test_compiled_code_forms_the_sum() -> None:
    layer = adapted("mixtral", {"a": 3})
    layer.config._experts_implementation = "batched_mm"
    x = torch.randn(5, HIDDEN)
    chosen, weights = routing(5, 2, seed=6)
    compiled = torch.compile(layer)
    torch.testing.assert_close(compiled(x, chosen, weights), layer(x, chosen, weights))


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_registered_with_transformers(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        num_experts=4, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    tokens = torch.randint(1, 64, (2, 7))
    wanted = model(tokens).logits
    model.set_experts_implementation("lora_ext")
    torch.testing.assert_close(model(tokens).logits, wanted)
    lora = lora_ext.get_lora_model(
        model,
        lora_ext.LoraConfig(
            target_modules=[],
            target_parameters=["gate_up_proj", "down_proj"],
            init_lora_weights=False,
        ),
    ).eval()
    found = lora(tokens).logits
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(lora.merge_and_unload()(tokens).logits, found)
