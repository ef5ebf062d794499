"""Programs written for PEFT that run with the import swapped, and what they get: the same as
there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap
import peft_programs
import pytest
import torch
from peft_programs import (
    PREFIX,
    TARGETS,
    TOKENS,
    Net,
    adapter,
    config_of,
    gives_the_same,
    read,
)
from safetensors.torch import save_file

folder = peft_programs.folder  # a fixture


# Each is run with PEFT and with lora_ext as `lib`; both have to return the same.


def keywords(lib: Any, folder: Path, tmp: Path) -> Any:
    config = config_of(lib)
    model = lib.get_peft_model(
        model=Net(), peft_config=config, adapter_name="a", mixed=False, autocast_adapter_dtype=True
    )
    model.add_adapter(adapter_name="b", peft_config=config, low_cpu_mem_usage=False)
    result = model.load_adapter(
        model_id=str(folder), adapter_name="third", is_trainable=False, torch_device="cpu"
    )
    model.save_pretrained(
        save_directory=str(tmp / "saved"),
        safe_serialization=True,
        selected_adapters=["a", "third"],
        save_embedding_layers=False,
        is_main_process=True,
    )
    model.set_adapter("b")
    files = sorted(str(path.relative_to(tmp)) for path in tmp.rglob("*.safetensors"))
    return files, result.missing_keys, result.unexpected_keys, sorted(model.peft_config)


def positions(lib: Any, folder: Path, tmp: Path) -> Any:
    model = lib.PeftModel.from_pretrained(Net(), str(folder), "a", True, None, True)
    model.save_pretrained(str(tmp), True, ["a"], False)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    return sorted(read(tmp / "a")), len(trains), model.training


def from_pretrained_with_config(lib: Any, folder: Path, tmp: Path) -> Any:
    config = lib.PeftConfig.from_pretrained(str(folder))
    model = lib.PeftModel.from_pretrained(
        Net(), model_id=str(folder), config=config, low_cpu_mem_usage=True, torch_device="cpu"
    )
    return model.peft_config["default"] is config, config.inference_mode, model(TOKENS)


def subfolders(lib: Any, folder: Path, tmp: Path) -> Any:
    model = lib.PeftModel.from_pretrained(Net(), str(folder), subfolder="other", is_trainable=True)
    config = lib.LoraConfig.from_pretrained(str(folder), subfolder="other", lora_alpha=64)
    return model(TOKENS), config.lora_alpha, config.r


def paths(lib: Any, folder: Path, tmp: Path) -> Any:
    net = Net()
    model = lib.get_peft_model(net, config_of(lib))
    same = model.base_model.model is net and model.model is net and model.get_base_model() is net
    names = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    return same, [name.replace(".base_layer", "") for name in names], model.active_adapters


def state_dicts(lib: Any, folder: Path, tmp: Path) -> Any:
    model = adapter(lib, folder)
    state = lib.get_peft_model_state_dict(model)
    torch.manual_seed(5)
    other = lib.get_peft_model(Net(), config_of(lib, modules_to_save=["head"])).eval()
    result = lib.set_peft_model_state_dict(other, state)
    unknown = {f"{PREFIX}nothing.lora_A.weight": torch.ones(1)}
    more = lib.set_peft_model_state_dict(other, state | unknown)
    torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)
    said = [key.replace(".default", "") for key in more.unexpected_keys]
    return state, result.unexpected_keys, said


def injection(lib: Any, folder: Path, tmp: Path) -> Any:
    net = Net()
    assert lib.inject_adapter_in_model(config_of(lib), net, "a") is net
    lib.inject_adapter_in_model(config_of(lib, target_modules=["head"]), net, "b")
    state = {k.removeprefix(PREFIX): t for k, t in read(folder).items() if "head" not in k}
    result = lib.set_peft_model_state_dict(net, state, "a")
    again = lib.get_peft_model_state_dict(net, adapter_name="a")
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
    return sorted(again), sorted(net.peft_config), result.unexpected_keys, net.eval()(TOKENS)


def on_meta(lib: Any, folder: Path, tmp: Path) -> Any:
    config = config_of(lib, modules_to_save=None)
    net = lib.inject_adapter_in_model(config, Net(), low_cpu_mem_usage=True)
    meta = sum(p.is_meta for p in net.parameters())
    state = {k.removeprefix(PREFIX): t for k, t in read(folder).items() if "head" not in k}
    lib.set_peft_model_state_dict(net, state, low_cpu_mem_usage=True)
    return meta, net.eval()(TOKENS)


def base_state(lib: Any, folder: Path, tmp: Path) -> Any:
    model = adapter(lib, folder)
    get = getattr(lib, "get_base_model_state_dict", None)
    model.merge_adapter()
    model.unmerge_adapter()
    state = get(model)
    module = peft.utils.save_and_load if lib is peft else lib
    result = module.set_base_model_state_dict(model, {k: t * 2 for k, t in state.items()})
    return state, result.missing_keys, result.unexpected_keys, model(TOKENS)


def statuses(lib: Any, folder: Path, tmp: Path) -> Any:
    model = adapter(lib, folder)
    model.load_adapter(str(folder / "other"), "other")
    rows = lib.get_layer_status(model)
    status = model.get_model_status()
    fields = "name module_type enabled active_adapters merged_adapters requires_grad devices"
    fields += " available_adapters quantization_backend"
    whole = "base_model_type num_adapter_layers enabled active_adapters merged_adapters devices"
    whole += " requires_grad available_adapters quantization_backend peft_types"
    return [
        sorted([str(getattr(row, field)) for field in fields.split()] for row in rows),
        [getattr(status, field) for field in whole.split()],
    ]


def trainable(lib: Any, folder: Path, tmp: Path) -> Any:
    model = lib.get_peft_model(Net(), config_of(lib))
    model.add_adapter("b", config_of(lib))
    counts = [model.get_nb_trainable_parameters()]
    for names, flag in (("b", True), (["default"], False), (["default", "b"], True)):
        model.set_requires_grad(names, flag)
        counts.append(model.get_nb_trainable_parameters())
    return counts


def switching(lib: Any, folder: Path, tmp: Path) -> Any:
    model = adapter(lib, folder)
    with model.disable_adapter():
        first = model(TOKENS)
    model.base_model.disable_adapter_layers()
    second = model(TOKENS)
    model.base_model.enable_adapter_layers()
    return first, second, model(TOKENS), model.active_peft_config.r, model.active_adapter


def scales(lib: Any, folder: Path, tmp: Path) -> Any:
    model = adapter(lib, folder)
    helpers = peft.helpers if lib is peft else lib
    with helpers.rescale_adapter_scale(model, 0.5):
        within = model(TOKENS)
    return within, model(TOKENS), helpers.check_if_peft_model(str(folder))


def twice_merged(lib: Any, folder: Path, tmp: Path) -> Any:
    model = adapter(lib, folder)
    model.merge_adapter(safe_merge=True)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    return model.merge_and_unload(progressbar=False, safe_merge=True, adapter_names=["default"])(
        TOKENS
    )


def deltas(lib: Any, folder: Path, tmp: Path) -> Any:
    model = adapter(lib, folder)
    layers = (model.get_base_model().get_submodule(name) for name in TARGETS)
    return [layer.get_delta_weight("default") for layer in layers]


def hotswapped(lib: Any, folder: Path, tmp: Path) -> Any:
    swap = peft.utils.hotswap.hotswap_adapter if lib is peft else lib.hotswap_adapter
    linear = ["first", "second"]  # PEFT's hotswap knows no others
    torch.manual_seed(4)
    peft.get_peft_model(Net(), config_of(peft, target_modules=linear)).save_pretrained(tmp)
    torch.manual_seed(3)
    model = lib.get_peft_model(Net(), config_of(lib, target_modules=linear, lora_alpha=1)).eval()
    before = {name: id(p) for name, p in model.named_parameters()}
    swap(model, str(tmp), adapter_name="default", torch_device="cpu")
    kept = lib is peft or before == {name: id(p) for name, p in model.named_parameters()}
    return kept, model(TOKENS)


def resumed(lib: Any, folder: Path, tmp: Path) -> Any:
    """As a Trainer resumes: into the adapter that is there."""
    torch.manual_seed(3)
    model = lib.get_peft_model(Net(), config_of(lib, modules_to_save=["head"]))
    model.load_adapter(str(folder), "default", is_trainable=True)
    trains = sum(p.requires_grad for p in model.parameters())
    return model(TOKENS), trains, model.training


def mapped(lib: Any, folder: Path, tmp: Path) -> Any:
    tensors = {key.replace("first", "former"): t for key, t in read(folder).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    mapping = {"^former": "first"}
    return lib.PeftModel.from_pretrained(Net(), str(folder), key_mapping=mapping)(TOKENS)


PROGRAMS: dict[str, Callable[[Any, Path, Path], Any]] = {
    one.__name__: one
    for one in (
        *(keywords, positions, from_pretrained_with_config, subfolders, paths, state_dicts),
        *(injection, on_meta, base_state, statuses, trainable, switching, scales, twice_merged),
        *(deltas, hotswapped, resumed, mapped),
    )
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_program_gives_the_same(name: str, folder: Path, tmp_path: Path) -> None:
    gives_the_same(PROGRAMS[name], folder, tmp_path)
