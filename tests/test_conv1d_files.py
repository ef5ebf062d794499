"""transformers' Conv1D, whose weight is [in, out]: what files say of it, and merging by the names
of tensors, which does not guess it."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_places import randomise
from cli_runs import failed, run
from safetensors.torch import load_file, save_file
from torch import nn

from lora_ext import LoraConfig, LoraModel, get_lora_model, quant
from lora_ext.io.convert import convert

transformers = pytest.importorskip("transformers")
Conv1D = transformers.pytorch_utils.Conv1D
N = 12


class Block(nn.Module):
    """Square and other layers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(3 * N, N), Conv1D(N, N)
        self.square, self.up = nn.Linear(N, N), nn.Linear(N, 2 * N)
        self.emb = nn.Embedding(5, N)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.c_proj(self.c_attn(self.emb(tokens))[..., :N])
        result: torch.Tensor = self.up(self.square(x))
        return result


def said(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]


# Target modules, what a user says, and what is saved.
SAID: dict[str, tuple[list[str], bool, bool]] = {
    "one of Conv1D": (["c_proj"], False, True),
    "all of Conv1D": (["c_attn", "c_proj"], True, True),
    "linear": (["square"], False, False),
    "linear, and said otherwise": (["square"], True, False),
    "both": (["c_attn", "c_proj", "square", "up"], False, True),
    "Conv1D and an embedding": (["emb", "c_proj"], False, True),
    "an embedding alone": (["emb"], True, True),
}


@pytest.mark.parametrize("case", SAID)
def test_files_say_how_the_weights_are_stored(case: str, tmp_path: Path) -> None:
    """As PEFT's do, and they load in both libraries, whichever wrote them."""
    peft = pytest.importorskip("peft")
    targets, given, expected = SAID[case]
    fields = {"r": 2, "target_modules": targets, "fan_in_fan_out": given}
    torch.manual_seed(0)
    base, tokens = Block(), torch.tensor([[0, 3, 1]])
    ours = randomise(get_lora_model(copy.deepcopy(base), LoraConfig(**fields)))
    theirs = randomise(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert said(tmp_path / "ours") is ours.peft_config["default"].fan_in_fan_out is expected
    if case != "both":  # there it is that of the last one
        assert said(tmp_path / "theirs") is expected
    with torch.no_grad():
        for name, model in (("ours", ours), ("theirs", theirs)):
            wanted = model.eval()(tokens)
            for load in (LoraModel, peft.PeftModel):
                again = load.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
                torch.testing.assert_close(again(tokens), wanted)
    before = edit(tmp_path / "ours", fan_in_fan_out=False)  # as earlier versions wrote it
    again = LoraModel.from_pretrained(copy.deepcopy(base), before)
    again.save_pretrained(tmp_path / "again")
    assert said(tmp_path / "again") is (expected and case != "an embedding alone")


def test_files_of_a_quantized_conv1d(tmp_path: Path) -> None:
    """They are of the weights that the model has when it is not quantized."""
    model = Block()
    quant.quantize_(model, "nf4")
    adapted = get_lora_model(model, LoraConfig(r=2, target_modules=["c_proj"]))
    adapted.save_pretrained(tmp_path)
    assert said(tmp_path) is True


def test_converted_files_say_it_where_the_base_is_given(tmp_path: Path) -> None:
    base, file = nn.ModuleDict({"a": Conv1D(N, N), "b": Conv1D(9, N), "c": nn.Linear(N, N)}), {}
    for name, rows in (("a", N), ("b", 9), ("c", N)):
        one = {f"{name}.lora_A": torch.ones(2, N), f"{name}.lora_B": torch.ones(rows, 2)}
        file[name] = tmp_path / f"{name}.safetensors"
        save_file(one, file[name])
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    for name, path in file.items():
        convert(path, tmp_path / "peft", alpha=2, modules=base)
        assert said(tmp_path / "peft") is (name != "c")
        arguments = ("--alpha", 2, "--base", tmp_path / "base.safetensors", "--overwrite")
        assert run("convert", path, tmp_path / "peft", *arguments).code == 0
        assert said(tmp_path / "peft") is (name == "b")  # by its shape


def edit(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def adapter_on(folder: Path, base: nn.Module, *targets: str) -> Path:
    """As earlier versions wrote them."""
    config = LoraConfig(r=2, target_modules=list(targets))
    randomise(get_lora_model(copy.deepcopy(base), config)).save_pretrained(folder)
    return edit(folder, fan_in_fan_out=False)


REFUSED = {
    "attn.c_proj": r"'h.0.attn.c_proj.weight' is square, .*as 'h.0.attn.c_attn.weight' is",
    "mlp.c_proj": r"'h.0.mlp.c_proj.weight' has shape .*stored transposed, as \[in, out\]",
    "c_attn": r"'h.0.attn.c_attn.weight' has shape .*stored transposed, as \[in, out\]",
}


@pytest.mark.parametrize("target", REFUSED)
def test_merging_gpt2_by_names_is_refused(target: str, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=9, n_embd=N, n_layer=1, n_head=2, n_positions=8)
    base = transformers.GPT2Model(config)
    base.save_pretrained(tmp_path / "base")
    adapter = adapter_on(tmp_path / "adapter", base, target)
    file, out = tmp_path / "base" / "model.safetensors", tmp_path / "out"
    message = failed("merge", file, adapter, out)
    assert re.search(REFUSED[target], message), message
    assert "with its config.json" in message and not out.exists()
    edit(adapter, fan_in_fan_out=True)  # as they are saved now
    assert "fan_in_fan_out" in failed("merge", file, adapter, out)
    assert run("merge", tmp_path / "base", adapter, out).code == 0


# The base's weights, whether each has a bias, and of which ones a square adapted layer is refused.
TOLD: dict[str, tuple[dict[str, nn.Module], str, bool]] = {
    "linear beside it": ({"c_proj": nn.Linear(N, N), "up": nn.Linear(N, 9)}, "c_proj", False),
    "a Conv1D beside it": ({"q": nn.Linear(N, N), "up": Conv1D(9, N)}, "q", True),
    "no bias": ({"q": nn.Linear(N, N, bias=False), "up": Conv1D(9, N)}, "q", False),
    "GPT-2's name alone": ({"c_proj": nn.Linear(N, N), "q": nn.Linear(N, N)}, "c_proj", True),
    "another name alone": ({"q": nn.Linear(N, N)}, "q", False),
    "not square": ({"up": nn.Linear(N, 9), "c_attn": Conv1D(9, N)}, "up", False),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_what_tells_how_a_square_weight_is_stored(case: str, tmp_path: Path) -> None:
    modules, target, refused = TOLD[case]
    base = nn.ModuleDict(modules)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    adapter = adapter_on(tmp_path / "adapter", base, target)
    out = tmp_path / "out"
    if refused:
        assert "is square" in failed("merge", tmp_path / "base.safetensors", adapter, out)
        return
    assert run("merge", tmp_path / "base.safetensors", adapter, out).code == 0
    merged = LoraModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    found = load_file(out / "model.safetensors")
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in merged.items())
