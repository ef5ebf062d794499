"""`convert_to_lora` over PEFT's tuners: what PEFT's own function makes of them, within what a
decomposition in float32 leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.tuners.lora.conversion as theirs
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_ext

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner = nn.Linear(12, 16), nn.ModuleDict({"first": nn.Linear(16, 12)})
        self.turned, self.head = Conv1D(8, 12), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner["first"](self.first(x).tanh())
        return self.head(self.turned(x))


BOTH, ALL = ["first"], ["first", "turned"]
KINDS: dict[str, Callable[[], Any]] = {
    "LoHa": lambda: peft.LoHaConfig(r=3, target_modules=BOTH, init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(r=3, target_modules=BOTH, init_weights=False),
    "LoKr of four": lambda: peft.LoKrConfig(r=3, target_modules=BOTH, decompose_both=True),
    "VeRa": lambda: peft.VeraConfig(r=4, target_modules=["inner.first"], init_weights=False),
    "C3A": lambda: peft.C3AConfig(block_size=4, target_modules=BOTH, init_weights=False),
    "RandLora": lambda: peft.RandLoraConfig(r=4, target_modules=["inner.first"]),
    "GraLoRA": lambda: peft.GraloraConfig(r=4, target_modules=BOTH, init_weights=False),
    "DeLoRA": lambda: peft.DeloraConfig(r=4, target_modules=BOTH, init_weights=False),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=30, target_modules=BOTH, init_weights=False),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=30, target_modules=BOTH),
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=ALL, init_lora_weights=False),
    "MiSS": lambda: peft.MissConfig(r=4, target_modules=BOTH, init_weights="miss"),
    "MiSS of other sizes": lambda: peft.MissConfig(r=5, target_modules=BOTH, init_weights="miss"),
    "mini MiSS": lambda: peft.MissConfig(r=4, mini_r=4, target_modules=BOTH, init_weights="mini"),
    "bat MiSS": lambda: peft.MissConfig(r=4, target_modules=BOTH, init_weights="bat"),
}
SOME = ["LoHa", "LoRA", "MiSS", "bat MiSS"]


def adapted(kind: str) -> Any:
    model = peft.get_peft_model(Net(), KINDS[kind]())
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def deltas(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith("A.weight")]
    return {n: state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"] for n in names}


def check_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """LAPACK's singular vectors err by about eps times the largest singular value, over the gap to
    the next one; the products of truncated ones so by as much times the largest."""
    assert got.keys() == expected.keys() and got
    for key, delta in expected.items():
        S = torch.linalg.svdvals(delta)
        bound = 100 * torch.finfo(torch.float32).eps * S[0]
        assert (got[key] - delta).abs().max() <= bound, key


@pytest.mark.parametrize("rank", [2, 4, 0.6, 0.95])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_it_is_what_pefts_function_makes(kind: str, rank: float) -> None:
    model = adapted(kind)
    expected_config, expected = theirs.convert_to_lora(model, rank)
    config, state = lora_ext.convert_to_lora(model, rank)
    assert {k: t.shape for k, t in state.items()} == {k: t.shape for k, t in expected.items()}
    check_close(deltas(state), deltas(expected))
    assert (config.r, config.lora_alpha) == (expected_config.r, expected_config.lora_alpha)
    ranks = {key.removeprefix("^"): r for key, r in (config.rank_pattern or {}).items()}
    assert ranks == expected_config.rank_pattern and config.rank_pattern == config.alpha_pattern
    assert config.base_model_name_or_path == expected_config.base_model_name_or_path


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.filterwarnings("ignore")
def test_a_full_rank_is_the_adapter_here_and_in_peft(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    lora_ext.save_as_lora(tmp_path / "lora", model, 8 if kind == "LoRA" else 12)
    expected = model(X)
    assert not torch.allclose(expected, Net()(X), atol=1e-2)
    for lib in (lora_ext, peft):
        again = lib.PeftModel.from_pretrained(Net(), tmp_path / "lora")
        torch.testing.assert_close(again(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_writes_and_what_we_write_are_the_same_adapter(tmp_path: Path) -> None:
    model = adapted("LoKr")
    theirs.save_as_lora(tmp_path / "theirs", model, 0.9)
    lora_ext.save_as_lora(tmp_path / "ours", model, 0.9, "default", False, None)
    outputs = [
        lib.PeftModel.from_pretrained(Net(), tmp_path / name)(X)
        for lib in (lora_ext, peft)
        for name in ("ours", "theirs")
    ]
    for one in outputs[1:]:
        torch.testing.assert_close(one, outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_modules_to_save_go_along(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=8, target_modules=BOTH, modules_to_save=["head"], init_weights=False)
    model = peft.get_peft_model(Net(), config).eval()
    for parameter in model.base_model.model.head.modules_to_save["default"].parameters():
        nn.init.normal_(parameter)
    _, expected = theirs.convert_to_lora(model, 12)
    made, state = lora_ext.convert_to_lora(model, 12)
    assert state.keys() == expected.keys() and made.modules_to_save == ["head"]
    key = "base_model.model.head.weight"
    assert torch.equal(state[key], expected[key])
    lora_ext.save_as_lora(tmp_path, model, 12)
    again = lora_ext.LoraModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(again(X), model(X), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_name_that_ends_anothers_is_told_apart() -> None:
    """`first` and `inner.first` have other ranks: a plain key `first` would mean both."""
    config, state = lora_ext.convert_to_lora(adapted("LoHa"), 0.5)
    ranks = [len(state[f"base_model.model.{n}.lora_A.weight"]) for n in ("first", "inner.first")]
    again = lora_ext.get_lora_model(Net(), config)
    made = [again.get_base_model().get_submodule(n).r for n in ("first", "inner.first")]
    assert made == ranks and config.rank_pattern.keys() == {"^first", "inner.first"}


def test_a_model_of_transformers_without_a_peft_model(tmp_path: Path) -> None:
    """Adapters that were injected: keys have no prefix, the file that is written has."""
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(
        peft.LoHaConfig(r=2, target_modules=BOTH, init_weights=False), Net()
    )
    _, expected = theirs.convert_to_lora(model, 3)
    _, state = lora_ext.convert_to_lora(model, 3)
    check_close(deltas(state), deltas(expected))
    assert all(key.startswith(("first.", "inner.")) for key in state)
    lora_ext.save_as_lora(tmp_path, model, 3)
    assert lora_ext.LoraModel.from_pretrained(Net(), tmp_path).peft_config["default"].r == 3


REFUSED: dict[str, tuple[Callable[[], Any], Any, type[Exception], str]] = {
    "IA3": (
        lambda: peft.get_peft_model(
            Net(), peft.IA3Config(target_modules=["first"], feedforward_modules=[])
        ),
        2,
        TypeError,
        "do not support LoRA conversion",
    ),
    "no adapter": (Net, 2, TypeError, "Could not detect any layer"),
    "0": (lambda: adapted("LoHa"), 0, ValueError, "doesn't make sense"),
    "1.5": (lambda: adapted("LoHa"), 1.5, ValueError, "interpreted as a threshold"),
    "0.0": (lambda: adapted("LoHa"), 0.0, ValueError, "interpreted as a threshold"),
    "too large": (lambda: adapted("LoHa"), 13, ValueError, "larger than the weight shape"),
    "bias": (
        lambda: peft.get_peft_model(Net(), peft.LoraConfig(target_modules=BOTH, bias="all")),
        2,
        ValueError,
        "bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_peft_refuses_is_refused(case: str) -> None:
    make, rank, error, text = REFUSED[case]
    for convert in (theirs.convert_to_lora, lora_ext.convert_to_lora):
        with pytest.raises(error, match=text):
            convert(make(), rank)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_would_lose_is_refused() -> None:
    for options, error, text in (
        ({"use_dora": True}, TypeError, "do not support LoRA conversion"),
        ({"lora_bias": True}, ValueError, "lora_bias: got True"),
    ):
        config = peft.LoraConfig(target_modules=BOTH, **options)
        with pytest.raises(error, match=text):
            lora_ext.convert_to_lora(peft.get_peft_model(Net(), config), 2)
    with pytest.raises(ValueError, match="adapter_name: got 'other'"):
        lora_ext.convert_to_lora(adapted("LoHa"), 2, "other")
    for rank in (True, "2", None):
        with pytest.raises(TypeError, match="convert_to_lora: rank"):
            lora_ext.convert_to_lora(adapted("LoHa"), rank)


def test_an_adapter_that_is_lora_already_is_said_to_be() -> None:
    with pytest.warns(UserWarning, match="that is already a LoRA adapter"):
        lora_ext.convert_to_lora(adapted("LoRA"), 2)


def test_gpt2s_transposed_layers(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 20}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    config = peft.VeraConfig(r=8, target_modules=["c_attn"], init_weights=False)
    model = peft.get_peft_model(base, config).eval()
    lora_ext.save_as_lora(tmp_path / "lora", model, 16)
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    again = lora_ext.LoraModel.from_pretrained(plain, tmp_path / "lora")
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
