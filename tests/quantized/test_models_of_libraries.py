"""Models that transformers loads quantized, beside PEFT: losses, files, merging."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torchao.quantization as ao
import transformers
from quantized_problems import randomise
from torch import Tensor, nn
from trained_models import FIELDS, CountingUp, losses
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig, TrainingArguments

import lora_ext
from lora_ext.nn.quantized import QuantizedLinear

TOKENS = torch.arange(24).view(2, 12) + 5

CONFIGS: dict[str, Any] = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "nf4 for bf16": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(ao.Int8WeightOnlyConfig()),
}
BITSANDBYTES = ["nf4", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with sizes for which bitsandbytes' kernels for CPUs are right."""
    path = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def quiet(one_thread: None) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(4-bit|8-bit|rounding errors|Merge lora).*")
        yield


def load(folder: Path, kind: str, **options: Any) -> Any:
    options = {"dtype": torch.float32} | options
    return LlamaForCausalLM.from_pretrained(
        folder, quantization_config=CONFIGS[kind](), device_map="cpu", **options
    )


def both(folder: Path, kind: str, **fields: Any) -> tuple[Any, Any]:
    """PEFT's model and ours, with the same adapter, which is not zero; in training mode, in which
    bitsandbytes repacks nothing."""
    theirs = peft.get_peft_model(load(folder, kind), peft.LoraConfig(**FIELDS | fields))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    ours = lora_ext.get_peft_model(load(folder, kind), lora_ext.LoraConfig(**FIELDS | fields))
    state = peft.get_peft_model_state_dict(theirs)
    lora_ext.set_peft_model_state_dict(ours, state)
    return theirs.train(), ours.train()


def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def base_bytes(model: nn.Module) -> dict[str, bytes]:
    def as_bytes(tensor: Any) -> bytes:
        parts = getattr(tensor, "__tensor_flatten__", lambda: ((), None))()[0]
        if parts:
            return b"".join(as_bytes(getattr(tensor, part)) for part in parts)
        return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return {name: as_bytes(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("nf4", {}), ("nf4", {"use_dora": True}), ("int8", {"use_rslora": True})],
    ids=["nf4", "nf4, dora", "int8, rslora"],
)
def test_logits_and_gradients_are_pefts(folder: Path, kind: str, fields: dict[str, Any]) -> None:
    """PEFT's DoRA over int8 fails on a CPU."""
    theirs, ours = both(folder, kind, **fields)
    # LLM.int8() rounds x to 8 bits, too; the values here are of the codes alone.
    bound = {"rtol": 0.05, "atol": 0.03} if kind == "int8" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(logits(ours), logits(theirs), **bound)
    found = []
    for model in (theirs, ours):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found.append([p.grad.norm() for _, p in sorted(gradients.items())])
    torch.testing.assert_close(torch.stack(found[0]).sum(), torch.stack(found[1]).sum(), **bound)


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_saving_merging(folder: Path, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = lora_ext.prepare_model_for_kbit_training(load(folder, kind))
    assert base.is_gradient_checkpointing
    before = base_bytes(base)
    config = lora_ext.LoraConfig(**FIELDS, lora_dropout=0.05)
    model: Any = lora_ext.get_peft_model(base, config).train()
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(quantized) == 14
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    loss = []
    for _ in range(10):
        loss.append(model(input_ids=TOKENS, labels=TOKENS).loss)
        loss[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss[-1] < loss[0] - 0.1
    state = lora_ext.get_base_model_state_dict(model)
    assert {name.replace("base_layer.", "") for name in state} == before.keys()
    y = logits(model.eval())
    with model.disable_adapter():
        assert not torch.equal(logits(model), y)
    model.save_pretrained(tmp_path)
    again: Any = lora_ext.PeftModel.from_pretrained(load(folder, kind), tmp_path)
    lora_ext.prepare_model_for_kbit_training(again.get_base_model())
    atol = 0.02 if kind == "nf4 for bf16" else 1e-5
    torch.testing.assert_close(logits(again.eval()), y, rtol=0, atol=atol)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y, rtol=0, atol=5 * atol)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    assert base_bytes(copy.deepcopy(model).unload()) == before
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), y, rtol=0, atol=5 * atol)
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    if kind != "torchao int8":  # nothing says any more that it is quantized
        merged.half().save_pretrained(tmp_path / "merged")
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        assert base_bytes(loaded) == base_bytes(merged)


@pytest.mark.parametrize("kind", [*BITSANDBYTES, "fp4"])
@pytest.mark.parametrize("part", ["all", "partly merged", "dense"])
def test_a_model_of_quantize_is_loaded_as_bitsandbytes(
    folder: Path, kind: str, part: str, tmp_path: Path
) -> None:
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora_ext.quant.quantize_(model, kind, exclude_modules=["k_proj"], nested=kind == "nf4")
    if part != "all":
        fields = FIELDS | {"target_modules": ["q_proj"], "init_lora_weights": False}
        model = lora_ext.get_peft_model(model, lora_ext.LoraConfig(**fields)).merge_and_unload()
    y = logits(model)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    layer = loaded.model.layers[0].self_attn
    assert type(layer.v_proj).__module__.startswith("bitsandbytes")
    assert type(layer.k_proj) is nn.Linear
    assert (type(layer.q_proj) is nn.Linear) is (part != "all")
    if part == "dense":
        assert len(lora_ext.quant.dequantize_(loaded)) == 10
        assert loaded.float().dtype is torch.float32
    # In training bitsandbytes multiplies with the values of the codes.
    torch.testing.assert_close(logits(loaded.train()), y, rtol=0, atol=1e-5)


def test_a_part_of_a_model_of_bitsandbytes_is_merged(folder: Path, tmp_path: Path) -> None:
    fields = FIELDS | {"target_modules": ["q_proj"], "init_lora_weights": False}
    model = lora_ext.get_peft_model(load(folder, "nf4"), lora_ext.LoraConfig(**fields)).train()
    y = logits(model)
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).train()
    assert type(loaded.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(loaded), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_merging_as_peft_does(folder: Path, kind: str) -> None:
    """Into codes again: PEFT's, but where another order of additions rounds to the next one."""
    theirs, ours = both(folder, kind)
    mine, other = ours.merge_and_unload(requantize=True), theirs.merge_and_unload()
    pairs = [
        (one.weight, two.weight)
        for (_, one), (_, two) in zip(mine.named_modules(), other.named_modules(), strict=True)
        if type(one).__module__.startswith("bitsandbytes")
    ]
    assert len(pairs) == 14 and all(type(one) is type(two) for one, two in pairs)
    differ = [(one.data != two.data).float().mean().item() for one, two in pairs]
    assert max(differ) < 0.01
    torch.testing.assert_close(logits(mine), logits(other), rtol=0.01, atol=0.02)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_adapters_go_both_ways(folder: Path, kind: str, tmp_path: Path) -> None:
    theirs, ours = both(folder, kind)
    theirs.save_pretrained(tmp_path / "peft")
    ours.save_pretrained(tmp_path / "lora_ext")
    bound = {"rtol": 0.05, "atol": 0.03} if kind == "int8" else {"rtol": 1e-3, "atol": 1e-4}
    read: Any = lora_ext.PeftModel.from_pretrained(load(folder, kind), tmp_path / "peft")
    assert torch.equal(logits(read.train()), logits(ours))
    back = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path / "lora_ext")
    torch.testing.assert_close(logits(back.train()), logits(ours), **bound)


def test_plans_and_several_adapters(folder: Path, tmp_path: Path) -> None:
    model: Any = lora_ext.get_peft_model(load(folder, "nf4"), lora_ext.LoraConfig(**FIELDS))
    model.add_adapter("other", lora_ext.LoraConfig(**FIELDS | {"r": 2, "use_dora": True}))
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            randomise(layer)
    model.eval()
    rows = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        rows[name] = logits(model)
    planned = model(input_ids=TOKENS, adapter_names=["other", "default"]).logits
    torch.testing.assert_close(planned[0], rows["other"][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(planned[1], rows["default"][1], rtol=0, atol=1e-4)


def test_preparation_is_pefts(folder: Path) -> None:
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    found = []
    for library in (peft, lora_ext):
        model = library.prepare_model_for_kbit_training(
            load(folder, "nf4", dtype=torch.bfloat16), **options
        )
        found.append({n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()})
        assert model.is_gradient_checkpointing
    assert found[0] == found[1]


def test_fifty_steps_of_the_trainer(folder: Path, tmp_path: Path) -> None:
    """R: the losses are those of PEFT over bitsandbytes, within 1e-3 of each."""
    found = []
    for name, model in zip(("peft", "lora_ext"), both(folder, "nf4"), strict=True):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=4,
            max_steps=50,
            logging_steps=1,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            learning_rate=5e-3,
            seed=1,
            disable_tqdm=True,
        )
        run = transformers.Trainer(model=model, args=arguments, train_dataset=CountingUp())
        run.train()
        found.append(losses(run))
    theirs, ours = found
    assert len(theirs) == len(ours) == 50 and theirs[0] - theirs[-1] > 0.5
    assert max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)) < 1e-3


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_gpt2_gets_its_own_layers_back(kind: str, tmp_path: Path) -> None:
    """Of its Conv1D transformers makes layers with the transposed weight."""
    config = transformers.GPT2Config(
        n_embd=64, n_layer=1, n_head=4, n_positions=32, vocab_size=97, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    base: Any = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "base", quantization_config=CONFIGS[kind](), dtype=torch.float32
    )
    fields: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": False}
    adapted = lora_ext.get_peft_model(base, lora_ext.LoraConfig(r=4, **fields)).eval()
    y = logits(adapted)
    merged: Any = adapted.merge_and_unload()
    assert lora_ext.quant.dequantize_(merged) == ["transformer.h.0.mlp.c_fc"]
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(merged))
    # The layer without an adapter was bitsandbytes' own, which rounds x to 8 bits.
    torch.testing.assert_close(logits(loaded), y, rtol=0, atol=0.02 if kind == "int8" else 1e-4)
