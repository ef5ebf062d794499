"""Trains adapters of a small Llama on several processes: copies (DDP), shards (FSDP2), tensor
parallelism, or a mesh of all three. Two CPU processes do:

    torchrun --nproc_per_node 2 examples/train_distributed.py --plan ddp
    torchrun --nproc_per_node 2 examples/train_distributed.py --plan fsdp
    torchrun --nproc_per_node 2 examples/train_distributed.py --plan tp
    torchrun --nproc_per_node 8 examples/train_distributed.py --plan mesh --mesh 2x2x2

On many nodes the same program is started by torchrun on each; docs/scale.md says what is divided
and what a step moves. With GPUs it uses NCCL.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.distributed import Traffic, lora_plan

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = StateDictOptions(ignore_frozen_params=True)  # and their optimizer's state


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--plan", choices=("ddp", "fsdp", "tp", "mesh"), default="fsdp")
    parser.add_argument("--mesh", help="dp x fsdp x tp for --plan mesh, such as 2x2x2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="of all processes together")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mixed", action="store_true", help="FSDP2 computes in bfloat16")
    parser.add_argument("--offload", action="store_true", help="FSDP2 keeps shards on the CPU")
    parser.add_argument("--out", type=Path, help="folder for the adapter")
    parser.add_argument("--checkpoint", type=Path, help="folder: resumed from, written at the end")
    return parser.parse_args()


def mesh_of(options: argparse.Namespace, device: str) -> DeviceMesh:
    """dp x fsdp x tp."""
    p = dist.get_world_size()
    sizes = {"ddp": (p, 1, 1), "fsdp": (1, p, 1), "tp": (1, 1, p)}.get(options.plan)
    if sizes is None:
        sizes = tuple(int(size) for size in (options.mesh or "").split("x") if size.isdigit())
    if len(sizes) != 3 or sizes[0] * sizes[1] * sizes[2] != p:
        raise SystemExit(f"--mesh: got {options.mesh}, expected three sizes, {p} processes in all")
    return init_device_mesh(device, sizes, mesh_dim_names=("dp", "fsdp", "tp"))


def build(options: argparse.Namespace, device: str) -> LoraModel:
    """The same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=options.length,
    )
    base = LlamaForCausalLM(config).to(device, getattr(torch, options.dtype))
    adapters = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        target_modules=TARGETS,
    )
    return get_lora_model(base, adapters).train()


def divide(model: LoraModel, mesh: DeviceMesh, options: argparse.Namespace) -> nn.Module:
    """What is called in a step. Order matters: adapters, tensor parallelism, then FSDP2 or DDP."""
    base: Any = model.get_base_model()
    if mesh["tp"].size() > 1:
        plan = {f"model.{name}": style for name, style in base.config.base_model_tp_plan.items()}
        parallelize_module(base, mesh["tp"], lora_plan(plan))
    if options.plan == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if mesh["dp"].size() * mesh["fsdp"].size() > 1:
        choices: dict[str, Any] = {"mesh": mesh["dp", "fsdp"]}
        if options.plan == "fsdp":
            choices["mesh"] = mesh["fsdp"]
        if options.mixed:
            choices["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if options.offload:
            pinned = mesh.device_type == "cuda"
            choices["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
        for block in base.model.layers:
            fully_shard(block, **choices)
        fully_shard(model, **choices)
    return model


def batches(options: argparse.Namespace, mesh: DeviceMesh, device: str) -> Iterator[Tensor]:
    """This process's rows of batches of [batch_size, length]: sequences that a few rules make. The
    processes of a tensor parallel group have the same."""
    replicas = mesh["dp"].size() * mesh["fsdp"].size()
    mine = mesh["dp"].get_local_rank() * mesh["fsdp"].size() + mesh["fsdp"].get_local_rank()
    generator = torch.Generator().manual_seed(1)
    while True:
        start = torch.randint(0, 512, (options.batch_size, 1), generator=generator)
        step = torch.randint(1, 4, (options.batch_size, 1), generator=generator)
        tokens = (start + step * torch.arange(options.length)) % 512
        yield tokens.chunk(replicas)[mine].to(device)


def main() -> None:
    options = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = mesh_of(options, device)
    first = dist.get_rank() == 0
    model = build(options, device)
    called = divide(model, mesh, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    if options.checkpoint and (options.checkpoint / ".metadata").exists():
        resume(model, optimizer, options.checkpoint)
    # Dropout: other masks in other replicas, the same within a tensor parallel group.
    torch.manual_seed(dist.get_rank() // mesh["tp"].size())
    data = batches(options, mesh, device)
    losses, seconds, traffic = [], [], Traffic()
    for step in range(options.steps):
        tokens, begin = next(data), time.perf_counter()
        with traffic if step == 1 else torch.enable_grad():  # counted in one step
            loss = called(input_ids=tokens, labels=tokens).loss
            loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=dist.ReduceOp.SUM)
        losses.append(mean.item() / dist.get_world_size())
        seconds.append(time.perf_counter() - begin)
        if first and (step % 5 == 0 or step == options.steps - 1):
            print(f"step {step:3d}  loss {losses[-1]:.4f}", flush=True)
    if options.checkpoint:
        dcp.save(states_of(model, optimizer), checkpoint_id=options.checkpoint)
    if options.out and (options.plan != "ddp" or first):
        model.save_pretrained(options.out)  # of shards all processes call it, and the first writes
    if first:
        report = {
            "plan": options.plan,
            "mesh": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
            "losses": losses,
            "seconds_per_step": sorted(seconds)[len(seconds) // 2],
            "bytes_into_collectives_of_a_step": dict(traffic.bytes),
            "collectives_of_a_step": dict(traffic.calls),
            "parameters_here": sum(local(p).numel() for p in model.parameters()),
            "trained_here": sum(local(p).numel() for p in trained),
        }
        print(json.dumps(report), flush=True)
    dist.destroy_process_group()


def states_of(model: LoraModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Of the adapters alone."""
    states = get_state_dict(model, optimizer, options=ADAPTERS)
    return dict(zip(("model", "optimizer"), states, strict=True))


def resume(model: LoraModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Adapters and optimizer of a checkpoint, whatever the mesh was that wrote it."""
    loaded = states_of(model, optimizer)
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


if __name__ == "__main__":
    main()
