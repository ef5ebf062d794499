"""A merge of one tensor at a time: in the memory of two tensors, and continued after a kill."""

from __future__ import annotations

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
from cli_runs import run
from measured import attempt
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import tiny_models
import transformers
from cli_places import randomise
from test_streaming_merge import SHARDS, assert_same_bits, big_base, contents

import lora_ext.adapters.streamed_merge as streamed
from lora_ext import LoraConfig, LoraModel
from lora_ext.cli.by_name import model_of
from lora_ext.io import CONFIG_NAME, TensorSpec, open_tensors, whole_folder
from lora_ext.io.adapter_file import read_header
from lora_ext.io.tensor_writer import write_tensors
from lora_ext.io.whole_folder import SUFFIX, resumed_folder


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

    def begin() -> int:
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                merge(tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
        return child

    start = time.monotonic()
    _, status = os.waitpid(begin(), 0)
    assert status == 0
    whole = time.monotonic() - start  # in a child, where it takes longer
    shutil.rmtree(out)
    kills = complete = went_on = 0
    finished: dict[Path, int] = {}
    while kills < 50 or (went_on < 3 and kills < 500):
        child = begin()
        time.sleep(seed.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        whole *= 0.9 if out.exists() else 1.1  # other processes come and go
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


def killed_after(tmp_path: Path, shards: int, merge: Callable[[Path], object] = merge) -> Path:
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


def test_the_command_says_that_it_went_on(tmp_path: Path) -> None:
    base, adapter, out = big_base(tmp_path, 64), tmp_path / "adapter", tmp_path / "out"
    killed_after(tmp_path, 3, lambda _: run("merge", base, adapter, out))
    done = run("merge", base, adapter, out)
    assert done.code == 0 and "3 files of a merge that was killed" in done.out
    shutil.rmtree(out)
    assert run("merge", base, adapter, out, "--json").json()["kept"] == 0


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


def test_files_beside_the_weights_are_those_of_the_last_call(tmp_path: Path) -> None:
    """Changed, added or deleted after a merge was killed that had copied them already."""
    big_base(tmp_path, 64)
    base, out = tmp_path / "base", tmp_path / "out"
    for name in ("tokenizer.json", "chat.txt"):
        (base / name).write_text("former")
    arguments = ("merge", base, tmp_path / "adapter", out)
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            whole_folder._appear = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            run(*arguments)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (folder,) = tmp_path.glob(f".out{SUFFIX}*")
    assert {"tokenizer.json", "chat.txt"} <= set(os.listdir(folder))
    (base / "tokenizer.json").write_text("now")
    (base / "chat.txt").unlink()
    assert run(*arguments).code == 0
    assert (out / "tokenizer.json").read_text() == "now" and not (out / "chat.txt").exists()
    assert_same_bits(contents(out), in_memory(tmp_path))


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
