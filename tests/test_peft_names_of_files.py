"""What PEFT's names write, find and refuse."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap
import peft_programs
import pytest
import torch
from peft_programs import PREFIX, TOKENS, Net, adapter, config_of, read
from safetensors.torch import save_file
from tiny_models import BUILDERS
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError, NotBuiltError

folder = peft_programs.folder  # a fixture


# Files


def test_a_given_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    model = get_lora_model(Net(), config_of(lora_ext, bias="all", modules_to_save=["head"]))
    given = {key: tensor.clone() + 1 for key, tensor in model.state_dict().items()}
    before = {name: parameter for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path, state_dict=given)
    assert all(model.get_parameter(name) is value for name, value in before.items())
    own = lora_ext.get_peft_model_state_dict(model)
    saved = read(tmp_path)
    assert saved.keys() == own.keys() and saved
    assert all(torch.equal(saved[key], own[key] + 1) for key in own)
    part = {"base_model.model.first.lora_A": given["base_model.model.first.lora_A"]}
    model.save_pretrained(tmp_path, state_dict=part)  # the rest is the model's
    changed = [key for key, tensor in read(tmp_path).items() if not torch.equal(tensor, own[key])]
    assert changed == [f"{PREFIX}first.lora_A.weight"]


@pytest.mark.parametrize("lib", [peft, lora_ext])
def test_pefts_way_to_convert_an_adapter_that_changed_the_base(lib: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    config = lib.LoraConfig(init_lora_weights="pissa", target_modules=["0"], r=2)
    model = lib.get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    model.save_pretrained(
        str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    plain = lib.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "plain"))
    assert plain.peft_config["default"].r == 4
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_only_the_main_process_writes_and_no_pickle(tmp_path: Path) -> None:
    model = get_lora_model(Net(), config_of(lora_ext))
    model.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()
    with pytest.raises(ValueError, match="safe_serialization: got False, expected True"):
        model.save_pretrained(tmp_path / "not", safe_serialization=False)
    assert not (tmp_path / "not").exists()


def test_the_card_says_what_the_hub_reads_and_keeps_what_is_there(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    base, _ = BUILDERS["llama"]()
    base.config._name_or_path = "owner/base"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_lora_model(base, config)
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"

    def data() -> Any:
        return yaml.safe_load(path.read_text().split("---\n")[1])

    expected = {
        "base_model": "owner/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:owner/base", "lora", "transformers"],
    }
    assert data() == expected
    path.write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My words\n---\nend\n")
    model.create_or_update_model_card(tmp_path)
    assert data() == expected | {"license": "mit"}
    assert path.read_text().endswith("---\n# My words\n---\nend\n")
    path.write_text("no front matter\n")
    model.save_pretrained(tmp_path)
    assert data() == expected and path.read_text().endswith("---\nno front matter\n")


def test_files_say_which_base_and_whose_format(tmp_path: Path) -> None:
    for lib in (peft, lora_ext):
        lib.get_peft_model(Net(), config_of(lib)).save_pretrained(str(tmp_path / lib.__name__))
    theirs, ours = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("peft", "lora_ext")
    )
    assert (
        ours["auto_mapping"]
        == theirs["auto_mapping"]
        == {
            "base_model_class": "Net",
            "parent_library": Net.__module__,
        }
    )
    assert ours["peft_version"] == theirs["peft_version"] == peft.__version__


def test_push_to_hub_uploads_the_adapter_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two calls that need the network are recorded."""
    import huggingface_hub

    seen: dict[str, Any] = {}

    def create_repo(api: Any, repo_id: str, **options: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload_folder(api: Any, *, repo_id: str, folder_path: str, **options: Any) -> str:
        seen.update(options, repo_id=repo_id, files=sorted(os.listdir(folder_path)))
        seen["card"] = Path(folder_path, "README.md").read_text()
        return "uploaded"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    model = adapter(lora_ext, folder)
    assert model.push_to_hub("adapter", commit_message="one", create_pr=True) == "uploaded"
    assert seen["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert seen["repo_id"] == "me/adapter" and seen["commit_message"] == "one"
    assert seen["create_pr"] is True and '"mine"' not in seen["card"]
    model.push_to_hub(
        repo_id="adapter", max_shard_size="5MB", tags=["mine"], safe_serialization=True
    )
    assert '"lora"' in seen["card"] and '"mine"' in seen["card"]


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> Path:
    """The hub's cache with the adapter in it: links from a snapshot to blobs."""
    place = tmp_path / "cache" / "models--owner--adapter"
    for sub in ("", "other/"):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            blob = place / "blobs" / f"{sub[:1]}{name[:9]}"
            link = place / "snapshots" / "abc" / sub / name
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes((folder / sub / name).read_bytes())
            link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    return tmp_path / "cache"


def test_ids_of_the_hub_are_found_in_its_cache(folder: Path, cache: Path) -> None:
    options: dict[str, Any] = {"cache_dir": str(cache), "local_files_only": True}
    model = LoraModel.from_pretrained(Net(), "owner/adapter", **options)
    assert torch.equal(model(TOKENS), adapter(lora_ext, folder)(TOKENS))
    model.load_adapter("owner/adapter", "second", subfolder="other", revision="main", **options)
    model.set_adapter("second")
    other = LoraModel.from_pretrained(Net(), folder / "other")
    assert torch.equal(model(TOKENS), other(TOKENS))
    config = LoraConfig.from_pretrained("owner/adapter", **options)
    assert config.modules_to_save == ["head"]
    with pytest.raises(AdapterFileError, match=r"Can't find 'adapter_config\.json' at 'owner/no'"):
        LoraModel.from_pretrained(Net(), "owner/no", **options)


@pytest.mark.parametrize("subfolder", ["../adapter", "/etc", 3])
def test_subfolders_stay_inside(folder: Path, subfolder: Any) -> None:
    for call in (lambda **o: LoraModel.from_pretrained(Net(), folder, **o), None):
        with pytest.raises(TypeError, match="subfolder: got"):
            if call is None:
                LoraConfig.from_pretrained(folder, subfolder=subfolder)
            else:
                call(subfolder=subfolder)


# What is wrong is said, and changes nothing


def unchanged(model: nn.Module, call: Callable[[], Any], error: type[Exception], text: str) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(error, match=text):
        call()
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], tensor) for key, tensor in before.items())


def test_state_dicts_that_do_not_fit_change_nothing(folder: Path) -> None:
    model = adapter(lora_ext, folder)
    state = {key: tensor + 1 for key, tensor in read(folder).items()}
    wrong = state | {f"{PREFIX}second.lora_A.weight": torch.ones(3, 8)}
    put = lora_ext.set_peft_model_state_dict
    unchanged(model, lambda: put(model, wrong), ValueError, r"size mismatch for .*second\.lora_A")
    unchanged(model, lambda: put(model, state, "no"), ValueError, "adapter_name: got 'no'")
    unchanged(model, lambda: put(model, {"a": 1}), TypeError, "peft_model_state_dict")
    with pytest.warns(UserWarning, match="size mismatch"):
        result = put(model, wrong, ignore_mismatched_sizes=True)
    now = lora_ext.get_peft_model_state_dict(model)
    kept = [key for key in state if not torch.equal(now[key], state[key])]
    assert kept == [f"{PREFIX}second.lora_A.weight"] and result.unexpected_keys == []
    del state[kept[0]]
    assert put(model, state).missing_keys == kept
    with pytest.raises(TypeError, match="model: got a Net without adapters"):
        put(Net(), state)


def test_a_file_that_does_not_fit_leaves_the_adapter_of_its_name(folder: Path) -> None:
    model = adapter(lora_ext, folder)
    narrow = read(folder) | {f"{PREFIX}second.lora_A.weight": torch.ones(3, 8)}
    save_file(narrow, folder / "adapter_model.safetensors")
    for call in (
        lambda: model.load_adapter(folder, "default"),
        lambda: lora_ext.hotswap_adapter(model, folder / "other", "no"),
    ):
        unchanged(model, call, ValueError, r"second\.lora_A|adapter_name: got 'no'")


def test_hotswap_refuses_what_it_cannot_do(folder: Path, tmp_path: Path) -> None:
    model = adapter(lora_ext, folder)
    swap = lora_ext.hotswap_adapter
    get_lora_model(Net(), config_of(lora_ext, r=3)).save_pretrained(tmp_path / "rank")
    get_lora_model(Net(), config_of(lora_ext, target_modules=["head"])).save_pretrained(
        tmp_path / "keys"
    )
    unchanged(model, lambda: swap(model, tmp_path / "rank", "default"), ValueError, "another rank")
    unchanged(model, lambda: swap(model, tmp_path / "keys", "default"), ValueError, "unexpected")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged in 'words'"):
        swap(model, folder / "other", "default")


def test_hotswap_of_fewer_layers_makes_the_others_zero(folder: Path, tmp_path: Path) -> None:
    part = config_of(lora_ext, target_modules=["first"], use_rslora=True, lora_alpha=4)
    source = get_lora_model(Net(), part).eval()
    source.save_pretrained(tmp_path / "part")
    model = get_lora_model(Net(), config_of(lora_ext)).eval()
    lora_ext.hotswap_adapter(model, tmp_path / "part", "default")
    torch.testing.assert_close(model(TOKENS), source(TOKENS))
    model.save_pretrained(tmp_path / "again")
    again = LoraModel.from_pretrained(Net(), tmp_path / "again")
    torch.testing.assert_close(again(TOKENS), source(TOKENS))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception]]] = {
    "mixed": (lambda: get_lora_model(Net(), config_of(lora_ext), mixed=True), NotBuiltError),
    "replace_lora_weights_loftq": (
        lambda: lora_ext.replace_lora_weights_loftq(Net()),
        TypeError,
    ),
    "state_dict": (
        lambda: lora_ext.inject_adapter_in_model(config_of(lora_ext), Net(), state_dict={}),
        ValueError,
    ),
    "ignore_mismatched_sizes": (
        lambda: lora_ext.load_peft_weights("x", ignore_mismatched_sizes=True),
        NotBuiltError,
    ),
    "multiplier": (
        lambda: lora_ext.rescale_adapter_scale(Net(), "1").__enter__(),
        TypeError,
    ),
    "LoraLayers": (lambda: lora_ext.rescale_adapter_scale(Net(), 1.0).__enter__(), ValueError),
    "torch_devise": (lambda: LoraModel.from_pretrained(Net(), "x", torch_devise="cpu"), TypeError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    call, error = REFUSED[name]
    with pytest.raises(error, match=name):
        call()


def test_deltas_of_dora_and_of_several_weights_are_refused() -> None:
    layer = lora_ext.nn.Linear(4, 4, r=2, use_dora=True)
    with pytest.raises(ValueError, match="scales the weight"):
        layer.get_delta_weight("default")
    attention = lora_ext.nn.MultiheadAttention(8, 2, r=2)
    with pytest.raises(NotBuiltError, match="several weights"):
        attention.get_delta_weight("default")


def test_a_delta_is_what_merging_adds() -> None:
    for make in (
        lambda **o: lora_ext.nn.Linear(6, 4, r=2, fan_in_fan_out=True, **o),
        lambda **o: lora_ext.nn.Conv2d(4, 6, 3, r=2, groups=2, **o),
        lambda **o: lora_ext.nn.Embedding(7, 5, r=2, **o),
    ):
        layer = make(init_lora_weights=False, dtype=torch.float64)
        before = layer.weight.detach().clone()
        delta = layer.get_delta_weight("default")
        assert torch.equal(layer.weight, before) and delta.abs().max() > 0
        layer.merge()
        torch.testing.assert_close(layer.weight.detach(), before + delta)


def test_training_is_prepared_as_in_peft() -> None:
    for lib in (peft, lora_ext):
        base, _ = BUILDERS["llama"]()
        base = base.to(torch.bfloat16)
        assert lib.prepare_model_for_kbit_training(base) is base
        assert {p.dtype for p in base.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in base.parameters())
    base, inputs = BUILDERS["llama"]()
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
