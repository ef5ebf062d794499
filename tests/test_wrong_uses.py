"""Uses that are wrong in other ways than test_wrong_arguments.py tries: names of arguments that
there are not, and what torch or Python would refuse in words of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_ext
from lora_ext import LoraConfig, io, loralib
from lora_ext import nn as lora

T = torch.zeros


def adapted() -> lora_ext.LoraModel:
    return lora_ext.get_lora_model(
        nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"])
    )


def attention(*sizes: int) -> lora.MultiheadAttention:
    return lora.MultiheadAttention(*sizes, r=2)


NAMES: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "config": (LoraConfig, {"rank": 4}, "LoraConfig: rank: unknown, did you mean r?"),
    "config, a typo": (
        LoraConfig,
        {"target_module": ["q"]},
        "LoraConfig: target_module: unknown, did you mean target_modules?",
    ),
    "settings": (
        lora.AdapterSettings,
        {"alpha": 4},
        "AdapterSettings: alpha: unknown, did you mean lora_alpha?",
    ),
    "linear": (
        lambda **k: lora.Linear(4, 4, **k),
        {"lora_r": 2},
        "Linear: lora_r: unknown, did you mean r?",
    ),
    "embedding": (
        lambda **k: lora.Embedding(4, 4, **k),
        {"padding": 1},
        "Embedding: padding: unknown, did you mean padding_idx?",
    ),
    "convolution": (
        lambda **k: lora.Conv2d(4, 4, 3, **k),
        {"dropout": 0.1},
        "Conv2d: dropout: unknown, did you mean lora_dropout?",
    ),
    "merged": (
        lambda **k: lora.MergedLinear(4, 6, **k),
        {"nothing_like_it": 1},
        "MergedLinear: nothing_like_it: unknown, expected some of ['in_features', ",
    ),
    "attention": (
        lambda **k: lora.MultiheadAttention(4, 2, **k),
        {"alpha": 1},
        "MultiheadAttention: alpha: unknown, did you mean lora_alpha?",
    ),
}


@pytest.mark.parametrize(("make", "arguments", "message"), NAMES.values(), ids=NAMES)
def test_an_unknown_name_says_which_one_may_be_meant(
    make: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError) as caught:
        make(**arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "call",
    [
        lambda: lora_ext.LoraConfig(nothing_like_it=1),
        lambda: lora_ext.nn.Linear(4, 4).add_adapter("a", nothing_like_it=1),
        lambda: lora_ext.replace_linear(nn.Sequential(nn.Linear(4, 4)), ["0"], nothing_like_it=1),
    ],
    ids=["LoraConfig", "add_adapter", "replace_linear"],
)
def test_what_the_package_fills_itself_is_not_suggested(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="nothing_like_it: unknown, expected some of") as caught:
        call()
    internal = ("unknown_fields", "absent_fields", "'weights'", "blocks_of", "ungrouped_lora_A")
    assert "'lora_alpha'" in str(caught.value) and "'use_dora'" in str(caught.value)
    assert not any(name in str(caught.value) for name in internal)


def test_a_dict_with_an_unknown_name_says_so() -> None:
    with pytest.warns(UserWarning, match=r"\['rank'\].*did you mean r\?$"):
        LoraConfig.from_dict({"rank": 4})


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype, a text": (lambda: lora.Linear(4, 4, r=2, dtype="float32"), "Linear: dtype: got 'float"),  # type: ignore[arg-type]
    "dtype of integers": (
        lambda: lora.Conv1d(4, 4, 3, r=2, dtype=torch.int8),
        "Conv1d: dtype: got torch.int8, expected a floating torch.dtype",
    ),
    "device": (
        lambda: lora.Embedding(4, 4, device="gpu"),
        "Embedding: device: got 'gpu', expected",
    ),
    "device of the base": (
        lambda: lora.MultiheadAttention(4, 2, r=2, device="gpu"),
        "MultiheadAttention: device: got 'gpu', expected",
    ),
    "bias": (lambda: lora.Linear(4, 4, bias="no"), "Linear: bias: got 'no', expected True or"),  # type: ignore[arg-type]
    "merge_weights": (
        lambda: lora.Linear(4, 4, merge_weights=None),  # type: ignore[arg-type]
        "Linear: merge_weights: got None, expected True or False",
    ),
    "padding_idx": (
        lambda: lora.Embedding(4, 4, r=2, padding_idx=9),
        "Embedding: padding_idx: got 9, expected an integer from -4 to 3, or None",
    ),
    "heads": (lambda: attention(4, 3), "MultiheadAttention: embed_dim: got 4 with num_heads 3, ex"),
    "query": (
        lambda: attention(4, 2)(None, None, None),
        "MultiheadAttention: query: got None, expected a torch.Tensor",
    ),
    "channels": (
        lambda: lora.Conv2d(3, 3, 3, r=2)(T(2, 4, 8, 8)),
        "Conv2d: x: got shape [2, 4, 8, 8], expected [batch, 3, height, width]",
    ),
    "dimensions": (
        lambda: lora.Conv1d(3, 3, 3, r=2)(T(3)),
        "Conv1d: x: got shape [3], expected [batch, 3, length], or that without batch",
    ),
    "input of doubles": (
        lambda: lora.Conv2d(3, 3, 3, r=2)(T(3, 8, 8).double()),
        "Conv2d: x: got dtype torch.float64, expected torch.float32",
    ),
    "input of numpy, DoRA": (
        lambda: lora.Conv2d(3, 3, 3, r=2, use_dora=True)(np.ones((3, 8, 8))),
        "Conv2d: x: got a numpy.ndarray, expected a torch.Tensor",
    ),
    "weights": (
        lambda: lora.AnyLayer.from_module(nn.GRU(4, 4), 3),  # type: ignore[arg-type]
        "AnyLayer: weights: got 3, expected a name or a list of names",
    ),
    "enabled": (
        lambda: adapted().enable_adapters("no"),  # type: ignore[arg-type]
        "LoraModel.enable_adapters: enabled: got 'no', expected True or False",
    ),
    "as_plain_lora": (
        lambda: adapted().save_pretrained("x", as_plain_lora="yes"),
        "save_pretrained: as_plain_lora: got 'yes', expected True or False",
    ),
    "a model that is a layer": (
        lambda: lora_ext.replace_linear(nn.Linear(4, 4), ["0"], r=2),
        "replace_linear: target_modules: ['0'] matches no module; nothing in the model can be "
        "adapted; put a single layer into an nn.Sequential first",
    ),
    "save_adapter, config": (
        lambda: io.save_adapter("x", None, {}),  # type: ignore[arg-type]
        "save_adapter: config: got None, expected a dict",
    ),
    "adapter_bytes": (
        lambda: io.adapter_bytes([T(2)]),  # type: ignore[arg-type]
        "adapter_bytes: tensors: got [tensor([0., 0.])], expected a dict of texts to tensors",
    ),
    "adapter_bytes, numpy": (
        lambda: io.adapter_bytes({"w": np.ones(2)}),  # type: ignore[dict-item]
        "adapter_bytes: tensors['w']: got a numpy.ndarray, expected tensors",
    ),
    "adapter_bytes, a key": (
        lambda: io.adapter_bytes({3: T(2)}),  # type: ignore[dict-item]
        "adapter_bytes: tensors: a key: got 3, expected a text",
    ),
    "read_header": (lambda: io.read_header(None), "read_header: source: got None, expected a path"),  # type: ignore[arg-type]
    "read_adapter_tensors": (
        lambda: io.read_adapter_tensors("x", {"w": 1}),  # type: ignore[dict-item]
        "read_adapter_tensors: expected['w']: got 1, expected TensorSpecs",
    ),
    "save_files": (
        lambda: io.save_files("x", {"a": "text"}),  # type: ignore[dict-item]
        "save_files: files['a']: got 'text', expected bytes",
    ),
    "lock_timeout": (
        lambda: io.save_files("x", {}, lock_timeout="1"),  # type: ignore[arg-type]
        "save_files: lock_timeout: got '1', expected seconds",
    ),
    "open_files": (
        lambda: io.open_files("x", None),  # type: ignore[arg-type]
        "open_files: names: got None, expected a name or a list of names",
    ),
    "recover": (lambda: io.recover(None), "recover: folder: got None, expected a path"),  # type: ignore[arg-type]
    "inside": (lambda: io.inside("x", None), "inside: name: got None, expected a text"),  # type: ignore[arg-type]
    "rows of a number": (
        lambda: lora_ext.lora_embedding(
            torch.tensor([0]), torch.ones(()), torch.ones(2, 5), torch.ones(3, 2), padding_idx=0
        ),
        "lora_embedding: weight: got shape [], expected [num_embeddings, embedding_dim]",
    ),
    "density for a single adapter": (
        lambda: adapted().add_weighted_adapter(["default"], [1.0], "n", "ties", density=2.0),
        "add_weighted_adapter: density: got 2.0, expected a share from 0 to 1, for "
        "combination_type='ties'",
    ),
    "loralib, sizes": (
        lambda: loralib.Linear("4", 4, r=2),  # type: ignore[arg-type]
        "Linear: in_features: got '4', expected an integer",
    ),
    "loralib, slices": (
        lambda: loralib.MergedLinear(4, 6, r=2, enable_lora=True),  # type: ignore[arg-type]
        "MergedLinear: enable_lora: got True, expected a list with one bool for each slice",
    ),
    "loralib, r of a convolution": (
        lambda: loralib.Conv2d(3, 3, 3, r="2"),
        "Conv2d: r: got '2', expected an integer",
    ),
    "loralib, no convolution": (
        lambda: loralib.ConvLoRA(nn.Linear, 3, 3, 3, r=2),
        "ConvLoRA: conv_module: got the class torch.nn.modules.linear.Linear, expected the class",
    ),
    "loralib, input": (
        lambda: loralib.Conv2d(3, 3, 3, r=2)(None),
        "Conv2d: x: got None, expected a torch.Tensor",
    ),
    "loralib, model": (
        lambda: loralib.mark_only_lora_as_trainable(None),  # type: ignore[arg-type]
        "mark_only_lora_as_trainable: model: got NoneType, expected a Module",
    ),
    "loralib, a state dict": (
        lambda: loralib.lora_state_dict({}),  # type: ignore[arg-type]
        "lora_state_dict: model: got dict, expected a Module",
    ),
}


@pytest.mark.parametrize(("use", "message"), WRONG.values(), ids=WRONG)
def test_wrong_uses_are_named(
    use: Callable[[], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError)) as caught:
        use()
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.iterdir())
