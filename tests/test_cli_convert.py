"""`lora-ext convert` between formats: what it takes, what it says, what it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runs import failed, run
from converted import Tensors, same, values, write
from safetensors.torch import load_file
from torch import nn

from lora_ext.cli.convert import FORMATS

R = 2
LORALIB: Tensors = {"h.c_attn.lora_A": values(1, 2 * R, 6), "h.c_attn.lora_B": values(2, 12, R)}
CANDLE: Tensors = {
    f"l.0.lora_llama_csa.{what}{at}.weight": values(at, *shape)
    for at in range(2)
    for what, shape in (("a", (R, 6)), ("b", (6, R)))
}
KOHYA: Tensors = {
    "lora_unet_mid_block_to_q.lora_down.weight": values(1, R, 6),
    "lora_unet_mid_block_to_q.lora_up.weight": values(2, 6, R),
    "lora_unet_mid_block_to_q.alpha": torch.tensor(1.0),
}
ATTENTION: Tensors = {
    "attn.qv_lora_A": values(1, R, 8), "attn.qv_lora_B": values(2, 24, R),
    "attn.o_lora_A": values(3, R, 8), "attn.o_lora_B": values(4, 8, R),
}  # fmt: skip


def test_help_names_all_formats() -> None:
    shown = run("convert", "--help").out
    assert all(name in shown for name in FORMATS)


def test_loralib(tmp_path: Path) -> None:
    path, out = write(tmp_path / "lora.safetensors", LORALIB), tmp_path / "peft"
    slices = ("--slices", "c_attn=1,0,1")
    data = run("convert", path, out, "--alpha", 8, *slices, "--json").json()
    assert data["from"] == "loralib" and data["to"] == "peft" and data["tensors"] == 2
    back = tmp_path / "back.safetensors"
    done = run("convert", out, back, "--to", "loralib", *slices)
    assert done.code == 0 and "for layers made with lora_alpha=8.0" in done.out
    same(load_file(back), LORALIB)
    assert "--overwrite" in failed("convert", out, back, "--to", "loralib", code=2)
    assert run("convert", out, back, "--to", "loralib", *slices, "--overwrite").code == 0


def test_slices_with_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", LORALIB)
    slices = ("--slices", "h.c_attn=8:1,4:0,4:1")
    assert run("convert", path, tmp_path / "peft", "--alpha", 8, *slices).code == 0
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert tensors["base_model.model.h.c_attn.lora_B.weight"].shape == (16, 2 * R)


def test_candle(tmp_path: Path) -> None:
    path, out = write(tmp_path / "candle.safetensors", CANDLE), tmp_path / "peft"
    ids = ("--id", "lora_llama_csa.0=v_proj", "--id", "1=q_proj")
    assert run("convert", path, out, "--alpha", 8, *ids).code == 0
    tensors = load_file(out / "adapter_model.safetensors")
    v = tensors["base_model.model.l.0.v_proj.lora_A.weight"]
    assert torch.equal(v, CANDLE["l.0.lora_llama_csa.a0.weight"])


def test_loratorch(tmp_path: Path) -> None:
    path, out = write(tmp_path / "a.safetensors", ATTENTION), tmp_path / "peft"
    assert run("convert", path, out, "--alpha", 4).code == 0
    slices = ("--to", "loratorch", "--slices", "attn=1,0,1")
    assert run("convert", out, tmp_path / "b.safetensors", *slices).code == 0
    same(load_file(tmp_path / "b.safetensors"), ATTENTION)


@pytest.mark.parametrize("base", ["names", "file", "pipeline", "unet"])
def test_kohya(base: str, tmp_path: Path) -> None:
    path, out = write(tmp_path / "kohya.safetensors", KOHYA), tmp_path / "out"
    name, component = "mid_block.to_q", ()
    if base == "names":
        place = tmp_path / "names.txt"
        place.write_text(f"unet.{name}\nunet.mid.block_x\n\n")
    elif base == "file":
        weights = {f"unet.{name}.weight": torch.zeros(6, 6), "unet.norm.weight": torch.zeros(6)}
        place = write(tmp_path / "base.safetensors", weights)
    else:
        place = tmp_path / base
        folder = place / "unet" if base == "pipeline" else place
        folder.mkdir(parents=True)
        write(folder / "model.safetensors", {f"{name}.weight": torch.zeros(6, 6)})
        (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        component = () if base == "pipeline" else ("--component", "unet")
    done = run("convert", path, out, "--to", "diffusers", "--base", place, *component)
    assert done.code == 0, done.err
    found = load_file(out / "pytorch_lora_weights.safetensors")
    assert found.keys() == {f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"}
    back = ("--to", "kohya", "--component", "unet")
    assert run("convert", out, tmp_path / "b.safetensors", *back).code == 0
    same(load_file(tmp_path / "b.safetensors"), KOHYA)
    assert "--overwrite" in failed("convert", path, out, "--to", "diffusers", code=2)


def test_a_folder_of_transformers_is_a_base(tmp_path: Path) -> None:
    tiny_models = pytest.importorskip("tiny_models")
    model, _ = tiny_models.llama()
    model.save_pretrained(tmp_path / "llama")
    name = "model.layers.0.mlp.lora_mlp"
    up = model.get_submodule("model.layers.0.mlp.up_proj").weight.shape
    down = model.get_submodule("model.layers.0.mlp.down_proj").weight.shape
    sizes = {"a0": (R, down[1]), "b0": (down[0], R)}
    file = {f"{name}.{k}.weight": values(1, *one) for k, one in sizes.items()}
    file |= {f"{name}.a1.weight": values(1, R, up[1]), f"{name}.b1.weight": values(1, up[0], R)}
    path = write(tmp_path / "candle.safetensors", file)
    arguments = ("convert", path, tmp_path / "out", "--alpha", 2, "--base", tmp_path / "llama")
    # gate and up have one shape, so the second id is asked for, and only that.
    said = failed(*arguments)
    assert "up_proj" in said and "gate_proj" in said and "--id" in said
    assert run(*arguments, "--id", "lora_mlp.1=up_proj").code == 0


def test_dtype_of_another_format(tmp_path: Path) -> None:
    path, out = write(tmp_path / "candle.safetensors", CANDLE), tmp_path / "b.safetensors"
    ids = ("--id", "0=q_proj", "--id", "1=k_proj")
    arguments = ("--alpha", 4, *ids, "--dtype", "bfloat16", "--to", "loralib")
    assert run("convert", path, out, *arguments).code == 0
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.bfloat16}


SAID = {
    "no alpha": (ATTENTION, (), 1, "--alpha"),
    "no slices": (LORALIB, ("--alpha", 1), 1, "--slices"),
    "no ids": (CANDLE, ("--alpha", 1), 1, "--id"),
    "no base": (KOHYA, (), 1, "--base"),
    "alpha of zero": (LORALIB, ("--alpha", 0), 2, "--alpha: got 0"),
    "alpha infinite": (LORALIB, ("--alpha", "inf"), 2, "above 0"),
    "slices without a name": (LORALIB, ("--slices", "1,0,1"), 2, "NAME=VALUE"),
    "slices of words": (LORALIB, ("--slices", "c_attn=q,v"), 2, "NAME=1,0,1"),
    "slices of two kinds": (LORALIB, ("--alpha", 1, "--slices", "c_attn=1,4:0,1"), 1, "slices"),
    "an id alone": (CANDLE, ("--id", "q_proj"), 2, "NAME=VALUE"),
    "another format": (KOHYA, ("--from", "candle"), 1, "candle-lora name"),
    "no format": (LORALIB, ("--from", "gguf2"), 2, "gguf2"),
    "a folder for a file": (LORALIB, ("--alpha", 1, "--slices", "c_attn=1,1", "--to", "candle"), 1,
                            ".safetensors"),
    "a base that is not there": (KOHYA, ("--base", "/nowhere"), 2, "/nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_it_asks_for(case: str, tmp_path: Path) -> None:
    tensors, options, code, says = SAID[case]
    path = write(tmp_path / "file.safetensors", tensors)
    assert says in failed("convert", path, tmp_path / "out", *options, code=code)
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter(tmp_path: Path) -> None:
    torch.save(LORALIB, tmp_path / "a.pt")
    said = failed("convert", tmp_path / "a.pt", tmp_path / "out")
    assert "a.pt" in said and "weights_only=True" in said
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    assert "no safetensors file" in failed("convert", tmp_path / "a.safetensors", tmp_path / "out")
    model = write(tmp_path / "m.safetensors", nn.Linear(3, 3).state_dict())
    assert "known format" in failed("convert", model, tmp_path / "out", code=2)
    path = write(tmp_path / "b.safetensors", KOHYA)
    assert "is a file" in failed("convert", path, model, code=2)
    (tmp_path / "empty").mkdir()
    said = failed("convert", path, tmp_path / "out", "--base", tmp_path / "empty", code=2)
    assert "config.json" in said
