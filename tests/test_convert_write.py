"""Adapters of PEFT that are damaged, or made to do harm: no format writes anything of them."""

from __future__ import annotations

import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import Tensors, values, without
from measured import refused
from safetensors.torch import save_file

from lora_ext.io.convert import FORMATS, convert, recognised

# Whose files are pairs'; gguf's modules are those of a base (test_convert_gguf.py).
TARGETS = [name for name in FORMATS if name not in ("peft", "diffusers", "gguf")]
A, B = "base_model.model.unet.a.lora_A.weight", "base_model.model.unet.a.lora_B.weight"
C, D = "base_model.model.unet.c.lora_A.weight", "base_model.model.unet.c.lora_B.weight"
GOOD: Tensors = {A: values(1, 4, 6), B: values(2, 7, 4)}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["a"]}
BAD: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "no lora_B": (without(GOOD, B), {}, "unet.a"),
    "no lora_A": (without(GOOD, A), {}, "unet.a"),
    "another rank": ({**GOOD, B: values(2, 7, 3)}, {}, "unet.a"),
    "one dimension": ({**GOOD, A: values(2, 7)}, {}, "unet.a"),
    "no rows": ({**GOOD, A: values(2, 0, 6)}, {}, "unet.a"),
    "no columns of lora_B": ({**GOOD, B: values(2, 7, 0)}, {}, "unet.a"),
    "integers": ({**GOOD, A: torch.ones(4, 6, dtype=torch.int32)}, {}, "unet.a"),
    "a kernel and a matrix": ({**GOOD, C: values(1, 4, 3, 3, 3), D: values(2, 6, 4)}, {}, "unet.c"),
    "a wide lora_B": (
        {**GOOD, C: values(1, 4, 3, 3, 3), D: values(2, 6, 4, 3, 3)}, {}, "unet.c",
    ),
    "a larger rank in lora_B": (
        {**GOOD, C: values(1, 4, 3, 3, 3), D: values(2, 6, 7, 1, 1)}, {}, "unet.c",
    ),
    "groups that do not divide": (
        {**GOOD, C: values(1, 4, 4, 3, 3), D: values(2, 5, 2, 1, 1)}, {}, "unet.c",
    ),
    "magnitudes of other rows": (
        {**GOOD, A.replace("lora_A.weight", "lora_magnitude_vector"): values(1, 6)}, {}, "unet.a",
    ),
    "bias of other rows": ({**GOOD, B.replace("weight", "bias"): values(1, 6)}, {}, "unet.a"),
    "another method": (GOOD, {"peft_type": "LOHA"}, "LOHA"),
    "a method that is a list": (GOOD, {"peft_type": ["LORA"]}, "peft_type"),
    "alpha of zero": (GOOD, {"lora_alpha": 0}, "lora_alpha"),
    "alpha below zero": (GOOD, {"lora_alpha": -1}, "lora_alpha"),
    "alpha of 4,000 digits": (GOOD, {"lora_alpha": 10**4000}, "lora_alpha"),
    "alpha a text": (GOOD, {"lora_alpha": "4"}, "lora_alpha"),
    "alpha true": (GOOD, {"lora_alpha": True}, "lora_alpha"),
    "patterns of texts": (GOOD, {"alpha_pattern": {"a": "x"}}, "alpha_pattern"),
    "patterns that are a list": (GOOD, {"alpha_pattern": ["a"]}, "alpha_pattern"),
    "no expression": (GOOD, {"alpha_pattern": {"a(": 1}}, "alpha_pattern"),
    "an expression with counts": (GOOD, {"alpha_pattern": {"(a{999}){999}": 1}}, "alpha_pattern"),
    "an expression of 100,000": (GOOD, {"alpha_pattern": {"a|" * 50_000: 1}}, "alpha_pattern"),
    "replicated layers": (GOOD, {"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "tokens": (GOOD, {"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token"),
    "block-diagonal": (GOOD, {"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "activated": (GOOD, {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
}  # fmt: skip


def saved(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_the_undamaged_one_is_written(target: str, tmp_path: Path) -> None:
    tensors = {**GOOD, C: values(1, 4, 4, 3, 3), D: values(2, 6, 4, 1, 1)}
    out = tmp_path / "out.safetensors"
    convert(saved(tmp_path / "adapter", tensors, CONFIG), out, target=target)
    assert recognised(out) == target


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_written(case: str, target: str, tmp_path: Path) -> None:
    tensors, fields, names = BAD[case]
    folder, out = tmp_path / "adapter", tmp_path / "out.safetensors"
    saved(folder, tensors, {**CONFIG, **fields})
    said = refused(lambda: convert(folder, out, target=target))
    assert (str(out) in said or str(folder) in said) and names in said, said
    assert not out.exists()


@pytest.mark.parametrize("target", [*TARGETS, "peft", "gguf"])
def test_a_file_that_does_not_fit_is_named(target: str, tmp_path: Path) -> None:
    """As on a full disk: what the system says has no name of a file."""
    tensors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": values(1, *shape)
        for part, shape in (("A", (4, 512)), ("B", (512, 4)))
    }
    folder = saved(tmp_path / "adapter", tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 4})
    fields = {"model_type": "qwen2", "num_hidden_layers": 1}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(fields))
    options: dict[str, Any] = {"base": tmp_path / "base"} if target == "gguf" else {}
    if target == "kohya":
        options["component"] = "unet"
    if target == "gguf":
        pytest.importorskip("gguf")
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out" if target == "peft" else tmp_path / "out.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            convert(folder, out, target=target, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno is not None and raised.value.strerror
    place = tempfile.gettempdir() if target == "gguf" else str(tmp_path)
    assert str(raised.value.filename).startswith(place)
    assert [path for path in sorted(tmp_path.iterdir()) if path != out] == before
