"""loralib's files: read by their meaning, beside loralib itself, and written byte for byte."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    values,
    without,
    write,
)
from safetensors.torch import load_file, save
from torch import nn

import lora_ext
from lora_ext.io.convert import Layer, convert, recognised

loralib = pytest.importorskip("loralib")

ALPHA, R = 6, 2
F64 = torch.float64
TOKENS = torch.tensor([[0, 3, 3], [8, 1, 2]])
X, IMAGE = values(1, 3, 5, 6), values(2, 2, 4, 7, 7)
QKV = ((8, True), (4, False), (4, True))  # grouped-query attention: k and v have fewer rows


class Small(nn.Module):
    """One layer below a name with dots."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"layer": layer})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.block["layer"](x)
        return result


def merged(enabled: list[bool], out: int = 12) -> Callable[[], nn.Module]:
    return lambda: loralib.MergedLinear(6, out, r=R, lora_alpha=ALPHA, enable_lora=enabled)


def conv(kind: str, *sizes: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(loralib, kind)(*sizes, r=R, lora_alpha=ALPHA, **options)


# Of each: loralib's layer, the plain one, an input, and what the caller has to say.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], torch.Tensor, Any]] = {
    "linear": (lambda: loralib.Linear(6, 7, r=R, lora_alpha=ALPHA), lambda: nn.Linear(6, 7), X, {}),
    "linear, no bias": (
        lambda: loralib.Linear(6, 7, r=R, lora_alpha=ALPHA, bias=False),
        lambda: nn.Linear(6, 7, bias=False), X, {},
    ),
    "linear, rank 1": (
        lambda: loralib.Linear(6, 9, r=1, lora_alpha=ALPHA), lambda: nn.Linear(6, 9), X, {},
    ),
    "linear, rank 5": (
        lambda: loralib.Linear(6, 4, r=5, lora_alpha=ALPHA), lambda: nn.Linear(6, 4), X, {},
    ),
    "embedding": (
        lambda: loralib.Embedding(9, 5, r=R, lora_alpha=ALPHA), lambda: nn.Embedding(9, 5),
        TOKENS, {},
    ),
    "embedding, wide": (
        lambda: loralib.Embedding(9, 9, r=3, lora_alpha=ALPHA), lambda: nn.Embedding(9, 9),
        TOKENS, {},
    ),
    "qkv": (merged([True, False, True]), lambda: nn.Linear(6, 12), X,
            {"slices": {"layer": (True, False, True)}}),
    "qkv, all": (merged([True] * 3), lambda: nn.Linear(6, 12), X,
                 {"slices": {"layer": [True] * 3}}),
    "qkv, the last": (merged([False, False, True]), lambda: nn.Linear(6, 12), X,
                      {"slices": {"block.layer": [False, False, True]}}),
    "qkv, two slices": (merged([False, True]), lambda: nn.Linear(6, 12), X,
                        {"slices": {"layer": [False, True]}}),
    "qkv, sizes": (merged([True, False, True]), lambda: nn.Linear(6, 12), X,
                   {"slices": {"layer": ((4, True), (4, False), (4, True))}}),
    "conv2d": (conv("Conv2d", 4, 6, 3), lambda: nn.Conv2d(4, 6, 3), IMAGE, {}),
    "conv2d of one": (conv("Conv2d", 4, 6, 1), lambda: nn.Conv2d(4, 6, 1), IMAGE, {}),
    "conv2d of two": (conv("Conv2d", 4, 5, 2), lambda: nn.Conv2d(4, 5, 2), IMAGE, {}),
    "conv2d, strided": (
        conv("Conv2d", 4, 6, 3, stride=2, padding=1),
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGE, {},
    ),
    "conv2d, dilated": (
        conv("Conv2d", 4, 6, 3, dilation=2), lambda: nn.Conv2d(4, 6, 3, dilation=2), IMAGE, {},
    ),
    "conv2d, two groups": (
        conv("Conv2d", 4, 6, 3, groups=2), lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGE, {},
    ),
    "conv2d, groups of one": (
        conv("Conv2d", 4, 8, 2, groups=4), lambda: nn.Conv2d(4, 8, 2, groups=4), IMAGE, {},
    ),
    "conv1d of one": (
        conv("Conv1d", 4, 6, 1), lambda: nn.Conv1d(4, 6, 1), IMAGE[..., 0], {},
    ),
    "conv3d of one": (
        conv("Conv3d", 4, 6, 1), lambda: nn.Conv3d(4, 6, 1), IMAGE[..., None], {},
    ),
}  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_case = pytest.mark.parametrize("case", CASES)


def trained(case: str) -> tuple[nn.Module, nn.Module, Tensors]:
    """loralib's layer, the plain one of the same weight, and its file."""
    torch.manual_seed(0)
    make, make_plain, _, _ = CASES[case]
    layer, plain = Small(make()), Small(make_plain())
    file = loralib.lora_state_dict(layer)
    for at, (key, tensor) in enumerate(sorted(file.items())):
        file[key] = values(at + 10, *tensor.shape)
    layer.load_state_dict(file, strict=False)
    base = {k.replace(".conv.", "."): t for k, t in layer.state_dict().items() if "lora_" not in k}
    plain.load_state_dict(base)
    return layer, plain, file


def options_of(case: str, plain: nn.Module) -> dict[str, Any]:
    return {"alpha": ALPHA, "modules": plain, **CASES[case][3]}


@each_case
def test_is_what_loralib_computes_and_comes_back(case: str, tmp_path: Path) -> None:
    layer, plain, file = trained(case)
    folder = round_trip(tmp_path, "loralib", file, **options_of(case, plain))
    model, x = loaded(plain, folder), CASES[case][2]
    exact = copy.deepcopy(layer).double().train()  # not merged; no dropout
    close(model(x), exact(x.double() if x.is_floating_point() else x))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("conv2d, dilated",)])
def test_peft_loads_it(case: str, tmp_path: Path) -> None:
    """But for convolutions with a dilation, which PEFT cannot run."""
    layer, plain, file = trained(case)
    path, x = write(tmp_path / "file.safetensors", file), CASES[case][2]
    convert(path, tmp_path / "peft", **options_of(case, plain))
    exact = copy.deepcopy(layer).double().train()
    close(
        loaded_by_peft(plain, tmp_path / "peft")(x),
        exact(x.double() if x.is_floating_point() else x),
    )


@each_case
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bit_files_come_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, plain, file = trained(case)
    file = {key: tensor.to(dtype) for key, tensor in file.items()}
    round_trip(tmp_path, "loralib", file, **options_of(case, plain))


def test_slices_of_several_sizes(tmp_path: Path) -> None:
    """Grouped-query attention, of which loralib has no layer but whose formula is plain."""
    A, B = values(3, 2 * R, 6), values(4, 12, R)
    file = {"block.layer.lora_A": A, "block.layer.lora_B": B}
    plain = Small(nn.Linear(6, 16))
    folder = round_trip(tmp_path, "loralib", file, alpha=ALPHA, slices={"layer": QKV})
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        weight = exact.block["layer"].weight
        weight[:8] += ALPHA / R * B[:8].double() @ A[:R].double()
        weight[12:] += ALPHA / R * B[8:].double() @ A[R:].double()
    close(loaded(plain, folder)(X), exact(X.double()))


def test_lora_exts_layers_write_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = Small(
        lora_ext.loralib.MergedLinear(6, 12, r=R, lora_alpha=ALPHA, enable_lora=[True] * 2)
    )
    file = lora_ext.loralib.lora_state_dict(layer)
    assert file.keys() == {"block.layer.lora_A", "block.layer.lora_B"}
    # The base's shape says that all slices are enabled; back, the caller does.
    back = {"slices": {"layer": [True, True]}}
    round_trip(tmp_path, "loralib", file, back, alpha=ALPHA, modules=Small(nn.Linear(6, 12)))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases(bias: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = nn.Sequential(
        nn.Linear(6, 6), loralib.Linear(6, 4, r=R, lora_alpha=ALPHA), nn.LayerNorm(4),
    )  # fmt: skip
    file = {k: t.clone() for k, t in loralib.lora_state_dict(lora, bias=bias).items()}
    nn.init.normal_(file["1.lora_B"])
    file["1.bias"] += 1
    folder = round_trip(tmp_path, "loralib", file, alpha=ALPHA)
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.LayerNorm(4))
    plain.load_state_dict({k: t for k, t in lora.state_dict().items() if "lora_" not in k})
    lora.load_state_dict(file, strict=False)
    close(loaded(plain, folder)(X), lora.double()(X.double()))


def test_biases_of_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = nn.Sequential(conv("Conv2d", 4, 6, 3)(), nn.Conv2d(6, 2, 1))
    file = {k: t + 0.1 for k, t in loralib.lora_state_dict(lora, bias="all").items()}
    assert "0.conv.bias" in file
    plain = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1))
    folder = round_trip(tmp_path, "loralib", file, alpha=ALPHA, modules=plain)
    names = {k.replace("0.conv.", "0."): t for k, t in lora.state_dict().items()}
    plain.load_state_dict({k: t for k, t in names.items() if "lora_" not in k})
    lora.load_state_dict(file, strict=False)
    close(loaded(plain, folder)(IMAGE), lora.double()(IMAGE.double()))


def test_gpt2(tmp_path: Path) -> None:
    """A fused projection that is stored [in, out]."""
    tiny_models = pytest.importorskip("tiny_models")
    torch.manual_seed(0)
    model, inputs = tiny_models.gpt2()
    name = "transformer.h.0.attn.c_attn"
    width = model.get_submodule(name).weight.shape[0]
    A, B = values(5, 2 * R, width), values(6, 2 * width, R)
    file = {f"{name}.lora_A": A, f"{name}.lora_B": B}
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        weight = exact.get_submodule(name).weight
        weight[:, :width] += ALPHA / R * (B[:width].double() @ A[:R].double()).t()
        weight[:, 2 * width :] += ALPHA / R * (B[width:].double() @ A[R:].double()).t()
    options = {"alpha": ALPHA, "slices": {"c_attn": [True, False, True]}, "modules": model}
    folder = round_trip(tmp_path, "loralib", file, **options)
    close(loaded(model, folder)(**inputs).logits, exact(**inputs).logits)


# ---- what is asked, and what is refused ----------------------------------------------------------


def test_merged_linear_of_lora_ext_is_saved_plain(tmp_path: Path) -> None:
    """Its own keys are grouped; the message says how to save one that others can read."""
    torch.manual_seed(0)
    enabled = [True, False, True]
    base = Small(lora_ext.nn.MergedLinear(6, 12, enable_lora=enabled))
    config = lora_ext.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["layer"])
    model = lora_ext.get_lora_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "plain", as_plain_lora=True)
    out = tmp_path / "out.safetensors"
    refuses_to_write(
        lambda: convert(tmp_path / "own", out, target="loralib"), "block.layer", "as_plain_lora"
    )
    convert(tmp_path / "plain", out, target="loralib", slices={"layer": enabled})
    lora = Small(merged(enabled)())
    state = base.block["layer"].state_dict()
    weights = {f"block.layer.{k}": t for k, t in state.items() if "lora_" not in k}
    lora.load_state_dict({**weights, **load_file(out)}, strict=False)
    close(lora.train()(X), model.double().eval()(X.double()))


def test_alpha_is_asked_and_kept(tmp_path: Path) -> None:
    file = {"a.lora_A": values(1, R, 6), "a.lora_B": values(2, 7, R)}
    said = refuses(tmp_path, "loralib", save(file), "alpha=")
    assert "--alpha" in said
    path = write(tmp_path / "file.safetensors", file)
    assert convert(path, tmp_path / "peft", alpha=2.5).config["lora_alpha"] == 2.5
    convert(tmp_path / "peft", tmp_path / "b.safetensors", target="loralib")
    # In the metadata of what lora_ext wrote, so that it need not be asked again.
    assert convert(tmp_path / "b.safetensors", tmp_path / "c").config["lora_alpha"] == 2.5


def test_is_recognised(tmp_path: Path) -> None:
    file = {"a.lora_A": values(1, R, 6), "a.lora_B": values(2, 7, R)}
    assert recognised(write(tmp_path / "file.safetensors", file)) == "loralib"


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_pickles_are_refused_with_the_cure(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    torch.save({"a.lora_A": values(1, R, 6)}, path)
    for source in (None, "loralib"):
        refuses_to_write(
            lambda source=source: convert(path, tmp_path / "out", source=source, alpha=1),  # type: ignore[misc]
            str(path), "pickle", "weights_only=True",
        )  # fmt: skip


def adapter(tmp_path: Path, **options: Any) -> Path:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    config = lora_ext.LoraConfig(
        **{"r": R, "lora_alpha": 4, "target_modules": ["0", "1"], **options}
    )
    lora_ext.get_lora_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "several alphas": ({"alpha_pattern": {"1": 3}}, "alpha="),
    "rslora of several ranks": ({"use_rslora": True, "rank_pattern": {"1": 3}}, "alpha="),
    "modules_to_save": ({"target_modules": ["0"], "modules_to_save": ["1"]}, "modules_to_save"),
    "target_parameters": (
        {"target_modules": ["0"], "target_parameters": ["1.weight"]}, "target_parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_loralib_cannot_hold(case: str, tmp_path: Path) -> None:
    fields, says = REFUSED[case]
    folder, out = adapter(tmp_path, **fields), tmp_path / "out.safetensors"
    refuses_to_write(lambda: convert(folder, out, target="loralib"), str(out), says)
    assert not out.exists()


@pytest.mark.parametrize("fields", [
    {"alpha_pattern": {"1": 3}}, {"use_rslora": True, "rank_pattern": {"1": 3}},
    {"use_rslora": True},
], ids=["alphas", "rslora and ranks", "rslora"])  # fmt: skip
def test_alphas_are_folded_into_one_that_is_given(fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    config = lora_ext.LoraConfig(r=R, lora_alpha=4, target_modules=["0", "1"], **fields)
    model = lora_ext.get_lora_model(copy.deepcopy(plain), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out.safetensors"
    convert(tmp_path / "adapter", out, target="loralib", alpha=5)
    file = load_file(out)
    ranks = [file[f"{name}.lora_A"].shape[0] for name in "01"]
    lora = nn.Sequential(*(
        loralib.Linear(6, n, r=r, lora_alpha=5) for n, r in zip((6, 4), ranks, strict=True)
    ))  # fmt: skip
    lora.load_state_dict({**plain.state_dict(), **file})
    close(lora.train()(X), model.double().eval()(X.double()))


A, B = "a.lora_A", "a.lora_B"
GOOD: Tensors = {A: values(1, 4, 6), B: values(2, 7, 4), "b.lora_A": values(3, 4, 6),
                 "b.lora_B": values(4, 6, 4)}  # fmt: skip
CONTAINERS = containers(GOOD, A)
MALFORMED: dict[str, tuple[Tensors, str, dict[str, Any]]] = {
    "no lora_B": (without(GOOD, B), B, {}),
    "no lora_A": (without(GOOD, A), A, {}),
    "one dimension": ({**GOOD, B: values(2, 7)}, B, {}),
    "four dimensions": ({**GOOD, B: values(2, 7, 4, 1, 1)}, B, {}),
    "another rank": ({**GOOD, B: values(2, 7, 3)}, A, {}),
    "lora_A is empty": ({**GOOD, A: values(2, 0, 6)}, A, {}),
    "lora_B is empty": ({**GOOD, B: values(2, 7, 0)}, B, {}),
    "a slice unknown": ({**GOOD, B: values(2, 7, 2)}, B, {}),
    "base of other columns": (GOOD, B, {"modules": {"a": Layer("linear", (7, 5))}}),
    "base of other rows": (GOOD, B, {"modules": {"a": Layer("linear", (14, 6))}}),
    "base of fewer rows": (GOOD, B, {"modules": {"a": Layer("linear", (4, 6))}}),
    "slices of another base": (
        GOOD,
        "b.lora_B",
        {"slices": {"b": [True, False]}, "modules": {"b": Layer("linear", (8, 6))}},
    ),
    "slices of odd rows": (GOOD, "a", {"slices": {"a": [True, True]}}),
    "slices without one": (GOOD, "a", {"slices": {"a": [False, False]}}),
    "slices of another rank": (GOOD, "b.lora_A", {"slices": {"b": [True, True]}}),
    "slices of texts": (GOOD, "a", {"slices": {"a": ["q", "v"]}}),
    "slices of negative rows": (GOOD, "a", {"slices": {"a": [(-7, True)]}}),
    "slices of too many rows": (GOOD, "a", {"slices": {"a": [(1 << 40, True)]}}),
    "another convolution": (GOOD, B, {"modules": {"a": Layer("conv", (7, 2, 3, 3))}}),
    "an uneven kernel": (GOOD, B, {"modules": {"a": Layer("conv", (7, 6, 1, 3))}}),
    "without a name": ({"lora_A": values(1, 4, 6)}, "lora_A", {}),
    "a whole weight": ({**GOOD, "a.weight": values(1, 7, 6)}, "a.weight", {}),
    "PEFT's names": ({**GOOD, "a.lora_A.weight": values(1, 4, 6)}, "a.lora_A.weight", {}),
    "bias of integers": ({**GOOD, "a.bias": torch.arange(7)}, "a.bias", {}),
    "only biases": ({"a.bias": values(1, 7)}, "lora_A", {}),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_no_whole_file(case: str, tmp_path: Path) -> None:
    content, names = CONTAINERS[case]
    refuses(tmp_path, "loralib", content, names, alpha=2)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    tensors, names, options = MALFORMED[case]
    refuses(tmp_path, "loralib", save(tensors), names, **{"alpha": 2, **options})


@pytest.mark.parametrize("alpha", ["", "x", "nan", "inf", "-1", "0", "1e999", "9" * 5000])
def test_alpha_of_the_metadata_is_checked(alpha: str, tmp_path: Path) -> None:
    refuses(tmp_path, "loralib", save(GOOD, metadata={"lora_alpha": alpha}), "lora_alpha")
