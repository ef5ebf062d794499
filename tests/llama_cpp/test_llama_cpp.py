"""llama.cpp itself loads what we write, and computes what PyTorch does; and what it computes with a
file of its own is what we read. `make llama-cpp` installs and compiles it, and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import bases
import fused_bases
from quantized_libraries import library

from lora_ext import LoraConfig, LoraModel
from lora_ext.errors import AdapterFileError
from lora_ext.io.convert import convert

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("LORA_EXT_LLAMA_CPP", Path(sys.prefix, "llama_cpp")))
pytestmark = pytest.mark.skipif(
    PathFinder.find_spec("llama_cpp", [str(FOLDER)]) is None,
    reason=f"llama-cpp-python is not in {FOLDER} (make llama-cpp)",
)
gguf = library("gguf")

TOKENS = [1, 7, 30, 12, 41, 5, 9, 22, 13, 3]
TOLERANCE = 1e-4  # of logits of some 1; both sides sum in float32, in another order
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """llama, tied and mixtral: folders of transformers, and files of llama.cpp beside them."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    made = {"llama": bases.llama(), "tied": bases.llama(tied=True), "mixtral": bases.mixtral()}
    for name, model in made.items():
        model.save_pretrained(folder / name)  # type: ignore[operator]
        bases.write(gguf, model, folder / f"{name}.gguf")
    yield folder


def base(kind: str) -> nn.Module:
    return {
        "llama": bases.llama,
        "tied": lambda: bases.llama(tied=True),
        "mixtral": bases.mixtral,
    }[kind]()


def run(model: Path, *adapters: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, HERE / "logits.py", FOLDER, model, json.dumps(TOKENS), *adapters]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)


def llama_cpp(model: Path, *adapters: object) -> Tensor:
    answer = run(model, *adapters)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return torch.tensor(json.loads(answer.stdout)["logits"])


@torch.no_grad()
def torch_logits(model: Any) -> Tensor:
    logits: Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


def adapted(kind: str, **fields: Any) -> LoraModel:
    """With random adapters, which change the logits by much more than the tolerance."""
    torch.manual_seed(4)
    model = LoraModel(base(kind), LoraConfig(r=4, lora_alpha=6, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.15)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "tied", "mixtral"])
def test_the_bases_are_the_same(place: Path, kind: str) -> None:
    expected = torch_logits(base(kind))
    assert expected.std() > 0.3
    torch.testing.assert_close(llama_cpp(place / f"{kind}.gguf"), expected, rtol=0, atol=TOLERANCE)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "k_proj", "v_proj"]}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "tied base": ("tied", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "rslora, ranks": (
        "llama",
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 7}},
    ),
    "alpha_pattern": (
        "llama",
        {"target_modules": "all-linear", "alpha_pattern": {"k_proj": 1, "layers.1.mlp.*": 11}},
    ),
    "rank_pattern": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2, "v_proj": 8}},
    ),
    "head": ("llama", {"target_modules": ["o_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "mixtral": (
        "mixtral",
        {"target_modules": ["q_proj", "k_proj"], "target_parameters": EXPERT_PARAMETERS},
    ),
    "mixtral, router": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["mlp.gate.weight", EXPERT_PARAMETERS[1]]},
    ),
    "mixtral, alphas": (
        "mixtral",
        {
            "target_modules": ["v_proj"],
            "target_parameters": EXPERT_PARAMETERS,
            "alpha_pattern": {".*gate_up_proj": 2},
            "rank_pattern": {".*down_proj": 3},
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_torch_does(place: Path, tmp_path: Path, name: str) -> None:
    """And what is read back does, too."""
    kind, fields = CASES[name]
    model = adapted(kind, **fields)
    save = {"save_embedding_layers": False} if name in ("head", "embedding") else {}
    model.save_pretrained(tmp_path / "adapter", **save)
    convert(tmp_path / "adapter", tmp_path / "a.gguf", target="gguf", base=place / kind)
    expected, plain = torch_logits(model), torch_logits(base(kind))
    assert (expected - plain).abs().max() > 0.1
    found = llama_cpp(place / f"{kind}.gguf", tmp_path / "a.gguf", 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    # A user's scale of 0 is the base; half of it is half of every scaling.
    found = llama_cpp(place / f"{kind}.gguf", tmp_path / "a.gguf", 0)
    torch.testing.assert_close(found, plain, rtol=0, atol=TOLERANCE)
    for _, layer in model.lora_layers():
        layer.scale_layer(0.5)
    found = llama_cpp(place / f"{kind}.gguf", tmp_path / "a.gguf", 0.5)
    torch.testing.assert_close(found, torch_logits(model), rtol=0, atol=TOLERANCE)
    convert(tmp_path / "a.gguf", tmp_path / "back", base=place / kind)
    back = LoraModel.from_pretrained(base(kind), tmp_path / "back").eval()
    torch.testing.assert_close(torch_logits(back), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("alpha", [None, 0.0, 5.0])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_file_of_llama_cpps_is_read_as_it_computes(
    place: Path, tmp_path: Path, kind: str, alpha: float | None
) -> None:
    """A file in its order of rows and its names, which no code of ours has written."""
    generator = torch.Generator().manual_seed(5)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    r, E, head = 3, bases.EXPERTS, bases.HIDDEN // bases.HEADS
    sizes = {"attn_q": (bases.HIDDEN,) * 2, "attn_k": (bases.KV_HEADS * head, bases.HIDDEN)}
    stacks = {
        "ffn_gate_exps": (bases.INNER, bases.HIDDEN),
        "ffn_up_exps": (bases.INNER, bases.HIDDEN),
    }
    stacks |= {"ffn_down_exps": (bases.HIDDEN, bases.INNER)}
    for i in range(bases.LAYERS):
        for name, (out, columns) in (sizes | (stacks if kind == "mixtral" else {})).items():
            before = (E,) if name in stacks else ()
            for end, shape in (("a", (*before, r, columns)), ("b", (*before, out, r))):
                value = torch.randn(shape, generator=generator) * 0.15
                writer.add_tensor(f"blk.{i}.{name}.weight.lora_{end}", value.numpy())
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    convert(tmp_path / "a.gguf", tmp_path / "adapter", base=place / kind)
    model = LoraModel.from_pretrained(base(kind), tmp_path / "adapter").eval()
    found = llama_cpp(place / f"{kind}.gguf", tmp_path / "a.gguf", 1)
    assert (found - torch_logits(base(kind))).abs().max() > 0.1
    torch.testing.assert_close(torch_logits(model), found, rtol=0, atol=TOLERANCE)


FUSED: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "gpt_neox": {"target_modules": "all-linear", "use_rslora": True},
    "falcon": {"target_modules": ["query_key_value", "dense"], "alpha_pattern": {"dense": 3}},
}


@pytest.mark.parametrize("kind", FUSED)
def test_fused_queries_keys_and_values(tmp_path: Path, kind: str) -> None:
    """llama.cpp looks up GELU in a table of halves, so both differ by some thousandths already
    without an adapter."""
    made: nn.Module = getattr(fused_bases, kind)()
    made.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    fused_bases.write(gguf, made, tmp_path / "base.gguf")
    plain = torch_logits(made)
    torch.manual_seed(4)
    model = LoraModel(made, LoraConfig(r=4, lora_alpha=6, **FUSED[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.15)
    model.eval().save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "a.gguf", target="gguf", base=tmp_path / "base")
    expected = torch_logits(model)
    found = llama_cpp(tmp_path / "base.gguf")
    error = float((found - plain).abs().max())
    found = llama_cpp(tmp_path / "base.gguf", tmp_path / "a.gguf", 1)
    effect = float((expected - plain).abs().max())
    print(kind, error, float((found - expected).abs().max()), effect)
    assert error < 0.01 and effect > 0.3
    assert float((found - expected).abs().max()) < 0.01


def test_invocation_tokens_are_llama_cpps(place: Path, tmp_path: Path) -> None:
    model = adapted("llama", target_modules=["q_proj"], alora_invocation_tokens=[30, 12])
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "a.gguf", target="gguf", base=place / "llama")
    answer = run(place / "llama.gguf", tmp_path / "a.gguf", 1)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert json.loads(answer.stdout)["invocations"] == [[30, 12]]


def test_embeddings_of_tied_bases(place: Path, tmp_path: Path) -> None:
    """llama.cpp takes the adapter for one of the output layer too, and ends its process: they are
    refused."""
    model = adapted("llama", target_modules=["embed_tokens"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(AdapterFileError, match="tied"):
        convert(tmp_path / "adapter", tmp_path / "a.gguf", target="gguf", base=place / "tied")
    convert(tmp_path / "adapter", tmp_path / "a.gguf", target="gguf", base=place / "llama")
    answer = run(place / "tied.gguf", tmp_path / "a.gguf", 1)
    assert answer.returncode < 0, "llama.cpp can do this now: it need not be refused any more"
    assert "GGML_ASSERT" in answer.stderr
