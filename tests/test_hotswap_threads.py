"""Calls and changes of adapters in other threads: a call sees one adapter or the other in all
layers, and no change undoes another."""

from __future__ import annotations

import contextvars
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from swapped_models import CAPACITY, X, config, loaded, net, prepared, save_folders, saved
from torch import Tensor

import lora_ext
from lora_ext import LoraModel


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return save_folders(tmp_path)


def under_load(model: LoraModel, change: Any, seconds: float) -> list[Tensor]:
    """The results of sixteen threads of calls, while `change(i)` is called again and again."""
    results: list[Tensor] = []
    failures: list[BaseException] = []
    end = time.monotonic() + seconds

    def calls() -> None:
        try:
            with torch.no_grad():
                while time.monotonic() < end:
                    results.append(model(X))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=calls) for _ in range(16)]
    for thread in threads:
        thread.start()
    changed = 0
    while time.monotonic() < end:
        change(changed)
        changed += 1
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert changed > 3 and len(results) > 32
    return results


@pytest.mark.parametrize("kind", ["swap", "set_adapter", "set_adapters"])
def test_sixteen_threads_see_one_or_the_other(folders: list[Path], kind: str) -> None:
    model = LoraModel.from_pretrained(net(), folders[0]).eval()
    lora_ext.prepare_model_for_compiled_hotswap(model, target_rank=CAPACITY)
    model.load_adapter(str(folders[1]), "other")
    for name in ("1", "3"):
        model.get_base_model()[int(name)].register_forward_hook(
            lambda module, args, y: time.sleep(0.0005)
        )
    with torch.no_grad():
        model.set_adapters(["default"])
        first = model(X)
        model.set_adapters(["other"])
        second = model(X)
    model.set_adapters(["default"])

    def change(i: int) -> None:
        if kind == "swap":
            lora_ext.hotswap_adapter(model, folders[(i + 1) % 2], "default")
        elif kind == "set_adapter":
            model.set_adapter(["default", "other"][(i + 1) % 2])
        else:
            model.set_adapters(["default", "other"][(i + 1) % 2], 1.0)

    for y in under_load(model, change, 1.5):
        errors = [float((y - wanted).abs().max()) for wanted in (first, second)]
        assert min(errors) < 1e-5, errors


def test_loading_into_the_name_that_runs(tmp_path: Path) -> None:
    sources = [saved(tmp_path / str(i), 4, 8, seed=i) for i in range(2)]
    model = loaded(sources[0])
    for name in ("1", "3"):
        model.get_base_model()[int(name)].register_forward_hook(
            lambda module, args, y: time.sleep(0.0005)
        )
    with torch.no_grad():
        wanted = [loaded(source)(X) for source in sources]
    for y in under_load(model, lambda i: model.load_adapter(sources[i % 2], "default"), 1.5):
        errors = [float((y - one).abs().max()) for one in wanted]
        assert min(errors) < 1e-5, errors


def test_a_request_of_several_calls(folders: list[Path]) -> None:
    model = prepared(folders[0])
    order: list[str] = []
    inside = threading.Event()

    def request() -> None:
        with model.request():
            inside.set()
            time.sleep(0.1)
            model(X)
            order.append("request")

    thread = threading.Thread(target=request)
    thread.start()
    inside.wait()
    model.set_scale("default", 2.0)
    order.append("change")
    thread.join()
    assert order == ["request", "change"]


def test_threads_in_a_copy_of_its_context_belong_to_a_request(folders: list[Path]) -> None:
    """Also when a change waits for its end; a copy that is left over does not."""
    model = prepared(folders[0])
    other = prepared(folders[1])
    results: list[Tensor] = []

    def in_thread(context: contextvars.Context) -> threading.Thread:
        thread = threading.Thread(target=lambda: results.append(context.run(model, X)))
        thread.start()
        return thread

    change = threading.Thread(target=lambda: model.set_scale("default", 2.0))
    with torch.no_grad():
        before = model(X)
    with model.request(), other.request():
        change.start()
        while model._requests._changer is None:
            time.sleep(0.001)
        threads = [in_thread(contextvars.copy_context()) for _ in range(3)]
        kept = contextvars.copy_context()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert change.is_alive() and all(torch.equal(y.detach(), before) for y in results)
    change.join(20)
    assert not change.is_alive()
    done = threading.Event()

    def slow_change() -> None:
        with model.changing():
            done.wait(20)

    change = threading.Thread(target=slow_change)
    change.start()
    while model._requests._changer is None:
        time.sleep(0.001)
    late = in_thread(kept)
    late.join(0.2)
    assert late.is_alive()
    done.set()
    late.join(20)
    change.join(20)
    assert not late.is_alive()


def test_changes_inside_of_a_call_wait_for_nobody(folders: list[Path]) -> None:
    model = prepared(folders[0])
    hook = model.get_base_model()[1].register_forward_hook(
        lambda *_: model.set_scale("default", 1.0)
    )
    threads = [threading.Thread(target=lambda: model(X)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    hook.remove()


def test_an_exception_in_a_call_ends_it(folders: list[Path]) -> None:
    model = prepared(folders[0])
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.randn(5, 3))
    done = threading.Thread(target=lambda: model.set_scale("default", 1.5))
    done.start()
    done.join(timeout=10)
    assert not done.is_alive()


def test_adapters_that_threads_load_at_once_are_all_there(folders: list[Path]) -> None:
    """In every layer: of two drafts of one layer the second would undo the first."""
    model = loaded(folders[0])

    def load(thread: int) -> None:
        for i in range(4):
            model.load_adapter(folders[i], f"{thread}_{i}")
            model.add_adapter(f"{thread}_{i}_new", config(2, 2))

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {"default"}
    names |= {f"{t}_{i}{end}" for t in range(4) for i in range(4) for end in ("", "_new")}
    assert set(model.peft_config) == names
    for name, layer in model.lora_layers():
        assert set(layer.adapters) == names, name
        for one in names:
            assert layer.parts(one)["lora_A"] is not None, (name, one)


def test_loading_undoes_no_change_of_another_thread(folders: list[Path]) -> None:
    """A change comes when the drafts of a new adapter are there: it waits, calls do not."""
    model = loaded(folders[0])
    drafted, done = threading.Event(), threading.Event()
    layer = model.get_base_model()[0]
    original = type(layer).add_adapter

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        drafted.set()
        model_called = threading.Thread(target=lambda: model(X))
        model_called.start()
        model_called.join(20)
        assert not model_called.is_alive(), "calls wait for an adapter that is loaded"
        done.wait(0.3)  # in vain: the change waits for the adapter
        return original(self, *args, **kwargs)

    def change() -> None:
        drafted.wait()
        model.set_scale("default", 3.0)
        done.set()

    thread = threading.Thread(target=change)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "add_adapter", slow)
        model.load_adapter(folders[1], "other")
    thread.join()
    for name, one in model.lora_layers():
        assert one.get_scale("default") == 3 * one.adapters["default"].scaling, name
        assert "other" in one.adapters, name
