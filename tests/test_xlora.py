"""X-LoRA: results, gradients and generated tokens are PEFT's and those of a composition in plain
PyTorch; each token and layer has its own mixture, and each call its own."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from xlora_models import TOKENS, Composed, base_of, ours, saved_experts, theirs_of

import lora_ext

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise": {"layerwise_scalings": True},
    "deep": {"xlora_depth": 3, "layerwise_scalings": True},
    "one linear layer": {"xlora_depth": 1},
    "temperature": {"softmax_temperature": 0.3, "layerwise_scalings": True},
    "pass value": {"scaling_pass_value": 0.25, "global_scaling_weight": 1.5},
    "top k": {"top_k_lora": 1, "layerwise_scalings": True},
    "softmax of top k": {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    "no softmax": {"enable_softmax": False, "global_scaling_weight": 0.5},
}


def loss_and_gradients(model: Any, **more: Any) -> tuple[Tensor, list[Tensor]]:
    classifier = list(model.internal_xlora_classifier.parameters())
    loss = model(input_ids=TOKENS, labels=TOKENS, **more).loss
    return loss.detach(), list(torch.autograd.grad(loss, classifier))


def assert_close(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    largest = max(one.abs().max() for one in wanted)
    assert largest > 0
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= bound * largest


@pytest.mark.filterwarnings("ignore:.*enable_softmax")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_results_gradients_and_generated_tokens_are_pefts(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    adapters = saved_experts(family, tmp_path)
    model = ours(family, adapters, **options)
    theirs = theirs_of(model, family, adapters, **options)
    y, wanted = model(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits
    with model.disable_adapter():
        base = model(input_ids=TOKENS).logits
    assert (y - wanted).abs().max() <= 1e-5
    assert (y - base).abs().max() > 1e-2
    scalings = model.get_latest_scalings()
    assert (scalings - theirs.get_latest_scalings()).abs().max() <= 1e-5
    found, wanted = (loss_and_gradients(one)[1] for one in (model, theirs))
    assert max((a - b).abs().max() for a, b in zip(found, wanted, strict=True)) <= 1e-5
    for cached in (False, True):
        tokens = model.generate(input_ids=TOKENS, max_new_tokens=6, use_cache=cached)
        assert torch.equal(tokens, theirs.generate(input_ids=TOKENS, max_new_tokens=6))
    # Without what float32 rounds of small differences.
    theirs.internal_xlora_classifier.dtype = torch.float64
    found, wanted = (loss_and_gradients(one.double())[1] for one in (model, theirs))
    assert_close(found, wanted, 1e-10)


# Against float64


def composition(model: Any) -> tuple[Any, list[Composed]]:
    """The base with layers in plain PyTorch, in the order of the scalings."""
    copied = copy.deepcopy(model)
    layers = {
        name: Composed(layer, list(model.peft_config)) for name, layer in copied.lora_layers()
    }
    base = copied.unload()
    for name, layer in layers.items():
        base.set_submodule(name, layer)
    return base, list(layers.values())


@pytest.mark.parametrize("options", [OPTIONS["layerwise"], OPTIONS["temperature"]], ids=["1", "T"])
def test_float64_is_the_composition(options: dict[str, Any], tmp_path: Path) -> None:
    """Exact but for the last digits, with the gradients of the classifier's parameters."""
    model = ours("llama", saved_experts("llama", tmp_path), **options).double()
    base, layers = composition(model)
    classifier = copy.deepcopy(model.internal_xlora_classifier)
    with torch.no_grad():
        plain = base_of("llama").double()
        hidden = plain(input_ids=TOKENS, output_hidden_states=True).hidden_states[-1]
    logits = classifier.layers(hidden).unflatten(-1, (len(layers), 2))
    scalings = torch.softmax(logits / options.get("softmax_temperature", 1.0), -1)
    for place, layer in enumerate(layers):
        layer.gates = scalings[:, :, place]
    wanted = base(input_ids=TOKENS, labels=TOKENS)
    exact = torch.autograd.grad(wanted.loss, list(classifier.parameters()))
    y = model(input_ids=TOKENS).logits
    torch.testing.assert_close(y, wanted.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.get_latest_scalings(), scalings, rtol=1e-12, atol=1e-12)
    assert_close(loss_and_gradients(model)[1], list(exact), 1e-11)


def pick(model: Any, which: int) -> None:
    """Scalings of 1 for one adapter and exactly 0 for others."""
    *_, (_, last) = model.internal_xlora_classifier.linears()
    nn.init.zeros_(last.weight)
    last.bias.data = torch.where(torch.arange(len(last.bias)) == which, 1e4, 0.0)


@pytest.mark.parametrize("which", [0, 1])
def test_one_hot_scalings_are_that_adapter(which: int, tmp_path: Path) -> None:
    adapters = saved_experts("gpt2", tmp_path)
    model = ours("gpt2", adapters)
    pick(model, which)
    alone = lora_ext.LoraModel.from_pretrained(base_of("gpt2"), adapters[str(which)])
    with torch.no_grad():
        y, wanted = model(input_ids=TOKENS).logits, alone(input_ids=TOKENS).logits
    assert (y - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_the_scaling_pass_is_the_base_bit_for_bit(tmp_path: Path) -> None:
    model = ours("llama", saved_experts("llama", tmp_path))
    seen: list[Tensor] = []
    model.internal_xlora_classifier.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(input_ids=TOKENS)
    plain = base_of("llama")(input_ids=TOKENS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(seen[0], plain)
    model.set_scaling_pass_value(None)
    assert model.xlora_config.scaling_pass_value == 0.5
    model(input_ids=TOKENS)
    assert (seen[1] - plain).abs().max() > 1e-3


# Top k


def three(tmp_path: Path, **options: Any) -> Any:
    return ours("llama", saved_experts("llama", tmp_path, ("a", "b", "c")), **options)


@pytest.mark.parametrize("layerwise", [False, True])
def test_top_k_is_of_each_token_and_layer(layerwise: bool, tmp_path: Path) -> None:
    """Also the softmax of the chosen ones, which others have taken over all tokens."""
    model = three(
        tmp_path,
        top_k_lora=2,
        enable_softmax=False,
        enable_softmax_topk=True,
        layerwise_scalings=layerwise,
    )
    model(input_ids=TOKENS)
    classifier, scalings = model.internal_xlora_classifier, model.get_latest_scalings()
    gates, chosen = classifier.gates(scalings if layerwise else scalings[:, :, :1])
    torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:-1]))
    assert len(chosen.flatten(0, 2).sort(-1).values.unique(dim=0)) > 1, "all tokens chose the same"
    for row in [(0, 0, 0), (1, 6, -1), (0, 3, -1)]:
        values = scalings[row]
        kept = values.topk(2)
        place = row[2] if layerwise else 0
        assert torch.equal(chosen[place, row[0], row[1]], kept.indices)
        torch.testing.assert_close(gates[place, row[0], row[1]], kept.values.softmax(-1))


def test_adapters_that_are_not_chosen_are_not_there(tmp_path: Path) -> None:
    model = three(tmp_path, top_k_lora=2)
    *_, (_, last) = model.internal_xlora_classifier.linears()
    last.bias.data = torch.tensor([0.0, -1e4, 0.0])
    wanted = model(input_ids=TOKENS).logits
    for _, layer in model.layers_with("b"):
        for parameter in layer.adapter_parameters("b").values():
            parameter.data.fill_(float("nan"))
    assert torch.equal(model(input_ids=TOKENS).logits, wanted)
    model.set_topk_lora(None)
    assert model(input_ids=TOKENS).logits.isnan().any()


# Where layers run again, several times, at the same time


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "options", [{}, OPTIONS["layerwise"], OPTIONS["top k"]], ids=["", "l", "k"]
)
def test_checkpointing_gives_the_same_gradients(
    options: dict[str, Any], reentrant: bool, tmp_path: Path
) -> None:
    model = ours("llama", saved_experts("llama", tmp_path), **options).train()
    loss, wanted = loss_and_gradients(model, use_cache=False)
    runs: list[int] = []
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    layer.register_forward_hook(lambda *_: runs.append(1))
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    found = [one.grad for one in model.internal_xlora_classifier.parameters()]
    assert len(runs) == 3, "the scaling pass, the forward, and again in backward"
    assert_close(found, wanted, 1e-6)
    assert torch.isfinite(loss)


class Twice(nn.Module):
    """One linear layer, called twice, after an embedding and between convolutions: over tokens, and
    of one input for each request."""

    def __init__(self, checkpoint: Any = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, 32)
        self.linear = nn.Linear(32, 32)
        self.image = nn.Conv2d(3, 32, 4)
        self.checkpoint = checkpoint

    def part(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()

    def forward(self, input_ids: Tensor, pixels: Tensor, **_: Any) -> Any:
        x = self.embedding(input_ids) + self.image(pixels).flatten(2).transpose(1, 2)
        for _ in range(2):
            x = self.checkpoint(self.part, x) if self.checkpoint else self.part(x)
        return _Result(x, (x,))


class _Result:
    def __init__(self, x: Tensor, hidden_states: Any) -> None:
        self.x, self.hidden_states = x, hidden_states


PIXELS = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
MODULES = ["embedding", "linear", "image"]


def twice(tmp_path: Path, checkpoint: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    base = Twice()
    adapters = {}
    for name, modules in (("a", MODULES), ("b", MODULES[1:])):
        config = lora_ext.LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
        lora_ext.LoraModel(copy.deepcopy(base), config).save_pretrained(tmp_path / name)
        adapters[name] = tmp_path / name
    base.checkpoint = checkpoint
    config = lora_ext.XLoraConfig(hidden_size=32, adapters=adapters, xlora_depth=1, **options)
    return lora_ext.XLoraModel(base, config)


def test_layers_of_all_kinds_and_called_twice(tmp_path: Path) -> None:
    """Inputs of one row for each request have the mean of its tokens' scalings."""
    model = twice(tmp_path, layerwise_scalings=True)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    y = model(TOKENS, PIXELS, attention_mask=mask).x
    scalings = model.get_latest_scalings()
    assert scalings.shape == (2, 7, 3, 2)
    layers = dict(model.lora_layers())
    gates = dict(zip(layers, scalings.unbind(2), strict=True))
    base = copy.deepcopy(model).unload()

    def update(name: str, adapter: str, x: Tensor) -> Tensor:
        layer = layers[name]
        if adapter not in layer.adapters:
            return torch.zeros(())
        delta = layer.get_delta_weight(adapter)
        if name == "embedding":
            return delta[x]
        return nn.functional.conv2d(x, delta) if name == "image" else x @ delta.T

    def run(name: str, x: Tensor, gate: Tensor) -> Tensor:
        result = getattr(base, name)(x)
        for place, adapter in enumerate("ab"):
            result = result + gate[..., place].reshape(*gate.shape[:-1], *[1] * (
                result.dim() - gate.dim() + 1
            )) * update(name, adapter, x)  # fmt: skip
        return result

    of_requests = (gates["image"] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    x = run("embedding", TOKENS, gates["embedding"])
    x = x + run("image", PIXELS, of_requests).flatten(2).transpose(1, 2)
    for _ in range(2):
        x = run("linear", x, gates["linear"]).tanh()
    torch.testing.assert_close(y, x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_ones_own_follows_or_is_refused(reentrant: bool, tmp_path: Path) -> None:
    def own(function: Any, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)

    wanted = None
    for checkpoint in (None, lora_ext.batching.Checkpointing(own)):
        model = twice(tmp_path, checkpoint, layerwise_scalings=True)
        torch.manual_seed(3)
        for parameter in model.internal_xlora_classifier.parameters():
            nn.init.normal_(parameter.data)
        model(TOKENS, PIXELS).x.square().sum().backward()
        found = [one.grad for one in model.internal_xlora_classifier.parameters()]
        if wanted is not None:
            assert_close(found, wanted, 1e-6)
        wanted = found
    model = twice(tmp_path, own)
    y = model(TOKENS, PIXELS).x
    with pytest.raises(
        ValueError, match=r"X-LoRA: got a call outside.*Checkpointing\(checkpoint\)"
    ):
        y.square().sum().backward()


def test_requests_of_two_threads_have_their_own_scalings(tmp_path: Path) -> None:
    model = ours("llama", saved_experts("llama", tmp_path), layerwise_scalings=True)
    inputs = [TOKENS[:1], TOKENS[1:, :4]]
    with torch.no_grad():
        wanted = [model(input_ids=tokens).logits for tokens in inputs]
    both = threading.Barrier(2, timeout=60)

    def meet(*_: Any) -> None:
        both.wait()

    for module in model.modules():
        if isinstance(module, lora_ext.nn.LoraLayer):  # in each layer of both passes they meet
            module.register_forward_pre_hook(meet)
    found: list[Any] = [None, None]

    def run(which: int) -> None:
        with torch.no_grad():
            found[which] = model(input_ids=inputs[which]).logits

    threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not lora_ext.batching.in_use


def test_nothing_stays_after_an_error(tmp_path: Path) -> None:
    model = ours("llama", saved_experts("llama", tmp_path))
    wanted = model(input_ids=TOKENS).logits
    layer = model.get_submodule("base_model.model.model.layers.2.mlp.up_proj")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = layer.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=TOKENS)
    hook.remove()
    assert lora_ext.batching.current_plan() is None and not lora_ext.batching.in_use
    assert torch.equal(model(input_ids=TOKENS).logits, wanted)
