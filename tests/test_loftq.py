"""LoftQ: an initialisation that quantizes the weight, and one over bases that are quantized. Beside
PEFT's: tests/quantized."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_ext
from lora_ext import LoftQConfig, LoraConfig, LoraModel, get_lora_model, quant

N, K, R = 48, 80, 6
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(K, N), nn.Linear(N, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": R, "target_modules": ["first", "second"]} | fields)


def loftq(bits: int = 4, iterations: int = 1, **fields: Any) -> LoraConfig:
    given = LoftQConfig(loftq_bits=bits, loftq_iter=iterations)
    return config(init_lora_weights="loftq", loftq_config=given, **fields)


def effective(layer: Any) -> Tensor:
    lora_A, lora_B = (part.detach() for part in layer.parts("default").values())
    base = layer.unmerged_weight().to(lora_A.dtype)
    return base + layer.scaling * lora_B @ lora_A  # type: ignore[no-any-return]


def error(layer: Any, weight: Tensor) -> float:
    return (effective(layer) - weight).norm().item()


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 3}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_weight_becomes_values_of_codes(bits: int, options: dict[str, Any]) -> None:
    plain = Net().first.weight.detach()
    errors = []
    for iterations in (1, 5):
        model: Any = get_lora_model(Net(), loftq(bits, iterations, **options))
        layer = model.get_base_model().first
        kind = "nf4" if bits == 4 else "int8"
        base = layer.weight.detach()
        again = quant.quantize(base if bits == 4 else base.half(), kind).dequantize(torch.float32)
        if bits == 4:
            assert torch.equal(again, base)  # to the bit, so that it can be quantized
        torch.testing.assert_close(again, base, rtol=1e-3, atol=1e-6)
        errors.append(error(layer, plain))
    lost = (quant.quantize(plain, kind).dequantize() - plain).norm().item()
    assert errors[1] <= errors[0] < 0.9 * lost


def test_narrow_bases_count_their_own_rounding() -> None:
    model: Any = get_lora_model(Net().bfloat16(), loftq())
    layer = model.get_base_model().first
    assert layer.weight.dtype is torch.bfloat16 and layer.lora_A.dtype is torch.float32
    plain = Net().first.weight.detach().bfloat16().float()
    residual = plain - layer.weight.detach().float()
    singular = torch.linalg.svdvals(residual)
    assert error(layer, plain) == pytest.approx(singular[R:].norm().item(), rel=1e-4)


def test_files_say_it(tmp_path: Path) -> None:
    model: Any = get_lora_model(Net(), loftq(iterations=2))
    model.get_base_model().first.lora_B.data += 0.1
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 2}
    again = lora_ext.PeftModel.from_pretrained(Net(), tmp_path)
    x = torch.randn(3, K)
    assert torch.equal(again.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match="initialised by LoftQ"):
        model.save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path)
        )


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no config": (lambda: config(init_lora_weights="loftq"), "loftq_config.* must be specified"),
    "bits": (lambda: LoftQConfig(loftq_bits=2), r"loftq_bits: got 2, expected one of \(4, 8\)"),
    "iterations": (lambda: LoftQConfig(loftq_iter=0), "loftq_iter: got 0"),
    "field": (lambda: config(loftq_config={"bits": 4}), "loftq_config: got .*loftq_bits"),
    "embedding": (
        lambda: get_lora_model(
            nn.Sequential(nn.Embedding(8, 8)),
            LoraConfig(
                r=2, target_modules=["0"], init_lora_weights="loftq", loftq_config=LoftQConfig()
            ),
        ),
        "'loftq' for an embedding",
    ),
    "quantized": (lambda: get_lora_model(quantized(), loftq()), "replace_lora_weights_loftq"),
    "layer": (
        lambda: lora_ext.nn.Linear.from_linear(
            Net().first, init_lora_weights="loftq", loftq_bits=3
        ),
        "loftq_bits: got 3",
    ),
    "scaling": (lambda: get_lora_model(Net(), loftq(lora_alpha=-4)), "loftq: scaling: got -0.6"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_config_that_is_not_used_is_dropped() -> None:
    with pytest.warns(UserWarning, match="loftq_config.*will be ignored"):
        assert config(loftq_config=LoftQConfig()).loftq_config == {}


# Over quantized bases


def quantized(kind: str = "nf4") -> Net:
    model = Net()
    assert quant.quantize_(model, kind) == ["first", "second"]
    return model


def saved(folder: Path, sharded: bool = False) -> Path:
    state = {f"model.{name}": t.contiguous() for name, t in Net().state_dict().items()}
    if not sharded:
        save_file(state, folder / "model.safetensors")
        return folder
    for name, tensor in state.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def adapted(kind: str = "nf4", **fields: Any) -> Any:
    model = quantized(kind)
    model.base_model_prefix = "model"  # type: ignore[assignment]
    return get_lora_model(model, config(**fields))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "parts"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_replacing(kind: str, sharded: bool, tmp_path: Path) -> None:
    model = adapted(kind, lora_alpha=3)
    seen: list[str] = []

    def callback(given: nn.Module, name: str) -> bool:
        assert given is model
        seen.append(name)
        return True

    lora_ext.replace_lora_weights_loftq(model, saved(tmp_path, sharded), callback=callback)
    assert seen == ["first", "second"]
    plain = Net()
    for name in seen:
        layer, weight = getattr(model.get_base_model(), name), getattr(plain, name).weight
        singular = torch.linalg.svdvals(layer.unmerged_weight() - weight.detach())
        bound = singular[R:].norm().item()
        assert error(layer, weight.detach()) == pytest.approx(bound, rel=1e-3, abs=1e-5)
        assert bound < 0.9 * singular.norm()
    x = torch.randn(9, K)
    before = (quantized(kind)(x) - plain(x)).norm()
    assert (model(x) - plain(x)).norm() < 0.9 * before


def test_a_callback_that_refuses_rolls_back(tmp_path: Path) -> None:
    model = adapted(init_lora_weights=False, use_dora=True)
    state = {name: t.clone() for name, t in model.state_dict().items()}

    def only_second(given: nn.Module, name: str) -> bool:
        now = given.state_dict()
        assert not torch.equal(now[f"base_model.model.{name}.lora_A"], state[key(name)])
        return name == "second"

    def key(name: str) -> str:
        return f"base_model.model.{name}.lora_A"

    lora_ext.replace_lora_weights_loftq(model, saved(tmp_path), callback=only_second)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, state[name])}
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    assert changed == {f"base_model.model.second.{part}" for part in parts}
    model.load_state_dict(state)
    lora_ext.replace_lora_weights_loftq(model, tmp_path, callback=lambda *_: False)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())

    def fails(given: nn.Module, name: str) -> bool:
        if name == "second":
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        lora_ext.replace_lora_weights_loftq(model, tmp_path, callback=fails)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_replacing_is_refused(tmp_path: Path) -> None:
    replace = lora_ext.replace_lora_weights_loftq
    model = adapted()
    with pytest.raises(FileNotFoundError, match="Could not find file for"):
        replace(model, tmp_path)
    with pytest.raises(ValueError, match="you must pass the model_path"):
        replace(model)
    with pytest.raises(TypeError, match="replace_lora_weights_loftq: callback: got 3"):
        replace(model, tmp_path, callback=3)  # type: ignore[arg-type]
    save_file({"first.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'first': got \[2, 2\] in the file, expected \[48, 80\]"):
        replace(model, tmp_path / "model.safetensors")
    save_file({"first.weight": Net().first.weight.detach()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no second\.weight, .* of another model\?"):
        replace(model, tmp_path)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="other"):
        replace(model, tmp_path, "other")
    with pytest.raises(ValueError, match=r"loftq: scaling: got 0\.0, expected .*above 0"):
        replace(adapted(lora_alpha=0), saved(tmp_path))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"layer 'first' is merged; call unmerge_adapter"):
        replace(model, tmp_path)
    with pytest.raises(ValueError, match="No bnb LoRA module found"):
        replace(get_lora_model(Net(), config()), tmp_path)
    with pytest.raises(TypeError):
        replace(Net(), tmp_path)


def test_from_the_start_to_a_quantized_base(tmp_path: Path) -> None:
    """Saved, the base quantized, loaded; saved from there and loaded again; and onto bases in
    floating point, the original one and the one that LoftQ left."""
    x = torch.randn(3, K)
    start: Any = get_lora_model(Net(), loftq())
    expected = start(x)
    start.save_pretrained(tmp_path / "a")
    dense = start.unload()
    base = copy.deepcopy(dense)
    quant.quantize_(base, "nf4")
    codes = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model: Any = LoraModel.from_pretrained(base, tmp_path / "a", is_trainable=True)
    torch.testing.assert_close(model(x), expected)
    assert model.peft_config["default"].init_lora_weights == "loftq"
    model.add_weighted_adapter(["default"], [1.0], "same")
    model.save_pretrained(tmp_path / "b")
    model.load_adapter(tmp_path / "a", "default")  # into the one that is there
    left = model.unload().state_dict()
    assert all(torch.equal(left[name], codes[name]) for name in codes)
    for one in (base, Net(), dense):
        again: Any = LoraModel.from_pretrained(one, tmp_path / "b").eval()
        torch.testing.assert_close(again(x), expected)
    quantized = Net()
    quant.quantize_(quantized)
    with pytest.raises(ValueError, match=r"got 'loftq', which quantizes the .*quantized already"):
        get_lora_model(quantized, loftq())
    assert type(quantized.first) is quant.Linear
