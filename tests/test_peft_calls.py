"""Single calls with all the arguments that PEFT has, by keyword or by position: the same in both
libraries. `test_peft_signatures.py` says that none is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft_programs
import pytest
import torch
from peft_programs import PREFIX, TARGETS, TOKENS, Net, adapter, config_of, gives_the_same, read
from safetensors.torch import save_file
from torch import nn

import lora_ext

folder = peft_programs.folder  # a fixture
FORMER = {"^former": "first"}

# Each is run with PEFT and with lora_ext as `lib`; both have to return the same.


def layers_of(model: Any) -> list[Any]:
    return [model.base_model.model.get_submodule(name) for name in TARGETS]


def state(layer: Any) -> list[Any]:
    active, merged = layer.active_adapters, layer.merged_adapters
    return [list(active), list(merged), layer.merged, layer.disable_adapters]


def with_two(lib: Any, folder: Path) -> Any:
    model = adapter(lib, folder)
    model.load_adapter(str(folder / "other"), "other")
    return model


def layers_merge(lib: Any, folder: Path, tmp: Path) -> Any:
    model, results = with_two(lib, folder), []
    merges: tuple[Callable[[Any], None], ...] = (
        lambda layer: layer.merge(),
        lambda layer: layer.merge(safe_merge=True),
        lambda layer: layer.merge(safe_merge=True, adapter_names=["other"]),
        lambda layer: layer.merge(False, ["default", "other"]),
        lambda layer: layer.merge(adapter_names=["other"]),
    )
    for merge in merges:
        for layer in layers_of(model):
            merge(layer)
        results += [model(TOKENS), *map(state, layers_of(model))]
        for layer in layers_of(model):
            layer.unmerge()
    return results, model(TOKENS)


def layers_are_scaled(lib: Any, folder: Path, tmp: Path) -> Any:
    model, results = with_two(lib, folder), []
    scales: tuple[Callable[[Any], None], ...] = (
        lambda layer: layer.set_scale(adapter="default", scale=0.5),
        lambda layer: layer.set_scale("other", 3.0),  # which does not run
        lambda layer: layer.scale_layer(scale=3.0),
        lambda layer: layer.unscale_layer(scale=2.0),
        lambda layer: layer.unscale_layer(scale=None),
    )
    for scale in scales:
        for layer in layers_of(model)[1:]:  # PEFT scales no embeddings
            scale(layer)
        results.append(model(TOKENS))
    return results


def layers_tell_their_delta(lib: Any, folder: Path, tmp: Path) -> Any:
    layers = layers_of(with_two(lib, folder))
    return [
        [layer.get_delta_weight(adapter="default"), layer.get_delta_weight("other")]
        for layer in layers
    ]


def layers_choose(lib: Any, folder: Path, tmp: Path) -> Any:
    model, results = with_two(lib, folder), []
    chosen: tuple[Callable[[Any], None], ...] = (
        lambda layer: layer.set_adapter(adapter_names=["other"], inference_mode=True),
        lambda layer: layer.set_adapter(["default", "other"]),
        lambda layer: layer.set_requires_grad(adapter_names="other", requires_grad=False),
        lambda layer: layer.set_requires_grad(["default"], False),
        lambda layer: layer.set_requires_grad(adapter_names=["default", "other"]),
        lambda layer: layer.enable_adapters(enabled=False),
        lambda layer: layer.enable_adapters(enabled=True),
        lambda layer: layer.delete_adapter(adapter_name="other"),
    )
    for choose in chosen:
        for layer in layers_of(model):
            choose(layer)
        rows = [row for row in model.get_layer_status() if "head" not in row.name]
        trains = {} if not rows[0].enabled else {row.name: row.requires_grad for row in rows}
        results += [model(TOKENS), trains, *map(state, layers_of(model))]
    return results


def layers_start_again(lib: Any, folder: Path, tmp: Path) -> Any:
    """Numbers are drawn in another order, so it is their kind that is the same."""
    model, results = adapter(lib, folder), []

    def values() -> dict[str, torch.Tensor]:
        return {
            k: t.clone() for k, t in lib.get_peft_model_state_dict(model).items() if "head" not in k
        }

    for kind in (False, True, "gaussian"):
        before = values()
        for layer in layers_of(model):
            if kind == "gaussian":
                layer.reset_lora_parameters("default", kind)
            else:
                layer.reset_lora_parameters(adapter_name="default", init_lora_weights=kind)
        for key, tensor in values().items():
            bound = tensor[0].numel() ** -0.5  # of a uniform distribution
            results.append([kind, key, torch.equal(tensor, before[key]), not tensor.any()])
            if kind is True and "embedding" not in key:
                results.append(bool((tensor.abs() <= bound).all()))
    return results


def layers_are_called(lib: Any, folder: Path, tmp: Path) -> Any:
    words, conv, first, _ = layers_of(adapter(lib, folder))
    y = words(x=TOKENS)
    return y, conv(x=y.mT), first(x=y), words(TOKENS), first.get_base_layer()(y)


def models_load_by_position(lib: Any, folder: Path, tmp: Path) -> Any:
    tensors = {key.replace("first", "former"): t for key, t in read(folder).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    model = lib.PeftModel.from_pretrained(
        Net(), str(folder), "a", True, None, True, False, False, FORMER
    )
    result = model.load_adapter(str(folder), "b", False, "cpu", True, False, False, FORMER)
    model.set_adapter(adapter_name="b", inference_mode=True)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    return model.active_adapters, model(TOKENS), result.unexpected_keys, trains


def models_load_by_keyword(lib: Any, folder: Path, tmp: Path) -> Any:
    options = {
        "autocast_adapter_dtype": False,
        "ephemeral_gpu_offload": False,
        "low_cpu_mem_usage": True,
        "key_mapping": None,
    }
    model = lib.PeftModel.from_pretrained(
        model=Net(),
        model_id=str(folder),
        adapter_name="a",
        is_trainable=False,
        config=None,
        **options,
    )
    model.load_adapter(
        model_id=str(folder / "other"),
        adapter_name="b",
        is_trainable=True,
        torch_device=None,
        **options,
    )
    first = model(TOKENS)
    model.set_adapter("b", True)
    return first, model.training, model.eval()(TOKENS)


def adapters_are_combined(lib: Any, folder: Path, tmp: Path) -> Any:
    torch.manual_seed(2)
    like = peft.get_peft_model(Net(), config_of(peft, target_modules=["first", "second"]))
    like.add_adapter("other", like.peft_config["default"])
    model, results = (
        lib.get_peft_model(Net(), config_of(lib, target_modules=["first", "second"])),
        [],
    )
    model.add_adapter("other", model.peft_config["default"])
    for name in ("default", "other"):
        values = peft.get_peft_model_state_dict(like, adapter_name=name)
        lib.set_peft_model_state_dict(model, values, name)
    options: dict[str, dict[str, Any]] = {
        "linear": {},
        "cat": {},
        "svd": {"svd_rank": 3, "svd_clamp": None, "svd_full_matrices": False, "svd_driver": None},
        "ties": {"density": 0.5, "majority_sign_method": "frequency"},
    }
    for kind, more in options.items():
        model.add_weighted_adapter(
            adapters=["default", "other"],
            weights=[0.5, -2.0],
            adapter_name=kind,
            combination_type=kind,
            **more,
        )
    names, numbers = ["default", "other"], [1.0, 0.5]
    model.add_weighted_adapter(names, numbers, "by position", "svd", 4, None, True, None)
    model.base_model.add_weighted_adapter(
        names, numbers, "to the end", "ties_svd", 4, None, True, None, 0.5, "total"
    )
    for name in (*options, "by position", "to the end"):
        model.set_adapter(name)
        results.append(model(TOKENS))
    return results


def models_merge(lib: Any, folder: Path, tmp: Path) -> Any:
    model = with_two(lib, folder)
    model.merge_adapter(adapter_names=["other"], safe_merge=False)
    merged = model(TOKENS)
    model.unmerge_adapter()
    model.merge_adapter(["default"], True)
    again = model(TOKENS)
    model.unmerge_adapter()
    return merged, again, model.merge_and_unload(False, False, ["other"])(TOKENS)


def states_are_taken_and_given(lib: Any, folder: Path, tmp: Path) -> Any:
    model = with_two(lib, folder)
    taken = lib.get_peft_model_state_dict(
        model=model,
        state_dict=model.state_dict(),
        adapter_name="other",
        unwrap_compiled=False,
        save_embedding_layers=False,
    )
    lib.set_peft_model_state_dict(
        model=model,
        peft_model_state_dict={key: 2 * tensor for key, tensor in taken.items()},
        adapter_name="other",
        ignore_mismatched_sizes=False,
        low_cpu_mem_usage=False,
    )
    model.set_adapter("other")
    return taken, model(TOKENS)


def weights_are_read(lib: Any, folder: Path, tmp: Path) -> Any:
    tensors = lib.load_peft_weights(
        model_id=str(folder), device="cpu", key_mapping={"first": "a.b"}
    )
    inner = lib.load_peft_weights(str(folder), "cpu", None, subfolder="other")
    return tensors, inner, lib.load_peft_weights(str(folder / "other"))


def adapters_are_injected(lib: Any, folder: Path, tmp: Path) -> Any:
    tensors = {k.removeprefix(PREFIX): t for k, t in read(folder / "other").items()}
    net = lib.inject_adapter_in_model(
        peft_config=config_of(lib),
        model=Net(),
        adapter_name="a",
        low_cpu_mem_usage=True,
        state_dict=tensors,
    )
    lib.set_peft_model_state_dict(net, tensors, "a", low_cpu_mem_usage=True)
    return net.eval()(TOKENS)


def configs_are_made(lib: Any, folder: Path, tmp: Path) -> Any:
    fields = {"peft_type": "LORA", "r": 4, "target_modules": ["a"], "task_type": "CAUSAL_LM"}
    made = [
        lib.PeftConfig.from_peft_type(**fields),
        lib.LoraConfig.from_peft_type(r=3),
        lib.get_peft_config(config_dict=fields),
        lib.LoraConfig.from_pretrained(
            pretrained_model_name_or_path=str(folder), subfolder="other", cache_dir=None
        ),
        lib.PeftConfig.from_pretrained(str(folder), None, token=None),
    ]
    names = [sorted(one.target_modules or ()) for one in made]
    values = [{**one.to_dict(), "target_modules": [], "peft_version": None} for one in made]
    values = json.loads(json.dumps(values))  # enums as texts
    raw = lib.PeftConfig.from_json_file(path_json_file=str(folder / "adapter_config.json"))
    kinds = [isinstance(one, lib.LoraConfig) for one in made]
    return names, values, {**raw, "target_modules": sorted(raw["target_modules"])}, kinds


def configs_are_saved(lib: Any, folder: Path, tmp: Path) -> Any:
    """A config's own inference_mode; true in what the model writes."""
    said = []
    for inference_mode in (False, True):
        config = config_of(lib, inference_mode=inference_mode, target_modules=["first"])
        config.save_pretrained(save_directory=str(tmp / "alone"), auto_mapping_dict={"a": "b"})
        model = lib.get_peft_model(Net(), config)
        model.peft_config["default"].save_pretrained(str(tmp / "in the model"), unknown=1)
        model.save_pretrained(str(tmp / "model's"))
        for name in ("alone", "in the model", "model's"):
            said.append(json.loads((tmp / name / "adapter_config.json").read_text()))
        said.append(model.peft_config["default"].inference_mode)
    return said


def bases_are_prepared(lib: Any, folder: Path, tmp: Path) -> Any:
    results = []
    prepare = lib.prepare_model_for_kbit_training
    for net in (
        prepare(Net().bfloat16(), False, None, False),
        prepare(
            model=Net().half(),
            use_gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            auto_clear_cache=True,
        ),
    ):
        results.append([(str(p.dtype), p.requires_grad) for p in net.parameters()])
    model = lib.get_peft_model(Net(), config_of(lib, target_modules=["first"]))
    lib.cast_mixed_precision_params(model=model, dtype=torch.bfloat16)
    results.append(sorted((str(p.dtype), p.requires_grad, p.numel()) for p in model.parameters()))
    return results


def states_are_told(lib: Any, folder: Path, tmp: Path) -> Any:
    model = with_two(lib, folder)
    helpers = peft.helpers if lib is peft else lib
    with helpers.rescale_adapter_scale(model=model, multiplier=2):
        within = model(TOKENS)
    found = helpers.check_if_peft_model(model_name_or_path=str(folder / "nothing"))
    rows = lib.get_layer_status(model=model)
    status = lib.get_model_status(model=model)
    return within, found, len(rows), status.num_adapter_layers, status.available_adapters


def cards_are_written(lib: Any, folder: Path, tmp: Path) -> Any:
    tmp.mkdir()
    model = adapter(lib, folder)
    model.create_or_update_model_card(output_dir=str(tmp))
    return "library_name: " in (tmp / "README.md").read_text()


PROGRAMS = (
    *(layers_merge, layers_are_scaled, layers_tell_their_delta, layers_choose),
    *(layers_start_again, layers_are_called, models_load_by_position, models_load_by_keyword),
    *(adapters_are_combined, models_merge, states_are_taken_and_given, weights_are_read),
    *(adapters_are_injected, configs_are_made, configs_are_saved, bases_are_prepared),
    *(states_are_told, cards_are_written),
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.__name__)
def test_calls_give_the_same(
    program: Callable[[Any, Path, Path], Any], folder: Path, tmp_path: Path
) -> None:
    gives_the_same(program, folder, tmp_path)


# What the arguments were called here, and where they stood.

FORMERLY: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "merge": (
        lambda model: layers_of(model)[2].merge(["other"]),
        lambda model: layers_of(model)[2].merge(adapter_names=["other"]),
        r"Linear\.merge: adapters are adapter_names=\.\.\. now",
    ),
    "set_scale": (
        lambda model: layers_of(model)[2].set_scale(adapter_name="default", scale=3.0),
        lambda model: layers_of(model)[2].set_scale(adapter="default", scale=3.0),
        "set_scale: adapter_name is adapter now",
    ),
    "get_delta_weight": (
        lambda model: layers_of(model)[2].get_delta_weight(adapter_name="default"),
        lambda model: layers_of(model)[2].get_delta_weight(adapter="default"),
        "get_delta_weight: adapter_name is adapter now",
    ),
    "set_adapter": (
        lambda model: model.set_adapter(adapter_names=["other"]),
        lambda model: model.set_adapter(adapter_name=["other"]),
        r"LoraModel\.set_adapter: adapter_names is adapter_name now",
    ),
}


@pytest.mark.parametrize("name", FORMERLY)
def test_former_names_work_with_a_warning(name: str, folder: Path) -> None:
    former, now, text = FORMERLY[name]
    one, other = with_two(lora_ext, folder), with_two(lora_ext, folder)
    with pytest.warns(DeprecationWarning, match=text):
        before = former(one)
    after = now(other)
    assert after is None or torch.equal(before, after)
    assert torch.equal(one(TOKENS), other(TOKENS))


def test_a_stack_of_matrices_tells_its_delta() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stack = nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.stack.sum(0).T

    results = []
    for lib in (peft, lora_ext):
        torch.manual_seed(1)
        config = config_of(lib, target_modules=[], target_parameters=["experts.stack"])
        model = lib.get_peft_model(nn.ModuleDict({"experts": Experts()}), config)
        if lib is peft:
            values = lib.get_peft_model_state_dict(model)
        lora_ext.set_peft_model_state_dict(model, values) if lib is lora_ext else None
        layer = model.base_model.model["experts"]
        results.append(layer.get_delta_weight(adapter_name="default"))
    assert results[0].shape == (3, 6, 4)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_adapting_keeps_the_mode_and_switching_off_what_trains(folder: Path) -> None:
    """Two of the differences on purpose (docs/peft.md); `theirs` says that PEFT still does so."""

    def trains_in_eval(lib: Any) -> bool:
        base = Net().eval()
        lib.get_peft_model(base, config_of(lib, lora_dropout=0.5))
        return any(module.training for module in base.modules())

    def trains_after(lib: Any) -> bool:
        model = adapter(lib, folder)
        assert not any(one.requires_grad for one in model.parameters())
        with model.disable_adapter():
            pass
        return any(one.requires_grad for one in model.parameters())

    for question in (trains_in_eval, trains_after):
        ours, theirs = question(lora_ext), question(peft)
        assert not ours and theirs, question.__name__
