"""X-LoRA's files: PEFT's and the published package's, both ways; damaged and hostile ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from xlora_models import TOKENS, base_of, ours, saved_experts, settings, theirs_of

import lora_ext
from lora_ext.errors import AdapterFileError, NotBuiltError

NAMES = ("math", "code")
PEFTS = "base_model.internal_xlora_classifier."


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def saved(tmp_path: Path, layout: str = "peft", **options: Any) -> tuple[Any, Path]:
    model = ours("llama", saved_experts("llama", tmp_path / "experts", NAMES), **options)
    model.save_pretrained(tmp_path / "saved", layout=layout)
    return model, tmp_path / "saved"


def loaded(folder: Path, **options: Any) -> Any:
    return lora_ext.XLoraModel.from_pretrained(base_of("llama"), folder, **options)


# Round trips


@pytest.mark.parametrize("layout", ["peft", "xlora"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_what_is_saved_is_loaded(layout: str, layerwise: bool, tmp_path: Path) -> None:
    """From another place, without the folders that the adapters came from."""
    options = {"xlora_dropout_p": 0.1, "softmax_temperature": 0.5, "top_k_lora": 2}
    model, folder = saved(tmp_path, layout, layerwise_scalings=layerwise, **options)
    moved = folder.rename(tmp_path / "moved")
    (tmp_path / "experts").rename(tmp_path / "gone")
    again = loaded(moved)
    assert list(again.peft_config) == list(NAMES)
    assert torch.equal(logits(again), logits(model))
    assert again.xlora_config.top_k_lora == 2 and again.xlora_config.softmax_temperature == 0.5
    assert not any(p.requires_grad for p in again.parameters()) and not again.training
    on = loaded(moved, is_trainable=True)
    found = {name.split(".")[0] for name, p in on.named_parameters() if p.requires_grad}
    assert found == {"internal_xlora_classifier"}
    copied = {name: str(tmp_path / "gone" / name) for name in reversed(NAMES)}
    assert torch.equal(logits(loaded(moved, adapters=copied)), logits(model)), "in its own order"


def test_trained_adapters_are_saved(tmp_path: Path) -> None:
    adapters = saved_experts("llama", tmp_path / "experts", NAMES)
    model = ours("llama", adapters, use_trainable_adapters=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert any(p.requires_grad for p in again.base_model.parameters())


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_ours_to_peft_and_back(depth: int, dropout: float, tmp_path: Path) -> None:
    """PEFT runs adapters under numbers alone, so the file has numbers; names are the folders'."""
    options = {"xlora_depth": depth, "xlora_dropout_p": dropout, "layerwise_scalings": True}
    model, folder = saved(tmp_path, **options)
    theirs = peft.PeftModel.from_pretrained(base_of("llama"), folder).eval()
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = lora_ext.PeftModel.from_pretrained(base_of("llama"), tmp_path / "theirs")
    assert isinstance(again, lora_ext.XLoraModel)
    assert torch.equal(logits(again), logits(model))


def test_pefts_files_are_loaded_with_what_it_puts_elsewhere(tmp_path: Path) -> None:
    adapters = saved_experts("llama", tmp_path / "experts")
    model = ours("llama", adapters)
    theirs_of(model, "llama", adapters).save_pretrained(tmp_path / "theirs")
    own = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert f"{PEFTS}layers.0.weight" not in own, "PEFT was mended: simplify _lost_by_peft"
    again = loaded(tmp_path / "theirs")
    assert list(again.peft_config) == ["0", "1"]
    assert torch.equal(logits(again), logits(model))
    (tmp_path / "experts").rename(tmp_path / "gone")
    with pytest.raises(
        AdapterFileError, match=r"adapter '0' is not in adapters/0, nor is .* a fol"
    ):
        loaded(tmp_path / "theirs")
    (tmp_path / "theirs" / "0" / "adapter_model.safetensors").unlink()
    places = {name: tmp_path / "gone" / name for name in "01"}
    with pytest.raises(AdapterFileError, match=r"missing key .*layers\.0\."):
        loaded(tmp_path / "theirs", adapters=places)


# The published package's layout, written as the package writes it


def written_by_the_package(tmp_path: Path, **options: Any) -> tuple[Path, nn.ModuleList, nn.Linear]:
    """Of four linear layers, ReLU and Dropout between them, which count; over 12 layers."""
    adapters = saved_experts("llama", tmp_path / "experts", NAMES)
    torch.manual_seed(9)
    relus = options.get("enable_relu_and_dropout", True)
    inner = nn.ModuleList()
    for features in (32, 16, 16):
        inner.append(nn.Linear(features, 16, bias=options.get("use_bias", True)))
        if relus:
            inner += [nn.ReLU(), nn.Dropout(0.2)]
    last = nn.Linear(16, 2 * 12, bias=options.get("use_bias", True))
    folder = tmp_path / "package"
    (folder / "adapters").mkdir(parents=True)
    for name, place in adapters.items():
        Path(place).rename(folder / "adapters" / name)
    tensors = {f"inner.{key}": value for key, value in inner.state_dict().items()}
    tensors |= {f"last.{key}": value for key, value in last.state_dict().items()}
    save_file(tensors, folder / "xlora_classifier.safetensors")
    config = {
        "hidden_size": 32,
        "base_model_id": "someone/llama",
        "adapters": list(NAMES),
        "enable_softmax": True,
        "enable_softmax_topk": False,
        "layerwise_scalings": True,
        "xlora_depth": 4,
        "xlora_size": 16,
        "enable_relu_and_dropout": True,
        "use_bias": True,
        "xlora_dropout_p": 0.2,
        "stop_token_id": None,
        "use_trainable_adapters": False,
        "use_mean_pool": False,
        "softmax_temperature": 0.7,
        "top_k_lora": None,
        "scaling_pass_value": 0.0,
        "global_scaling_weight": 1.0,
    }
    (folder / "xlora_config.json").write_text(json.dumps(config | options))
    return folder, inner, last


@pytest.mark.parametrize("relus", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_packages_files_are_loaded(relus: bool, bias: bool, tmp_path: Path) -> None:
    folder, inner, last = written_by_the_package(
        tmp_path, enable_relu_and_dropout=relus, use_bias=bias
    )
    model = loaded(folder)
    assert list(model.peft_config) == list(NAMES)
    assert model.xlora_config.base_model_name_or_path == "someone/llama"
    logits(model)
    hidden = base_of("llama")(input_ids=TOKENS, output_hidden_states=True).hidden_states[-1]
    for module in inner.eval():
        hidden = module(hidden)
    wanted = (last(hidden).unflatten(-1, (12, 2)) / 0.7).softmax(-1)
    torch.testing.assert_close(model.get_latest_scalings(), wanted)
    if relus and bias:
        return
    with pytest.raises(ValueError, match=r"got False, expected True: PEFT's.*layout='xlora'"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    model.save_pretrained(tmp_path / "again", layout="xlora")
    first = load_file(folder / "xlora_classifier.safetensors")
    again = load_file(tmp_path / "again" / "xlora_classifier.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("field", [{"use_mean_pool": True}, {"stop_token_id": 2}], ids=str)
def test_one_scaling_for_a_whole_request_is_refused(field: dict[str, Any], tmp_path: Path) -> None:
    folder, _, _ = written_by_the_package(tmp_path, **field)
    with pytest.raises(
        NotBuiltError, match=f"{next(iter(field))}: got a value.*one scaling for al"
    ):
        loaded(folder)


def test_adapters_in_the_folder_itself(tmp_path: Path) -> None:
    """As later versions of the package save them."""
    folder, _, _ = written_by_the_package(tmp_path)
    wanted = logits(loaded(folder))
    for name in NAMES:
        (folder / "adapters" / name).rename(folder / name)
    assert torch.equal(logits(loaded(folder)), wanted)
    path = folder / "xlora_config.json"
    values = json.loads(path.read_text())
    del values["adapters"]
    path.write_text(json.dumps(values))
    with pytest.raises(AdapterFileError, match="does not name its adapters; say them in the order"):
        loaded(folder)
    places = {name: folder / name for name in NAMES}
    assert torch.equal(logits(loaded(folder, adapters=places)), wanted)


# Damaged, hostile and other files


def change_config(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return changed


def link_out(folder: Path) -> None:
    (folder / "adapters" / "math").rename(folder.parent / "elsewhere")
    (folder / "adapters" / "math").symlink_to(folder.parent / "elsewhere")


def last_bias(tensors: dict[str, Tensor]) -> Tensor:
    return tensors[f"{PEFTS}layers.2.bias"]


DAMAGED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no config": (
        "has no adapter_config.json and no xlora_config.json",
        lambda f: (f / "adapter_config.json").unlink(),
    ),
    "no classifier": (
        "has no adapter_config.json and adapter_model.safetensors",
        lambda f: (f / "adapter_model.safetensors").unlink(),
    ),
    "other kind": ("peft_type: got 'LORA', expected 'XLORA'", change_config(peft_type="LORA")),
    "field": ("xlora_depth: got 'deep'", change_config(xlora_depth="deep")),
    "huge": ("xlora_size: got 1000000000000", change_config(xlora_size=10**12)),
    "deep": ("xlora_depth: got 100000000", change_config(xlora_depth=10**8)),
    "other size": ("shape", change_config(xlora_size=8)),
    "layerwise": (
        r"layers\.2\.weight: got 2 results, expected 24: 2 adapters x 12 layers.*layerwise_sca",
        change_config(layerwise_scalings=True),
    ),
    "name": ("adapters: a name: got '../x'", change_config(adapters={"../x": "y"})),
    "hub": (
        "adapter '0' is not in adapters/0, nor is 'someone/secret' a folder",
        change_config(adapters={"0": "someone/secret", "1": "someone/other"}),
    ),
    "fewer": (
        r"got 2 results, expected 1: 1 adapters",
        change_config(adapters={"0": "adapters/math"}),
    ),
    "nan": ("NaN", change_tensors(lambda t: last_bias(t).fill_(float("nan")))),
    "missing": ("missing key", change_tensors(lambda t: t.pop(f"{PEFTS}layers.2.bias"))),
    "more": ("unknown key", change_tensors(lambda t: t.update({"x": torch.ones(1)}))),
    "cut": (
        "safetensors",
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-9]
        ),
    ),
    "link": ("is a link to .*outside its folder", link_out),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_and_hostile_files_are_refused_and_change_nothing(
    case: str, tmp_path: Path
) -> None:
    what, damage = DAMAGED[case]
    _, folder = saved(tmp_path)
    damage(folder)
    base = base_of("llama")
    before, wanted = set(dict(base.named_modules())), logits(base)
    with pytest.raises(AdapterFileError, match=what):
        lora_ext.XLoraModel.from_pretrained(base, folder)
    assert set(dict(base.named_modules())) == before and "forward" not in vars(base)
    assert torch.equal(logits(base), wanted)


def test_other_numbers_of_adapters_are_told(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    places = {"math": folder / "adapters" / "math"}
    with pytest.raises(ValueError, match=r"adapters: got .'math'., expected 2: .*'math', 'code'"):
        loaded(folder, adapters=places)


def test_what_cannot_be_saved_leaves_the_folder_alone(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="layout: got 'gguf', expected one of"):
        model.save_pretrained(folder, layout="gguf")
    with pytest.raises(ValueError, match="safe_serialization: got False"):
        model.save_pretrained(folder, safe_serialization=False)
    next(model.internal_xlora_classifier.parameters()).data[0, 0] = float("inf")
    with pytest.raises(AdapterFileError, match="NaN or Inf; it is not saved"):
        model.save_pretrained(folder)
    assert {path: path.read_bytes() for path in before} == before


def test_the_classifier_and_adapters_get_a_folders_values(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    other = ours("llama", saved_experts("llama", tmp_path / "more", NAMES), seed=8)
    assert (logits(other) - logits(model)).abs().max() > 1e-4
    other.load_adapter(folder, "default")
    assert torch.equal(logits(other), logits(model))
    other.load_adapter(folder / "adapters" / "math", "math")
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="'x', expected one of"):
        other.load_adapter(folder, "x")


def test_a_trainer_saves_and_goes_on(tmp_path: Path) -> None:
    model = ours("llama", saved_experts("llama", tmp_path / "experts", NAMES))
    data = [{"input_ids": TOKENS[i % 2], "labels": TOKENS[i % 2]} for i in range(8)]

    def trainer(model: Any, steps: int) -> Any:
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            max_steps=steps,
            save_steps=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return transformers.Trainer(model=model, args=args, train_dataset=data)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(model, 4).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in changed} == {"internal_xlora_classifier"}
    half = tmp_path / "out" / "checkpoint-2"
    again = ours("llama", saved_experts("llama", tmp_path / "experts", NAMES), seed=8)
    trainer(again, 4).train(resume_from_checkpoint=str(half))
    torch.testing.assert_close(logits(again.eval()), logits(model.eval()))


def test_configs_are_pefts(tmp_path: Path) -> None:
    theirs = peft.XLoraConfig(adapters={"0": "a"}, **settings(top_k_lora=1))
    own = lora_ext.XLoraConfig.of(theirs, "test")
    assert {k: v for k, v in own.to_dict().items() if k in theirs.to_dict()} == theirs.to_dict()
    own.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).to_dict() == theirs.to_dict()
    assert lora_ext.XLoraConfig.from_pretrained(tmp_path) == own


def test_a_config_of_no_kind_is_none_of_x_lora(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    with pytest.raises(ValueError, match="peft_type: is missing, expected 'XLORA'"):
        lora_ext.XLoraConfig.from_pretrained(tmp_path)
    assert not lora_ext.check_if_peft_model(tmp_path)
