"""FSDP2 and DDP: two processes learn what one does; adapters in parts are saved, loaded, merged."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import assert_passed, names_of_checks, run_checks, shared_folder
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(
    3, tiny_models.VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(1)
)


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | options)


def model_of(dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> LoraModel:
    torch.manual_seed(seed)
    casts = {"autocast_adapter_dtype": options.pop("autocast_adapter_dtype", True)}
    base = tiny_models.llama()[0].to(dtype)
    return get_lora_model(base, config(**options), **casts).train()


def divided(model: LoraModel, **options: Any) -> LoraModel:
    for block in model.get_base_model().model.layers:  # type: ignore[union-attr]
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def my_tokens() -> Tensor:
    return TOKENS[2 * dist.get_rank() : 2 * dist.get_rank() + 2]


def loss_of(model: nn.Module, tokens: Tensor) -> Any:
    return model(input_ids=tokens, labels=tokens).loss


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def of_one_process(model: nn.Module) -> dict[str, Tensor]:
    loss_of(model, TOKENS).backward()
    return gradients(model)


def of_halves(model: nn.Module) -> dict[str, Tensor]:
    """The same as the mean over what the two processes compute, with their roundings."""
    found: list[dict[str, Tensor]] = []
    for tokens in TOKENS.split(2):
        model.zero_grad()
        loss_of(model, tokens).backward()
        found.append({name: grad.float() for name, grad in gradients(model).items()})
    return {name: (grad + found[1][name]) / 2 for name, grad in found[0].items()}


def assert_alike(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Each gradient within a part of the size of all of them."""
    assert got.keys() == want.keys() and len(want) > 10
    size = torch.stack([grad.double().norm() for grad in want.values()]).norm()
    for name, grad in want.items():
        assert 0 < grad.norm()
        error = ((got[name].double() - grad.double()).norm() / size).item()
        assert error <= tolerance, (name, error)


def check_ddp() -> None:
    want = of_one_process(model_of())
    model = nn.parallel.DistributedDataParallel(model_of())
    loss_of(model, my_tokens()).backward()
    assert_alike({n.removeprefix("module."): g for n, g in gradients(model).items()}, want, 1e-6)


def check_ddp_with_other_seeds_and_dropout() -> None:
    """Processes that made other adapters have the first one's; with a mask each they still hold the
    same after a step."""
    model = model_of(seed=1 + dist.get_rank(), lora_dropout=0.5)
    parallel = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(dist.get_rank())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(parallel, my_tokens()).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            both = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(both, parameter.detach())
            assert torch.equal(*both), name


def check_fsdp_gradients_are_those_of_one_process() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        want = of_one_process(model_of(dtype))
        model = divided(model_of(dtype))
        for _ in range(2):  # the second after parts became whole and parts again
            model.zero_grad()
            loss_of(model, my_tokens()).backward()
            assert_alike(gradients(model), want, tolerance)


def check_fsdp_of_float32_adapters_beside_a_bfloat16_base() -> None:
    """One unit of parameters of two dtypes: those that are trained are all of one."""
    want = of_halves(model_of(torch.bfloat16))
    model = divided(model_of(torch.bfloat16))
    loss_of(model, my_tokens()).backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert_alike(gradients(model), want, 1e-6)


def check_fsdp_with_cpu_offload() -> None:
    want = of_one_process(model_of())
    model = divided(model_of(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    loss_of(model, my_tokens()).backward()
    assert_alike(gradients(model), want, 1e-6)
    model.save_pretrained(shared_folder("offloaded"))
    model.load_adapter(shared_folder("offloaded"), "default")
    model.merge_adapter()
    model.unmerge_adapter()
    model.zero_grad()
    loss_of(model, my_tokens()).backward()
    assert_alike(gradients(model), want, 1e-6)


def check_fsdp_of_trained_parameters_of_two_dtypes() -> None:
    """Torch refuses them in one unit; a unit of their own, as docs/scale.md says, is fine."""

    def build() -> LoraModel:
        model = model_of(torch.bfloat16)
        model.get_base_model().model.norm.weight.requires_grad_(True)  # type: ignore[union-attr]
        return model

    model = build()
    fully_shard(model)
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        loss_of(model, my_tokens())
    model = divided(build())  # the norm is in the root's unit, where no adapters are
    loss_of(model, my_tokens()).backward()
    assert_alike(gradients(model), of_halves(build()), 2**-8)  # reduced in bfloat16


def check_fsdp_in_mixed_precision() -> None:
    """Parameters in float32, computed with in bfloat16: as one process whose are cast."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        cast = model_of(dtype)
        for parameter in cast.parameters():
            parameter.data = parameter.to(torch.bfloat16)
        want = of_halves(cast)
        model = divided(model_of(dtype), mp_policy=policy)
        loss_of(model, my_tokens()).backward()
        assert {g.dtype for g in gradients(model).values()} == {torch.float32}
        assert_alike(gradients(model), want, 1e-6)


def check_fsdp_of_layers_of_other_kinds() -> None:
    """A unit of a convolution, an embedding, an attention and DoRA."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)
            self.convolution = nn.Conv1d(8, 8, 3, padding=1)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.convolution(self.table(tokens).transpose(1, 2)).transpose(1, 2)
            result: Tensor = self.head(self.attention(x, x, x)[0]).square().mean()
            return result

    names = ["table", "convolution", "attention", "head"]

    def build() -> LoraModel:
        torch.manual_seed(2)
        model = get_lora_model(
            Net(), LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        )
        model.add_adapter("dora", LoraConfig(r=2, target_modules=["head"], use_dora=True))
        model.set_adapter(["default", "dora"])
        return model

    tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(1))
    want, model = build(), build()
    fully_shard(model)
    want(tokens).backward()
    model(tokens[2 * dist.get_rank() :][:2]).backward()
    found = gradients(model)
    for name, grad in gradients(want).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)
    want.merge_adapter()
    model.merge_adapter()
    torch.testing.assert_close(model(tokens), want(tokens), rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    want.unmerge_adapter()
    torch.testing.assert_close(model(tokens), want(tokens), rtol=1e-5, atol=1e-6)


def trained(model: nn.Module, tokens: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_saving_gathers_bit_for_bit() -> None:
    """Before a forward, after one (parameters of the root are whole then) and after a backward."""
    model = model_of(modules_to_save=["lm_head"])
    if dist.get_rank() == 0:
        model.save_pretrained(shared_folder("whole"))
    dist.barrier()
    want = files_of(shared_folder("whole"))
    model = divided(model_of(modules_to_save=["lm_head"]))
    for moment in ("before", "forward", "backward"):
        if moment == "forward":
            loss = loss_of(model, my_tokens())
        if moment == "backward":
            loss.backward()
        folder = shared_folder(moment)
        model.save_pretrained(folder)  # is there when it returns, in every process
        assert files_of(folder) == want, moment
    assert all(isinstance(p, DTensor) for p in model.parameters())


def check_one_process_writes() -> None:
    """The model card too: where all write one file, others read half of it."""
    model = divided(model_of())
    folder, made = str(shared_folder("of one")), []

    def see(event: str, told: tuple[Any, ...]) -> None:
        if event == "open" and str(told[0]).startswith(folder) and told[2] & os.O_CREAT:
            made.append(told[0])

    sys.addaudithook(see)
    model.save_pretrained(folder)
    assert bool(made) is (dist.get_rank() == 0), made


def check_saving_fails_in_all_processes() -> None:
    model = divided(model_of())
    folder = shared_folder("a file")
    if dist.get_rank() == 0:
        folder.write_text("in the way")
    dist.barrier()
    with pytest.raises((OSError, AdapterFileError, RuntimeError)) as caught:
        model.save_pretrained(folder)
    if dist.get_rank() == 1:
        assert "failed in process 0" in str(caught.value)
    assert folder.read_text() == "in the way"


def check_loading_into_parts() -> None:
    """An adapter that was there before fully_shard gets a file's values, in place."""
    source = model_of(seed=7, modules_to_save=["lm_head"])
    folder = shared_folder("source")
    if dist.get_rank() == 0:
        source.save_pretrained(folder)
    dist.barrier()
    model = divided(model_of(modules_to_save=["lm_head"]))
    loss_of(model, my_tokens()).backward()
    model.zero_grad()
    places = {name: id(parameter) for name, parameter in model.named_parameters()}
    model.load_adapter(folder, "default")
    assert places == {name: id(parameter) for name, parameter in model.named_parameters()}
    want = of_one_process(source)
    loss_of(model, my_tokens()).backward()
    assert_alike(gradients(model), want, 1e-6)
    other = divided(model_of(r=2))
    before = {n: whole(p.detach()).clone() for n, p in other.named_parameters()}
    with pytest.raises(AdapterFileError):
        other.load_adapter(folder, "default")
    assert all(torch.equal(before[n], whole(p.detach())) for n, p in other.named_parameters())
    like_it = divided(model_of(lora_alpha=16, modules_to_save=["lm_head"]))
    with pytest.warns(UserWarning, match=r"lora_alpha: the file says \d+, but .* keeps 16"):
        like_it.load_adapter(folder, "default")


def check_what_fsdp_would_not_see_is_refused() -> None:
    model = divided(model_of())
    layer = next(iter(model.lora_layers()))[1]
    calls: dict[str, Callable[[], object]] = {
        "add adapters first": lambda: model.add_adapter("new", config()),
        "rename it, then": lambda: model.rename_adapter("default", "new"),
        "delete it, then": lambda: model.delete_adapter("default"),
        "take the adapters out, then": model.unload,
        "take the adapters out, ": model.merge_and_unload,
        "before that": lambda: layer.add_adapter("new"),
    }
    for text, call in calls.items():
        with pytest.raises(ValueError, match=f"FSDP2.*{text}"):
            call()
    base = tiny_models.llama()[0]
    fully_shard(base)
    with pytest.raises(ValueError, match=r"FSDP2.*add adapters first"):
        get_lora_model(base, config())
    want = of_one_process(model_of())
    loss_of(model, my_tokens()).backward()
    assert_alike(gradients(model), want, 1e-6)


def check_merging_parts() -> None:
    """The merged weights are bit for bit those of one process; forwards use them; unmerging gives
    back the very parameters."""
    whole_one, model = model_of(), divided(model_of())
    loss_of(model, my_tokens()).backward()  # FSDP has seen its parameters
    before = loss_of(model, TOKENS).detach()
    named = dict(model.named_parameters())
    model.merge_adapter()
    whole_one.merge_adapter()
    for (name, one), (_, other) in zip(model.lora_layers(), whole_one.lora_layers(), strict=True):
        assert isinstance(one.weight, DTensor) and torch.equal(whole(one.weight), other.weight), (
            name
        )
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, TOKENS), before, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss_of(model, TOKENS), loss_of(whole_one, TOKENS))
        merged = dict(model.named_parameters())
        key = next(name for name in merged if name.endswith("q_proj.weight"))
        assert merged[key] is not named[key]
        model.unmerge_adapter()
        assert dict(model.named_parameters())[key] is named[key]
        torch.testing.assert_close(loss_of(model, TOKENS), before, rtol=0, atol=0)
        model.disable_adapters()
        base = tiny_models.llama()[0].train()
        torch.testing.assert_close(loss_of(model, TOKENS), loss_of(base, TOKENS))
    layer = dict(model.lora_layers())["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.lora_A.fill_(torch.inf)
    model.enable_adapters()
    with pytest.raises(ValueError, match="NaN or Inf"):
        model.merge_adapter()
    assert not any(one.merged for _, one in model.lora_layers())


def check_trained_rows_of_a_tied_embedding() -> None:
    def made() -> LoraModel:
        torch.manual_seed(1)
        rows = sorted(set(TOKENS.flatten().tolist()))[:4]
        fields = {"target_modules": ["c_attn", "c_fc"], "trainable_token_indices": rows}
        return get_lora_model(tiny_models.gpt2()[0], config(**fields)).eval()

    plain = made()
    want = of_one_process(plain)
    model = divided_blocks(made())
    loss_of(model, my_tokens()).backward()
    assert_alike(gradients(model), want, 1e-6)
    for one in (plain, model):
        trained(one, TOKENS)
    right = plain(input_ids=TOKENS).logits
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model(input_ids=TOKENS).logits, right, **near)
    folder = shared_folder("rows")
    model.save_pretrained(folder)
    model.load_adapter(folder, "default")
    before = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=TOKENS).logits, right, **near)
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(whole(after[name]), tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match="FSDP2"):
        model.get_base_model().transformer.wte.token_adapter.delete_adapter("default")


def divided_blocks(model: LoraModel) -> LoraModel:
    for block in model.get_base_model().transformer.h:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    return model


def check_choosing_adapters() -> None:
    """One trains at a time, and the gradients are its own."""

    def build() -> LoraModel:
        model = model_of()
        model.add_adapter("second", config(r=2, target_modules=["q_proj", "up_proj"]))
        return model

    want, model = build(), divided(build())
    for names in ("default", "second", ["default", "second"], "default"):
        for one, tokens in ((want, TOKENS), (model, my_tokens())):
            one.set_adapter(names)
            one.zero_grad()
            loss_of(one, tokens).backward()
        found = gradients(model)
        assert_alike(found, gradients(want), 1e-6)
    with torch.no_grad():
        model.set_scale("default", 0.5)
        want.set_scale("default", 0.5)
        torch.testing.assert_close(loss_of(model, TOKENS), loss_of(want, TOKENS))


def check_distributed_checkpoint() -> None:
    """What was trained comes back, with the optimizer's state, and training goes on as it was."""

    def start() -> tuple[LoraModel, torch.optim.Optimizer]:
        model = divided(model_of())
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=0.01)

    def step(model: LoraModel, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss_of(model, my_tokens()).backward()
        optimizer.step()

    options = StateDictOptions(ignore_frozen_params=True)
    model, optimizer = start()
    step(model, optimizer)
    states = get_state_dict(model, optimizer, options=options)
    assert set(states[0]) == {n for n, p in model.named_parameters() if p.requires_grad}
    folder = shared_folder("checkpoint")
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    step(model, optimizer)
    again, other = start()
    loaded = dict(
        zip(("model", "optimizer"), get_state_dict(again, other, options=options), strict=True)
    )
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        again,
        other,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    step(again, other)
    for name, one in model.named_parameters():
        assert torch.equal(whole(one.detach()), whole(again.get_parameter(name).detach())), name
    # A whole state dict, as for a model of one process.
    full = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    )
    plain = model_of(seed=9)
    set_model_state_dict(
        plain,
        full if dist.get_rank() == 0 else {},
        options=StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=True),
    )
    for name, one in model.named_parameters():
        if one.requires_grad:
            assert torch.equal(whole(one.detach()), plain.get_parameter(name)), name


def check_names_of_fsdp1() -> None:
    """lora_state_dict knows adapters within FSDP1's wrappers."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    lora_ext.replace_linear(model, ["0", "1.0"], r=2)
    lora_ext.mark_only_lora_as_trainable(model)
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    model[1] = FullyShardedDataParallel(model[1], **options)
    wrapped = FullyShardedDataParallel(model, **options)
    found = lora_ext.lora_state_dict(wrapped)
    assert set(found) == {"0.lora_A", "0.lora_B", "1.0.lora_A", "1.0.lora_B"}


@pytest.mark.parametrize("check", names_of_checks(globals()))
def test_in_two_processes(check: str) -> None:
    assert_passed(__file__, check)


if __name__ == "__main__":
    run_checks(globals())
