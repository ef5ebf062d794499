"""llama.cpp's adapters: byte-equal round trips, the order of rows, scalings, experts, refusals."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import gguf_problems as problems
import pytest
import torch
from cli_runs import failed, run
from gguf_problems import HEADS, HIDDEN, INNER, LAYERS, PREFIX, VOCABULARY, adapter_of, llama_shapes
from quantized_libraries import library
from torch import Tensor

from lora_ext.io.convert import FORMATS, LoadedAdapter, Options, convert, recognised
from lora_ext.io.convert.gguf_names import FAMILIES, Base

gguf = library("gguf")

HEAD = HIDDEN // HEADS
EXPERTS = 4


def written(tmp_path: Path, adapter: LoadedAdapter, kind: str, **fields: Any) -> Any:
    """The file, as the package gguf reads it."""
    base = problems.base_folder(tmp_path / "base", kind, **fields)
    FORMATS["gguf"].write(tmp_path / "a.gguf", adapter, Options(base=base))
    return gguf.GGUFReader(tmp_path / "a.gguf")


def tensors_of(reader: Any) -> dict[str, Tensor]:
    return {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}


def read(tmp_path: Path) -> LoadedAdapter:
    return FORMATS["gguf"].read(tmp_path / "a.gguf", Options(base=tmp_path / "base"))


def assert_same(found: LoadedAdapter, expected: LoadedAdapter) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        assert found.tensors[key].dtype == tensor.dtype and found.tensors[key].is_contiguous()
        assert torch.equal(found.tensors[key], tensor), key


def stacks(before: str, experts: int = EXPERTS, r: int = 4, **parts: Any) -> dict[str, Tensor]:
    """Tensors of stacked experts: gate_up and down."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"base_layer.": (2 * INNER, HIDDEN), "": (HIDDEN, INNER)}
    if "only" in parts:
        sizes = {"": sizes[parts["only"]]}
    return {
        f"{PREFIX}{before}.{i}.mlp.experts.{depth}{name}.weight": torch.randn(
            shape, generator=generator
        )
        for i in range(LAYERS)
        for depth, (out, columns) in sizes.items()
        for name, shape in (
            ("lora_A", (experts * r, columns)),
            ("lora_B", (out, r * experts)),
        )
    }


def moe(only: str | None = None, **config: Any) -> LoadedAdapter:
    own = stacks("model.layers", **({} if only is None else {"only": only}))
    parameters = {
        None: ["gate_up_proj", "down_proj"],
        "base_layer.": ["gate_up_proj"],
        "": ["down_proj"],
    }
    attention = layers("model.layers", {"self_attn.q_proj": (HIDDEN, HIDDEN)})
    adapter = adapter_of(
        attention,
        target_parameters=[f"mlp.experts.{one}" for one in parameters[only]],
        **config,
    )
    return LoadedAdapter(adapter.config, adapter.tensors | own)


layers = problems.layers_of
_BLOOM = {
    "self_attention.query_key_value": (3 * HIDDEN, HIDDEN),
    "self_attention.dense": (HIDDEN, HIDDEN),
    "mlp.dense_h_to_4h": (4 * HIDDEN, HIDDEN),
    "mlp.dense_4h_to_h": (HIDDEN, 4 * HIDDEN),
}
_GPT2 = {
    **{"attn.c_attn": (3 * HIDDEN, HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN)},
    **{"mlp.c_fc": (4 * HIDDEN, HIDDEN), "mlp.c_proj": (HIDDEN, 4 * HIDDEN)},
}
_NEOX = {name.replace("self_attention", "attention"): shape for name, shape in _BLOOM.items()}
_PHI3 = {
    **{"self_attn.qkv_proj": (64, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)},
    **{"mlp.gate_up_proj": (2 * INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)},
}


def falcon(groups: int) -> dict[str, tuple[int, int]]:
    rows = (HEADS + 2 * groups) * HEAD
    of_layer = _BLOOM | {"self_attention.query_key_value": (rows, HIDDEN)}
    return layers("transformer.h", of_layer)


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    adapter: LoadedAdapter
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


GQA: dict[str, Any] = {"num_key_value_heads": 2}
MOE = GQA | {"num_local_experts": EXPERTS}
CASES = {
    "llama": Case("llama", adapter_of(llama_shapes(4))),
    "llama-gqa": Case("llama", adapter_of(llama_shapes()), GQA),
    "llama-bf16": Case("llama", adapter_of(llama_shapes(), dtype=torch.bfloat16), GQA),
    "llama-f16": Case("llama", adapter_of(llama_shapes(), dtype=torch.float16), GQA),
    "llama-rank-1": Case("llama", adapter_of(llama_shapes(), r=1), GQA),
    "llama-rslora": Case("llama", adapter_of(llama_shapes(), r=8, use_rslora=True), GQA),
    "llama-rank_pattern": Case(
        "llama",
        adapter_of(
            llama_shapes(),
            ranks={name: 2 for name in llama_shapes() if name.endswith("v_proj")},
            rank_pattern={"v_proj": 2},
        ),
        GQA,
    ),
    "llama-alora": Case("llama", adapter_of(llama_shapes(), alora_invocation_tokens=[5, 9]), GQA),
    "llama-embedding": Case(
        "llama", adapter_of({"model.embed_tokens": (VOCABULARY, HIDDEN), **llama_shapes()}), GQA
    ),
    "llama-lm_head": Case("llama", adapter_of({"lm_head": (VOCABULARY, HIDDEN)}), GQA),
    "mistral": Case("mistral", adapter_of(llama_shapes()), GQA),
    "smollm3": Case("smollm3", adapter_of(llama_shapes()), GQA),
    "granite": Case("granite", adapter_of(llama_shapes()), GQA),
    "olmo": Case("olmo", adapter_of(llama_shapes()), GQA),
    "olmo2": Case("olmo2", adapter_of(llama_shapes()), GQA),
    "qwen2": Case("qwen2", adapter_of(llama_shapes()), GQA),
    "qwen3": Case("qwen3", adapter_of(llama_shapes()), GQA),
    "gemma2": Case("gemma2", adapter_of(llama_shapes()), GQA),
    "gemma3": Case("gemma3_text", adapter_of(llama_shapes()), GQA),
    "phi3": Case("phi3", adapter_of(layers("model.layers", _PHI3)), GQA),
    "gpt2": Case("gpt2", adapter_of(layers("transformer.h", _GPT2), fan_in_fan_out=True)),
    "gpt_bigcode": Case(
        "gpt_bigcode",
        adapter_of(layers("transformer.h", _GPT2 | {"attn.c_attn": (HIDDEN + 2 * HEAD, HIDDEN)})),
    ),
    "gpt_neox": Case("gpt_neox", adapter_of(layers("gpt_neox.layers", _NEOX))),
    "bloom": Case("bloom", adapter_of(layers("transformer.h", _BLOOM))),
    "falcon-7b": Case("falcon", adapter_of(falcon(1)), {"multi_query": True, "num_kv_heads": 4}),
    "falcon-40b": Case(
        "falcon", adapter_of(falcon(2)), {"new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "falcon-rw": Case("falcon", adapter_of(falcon(4)), {"multi_query": False}),
    "mixtral": Case("mixtral", moe(), MOE),
    "mixtral-gate_up": Case("mixtral", moe("base_layer."), MOE),
    "qwen2_moe": Case("qwen2_moe", moe(), GQA | {"num_experts": EXPERTS}),
    "qwen3_moe-down": Case("qwen3_moe", moe(""), GQA | {"num_experts": EXPERTS}),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trips_are_byte_equal(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    written(tmp_path, case.adapter, case.kind, **case.fields)
    assert recognised(tmp_path / "a.gguf") == "gguf"
    found = read(tmp_path)
    assert_same(found, case.adapter)
    config = case.adapter.config
    assert found.config["fan_in_fan_out"] is (case.kind == "gpt2")
    assert found.config.get("alora_invocation_tokens") == config.get("alora_invocation_tokens")
    for key, expected in scalings(case.adapter).items():
        assert scalings(found)[key] == pytest.approx(expected, rel=1e-6)
    # And once more, from what was read: the same file.
    before = (tmp_path / "a.gguf").read_bytes()
    FORMATS["gguf"].write(tmp_path / "a.gguf", found, Options(base=tmp_path / "base"))
    assert (tmp_path / "a.gguf").read_bytes() == before


def scalings(adapter: LoadedAdapter) -> dict[str, float]:
    """By PEFT's definition, of the lora_B of every module that is no stack of experts."""
    config, found = adapter.config, {}
    for key, tensor in adapter.tensors.items():
        if "lora_B" not in key or "experts" in key:
            continue
        name = name_of(key)
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if name == pattern or name.endswith(f".{pattern}"):
                alpha = value
        r = tensor.shape[1]
        found[key] = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return found


def test_every_family_has_names_for_all_its_modules(tmp_path: Path) -> None:
    tied = {"gemma", "gemma2", "cohere", "cohere2"}  # of which gguf has no output layer
    for kind, family in FAMILIES.items():
        base = Base.of(problems.base_folder(tmp_path / kind, kind))
        expected = len(family.modules) + LAYERS * len(family.layer) - (kind in tied)
        assert len(base.modules) == expected, kind
        assert len(base.experts) == (3 * LAYERS if family.experts else 0)
        assert all(base.experts.values())


# The order of rows


def test_rotary_pairs_are_neighbours(tmp_path: Path) -> None:
    adapter = adapter_of(llama_shapes())
    found = tensors_of(written(tmp_path, adapter, "llama", **GQA))
    for part, heads in (("q", HEADS), ("k", 2)):
        B = adapter.tensors[f"{PREFIX}model.layers.1.self_attn.{part}_proj.lora_B.weight"]
        theirs = found[f"blk.1.attn_{part}.weight.lora_b"]
        for head in range(heads):
            for i in range(HEAD // 2):
                start = head * HEAD
                assert torch.equal(theirs[start + 2 * i], B[start + i])
                assert torch.equal(theirs[start + 2 * i + 1], B[start + HEAD // 2 + i])
    B = adapter.tensors[f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"]
    assert torch.equal(found["blk.1.attn_v.weight.lora_b"], B)


@pytest.mark.parametrize("name", ["gpt_neox", "bloom", "falcon-7b", "falcon-40b", "falcon-rw"])
def test_fused_rows_are_queries_keys_values(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    found = tensors_of(written(tmp_path, case.adapter, case.kind, **case.fields))
    key = next(key for key in case.adapter.tensors if "h.1" in key or "layers.1" in key)
    key = key.removesuffix("lora_A.weight") + "lora_B.weight"
    assert "query_key_value" in key
    B = case.adapter.tensors[key]
    groups = (B.shape[0] // HEAD - HEADS) // 2
    each = HEADS // groups
    queries, keys, values = [], [], []
    row = 0
    for _ in range(groups):
        for part in (*[queries] * each, keys, values):
            part.append(B[row : row + HEAD])
            row += HEAD
    assert torch.equal(found["blk.1.attn_qkv.weight.lora_b"], torch.cat([*queries, *keys, *values]))


def test_embedding_is_read_by_rows(tmp_path: Path) -> None:
    adapter = CASES["llama-embedding"].adapter
    found = tensors_of(written(tmp_path, adapter, "llama", **GQA))
    A = adapter.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"]
    assert torch.equal(found["token_embd.weight.lora_a"], A.T)
    B = adapter.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"]
    assert torch.equal(found["token_embd.weight.lora_b"], B)


def test_keys_are_llama_cpps(tmp_path: Path) -> None:
    adapter = adapter_of(
        llama_shapes(), alora_invocation_tokens=[7, 8, 9], task_name="sums", prompt_prefix="q:"
    )
    reader = written(tmp_path, adapter, "llama", **GQA)
    values = {key: field.contents() for key, field in reader.fields.items() if "." in key}
    assert values["general.architecture"] == "llama"
    assert (values["general.type"], values["adapter.type"]) == ("adapter", "lora")
    assert values["adapter.lora.alpha"] == 8.0
    assert values["adapter.lora.task_name"] == "sums"
    assert values["adapter.lora.prompt_prefix"] == "q:"
    field = reader.fields["adapter.alora.invocation_tokens"]
    kinds = gguf.GGUFValueType
    assert field.types == [kinds.ARRAY, kinds.UINT32] and field.contents() == [7, 8, 9]
    back = read(tmp_path).config
    assert (back["task_name"], back["prompt_prefix"]) == ("sums", "q:")


# Scalings


SCALED: dict[str, dict[str, Any]] = {
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3, r"model\.layers\.1\.mlp.*": 0.5}},
    "rank and alpha": {
        "ranks": {name: 2 for name in llama_shapes() if "v_proj" in name},
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"v_proj": 5},
    },
    "rslora, ranks": {
        "ranks": {name: 2 for name in llama_shapes() if "v_proj" in name},
        "rank_pattern": {"v_proj": 2},
        "use_rslora": True,
    },
    "bf16": {"alpha_pattern": {"q_proj": 3}, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", SCALED)
def test_llama_cpp_computes_each_modules_scaling(tmp_path: Path, name: str) -> None:
    adapter = adapter_of(llama_shapes(), **SCALED[name])
    reader = written(tmp_path, adapter, "qwen2", **GQA)  # whose rows are in PEFT's order
    alpha = reader.fields["adapter.lora.alpha"].contents()
    found, base = tensors_of(reader), Base.of(tmp_path / "base")
    patterns = adapter.config.get("alpha_pattern", {})
    for key in scalings(adapter):
        module = name_of(key)
        A, B = (adapter.tensors[f"{PREFIX}{module}.lora_{one}.weight"].double() for one in "AB")
        r = B.shape[1]
        own = adapter.config["lora_alpha"]
        if "q_proj" in module:
            own = patterns.get("q_proj", own)
        if "v_proj" in module:
            own = patterns.get("v_proj", own)
        if "layers.1.mlp" in module:
            own = patterns.get(r"model\.layers\.1\.mlp.*", own)
        scaling = own / (math.sqrt(r) if adapter.config.get("use_rslora") else r)
        name_there = base.modules[module]
        a, b = (found[f"{name_there}.weight.lora_{one}"] for one in "ab")
        a, b = (one.view(torch.bfloat16) if one.dtype is torch.uint8 else one for one in (a, b))
        theirs = (alpha / b.shape[1] if alpha else 1.0) * b.double() @ a.double()
        # B is rounded once, to float32, where the scaling is in it; alpha is a float32.
        torch.testing.assert_close(theirs, scaling * (B @ A), rtol=2e-7, atol=2e-6)
    back, written_B = (
        read(tmp_path),
        {key: found[f"{base.modules[name_of(key)]}.weight.lora_b"] for key in scalings(adapter)},
    )
    for key, scaling in scalings(
        back
    ).items():  # what was read means the same, by PEFT's definition
        B = written_B[key]
        assert scaling == pytest.approx(alpha / B.shape[-1] if alpha else 1.0, rel=1e-12)
        assert torch.equal(back.tensors[key].view(B.dtype), B)


def name_of(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(".lora_B.weight")


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_alpha_the_scaling_is_one(tmp_path: Path, alpha: float | None) -> None:
    keys = dict(problems.KEYS)
    del keys["adapter.lora.alpha"]
    if alpha is not None:
        keys["adapter.lora.alpha"] = problems.key(
            "adapter.lora.alpha", problems.FLOAT32, struct.pack("<f", alpha)
        )
    problems.base_folder(tmp_path / "base", "llama", **GQA)
    (tmp_path / "a.gguf").write_bytes(problems.packed(keys))
    config = read(tmp_path).config
    assert config["r"] == config["lora_alpha"] == 4
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]


# Experts


def delta(A: Tensor, B: Tensor, scaling: float, experts: int = EXPERTS) -> Tensor:
    """W's change, [E, out, in], by PEFT's definition of stacks."""
    r = A.shape[0] // experts
    left = B.double().reshape(B.shape[0], r, experts)
    right = A.double().reshape(experts, r, A.shape[1])
    return scaling * torch.einsum("ore,eri->eoi", left, right)


def test_stacks_are_split_and_joined(tmp_path: Path) -> None:
    adapter = moe(alpha_pattern={"gate_up_proj": 2})
    reader = written(tmp_path, adapter, "mixtral", **MOE)
    assert reader.fields["adapter.lora.alpha"].contents() == 0.0
    found = tensors_of(reader)
    where = f"{PREFIX}model.layers.1.mlp.experts."
    A, B = (adapter.tensors[f"{where}base_layer.lora_{one}.weight"] for one in "AB")
    expected = delta(A, B, 2 / 4)
    for part, rows in (("gate", slice(0, INNER)), ("up", slice(INNER, None))):
        a, b = (found[f"blk.1.ffn_{part}_exps.weight.lora_{one}"].double() for one in "ab")
        torch.testing.assert_close(b @ a, expected[:, rows], rtol=2e-7, atol=2e-6)
    A, B = (adapter.tensors[f"{where}lora_{one}.weight"] for one in "AB")
    a, b = (found[f"blk.1.ffn_down_exps.weight.lora_{one}"].double() for one in "ab")
    torch.testing.assert_close(b @ a, delta(A, B, 8 / 4), rtol=2e-7, atol=2e-6)


def test_layers_of_single_experts_become_stacks(tmp_path: Path) -> None:
    shapes = {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}": shape
        for i in range(LAYERS)
        for e in range(EXPERTS - 1)  # the last one has none
        for w, shape in (("w1", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER)), ("w3", (INNER, HIDDEN)))
    }
    some = "model.layers.0.block_sparse_moe.experts.1.w1"
    adapter = adapter_of(shapes, ranks={some: 2}, rank_pattern={some: 2})
    written(tmp_path, adapter, "mixtral", **MOE)
    back = read(tmp_path)
    assert back.config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    patterns = back.config["alpha_pattern"]
    for i in range(LAYERS):
        where = f"model.layers.{i}.mlp.experts"
        A, B = (back.tensors[f"{PREFIX}{where}.base_layer.lora_{one}.weight"] for one in "AB")
        alpha = patterns.get(f"{where}.gate_up_proj", back.config["lora_alpha"])
        gate, up = delta(A, B, alpha / (len(A) // EXPERTS)).chunk(2, 1)
        A, B = (back.tensors[f"{PREFIX}{where}.lora_{one}.weight"] for one in "AB")
        alpha = patterns.get(f"{where}.down_proj", back.config["lora_alpha"])
        down = delta(A, B, alpha / (len(A) // EXPERTS))
        for e in range(EXPERTS):
            for w, found in (("w1", gate[e]), ("w2", down[e]), ("w3", up[e])):
                name = f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}"
                expected = torch.zeros_like(found)
                if name in shapes:
                    A, B = (adapter.tensors[f"{PREFIX}{name}.lora_{one}.weight"] for one in "AB")
                    expected = 8 / len(A) * B.double() @ A.double()
                torch.testing.assert_close(found, expected, rtol=2e-7, atol=2e-6)


def test_gate_alone_leaves_up_as_it_is(tmp_path: Path) -> None:
    written(tmp_path, moe("base_layer."), "mixtral", **MOE)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    a, b = torch.randn(EXPERTS, 2, HIDDEN), torch.randn(EXPERTS, INNER, 2)
    for end, tensor in (("a", a), ("b", b)):
        writer.add_tensor(f"blk.0.ffn_gate_exps.weight.lora_{end}", tensor.numpy())
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    found = FORMATS["gguf"].read(tmp_path / "b.gguf", Options(base=tmp_path / "base"))
    A, B = (found.tensors[f"{PREFIX}model.layers.0.mlp.experts.lora_{one}.weight"] for one in "AB")
    gate, up = delta(A, B, 1.0).chunk(2, 1)
    torch.testing.assert_close(gate, b.double() @ a.double(), rtol=1e-12, atol=1e-12)
    assert not up.any()
    assert found.config["target_parameters"] == ["model.layers.0.mlp.experts.gate_up_proj"]


def test_quantized_matrices_are_read_as_their_values(tmp_path: Path) -> None:
    problems.base_folder(tmp_path / "base", "llama", **GQA)
    kind, torch_A = gguf.GGMLQuantizationType.Q8_0, torch.randn(32, HIDDEN)
    B = torch.randn(HIDDEN, 32).half()
    codes = gguf.quantize(torch_A.numpy(), kind)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.1.attn_v.weight.lora_a", codes, raw_dtype=kind)
    writer.add_tensor("blk.1.attn_v.weight.lora_b", B.numpy())
    writer.add_tensor("blk.1.attn_norm.weight", torch.ones(HIDDEN).numpy())
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    with pytest.warns(UserWarning, match="1 weights of norms"):
        found = read(tmp_path)
    name = f"{PREFIX}model.layers.1.self_attn.v_proj"
    expected = torch.from_numpy(gguf.dequantize(codes, kind))
    assert torch.equal(found.tensors[f"{name}.lora_A.weight"], expected)
    assert torch.equal(found.tensors[f"{name}.lora_B.weight"], B)


def test_peft_to_gguf_and_back_by_one_call(tmp_path: Path) -> None:
    adapter = adapter_of(llama_shapes())
    base = problems.base_folder(tmp_path / "base", "llama", **GQA)
    FORMATS["peft"].write(tmp_path / "adapter", adapter, Options())
    convert(tmp_path / "adapter", tmp_path / "a.gguf", target="gguf", base=base)
    convert(tmp_path / "a.gguf", tmp_path / "back", base=base)
    assert_same(FORMATS["peft"].read(tmp_path / "back", Options()), adapter)
    assert FORMATS["gguf"].bytes_of(tmp_path / "a.gguf") == sum(
        tensor.nbytes for tensor in adapter.tensors.values()
    )


def test_the_command_writes_and_reads_files(tmp_path: Path) -> None:
    adapter = adapter_of(llama_shapes())
    base = problems.base_folder(tmp_path / "base", "llama", **GQA)
    FORMATS["peft"].write(tmp_path / "adapter", adapter, Options())
    file, back = tmp_path / "adapter.gguf", tmp_path / "back"
    command = ("convert", tmp_path / "adapter", file, "--to", "gguf")
    assert "--base FOLDER" in failed(*command)
    data = run(*command, "--base", base, "--json").json()
    assert data["to"] == "gguf" and data["tensors"] == len(adapter.tensors)
    assert "--overwrite" in failed(*command, "--base", base, code=2)
    halves = run(*command, "--base", base, "--overwrite", "--dtype", "float16", "--json").json()
    assert 2 * halves["bytes"] == data["bytes"]
    data = run("convert", file, back, "--base", base, "--json").json()
    assert data["from"] == "gguf" and data["to"] == "peft"
    found = FORMATS["peft"].read(back, Options())
    assert_same(found, LoadedAdapter({}, {k: t.half() for k, t in adapter.tensors.items()}))
    folder = tmp_path / "folder"
    folder.mkdir()
    said = failed("convert", tmp_path / "adapter", folder, "--to", "gguf", "--base", base)
    assert "is a folder" in said
