"""candle-lora's files, made by a script that follows its naming: read onto the models it has,
beside `W x + scaling B (A x)`, and written byte for byte."""

from __future__ import annotations

import copy
from collections.abc import Iterable
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
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

import lora_ext
from lora_ext.io.convert import Layer, convert, layers_of, recognised

pytest.importorskip("transformers")

import tiny_models
from transformers import BertConfig, BertModel

ALPHA, R = 6, 2
S = ALPHA / R
# (prefix of the conversion, modules in it in the order of their ids)
Conversions = Iterable[tuple[str, list[str]]]


def candle_file(model: nn.Module, conversions: Conversions, rank: int = R) -> Tensors:
    """What `get_tensors` of a converted model gives: ids restart in each conversion."""
    file: Tensors = {}
    for prefix, modules in conversions:
        for at, name in enumerate(modules):
            weight = model.get_submodule(name).weight
            shape = tuple(weight.shape)  # type: ignore[union-attr, arg-type]
            embedding = isinstance(model.get_submodule(name), nn.Embedding)
            out, inputs = (shape[1], (shape[0],)) if embedding else (shape[0], shape[1:])
            groups = getattr(model.get_submodule(name), "groups", 1)
            ones = (1,) * (len(shape) - 2)
            seed = len(file)
            file[f"{prefix}.a{at}.weight".lstrip(".")] = values(seed, rank, *inputs) / 3
            b = values(seed + 1, out, rank // groups, *ones) / 3
            file[f"{prefix}.b{at}.weight".lstrip(".")] = b
    return file


def exact_model(model: nn.Module, file: Tensors, conversions: Conversions) -> nn.Module:
    """The same model in float64 with W + scaling B A for each weight."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        for prefix, modules in conversions:
            for at, name in enumerate(modules):
                key = f"{prefix}.{{}}{at}.weight".lstrip(".")
                A, B = (file[key.format(what)].double() for what in "ab")
                module = exact.get_submodule(name)
                weight = module.weight
                assert isinstance(weight, torch.Tensor)
                if A.dim() == 4:
                    update = per_group(A, B)
                else:
                    update = (B @ A).t() if isinstance(module, nn.Embedding) else B @ A
                # Of this module alone, also where others share the weight.
                module.weight = nn.Parameter(weight + S * update.reshape(weight.shape))
    return exact


def per_group(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A convolution with A and then one of 1 x 1 with B, as one kernel."""
    groups = A.shape[0] // B.shape[1]
    parts = zip(A.chunk(groups), B.chunk(groups), strict=True)
    return torch.cat([torch.einsum("or,rixy->oixy", b[..., 0, 0], a) for a, b in parts])


# ---- the models ----------------------------------------------------------------------------------


class DinoBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v))
        result: torch.Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](x)))
        return result


class Dino(nn.Module):
    """dinov2, as candle has it: a strided patch convolution, fused q, k and v."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, stride=4)})
        self.blocks = nn.ModuleList(DinoBlock(width) for _ in range(2))
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.head(torch.cat([x[:, 0], x.mean(1)], -1))
        return result


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.downsample = nn.Sequential(
            nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = F.relu(
            self.conv2(F.relu(self.bn1(self.conv1(x)))) + self.downsample(x)
        )
        return result


class Resnet(nn.Module):
    """resnet: kernels of 7, 3 and 1, with stride and padding, of which only they are converted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.layer1 = nn.Sequential(ResnetBlock(8, 8, 1))
        self.layer2 = nn.Sequential(ResnetBlock(8, 12, 2), ResnetBlock(12, 12, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.conv1(x)))
        result: torch.Tensor = self.fc(x.mean((2, 3)))
        return result


def llama(order: list[str]) -> tuple[nn.Module, dict[str, Any], Conversions, dict[str, str]]:
    """q, k, v and o of a layer are fields of one conversion, numbered as a hash map has them."""
    model, inputs = tiny_models.llama()
    layers = len(model.model.layers)  # type: ignore[union-attr, arg-type]
    conversions = [
        (f"model.layers.{at}.self_attn.lora_llama_csa",
         [f"model.layers.{at}.self_attn.{name}_proj" for name in order])
        for at in range(layers)
    ]  # fmt: skip
    conversions.append(("lora_llama", ["lm_head", "model.embed_tokens"]))
    ids = {f"lora_llama_csa.{at}": f"{name}_proj" for at, name in enumerate(order)}
    return model, inputs, conversions, {
        **ids, "lora_llama.0": "lm_head", "lora_llama.1": "model.embed_tokens",
    }  # fmt: skip


def bert() -> tuple[nn.Module, dict[str, Any], Conversions, dict[str, str]]:
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20, max_position_embeddings=12, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config).eval()
    conversions = [
        (
            f"{name}.lora_embed" if isinstance(module, nn.Embedding) else f"{name}.lora_linear",
            [name],
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.Linear) and name != "pooler.dense"
    ]
    return model, {"input_ids": torch.tensor([[1, 5, 9, 2]])}, conversions, {}


def t5() -> tuple[nn.Module, dict[str, Any], Conversions, dict[str, str]]:
    """Tied embeddings and a table of relative positions. candle calls `shared`; transformers' model
    calls embeddings of the stacks, of the same weight."""
    model, inputs = tiny_models.t5()
    conversions = [
        (f"{name}.traced_lora_{'embed' if isinstance(module, nn.Embedding) else 'linear'}", [name])
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.Linear) and name != "lm_head"
        and (name == "shared" or not name.endswith("embed_tokens"))
    ]  # fmt: skip
    return model, inputs, conversions, {"traced_lora_linear.0": "", "traced_lora_embed.0": ""}


def dinov2() -> tuple[nn.Module, dict[str, Any], Conversions, dict[str, str]]:
    model = Dino()
    conversions = [
        (f"{name}.lora_{field}", [f"{name}.{field}"])
        for at in range(2)
        for name, fields in (
            (f"blocks.{at}.attn", ("qkv", "proj")),
            (f"blocks.{at}.mlp", ("fc1", "fc2")),
        )
        for field in fields
    ] + [("patch_embed.lora_proj", ["patch_embed.proj"]), ("lora_head", ["head"])]
    ids = {f"lora_{one}.0": one for one in ("qkv", "proj", "fc1", "fc2", "head")}
    return model, {"x": values(1, 2, 3, 8, 8)}, conversions, ids


def resnet() -> tuple[nn.Module, dict[str, Any], Conversions, dict[str, str]]:
    model = Resnet().eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return model, {"x": values(1, 2, 3, 16, 16)}, [(f"{n}.lora_conv2d", [n]) for n in names], {}


MODELS = {
    "llama": lambda: llama(["q", "k", "v", "o"]),
    "llama, another run": lambda: llama(["o", "v", "q", "k"]),
    "bert": bert,
    "t5": t5,
    "dinov2": dinov2,
    "resnet": resnet,
}


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    result = model(**inputs)
    if isinstance(result, torch.Tensor):
        return result
    found = result.logits if hasattr(result, "logits") else result.last_hidden_state
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_models(case: str, rank: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs, conversions, ids = MODELS[case]()
    file = candle_file(model, conversions, rank)
    alpha = ALPHA * rank / R  # the same scaling
    folder = round_trip(tmp_path, "candle", file, alpha=alpha, ids=ids, modules=model)
    exact = exact_model(model, file, conversions)
    double = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    with torch.no_grad():
        expected = output(exact, double)
        close(output(loaded(model, folder), inputs), expected)


@pytest.mark.parametrize("case", MODELS)
def test_peft_loads_them(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs, conversions, ids = MODELS[case]()
    file = candle_file(model, conversions)
    path = write(tmp_path / "file.safetensors", file)
    convert(path, tmp_path / "peft", alpha=ALPHA, ids=ids, modules=model)
    exact = exact_model(model, file, conversions)
    double = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    with torch.no_grad():
        expected = output(exact, double)
        close(output(loaded_by_peft(model, tmp_path / "peft"), inputs), expected)


def test_shared_embedding_of_t5(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs, conversions, _ = t5()
    file = candle_file(model, conversions)
    path, x = write(tmp_path / "file.safetensors", file), inputs["input_ids"]
    convert(path, tmp_path / "peft", alpha=ALPHA, modules=model)
    exact = exact_model(model, file, conversions)
    shared = loaded(model, tmp_path / "peft").get_submodule("base_model.model.shared")
    close(shared(x), exact.shared(x))  # type: ignore[operator]


def test_without_the_base(tmp_path: Path) -> None:
    """Names and shapes are enough: embeddings are told by the names of their conversions."""
    model, inputs, conversions, _ = bert()
    file = candle_file(model, conversions)
    folder = round_trip(tmp_path, "candle", file, alpha=ALPHA)
    with torch.no_grad():
        expected = output(exact_model(model, file, conversions), inputs)
        close(output(loaded(model, folder), inputs), expected)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=groups), nn.Conv2d(12, 4, 1))
    conversions = [("0.lora_conv2d", ["0"]), ("1.lora_conv2d", ["1"])]
    file = candle_file(model, conversions, rank=4)
    folder = round_trip(tmp_path, "candle", file, alpha=2 * ALPHA, modules=model)
    x = values(1, 2, 8, 6, 6)
    exact = exact_model(model, file, conversions)
    close(loaded(model, folder)(x), exact(x.double()))


def test_conv1d_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 1))
    file = {"0.lora_conv1d.a0.weight": values(1, R, 4), "0.lora_conv1d.b0.weight": values(2, 6, R)}
    round_trip(tmp_path, "candle", file, alpha=ALPHA, modules=model)
    exact, x = copy.deepcopy(model).double(), values(3, 2, 4, 5)
    with torch.no_grad():
        update = file["0.lora_conv1d.b0.weight"].double() @ file["0.lora_conv1d.a0.weight"].double()
        exact[0].weight += S * update[..., None]
    close(loaded(model, tmp_path / "peft")(x), exact(x.double()))


def test_fields_by_their_shapes(tmp_path: Path) -> None:
    """Where the base leaves no choice, nobody has to say which id is which."""
    model = nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)})
    root = nn.ModuleDict({"mlp": model})
    names = ["mlp.down", "mlp.up"]
    file = candle_file(root, [("mlp.lora_mlp", names)])
    path = write(tmp_path / "file.safetensors", file)
    adapter = convert(path, tmp_path / "peft", alpha=ALPHA, modules=root)
    assert adapter.config["target_modules"] == sorted(names)
    down = adapter.tensors["base_model.model.mlp.down.lora_A.weight"]
    assert torch.equal(down, file["mlp.lora_mlp.a0.weight"])


# ---- what is asked, and what is refused ----------------------------------------------------------

A, B = "m.q.lora_linear.a0.weight", "m.q.lora_linear.b0.weight"
C, D = "m.c.lora_conv2d.a0.weight", "m.c.lora_conv2d.b0.weight"
GOOD: Tensors = {A: values(1, 4, 6), B: values(2, 7, 4), C: values(3, 4, 3, 3, 3),
                 D: values(4, 6, 4, 1, 1)}  # fmt: skip
CSA = {
    f"l.0.lora_llama_csa.{what}{at}.weight": values(at, *shape)
    for at in range(2)
    for what, shape in (("a", (2, 6)), ("b", (6, 2)))
}
BASE = {f"l.0.{name}": Layer("linear", (6, 6)) for name in ("q_proj", "o_proj")}
CONTAINERS = {key: one for key, one in containers(GOOD, A).items() if key != "three dimensions"} | {
    f"convolution, {k}": one
    for k, one in containers(GOOD, D).items()
    if one[1] == D and k != "a row less"
}
MALFORMED: dict[str, tuple[Tensors, str, dict[str, Any]]] = {
    "no b": (without(GOOD, B), B, {}),
    "no a": (without(GOOD, A), A, {}),
    "no a of a convolution": (without(GOOD, C), C, {}),
    "another rank": ({**GOOD, B: values(2, 7, 3)}, B, {}),
    "three dimensions": ({**GOOD, B: values(2, 7, 4, 1)}, B, {}),
    "a matrix and a kernel": ({**GOOD, D: values(2, 6, 4)}, D, {}),
    "a kernel that is not 1 x 1": ({**GOOD, D: values(2, 6, 4, 3, 3)}, D, {}),
    "ranks of no groups": ({**GOOD, D: values(2, 6, 3, 1, 1)}, D, {}),
    "rows of no groups": ({**GOOD, D: values(2, 5, 2, 1, 1)}, D, {}),
    "ids that are not said": (CSA, "lora_llama_csa.a0", {}),
    "ids of the same shapes": (CSA, "o_proj", {"modules": BASE}),
    "one id that is not said": (CSA, "a1", {"ids": {"0": "q_proj"}}),
    "two ids of one field": (CSA, "l.0.q_proj", {"ids": {"0": "q_proj", "1": "q_proj"}}),
    "the whole model": (
        {"a0.weight": values(1, 4, 6), "b0.weight": values(2, 7, 4)}, "a0.weight", {},
    ),
    "one field of many": (
        {"lora_falcon.a0.weight": values(1, 4, 6), "lora_falcon.b0.weight": values(2, 7, 4)},
        "lora_falcon.a0", {},
    ),
    "no module at all": (
        {"a0.weight": values(1, 4, 6), "b0.weight": values(2, 7, 4)}, "a0.weight",
        {"ids": {"0": ""}},
    ),
    "base of other sizes": (GOOD, B, {"modules": {"m.q": Layer("linear", (7, 5))}}),
    "base of another kernel": (GOOD, D, {"modules": {"m.c": Layer("conv", (6, 3, 1, 1))}}),
    "a wide Conv1d": (GOOD, B, {"modules": {"m.q": Layer("conv", (7, 6, 3))}}),
    "an id with a zero before": (
        {**GOOD, "m.a00.weight": values(1, 4, 6)}, "m.a00.weight", {},
    ),
    "an id of 20 digits": ({**GOOD, f"m.a{10**20}.weight": values(1, 4, 6)}, f"a{10**20}", {}),
    "a negative id": ({**GOOD, "m.a-1.weight": values(1, 4, 6)}, "m.a-1.weight", {}),
    "a whole weight": ({**GOOD, "m.q.weight": values(1, 7, 6)}, "m.q.weight", {}),
    "a bias": ({**GOOD, "m.a0.bias": values(1, 7)}, "m.a0.bias", {}),
    "PEFT's names": ({**GOOD, "m.q.lora_A.weight": values(1, 4, 6)}, "m.q.lora_A.weight", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTAINERS)
def test_no_whole_file(case: str, tmp_path: Path) -> None:
    content, names = CONTAINERS[case]
    refuses(tmp_path, "candle", content, names, alpha=2)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    tensors, names, options = MALFORMED[case]
    refuses(tmp_path, "candle", save(tensors), names, **{"alpha": 2, **options})


def test_is_recognised_and_alpha_is_asked(tmp_path: Path) -> None:
    assert recognised(write(tmp_path / "file.safetensors", GOOD)) == "candle"
    assert "--alpha" in refuses(tmp_path, "candle", save(GOOD), "alpha=")
    assert "--id" in refuses(tmp_path, "candle", save(CSA), "ids=", alpha=2)


REFUSED: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "dora": (nn.Linear(6, 4), {"use_dora": True}, "DoRA"),
    "lora_bias": (nn.Linear(6, 4), {"lora_bias": True}, "lora_bias"),
    "bias": (nn.Linear(6, 4), {"bias": "all"}, "bias"),
    "conv1d": (nn.Conv1d(4, 6, 3), {}, "in 1 dimensions"),
    "conv3d": (nn.Conv3d(4, 6, 3), {}, "in 3 dimensions"),
    "attention": (nn.MultiheadAttention(8, 2), {}, "attention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_candle_cannot_hold(case: str, tmp_path: Path) -> None:
    layer, fields, says = REFUSED[case]
    config = lora_ext.LoraConfig(r=R, target_modules=["0"], **fields)
    lora_ext.get_lora_model(nn.Sequential(layer), config).save_pretrained(tmp_path / "a")
    out = tmp_path / "out.safetensors"
    refuses_to_write(lambda: convert(tmp_path / "a", out, target="candle"), str(out), says)


def test_layers_of_a_model() -> None:
    found = layers_of(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Embedding(5, 6)))
    assert found == {"0": Layer("conv", (8, 2, 3, 3), 2), "1": Layer("embedding", (5, 6))}
