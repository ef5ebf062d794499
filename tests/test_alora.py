"""Activated LoRA: before its invocation tokens a model is its base bit for bit, from there on its
results, tokens and gradients are PEFT's."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from torch import Tensor, nn

import lora_ext
from lora_ext.errors import NotBuiltError
from lora_ext.nn.conv import KeptConv1d

INVOCATION = [5, 6]
TOKENS = torch.tensor(
    [
        [9, 5, 6, 8, 5, 6, 7, 10],  # twice: the last one counts
        [9, 8, 7, 5, 9, 6, 5, 9],  # never
        [5, 6, 9, 8, 7, 11, 12, 13],  # from the first on
        [9, 8, 7, 11, 12, 13, 5, 6],  # the last two alone
    ]
)
BEGINS = [4, None, 0, 6]


def activated(family: str = "llama", **options: Any) -> Any:
    torch.manual_seed(0)
    base, _ = getattr(tiny_models, family)()
    targets = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[family]
    config = lora_ext.LoraConfig(
        r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM",
        alora_invocation_tokens=INVOCATION, **options,
    )  # fmt: skip
    return lora_ext.get_peft_model(base, config).eval()


def base_of(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad(), model.disable_adapter():
        return model(*args, **kwargs).logits  # type: ignore[no-any-return]


def of_peft(model: Any, folder: Path, family: str = "llama", **options: Any) -> Any:
    model.save_pretrained(folder)
    base, _ = getattr(tiny_models, family)()
    return peft.PeftModel.from_pretrained(base, folder, **options)


def test_the_base_bitwise_before_the_invocation() -> None:
    model = activated()
    base = base_of(model, input_ids=TOKENS)
    with torch.no_grad():
        y = model(input_ids=TOKENS).logits
    for i, begin in enumerate(BEGINS):
        assert torch.equal(y[i, :begin], base[i, :begin])
        assert begin is None or not torch.isclose(y[i, begin:], base[i, begin:]).all(-1).any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_results_and_generated_tokens_are_pefts(family: str, tmp_path: Path) -> None:
    model = activated(family)
    theirs = of_peft(model, tmp_path, family).eval()
    with torch.no_grad():
        y, wanted = model(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits
        assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        offsets = [3, None, 8, 100]
        y = model(input_ids=TOKENS, alora_offsets=offsets).logits
        wanted = theirs(input_ids=TOKENS, alora_offsets=offsets).logits
        assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    options: dict[str, Any] = {
        "input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 6,
        "do_sample": False,
    }  # fmt: skip
    tokens = model.generate(**options)
    assert torch.equal(tokens, theirs.generate(**options))
    assert torch.equal(tokens, model.generate(**options, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(tokens, model.generate(**options))


def test_beams_are_those_of_each_input_alone() -> None:
    model = activated()
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    for i in range(len(TOKENS)):
        row = TOKENS[i : i + 1]
        alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **options)
        assert torch.equal(tokens[i : i + 1, : alone.shape[1]], alone)


def test_gradients_are_pefts(tmp_path: Path) -> None:
    model = activated()
    theirs = of_peft(model, tmp_path, is_trainable=True)
    model.train()
    theirs.train()
    for one in (model, theirs):
        one(input_ids=TOKENS).logits.square().sum().backward()
    wanted = {
        name.replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = {name + ".weight": p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * scale)


def test_without_invocation_gradients_are_zero_and_outputs_the_base() -> None:
    model = activated().train()
    y = model(input_ids=TOKENS[1:2]).logits
    y.sum().backward()
    assert torch.equal(y, base_of(model, input_ids=TOKENS[1:2]))
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(g is not None and not g.any() for g in gradients)


def test_beside_plain_adapters_and_the_base() -> None:
    model = activated()
    plain = lora_ext.LoraConfig(
        r=2, target_modules=["q_proj", "gate_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model.add_adapter("plain", plain)
    names = ["default", "plain", "__base__", "default"]
    with torch.no_grad():
        mixed = model(input_ids=TOKENS, adapter_names=names).logits
        model.set_adapter("plain")
        alone = model(input_ids=TOKENS).logits
        model.set_adapter("default")
        own = model(input_ids=TOKENS).logits
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(mixed[[0, 3]], own[[0, 3]], **close)
    torch.testing.assert_close(mixed[1], alone[1], **close)
    torch.testing.assert_close(mixed[2], base_of(model, input_ids=TOKENS)[2], **close)
    assert torch.equal(mixed[3, :6], base_of(model, input_ids=TOKENS)[3, :6])
    model.set_adapter(["default", "plain"])
    with pytest.raises(NotBuiltError, match="several adapters are active"):
        model(input_ids=TOKENS)


def test_files_keep_the_tokens(tmp_path: Path) -> None:
    model = activated()
    model.save_pretrained(tmp_path)
    again = lora_ext.LoraModel.from_pretrained(tiny_models.llama()[0], tmp_path)
    assert again.peft_config["default"].alora_invocation_tokens == INVOCATION
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_without_tokens_the_model_is_its_base() -> None:
    model = activated()
    base = base_of(model, input_ids=TOKENS)
    with torch.no_grad():
        assert torch.equal(model.get_base_model()(input_ids=TOKENS).logits, base)
        embeds = model.get_input_embeddings()(TOKENS)
        with pytest.warns(UserWarning, match="Disabling aLoRA for this forward pass"):
            y = model(inputs_embeds=embeds).logits
        torch.testing.assert_close(y, base)
    assert "activated by tokens" in str(lora_ext.explain(model))


def test_a_plan_of_ones_own_says_where_they_begin() -> None:
    model = activated()
    names, scales = ["default"] * 4, [0.5, 1.0, 2.0, 1.0]
    with torch.no_grad():
        y = model(input_ids=TOKENS, adapter_names=names, adapter_scales=scales).logits
        with lora_ext.batch(names, after=BEGINS, scale=scales):
            assert torch.equal(y, model(input_ids=TOKENS).logits)
    base = base_of(model, input_ids=TOKENS)
    assert torch.equal(y[0, :4], base[0, :4]) and not torch.equal(y[0, 4:], base[0, 4:])
    with (
        lora_ext.batch(names),
        pytest.raises(ValueError, match=r"which tokens activate .* give adapter_names="),
    ):
        model(input_ids=TOKENS)


def test_decoded_by_hand_the_place_is_a_plans() -> None:
    """A later call has no tokens of its own, and is the base, as in PEFT; a plan remembers them."""
    model = activated()
    first_ones, begins = 5, [1, None, 0, 3]
    with torch.no_grad():
        with lora_ext.batch(["default"] * 4, after=begins):
            whole = model(input_ids=TOKENS).logits
        with lora_ext.batch(["default"] * 4, rows=(4, first_ones), after=begins):
            first = model(input_ids=TOKENS[:, :first_ones], use_cache=True)
            cache = first.past_key_values
            rest = model(input_ids=TOKENS[:, first_ones:], past_key_values=cache).logits
    torch.testing.assert_close(first.logits, whole[:, :first_ones], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rest, whole[:, first_ones:], rtol=1e-4, atol=1e-4)
    base = base_of(model, input_ids=TOKENS)
    assert not torch.isclose(rest[[0, 2, 3]], base[[0, 2, 3], first_ones:], atol=1e-3).all(-1).any()


def test_no_invocation_tokens_are_a_plain_adapter() -> None:
    """As in PEFT."""
    config: dict[str, Any] = dict(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    plain = lora_ext.get_peft_model(tiny_models.llama()[0], lora_ext.LoraConfig(**config))
    torch.manual_seed(3)
    empty = lora_ext.get_peft_model(
        tiny_models.llama()[0], lora_ext.LoraConfig(alora_invocation_tokens=[], **config)
    )
    with torch.no_grad():
        assert torch.equal(empty(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits)
    empty.merge_adapter()


def test_what_cannot_be_is_refused() -> None:
    model = activated()
    with pytest.raises(ValueError, match="aLoRA does not support merging"):
        model.merge_adapter()
    with pytest.raises(TypeError, match="alora_offsets: got 'x'"):
        model(input_ids=TOKENS, alora_offsets="x")
    with pytest.raises(ValueError, match=r"alora_offsets: got 1 number for 4 inputs, expected one"):
        model(input_ids=TOKENS, alora_offsets=[3])
    with pytest.raises(ValueError, match=r"alora_offsets: got 2 numbers for 4 names"):
        model(input_ids=TOKENS, adapter_names=["default"] * 4, alora_offsets=[3, None])
    with pytest.raises(NotBuiltError, match="prefill_chunk_size"):
        model.generate(input_ids=TOKENS, prefill_chunk_size=2)
    tokens: dict[str, Any] = {"alora_invocation_tokens": [1]}
    with pytest.raises(ValueError, match=r"alora_invocation_tokens: got \[1\]"):
        lora_ext.LoraConfig(use_dora=True, **tokens)
    with pytest.raises(ValueError, match=r"alora_invocation_tokens: got \[-1\]"):
        lora_ext.LoraConfig(alora_invocation_tokens=[-1])
    config = lora_ext.LoraConfig(target_modules=["embed_tokens"], **tokens)
    with pytest.raises(ValueError, match="only linear layers have activated adapters"):
        lora_ext.get_peft_model(tiny_models.llama()[0], config)


def test_what_a_swap_brings_counts_and_mixtures_are_refused(tmp_path: Path) -> None:
    model = activated()
    model.save_pretrained(tmp_path / "activated")
    tokens = {"input_ids": TOKENS}
    with torch.no_grad():
        wanted = model(**tokens).logits
    base, _ = tiny_models.llama()
    plain = lora_ext.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    swapped = lora_ext.get_peft_model(base, plain).eval()
    lora_ext.hotswap_adapter(swapped, tmp_path / "activated", "default")
    with torch.no_grad():
        assert torch.equal(swapped(**tokens).logits, wanted)
    model.add_adapter("plain", plain)
    with pytest.raises(ValueError, match="different tokens activate"):
        model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "both", "linear")


def test_the_last_logits_are_those_of_all() -> None:
    model = activated(modules_to_save=None)
    config = lora_ext.LoraConfig(
        r=4, target_modules=["lm_head"], init_lora_weights=False, alora_invocation_tokens=INVOCATION
    )
    model.add_adapter("head", config)
    model.set_adapter("head")
    with torch.no_grad():
        y = model(input_ids=TOKENS).logits
        last = model(input_ids=TOKENS, logits_to_keep=5).logits
    torch.testing.assert_close(last, y[:, -5:])


def test_copies_and_trained_rows_hold_for_all_tokens_as_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = activated(modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [9, 5]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.normal_()
        want = of_peft(model, tmp_path)(input_ids=TOKENS).logits
        torch.testing.assert_close(model(input_ids=TOKENS).logits, want)


def test_places_that_cannot_be_told_are_refused() -> None:
    with lora_ext.batch(["a", "a"], rows=(2, 3), after=[1, 2], repeats=True):
        layer = lora_ext.nn.Linear(4, 4)
        layer.add_adapter("a", r=2, init_lora_weights=False)
        layer(torch.randn(6, 4)), layer(torch.randn(2, 4))
        with pytest.raises(ValueError, match="got 12 rows in one dimension"):
            layer(torch.randn(12, 4))  # of two beams, or of later tokens
    model = activated()
    with pytest.raises(NotBuiltError, match="prompt_lookup_num_tokens"):
        model.generate(input_ids=TOKENS, prompt_lookup_num_tokens=2, max_new_tokens=2)


def test_where_no_place_can_be_told_after_is_refused() -> None:
    """A convolution's row is a whole request, and so is a pooler's: not all of it, nor nothing."""
    conv = lora_ext.nn.Conv1d(4, 6, 3, r=2)
    kept: Any = KeptConv1d._over(nn.Conv1d(4, 6, 1), nn.Conv1d)
    kept.add_adapter("default", r=2)
    pooler = lora_ext.nn.Linear(4, 6, r=2)
    dora = lora_ext.nn.Conv1d.from_conv(nn.Conv1d(4, 6, 1), r=2, use_dora=True)
    for layer, x in (
        (conv, torch.randn(2, 4, 9)),
        (kept, torch.randn(2, 4, 9)),
        (dora, torch.randn(2, 4, 9)),
        (pooler, torch.randn(2, 4)),
    ):
        for after in ([3, None], [-2, 0]):
            with (
                pytest.raises(ValueError, match=f"{type(layer).__name__}: batch: .*after"),
                lora_ext.batch(["default"] * 2, after=after),
            ):
                layer(x)
        with suppress(ValueError), lora_ext.batch(["other"] * 2, after=[3, None]):
            y = layer(x)
        layer.set_adapter([])
        assert torch.equal(y, layer(x))


def test_a_layer_with_none_of_the_adapters_may_have_other_rows() -> None:
    """As a pooler, which sees the first token of each request alone."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pooler, self.conv = nn.Linear(4, 4), nn.Linear(4, 3), nn.Conv1d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return torch.cat([self.pooler(x[:, 0]), self.conv(x.mT).flatten(1)], 1)

    def config(*targets: str) -> lora_ext.LoraConfig:
        return lora_ext.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)

    model = lora_ext.get_lora_model(Pooled(), config("body", "pooler", "conv"), "all").eval()
    model.add_adapter("body", config("body"))
    x = torch.randn(2, 5, 4)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    plans: list[dict[str, Any]] = [
        {"ids": ids}, {"lengths": [10]}, {"ids": ids.unsqueeze(2), "gates": torch.ones(2, 5, 1)}
    ]  # fmt: skip
    for plan in plans:
        with lora_ext.batch(["body"], **plan):
            y = model(x)
        model.set_adapter("body")
        torch.testing.assert_close(y, model(x))
        with pytest.raises(ValueError, match="batch"), lora_ext.batch(["all"], **plan):
            model(x)
