"""Loading a hostile or unfit adapter into a model: a typed error, fast, in little memory, and the
model as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UP_A, UP_B = "base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight"
Tensors = dict[str, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    modules = {"up": nn.Linear(6, 8), "down": nn.Linear(8, 6), "norm": nn.LayerNorm(6)}
    return nn.ModuleDict(modules)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    model = get_lora_model(net(), LoraConfig(r=4, target_modules=["up", "down"], bias="lora_only"))
    model.save_pretrained(folder)
    return folder


def config(**fields: Any) -> Callable[[Path], None]:
    """Other fields in the config; None keeps a field away."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text()) | fields
        (folder / CONFIG).write_text(json.dumps(values))

    return damage


def weights(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def put(key: str, tensor: Tensor) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.update({key: tensor}))


def without(key: str) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors.pop(key))


# What is wrong, and what the message has to name.
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rank of 10^8": (config(r=10**8), "r: got 100000000"),
    "rank of 60,000": (config(r=60_000), "lora_A"),
    "rank 0": (config(r=0), "r"),
    "rank -1": (config(r=-1), "r"),
    "rank true": (config(r=True), "r"),
    "rank as text": (config(r="8"), "r"),
    "another rank": (config(r=5), "lora_A"),
    "alpha 1e300": (config(lora_alpha=1e300), ""),
    "alpha as text": (config(lora_alpha="16"), "lora_alpha"),
    "dropout 2": (config(lora_dropout=2), "lora_dropout"),
    "rank pattern of 10^9": (config(rank_pattern={"up": 10**9}), "rank_pattern"),
    "targets nothing": (config(target_modules=["sideways"]), "target_modules"),
    "targets a norm": (config(target_modules=["norm"]), "norm"),
    "targets a number": (config(target_modules=7), "target_modules"),
    "wrong expression": (config(target_modules="(up"), "target_modules"),
    "a name of 900,000 letters": (config(exclude_modules="a" * 900_000), "exclude_modules"),
    "8,000 alternatives": (config(target_modules="|" * 8000), "target_modules"),
    "fewer targets": (config(target_modules=["down"]), "up"),
    "more to save": (config(modules_to_save=["norm"]), "norm"),
    "another method": (config(peft_type="LOHA"), "peft_type"),
    "not built": (config(use_qalora=True), "use_qalora"),
    "unknown init": (config(init_lora_weights="magic"), "init_lora_weights"),
    "no biases": (config(bias="none"), "bias"),
    "unknown bias": (config(bias="some"), "bias"),
    "replication of no layers": (config(layer_replication=[[0, 2]]), "layer_replication"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "no folder": (lambda folder: shutil.rmtree(folder), "folder"),
    "empty config": (lambda folder: (folder / CONFIG).write_bytes(b""), CONFIG),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), WEIGHTS),
    "another shape": (put(UP_A, torch.zeros(4, 7)), UP_A),
    "transposed": (put(UP_B, torch.zeros(4, 8)), UP_B),
    "integers": (put(UP_A, torch.zeros(4, 6, dtype=torch.int32)), UP_A),
    "NaN": (put(UP_B, torch.full((8, 4), torch.nan)), UP_B),
    "infinity": (put(UP_B, torch.full((8, 4), torch.inf)), UP_B),
    "NaN in half precision": (put(UP_B, torch.full((8, 4), torch.nan).half()), UP_B),
    "missing": (without(UP_B), UP_B),
    "missing bias": (without("base_model.model.up.base_layer.bias"), "up.base_layer.bias"),
    "unknown": (put("base_model.model.up.lora_C.weight", torch.zeros(1)), "lora_C"),
    "a base weight": (put("base_model.model.up.base_layer.weight", torch.zeros(8, 6)), "up"),
    "with a name in the keys": (
        put("base_model.model.up.lora_A.default.weight", torch.zeros(4, 6)), "default"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, good: Path, tmp_path: Path) -> None:
    damage, named = CASES[case]
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    damage(folder)
    model = get_lora_model(net(), LoraConfig(r=2, target_modules=["up"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = refused(lambda: model.load_adapter(folder, "new"))
    assert str(folder) in message and named in message
    with pytest.raises(AdapterFileError):
        model.load_adapter(folder, "new")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert list(model.peft_config) == ["default"]


def test_one_file_of_the_folder(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name may look like an id of the hub, which is not asked."""
    monkeypatch.chdir(good.parent)
    path = f"{good.name}/adapter_model.safetensors"
    assert "is a file" in refused(lambda: LoraModel.from_pretrained(net(), path))


def test_many_names_of_nothing_in_a_deep_model(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "adapter")
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(200)))
    for field in ("target_modules", "modules_to_save"):
        for names in (["a"] * 23_000, [f"{i}" * 5 for i in range(500, 23_000)], ["." * 999] * 500):
            config(**{"target_modules": ["0"], field: names})(tmp_path / "adapter")
            load = lambda: LoraModel.from_pretrained(model, tmp_path / "adapter")  # noqa: E731
            assert field in refused(load)
    config(target_modules=["a." * 4097])(tmp_path / "adapter")
    assert "of at most 8192 characters" in refused(load)


def test_good_one_is_loaded(good: Path) -> None:
    assert LoraModel.from_pretrained(net(), good).active_adapters == ["default"]


def test_values_too_large_for_the_models_dtype(tmp_path: Path) -> None:
    """1e5 is finite in the file and Inf in float16."""
    make = lambda: nn.Sequential(nn.Linear(6, 8).half())  # noqa: E731
    get_lora_model(make(), LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path)
    key = "base_model.model.0.lora_A.weight"
    put(key, torch.full((4, 6), 1e5))(tmp_path)
    model = make()
    message = refused(
        lambda: LoraModel.from_pretrained(model, tmp_path, autocast_adapter_dtype=False)
    )
    assert key in message and "too large for torch.float16" in message
    LoraModel.from_pretrained(make(), tmp_path)  # in float32 it is what it is
    put(key, torch.full((4, 6), 65519.0))(tmp_path)  # rounds to the largest float16
    adapted = LoraModel.from_pretrained(make(), tmp_path, autocast_adapter_dtype=False)
    assert adapted.get_base_model()[0].lora_A.max() == 65504


def test_initial_adapter_is_compared_with_the_model(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="olora")
    model = get_lora_model(nn.Sequential(nn.Linear(8, 8)), config)
    model.save_pretrained(tmp_path / "initial")
    option = {"path_initial_model_for_weight_conversion": tmp_path / "initial"}
    initial = load_file(tmp_path / "initial" / WEIGHTS)
    with torch.no_grad():
        model.get_base_model()[0].lora_A.mul_(2)
    model.save_pretrained(tmp_path / "right", **option)
    for key in ("unknown", "base_model.model.0.lora_A.weight"):
        put(key, torch.zeros(64, 8))(tmp_path / "initial")
        message = refused(lambda: model.save_pretrained(tmp_path / "wrong", **option))
        assert key in message and not (tmp_path / "wrong").exists()
        save_file(initial, tmp_path / "initial" / WEIGHTS, {"format": "pt"})


def test_cache_of_the_hub_loads(good: Path, tmp_path: Path) -> None:
    """There snapshots/REVISION/name is a link to ../../blobs/HASH; also in a subfolder."""
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        shutil.copy(good / name, tmp_path / "blobs" / f"hash of {name}")
    for place in ("snapshots/abc", "snapshots/abc/sub/folder"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for name in (CONFIG, WEIGHTS):
            up = "../" * (place.count("/") + 1)
            (folder / name).symlink_to(f"{up}blobs/hash of {name}")
        LoraModel.from_pretrained(net(), folder)


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("snapshots/abc", "../../secret"),
        ("snapshots/abc", "../../blobs/inner/secret"),
        ("snapshots/abc", "../../blobs/link"),
        ("snapshots", "../blobs/secret"),
        ("other/abc", "../../blobs/secret"),
        ("snapshots/abc", "../../../blobs/secret"),
    ],
)
def test_other_links_out_are_refused(good: Path, tmp_path: Path, place: str, target: str) -> None:
    cache = tmp_path / "cache"
    folder = cache / place
    folder.mkdir(parents=True)
    (cache / "blobs" / "inner").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for secret in ("cache/secret", "cache/blobs/secret", "cache/blobs/inner/secret"):
        shutil.copy(good / WEIGHTS, tmp_path / secret)
    shutil.copy(good / WEIGHTS, tmp_path / "blobs" / "secret")
    (cache / "blobs" / "link").symlink_to("../secret")
    shutil.copy(good / CONFIG, folder / CONFIG)
    (folder / WEIGHTS).symlink_to(target)
    assert "outside its folder" in refused(lambda: LoraModel.from_pretrained(net(), folder))


UNSAVABLE = ["1e999", '[{"a": 1e999}]']


@pytest.mark.parametrize("value", UNSAVABLE)
def test_what_could_not_be_saved_is_not_loaded(good: Path, tmp_path: Path, value: str) -> None:
    shutil.copytree(good, tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG
    path.write_text('{"unknown": ' + value + "," + path.read_text()[1:])
    message = refused(lambda: LoraModel.from_pretrained(net(), tmp_path / "adapter"))
    assert "unknown: got" in message and str(path) in message
