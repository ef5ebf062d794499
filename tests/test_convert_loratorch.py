"""LoRA-Torch's files: read by their meaning, which is W + scaling B A for every weight, and written
byte for byte."""

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
    refuses,
    refuses_to_write,
    round_trip,
    values,
    without,
    write,
)
from safetensors.torch import save
from torch import nn

import lora_ext
from lora_ext.io.convert import Layer, convert, recognised

ALPHA, R, E = 6, 2, 8
S = ALPHA / R
X, IMAGE = values(1, 3, 5, 6), values(2, 2, 4, 7, 7)
TOKENS = torch.tensor([[0, 3, 3], [8, 1, 2]])


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return S * (B.double() @ A.double())


# ---- layers of one weight ------------------------------------------------------------------------

# Of each: the plain layer, its input, and the shapes of A and B.
Sizes = tuple[int, ...]
LAYERS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, Sizes, Sizes]] = {
    "linear": (lambda: nn.Linear(6, 7), X, (R, 6), (7, R)),
    "linear, no bias": (lambda: nn.Linear(6, 7, bias=False), X, (R, 6), (7, R)),
    "linear, rank 5": (lambda: nn.Linear(6, 3), X, (5, 6), (3, 5)),
    "embedding": (lambda: nn.Embedding(9, 5), TOKENS, (R, 5), (9, R)),
    "embedding, square": (lambda: nn.Embedding(9, 9), TOKENS, (3, 9), (9, 3)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), IMAGE, (R * 3, 12), (18, R * 3)),
    "conv2d of one": (lambda: nn.Conv2d(4, 6, 1, stride=2), IMAGE, (R, 4), (6, R)),
    "conv2d of five": (lambda: nn.Conv2d(4, 3, 5, padding=2), IMAGE, (R * 5, 20), (15, R * 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGE, (R * 3, 12), (9, R * 3)),
    "conv1d of one": (lambda: nn.Conv1d(4, 6, 1), IMAGE[..., 0], (R, 4), (6, R)),
    "conv3d of one": (lambda: nn.Conv3d(4, 6, 1), IMAGE[..., None], (R, 4), (6, R)),
}  # fmt: skip


def kernel(plain: nn.Module) -> int:
    return plain.kernel_size[0] if hasattr(plain, "kernel_size") else 1  # type: ignore[index]


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x, size_A, size_B = LAYERS[case]
    plain = nn.Sequential(make())
    A, B = values(3, *size_A, dtype=dtype), values(4, *size_B, dtype=dtype)
    file = {"0.w_lora_A": A, "0.w_lora_B": B}
    folder = round_trip(tmp_path, "loratorch", file, alpha=ALPHA, modules=plain)
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        # The scaling is lora_alpha / r, where lora_A of a convolution has r k rows.
        weight, r = exact[0].weight, A.shape[0] / kernel(plain[0])
        weight += (ALPHA / r / S * product(A, B)).reshape(weight.shape)
    x = x if case.startswith("embedding") else x.double()
    close(loaded(plain, folder)(x.float() if x.is_floating_point() else x), exact(x))


@pytest.mark.parametrize("enabled", [(1, 0, 1), (1, 1, 1), (0, 1, 0), (0, 1), (1, 1)], ids=str)
def test_merged_linear(enabled: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, n, rows = nn.Sequential(nn.Linear(6, 12)), sum(enabled), 12 // len(enabled)
    A, B = values(3, n * R, 6), values(4, n * rows, R)
    file = {"0.w_lora_A": A, "0.w_lora_B": B}
    flags = {"0": [bool(one) for one in enabled]}
    folder = round_trip(tmp_path, "loratorch", file, alpha=ALPHA, slices=flags)
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        for at, slot in enumerate(i for i, one in enumerate(enabled) if one):
            update = product(A[at * R : (at + 1) * R], B[at * rows : (at + 1) * rows])
            exact[0].weight[slot * rows : (slot + 1) * rows] += update
    close(loaded(plain, folder)(X), exact(X.double()))


# ---- attention -----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.attn(q, k, v, need_weights=False)[0]
        return result


def exact_attention(plain: Attention, file: Tensors) -> Attention:
    """W + scaling B A for each weight, as LoRA-Torch has it."""
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        for key, A in file.items():
            if not key.endswith("_A"):
                continue
            update, part = product(A, file[f"{key[:-1]}B"]), key.split(".")[-1].split("_lora")[0]
            if part == "o":
                exact.attn.out_proj.weight += update
            elif update.shape[0] == 3 * E:
                exact.attn.in_proj_weight += update
            else:
                getattr(exact.attn, f"{part}_proj_weight").add_(update)
    return exact


@pytest.mark.parametrize("fused", ["qkv", "qk", "qv", "kv", "q", "k", "v", ""])
@pytest.mark.parametrize("o", [True, False], ids=["o", "no o"])
def test_attention_of_one_width(fused: str, o: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Attention(nn.MultiheadAttention(E, 2, batch_first=True))
    file = {f"attn.{fused}_lora_A": values(3, R, E), f"attn.{fused}_lora_B": values(4, 3 * E, R)}
    if o:
        file |= {"attn.o_lora_A": values(5, R, E), "attn.o_lora_B": values(6, E, R)}
    flags = {"attn": [one in fused for one in "qkv"]}
    back = {"slices": flags}
    folder = round_trip(tmp_path, "loratorch", file, back, alpha=ALPHA)
    x = values(7, 2, 3, E)
    q, k, v = x, x.flip(0), x * 0.5
    exact = exact_attention(plain, file)
    close(loaded(plain, folder)(q, k, v), exact(q.double(), k.double(), v.double()))


@pytest.mark.parametrize("enabled", ["qkvo", "qvo", "q", "kv", "ko"])
def test_attention_of_several_widths(enabled: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Attention(nn.MultiheadAttention(E, 2, kdim=6, vdim=4, batch_first=True))
    widths, file = {"q": E, "k": 6, "v": 4, "o": E}, {}
    for at, one in enumerate(enabled):
        file[f"attn.{one}_lora_A"] = values(at, R, widths[one])
        file[f"attn.{one}_lora_B"] = values(9 + at, E, R)
    folder = round_trip(tmp_path, "loratorch", file, alpha=ALPHA)
    layer = lora_ext.nn.MultiheadAttention(
        E, 2, list(enabled), r=0, kdim=6, vdim=4, batch_first=True
    )
    layer.load_state_dict(plain.attn.state_dict())
    q, k, v = values(7, 2, 3, E), values(8, 2, 3, 6), values(9, 2, 3, 4)
    exact = exact_attention(plain, file)
    close(loaded(Attention(layer), folder)(q, k, v), exact(q.double(), k.double(), v.double()))


def test_a_model_of_all_of_them(tmp_path: Path) -> None:
    """A transformer's block of OpenCLIP's names, with biases."""
    file = {
        "visual.conv1.w_lora_A": values(1, R * 2, 6), "visual.conv1.w_lora_B": values(2, 16, R * 2),
        "token_embedding.w_lora_A": values(3, R, E), "token_embedding.w_lora_B": values(4, 20, R),
        "resblocks.0.attn.qkv_lora_A": values(5, R, E),
        "resblocks.0.attn.qkv_lora_B": values(6, 3 * E, R),
        "resblocks.0.attn.o_lora_A": values(7, R, E), "resblocks.0.attn.o_lora_B": values(8, E, R),
        "resblocks.0.mlp.c_fc.w_lora_A": values(9, R, E),
        "resblocks.0.mlp.c_fc.w_lora_B": values(10, 4 * E, R),
        "resblocks.0.mlp.c_fc.bias": values(11, 4 * E),
    }  # fmt: skip
    modules = {"visual.conv1": Layer("conv", (8, 3, 2, 2))}
    adapter = round_trip(tmp_path, "loratorch", file, alpha=ALPHA, modules=modules)
    config = convert(tmp_path / "source.safetensors", tmp_path / "b", alpha=ALPHA, modules=modules)
    assert sorted(config.config["target_modules"]) == [
        "resblocks.0.attn", "resblocks.0.mlp.c_fc", "token_embedding", "visual.conv1",
    ]  # fmt: skip
    assert config.config["bias"] == "lora_only" and (adapter / "adapter_config.json").exists()


# ---- what is refused -----------------------------------------------------------------------------


def test_is_recognised_and_alpha_is_asked(tmp_path: Path) -> None:
    file = {"a.qv_lora_A": values(1, R, 6), "a.qv_lora_B": values(2, 18, R)}
    assert recognised(write(tmp_path / "file.safetensors", file)) == "loratorch"
    assert "--alpha" in refuses(tmp_path, "loratorch", save(file), "alpha=")


@pytest.mark.parametrize("fields, says", [
    ({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "bias"),
    ({"alpha_pattern": {"1": 3}}, "alpha="),
])  # fmt: skip
def test_what_loratorch_cannot_hold(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    config = lora_ext.LoraConfig(r=R, lora_alpha=4, target_modules=["0", "1"], **fields)
    lora_ext.get_lora_model(model, config).save_pretrained(tmp_path / "a")
    out = tmp_path / "out.safetensors"
    refuses_to_write(lambda: convert(tmp_path / "a", out, target="loratorch"), str(out), says)


A, B = "a.w_lora_A", "a.w_lora_B"
QA, QB, OA, OB = "b.qkv_lora_A", "b.qkv_lora_B", "b.o_lora_A", "b.o_lora_B"
GOOD: Tensors = {A: values(1, 4, 6), B: values(2, 7, 4), QA: values(3, 4, 6), QB: values(4, 18, 4),
                 OA: values(5, 4, 6), OB: values(6, 6, 4)}  # fmt: skip
CONTAINERS = {
    **containers(GOOD, A),
    **{f"attention, {k}": one for k, one in containers(GOOD, QB).items() if one[1] == QB},
}
MALFORMED: dict[str, tuple[Tensors, str, dict[str, Any]]] = {
    "no lora_B": (without(GOOD, B), B, {}),
    "no lora_A": (without(GOOD, A), A, {}),
    "no lora_B of an attention": (without(GOOD, QB), QB, {}),
    "no lora_A of out_proj": (without(GOOD, OA), OA, {}),
    "another rank": ({**GOOD, B: values(2, 7, 3)}, A, {}),
    "another rank in an attention": ({**GOOD, QA: values(2, 3, 6)}, QA, {}),
    "a rank for each projection": (
        {**GOOD, OA: values(5, 3, 6), OB: values(6, 6, 3)}, "b", {},
    ),
    "two thirds of the rows": ({**GOOD, QB: values(4, 12, 4)}, QB, {}),
    "two fused projections": (
        {**GOOD, "b.q_lora_A": values(7, 4, 6), "b.q_lora_B": values(8, 18, 4)}, "b.q", {},
    ),
    "fused and single": (
        {**GOOD, "b.q_lora_A": values(7, 4, 6), "b.q_lora_B": values(8, 6, 4)}, "b.q", {},
    ),
    "out_proj of another width": (
        {**GOOD, OA: values(7, 4, 5), OB: values(8, 5, 4)}, "b.", {},
    ),
    "a layer and an attention": ({**GOOD, "b.w_lora_A": values(7, 4, 6)}, "b.w_lora_A", {}),
    "qk with the rows of one": (
        {"b.qk_lora_A": values(7, 4, 6), "b.qk_lora_B": values(8, 6, 4)}, "b.qk_lora_B", {},
    ),
    "an order that there is not": ({**GOOD, "c.vq_lora_A": values(7, 4, 6)}, "c.vq_lora_A", {}),
    "in_proj_bias": ({**GOOD, "b.in_proj_bias": values(7, 18)}, "b.in_proj_bias", {}),
    "a whole weight": ({**GOOD, "a.weight": values(7, 7, 6)}, "a.weight", {}),
    "without a name": ({"w_lora_A": values(7, 4, 6)}, "w_lora_A", {}),
    "base of other columns": (GOOD, B, {"modules": {"a": Layer("linear", (7, 5))}}),
    "base is another embedding": (GOOD, B, {"modules": {"a": Layer("embedding", (9, 6))}}),
    "an embedding of two ranks": (
        {**GOOD, B: values(2, 7, 3)}, A, {"modules": {"a": Layer("embedding", (7, 6))}},
    ),
    "only biases": ({"a.bias": values(1, 7)}, "lora_A", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTAINERS)
def test_no_whole_file(case: str, tmp_path: Path) -> None:
    content, names = CONTAINERS[case]
    refuses(tmp_path, "loratorch", content, names, alpha=2)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    tensors, names, options = MALFORMED[case]
    refuses(tmp_path, "loratorch", save(tensors), names, **{"alpha": 2, **options})
