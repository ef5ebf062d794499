"""kohya's files: read by the base's names and their meaning, `W + alpha / dim up down`, and written
byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from converted import (
    Tensors,
    close,
    containers,
    loaded,
    loaded_by_peft,
    refuses,
    refuses_to_write,
    round_trip,
    same,
    values,
    without,
    write,
)
from diffusion_models import BLOCK, TEXT, TOKENS, Pipeline, Update, X, update, updated
from safetensors.torch import load_file, save
from torch import nn

import lora_ext
from lora_ext.io.convert import Layer, convert, recognised

UNET = [f"{BLOCK}.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
CLIP = [f"{TEXT}.0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
LINEARS = [*UNET, f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2"]
CONVOLUTIONS = ["conv_in", "down_blocks.0.attentions.0.proj_in"]
# Of each: start of the names, modules, rank, alpha, dtype, DoRA.
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES: dict[str, tuple[str, list[str], int, float, torch.dtype, bool]] = {
    "unet, alpha 1": ("lora_unet", LINEARS, 4, 1, F32, False),
    "unet, alpha of the rank": ("lora_unet", LINEARS, 4, 4, F32, False),
    "unet, alpha a fraction": ("lora_unet", LINEARS, 3, 0.3, F32, False),
    "unet, rank 1": ("lora_unet", LINEARS, 1, 2, F32, False),
    "unet, fp16": ("lora_unet", LINEARS, 4, 2, F16, False),
    "unet, bf16": ("lora_unet", LINEARS, 4, 8, BF16, False),
    "unet, one module": ("lora_unet", UNET[:1], 2, 2, F32, False),
    "unet, convolutions": ("lora_unet", CONVOLUTIONS, 2, 1, F32, False),
    "unet, convolutions, fp16": ("lora_unet", CONVOLUTIONS, 3, 4, F16, False),
    "unet, all": ("lora_unet", LINEARS + CONVOLUTIONS, 2, 3, F32, False),
    "unet, dora": ("lora_unet", LINEARS, 2, 3, F32, True),
    "unet, dora, fp16": ("lora_unet", LINEARS, 2, 4, F16, True),
    "unet, dora of convolutions": ("lora_unet", CONVOLUTIONS, 2, 3, F32, True),
    "text encoder": ("lora_te", CLIP, 4, 2, F32, False),
    "text encoder, mlp": ("lora_te", [f"{TEXT}.1.mlp.fc1", f"{TEXT}.1.mlp.fc2"], 4, 2, F32, False),
    "text encoder, fp16": ("lora_te", CLIP, 4, 2, F16, False),
    "text encoder, dora": ("lora_te", CLIP, 3, 2, F32, True),
    "SDXL's first": ("lora_te1", CLIP, 4, 2, F32, False),
    "SDXL's second": ("lora_te2", CLIP, 4, 2, BF16, False),
    "SDXL's second, dora": ("lora_te2", CLIP, 2, 2, F32, True),
    "SD3's transformer": ("lora_transformer", LINEARS, 4, 2, F32, False),
    "SD3's third": ("lora_te3", CLIP, 4, 2, F32, False),
}  # fmt: skip
COMPONENTS = {
    "lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3", "lora_transformer": "transformer",
}  # fmt: skip


def file_of(start: str, updates: dict[str, Update], alpha: float) -> Tensors:
    file: Tensors = {}
    for name, one in updates.items():
        stem = f"{start}_{name.replace('.', '_')}"
        file[f"{stem}.lora_down.weight"], file[f"{stem}.lora_up.weight"] = one.A, one.B
        scalar = torch.tensor(alpha, dtype=one.A.dtype)
        file[f"{stem}.alpha"] = scalar if float(scalar) == alpha else torch.tensor(alpha)
        if one.magnitude is not None:
            file[f"{stem}.dora_scale"] = one.magnitude.reshape(-1, *[1] * (one.A.dim() - 1))
    return file


@pytest.fixture
def pipeline() -> Pipeline:
    torch.manual_seed(0)
    return Pipeline().eval()


@pytest.mark.parametrize("case", CASES)
def test_is_what_kohya_computes_and_comes_back(
    case: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    start, names, rank, alpha, dtype, dora = CASES[case]
    text = start.startswith("lora_te")
    model: nn.Module = pipeline.text_encoder if text else pipeline.unet
    inputs = (TOKENS,) if text else (X, values(2, 2, 4, 6))
    updates = {
        name: update(model, name, 7 * at, rank, alpha / rank, dora, dtype)
        for at, name in enumerate(names)
    }
    file = file_of(start, updates, alpha)
    back = {"component": COMPONENTS[start]}
    if start == "lora_te1":  # SDXL has two of them, as the base's names say
        back["modules"] = ["text_encoder_2.text_model"]  # type: ignore[assignment]
    options = {"modules": model, "component": COMPONENTS[start]}
    folder = round_trip(tmp_path, "kohya", file, back, **options)
    exact = updated(model, updates)(*(x.double() if x.is_floating_point() else x for x in inputs))
    close(loaded(model, folder)(*inputs), exact)


@pytest.mark.parametrize("case", ["unet, all", "unet, dora", "text encoder, dora", "unet, fp16"])
def test_peft_loads_it(case: str, pipeline: Pipeline, tmp_path: Path) -> None:
    start, names, rank, alpha, dtype, dora = CASES[case]
    text = start.startswith("lora_te")
    model: nn.Module = pipeline.text_encoder if text else pipeline.unet
    inputs = (TOKENS,) if text else (X, values(2, 2, 4, 6))
    updates = {
        name: update(model, name, 7 * at, rank, alpha / rank, dora, dtype)
        for at, name in enumerate(names)
    }
    path = write(tmp_path / "file.safetensors", file_of(start, updates, alpha))
    convert(path, tmp_path / "peft", modules=model, component=COMPONENTS[start])
    exact = updated(model, updates)(*(x.double() if x.is_floating_point() else x for x in inputs))
    close(loaded_by_peft(model, tmp_path / "peft")(*inputs), exact)


def test_a_whole_pipeline(pipeline: Pipeline, tmp_path: Path) -> None:
    unet = {n: update(pipeline.unet, n, 7 * i, 2, 1.5) for i, n in enumerate(LINEARS)}
    text = {n: update(pipeline.text_encoder, n, 5 * i, 4, 0.25) for i, n in enumerate(CLIP)}
    file = {**file_of("lora_unet", unet, 3.0), **file_of("lora_te", text, 1.0)}
    folder = round_trip(tmp_path, "kohya", file, modules=pipeline)
    exact = updated(
        pipeline, {f"unet.{n}": one for n, one in unet.items()}
        | {f"text_encoder.{n}": one for n, one in text.items()},
    )(X.double(), TOKENS)  # fmt: skip
    close(loaded(pipeline, folder)(X, TOKENS), exact)
    # And on to diffusers' names, which need no base.
    convert(folder, tmp_path / "d", target="diffusers")
    convert(tmp_path / "d", tmp_path / "again.safetensors", target="kohya")
    same(load_file(tmp_path / "again.safetensors"), file)


@pytest.mark.parametrize("component", [None, "text_encoder"])
def test_base_whose_names_lack_text_model(
    component: str | None, pipeline: Pipeline, tmp_path: Path
) -> None:
    """As the CLIPTextModel of transformers 5: the base's names are read, sd-scripts' written."""
    updates = {n: update(pipeline.text_encoder, n, i, 2) for i, n in enumerate(CLIP)}
    file = file_of("lora_te", updates, 2.0)
    start = "" if component else "text_encoder."
    names = [start + name.removeprefix("text_model.") for name in CLIP]
    options = {"modules": names, "component": component}
    folder = round_trip(tmp_path, "kohya", file, **options)
    found = load_file(folder / "adapter_model.safetensors")
    assert {key.split(".lora_")[0].removeprefix("base_model.model.") for key in found} == {*names}


def test_names_alone_are_enough(pipeline: Pipeline, tmp_path: Path) -> None:
    """A list of names, as those of an adapter's config or of a model that is not here."""
    updates = {n: update(pipeline.unet, n, i, 2) for i, n in enumerate(LINEARS)}
    file = file_of("lora_unet", updates, 2.0)
    round_trip(tmp_path, "kohya", file, modules=[f"unet.{name}" for name in LINEARS])


def test_without_alphas(pipeline: Pipeline, tmp_path: Path) -> None:
    updates = {n: update(pipeline.unet, n, i, 3, 1.0) for i, n in enumerate(UNET)}
    file = {k: t for k, t in file_of("lora_unet", updates, 3).items() if "alpha" not in k}
    path = write(tmp_path / "file.safetensors", file)
    convert(path, tmp_path / "peft", modules=pipeline.unet, component="unet")
    y = values(2, 2, 4, 6)
    exact = updated(pipeline.unet, updates)(X.double(), y.double())
    close(loaded(pipeline.unet, tmp_path / "peft")(X, y), exact)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32])
def test_alphas_of_any_dtype(dtype: torch.dtype, pipeline: Pipeline, tmp_path: Path) -> None:
    updates = {n: update(pipeline.unet, n, i, 3) for i, n in enumerate(UNET)}
    file = file_of("lora_unet", updates, 2)
    file = {k: t.to(dtype).reshape(1) if "alpha" in k else t for k, t in file.items()}
    path = write(tmp_path / "file.safetensors", file)
    adapter = convert(path, tmp_path / "peft", modules=pipeline.unet, component="unet")
    assert adapter.config["lora_alpha"] == 2 and adapter.config["alpha_pattern"] == {}


def test_rslora_is_folded_into_alpha(pipeline: Pipeline, tmp_path: Path) -> None:
    config = lora_ext.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["to_q"])
    lora_ext.get_lora_model(pipeline.unet, config).save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b.safetensors", target="kohya", component="unet")
    alphas = [t for k, t in load_file(tmp_path / "b.safetensors").items() if "alpha" in k]
    assert len(alphas) == 2 and all(float(alpha) == 6 for alpha in alphas)


# ---- what is asked, and what is refused ----------------------------------------------------------

A, B = "lora_unet_a_to_q.lora_down.weight", "lora_unet_a_to_q.lora_up.weight"
ALPHA, C = "lora_unet_a_to_q.alpha", "lora_unet_conv_in.lora_down.weight"
D, SCALE = "lora_unet_conv_in.lora_up.weight", "lora_unet_a_to_q.dora_scale"
GOOD: Tensors = {A: values(1, 4, 6), B: values(2, 7, 4), ALPHA: torch.tensor(2.0),
                 C: values(3, 4, 3, 3, 3), D: values(4, 6, 4, 1, 1)}  # fmt: skip
BASE: dict[str, Any] = {"modules": {"unet.a.to_q": Layer(), "unet.conv_in": Layer()}}
BESIDE = ("three dimensions", "a row less")  # found where the other is compared with it
CONTAINERS = {
    key: (content, B if key in BESIDE else names)
    for key, (content, names) in containers(GOOD, A).items()
} | {f"convolution, {k}": one for k, one in containers(GOOD, D).items()
     if one[1] == D and k != "a row less"}  # fmt: skip


def also(key: str, *shape: int) -> Tensors:
    return {**GOOD, key: values(9, *shape)}


MALFORMED: dict[str, tuple[Tensors, str, dict[str, Any]]] = {
    "no lora_up": (without(GOOD, B), "lora_unet_a_to_q", {}),
    "no lora_down": (without(GOOD, A), "lora_unet_a_to_q", {}),
    "another rank": (also(B, 7, 3), B, {}),
    "a kernel that is not 1 x 1": (also(D, 6, 4, 3, 3), D, {}),
    "a matrix and a kernel": (also(D, 6, 4), D, {}),
    "alpha of zero": ({**GOOD, ALPHA: torch.tensor(0.0)}, ALPHA, {}),
    "alpha below zero": ({**GOOD, ALPHA: torch.tensor(-2.0)}, ALPHA, {}),
    "alpha of two": ({**GOOD, ALPHA: torch.ones(2)}, ALPHA, {}),
    "alpha NaN": ({**GOOD, ALPHA: torch.tensor(torch.nan)}, ALPHA, {}),
    "alpha alone": ({**GOOD, "lora_unet_b.alpha": torch.tensor(1.0)}, "lora_unet_b.alpha", {}),
    "no base": (GOOD, A, {"modules": ()}),
    "base without the module": (GOOD, A, {"modules": ["unet.conv_in"]}),
    "base of another component": (GOOD, A, {"modules": ["text_encoder.a.to_q"]}),
    "base where two are meant": (
        GOOD, A, {"modules": ["unet.a.to.q", "unet.a.to_q", "unet.conv_in"]},
    ),
    "base of other sizes": (
        GOOD, A, {"modules": {"unet.a.to_q": Layer("linear", (7, 5)), "unet.conv_in": Layer()}},
    ),
    "base of another kernel": (
        GOOD, C, {"modules": {"unet.a.to_q": Layer(), "unet.conv_in": Layer("conv", (6, 3, 1, 1))}},
    ),
    "no such component": (GOOD, "'vae'", {"component": "vae"}),
    "one text encoder by two names": (
        {
            f"{start}_a.lora_{part}.weight": values(1, *shape)
            for start in ("lora_te", "lora_te1")
            for part, shape in (("down", (4, 6)), ("up", (7, 4)))
        }, "text_encoder.a", {"modules": ["text_encoder.a"]},
    ),
    "dora over columns": (also(SCALE, 1, 6), SCALE, {}),
    "dora of other rows": (also(SCALE, 6, 1), SCALE, {}),
    "LoCon in Tucker form": (also("lora_unet_conv_in.lora_mid.weight", 4, 4, 3, 3), "lora_mid", {}),
    "LoHa": (also("lora_unet_a_to_q.hada_w1_a", 7, 4), "LoHa", {}),
    "LoKr": (also("lora_unet_a_to_q.lokr_w1", 7, 4), "LoKr", {}),
    "OFT": (also("lora_unet_a_to_q.oft_blocks", 7, 4, 4), "OFT", {}),
    "whole differences": (also("lora_unet_a_to_q.diff", 7, 6), "diff", {}),
    "(IA)3": (also("lora_unet_a_to_q.on_input", 1), "(IA)3", {}),
    "GLoRA": (also("lora_unet_a_to_q.a1.weight", 7, 4), "GLoRA", {}),
    "an unknown part": (also("lora_unet_a_to_q.lora_left.weight", 7, 4), "lora_left", {}),
    "another start": (also("lora_vae_a.lora_down.weight", 7, 4), "lora_vae_a", {}),
    "PEFT's names": (also("unet.a.lora_A.weight", 7, 4), "unet.a.lora_A.weight", {}),
    "nothing after the start": (also("lora_unet_.lora_down.weight", 7, 4), "lora_unet_", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTAINERS)
def test_no_whole_file(case: str, tmp_path: Path) -> None:
    content, names = CONTAINERS[case]
    refuses(tmp_path, "kohya", content, names, **BASE)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    tensors, names, options = MALFORMED[case]
    refuses(tmp_path, "kohya", save(tensors), names, **{**BASE, **options})


def test_is_recognised_and_the_base_is_asked(tmp_path: Path) -> None:
    assert recognised(write(tmp_path / "file.safetensors", GOOD)) == "kohya"
    assert "--base" in refuses(tmp_path, "kohya", save(GOOD), "modules=")


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no component": ({}, {}, "--component"),
    "lora_bias": ({"lora_bias": True}, {"component": "unet"}, "bias of lora_B"),
    "bias": ({"bias": "lora_only"}, {"component": "unet"}, "bias"),
    "an embedding": ({"target_modules": ["emb"]}, {"component": "unet"}, "embedding"),
    "an attention": ({"target_modules": ["attn"]}, {"component": "unet"}, "attention"),
    "modules_to_save": ({"modules_to_save": ["a"]}, {"component": "unet"}, "modules_to_save"),
    "two of one name": ({"target_modules": ["a.b", "a_b"]}, {"component": "unet"}, "a_b"),
    "an unknown component": ({}, {"component": "vae"}, "--component"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_kohya_cannot_hold(case: str, tmp_path: Path) -> None:
    fields, options, says = REFUSED[case]
    inner = nn.ModuleDict({"b": nn.Linear(6, 6)})
    model = nn.ModuleDict({
        "a": inner, "a_b": nn.Linear(6, 6), "emb": nn.Embedding(5, 6),
        "attn": nn.MultiheadAttention(6, 2),
    })  # fmt: skip
    config = lora_ext.LoraConfig(**{"r": 2, "target_modules": ["a_b"], **fields})
    lora_ext.get_lora_model(model, config).save_pretrained(tmp_path / "a")
    out = tmp_path / "out.safetensors"
    refuses_to_write(
        lambda: convert(tmp_path / "a", out, target="kohya", **options), str(out), says
    )
