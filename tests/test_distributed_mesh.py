"""Four processes in a mesh of three dimensions: FSDP2 of what tensor parallelism divided, and
copies of that."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
from processes import assert_passed, names_of_checks, run_checks, shared_folder
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.distributed import lora_plan

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(
    3, tiny_models.VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(1)
)


def model_of(seed: int = 4) -> LoraModel:
    base = tiny_models.llama()[0].double()
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False}
    return get_lora_model(base, LoraConfig(**settings)).train()


def divided(model: LoraModel, dp: int, fsdp: int, tp: int) -> LoraModel:
    """On a mesh of dp x fsdp x tp: what tp divides is divided once more in fsdp, with copies in
    dp."""
    mesh = init_device_mesh("cpu", (dp, fsdp, tp), mesh_dim_names=("dp", "fsdp", "tp"))
    base: Any = model.get_base_model()
    plan = {f"model.{name}": style for name, style in base.config.base_model_tp_plan.items()}
    parallelize_module(base, mesh["tp"], lora_plan(plan))
    for block in base.model.layers:
        fully_shard(block, mesh=mesh["dp", "fsdp"])
    fully_shard(model, mesh=mesh["dp", "fsdp"])
    return model


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_like_one_process(dp: int, fsdp: int, tp: int) -> None:
    want = model_of()
    loss_of(want, TOKENS).backward()
    wanted = {n: p.grad for n, p in want.named_parameters() if p.grad is not None}
    model = divided(model_of(), dp, fsdp, tp)
    mine = TOKENS.chunk(dp * fsdp)[dist.get_rank() // tp]

    def assert_gradients() -> None:
        model.zero_grad()
        loss_of(model, mine).backward()
        found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys() and len(wanted) == 42
        for name, grad in wanted.items():
            assert (found[name] - grad).norm() <= 1e-12 * grad.norm(), name

    assert_gradients()
    folders = [shared_folder(f"{kind} {dp} {fsdp} {tp}") for kind in ("whole", "parts")]
    if dist.get_rank() == 0:
        want.save_pretrained(folders[0])
    model.save_pretrained(folders[1])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    model.load_adapter(folders[0], "default")
    assert_gradients()
    with torch.no_grad():
        before = loss_of(model, TOKENS)
        want.merge_adapter()
        model.merge_adapter()
        for (name, one), (_, other) in zip(model.lora_layers(), want.lora_layers(), strict=True):
            assert torch.equal(whole(one.weight), other.weight), name
        torch.testing.assert_close(loss_of(model, TOKENS), before)
        model.unmerge_adapter()
        assert torch.equal(loss_of(model, TOKENS), before)


def check_fsdp_and_tp() -> None:
    assert_like_one_process(1, 2, 2)


def check_dp_and_tp() -> None:
    assert_like_one_process(2, 1, 2)


@pytest.mark.parametrize("check", names_of_checks(globals()))
def test_in_four_processes(check: str) -> None:
    assert_passed(__file__, check, processes=4)


if __name__ == "__main__":
    run_checks(globals())
