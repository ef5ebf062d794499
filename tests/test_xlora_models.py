"""Models with X-LoRA: caches of both passes, what trains, copies, logs, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor
from xlora_models import HIDDEN, TARGETS, TOKENS, base_of, ours, saved_experts, settings, theirs_of

import lora_ext

NAMES = ("math", "code")


def named(tmp_path: Path, family: str = "llama", **options: Any) -> Any:
    return ours(family, saved_experts(family, tmp_path, NAMES), **options)


# Caches


def lengths_of(model: Any) -> list[int]:
    """Numbers of tokens that a layer gets, as they come."""
    seen: list[int] = []
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    return seen


def test_both_passes_are_cached(tmp_path: Path) -> None:
    """A token's scalings depend on it and those before it alone, and stay what they were."""
    model = named(tmp_path, layerwise_scalings=True)
    with torch.no_grad():
        wanted = model(input_ids=TOKENS).logits
        seen = lengths_of(model)
        first = model(input_ids=TOKENS[:, :4], use_cache=True)
        rest = model(input_ids=TOKENS[:, 4:], cache=first.cache, use_cache=True)
    assert seen == [4, 4, 3, 3]
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), wanted)


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_passes_new_tokens_alone(family: str, beams: int, tmp_path: Path) -> None:
    adapters = saved_experts(family, tmp_path)
    model = ours(family, adapters, layerwise_scalings=True)
    theirs = theirs_of(model, family, adapters, layerwise_scalings=True)
    mask = torch.ones_like(TOKENS)
    mask[1, :3] = 0  # padding on the left
    options = {
        "input_ids": TOKENS,
        "attention_mask": mask,
        "max_new_tokens": 5,
        "num_beams": beams,
        "do_sample": False,
    }
    model.enable_scalings_logging()
    tokens = model.generate(**options, use_cache=True)
    assert torch.equal(tokens, theirs.generate(**options))
    lengths = [one.shape[1] for one in model.get_scalings_log()]
    assert lengths == [7, 1, 1, 1, 1]


def test_other_caches_are_taken_empty_and_refused_full(tmp_path: Path) -> None:
    model = named(tmp_path)
    wanted = model.generate(input_ids=TOKENS, max_new_tokens=4)
    static = model.generate(input_ids=TOKENS, max_new_tokens=4, cache_implementation="static")
    assert torch.equal(static, wanted)
    cache = transformers.DynamicCache(config=model.config)
    base_of("llama")(input_ids=TOKENS[:, :4], cache=cache, use_cache=True)
    with pytest.raises(
        ValueError, match=r"cache: got a DynamicCache with tokens.*expected an empt"
    ):
        model(input_ids=TOKENS[:, 4:], cache=cache)
    with pytest.raises(ValueError, match="cache: got a tuple, expected a Cache"):
        model(input_ids=TOKENS, cache=((TOKENS, TOKENS),))


def test_a_head_with_adapters_has_the_scalings_of_the_tokens_that_it_gets(tmp_path: Path) -> None:
    adapters = {}
    for name in NAMES:
        config = lora_ext.LoraConfig(
            r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False
        )
        lora_ext.get_peft_model(base_of("llama"), config).save_pretrained(tmp_path / name)
        adapters[name] = str(tmp_path / name)
    model = ours("llama", adapters, layerwise_scalings=True)
    wanted = model(input_ids=TOKENS).logits
    torch.testing.assert_close(model(input_ids=TOKENS, logits_to_keep=2).logits, wanted[:, -2:])
    which = torch.tensor([1, 4, 5])
    torch.testing.assert_close(
        model(input_ids=TOKENS, logits_to_keep=which).logits, wanted[:, which]
    )
    generated = model.generate(input_ids=TOKENS, max_new_tokens=3)  # which keeps the last one
    slow = model.generate(input_ids=TOKENS, max_new_tokens=3, use_cache=False)
    assert torch.equal(generated, slow)


# What trains


def trained(model: Any) -> set[str]:
    found = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    return found


def test_the_classifier_trains_alone(tmp_path: Path) -> None:
    model = named(tmp_path)
    assert trained(model) == {"internal_xlora_classifier"} and not model.training
    model.set_adapter("default")
    model.set_adapter(list(NAMES))
    with model.disable_adapter():
        pass
    model.generate(input_ids=TOKENS, max_new_tokens=2)
    assert trained(model) == {"internal_xlora_classifier"}
    count = sum(p.numel() for p in model.internal_xlora_classifier.parameters())
    assert model.get_nb_trainable_parameters()[0] == count


def test_adapters_train_where_they_shall(tmp_path: Path) -> None:
    model = named(tmp_path, use_trainable_adapters=True)
    assert trained(model) == {"internal_xlora_classifier", "base_model"}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for _, layer in model.lora_layers():
        for name in layer.adapters:
            for parameter in layer.adapter_parameters(name).values():
                assert parameter.grad is not None and parameter.grad.abs().max() > 0
    model.set_use_trainable_adapters(False)
    assert trained(model) == {"internal_xlora_classifier"}
    assert model.get_use_trainable_adapters() is False


def test_training_learns_which_adapter_to_take(tmp_path: Path) -> None:
    adapters = saved_experts("llama", tmp_path, NAMES)
    teacher = lora_ext.LoraModel.from_pretrained(base_of("llama"), adapters["code"])
    wanted = teacher(input_ids=TOKENS).logits.detach()
    model = ours("llama", adapters).train()
    optimizer = torch.optim.Adam(model.internal_xlora_classifier.parameters(), lr=0.05)
    losses = []
    for _ in range(25):
        loss = (model(input_ids=TOKENS).logits - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert model.get_latest_scalings()[..., 1].min() > 0.7


# The model


def test_names_are_kept_and_calls_are_pefts(tmp_path: Path) -> None:
    import peft

    model = named(tmp_path, layerwise_scalings=True)
    assert list(model.peft_config) == list(NAMES) == model.active_adapters
    assert isinstance(model, lora_ext.XLoraModel) and isinstance(model, peft.PeftModel)
    assert model.get_latest_scalings() is None
    model.enable_scalings_logging()
    y = model(TOKENS).logits  # by position
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(TOKENS)).logits, y)
    model(input_ids=TOKENS[:, :3])
    model.disable_scalings_logging()
    model(input_ids=TOKENS)
    log = model.get_scalings_log()
    assert [one.shape for one in log] == [(2, 7, 12, 2), (2, 7, 12, 2), (2, 3, 12, 2)]
    assert not log[0].requires_grad and model.get_latest_scalings().requires_grad
    buckets = model.get_bucketed_scalings_log()
    assert {n: places for n, (places, _) in buckets.items()} == {7: [0, 1], 3: [2]}
    assert buckets[3][1][0] is log[2]
    model.clear_scalings_log()
    assert model.get_scalings_log() == [] and len(log) == 3
    model.set_global_scaling_weight(0.0)
    assert model.get_global_scaling_weight() == 0.0
    with model.disable_adapter():
        base = model(input_ids=TOKENS).logits
    torch.testing.assert_close(model(input_ids=TOKENS).logits, base)


def test_the_base_alone_calls_are_routed_too_until_unload(tmp_path: Path) -> None:
    model = named(tmp_path)
    wanted = model(input_ids=TOKENS).logits
    base = model.get_base_model()
    assert torch.equal(base(input_ids=TOKENS).logits, wanted)
    with pytest.raises(ValueError, match="X-LoRA: got a call outside of a call of the whole model"):
        base.model(input_ids=TOKENS)
    plain = model.unload()
    assert torch.equal(plain(input_ids=TOKENS).logits, base_of("llama")(input_ids=TOKENS).logits)
    assert "forward" not in vars(plain)


def test_a_copy_is_a_model_of_its_own(tmp_path: Path) -> None:
    model = named(tmp_path)
    wanted = model(input_ids=TOKENS).logits  # its scalings have gradients
    copied = copy.deepcopy(model)
    for parameter in copied.internal_xlora_classifier.parameters():
        parameter.data.zero_()
    assert torch.equal(model(input_ids=TOKENS).logits, wanted)
    assert (copied(input_ids=TOKENS).logits - wanted).abs().max() > 1e-3
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(input_ids=TOKENS).logits, wanted)


def test_16_bits(tmp_path: Path) -> None:
    adapters = saved_experts("llama", tmp_path, NAMES)
    base = base_of("llama").to(torch.bfloat16)
    config = lora_ext.XLoraConfig(adapters=adapters, **settings(layerwise_scalings=True))
    model: Any = lora_ext.get_peft_model(base, config)
    kinds = {p.dtype for p in model.internal_xlora_classifier.parameters()}
    assert kinds == {torch.bfloat16}
    exact = ours("llama", adapters, layerwise_scalings=True)
    own = exact.internal_xlora_classifier.state_dict()
    model.internal_xlora_classifier.load_state_dict(own)
    y, wanted = model(input_ids=TOKENS).logits, exact(input_ids=TOKENS).logits
    assert y.dtype == torch.bfloat16
    assert (y.float() - wanted).abs().max() <= 0.05 * wanted.abs().max()


# Refused


def expert(folder: Path, **options: Any) -> dict[str, Any]:
    config = lora_ext.LoraConfig(**{"target_modules": ["q_proj"], **options})
    lora_ext.get_peft_model(base_of("llama"), config).save_pretrained(folder / "a")
    return {"adapters": {"a": folder / "a"}}


EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("'a': use_dora: got True.*train it as plain LoRA", {"use_dora": True}),
    "alora": ("'a': alora_invocation_tokens", {"alora_invocation_tokens": [5]}),
    "modules": ("'a': modules_to_save: got .'lm_head'.", {"modules_to_save": ["lm_head"]}),
    "tokens": ("'a': trainable_token_indices", {"trainable_token_indices": [1, 2]}),
    "bias": ("'a': bias: got 'lora_only', expected 'none'", {"bias": "lora_only"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", EXPERTS)
def test_adapters_that_cannot_be_mixed_are_refused_by_name(case: str, tmp_path: Path) -> None:
    what, options = EXPERTS[case]
    config = lora_ext.XLoraConfig(hidden_size=HIDDEN, **expert(tmp_path, **options))
    base = base_of("llama")
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match=what):
        lora_ext.XLoraModel(base, config)
    assert dict(base.named_modules()).keys() == before.keys() and "forward" not in vars(base)


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "depth": ("xlora_depth: got 0, expected an integer from 1", {"xlora_depth": 0}),
    "size": ("xlora_size: got 1.5", {"xlora_size": 1.5}),
    "hidden": ("hidden_size: got -1", {"hidden_size": -1}),
    "temperature": ("softmax_temperature: got 0, expected more", {"softmax_temperature": 0}),
    "nan": ("scaling_pass_value: got nan, expected a fin", {"scaling_pass_value": float("nan")}),
    "dropout": ("xlora_dropout_p: got 1.0, expected 0 to", {"xlora_dropout_p": 1.0}),
    "top k": ("top_k_lora: got 2, expected 1 to 1", {"top_k_lora": 2, "adapters": {"a": "."}}),
    "flag": ("enable_softmax: got 'yes', expected True or", {"enable_softmax": "yes"}),
    "adapters": ("adapters: got .'a'., expected a dict", {"adapters": ["a"]}),
    "a name": ("adapters: a name: got 'a/b'", {"adapters": {"a/b": "."}}),
    "a place": ("adapters.'a'.: got 3, expected a folder", {"adapters": {"a": 3}}),
    "unknown": ("topk_lora: unknown, did you mean top_k_lora", {"topk_lora": 1}),
    "kind": ("peft_type: got 'LORA', expected 'XLORA'", {"peft_type": "LORA"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_are_refused_by_name(case: str) -> None:
    what, options = CONFIGS[case]
    with pytest.raises((ValueError, TypeError), match=f"XLoraConfig: {what}"):
        lora_ext.XLoraConfig(**options)


CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "names": ("adapter_names: got", lambda m: m(input_ids=TOKENS, adapter_names=["math", "code"])),
    "add": ("add_adapter", lambda m: m.add_adapter("x", lora_ext.LoraConfig())),
    "delete": ("delete_adapter", lambda m: m.delete_adapter("math")),
    "rename": ("rename_adapter", lambda m: m.rename_adapter("math", "x")),
    "combine": ("add_weighted_adapter", lambda m: m.add_weighted_adapter(["math"], [1.0], "x")),
    "merge": ("merge_adapter: .*each token has another mixture", lambda m: m.merge_adapter()),
    "unload": ("merge_and_unload", lambda m: m.merge_and_unload()),
    "one": ("set_adapter: adapter_name: got .'math'., expected", lambda m: m.set_adapter("math")),
    "k": ("set_topk_lora: top_k_lora: got 3, expected 1 to 2", lambda m: m.set_topk_lora(3)),
    "weight": ("weight: got inf", lambda m: m.set_global_scaling_weight(float("inf"))),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_are_refused_by_name(case: str, tmp_path: Path) -> None:
    what, call = CALLS[case]
    with pytest.raises(ValueError, match=f"XLoraModel.*{what}"):
        call(named(tmp_path))


def test_other_models_and_plans_are_refused(tmp_path: Path) -> None:
    adapters = saved_experts("llama", tmp_path, NAMES)
    config = lora_ext.XLoraConfig(adapters=adapters, **settings(hidden_size=16))
    with pytest.raises(ValueError, match="hidden_size: got 16, expected 32"):
        lora_ext.get_peft_model(base_of("llama"), config)
    with pytest.raises(ValueError, match="adapters: got none, expected names and folders"):
        lora_ext.get_peft_model(base_of("llama"), lora_ext.XLoraConfig(hidden_size=32))
    config = lora_ext.XLoraConfig(adapters=adapters, **settings())
    with pytest.raises(TypeError, match="got an encoder with a decoder"):
        lora_ext.get_peft_model(tiny_models.t5()[0], config)
    model: Any = ours("llama", adapters)
    with lora_ext.batch(["math", "code"]), pytest.raises(ValueError, match="got a plan around"):
        model(input_ids=TOKENS)


class NoStates(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(32, 32)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.q_proj(x)


def test_a_model_without_hidden_states_is_refused(tmp_path: Path) -> None:
    config = lora_ext.LoraConfig(target_modules=["q_proj"])
    lora_ext.LoraModel(NoStates(), config).save_pretrained(tmp_path)
    mixed = lora_ext.XLoraConfig(hidden_size=32, adapters={"a": tmp_path})
    with pytest.raises(TypeError, match="hidden_states: got None of NoStates's result"):
        lora_ext.XLoraModel(NoStates(), mixed)(torch.randn(2, 3, 32))


def test_layers_that_not_all_adapters_have(tmp_path: Path) -> None:
    model = named(tmp_path)
    having = {name: set(layer.adapters) for name, layer in model.lora_layers()}
    kinds = {frozenset(names) for names in having.values()}
    assert kinds == {frozenset({"math"}), frozenset({"code"}), frozenset(NAMES)}
    assert TARGETS["llama"][0] != TARGETS["llama"][1]
