"""Merging one tensor at a time: the same bits as in memory, in the memory of two tensors, and
continued after a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import failed, run
from measured import attempt
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import tiny_models
import transformers
from cli_places import randomise

import lora_ext.adapters.streamed_merge as streamed
from lora_ext import LoraConfig, LoraModel
from lora_ext.cli.by_name import model_of
from lora_ext.errors import AdapterFileError
from lora_ext.io import CONFIG_NAME, TensorSpec, open_tensors, save_adapter
from lora_ext.io.adapter_file import read_header
from lora_ext.io.tensor_writer import write_tensors
from lora_ext.io.whole_folder import SUFFIX, resumed_folder

INDEX = "model.safetensors.index.json"
SHARDS = 4


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        own, other = (one.reshape(-1).view(torch.uint8) for one in (found[key], tensor))
        assert torch.equal(own, other), key


# Bit for bit what is merged in memory


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora, ranks, alphas": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"o_proj": 3},
        "alpha_pattern": {"up_proj": 5},
    },
    "dora": {"target_modules": ["q_proj", "gate_proj"], "use_dora": True},
    "olmo-like layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "lora_bias": {"target_modules": ["k_proj"], "lora_bias": True},
    "alora": {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bits_as_in_memory(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    with_bias = name == "lora_bias"
    base, _ = tiny_models.llama(attention_bias=with_bias)
    base.to(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")  # type: ignore[operator]
    assert (tmp_path / "base" / INDEX).exists()
    lora = randomise(LoraModel(base, LoraConfig(r=4, lora_alpha=8, **CONFIGS[name])))
    lora.save_pretrained(tmp_path / "adapter")
    if name == "alora":  # which no weight can hold
        says = failed("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert "alora" in says.lower() and not (tmp_path / "out").exists()
        assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
        return
    data = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json").json()
    assert data["loaded"] is None and len(data["layers"]) == len(list(lora.lora_layers()))
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    assert_same_bits(contents(tmp_path / "out"), expected)
    changed = [k for k, t in contents(tmp_path / "base").items() if not torch.equal(t, expected[k])]
    assert len(changed) == len(data["layers"]) * (2 if with_bias else 1)
    # The same shards, and what else is in the folder.
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    former = json.loads((tmp_path / "base" / INDEX).read_text())
    assert index["weight_map"] == former["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "base"))
    # And by names alone.
    for path in ("config.json", "generation_config.json"):
        (tmp_path / "base" / path).unlink(missing_ok=True)
    data = run(
        "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "again", "--json"
    ).json()
    assert data["loaded"] is None
    assert_same_bits(contents(tmp_path / "again"), expected)


def gpt2() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.gpt2()[0], {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}


def mixtral() -> tuple[torch.nn.Module, dict[str, Any]]:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = transformers.MixtralConfig(
        **tiny_models.TEXT,
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
    )
    model = transformers.MixtralForCausalLM(config)
    return model, {"target_modules": [], "target_parameters": targets}


def bert() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.bert()[0], {"target_modules": ["query", "dense"]}


def tied_head() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.llama(tie_word_embeddings=True)[0], {"target_modules": ["q_proj", "lm_head"]}


def tied_elsewhere() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.llama(tie_word_embeddings=True)[0], {"target_modules": ["q_proj"]}


def saved() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.llama()[0], {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}


def tokens() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.llama()[0], {"target_modules": ["q_proj"], "trainable_token_indices": [3]}


def biases() -> tuple[torch.nn.Module, dict[str, Any]]:
    base = tiny_models.llama(attention_bias=True)[0]
    return base, {"target_modules": ["q_proj"], "bias": "lora_only"}


def pissa() -> tuple[torch.nn.Module, dict[str, Any]]:
    return tiny_models.llama()[0], {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}


def replicated() -> tuple[torch.nn.Module, dict[str, Any]]:
    ranges = [[0, 2], [1, 3]]
    return tiny_models.llama()[0], {"target_modules": ["q_proj"], "layer_replication": ranges}


# Which base and adapter, and why the model is loaded for it.
MODELS: dict[str, tuple[Callable[[], tuple[torch.nn.Module, dict[str, Any]]], str | None]] = {
    "gpt2": (gpt2, None),
    "bert": (bert, None),
    "tied elsewhere": (tied_elsewhere, None),
    "mixtral": (mixtral, "which no file has under this name"),
    "tied head": (tied_head, "lm_head|tied"),
    "modules_to_save": (saved, "modules_to_save"),
    "tokens": (tokens, "trainable_token_indices"),
    "bias": (biases, "bias of the adapter"),
    "pissa": (pissa, "init_lora_weights='pissa'"),
    "layer_replication": (replicated, "layer_replication"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_what_names_do_not_tell_is_loaded_and_says_why(tmp_path: Path, name: str) -> None:
    make, why = MODELS[name]
    torch.manual_seed(0)
    base, fields = make()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    lora = LoraModel(base, LoraConfig(r=2, lora_alpha=4, **fields))
    randomise(lora).save_pretrained(tmp_path / "adapter")
    data = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json").json()
    if why is None:
        assert data["loaded"] is None
    else:
        assert any(one in data["loaded"] for one in why.split("|")), data["loaded"]
    if name in ("pissa", "layer_replication"):  # compared elsewhere, by what the model computes
        return
    merged = lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "expected")
    assert_same_bits(contents(tmp_path / "out"), contents(tmp_path / "expected"))


def test_files_in_another_dtype_than_the_models_are_loaded(tmp_path: Path) -> None:
    base, _ = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    randomise(LoraModel(base, LoraConfig(r=2, target_modules=["q_proj"]))).save_pretrained(
        tmp_path / "adapter"
    )
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, file, {"format": "pt"})
    data = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json").json()
    assert "another dtype" in data["loaded"]


def test_what_the_model_does_not_have_is_copied(tmp_path: Path) -> None:
    """As the buffers that older versions of transformers saved."""
    base, _ = tiny_models.llama()
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    lora = LoraModel(base, LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(lora).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "base" / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    save_file(load_file(file) | buffer, file, {"format": "pt"})
    data = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--json").json()
    assert data["loaded"] is None
    expected = dict(lora.merge_and_unload().state_dict()) | buffer
    assert_same_bits(contents(tmp_path / "out"), expected)


def test_nan_leaves_nothing(tmp_path: Path) -> None:
    base = big_base(tmp_path, 64)
    file = base / "model-00003-of-00004.safetensors"
    tensors = load_file(file)
    tensors["layers.2.b.weight"][3, 4] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    says = failed("merge", base, tmp_path / "adapter", tmp_path / "out")
    assert "layers.2.b" in says and "NaN" in says
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


# Four shards of a model


def big_base(tmp_path: Path, size: int, r: int = 2) -> Path:
    """Two matrices in each shard, of which the adapter changes one and b of the third, too."""
    torch.manual_seed(0)
    base, weight_map = tmp_path / "base", {}
    base.mkdir()
    adapter = {}
    for i in range(SHARDS):
        name = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {f"layers.{i}.{one}.weight": torch.randn(size, size) for one in "ab"}
        save_file(tensors, base / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        for one in "ab" if i == 2 else "a":
            where = f"base_model.model.layers.{i}.{one}"
            adapter[f"{where}.lora_A.weight"] = torch.randn(r, size)
            adapter[f"{where}.lora_B.weight"] = torch.randn(size, r)
    (base / INDEX).write_text(json.dumps({"metadata": {"note": "x"}, "weight_map": weight_map}))
    (base / "tokenizer.model").write_bytes(b"a tokenizer")
    names = sorted({key.removeprefix("base_model.model.").partition(".lora")[0] for key in adapter})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 3, "target_modules": names}
    save_adapter(tmp_path / "adapter", config, adapter)
    return base


@contextmanager
def outlined(tmp_path: Path) -> Iterator[tuple[LoraModel, dict[str, Any]]]:
    with ExitStack() as stack:
        files = {
            path.name: stack.enter_context(open_tensors(path))
            for path in sorted((tmp_path / "base").glob("*.safetensors"))
        }
        tensors = {
            k: torch.empty(s.shape) for file in files.values() for k, s in file.specs.items()
        }
        shapes = {
            key: spec.shape
            for key, spec in read_header(tmp_path / "adapter" / "adapter_model.safetensors").items()
        }
        lora = LoraModel.from_pretrained(model_of(tensors, shapes, "base"), tmp_path / "adapter")
        assert streamed.why_not_streamed(lora, files) is None
        yield lora, files


def merge(tmp_path: Path) -> None:
    with outlined(tmp_path) as (lora, files):
        streamed.merge_files(lora, files, tmp_path / "adapter", tmp_path / "out")


def in_memory(tmp_path: Path) -> dict[str, torch.Tensor]:
    tensors = contents(tmp_path / "base")
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
    }
    lora = LoraModel.from_pretrained(model_of(tensors, shapes, "base"), tmp_path / "adapter")
    return dict(lora.merge_and_unload().state_dict())


def test_memory_is_that_of_two_tensors(tmp_path: Path) -> None:
    """Of 32 MiB each, beyond what merging a tiny base takes for its code; eight are 256 MiB. Eight
    MiB are for the adapter (1 MiB, in the file and in the model), blocks, and what allocators keep.
    """
    size = 2912  # more than 32 MiB: what glibc gives back to the system at once
    peaks = []
    for name, one in (("tiny", 16), ("big", size)):
        (tmp_path / name).mkdir()
        big_base(tmp_path / name, one)
        outcome = attempt(lambda name=name: merge(tmp_path / name), patience=60)  # type: ignore[misc]
        assert outcome.error == ""
        peaks.append(outcome.extra_bytes)
    tensor = size * size * 4
    assert peaks[1] - peaks[0] < 2 * tensor + (8 << 20), [peak >> 20 for peak in peaks]
    assert peaks[1] - peaks[0] > tensor  # or what was measured is not this
    assert_same_bits(contents(tmp_path / "big" / "out"), in_memory(tmp_path / "big"))


def test_memory_of_a_model_of_transformers(tmp_path: Path) -> None:
    """The same of a folder with a config.json, whose model is made as an outline: 270 MiB, of which
    the largest tensor has 36. Smaller ones stay with the allocator."""
    peaks = []
    for name, hidden in (("tiny", 32), ("big", 1536)):
        config = transformers.LlamaConfig(
            **tiny_models.TEXT,
            **{"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2},
        )
        base = transformers.LlamaForCausalLM(config)
        base.save_pretrained(tmp_path / name, max_shard_size="40MB")  # type: ignore[operator]
        adapter = tmp_path / f"{name} adapter"
        lora = LoraModel(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        randomise(lora).save_pretrained(adapter)
        arguments = ("merge", tmp_path / name, adapter, tmp_path / f"{name} out", "--json")
        run("verify", adapter, "--model", tmp_path / name)  # imports all of it before the fork
        outcome = attempt(lambda given=arguments: run(*given).json(), patience=60)  # type: ignore[misc]
        assert outcome.error == ""
        peaks.append(outcome.extra_bytes)
        expected = dict(lora.merge_and_unload().state_dict())
        assert_same_bits(contents(tmp_path / f"{name} out"), expected)
    assert peaks[1] - peaks[0] < 2 * (36 << 20) + (24 << 20), [peak >> 20 for peak in peaks]


def test_50_kills_at_random_moments(tmp_path: Path) -> None:
    """Whatever moment a merge is killed at, OUT is not there, and the next one goes on: all is as
    in memory, and no finished shard is written twice."""
    big_base(tmp_path, 512)
    expected = in_memory(tmp_path)
    out, seed = tmp_path / "out", random.Random(0)
    start = time.monotonic()
    merge(tmp_path)
    whole = time.monotonic() - start
    shutil.rmtree(out)
    kills = complete = went_on = 0
    finished: dict[Path, int] = {}
    while kills < 50:
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                merge(tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
        time.sleep(seed.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if out.exists():  # all of it
            assert_same_bits(contents(out), expected)
            assert len(list(out.iterdir())) == SHARDS
            assert not list(tmp_path.glob(f".out{SUFFIX}*"))
            shutil.rmtree(out)
            complete, finished = complete + 1, {}
            kills += os.WIFSIGNALED(status)
            continue
        assert os.WIFSIGNALED(status)
        kills += 1
        left = list(tmp_path.glob(f".out{SUFFIX}*/model*.safetensors"))
        now = {path: path.stat().st_mtime_ns for path in left}
        went_on += bool(finished) and finished.items() <= now.items()
        assert finished.items() <= now.items()  # finished ones stay, and are not written again
        finished = now
    merge(tmp_path)
    assert_same_bits(contents(out), expected)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]
    print(f"{kills} kills, {went_on} after one that had finished shards, {complete} merges ended")
    assert went_on >= 3  # or the kills missed what they are for


class Killed(Exception):
    pass


def killed_after(tmp_path: Path, shards: int) -> Path:
    """The partial folder of a merge that was killed after so many shards."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            written = []

            def write(path: Path, *arguments: Any) -> None:
                if len(written) == shards:
                    path.write_bytes(b"half")
                    os.kill(os.getpid(), signal.SIGKILL)
                written.append(path)
                write_tensors(path, *arguments)

            streamed.write_tensors = write
            merge(tmp_path)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (folder,) = tmp_path.glob(f".out{SUFFIX}*")
    assert len(list(folder.glob("model*"))) == shards and len(list(folder.glob(".model*"))) == 1
    return folder


def test_a_killed_merge_goes_on_after_its_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big_base(tmp_path, 64)
    folder = killed_after(tmp_path, 3)
    written = []

    def write(path: Path, *arguments: Any) -> None:
        written.append(path.name)
        write_tensors(path, *arguments)

    monkeypatch.setattr(streamed, "write_tensors", write)
    merge(tmp_path)
    assert written == [".model-00004-of-00004.safetensors"] and not folder.exists()
    assert_same_bits(contents(tmp_path / "out"), in_memory(tmp_path))
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").iterdir()} == {"0o644"}


@pytest.mark.parametrize("what", ["base", "adapter", "config"])
def test_another_base_or_adapter_begins_again(tmp_path: Path, what: str) -> None:
    big_base(tmp_path, 64)
    killed_after(tmp_path, 2)
    if what == "base":
        file = tmp_path / "base" / "model-00001-of-00004.safetensors"
        save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file)
    elif what == "adapter":
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file)
    else:
        file = tmp_path / "adapter" / CONFIG_NAME
        file.write_text(file.read_text().replace('"lora_alpha": 3', '"lora_alpha": 4'))
    merge(tmp_path)
    assert_same_bits(contents(tmp_path / "out"), in_memory(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]


def test_a_merge_in_memory_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    from lora_ext.io import new_folder

    big_base(tmp_path, 64)
    folder = killed_after(tmp_path, 1)
    with new_folder(tmp_path / "out") as other:
        assert not folder.exists() and other.exists()


def test_two_at_the_same_work_exclude_each_other(tmp_path: Path) -> None:
    with resumed_folder(tmp_path / "out", "ab") as folder:
        (folder / "x").write_text("x")
        with pytest.raises(FileExistsError, match="another process"):
            with resumed_folder(tmp_path / "out", "ab"):
                pass
        with resumed_folder(tmp_path / "other", "ab"):
            pass
    assert (tmp_path / "out" / "x").read_text() == "x"
    with pytest.raises(FileExistsError, match="is there already"):
        with resumed_folder(tmp_path / "out", "ab"):
            pass


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    for error in (Killed, KeyboardInterrupt):
        with pytest.raises(error):
            with resumed_folder(tmp_path / "out", "ab") as folder:
                (folder / "x").write_text("x")
                raise error
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_what_was_announced(tmp_path: Path) -> None:
    specs = {
        "a": TensorSpec((2, 3), frozenset({torch.bfloat16})),
        "none": TensorSpec((0, 5), frozenset({torch.float32})),
        "b": TensorSpec((), frozenset({torch.int64})),
    }
    values = {
        "a": torch.randn(2, 3, dtype=torch.bfloat16),
        "none": torch.empty(0, 5),
        "b": torch.tensor(7),
    }
    told: list[int] = []
    write_tensors(tmp_path / "x.safetensors", specs, lambda key: [values[key]], told.append)
    assert_same_bits(load_file(tmp_path / "x.safetensors"), values)
    assert sum(told) == 2 * 6 + 8
    with pytest.raises(ValueError, match="a: got 6 bytes, expected 12"):
        write_tensors(tmp_path / "y", specs, lambda key: [values[key].reshape(-1)[:3]])
    with pytest.raises(ValueError, match=r"a: got torch.float32, expected torch.bfloat16"):
        write_tensors(tmp_path / "y", specs, lambda key: [values[key].float()])


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    base = big_base(tmp_path, 8)
    shutil.copyfile(base / "model-00001-of-00004.safetensors", base / "copy.safetensors")
    assert "is in two of its files" in failed("merge", base, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(AdapterFileError):
        streamed.why_not_outlined(base)
