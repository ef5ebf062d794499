"""fuse_blocks: the blocks of models as one operator each, beside the same models layer by layer."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext
from lora_ext import LoraConfig

pytest.importorskip("transformers")
import transformers

F = nn.functional
SIZES = {
    **{"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 50},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
QKV = "self_attn", "one x", ("q_proj", "k_proj", "v_proj")
MLP = "mlp", "mlp", ("gate_proj", "up_proj", "down_proj")
NO_QKV = "self_attn", None, ("o_proj", "qkv_proj")
GATE_UP = "mlp", "mlp", ("gate_up_proj", "down_proj")
FAMILIES: dict[str, tuple[Any, dict[str, Any], list[Any]]] = {
    "llama": (transformers.LlamaConfig, {"mlp_bias": True}, [QKV, MLP]),
    "mistral": (transformers.MistralConfig, {}, [QKV, MLP]),
    "qwen2": (transformers.Qwen2Config, {}, [QKV, MLP]),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}, [QKV, MLP]),
    "gemma": (transformers.GemmaConfig, {"head_dim": 8}, [QKV, MLP]),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 8}, [QKV, MLP]),
    "phi3": (transformers.Phi3Config, {}, [NO_QKV, GATE_UP]),
    "stablelm": (transformers.StableLmConfig, {}, [QKV, MLP]),
    "olmo": (transformers.OlmoConfig, {"clip_qkv": 3.0}, [QKV, MLP]),
    "olmo2": (transformers.Olmo2Config, {}, [QKV, MLP]),
    "granite": (transformers.GraniteConfig, {}, [QKV, MLP]),
}
TOKENS = torch.arange(18).view(2, 9) % 47 + 3


def base_of(family: str = "llama") -> nn.Module:
    kind, more, _ = FAMILIES[family]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(kind(**SIZES | more))


def model_of(family: str = "llama", **more: Any) -> Any:
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    config = LoraConfig(**{**options, "init_lora_weights": False, **more})  # type: ignore[arg-type]
    return lora_ext.get_lora_model(base_of(family), config).train()


def step(model: nn.Module) -> dict[str, Tensor]:
    """Logits, and every gradient; of one seed for all masks."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    out.loss.backward()
    named = ((n.removeprefix("_orig_mod."), p.grad) for n, p in model.named_parameters())
    grads = {name: grad for name, grad in named if grad is not None}
    return {"logits": out.logits.detach(), **grads}


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        error = (found[name] - want).norm() / want.norm()
        assert error <= 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_layers(family: str) -> None:
    """And what is fused is said; and compiled there is no graph break."""
    model = model_of(family)
    state, wanted = list(model.state_dict()), step(model)
    blocks = lora_ext.fuse_blocks(model)
    told = [(one.name.rpartition(".")[2], one.kind, one.layers) for one in blocks]
    assert told == FAMILIES[family][2]
    assert [one.fused for one in blocks] == [one.kind is not None for one in blocks]
    check_same(step(model), wanted)
    assert list(model.state_dict()) == state
    check_same(step(torch.compile(model, fullgraph=True, backend="eager")), wanted)
    torch.compiler.reset()
    lora_ext.unfuse_blocks(model)
    assert not lora_ext.fused_blocks(model)
    assert all(torch.equal(found, wanted[name]) for name, found in step(model).items())


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["down_proj"], ["up_proj", "k_proj"]], ids="-".join
)
def test_adapters_on_some_layers(targets: list[str]) -> None:
    model = model_of(target_modules=targets)
    wanted = step(model)
    assert all(block.fused for block in lora_ext.fuse_blocks(model, recompute=True))
    check_same(step(model), wanted)


def test_less_is_kept_for_backward() -> None:
    def kept(model: nn.Module) -> int:
        found: dict[int, int] = {}
        parameters = {p.data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=TOKENS, use_cache=False)
        return sum(found.values())

    model = model_of()
    before = kept(model)
    lora_ext.fuse_blocks(model)
    half = kept(model)
    lora_ext.fuse_blocks(model, recompute=True)
    inner = TOKENS.numel() * 40 * 4
    assert before - half == 2 * inner  # what f made, and the product
    assert half - kept(model) == 2 * inner  # what gate and up made


def fused(**more: Any) -> tuple[Any, Any]:
    """A model, and one of the same that is fused."""
    model = model_of(**more)
    other = copy.deepcopy(model)
    lora_ext.fuse_blocks(other)
    return model, other


def test_copies_and_pickles_stay_fused() -> None:
    _, model = fused()
    wanted = step(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert [str(one) for one in lora_ext.fused_blocks(other)] == [
            str(one) for one in lora_ext.fused_blocks(model)
        ]
        with torch.no_grad():  # its own parameters are read
            other.base_model.model.model.layers[0].mlp.up_proj.weight.zero_()
        assert not torch.equal(step(other)["logits"], wanted["logits"])
        assert torch.equal(step(model)["logits"], wanted["logits"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    _, model = fused()
    model.enable_input_require_grads()
    wanted = step(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_same(step(model), wanted)


def test_layers_that_have_to_run_by_themselves_do() -> None:
    """For as long as they have to, and the blocks say why."""
    plain, model = fused(lora_dropout=0.0)
    mlp = model.base_model.model.model.layers[0].mlp

    def reasons() -> list[str | None]:
        return [one.reason for one in lora_ext.fused_blocks(model)]

    def logits(model: Any) -> Tensor:
        found: Tensor = model(input_ids=TOKENS).logits.detach()
        return found

    calls: list[int] = []
    hook = mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(logits(model), logits(plain))
    assert calls == [1] and reasons() == [None, "up_proj has hooks"]
    hook.remove()
    assert reasons() == [None, None]
    for one in (model, plain):
        one.add_adapter("other", LoraConfig(r=2, use_dora=True, target_modules=["k_proj"]))
        one.set_adapter("other")
    assert reasons() == ["k_proj has an adapter of a variant, LinearDora", None]
    torch.testing.assert_close(logits(model), logits(plain))
    with lora_ext.batch(["default", None]):
        assert torch.equal(logits(model), logits(plain))
        assert reasons() == [
            f"{name} follows a plan of lora_ext.batch" for name in ("q_proj", "gate_proj")
        ]
    for one in (model, plain):
        one.set_adapter("default")
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(logits(model), logits(plain))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), logits(plain))
    model.unmerge_adapter()
    with torch.inference_mode():
        torch.testing.assert_close(logits(model), logits(plain))


def test_unloading_leaves_plain_modules() -> None:
    plain, model = fused()
    for one in (model, plain):
        one.eval()
    merged, wanted = model.merge_and_unload(), plain.merge_and_unload()
    assert not any("forward" in module.__dict__ for module in merged.modules())
    assert torch.equal(merged(TOKENS).logits, wanted(TOKENS).logits)


def test_a_tensor_that_was_changed_in_between_is_read_again() -> None:
    """And another tensor; and nothing that one call made is another's."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
            self.change: Any = lambda x: None

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            self.change(x)
            k = self.k(x)
            return torch.cat([q, k, self.v(x)], -1)

    plain = Attention()
    lora_ext.replace_linear(plain, r=2, target_modules=["q", "k"])
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_()
    model = copy.deepcopy(plain)
    (block,) = lora_ext.fuse_blocks(model)
    assert block.layers == ("q", "k", "v") and block.fused
    x = torch.ones(2, 4)
    with torch.no_grad():
        for change in (lambda x: None, lambda x: x.add_(1)):
            model.change = plain.change = change
            torch.testing.assert_close(model(x.clone()), plain(x.clone()))
        model.change, plain.change = lambda x: model.q(x + 1), lambda x: None
        torch.testing.assert_close(model(x), plain(x))
        model.change = plain.change
        model.q(x)  # by itself: what it made for the others is no other call's, or thread's
        model.k.weight.zero_()
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.extend([model.k(x), model(x)]))
        thread.start()
        thread.join()
        assert torch.equal(found[0], model.k(x))
        assert torch.equal(found[1], model(x))


def test_explain_and_get_lora_model_know_of_it() -> None:
    config = LoraConfig(target_modules=["up_proj", "q_proj"])
    model = lora_ext.get_lora_model(base_of(), config, fuse_blocks=True)
    rows = {row.name.rpartition(".")[2]: row.reason for row in lora_ext.explain(model)}
    assert rows["q_proj"].endswith(
        "; in one operator: q_proj, k_proj, v_proj of base_model.model.model.layers.0.self_attn"
    )
    model.base_model.model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    (reason,) = [row.reason for row in lora_ext.explain(model) if "up_proj" in row.name]
    assert "; not in one operator" in reason and reason.endswith("since act_fn has hooks")


def test_pefts_models() -> None:
    peft = pytest.importorskip("peft")
    import lora_ext.integrations.peft as on_peft

    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False
    )
    model = peft.get_peft_model(base_of(), config).train()
    told = lora_ext.fuse_blocks(model)
    assert all("patch() or accelerate(model)" in str(one) for one in told)
    on_peft.accelerate(model)
    lora_ext.unfuse_blocks(model)
    wanted = step(model)
    on_peft.accelerate(model, fuse_blocks=True)
    assert all(one.fused for one in lora_ext.fused_blocks(model))
    check_same(step(model), wanted)
    with model.disable_adapter():
        base = model(TOKENS).logits
    model.eval().merge_adapter()
    with model.disable_adapter():  # in which PEFT takes out what is merged
        torch.testing.assert_close(model(TOKENS).logits, base, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    assert all(one.fused for one in lora_ext.fused_blocks(model))
    merged = model(TOKENS).logits
    model.unmerge_adapter()
    torch.testing.assert_close(merged, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(merged, base)
