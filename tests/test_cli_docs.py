"""docs/cli.md: every example prints what it says. `LORA_EXT_WRITE_DOCS=1` writes what it prints."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from cli_runs import run
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import tiny_models

import lora_ext
from lora_ext import LoraConfig, LoraModel

PAGE = Path(lora_ext.__file__).parent.parent / "docs" / "cli.md"
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
ELSEWHERE = ("info", "doctor", "explain")  # depend on the machine
INSTALLED = "/venv/lib/python3.11/site-packages/lora_ext"  # for the page
CODES = {"diff adapter later": 1, "verify broken": 1}


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base, _ = tiny_models.llama()
    base.save_pretrained("llama")  # type: ignore[operator]
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], base_model_name_or_path="llama"
    )
    torch.manual_seed(0)
    model = LoraModel(base, config)
    for name, where in (("adapter", "lora_"), ("later", "lora_B")):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if where in key:
                    parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(name)
    model.save_pretrained("broken")
    tensors = load_file("broken/adapter_model.safetensors")
    first, *_, last = sorted(tensors)
    tensors[first][0, 0] = float("nan")
    tensors[last] = tensors[last][:, :3].contiguous()
    save_file(tensors, "broken/adapter_model.safetensors", {"format": "pt"})
    assert run("convert", "adapter", "small", "--dtype", "bfloat16").code == 0
    return tmp_path


def answers(commands: list[str]) -> str:
    """What the commands print, as the page has it."""
    text = ""
    for command in commands:
        found = run(*shlex.split(command))
        assert found.code == CODES.get(command, 0), (command, found)
        text += f"$ lora-ext {command}\n{found.out.lstrip(chr(10))}"
    return text.replace(str(Path(lora_ext.__file__).parent), INSTALLED)


def without_sizes(text: str) -> str:
    """config.json has another size with another transformers."""
    return re.sub(r"[\d.]+ [KM]iB", "SIZE", text)


def test_examples_print_what_the_page_says(examples: Path) -> None:
    if not PAGE.exists():
        pytest.skip("docs/ is not here: an installed copy is tested")
    page = PAGE.read_text()
    blocks = BLOCK.findall(page)
    assert len(blocks) >= 8
    for block in blocks:
        commands = re.findall(r"^\$ lora-ext (.*)$", block, re.MULTILINE)
        found = answers(commands)
        if "LORA_EXT_WRITE_DOCS" in os.environ:
            page = page.replace(f"```console\n{block}```", f"```console\n{found}```")
        elif commands[0].split()[0] not in ELSEWHERE:
            assert without_sizes(block) == without_sizes(found)
        else:
            assert block.count("\n") > 3
    if "LORA_EXT_WRITE_DOCS" in os.environ:
        PAGE.write_text(page)


def test_every_command_has_a_chapter_and_a_line() -> None:
    if not PAGE.exists():
        pytest.skip("docs/ is not here: an installed copy is tested")
    from lora_ext.cli.program import program

    page = PAGE.read_text()
    for name in program.commands:
        assert f"\n## {name}\n" in page and f"\n| `{name}" in page
