"""torch.export of layers and models, and programs compiled ahead of time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compile_changes import KINDS, first, made
from tiny_models import BUILDERS
from torch import nn

from lora_ext import LoraConfig, get_lora_model

each_way = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


@each_way
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, strict: bool) -> None:
    layer, args = made(kind)
    layer.eval().requires_grad_(False)
    program = torch.export.export(layer, args, strict=strict)
    assert torch.equal(first(program.module()(*args)), first(layer(*args)))


@each_way
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_of_transformers(family: str, strict: bool) -> None:
    model, inputs = BUILDERS[family]()
    del inputs["labels"]
    model.config.use_cache = False
    model = get_lora_model(model, LoraConfig(r=2, init_lora_weights=False)).eval()
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=strict)
        assert torch.equal(program.module()(**inputs).logits, model(**inputs).logits)


def made_model() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    config = LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=False)
    return get_lora_model(net, config).eval()


def exported(model: Any) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=2, max=512)
    # The model takes *args: one tuple.
    return torch.export.export(model, (torch.randn(4, 16),), dynamic_shapes=(({0: rows},),))


def test_a_saved_program_runs_any_number_of_rows(tmp_path: Path) -> None:
    model = made_model()
    torch.export.save(exported(model), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for rows in (2, 9):
        x = torch.randn(rows, 16)
        assert torch.equal(program(x), model(x))


DOCS = Path(__file__).parent.parent / "docs" / "compile.md"


def test_the_examples_of_the_docs_run(tmp_path: Path) -> None:
    if not DOCS.exists():
        pytest.skip("docs/ is not here: an installed copy is tested")
    program = "".join(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL))
    # Compiled ahead of time too: a C++ compiler is called, and the results are compared.
    assert "aoti_load_package" in program and "assert_close" in program
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / "compiled.pt2").exists()
