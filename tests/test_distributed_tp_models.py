"""Tensor parallelism of whole models, by transformers' plans: divided by `lora_plan`, or by
transformers itself."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
import transformers
from processes import assert_passed, names_of_checks, run_checks, shared_folder
from safetensors.torch import load_file
from test_distributed_tp import gradients, mesh
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.distributed import lora_plan

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def llama(**options: Any) -> LoraModel:
    base = tiny_models.llama()[0]
    torch.manual_seed(4)
    settings: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False}
    return get_lora_model(base, LoraConfig(**settings | options)).train()


def plan_of(base: Any) -> dict[str, Any]:
    plan = {f"model.{name}": style for name, style in base.config.base_model_tp_plan.items()}
    return {**plan, "lm_head": "colwise_gather_output"}


def divided(model: LoraModel) -> LoraModel:
    parallelize_module(model.get_base_model(), mesh(), lora_plan(plan_of(model.get_base_model())))
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    inputs = tiny_models.llama()[1]
    model(**inputs).loss.backward()
    return gradients(model)


def assert_alike(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and len(want) > 40
    size = torch.stack([grad.norm() for grad in want.values()]).norm()
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 1e-6 * size, name


def check_a_model() -> None:
    want, model = step(llama()), divided(llama())
    assert_alike(step(model), want)
    assert sum(isinstance(p, DTensor) for p in model.parameters()) == 3 * (7 * 3) + 3
    assert "this process's part" in str(lora_ext.explain(model))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.set_adapter(["default", "second"])
    assert len(step(model)) == len(want) + 3 * 2 * 2
    model.set_adapter("default")
    assert_alike(step(model), want)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    whole = llama()
    other = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=0.01)
    step(whole)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
    optimizer.step()
    other.step()
    for name, parameter in whole.named_parameters():
        own = model.get_parameter(name)
        own = own.full_tensor() if isinstance(own, DTensor) else own
        torch.testing.assert_close(own, parameter, rtol=1e-4, atol=1e-4)


def check_a_model_with_a_module_to_save() -> None:
    """The head and its copy are both divided."""
    options: dict[str, Any] = {"target_modules": TARGETS[:-1], "modules_to_save": ["lm_head"]}
    want, model = step(llama(**options)), divided(llama(**options))
    got = step(model)
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    assert name in got and model.get_parameter(name).placements == (Shard(0),)
    assert_alike(got, want)
    model.save_pretrained(shared_folder("with a head"))
    read = load_file(shared_folder("with a head") / "adapter_model.safetensors")
    assert read["base_model.model.lm_head.weight"].shape == (tiny_models.VOCABULARY, 32)


def check_files_of_a_model() -> None:
    """What is saved is bit for bit what one process saves, and loads into a model that is divided
    already, before or after it has adapters."""
    if dist.get_rank() == 0:
        llama().save_pretrained(shared_folder("whole"))
    model = divided(llama())
    model.save_pretrained(shared_folder("parts"))
    dist.barrier()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        one, other = (shared_folder(folder) / name for folder in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes(), name
    want = step(llama())
    base = tiny_models.llama()[0]
    parallelize_module(base, mesh(), lora_plan(plan_of(base)))
    loaded = LoraModel.from_pretrained(base, shared_folder("whole"), is_trainable=True).train()
    assert_alike(step(loaded), want)
    loaded.load_adapter(shared_folder("parts"), "second", is_trainable=True)
    loaded.set_adapter("second")
    second = {name.replace("_second", ""): grad for name, grad in step(loaded).items()}
    assert_alike(second, want)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "second" in name:
                parameter.zero_()
    loaded.load_adapter(shared_folder("parts"), "second")  # again, into what is there
    assert_alike({n.replace("_second", ""): grad for n, grad in step(loaded).items()}, want)


def check_merging_a_model() -> None:
    inputs = tiny_models.llama()[1]
    whole, model = llama(), divided(llama())
    with torch.no_grad():
        before = model(**inputs).logits
        torch.testing.assert_close(before, whole(**inputs).logits, rtol=1e-4, atol=1e-5)
        model.merge_adapter()
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(**inputs).logits, before)
        model.disable_adapters()
        plain = tiny_models.llama()[0](**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-4, atol=1e-5)
        model.enable_adapters()
        plain_model = model.merge_and_unload()
        torch.testing.assert_close(plain_model(**inputs).logits, before, rtol=1e-4, atol=1e-5)


def check_a_model_that_transformers_divided() -> None:
    """Its forwards are put around the layers with adapters, in their place."""
    folder, inputs = shared_folder("base"), tiny_models.llama()[1]
    if dist.get_rank() == 0:
        tiny_models.llama()[0].save_pretrained(folder)
    dist.barrier()

    def base() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto")

    torch.manual_seed(4)
    settings: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False}
    model = get_lora_model(base(), LoraConfig(**settings)).train()
    whole = llama()
    assert sum(isinstance(p, DTensor) for p in model.parameters()) >= 3 * (7 * 3) + 3
    assert_alike(step(model), step(whole))
    with torch.no_grad():
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, whole(**inputs).logits, rtol=1e-4, atol=1e-5)
    whole.save_pretrained(shared_folder(f"one {dist.get_rank()}"))
    model.save_pretrained(shared_folder("transformers"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        one = shared_folder(f"one {dist.get_rank()}") / name
        text, other = one.read_bytes(), (shared_folder("transformers") / name).read_bytes()
        if name.endswith("json"):  # which knows where the base came from
            text, other = (json.loads(t) | {"base_model_name_or_path": None} for t in (text, other))
        assert text == other, name
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
    plain = model.unload()
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="lora_bias: got True"):
        get_lora_model(base(), LoraConfig(r=2, target_modules=["o_proj"], lora_bias=True))


@pytest.mark.parametrize("check", names_of_checks(globals()))
def test_in_two_processes(check: str) -> None:
    assert_passed(__file__, check)


if __name__ == "__main__":
    run_checks(globals())
