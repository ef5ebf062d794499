"""Programs written for PEFT that run with the import swapped, and what they get: the same as
there."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BUILDERS
from torch import nn

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError, NotBuiltError

PREFIX = "base_model.model."


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.words(tokens).mT).mT
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


TARGETS = ["words", "conv", "first", "second"]
TOKENS = torch.arange(10).view(2, 5)


def config_of(lib: Any, **fields: Any) -> Any:
    return lib.LoraConfig(
        **{"r": 2, "target_modules": TARGETS, "init_lora_weights": False, **fields}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter that PEFT wrote."""
    torch.manual_seed(1)
    model = peft.get_peft_model(Net(), config_of(peft, modules_to_save=["head"]))
    model.save_pretrained(tmp_path / "adapter")
    model.add_adapter("other", config_of(peft))
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["other"])
    return tmp_path / "adapter"


def adapter(lib: Any, folder: Path) -> Any:
    return lib.PeftModel.from_pretrained(Net(), str(folder)).eval()


def read(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


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
    results = []
    for lib in (peft, lora_ext):
        with warnings.catch_warnings():
            if lib is lora_ext:
                warnings.simplefilter("error", DeprecationWarning)
            where = tmp_path / lib.__name__
            source = where / "source"
            where.mkdir()
            os.system(f"cp -r '{folder}' '{source}'")
            results.append(PROGRAMS[name](lib, source, where / "out"))
    assert_same(*results)


def assert_same(theirs: Any, ours: Any) -> None:
    """Equal, but for rounding in tensors: sums of at most 30 products of float32, in another order
    of additions."""
    assert type(theirs) is type(ours) or isinstance(theirs, torch.Tensor)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    elif isinstance(theirs, dict):
        assert theirs.keys() == ours.keys()
        for key in theirs:
            assert_same(theirs[key], ours[key])
    elif isinstance(theirs, list | tuple):
        assert len(theirs) == len(ours)
        for one, other in zip(theirs, ours, strict=True):
            assert_same(one, other)
    else:
        assert theirs == ours


# Former names


FORMER: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "get_lora_model": (
        lambda m, _: get_lora_model(Net(), config=config_of(lora_ext)),
        "config is peft_config",
    ),
    "add_adapter": (
        lambda m, _: m.add_adapter("b", config=config_of(lora_ext)),
        "config is peft_config",
    ),
    "load_adapter": (lambda m, f: m.load_adapter(folder=f, adapter_name="b"), "folder is model_id"),
    "from_pretrained": (
        lambda m, f: LoraModel.from_pretrained(Net(), folder=f),
        "folder is model_id",
    ),
    "save_pretrained": (
        lambda m, f: m.save_pretrained(folder=f / "new", adapter_names="default"),
        "is (save_directory|selected_adapters)",
    ),
    "save_pretrained, by position": (
        lambda m, f: m.save_pretrained(f / "new", ["default"]),
        "selected_adapters=",
    ),
    "LoraConfig.from_pretrained": (
        lambda m, f: LoraConfig.from_pretrained(folder_or_file=f),
        "pretrained_model_name_or_path",
    ),
}


@pytest.mark.parametrize("name", FORMER)
def test_former_names_of_arguments_are_taken_with_a_warning(name: str, folder: Path) -> None:
    model = adapter(lora_ext, folder)
    call, text = FORMER[name]
    with pytest.warns(DeprecationWarning, match=text) as caught:
        call(model, folder)
    assert caught[0].filename == __file__


def test_an_argument_under_both_names_is_refused() -> None:
    config: Any = config_of(lora_ext)
    with pytest.raises(TypeError, match="got peft_config and config, its former name"):
        get_lora_model(Net(), peft_config=config, config=config)


def test_a_state_dict_with_the_former_keys_loads() -> None:
    model = get_lora_model(Net(), config_of(lora_ext))
    former = {k.replace(PREFIX, "base_model."): t + 1 for k, t in model.state_dict().items()}
    assert not any(key.startswith(PREFIX) for key in former)
    model.load_state_dict(former)
    now = model.state_dict()
    assert all(torch.equal(now[k.replace("base_model.", PREFIX)], t) for k, t in former.items())
    base, _ = BUILDERS["llama"]()  # a model with a child `model`
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    former = {"base_model." + k.removeprefix(PREFIX): t for k, t in model.state_dict().items()}
    assert "base_model.model.embed_tokens.weight" in former
    model.load_state_dict(former)


def test_base_model_still_stands_for_the_model() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_lora_model(net, LoraConfig(r=2, target_modules=["0"]))
    assert model.base_model[0] is net[0] and len(model.base_model) == 2
    assert list(model.base_model) == list(net) and model.base_model
    replaced = nn.Linear(4, 4)
    setattr(model.base_model, "1", replaced)
    assert net[1] is replaced and model.base_model.active_adapter == "default"
    model.base_model.training = False
    assert net.training


# What the wrappers do


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_models_of_transformers_are_pefts_models_too(task: str | None, copied: Any) -> None:
    base, inputs = BUILDERS["llama"]()
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type=task))
    expected = peft.PeftModelForCausalLM if task else peft.PeftModel
    assert isinstance(model, expected) and isinstance(model, LoraModel)
    assert type(model).__name__ == ("PeftModelForCausalLM" if task else "LoraModel")
    again = copied(model)
    assert type(again) is type(model)
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)
    assert again.base_model.peft_config is again.peft_config is not model.peft_config
    again.set_scale("default", 3.0)
    assert model.get_layer_status()[0].scaling["default"] == 1.0 * 8 / 2
    # No method of PEFT's class runs that this package has of its own.
    for name in ("forward", "save_pretrained", "load_adapter", "merge_adapter", "peft_config"):
        owner = next(kind for kind in type(model).__mro__ if name in vars(kind))
        assert owner.__module__.startswith(("lora_ext.", "torch.")) or name == "merge_adapter"


@pytest.mark.parametrize(
    ("builder", "task", "kind"),
    [
        ("t5", "SEQ_2_SEQ_LM", "PeftModelForSeq2SeqLM"),
        ("bert_classifier", "SEQ_CLS", "PeftModelForSequenceClassification"),
        ("bert", "FEATURE_EXTRACTION", "PeftModelForFeatureExtraction"),
        ("llama", "CAUSAL_LM", "PeftModelForCausalLM"),
    ],
)
def test_the_class_is_that_of_the_task(builder: str, task: str, kind: str, tmp_path: Path) -> None:
    base, inputs = BUILDERS[builder]()
    targets = ["q", "query", "q_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, target_modules=targets, task_type=task, init_lora_weights=False)
        model = get_lora_model(base, config).eval()
        assert type(model).__name__ == kind and isinstance(model, getattr(lora_ext, kind))
        model.save_pretrained(tmp_path)
        again = LoraModel.from_pretrained(BUILDERS[builder]()[0], tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_a_model_without_input_ids_keeps_its_own_arguments() -> None:
    model = get_lora_model(Net(), config_of(lora_ext, task_type="CAUSAL_LM"))
    assert type(model) is LoraModel and model(TOKENS).shape == (2, 5, 3)


def test_generate_follows_the_generation_config_of_the_wrapper() -> None:
    base, inputs = BUILDERS["llama"]()
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tokens = inputs["input_ids"]
    for new in (2, 5):
        changed = copy.deepcopy(model.generation_config)
        changed.max_new_tokens = changed.min_new_tokens = new
        model.generation_config = changed
        result = model.generate(input_ids=tokens, do_sample=False)
        assert result.shape[1] == tokens.shape[1] + new


@pytest.mark.parametrize("argument", ["adapter_names", "alora_offsets"])
def test_arguments_of_pefts_own_are_refused_by_name(argument: str) -> None:
    base, inputs = BUILDERS["llama"]()
    model = get_lora_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert model(**inputs, **{argument: None}).loss is not None
    with pytest.raises(NotBuiltError, match=argument):
        model(**inputs, **{argument: ["default", "__base__"]})
    with pytest.raises(NotBuiltError, match=argument):
        model.generate(**inputs, **{argument: ["default"]})


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
        return "uploaded"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    model = adapter(lora_ext, folder)
    assert model.push_to_hub("adapter", commit_message="one", create_pr=True) == "uploaded"
    assert seen["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert seen["repo_id"] == "me/adapter" and seen["commit_message"] == "one"
    assert seen["create_pr"] is True


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
    "prepare_model_for_compiled_hotswap": (
        lambda: lora_ext.prepare_model_for_compiled_hotswap(Net()),
        NotBuiltError,
    ),
    "replace_lora_weights_loftq": (
        lambda: lora_ext.replace_lora_weights_loftq(Net()),
        NotBuiltError,
    ),
    "state_dict": (
        lambda: lora_ext.inject_adapter_in_model(config_of(lora_ext), Net(), state_dict={}),
        NotBuiltError,
    ),
    "ephemeral_gpu_offload": (
        lambda: LoraModel.from_pretrained(Net(), "x", ephemeral_gpu_offload=True),
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
