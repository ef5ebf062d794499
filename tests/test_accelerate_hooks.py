"""Models that accelerate's hooks hold: `cpu_offload`, `disk_offload`, `dispatch_model`, before and
after adapting. What runs is what runs without hooks; what a hook would lose is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from layer_kinds import KINDS, first
from tiny_models import llama
from torch import Tensor, nn

import lora_ext
import lora_ext.integrations.peft as fused
import lora_ext.loralib as loralib
from lora_ext import LoraConfig, LoraModel, get_lora_model

# Parts of the small Llama that stay, and one layer that is on the disk.
MIXED = dict.fromkeys(
    ["model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "lm_head"], "cpu"
) | {"model.layers.1": "disk", "model.rotary_emb": "cpu"}

PLACES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "dispatched, a layer on disk": lambda model, folder: dispatch_model(
        model, MIXED, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}
OFFLOADED = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
PLACES_ALL = PLACES | {
    "dispatched": lambda model, folder: dispatch_model(
        model, {"": "cpu"}, main_device="cpu", force_hooks=True
    )
}
EACH = pytest.mark.parametrize("place", PLACES_ALL.values(), ids=PLACES_ALL)
FIELDS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of what is offloaded."""
    return tmp_path / "offloaded"


def adapted(base: nn.Module, **fields: Any) -> LoraModel:
    torch.manual_seed(1)
    return get_lora_model(base, LoraConfig(**(FIELDS | fields))).eval()


def logits(model: nn.Module) -> Tensor:
    y: Tensor = model(**llama()[1]).logits
    return y.detach()


def losses(model: nn.Module) -> list[float]:
    """Of a few steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for _ in range(3):
        loss = model(**llama()[1]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def close(got: Tensor, want: Tensor) -> None:
    # The base is called and the update added, instead of one fused call: a rounding in each layer.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@EACH
def test_a_hooked_base_is_adapted_trained_saved_and_loaded(
    place: Callable[[nn.Module, Path], Any], tmp_path: Path, folder: Path
) -> None:
    plain, base, other = adapted(llama()[0]), llama()[0], llama()[0]
    place(base, folder)
    place(other, folder.with_name("other"))
    model = adapted(base)
    close(logits(model), logits(plain))
    want = losses(plain)
    assert want[-1] < want[0] - 0.01
    assert losses(model) == pytest.approx(want, abs=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    for fresh in (llama()[0], other):
        close(logits(LoraModel.from_pretrained(fresh, tmp_path / "adapter")), logits(plain))
    for (_, layer), (_, of_plain) in zip(model.lora_layers(), plain.lora_layers(), strict=True):
        delta, expected = layer.get_delta_weight("default"), of_plain.get_delta_weight("default")
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-4)
    remove_hook_from_module(model, recurse=True)
    close(logits(model.merge_and_unload()), logits(plain))


@EACH
def test_a_model_that_is_hooked_with_its_adapters_runs(
    place: Callable[[nn.Module, Path], Any], folder: Path
) -> None:
    model = adapted(llama()[0], use_dora=True)
    want = logits(model)
    place(model.get_base_model(), folder)
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    with model.disable_adapter():
        close(logits(model), logits(llama()[0]))
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), want)
    losses(model)  # nothing is left of the hooks that would refuse it


def test_hooks_of_the_whole_lora_model(folder: Path) -> None:
    model = adapted(llama()[0], modules_to_save=["lm_head"])
    want = logits(model)
    PLACES_ALL["dispatched"](model, folder)
    assert torch.equal(logits(model), want)
    assert losses(model) == losses(adapted(llama()[0], modules_to_save=["lm_head"]))
    remove_hook_from_module(model, recurse=True)
    assert not [m for m in model.modules() if "_hf_hook" in vars(m) or "_old_forward" in vars(m)]


@OFFLOADED
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_what_is_offloaded_is_refused(
    mode: str, place: Callable[[nn.Module, Path], Any], folder: Path
) -> None:
    model = adapted(llama()[0]).train(mode == "train")
    place(model.get_base_model(), folder)
    with pytest.raises(ValueError, match=r"lora_A is to be trained, but a hook offloads it.*"):
        losses(model)
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()(llama()[1]["input_ids"]).requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is not None


@pytest.mark.parametrize("first", ["hooks", "adapters"])
def test_training_a_copy_that_is_offloaded_is_refused(first: str) -> None:
    fields: dict[str, Any] = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    base = llama()[0]
    if first == "hooks":
        cpu_offload(base, execution_device="cpu")
        with pytest.raises(ValueError, match=r"modules_to_save: 'lm_head': weight is offloaded"):
            adapted(base, **fields)
        close(logits(base), logits(llama()[0]))
        return
    model = adapted(base, **fields)
    want = logits(model)
    copy_ = model.get_base_model().lm_head.modules_to_save["default"]
    cpu_offload(copy_, execution_device="cpu")
    assert torch.equal(logits(model), want)
    with pytest.raises(ValueError, match=r"weight is to be trained, but a hook offloads it"):
        losses(model)


def test_training_rows_of_an_offloaded_embedding_is_refused() -> None:
    base = llama()[0]
    cpu_offload(base, execution_device="cpu")
    fields: dict[str, Any] = FIELDS | {"trainable_token_indices": {"embed_tokens": [1, 2]}}
    with pytest.raises(ValueError, match=r"indices: 'model.embed_tokens': weight is offloaded"):
        get_lora_model(base, LoraConfig(**fields))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_training_biases_that_are_offloaded_is_refused(bias: str) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cpu_offload(base, execution_device="cpu")
    with pytest.raises(ValueError, match=rf"bias: got '{bias}', but of .*: bias is offloaded"):
        get_lora_model(base, LoraConfig(r=2, target_modules=["0"], bias=bias))
    get_lora_model(base, LoraConfig(r=2, target_modules=["0"]))


@OFFLOADED
def test_merged_layers_that_are_offloaded_do_not_run_the_bases_weight(
    place: Callable[[nn.Module, Path], Any], folder: Path
) -> None:
    model = adapted(llama()[0])
    want = logits(model)
    model.merge_adapter()
    place(model.get_base_model(), folder)
    with pytest.raises(ValueError, match=r"were merged when a hook began to offload the layer"):
        logits(model)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)


CHANGES: dict[str, Callable[[LoraModel, Path], Any]] = {
    "load_adapter": lambda model, path: model.load_adapter(path, "default"),
    "set_peft_model_state_dict": lambda model, path: lora_ext.set_peft_model_state_dict(
        model, lora_ext.get_peft_model_state_dict(adapted(llama()[0]))
    ),
    "low_cpu_mem_usage": lambda model, path: lora_ext.set_peft_model_state_dict(
        model, lora_ext.get_peft_model_state_dict(adapted(llama()[0])), low_cpu_mem_usage=True
    ),
    "load_state_dict": lambda model, path: model.load_state_dict(adapted(llama()[0]).state_dict()),
    "get_delta_weight": lambda model, path: next(model.lora_layers())[1].get_delta_weight(
        "default"
    ),
    "rename_adapter": lambda model, path: next(model.lora_layers())[1].rename_adapter(
        "default", "other"
    ),
    "add_weighted_adapter": lambda model, path: model.add_weighted_adapter(
        ["default"], [0.5], "half", combination_type="cat"
    ),
    "save_pretrained": lambda model, path: model.save_pretrained(path / "again"),
    "merge_adapter": lambda model, path: model.merge_adapter(),
    "merge_and_unload": lambda model, path: model.merge_and_unload(),
    "unload": lambda model, path: model.unload(),
}


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")  # torch's, of others
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_needs_values_that_a_hook_has_says_so(
    change: Callable[[LoraModel, Path], Any], tmp_path: Path
) -> None:
    adapted(llama()[0]).save_pretrained(tmp_path)
    model = adapted(llama()[0], r=4)
    with torch.no_grad():
        for _, layer in model.lora_layers():
            layer.lora_A.mul_(2)  # type: ignore[union-attr]
    want = logits(model)
    cpu_offload(model.get_base_model(), execution_device="cpu")
    with pytest.raises((ValueError, RuntimeError), match="remove_hook_from_module"):
        change(model, tmp_path)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("submodules", [False, True], ids=["own", "with submodules"])
def test_each_kind_of_layer_runs_under_an_offloading_hook(name: str, submodules: bool) -> None:
    make, adapt, args = KINDS[name]
    layer = adapt(make()).eval()
    want = first(layer(*args)).detach()
    hook = AlignDevicesHook("cpu", offload=True, place_submodules=submodules)
    add_hook_to_module(layer, hook)
    y = first(layer(*args))
    torch.testing.assert_close(y.detach(), want, rtol=0, atol=0)
    with pytest.raises(ValueError, match="is to be trained, but a hook offloads it"):
        y.sum().backward()
    remove_hook_from_module(layer)
    first(layer(*args)).sum().backward()
    assert any(p.grad is not None for n, p in layer.named_parameters() if "lora" in n)


# loralib's layers, which merge in eval()


def loralib_net() -> nn.Module:
    torch.manual_seed(0)
    merged = loralib.MergedLinear(8, 4, r=2, enable_lora=[True, False])
    net = nn.Sequential(loralib.Linear(8, 8, r=2), nn.ReLU(), merged)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return net


def test_loralibs_layers_that_are_offloaded_do_not_merge() -> None:
    net, x = loralib_net(), torch.randn(3, 8)
    want = net(x)
    cpu_offload(net, execution_device="cpu")
    for mode in (False, True, False):
        net.train(mode)
        torch.testing.assert_close(net(x), want, rtol=0, atol=0)
    with pytest.raises(ValueError, match="is to be trained, but a hook offloads it"):
        net(x).sum().backward()
    merged = loralib_net().eval()
    cpu_offload(merged, execution_device="cpu")
    torch.testing.assert_close(merged(x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"was offloaded by a hook since the layer was merged"):
        merged.train()
    remove_hook_from_module(merged, recurse=True)
    torch.testing.assert_close(merged.eval().train()(x), want, rtol=1e-5, atol=1e-5)


def test_loralibs_convolutions_run_offloaded_only_merged() -> None:
    for merged in (True, False):
        net, x = nn.Sequential(loralib.Conv2d(1, 2, 3, r=2)).train(not merged), torch.randn(1, 5, 5)
        want = net(x)
        cpu_offload(net, execution_device="cpu")
        if merged:
            torch.testing.assert_close(net(x), want)
        else:
            with pytest.raises(RuntimeError, match=r"Conv2d: conv: its weight is offloaded by"):
                net(x)


# PEFT's models, patched: layers under hooks are PEFT's


@pytest.mark.parametrize(
    ("order", "place"),
    # An offloaded base leaves PEFT's adapters on "meta", and its results are NaN.
    [("hooks first", "dispatched"), *(("adapters first", place) for place in PLACES_ALL)],
)
def test_a_patched_model_of_peft_does_under_hooks_what_pefts_does(
    order: str, place: str, folder: Path
) -> None:
    def run(path: Path) -> tuple[Tensor, Any]:
        base, config = llama()[0], peft.LoraConfig(**FIELDS)
        if order == "hooks first":
            PLACES_ALL[place](base, path)
        torch.manual_seed(1)
        model = peft.get_peft_model(base, config).eval()
        if order != "hooks first":
            PLACES_ALL[place](base, path)
        y = logits(model)
        model.merge_adapter()
        return y, logits(model)

    want = run(folder)
    fused.patch()
    try:
        before = fused.calls[fused.FUSED]
        got = run(folder.with_name("patched"))
        assert fused.calls[fused.FUSED] == before  # a fused call would pass the hooks by
    finally:
        fused.unpatch()
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
