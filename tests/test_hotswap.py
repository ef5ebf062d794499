"""Adapters of other ranks and scalings in the place of one, also under compiled code."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from swapped_models import CAPACITY, X, config, loaded, net, prepared, save_folders, saved
from torch import nn
from torch._dynamo.testing import CompileCounter

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError, NotBuiltError


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return save_folders(tmp_path)


def test_preparing_changes_no_result(folders: list[Path]) -> None:
    for folder in folders:
        torch.testing.assert_close(prepared(folder)(X), loaded(folder)(X))


def test_swapped_is_loaded(folders: list[Path], tmp_path: Path) -> None:
    """And so is what is saved of it, here and in a model without room."""
    model = prepared(folders[0])
    for folder in [*folders[1:], folders[0]]:
        lora_ext.hotswap_adapter(model, folder, "default")
        wanted = loaded(folder)(X)
        torch.testing.assert_close(model(X), wanted)
        model.save_pretrained(tmp_path / "again")
        torch.testing.assert_close(loaded(tmp_path / "again")(X), wanted)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(X), wanted)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(X), wanted)


def test_parameters_stay_the_same_objects(folders: list[Path]) -> None:
    model = prepared(folders[0])
    before = {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}
    for folder in folders:
        lora_ext.hotswap_adapter(model, folder, "default")
    assert before == {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}


def test_a_hundred_swaps_compile_nothing(folders: list[Path]) -> None:
    model = prepared(folders[0])
    wanted = [loaded(folder)(X) for folder in folders]
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), wanted[0])
        assert counter.frame_count == 1
        for i in range(1, 101):
            which = i % len(folders)
            lora_ext.hotswap_adapter(model, folders[which], "default")
            torch.testing.assert_close(compiled(X), wanted[which])
        model.set_scale("default", 0.5)
        torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == 1


def test_convolutions_and_biases(tmp_path: Path) -> None:
    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))

    x = torch.randn(2, 3, 4, 4)
    made = []
    for i, r in enumerate((2, 6)):
        model = get_lora_model(
            base(),
            LoraConfig(r=r, target_modules=["0", "2"], init_lora_weights=False, lora_bias=True),
        )
        model.save_pretrained(tmp_path / str(i))
        made.append(model.eval()(x))
    model = LoraModel.from_pretrained(base(), tmp_path / "0").eval()
    lora_ext.prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch.testing.assert_close(model(x), made[0])
    lora_ext.hotswap_adapter(model, tmp_path / "1", "default")
    torch.testing.assert_close(model(x), made[1])
    lora_ext.hotswap_adapter(model, tmp_path / "0", "default")
    torch.testing.assert_close(model(x), made[0])


@pytest.mark.parametrize("groups", [2, 4])
def test_convolutions_with_groups(tmp_path: Path, groups: int) -> None:
    """Each group has ranks of its own, and room for more of them; files have all channels."""

    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(8, 12, 3, groups=groups))

    x, made = torch.randn(2, 8, 5), []
    for i, r in enumerate((4, 8)):
        settings = LoraConfig(r=r, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
        model = get_lora_model(base(), settings).eval()
        model.save_pretrained(tmp_path / str(i))
        made.append(model(x))
    model = LoraModel.from_pretrained(base(), tmp_path / "0").eval()
    model.load_adapter(tmp_path / "0", "default")  # into what is there
    lora_ext.hotswap_adapter(model, tmp_path / "0", "default")
    torch.testing.assert_close(model(x), made[0], atol=0, rtol=0)
    lora_ext.prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(x), made[0])
    for i in (1, 0):
        lora_ext.hotswap_adapter(model, tmp_path / str(i), "default")
        torch.testing.assert_close(model(x), made[i])
        model.save_pretrained(tmp_path / "again")
        again = LoraModel.from_pretrained(base(), tmp_path / "again").eval()
        torch.testing.assert_close(again(x), made[i])

    linking = load_file(tmp_path / "1" / "adapter_model.safetensors")
    for name, tensor in linking.items():
        linking[name] = torch.ones_like(tensor)
    save_file(linking, tmp_path / "1" / "adapter_model.safetensors")
    for load in (lora_ext.hotswap_adapter, LoraModel.load_adapter):
        with pytest.raises(AdapterFileError, match="links channels of different groups"):
            load(model, tmp_path / "1", "default")  # type: ignore[operator]
        torch.testing.assert_close(model(x), made[0])


def test_it_goes_where_the_model_goes(folders: list[Path]) -> None:
    model = prepared(folders[2]).double()
    torch.testing.assert_close(model(X.double()), loaded(folders[2]).double()(X.double()))
    for layer in (model.get_base_model()[0],):
        assert layer._scaling_tensors["default"].dtype == torch.float32
        assert torch.equal(
            layer._scaling_tensors["default"].double(),
            torch.tensor(layer._scaling["default"]).double(),
        )


def test_a_failed_swap_leaves_the_former_adapter(folders: list[Path], tmp_path: Path) -> None:
    model = prepared(folders[0])
    before = {n: p.clone() for n, p in model.named_parameters()}
    larger = saved(tmp_path / "larger", r=CAPACITY + 1, alpha=1, seed=9)
    with pytest.raises((NotBuiltError, AdapterFileError), match="made room"):
        lora_ext.hotswap_adapter(model, larger, "default")
    plain = loaded(folders[0])
    with pytest.raises((NotBuiltError, AdapterFileError), match="target_rank"):
        lora_ext.hotswap_adapter(plain, folders[1], "default")
    (folders[3] / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError):
        lora_ext.hotswap_adapter(model, folders[3], "default")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    torch.testing.assert_close(model(X), loaded(folders[0])(X))


def test_refused(folders: list[Path]) -> None:
    prepare = lora_ext.prepare_model_for_compiled_hotswap
    model = loaded(folders[0])
    with pytest.raises(ValueError, match="at least 4"):
        prepare(model, target_rank=2)
    with pytest.raises(ValueError, match="compiling"):
        prepare(torch.compile(model), target_rank=8)
    with pytest.raises(TypeError, match="without adapters"):
        prepare(net(), target_rank=8)
    with pytest.raises(ValueError, match="check_compile"):
        prepare(model, check_compiled="maybe")
    dora = get_lora_model(net(), config(2, 2, use_dora=True))
    with pytest.raises(ValueError, match="use_dora"):
        prepare(dora, target_rank=8)
    embedding = get_lora_model(nn.Sequential(nn.Embedding(4, 3)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="Embedding"):
        prepare(embedding, target_rank=8)


def test_strengths_belong_to_the_set(folders: list[Path]) -> None:
    """What leaves it has its own scaling again, in requests and files too; `set_scale` stays."""
    model = loaded(folders[0])
    for i in (1, 2):
        model.load_adapter(str(folders[i]), f"a{i}")

    def strengths() -> dict[str, float]:
        layers = [layer for _, layer in model.lora_layers()]
        return {
            name: layer.get_scale(name) / layer.adapters[name].scaling
            for name in model.peft_config
            for layer in layers
            if name in layer.adapters
        }

    def leaves() -> None:
        model.rename_adapter("a1", "new")
        model.set_adapter("new")
        model.rename_adapter("new", "a1")

    with torch.no_grad():
        wanted = model(X, adapter_names=["a1"] * len(X))
        for change in (
            lambda: model.set_adapters(["default"], [1.0]),
            lambda: model.set_adapters([]),
            lambda: model.set_adapter("default"),
            lambda: model.set_adapter("a1"),
            lambda: model.set_adapters(["default", "a1"]),
            leaves,
        ):
            model.set_adapters(["default", "a1"], [0.5, 2.0])
            assert strengths() == {"default": 0.5, "a1": 2.0, "a2": 1.0}
            change()
            assert set(strengths().values()) == {1.0}
            assert torch.equal(model(X, adapter_names=["a1"] * len(X)), wanted)
    model.set_adapters(["a1"], [2.0])
    with pytest.raises(ValueError, match="no"):
        model.set_adapters(["default", "no"], [1.0, 1.0])
    assert strengths()["a1"] == 2.0
    model.set_scale("a1", 2.0)  # a word of its own, of the same number
    model.set_scale("a2", 3.0)
    model.set_adapters(["default"])
    model.set_adapter("default")
    assert strengths() == {"default": 1.0, "a1": 2.0, "a2": 3.0}
    model.set_adapters(["a1", "a2"], [2.0, 0.0])
    lora_ext.hotswap_adapter(model, folders[1], "a1")  # brings its own
    model.set_adapters([])
    assert set(strengths().values()) == {1.0}


def test_a_set_without_strengths_compiles_nothing(folders: list[Path]) -> None:
    model = prepared(folders[0])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        wanted = compiled(X)
        model.set_adapters("default", 2.0)
        torch.testing.assert_close(compiled(X), model(X))
        model.set_adapter("default", inference_mode=True)
        torch.testing.assert_close(compiled(X), wanted)
    assert counter.frame_count <= 2


def test_the_whole_set_with_strengths(folders: list[Path]) -> None:
    """As llama.cpp sets it, and diffusers."""
    model = loaded(folders[0])
    for i in (1, 2):
        model.load_adapter(str(folders[i]), f"a{i}")
    base = net()(X)
    with torch.no_grad():
        model.set_adapters(["default", "a2"], [0.5, 2.0])
        mixed = model(X)
        model.set_adapters([])
        torch.testing.assert_close(model(X), base)
        model.set_adapters("a1")
        torch.testing.assert_close(model(X), loaded(folders[1])(X))
        model.set_adapters(["a2", "default"], [2.0, 0.5])
        torch.testing.assert_close(model(X), mixed)
    assert model.active_adapters == ["a2", "default"]
    for arguments, what in (
        ((["a2", "no"],), "no"),
        ((["a2"], [1.0, 2.0]), "2 numbers for 1"),
        ((["a2"], [float("inf")]), "finite"),
    ):
        with pytest.raises(ValueError, match=what):
            model.set_adapters(*arguments)
    assert model.active_adapters == ["a2", "default"]


def whole(model: LoraModel, folder: Path, match: str) -> None:
    """The swap is refused, and the model is what it was."""
    x = torch.randn(5, 12)
    y, state, kept = model(x), copy.deepcopy(model.state_dict()), model.peft_config["default"]
    with pytest.raises(AdapterFileError, match=match):
        lora_ext.hotswap_adapter(model, folder, "default")
    assert model.peft_config["default"] == kept and torch.equal(model(x), y)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_get_the_scaling(tmp_path: Path, dora: bool) -> None:
    def embedding(alpha: float) -> LoraModel:
        torch.manual_seed(int(alpha))
        base = nn.Sequential(nn.Embedding(9, 6))
        nn.init.ones_(base[0].weight)
        settings = LoraConfig(target_modules=["0"], lora_alpha=alpha, use_dora=dora)
        model = get_lora_model(base, settings).eval()
        for name, parameter in model.named_parameters():
            if "lora_embedding" in name:
                nn.init.normal_(parameter, std=0.3)
        return model

    model, other = embedding(8), embedding(32)
    other.save_pretrained(tmp_path)
    lora_ext.hotswap_adapter(model, tmp_path, "default")
    tokens = torch.arange(9)
    assert torch.equal(model(tokens), other(tokens))


def test_other_features_are_no_ranks(folders: list[Path], tmp_path: Path) -> None:
    """Room is for ranks: an adapter of a narrower base is not filled up."""
    model = loaded(folders[0])
    lora_ext.prepare_model_for_compiled_hotswap(model, target_rank=CAPACITY)
    narrow = nn.Sequential(nn.Linear(11, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh())
    narrow.append(nn.Linear(16, 3))
    get_lora_model(narrow, config(4, 8)).save_pretrained(tmp_path / "narrow")
    whole(model, tmp_path / "narrow", "got shape")


def test_a_variant_or_a_part_of_one_adapter(folders: list[Path], tmp_path: Path) -> None:
    """Zeros would stand for a magnitude, or for half of a product."""
    dora = loaded(saved(tmp_path / "dora", 4, 8, 5, use_dora=True))
    whole(dora, folders[0], "no variant, but 'default' has use_dora")
    model = loaded(folders[0])
    whole(model, tmp_path / "dora", "files' adapter is DoRA's, 'default' is not, unexpected keys")
    fewer = get_lora_model(net(), LoraConfig(r=4, target_modules=["0"], use_dora=True))
    fewer.save_pretrained(tmp_path / "fewer")
    whole(dora, tmp_path / "fewer", r"got no .*2\.lora_A.weight")

    half = tmp_path / "half"
    shutil.copytree(folders[0], half)
    tensors = load_file(half / "adapter_model.safetensors")
    del tensors["base_model.model.2.lora_A.weight"]
    save_file(tensors, half / "adapter_model.safetensors")
    whole(model, half, r"got no .*2\.lora_A.weight")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("r", 7, "got rank 4, expected 7"),
        ("rank_pattern", {"2": 3}, "got rank 4, expected 3"),
        ("lora_bias", True, "no bias of lora_B"),
        ("use_dora", True, "use_dora, but 'default' has none"),
    ],
)
def test_a_config_that_is_not_of_its_tensors(
    folders: list[Path], tmp_path: Path, field: str, value: object, match: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(folders[0], folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    for room in (None, CAPACITY):
        model = loaded(folders[0])
        if room:
            lora_ext.prepare_model_for_compiled_hotswap(model, target_rank=room)
        whole(model, folder, match)


def test_what_was_swapped_is_saved_and_loaded(folders: list[Path], tmp_path: Path) -> None:
    """With biases that the new adapter has not, and its dropout."""
    model = loaded(saved(tmp_path / "biased", 4, 8, 5, lora_bias=True))
    other = saved(tmp_path / "plain", 4, 3, 6, lora_dropout=0.5)
    lora_ext.hotswap_adapter(model, other, "default")
    model.save_pretrained(tmp_path / "again")
    x = torch.randn(5, 12)
    assert torch.equal(loaded(tmp_path / "again")(x), loaded(other)(x))
    assert {layer.adapters["default"].lora_dropout for _, layer in model.lora_layers()} == {0.5}


def test_a_name_that_is_the_end_of_anothers_keeps_its_scaling(tmp_path: Path) -> None:
    """In the config of what is filled up, whose keys mean ends of names."""
    base = nn.Sequential()
    base.add_module("m", nn.Sequential())
    base.m.add_module("fc", nn.Linear(6, 6))
    base.add_module("fc", nn.Linear(6, 6))
    alphas = {"m.fc": 5, "^fc": 2}
    model = LoraModel(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=["fc"], alpha_pattern=alphas)
    )
    with torch.no_grad():
        for _, layer in model.lora_layers():
            layer.lora_B.normal_()
    lora_ext.prepare_model_for_compiled_hotswap(model, target_rank=4)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(LoraModel.from_pretrained(base, tmp_path)(x), model.eval()(x))
