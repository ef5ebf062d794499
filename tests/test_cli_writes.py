"""The commands of `lora-ext` that write or compare, and explain, on real models and adapters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import cli_places
import pytest
import torch
from cli_places import (
    CONFIGS,
    EPS32,
    EPS_BF16,
    A,
    B,
    Q,
    assert_close,
    contents,
    edited,
    of_another_rank,
    randomise,
    with_value,
)
from cli_runs import failed, run
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import tiny_models
import transformers

import lora_ext
from lora_ext import LoraConfig, LoraModel

place = cli_places.place  # a fixture


# ---- merge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["llama", "llama16"])
def test_merge_is_exact(place: Path, tmp_path: Path, base: str) -> None:
    """W + s B A in float32, rounded once: half a unit in the last place of the base's dtype, and
    the rounding of r + 1 products and sums in float32."""
    data = run("merge", place / base, place / "plain", tmp_path / "out", "--json").json()
    weights = load_file(place / base / "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    adapter = load_file(place / "plain" / "adapter_model.safetensors")
    assert merged.keys() == weights.keys() and len(data["layers"]) == 6
    for key, weight in weights.items():
        name = key.removesuffix(".weight")
        assert merged[key].dtype == weight.dtype
        if name not in data["layers"]:
            assert torch.equal(merged[key], weight)
            continue
        a, b = (adapter[f"base_model.model.{name}.{part}"].double() for part in (A, B))
        exact, size = weight.double() + 2 * b @ a, weight.double().abs() + 2 * b.abs() @ a.abs()
        rounding = EPS_BF16 if weight.dtype == torch.bfloat16 else EPS32
        bound = rounding * exact.abs() + 6 * EPS32 * size
        assert bool(((merged[key] - exact).abs() <= bound).all())
        assert not torch.equal(merged[key], weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_model_computes_what_base_and_adapter_do(
    place: Path, tmp_path: Path, name: str
) -> None:
    """And so does the file alone, whose tensors are merged by their names."""
    assert run("merge", place / "llama", place / name, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"a tokenizer"
    base, inputs = tiny_models.llama()
    adapted = LoraModel.from_pretrained(base, place / name)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected, found = adapted(**inputs).logits, merged(**inputs).logits
    assert_close(found, expected, 48)
    file = place / "llama" / "model.safetensors"
    by_name = run("merge", file, place / name, tmp_path / "by name")
    assert by_name.code == 0 and ("is merged by its name" in by_name.err) == ("embed" in name)
    same = run("diff", tmp_path / "out" / "model.safetensors", tmp_path / "by name")
    assert same.code == 0, same.out


def test_merge_of_a_transposed_weight(place: Path, tmp_path: Path) -> None:
    """GPT-2's Conv1D; its tied head stays tied."""
    assert run("merge", place / "gpt2", place / "for gpt2", tmp_path / "out").code == 0
    base, inputs = tiny_models.gpt2()
    adapted = LoraModel.from_pretrained(base, place / "for gpt2")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.transformer.wte.weight
    with torch.no_grad():
        expected, found = adapted(**inputs).logits, merged(**inputs).logits
    assert_close(found, expected, 32)
    file = place / "gpt2" / "model.safetensors"
    assert "fan_in_fan_out" in failed("merge", file, place / "for gpt2", tmp_path / "no")


@pytest.mark.parametrize("tied", [False, True])
def test_merge_of_repeated_layers(tmp_path: Path, tied: bool) -> None:
    """Each has all of its weights in the file, and the config says how many there are."""
    base, inputs = tiny_models.llama(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    adapted = randomise(LoraModel(base, config))
    adapted.save_pretrained(tmp_path / "adapter")
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out").code == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.num_hidden_layers == len(merged.model.layers) == 4
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    with torch.no_grad():
        expected, found = adapted(**inputs).logits, merged(**inputs).logits
    assert_close(found, expected, 48)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_what_peft_wrote(place: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """PEFT rounds as often in float32: its merged weights are the same but for that."""
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "llama")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
        **options,
    )
    model = randomise(peft.get_peft_model(base, config))
    model.save_pretrained(tmp_path / "adapter")
    assert run("verify", tmp_path / "adapter", "--model", place / "llama").code == 0
    assert run("merge", place / "llama", tmp_path / "adapter", tmp_path / "out").code == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        bound = 8 * EPS32 * float(tensor.abs().max())
        torch.testing.assert_close(merged[key], tensor, rtol=0, atol=bound)


def test_merge_by_name_keeps_shards_and_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.Linear(5, 7))
    state = model.state_dict()
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    save_file({k: v.clone() for k, v in state.items() if k[0] == "0"}, base / "a.safetensors")
    save_file(
        {k: v.clone() for k, v in state.items() if k[0] == "1"} | {"n": torch.arange(3)},
        base / "b.safetensors",
    )
    adapted = randomise(LoraModel(model, LoraConfig(r=2, target_modules=["0", "1"])))
    adapted.save_pretrained(tmp_path / "adapter")
    data = run("merge", base, tmp_path / "adapter", out, "--json").json()
    assert data["files"] == ["a.safetensors", "b.safetensors"] and data["layers"] == ["0", "1"]
    found = load_file(out / "a.safetensors") | load_file(out / "b.safetensors")
    assert torch.equal(found.pop("n"), torch.arange(3))
    expected = adapted.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_merge_refuses_what_it_cannot_do(place: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", place / "llama" / "model.safetensors"
    for base, adapter, says, code in (
        (place / "llama", place / "for gpt2", "c_attn", 1),
        (file, place / "for gpt2", "fan_in_fan_out", 1),
        (place / "gpt2" / "model.safetensors", place / "plain", f"has no tensor '{Q}.weight'", 1),
        (place / "plain", place / "llama", "has no adapter_config.json", 1),
        (place / "llama", tmp_path, "has no adapter_config.json", 1),
        (tmp_path, place / "plain", "neither a config.json nor safetensors", 2),
    ):
        assert says in failed("merge", base, adapter, out, code=code)
        assert list(tmp_path.iterdir()) == []
    nan = edited(place / "plain", tmp_path / "nan", with_value(float("nan")))
    assert "has NaN or Inf" in failed("merge", place / "llama", nan, out)
    assert "is there already" in failed("merge", place / "llama", place / "plain", nan, code=2)
    # Said before anything is read: what is given as the adapter here is none.
    inside = nan / "adapter_config.json" / "out"
    assert "is there and is no folder" in failed("merge", place / "llama", tmp_path, inside, code=2)
    assert list(tmp_path.iterdir()) == [nan]


def test_merge_needs_all_of_the_base(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "llama", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    arguments = ("merge", tmp_path / "base")
    said = failed(*arguments, place / "plain", tmp_path / "out")
    assert "has no values for 'model.norm.weight'" in said
    # Which this adapter has.
    assert run(*arguments, place / "modules_to_save", tmp_path / "out").code == 0


def test_merge_does_not_read_pickles(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "llama", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    failed("merge", tmp_path / "base", place / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# With the adapter of which the merge comes there: tensor by tensor, or in memory.
POINTS = {
    "lora_ext.adapters.streamed_merge.write_tensors": "plain",
    "lora_ext.io.whole_folder._sync": "plain",
    "os.rename": "plain",
    "tempfile.mkdtemp": "modules_to_save",
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("how", ["killed", "Ctrl-C", "full disk"])
def test_interrupted_merge_leaves_nothing_half(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, how: str
) -> None:
    arguments = ("merge", place / "llama", place / POINTS[point], tmp_path / "out")

    def end(*arguments: object, **options: object) -> None:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt if how == "Ctrl-C" else OSError(28, "No space left on device")

    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of the parent's pools are not here
            monkeypatch.setattr(point, end)
            os._exit(run(*arguments).code)
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    expected = {"killed": -9, "Ctrl-C": 130, "full disk": 1}[how]
    assert os.waitstatus_to_exitcode(status) == expected
    left = list(tmp_path.iterdir())
    assert not (tmp_path / "out").exists() and (how == "killed" or not left)
    assert run(*arguments).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing of the killed one


# ---- convert, diff ------------------------------------------------------------------------------


def test_convert_dtype_and_diff(place: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", place / "plain"
    data = run("convert", plain, out, "--dtype", "bfloat16", "--json").json()
    assert data["tensors"] == 12 and data["from"] == data["to"] == "peft"
    found = load_file(out / "adapter_model.safetensors")
    for key, tensor in load_file(plain / "adapter_model.safetensors").items():
        assert torch.equal(found[key], tensor.bfloat16())
    answer = run("diff", plain, out, "--json")
    differences = answer.json()["different"]
    assert answer.code == 1 and len(differences) == 12 and answer.json()["config"] == []
    assert all(0 < one["relative"] <= EPS_BF16 for one in differences)
    assert run("diff", plain, out, "--tolerance", EPS_BF16).code == 0
    assert run("diff", plain, out, "--tolerance", 1e-6).code == 1
    assert "float32 -> bfloat16" in run("diff", plain, out).out
    assert run("verify", out, "--model", place / "llama").code == 0


def test_convert_keeps_an_adapter_that_is_there(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", place / "plain", out).code == 0
    assert run("diff", place / "plain", out).code == 0
    before = contents(out)
    assert "--overwrite" in failed("convert", place / "dora", out, code=2)
    big = edited(place / "plain", tmp_path / "big", with_value(1e6))
    said = failed("convert", big, out, "--dtype", "float16", "--overwrite")
    assert "values up to 1e+06, too large for float16" in said
    assert contents(out) == before
    assert run("convert", place / "dora", out, "--overwrite").code == 0
    assert run("diff", place / "dora", out).code == 0


def test_convert_pissa_to_plain(place: Path, tmp_path: Path) -> None:
    """The plain adapter on the original base is what pissa is on the changed one."""
    out = tmp_path / "out"
    arguments = ("convert", place / "pissa", out)
    assert run(*arguments, "--initial", place / "pissa before").code == 0
    base, inputs = tiny_models.llama()
    expected = LoraModel.from_pretrained(tiny_models.llama()[0], place / "pissa")(**inputs).logits
    found = LoraModel.from_pretrained(base, out)(**inputs).logits
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    # The SVD of pissa itself is not more exact than that.
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    initial = ("--initial", place / "plain", "--overwrite")
    said = failed("convert", place / "plain", out, *initial, code=2)
    assert "is True, expected pissa, olora, corda or lora_ga (PEFT wants True in the" in said


def test_convert_without_embeddings(place: Path, tmp_path: Path) -> None:
    source, out = place / "embedding, lora_bias", tmp_path / "out"
    assert any("embed_tokens" in k and "lora" not in k for k in keys(source))
    assert run("convert", source, out, "--no-embeddings").code == 0
    assert keys(out) == {key for key in keys(source) if "lora_" in key}
    assert run("verify", out, "--model", place / "llama").code == 0
    # What the config asks to save stays.
    kept = tmp_path / "kept"
    assert run("convert", place / "modules_to_save", kept, "--no-embeddings").code == 0
    assert keys(kept) == keys(place / "modules_to_save")


def keys(folder: Path) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


def test_diff(place: Path, tmp_path: Path) -> None:
    answer = run("diff", place / "plain", place / "rslora, ranks", "--json")
    data = answer.json()
    assert answer.code == 1 and len(data["only_a"]) == 12 and len(data["only_b"]) == 12
    fields = {one["field"] for one in data["config"]}
    assert {"r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern"} <= fields
    changed = edited(place / "plain", tmp_path / "changed", of_another_rank)
    data = run("diff", place / "plain", changed, "--json").json()
    assert [one["relative"] for one in data["different"]] == [None, None]
    nan = edited(place / "plain", tmp_path / "nan", with_value(float("nan")))
    assert run("diff", nan, nan).code == 0  # nothing differs
    found = run("diff", place / "plain", nan, "--json")
    assert found.code == 1 and found.json()["different"][0]["max_abs"] is None
    assert run("diff", place / "llama", place / "llama").code == 0
    assert run("diff", place / "llama", place / "llama16", "--tolerance", EPS_BF16).code == 1
    (tmp_path / "empty").mkdir()
    assert "no safetensors files" in failed("diff", tmp_path / "empty", place / "plain", code=2)


# ---- explain ------------------------------------------------------------------------------------


def test_explain(place: Path) -> None:
    base, _ = tiny_models.llama()
    adapted = LoraModel.from_pretrained(base, place / "plain")
    expected = lora_ext.explain(adapted.get_base_model(), 7)
    arguments = ("explain", place / "llama", "--tokens", 7, "--device", "cpu")
    data = run(*arguments, "--adapter", place / "plain", "--json").json()
    rows = [(one["name"], one["path"], one["reason"]) for one in data["layers"]]
    assert rows == [(row.name, row.path, row.reason) for row in expected]
    assert sum(data["paths"].values()) == 6 and data["dtype"] == "float32"
    by_config = run(*arguments, "--config", place / "plain" / "adapter_config.json", "--json")
    assert by_config.json()["layers"] == data["layers"]
    assert run(*arguments, "--json").json()["layers"]  # the usual modules of a llama
    text = run(*arguments, "--dtype", "bfloat16", "--train").out
    assert Q in text and "bfloat16" in text
    assert run(*arguments, "--config", place, "--adapter", place / "plain").code == 2
    if not torch.cuda.is_available():
        cuda = ("explain", place / "llama", "--device", "cuda")
        assert "no CUDA device" in failed(*cuda, code=2)


def test_a_model_of_unknown_kind_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "llama", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    fields = json.loads(file.read_text())
    ran = tmp_path / "ran"
    (tmp_path / "model" / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    for change in (
        {"model_type": "nobody", "architectures": ["Nobody"]},
        {"model_type": "nobody", "auto_map": {"AutoConfig": "code.Nobody"}},
    ):
        file.write_text(json.dumps(fields | change))
        failed("merge", tmp_path / "model", place / "plain", tmp_path / "out")
        failed("explain", tmp_path / "model")
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_explain_and_verify_do_not_initialise_from_weights_that_are_not_there(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*arguments: object, **options: object) -> None:
        raise AssertionError("a factorisation")

    monkeypatch.setattr(torch.linalg, "svd", no)
    for option in ("--adapter", "--config"):
        assert run("explain", place / "llama", option, place / "pissa").code == 0
    assert run("verify", place / "pissa", "--model", place / "llama").code == 0


def test_only_what_needs_transformers_asks_for_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    plain, file = place / "plain", place / "llama" / "model.safetensors"
    for command in (
        ("merge", place / "llama", plain, tmp_path / "out"),
        ("verify", plain, "--model", place / "llama"),
        ("explain", place / "llama"),
    ):
        assert "pip install transformers" in failed(*command, code=2)
    assert run("merge", file, plain, tmp_path / "out").code == 0
    assert run("inspect", plain).code == run("verify", plain).code == 0
    assert run("convert", plain, tmp_path / "converted").code == run("info").code == 0
    assert run("diff", plain, tmp_path / "converted").code == 0


def test_formats_of_the_command_are_those_of_the_library() -> None:
    from lora_ext.cli.convert import FORMATS
    from lora_ext.io import convert

    assert tuple(convert.FORMATS) == FORMATS
