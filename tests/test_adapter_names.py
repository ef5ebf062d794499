"""PEFT's `adapter_names` of a LoraModel: results and generated tokens are PEFT's, in training each
request is what it is alone, and what does not fit is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers
from torch import nn

import lora_ext

FAMILIES = ["llama", "gpt2", "bert", "t5"]
NAMES = ["a", "__base__", "b", "a"]
TOKENS = torch.randint(
    3, tiny_models.VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(5)
)
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "c_proj", "wte"],
    "bert": ["query", "value", "dense"],
    "t5": ["q", "v", "wo"],
}


def two_adapters(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    base, _ = getattr(tiny_models, family)()
    task = {"t5": "SEQ_2_SEQ_LM", "bert": None}.get(family, "CAUSAL_LM")
    model: Any = None
    for name, r, targets in (("a", 4, TARGETS[family]), ("b", 8, TARGETS[family][:2])):
        config = lora_ext.LoraConfig(
            r=r, lora_alpha=16, target_modules=targets, init_lora_weights=False, task_type=task,
            **options,
        )  # fmt: skip
        if model is None:
            model = lora_ext.get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def of_peft(ours: Any, family: str, folder: Path) -> Any:
    ours.save_pretrained(folder)
    base, _ = getattr(tiny_models, family)()
    model = peft.PeftModel.from_pretrained(base, folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    return model.eval()


def inputs(family: str) -> dict[str, Any]:
    more = {"decoder_input_ids": TOKENS[:, :4]} if family == "t5" else {}
    return {"input_ids": TOKENS, **more}


@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_pefts(family: str, tmp_path: Path) -> None:
    ours = two_adapters(family)
    theirs = of_peft(ours, family, tmp_path)
    with torch.no_grad():
        y = ours(**inputs(family), adapter_names=NAMES).logits
        wanted = theirs(**inputs(family), adapter_names=NAMES).logits
        plain = ours(**inputs(family)).logits
    assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (y - plain).abs().max() > 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generated_tokens_are_pefts(family: str, beams: int, tmp_path: Path) -> None:
    ours = two_adapters(family)
    theirs = of_peft(ours, family, tmp_path)
    options: dict[str, Any] = {
        "input_ids": TOKENS, "max_new_tokens": 6, "num_beams": beams, "do_sample": False,
        "attention_mask": torch.ones_like(TOKENS), "adapter_names": NAMES,
    }  # fmt: skip
    found, wanted = ours.generate(**options), theirs.generate(**options)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, ours.generate(**{**options, "adapter_names": NAMES[::-1]}))


def gradients(model: Any, run: Callable[[], None]) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    run()
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_in_training_each_request_is_what_it_is_alone(checkpointing: bool) -> None:
    model = two_adapters("llama").train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.set_adapter(["a", "b"])

    def mixed() -> None:
        model(input_ids=TOKENS, adapter_names=NAMES).logits.square().sum().backward()

    found = gradients(model, mixed)
    for name in ("a", "b"):
        model.set_adapter(name)
        requests = [i for i, one in enumerate(NAMES) if one == name]

        def alone(rows: list[int] = requests) -> None:
            model(input_ids=TOKENS[rows]).logits.square().sum().backward()

        wanted = gradients(model, alone)
        own = [key for key, value in wanted.items() if value is not None]
        assert own
        for key in own:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-5)


def assert_each_is_what_it_is_alone(model: Any, logits: torch.Tensor) -> None:
    """Within the roundings of products of other numbers of rows."""
    for i, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(input_ids=TOKENS[i : i + 1]).logits
        else:
            model.set_adapter(name)
            alone = model(input_ids=TOKENS[i : i + 1]).logits
        torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_within_a_plan_and_with_copies_of_modules() -> None:
    model = two_adapters("llama", modules_to_save=["lm_head"])
    for i, name in enumerate(("a", "b")):
        head = model.base_model.model.lm_head.modules_to_save[name]
        nn.init.normal_(head.weight, std=0.1 + i)
    with torch.no_grad():
        y = model(input_ids=TOKENS, adapter_names=NAMES).logits
        with lora_ext.batch(NAMES):
            assert torch.equal(model(input_ids=TOKENS).logits, y)
        with lora_ext.batch(NAMES, rows=(4, 7)):
            assert torch.equal(model(input_ids=TOKENS).logits, y)
        assert_each_is_what_it_is_alone(model, y)


def test_layers_that_get_all_tokens_in_one_dimension() -> None:
    """OPT's fc1 and fc2. PEFT refuses them."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=tiny_models.VOCABULARY, hidden_size=16, num_hidden_layers=2, ffn_dim=24,
        num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    of_lora = lora_ext.LoraConfig(target_modules=["q_proj", "fc1", "fc2"], init_lora_weights=False)
    model = lora_ext.get_peft_model(transformers.OPTForCausalLM(config), of_lora, "a")
    model.add_adapter("b", of_lora)
    logits = model.eval()(input_ids=TOKENS, adapter_names=NAMES).logits
    assert_each_is_what_it_is_alone(model, logits)
    first = next(m for m in model.modules() if isinstance(m, lora_ext.nn.Linear))
    with lora_ext.batch(NAMES), pytest.raises(ValueError, match=r"say so: .*rows=\(4, 7\)"):
        first(torch.ones(28, 16))


def test_names_that_do_not_fit_are_refused() -> None:
    model = two_adapters("llama")
    with pytest.raises(ValueError, match="got 3 names for 4 inputs"):
        model(input_ids=TOKENS, adapter_names=NAMES[:3])
    with pytest.raises(ValueError, match=r"adapter_names: got \['c'\], expected some of"):
        model(input_ids=TOKENS, adapter_names=["a", "c", "a", "a"])
    with pytest.raises(TypeError, match="adapter_names: got 'a', expected a list"):
        model(input_ids=TOKENS, adapter_names="a")
    with pytest.raises(ValueError, match="'c'"), lora_ext.batch(["c", None, None, None]):
        model(input_ids=TOKENS)
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged into the weight"):
        model(input_ids=TOKENS, adapter_names=NAMES)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_names_are_no_beams(count: int) -> None:
    """They would divide the inputs among themselves."""
    model = two_adapters("llama")
    for call in (model.generate, lambda x, **more: model.generate(input_ids=x, **more)):
        with pytest.raises(ValueError, match=f"got {count} names for 4 inputs"):
            call(TOKENS, adapter_names=NAMES[:count], max_new_tokens=1)
    # As many as what is generated is PEFT's way with num_return_sequences.
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": True, "num_return_sequences": 2}
    found = model.generate(input_ids=TOKENS[:2], adapter_names=NAMES, **options)
    assert len(found) == 4


@pytest.mark.parametrize("beams", [1, 2])
def test_scales_are_strengths_of_each_input(beams: int) -> None:
    """In float64, in which the same numbers come of another order."""
    model = two_adapters("llama").double()
    scales = [0.5, 1.0, -2.0, 0.0]
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": None}
    options["pad_token_id"] = 0
    with torch.no_grad():
        logits = model(input_ids=TOKENS, adapter_names=NAMES, adapter_scales=scales).logits
    made = model.generate(input_ids=TOKENS, adapter_names=NAMES, adapter_scales=scales, **options)
    plain = model.generate(input_ids=TOKENS, adapter_names=NAMES, **options)
    assert not torch.equal(made.scores[0], plain.scores[0])
    for i, (name, scale) in enumerate(zip(NAMES, scales, strict=True)):
        one = TOKENS[i : i + 1]
        model.set_adapters([] if name == "__base__" else [name], scale)
        with torch.no_grad():
            torch.testing.assert_close(logits[i : i + 1], model(input_ids=one).logits)
        alone = model.generate(input_ids=one, **options)
        assert torch.equal(made.sequences[i], alone.sequences[0])


def test_scales_have_gradients_and_need_names() -> None:
    model = two_adapters("llama")
    scales = torch.ones(4, requires_grad=True)
    model(input_ids=TOKENS, adapter_names=NAMES, adapter_scales=scales).logits.sum().backward()
    assert scales.grad is not None and (scales.grad != 0).tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="adapter_scales: got a value without adapter_names"):
        model(input_ids=TOKENS, adapter_scales=[1.0] * 4)
    with pytest.raises(TypeError, match=r"adapter_scales: got 0\.5, expected a list"):
        model(input_ids=TOKENS, adapter_names=NAMES, adapter_scales=0.5)
    for bad in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match=f"LoraModel: adapter_scales: got {bad}, expected fin"):
            model(input_ids=TOKENS, adapter_names=NAMES, adapter_scales=[1.0, bad, 1.0, 1.0])
    with pytest.raises(ValueError, match="adapter_scales: got 3 numbers for 4 names"):
        model(input_ids=TOKENS, adapter_names=NAMES, adapter_scales=[1.0] * 3)


def test_disabled_adapters_stay_disabled() -> None:
    model = two_adapters("llama")
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=TOKENS).logits
        assert torch.equal(model(input_ids=TOKENS, adapter_names=NAMES).logits, base)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_trained_rows_of_an_embedding_follow(tied: bool) -> None:
    torch.manual_seed(0)
    base, _ = tiny_models.llama()
    base.config.tie_word_embeddings = tied
    if tied:
        base.lm_head.weight = base.model.embed_tokens.weight
    rows = TOKENS.unique()[:4].tolist()
    options: dict[str, Any] = {"target_modules": ["q_proj"], "init_lora_weights": False}
    config = lora_ext.LoraConfig(trainable_token_indices=rows, **options)
    model: Any = lora_ext.get_peft_model(base, config, "a").eval()
    model.add_adapter("b", lora_ext.LoraConfig(trainable_token_indices=rows[2:], **options))
    for key, parameter in model.named_parameters():
        if "trainable_tokens_delta" in key:
            nn.init.normal_(parameter)
    with torch.no_grad():
        y = model(input_ids=TOKENS, adapter_names=NAMES).logits
        assert_each_is_what_it_is_alone(model, y)
