"""PEFT and lora_ext on the same seeded models and configs: what they accept, the names adapted,
the tensors' names and shapes, files both ways, outputs, gradients, training, several adapters,
merging. `LORA_EXT_FUZZ=1000` runs as many cases, `LORA_EXT_FUZZ_FROM=5000` others.

Both are compared in float64, where equal formulas agree to rounding, whatever their order.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_differences import Differs, check, is_any, is_changed, randomly_changed
from peft_fuzz import Case, case_of
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_ext.nn as lora
from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.adapters.checkpoint import adapter_state_dict

COUNT = int(os.environ.get("LORA_EXT_FUZZ", "90"))
FIRST = int(os.environ.get("LORA_EXT_FUZZ_FROM", "0"))
CHUNK = 30

# Sums of up to a thousand terms through up to some twenty layers.
BOUND = 20 * 1000 * 2.0**-53


def test_seeds() -> None:
    """One of a kind: the same case from the same seed."""
    assert case_of(7) == case_of(7) and case_of(7) != case_of(8)


@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, CHUNK))
def test_as_peft(first: int) -> None:
    differences = {}
    for seed in range(first, min(first + CHUNK, FIRST + COUNT)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compare(case_of(seed))
        except Exception as error:
            text = error if isinstance(error, Differs) else repr(error)
            differences[seed] = f"{text}\n    {case_of(seed)}"
    assert not differences, "\n".join(f"{seed}: {text}" for seed, text in differences.items())


# The steps


def compare(case: Case) -> None:
    """Raises Differs."""
    try:
        _compare(case)
    except KeyError as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        check("inside", case, False, f"{last}: KeyError: {error}")


def _compare(case: Case) -> None:
    with temporary_folder() as folder:
        base, inputs = case.model()
        theirs, ours = both(
            "accept",
            case,
            lambda: their_model(case, base),
            lambda: our_model(case, base),
        )
        if theirs is None or ours is None:
            return
        same_names(case, theirs, ours)
        names = ["default"]
        if "other" in case.configs:
            added = both(
                "accept another",
                case,
                lambda: another(case, theirs),
                lambda: (
                    ours.add_adapter(
                        "other",
                        LoraConfig(**copy.deepcopy(case.configs["other"])),
                        autocast_adapter_dtype=case.autocast_adapter_dtype,
                    )
                    or ours
                ),
            )
            if None in added:
                return
            names.append("other")
        for name in names:
            same_tensors(case, theirs, ours, name)
        for model in (theirs, ours):
            disturb(model, case.seed)
        options = {"save_embedding_layers": case.save_embedding_layers}
        theirs.save_pretrained(folder / "theirs", **options)
        ours.save_pretrained(folder / "ours", **options)
        own_files_come_back(case, base, inputs, ours, names, folder)
        their_files_load_here(case, base, inputs, names, folder)
        our_files_load_there(case, base, inputs, ours, names, folder)


def their_config(case: Case, name: str = "default") -> peft.LoraConfig:
    return peft.LoraConfig(**copy.deepcopy(case.configs[name]))


def their_model(case: Case, base: nn.Module) -> peft.PeftModel:
    torch.manual_seed(case.seed)
    return peft.get_peft_model(
        copy.deepcopy(base),
        their_config(case),
        autocast_adapter_dtype=case.autocast_adapter_dtype,
    ).eval()


def another(case: Case, model: peft.PeftModel) -> peft.PeftModel:
    config, autocast = their_config(case, "other"), case.autocast_adapter_dtype
    model.add_adapter("other", config, autocast_adapter_dtype=autocast)
    return model


def our_model(case: Case, base: nn.Module) -> LoraModel:
    torch.manual_seed(case.seed)
    return get_lora_model(
        copy.deepcopy(base),
        LoraConfig(**copy.deepcopy(case.fields)),
        autocast_adapter_dtype=case.autocast_adapter_dtype,
    ).eval()


def both(stage: str, case: Case, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """The results of PEFT and of lora_ext; None where one refuses, as the other has to."""
    results: list[Any] = []
    errors = []
    for call in (first, second):
        try:
            results.append(call())
            errors.append("")
        except Exception as error:
            results.append(None)
            errors.append(f"{type(error).__name__}: {error}"[:300])
    text = f"PEFT: {errors[0] or 'accepts'} | lora_ext: {errors[1] or 'accepts'}"
    check(stage, case, bool(errors[0]) == bool(errors[1]), text)
    return results


def same_names(case: Case, theirs: peft.PeftModel, ours: LoraModel) -> None:
    for what in ("targeted_module_names", "targeted_parameter_names"):
        their, our = (sorted(set(getattr(model, what))) for model in (theirs, ours))
        check("names", case, their == our, f"{what}: PEFT {their}, lora_ext {our}")
    their, our = (
        sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (theirs, ours)
    )
    check("trainable", case, their == our, f"PEFT {their}, lora_ext {our}")


def their_tensors(case: Case, model: peft.PeftModel, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=case.save_embedding_layers
    )
    return tensors


def our_tensors(case: Case, model: LoraModel, name: str) -> dict[str, Tensor]:
    return adapter_state_dict(model, name, save_embedding_layers=case.save_embedding_layers)


def is_extra(key: str, case: Case) -> bool:
    """What PEFT alone saves: the original, and the name inside the model, of a module to save that
    is an embedding or has a bias; the magnitude of an embedding that is saved, once more; the base
    of layers that another adapter adapts."""
    inside = ".original_module." in key or ".modules_to_save." in key
    inside |= case.save_embedding_layers is True and key.endswith("lora_magnitude_vector.weight")
    return inside or ("other" in case.configs and ".base_layer." in key)


def comparable_keys(
    case: Case, their: dict[str, Tensor], our: dict[str, Tensor]
) -> dict[str, Tensor]:
    """PEFT's without those of `is_extra`; a layer that another adapter adapts is a plain one."""
    plain = {k.replace(".base_layer.", "."): t for k, t in their.items() if ".lora_" not in k}
    kept = {key: t for key, t in their.items() if key in our or not is_extra(key, case)}
    return kept | {key: tensor for key, tensor in plain.items() if key in our}


def same_tensors(case: Case, theirs: peft.PeftModel, ours: LoraModel, name: str) -> None:
    their, our = their_tensors(case, theirs, name), our_tensors(case, ours, name)
    their = comparable_keys(case, their, our)
    text = f"{name}: PEFT only {sorted(their.keys() - our.keys())}, lora_ext only "
    check("keys", case, their.keys() == our.keys(), text + f"{sorted(our.keys() - their.keys())}")
    for key in sorted(their.keys() & our.keys()):
        shapes = tuple(their[key].shape), tuple(our[key].shape)
        check("shapes", case, shapes[0] == shapes[1], f"{key}: {shapes}")
        types = their[key].dtype, our[key].dtype
        check("dtypes", case, types[0] == types[1], f"{key}: {types}")


def own_files_come_back(
    case: Case, base: nn.Module, inputs: Any, ours: LoraModel, names: list[str], folder: Path
) -> None:
    again = our_loaded(case, base, folder / "ours", names)
    again.save_pretrained(folder / "own", save_embedding_layers=case.save_embedding_layers)
    same_files(case, "own", folder / "ours", folder / "own", names)
    for name in names:
        ours.set_adapter(name)
        again.set_adapter(name)
        if not randomly_changed(case):
            same_bits = torch.equal(outputs(ours, inputs), outputs(again, inputs))
            check("own outputs", case, same_bits, f"{name}: not bit for bit")


def their_files_load_here(
    case: Case, base: nn.Module, inputs: Any, names: list[str], folder: Path
) -> None:
    trained = their_loaded(case, base, folder / "theirs", names)
    if trained is None:
        return
    try:
        read = our_loaded(case, base, folder / "theirs", names)
    except Exception as error:
        check("PEFT's file", case, False, f"{type(error).__name__}: {error}")
        return
    read.save_pretrained(folder / "again", save_embedding_layers=case.save_embedding_layers)
    same_files(case, "resaved", folder / "theirs", folder / "again", names)
    same_bases(case, base, trained, read)
    for name in names:
        their, our = exact(trained), exact(read)
        their.set_adapter(name)
        our.set_adapter(name)
        same_outputs(case, "outputs", outputs(their, inputs), outputs(our, inputs), name)
        same_training(case, their, our, inputs, name)
    merges(case, read, inputs, names)
    if case.combination is not None and len(names) > 1:
        same_combination(case, trained, read, inputs)


def our_files_load_there(
    case: Case, base: nn.Module, inputs: Any, ours: LoraModel, names: list[str], folder: Path
) -> None:
    back = their_loaded(case, base, folder / "ours", names)
    check("back", case, back is not None, "PEFT does not load our file")
    if back is None:
        return
    same_bases(case, base, back, ours)
    for name in names:
        their, our = exact(back), exact(ours)
        their.set_adapter(name)
        our.set_adapter(name)
        same_outputs(case, "back", outputs(their, inputs), outputs(our, inputs), name)


def same_bases(case: Case, base: nn.Module, theirs: peft.PeftModel, ours: LoraModel) -> None:
    """Where an initialisation takes a product out of weights, each does it by an SVD or QR of its
    own: what is left may differ by as much as roundings turn these. It is the same after this."""
    if not is_any(case, init_lora_weights=is_changed):
        return
    originals, layers = dict(base.named_modules()), dict(ours.lora_layers())
    for name, module in theirs.base_model.model.named_modules():
        layer, left = layers.get(name), getattr(module, "base_layer", None)
        if not isinstance(layer, lora.Linear) or not isinstance(left, nn.Module):
            continue
        weight, own = left.weight.detach(), layer.unmerged_weight()
        if not any(is_changed(one.init_lora_weights) for one in layer.adapters.values()):
            check("bases", case, torch.equal(weight, own), f"{name}: its base's weight is another")
            continue
        if not randomly_changed(case):
            difference = torch.linalg.matrix_norm(weight.double() - own.double(), 2).item()
            limit = turned_by_rounding(originals[name].weight.detach().double(), layer, case.dtype)
            text = f"{name}: its base's weight differs by {difference:.1e}, more than {limit:.1e}"
            check("bases", case, difference <= limit, text)
        own.copy_(weight)


def turned_by_rounding(weight: Tensor, layer: lora.Linear, dtype: torch.dtype) -> float:
    """Of what is left when products are taken out of a weight, in the norm of matrices. An SVD or
    QR is that of a matrix that differs by max(N, K) roundings; the first r singular vectors then
    turn by that over the distance of the r-th singular value to the next, the first r columns of a
    QR by that over the least singular value of the first r columns."""
    error, left = 0.0, weight.t() if layer.fan_in_fan_out else weight
    for settings in layer.adapters.values():
        kind, r = str(settings.init_lora_weights), settings.r
        values = [*torch.linalg.svdvals(left).tolist(), 0.0]
        error += max(left.shape) * torch.finfo(dtype).eps * values[0]
        if kind.startswith("pissa"):
            distance = values[r - 1] - values[r] if r < len(values) else values[-2]
            error *= 1 + values[0] / max(distance, 1e-300)
            U, S, Vh = torch.linalg.svd(left, full_matrices=False)
            left = left - U[:, :r] * S[:r] @ Vh[:r]
        elif kind == "olora":
            least = torch.linalg.svdvals(left[:, :r])[-1].item()
            error *= 1 + values[0] / max(least, 1e-300)
            Q, R = torch.linalg.qr(left)
            left = left - Q[:, :r] @ R[:r]
    return error


def same_outputs(case: Case, stage: str, their: Tensor, our: Tensor, name: str) -> None:
    error = (their - our).abs().max().item() / max(their.abs().max().item(), 1e-3)
    limit = bound(stage)
    check(stage, case, error <= limit, f"{name}: relative error {error:.1e}")


def bound(stage: str) -> float:
    """The weights of a combination are numbers in float32 for PEFT."""
    return max(100 * 2.0**-24, BOUND) if stage == "combined" else BOUND


def same_training(
    case: Case, theirs: peft.PeftModel, ours: LoraModel, inputs: Any, name: str
) -> None:
    """Gradients, and the outputs after a step along them; in evaluation mode, without dropout."""
    gradients = []
    for model, tensors in (
        (theirs, their_tensors(case, theirs, name)),
        (ours, our_tensors(case, ours, name)),
    ):
        y = outputs(model, inputs)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if trainable:
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
        places = {p.data_ptr(): p for p in trainable}
        found = {key: places.get(tensor.data_ptr()) for key, tensor in tensors.items()}
        gradients.append(
            {
                key: torch.zeros_like(p) if p.grad is None else p.grad
                for key, p in found.items()
                if p is not None
            }
        )
        if trainable:
            torch.optim.SGD(trainable, lr=0.01).step()
    their, our = gradients
    their = comparable_keys(case, their, our)
    text = f"{name}: trains PEFT only {sorted(their.keys() - our.keys())}, lora_ext only "
    check("trains", case, their.keys() == our.keys(), text + f"{sorted(our.keys() - their.keys())}")
    for key in their.keys() & our.keys():
        if their[key].shape == our[key].shape:
            same_outputs(case, "gradients", their[key], our[key], f"{name}, {key}")
    their_y, our_y = outputs(theirs, inputs), outputs(ours, inputs)
    same_outputs(case, "outputs after a step", their_y, our_y, name)


def merges(case: Case, model: LoraModel, inputs: Any, names: list[str]) -> None:
    for name in names:
        model.set_adapter(name)
        before = {n: p.detach().clone() for n, p in model.get_base_model().named_parameters()}
        try:
            model.merge_adapter()
        except Exception as error:
            check("merge", case, False, f"{type(error).__name__}: {error}")
            return
        model.unmerge_adapter()
        same = all(torch.equal(p, before[n]) for n, p in model.get_base_model().named_parameters())
        check("unmerge", case, same, f"{name}: not bit for bit")
        precise = exact(model)
        y = outputs(precise, inputs)
        precise.merge_adapter()
        same_outputs(case, "merged", y, outputs(precise, inputs), name)
        unloaded = exact(model).merge_and_unload()
        same_outputs(case, "unloaded", y, outputs(unloaded, inputs), name)


def same_combination(case: Case, theirs: peft.PeftModel, ours: LoraModel, inputs: Any) -> None:
    assert case.combination is not None
    kind, weights = case.combination
    options = {} if kind in ("linear", "cat", "svd") else {"density": 0.6}
    arguments = (["default", "other"], weights, "both", kind)
    theirs, ours = exact(theirs), exact(ours)
    results = both(
        "combine",
        case,
        lambda: theirs.add_weighted_adapter(*arguments, **options) or theirs,
        lambda: ours.add_weighted_adapter(*arguments, **options) or ours,
    )
    if None in results:
        return
    for model in results:
        model.set_adapter("both")
    theirs.eval()  # its new dropout trains, in a model that does not
    our = outputs(ours, inputs)
    try:
        their = outputs(theirs, inputs)
    except RuntimeError:  # an SVD of fewer values than the rank makes a layer that cannot run
        return
    same_outputs(case, "combined", their, our, kind)


# What these need


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    cast = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    result = model(**cast)
    y: Tensor = result if isinstance(result, Tensor) else result.logits
    return y


def exact(model: Any) -> Any:
    return copy.deepcopy(model).double()


def disturb(model: nn.Module, seed: int) -> None:
    """Makes what adapters hold, and biases and modules that are saved with them, others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or "lora_" in name:
                p.add_((0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype))


def our_loaded(case: Case, base: nn.Module, folder: Path, names: list[str]) -> LoraModel:
    torch.manual_seed(case.seed)
    options = {"is_trainable": True, "autocast_adapter_dtype": case.autocast_adapter_dtype}
    model = LoraModel.from_pretrained(copy.deepcopy(base), folder, **options)
    if "other" in names:
        model.load_adapter(folder / "other", "other", **options)
    return model.eval()


def their_loaded(
    case: Case, base: nn.Module, folder: Path, names: list[str]
) -> peft.PeftModel | None:
    torch.manual_seed(case.seed)
    options = {"is_trainable": True, "autocast_adapter_dtype": case.autocast_adapter_dtype}
    try:
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), **options)
        if "other" in names:
            model.load_adapter(str(folder / "other"), "other", **options)
    except Exception:
        return None
    return model.eval()


def same_files(case: Case, stage: str, one: Path, two: Path, names: list[str]) -> None:
    for name in names:
        place = "" if name == "default" else name
        first, second = (load_file(f / place / "adapter_model.safetensors") for f in (one, two))
        lost = sorted(k for k in first.keys() - second.keys() if not is_extra(k, case))
        check(f"{stage} file", case, not lost, f"{name}: {lost} is lost")
        plain = {k.replace(".base_layer.", ".") for k in first if ".lora_" not in k}
        more = sorted(second.keys() - first.keys() - plain)
        check(f"{stage} file", case, not more, f"{name}: {more} is added")
        for key in first.keys() & second.keys():
            same = first[key].dtype == second[key].dtype and torch.equal(first[key], second[key])
            check(f"{stage} file", case, same, f"{name}: {key} differs")
        first, second = (comparable(folder / place) for folder in (one, two))
        fields = sorted(k for k in first.keys() | second.keys() if first.get(k) != second.get(k))
        text = [f"{field}: {first.get(field)!r} {second.get(field)!r}" for field in fields]
        check(f"{stage} config", case, not fields, f"{name}: {text}")


def comparable(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    for field in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(field), list):
            config[field] = sorted(config[field])
    return config
