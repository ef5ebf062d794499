"""Whole models: what trains, what is saved, what is printed, and which path each layer takes."""

from __future__ import annotations

from platform import machine
from typing import Any

import pytest
import torch
from devices import dots_slowly, multiplies_fp16
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_ext
from lora_ext.nn import Linear


class Block(nn.Module):
    """A layer with an adapter, one without, a norm, and parameters with misleading names."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.query = Linear(6, 6, 2, init_lora_weights=False, **options)
        self.plain = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.relative_attention_bias = nn.Embedding(4, 6)
        self.bias_table = nn.Parameter(torch.randn(6))
        self.lora_scores = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.plain(self.query(x) + self.bias_table))
        return y


ADAPTER = {"query.lora_A", "query.lora_B", "query.lora_bias"}
BY_BIAS = {
    "none": ADAPTER,
    "lora_only": ADAPTER | {"query.bias"},
    "all": ADAPTER | {"query.bias", "plain.bias", "norm.bias"},
}
each_bias = pytest.mark.parametrize(("bias", "names"), BY_BIAS.items(), ids=BY_BIAS.keys())


@each_bias
@pytest.mark.parametrize("start", [True, False], ids=["all trainable", "all frozen"])
def test_only_lora_is_trainable(start: bool, bias: str, names: set[str]) -> None:
    model = Block(lora_bias=True).requires_grad_(start)
    lora_ext.mark_only_lora_as_trainable(model, bias)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


def test_an_adapter_under_two_names_trains() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Linear(4, 4, 2))
    model.append(model[1])
    lora_ext.mark_only_lora_as_trainable(model, "lora_only")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"1.bias", "1.lora_A", "1.lora_B"}


def test_a_layer_can_be_the_model() -> None:
    layer = Linear(4, 4, 2)
    lora_ext.mark_only_lora_as_trainable(layer)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert set(lora_ext.lora_state_dict(layer)) == {"lora_A", "lora_B"}


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@each_bias
def test_lora_state_dict_round_trip(bias: str, names: set[str], merged: bool) -> None:
    torch.manual_seed(0)
    model, other, x = Block(lora_bias=True), Block(lora_bias=True), torch.randn(3, 6)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if k not in names}
    other.load_state_dict(frozen, strict=False)
    expected = model(x)
    assert not torch.equal(other(x), expected)
    if merged:
        model.query.merge()
    state = lora_ext.lora_state_dict(model, bias)
    assert set(state) == names
    result = other.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) == set(frozen)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_modules_saved_whole_belong_to_their_adapter(bias: str) -> None:
    def made() -> lora_ext.LoraModel:
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        config = lora_ext.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], bias=bias)
        return lora_ext.get_lora_model(nn.Sequential(nn.Linear(6, 6), head), config)

    model, x = made(), torch.randn(5, 6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    lora_ext.mark_only_lora_as_trainable(model)
    kept = {name for name, p in model.named_parameters() if p.requires_grad}
    assert kept == {name for name in trained if "lora_" in name or "modules_to_save" in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(torch.randn_like(parameter))
    model(x)  # moves the statistics of the norm
    read = made()
    result = read.load_state_dict(lora_ext.lora_state_dict(model, bias), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(read.eval()(x), model.eval()(x))


def test_lora_state_dict_goes_through_safetensors(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = lora_ext.lora_state_dict(Block(lora_bias=True, dtype=torch.bfloat16), "lora_only")
    safetensors.save_file(state, tmp_path / "adapter.safetensors")
    loaded = safetensors.load_file(tmp_path / "adapter.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def tower(width: int, layers: int) -> nn.ModuleDict:
    """The linear layers of a CLIP tower, attention as separate projections, without memory."""
    sizes = {name: (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    sizes |= {"c_fc": (width, 4 * width), "c_proj": (4 * width, width)}

    def block() -> nn.ModuleDict:
        return nn.ModuleDict({n: nn.Linear(*size, device="meta") for n, size in sizes.items()})

    return nn.ModuleDict({str(i): block() for i in range(layers)})


# OpenCLIP ViT-B/32 has 12 vision layers of width 768 and 12 text layers of width 512. Adapters of
# r = 16 on the four attention projections of both are 12 * 4 * 16 * 2 * (768 + 512) = 1,966,080
# parameters. 2,359,296 are those of two towers as wide as the vision tower, and of q, k, v and the
# MLP of the vision tower alone.
QKV = ["q_proj", "k_proj", "v_proj"]
COUNTS = {
    "ViT-B/32 attention": (768, 512, [*QKV, "out_proj"], 1_966_080),
    "two towers of width 768": (768, 768, [*QKV, "out_proj"], 2_359_296),
    "ViT-B/32 vision qkv and MLP": (
        768,
        512,
        rf"vision\..*({'|'.join(QKV)}|c_fc|c_proj)",
        2_359_296,
    ),
}


@pytest.mark.parametrize(("vision", "text", "targets", "count"), COUNTS.values(), ids=COUNTS.keys())
def test_count_of_trainable_parameters(
    vision: int, text: int, targets: str | list[str], count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"vision": tower(vision, 12), "text": tower(text, 12)})
    base = sum(parameter.numel() for parameter in model.parameters())
    lora_ext.replace_linear(model, targets, r=16)
    lora_ext.mark_only_lora_as_trainable(model)
    lora_ext.print_trainable_parameters(model)
    total, share = base + count, 100 * count / (base + count)
    assert capsys.readouterr().out == (
        f"trainable params: {count:,d} || all params: {total:,d} || trainable%: {share:.4f}\n"
    )


def test_print_trainable_parameters_is_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = (nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)) for _ in range(2))
    lora_ext.replace_linear(ours, ["0"], r=4)
    lora_ext.mark_only_lora_as_trainable(ours)
    lora_ext.print_trainable_parameters(ours)
    printed = capsys.readouterr().out
    peft.get_peft_model(
        theirs, peft.LoraConfig(target_modules=["0"], r=4)
    ).print_trainable_parameters()
    assert printed == capsys.readouterr().out


def test_print_trainable_parameters_of_an_empty_model(capsys: pytest.CaptureFixture[str]) -> None:
    lora_ext.print_trainable_parameters(nn.Identity())
    assert capsys.readouterr().out.endswith("all params: 0 || trainable%: 0.0000\n")


def explained(layer: Linear, tokens: int = 2048) -> tuple[str, str]:
    (row,) = lora_ext.explain(nn.Sequential(nn.Linear(2, 2), layer), tokens)
    assert row.name == "1"
    return row.path, row.reason


CAPABILITY = lora_ext.build_info()["cpu_capability"]
DOT = CAPABILITY in ("avx512_bf16", "amx_bf16")
FUSED = f"cpu fused {'avx512' if DOT else CAPABILITY}"
LINEAR = "torch.nn.functional.linear"


# (dtype, adapters stay fp32, dropout, tokens, in = out, r) → (path, part of the reason)
PATHS = {
    "fp32": (torch.float32, True, 0.0, 2048, 32, 4, FUSED, "one pass over x"),
    "dropout": (torch.float32, True, 0.5, 2048, 32, 4, FUSED, "dropout is made in cache"),
    "mixed": (torch.bfloat16, True, 0.0, 2048, 32, 4, FUSED, "float32 adapters"),
    "fp16": (
        torch.float16,
        False,
        0.0,
        2048,
        32,
        4,
        FUSED,
        "one pass over x" if multiplies_fp16() else "BLAS is slow",
    ),
    "large rank": (torch.float32, True, 0.1, 512, 32, 128, "cpu blas", "a large rank: low-rank"),
    "large rank, mixed": (torch.bfloat16, True, 0.0, 512, 32, 256, "cpu blas", "are float32's"),
    "few rows": (torch.float32, True, 0.0, 16, 1024, 64, "cpu blas", "few rows and a large"),
    "few rows, dropout": (torch.float32, True, 0.1, 16, 2100, 64, "cpu blas", "few rows"),
    "few rows, small adapter": (torch.float32, True, 0.0, 16, 1024, 8, FUSED, "one pass"),
    "no rows": (torch.float32, True, 0.0, 0, 32, 4, FUSED, "one pass"),
}


@pytest.mark.parametrize(
    ("dtype", "autocast", "dropout", "tokens", "size", "r", "path", "reason"),
    PATHS.values(),
    ids=PATHS.keys(),
)
def test_explain_tells_the_path_and_why(
    dtype: torch.dtype,
    autocast: bool,
    dropout: float,
    tokens: int,
    size: int,
    r: int,
    path: str,
    reason: str,
) -> None:
    layer = Linear(
        size, size, r, lora_dropout=dropout, dtype=dtype, autocast_adapter_dtype=autocast
    )
    got_path, got_reason = explained(layer, tokens)
    assert got_path == path and reason in got_reason


def test_explain_bf16_depends_on_the_cpu() -> None:
    layer = Linear(32, 16, 4, dtype=torch.bfloat16, autocast_adapter_dtype=False)
    path, reason = explained(layer, tokens=16)
    assert path == (f"cpu fused {CAPABILITY}" if DOT else FUSED)
    widens = machine() in ("x86_64", "AMD64") and not DOT
    assert ("base product is float32's" in reason) == widens
    assert explained(layer, tokens=4)[0] == ("cpu blas" if DOT else FUSED)
    one_row = explained(layer, tokens=1)
    assert one_row[0] == ("cpu blas" if DOT or CAPABILITY == "avx512" else FUSED)
    assert "base product is float32's" not in one_row[1]
    wide = Linear(128, 96, 4, dtype=torch.bfloat16, autocast_adapter_dtype=False)
    for tokens, enough in ((63, False), (64, True)):
        widens = machine() in ("x86_64", "AMD64") and (not DOT or (enough and dots_slowly()))
        assert ("base product is float32's" in explained(wide, tokens)[1]) == widens


def test_explain_follows_the_training_mode() -> None:
    layer = Linear(32, 16, 4, lora_dropout=0.5)
    assert "dropout" in explained(layer)[1]
    assert "dropout" not in explained(layer.eval())[1]


def test_explain_without_adapter_merged_and_elsewhere() -> None:
    assert explained(Linear(4, 4)) == (LINEAR, "there is no adapter")
    layer = Linear(4, 4, 2)
    layer.merge()
    assert explained(layer) == (LINEAR, "merged: the adapter is in the weight")
    layer.unmerge()
    assert explained(layer)[0] == FUSED
    path, reason = explained(Linear(4, 4, 2, device="meta"))
    assert path == "none" and "no kernels for meta" in reason


@pytest.mark.skipif(lora_ext.build_info()["cuda"] is not None, reason="this build is for CUDA")
def test_explain_a_gpu_to_a_cpu_build() -> None:
    layer = Linear(4, 4, 2)
    with FakeTensorMode():  # its tensors say that they are on a GPU, with no GPU there
        layer.weight = nn.Parameter(torch.empty(4, 4, device="cuda"))
    path, reason = explained(layer)
    assert path == "none" and "this build has no kernels for cuda" in reason


def test_explanation_prints_as_a_table() -> None:
    model = nn.Sequential(Linear(4, 4, 2), nn.ModuleDict({"long name": Linear(4, 4)}))
    first, second = str(lora_ext.explain(model)).splitlines()
    assert second.startswith(f"1.long name  {LINEAR}  there is no adapter")
    assert first.index(FUSED) == second.index(LINEAR)
    assert str(lora_ext.explain(nn.Identity())).startswith("no layer of lora_ext is in this model")
