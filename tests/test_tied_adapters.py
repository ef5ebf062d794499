"""ensure_weight_tying of adapters: layers that share an embedding's weight have its adapter, as
with PEFT, and the weights that are merged are one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from tiny_models import BUILDERS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError, NotBuiltError
from lora_ext.io import WEIGHTS_NAME
from lora_ext.nn.kept_base import KeptBase

TOKENS = torch.tensor([[1, 5, 3, 2, 5]])
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
R, ALPHA = 2, 6


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=11, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).eval()


def config_of(*targets: str, **options: Any) -> LoraConfig:
    fields = {"r": R, "lora_alpha": ALPHA, "ensure_weight_tying": True, **options}
    return LoraConfig(target_modules=list(targets), **fields)


def disturb(model: nn.Module) -> None:
    """Only what an optimizer would change."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(*targets: str, **options: Any) -> LoraModel:
    model = get_lora_model(llama(), config_of(*(targets or (HEAD,)), **options))
    disturb(model)
    return model.eval()


def layers(model: LoraModel) -> tuple[Any, Any]:
    base = model.get_base_model()
    return base.get_submodule(EMBEDDING), base.get_submodule(HEAD)


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def with_weight(model: nn.Module, weight: Tensor) -> nn.Module:
    """The plain model, in float64, whose one weight is another."""
    plain = copy.deepcopy(model).double()
    plain.get_submodule(EMBEDDING).weight = plain.get_submodule(HEAD).weight = nn.Parameter(weight)
    return plain


@pytest.mark.parametrize("targets", [[HEAD], ["embed_tokens"], ["embed_tokens", HEAD]], ids=str)
def test_is_one_adapter_of_one_weight(targets: list[str]) -> None:
    """Results and gradients are those of W + scaling (B A)^T in both places."""
    base = llama()
    model = adapted(*targets)
    embedding, head = layers(model)
    assert head.lora_A is embedding.lora_B and head.lora_B is embedding.lora_A
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert [name.rpartition(".")[2] for name in trained] == ["lora_A", "lora_B"]

    A = embedding.lora_A.detach().double().requires_grad_()
    B = embedding.lora_B.detach().double().requires_grad_()
    W = base.get_submodule(EMBEDDING).weight.detach().double() + ALPHA / R * (B @ A).t()
    plain = copy.deepcopy(base).double()
    names = [f"{EMBEDDING}.weight", f"{HEAD}.weight"]
    result = torch.func.functional_call(
        plain, dict.fromkeys(names, W), kwargs={"input_ids": TOKENS}, tie_weights=False
    )
    want: Tensor = result.logits
    got = logits(model)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())
    weights = torch.randn(want.shape, dtype=torch.float64)
    (want * weights).sum().backward()
    (got * weights.float()).sum().backward()
    for own, exact in ((embedding.lora_A.grad, A.grad), (embedding.lora_B.grad, B.grad)):
        assert exact is not None
        torch.testing.assert_close(
            own.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item()
        )


def test_merging_keeps_the_tie() -> None:
    model = adapted()
    embedding, head = layers(model)
    before, want = embedding.weight, logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    assert head.weight is embedding.weight is not before
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert head.weight is embedding.weight is before
    assert torch.equal(logits(model), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain: Any = model.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert type(plain.lm_head) is nn.Linear and plain.config.tie_word_embeddings
    torch.testing.assert_close(logits(plain), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [[HEAD], ["embed_tokens"], ["q_proj", HEAD]], ids=str)
def test_files_go_both_ways(targets: list[str], tmp_path: Path) -> None:
    fields = {"r": R, "lora_alpha": ALPHA, "ensure_weight_tying": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=list(targets), **fields)
        theirs = peft.get_peft_model(llama(), config).eval()
        disturb(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = adapted(*targets)
        ours.save_pretrained(tmp_path / "ours")
        read = LoraModel.from_pretrained(llama(), tmp_path / "theirs")
        back = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(read), logits(theirs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(back), logits(ours), rtol=1e-5, atol=1e-5)
    embedding, head = layers(read)
    assert head.lora_A is embedding.lora_B
    shapes = []
    for who in ("theirs", "ours"):
        tensors = safetensors.torch.load_file(tmp_path / who / WEIGHTS_NAME)
        shapes.append({key: tensor.shape for key, tensor in tensors.items()})
    own = [key for key in shapes[1] if key.startswith(f"base_model.model.{HEAD}.lora_")]
    assert len(own) == 2 and {key: shapes[0][key] for key in shapes[1]} == shapes[1]
    names = [
        set(one.from_pretrained(str(tmp_path / who)).target_modules)
        for one, who in ((peft.LoraConfig, "theirs"), (LoraConfig, "ours"))
    ]
    assert HEAD not in names[1] and {*names[0], "embed_tokens"} >= names[1]
    again = LoraModel.from_pretrained(llama(), tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))


def test_a_file_without_the_heads_tensors_is_of_the_embedding_alone(tmp_path: Path) -> None:
    """As PEFT ties only what it knows the name of: of GPT-2 not `wte`."""
    base, inputs = BUILDERS["gpt2"]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {"r": R, "target_modules": ["wte"], "ensure_weight_tying": True}
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)).eval()
        disturb(theirs)
        theirs.save_pretrained(tmp_path)
        read = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
        read.save_pretrained(tmp_path / "again")
        again = LoraModel.from_pretrained(base, tmp_path / "again")
    assert type(read.get_base_model().lm_head) is nn.Linear
    torch.testing.assert_close(read(**inputs).loss, theirs(**inputs).loss)
    assert torch.equal(again(**inputs).loss, read(**inputs).loss)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", r".*\.(q_proj|embed_tokens)"),
        ("llama", r"model\.embed_tokens"),
        ("gpt2", ["wte"]),
        ("bert", ["word_embeddings"]),
        ("bert", ["query", "decoder"]),
        ("bert", r".*\.(query|word_embeddings)"),
    ],
    ids=str,
)
def test_peft_reads_files_in_which_it_would_see_no_tie(
    name: str, targets: list[str] | str, tmp_path: Path
) -> None:
    """It asks expressions about bare names, and knows GPT-2's embedding by none, nor any of BERT's.
    That lm_head is named for its sake is no reason to save the base below, as auto would."""
    base, inputs = BUILDERS[name](**({"tie_word_embeddings": True} if name == "llama" else {}))
    config = config_of("q")
    config.target_modules = targets
    ours = get_lora_model(copy.deepcopy(base), config).eval()
    disturb(ours)
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    again = LoraModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(theirs(**inputs).logits, ours(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(again(**inputs).logits, ours(**inputs).logits)
    assert len(list(again.parameters())) == len(list(ours.parameters()))
    keys = safetensors.torch.load_file(tmp_path / WEIGHTS_NAME)
    assert any("base_layer" in key for key in keys) is (name == "llama")


@pytest.mark.parametrize("excluded", ["embed_tokens", HEAD])
def test_what_is_tied_in_spite_of_exclude_modules_is_saved(excluded: str, tmp_path: Path) -> None:
    (other,) = {"embed_tokens", HEAD} - {excluded}
    ours = adapted("q_proj", other, exclude_modules=[excluded])
    ours.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    again = LoraModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(back), logits(ours), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(again), logits(ours))


def test_what_was_assigned_apart_is_merged_apart() -> None:
    model = adapted()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)  # each key a parameter, as of all modules
    embedding, head = layers(model)
    assert head.lora_A is not embedding.lora_B
    disturb(model)
    want = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)


def test_a_weight_of_its_own_is_merged_apart() -> None:
    model = adapted()
    _, head = layers(model)
    head.weight = nn.Parameter(torch.randn_like(head.weight), False)
    want = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


def test_a_file_that_says_two_things_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS_NAME)
    tensors["base_model.model.lm_head.lora_B.weight"] += 1
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterFileError, match="differs from"):
        LoraModel.from_pretrained(llama(), tmp_path)


def test_several_adapters_and_switches() -> None:
    model = adapted()
    before = logits(model)
    model.add_adapter("own", config_of("q_proj", HEAD, ensure_weight_tying=False))
    model.add_adapter("more", config_of("embed_tokens"))
    embedding, head = layers(model)
    assert head.lora_A_more is embedding.lora_B_more
    assert head.lora_A_own.shape == (R, 8) and "own" not in embedding.adapters
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(llama()))
    model.set_adapter("more")
    assert embedding.lora_A_more.requires_grad and not embedding.lora_A.requires_grad
    model.set_adapter("default")
    twin = copy.deepcopy(model)
    assert layers(twin)[0].lora_A is layers(twin)[1].lora_B is not embedding.lora_A
    assert torch.equal(logits(twin), before)
    model.delete_adapter("default")
    assert "default" not in head.adapters and not head._tied.keys() - {"more"}
    model.to(torch.float64)
    assert head.lora_A_more is embedding.lora_B_more and embedding.lora_B_more.dtype.itemsize == 8


def test_state_dicts_and_meta() -> None:
    model = adapted()
    state = lora_ext.get_peft_model_state_dict(model)
    other = llama()
    lora_ext.inject_adapter_in_model(config_of(HEAD), other, low_cpu_mem_usage=True)
    lora_ext.set_peft_model_state_dict(other, state, low_cpu_mem_usage=True)
    assert other.get_submodule(HEAD).lora_A is other.get_submodule(EMBEDDING).lora_B
    assert torch.equal(logits(other), logits(model))


def test_under_a_plan_of_a_batch() -> None:
    model = adapted()
    want = logits(model)
    with lora_ext.batch(["default"]):
        got = logits(model)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "expected plain LoRA"),
        ({"init_lora_weights": "orthogonal"}, "expected plain LoRA"),
        ({"rank_pattern": {HEAD: 4}}, "other ranks or scalings"),
        ({"modules_to_save": ["embed_tokens"]}, "expected them in one of the two"),
    ],
    ids=str,
)
def test_what_cannot_be_one_adapter_is_refused(options: dict[str, Any], match: str) -> None:
    base = llama()
    before = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=match):
        get_lora_model(base, config_of(HEAD, **options))
    assert [type(module) for module in base.modules()] == before


def test_combining_is_refused() -> None:
    model = adapted()
    model.add_adapter("more", config_of("embed_tokens"))
    with pytest.raises(NotBuiltError, match="that of the embedding"):
        model.add_weighted_adapter(["default", "more"], [0.5, 0.5], "mixed")


def test_loaded_over_the_adapter_and_swapped(tmp_path: Path) -> None:
    source = adapted()
    source.save_pretrained(tmp_path)
    for load in (
        lambda model: model.load_adapter(tmp_path, "default"),
        lambda model: lora_ext.hotswap_adapter(model, tmp_path, "default"),
    ):
        model = get_lora_model(llama(), config_of(HEAD)).eval()
        assert not torch.equal(logits(model), logits(source))
        load(model)
        embedding, head = layers(model)
        assert head.lora_A is embedding.lora_B
        assert torch.equal(logits(model), logits(source))
    with pytest.raises(ValueError, match="is the adapter of an embedding"):
        head.reset_lora_parameters()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_head_that_is_called_has_it_beside_its_weight() -> None:
    base = llama()
    base.get_submodule(HEAD).__class__ = Doubled
    model = get_lora_model(base, config_of(HEAD)).eval()
    disturb(model)
    want = logits(model)
    assert isinstance(layers(model)[1], KeptBase)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
